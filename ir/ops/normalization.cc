#include <cmath>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::Status CheckScale(absl::string_view name, const TensorType& type, const TensorType& x) {
  return CheckFloatDims(name, type, {x.dim(-1)}, "the last dimension of x");
}

absl::Status CheckX(const TensorType& x, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  if (!(attrs.Double("eps") >= 0)) {
    return absl::InvalidArgumentError(absl::StrCat("attribute eps is ", attrs.Double("eps"), "; it must be >= 0"));
  }
  return absl::OkStatus();
}

TensorType Statistics(const TensorType& x) { return {DType::kF32, Dims(x.dims.begin(), x.dims.end() - 1)}; }

// layer_norm

absl::StatusOr<std::vector<TensorType>> InferLayerNorm(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  RETURN_IF_ERROR(CheckX(x, attrs));
  RETURN_IF_ERROR(CheckScale("gamma", operands[1], x));
  if (attrs.Bool("beta")) {
    RETURN_IF_ERROR(CheckIs("beta", operands[2], operands[1], "as gamma"));
  }
  return std::vector<TensorType>{x, Statistics(x), Statistics(x)};
}

absl::Status GradLayerNorm(GradContext& c) {
  RETURN_IF_ERROR(OnlyResult0HasGradient(c));
  const absl::Span<const Value> operands = c.node.operands();
  const std::vector<Value> grads = c.builder.Ops(
      "layer_norm_backward", {c.result_grads[0], operands[0], operands[1], c.node.result(1), c.node.result(2)}, {},
      c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  for (size_t i = 0; i < operands.size(); ++i) {
    if (c.wants[i]) c.operand_grads[i] = grads[i];
  }
  return absl::OkStatus();
}

// Sums are in f64; everything else is in T, a rounding for each operation, as in a fused region.
template <typename T>
void ReferenceLayerNorm(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                        absl::Span<HostTensor<T>* const> results) {
  const int64_t c = operands[0]->type.dim(-1), rows = RowsOf(operands[0]->type);
  const T* gamma = operands[1]->values.data();
  const T* beta = attrs.Bool("beta") ? operands[2]->values.data() : nullptr;
  const T inverse = static_cast<T>(1.0 / static_cast<double>(c)), eps = static_cast<T>(attrs.Double("eps"));
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = operands[0]->values.data() + r * c;
    T* y = results[0]->values.data() + r * c;
    double sum = 0, squares = 0;
    for (int64_t j = 0; j < c; ++j) sum += static_cast<double>(x[j]);
    const T mean = static_cast<T>(sum) * inverse;
    for (int64_t j = 0; j < c; ++j) {
      const T d = x[j] - mean;
      squares += static_cast<double>(d * d);
    }
    const T rstd = T{1} / std::sqrt(static_cast<T>(squares) * inverse + eps);
    for (int64_t j = 0; j < c; ++j) {
      const T scaled = (x[j] - mean) * rstd * gamma[j];
      y[j] = beta != nullptr ? scaled + beta[j] : scaled;
    }
    results[1]->values[static_cast<size_t>(r)] = mean;
    results[2]->values[static_cast<size_t>(r)] = rstd;
  }
}

absl::StatusOr<std::vector<TensorType>> InferLayerNormBackward(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType &dy = operands[0], &x = operands[1], &gamma = operands[2];
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  RETURN_IF_ERROR(CheckIs("dy", dy, x, "as x"));
  RETURN_IF_ERROR(CheckScale("gamma", gamma, x));
  RETURN_IF_ERROR(CheckIs("mean", operands[3], Statistics(x), "one for each row of x"));
  RETURN_IF_ERROR(CheckIs("rstd", operands[4], Statistics(x), "one for each row of x"));
  return std::vector<TensorType>{x, gamma, gamma};
}

