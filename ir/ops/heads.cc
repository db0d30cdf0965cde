// Attention's layouts: a projection's rows [B, T, heads D] and a tensor for each head [B, heads, T, D].
#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::StatusOr<std::vector<TensorType>> InferSplitHeads(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckPackedHeads("x", x, attrs));
  const int64_t h = attrs.Int("heads"), g = attrs.Int("kv_heads");
  const int64_t d = x.dim(2) / (h + 2 * g);
  const TensorType kv = {x.dtype, {x.dim(0), g, x.dim(1), d}};
  return std::vector<TensorType>{{x.dtype, {x.dim(0), h, x.dim(1), d}}, kv, kv};
}

absl::Status GradSplitHeads(GradContext& c) {
  Value parts[3];
  for (int i = 0; i < 3; ++i) {
    // No gradient from one of the three: zeros.
    const Value dy = c.result_grads[static_cast<size_t>(i)];
    parts[i] = dy ? dy : c.builder.Scale(c.node.result(i), 0.0);
  }
  c.operand_grads[0] = c.builder.Op("join_heads", parts, {}, c.node.name());
  return c.builder.status();
}

absl::StatusOr<std::vector<TensorType>> InferJoinHeads(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType &q = operands[0], &k = operands[1];
  RETURN_IF_ERROR(CheckSplitHeads(q, k, operands[2]));
  RETURN_IF_ERROR(CheckAttr("heads (of q)", q.dim(1), 1, kMaxHeads));
  RETURN_IF_ERROR(CheckAttr("heads (of k)", k.dim(1), 1, kMaxHeads));
  const std::optional<int64_t> width = CheckedMultiply(q.dim(1) + 2 * k.dim(1), q.dim(3));
  if (!width) return absl::InvalidArgumentError(absl::StrCat("the result is too wide: q is ", q.ToString()));
  return std::vector<TensorType>{{q.dtype, {q.dim(0), q.dim(2), *width}}};
}

absl::Status GradJoinHeads(GradContext& c) {
  const std::vector<Value> parts = c.builder.Ops(
      "split_heads", {c.result_grads[0]},
      {{"heads", c.node.operands()[0].type().dim(1)}, {"kv_heads", c.node.operands()[1].type().dim(1)}}, c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  for (size_t i = 0; i < 3; ++i) {
    if (c.wants[i]) c.operand_grads[i] = parts[i];
  }
  return absl::OkStatus();
}

// Copies heads [B, H, T, D] from or to columns [first_head D, ...) of rows [B, T, width].
template <typename T>
void CopyHeads(const TensorType& heads, int64_t first_head, int64_t width, const T* from, T* to, bool to_heads) {
  const int64_t t = heads.dim(2), d = heads.dim(3);
  ForEachIndex(heads.dims, [&](int64_t flat, const Dims& i) {
    const int64_t row = (i[0] * t + i[2]) * width + (first_head + i[1]) * d + i[3];
    if (to_heads) {
      to[flat] = from[row];
    } else {
      to[row] = from[flat];
    }
  });
}

template <typename T>
void ReferenceSplitHeads(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  int64_t first_head = 0;
  for (HostTensor<T>* part : results) {
    CopyHeads(part->type, first_head, operands[0]->type.dim(-1), operands[0]->values.data(), part->values.data(), true);
    first_head += part->type.dim(1);
  }
}

template <typename T>
void ReferenceJoinHeads(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  int64_t first_head = 0;
  for (const HostTensor<T>* part : operands) {
    CopyHeads(part->type, first_head, results[0]->type.dim(-1), part->values.data(), results[0]->values.data(), false);
    first_head += part->type.dim(1);
  }
}

absl::StatusOr<std::vector<TensorType>> InferMergeHeads(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 4, 4));
  return std::vector<TensorType>{{x.dtype, {x.dim(0), x.dim(2), x.dim(1) * x.dim(3)}}};
}

absl::Status GradMergeHeads(GradContext& c) {
  c.operand_grads[0] = c.builder.Op("unmerge_heads", {c.result_grads[0]},
                                    {{"heads", c.node.operands()[0].type().dim(1)}}, c.node.name());
  return c.builder.status();
}

absl::StatusOr<std::vector<TensorType>> InferUnmergeHeads(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 3, 3));
  const int64_t h = attrs.Int("heads");
  RETURN_IF_ERROR(CheckAttr("heads", h, 1, kMaxHeads));
  if (x.dim(2) % h != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("operand x is ", x.ToString(), "; its last dimension must be a multiple of heads, ", h));
  }
  return std::vector<TensorType>{{x.dtype, {x.dim(0), h, x.dim(1), x.dim(2) / h}}};
}

