// The precision of a module: tf32, bf16, fp16, from the autocast column of the rows.
//
// bf16 and fp16 retype the forward graphs: parameters stay f32 and are read through casts, values between ops are
// 16-bit, and autodiff then differentiates what is there. Statistics that a row declares as f32 stay f32.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "passes/registry.h"
#include "passes/states.h"

namespace mt {
namespace {

constexpr absl::string_view kTf32 = "tf32", kResidual = "residual";
constexpr absl::string_view kLoss = "loss";

bool TakesAttr(const OpDef& op, absl::string_view name) {
  return absl::c_any_of(op.attrs, [&](const AttrSpec& spec) { return spec.name == name; });
}

std::string Describe(const Graph& graph, const Node& node) {
  return absl::StrCat("graph @", graph.name(), ": ", node.op().name, " \"", node.name(), "\"");
}

// Rebuilds one graph with values of `low` where rows and operands allow it.
class Retyper {
 public:
  // wide_residual: what follows its operands stays f32 where one of them is: embeddings, and the sums after them.
  Retyper(Graph& graph, DType low, bool wide_residual) : graph_(graph), low_(low), wide_residual_(wide_residual) {}

  absl::StatusOr<bool> Run() {
    RETURN_IF_ERROR(RetypeCaches());
    for (Node* node : graph_.TopologicalOrder()) {
      if (!node->is_input()) RETURN_IF_ERROR(Retype(*node));
    }
    // What a program returns keeps its type.
    std::vector<Output> outputs = graph_.outputs();
    for (Output& output : outputs) {
      const auto cache = caches_.find(output.donates);
      if (cache != caches_.end()) output.donates = cache->second;
      const DType dtype = (cache != caches_.end() ? cache->second->result() : output.value).type().dtype;
      ASSIGN_OR_RETURN(output.value, Cast(Now(output.value), dtype));
    }
    for (const auto& [old, made] : caches_) {
      const std::string name = old->name();
      graph_.SetNodeName(const_cast<Node*>(old), absl::StrCat(name, ".f32"));  // Nobody reads it any longer.
      graph_.SetNodeName(made, name);
    }
    graph_.SetOutputs(std::move(outputs));
    return changed_;
  }

 private:
  Value Now(Value value) const {
    const auto at = now_.find(value);
    return at == now_.end() ? value : at->second;
  }

  // What a program keeps for itself is kept as it is computed.
  absl::Status RetypeCaches() {
    const std::vector<Node*> inputs(graph_.inputs().begin(), graph_.inputs().end());
    for (const Node* input : inputs) {
      if (input->role() != Role::kCache || input->result().type().dtype != DType::kF32) continue;
      const TensorType type = {low_, input->result().type().dims};
      ASSIGN_OR_RETURN(const Value made,
                       graph_.AddInput(absl::StrCat(input->name(), ".", DTypeName(low_)), type, Role::kCache));
      now_[input->result()] = made;
      caches_[input] = made.node;
      changed_ = true;
    }
    return absl::OkStatus();
  }

  // One cast for each value and dtype, made before its first reader.
  absl::StatusOr<Value> Cast(Value value, DType to) {
    if (value.type().dtype == to) return value;
    Value& cast = casts_[{value, to}];
    if (!cast) {
      const Phase phase = graph_.phase();
      graph_.set_phase(value.node->phase());
      const absl::StatusOr<Node*> made =
          graph_.AddNode(*FindOp("cast"), {value}, {{"to", to}}, absl::StrCat(value.node->name(), ".", DTypeName(to)));
      graph_.set_phase(phase);
      RETURN_IF_ERROR(made);
      cast = (*made)->result();
      changed_ = true;
    }
    return cast;
  }

  // f32 and `low` take part; what the model itself has in another floating-point dtype stays as it is.
  bool TakesPart(Value value) const { return value.type().dtype == DType::kF32 || value.type().dtype == low_; }

  DType Chosen(const Node& node, const std::vector<Value>& operands) const {
    if (node.op().autocast == Autocast::kAlways) return low_;
    if (node.op().autocast == Autocast::kNever) return DType::kF32;
    bool any_low = false, any_wide = false;
    for (const Value& operand : operands) {
      const bool is_parameter = operand.node->is_input() && operand.node->role() == Role::kParameter;
      if (is_parameter || !TakesPart(operand)) continue;
      (operand.type().dtype == low_ ? any_low : any_wide) = true;
    }
    if (wide_residual_) return any_low && !any_wide ? low_ : DType::kF32;
    return any_wide && !any_low ? DType::kF32 : low_;  // Of parameters alone: low.
  }

