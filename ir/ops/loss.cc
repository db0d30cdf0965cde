#include <algorithm>
#include <cmath>

#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::Status CheckLogits(const TensorType& logits, const TensorType& labels, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("logits", logits));
  RETURN_IF_ERROR(CheckRank("logits", logits, 1));
  RETURN_IF_ERROR(CheckAttr("classes", attrs.Int("classes"), 0, logits.dim(-1)));
  return CheckIs("labels", labels, {DType::kI32, Dims(logits.dims.begin(), logits.dims.end() - 1)},
                 "one for each row of logits");
}

absl::StatusOr<std::vector<TensorType>> InferLoss(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckLogits(operands[0], operands[1], attrs));
  const TensorType scalar = {DType::kF32, {}};
  return std::vector<TensorType>{scalar, scalar, {DType::kF32, operands[1].dims}};
}

absl::Status GradLoss(GradContext& c) {
  // The count does not depend on the logits; nobody but the backward op reads lse.
  if (c.result_grads[2]) return OnlyResult0HasGradient(c);
  if (!c.result_grads[0]) return absl::OkStatus();
  c.operand_grads[0] = c.builder.Op("softmax_cross_entropy_backward",
                                    {c.result_grads[0], c.node.operands()[0], c.node.operands()[1], c.node.result(2)},
                                    c.node.attrs(), c.node.name());
  return c.builder.status();
}

// Columns of the logits that are classes.
int64_t ClassesOf(const TensorType& logits, const Attrs& attrs) {
  return attrs.Int("classes") == 0 ? logits.dim(-1) : attrs.Int("classes");
}

template <typename T>
void ReferenceLoss(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                   absl::Span<HostTensor<T>* const> results) {
  const HostTensor<T>& logits = *operands[0];
  const int64_t v = logits.type.dim(-1), classes = ClassesOf(logits.type, attrs), rows = RowsOf(logits.type);
  double sum = 0, count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = logits.values.data() + r * v;
    const double max = *std::max_element(x, x + classes);
    double total = 0;
    for (int64_t j = 0; j < classes; ++j) total += std::exp(x[j] - max);
    const double lse = max + std::log(total);
    results[2]->values[static_cast<size_t>(r)] = static_cast<T>(lse);
    const int32_t label = operands[1]->ints[static_cast<size_t>(r)];
    if (label < 0) continue;
    sum += lse - x[label];
    count += 1;
  }
  results[0]->values[0] = static_cast<T>(sum);
  results[1]->values[0] = static_cast<T>(count);
}

Cost CostLoss(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 4 * operands[0].num_elements());
}

constexpr SampleOperand::Fill kPositive = SampleOperand::Fill::kPositive;

std::vector<OpSample> SamplesLoss() {
  return {{.operands = {F32({5, 7}), Ids({5}, 7)}},
          {.operands = {F32({2, 9, 65}), Ids({2, 9}, -65)}},
          {.operands = {BF16({2, 4, 100}), Ids({2, 4}, -100)}},
          {.operands = {F32({140, 33}), Ids({140}, -33)}},
          {.operands = {F32({3, 65}), Ids({3}, 50)}, .attrs = {{"classes", int64_t{50}}}},
          {.operands = {BF16({40, 600}), Ids({40}, -530)}, .attrs = {{"classes", int64_t{530}}}},
          {.operands = {F16({2, 4, 100}), Ids({2, 4}, -100)}}};
}

absl::StatusOr<std::vector<TensorType>> InferLossBackward(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckIs("dloss", operands[0], {DType::kF32, {}}, "one number"));
  RETURN_IF_ERROR(CheckLogits(operands[1], operands[2], attrs));
  RETURN_IF_ERROR(CheckIs("lse", operands[3], {DType::kF32, operands[2].dims}, "one for each row of logits"));
  return std::vector<TensorType>{operands[1]};
}

template <typename T>
void ReferenceLossBackward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                           absl::Span<HostTensor<T>* const> results) {
  const double dloss = operands[0]->values[0];
  const HostTensor<T>& logits = *operands[1];
  const int64_t v = logits.type.dim(-1), classes = ClassesOf(logits.type, attrs), rows = RowsOf(logits.type);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t label = operands[2]->ints[static_cast<size_t>(r)];
    const double lse = operands[3]->values[static_cast<size_t>(r)];
    for (int64_t j = 0; j < v; ++j) {
      const size_t at = static_cast<size_t>(r * v + j);
      const double p = std::exp(logits.values[at] - lse);
      results[0]->values[at] =
          label < 0 || j >= classes ? T{0} : static_cast<T>(dloss * (p - (j == label ? 1.0 : 0.0)));
    }
  }
}

Cost CostLossBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 4 * operands[1].num_elements());
}

std::vector<OpSample> SamplesLossBackward() {
  return {{.operands = {F32({}, kPositive), F32({5, 7}), Ids({5}, 7), F32({5}, kPositive)}},
          {.operands = {F32({}), F32({2, 9, 65}), Ids({2, 9}, -65), F32({2, 9}, kPositive)}},
          {.operands = {F32({}), BF16({2, 4, 100}), Ids({2, 4}, -100), F32({2, 4}, kPositive)}},
          {.operands = {F32({}), F32({3, 65}), Ids({3}, 50), F32({3}, kPositive)}, .attrs = {{"classes", int64_t{50}}}},
          {.operands = {F32({}), BF16({9, 600}), Ids({9}, -530), F32({9}, kPositive)},
           .attrs = {{"classes", int64_t{530}}}},
          {.operands = {F32({}), F16({2, 4, 100}), Ids({2, 4}, -100), F32({2, 4}, kPositive)}}};
}

constexpr absl::string_view kOperands[] = {"logits", "labels"}, kResults[] = {"loss_sum", "count", "lse"};
constexpr absl::string_view kBackwardOperands[] = {"dloss", "logits", "labels", "lse"},
                            kBackwardResults[] = {"dlogits"};
constexpr AttrSpec kAttrs[] = {
    {"classes", AttrKind::kInt, "columns of logits that are classes; those after them are padding; 0: all", "0"},
};
constexpr int kLabels[] = {1}, kBackwardNoGrad[] = {2, 3};

}  // namespace

absl::Span<const OpDef> LossOps() {
  static const OpDef ops[] = {
      {.name = "softmax_cross_entropy",
       .summary = "loss_sum = sum over rows with label >= 0 of lse[r] - logits[r, label]; count = number of such rows; "
                  "lse[r] = log sum exp logits[r, :classes]. logits [..., V], labels [...].",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferLoss,
       .grad = GradLoss,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceLoss(attrs, operands, results); },
       .samples = SamplesLoss,
       .cost = CostLoss,
       .no_grad_operands = kLabels},
      {.name = "softmax_cross_entropy_backward",
       .summary = "dlogits[r, j] = dloss (exp(logits[r, j] - lse[r]) - [j = label]); 0 in rows with label < 0 and in "
                  "columns that are no class.",
       .operands = kBackwardOperands,
       .results = kBackwardResults,
       .attrs = kAttrs,
       .infer = InferLossBackward,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceLossBackward(attrs, operands, results); },
       .samples = SamplesLossBackward,
       .cost = CostLossBackward,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 1}};
           },
       .no_grad_operands = kBackwardNoGrad},
  };
  return ops;
}

}  // namespace mt
