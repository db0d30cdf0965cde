#include "passes/head.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

bool IsOp(const Node& node, absl::string_view op) { return !node.is_input() && node.op().name == op; }

absl::Status CheckOnlyReader(const Graph& graph, const Node& node, absl::string_view pass) {
  if (graph.IsOutput(&node)) return HeadStopped(graph, node, pass, "is an output of the graph", "it to stay inside");
  if (node.uses().size() == 1) return absl::OkStatus();
  return HeadStopped(graph, node, pass, absl::StrCat("is read ", node.uses().size(), " times"),
                     "it to be read by the cross entropy alone");
}

absl::StatusOr<Head> WrittenOut(const Graph& graph, Node* loss, absl::string_view pass) {
  Head head{.loss = loss};
  Node* maker = loss->operands()[0].node;
  if (IsOp(*maker, "add")) {
    head.add = maker;
    RETURN_IF_ERROR(CheckOnlyReader(graph, *maker, pass));
    const bool first = IsOp(*maker->operands()[0].node, "matmul");
    head.bias = maker->operands()[first ? 1 : 0];
    maker = maker->operands()[first ? 0 : 1].node;
  }
  if (!IsOp(*maker, "matmul") || maker->attrs().Bool("transpose_a") || !maker->attrs().Bool("transpose_b") ||
      maker->operands()[1].type().rank() != 2) {
    return HeadStopped(graph, *maker, pass, absl::StrCat("makes the logits of ", loss->name()),
                       "matmul(x, w) {transpose_b=true}, w [V, C], with or without a bias, there");
  }
  RETURN_IF_ERROR(CheckOnlyReader(graph, *maker, pass));
  head.matmul = maker;
  head.x = maker->operands()[0];
  head.w = maker->operands()[1];
  const bool has_bias = maker->attrs().Bool("bias");
  if (has_bias && head.add == nullptr) head.bias = maker->operands()[2];
  const Dims classes = {head.w.type().dim(0)};
  if (head.bias && ((has_bias && head.add != nullptr) || head.bias.type().dims != classes)) {
    return HeadStopped(graph, *head.add, pass, absl::StrCat("adds ", head.bias.type().ToString(), " to the logits"),
                       absl::StrCat("one bias of ", DimsToString(classes), " at most"));
  }
  return head;
}

}  // namespace

absl::Status HeadStopped(const Graph& graph, const Node& node, absl::string_view pass, absl::string_view fact,
                         absl::string_view expected) {
  const std::string name = node.name().empty() ? "" : absl::StrCat(" \"", node.name(), "\"");
  const std::string what = node.is_input() ? absl::StrCat("input ", node.name()) : absl::StrCat(node.op().name, name);
  return absl::InvalidArgumentError(absl::StrCat("graph @", graph.name(), ": ", what, " ", fact, "; ", pass, " needs ",
                                                 expected, ". Write the head so, or leave ", pass, " out"));
}

absl::StatusOr<std::vector<Head>> FindHeads(const Graph& graph, absl::string_view pass) {
  std::vector<Head> heads;
  for (Node* node : graph.TopologicalOrder()) {
    if (IsOp(*node, "softmax_cross_entropy")) {
      ASSIGN_OR_RETURN(Head head, WrittenOut(graph, node, pass));
      heads.push_back(head);
    } else if (IsOp(*node, "chunked_loss")) {
      heads.push_back({.loss = node, .x = node->operands()[0], .w = node->operands()[1]});
      if (node->attrs().Bool("bias")) heads.back().bias = node->operands()[3];
    }
  }
  return heads;
}

}  // namespace mt
