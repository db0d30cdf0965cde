#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

// The columns that row r of a matrix of `rows` x `columns` sees: [first, last).
struct Visible {
  int64_t first, last;
};

Visible VisibleColumns(int64_t row, int64_t columns, const Attrs& attrs) {
  if (!attrs.Bool("causal")) return {0, columns};
  const int64_t t = row % columns, window = attrs.Int("window");
  return {window < 0 ? 0 : std::max<int64_t>(0, t - window), t + 1};
}

// Elements of x that some row sees.
int64_t VisibleElements(const TensorType& x, const Attrs& attrs) {
  if (!attrs.Bool("causal")) return x.num_elements();
  const int64_t t = x.dim(-1), window = attrs.Int("window");
  const int64_t w = window < 0 ? t : std::min(window + 1, t);  // Row t sees min(t + 1, w) columns.
  return x.num_elements() / (t * t) * (w * (w + 1) / 2 + (t - w) * w);
}

absl::Status CheckMask(const TensorType& x, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  const int64_t window = attrs.Int("window"), group = attrs.Int("group");
  RETURN_IF_ERROR(CheckAttr("window", window, -1, kMaxElements));
  RETURN_IF_ERROR(CheckAttr("group", group, 1, kMaxElements));
  if (!attrs.Bool("causal")) {
    if (window < 0) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("attribute window is ", window, "; it needs causal=true"));
  }
  if (x.rank() < 2 || x.dim(-2) % group != 0 || x.dim(-2) / group != x.dim(-1)) {
    return absl::InvalidArgumentError(absl::StrCat("operand x is ", x.ToString(), "; a causal mask needs [..., ", group,
                                                   " T, T] (group query heads, T queries, T keys)"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TensorType>> InferSoftmax(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", operands[0]));
  RETURN_IF_ERROR(CheckMask(operands[0], attrs));
  return std::vector<TensorType>{operands[0]};
}

absl::Status GradSoftmax(GradContext& c) {
  c.operand_grads[0] =
      c.builder.Op("softmax_backward", {c.result_grads[0], c.node.result(0)}, c.node.attrs(), c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferenceSoftmax(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                      absl::Span<HostTensor<T>* const> results) {
  const TensorType& type = operands[0]->type;
  const int64_t columns = type.dim(-1), rows = RowsOf(type);
  const double scale = attrs.Double("scale");
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = operands[0]->values.data() + r * columns;
    T* y = results[0]->values.data() + r * columns;
    const Visible visible = VisibleColumns(r, columns, attrs);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t s = visible.first; s < visible.last; ++s) max = std::max(max, scale * x[s]);
    for (int64_t s = visible.first; s < visible.last; ++s) sum += std::exp(scale * x[s] - max);
    for (int64_t s = 0; s < columns; ++s) {
      y[s] = s < visible.first || s >= visible.last ? T{0} : static_cast<T>(std::exp(scale * x[s] - max) / sum);
    }
  }
}

Cost CostSoftmax(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  const int64_t visible = VisibleElements(operands[0], attrs);
  return {.flops = 5 * visible,
          .bytes_read = visible * ByteSize(operands[0].dtype),
          .bytes_written = results[0].byte_size()};
}

absl::StatusOr<std::vector<TensorType>> InferSoftmaxBackward(absl::Span<const TensorType> operands,
                                                             const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("y", operands[1]));
  RETURN_IF_ERROR(CheckMask(operands[1], attrs));
  RETURN_IF_ERROR(CheckIs("dy", operands[0], operands[1], "as y"));
  return std::vector<TensorType>{operands[1]};
}

template <typename T>
void ReferenceSoftmaxBackward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                              absl::Span<HostTensor<T>* const> results) {
  const TensorType& type = operands[1]->type;
  const int64_t columns = type.dim(-1), rows = RowsOf(type);
  const double scale = attrs.Double("scale");
  for (int64_t r = 0; r < rows; ++r) {
    const T* dy = operands[0]->values.data() + r * columns;
    const T* y = operands[1]->values.data() + r * columns;
    T* dx = results[0]->values.data() + r * columns;
    const Visible visible = VisibleColumns(r, columns, attrs);
    double sum = 0;
    for (int64_t s = visible.first; s < visible.last; ++s) sum += static_cast<double>(dy[s]) * y[s];
    for (int64_t s = 0; s < columns; ++s) {
      dx[s] = s < visible.first || s >= visible.last ? T{0} : static_cast<T>(scale * y[s] * (dy[s] - sum));
    }
  }
}

Cost CostSoftmaxBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results,
                         const Attrs& attrs) {
  const int64_t visible = VisibleElements(operands[1], attrs);
  return {.flops = 5 * visible,
          .bytes_read = 2 * visible * ByteSize(operands[1].dtype),
          .bytes_written = results[0].byte_size()};
}

