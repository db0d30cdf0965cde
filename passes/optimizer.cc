// Clipping and the update of every parameter.
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "passes/registry.h"
#include "passes/states.h"

namespace mt {
namespace {

absl::StatusOr<Value> AddOptimizerState(Module& module, Graph& graph, absl::string_view name, const TensorType& type,
                                        const Dims& logical_dims) {
  return AddState(
      module, graph,
      {.name = std::string(name), .type = type, .logical_dims = logical_dims, .role = Role::kOptimizerState});
}

// The graph's input of a state that the module has.
absl::StatusOr<Value> StateInput(const Module& module, Graph& graph, absl::string_view name) {
  if (Node* input = graph.FindInput(name); input != nullptr) return input->result();
  const State* state = module.FindState(name);
  if (state == nullptr) return absl::FailedPreconditionError(absl::StrCat("the module has no state ", name));
  return graph.AddInput(name, state->type, state->role);
}

struct Gradients {
  absl::flat_hash_map<std::string, Value> of;  // By parameter.
  std::vector<Value> all;                      // In the order of the parameters.
  Value divisor;                               // What all are multiplied by: tokens, the loss scale, both; or nothing.
};

// Adds the updates of all parameters that are inputs of `graph`. Where there is a loss scale, a step whose gradients
// are not finite changes nothing but the scale.
absl::Status AddUpdates(Module& module, Graph& graph, const Attrs& options, Gradients gradients,
                        std::vector<Output> outputs) {
  const std::string& kind = options.Get<std::string>("kind");
  Builder builder(graph);
  builder.set_path("optimizer");
  const TensorType f32{DType::kF32, {}}, f64{DType::kF64, {}}, i32{DType::kI32, {}};
  const Value lr = builder.Input("lr", f32, Role::kStep);
  const Value beta1 = builder.Input("beta1", f64, Role::kStep);
  const Value beta2 = builder.Input("beta2", f64, Role::kStep);
  const Value eps = builder.Input("eps", f32, Role::kStep);
  const Value weight_decay = builder.Input("weight_decay", f32, Role::kStep);
  const Value grad_clip = builder.Input("grad_clip", f32, Role::kStep);
  const Value beta1_f32 = builder.Op("cast", {beta1}, {{"to", DType::kF32}}, "beta1");
  const Value beta2_f32 = builder.Op("cast", {beta2}, {{"to", DType::kF32}}, "beta2");

  std::vector<Value> apply;  // Whether to update: nothing, where that is always so.
  Value divisor = gradients.divisor;
  const bool scaled = module.FindState(kLossScaleState) != nullptr;
  Value norm, loss_scale;
  if (scaled) {
    ASSIGN_OR_RETURN(loss_scale, StateInput(module, graph, kLossScaleState));
    divisor = divisor ? builder.Op("mul", {divisor, loss_scale}, {}, "divisor") : loss_scale;
  }
  if (!divisor) {
    norm = builder.Op("global_norm", gradients.all, {}, "grad_norm");
  } else {
    norm = builder.Op("global_norm", gradients.all, {}, "undivided_norm");
  }
  if (scaled) {
    ASSIGN_OR_RETURN(const Value good_steps, StateInput(module, graph, kGoodStepsState));
    const std::vector<Value> next = builder.Ops("loss_scale_step", {loss_scale, good_steps, norm},
                                                {{"interval", options.Int("loss_scale_interval")}}, "loss_scale");
    RETURN_IF_ERROR(builder.status());
    outputs.push_back({next[0], std::string(kLossScaleState), loss_scale.node});
    outputs.push_back({next[1], std::string(kGoodStepsState), good_steps.node});
    outputs.push_back({next[2], "applied", nullptr});
    apply = {next[2]};
  }
  if (divisor) norm = builder.Op("div", {norm, divisor}, {}, "grad_norm");
  Value grad_scale = builder.Op("clip_scale", {norm, grad_clip}, {}, "grad_scale");
  if (divisor) grad_scale = builder.Op("div", {grad_scale, divisor}, {}, "divided_grad_scale");
  const std::string step_name = absl::StrCat(kind, ".t");
  ASSIGN_OR_RETURN(const Value t, AddOptimizerState(module, graph, step_name, i32, {}));
  std::vector<Value> operands = {t, beta1, beta2};
  operands.insert(operands.end(), apply.begin(), apply.end());
  const std::vector<Value> step = builder.Ops("adam_step", operands, {{"apply", scaled}}, "step");
  RETURN_IF_ERROR(builder.status());
  outputs.push_back({norm, "grad_norm", nullptr});

  const std::vector<Node*> inputs(graph.inputs().begin(), graph.inputs().end());
  for (Node* parameter : inputs) {
    if (parameter->role() != Role::kParameter) continue;
    const std::string& name = parameter->name();
    const auto gradient = gradients.of.find(name);
    if (gradient == gradients.of.end()) {
      return absl::FailedPreconditionError(absl::StrCat("parameter ", name, " has no output grad.", name));
    }
    const State* state = module.FindState(name);
    const Dims logical_dims = state->logical_dims;  // Adding states moves the table.
    const TensorType moments{DType::kF32, state->type.dims};
    const std::string m_name = absl::StrCat(kind, ".m.", name), v_name = absl::StrCat(kind, ".v.", name);
    ASSIGN_OR_RETURN(const Value m, AddOptimizerState(module, graph, m_name, moments, logical_dims));
    ASSIGN_OR_RETURN(const Value v, AddOptimizerState(module, graph, v_name, moments, logical_dims));
    const Value p = parameter->result();
    builder.set_path(name);
    operands = {p, m, v, gradient->second, lr, beta1_f32, beta2_f32, eps, weight_decay, step[1], step[2], grad_scale};
    operands.insert(operands.end(), apply.begin(), apply.end());
    const std::vector<Value> updated =
        builder.Ops(kind, operands, {{"decay", p.type().rank() >= 2}, {"apply", scaled}}, "update");
    RETURN_IF_ERROR(builder.status());
    outputs.push_back({updated[0], name, parameter});
    outputs.push_back({updated[1], m_name, m.node});
    outputs.push_back({updated[2], v_name, v.node});
  }
  outputs.push_back({step[0], step_name, t.node});
  graph.SetOutputs(std::move(outputs));
  return absl::OkStatus();
}

// In @train itself, from its outputs grad.NAME, which are outputs no longer.
absl::Status UpdateInTrain(Module& module, Graph& train, const Attrs& options) {
  std::vector<Output> outputs;
  Gradients gradients;
  for (const Output& output : train.outputs()) {
    absl::string_view name = output.name;
    if (!absl::ConsumePrefix(&name, kGradientPrefix)) {
      outputs.push_back(output);
      continue;
    }
    gradients.of[std::string(name)] = output.value;
    gradients.all.push_back(output.value);
  }
  const Phase phase = train.phase();
  train.set_phase(Phase::kOptimizer);
  const absl::Status status = AddUpdates(module, train, options, std::move(gradients), std::move(outputs));
  train.set_phase(phase);
  return status;
}

// In a graph @apply of its own: the sums over the microbatches are read, divided by the tokens, and zeroed.
absl::Status UpdateInApply(Module& module, const Graph& train, const Attrs& options) {
  if (module.FindGraph("apply") != nullptr) {
    return absl::InvalidArgumentError("the module has a graph @apply already; rename it");
  }
  Graph& graph = *module.AddGraph("apply");
  graph.set_phase(Phase::kOptimizer);
  Gradients gradients;
  std::vector<Value> sums;
  for (const Node* parameter : train.inputs()) {
    if (parameter->role() != Role::kParameter) continue;
    ASSIGN_OR_RETURN(const Value unused, StateInput(module, graph, parameter->name()));
    ASSIGN_OR_RETURN(const Value sum, StateInput(module, graph, absl::StrCat(kGradientPrefix, unused.node->name())));
    gradients.of[parameter->name()] = sum;
    gradients.all.push_back(sum);
  }
  sums = gradients.all;
  ASSIGN_OR_RETURN(const Value loss_sum, StateInput(module, graph, kAccumulatedLoss));
  ASSIGN_OR_RETURN(const Value tokens, StateInput(module, graph, kAccumulatedTokens));
  sums.push_back(loss_sum);
  sums.push_back(tokens);
  gradients.divisor = tokens;
  Builder builder(graph);
  const Value loss = builder.Op("div", {loss_sum, tokens}, {}, "loss.mean");
  RETURN_IF_ERROR(builder.status());
  RETURN_IF_ERROR(AddUpdates(module, graph, options, std::move(gradients), {{loss, "loss", nullptr}}));
  for (const Value& sum : sums) {
    const Dims& dims = sum.type().dims;
    const Value zero = builder.Op("fill", {}, {{"dims", IntList(dims.begin(), dims.end())}, {"value", 0.0}},
                                  absl::StrCat(sum.node->name(), ".zero"));
    RETURN_IF_ERROR(builder.status());
    graph.AddOutput(zero, sum.node->name(), sum.node);
  }
  graph.set_stage(Stage::kOptimized);
  return absl::OkStatus();
}

absl::StatusOr<bool> Optimizer(Module& module, const Attrs& options, PassContext&) {
  if (options.Get<std::string>("kind") == "none") return false;
  Graph& train = *module.FindGraph("train");
  const State* tokens = module.FindState(kAccumulatedTokens);
  const bool accumulates = tokens != nullptr && tokens->role == Role::kGradient;
  RETURN_IF_ERROR(accumulates ? UpdateInApply(module, train, options) : UpdateInTrain(module, train, options));
  train.set_stage(Stage::kOptimized);
  return true;
}

constexpr PassOption kOptions[] = {
    {.name = "kind",
     .kind = AttrKind::kString,
     .doc = "adamw (decoupled decay), adam (decay added to the gradient), none (gradients stay outputs)",
     .default_text = "adamw",
     .choices = "adamw|adam|none"},
    {.name = "loss_scale_interval",
     .kind = AttrKind::kInt,
     .doc = "steps with finite gradients in a row after which fp16's loss scale doubles",
     .default_text = "2000",
     .min = 1},
};

}  // namespace

const PassDef kOptimizerPass = {
    .name = "optimizer",
    .summary = "Adds the gradient norm, clipping and the update of every parameter; weights of rank 2 and more decay.",
    .options = kOptions,
    .requires_stage = Stage::kTraining,
    .provides_stage = Stage::kOptimized,
    .source = "Loshchilov and Hutter, \"Decoupled Weight Decay Regularization\" (2019), algorithm 2",
    .always_on = true,
    .run = Optimizer,
};

}  // namespace mt
