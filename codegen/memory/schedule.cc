#include "codegen/memory/schedule.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <queue>
#include <set>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/op.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

Value RootOf(Value value) {
  while (!value.node->is_input() && value.node->op().is_view) value = value.node->operands()[0];
  return value;
}

// Whether `writer` may write result `index` over every operand that is `state` or a view of it.
bool WritesInPlace(const Node& writer, int index, const Node& state) {
  std::optional<std::vector<std::pair<int, int>>> pairs;
  for (size_t k = 0; k < writer.operands().size(); ++k) {
    if (RootOf(writer.operands()[k]).node != &state) continue;
    if (!pairs) pairs = InPlacePairs(writer.op(), writer.operand_types(), writer.result_types(), writer.attrs());
    if (std::find(pairs->begin(), pairs->end(), std::make_pair(index, static_cast<int>(k))) == pairs->end())
      return false;
  }
  return true;
}

// Indices of the outputs whose value needs a copy.
std::vector<size_t> OutputsToCopy(const Graph& graph) {
  absl::flat_hash_set<const Node*> written;  // States that do not keep their value.
  for (const Output& output : graph.outputs()) {
    if (output.donates != nullptr && RootOf(output.value).node != output.donates) written.insert(output.donates);
  }
  std::vector<size_t> copies;
  absl::flat_hash_set<Value> taken;
  for (size_t i = 0; i < graph.outputs().size(); ++i) {
    const Output& output = graph.outputs()[i];
    const Value root = RootOf(output.value);
    if (output.donates == nullptr) {
      if (written.contains(root.node)) copies.push_back(i);
    } else if (root.node != output.donates) {
      if (root.node->is_input() || !taken.insert(root).second ||
          !WritesInPlace(*root.node, root.index, *output.donates)) {
        copies.push_back(i);
      }
    }
  }
  return copies;
}

}  // namespace

bool NeedsDonationCopies(const Graph& graph) { return !OutputsToCopy(graph).empty(); }

absl::StatusOr<int> InsertDonationCopies(Graph& graph) {
  const std::vector<size_t> copies = OutputsToCopy(graph);
  if (copies.empty()) return 0;
  const OpDef* copy = FindOp("broadcast");  // To the dimensions that it has: a copy of any dtype.
  CHECK(copy != nullptr);
  std::vector<Output> outputs = graph.outputs();
  for (const size_t i : copies) {
    const Dims& dims = outputs[i].value.type().dims;
    ASSIGN_OR_RETURN(Node * node,
                     graph.AddNode(*copy, {outputs[i].value}, {{"dims", IntList(dims.begin(), dims.end())}},
                                   absl::StrCat(outputs[i].name, ".copy")));
    graph.SetNodePhase(node, outputs[i].donates == nullptr ? outputs[i].value.node->phase() : Phase::kOptimizer);
    outputs[i].value = node->result();
  }
  graph.SetOutputs(std::move(outputs));
  return static_cast<int>(copies.size());
}

namespace {

// The values that lead from `state` to `root` step by step, last first: each is read by the next step alone, which may
// write over it, and the first one is written over the state. Empty where there is no such chain.
std::vector<int> StepsBefore(const PlanGraph& plan, int root, int state) {
  std::vector<int> steps;
  for (int at = root;;) {
    const PlanNode& node = plan.nodes[At(plan.values[At(at)].producer)];
    int over = -1;
    for (const auto& [result, operand] : node.in_place) {
      if (result != at) continue;
      if (operand == state) return steps;
      if (over < 0 && plan.values[At(operand)].producer >= 0) over = operand;
    }
    if (over < 0) return {};
    const PlanValue& value = plan.values[At(over)];
    if (value.is_output || value.state >= 0 || value.readers.size() != 1) return {};
    // The state must not be read by a later step besides.
    if (std::any_of(node.reads.begin(), node.reads.end(), [&](const auto& read) { return read.first == state; })) {
      return {};
    }
    steps.push_back(over);
    at = over;
  }
}

}  // namespace

