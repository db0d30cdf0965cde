#include "ir/ops/common.h"

#include "absl/strings/str_cat.h"
#include "ir/graph.h"

namespace mt {

int64_t Product(absl::Span<const int64_t> dims) {
  int64_t product = 1;
  for (const int64_t d : dims) product *= d;
  return product;
}

absl::Status CheckFloat(absl::string_view name, const TensorType& type) {
  if (IsFloat(type.dtype)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("operand ", name, " is ", type.ToString(), "; it must be floating point"));
}

absl::Status CheckRank(absl::string_view name, const TensorType& type, int64_t least, int64_t most) {
  if (type.rank() >= least && type.rank() <= most) return absl::OkStatus();
  const std::string expected = least == most      ? absl::StrCat(least)
                               : most == kMaxRank ? absl::StrCat("at least ", least)
                                                  : absl::StrCat(least, " to ", most);
  return absl::InvalidArgumentError(absl::StrCat("operand ", name, " is ", type.ToString(), ", ", type.rank(),
                                                 " dimensions; it must have ", expected));
}

absl::Status CheckIs(absl::string_view name, const TensorType& type, const TensorType& expected,
                     absl::string_view why) {
  if (type == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("operand ", name, " is ", type.ToString(), "; it must be ", expected.ToString(), " (", why, ")"));
}

absl::Status CheckSplitHeads(const TensorType& q, const TensorType& k, const TensorType& v) {
  RETURN_IF_ERROR(CheckFloat("q", q));
  RETURN_IF_ERROR(CheckRank("q", q, 4, 4));
  RETURN_IF_ERROR(CheckRank("k", k, 4, 4));
  TensorType expected = q;
  expected.dims[1] = k.dim(1);
  RETURN_IF_ERROR(CheckIs("k", k, expected, "as q, but for the number of heads"));
  return CheckIs("v", v, k, "as k");
}

absl::Status CheckFloatDims(absl::string_view name, const TensorType& type, absl::Span<const int64_t> dims,
                            absl::string_view why) {
  RETURN_IF_ERROR(CheckFloat(name, type));
  if (absl::MakeConstSpan(type.dims) == dims) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("operand ", name, " is ", type.ToString(), "; its dimensions must be ",
                                                 DimsToString(dims), " (", why, ")"));
}

absl::Status CheckAttr(absl::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("attribute ", name, " is ", value, "; it must be from ", least, " to ", most));
}

absl::Status CheckPackedHeads(absl::string_view name, const TensorType& x, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat(name, x));
  RETURN_IF_ERROR(CheckRank(name, x, 3, 3));
  const int64_t h = attrs.Int("heads"), g = attrs.Int("kv_heads");
  RETURN_IF_ERROR(CheckAttr("heads", h, 1, kMaxHeads));
  RETURN_IF_ERROR(CheckAttr("kv_heads", g, 1, h));
  if (h % g != 0) {
    return absl::InvalidArgumentError(absl::StrCat("attribute kv_heads is ", g, "; it must divide heads, ", h));
  }
  if (x.dim(2) % (h + 2 * g) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("operand ", name, " is ", x.ToString(),
                                                 "; its last dimension must be a multiple of ", h + 2 * g,
                                                 " (heads + 2 kv_heads)"));
}

absl::Status CheckDimList(absl::string_view name, const IntList& dims, const TensorType& x) {
  bool good = !dims.empty();
  for (size_t i = 0; i < dims.size(); ++i) {
    good = good && dims[i] >= 0 && dims[i] < x.rank() && (i == 0 || dims[i] > dims[i - 1]);
  }
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("attribute ", name, " is ", DimsToString(dims),
                                                 "; it must list dimensions of ", x.ToString(),
                                                 " in increasing order, at least one"));
}

Cost TransferCost(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, int64_t flops) {
  return {.flops = flops, .bytes_read = TotalBytes(operands), .bytes_written = TotalBytes(results)};
}

int64_t TotalBytes(absl::Span<const TensorType> types) {
  int64_t bytes = 0;
  for (const TensorType& type : types) bytes += type.byte_size();
  return bytes;
}

absl::Status OnlyResult0HasGradient(const GradContext& context) {
  for (size_t i = 1; i < context.result_grads.size(); ++i) {
    if (!context.result_grads[i]) continue;
    return absl::UnimplementedError(
        absl::StrCat(context.node.op().name, " \"", context.node.name(), "\": a gradient arrives at result ",
                     ResultName(context.node.op(), static_cast<int>(i)), ", which is not differentiable"));
  }
  return absl::OkStatus();
}

Dims StridesOf(absl::Span<const int64_t> dims) {
  Dims strides(dims.size(), 1);
  for (size_t d = dims.size(); d-- > 1;) strides[d - 1] = strides[d] * dims[d];
  return strides;
}

}  // namespace mt
