#include "tests/fuzz/graph_checks.h"

#include <vector>

#include "ir/base/check.h"
#include "ir/op.h"

namespace mt {

void ExpectCosts(const Graph& graph) {
  for (const Node* node : graph.TopologicalOrder()) {
    if (node->is_input()) continue;
    std::vector<TensorType> operands;
    for (const Value& operand : node->operands()) operands.push_back(operand.type());
    const Cost cost = CostOf(node->op(), operands, node->result_types(), node->attrs());
    CHECK(cost.flops >= 0 && cost.bytes_read >= 0 && cost.bytes_written >= 0) << node->op().name;
  }
}

}  // namespace mt