absl::StatusOr<PlanGraph> MakePlanGraph(const Graph& graph, absl::string_view target, int64_t alignment) {
  PlanGraph plan;
  plan.graph = &graph;
  const std::vector<Node*> order = graph.TopologicalOrder();
  int64_t max_id = 0;
  for (const Node* node : order) max_id = std::max(max_id, node->id());
  std::vector<int> first_value(At(max_id) + 1, -1);  // By node id.
  const auto value_index = [&](const Value& value) { return first_value[At(value.node->id())] + value.index; };
  const auto aligned = [&](int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
  for (Node* node : order) {
    first_value[At(node->id())] = static_cast<int>(plan.values.size());
    const int producer = node->is_input() ? -1 : static_cast<int>(plan.nodes.size());
    for (int r = 0; r < node->num_results(); ++r) {
      PlanValue value;
      value.value = node->result(r);
      value.producer = producer;
      value.root = static_cast<int>(plan.values.size());
      value.bytes = aligned(node->result_types()[At(r)].byte_size());
      if (node->is_input() && IsDonated(node->role())) value.state = value.root;
      plan.values.push_back(std::move(value));
    }
    if (node->is_input()) {
      ++plan.num_inputs;
      continue;
    }
    PlanNode entry;
    entry.node = node;
    entry.is_view = node->op().is_view;
    for (const Value& operand : node->operands()) {
      const int v = value_index(operand);
      entry.operands.push_back(v);
      const int root = plan.values[At(v)].root;
      ++plan.values[At(root)].num_reads;
      const auto known =
          std::find_if(entry.reads.begin(), entry.reads.end(), [&](const auto& r) { return r.first == root; });
      if (known != entry.reads.end()) {
        ++known->second;
      } else {
        entry.reads.push_back({root, 1});
        plan.values[At(root)].readers.push_back(producer);
      }
    }
    for (int r = 0; r < node->num_results(); ++r) entry.results.push_back(first_value[At(node->id())] + r);
    if (entry.is_view) {
      plan.values[At(entry.results[0])].root = plan.values[At(entry.operands[0])].root;
    } else {
      const std::vector<TensorType> operand_types = node->operand_types();
      entry.workspace_bytes = WorkspaceBytes(target, node->op(), operand_types, node->result_types(), node->attrs());
      entry.aligned_workspace_bytes = aligned(entry.workspace_bytes);
      const std::vector<std::pair<int, int>> pairs =
          InPlacePairs(node->op(), operand_types, node->result_types(), node->attrs());
      for (const auto& [r, k] : pairs) {
        const int result = entry.results[At(r)], root = plan.values[At(entry.operands[At(k)])].root;
        if (plan.values[At(result)].bytes != plan.values[At(root)].bytes) continue;
        // Every operand that reads this root must be one that the result may be written over.
        bool all = true;
        for (size_t other = 0; other < entry.operands.size(); ++other) {
          all =
              all && (plan.values[At(entry.operands[other])].root != root ||
                      std::find(pairs.begin(), pairs.end(), std::make_pair(r, static_cast<int>(other))) != pairs.end());
        }
        if (all) entry.in_place.push_back({result, root});
      }
    }
    plan.nodes.push_back(std::move(entry));
  }

  const auto edge = [&](int from, int to) {
    plan.nodes[At(from)].successors.push_back(to);
    ++plan.nodes[At(to)].num_predecessors;
  };
  int last_collective = -1;
  for (int n = 0; n < static_cast<int>(plan.nodes.size()); ++n) {
    const PlanNode& node = plan.nodes[At(n)];
    for (const int v : node.operands) {
      if (plan.values[At(v)].producer >= 0) edge(plan.values[At(v)].producer, n);
    }
    if (node.node->op().effect == Effect::kCollective) {
      if (last_collective >= 0) edge(last_collective, n);
      last_collective = n;
    }
  }
  for (const Output& output : graph.outputs()) {
    plan.values[At(plan.values[At(value_index(output.value))].root)].is_output = true;
  }
  for (const Output& output : graph.outputs()) {
    const int root = plan.values[At(value_index(output.value))].root;
    if (output.donates == nullptr) continue;
    const int state = value_index(output.donates->result());
    if (root == state) continue;
    CHECK(plan.values[At(root)].state < 0 && plan.values[At(root)].producer >= 0)
        << "a copy is missing: " << output.name;
    plan.values[At(root)].state = state;
    // A state may be added to in several steps, each in place of the one before: all lie in its buffer.
    int writer = plan.values[At(root)].producer;
    for (const int earlier : StepsBefore(plan, root, state)) {
      plan.values[At(earlier)].state = state;
      writer = plan.values[At(earlier)].producer;
    }
    for (const int reader : plan.values[At(state)].readers) {
      if (reader != writer) edge(reader, writer);
    }
  }

  // A cycle can only come through the donations.
  std::vector<int> waiting, ready;
  for (int n = 0; n < static_cast<int>(plan.nodes.size()); ++n) {
    waiting.push_back(plan.nodes[At(n)].num_predecessors);
    if (waiting.back() == 0) ready.push_back(n);
  }
  size_t done = 0;
  while (done < ready.size()) {
    for (const int s : plan.nodes[At(ready[done])].successors) {
      if (--waiting[At(s)] == 0) ready.push_back(s);
    }
    ++done;
  }
  if (done != plan.nodes.size()) {
    const auto stuck = std::find_if(waiting.begin(), waiting.end(), [](int w) { return w > 0; });
    return absl::InternalError(absl::StrCat("graph ", graph.name(), ": node \"",
                                            plan.nodes[At(stuck - waiting.begin())].node->name(),
                                            "\" must run both before and after the writer of a state that it reads"));
  }
  return plan;
}

namespace {

// The run so far: what lives where.
class LiveState {
 public:
  explicit LiveState(const PlanGraph& graph) : graph_(graph) {
    sharing_.buffer_of.assign(graph.values.size(), -1);
    sharing_.buffers.reserve(graph.values.size());
    uses_.reserve(graph.values.size());
    for (int v = 0; v < graph.num_inputs; ++v) {
      const Role role = graph.values[At(v)].value.node->role();
      const int b = Open(v, IsState(role) ? v : -1);
      uses_[At(b)].pinned = IsDonated(role);
      Define(v, b);
    }
    // An input that nobody reads is live at the first position alone.
    sharing_.peak_bytes = live_;
    for (int v = 0; v < graph.num_inputs; ++v) Close(sharing_.buffer_of[At(v)]);
  }

  int64_t remaining(int buffer) const { return uses_[At(buffer)].remaining; }
  int buffer_of(int value) const { return sharing_.buffer_of[At(value)]; }
  int64_t peak_bytes() const { return sharing_.peak_bytes; }

  // Change of the live bytes by running the node now.
  int64_t Delta(int n) const {
    const PlanNode& node = graph_.nodes[At(n)];
    int64_t delta = 0;
    absl::InlinedVector<int, 2> taken;
    if (!node.is_view) {
      for (const int v : node.results) {
        const PlanValue& value = graph_.values[At(v)];
        if (value.state >= 0) continue;
        const int over = InPlaceBuffer(node, v, taken);
        if (over >= 0) taken.push_back(over);
        if (value.num_reads == 0 && !value.is_output) {
          if (over >= 0) delta -= value.bytes;
        } else if (over < 0) {
          delta += value.bytes;
        }
      }
    }
    for (const auto& [root, count] : node.reads) {
      const int b = buffer_of(root);
      if (remaining(b) == count && !Pinned(b) && std::find(taken.begin(), taken.end(), b) == taken.end()) {
        delta -= sharing_.buffers[At(b)].bytes;
      }
    }
    return delta;
  }

  void Run(int n) {
    const PlanNode& node = graph_.nodes[At(n)];
    absl::InlinedVector<int, 2> taken;
    if (node.is_view) {
      sharing_.buffer_of[At(node.results[0])] = buffer_of(node.operands[0]);
    } else {
      for (const int v : node.results) {
        const PlanValue& value = graph_.values[At(v)];
        int b = value.state >= 0 ? buffer_of(value.state) : InPlaceBuffer(node, v, taken);
        if (b >= 0) {
          taken.push_back(b);
          sharing_.buffer_of[At(v)] = b;
        } else {
          b = Open(v, -1);
        }
        Define(v, b);
      }
    }
    if (live_ + node.aligned_workspace_bytes > sharing_.peak_bytes) {
      sharing_.peak_bytes = live_ + node.aligned_workspace_bytes;
      sharing_.peak_position = position_;
    }
    for (const auto& [root, count] : node.reads) {
      uses_[At(buffer_of(root))].remaining -= count;
      Close(buffer_of(root));
    }
    if (!node.is_view) {
      for (const int v : node.results) Close(buffer_of(v));
    }
    ++position_;
  }

  Sharing Finish() && {
    const int64_t last = std::max<int64_t>(position_ - 1, 0);
    for (size_t b = 0; b < sharing_.buffers.size(); ++b) {
      if (!uses_[b].closed) sharing_.buffers[b].last = last;
    }
    return std::move(sharing_);
  }

 private:
  bool Pinned(int b) const { return uses_[At(b)].pinned; }

  int Open(int v, int state) {
    const int b = static_cast<int>(sharing_.buffers.size());
    SharedBuffer buffer;
    buffer.first_value = v;
    buffer.bytes = graph_.values[At(v)].bytes;
    buffer.first = position_;
    buffer.state = state;
    if (state < 0) live_ += buffer.bytes;
    sharing_.buffers.push_back(buffer);
    uses_.push_back({.pinned = state >= 0});
    sharing_.buffer_of[At(v)] = b;
    return b;
  }

  void Define(int v, int b) {
    uses_[At(b)].remaining += graph_.values[At(v)].num_reads;
    if (graph_.values[At(v)].is_output) uses_[At(b)].pinned = true;
  }

  // Frees the buffer if nothing will read it.
  void Close(int b) {
    BufferUse& use = uses_[At(b)];
    if (use.remaining > 0 || use.pinned || use.closed) return;
    use.closed = true;
    sharing_.buffers[At(b)].last = position_;
    live_ -= sharing_.buffers[At(b)].bytes;
  }

  // The buffer of an operand that dies at `node` and that result `v` may be written over; -1: none.
  int InPlaceBuffer(const PlanNode& node, int v, absl::Span<const int> taken) const {
    for (const auto& [result, root] : node.in_place) {
      if (result != v || graph_.values[At(root)].producer < 0) continue;
      const int b = buffer_of(root);
      if (Pinned(b) || std::find(taken.begin(), taken.end(), b) != taken.end()) continue;
      for (const auto& [read, count] : node.reads) {
        if (read == root && remaining(b) == count) return b;
      }
    }
    return -1;
  }

  const PlanGraph& graph_;
  Sharing sharing_;
  struct BufferUse {
    int64_t remaining = 0;  // Reads to come of the values in it.
    bool pinned = false, closed = false;
  };
  std::vector<BufferUse> uses_;  // By buffer.
  int64_t live_ = 0;
  int64_t position_ = 0;
};

// An order and its ShareBuffers' peak.
struct Proposal {
  std::vector<int> order;
  int64_t peak_bytes = 0;
};

// Follows `base`, but runs a node that raises nothing as soon as it can; among the first `window` nodes that are ready
// in the order of `base`, the one that raises the live bytes least. Null where the peak is not below `below`.
std::optional<Proposal> Forward(const PlanGraph& graph, absl::Span<const int> base, int window, int64_t below) {
  const int n = static_cast<int>(graph.nodes.size());
  std::vector<int> position(At(n)), waiting(At(n));
  for (int i = 0; i < n; ++i) position[At(base[At(i)])] = i;
  std::set<int> ready;  // Positions in base.
  std::priority_queue<int, std::vector<int>, std::greater<int>> eager;
  std::vector<bool> done(At(n), false);
  LiveState state(graph);
  std::vector<int> order;
  order.reserve(At(n));
  const auto consider = [&](int node) {
    if (!done[At(node)] && waiting[At(node)] == 0 && state.Delta(node) <= 0) eager.push(position[At(node)]);
  };
  for (int i = 0; i < n; ++i) {
    waiting[At(i)] = graph.nodes[At(i)].num_predecessors;
    if (waiting[At(i)] == 0) ready.insert(position[At(i)]);
  }
  for (const int p : ready) consider(base[At(p)]);
  while (static_cast<int>(order.size()) < n) {
    int next = -1;
    while (!eager.empty() && next < 0) {
      const int node = base[At(eager.top())];
      eager.pop();
      if (!done[At(node)] && state.Delta(node) <= 0) next = node;
    }
    if (next < 0) {
      int64_t least = std::numeric_limits<int64_t>::max();
      int seen = 0;
      for (const int p : ready) {
        if (seen++ == window) break;
        const int64_t delta = window == 1 ? 0 : state.Delta(base[At(p)]);
        if (delta < least) least = delta, next = base[At(p)];
      }
    }
    CHECK(next >= 0);
    done[At(next)] = true;
    ready.erase(position[At(next)]);
    state.Run(next);
    if (state.peak_bytes() >= below) return std::nullopt;
    order.push_back(next);
    for (const int s : graph.nodes[At(next)].successors) {
      if (--waiting[At(s)] == 0) {
        ready.insert(position[At(s)]);
        consider(s);
      }
    }
    // Whoever is now the last reader of what was read may have become cheap.
    for (const auto& [root, count] : graph.nodes[At(next)].reads) {
      if (state.remaining(state.buffer_of(root)) > 2) continue;
      for (const int reader : graph.values[At(root)].readers) consider(reader);
    }
  }
  return Proposal{std::move(order), state.peak_bytes()};
}

// The same backwards: from the end, a node goes directly before its first reader where that frees at least what it
// makes live (casts of weights, constants, recomputed values).
std::vector<int> Backward(const PlanGraph& graph, absl::Span<const int> base) {
  const int n = static_cast<int>(graph.nodes.size());
  std::vector<int> position(At(n)), waiting(At(n), 0);
  std::vector<absl::InlinedVector<int, 4>> predecessors(At(n));
  for (int i = 0; i < n; ++i) {
    position[At(base[At(i)])] = i;
    waiting[At(i)] = static_cast<int>(graph.nodes[At(i)].successors.size());
    for (const int s : graph.nodes[At(i)].successors) predecessors[At(s)].push_back(i);
  }
  std::vector<bool> live(graph.values.size(), false), done(At(n), false);
  for (size_t v = 0; v < graph.values.size(); ++v) live[v] = graph.values[v].is_output || graph.values[v].state >= 0;
  const auto delta = [&](int i) {
    const PlanNode& node = graph.nodes[At(i)];
    int64_t bytes = 0;
    for (const auto& [root, count] : node.reads) {
      if (!live[At(root)]) bytes += graph.values[At(root)].bytes;
    }
    if (node.is_view) return bytes;
    for (const int v : node.results) {
      if (live[At(v)] && graph.values[At(v)].state < 0) bytes -= graph.values[At(v)].bytes;
    }
    return bytes;
  };
  std::set<int> ready;
  std::priority_queue<int> eager;
  const auto consider = [&](int i) {
    if (!done[At(i)] && waiting[At(i)] == 0 && delta(i) <= 0) eager.push(position[At(i)]);
  };
  for (int i = 0; i < n; ++i) {
    if (waiting[At(i)] == 0) ready.insert(position[At(i)]);
  }
  for (const int p : ready) consider(base[At(p)]);
  std::vector<int> order;
  order.reserve(At(n));
  while (static_cast<int>(order.size()) < n) {
    int next = -1;
    while (!eager.empty() && next < 0) {
      const int node = base[At(eager.top())];
      eager.pop();
      if (!done[At(node)]) next = node;
    }
    if (next < 0) next = base[At(*ready.rbegin())];
    done[At(next)] = true;
    ready.erase(position[At(next)]);
    order.push_back(next);
    absl::InlinedVector<int, 4> born;
    for (const auto& [root, count] : graph.nodes[At(next)].reads) {
      if (live[At(root)]) continue;
      live[At(root)] = true;
      born.push_back(root);
    }
    for (const int p : predecessors[At(next)]) {
      if (--waiting[At(p)] == 0) {
        ready.insert(position[At(p)]);
        consider(p);
      }
    }
    for (const int root : born) {
      for (const int reader : graph.values[At(root)].readers) consider(reader);
    }
  }
  std::reverse(order.begin(), order.end());
  return order;
}

// `base` where it respects all edges, else the nearest order that does.
std::vector<int> Legal(const PlanGraph& graph) {
  std::vector<int> waiting, order;
  std::priority_queue<int, std::vector<int>, std::greater<int>> ready;
  for (int i = 0; i < static_cast<int>(graph.nodes.size()); ++i) {
    waiting.push_back(graph.nodes[At(i)].num_predecessors);
    if (waiting.back() == 0) ready.push(i);
  }
  while (!ready.empty()) {
    const int next = ready.top();
    ready.pop();
    order.push_back(next);
    for (const int s : graph.nodes[At(next)].successors) {
      if (--waiting[At(s)] == 0) ready.push(s);
    }
  }
  return order;
}

// An order for backward passes. The topological one runs originals before clones, which are younger, so that whatever
// needs no recomputed value overtakes what does. Here a recomputed node and a view stand directly before their first
// reader, and everything else where it stood without them. With `sinks_first`, what makes a gradient of a parameter
// runs as soon as the gradient that it reads is there: what it reads besides dies before the next is made.
std::vector<int> JustInTime(const PlanGraph& graph, bool sinks_first) {
  const int n = static_cast<int>(graph.nodes.size());
  const auto floats = [&](int i) {
    const PlanNode& node = graph.nodes[At(i)];
    return node.node->recompute_of() != nullptr || (node.is_view && node.node->phase() == Phase::kBackward);
  };
  std::vector<int> originals;
  for (int i = 0; i < n; ++i) {
    if (!floats(i)) originals.push_back(i);
  }
  std::sort(originals.begin(), originals.end(),
            [&](int a, int b) { return graph.nodes[At(a)].node->id() < graph.nodes[At(b)].node->id(); });
  constexpr int64_t kUnit = 4;
  std::vector<int64_t> key(At(n), kUnit * n);
  for (size_t rank = 0; rank < originals.size(); ++rank)
    key[At(originals[rank])] = kUnit * static_cast<int64_t>(rank + 1);
  if (sinks_first) {
    for (const int i : originals) {
      const PlanNode& node = graph.nodes[At(i)];
      if (node.node->phase() != Phase::kBackward) continue;
      const bool sink = std::all_of(node.successors.begin(), node.successors.end(),
                                    [&](int s) { return graph.nodes[At(s)].node->phase() == Phase::kOptimizer; });
      if (!sink) continue;
      int64_t after = -1;
      for (const auto& [root, count] : node.reads) {
        const int producer = graph.values[At(root)].producer;
        if (producer >= 0 && !floats(producer) && graph.nodes[At(producer)].node->phase() == Phase::kBackward) {
          after = std::max(after, key[At(producer)]);
        }
      }
      if (after >= 0) key[At(i)] = std::min(key[At(i)], after + 1);
    }
  }
  for (int i = n; i-- > 0;) {
    if (!floats(i)) continue;
    for (const int s : graph.nodes[At(i)].successors)
      key[At(i)] = std::min(key[At(i)], key[At(s)] - (floats(s) ? 0 : 1));
  }
  using Entry = std::pair<int64_t, int>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> ready;
  std::vector<int> waiting, order;
  for (int i = 0; i < n; ++i) {
    waiting.push_back(graph.nodes[At(i)].num_predecessors);
    if (waiting.back() == 0) ready.push({key[At(i)], i});
  }
  while (!ready.empty()) {
    const int next = ready.top().second;
    ready.pop();
    order.push_back(next);
    for (const int s : graph.nodes[At(next)].successors) {
      if (--waiting[At(s)] == 0) ready.push({key[At(s)], s});
    }
  }
  return order;
}

// Null where the peak is not below `below`.
std::optional<int64_t> Peak(const PlanGraph& graph, absl::Span<const int> order, int64_t below) {
  LiveState state(graph);
  for (const int n : order) {
    state.Run(n);
    if (state.peak_bytes() >= below) return std::nullopt;
  }
  return state.peak_bytes();
}

}  // namespace

Sharing ShareBuffers(const PlanGraph& graph, absl::Span<const int> order) {
  LiveState state(graph);
  for (const int n : order) state.Run(n);
  return std::move(state).Finish();
}

std::vector<int> Schedule(const PlanGraph& graph) {
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  Proposal best{.order = Legal(graph)};
  if (const std::optional<int64_t> peak = Peak(graph, best.order, kAny)) best.peak_bytes = *peak;
  const auto propose = [&](const std::vector<int>& order) {
    const std::optional<int64_t> peak = Peak(graph, order, best.peak_bytes);
    if (peak) best = {order, *peak};
  };
  const auto propose_forward = [&](const std::vector<int>& base, int window) {
    std::optional<Proposal> proposal = Forward(graph, base, window, best.peak_bytes);
    if (proposal) best = *std::move(proposal);
  };
  std::vector<std::vector<int>> bases = {best.order, JustInTime(graph, /*sinks_first=*/true)};
  if (std::any_of(graph.nodes.begin(), graph.nodes.end(),
                  [](const PlanNode& node) { return node.node->recompute_of() != nullptr; })) {
    bases.push_back(JustInTime(graph, /*sinks_first=*/false));
  }
  for (size_t i = 0; i < bases.size(); ++i) {
    const std::vector<int>& base = bases[i];
    if (std::find(bases.begin(), bases.begin() + static_cast<int64_t>(i), base) !=
        bases.begin() + static_cast<int64_t>(i)) {
      continue;
    }
    const std::vector<int> late = Backward(graph, base);
    if (i > 0) propose(base);
    propose_forward(base, 1);
    propose(late);
    propose_forward(late, 1);
    propose_forward(base, 8);
    propose_forward(late, 8);
    propose_forward(late, 64);
  }
  // A second round from the best so far.
  propose(Backward(graph, std::vector<int>(best.order)));
  propose_forward(std::vector<int>(best.order), 4);
  return std::move(best.order);
}

}  // namespace mt
