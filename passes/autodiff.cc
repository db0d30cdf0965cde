// Reverse-mode differentiation of the train graph, from the rows.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "passes/registry.h"

namespace mt {
namespace {

// An output that stands for the loss: fp16's, scaled.
constexpr absl::string_view kScaledLoss = "scaled_loss";
constexpr absl::string_view kGradientPrefix = "grad.";
// Attributes of rows: an operand that the result is summed into, and a result in f32.
constexpr absl::string_view kAccumulator = "accumulator", kF32Result = "f32_result";

bool TakesAttr(const OpDef& op, absl::string_view name) {
  return absl::c_any_of(op.attrs, [&](const AttrSpec& spec) { return spec.name == name; });
}

bool HasDerivedRows(const OpDef& op) { return op.is_element_wise() && op.results.size() == 1; }

// True if a gradient may flow back through operand `i` of `node`.
bool IsDifferentiable(const Node& node, size_t i) {
  const OpDef& op = node.op();
  const int index = static_cast<int>(i);
  if (!IsFloat(node.operands()[i].type().dtype) || absl::c_linear_search(op.no_grad_operands, index)) return false;
  return !HasDerivedRows(op) || FindDerivative(op, index) != nullptr;
}

std::string Describe(const Node& node) {
  return node.name().empty() ? std::string(node.op().name) : absl::StrCat(node.op().name, " \"", node.name(), "\"");
}

class Differentiator {
 public:
  explicit Differentiator(Graph& graph) : graph_(graph), builder_(graph), order_(graph.TopologicalOrder()) {}

  absl::Status Run() {
    const Output* loss = graph_.FindOutput(kScaledLoss);
    if (loss == nullptr) loss = graph_.FindOutput("loss");
    if (loss == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("graph @", graph_.name(), " has no output \"loss\""));
    }
    const Value seed = loss->value;
    const TensorType& type = seed.type();
    if (type.rank() != 0 || !IsFloat(type.dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat("output \"", loss->name, "\" is ", type.ToString(), "; expected a floating-point scalar"));
    }
    FindPath(seed.node);
    CountReaders();
    BeginSums();
    const Phase phase = graph_.phase();
    graph_.set_phase(Phase::kBackward);
    builder_.set_path("loss.grad");
    gradients_[seed] = builder_.Op("fill", {}, {{"dims", IntList{}}, {"value", 1.0}, {"dtype", type.dtype}});
    held_.insert(gradients_[seed].node);
    named_.insert(gradients_[seed].node);
    absl::Status status = builder_.status();
    for (auto node = order_.rbegin(); status.ok() && node != order_.rend(); ++node) {
      if (!(*node)->is_input() && path_.contains(*node)) status = Differentiate(**node);
    }
    graph_.set_phase(phase);
    RETURN_IF_ERROR(status);
    return AddOutputs();
  }

 private:
  // path_: the nodes that depend on a parameter and that the loss depends on, along differentiable operands.
  void FindPath(const Node* loss) {
    absl::flat_hash_set<const Node*> active;
    for (const Node* node : order_) {
      if (node->is_input()) {
        if (node->role() == Role::kParameter && IsFloat(node->result().type().dtype)) active.insert(node);
        continue;
      }
      for (size_t i = 0; i < node->operands().size(); ++i) {
        if (active.contains(node->operands()[i].node) && IsDifferentiable(*node, i)) {
          active.insert(node);
          break;
        }
      }
    }
    if (!active.contains(loss)) return;
    std::vector<const Node*> todo = {loss};
    path_.insert(loss);
    while (!todo.empty()) {
      const Node* node = todo.back();
      todo.pop_back();
      for (size_t i = 0; i < node->operands().size(); ++i) {
        const Node* operand = node->operands()[i].node;
        if (active.contains(operand) && IsDifferentiable(*node, i) && path_.insert(operand).second) {
          todo.push_back(operand);
        }
      }
    }
  }

  // A parameter's casts do nothing to a gradient: the gradients of all their readers are summed at the parameter, in
  // its dtype.
  static Value Home(Value value) {
    Value at = value;
    while (!at.node->is_input() && IsTransparent(*at.node)) at = at.node->operands()[0];
    return at.node->is_input() && at.node->role() == Role::kParameter ? at : value;
  }
  static bool IsTransparent(const Node& node) {
    if (!HasDerivedRows(node.op()) || node.operands().size() != 1) return false;
    const DerivedOp* derived = FindDerivative(node.op(), 0);
    return derived != nullptr && derived->is_identity && node.operands()[0].type().dims == node.result_types()[0].dims;
  }

