// Attention as one op: Dao, "FlashAttention-2" (2023), algorithms 1 and 2. Its kernels never hold the [T, T] weights.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "ir/attention_layout.h"
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
int64_t VisiblePairs(const AttentionLayout& layout, const Attrs& attrs) {
  const int64_t heads = layout.batch * layout.heads, t = layout.length;
  if (!attrs.Bool("causal")) return heads * t * t;
  const int64_t window = attrs.Int("window");
  const int64_t w = window < 0 ? t : std::min(window + 1, t);  // Query t sees min(t + 1, w) keys.
  return heads * (w * (w + 1) / 2 + (t - w) * w);
}

// `name` is q or qkv, of type `type`.
absl::Status CheckAttrs(absl::string_view name, const TensorType& type, const AttentionLayout& layout,
                        const Attrs& attrs) {
  const int64_t window = attrs.Int("window");
  const double rate = attrs.Double("rate");
  if (attrs.Bool("tf32") && type.dtype != DType::kF32) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute tf32 is true; it needs f32 operands, and ", name, " is ", type.ToString()));
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
  std::optional<int64_t> pairs = CheckedMultiply(layout.length, layout.length);
  if (pairs) pairs = CheckedMultiply(*pairs, layout.batch * layout.heads);
  if (pairs) pairs = CheckedMultiply(*pairs, 16 * layout.width);
  if (!pairs) {
    return absl::InvalidArgumentError(absl::StrCat("operand ", name, " is ", type.ToString(), "; that is too large"));
  }
  return absl::OkStatus();
}

// As CheckSplitHeads, and G divides H.
absl::Status CheckHeads(const TensorType& q, const TensorType& k, const TensorType& v) {
  RETURN_IF_ERROR(CheckSplitHeads(q, k, v));
  if (q.dim(1) % k.dim(1) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("operand k is ", k.ToString(), "; its ", k.dim(1), " heads must divide those of q, ", q.dim(1)));
}

const TensorType kRandomState{DType::kI32, {4}};

// The types of out and lse.
struct ForwardTypes {
  TensorType out, lse;
};
ForwardTypes TypesOf(const AttentionLayout& l) {
  const Dims out = l.packed ? Dims{l.batch, l.length, l.heads * l.width} : Dims{l.batch, l.heads, l.length, l.width};
  return {.out = {l.dtype, out}, .lse = {DType::kF32, {l.batch, l.heads, l.length}}};
}

template <bool kPacked>
absl::StatusOr<std::vector<TensorType>> Infer(absl::Span<const TensorType> operands, const Attrs& attrs,
                                              bool backward) {
  const absl::Span<const TensorType> qkv = operands.subspan(backward ? 1 : 0);
  RETURN_IF_ERROR(kPacked ? CheckPackedHeads("qkv", qkv[0], attrs) : CheckHeads(qkv[0], qkv[1], qkv[2]));
  const AttentionLayout layout = LayoutOfAttention(operands, attrs, backward);
  RETURN_IF_ERROR(CheckAttrs(kPacked ? "qkv" : "q", qkv[0], layout, attrs));
  const ForwardTypes types = TypesOf(layout);
  const absl::Span<const TensorType> others = operands.subspan(static_cast<size_t>(layout.statistics));
  if (attrs.Bool("rng")) {
    RETURN_IF_ERROR(CheckIs("rng", others[backward ? 2 : 0], kRandomState, "seed low, seed high, step, first sample"));
  }
  if (!backward) return std::vector<TensorType>{types.out, types.lse};
  const absl::string_view why = kPacked ? "B, T and the columns of H heads" : "as q";
  RETURN_IF_ERROR(CheckIs("dout", operands[0], types.out, why));
  RETURN_IF_ERROR(CheckIs("out", others[0], types.out, why));
  RETURN_IF_ERROR(CheckIs("lse", others[1], types.lse, "one number a query"));
  return std::vector<TensorType>(qkv.begin(), qkv.begin() + (kPacked ? 1 : 3));
}
template <bool kPacked>
absl::StatusOr<std::vector<TensorType>> InferForward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  return Infer<kPacked>(operands, attrs, /*backward=*/false);
}
template <bool kPacked>
absl::StatusOr<std::vector<TensorType>> InferBackward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  return Infer<kPacked>(operands, attrs, /*backward=*/true);
}

