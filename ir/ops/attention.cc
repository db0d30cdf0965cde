// Attention as one op: Dao, "FlashAttention-2" (2023), algorithms 1 and 2. Its kernels never hold the [T, T] weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"
#include "ir/scalar.h"

namespace mt {
namespace {

// The keys that query t sees: [first, last).
struct Visible {
  int64_t first, last;
};
Visible VisibleKeys(int64_t t, int64_t length, const Attrs& attrs) {
  if (!attrs.Bool("causal")) return {0, length};
  const int64_t window = attrs.Int("window");
  return {window < 0 ? 0 : std::max<int64_t>(0, t - window), t + 1};
}

// (query, key) pairs of all heads that see each other.
int64_t VisiblePairs(const TensorType& q, const Attrs& attrs) {
  const int64_t heads = q.dim(0) * q.dim(1), t = q.dim(2);
  if (!attrs.Bool("causal")) return heads * t * t;
  const int64_t window = attrs.Int("window");
  const int64_t w = window < 0 ? t : std::min(window + 1, t);  // Query t sees min(t + 1, w) keys.
  return heads * (w * (w + 1) / 2 + (t - w) * w);
}

absl::Status CheckAttrs(const TensorType& q, const Attrs& attrs) {
  const int64_t window = attrs.Int("window");
  const double rate = attrs.Double("rate");
  if (attrs.Bool("tf32") && q.dtype != DType::kF32) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute tf32 is true; it needs f32 operands, and q is ", q.ToString()));
  }
  RETURN_IF_ERROR(CheckAttr("window", window, -1, kMaxElements));
  RETURN_IF_ERROR(CheckAttr("key", attrs.Int("key"), 0, std::numeric_limits<uint32_t>::max()));
  if (window >= 0 && !attrs.Bool("causal")) {
    return absl::InvalidArgumentError(absl::StrCat("attribute window is ", window, "; it needs causal=true"));
  }
  if (!(rate >= 0 && rate < 1)) {
    return absl::InvalidArgumentError(absl::StrCat("attribute rate is ", rate, "; it must be at least 0 and below 1"));
  }
  if (rate > 0 && !attrs.Bool("rng")) {
    return absl::InvalidArgumentError(absl::StrCat("attribute rate is ", rate, "; it needs rng=true"));
  }
  // The counters of the random numbers, and the pairs that cost counts, are products of these.
  std::optional<int64_t> pairs = CheckedMultiply(q.dim(2), q.dim(2));
  if (pairs) pairs = CheckedMultiply(*pairs, q.dim(0) * q.dim(1));
  if (pairs) pairs = CheckedMultiply(*pairs, 16 * q.dim(3));
  if (!pairs) return absl::InvalidArgumentError(absl::StrCat("operand q is ", q.ToString(), "; that is too large"));
  return absl::OkStatus();
}

// q [B, H, T, D], k and v [B, G, T, D], all of one dtype.
absl::Status CheckHeads(const TensorType& q, const TensorType& k, const TensorType& v) {
  RETURN_IF_ERROR(CheckFloat("q", q));
  RETURN_IF_ERROR(CheckRank("q", q, 4, 4));
  RETURN_IF_ERROR(CheckRank("k", k, 4, 4));
  TensorType expected = q;
  expected.dims[1] = k.dim(1);
  RETURN_IF_ERROR(CheckIs("k", k, expected, "as q, but for the number of heads"));
  RETURN_IF_ERROR(CheckIs("v", v, k, "as k"));
  if (q.dim(1) % k.dim(1) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("operand k is ", k.ToString(), "; its ", k.dim(1), " heads must divide those of q, ", q.dim(1)));
}

TensorType SumsType(const TensorType& q) { return {DType::kF32, {q.dim(0), q.dim(1), q.dim(2)}}; }
const TensorType kRandomState{DType::kI32, {4}};

absl::StatusOr<std::vector<TensorType>> InferForward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckHeads(operands[0], operands[1], operands[2]));
  RETURN_IF_ERROR(CheckAttrs(operands[0], attrs));
  if (attrs.Bool("rng")) {
    RETURN_IF_ERROR(CheckIs("rng", operands[3], kRandomState, "seed low, seed high, step, first sample"));
  }
  return std::vector<TensorType>{operands[0], SumsType(operands[0])};
}

