// Where a training loop stands: what it finds again after a checkpoint, beside the states of the plan.
#ifndef MT_RUNTIME_TRAIN_TRAIN_STATE_H_
#define MT_RUNTIME_TRAIN_TRAIN_STATE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "ir/base/json.h"
#include "runtime/train/lr_schedule.h"

namespace mt {

struct TrainState {
  int64_t steps = 0;     // Optimizer steps that are done.
  int64_t samples = 0;   // Sequences of the corpus's endless order (SampleOrder) that have been used ...
  int64_t sequence = 0;  // ... in sequences of so many tokens; 0: none were used.
  int64_t tokens = 0;
  int64_t skipped_steps = 0;  // By loss scaling; among `steps`.
  double seconds = 0, last_loss = 0;
  LrSchedule::Plateau plateau;
  // Early stopping: the least loss of an evaluation, and how many have come since.
  double best_val = 1e300;
  int64_t evals_since_best = 0;
  // The guard: the running mean of the loss, over how many steps; how often the run went back in a row, the factor of
  // the learning rate since, and the last step that it holds for.
  double mean_loss = 0;
  int64_t mean_steps = 0;
  int64_t setbacks = 0;
  double lr_factor = 1;
  int64_t backs_off_until = 0;
};

// The same place of the corpus in sequences of another length: the next one that starts there or later. What is
// measured by the loss of sequences as they were (the running mean) starts anew. REQUIRES: sequence >= 1.
void CountInSequences(int64_t sequence, TrainState* state);

// Numbers come back to the bit; where they are not finite they are null.
nlohmann::ordered_json ToJson(const TrainState& state);
// Untrusted. Errors: FailedPrecondition (names the member).
absl::StatusOr<TrainState> TrainStateFromJson(const nlohmann::json& json);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_TRAIN_STATE_H_