absl::Status GradForward(GradContext& c) {
  RETURN_IF_ERROR(OnlyResult0HasGradient(c));
  const absl::Span<const Value> operands = c.node.operands();
  const bool rng = c.node.attrs().Bool("rng");
  const size_t parts = operands.size() - (rng ? 1 : 0);  // q, k and v, or qkv.
  std::vector<Value> reads = {c.result_grads[0]};
  reads.insert(reads.end(), operands.begin(), operands.begin() + static_cast<ptrdiff_t>(parts));
  reads.push_back(c.node.result(0));
  reads.push_back(c.node.result(1));
  if (rng) reads.push_back(operands.back());
  const std::vector<Value> grads =
      c.builder.Ops(absl::StrCat(c.node.op().name, "_backward"), reads, c.node.attrs(), c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  for (size_t i = 0; i < parts; ++i) {
    if (c.wants[i]) c.operand_grads[i] = grads[i];
  }
  return absl::OkStatus();
}

// What the weight of (query, key) is multiplied with: 0 or 1 / (1 - rate), as the row dropout of [B, H, T, T] has it.
double Keep(const Attrs& attrs, absl::Span<const int32_t> rng, const AttentionLayout& layout, int64_t b, int64_t h,
            int64_t t, int64_t s) {
  const double rate = attrs.Double("rate");
  if (rate == 0) return 1;
  const int64_t element = (h * layout.length + t) * layout.length + s;
  return UniformAt(rng, static_cast<uint32_t>(attrs.Int("key")), b, element) < rate ? 0 : 1.0 / (1.0 - rate);
}

template <typename T>
double Dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

template <typename F>
void ForEachQuery(const AttentionLayout& layout, F f) {
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t h = 0; h < layout.heads; ++h) {
      for (int64_t t = 0; t < layout.length; ++t) f(b, h, t);
    }
  }
}

template <typename T>
std::vector<TensorType> TypesOf(absl::Span<const HostTensor<T>* const> tensors) {
  std::vector<TensorType> types;
  for (const HostTensor<T>* tensor : tensors) types.push_back(tensor->type);
  return types;
}

// The first elements of q, k and v.
template <typename T>
struct Parts {
  Parts(const AttentionLayout& l, absl::Span<const HostTensor<T>* const> operands) {
    const auto at = [&](int part, int64_t offset) {
      return operands[static_cast<size_t>(l.first_operand + (l.packed ? 0 : part))]->values.data() + offset;
    };
    q = at(0, 0);
    k = at(1, l.k_offset);
    v = at(2, l.v_offset);
  }
  const T *q, *k, *v;
};

template <typename T>
void ReferenceForward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                      absl::Span<HostTensor<T>* const> results) {
  const AttentionLayout layout = LayoutOfAttention(TypesOf(operands), attrs, /*backward=*/false);
  const Parts<T> in(layout, operands);
  const absl::Span<const int32_t> rng =
      attrs.Bool("rng") ? absl::MakeConstSpan(operands.back()->ints) : absl::Span<const int32_t>();
  const double scale = attrs.Double("scale");
  const int64_t d = layout.width;
  std::vector<double> scores(static_cast<size_t>(layout.length)), sums(static_cast<size_t>(d));
  ForEachQuery(layout, [&](int64_t b, int64_t h, int64_t t) {
    const T* q = in.q + layout.q_strides.At(b, h, t);
    const auto key = [&](int64_t s) { return layout.kv_strides.At(b, h / layout.group(), s); };
    const Visible visible = VisibleKeys(t, layout.length, attrs);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t s = visible.first; s < visible.last; ++s) {
      double& score = scores[static_cast<size_t>(s)];
      score = scale * Dot(q, in.k + key(s), d);
      max = std::max(max, score);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t s = visible.first; s < visible.last; ++s) {
      const double e = std::exp(scores[static_cast<size_t>(s)] - max);
      sum += e;
      const double kept = e * Keep(attrs, rng, layout, b, h, t, s);
      for (int64_t i = 0; i < d; ++i) sums[static_cast<size_t>(i)] += kept * in.v[key(s) + i];
    }
    T* out = results[0]->values.data() + layout.out_strides.At(b, h, t);
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(sums[static_cast<size_t>(i)] / sum);
    results[1]->values[static_cast<size_t>(layout.Query(b, h, t))] = static_cast<T>(max + std::log(sum));
  });
}