  // The result types for these dtypes of the operands; nullopt where the row does not take them.
  std::optional<std::vector<TensorType>> Infer(const Node& node, const std::vector<Value>& operands,
                                               const std::vector<DType>& dtypes) const {
    std::vector<TensorType> types;
    for (size_t i = 0; i < operands.size(); ++i) types.push_back({dtypes[i], operands[i].type().dims});
    Attrs attrs = node.attrs();
    absl::StatusOr<std::vector<TensorType>> results = InferTypes(node.op(), types, attrs);
    if (!results.ok()) return std::nullopt;
    return *std::move(results);
  }

  // The dtype in which each operand is read. An operand is not cast where the row takes it as it is and gives the same.
  std::vector<DType> Dtypes(const Node& node, const std::vector<Value>& operands) const {
    std::vector<DType> as_is, cast;
    const DType chosen = Chosen(node, operands);
    for (const Value& operand : operands) {
      as_is.push_back(operand.type().dtype);
      cast.push_back(TakesPart(operand) ? chosen : operand.type().dtype);
    }
    const auto wanted = Infer(node, operands, cast);
    if (!wanted) {  // The row has no such form: as the model has it.
      std::vector<DType> original;
      for (const Value& operand : node.operands()) original.push_back(operand.type().dtype);
      return original;
    }
    if (Infer(node, operands, as_is) == wanted) return as_is;
    for (size_t i = 0; i < operands.size(); ++i) {
      const DType dtype = std::exchange(cast[i], as_is[i]);
      if (Infer(node, operands, cast) != wanted) cast[i] = dtype;
    }
    return cast;
  }

  absl::Status Retype(Node& node) {
    std::vector<Value> operands;
    for (const Value& operand : node.operands()) operands.push_back(Now(operand));
    const std::vector<DType> dtypes = Dtypes(node, operands);
    for (size_t i = 0; i < operands.size(); ++i) {
      ASSIGN_OR_RETURN(operands[i], Cast(operands[i], dtypes[i]));
    }
    if (absl::MakeConstSpan(operands) == node.operands()) return absl::OkStatus();
    ASSIGN_OR_RETURN(Node * retyped, graph_.CloneNode(node, operands, /*recompute=*/false));
    for (int i = 0; i < node.num_results(); ++i) now_[node.result(i)] = retyped->result(i);
    changed_ = true;
    return absl::OkStatus();
  }

  Graph& graph_;
  const DType low_;
  const bool wide_residual_;
  bool changed_ = false;
  absl::flat_hash_map<Value, Value> now_;  // Values of the graph as it was -> what stands for them.
  absl::flat_hash_map<std::pair<Value, DType>, Value> casts_;
  absl::flat_hash_map<const Node*, Node*> caches_;  // As they were -> as they are.
};

absl::StatusOr<bool> RetypeGraphs(Module& module, const Attrs& options, DType low) {
  const bool wide_residual = options.Get<std::string>(kResidual) == DTypeName(DType::kF32);
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(const bool retyped, Retyper(*graph, low, wide_residual).Run());
    changed = changed || retyped;
  }
  return changed;
}

absl::StatusOr<bool> Bf16(Module& module, const Attrs& options, PassContext&) {
  return RetypeGraphs(module, options, DType::kBF16);
}

// Autodiff differentiates the loss, or what stands for it already, times loss_scale; the optimizer takes the factor out
// again.
absl::Status ScaleLoss(Module& module) {
  Graph& train = *module.FindGraph("train");
  const Output* loss = train.FindOutput(kScaledLossOutput);
  const bool stands_for_loss = loss != nullptr;
  if (!stands_for_loss) loss = train.FindOutput(kLoss);
  if (loss == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("graph @train has no output \"", kLoss, "\" that could be scaled"));
  }
  const Value unscaled = loss->value;
  ASSIGN_OR_RETURN(const Value scale, AddState(module, train,
                                               {.name = std::string(kLossScaleState),
                                                .type = {DType::kF32, {}},
                                                .logical_dims = {},
                                                .role = Role::kOptimizerState,
                                                .init = {.kind = Init::Kind::kConstant, .value = 65536}}));
  RETURN_IF_ERROR(AddState(module, train,
                           {.name = std::string(kGoodStepsState),
                            .type = {DType::kI32, {}},
                            .logical_dims = {},
                            .role = Role::kOptimizerState,
                            .init = {}}));
  ASSIGN_OR_RETURN(Node * scaled, train.AddNode(*FindOp("mul"), {unscaled, scale}, {}, "loss.scaled"));
  if (!stands_for_loss) {
    train.AddOutput(scaled->result(), kScaledLossOutput);
    return absl::OkStatus();
  }
  std::vector<Output> outputs = train.outputs();
  for (Output& output : outputs) {
    if (output.name == kScaledLossOutput) output.value = scaled->result();
  }
  train.SetOutputs(std::move(outputs));
  return absl::OkStatus();
}

