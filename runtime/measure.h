// What a step really does to memory, as the machine says it: not an echo of the plan.
#ifndef MT_RUNTIME_MEASURE_H_
#define MT_RUNTIME_MEASURE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/allocations.h"
#include "runtime/executor.h"

namespace mt {

struct PhaseMeasurement {
  std::string phase;
  int64_t planned_bytes = 0;    // Results of the phase's instructions, in whole granules.
  int64_t measured_bytes = 0;   // Of those, how many bytes changed, plus what changed outside; workspaces apart.
  int64_t workspace_bytes = 0;  // Changed bytes of the phase's workspaces: at most the plan's.
};

struct Measurement {
  int64_t planned_arena_bytes = 0;
  int64_t measured_arena_bytes = 0;  // End of the last granule that a step changed.
  int64_t idle_workspace_bytes = 0;  // From there to the plan's end, where that is workspace that no kernel touched.
  std::vector<PhaseMeasurement> phases;
  std::vector<std::string> differences;  // By buffer; empty: the measurement agrees with the plan.
  bool same_over_poisons = true;         // Outputs and states are the same bits over two poisons.
  bool counted_allocations = false;
  AllocationCounts allocations;  // Of one step after load.

  bool agrees() const { return differences.empty() && same_over_poisons && allocations.count == 0; }
};

// Runs `program` three times, each time from the same states.
//   Once instruction by instruction, memory poisoned where a buffer's life begins and where it has ended: a byte that
//   changes in another live buffer or behind the end of its own, or an end that is not filled, is a difference, and the
//   measurement stops there. Then phase by phase, twice, over two different poisons.
//   Before a phase, every granule (256 bytes) that the plan says is not live across the boundary is poisoned, and every
//   granule is hashed; after it, the granules whose hash changed are the bytes written. What changed outside the plan's
//   written ranges, or did not change inside (but for zeros written in place over zeros), is a difference. A poison
//   that reaches a result is a read before a write: the runs then differ.
// `prepare` feeds the inputs (after each poisoning); `restore` sets the states to what they were. Optimizer states are
// given nonzero values for the duration, so that every element that the plan says is updated does change;
//   sums of gradients, too, unless the program reads batches: a step begins with sums of zero.
// Takes host memory for two hashes a granule. Errors: InvalidArgument (null backend, or guarded buffers).
absl::StatusOr<Measurement> MeasureProgram(Executor& executor, const Program& program,
                                           const std::function<absl::Status()>& prepare,
                                           const std::function<absl::Status()>& restore);

// Of programs that run one after another: bytes of each phase added up, the larger arena, all differences.
Measurement Together(const Measurement& a, const Measurement& b);

// The process's resident bytes now, and their maximum since ResetPeakResidentBytes (or the start).
int64_t ResidentBytes();
int64_t PeakResidentBytes();
// Of those now, what the process wrote itself: without the pages of files that it maps, such as a corpus.
int64_t AnonymousBytes();
void ResetPeakResidentBytes();

}  // namespace mt

#endif  // MT_RUNTIME_MEASURE_H_
