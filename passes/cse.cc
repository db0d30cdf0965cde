// Common subexpression elimination.
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "passes/registry.h"

namespace mt {
namespace {

// A node by what it computes. Its name and phase say where it stands in the model, not what it is.
struct ByComputation {
  const Node* node;

  friend bool operator==(const ByComputation& a, const ByComputation& b) {
    return &a.node->op() == &b.node->op() && a.node->operands() == b.node->operands() &&
           a.node->attrs() == b.node->attrs() && a.node->recompute_of() == b.node->recompute_of();
  }
  template <typename H>
  friend H AbslHashValue(H h, const ByComputation& key) {
    h = H::combine(std::move(h), &key.node->op(), key.node->recompute_of(), key.node->operands());
    for (const auto& [name, value] : key.node->attrs().entries()) {
      h = H::combine(std::move(h), name, value.index());
      h = std::visit([&](const auto& held) { return H::combine(std::move(h), held); }, value);
    }
    return h;
  }
};

bool MergeEqualNodes(Graph& graph) {
  // A value that takes over a state's buffer stays apart, and so does a node that others repeat: `recompute_of` has to
  // keep telling them from it.
  absl::flat_hash_set<const Node*> kept_apart;
  for (const Output& output : graph.outputs()) {
    if (output.donates != nullptr) kept_apart.insert(output.value.node);
  }
  const std::vector<Node*> order = graph.TopologicalOrder();
  for (const Node* node : order) {
    if (node->recompute_of() != nullptr) kept_apart.insert(node->recompute_of());
  }
  absl::flat_hash_map<ByComputation, Node*> first;
  bool changed = false;
  for (Node* node : order) {
    if (node->is_input() || node->op().effect != Effect::kNone || kept_apart.contains(node)) continue;
    const auto [at, is_first] = first.emplace(ByComputation{node}, node);
    if (is_first) continue;
    for (int i = 0; i < node->num_results(); ++i) graph.ReplaceAllUses(node->result(i), at->second->result(i));
    graph.RemoveNode(node);
    changed = true;
  }
  return changed;
}

absl::StatusOr<bool> Cse(Module& module, const Attrs&, PassContext&) {
  bool changed = false;
  for (const auto& graph : module.graphs()) changed = MergeEqualNodes(*graph) || changed;
  return changed;
}

}  // namespace

const PassDef kCsePass = {
    .name = "cse",
    .summary = "Computes equal nodes once. Repeated nodes (remat) stay apart.",
    .any_stage = true,
    .always_on = true,
    .run = Cse,
};

}  // namespace mt
