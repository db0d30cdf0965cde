// A timeline of one step for Perfetto: measured slices by phase, and a counter of live bytes.
#ifndef MT_RUNTIME_TRACE_H_
#define MT_RUNTIME_TRACE_H_

#include <string>

#include "absl/status/status.h"
#include "runtime/executor.h"

namespace mt {

// Runs the program once, instruction by instruction, and writes Chrome's trace format: one track with the phases, one
// with the instructions (op, path, FLOPs, bytes), counters of live bytes by class. Inputs must be set. Errors: DataLoss
// (failed write).
absl::Status WriteTrace(Executor& executor, const Program& program, const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_TRACE_H_