absl::StatusOr<bool> Fp16(Module& module, const Attrs& options, PassContext&) {
  RETURN_IF_ERROR(RetypeGraphs(module, options, DType::kF16));
  RETURN_IF_ERROR(ScaleLoss(module));
  return true;
}

// A property of the ops that hold products: nothing is retyped.
absl::StatusOr<bool> Tf32(Module& module, const Attrs&, PassContext& context) {
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    for (Node* node : graph->TopologicalOrder()) {
      if (node->is_input() || !TakesAttr(node->op(), kTf32) || node->attrs().Bool(kTf32)) continue;
      const bool is_f32 = absl::c_none_of(node->operands(), [](const Value& operand) {
        return IsFloat(operand.type().dtype) && operand.type().dtype != DType::kF32;
      });
      if (!is_f32) continue;
      Attrs attrs = node->attrs();
      attrs.Set(kTf32, true);
      const Phase phase = graph->phase();
      graph->set_phase(node->phase());
      const absl::StatusOr<Node*> made = graph->AddNode(node->op(), node->operands(), std::move(attrs), node->name());
      graph->set_phase(phase);
      RETURN_IF_ERROR(Annotate(made.status(), Describe(*graph, *node)));
      for (int i = 0; i < node->num_results(); ++i) graph->ReplaceAllUses(node->result(i), (*made)->result(i));
      graph->RemoveNode(node);
      changed = true;
    }
  }
  if (!changed) {
    context.warnings.push_back(absl::StrCat("tf32 finds no matrix product of f32 operands in ", module.name()));
  }
  return changed;
}

bool HasMatrixProduct(const Module& module) {
  return absl::c_any_of(module.graphs(), [](const auto& graph) {
    return absl::c_any_of(graph->Nodes(),
                          [](const Node* node) { return !node->is_input() && TakesAttr(node->op(), kTf32); });
  });
}

constexpr absl::string_view kResidualDoc =
    "dtype of the residual stream: embeddings, the sums after them, and what normalizes those";
constexpr PassOption kBf16Options[] = {
    {.name = kResidual, .kind = AttrKind::kString, .doc = kResidualDoc, .default_text = "bf16", .choices = "bf16|f32"}};
constexpr PassOption kFp16Options[] = {
    {.name = kResidual, .kind = AttrKind::kString, .doc = kResidualDoc, .default_text = "f16", .choices = "f16|f32"}};
constexpr absl::string_view kTf32Names[] = {"allow_tf32", "use_tf32", "tensorfloat32"};
constexpr absl::string_view kBf16Names[] = {"amp",        "autocast", "mixed_precision", "bfloat16",
                                            "bf16_mixed", "use_bf16", "use_amp"};
constexpr absl::string_view kFp16Names[] = {"float16", "f16", "half", "use_fp16", "grad_scaler", "loss_scaling"};

}  // namespace

const PassDef kTf32Pass = {
    .name = "tf32",
    .summary =
        "Matrix products of f32 may round their operands to TF32, 8 bits of exponent and 10 of mantissa; "
        "the CPU computes them in f32.",
    .source = "NVIDIA, \"A100 Tensor Core GPU Architecture\" (2020), TF32",
    .tolerance = 2e-3,
    .also_known_as = kTf32Names,
    .applies = HasMatrixProduct,
    .run = Tf32,
};

const PassDef kBf16Pass = {
    .name = "bf16",
    .summary =
        "Activations, weights as they are read and gradients in bf16; parameters, statistics and sums of "
        "several gradients in f32.",
    .options = kBf16Options,
    .source = "Kalamkar et al., \"A Study of BFLOAT16 for Deep Learning Training\" (2019)",
    .tolerance = 1e-2,
    .also_known_as = kBf16Names,
    .run = Bf16,
};

const PassDef kFp16Pass = {
    .name = "fp16",
    .summary =
        "As bf16, in IEEE half precision, with dynamic loss scaling: the states loss_scale and "
        "loss_scale.good_steps.",
    .options = kFp16Options,
    .source = "Micikevicius et al., \"Mixed Precision Training\" (2018), sections 3.1 to 3.3",
    .tolerance = 5e-3,
    .also_known_as = kFp16Names,
    .run = Fp16,
};

}  // namespace mt
