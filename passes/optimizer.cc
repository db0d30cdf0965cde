// Clipping and the update of every parameter.
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "passes/registry.h"

namespace mt {
namespace {

constexpr absl::string_view kGradientPrefix = "grad.";

// Adds a state of the optimizer to the module and its input to the graph.
absl::StatusOr<Value> AddState(Module& module, Graph& graph, absl::string_view name, const TensorType& type,
                               const Dims& logical_dims) {
  RETURN_IF_ERROR(module.AddState({.name = std::string(name),
                                   .type = type,
                                   .logical_dims = logical_dims,
                                   .role = Role::kOptimizerState,
                                   .init = {.kind = Init::Kind::kZeros}}));
  return graph.AddInput(name, type, Role::kOptimizerState);
}

absl::Status AddUpdates(Module& module, Graph& graph, absl::string_view kind) {
  std::vector<Output> outputs;  // All but the gradients.
  absl::flat_hash_map<std::string, Value> gradients;
  std::vector<Value> all_gradients;
  for (const Output& output : graph.outputs()) {
    absl::string_view name = output.name;
    if (!absl::ConsumePrefix(&name, kGradientPrefix)) {
      outputs.push_back(output);
      continue;
    }
    gradients[std::string(name)] = output.value;
    all_gradients.push_back(output.value);
  }
  graph.SetOutputs(outputs);

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
  const Value norm = builder.Op("global_norm", all_gradients, {}, "grad_norm");
  const Value grad_scale = builder.Op("clip_scale", {norm, grad_clip}, {}, "grad_scale");
  const std::string step_name = absl::StrCat(kind, ".t");
  ASSIGN_OR_RETURN(const Value t, AddState(module, graph, step_name, i32, {}));
  const std::vector<Value> step = builder.Ops("adam_step", {t, beta1, beta2}, {}, "step");
  RETURN_IF_ERROR(builder.status());
  outputs.push_back({norm, "grad_norm", nullptr});

  const std::vector<Node*> inputs(graph.inputs().begin(), graph.inputs().end());
  for (Node* parameter : inputs) {
    if (parameter->role() != Role::kParameter) continue;
    const std::string& name = parameter->name();
    const auto gradient = gradients.find(name);
    if (gradient == gradients.end()) {
      return absl::FailedPreconditionError(absl::StrCat("parameter ", name, " has no output grad.", name));
    }
    const State* state = module.FindState(name);
    const Dims logical_dims = state->logical_dims;  // Adding states moves the table.
    const TensorType moments{DType::kF32, state->type.dims};
    const std::string m_name = absl::StrCat(kind, ".m.", name), v_name = absl::StrCat(kind, ".v.", name);
    ASSIGN_OR_RETURN(const Value m, AddState(module, graph, m_name, moments, logical_dims));
    ASSIGN_OR_RETURN(const Value v, AddState(module, graph, v_name, moments, logical_dims));
    const Value p = parameter->result();
    builder.set_path(name);
    const std::vector<Value> updated = builder.Ops(
        kind, {p, m, v, gradient->second, lr, beta1_f32, beta2_f32, eps, weight_decay, step[1], step[2], grad_scale},
        {{"decay", p.type().rank() >= 2}}, "update");
    RETURN_IF_ERROR(builder.status());
    outputs.push_back({updated[0], name, parameter});
    outputs.push_back({updated[1], m_name, m.node});
    outputs.push_back({updated[2], v_name, v.node});
  }
  outputs.push_back({step[0], step_name, t.node});
  graph.SetOutputs(std::move(outputs));
  return absl::OkStatus();
}

absl::StatusOr<bool> Optimizer(Module& module, const Attrs& options, PassContext&) {
  const std::string& kind = options.Get<std::string>("kind");
  if (kind == "none") return false;
  Graph& train = *module.FindGraph("train");
  const Phase phase = train.phase();
  train.set_phase(Phase::kOptimizer);
  const absl::Status status = AddUpdates(module, train, kind);
  train.set_phase(phase);
  RETURN_IF_ERROR(status);
  train.set_stage(Stage::kOptimized);
  return true;
}

constexpr PassOption kOptions[] = {
    {.name = "kind",
     .kind = AttrKind::kString,
     .doc = "adamw (decoupled decay), adam (decay added to the gradient), none (gradients stay outputs)",
     .default_text = "adamw",
     .choices = "adamw|adam|none"},
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
