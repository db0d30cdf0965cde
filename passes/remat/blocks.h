// The forward graph as a chain of blocks, found by structure alone: what rematerialization decides about.
#ifndef MT_PASSES_REMAT_BLOCKS_H_
#define MT_PASSES_REMAT_BLOCKS_H_

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "ir/graph.h"

namespace mt {

// What a value is a view of, through any number of views; itself where it is none.
Value BehindViews(Value value);

// A stretch of the forward graph that hands one node's results on to the next stretch.
struct RematBlock {
  std::vector<Node*> nodes;     // Forward nodes, views included, operands first.
  std::vector<Node*> backward;  // The nodes of the backward graph that belong to it, in canonical order.
  // Results of its nodes that other blocks read (behind views); later blocks count on them.
  absl::flat_hash_set<Value> outputs;
  // Blocks of one kind are equal node for node: what is decided for one by indices into `nodes` fits all.
  int kind = 0;
  // A repeated stretch of the model (a transformer block); where nothing repeats, any one or two stretches of several
  // nodes that do not hold the loss. Others lie before, between or behind: embedding, last norm, head and loss.
  bool is_unit = false;
};

struct RematChain {
  std::vector<RematBlock> blocks;  // In forward order.
  // Forward nodes that belong to no block: constants, casts of weights that several blocks read.
  std::vector<Node*> shared;
  absl::flat_hash_map<const Node*, int> block_of;     // Of forward nodes.
  absl::flat_hash_map<const Node*, int> backward_of;  // Of nodes of the backward graph.
  std::vector<Node*> late;                            // Nodes of the later phases, in canonical order.
};

// Cuts the forward nodes that depend on data and parameters where everything that is handed on comes from one node,
// and takes the longest runs of equal stretches, by a hash of ops, types and wiring, for the model's blocks.
RematChain FindRematBlocks(const Graph& graph);

// Whether the node may run twice: forward, no effect, no policy against it.
bool MayRecompute(const Node& node);

}  // namespace mt

#endif  // MT_PASSES_REMAT_BLOCKS_H_
