// The head of a model: x w^T + bias and its cross entropy, as the passes over it find it.
#ifndef MT_PASSES_HEAD_H_
#define MT_PASSES_HEAD_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/graph.h"

namespace mt {

struct Head {
  Node* loss = nullptr;  // softmax_cross_entropy, or chunked_loss, which is all of the head.
  Node* matmul = nullptr;
  Node* add = nullptr;  // Adds the bias, where the matmul does not.
  Value x, w, bias;     // x [..., C], w [V, C]; bias [V] may be invalid.
};

// Every head of a forward graph, in order. Errors (InvalidArgument): a loss that `pass` cannot take, with the node that
// stopped it.
absl::StatusOr<std::vector<Head>> FindHeads(const Graph& graph, absl::string_view pass);

// Says that `node` stopped `pass`: what it is or does, and what the pass needs.
absl::Status HeadStopped(const Graph& graph, const Node& node, absl::string_view pass, absl::string_view fact,
                         absl::string_view expected);

}  // namespace mt

#endif  // MT_PASSES_HEAD_H_
