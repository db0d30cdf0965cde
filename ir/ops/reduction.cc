#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

// 1 where dimension d of x is reduced.
std::vector<bool> Reduced(const TensorType& x, const Attrs& attrs) {
  std::vector<bool> reduced(x.dims.size(), false);
  for (const int64_t d : attrs.Get<IntList>("dims")) reduced[static_cast<size_t>(d)] = true;
  return reduced;
}

// x's dimensions with 1 for the reduced ones.
Dims KeptDims(const TensorType& x, const Attrs& attrs) {
  const std::vector<bool> reduced = Reduced(x, attrs);
  Dims dims = x.dims;
  for (size_t d = 0; d < dims.size(); ++d) {
    if (reduced[d]) dims[d] = 1;
  }
  return dims;
}

absl::StatusOr<std::vector<TensorType>> InferReduce(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckDimList("dims", attrs.Get<IntList>("dims"), x));
  if (attrs.Bool("keep_dims")) return std::vector<TensorType>{{x.dtype, KeptDims(x, attrs)}};
  const std::vector<bool> reduced = Reduced(x, attrs);
  TensorType result = {x.dtype, {}};
  for (size_t d = 0; d < x.dims.size(); ++d) {
    if (!reduced[d]) result.dims.push_back(x.dims[d]);
  }
  return std::vector<TensorType>{result};
}

// dy stretched over the reduced dimensions.
Value Stretched(GradContext& c) {
  const TensorType& x = c.node.operands()[0].type();
  const Value kept = c.builder.Reshape(c.result_grads[0], KeptDims(x, c.node.attrs()));
  return c.builder.Op("broadcast", {kept}, {{"dims", IntList(x.dims.begin(), x.dims.end())}}, c.node.name());
}

absl::Status GradReduceSum(GradContext& c) {
  c.operand_grads[0] = Stretched(c);
  return c.builder.status();
}

int64_t ReducedCount(const TensorType& x, const TensorType& y) { return x.num_elements() / y.num_elements(); }

absl::Status GradReduceMean(GradContext& c) {
  const int64_t n = ReducedCount(c.node.operands()[0].type(), c.node.result_types()[0]);
  c.operand_grads[0] = c.builder.Scale(Stretched(c), 1.0 / static_cast<double>(n));
  return c.builder.status();
}

// Folds every element of x into its result element, starting from `start`; then `finish`.
template <typename T, typename Fold, typename Finish>
void ReferenceReduce(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                     absl::Span<HostTensor<T>* const> results, double start, Fold fold, Finish finish) {
  const HostTensor<T>& x = *operands[0];
  const Dims kept = KeptDims(x.type, attrs), strides = StridesOf(kept);
  std::vector<double> folded(results[0]->values.size(), start);
  ForEachIndex(x.type.dims, [&](int64_t flat, const Dims& index) {
    int64_t to = 0;
    for (size_t d = 0; d < index.size(); ++d) {
      if (kept[d] != 1) to += index[d] * strides[d];
    }
    double& f = folded[static_cast<size_t>(to)];
    f = fold(f, static_cast<double>(x.values[static_cast<size_t>(flat)]));
  });
  const double n = static_cast<double>(ReducedCount(x.type, results[0]->type));
  for (size_t i = 0; i < folded.size(); ++i) results[0]->values[i] = static_cast<T>(finish(folded[i], n));
}

Cost CostReduce(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, operands[0].num_elements());
}

std::vector<OpSample> SamplesReduce() {
  return {{.operands = {F32({5, 3})}, .attrs = {{"dims", IntList{0}}}},
          {.operands = {F32({2, 3, 40})}, .attrs = {{"dims", IntList{2}}}},
          {.operands = {F32({2, 50, 6})}, .attrs = {{"dims", IntList{0, 1}}}},
          {.operands = {F32({2, 3, 4, 5})}, .attrs = {{"dims", IntList{1, 3}}, {"keep_dims", true}}},
          {.operands = {BF16({70, 33})}, .attrs = {{"dims", IntList{0}}}},
          {.operands = {BF16({3, 40})}, .attrs = {{"dims", IntList{1}}}},
          {.operands = {BF16({2, 3, 4, 5})}, .attrs = {{"dims", IntList{1, 3}}}},
          {.operands = {F16({70, 33})}, .attrs = {{"dims", IntList{0}}}},
          {.operands = {F16({3, 40})}, .attrs = {{"dims", IntList{1}}}},
          {.operands = {F16({2, 3, 4, 5})}, .attrs = {{"dims", IntList{1, 3}}}},
          {.operands = {F32({3, 4})}, .attrs = {{"dims", IntList{0, 1}}}},
          {.operands = {F32({2, 1, 3})}, .attrs = {{"dims", IntList{1}}}}};
}

constexpr absl::string_view kX[] = {"x"}, kY[] = {"y"};
constexpr AttrSpec kAttrs[] = {
    {"dims", AttrKind::kIntList, "dimensions that are reduced, in increasing order"},
    {"keep_dims", AttrKind::kBool, "reduced dimensions stay, as 1", "false"},
};

}  // namespace

absl::Span<const OpDef> ReductionOps() {
  static const OpDef ops[] = {
      {.name = "reduce_sum",
       .summary = "y = sum of x over dims; summed in f32, rounded once.",
       .operands = kX,
       .results = kY,
       .attrs = kAttrs,
       .infer = InferReduce,
       .grad = GradReduceSum,
       .reference =
           [](const Attrs& attrs, auto operands, auto results) {
             ReferenceReduce(
                 attrs, operands, results, 0.0, [](double f, double x) { return f + x; },
                 [](double f, double) { return f; });
           },
       .samples = SamplesReduce,
       .cost = CostReduce},
      {.name = "reduce_mean",
       .summary = "y = mean of x over dims; summed in f32, rounded once.",
       .operands = kX,
       .results = kY,
       .attrs = kAttrs,
       .infer = InferReduce,
       .grad = GradReduceMean,
       .reference =
           [](const Attrs& attrs, auto operands, auto results) {
             ReferenceReduce(
                 attrs, operands, results, 0.0, [](double f, double x) { return f + x; },
                 [](double f, double n) { return f / n; });
           },
       .samples = SamplesReduce,
       .cost = CostReduce},
      {.name = "reduce_max",
       .summary = "y = maximum of x over dims; not differentiable.",
       .operands = kX,
       .results = kY,
       .attrs = kAttrs,
       .infer = InferReduce,
       .reference =
           [](const Attrs& attrs, auto operands, auto results) {
             ReferenceReduce(
                 attrs, operands, results, -std::numeric_limits<double>::infinity(),
                 [](double f, double x) { return std::max(f, x); }, [](double f, double) { return f; });
           },
       .samples = SamplesReduce,
       .cost = CostReduce},
  };
  return ops;
}

}  // namespace mt
