// A timeline of one step for Perfetto: measured slices by phase, and a counter of live bytes.
#ifndef MT_RUNTIME_TRACE_H_
#define MT_RUNTIME_TRACE_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "runtime/executor.h"

namespace mt {

// One execution of a program, and what sets its inputs before.
struct TracedRun {
  const Program* program;
  std::function<absl::Status()> prepare;
};

// Runs the programs one after another, instruction by instruction, and writes Chrome's trace format: one track with the
// phases, one with the instructions (op, path, FLOPs, bytes), counters of live bytes by class. Errors: those of
// `prepare`, DataLoss (failed write).
absl::Status WriteTrace(Executor& executor, absl::Span<const TracedRun> runs, const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_TRACE_H_
