// Live ranges of values over a given order of nodes.
#ifndef MT_IR_LIVENESS_H_
#define MT_IR_LIVENESS_H_

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "ir/graph.h"

namespace mt {

struct LiveRange {
  int64_t first = 0, last = 0;  // Positions in the order, inclusive. Written at `first`, last read at `last`.
};

// Range of every value of every node in `order`. Inputs are live from 0 (states and data) and outputs to the end; a
// value nobody reads lives at its own position. Views count as reads of what they view until their own last reader.
// REQUIRES: `order` is a topological order of all nodes of `graph` (inputs included).
absl::flat_hash_map<Value, LiveRange> LiveRanges(const Graph& graph, absl::Span<Node* const> order);

// Most bytes live at once of values made by nodes (inputs left out), views counted once.
int64_t PeakLiveBytes(const Graph& graph, absl::Span<Node* const> order);

}  // namespace mt

#endif  // MT_IR_LIVENESS_H_