// Both norms' backward: xhat = (x - mean) rstd; without `mean`, rms_norm's.
template <typename T>
void NormBackward(const HostTensor<T>& dy, const HostTensor<T>& x, const HostTensor<T>& gamma,
                  const HostTensor<T>* mean, const HostTensor<T>& rstd, HostTensor<T>& dx, HostTensor<T>& dgamma,
                  HostTensor<T>* dbeta) {
  const int64_t c = x.type.dim(-1), rows = RowsOf(x.type);
  const T inverse = static_cast<T>(1.0 / static_cast<double>(c));
  std::vector<double> gamma_sums(static_cast<size_t>(c), 0.0), beta_sums(static_cast<size_t>(c), 0.0);
  std::vector<T> xhat(static_cast<size_t>(c)), g(static_cast<size_t>(c));
  for (int64_t r = 0; r < rows; ++r) {
    const T m = mean != nullptr ? mean->values[static_cast<size_t>(r)] : T{0};
    const T s = rstd.values[static_cast<size_t>(r)];
    double sum = 0, dot = 0;
    for (size_t j = 0; j < xhat.size(); ++j) {
      const size_t at = static_cast<size_t>(r * c) + j;
      const T d = dy.values[at];
      xhat[j] = (x.values[at] - m) * s;
      g[j] = d * gamma.values[j];
      sum += static_cast<double>(g[j]);
      dot += static_cast<double>(g[j] * xhat[j]);
      gamma_sums[j] += static_cast<double>(d * xhat[j]);
      beta_sums[j] += static_cast<double>(d);
    }
    const T mean_g = mean != nullptr ? static_cast<T>(sum) * inverse : T{0}, mean_dot = static_cast<T>(dot) * inverse;
    for (size_t j = 0; j < xhat.size(); ++j) {
      dx.values[static_cast<size_t>(r * c) + j] = s * (g[j] - mean_g - xhat[j] * mean_dot);
    }
  }
  for (size_t j = 0; j < gamma_sums.size(); ++j) {
    dgamma.values[j] = static_cast<T>(gamma_sums[j]);
    if (dbeta != nullptr) dbeta->values[j] = static_cast<T>(beta_sums[j]);
  }
}

// rms_norm

absl::StatusOr<std::vector<TensorType>> InferRmsNorm(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckX(operands[0], attrs));
  RETURN_IF_ERROR(CheckScale("gamma", operands[1], operands[0]));
  return std::vector<TensorType>{operands[0], Statistics(operands[0])};
}

absl::Status GradRmsNorm(GradContext& c) {
  RETURN_IF_ERROR(OnlyResult0HasGradient(c));
  const absl::Span<const Value> operands = c.node.operands();
  const std::vector<Value> grads = c.builder.Ops(
      "rms_norm_backward", {c.result_grads[0], operands[0], operands[1], c.node.result(1)}, {}, c.node.name());
  RETURN_IF_ERROR(c.builder.status());
  for (size_t i = 0; i < operands.size(); ++i) {
    if (c.wants[i]) c.operand_grads[i] = grads[i];
  }
  return absl::OkStatus();
}

template <typename T>
void ReferenceRmsNorm(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                      absl::Span<HostTensor<T>* const> results) {
  const int64_t c = operands[0]->type.dim(-1), rows = RowsOf(operands[0]->type);
  const T* gamma = operands[1]->values.data();
  const T inverse = static_cast<T>(1.0 / static_cast<double>(c)), eps = static_cast<T>(attrs.Double("eps"));
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = operands[0]->values.data() + r * c;
    T* y = results[0]->values.data() + r * c;
    double squares = 0;
    for (int64_t j = 0; j < c; ++j) squares += static_cast<double>(x[j] * x[j]);
    const T rstd = T{1} / std::sqrt(static_cast<T>(squares) * inverse + eps);
    for (int64_t j = 0; j < c; ++j) y[j] = x[j] * rstd * gamma[j];
    results[1]->values[static_cast<size_t>(r)] = rstd;
  }
}

