// The head matmul and the cross entropy as one op, over chunks of rows: the logits never exist whole. Its kernels hold
// one chunk of them in their workspace.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

constexpr absl::string_view kForward = "chunked_loss", kGrad = "chunked_loss_grad",
                            kBiasGrad = "chunked_loss_bias_grad";

// x [..., C], w [V, C], labels [...], bias [V] or null.
absl::Status CheckHead(const TensorType& x, const TensorType& w, const TensorType& labels, const TensorType* bias,
                       const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  RETURN_IF_ERROR(CheckRank("w", w, 2, 2));
  RETURN_IF_ERROR(
      CheckIs("w", w, {x.dtype, {w.dim(0), x.dim(-1)}}, "the dtype of x and, for each class, a row as long"));
  RETURN_IF_ERROR(
      CheckIs("labels", labels, {DType::kI32, Dims(x.dims.begin(), x.dims.end() - 1)}, "one for each row of x"));
  if (bias != nullptr) {
    RETURN_IF_ERROR(CheckFloatDims("bias", *bias, {w.dim(0)}, "one for each row of w"));
    if (bias->dtype != DType::kF32 && bias->dtype != x.dtype) {
      return absl::InvalidArgumentError(absl::StrCat("operand bias is ", bias->ToString(), "; its dtype must be ",
                                                     DTypeName(x.dtype), ", as that of x, or f32"));
    }
  }
  if (attrs.Bool("tf32") && x.dtype != DType::kF32) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute tf32 is true; it needs f32 operands, and x is ", x.ToString()));
  }
  RETURN_IF_ERROR(CheckAttr("chunks", attrs.Int("chunks"), 1, std::max<int64_t>(1, RowsOf(x))));
  RETURN_IF_ERROR(CheckAttr("classes", attrs.Int("classes"), 0, w.dim(0)));
  // The bytes of a chunk and the FLOPs that cost counts are products of these.
  const std::optional<int64_t> logits = CheckedMultiply(RowsOf(x), w.dim(0));
  if (logits && *logits <= kMaxElements) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("operands x, ", x.ToString(), ", and w, ", w.ToString(),
                                                 ", have more logits than the limit for one tensor"));
}

const TensorType kScalar{DType::kF32, {}};

absl::StatusOr<std::vector<TensorType>> InferForward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckHead(operands[0], operands[1], operands[2], attrs.Bool("bias") ? &operands[3] : nullptr, attrs));
  return std::vector<TensorType>{kScalar};
}

absl::StatusOr<std::vector<TensorType>> InferGrads(absl::Span<const TensorType> operands, const Attrs& attrs,
                                                   bool has_bias) {
  const TensorType &x = operands[0], &w = operands[1];
  RETURN_IF_ERROR(CheckHead(x, w, operands[2], has_bias ? &operands[4] : nullptr, attrs));
  RETURN_IF_ERROR(CheckIs("dloss", operands[3], kScalar, "one number"));
  const TensorType dw = {DType::kF32, w.dims};
  if (attrs.Bool("accumulator")) {
    RETURN_IF_ERROR(CheckIs("accumulator", operands.back(), dw, "the dimensions of w, in f32"));
  }
  std::vector<TensorType> results = {dw, x, kScalar};
  if (has_bias) results.push_back({DType::kF32, {w.dim(0)}});
  return results;
}
absl::StatusOr<std::vector<TensorType>> InferGrad(absl::Span<const TensorType> operands, const Attrs& attrs) {
  return InferGrads(operands, attrs, /*has_bias=*/false);
}
absl::StatusOr<std::vector<TensorType>> InferBiasGrad(absl::Span<const TensorType> operands, const Attrs& attrs) {
  return InferGrads(operands, attrs, /*has_bias=*/true);
}

bool DependsOn(const Node* node, const Node* other) {
  absl::flat_hash_set<const Node*> seen = {node};
  std::vector<const Node*> todo = {node};
  while (!todo.empty()) {
    node = todo.back();
    todo.pop_back();
    if (node == other) return true;
    for (const Value& operand : node->operands()) {
      if (seen.insert(operand.node).second) todo.push_back(operand.node);
    }
  }
  return false;
}

// What reads `value`, and what reads that: computed in the backward phase from now on.
void MoveReadersToBackward(Graph& graph, Value value) {
  std::vector<Node*> todo = {value.node};
  while (!todo.empty()) {
    const Node* node = todo.back();
    todo.pop_back();
    for (const Use& use : node->uses()) {
      if (node == value.node && use.node->operands()[static_cast<size_t>(use.operand)] != value) continue;
      if (use.node->phase() != Phase::kForward) continue;
      graph.SetNodePhase(use.node, Phase::kBackward);
      todo.push_back(use.node);
    }
  }
}

