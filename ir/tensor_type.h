// Types of dense row-major tensors; every dimension is known at compile time.
#ifndef MT_IR_TENSOR_TYPE_H_
#define MT_IR_TENSOR_TYPE_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mt {

enum class DType : uint8_t { kF32, kBF16, kF16, kF64, kI32, kU8 };

inline constexpr DType kAllDTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64, DType::kI32, DType::kU8};

// Bytes of one element.
int64_t ByteSize(DType dtype);
// "f32", "bf16", "f16", "f64", "i32", "u8".
absl::string_view DTypeName(DType dtype);
std::optional<DType> ParseDType(absl::string_view name);
bool IsFloat(DType dtype);

// Rounds to the nearest value of `dtype` (ties to even); integers and f64 pass through. The one rounding of the
// numerics contract: a value is rounded to its declared dtype where it is defined.
double RoundTo(DType dtype, double value);

using Dims = absl::InlinedVector<int64_t, 4>;

struct TensorType {
  DType dtype = DType::kF32;
  Dims dims;  // Empty: a scalar.

  int64_t rank() const { return static_cast<int64_t>(dims.size()); }
  int64_t num_elements() const;
  int64_t byte_size() const { return num_elements() * ByteSize(dtype); }
  // Dimension `i`; negative counts from the last.
  int64_t dim(int64_t i) const { return dims[static_cast<size_t>(i < 0 ? i + rank() : i)]; }
  // "f32[32,128]"; a scalar is "f32[]".
  std::string ToString() const;

  friend bool operator==(const TensorType& a, const TensorType& b) { return a.dtype == b.dtype && a.dims == b.dims; }
  friend bool operator!=(const TensorType& a, const TensorType& b) { return !(a == b); }
  template <typename H>
  friend H AbslHashValue(H h, const TensorType& t) {
    return H::combine(std::move(h), t.dtype, t.dims);
  }
};

// Limits on what a file may describe: rank, one dimension, elements of one tensor.
inline constexpr int64_t kMaxRank = 8;
inline constexpr int64_t kMaxElements = int64_t{1} << 44;

// Errors: InvalidArgument for rank > kMaxRank, a dimension < 1, or more than kMaxElements elements.
absl::Status CheckTensorType(const TensorType& type);

// The reverse of ToString, checked.
absl::StatusOr<TensorType> ParseTensorType(absl::string_view text);

// a * b, or nullopt where it does not fit in int64 or either is negative.
std::optional<int64_t> CheckedMultiply(int64_t a, int64_t b);

std::string DimsToString(absl::Span<const int64_t> dims);  // "[32,128]"

}  // namespace mt

#endif  // MT_IR_TENSOR_TYPE_H_