absl::StatusOr<std::vector<TensorType>> InferBackward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& q = operands[1];
  RETURN_IF_ERROR(CheckHeads(q, operands[2], operands[3]));
  RETURN_IF_ERROR(CheckAttrs(q, attrs));
  RETURN_IF_ERROR(CheckIs("dout", operands[0], q, "as q"));
  RETURN_IF_ERROR(CheckIs("out", operands[4], q, "as q"));
  RETURN_IF_ERROR(CheckIs("lse", operands[5], SumsType(q), "one number a query"));
  if (attrs.Bool("rng")) {
    RETURN_IF_ERROR(CheckIs("rng", operands[6], kRandomState, "seed low, seed high, step, first sample"));
  }
  return std::vector<TensorType>{q, operands[2], operands[3]};
}

absl::Status GradForward(GradContext& c) {
  RETURN_IF_ERROR(OnlyResult0HasGradient(c));
  const absl::Span<const Value> operands = c.node.operands();
  std::vector<Value> reads = {c.result_grads[0], operands[0],      operands[1],
                              operands[2],       c.node.result(0), c.node.result(1)};
  if (c.node.attrs().Bool("rng")) reads.push_back(operands[3]);
  const std::vector<Value> grads = c.builder.Ops("flash_attention_backward", reads, c.node.attrs(), c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  for (size_t i = 0; i < 3; ++i) {
    if (c.wants[i]) c.operand_grads[i] = grads[i];
  }
  return absl::OkStatus();
}

// Where query (b, h, t) of a call lies, and what dropout does to its weights.
struct Shape {
  explicit Shape(const TensorType& q, const TensorType& k)
      : batch(q.dim(0)), heads(q.dim(1)), group(q.dim(1) / k.dim(1)), length(q.dim(2)), width(q.dim(3)) {}
  int64_t Query(int64_t b, int64_t h, int64_t t) const { return (b * heads + h) * length + t; }
  int64_t Key(int64_t b, int64_t h, int64_t s) const { return (b * (heads / group) + h / group) * length + s; }
  int64_t batch, heads, group, length, width;
};

// What the weight of (query, key) is multiplied with: 0 or 1 / (1 - rate), as the row dropout of [B, H, T, T] has it.
double Keep(const Attrs& attrs, absl::Span<const int32_t> rng, const Shape& shape, int64_t b, int64_t h, int64_t t,
            int64_t s) {
  const double rate = attrs.Double("rate");
  if (rate == 0) return 1;
  const int64_t element = (h * shape.length + t) * shape.length + s;
  return UniformAt(rng, static_cast<uint32_t>(attrs.Int("key")), b, element) < rate ? 0 : 1.0 / (1.0 - rate);
}

template <typename T>
double Dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

template <typename F>
void ForEachQuery(const Shape& shape, F f) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t t = 0; t < shape.length; ++t) f(b, h, t);
    }
  }
}

