// Scalars of the optimizer; the updates themselves are element-wise rows.
#include <cmath>

#include "absl/strings/str_cat.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::StatusOr<std::vector<TensorType>> InferGlobalNorm(absl::Span<const TensorType> operands, const Attrs&) {
  if (operands.empty()) return absl::InvalidArgumentError("no operands; it must have at least one");
  for (size_t i = 0; i < operands.size(); ++i) RETURN_IF_ERROR(CheckFloat(absl::StrCat("g", i), operands[i]));
  return std::vector<TensorType>{{DType::kF32, {}}};
}

template <typename T>
void ReferenceGlobalNorm(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  double sum = 0;
  for (const HostTensor<T>* g : operands) {
    for (const T x : g->values) sum += static_cast<double>(x) * x;
  }
  results[0]->values[0] = static_cast<T>(std::sqrt(sum));
}

Cost CostGlobalNorm(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  int64_t elements = 0;
  for (const TensorType& g : operands) elements += g.num_elements();
  return TransferCost(operands, results, 2 * elements);
}

std::vector<OpSample> SamplesGlobalNorm() {
  return {{.operands = {F32({5})}},
          {.operands = {F32({3, 40}), BF16({7}), F32({}), F16({2, 33})}},
          {.operands = {F32({300, 100}), F32({70000})}}};
}

absl::StatusOr<std::vector<TensorType>> InferAdamStep(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType i32 = {DType::kI32, {}}, f32 = {DType::kF32, {}}, f64 = {DType::kF64, {}};
  RETURN_IF_ERROR(CheckIs("t", operands[0], i32, "steps done"));
  RETURN_IF_ERROR(CheckIs("beta1", operands[1], f64, "a scalar"));
  RETURN_IF_ERROR(CheckIs("beta2", operands[2], f64, "a scalar"));
  return std::vector<TensorType>{i32, f32, f32};
}

template <typename T>
void ReferenceAdamStep(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  const int32_t t = operands[0]->ints[0] + 1;
  results[0]->ints[0] = t;
  for (size_t i = 1; i <= 2; ++i) {
    results[i]->values[0] = static_cast<T>(1.0 - std::pow(static_cast<double>(operands[i]->values[0]), t));
  }
}

std::vector<OpSample> SamplesAdamStep() {
  const SampleOperand t = Sample(DType::kI32, {}, SampleOperand::Fill::kStep);
  const SampleOperand beta = Sample(DType::kF64, {}, SampleOperand::Fill::kProbability);
  return {{.operands = {t, beta, beta}}};
}

constexpr absl::string_view kGradients[] = {"g*"}, kNorm[] = {"norm"};
constexpr absl::string_view kAdamOperands[] = {"t", "beta1", "beta2"};
constexpr absl::string_view kAdamResults[] = {"t_next", "bias_correction1", "bias_correction2"};

}  // namespace

absl::Span<const OpDef> OptimizerOps() {
  static const OpDef ops[] = {
      {.name = "global_norm",
       .summary = "norm f32[] = sqrt(sum of the squares of all elements of all operands).",
       .operands = kGradients,
       .results = kNorm,
       .infer = InferGlobalNorm,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceGlobalNorm(operands, results); },
       .samples = SamplesGlobalNorm,
       .cost = CostGlobalNorm,
       .remat = RematPolicy::kMustSave,
       .autocast = Autocast::kNever},
      {.name = "adam_step",
       .summary = "t_next = t + 1; bias_correction = 1 - beta^t_next, computed in f64. t i32[], beta f64[].",
       .operands = kAdamOperands,
       .results = kAdamResults,
       .infer = InferAdamStep,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceAdamStep(operands, results); },
       .samples = SamplesAdamStep,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}};
           },
       .remat = RematPolicy::kMustSave,
       .autocast = Autocast::kNever},
  };
  return ops;
}

}  // namespace mt
