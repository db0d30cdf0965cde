// What the families of op rows share: checks of operand types, samples, and index arithmetic of the references.
#ifndef MT_IR_OPS_COMMON_H_
#define MT_IR_OPS_COMMON_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/base/status_macros.h"
#include "ir/op.h"
#include "ir/tensor_type.h"

namespace mt {

// Product of the dimensions.
int64_t Product(absl::Span<const int64_t> dims);
// x as a matrix: all dimensions but the last, and the last. REQUIRES: rank >= 1.
inline int64_t RowsOf(const TensorType& type) { return type.num_elements() / type.dim(-1); }
inline absl::Span<const int64_t> AllButLast(const TensorType& type) {
  return absl::MakeConstSpan(type.dims.data(), type.dims.size() - 1);
}

// Errors (InvalidArgument) say: operand NAME is TYPE; it must ...
absl::Status CheckFloat(absl::string_view name, const TensorType& type);
absl::Status CheckRank(absl::string_view name, const TensorType& type, int64_t least, int64_t most = kMaxRank);
// `type` must be `expected`; `why` says where that comes from: "the dimensions of x without the last".
absl::Status CheckIs(absl::string_view name, const TensorType& type, const TensorType& expected, absl::string_view why);
// Floating point with these dimensions.
absl::Status CheckFloatDims(absl::string_view name, const TensorType& type, absl::Span<const int64_t> dims,
                            absl::string_view why);
// least <= value <= most, for attribute NAME.
absl::Status CheckAttr(absl::string_view name, int64_t value, int64_t least, int64_t most);
// q [B, H, T, D], k and v [B, G, T, D], all of one dtype.
absl::Status CheckSplitHeads(const TensorType& q, const TensorType& k, const TensorType& v);
// x [B, T, (H + 2 G) D] with H = attribute heads and G = attribute kv_heads, a divisor of H.
absl::Status CheckPackedHeads(absl::string_view name, const TensorType& x, const Attrs& attrs);
inline constexpr int64_t kMaxHeads = int64_t{1} << 20;
// Attribute NAME lists distinct dimensions of x in increasing order, at least one.
absl::Status CheckDimList(absl::string_view name, const IntList& dims, const TensorType& x);

// Operands read once, results written once, and `flops`.
Cost TransferCost(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, int64_t flops);
int64_t TotalBytes(absl::Span<const TensorType> types);

// For grad rules: Unimplemented where a gradient arrives at a result other than 0.
struct GradContext;
absl::Status OnlyResult0HasGradient(const GradContext& context);

// Samples.
inline SampleOperand Sample(DType dtype, Dims dims, SampleOperand::Fill fill = SampleOperand::Fill::kNormal,
                            int64_t limit = 0, int64_t of = 0) {
  return {.type = {dtype, std::move(dims)}, .fill = fill, .limit = limit, .of = of};
}
inline SampleOperand F32(Dims dims, SampleOperand::Fill fill = SampleOperand::Fill::kNormal) {
  return Sample(DType::kF32, std::move(dims), fill);
}
inline SampleOperand BF16(Dims dims, SampleOperand::Fill fill = SampleOperand::Fill::kNormal) {
  return Sample(DType::kBF16, std::move(dims), fill);
}
inline SampleOperand F16(Dims dims, SampleOperand::Fill fill = SampleOperand::Fill::kNormal) {
  return Sample(DType::kF16, std::move(dims), fill);
}
inline SampleOperand Ids(Dims dims, int64_t limit) {
  return Sample(DType::kI32, std::move(dims), SampleOperand::Fill::kIds, limit);
}

// Row-major strides in elements.
Dims StridesOf(absl::Span<const int64_t> dims);

// Calls f(flat, index) for every index of a row-major tensor, in order.
template <typename F>
void ForEachIndex(absl::Span<const int64_t> dims, F f) {
  Dims index(dims.size(), 0);
  const int64_t n = Product(dims);
  for (int64_t flat = 0; flat < n; ++flat) {
    f(flat, index);
    for (size_t d = dims.size(); d-- > 0;) {
      if (++index[d] < dims[d]) break;
      index[d] = 0;
    }
  }
}

// Copies one element, whatever the storage.
template <typename T>
void CopyElement(const HostTensor<T>& from, int64_t i, HostTensor<T>& to, int64_t j) {
  if (IsFloat(from.type.dtype)) {
    to.values[static_cast<size_t>(j)] = from.values[static_cast<size_t>(i)];
  } else {
    to.ints[static_cast<size_t>(j)] = from.ints[static_cast<size_t>(i)];
  }
}

}  // namespace mt

#endif  // MT_IR_OPS_COMMON_H_