template <typename T>
void ReferenceForward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                      absl::Span<HostTensor<T>* const> results) {
  const Shape shape(operands[0]->type, operands[1]->type);
  const T *q = operands[0]->values.data(), *k = operands[1]->values.data(), *v = operands[2]->values.data();
  const absl::Span<const int32_t> rng =
      attrs.Bool("rng") ? absl::MakeConstSpan(operands[3]->ints) : absl::Span<const int32_t>();
  const double scale = attrs.Double("scale");
  const int64_t d = shape.width;
  std::vector<double> scores(static_cast<size_t>(shape.length)), sums(static_cast<size_t>(d));
  ForEachQuery(shape, [&](int64_t b, int64_t h, int64_t t) {
    const int64_t row = shape.Query(b, h, t);
    const Visible visible = VisibleKeys(t, shape.length, attrs);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t s = visible.first; s < visible.last; ++s) {
      double& score = scores[static_cast<size_t>(s)];
      score = scale * Dot(q + row * d, k + shape.Key(b, h, s) * d, d);
      max = std::max(max, score);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t s = visible.first; s < visible.last; ++s) {
      const double e = std::exp(scores[static_cast<size_t>(s)] - max);
      sum += e;
      const double kept = e * Keep(attrs, rng, shape, b, h, t, s);
      for (int64_t i = 0; i < d; ++i) sums[static_cast<size_t>(i)] += kept * v[shape.Key(b, h, s) * d + i];
    }
    for (int64_t i = 0; i < d; ++i) {
      results[0]->values[static_cast<size_t>(row * d + i)] = static_cast<T>(sums[static_cast<size_t>(i)] / sum);
    }
    results[1]->values[static_cast<size_t>(row)] = static_cast<T>(max + std::log(sum));
  });
}

template <typename T>
void ReferenceBackward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                       absl::Span<HostTensor<T>* const> results) {
  const Shape shape(operands[1]->type, operands[2]->type);
  const T *dout = operands[0]->values.data(), *q = operands[1]->values.data(), *k = operands[2]->values.data();
  const T *v = operands[3]->values.data(), *out = operands[4]->values.data(), *lse = operands[5]->values.data();
  const absl::Span<const int32_t> rng =
      attrs.Bool("rng") ? absl::MakeConstSpan(operands[6]->ints) : absl::Span<const int32_t>();
  const double scale = attrs.Double("scale");
  const int64_t d = shape.width;
  std::vector<double> dq(results[0]->values.size()), dk(results[1]->values.size()), dv(results[2]->values.size());
  ForEachQuery(shape, [&](int64_t b, int64_t h, int64_t t) {
    const int64_t row = shape.Query(b, h, t);
    const double delta = Dot(dout + row * d, out + row * d, d);
    const Visible visible = VisibleKeys(t, shape.length, attrs);
    for (int64_t s = visible.first; s < visible.last; ++s) {
      const int64_t key = shape.Key(b, h, s);
      const double keep = Keep(attrs, rng, shape, b, h, t, s);
      const double p = std::exp(scale * Dot(q + row * d, k + key * d, d) - lse[row]);
      const double ds = scale * p * (keep * Dot(dout + row * d, v + key * d, d) - delta);
      for (int64_t i = 0; i < d; ++i) {
        dq[static_cast<size_t>(row * d + i)] += ds * k[key * d + i];
        dk[static_cast<size_t>(key * d + i)] += ds * q[row * d + i];
        dv[static_cast<size_t>(key * d + i)] += keep * p * dout[row * d + i];
      }
    }
  });
  const std::vector<double>* const sums[] = {&dq, &dk, &dv};
  for (size_t r = 0; r < 3; ++r) {
    std::transform(sums[r]->begin(), sums[r]->end(), results[r]->values.begin(),
                   [](double x) { return static_cast<T>(x); });
  }
}

// Two products of D and about five operations for each visible pair.
Cost CostForward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  return TransferCost(operands, results, VisiblePairs(operands[0], attrs) * (4 * operands[0].dim(3) + 5));
}
// Five products.
Cost CostBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  return TransferCost(operands, results, VisiblePairs(operands[1], attrs) * (10 * operands[1].dim(3) + 6));
}

struct Case {
  int64_t batch, heads, kv_heads, length, width;
  int64_t window = -1;
  double rate = 0;
  DType dtype = DType::kF32;
  bool causal = true;
};

