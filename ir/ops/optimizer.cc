// Scalars of the optimizer, and the update over 8-bit moments; those over f32 moments are element-wise rows.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "ir/dynamic_map.h"
#include "ir/loss_scale.h"
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
  if (operands.size() > 3) RETURN_IF_ERROR(CheckIs("apply", operands[3], f32, "0 or 1"));
  return std::vector<TensorType>{i32, f32, f32};
}

template <typename T>
void ReferenceAdamStep(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  const int32_t t = operands[0]->ints[0] + 1;
  results[0]->ints[0] = operands.size() > 3 && operands[3]->values[0] == 0 ? t - 1 : t;
  for (size_t i = 1; i <= 2; ++i) {
    results[i]->values[0] = static_cast<T>(1.0 - std::pow(static_cast<double>(operands[i]->values[0]), t));
  }
}

std::vector<OpSample> SamplesAdamStep() {
  const SampleOperand t = Sample(DType::kI32, {}, SampleOperand::Fill::kStep);
  const SampleOperand beta = Sample(DType::kF64, {}, SampleOperand::Fill::kProbability);
  const Attrs apply = {{"apply", true}};
  const auto flag = [](int64_t bound) { return Sample(DType::kF32, {}, SampleOperand::Fill::kIds, bound); };
  return {{.operands = {t, beta, beta}},
          {.operands = {t, beta, beta, flag(1)}, .attrs = apply},  // 0
          {.operands = {t, beta, beta, F32({}, SampleOperand::Fill::kPositive)}, .attrs = apply}};
}

absl::StatusOr<std::vector<TensorType>> InferLossScaleStep(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType i32 = {DType::kI32, {}}, f32 = {DType::kF32, {}};
  RETURN_IF_ERROR(CheckIs("scale", operands[0], f32, "a scalar"));
  RETURN_IF_ERROR(CheckIs("good_steps", operands[1], i32, "steps since the scale changed"));
  RETURN_IF_ERROR(CheckIs("norm", operands[2], f32, "a scalar"));
  RETURN_IF_ERROR(CheckAttr("interval", attrs.Int("interval"), 1, int64_t{1} << 30));
  return std::vector<TensorType>{f32, i32, f32};
}

template <typename T>
void ReferenceLossScaleStep(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                            absl::Span<HostTensor<T>* const> results) {
  const float scale = static_cast<float>(operands[0]->values[0]);
  const LossScale next = NextLossScale({scale, operands[1]->ints[0]}, std::isfinite(operands[2]->values[0]),
                                       static_cast<int32_t>(attrs.Int("interval")));
  results[0]->values[0] = next.scale;
  results[1]->ints[0] = next.good_steps;
  results[2]->values[0] = std::isfinite(operands[2]->values[0]) ? 1 : 0;
}

std::vector<OpSample> SamplesLossScaleStep() {
  const SampleOperand scale = F32({}, SampleOperand::Fill::kPositive), norm = F32({});
  const SampleOperand good_steps = Sample(DType::kI32, {}, SampleOperand::Fill::kStep);
  return {{.operands = {scale, good_steps, norm}, .attrs = {{"interval", int64_t{2000}}}},
          {.operands = {scale, good_steps, norm}, .attrs = {{"interval", int64_t{1}}}}};
}

constexpr absl::string_view kAdam8Operands[] = {"p",
                                                "m",
                                                "v",
                                                "m_scale",
                                                "v_scale",
                                                "g",
                                                "lr",
                                                "beta1",
                                                "beta2",
                                                "eps",
                                                "weight_decay",
                                                "bias_correction1",
                                                "bias_correction2",
                                                "grad_scale",
                                                "apply?"};

