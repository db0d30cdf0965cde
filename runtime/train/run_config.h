// mtrun --config FILE: flags from a textproto, and --show-config: each value with where it came from.
#ifndef MT_RUNTIME_TRAIN_RUN_CONFIG_H_
#define MT_RUNTIME_TRAIN_RUN_CONFIG_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/base/flags.h"
#include "proto/run_config.pb.h"

namespace mt {

// The flags that are set: ("weight-decay", "0.1"). Numbers come back to the bit.
std::vector<std::pair<std::string, std::string>> FlagsOf(const proto::RunConfig& config);

struct ConfiguredArguments {
  std::vector<std::string> arguments;   // Those of the file first, so that those that are typed win.
  std::vector<std::string> from_files;  // Names of the flags that the files set.
  std::string files;                    // As they were typed.
};
// Reads each --config FILE among `arguments`. Errors: NotFound, InvalidArgument (names file, line and fact).
absl::StatusOr<ConfiguredArguments> ReadConfigs(absl::Span<const std::string> arguments);

// A line a flag: name, value, origin ("default", "command line" or the file). `typed`: the arguments without the
// file's.
std::string ConfigTable(const ToolDef& tool, const ParsedArgs& args, const ParsedArgs& typed,
                        const ConfiguredArguments& configured);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_RUN_CONFIG_H_