// The last lengths pass the blocks of the kernels.
constexpr Case kCases[] = {
    {1, 1, 1, 1, 8},
    {2, 2, 2, 5, 8},
    {2, 2, 1, 7, 32, -1, 0.3},
    {1, 4, 2, 33, 8, 4},
    {1, 2, 1, 9, 8, 0},
    {1, 1, 1, 67, 64},
    {1, 1, 1, 40, 128, 13, 0.2},
    {2, 2, 2, 9, 8, -1, 0.2, DType::kF32, false},
    {2, 2, 1, 130, 8, 40, 0.25},
    {1, 1, 1, 300, 8, -1, 0.1},
    {1, 2, 1, 35, 32, -1, 0.25, DType::kBF16},
    {1, 1, 1, 130, 64, 20, 0, DType::kBF16},
    {1, 2, 1, 331, 16, -1, 0.5, DType::kBF16},
    {1, 1, 1, 600, 8, 270, 0, DType::kBF16},
    {1, 2, 1, 35, 32, -1, 0.25, DType::kF16},
    {1, 1, 1, 300, 16, 40, 0, DType::kF16},
};

std::vector<OpSample> Samples(bool backward) {
  std::vector<OpSample> samples;
  for (const Case& c : kCases) {
    const SampleOperand q = Sample(c.dtype, {c.batch, c.heads, c.length, c.width});
    const SampleOperand kv = Sample(c.dtype, {c.batch, c.kv_heads, c.length, c.width});
    OpSample sample{.operands = {q, kv, kv},
                    .attrs = {{"scale", 1.0 / std::sqrt(static_cast<double>(c.width))},
                              {"causal", c.causal},
                              {"window", c.window},
                              {"rate", c.rate},
                              {"key", int64_t{0xDEADBEEF}},
                              {"rng", c.rate > 0}}};
    if (backward) {
      sample.operands.insert(sample.operands.begin(), q);
      sample.operands.push_back(q);
      sample.operands.push_back(F32({c.batch, c.heads, c.length}));
    }
    if (c.rate > 0) sample.operands.push_back(Sample(DType::kI32, {4}, SampleOperand::Fill::kRandomState));
    samples.push_back(std::move(sample));
  }
  return samples;
}

constexpr absl::string_view kOperands[] = {"q", "k", "v", "rng?"};
constexpr absl::string_view kResults[] = {"out", "lse"};
constexpr absl::string_view kBackwardOperands[] = {"dout", "q", "k", "v", "out", "lse", "rng?"};
constexpr absl::string_view kBackwardResults[] = {"dq", "dk", "dv"};
constexpr AttrSpec kAttrs[] = {
    {"scale", AttrKind::kDouble, "factor of the scores q k before the softmax", "1.0"},
    {"causal", AttrKind::kBool, "query t sees keys s <= t", "true"},
    {"window", AttrKind::kInt, "N >= 0: query t also sees only keys s >= t - N; -1: all", "-1"},
    {"rate", AttrKind::kDouble, "probability with which a weight is dropped, in [0, 1)", "0.0"},
    {"key", AttrKind::kInt, "the place in the model: which random numbers are drawn, in [0, 2^32)", "0"},
    {"rng", AttrKind::kBool, "a last operand is the random state that dropout needs", "false"},
    {"tf32", AttrKind::kBool, "f32 operands of the products may be rounded to TF32, 10 bits of mantissa", "false"},
};

}  // namespace

absl::Span<const OpDef> AttentionOps() {
  static const OpDef ops[] = {
      {.name = "flash_attention",
       .summary = "out = dropout(softmax(scale q k^T + mask)) v; q, out [B, H, T, D], k, v [B, G, T, D] with head h at "
                  "h / (H/G); lse [B, H, T] = log of the sum of e^score over the keys seen.",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferForward,
       .grad = GradForward,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceForward(attrs, operands, results); },
       .samples = [] { return Samples(false); },
       .cost = CostForward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
      {.name = "flash_attention_backward",
       .summary = "dq, dk, dv of flash_attention; p = e^(scale q k^T - lse) is computed again, ds = scale p "
                  "(dropout(dout v^T) - the sum of dout out).",
       .operands = kBackwardOperands,
       .results = kBackwardResults,
       .attrs = kAttrs,
       .infer = InferBackward,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceBackward(attrs, operands, results); },
       .samples = [] { return Samples(true); },
       .cost = CostBackward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
  };
  return ops;
}

}  // namespace mt
