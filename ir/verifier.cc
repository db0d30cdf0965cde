#include "ir/verifier.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ir/base/status_macros.h"
#include "ir/text.h"

namespace mt {
namespace {

template <typename... Args>
absl::Status Broken(const Args&... args) {
  return absl::InternalError(absl::StrCat(args...));
}

std::string Describe(const Node& node) {
  if (node.is_input()) return absl::StrCat("input %", node.name());
  return absl::StrCat("node ", node.id(), " (", node.op().name,
                      node.name().empty() ? "" : absl::StrCat(" \"", node.name(), "\""), ")");
}

class GraphVerifier {
 public:
  explicit GraphVerifier(const Graph& graph) : graph_(graph), nodes_(graph.Nodes()) {
    for (const Node* node : nodes_) members_.insert(node);
  }

  absl::Status Run() const {
    if (!IsTextName(graph_.name())) {
      return Broken("\"", graph_.name(), "\" cannot name a graph; expected letters, digits, '.', '_', '-' or '/'");
    }
    RETURN_IF_ERROR(Inputs());
    for (const Node* node : nodes_) RETURN_IF_ERROR(Operands(*node));
    RETURN_IF_ERROR(UseLists());
    RETURN_IF_ERROR(Acyclic());
    for (const Node* node : nodes_) {
      if (node->is_input()) continue;
      RETURN_IF_ERROR(AttrsAndTypes(*node));
      RETURN_IF_ERROR(RecomputeOf(*node));
    }
    RETURN_IF_ERROR(Outputs());
    return StagePromises();
  }

 private:
  absl::Status Inputs() const {
    absl::flat_hash_set<const Node*> listed;
    absl::flat_hash_set<absl::string_view> names;
    for (const Node* input : graph_.inputs()) {
      if (!input->is_input()) return Broken(Describe(*input), " is listed among the inputs; expected an input");
      if (!listed.insert(input).second) return Broken(Describe(*input), " is listed twice among the inputs");
      if (!IsTextName(input->name())) {
        return Broken("\"", input->name(), "\" cannot name an input; expected letters, digits, '.', '_', '-' or '/', ",
                      "not digits alone");
      }
      if (!names.insert(input->name()).second) return Broken("two inputs are named %", input->name());
      const absl::Status type = CheckTensorType(input->result().type());
      if (!type.ok()) return Broken(Describe(*input), ": ", type.message());
    }
    return absl::OkStatus();
  }

  bool Exists(const Value& value) const {
    return members_.contains(value.node) && value.index >= 0 && value.index < value.node->num_results();
  }

  absl::Status Operands(const Node& node) const {
    for (size_t i = 0; i < node.operands().size(); ++i) {
      const Value& operand = node.operands()[i];
      if (Exists(operand)) continue;
      return Broken(Describe(node), ": operand ", i,
                    members_.contains(operand.node)
                        ? absl::StrCat(" is result ", operand.index, " of ", Describe(*operand.node), ", which has ",
                                       operand.node->num_results())
                        : " is a node that is not in the graph");
    }
    return absl::OkStatus();
  }

  // Every operand is in the use list of its node exactly once, and nothing else is.
  absl::Status UseLists() const {
    using Key = std::pair<const Node*, int>;  // User and operand.
    absl::flat_hash_set<Key> seen;            // Of one node.
    for (const Node* node : nodes_) {
      seen.clear();
      for (const Use& use : node->uses()) {
        if (!members_.contains(use.node)) {
          return Broken(Describe(*node), ": its use list names a node that is not in the graph");
        }
        const absl::Span<const Value> operands = use.node->operands();
        if (use.operand < 0 || use.operand >= static_cast<int>(operands.size()) ||
            operands[static_cast<size_t>(use.operand)].node != node) {
          return Broken(Describe(*node), ": its use list says operand ", use.operand, " of ", Describe(*use.node),
                        ", which reads something else");
        }
        if (node->uses().size() > 1 && !seen.insert({use.node, use.operand}).second) {
          return Broken(Describe(*node), ": its use list says operand ", use.operand, " of ", Describe(*use.node),
                        " twice");
        }
      }
    }
    absl::flat_hash_map<const Node*, size_t> reads;
    for (const Node* node : nodes_) {
      for (const Value& operand : node->operands()) ++reads[operand.node];
    }
    for (const auto& [node, count] : reads) {
      if (count != node->uses().size()) {
        return Broken(Describe(*node), ": ", count, " operands read it, but its use list has ", node->uses().size());
      }
    }
    return absl::OkStatus();
  }

