#include "ir/liveness.h"

#include <algorithm>

#include "ir/base/check.h"

namespace mt {

absl::flat_hash_map<Value, LiveRange> LiveRanges(const Graph& graph, absl::Span<Node* const> order) {
  CHECK_EQ(static_cast<int64_t>(order.size()), graph.num_nodes());
  const int64_t end = static_cast<int64_t>(order.size()) - 1;
  absl::flat_hash_map<Value, LiveRange> ranges;
  for (int64_t position = 0; position <= end; ++position) {
    const Node* node = order[static_cast<size_t>(position)];
    for (int i = 0; i < node->num_results(); ++i) {
      ranges[node->result(i)] = {.first = node->is_input() ? 0 : position, .last = position};
    }
    for (const Value& operand : node->operands()) {
      const auto at = ranges.find(operand);
      CHECK(at != ranges.end()) << "the order is not topological at node " << node->id();
      at->second.last = position;
    }
  }
  for (const Output& output : graph.outputs()) ranges.at(output.value).last = end;
  // From the back, so that the range of a view of a view is final before it extends what is viewed.
  for (int64_t position = end; position >= 0; --position) {
    const Node* node = order[static_cast<size_t>(position)];
    if (node->is_input() || !node->op().is_view) continue;
    LiveRange& viewed = ranges.at(node->operands()[0]);
    viewed.last = std::max(viewed.last, ranges.at(node->result()).last);
  }
  return ranges;
}

int64_t PeakLiveBytes(const Graph& graph, absl::Span<Node* const> order) {
  std::vector<int64_t> change(order.size() + 1, 0);  // Of the live bytes on reaching a position.
  for (const auto& [value, range] : LiveRanges(graph, order)) {
    if (value.node->is_input() || value.node->op().is_view) continue;
    const int64_t bytes = value.type().byte_size();
    change[static_cast<size_t>(range.first)] += bytes;
    change[static_cast<size_t>(range.last) + 1] -= bytes;
  }
  int64_t live = 0, peak = 0;
  for (const int64_t bytes : change) {
    live += bytes;
    peak = std::max(peak, live);
  }
  return peak;
}

}  // namespace mt
