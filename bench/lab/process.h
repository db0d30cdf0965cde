// Child processes of the lab.
#ifndef MT_BENCH_LAB_PROCESS_H_
#define MT_BENCH_LAB_PROCESS_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

struct ProcessResult {
  int code = 0;     // Exit code; 128 + signal for one that a signal ended.
  std::string err;  // Standard error, its last megabyte.
};

// Runs arguments[0] with `arguments`, standard input empty. Standard output goes to the file `out_path`, each line also
// to `on_line` as it comes (may be null). The child dies with this process. SIGINT and SIGTERM to this process are
// passed on to the child. Errors: Internal (cannot start), DataLoss (out_path).
absl::StatusOr<ProcessResult> RunProcess(const std::vector<std::string>& arguments, const std::string& out_path,
                                         const std::function<void(absl::string_view)>& on_line);

// Whether SIGINT or SIGTERM came while a child ran or between two.
bool Interrupted();
// From now on the two signals set Interrupted().
void CatchInterrupts();

// As bash would take it, quoted where needed.
std::string CommandLine(const std::vector<std::string>& arguments);

}  // namespace mt

#endif  // MT_BENCH_LAB_PROCESS_H_
