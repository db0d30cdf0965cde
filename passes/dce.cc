// Dead code elimination. Runs after every pass as well.
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "passes/registry.h"

namespace mt {
namespace {

// Removes nodes that no output and no effect depends on, then inputs of the loader and of StepInputs that nobody reads.
// States stay: they are what the module promises to hold.
absl::StatusOr<bool> RemoveDeadNodes(Graph& graph) {
  absl::flat_hash_set<const Node*> live;
  std::vector<const Node*> todo;
  const auto reach = [&](const Node* node) {
    if (live.insert(node).second) todo.push_back(node);
  };
  const std::vector<Node*> order = graph.TopologicalOrder();
  if (static_cast<int64_t>(order.size()) != graph.num_nodes()) {
    return absl::InternalError(absl::StrCat("graph @", graph.name(), " has a cycle"));
  }
  for (const Output& output : graph.outputs()) {
    reach(output.value.node);
    if (output.donates != nullptr) reach(output.donates);
  }
  for (const Node* node : order) {
    if (!node->is_input() && node->op().effect != Effect::kNone) reach(node);
    if (node->is_input() && IsState(node->role())) reach(node);
  }
  while (!todo.empty()) {
    const Node* node = todo.back();
    todo.pop_back();
    for (const Value& operand : node->operands()) reach(operand.node);
  }
  if (live.size() == order.size()) return false;
  for (auto node = order.rbegin(); node != order.rend(); ++node) {
    if (live.contains(*node)) continue;
    if ((*node)->is_input()) {
      graph.RemoveInput(*node);
    } else {
      graph.RemoveNode(*node);
    }
  }
  return true;
}

absl::StatusOr<bool> Dce(Module& module, const Attrs&, PassContext&) {
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(const bool removed, RemoveDeadNodes(*graph));
    changed = changed || removed;
  }
  return changed;
}

}  // namespace

const PassDef kDcePass = {
    .name = "dce",
    .summary = "Removes nodes whose results nobody needs, and data and step inputs that nobody reads.",
    .any_stage = true,
    .always_on = true,
    .run = Dce,
};

}  // namespace mt
