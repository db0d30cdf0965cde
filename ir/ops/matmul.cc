#include <limits>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

// One product: batch x [rows, depth] x [depth, cols]; batch 1 where b is a matrix (leading dimensions of a are rows).
struct Shape {
  int64_t batch, rows, depth, cols;
};

Shape ShapeOf(const TensorType& a, const TensorType& b, const Attrs& attrs) {
  const bool ta = attrs.Bool("transpose_a"), tb = attrs.Bool("transpose_b");
  Shape s;
  s.depth = a.dim(ta ? -2 : -1);
  s.cols = b.dim(tb ? -2 : -1);
  s.batch = b.rank() == 2 ? 1 : b.num_elements() / (b.dim(-1) * b.dim(-2));
  s.rows = a.num_elements() / (s.depth * s.batch);
  return s;
}

absl::StatusOr<std::vector<TensorType>> InferMatmul(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType &a = operands[0], &b = operands[1];
  const bool ta = attrs.Bool("transpose_a"), tb = attrs.Bool("transpose_b");
  RETURN_IF_ERROR(CheckFloat("a", a));
  RETURN_IF_ERROR(CheckRank("a", a, 2));
  RETURN_IF_ERROR(CheckRank("b", b, 2));
  if (a.dtype != b.dtype) {
    return absl::InvalidArgumentError(
        absl::StrCat("operands a, ", a.ToString(), ", and b, ", b.ToString(), ", must have the same dtype"));
  }
  if (b.rank() != 2 || ta) {
    Dims leading_a(a.dims.begin(), a.dims.end() - 2), leading_b(b.dims.begin(), b.dims.end() - 2);
    if (leading_a != leading_b) {
      return absl::InvalidArgumentError(absl::StrCat(
          "operands a, ", a.ToString(), ", and b, ", b.ToString(), ", must have the same leading dimensions",
          ta ? " (only an a that is not transposed may have them with a matrix b)" : ", or b be a matrix"));
    }
  }
  const int64_t depth_a = a.dim(ta ? -2 : -1), depth_b = b.dim(tb ? -1 : -2);
  if (depth_a != depth_b) {
    return absl::InvalidArgumentError(absl::StrCat(
        "operand b has ", depth_b, tb ? " columns (transposed)" : " rows", ", a has ", depth_a,
        ta ? " rows (transposed)" : " columns", "; they must be equal: a is ", a.ToString(), ", b is ", b.ToString()));
  }
  if (attrs.Bool("tf32") && a.dtype != DType::kF32) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute tf32 is true; it needs f32 operands, and a is ", a.ToString()));
  }
  TensorType result = a;
  if (attrs.Bool("f32_result")) result.dtype = DType::kF32;
  result.dims[result.dims.size() - 2] = a.dim(ta ? -1 : -2);
  result.dims.back() = b.dim(tb ? -2 : -1);
  size_t next = 2;
  if (attrs.Bool("bias")) {
    const TensorType& bias = operands[next++];
    RETURN_IF_ERROR(CheckFloatDims("bias", bias, {result.dim(-1)}, "one for each column of the result"));
    if (bias.dtype != DType::kF32 && bias.dtype != a.dtype) {
      return absl::InvalidArgumentError(absl::StrCat("operand bias is ", bias.ToString(), "; its dtype must be ",
                                                     DTypeName(a.dtype), ", as that of a, or f32"));
    }
  }
  if (attrs.Bool("accumulator")) {
    const TensorType& accumulator = operands[next];
    if (accumulator.dtype == DType::kF32) result.dtype = DType::kF32;
    RETURN_IF_ERROR(CheckIs("accumulator", accumulator, result, "the type of the product, or f32"));
  }
  return std::vector<TensorType>{result};
}