absl::StatusOr<std::vector<TensorType>> InferRmsNormBackward(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType &dy = operands[0], &x = operands[1], &gamma = operands[2];
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  RETURN_IF_ERROR(CheckIs("dy", dy, x, "as x"));
  RETURN_IF_ERROR(CheckScale("gamma", gamma, x));
  RETURN_IF_ERROR(CheckIs("rstd", operands[3], Statistics(x), "one for each row of x"));
  return std::vector<TensorType>{x, gamma};
}

Cost CostForward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 8 * operands[0].num_elements());
}

Cost CostBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(operands, results, 14 * operands[0].num_elements());
}

std::vector<std::pair<int, int>> InPlaceForward(absl::Span<const TensorType>, absl::Span<const TensorType>,
                                                const Attrs&) {
  return {{0, 0}};
}

std::vector<std::pair<int, int>> InPlaceBackward(absl::Span<const TensorType>, absl::Span<const TensorType>,
                                                 const Attrs&) {
  return {{0, 0}, {0, 1}};
}

constexpr SampleOperand::Fill kPositive = SampleOperand::Fill::kPositive;

std::vector<OpSample> SamplesLayerNorm() {
  return {{.operands = {F32({3, 8}), F32({8}), F32({8})}},
          {.operands = {F32({2, 5, 40}), F32({40}), F32({40})}, .attrs = {{"eps", 1e-3}}},
          {.operands = {F32({4, 7}), F32({7})}, .attrs = {{"beta", false}}},
          {.operands = {BF16({2, 3, 33}), F32({33}), F32({33})}},
          {.operands = {BF16({2, 3, 16}), BF16({16}), BF16({16})}},
          {.operands = {F16({2, 3, 33}), F32({33}), F32({33})}},
          {.operands = {F16({2, 3, 16}), F16({16})}, .attrs = {{"beta", false}}}};
}

std::vector<OpSample> SamplesLayerNormBackward() {
  return {{.operands = {F32({3, 8}), F32({3, 8}), F32({8}), F32({3}), F32({3}, kPositive)}},
          {.operands = {F32({2, 70, 40}), F32({2, 70, 40}), F32({40}), F32({2, 70}), F32({2, 70}, kPositive)}},
          {.operands = {BF16({2, 3, 33}), BF16({2, 3, 33}), F32({33}), F32({2, 3}), F32({2, 3}, kPositive)}},
          {.operands = {BF16({6, 16}), BF16({6, 16}), BF16({16}), F32({6}), F32({6}, kPositive)}},
          {.operands = {F16({70, 33}), F16({70, 33}), F32({33}), F32({70}), F32({70}, kPositive)}},
          {.operands = {F16({6, 16}), F16({6, 16}), F16({16}), F32({6}), F32({6}, kPositive)}}};
}

std::vector<OpSample> SamplesRmsNorm() {
  return {
      {.operands = {F32({3, 8}), F32({8})}},       {.operands = {F32({2, 5, 40}), F32({40})}, .attrs = {{"eps", 1e-3}}},
      {.operands = {BF16({2, 3, 33}), F32({33})}}, {.operands = {BF16({2, 3, 16}), BF16({16})}},
      {.operands = {F16({2, 3, 33}), F32({33})}},  {.operands = {F16({2, 3, 16}), F16({16})}}};
}

std::vector<OpSample> SamplesRmsNormBackward() {
  return {{.operands = {F32({3, 8}), F32({3, 8}), F32({8}), F32({3}, kPositive)}},
          {.operands = {F32({2, 70, 40}), F32({2, 70, 40}), F32({40}), F32({2, 70}, kPositive)}},
          {.operands = {BF16({2, 3, 33}), BF16({2, 3, 33}), F32({33}), F32({2, 3}, kPositive)}},
          {.operands = {BF16({6, 16}), BF16({6, 16}), BF16({16}), F32({6}, kPositive)}},
          {.operands = {F16({70, 33}), F16({70, 33}), F32({33}), F32({70}, kPositive)}}};
}

