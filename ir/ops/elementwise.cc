// Element-wise rows: one expression each. Derivative, reference, CPU loops and CUDA source come from it.
//
// Operands broadcast like NumPy; the result has the dtype of operand 0 (cast: `to`). adamw and adam: result i has the
// type of operand i.
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"
#include "ir/scalar.h"

namespace mt {
namespace {

using Fill = SampleOperand::Fill;

constexpr absl::string_view kX[] = {"x"};
constexpr absl::string_view kY[] = {"y"};
constexpr absl::string_view kAB[] = {"a", "b"};
constexpr absl::string_view kGateUp[] = {"gate", "up"};
constexpr absl::string_view kXRng[] = {"x", "rng"};
constexpr absl::string_view kNorms[] = {"norm", "max_norm"};
constexpr absl::string_view kFactor[] = {"factor"};
constexpr absl::string_view kOptimizerOperands[] = {"p",
                                                    "m",
                                                    "v",
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
constexpr absl::string_view kOptimizerResults[] = {"p_new", "m_new", "v_new"};
constexpr int kOperand1[] = {1};
constexpr int kAllOfTwo[] = {0, 1};
constexpr int kAllOfOptimizer[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

constexpr AttrSpec kScaleAttrs[] = {{"factor", AttrKind::kDouble, "what x is multiplied by, rounded to f32"}};
constexpr AttrSpec kCastAttrs[] = {{"to", AttrKind::kDType, "dtype of the result, floating point"}};
constexpr AttrSpec kFillAttrs[] = {{"dims", AttrKind::kIntList, "dimensions of the result"},
                                   {"value", AttrKind::kDouble, "every element, rounded to f32"},
                                   {"dtype", AttrKind::kDType, "dtype of the result, floating point", "f32"}};
constexpr AttrSpec kDropoutAttrs[] = {
    {"rate", AttrKind::kDouble, "probability with which an element is dropped, in [0, 1)"},
    {"key", AttrKind::kInt, "the place in the model: which random numbers are drawn, in [0, 2^32)"}};
constexpr AttrSpec kOptimizerAttrs[] = {
    {"decay", AttrKind::kBool, "whether weight_decay applies"},
    {"apply", AttrKind::kBool, "a last operand says whether to update; where it is 0, nothing changes, to the bit",
     "false"}};

constexpr double kMaxKey = std::numeric_limits<uint32_t>::max();

// --- Types
// -------------------------------------------------------------------------------------------------------------

absl::StatusOr<std::vector<TensorType>> InferFloats(absl::Span<const TensorType> operands, const Attrs&) {
  TensorType result{operands[0].dtype, operands[0].dims};
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!IsFloat(operands[i].dtype)) {
      return absl::InvalidArgumentError(absl::StrCat("operand ", i, " is ", operands[i].ToString(),
                                                     "; element-wise operands must be floating point"));
    }
    absl::StatusOr<Dims> dims = BroadcastDims(result.dims, operands[i].dims);
    if (!dims.ok()) {
      return Annotate(dims.status(), absl::StrCat("operand ", i, ", ", operands[i].ToString(),
                                                  i == 1 ? ", beside operand 0, " : ", beside those before, ",
                                                  DimsToString(result.dims)));
    }
    result.dims = *std::move(dims);
  }
  return std::vector<TensorType>{result};
}

absl::StatusOr<std::vector<TensorType>> InferScale(absl::Span<const TensorType> operands, const Attrs& attrs) {
  if (!std::isfinite(attrs.Double("factor"))) {
    return absl::InvalidArgumentError(
        absl::StrCat("attribute factor is ", attrs.Double("factor"), "; it must be finite"));
  }
  return InferFloats(operands, attrs);
}

absl::StatusOr<std::vector<TensorType>> InferCast(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", operands[0]));
  const DType to = attrs.Get<DType>("to");
  if (!IsFloat(to)) {
    return absl::InvalidArgumentError(absl::StrCat("attribute to is ", DTypeName(to), "; it must be floating point"));
  }
  return std::vector<TensorType>{{to, operands[0].dims}};
}

absl::StatusOr<std::vector<TensorType>> InferFill(absl::Span<const TensorType>, const Attrs& attrs) {
  const IntList& dims = attrs.Get<IntList>("dims");
  const DType dtype = attrs.Get<DType>("dtype");
  if (!IsFloat(dtype) || !std::isfinite(attrs.Double("value"))) {
    return absl::InvalidArgumentError(absl::StrCat("attributes dtype and value are ", DTypeName(dtype), " and ",
                                                   attrs.Double("value"), "; they must be floating point and finite"));
  }
  return std::vector<TensorType>{{dtype, Dims(dims.begin(), dims.end())}};
}

absl::StatusOr<std::vector<TensorType>> InferDropout(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", operands[0]));
  RETURN_IF_ERROR(CheckIs("rng", operands[1], {DType::kI32, {4}}, "seed low, seed high, step, first sample"));
  const double rate = attrs.Double("rate");
  if (!(rate >= 0 && rate < 1)) {
    return absl::InvalidArgumentError(absl::StrCat("attribute rate is ", rate, "; it must be at least 0 and below 1"));
  }
  RETURN_IF_ERROR(CheckAttr("key", attrs.Int("key"), 0, static_cast<int64_t>(kMaxKey)));
  return std::vector<TensorType>{operands[0]};
}

absl::StatusOr<std::vector<TensorType>> InferClipScale(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType scalar{DType::kF32, {}};
  for (size_t i = 0; i < 2; ++i) RETURN_IF_ERROR(CheckIs(kNorms[i], operands[i], scalar, "one number"));
  return std::vector<TensorType>{scalar};
}

absl::StatusOr<std::vector<TensorType>> InferOptimizer(absl::Span<const TensorType> operands, const Attrs&) {
  RETURN_IF_ERROR(CheckFloat("p", operands[0]));
  for (size_t i = 1; i < 4; ++i) {
    RETURN_IF_ERROR(CheckFloatDims(kOptimizerOperands[i], operands[i], operands[0].dims, "those of p"));
  }
  for (size_t i = 4; i < operands.size(); ++i) {
    const absl::string_view name = i == 12 ? "apply" : kOptimizerOperands[i];
    RETURN_IF_ERROR(CheckIs(name, operands[i], {DType::kF32, {}}, "one number"));
  }
  return std::vector<TensorType>{operands[0], operands[1], operands[2]};
}

// --- Expressions
// -------------------------------------------------------------------------------------------------------

Expr X() { return Operand(0); }
Expr A() { return Operand(0); }
Expr B() { return Operand(1); }

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
Expr GeluTanh(const Expr& x) {
  const double root = std::sqrt(2.0) * std::numbers::inv_sqrtpi;
  return 0.5 * x * (1.0 + Tanh(x * (root + root * 0.044715 * (x * x))));
}
Expr GeluErf(const Expr& x) { return 0.5 * x * (1.0 + Erf(x * (1.0 / std::numbers::sqrt2))); }
Expr Silu(const Expr& x) { return x * Sigmoid(x); }

Expr DropoutExpr(const Attrs& attrs) {
  const double rate = attrs.Double("rate");
  const Expr u = Uniform(1, static_cast<uint32_t>(attrs.Int("key")));
  return Select(Less(u, rate), 0.0, X() * (1.0 / (1.0 - rate)));
}

// The update of Kingma and Ba, "Adam" (2015), algorithm 1, in the order of operations of PyTorch.
std::vector<Expr> OptimizerExprs(const Attrs& attrs, bool decoupled) {
  const Expr p = Operand(0), m = Operand(1), v = Operand(2), g = Operand(3), lr = Operand(4), beta1 = Operand(5),
             beta2 = Operand(6), eps = Operand(7), weight_decay = Operand(8), correction1 = Operand(9),
             correction2 = Operand(10), grad_scale = Operand(11);
  const bool decay = attrs.Bool("decay");
  Expr gradient = g * grad_scale;
  if (decay && !decoupled) gradient = gradient + weight_decay * p;
  // Decoupled: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
  const Expr decayed = decay && decoupled ? p - lr * weight_decay * p : p;
  const Expr m_new = beta1 * m + (1.0 - beta1) * gradient;
  const Expr v_new = beta2 * v + (1.0 - beta2) * (gradient * gradient);
  const Expr p_new = decayed - lr / correction1 * m_new / (Sqrt(v_new) / Sqrt(correction2) + eps);
  if (!attrs.Bool("apply")) return {p_new, m_new, v_new};
  const Expr apply = Operand(12);
  return {Select(apply, p_new, p), Select(apply, m_new, m), Select(apply, v_new, v)};
}

// --- Samples
// -----------------------------------------------------------------------------------------------------------

std::vector<OpSample> UnarySamples(Fill fill, const Attrs& attrs = {}) {
  std::vector<OpSample> samples;
  for (const Dims& dims : {Dims{}, Dims{7}, Dims{4, 33}, Dims{2, 3, 5}}) samples.push_back({{F32(dims, fill)}, attrs});
  samples.push_back({{BF16({5, 19}, fill)}, attrs});
  samples.push_back({{F16({5, 19}, fill)}, attrs});
  return samples;
}

std::vector<OpSample> BinarySamples(Fill fill_b = Fill::kNormal) {
  return {
      {{F32({}), F32({}, fill_b)}},
      {{F32({4, 33}), F32({4, 33}, fill_b)}},
      {{F32({3, 5, 17}), F32({17}, fill_b)}},
      {{F32({3, 5, 17}), F32({3, 5, 1}, fill_b)}},
      {{F32({2, 1, 6}), F32({4, 1}, fill_b)}},
      {{F32({9}), F32({2, 9}, fill_b)}},
      {{F32({6, 7}), F32({}, fill_b)}},
      {{BF16({4, 19}), BF16({4, 19}, fill_b)}},
      {{BF16({4, 19}), F32({19}, fill_b)}},
      {{F32({4, 19}), BF16({4, 19}, fill_b)}},
      {{F16({4, 19}), F16({4, 19}, fill_b)}},
      {{F16({4, 19}), F32({19}, fill_b)}},
      {{F32({4, 19}), F16({4, 19}, fill_b)}},
  };
}

std::vector<OpSample> CastSamples() {
  std::vector<OpSample> samples;
  for (const auto& [from, to] : {std::pair(DType::kF32, DType::kBF16), std::pair(DType::kBF16, DType::kF32),
                                 std::pair(DType::kF32, DType::kF16), std::pair(DType::kF16, DType::kF32),
                                 std::pair(DType::kBF16, DType::kF16), std::pair(DType::kF32, DType::kF32)}) {
    samples.push_back({{Sample(from, {5, 19})}, {{"to", to}}});
  }
  samples.push_back({{Sample(DType::kF64, {}, Fill::kProbability)}, {{"to", DType::kF32}}});
  return samples;
}

std::vector<OpSample> DropoutSamples() {
  const SampleOperand rng = Sample(DType::kI32, {4}, Fill::kRandomState);
  std::vector<OpSample> samples;
  for (const Dims& dims : {Dims{4, 33}, Dims{2, 3, 5}, Dims{9}}) {
    samples.push_back({{F32(dims), rng}, {{"rate", 0.3}, {"key", int64_t{0xDEADBEEF}}}});
  }
  samples.push_back({{BF16({5, 19}), rng}, {{"rate", 0.5}, {"key", int64_t{1}}}});
  samples.push_back({{F16({5, 19}), rng}, {{"rate", 0.5}, {"key", int64_t{1}}}});
  samples.push_back({{F32({4, 8}), rng}, {{"rate", 0.0}, {"key", int64_t{1}}}});
  return samples;
}

std::vector<OpSample> ClipScaleSamples() {
  return {{{F32({}, Fill::kPositive), F32({}, Fill::kProbability)}}, {{F32({}, Fill::kProbability), F32({})}}};
}

std::vector<OpSample> OptimizerSamples() {
  const auto sample = [](Dims dims, DType gradient, bool decay) {
    OpSample made{{F32(dims), F32(dims), F32(dims, Fill::kPositive), Sample(gradient, dims)}, {{"decay", decay}}};
    // lr, beta1, beta2, eps, weight_decay, bias corrections, grad_scale.
    for (const Fill fill : {Fill::kProbability, Fill::kProbability, Fill::kProbability, Fill::kPositive,
                            Fill::kProbability, Fill::kPositive, Fill::kPositive, Fill::kPositive}) {
      made.operands.push_back(F32({}, fill));
    }
    return made;
  };
  std::vector<OpSample> samples = {sample({4, 33}, DType::kF32, true), sample({19}, DType::kF32, false),
                                   sample({}, DType::kF32, true), sample({3, 5}, DType::kBF16, true),
                                   sample({3, 5}, DType::kF16, false)};
  for (const int64_t bound : {1, 2}) {  // 0; 0 or 1.
    samples.push_back(sample({4, 33}, DType::kF32, bound == 2));
    samples.back().attrs.Set("apply", true);
    samples.back().operands.push_back(Sample(DType::kF32, {}, Fill::kIds, bound));
  }
  return samples;
}

// --- Rows
// --------------------------------------------------------------------------------------------------------------

// Exact up to one rounding; with transcendental functions.
constexpr double kArithmetic = 1e-6, kFunction = 1e-5;

OpDef Unary(absl::string_view name, absl::string_view summary, Expr (*of)(const Expr& x), double tolerance,
            Fill fill = Fill::kNormal) {
  return {.name = name,
          .summary = summary,
          .operands = kX,
          .results = kY,
          .infer = InferFloats,
          .expr = [of](const Attrs&) { return std::vector<Expr>{of(X())}; },
          .samples = [fill] { return UnarySamples(fill); },
          .tolerance = tolerance};
}

OpDef Binary(absl::string_view name, absl::string_view summary, Expr (*of)(const Expr& a, const Expr& b),
             double tolerance, absl::Span<const absl::string_view> operands = kAB, Fill fill_b = Fill::kNormal) {
  return {.name = name,
          .summary = summary,
          .operands = operands,
          .results = kY,
          .infer = InferFloats,
          .expr = [of](const Attrs&) { return std::vector<Expr>{of(A(), B())}; },
          .samples = [fill_b] { return BinarySamples(fill_b); },
          .tolerance = tolerance};
}

OpDef Optimizer(absl::string_view name, absl::string_view summary, bool decoupled) {
  return {.name = name,
          .summary = summary,
          .operands = kOptimizerOperands,
          .results = kOptimizerResults,
          .attrs = kOptimizerAttrs,
          .infer = InferOptimizer,
          .expr = [decoupled](const Attrs& attrs) { return OptimizerExprs(attrs, decoupled); },
          .samples = OptimizerSamples,
          .remat = RematPolicy::kMustSave,
          .autocast = Autocast::kNever,
          .no_grad_operands = kAllOfOptimizer,
          .tolerance = kFunction};
}

std::vector<OpDef> MakeRows() {
  std::vector<OpDef> rows = {
      Binary(
          "add", "y = a + b", [](const Expr& a, const Expr& b) { return a + b; }, kArithmetic),
      Binary(
          "sub", "y = a - b", [](const Expr& a, const Expr& b) { return a - b; }, kArithmetic),
      Binary(
          "mul", "y = a * b", [](const Expr& a, const Expr& b) { return a * b; }, kArithmetic),
      Binary(
          "div", "y = a / b", [](const Expr& a, const Expr& b) { return a / b; }, kArithmetic, kAB, Fill::kPositive),
      Binary(
          "maximum", "y = max(a, b); on ties a has the gradient",
          [](const Expr& a, const Expr& b) { return Max(a, b); }, kArithmetic),
      Binary(
          "minimum", "y = min(a, b); on ties a has the gradient",
          [](const Expr& a, const Expr& b) { return Min(a, b); }, kArithmetic),
      Unary(
          "neg", "y = -x", [](const Expr& x) { return -x; }, kArithmetic),
      Unary(
          "abs", "y = |x|; gradient 0 at 0", [](const Expr& x) { return Abs(x); }, kArithmetic),
      Unary(
          "exp", "y = e^x", [](const Expr& x) { return Exp(x); }, kFunction),
      Unary(
          "log", "y = ln x", [](const Expr& x) { return Log(x); }, kFunction, Fill::kPositive),
      Unary(
          "sqrt", "y = sqrt(x)", [](const Expr& x) { return Sqrt(x); }, kArithmetic, Fill::kPositive),
      Unary(
          "tanh", "y = tanh x", [](const Expr& x) { return Tanh(x); }, kFunction),
      {.name = "scale",
       .summary = "y = factor * x",
       .operands = kX,
       .results = kY,
       .attrs = kScaleAttrs,
       .infer = InferScale,
       .expr = [](const Attrs& attrs) { return std::vector<Expr>{X() * attrs.Double("factor")}; },
       .samples =
           [] {
             return UnarySamples(Fill::kNormal, {{"factor", 0.3}});
           },
       .tolerance = kArithmetic},
      {.name = "cast",
       .summary = "y = x in another floating point dtype, rounded to nearest even",
       .operands = kX,
       .results = kY,
       .attrs = kCastAttrs,
       .infer = InferCast,
       .expr = [](const Attrs&) { return std::vector<Expr>{X()}; },
       .samples = CastSamples,
       .tolerance = kArithmetic},
      {.name = "fill",
       .summary = "y = value everywhere",
       .operands = {},
       .results = kY,
       .attrs = kFillAttrs,
       .infer = InferFill,
       .expr = [](const Attrs& attrs) { return std::vector<Expr>{attrs.Double("value")}; },
       .samples =
           [] {
             return std::vector<OpSample>{
                 {.operands = {}, .attrs = {{"dims", IntList{}}, {"value", 1.0}}},
                 {.operands = {}, .attrs = {{"dims", IntList{3, 33}}, {"value", -0.1}, {"dtype", DType::kBF16}}}};
           },
       .remat = RematPolicy::kMustRecompute,
       .autocast = Autocast::kNever,
       .tolerance = kArithmetic},
      Unary("gelu", "y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))", GeluTanh, kFunction),
      Unary("gelu_erf", "y = x/2 (1 + erf(x / sqrt 2))", GeluErf, kFunction),
      // 0 comes first, so that the gradient at 0 is 0.
      Unary(
          "relu", "y = max(0, x); gradient 0 at 0", [](const Expr& x) { return Max(0.0, x); }, kArithmetic),
      Unary("silu", "y = x / (1 + e^-x)", Silu, kFunction),
      Binary(
          "swiglu", "y = gate / (1 + e^-gate) * up", [](const Expr& gate, const Expr& up) { return Silu(gate) * up; },
          kFunction, kGateUp),
      Binary(
          "geglu", "y = gelu(gate) * up, gelu by tanh",
          [](const Expr& gate, const Expr& up) { return GeluTanh(gate) * up; }, kFunction, kGateUp),
      {.name = "dropout",
       .summary =
           "y = u < rate ? 0 : x / (1 - rate); u uniform by Philox at (key, step, sample, element in the sample)",
       .operands = kXRng,
       .results = kY,
       .attrs = kDropoutAttrs,
       .infer = InferDropout,
       .expr = [](const Attrs& attrs) { return std::vector<Expr>{DropoutExpr(attrs)}; },
       .samples = DropoutSamples,
       .no_grad_operands = kOperand1,
       .tolerance = kArithmetic},
      {.name = "clip_scale",
       .summary = "factor = max_norm > 0 ? min(1, max_norm / (norm + 1e-6)) : 1, all f32[]",
       .operands = kNorms,
       .results = kFactor,
       .infer = InferClipScale,
       .expr =
           [](const Attrs&) { return std::vector<Expr>{Select(Less(0.0, B()), Min(1.0, B() / (A() + 1e-6)), 1.0)}; },
       .samples = ClipScaleSamples,
       .remat = RematPolicy::kPreferSave,
       .autocast = Autocast::kNever,
       .no_grad_operands = kAllOfTwo,
       .tolerance = kArithmetic},
      Optimizer("adamw",
                "g' = g grad_scale; m_new = beta1 m + (1-beta1) g'; v_new = beta2 v + (1-beta2) g'^2; p_new = p - lr "
                "weight_decay p - lr/bias_correction1 m_new / (sqrt(v_new)/sqrt(bias_correction2) + eps)",
                true),
      Optimizer("adam", "as adamw, but weight decay is L2: g' = g grad_scale + weight_decay p, and p does not decay",
                false),
  };
  for (OpDef& row : rows) {
    if (row.name == "exp" || row.name == "log") row.autocast = Autocast::kNever;  // Ranges that 8 bits do not carry.
  }
  return rows;
}

}  // namespace

absl::Span<const OpDef> ElementwiseOps() {
  static const std::vector<OpDef>& rows = *new std::vector<OpDef>(MakeRows());
  return rows;
}

}  // namespace mt