template <typename T>
void ReferenceBackward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                       absl::Span<HostTensor<T>* const> results) {
  const AttentionLayout layout = LayoutOfAttention(TypesOf(operands), attrs, /*backward=*/true);
  const Parts<T> in(layout, operands);
  const T* dout = operands[0]->values.data();
  const T* out = operands[static_cast<size_t>(layout.statistics)]->values.data();
  const T* lse = operands[static_cast<size_t>(layout.statistics) + 1]->values.data();
  const absl::Span<const int32_t> rng =
      attrs.Bool("rng") ? absl::MakeConstSpan(operands.back()->ints) : absl::Span<const int32_t>();
  const double scale = attrs.Double("scale");
  const int64_t d = layout.width;
  std::vector<std::vector<double>> sums;
  for (const HostTensor<T>* result : results) sums.emplace_back(result->values.size());
  double* dq = sums[0].data();
  double* dk = sums[layout.packed ? 0 : 1].data() + layout.k_offset;
  double* dv = sums[layout.packed ? 0 : 2].data() + layout.v_offset;
  ForEachQuery(layout, [&](int64_t b, int64_t h, int64_t t) {
    const int64_t query = layout.q_strides.At(b, h, t), row = layout.out_strides.At(b, h, t);
    const double delta = Dot(dout + row, out + row, d);
    const Visible visible = VisibleKeys(t, layout.length, attrs);
    for (int64_t s = visible.first; s < visible.last; ++s) {
      const int64_t key = layout.kv_strides.At(b, h / layout.group(), s);
      const double keep = Keep(attrs, rng, layout, b, h, t, s);
      const double p = std::exp(scale * Dot(in.q + query, in.k + key, d) - lse[layout.Query(b, h, t)]);
      const double ds = scale * p * (keep * Dot(dout + row, in.v + key, d) - delta);
      for (int64_t i = 0; i < d; ++i) {
        dq[query + i] += ds * in.k[key + i];
        dk[key + i] += ds * in.q[query + i];
        dv[key + i] += keep * p * dout[row + i];
      }
    }
  });
  for (size_t r = 0; r < results.size(); ++r) {
    std::transform(sums[r].begin(), sums[r].end(), results[r]->values.begin(),
                   [](double x) { return static_cast<T>(x); });
  }
}

// Two products of D and about five operations for each visible pair.
Cost CostForward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  const AttentionLayout layout = LayoutOfAttention(operands, attrs, /*backward=*/false);
  return TransferCost(operands, results, VisiblePairs(layout, attrs) * (4 * layout.width + 5));
}
// Five products.
Cost CostBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  const AttentionLayout layout = LayoutOfAttention(operands, attrs, /*backward=*/true);
  return TransferCost(operands, results, VisiblePairs(layout, attrs) * (10 * layout.width + 6));
}

struct Case {
  int64_t batch, heads, kv_heads, length, width;
  int64_t window = -1;
  double rate = 0;
  DType dtype = DType::kF32;
  bool causal = true, tf32 = false;
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
    {1, 2, 1, 128, 32, 40, 0, DType::kBF16},
    {1, 1, 1, 140, 128, 0, 0, DType::kBF16},
    {1, 2, 1, 331, 16, -1, 0.5, DType::kBF16},
    {1, 1, 1, 600, 8, 270, 0, DType::kBF16},
    {1, 2, 1, 35, 32, -1, 0.25, DType::kF16},
    {1, 1, 1, 300, 16, 40, 0, DType::kF16},
    {1, 2, 1, 68, 32, -1, 0.25, DType::kF32, true, true},
    {1, 1, 1, 131, 64, 40, 0, DType::kF32, true, true},
    {1, 1, 1, 70, 128, 30, 0, DType::kF32, true, true},
    {1, 2, 2, 67, 48, -1, 0.2, DType::kF32, false, true},
};

