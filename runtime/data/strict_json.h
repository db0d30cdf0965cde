// JSON from untrusted files, as a tree.
#ifndef MT_RUNTIME_DATA_STRICT_JSON_H_
#define MT_RUNTIME_DATA_STRICT_JSON_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/base/json.h"

namespace mt {

// Errors: FailedPrecondition (syntax, a key given twice, nested deeper than 64, not an object).
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_STRICT_JSON_H_