absl::StatusOr<std::vector<TensorType>> InferAdam8(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType& p = operands[0];
  const TensorType codes = {DType::kU8, p.dims};
  const TensorType scales = {DType::kF32, {(p.num_elements() + kQuantizedBlock - 1) / kQuantizedBlock}};
  RETURN_IF_ERROR(CheckFloat("p", p));
  RETURN_IF_ERROR(CheckIs("m", operands[1], codes, "a code for each element of p"));
  RETURN_IF_ERROR(CheckIs("v", operands[2], codes, "a code for each element of p"));
  RETURN_IF_ERROR(CheckIs("m_scale", operands[3], scales, "one for each 256 elements of p"));
  RETURN_IF_ERROR(CheckIs("v_scale", operands[4], scales, "one for each 256 elements of p"));
  RETURN_IF_ERROR(CheckFloatDims("g", operands[5], p.dims, "those of p"));
  for (size_t i = 6; i < operands.size(); ++i) {
    RETURN_IF_ERROR(CheckIs(i == 14 ? "apply" : kAdam8Operands[i], operands[i], {DType::kF32, {}}, "one number"));
  }
  return std::vector<TensorType>{p, codes, codes, scales, scales};
}

// In f32 whatever T: no operation but those that IEEE 754 rounds exactly, so that codes are the same everywhere. The
// update itself is that of the row adamw.
template <typename T>
void ReferenceAdam8(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                    absl::Span<HostTensor<T>* const> results) {
  const int64_t n = operands[0]->type.num_elements();
  const auto scalar = [&](size_t i) { return static_cast<float>(operands[i]->values[0]); };
  const float lr = scalar(6), beta1 = scalar(7), beta2 = scalar(8), eps = scalar(9), weight_decay = scalar(10),
              correction1 = scalar(11), correction2 = scalar(12), grad_scale = scalar(13);
  const bool skip = attrs.Bool("apply") && scalar(14) == 0;
  const auto& m_values = DynamicMap::Signed().values();
  const auto& v_values = DynamicMap::Unsigned().values();
  for (int64_t first = 0; first < n; first += kQuantizedBlock) {
    const size_t block = static_cast<size_t>(first / kQuantizedBlock), begin = static_cast<size_t>(first);
    const size_t end = static_cast<size_t>(std::min(n, first + kQuantizedBlock));
    const float m_scale = static_cast<float>(operands[3]->values[block]);
    const float v_scale = static_cast<float>(operands[4]->values[block]);
    float m_largest = 0, v_largest = 0;
    std::vector<float> m_new, v_new;
    for (size_t i = begin; i < end; ++i) {
      const float p = static_cast<float>(operands[0]->values[i]);
      const float g = static_cast<float>(operands[5]->values[i]) * grad_scale;
      const float m = m_values[static_cast<uint8_t>(operands[1]->ints[i])] * m_scale;
      const float v = v_values[static_cast<uint8_t>(operands[2]->ints[i])] * v_scale;
      m_new.push_back(beta1 * m + (1.0f - beta1) * g);
      v_new.push_back(beta2 * v + (1.0f - beta2) * (g * g));
      m_largest = std::max(m_largest, std::abs(m_new.back()));
      v_largest = std::max(v_largest, v_new.back());
      const float decayed = attrs.Bool("decay") ? p - lr * weight_decay * p : p;
      const float updated =
          decayed - lr / correction1 * m_new.back() / (std::sqrt(v_new.back()) / std::sqrt(correction2) + eps);
      results[0]->values[i] = static_cast<T>(skip ? p : updated);
    }
    for (size_t i = begin; i < end; ++i) {
      const float m = m_new[i - begin], v = v_new[i - begin];
      results[1]->ints[i] =
          skip ? operands[1]->ints[i] : DynamicMap::Signed().Encode(m_largest > 0 ? m / m_largest : 0);
      results[2]->ints[i] =
          skip ? operands[2]->ints[i] : DynamicMap::Unsigned().Encode(v_largest > 0 ? v / v_largest : 0);
    }
    results[3]->values[block] = static_cast<T>(skip ? m_scale : m_largest);
    results[4]->values[block] = static_cast<T>(skip ? v_scale : v_largest);
  }
}

Cost CostAdam8(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 30 * operands[0].num_elements());
}

