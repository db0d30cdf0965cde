// Names that passes agree on, and states that they add.
#ifndef MT_PASSES_STATES_H_
#define MT_PASSES_STATES_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/base/status_macros.h"
#include "ir/graph.h"

namespace mt {

// Outputs of @train: what autodiff differentiates in place of "loss" where it is there, the gradient of a parameter.
inline constexpr absl::string_view kScaledLossOutput = "scaled_loss";
inline constexpr absl::string_view kGradientPrefix = "grad.";
// States of fp16, f32[] and i32[].
inline constexpr absl::string_view kLossScaleState = "loss_scale", kGoodStepsState = "loss_scale.good_steps";
// States of accumulate, f32[], beside grad.NAME: sums over the microbatches so far, all in the same unit.
inline constexpr absl::string_view kAccumulatedLoss = "accumulated.loss", kAccumulatedTokens = "accumulated.tokens";
// How many microbatches make up the fact "batch".
inline constexpr absl::string_view kMicrobatchesFact = "microbatches";

// Adds a state to the module and its input to the graph. Errors: InvalidArgument (the name is taken, a bad type).
inline absl::StatusOr<Value> AddState(Module& module, Graph& graph, const State& state) {
  RETURN_IF_ERROR(module.AddState(state));
  return graph.AddInput(state.name, state.type, state.role);
}

}  // namespace mt

#endif  // MT_PASSES_STATES_H_