  absl::Status Acyclic() const {
    const std::vector<Node*> order = graph_.TopologicalOrder();
    if (order.size() == nodes_.size()) return absl::OkStatus();
    const absl::flat_hash_set<const Node*> placed(order.begin(), order.end());
    // Every node that is left waits for another one that is left: walking back runs into the cycle.
    const Node* at = *std::find_if(nodes_.begin(), nodes_.end(), [&](const Node* n) { return !placed.contains(n); });
    std::vector<const Node*> path;
    while (std::find(path.begin(), path.end(), at) == path.end()) {
      path.push_back(at);
      for (const Value& operand : at->operands()) {
        if (!placed.contains(operand.node)) {
          at = operand.node;
          break;
        }
      }
    }
    path.erase(path.begin(), std::find(path.begin(), path.end(), at));
    if (path.size() > 8) path.resize(8);
    return Broken("a cycle: ",
                  absl::StrJoin(path, " reads ",
                                [](std::string* out, const Node* node) { absl::StrAppend(out, Describe(*node)); }),
                  ", and so on");
  }

  absl::Status AttrsAndTypes(const Node& node) const {
    Attrs complete = node.attrs();
    const absl::StatusOr<std::vector<TensorType>> inferred = InferTypes(node.op(), node.operand_types(), complete);
    if (!inferred.ok()) return Broken(Describe(node), ": ", inferred.status().message());
    if (complete != node.attrs()) {
      return Broken(Describe(node), ": attributes are ", AttrsToString({}, node.attrs()), "; complete they are ",
                    AttrsToString({}, complete));
    }
    const auto list = [](absl::Span<const TensorType> types) {
      return absl::StrJoin(types, ", ",
                           [](std::string* out, const TensorType& t) { absl::StrAppend(out, t.ToString()); });
    };
    if (node.result_types() != absl::MakeConstSpan(*inferred)) {
      return Broken(Describe(node), ": results are ", list(node.result_types()), ", but ", node.op().name, " of ",
                    list(node.operand_types()), " gives ", list(*inferred));
    }
    return absl::OkStatus();
  }

  // Fewer results, each of a type that the original has: a part of a fused node.
  static bool IsPartOf(const Node& node, const Node& original) {
    const absl::Span<const TensorType> types = original.result_types();
    return node.num_results() < original.num_results() &&
           std::all_of(node.result_types().begin(), node.result_types().end(), [&](const TensorType& type) {
             return std::find(types.begin(), types.end(), type) != types.end();
           });
  }

  absl::Status RecomputeOf(const Node& node) const {
    const Node* original = node.recompute_of();
    if (original == nullptr) return absl::OkStatus();
    if (!members_.contains(original)) {
      return Broken(Describe(node), ": recompute_of refers to a node that is not in the graph");
    }
    if (original == &node || original->is_input() || &original->op() != &node.op() ||
        ((original->attrs() != node.attrs() || original->result_types() != node.result_types()) &&
         !IsPartOf(node, *original))) {
      return Broken(Describe(node), ": recompute_of refers to ", Describe(*original),
                    "; expected another node of the same op, attributes and result types");
    }
    if (node.op().effect != Effect::kNone || node.op().remat == RematPolicy::kMustSave) {
      return Broken(Describe(node), " repeats ", Describe(*original), ", but ", node.op().name,
                    " may not be recomputed");
    }
    return absl::OkStatus();
  }

  absl::Status Outputs() const {
    absl::flat_hash_set<absl::string_view> names;
    absl::flat_hash_set<const Node*> taken_over;
    for (const Output& output : graph_.outputs()) {
      if (!Exists(output.value)) return Broken("output \"", output.name, "\" is a value that is not in the graph");
      if (output.name.empty()) return Broken("an output has no name; every output needs one");
      if (!names.insert(output.name).second) return Broken("two outputs are named \"", output.name, "\"");
      const Node* input = output.donates;
      if (input == nullptr) continue;
      taken_over.insert(input);
      if (!members_.contains(input) || !input->is_input()) {
        return Broken("output \"", output.name, "\" donates something that is no input of the graph");
      }
      if (!IsDonated(input->role())) {
        return Broken("output \"", output.name, "\" donates ", Describe(*input), ", whose role is ",
                      RoleName(input->role()), "; expected a state or a cache");
      }
      if (input->name() != output.name) {
        return Broken("output \"", output.name, "\" donates ", Describe(*input),
                      "; expected the input of its own name");
      }
      if (input->result().type() != output.value.type()) {
        return Broken("output \"", output.name, "\" is ", output.value.type().ToString(), " and donates ",
                      Describe(*input), ", which is ", input->result().type().ToString(), "; expected the same type");
      }
    }
    for (const Node* input : graph_.inputs()) {
      if (input->role() == Role::kCache && !taken_over.contains(input)) {
        return Broken(Describe(*input), " is a cache that no output takes over");
      }
    }
    return absl::OkStatus();
  }