struct Case {
  Dims dims;
  Attrs attrs;
  DType dtype = DType::kF32;
};

std::vector<Case> Cases() {
  return {{{3, 7}, {}},
          {{2, 3, 40}, {{"scale", 0.25}}},
          {{2, 2, 6, 6}, {{"scale", 0.5}, {"causal", true}}},
          {{1, 2, 40, 40}, {{"scale", 0.125}, {"causal", true}}},
          {{1, 2, 35, 35}, {{"causal", true}, {"window", int64_t{4}}}},
          {{1, 1, 5, 5}, {{"causal", true}, {"window", int64_t{0}}}},
          {{2, 1, 18, 6}, {{"causal", true}, {"group", int64_t{3}}}},
          {{2, 2, 9, 9}, {{"scale", 0.5}, {"causal", true}}, DType::kBF16},
          {{3, 65}, {}, DType::kBF16},
          {{1, 2, 40, 40}, {{"scale", 0.25}, {"causal", true}, {"window", int64_t{7}}}, DType::kF16}};
}

std::vector<OpSample> SamplesSoftmax() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) samples.push_back({.operands = {Sample(c.dtype, c.dims)}, .attrs = c.attrs});
  return samples;
}

std::vector<OpSample> SamplesSoftmaxBackward() {
  std::vector<OpSample> samples;
  for (const Case& c : Cases()) {
    const SampleOperand y = Sample(c.dtype, c.dims, SampleOperand::Fill::kProbability);
    samples.push_back({.operands = {Sample(c.dtype, c.dims), y}, .attrs = c.attrs});
  }
  return samples;
}

constexpr absl::string_view kX[] = {"x"}, kY[] = {"y"}, kDyY[] = {"dy", "y"}, kDx[] = {"dx"};
constexpr AttrSpec kAttrs[] = {
    {"scale", AttrKind::kDouble, "factor of x before the softmax", "1.0"},
    {"causal", AttrKind::kBool, "query t sees keys s <= t", "false"},
    {"window", AttrKind::kInt, "N >= 0: query t also sees only keys s >= t - N; -1: all", "-1"},
    {"group", AttrKind::kInt, "query heads stacked along the rows, t = row modulo T", "1"},
};

}  // namespace

absl::Span<const OpDef> SoftmaxOps() {
  static const OpDef ops[] = {
      {.name = "softmax",
       .summary = "y = softmax(scale x + mask) over the last dimension of x [..., group T, S]; masked elements are 0.",
       .operands = kX,
       .results = kY,
       .attrs = kAttrs,
       .infer = InferSoftmax,
       .grad = GradSoftmax,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceSoftmax(attrs, operands, results); },
       .samples = SamplesSoftmax,
       .cost = CostSoftmax,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}};
           }},
      {.name = "softmax_backward",
       .summary = "dx = scale y (dy - sum of dy y over the visible elements of the row); masked elements are 0.",
       .operands = kDyY,
       .results = kDx,
       .attrs = kAttrs,
       .infer = InferSoftmaxBackward,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceSoftmaxBackward(attrs, operands, results); },
       .samples = SamplesSoftmaxBackward,
       .cost = CostSoftmaxBackward,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}, {0, 1}};
           }},
  };
  return ops;
}

}  // namespace mt
