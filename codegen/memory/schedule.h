// The order in which a program's nodes run, chosen to lower the peak of live bytes; and how values share buffers over
// an order.
#ifndef MT_CODEGEN_MEMORY_SCHEDULE_H_
#define MT_CODEGEN_MEMORY_SCHEDULE_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/graph.h"

namespace mt {

// A graph as arrays. A value's root is what it is a view of, through any number of views, or itself.
struct PlanNode {
  const Node* node = nullptr;
  bool is_view = false;
  absl::InlinedVector<int, 4> operands;  // Values.
  absl::InlinedVector<int, 2> results;   // Values.
  // Each root that is read, and how many of the operands read it.
  absl::InlinedVector<std::pair<int, int>, 4> reads;
  // Roots that a result may be written over, if they die here: (result value, root), in the row's order.
  absl::InlinedVector<std::pair<int, int>, 2> in_place;
  int64_t workspace_bytes = 0;             // As the op asks for.
  int64_t aligned_workspace_bytes = 0;     // What it takes in the arena.
  absl::InlinedVector<int, 4> successors;  // Nodes that come later: readers, writers of donated states, collectives.
  int num_predecessors = 0;
};

struct PlanValue {
  Value value;
  int producer = -1;  // Node; -1: an input of the graph.
  int root = -1;
  int64_t bytes = 0;       // Aligned.
  int num_reads = 0;       // Of a root: by all nodes, of itself and of its views.
  bool is_output = false;  // Of a root: it or a view of it is an output.
  // Of a root: the input, a state or cache, in whose buffer it lies: the input itself, or what it donates to.
  int state = -1;
  absl::InlinedVector<int, 4> readers;  // Of a root: nodes, each once.
};

struct PlanGraph {
  const Graph* graph = nullptr;
  std::vector<PlanNode> nodes;    // The graph's nodes without inputs, in topological order.
  std::vector<PlanValue> values;  // Inputs first, then results in order.
  int num_inputs = 0;
};

// A donated output must be computable into its state's buffer. Where it is not (the writer reads the state in another
// way than in place, the value is another input, or is donated twice), and where the old value of a state that is
// written is a metric, a copy is inserted. Returns how many. Errors: Internal for a graph that did not pass
// VerifyGraph.
absl::StatusOr<int> InsertDonationCopies(Graph& graph);
// Whether InsertDonationCopies would change the graph.
bool NeedsDonationCopies(const Graph& graph);

// Errors: Internal for a cycle through donations (readers of a state behind its writer).
// REQUIRES: !NeedsDonationCopies(graph).
absl::StatusOr<PlanGraph> MakePlanGraph(const Graph& graph, absl::string_view target, int64_t alignment);

// One buffer of values that follow one another in place, with their views.
struct SharedBuffer {
  int first_value = 0;          // The root that opened it.
  int64_t bytes = 0;            // Aligned.
  int64_t first = 0, last = 0;  // Positions in the order, inclusive; inputs: first = 0; outputs: to the last position.
  int state = -1;               // The state input whose buffer this is; it is live always. Caches are the program's.
};

struct Sharing {
  std::vector<int> buffer_of;  // By value.
  std::vector<SharedBuffer> buffers;
  int64_t peak_bytes = 0;  // Most bytes live at once, workspaces included, states left out.
  int64_t peak_position = 0;
};

// Live ranges over `order`, to the byte: results are there before operands are freed; a result takes over the buffer of
// an operand where the row allows it and the operand dies there; a donated output is written into its state's buffer;
// inputs are live from the start to their last reader, outputs to the end. Inputs that are not donated are never
// written; caches are live throughout. REQUIRES: `order` is a permutation of the nodes that respects their successors.
Sharing ShareBuffers(const PlanGraph& graph, absl::Span<const int> order);

// Respects data edges, donations and the order of collectives. The best of several list schedules by ShareBuffers'
// peak; the topological order unless another is lower.
std::vector<int> Schedule(const PlanGraph& graph);

}  // namespace mt

#endif  // MT_CODEGEN_MEMORY_SCHEDULE_H_