std::vector<OpSample> SamplesAdam8() {
  using Fill = SampleOperand::Fill;
  const auto sample = [](Dims dims, DType gradient, bool decay, int64_t apply_bound = 0) {
    const int64_t blocks = (Product(dims) + kQuantizedBlock - 1) / kQuantizedBlock;
    const SampleOperand codes = Sample(DType::kU8, dims, Fill::kIds, 256), scales = F32({blocks}, Fill::kPositive);
    OpSample made{{F32(dims), codes, codes, scales, scales, Sample(gradient, dims)},
                  {{"decay", decay}, {"apply", apply_bound > 0}}};
    // lr, beta1, beta2, eps, weight_decay, bias corrections, grad_scale.
    for (const Fill fill : {Fill::kProbability, Fill::kProbability, Fill::kProbability, Fill::kPositive,
                            Fill::kProbability, Fill::kPositive, Fill::kPositive, Fill::kPositive}) {
      made.operands.push_back(F32({}, fill));
    }
    if (apply_bound > 0) made.operands.push_back(Sample(DType::kF32, {}, Fill::kIds, apply_bound));
    return made;
  };
  return {sample({4, 33}, DType::kF32, true), sample({2, 256}, DType::kF32, false), sample({7, 85}, DType::kBF16, true),
          sample({300}, DType::kF32, true, 1), sample({300}, DType::kF32, false, 2)};
}

constexpr absl::string_view kGradients[] = {"g*"}, kNorm[] = {"norm"};
constexpr absl::string_view kAdamOperands[] = {"t", "beta1", "beta2", "apply?"};
constexpr absl::string_view kAdamResults[] = {"t_next", "bias_correction1", "bias_correction2"};
constexpr AttrSpec kAdamAttrs[] = {
    {"apply", AttrKind::kBool, "a last operand says whether the step counts; where it is 0, t_next = t", "false"}};
constexpr absl::string_view kLossScaleOperands[] = {"scale", "good_steps", "norm"};
constexpr absl::string_view kLossScaleResults[] = {"scale_next", "good_steps_next", "apply"};
constexpr AttrSpec kLossScaleAttrs[] = {
    {"interval", AttrKind::kInt, "good steps after which the scale doubles", "2000"}};
constexpr absl::string_view kAdam8Results[] = {"p_new", "m_new", "v_new", "m_scale_new", "v_scale_new"};
constexpr AttrSpec kAdam8Attrs[] = {
    {"decay", AttrKind::kBool, "whether weight_decay applies"},
    {"apply", AttrKind::kBool, "a last operand says whether to update; where it is 0, nothing changes, to the bit",
     "false"}};

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
       .attrs = kAdamAttrs,
       .infer = InferAdamStep,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceAdamStep(operands, results); },
       .samples = SamplesAdamStep,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}};
           },
       .remat = RematPolicy::kMustSave,
       .autocast = Autocast::kNever},
      {.name = "loss_scale_step",
       .summary = "apply = norm is finite ? 1 : 0. Then good_steps + 1, and the scale doubles (to at most 2^24) after "
                  "`interval` of them in a row; else good_steps = 0 and the scale halves. f32[], i32[], f32[].",
       .operands = kLossScaleOperands,
       .results = kLossScaleResults,
       .attrs = kLossScaleAttrs,
       .infer = InferLossScaleStep,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceLossScaleStep(attrs, operands, results); },
       .samples = SamplesLossScaleStep,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}, {1, 1}};
           },
       .remat = RematPolicy::kMustSave,
       .autocast = Autocast::kNever,
       .tolerance = 0},
      {.name = "adamw8bit",
       .summary =
           "adamw over moments of 8 bits: m = signed[code] m_scale[block], v = unsigned[code] v_scale[block], of "
           "blocks of 256 elements and the dynamic maps of Dettmers et al.; the new scales are the largest "
           "magnitudes, the new codes the nearest values.",
       .operands = kAdam8Operands,
       .results = kAdam8Results,
       .attrs = kAdam8Attrs,
       .infer = InferAdam8,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceAdam8(attrs, operands, results); },
       .samples = SamplesAdam8,
       .cost = CostAdam8,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}};
           },
       .remat = RematPolicy::kMustSave,
       .autocast = Autocast::kNever,
       .tolerance = 0},
  };
  return ops;
}

}  // namespace mt