// The backward op computes the loss as well. Where dloss can be had without it, as that of a mean over a count can, the
// forward op's readers read this one, and the forward op is dead: three head matmuls a chunk instead of four.
absl::Status GradForward(GradContext& c) {
  if (!c.result_grads[0]) return absl::OkStatus();
  const absl::Span<const Value> operands = c.node.operands();
  const Attrs& attrs = c.node.attrs();
  const bool has_bias = attrs.Bool("bias");
  std::vector<Value> reads = {operands[0], operands[1], operands[2], c.result_grads[0]};
  if (has_bias) reads.push_back(operands[3]);
  const std::vector<Value> grads =
      c.builder.Ops(has_bias ? kBiasGrad : kGrad, reads,
                    {{"chunks", attrs.Int("chunks")}, {"classes", attrs.Int("classes")}, {"tf32", attrs.Bool("tf32")}},
                    c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  if (c.wants[0]) c.operand_grads[0] = grads[1];
  if (c.wants[1]) c.operand_grads[1] = grads[0];
  if (has_bias && c.wants[3]) c.operand_grads[3] = grads[3];
  if (!DependsOn(c.result_grads[0].node, &c.node)) {
    c.builder.graph().ReplaceAllUses(c.node.result(0), grads[2]);
    MoveReadersToBackward(c.builder.graph(), grads[2]);
  }
  return absl::OkStatus();
}

// Logits of one row at a time; f(row, logits, largest, lse) for each row whose label counts.
template <typename T, typename F>
double ForEachRow(const HostTensor<T>& x, const HostTensor<T>& w, const HostTensor<T>& labels,
                  const HostTensor<T>* bias, const Attrs& attrs, F f) {
  const int64_t c = x.type.dim(-1), rows = RowsOf(x.type);
  const int64_t classes = attrs.Int("classes") == 0 ? w.type.dim(0) : attrs.Int("classes");
  std::vector<double> logits(static_cast<size_t>(classes));
  double loss = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t label = labels.ints[static_cast<size_t>(r)];
    if (label < 0) continue;
    for (int64_t v = 0; v < classes; ++v) {
      double sum = bias == nullptr ? 0 : static_cast<double>(bias->values[static_cast<size_t>(v)]);
      for (int64_t k = 0; k < c; ++k) {
        sum += static_cast<double>(x.values[static_cast<size_t>(r * c + k)]) *
               static_cast<double>(w.values[static_cast<size_t>(v * c + k)]);
      }
      logits[static_cast<size_t>(v)] = sum;
    }
    const double max = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (const double logit : logits) total += std::exp(logit - max);
    const double lse = max + std::log(total);
    loss += lse - logits[static_cast<size_t>(label)];
    f(r, logits, lse);
  }
  return loss;
}

template <typename T>
void ReferenceForward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                      absl::Span<HostTensor<T>* const> results) {
  results[0]->values[0] =
      static_cast<T>(ForEachRow(*operands[0], *operands[1], *operands[2], attrs.Bool("bias") ? operands[3] : nullptr,
                                attrs, [](int64_t, const std::vector<double>&, double) {}));
}

template <typename T>
void ReferenceGrad(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                   absl::Span<HostTensor<T>* const> results) {
  const bool has_bias = results.size() > 3;
  const HostTensor<T>&x = *operands[0], &w = *operands[1], &labels = *operands[2];
  const double dloss = operands[3]->values[0];
  const int64_t c = x.type.dim(-1);
  std::vector<double> dw(results[0]->values.size()), dx(results[1]->values.size()),
      dbias(static_cast<size_t>(w.type.dim(0)));
  const double loss = ForEachRow(x, w, labels, has_bias ? operands[4] : nullptr, attrs,
                                 [&](int64_t r, const std::vector<double>& logits, double lse) {
                                   for (size_t v = 0; v < logits.size(); ++v) {
                                     const bool is_label =
                                         static_cast<int32_t>(v) == labels.ints[static_cast<size_t>(r)];
                                     const double d = dloss * (std::exp(logits[v] - lse) - (is_label ? 1.0 : 0.0));
                                     dbias[v] += d;
                                     for (int64_t k = 0; k < c; ++k) {
                                       const size_t at_x = static_cast<size_t>(r * c + k),
                                                    at_w = v * static_cast<size_t>(c) + static_cast<size_t>(k);
                                       dw[at_w] += d * static_cast<double>(x.values[at_x]);
                                       dx[at_x] += d * static_cast<double>(w.values[at_w]);
                                     }
                                   }
                                 });
  if (attrs.Bool("accumulator")) {
    for (size_t i = 0; i < dw.size(); ++i) dw[i] += static_cast<double>(operands[operands.size() - 1]->values[i]);
  }
  const auto narrow = [](double value) { return static_cast<T>(value); };
  absl::c_transform(dw, results[0]->values.begin(), narrow);
  absl::c_transform(dx, results[1]->values.begin(), narrow);
  results[2]->values[0] = static_cast<T>(loss);
  if (has_bias) absl::c_transform(dbias, results[3]->values.begin(), narrow);
}