constexpr absl::string_view kLayerNormOperands[] = {"x", "gamma", "beta?"};
constexpr absl::string_view kLayerNormResults[] = {"y", "mean", "rstd"};
constexpr absl::string_view kLayerNormBackwardOperands[] = {"dy", "x", "gamma", "mean", "rstd"};
constexpr absl::string_view kLayerNormBackwardResults[] = {"dx", "dgamma", "dbeta"};
constexpr absl::string_view kRmsNormOperands[] = {"x", "gamma"}, kRmsNormResults[] = {"y", "rstd"};
constexpr absl::string_view kRmsNormBackwardOperands[] = {"dy", "x", "gamma", "rstd"};
constexpr absl::string_view kRmsNormBackwardResults[] = {"dx", "dgamma"};
constexpr AttrSpec kEps = {"eps", AttrKind::kDouble, "added to the variance", "1e-05"};
constexpr AttrSpec kLayerNormAttrs[] = {kEps, {"beta", AttrKind::kBool, "an operand beta is added", "true"}};
constexpr AttrSpec kRmsNormAttrs[] = {kEps};
constexpr int kLayerNormStatistics[] = {3, 4}, kRmsNormStatistics[] = {3};

}  // namespace

absl::Span<const OpDef> NormalizationOps() {
  static const OpDef ops[] = {
      {.name = "layer_norm",
       .summary =
           "y = (x - mean) rstd gamma + beta over the last dimension; rstd = 1 / sqrt(variance + eps). x [..., C], "
           "gamma, beta [C], mean, rstd f32[...]. Ba et al. (2016).",
       .operands = kLayerNormOperands,
       .results = kLayerNormResults,
       .attrs = kLayerNormAttrs,
       .infer = InferLayerNorm,
       .grad = GradLayerNorm,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceLayerNorm(attrs, operands, results); },
       .samples = SamplesLayerNorm,
       .cost = CostForward,
       .in_place = InPlaceForward},
      {.name = "layer_norm_backward",
       .summary =
           "dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma, xhat = (x - mean) rstd; dgamma = sum over "
           "rows of dy xhat; dbeta = sum over rows of dy.",
       .operands = kLayerNormBackwardOperands,
       .results = kLayerNormBackwardResults,
       .infer = InferLayerNormBackward,
       .reference =
           [](const Attrs&, auto operands, auto results) {
             NormBackward(*operands[0], *operands[1], *operands[2], operands[3], *operands[4], *results[0], *results[1],
                          results[2]);
           },
       .samples = SamplesLayerNormBackward,
       .cost = CostBackward,
       .in_place = InPlaceBackward,
       .no_grad_operands = kLayerNormStatistics},
      {.name = "rms_norm",
       .summary = "y = x rstd gamma over the last dimension; rstd = 1 / sqrt(mean(x^2) + eps). x [..., C], gamma [C], "
                  "rstd f32[...]. Zhang and Sennrich (2019).",
       .operands = kRmsNormOperands,
       .results = kRmsNormResults,
       .attrs = kRmsNormAttrs,
       .infer = InferRmsNorm,
       .grad = GradRmsNorm,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceRmsNorm(attrs, operands, results); },
       .samples = SamplesRmsNorm,
       .cost = CostForward,
       .in_place = InPlaceForward},
      {.name = "rms_norm_backward",
       .summary = "dx = rstd (g - xhat mean(g xhat)), g = dy gamma, xhat = x rstd; dgamma = sum over rows of dy xhat.",
       .operands = kRmsNormBackwardOperands,
       .results = kRmsNormBackwardResults,
       .infer = InferRmsNormBackward,
       .reference =
           [](const Attrs&, auto operands, auto results) {
             using Host = std::remove_reference_t<decltype(*results[0])>;
             NormBackward(*operands[0], *operands[1], *operands[2], static_cast<const Host*>(nullptr), *operands[3],
                          *results[0], *results[1], static_cast<Host*>(nullptr));
           },
       .samples = SamplesRmsNormBackward,
       .cost = CostBackward,
       .in_place = InPlaceBackward,
       .no_grad_operands = kRmsNormStatistics},
  };
  return ops;
}

}  // namespace mt