  absl::Status StagePromises() const {
    const absl::string_view stage = StageName(graph_.stage());
    switch (graph_.stage()) {
      case Stage::kForward:
        for (const Node* node : nodes_) {
          if (node->phase() != Phase::kForward) {
            return Broken(Describe(*node), " is of phase ", PhaseName(node->phase()), "; at stage ", stage,
                          " every node is of phase forward");
          }
        }
        return absl::OkStatus();
      case Stage::kTraining:
        if (graph_.FindOutput("loss") == nullptr) {
          return Broken("there is no output \"loss\", which stage ", stage, " promises");
        }
        return absl::OkStatus();
      case Stage::kOptimized: {
        absl::flat_hash_set<const Node*> donated;
        for (const Output& output : graph_.outputs()) donated.insert(output.donates);
        for (const Node* input : graph_.inputs()) {
          if (input->role() != Role::kParameter || donated.contains(input)) continue;
          const Node* sum = graph_.FindInput(absl::StrCat("grad.", input->name()));
          if (sum == nullptr || sum->role() != Role::kGradient || !donated.contains(sum)) {
            return Broken(Describe(*input), " is a parameter that no output donates; at stage ", stage,
                          " every parameter is updated, or its gradient added to a state");
          }
        }
        return absl::OkStatus();
      }
    }
    return Broken("the stage is no stage");
  }

  const Graph& graph_;
  std::vector<Node*> nodes_;
  absl::flat_hash_set<const Node*> members_;
};

absl::Status VerifyState(const State& state) {
  if (!IsTextName(state.name)) {
    return Broken("\"", state.name,
                  "\" cannot name a state; expected letters, digits, '.', '_', '-' or '/', not digits "
                  "alone");
  }
  const absl::Status type = CheckTensorType(state.type);
  if (!type.ok()) return Broken("state ", state.name, ": ", type.message());
  if (!IsState(state.role)) return Broken("state ", state.name, " has role ", RoleName(state.role));
  bool fits = state.logical_dims.size() == state.type.dims.size();
  for (size_t i = 0; fits && i < state.type.dims.size(); ++i) {
    fits = state.logical_dims[i] >= 1 && state.logical_dims[i] <= state.type.dims[i];
  }
  if (!fits) {
    return Broken("state ", state.name, ": logical dims ", DimsToString(state.logical_dims), " do not fit in ",
                  state.type.ToString());
  }
  if (!std::isfinite(state.init.stddev) || state.init.stddev < 0) {
    return Broken("state ", state.name, ": standard deviation ", state.init.stddev, "; expected a finite one >= 0");
  }
  if (!std::isfinite(state.init.value)) {
    return Broken("state ", state.name, ": initial value ", state.init.value, "; expected a finite one");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status VerifyGraph(const Graph& graph) {
  return Annotate(GraphVerifier(graph).Run(), absl::StrCat("graph @", graph.name()));
}

absl::Status VerifyModule(const Module& module) {
  if (!IsTextName(module.name())) {
    return Broken("\"", module.name(), "\" cannot name a module; expected letters, digits, '.', '_', '-' or '/'");
  }
  for (const auto& [name, value] : module.facts()) {
    if (!IsTextName(name)) return Broken("module @", module.name(), ": \"", name, "\" cannot name a fact");
  }
  absl::flat_hash_map<absl::string_view, const State*> states;
  for (const State& state : module.states()) {
    RETURN_IF_ERROR(Annotate(VerifyState(state), absl::StrCat("module @", module.name())));
    if (!states.emplace(state.name, &state).second) {
      return Broken("module @", module.name(), ": two states are named ", state.name);
    }
  }
  absl::flat_hash_set<absl::string_view> names;
  for (const auto& graph : module.graphs()) {
    if (!names.insert(graph->name()).second) {
      return Broken("module @", module.name(), ": two graphs are named @", graph->name());
    }
    RETURN_IF_ERROR(VerifyGraph(*graph));
    for (const Node* input : graph->inputs()) {
      if (!IsState(input->role())) continue;
      const auto at = states.find(input->name());
      if (at == states.end()) {
        return Broken("graph @", graph->name(), ": input %", input->name(), " is a ", RoleName(input->role()),
                      " that is not among the module's states");
      }
      const State& state = *at->second;
      if (state.type != input->result().type() || state.role != input->role()) {
        return Broken("graph @", graph->name(), ": input %", input->name(), " is ", input->result().type().ToString(),
                      " ", RoleName(input->role()), ", but the module's state is ", state.type.ToString(), " ",
                      RoleName(state.role));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace mt
