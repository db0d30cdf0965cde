// Rewrites that change no bit of any result.
#include <optional>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "ir/base/status_macros.h"
#include "passes/registry.h"

namespace mt {
namespace {

// What may stand in the place of a node's only result; nullopt: nothing better.
using Simplification = absl::StatusOr<std::optional<Value>>;
constexpr std::nullopt_t kKeep = std::nullopt;

// The node that makes operand 0 if it is an `op` that may be looked through: not one that remat placed here.
const Node* Producer(const Node& node, absl::string_view op) {
  const Node* producer = node.operands()[0].node;
  const bool fits = !producer->is_input() && producer->op().name == op && producer->recompute_of() == nullptr;
  return fits ? producer : nullptr;
}

// A node of the same name and phase as `node`.
Simplification Instead(Graph& graph, const Node& node, Value operand, Attrs attrs) {
  const Phase phase = graph.phase();
  graph.set_phase(node.phase());
  absl::StatusOr<Node*> made = graph.AddNode(node.op(), {operand}, std::move(attrs), node.name());
  graph.set_phase(phase);
  RETURN_IF_ERROR(made);
  return (*made)->result();
}

// y = x where the types are equal: reshape, broadcast, slice, pad and casts to what is there already.
Simplification SameType(Graph&, const Node& node) {
  const Value x = node.operands()[0];
  if (node.operands().size() == 1 && x.type() == node.result_types()[0]) return x;
  return kKeep;
}

Simplification Reshape(Graph& graph, const Node& node) {
  ASSIGN_OR_RETURN(const std::optional<Value> same, SameType(graph, node));
  if (same) return same;
  const Node* inner = Producer(node, "reshape");
  if (inner == nullptr) return kKeep;
  if (inner->operands()[0].type() == node.result_types()[0]) return inner->operands()[0];
  return Instead(graph, node, inner->operands()[0], node.attrs());
}

Simplification Transpose(Graph& graph, const Node& node) {
  const auto is_identity = [](const IntList& perm) {
    for (size_t i = 0; i < perm.size(); ++i) {
      if (perm[i] != static_cast<int64_t>(i)) return false;
    }
    return true;
  };
  const IntList& outer = node.attrs().Get<IntList>("perm");
  if (is_identity(outer)) return node.operands()[0];
  const Node* inner = Producer(node, "transpose");
  if (inner == nullptr) return kKeep;
  IntList composed;
  for (const int64_t i : outer) composed.push_back(inner->attrs().Get<IntList>("perm")[static_cast<size_t>(i)]);
  if (is_identity(composed)) return inner->operands()[0];
  return Instead(graph, node, inner->operands()[0], {{"perm", composed}});
}

// True if every value of `from` is one of `to`.
bool Widens(DType from, DType to) {
  return IsFloat(from) && (to == DType::kF64 || (to == DType::kF32 && from != DType::kF64) || from == to);
}

Simplification Cast(Graph& graph, const Node& node) {
  ASSIGN_OR_RETURN(const std::optional<Value> same, SameType(graph, node));
  if (same) return same;
  const Node* inner = Producer(node, "cast");
  if (inner == nullptr) return kKeep;
  const Value x = inner->operands()[0];
  if (!Widens(x.type().dtype, inner->result_types()[0].dtype)) return kKeep;
  if (x.type() == node.result_types()[0]) return x;
  return Instead(graph, node, x, node.attrs());
}

// 1 * x and x / 1 are x. A scale of a scale rounds twice and stays.
Simplification Scale(Graph&, const Node& node) {
  if (node.attrs().Double("factor") == 1) return node.operands()[0];
  return kKeep;
}

Simplification Dropout(Graph&, const Node& node) {
  if (node.attrs().Double("rate") == 0) return node.operands()[0];
  return kKeep;
}

Simplification Neg(Graph&, const Node& node) {
  if (const Node* inner = Producer(node, "neg")) return inner->operands()[0];
  return kKeep;
}

struct Rule {
  absl::string_view op;
  Simplification (*simplify)(Graph& graph, const Node& node);
};
constexpr Rule kRules[] = {
    {"reshape", Reshape}, {"transpose", Transpose}, {"cast", Cast},       {"scale", Scale},    {"dropout", Dropout},
    {"neg", Neg},         {"broadcast", SameType},  {"concat", SameType}, {"slice", SameType}, {"pad", SameType},
};

// One sweep suffices for what is written in order: a node's operands have been simplified before it.
absl::StatusOr<bool> Simplify(Graph& graph) {
  absl::flat_hash_set<const Node*> kept;  // Outputs, and nodes that others repeat.
  for (const Output& output : graph.outputs()) kept.insert(output.value.node);
  const std::vector<Node*> order = graph.TopologicalOrder();
  for (const Node* node : order) {
    if (node->recompute_of() != nullptr) kept.insert(node->recompute_of());
  }
  bool changed = false;
  for (Node* node : order) {
    if (node->is_input() || node->recompute_of() != nullptr || kept.contains(node)) continue;
    const auto rule = absl::c_find_if(kRules, [&](const Rule& r) { return r.op == node->op().name; });
    if (rule == std::end(kRules)) continue;
    ASSIGN_OR_RETURN(const std::optional<Value> better, rule->simplify(graph, *node));
    if (!better || better->type() != node->result().type()) continue;
    graph.ReplaceAllUses(node->result(), *better);
    graph.RemoveNode(node);
    changed = true;
  }
  return changed;
}

absl::StatusOr<bool> Canonicalize(Module& module, const Attrs&, PassContext&) {
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(const bool simplified, Simplify(*graph));
    changed = changed || simplified;
  }
  return changed;
}

}  // namespace

const PassDef kCanonicalizePass = {
    .name = "canonicalize",
    .summary = "Drops reshapes, transposes, casts and scales that do nothing, and joins those that follow each other.",
    .any_stage = true,
    .always_on = true,
    .run = Canonicalize,
};

}  // namespace mt
