// The head matmul and the cross entropy to one op.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/ops/common.h"
#include "ir/target.h"
#include "ir/tensor_type.h"
#include "passes/head.h"
#include "passes/registry.h"

namespace mt {
namespace {

constexpr absl::string_view kName = "chunked_loss", kAuto = "auto";
// A chunk has as many rows as keep its logits within this many times the elements of x, but no fewer than `least_rows`,
// which keep the matmuls efficient, and no more than `most_rows`, beyond which they gain nothing.
struct ChunkRule {
  int64_t logits_over_input, least_rows, most_rows;
};
constexpr ChunkRule kOnCpu = {2, 512, int64_t{1} << 40};
// One chunk's gradient of w is added to f32 in memory; an H200's matmuls of fewer rows wait for that.
constexpr ChunkRule kOnCuda = {6, 1024, 4096};

int64_t ChunksFor(const Head& head, const ChunkRule& rule) {
  const int64_t rows = RowsOf(head.x.type()), width = head.x.type().dim(-1), vocab = head.w.type().dim(0);
  // In double: the product may pass 2^63, and a quotient of 2^53 rows is no less than all of them.
  const double within = static_cast<double>(rule.logits_over_input) * static_cast<double>(rows) *
                        static_cast<double>(width) / static_cast<double>(vocab);
  const int64_t least = std::min(rule.least_rows, rows), most = std::min(rule.most_rows, rows);
  const int64_t chunk_rows = std::clamp(static_cast<int64_t>(within), least, most);
  return (rows + chunk_rows - 1) / chunk_rows;
}

absl::StatusOr<std::optional<int64_t>> ParseChunks(absl::string_view text) {
  int64_t chunks = 0;
  if (text == kAuto) return std::optional<int64_t>();
  if (absl::SimpleAtoi(text, &chunks) && chunks >= 1) return std::optional<int64_t>(chunks);
  return absl::InvalidArgumentError(absl::StrCat(
      "chunks=", text, " is wrong; expected the number of parts that the rows are cut into, 1 or more, or ", kAuto));
}

absl::Status Replace(Graph& graph, const Head& head, std::optional<int64_t> chunks, const ChunkRule& rule) {
  const int64_t rows = RowsOf(head.x.type());
  if (chunks && *chunks > rows) {
    return absl::InvalidArgumentError(absl::StrCat("chunks=", *chunks, " is more than the ", rows, " rows of ",
                                                   head.loss->name(), " in graph @", graph.name(), "; expected 1 to ",
                                                   rows));
  }
  for (const Use& use : head.loss->uses()) {
    if (use.node->operands()[static_cast<size_t>(use.operand)] != head.loss->result(2)) continue;
    return HeadStopped(graph, *use.node, kName, "reads lse of the cross entropy",
                       "loss_sum and count alone to be read");
  }
  for (const Output& output : graph.outputs()) {
    if (output.value == head.loss->result(2)) {
      return HeadStopped(graph, *head.loss, kName, absl::StrCat("has its lse in output ", output.name),
                         "loss_sum and count alone to be read");
    }
  }
  const Value labels = head.loss->operands()[1];
  std::vector<Value> operands = {head.x, head.w, labels};
  if (head.bias) operands.push_back(head.bias);
  const std::string& name = head.loss->name();
  ASSIGN_OR_RETURN(Node * loss, graph.AddNode(*FindOp("chunked_loss"), operands,
                                              {{"chunks", chunks.value_or(ChunksFor(head, rule))},
                                               {"classes", head.loss->attrs().Int("classes")},
                                               {"tf32", head.matmul->attrs().Bool("tf32")},
                                               {"bias", static_cast<bool>(head.bias)}},
                                              name));
  ASSIGN_OR_RETURN(Node * count, graph.AddNode(*FindOp("count_labels"), {labels}, {},
                                               name.empty() ? "" : absl::StrCat(name, ".count")));
  graph.ReplaceAllUses(head.loss->result(0), loss->result());
  graph.ReplaceAllUses(head.loss->result(1), count->result());
  return absl::OkStatus();
}

absl::StatusOr<bool> ChunkedLoss(Module& module, const Attrs& options, PassContext& context) {
  ASSIGN_OR_RETURN(const std::optional<int64_t> chunks, ParseChunks(options.Get<std::string>("chunks")));
  ASSIGN_OR_RETURN(const Target target, ParseTarget(context.target));
  bool found = false;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(const std::vector<Head> heads, FindHeads(*graph, kName));
    for (const Head& head : heads) {
      if (head.matmul == nullptr) continue;
      RETURN_IF_ERROR(Replace(*graph, head, chunks, target.is_cuda() ? kOnCuda : kOnCpu));
      found = true;
    }
  }
  if (found) return true;
  return absl::InvalidArgumentError(absl::StrCat(
      "module @", module.name(), " has no cross entropy of logits; chunked_loss has nothing to do: leave it out"));
}

// There is a written-out head, and each is one that the pass can take.
bool HasHead(const Module& module) {
  bool found = false;
  for (const auto& graph : module.graphs()) {
    const absl::StatusOr<std::vector<Head>> heads = FindHeads(*graph, kName);
    if (!heads.ok()) return false;
    for (const Head& head : *heads) found = found || head.matmul != nullptr;
  }
  return found;
}

constexpr PassOption kOptions[] = {
    {.name = "chunks",
     .kind = AttrKind::kString,
     .doc =
         "parts that the rows are cut into; auto: so many that the logits of one have no more than twice the elements "
         "of the head's input, or 512 rows where those are more; cuda: six times, 1024 to 4096 rows",
     .default_text = kAuto},
};
constexpr absl::string_view kAlsoKnownAs[] = {"chunked_cross_entropy", "fused_linear_cross_entropy", "cce", "liger",
                                              "cut_cross_entropy"};

}  // namespace

const PassDef kChunkedLossPass = {
    .name = kName,
    .summary =
        "Head matmul, softmax and cross entropy become one op over chunks of rows; the logits never exist whole.",
    .options = kOptions,
    .source = "Wijmans et al., \"Cut Your Losses in Large-Vocabulary Language Models\" (2025); Liger Kernel (2024)",
    .tolerance = 1e-5,
    .also_known_as = kAlsoKnownAs,
    .applies = HasHead,
    .run = ChunkedLoss,
};

}  // namespace mt