std::vector<OpSample> Samples(bool packed, bool backward) {
  std::vector<OpSample> samples;
  for (const Case& c : kCases) {
    SampleOperand out = Sample(c.dtype, {c.batch, c.heads, c.length, c.width});
    OpSample sample{.attrs = {{"scale", 1.0 / std::sqrt(static_cast<double>(c.width))},
                              {"causal", c.causal},
                              {"window", c.window},
                              {"rate", c.rate},
                              {"key", int64_t{0xDEADBEEF}},
                              {"rng", c.rate > 0},
                              {"tf32", c.tf32}}};
    if (packed) {
      sample.attrs.Set("heads", c.heads);
      sample.attrs.Set("kv_heads", c.kv_heads);
      sample.operands = {Sample(c.dtype, {c.batch, c.length, (c.heads + 2 * c.kv_heads) * c.width})};
      out = Sample(c.dtype, {c.batch, c.length, c.heads * c.width});
    } else {
      const SampleOperand kv = Sample(c.dtype, {c.batch, c.kv_heads, c.length, c.width});
      sample.operands = {out, kv, kv};
    }
    if (backward) {
      sample.operands.insert(sample.operands.begin(), out);
      sample.operands.push_back(out);
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
constexpr absl::string_view kPackedOperands[] = {"qkv", "rng?"};
constexpr absl::string_view kPackedBackwardOperands[] = {"dout", "qkv", "out", "lse", "rng?"};
constexpr absl::string_view kPackedBackwardResults[] = {"dqkv"};
// The first two: of the packed rows alone.
constexpr AttrSpec kPackedAttrs[] = {
    {"heads", AttrKind::kInt, "query heads H"},
    {"kv_heads", AttrKind::kInt, "key-value heads G, a divisor of H"},
    {"scale", AttrKind::kDouble, "factor of the scores q k before the softmax", "1.0"},
    {"causal", AttrKind::kBool, "query t sees keys s <= t", "true"},
    {"window", AttrKind::kInt, "N >= 0: query t also sees only keys s >= t - N; -1: all", "-1"},
    {"rate", AttrKind::kDouble, "probability with which a weight is dropped, in [0, 1)", "0.0"},
    {"key", AttrKind::kInt, "the place in the model: which random numbers are drawn, in [0, 2^32)", "0"},
    {"rng", AttrKind::kBool, "a last operand is the random state that dropout needs", "false"},
    {"tf32", AttrKind::kBool, "f32 operands of the products may be rounded to TF32, 10 bits of mantissa", "false"},
};
constexpr absl::Span<const AttrSpec> kAttrs(kPackedAttrs + 2, std::size(kPackedAttrs) - 2);

}  // namespace

absl::Span<const OpDef> AttentionOps() {
  static const OpDef ops[] = {
      {.name = "flash_attention",
       .summary = "out = dropout(softmax(scale q k^T + mask)) v; q, out [B, H, T, D], k, v [B, G, T, D] with head h at "
                  "h / (H/G); lse [B, H, T] = log of the sum of e^score over the keys seen.",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferForward<false>,
       .grad = GradForward,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceForward(attrs, operands, results); },
       .samples = [] { return Samples(/*packed=*/false, /*backward=*/false); },
       .cost = CostForward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
      {.name = "flash_attention_backward",
       .summary = "dq, dk, dv of flash_attention; p = e^(scale q k^T - lse) is computed again, ds = scale p "
                  "(dropout(dout v^T) - the sum of dout out).",
       .operands = kBackwardOperands,
       .results = kBackwardResults,
       .attrs = kAttrs,
       .infer = InferBackward<false>,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceBackward(attrs, operands, results); },
       .samples = [] { return Samples(/*packed=*/false, /*backward=*/true); },
       .cost = CostBackward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
      {.name = "flash_attention_packed",
       .summary = "flash_attention where heads are columns of rows: qkv [B, T, (H+2G) D], as split_heads takes it, and "
                  "out [B, T, H D], as merge_heads makes it; lse [B, H, T].",
       .operands = kPackedOperands,
       .results = kResults,
       .attrs = kPackedAttrs,
       .infer = InferForward<true>,
       .grad = GradForward,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceForward(attrs, operands, results); },
       .samples = [] { return Samples(/*packed=*/true, /*backward=*/false); },
       .cost = CostForward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
      {.name = "flash_attention_packed_backward",
       .summary = "dqkv of flash_attention_packed, computed as by flash_attention_backward.",
       .operands = kPackedBackwardOperands,
       .results = kPackedBackwardResults,
       .attrs = kPackedAttrs,
       .infer = InferBackward<true>,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceBackward(attrs, operands, results); },
       .samples = [] { return Samples(/*packed=*/true, /*backward=*/true); },
       .cost = CostBackward,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways},
  };
  return ops;
}

}  // namespace mt
