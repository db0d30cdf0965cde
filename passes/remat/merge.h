// Recomputed values in the backward pass's own regions.
#ifndef MT_PASSES_REMAT_MERGE_H_
#define MT_PASSES_REMAT_MERGE_H_

#include "absl/status/statusor.h"
#include "ir/graph.h"

namespace mt {

// A recomputed node that reads the tensor that a node of the backward pass reads as well, and whose other readers make
// gradients of parameters, becomes one fused node with it: gelu and its derivative, or a norm and its backward pass, in
// one pass over the data. The bits of all values stay. Nothing changes in a graph that `fuse` has not been over. True:
// changed; all nodes are made anew. REQUIRES: a verified graph.
absl::StatusOr<bool> MergeRecomputed(Graph& graph);

}  // namespace mt

#endif  // MT_PASSES_REMAT_MERGE_H_