absl::Status GradUnmergeHeads(GradContext& c) {
  c.operand_grads[0] = c.builder.Op("merge_heads", {c.result_grads[0]}, {}, c.node.name());
  return c.builder.status();
}

std::vector<OpSample> SamplesSplitHeads() {
  return {{.operands = {F32({2, 5, 24})}, .attrs = {{"heads", int64_t{2}}, {"kv_heads", int64_t{2}}}},
          {.operands = {F32({2, 3, 64})}, .attrs = {{"heads", int64_t{4}}, {"kv_heads", int64_t{2}}}},
          {.operands = {BF16({1, 7, 48})}, .attrs = {{"heads", int64_t{4}}, {"kv_heads", int64_t{1}}}},
          {.operands = {F16({2, 3, 24})}, .attrs = {{"heads", int64_t{2}}, {"kv_heads", int64_t{2}}}}};
}

std::vector<OpSample> SamplesJoinHeads() {
  return {{.operands = {F32({2, 2, 5, 4}), F32({2, 2, 5, 4}), F32({2, 2, 5, 4})}},
          {.operands = {F32({2, 4, 3, 8}), F32({2, 2, 3, 8}), F32({2, 2, 3, 8})}},
          {.operands = {BF16({1, 4, 7, 8}), BF16({1, 1, 7, 8}), BF16({1, 1, 7, 8})}},
          {.operands = {F16({2, 2, 5, 4}), F16({2, 2, 5, 4}), F16({2, 2, 5, 4})}}};
}

std::vector<OpSample> SamplesMergeHeads() {
  return {{.operands = {F32({2, 3, 5, 4})}}, {.operands = {BF16({1, 2, 9, 16})}}, {.operands = {F16({2, 3, 5, 4})}}};
}

std::vector<OpSample> SamplesUnmergeHeads() {
  return {{.operands = {F32({2, 5, 12})}, .attrs = {{"heads", int64_t{3}}}},
          {.operands = {BF16({1, 9, 32})}, .attrs = {{"heads", int64_t{2}}}},
          {.operands = {F16({2, 5, 12})}, .attrs = {{"heads", int64_t{3}}}}};
}

constexpr absl::string_view kX[] = {"x"}, kY[] = {"y"}, kParts[] = {"q", "k", "v"};
constexpr AttrSpec kSplitAttrs[] = {{"heads", AttrKind::kInt, "query heads H"},
                                    {"kv_heads", AttrKind::kInt, "key-value heads G, a divisor of H"}};
constexpr AttrSpec kUnmergeAttrs[] = {{"heads", AttrKind::kInt, "heads H"}};

}  // namespace

absl::Span<const OpDef> HeadOps() {
  static const OpDef ops[] = {
      {.name = "split_heads",
       .summary = "x [B, T, (H+2G) D] -> q [B, H, T, D], k [B, G, T, D], v [B, G, T, D].",
       .operands = kX,
       .results = kParts,
       .attrs = kSplitAttrs,
       .infer = InferSplitHeads,
       .grad = GradSplitHeads,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceSplitHeads(operands, results); },
       .samples = SamplesSplitHeads,
       .tolerance = 0},
      {.name = "join_heads",
       .summary = "q [B, H, T, D], k [B, G, T, D], v [B, G, T, D] -> y [B, T, (H+2G) D]; undoes split_heads.",
       .operands = kParts,
       .results = kY,
       .infer = InferJoinHeads,
       .grad = GradJoinHeads,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceJoinHeads(operands, results); },
       .samples = SamplesJoinHeads,
       .tolerance = 0},
      {.name = "merge_heads",
       .summary = "x [B, H, T, D] -> y [B, T, H D].",
       .operands = kX,
       .results = kY,
       .infer = InferMergeHeads,
       .grad = GradMergeHeads,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceJoinHeads(operands, results); },
       .samples = SamplesMergeHeads,
       .tolerance = 0},
      {.name = "unmerge_heads",
       .summary = "x [B, T, H D] -> y [B, H, T, D]; undoes merge_heads.",
       .operands = kX,
       .results = kY,
       .attrs = kUnmergeAttrs,
       .infer = InferUnmergeHeads,
       .grad = GradUnmergeHeads,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceSplitHeads(operands, results); },
       .samples = SamplesUnmergeHeads,
       .tolerance = 0},
  };
  return ops;
}

}  // namespace mt
