// Positions that are computed, not learned.
#include <cmath>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

// Of the first row of T: 0, or what the operand says.
const TensorType kPosition{DType::kI32, {1}};
absl::Status CheckPosition(absl::Span<const TensorType> operands, const Attrs& attrs) {
  if (!attrs.Bool("position")) return absl::OkStatus();
  return CheckIs("position", operands.back(), kPosition, "the position of the first row");
}
template <typename T>
int64_t FirstPosition(absl::Span<const HostTensor<T>* const> operands, const Attrs& attrs) {
  return attrs.Bool("position") ? operands.back()->ints[0] : 0;
}

absl::StatusOr<std::vector<TensorType>> InferSinusoid(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckPosition(operands, attrs));
  RETURN_IF_ERROR(CheckAttr("length", attrs.Int("length"), 1, kMaxElements));
  RETURN_IF_ERROR(CheckAttr("width", attrs.Int("width"), 1, kMaxElements));
  return std::vector<TensorType>{{DType::kF32, {attrs.Int("length"), attrs.Int("width")}}};
}

template <typename T>
void ReferenceSinusoid(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                       absl::Span<HostTensor<T>* const> results) {
  const int64_t length = attrs.Int("length"), width = attrs.Int("width"), first = FirstPosition(operands, attrs);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t j = 0; j < width; ++j) {
      const double angle = static_cast<double>(first + t) * std::pow(10000.0, -static_cast<double>(j / 2 * 2) / width);
      results[0]->values[static_cast<size_t>(t * width + j)] =
          static_cast<T>(j % 2 == 0 ? std::sin(angle) : std::cos(angle));
    }
  }
}

Cost CostSinusoid(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 20 * results[0].num_elements());
}

std::vector<OpSample> SamplesSinusoid() {
  return {
      {.operands = {}, .attrs = {{"length", int64_t{40}}, {"width", int64_t{16}}}},
      {.operands = {}, .attrs = {{"length", int64_t{3}}, {"width", int64_t{5}}}},
      {.operands = {Ids({1}, 500)}, .attrs = {{"length", int64_t{20}}, {"width", int64_t{16}}, {"position", true}}}};
}

absl::StatusOr<std::vector<TensorType>> InferRope(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckPosition(operands, attrs));
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 2));
  if (x.dim(-1) % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("operand x is ", x.ToString(), "; its last dimension must be even: pairs are rotated"));
  }
  if (!(attrs.Double("theta") > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute theta is ", attrs.Double("theta"), "; it must be greater than 0"));
  }
  return std::vector<TensorType>{x};
}

absl::Status GradRope(GradContext& c) {
  Attrs attrs = c.node.attrs();
  attrs.Set("inverse", !attrs.Bool("inverse"));
  std::vector<Value> operands(c.node.operands().begin(), c.node.operands().end());
  operands[0] = c.result_grads[0];
  c.operand_grads[0] = c.builder.Op("rope", operands, attrs, c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferenceRope(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                   absl::Span<HostTensor<T>* const> results) {
  const TensorType& type = operands[0]->type;
  const int64_t d = type.dim(-1), t_count = type.dim(-2), rows = RowsOf(type);
  const int64_t first = FirstPosition(operands, attrs);
  const bool interleaved = attrs.Bool("interleaved");
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = operands[0]->values.data() + r * d;
    T* y = results[0]->values.data() + r * d;
    for (int64_t i = 0; i < d / 2; ++i) {
      const double frequency = std::pow(attrs.Double("theta"), -2.0 * static_cast<double>(i) / static_cast<double>(d));
      const double angle = static_cast<double>(first + r % t_count) * frequency;
      const double c = std::cos(angle), s = attrs.Bool("inverse") ? -std::sin(angle) : std::sin(angle);
      const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + d / 2;
      const double xa = x[a], xb = x[b];
      y[a] = static_cast<T>(xa * c - xb * s);
      y[b] = static_cast<T>(xb * c + xa * s);
    }
  }
}

Cost CostRope(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 3 * operands[0].num_elements());
}

std::vector<OpSample> SamplesRope() {
  return {{.operands = {F32({2, 3, 5, 8})}},
          {.operands = {F32({1, 2, 40, 34})}, .attrs = {{"theta", 500000.0}}},
          {.operands = {F32({2, 1, 7, 6})}, .attrs = {{"inverse", true}}},
          {.operands = {F32({2, 2, 4, 16})}, .attrs = {{"interleaved", true}}},
          {.operands = {BF16({2, 2, 9, 16})}},
          {.operands = {F16({2, 2, 9, 34})}},
          {.operands = {F16({1, 2, 4, 16})}, .attrs = {{"interleaved", true}, {"inverse", true}}},
          {.operands = {F32({1, 3, 1, 8}), Ids({1}, 900)}, .attrs = {{"position", true}}},
          {.operands = {BF16({2, 1, 20, 16}), Ids({1}, 50)}, .attrs = {{"position", true}}}};
}

constexpr absl::string_view kX[] = {"x", "position?"}, kY[] = {"y"}, kPositionAlone[] = {"position?"};
constexpr AttrSpec kPositionAttr = {"position", AttrKind::kBool, "a last operand says where the first row stands",
                                    "false"};
constexpr AttrSpec kSinusoidAttrs[] = {
    {"length", AttrKind::kInt, "positions"}, {"width", AttrKind::kInt, "columns"}, kPositionAttr};
constexpr AttrSpec kRopeAttrs[] = {
    {"theta", AttrKind::kDouble, "base of the frequencies", "10000.0"},
    {"inverse", AttrKind::kBool, "rotates back: the gradient", "false"},
    {"interleaved", AttrKind::kBool, "pairs are (2i, 2i+1), not (i, i+D/2)", "false"},
    kPositionAttr,
};

}  // namespace

absl::Span<const OpDef> PositionOps() {
  static const OpDef ops[] = {
      {.name = "sinusoid",
       .summary =
           "y[t, 2i] = sin((position + t) / 10000^(2i/width)), y[t, 2i+1] = cos of the same; position i32[1], or 0. "
           "Vaswani et al. (2017), 3.5.",
       .operands = kPositionAlone,
       .results = kY,
       .attrs = kSinusoidAttrs,
       .infer = InferSinusoid,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceSinusoid(attrs, operands, results); },
       .samples = SamplesSinusoid,
       .cost = CostSinusoid,
       .autocast = Autocast::kNever},
      {.name = "rope",
       .summary = "y = x [..., T, D] with the pairs (i, i+D/2) rotated by (position + t) theta^(-2i/D); position "
                  "i32[1], or 0. "
                  "Su et al. (2021), 3.2.",
       .operands = kX,
       .results = kY,
       .attrs = kRopeAttrs,
       .infer = InferRope,
       .grad = GradRope,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceRope(attrs, operands, results); },
       .samples = SamplesRope,
       .cost = CostRope,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}};
           }},
  };
  return ops;
}

}  // namespace mt
