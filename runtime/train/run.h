// A run of mtrun over a corpus: training, in stages and with setbacks, from where an earlier run stopped; evaluation;
// generation.
#ifndef MT_RUNTIME_TRAIN_RUN_H_
#define MT_RUNTIME_TRAIN_RUN_H_

#include <string>

#include "absl/status/status.h"
#include "ir/base/flags.h"
#include "proto/plan.pb.h"

namespace mt {

// What the flags ask for of the plan at `path`. SIGINT and SIGTERM end a training run at a checkpoint.
// Errors: InvalidArgument (flags that do not go together), NotFound, FailedPrecondition (corpus, weights, checkpoint),
// ResourceExhausted (memory), OutOfRange (numbers that are not finite), DataLoss (a write failed), Cancelled
// (interrupted).
absl::Status RunPlan(const ParsedArgs& args, const std::string& path, proto::PlanProto plan);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_RUN_H_
