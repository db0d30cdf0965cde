// Written-out attention to one op.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/status_macros.h"
#include "ir/tensor_type.h"
#include "passes/registry.h"

namespace mt {
namespace {

constexpr absl::string_view kAsWritten = "model";

// What was asked of the window: N keys before the query, or T/N of them.
struct Window {
  std::optional<int64_t> keys, part;
};

absl::StatusOr<Window> ParseWindow(absl::string_view text) {
  Window window;
  if (text == kAsWritten) return window;
  int64_t number = 0;
  const bool is_part = absl::ConsumePrefix(&text, "T/");
  if (!absl::SimpleAtoi(text, &number) || number < 1 || number > kMaxElements) {
    return absl::InvalidArgumentError(
        absl::StrCat("window=", is_part ? "T/" : "", text,
                     " is wrong; expected the number of keys before the query that it sees, 1 or more, or T/4 for a "
                     "quarter of the sequence, or ",
                     kAsWritten, " for the model's own"));
  }
  (is_part ? window.part : window.keys) = number;
  return window;
}

// One attention as written out: weights = softmax(q k^T), maybe dropout, times v.
struct Match {
  Node* softmax = nullptr;
  Node* dropout = nullptr;  // May be null.
  Node* values = nullptr;
  Value q, k, v;  // q [B, G, (H/G) T, D]
};

absl::Status Stopped(const Graph& graph, const Node& node, absl::string_view fact, absl::string_view expected) {
  const std::string name = node.name().empty() ? "" : absl::StrCat(" \"", node.name(), "\"");
  const std::string what = node.is_input() ? absl::StrCat("input ", node.name()) : absl::StrCat(node.op().name, name);
  return absl::InvalidArgumentError(absl::StrCat("graph @", graph.name(), ": ", what, " ", fact, "; flash needs ",
                                                 expected, ". Write the attention so, or leave flash out"));
}

// The only reader of the node's result.
absl::StatusOr<Node*> OnlyReader(const Graph& graph, const Node& node) {
  if (graph.IsOutput(&node)) return Stopped(graph, node, "is an output of the graph", "it to stay inside");
  if (node.uses().size() == 1) return node.uses()[0].node;
  return Stopped(graph, node, absl::StrCat("is read ", node.uses().size(), " times"),
                 "it to be read by the next step of the attention alone");
}

bool IsOp(const Node& node, absl::string_view op) { return !node.is_input() && node.op().name == op; }

bool IsPlainMatmul(const Node& node, bool transpose_b) {
  return IsOp(node, "matmul") && !node.attrs().Bool("transpose_a") && node.attrs().Bool("transpose_b") == transpose_b &&
         node.operands().size() == 2;
}

absl::StatusOr<Match> MatchAttention(const Graph& graph, Node* softmax) {
  Match match{.softmax = softmax};
  if (!softmax->attrs().Bool("causal")) return Stopped(graph, *softmax, "is not causal", "causal=true");
  const Node& scores = *softmax->operands()[0].node;
  if (!IsPlainMatmul(scores, /*transpose_b=*/true)) {
    return Stopped(graph, scores, absl::StrCat("makes the scores of ", softmax->name()),
                   "matmul(q, k) {transpose_b=true} without bias there");
  }
  RETURN_IF_ERROR(OnlyReader(graph, scores));
  match.q = scores.operands()[0];
  match.k = scores.operands()[1];
  ASSIGN_OR_RETURN(Node * reader, OnlyReader(graph, *softmax));
  if (IsOp(*reader, "dropout")) {
    match.dropout = reader;
    ASSIGN_OR_RETURN(reader, OnlyReader(graph, *reader));
  }
  match.values = reader;
  const Node* weights = match.dropout != nullptr ? match.dropout : softmax;
  if (!IsPlainMatmul(*reader, /*transpose_b=*/false) || reader->operands()[0].node != weights) {
    return Stopped(graph, *reader, absl::StrCat("reads the weights of ", softmax->name()),
                   "matmul(weights, v) without bias there");
  }
  match.v = reader->operands()[1];
  const TensorType &q = match.q.type(), &k = match.k.type(), &v = match.v.type();
  if (q.rank() != 4 || v != k || q.dtype != k.dtype) {
    return Stopped(graph, scores, absl::StrCat("has q ", q.ToString(), ", k ", k.ToString(), " and v ", v.ToString()),
                   "q [B, G, (H/G) T, D] and k, v [B, G, T, D] of one dtype");
  }
  return match;
}

// "h0.attn.softmax" -> "h0.attn.flash"
std::string FlashName(absl::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == absl::string_view::npos ? "flash" : absl::StrCat(name.substr(0, dot), ".flash");
}

absl::StatusOr<Value> Reshape(Graph& graph, Value x, const Dims& dims, absl::string_view name) {
  if (x.type().dims == dims) return x;
  if (IsOp(*x.node, "reshape") && x.node->operands()[0].type().dims == dims) return x.node->operands()[0];
  ASSIGN_OR_RETURN(Node * node,
                   graph.AddNode(*FindOp("reshape"), {x}, {{"dims", IntList(dims.begin(), dims.end())}}, name));
  return node->result();
}

// The split_heads that q, k and v are the results of, and that nothing but this attention reads; null: they come from
// elsewhere.
Node* PackedSource(const Graph& graph, const Match& match, Value q) {
  Node* split = q.node;
  if (!IsOp(*split, "split_heads") || graph.IsOutput(split)) return nullptr;
  if (q != split->result(0) || match.k != split->result(1) || match.v != split->result(2)) return nullptr;
  const Node* scores = match.softmax->operands()[0].node;
  const Node* stack = match.q == q ? scores : match.q.node;  // What reads q.
  for (const Use& use : split->uses()) {
    if (use.node != stack && use.node != scores && use.node != match.values) return nullptr;
  }
  if (stack != scores && (stack->uses().size() != 1 || graph.IsOutput(stack))) return nullptr;
  return split;
}

// The merge_heads that alone reads the values, maybe by way of a reshape to `dims`, [B, H, T, D]; null: another reader.
Node* PackedTarget(const Graph& graph, const Match& match, const Dims& dims) {
  Node* node = match.values;
  for (int step = 0; step < 2; ++step) {
    if (graph.IsOutput(node) || node->uses().size() != 1) return nullptr;
    Node* reader = node->uses()[0].node;
    if (IsOp(*reader, "merge_heads")) return node->result().type().dims == dims ? reader : nullptr;
    if (!IsOp(*reader, "reshape")) return nullptr;
    node = reader;
  }
  return nullptr;
}

absl::Status Replace(Graph& graph, const Match& match, int64_t window) {
  const Attrs& softmax = match.softmax->attrs();
  const TensorType &stacked = match.q.type(), &k = match.k.type();
  const int64_t kv_heads = k.dim(1), heads = kv_heads * softmax.Int("group");
  const Dims dims = {k.dim(0), heads, k.dim(2), k.dim(3)};
  const std::string name = FlashName(match.softmax->name());
  Attrs attrs = {{"scale", softmax.Double("scale")}, {"causal", true}, {"window", window}};
  std::vector<Value> rng;
  if (match.dropout != nullptr) {
    rng.push_back(match.dropout->operands()[1]);
    attrs.Set("rate", match.dropout->attrs().Double("rate"));
    attrs.Set("key", match.dropout->attrs().Int("key"));
    attrs.Set("rng", true);
  }
  ASSIGN_OR_RETURN(const Value q, Reshape(graph, match.q, dims, name));
  const Node* source = PackedSource(graph, match, q);
  Node* target = source != nullptr ? PackedTarget(graph, match, dims) : nullptr;
  if (target != nullptr) {
    std::vector<Value> operands = {source->operands()[0]};
    operands.insert(operands.end(), rng.begin(), rng.end());
    attrs.Set("heads", heads);
    attrs.Set("kv_heads", kv_heads);
    ASSIGN_OR_RETURN(Node * flash, graph.AddNode(*FindOp("flash_attention_packed"), operands, std::move(attrs), name));
    graph.ReplaceAllUses(target->result(), flash->result());
    return absl::OkStatus();
  }
  std::vector<Value> operands = {q, match.k, match.v};
  operands.insert(operands.end(), rng.begin(), rng.end());
  ASSIGN_OR_RETURN(Node * flash, graph.AddNode(*FindOp("flash_attention"), operands, std::move(attrs), name));
  const Value values = match.values->result(), out = flash->result();
  // Readers that stack the heads apart again read the op itself.
  const std::vector<Use> uses(match.values->uses().begin(), match.values->uses().end());
  for (const Use& use : uses) {
    if (IsOp(*use.node, "reshape") && use.node->result().type() == out.type()) {
      graph.ReplaceAllUses(use.node->result(), out);
    }
  }
  ASSIGN_OR_RETURN(const Value unstacked, Reshape(graph, out, stacked.dims, name));
  graph.ReplaceAllUses(values, unstacked);
  return absl::OkStatus();
}

// The window of attention over `length` positions, of which the model says `written`; -1: none.
absl::StatusOr<int64_t> ChooseWindow(const Window& asked, int64_t length, int64_t written, PassContext& context) {
  const auto warn = [&](std::string text) {
    if (std::find(context.warnings.begin(), context.warnings.end(), text) == context.warnings.end()) {
      context.warnings.push_back(std::move(text));
    }
  };
  std::optional<int64_t> window = asked.keys;
  if (asked.part) {
    window = length / *asked.part;
    if (*window < 1) {
      return absl::InvalidArgumentError(absl::StrCat("window=T/", *asked.part, " is no key at all for T = ", length,
                                                     "; expected T/", length, " or a larger part"));
    }
  }
  if (window && *window >= length - 1) {
    warn(absl::StrCat("flash:window=", *window, " reaches over all of T = ", length,
                      " positions: this is full attention"));
    window = -1;
  }
  if (!window || (written >= 0 && (*window < 0 || *window > written))) {
    if (window) warn(absl::StrCat("the model's own attention window, ", written, ", is narrower and holds"));
    window = written;
  }
  return *window >= length - 1 ? -1 : *window;
}

// A program that generates sees what the others see.
absl::Status NarrowCached(Graph& graph, Node* cached, const Window& asked, PassContext& context) {
  constexpr int kKeys = 3;  // k_cache [B, G, T, D]
  const int64_t length = cached->operands()[kKeys].type().dim(2), written = cached->attrs().Int("window");
  ASSIGN_OR_RETURN(const int64_t window, ChooseWindow(asked, length, written, context));
  if (window == written) return absl::OkStatus();
  Attrs attrs = cached->attrs();
  attrs.Set("window", window);
  ASSIGN_OR_RETURN(Node * narrow, graph.AddNode(cached->op(), cached->operands(), std::move(attrs), cached->name()));
  for (int i = 0; i < cached->num_results(); ++i) graph.ReplaceAllUses(cached->result(i), narrow->result(i));
  graph.RemoveNode(cached);
  return absl::OkStatus();
}

absl::StatusOr<bool> Flash(Module& module, const Attrs& options, PassContext& context) {
  ASSIGN_OR_RETURN(const Window asked, ParseWindow(options.Get<std::string>("window")));
  int64_t found = 0;
  for (const auto& graph : module.graphs()) {
    for (Node* node : graph->TopologicalOrder()) {
      if (IsOp(*node, "cached_attention")) {
        RETURN_IF_ERROR(NarrowCached(*graph, node, asked, context));
        continue;
      }
      if (!IsOp(*node, "softmax")) continue;
      ASSIGN_OR_RETURN(const Match match, MatchAttention(*graph, node));
      ASSIGN_OR_RETURN(const int64_t window,
                       ChooseWindow(asked, match.k.type().dim(2), node->attrs().Int("window"), context));
      RETURN_IF_ERROR(Replace(*graph, match, window));
      ++found;
    }
  }
  if (found > 0) return true;
  return absl::InvalidArgumentError(
      absl::StrCat("module @", module.name(), " has no attention, no softmax; flash has nothing to do: leave it out"));
}

// There is a softmax, and each is an attention that flash can take.
bool HasAttention(const Module& module) {
  bool found = false;
  for (const auto& graph : module.graphs()) {
    for (Node* node : graph->Nodes()) {
      if (!IsOp(*node, "softmax")) continue;
      if (!MatchAttention(*graph, node).ok()) return false;
      found = true;
    }
  }
  return found;
}

constexpr PassOption kOptions[] = {
    {.name = "window",
     .kind = AttrKind::kString,
     .doc = "query t sees keys t-N to t: N, or T/4 for a quarter of the sequence; model: as the model has it",
     .default_text = kAsWritten},
};
constexpr absl::string_view kAlsoKnownAs[] = {"flash_attention", "flash_attn", "flashattention", "sdpa"};

}  // namespace

const PassDef kFlashPass = {
    .name = "flash",
    .summary =
        "softmax(scale q k^T + mask) v with dropout becomes one op that never holds the [T, T] weights; it takes the "
        "place of split_heads and merge_heads around it as well.",
    .options = kOptions,
    .source = "Dao, \"FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning\" (2023)",
    .tolerance = 1e-5,
    .also_known_as = kAlsoKnownAs,
    .applies = HasAttention,
    .run = Flash,
};

}  // namespace mt
