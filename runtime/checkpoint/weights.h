// Weights as a safetensors file: parameters under their names with their logical shapes.
#ifndef MT_RUNTIME_CHECKPOINT_WEIGHTS_H_
#define MT_RUNTIME_CHECKPOINT_WEIGHTS_H_

#include <string>

#include "absl/status/status.h"
#include "runtime/executor.h"

namespace mt {

// Errors: DataLoss.
absl::Status SaveWeights(Executor& executor, const std::string& path);
// Errors: NotFound, FailedPrecondition (a parameter is missing or has another shape; names both).
absl::Status LoadWeights(Executor& executor, const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_CHECKPOINT_WEIGHTS_H_
