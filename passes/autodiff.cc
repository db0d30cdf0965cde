// Reverse-mode differentiation of the train graph, from the rows.
#include <string>
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
    const Output* loss = graph_.FindOutput("loss");
    if (loss == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("graph @", graph_.name(), " has no output \"loss\""));
    }
    const TensorType& type = loss->value.type();
    if (type.rank() != 0 || !IsFloat(type.dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat("output \"loss\" is ", type.ToString(), "; expected a floating-point scalar"));
    }
    FindPath(loss->value.node);
    const Phase phase = graph_.phase();
    graph_.set_phase(Phase::kBackward);
    builder_.set_path("loss.grad");
    gradients_[loss->value] = builder_.Op("fill", {}, {{"dims", IntList{}}, {"value", 1.0}, {"dtype", type.dtype}});
    held_.insert(gradients_[loss->value].node);
    named_.insert(gradients_[loss->value].node);
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
    for (size_t i = 0; i < count; ++i) {
      if (wants[i] && operand_grads[i]) RETURN_IF_ERROR(Contribute(node.operands()[i], operand_grads, i));
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
    const Value gradient = operand_grads[i];
    const auto [at, is_first] = gradients_.emplace(value, gradient);
    Value& sum = at->second;
    if (!is_first && Accumulates(gradient, sum) && absl::c_count(operand_grads, gradient) == 1) {
      Node* maker = gradient.node;
      std::vector<Value> operands(maker->operands().begin(), maker->operands().end());
      operands.push_back(sum);
      Attrs attrs = maker->attrs();
      attrs.Set("accumulator", true);
      ASSIGN_OR_RETURN(Node * accumulating, graph_.AddNode(maker->op(), operands, std::move(attrs), maker->name()));
      for (Value& other : operand_grads) {
        if (other.node == maker) other.node = accumulating;
      }
      named_.erase(maker);
      graph_.RemoveNode(maker);
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

  // True if the op that makes `gradient` can take `sum` as its accumulator and is new: nobody reads its results and no
  // gradient holds one. It must not read `sum` besides: the accumulator's buffer is written.
  bool Accumulates(Value gradient, Value sum) const {
    const Node& maker = *gradient.node;
    return maker.phase() == Phase::kBackward && !held_.contains(&maker) && maker.uses().empty() &&
           maker.op().has_accumulator && !maker.attrs().Bool("accumulator") && gradient.index == 0 &&
           gradient.type() == sum.type() &&
           absl::c_none_of(maker.operands(), [&](Value operand) { return BehindViews(operand) == BehindViews(sum); });
  }

  static Value BehindViews(Value value) {
    while (!value.node->is_input() && value.node->op().is_view) value = value.node->operands()[0];
    return value;
  }

  absl::Status AddOutputs() {
    for (Node* input : graph_.inputs()) {
      if (input->role() != Role::kParameter) continue;
      const auto gradient = gradients_.find(input->result());
      if (gradient == gradients_.end()) {
        return absl::InvalidArgumentError(absl::StrCat("parameter ", input->name(),
                                                       " does not influence the loss; use it in graph @", graph_.name(),
                                                       " or remove it from the model"));
      }
      graph_.AddOutput(gradient->second, absl::StrCat("grad.", input->name()));
    }
    return absl::OkStatus();
  }

  Graph& graph_;
  Builder builder_;
  const std::vector<Node*> order_;  // Of the forward graph.
  absl::flat_hash_set<const Node*> path_;
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