  // Where a state grad.NAME holds the sum over earlier microbatches, the gradients are added to it.
  void BeginSums() {
    for (Node* input : graph_.inputs()) {
      if (input->role() != Role::kParameter) continue;
      Node* sum = SumOf(*input);
      if (sum != nullptr) gradients_[input->result()] = sum->result();
    }
  }
  Node* SumOf(const Node& parameter) const {
    Node* sum = graph_.FindInput(absl::StrCat(kGradientPrefix, parameter.name()));
    const TensorType type = {DType::kF32, parameter.result().type().dims};
    return sum != nullptr && sum->role() == Role::kGradient && sum->result().type() == type ? sum : nullptr;
  }

  void CountReaders() {
    for (const Node* node : path_) {
      if (node->is_input() || (IsTransparent(*node) && Home(node->result()) != node->result())) continue;
      for (size_t i = 0; i < node->operands().size(); ++i) {
        const Value home = Home(node->operands()[i]);
        if (home.node->is_input() && IsDifferentiable(*node, i)) ++readers_[home];
      }
    }
  }

  absl::Status Differentiate(const Node& node) {
    std::vector<Value> result_grads(static_cast<size_t>(node.num_results()));
    bool arrives = false;
    builder_.set_path("");
    for (size_t i = 0; i < result_grads.size(); ++i) {
      const Value result = node.result(static_cast<int>(i));
      const auto at = gradients_.find(result);
      if (at == gradients_.end()) continue;
      result_grads[i] = builder_.Cast(at->second, result.type().dtype);
      arrives = true;
    }
    if (!arrives) return absl::OkStatus();
    const OpDef& op = node.op();
    const size_t count = node.operands().size();
    std::vector<bool> wants(count);
    for (size_t i = 0; i < count; ++i) {
      wants[i] = path_.contains(node.operands()[i].node) && IsDifferentiable(node, i);
    }
    std::vector<Value> operand_grads(count);
    if (HasDerivedRows(op)) {
      for (size_t i = 0; i < count; ++i) {
        if (wants[i]) operand_grads[i] = Derived(node, static_cast<int>(i), result_grads[0]);
      }
    } else if (op.grad != nullptr) {
      GradContext context = {.builder = builder_,
                             .node = node,
                             .result_grads = result_grads,
                             .wants = wants,
                             .operand_grads = operand_grads};
      RETURN_IF_ERROR(Annotate(op.grad(context), absl::StrCat("the gradient of ", Describe(node))));
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(node),
                       " has no gradient, but lies between a parameter and the loss; use a differentiable op there"));
    }
    RETURN_IF_ERROR(Annotate(builder_.status(), absl::StrCat("the gradient of ", Describe(node))));
    for (size_t i = 0; i < count; ++i) {
      const Value operand = node.operands()[i];
      if (!wants[i] || !operand_grads[i]) continue;
      if (operand_grads[i].type().dims != operand.type().dims) {
        return absl::InternalError(absl::StrCat("the gradient of ", Describe(node), " for operand ", i, " is ",
                                                operand_grads[i].type().ToString(), "; the operand is ",
                                                operand.type().ToString()));
      }
    }
    const std::string name = node.name().empty() ? "" : absl::StrCat(node.name(), ".grad");
    SetNames(operand_grads, name);
    builder_.set_path(name);
    // A result that can take over a sum comes before the others of its node.
    const auto takes_sum = [&](size_t i) {
      const Value gradient = operand_grads[i];
      return gradient.node->num_results() > 1 && gradient.node->op().has_accumulator && gradient.index == 0;
    };
    for (const bool first : {true, false}) {
      for (size_t i = 0; i < count; ++i) {
        if (!wants[i] || !operand_grads[i] || takes_sum(i) != first) continue;
        RETURN_IF_ERROR(Contribute(node.operands()[i], operand_grads, i));
      }
    }
    return absl::OkStatus();
  }

  // Names the new nodes that made `values`.
  void SetNames(const std::vector<Value>& values, absl::string_view name) {
    std::vector<Node*> todo;
    for (const Value& value : values) {
      if (value) todo.push_back(value.node);
    }
    while (!todo.empty()) {
      Node* node = todo.back();
      todo.pop_back();
      if (node->is_input() || node->phase() != Phase::kBackward || !named_.insert(node).second) continue;
      graph_.SetNodeName(node, name);
      for (const Value& operand : node->operands()) todo.push_back(operand.node);
    }
  }

  // dy * d node / d operand `index`, summed to the operand's shape where it was broadcast.
  Value Derived(const Node& node, int index, Value dy) {
    const DerivedOp& derived = *FindDerivative(node.op(), index);
    Value gradient = dy;
    if (!derived.is_identity) {
      std::vector<Value> operands = {dy};
      for (const int read : derived.operands_read) operands.push_back(node.operands()[static_cast<size_t>(read)]);
      gradient = builder_.Op(derived.op->name, operands, node.attrs());
    }
    return builder_.SumTo(gradient, node.operands()[static_cast<size_t>(index)].type().dims);
  }

  // Adds operand_grads[i] to the gradient of `value`: into the accumulator of the op that makes it, where it has one
  // and nothing else needs the op's result by itself, else by an add. The wider type holds the sum.
  absl::Status Contribute(Value value, std::vector<Value>& operand_grads, size_t i) {
    const Value home = Home(value);
    const auto readers = readers_.find(home);
    const bool is_summed = readers != readers_.end() && readers->second > 1;
    if (is_summed && gradients_.find(home) == gradients_.end()) {
      RETURN_IF_ERROR(Widen(home.type().dtype, operand_grads, i));
    }
    const Value gradient = operand_grads[i];
    const auto [at, is_first] = gradients_.emplace(home, gradient);
    Value& sum = at->second;
    if (!is_first && Accumulates(gradient, sum) && absl::c_count(operand_grads, gradient) == 1) {
      Node* maker = gradient.node;
      std::vector<Value> operands(maker->operands().begin(), maker->operands().end());
      operands.push_back(sum);
      Attrs attrs = maker->attrs();
      attrs.Set(kAccumulator, true);
      ASSIGN_OR_RETURN(Node * accumulating, Remake(maker, operands, std::move(attrs), operand_grads));
      sum = accumulating->result();
    } else if (!is_first) {
      const bool sum_is_wider = ByteSize(sum.type().dtype) >= ByteSize(gradient.type().dtype);
      sum = sum_is_wider ? builder_.Add(sum, gradient) : builder_.Add(gradient, sum);
      RETURN_IF_ERROR(builder_.status());
    }
    held_.insert(sum.node);
    named_.insert(sum.node);
    return absl::OkStatus();
  }

  // The first part of a sum in `to`: the op that makes operand_grads[i] gives it so where it can, before any rounding.
  absl::Status Widen(DType to, std::vector<Value>& operand_grads, size_t i) {
    Value& gradient = operand_grads[i];
    if (gradient.type().dtype == to) return absl::OkStatus();
    Node* maker = gradient.node;
    if (to == DType::kF32 && IsNew(*maker) && gradient.index == 0 && TakesAttr(maker->op(), kF32Result) &&
        absl::c_count(operand_grads, gradient) == 1) {
      Attrs attrs = maker->attrs();
      attrs.Set(kF32Result, true);
      return Remake(maker, maker->operands(), std::move(attrs), operand_grads).status();
    }
    gradient = builder_.Cast(gradient, to);
    return builder_.status();
  }

  // The node `maker`, which is new, with other operands and attributes; in `values` and for those who read its other
  // results the new one stands for it.
  absl::StatusOr<Node*> Remake(Node* maker, absl::Span<const Value> operands, Attrs attrs, std::vector<Value>& values) {
    ASSIGN_OR_RETURN(Node * made, graph_.AddNode(maker->op(), operands, std::move(attrs), maker->name()));
    for (Value& value : values) {
      if (value.node == maker) value.node = made;
    }
    for (int i = 1; i < maker->num_results(); ++i) graph_.ReplaceAllUses(maker->result(i), made->result(i));
    named_.erase(maker);
    graph_.RemoveNode(maker);
    return made;
  }

  // A backward node of which no gradient holds a result and nobody reads the first.
  bool IsNew(const Node& node) const {
    const auto is_first = [&](Value value) { return value == node.result(0); };
    return node.phase() == Phase::kBackward && !held_.contains(&node) &&
           absl::c_none_of(
               node.uses(),
               [&](const Use& use) { return is_first(use.node->operands()[static_cast<size_t>(use.operand)]); }) &&
           absl::c_none_of(graph_.outputs(), [&](const Output& output) { return is_first(output.value); });
  }

  // True if `node` is computed from `maker`: from another result than the first, which nobody reads.
  static bool DependsOn(const Node* node, const Node& maker) {
    if (maker.uses().empty()) return false;
    absl::flat_hash_set<const Node*> seen = {node};
    std::vector<const Node*> todo = {node};
    while (!todo.empty()) {
      const Node* next = todo.back();
      todo.pop_back();
      if (next == &maker) return true;
      for (const Value& operand : next->operands()) {
        if (seen.insert(operand.node).second) todo.push_back(operand.node);
      }
    }
    return false;
  }

  // True if the op that makes `gradient` is new and can take `sum` as its accumulator. It must not read `sum` besides:
  // the accumulator's buffer is written.
  bool Accumulates(Value gradient, Value sum) const {
    const Node& maker = *gradient.node;
    if (!IsNew(maker) || !maker.op().has_accumulator || maker.attrs().Bool(kAccumulator) || gradient.index != 0 ||
        DependsOn(sum.node, maker) ||
        absl::c_any_of(maker.operands(), [&](Value operand) { return BehindViews(operand) == BehindViews(sum); })) {
      return false;
    }
    std::vector<TensorType> types = maker.operand_types();
    types.push_back(sum.type());
    Attrs attrs = maker.attrs();
    attrs.Set(kAccumulator, true);
    const absl::StatusOr<std::vector<TensorType>> results = InferTypes(maker.op(), types, attrs);
    return results.ok() && (*results)[0] == sum.type();
  }

  static Value BehindViews(Value value) {
    while (!value.node->is_input() && value.node->op().is_view) value = value.node->operands()[0];
    return value;
  }

  absl::Status AddOutputs() {
    std::vector<Output> outputs = graph_.outputs();
    outputs.erase(
        std::remove_if(outputs.begin(), outputs.end(), [](const Output& output) { return output.name == kScaledLoss; }),
        outputs.end());
    graph_.SetOutputs(std::move(outputs));
    for (Node* input : graph_.inputs()) {
      if (input->role() != Role::kParameter) continue;
      const auto gradient = gradients_.find(input->result());
      Node* sum = SumOf(*input);
      if (gradient == gradients_.end() || gradient->second.node == sum) {
        return absl::InvalidArgumentError(absl::StrCat("parameter ", input->name(),
                                                       " does not influence the loss; use it in graph @", graph_.name(),
                                                       " or remove it from the model"));
      }
      graph_.AddOutput(gradient->second, absl::StrCat(kGradientPrefix, input->name()), sum);
    }
    return absl::OkStatus();
  }

  Graph& graph_;
  Builder builder_;
  const std::vector<Node*> order_;  // Of the forward graph.
  absl::flat_hash_set<const Node*> path_;
  absl::flat_hash_map<Value, int64_t> readers_;  // Parameters -> how many gradients they get.
  absl::flat_hash_map<Value, Value> gradients_;  // Value -> d loss / d value, as far as it has been summed.
  absl::flat_hash_set<const Node*> held_;        // The nodes that made them.
  absl::flat_hash_set<const Node*> named_;       // Backward nodes that have their name.
};

absl::StatusOr<bool> Autodiff(Module& module, const Attrs&, PassContext&) {
  Graph& train = *module.FindGraph("train");
  for (const State& state : module.states()) {
    if (state.role == Role::kParameter && train.FindInput(state.name) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("parameter ", state.name,
                                                     " does not influence the loss: graph @train does not read it; use "
                                                     "it there or remove it from the model"));
    }
  }
  RETURN_IF_ERROR(Differentiator(train).Run());
  train.set_stage(Stage::kTraining);
  return true;
}

}  // namespace

const PassDef kAutodiffPass = {
    .name = "autodiff",
    .summary = "Adds the backward pass of graph @train: an output grad.NAME for each parameter NAME.",
    .requires_stage = Stage::kForward,
    .provides_stage = Stage::kTraining,
    .source = "Griewank and Walther, \"Evaluating Derivatives\" (2008), chapter 3: reverse mode",
    .always_on = true,
    .run = Autodiff,
};

}  // namespace mt
