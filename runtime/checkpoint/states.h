// A loaded plan's states as a checkpoint holds them, and back.
#ifndef MT_RUNTIME_CHECKPOINT_STATES_H_
#define MT_RUNTIME_CHECKPOINT_STATES_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/executor.h"

namespace mt {

// "adamw" of "adamw.m.head.weight": states of an optimizer that are of use together alone.
std::string StateGroup(const std::string& name);

// Copies parameters and optimizer state, without padding, into host memory that `states` keeps between calls. Sums over
// microbatches are left out: between steps they are zero.
void SnapshotStates(Executor& executor, std::vector<SavedState>* states);

// Parameters and optimizer state from a checkpoint of the same model; padding, precision and the optimizer of the plan
// may differ. REQUIRES: the states have their initial values. Returns what starts fresh, in words: all of an
// optimizer's states do where one of them is missing or has another type or shape. Errors: FailedPrecondition (a
// parameter is missing or has another shape).
absl::StatusOr<std::vector<std::string>> RestoreStates(Executor& executor, const CheckpointReader& checkpoint);

// The same from a snapshot of another plan's states, which need not be there any more.
absl::StatusOr<std::vector<std::string>> RestoreStates(Executor& executor, absl::Span<const SavedState> states);

}  // namespace mt

#endif  // MT_RUNTIME_CHECKPOINT_STATES_H_
