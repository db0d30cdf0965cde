// AdamW's moments in 8 bits.
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/dynamic_map.h"
#include "passes/registry.h"
#include "passes/states.h"

namespace mt {
namespace {

// Tensors with fewer elements keep f32 moments, as in the paper's section 2.3.
constexpr int64_t kLeastElements = 4096;

constexpr size_t kP = 0, kM = 1, kV = 2;

// The states m and v of an update `adamw` become codes, with a state of scales each; the update becomes `adamw8bit`.
absl::Status Quantize(Module& module, Graph& graph, Node* update) {
  const std::vector<Value> operands(update->operands().begin(), update->operands().end());
  const Attrs attrs = update->attrs();
  const std::string name = update->name();
  const Phase phase = update->phase();
  if (!update->uses().empty()) {
    return absl::InternalError(absl::StrCat("update \"", name, "\" has readers; expected outputs alone"));
  }
  struct Slot {
    Output output;  // Of the old update.
    size_t result;
  };
  std::vector<Output> kept;
  std::vector<Slot> slots;
  size_t place = 0;  // In `kept`, of the update's outputs.
  for (const Output& output : graph.outputs()) {
    if (output.value.node != update) {
      kept.push_back(output);
      continue;
    }
    if (slots.empty()) place = kept.size();
    slots.push_back({output, static_cast<size_t>(output.value.index)});
  }
  graph.SetOutputs(kept);
  graph.RemoveNode(update);

  const TensorType& p = operands[kP].type();
  const TensorType codes = {DType::kU8, p.dims};
  const TensorType scales = {DType::kF32, {(p.num_elements() + kQuantizedBlock - 1) / kQuantizedBlock}};
  std::vector<Value> moments, scale_inputs;
  for (const size_t k : {kM, kV}) {
    Node* old = operands[k].node;
    const std::string state_name = old->name();
    State* state = old->is_input() ? module.MutableState(state_name) : nullptr;
    if (state == nullptr || state->role != Role::kOptimizerState || !old->uses().empty()) {
      return absl::InternalError(absl::StrCat("update \"", name, "\": its moments are no states of its own"));
    }
    graph.RemoveInput(old);
    state->type = codes;
    ASSIGN_OR_RETURN(const Value moment, graph.AddInput(state_name, codes, Role::kOptimizerState));
    ASSIGN_OR_RETURN(
        const Value scale,
        AddState(module, graph,
                 {.name = absl::StrCat(k == kM ? "adamw.m_scale." : "adamw.v_scale.", operands[kP].node->name()),
                  .type = scales,
                  .logical_dims = {},
                  .role = Role::kOptimizerState}));
    moments.push_back(moment);
    scale_inputs.push_back(scale);
  }
  std::vector<Value> quantized = {operands[kP], moments[0], moments[1], scale_inputs[0], scale_inputs[1]};
  quantized.insert(quantized.end(), operands.begin() + kV + 1, operands.end());
  ASSIGN_OR_RETURN(Node * node, graph.AddNode(*FindOp("adamw8bit"), quantized, attrs, name));
  graph.SetNodePhase(node, phase);

  std::vector<Output> added;
  for (const Slot& slot : slots) {
    Node* donates = slot.result == kP ? operands[kP].node : moments[slot.result - 1].node;
    added.push_back({node->result(static_cast<int>(slot.result)), slot.output.name, donates});
  }
  for (size_t k = 0; k < 2; ++k) {
    added.push_back({node->result(static_cast<int>(k) + 3), scale_inputs[k].node->name(), scale_inputs[k].node});
  }
  kept.insert(kept.begin() + static_cast<int64_t>(place), added.begin(), added.end());
  graph.SetOutputs(std::move(kept));
  return absl::OkStatus();
}

absl::StatusOr<bool> Adamw8bit(Module& module, const Attrs&, PassContext& context) {
  int64_t updates = 0, quantized = 0;
  for (const auto& graph : module.graphs()) {
    for (Node* node : graph->Nodes()) {
      if (node->is_input() || node->op().name != "adamw") continue;
      ++updates;
      if (node->operands()[kP].type().num_elements() < kLeastElements) continue;
      RETURN_IF_ERROR(Quantize(module, *graph, node));
      ++quantized;
    }
  }
  if (updates == 0) {
    return absl::InvalidArgumentError(
        "no parameter is updated by adamw, whose moments it makes smaller; use --optimizer adamw or leave it out");
  }
  if (quantized == 0) {
    context.warnings.push_back(absl::StrCat("adamw8bit: no parameter has ", kLeastElements,
                                            " elements, so all moments stay f32; leave it out"));
  }
  return quantized > 0;
}

constexpr absl::string_view kAlsoKnownAs[] = {"adam8bit", "8bit_adam", "bnb", "paged_adamw_8bit", "optim_8bit"};

}  // namespace

const PassDef kAdamw8bitPass = {
    .name = "adamw8bit",
    .summary =
        "AdamW's moments as 8-bit codes of a dynamic map, scaled block by block of 256 elements; parameters of "
        "fewer than 4,096 elements keep f32 moments.",
    .requires_stage = Stage::kOptimized,
    .provides_stage = Stage::kOptimized,
    .source = "Dettmers et al., \"8-bit Optimizers via Block-wise Quantization\" (2022)",
    .tolerance = 1e-2,
    .also_known_as = kAlsoKnownAs,
    .run = Adamw8bit,
};

}  // namespace mt
