// Fused nodes, for rematerialization, in the parts that can be computed again by themselves.
#ifndef MT_PASSES_REMAT_SPLIT_H_
#define MT_PASSES_REMAT_SPLIT_H_

#include <cstdint>
#include <vector>

#include "ir/graph.h"

namespace mt {

// A part of a fused forward node: it computes some of the node's results from another one. Sum and norm are one node,
// but where the sum is kept the norm is recomputed from it, without what the sum was made of.
struct FusedPart {
  int64_t part = 0, whole = 0;  // Node ids: the same in clones of the graph.
  std::vector<int> results;     // By result of the part: the result of the whole that it stands for.
};

// Adds the parts to the graph as nodes that take over their results' readers, so that the graph says what depends on
// what. The bits of all values stay. REQUIRES: a verified graph.
std::vector<FusedPart> SplitFusedNodes(Graph& graph);

// Gives the results back to the whole nodes and removes the parts; clones of a part, which remat made, become
// recomputations of the whole.
void JoinFusedNodes(Graph& graph, const std::vector<FusedPart>& parts);

}  // namespace mt

#endif  // MT_PASSES_REMAT_SPLIT_H_
