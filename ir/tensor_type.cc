#include "ir/tensor_type.h"

#include <cmath>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

struct DTypeRow {
  DType dtype;
  absl::string_view name;
  int64_t bytes;
  bool is_float;
};
constexpr DTypeRow kRows[] = {{DType::kF32, "f32", 4, true},  {DType::kBF16, "bf16", 2, true},
                              {DType::kF16, "f16", 2, true},  {DType::kF64, "f64", 8, true},
                              {DType::kI32, "i32", 4, false}, {DType::kU8, "u8", 1, false}};

const DTypeRow& Row(DType dtype) { return kRows[static_cast<size_t>(dtype)]; }

// Rounds to `digits` significant binary digits, subnormals at exponents below `min_exponent`, infinity above `max`.
double RoundBinary(double value, int digits, int min_exponent, double max) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), min_exponent);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double rounded = std::nearbyint(value / unit) * unit;
  if (std::abs(rounded) > max) return std::copysign(HUGE_VAL, value);
  return rounded;
}

}  // namespace

int64_t ByteSize(DType dtype) { return Row(dtype).bytes; }
absl::string_view DTypeName(DType dtype) { return Row(dtype).name; }
bool IsFloat(DType dtype) { return Row(dtype).is_float; }

std::optional<DType> ParseDType(absl::string_view name) {
  for (const DTypeRow& row : kRows) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

double RoundTo(DType dtype, double value) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<float>(value);
    case DType::kBF16:
      return RoundBinary(static_cast<float>(value), 8, -126, 0x1.FEp127);
    case DType::kF16:
      return RoundBinary(static_cast<float>(value), 11, -14, 65504.0);
    default:
      return value;
  }
}

int64_t TensorType::num_elements() const {
  int64_t n = 1;
  for (const int64_t d : dims) n *= d;
  return n;
}

std::string DimsToString(absl::Span<const int64_t> dims) { return absl::StrCat("[", absl::StrJoin(dims, ","), "]"); }

std::string TensorType::ToString() const { return absl::StrCat(DTypeName(dtype), DimsToString(dims)); }

std::optional<int64_t> CheckedMultiply(int64_t a, int64_t b) {
  int64_t product = 0;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

absl::Status CheckTensorType(const TensorType& type) {
  if (type.rank() > kMaxRank) {
    return absl::InvalidArgumentError(
        absl::StrCat(type.ToString(), " has ", type.rank(), " dimensions; at most ", kMaxRank, " are allowed"));
  }
  int64_t elements = 1;
  for (const int64_t d : type.dims) {
    if (d < 1) return absl::InvalidArgumentError(absl::StrCat(type.ToString(), ": every dimension must be at least 1"));
    const std::optional<int64_t> product = CheckedMultiply(elements, d);
    if (!product || *product > kMaxElements) {
      return absl::InvalidArgumentError(
          absl::StrCat(type.ToString(), " has more than ", kMaxElements, " elements, the limit for one tensor"));
    }
    elements = *product;
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorType> ParseTensorType(absl::string_view text) {
  const size_t bracket = text.find('[');
  if (bracket == absl::string_view::npos || !absl::EndsWith(text, "]")) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a type such as f32[32,128]"));
  }
  TensorType type;
  const std::optional<DType> dtype = ParseDType(text.substr(0, bracket));
  if (!dtype)
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": unknown dtype; known: f32 bf16 f16 f64 i32 u8"));
  type.dtype = *dtype;
  const absl::string_view inside = text.substr(bracket + 1, text.size() - bracket - 2);
  if (!inside.empty()) {
    for (const absl::string_view part : absl::StrSplit(inside, ',')) {
      int64_t d = 0;
      if (!absl::SimpleAtoi(part, &d)) {
        return absl::InvalidArgumentError(absl::StrCat("\"", text, "\": \"", part, "\" is not a whole number"));
      }
      type.dims.push_back(d);
    }
  }
  RETURN_IF_ERROR(CheckTensorType(type));
  return type;
}

}  // namespace mt