// `matmuls` head matmuls and `others` operations for each logit.
Cost CostOfLogits(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const TensorType& x,
                  const TensorType& w, int64_t matmuls, int64_t others) {
  const int64_t logits = RowsOf(x) * w.dim(0);
  return TransferCost(
      operands, results,
      CheckedMultiply(logits, 2 * matmuls * x.dim(-1) + others).value_or(std::numeric_limits<int64_t>::max() / 2));
}
Cost CostForward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  return CostOfLogits(operands, results, operands[0], operands[1], 1, attrs.Bool("bias") ? 5 : 4);
}
Cost CostGrad(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  Cost cost = CostOfLogits(operands, results, operands[0], operands[1], 3, results.size() > 3 ? 8 : 6);
  if (attrs.Bool("accumulator")) cost.flops += results[0].num_elements();
  return cost;
}

// x is read for the last time before dx's rows of the same chunk are written.
std::vector<std::pair<int, int>> InPlaceGrad(absl::Span<const TensorType> operands, absl::Span<const TensorType>,
                                             const Attrs& attrs) {
  std::vector<std::pair<int, int>> pairs = {{1, 0}};
  if (attrs.Bool("accumulator")) pairs.push_back({0, static_cast<int>(operands.size()) - 1});
  return pairs;
}

struct Case {
  Dims rows;
  int64_t vocab, width, chunks = 1, classes = 0;
  bool bias = false;
  DType dtype = DType::kF32, bias_dtype = DType::kF32;
  bool accumulator = false, tf32 = false;
};

// The larger ones pass the blocks of the kernels; chunks that do not divide the rows; labels that are ignored.
const std::vector<Case>& Cases() {
  static const std::vector<Case> cases = {
      {.rows = {5}, .vocab = 7, .width = 8},
      {.rows = {2, 9}, .vocab = 65, .width = 16, .chunks = 4, .accumulator = true},
      {.rows = {11}, .vocab = 13, .width = 6, .chunks = 11, .classes = 9, .bias = true},
      {.rows = {70}, .vocab = 128, .width = 33, .chunks = 3, .classes = 100, .accumulator = true},
      {.rows = {2, 20}, .vocab = 96, .width = 24, .chunks = 7, .classes = 95, .dtype = DType::kBF16},
      {.rows = {140}, .vocab = 270, .width = 520, .dtype = DType::kBF16, .accumulator = true},
      {.rows = {3}, .vocab = 1100, .width = 8, .chunks = 2, .bias = true, .dtype = DType::kBF16},
      {.rows = {30},
       .vocab = 17,
       .width = 9,
       .chunks = 4,
       .bias = true,
       .dtype = DType::kBF16,
       .bias_dtype = DType::kBF16,
       .accumulator = true},
      {.rows = {6, 7}, .vocab = 40, .width = 12, .chunks = 5, .dtype = DType::kF16},
      {.rows = {9}, .vocab = 20, .width = 5, .chunks = 2, .tf32 = true},
  };
  return cases;
}

std::vector<OpSample> SamplesForward() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) {
    Dims x = c.rows;
    x.push_back(c.width);
    OpSample sample{.operands = {Sample(c.dtype, x), Sample(c.dtype, {c.vocab, c.width}),
                                 Ids(c.rows, -(c.classes == 0 ? c.vocab : c.classes))},
                    .attrs = {{"chunks", c.chunks}, {"classes", c.classes}, {"bias", c.bias}, {"tf32", c.tf32}}};
    if (c.bias) sample.operands.push_back(Sample(c.bias_dtype, {c.vocab}));
    samples.push_back(std::move(sample));
  }
  return samples;
}

std::vector<OpSample> SamplesOfGrad(bool bias) {
  std::vector<OpSample> samples;
  const std::vector<OpSample> forward = SamplesForward();
  for (size_t i = 0; i < forward.size(); ++i) {
    const Case& c = Cases()[i];
    if (c.bias != bias) continue;
    OpSample sample{
        .operands = forward[i].operands,
        .attrs = {{"chunks", c.chunks}, {"classes", c.classes}, {"accumulator", c.accumulator}, {"tf32", c.tf32}}};
    sample.operands.insert(sample.operands.begin() + 3, F32({}));
    if (c.accumulator) sample.operands.push_back(F32({c.vocab, c.width}));
    samples.push_back(std::move(sample));
  }
  return samples;
}

