// Attention of one position to those before it, whose keys and values a program keeps from run to run: generation.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

enum Operands { kQ, kK, kV, kKCache, kVCache, kPosition };

absl::StatusOr<std::vector<TensorType>> Infer(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType &q = operands[kQ], &cache = operands[kKCache];
  RETURN_IF_ERROR(CheckFloat("q", q));
  RETURN_IF_ERROR(CheckRank("q", q, 4, 4));
  RETURN_IF_ERROR(CheckRank("k_cache", cache, 4, 4));
  TensorType one = q;
  one.dims[2] = 1;
  RETURN_IF_ERROR(CheckIs("q", q, one, "one position"));
  one.dims[1] = cache.dim(1);
  RETURN_IF_ERROR(CheckIs("k", operands[kK], one, "as q, with the heads of k_cache"));
  RETURN_IF_ERROR(CheckIs("v", operands[kV], one, "as k"));
  TensorType expected = one;
  expected.dims[2] = cache.dim(2);
  RETURN_IF_ERROR(CheckIs("k_cache", cache, expected, "as k, but for the number of positions"));
  RETURN_IF_ERROR(CheckIs("v_cache", operands[kVCache], cache, "as k_cache"));
  RETURN_IF_ERROR(CheckIs("position", operands[kPosition], {DType::kI32, {1}}, "where q stands"));
  if (q.dim(1) % cache.dim(1) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("operand k_cache is ", cache.ToString(), "; its ", cache.dim(1),
                                                   " heads must divide those of q, ", q.dim(1)));
  }
  RETURN_IF_ERROR(CheckAttr("window", attrs.Int("window"), -1, kMaxElements));
  const std::optional<int64_t> products = CheckedMultiply(q.num_elements(), cache.dim(2));
  if (!products || !CheckedMultiply(*products, 16)) {  // Cost counts them.
    return absl::InvalidArgumentError(
        absl::StrCat("operands q, ", q.ToString(), ", and k_cache, ", cache.ToString(), ", are too large"));
  }
  return std::vector<TensorType>{q, cache, cache};
}

template <typename T>
void ReferenceCached(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                     absl::Span<HostTensor<T>* const> results) {
  const TensorType &q_type = operands[kQ]->type, &cache = operands[kKCache]->type;
  const int64_t heads = q_type.dim(1), kv_heads = cache.dim(1), length = cache.dim(2), d = cache.dim(3);
  const int64_t position = operands[kPosition]->ints[0], window = attrs.Int("window");
  for (int part = 0; part < 2; ++part) {
    HostTensor<T>& to = *results[static_cast<size_t>(1 + part)];
    to.values = operands[static_cast<size_t>(kKCache + part)]->values;
    const std::vector<T>& row = operands[static_cast<size_t>(kK + part)]->values;
    for (int64_t g = 0; g < cache.dim(0) * kv_heads; ++g) {
      std::copy_n(row.begin() + g * d, d, to.values.begin() + (g * length + position) * d);
    }
  }
  const int64_t first = window < 0 ? 0 : std::max<int64_t>(0, position - window);
  std::vector<double> scores(static_cast<size_t>(length)), sums(static_cast<size_t>(d));
  for (int64_t h = 0; h < q_type.dim(0) * heads; ++h) {
    const int64_t group = h / heads * kv_heads + h % heads / (heads / kv_heads);
    const T* q = operands[kQ]->values.data() + h * d;
    const T* k = results[1]->values.data() + group * length * d;
    const T* v = results[2]->values.data() + group * length * d;
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t s = first; s <= position; ++s) {
      double score = 0;
      for (int64_t i = 0; i < d; ++i) score += static_cast<double>(q[i]) * k[s * d + i];
      scores[static_cast<size_t>(s)] = score * attrs.Double("scale");
      largest = std::max(largest, scores[static_cast<size_t>(s)]);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t s = first; s <= position; ++s) {
      const double weight = std::exp(scores[static_cast<size_t>(s)] - largest);
      sum += weight;
      for (int64_t i = 0; i < d; ++i) sums[static_cast<size_t>(i)] += weight * v[s * d + i];
    }
    for (int64_t i = 0; i < d; ++i) {
      results[0]->values[static_cast<size_t>(h * d + i)] = static_cast<T>(sums[static_cast<size_t>(i)] / sum);
    }
  }
}

// As at the last position: all keys that it sees are read, one row of each cache is written.
Cost CostCached(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs& attrs) {
  const TensorType &q = operands[kQ], &k = operands[kK], &cache = operands[kKCache];
  const int64_t window = attrs.Int("window"), length = cache.dim(2);
  const int64_t seen = window < 0 ? length : std::min(length, window + 1);
  return {.flops = q.num_elements() / q.dim(3) * seen * (4 * q.dim(3) + 5),
          .bytes_read = q.byte_size() + 2 * k.byte_size() * seen + operands[kPosition].byte_size(),
          .bytes_written = q.byte_size() + 2 * k.byte_size()};
}

std::vector<OpSample> Samples() {
  struct Case {
    int64_t batch, heads, kv_heads, length, width, window = -1;
    DType dtype = DType::kF32;
  };
  constexpr Case kCases[] = {{1, 1, 1, 1, 8},
                             {1, 4, 2, 33, 8, 4},
                             {2, 3, 1, 70, 16},
                             {1, 2, 2, 300, 64},
                             {1, 2, 1, 40, 34, 0},
                             {1, 2, 1, 600, 128, 400},
                             {1, 1, 1, 9, 5},
                             {1, 4, 2, 130, 64, -1, DType::kBF16},
                             {1, 2, 1, 90, 20, 17, DType::kBF16},
                             {1, 2, 1, 65, 32, -1, DType::kF16}};
  std::vector<OpSample> samples;
  for (const Case& c : kCases) {
    const SampleOperand kv = Sample(c.dtype, {c.batch, c.kv_heads, 1, c.width});
    const SampleOperand cache = Sample(c.dtype, {c.batch, c.kv_heads, c.length, c.width});
    samples.push_back(
        {.operands = {Sample(c.dtype, {c.batch, c.heads, 1, c.width}), kv, kv, cache, cache, Ids({1}, c.length)},
         .attrs = {{"scale", 1.0 / std::sqrt(static_cast<double>(c.width))}, {"window", c.window}}});
  }
  return samples;
}

constexpr absl::string_view kOperands[] = {"q", "k", "v", "k_cache", "v_cache", "position"};
constexpr absl::string_view kResults[] = {"out", "k_cache", "v_cache"};
constexpr AttrSpec kAttrs[] = {
    {"scale", AttrKind::kDouble, "factor of the scores q k before the softmax", "1.0"},
    {"window", AttrKind::kInt, "N >= 0: only keys from position - N on are seen; -1: all", "-1"},
};

}  // namespace

absl::Span<const OpDef> CachedAttentionOps() {
  static const OpDef ops[] = {
      {.name = "cached_attention",
       .summary =
           "out = softmax(scale q K^T) V over positions up to `position`, i32[1] in [0, T); q, out [B, H, 1, D]; "
           "k, v [B, G, 1, D] become rows `position` of K and V, k_cache and v_cache [B, G, T, D].",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = Infer,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceCached(attrs, operands, results); },
       .samples = Samples,
       .cost = CostCached,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{1, kKCache}, {2, kVCache}};
           },
       .autocast = Autocast::kAlways},
  };
  return ops;
}

}  // namespace mt
