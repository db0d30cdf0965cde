// Flags under the names that other trainers give them: `mtc train` takes these as well.
#ifndef MT_IR_BASE_ALIASES_H_
#define MT_IR_BASE_ALIASES_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mt {

struct FlagAlias {
  absl::string_view name;  // With '-'; '_' is equal.
  enum Kind {
    kRename,    // --name VALUE: `to` is the flag that takes the value.
    kSet,       // --name VALUE: --set `to`=VALUE.
    kPass,      // --name, --name true|false: the pass `to`, or not.
    kPassWith,  // --name VALUE: the pass `to` followed by the value.
    kSwitch,    // --name, --name true|false: the arguments `to`, or nothing.
  } kind;
  absl::string_view to;
};

// The table.
absl::Span<const FlagAlias> TrainAliases();

// `arguments` of mtc with the aliases of "train" spelled out; others as they are. The passes that aliases name become
// one --passes, in any order typed. Errors: InvalidArgument (a value is missing or no truth value; --passes is there
// too).
absl::StatusOr<std::vector<std::string>> ExpandAliases(absl::Span<const std::string> arguments);

}  // namespace mt

#endif  // MT_IR_BASE_ALIASES_H_