absl::StatusOr<std::vector<TensorType>> InferCount(absl::Span<const TensorType> operands, const Attrs&) {
  RETURN_IF_ERROR(CheckIs("labels", operands[0], {DType::kI32, operands[0].dims}, "token ids"));
  return std::vector<TensorType>{kScalar};
}

template <typename T>
void ReferenceCount(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  results[0]->values[0] = static_cast<T>(absl::c_count_if(operands[0]->ints, [](int32_t label) { return label >= 0; }));
}

Cost CostCount(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, operands[0].num_elements());
}

std::vector<OpSample> SamplesCount() {
  return {{.operands = {Ids({5}, 7)}}, {.operands = {Ids({3, 50}, -9)}}, {.operands = {Ids({2, 3, 4}, -2)}}};
}

constexpr absl::string_view kOperands[] = {"x", "w", "labels", "bias?"}, kResults[] = {"loss_sum"};
constexpr absl::string_view kGradOperands[] = {"x", "w", "labels", "dloss", "accumulator?"},
                            kGradResults[] = {"dw", "dx", "loss_sum"};
constexpr absl::string_view kBiasGradOperands[] = {"x", "w", "labels", "dloss", "bias", "accumulator?"},
                            kBiasGradResults[] = {"dw", "dx", "loss_sum", "dbias"};
constexpr absl::string_view kCountOperands[] = {"labels"}, kCountResults[] = {"count"};
constexpr AttrSpec kChunks = {"chunks", AttrKind::kInt, "parts that the rows are cut into, as equal as they can be"};
constexpr AttrSpec kClasses = {"classes", AttrKind::kInt,
                               "rows of w that are classes; those after them are padding; 0: all", "0"};
constexpr AttrSpec kTf32 = {"tf32", AttrKind::kBool,
                            "f32 operands of the products may be rounded to TF32, 10 bits of mantissa", "false"};
constexpr AttrSpec kAttrs[] = {
    kChunks,
    kClasses,
    kTf32,
    {"bias", AttrKind::kBool, "a last operand is added to every row of logits", "false"},
};
constexpr AttrSpec kGradAttrs[] = {
    kChunks,
    kClasses,
    kTf32,
    {"accumulator", AttrKind::kBool, "dw is added to a last operand, in place", "false"},
};
constexpr int kNoGrad[] = {2};

}  // namespace

absl::Span<const OpDef> ChunkedLossOps() {
  static const OpDef ops[] = {
      {.name = kForward,
       .summary = "loss_sum of softmax_cross_entropy(x w^T + bias, labels) over `chunks` chunks of rows. x [..., C], "
                  "w [V, C], labels [...], bias [V]; logits are f32.",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferForward,
       .grad = GradForward,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceForward(attrs, operands, results); },
       .samples = SamplesForward,
       .cost = CostForward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways,
       .no_grad_operands = kNoGrad},
      {.name = kGrad,
       .summary = "loss_sum and gradients of chunked_loss, each chunk of logits computed once: dlogits = dloss "
                  "(softmax - [label]); dw = dlogits^T x + accumulator, summed over the chunks in f32; dx = dlogits w.",
       .operands = kGradOperands,
       .results = kGradResults,
       .attrs = kGradAttrs,
       .infer = InferGrad,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceGrad(attrs, operands, results); },
       .samples = [] { return SamplesOfGrad(false); },
       .cost = CostGrad,
       .in_place = InPlaceGrad,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways,
       .has_accumulator = true},
      {.name = kBiasGrad,
       .summary = "chunked_loss_grad for a head with a bias; dbias [V] = sum over rows of dlogits, in f32.",
       .operands = kBiasGradOperands,
       .results = kBiasGradResults,
       .attrs = kGradAttrs,
       .infer = InferBiasGrad,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceGrad(attrs, operands, results); },
       .samples = [] { return SamplesOfGrad(true); },
       .cost = CostGrad,
       .in_place = InPlaceGrad,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways,
       .has_accumulator = true},
      {.name = "count_labels",
       .summary = "count = number of labels >= 0: the rows that a loss counts. labels [...].",
       .operands = kCountOperands,
       .results = kCountResults,
       .infer = InferCount,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceCount(operands, results); },
       .samples = SamplesCount,
       .cost = CostCount,
       .tolerance = 0},
  };
  return ops;
}

}  // namespace mt
