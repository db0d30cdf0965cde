// Where numbers stopped being numbers.
#ifndef MT_RUNTIME_TRAIN_NOT_FINITE_H_
#define MT_RUNTIME_TRAIN_NOT_FINITE_H_

#include <string>

#include "runtime/executor.h"
#include "runtime/train/trainer.h"

namespace mt {

// Runs the first microbatch of the step that ended in `failed` and names the first instruction with a NaN in an f32
// result: 'the first result that is no number is of matmul "h3.mlp.up"'. "" where there is none, or where the host
// cannot look. REQUIRES: the states are those before the step.
std::string FirstNotFinite(Executor& executor, Trainer& trainer, const TrainOptions& options, const TrainState& failed);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_NOT_FINITE_H_