absl::Status GradMatmul(GradContext& c) {
  const Value dy = c.result_grads[0];
  const Value a = c.node.operands()[0], b = c.node.operands()[1];
  const Attrs& attrs = c.node.attrs();
  const bool ta = attrs.Bool("transpose_a"), tb = attrs.Bool("transpose_b");
  Builder& builder = c.builder;
  const auto product = [&](Value x, Value y, bool tx, bool ty) {
    return builder.Op("matmul", {x, y}, {{"transpose_a", tx}, {"transpose_b", ty}, {"tf32", attrs.Bool("tf32")}},
                      c.node.name());
  };
  const Value dy_in = builder.Cast(dy, a.type().dtype);
  if (c.wants[0]) c.operand_grads[0] = ta ? product(b, dy_in, tb, true) : product(dy_in, b, false, !tb);
  if (c.wants[1]) {
    // Leading dimensions of a are rows where b is a matrix.
    const auto flat = [&](Value x) {
      return b.type().rank() == 2 ? builder.Reshape(x, {RowsOf(x.type()), x.type().dim(-1)}) : x;
    };
    const Value fa = flat(a), fdy = flat(dy_in);
    c.operand_grads[1] = tb ? product(fdy, fa, true, ta) : product(fa, fdy, !ta, false);
  }
  size_t next = 2;
  if (attrs.Bool("bias")) {
    if (c.wants[next]) c.operand_grads[next] = builder.SumTo(dy, c.node.operands()[next].type().dims);
    ++next;
  }
  if (attrs.Bool("accumulator") && c.wants[next]) c.operand_grads[next] = dy;
  return builder.status();
}

template <typename T>
void ReferenceMatmul(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                     absl::Span<HostTensor<T>* const> results) {
  const HostTensor<T>&a = *operands[0], &b = *operands[1];
  const bool ta = attrs.Bool("transpose_a"), tb = attrs.Bool("transpose_b");
  const Shape s = ShapeOf(a.type, b.type, attrs);
  size_t next = 2;
  const HostTensor<T>* bias = attrs.Bool("bias") ? operands[next++] : nullptr;
  const HostTensor<T>* accumulator = attrs.Bool("accumulator") ? operands[next] : nullptr;
  for (int64_t n = 0; n < s.batch; ++n) {
    const T* pa = a.values.data() + n * s.rows * s.depth;
    const T* pb = b.values.data() + n * s.depth * s.cols;
    for (int64_t i = 0; i < s.rows; ++i) {
      for (int64_t j = 0; j < s.cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < s.depth; ++k) {
          const double x = pa[ta ? k * s.rows + i : i * s.depth + k];
          const double y = pb[tb ? j * s.depth + k : k * s.cols + j];
          sum += x * y;
        }
        const size_t at = static_cast<size_t>((n * s.rows + i) * s.cols + j);
        if (bias != nullptr) sum += bias->values[static_cast<size_t>(j)];
        if (accumulator != nullptr) sum += accumulator->values[at];
        results[0]->values[at] = static_cast<T>(sum);
      }
    }
  }
}

Cost CostMatmul(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  const Shape s = ShapeOf(operands[0], operands[1], attrs);
  // A result within the limits may still take more than 2^63 FLOPs.
  int64_t flops =
      CheckedMultiply(2 * results[0].num_elements(), s.depth).value_or(std::numeric_limits<int64_t>::max() / 2);
  if (attrs.Bool("bias")) flops += results[0].num_elements();
  if (attrs.Bool("accumulator")) flops += results[0].num_elements();
  return TransferCost(operands, results, flops);
}

std::vector<std::pair<int, int>> InPlaceMatmul(absl::Span<const TensorType> operands, absl::Span<const TensorType>,
                                               const Attrs& attrs) {
  if (!attrs.Bool("accumulator")) return {};
  return {{0, static_cast<int>(operands.size()) - 1}};
}

std::vector<OpSample> SamplesMatmul() {
  std::vector<OpSample> samples;
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      const Attrs attrs = {{"transpose_a", ta}, {"transpose_b", tb}};
      const Dims a = ta ? Dims{7, 5} : Dims{5, 7}, b = tb ? Dims{3, 7} : Dims{7, 3};
      const auto batched = [](const Dims& d) { return Dims{2, 3, d[0], d[1]}; };
      samples.push_back({.operands = {F32(a), F32(b)}, .attrs = attrs});
      samples.push_back({.operands = {F32(batched(a)), F32(batched(b))}, .attrs = attrs});
      samples.push_back({.operands = {BF16(a), BF16(b)}, .attrs = attrs});
      samples.push_back({.operands = {F16(batched(a)), F16(batched(b))}, .attrs = attrs});
    }
  }
  samples.push_back({.operands = {F32({2, 4, 33}), F32({33, 17}), F32({17})}, .attrs = {{"bias", true}}});
  samples.push_back(
      {.operands = {F32({2, 4, 16}), F32({32, 16}), F32({32})}, .attrs = {{"bias", true}, {"transpose_b", true}}});
  samples.push_back(
      {.operands = {BF16({2, 4, 16}), BF16({32, 16}), F32({32})}, .attrs = {{"bias", true}, {"transpose_b", true}}});
  samples.push_back(
      {.operands = {F32({9, 4}), F32({9, 6}), F32({4, 6})}, .attrs = {{"transpose_a", true}, {"accumulator", true}}});
  samples.push_back(
      {.operands = {BF16({9, 4}), BF16({9, 6}), F32({4, 6})}, .attrs = {{"transpose_a", true}, {"accumulator", true}}});
  samples.push_back({.operands = {BF16({5, 9}), BF16({9, 6}), BF16({5, 6})}, .attrs = {{"accumulator", true}}});
  samples.push_back({.operands = {F32({5, 9}), F32({9, 6}), F32({6}), F32({5, 6})},
                     .attrs = {{"bias", true}, {"accumulator", true}}});
  samples.push_back({.operands = {F32({1, 1}), F32({1, 1})}});
  samples.push_back({.operands = {F32({5, 9}), F32({9, 6})}, .attrs = {{"tf32", true}}});
  for (const DType narrow : {DType::kBF16, DType::kF16}) {
    samples.push_back({.operands = {Sample(narrow, {2, 9, 4}), Sample(narrow, {2, 9, 6})},
                       .attrs = {{"transpose_a", true}, {"f32_result", true}}});
    samples.push_back({.operands = {Sample(narrow, {5, 9}), Sample(narrow, {9, 6}), Sample(narrow, {6}), F32({5, 6})},
                       .attrs = {{"bias", true}, {"accumulator", true}}});
  }
  // More than one of the blocks that 16-bit operands are widened in.
  samples.push_back({.operands = {BF16({140, 530}), BF16({530, 270}), BF16({270})}, .attrs = {{"bias", true}}});
  samples.push_back(
      {.operands = {F16({530, 140}), F16({270, 530})}, .attrs = {{"transpose_a", true}, {"transpose_b", true}}});
  return samples;
}

constexpr absl::string_view kOperands[] = {"a", "b", "bias?", "accumulator?"};
constexpr absl::string_view kResults[] = {"y"};
constexpr AttrSpec kAttrs[] = {
    {"transpose_a", AttrKind::kBool, "a is stored [..., K, M]", "false"},
    {"transpose_b", AttrKind::kBool, "b is stored [..., N, K]", "false"},
    {"bias", AttrKind::kBool, "an operand bias [N] is added to every row", "false"},
    {"accumulator", AttrKind::kBool, "the product is added to a last operand, in place", "false"},
    {"f32_result", AttrKind::kBool, "the result is f32, whatever a and b are", "false"},
    {"tf32", AttrKind::kBool, "f32 operands may be rounded to TF32, 10 bits of mantissa; products and sum are f32",
     "false"},
};

}  // namespace

absl::Span<const OpDef> MatmulOps() {
  static const OpDef ops[] = {
      {.name = "matmul",
       .summary = "y[..., M, N] = a[..., M, K] b[K, N] or a[..., M, K] b[..., K, N], + bias[N], + accumulator; the sum "
                  "is rounded once, to the dtype of a or of the accumulator, or to f32.",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferMatmul,
       .grad = GradMatmul,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceMatmul(attrs, operands, results); },
       .samples = SamplesMatmul,
       .cost = CostMatmul,
       .in_place = InPlaceMatmul,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kAlways,
       .has_accumulator = true},
  };
  return ops;
}

}  // namespace mt
