#include "ir/scalar.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/philox.h"
#include "ir/op.h"
#include "ir/ops/families.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename T>
T Evaluate(const Expr& expression, std::vector<T> operands) {
  std::vector<T> result(1);
  EvaluateScalar<T>(
      Linearize({expression}), operands, [](int64_t, uint32_t) { return T{0.25}; }, absl::MakeSpan(result));
  return result[0];
}

std::string Text(const Expr& expression) { return Linearize({expression}).ToString(); }

TEST(ScalarTest, EvaluatesEveryPrimitive) {
  const Expr x = Operand(0), y = Operand(1);
  const double a = 0.7, b = 1.9;
  EXPECT_EQ(Evaluate<double>(-x, {a, b}), -a);
  EXPECT_EQ(Evaluate<double>(Abs(x), {-a, b}), a);
  EXPECT_DOUBLE_EQ(Evaluate<double>(Exp(x), {a, b}), std::exp(a));
  EXPECT_DOUBLE_EQ(Evaluate<double>(Log(x), {a, b}), std::log(a));
  EXPECT_EQ(Evaluate<double>(Sqrt(x), {a, b}), std::sqrt(a));
  EXPECT_DOUBLE_EQ(Evaluate<double>(Tanh(x), {a, b}), std::tanh(a));
  EXPECT_DOUBLE_EQ(Evaluate<double>(Erf(x), {a, b}), std::erf(a));
  EXPECT_DOUBLE_EQ(Evaluate<double>(Sin(x), {a, b}), std::sin(a));
  EXPECT_DOUBLE_EQ(Evaluate<double>(Cos(x), {a, b}), std::cos(a));
  EXPECT_EQ(Evaluate<double>(x + y, {a, b}), a + b);
  EXPECT_EQ(Evaluate<double>(x - y, {a, b}), a - b);
  EXPECT_EQ(Evaluate<double>(x * y, {a, b}), a * b);
  EXPECT_EQ(Evaluate<double>(x / y, {a, b}), a / b);
  EXPECT_EQ(Evaluate<double>(Max(x, y), {a, b}), b);
  EXPECT_EQ(Evaluate<double>(Min(x, y), {a, b}), a);
  EXPECT_DOUBLE_EQ(Evaluate<double>(Pow(x, y), {a, b}), std::pow(a, b));
  EXPECT_EQ(Evaluate<double>(Less(x, y), {a, b}), 1);
  EXPECT_EQ(Evaluate<double>(Less(x, x), {a, b}), 0);
  EXPECT_EQ(Evaluate<double>(Select(Less(x, y), x, y), {a, b}), a);
  EXPECT_EQ(Evaluate<double>(Uniform(1, 7) + x, {a, b}), a + 0.25);
  EXPECT_EQ(Evaluate<double>(RoundExpr(DType::kBF16, x), {1.00390625 + 1e-4, b}), 1.0078125);
  EXPECT_EQ(Evaluate<float>(x + y, {1.0f, 0x1p-25f}), 1.0f);  // f32 arithmetic rounds each step.
}

TEST(ScalarTest, MaxAndMinPropagateNan) {
  const double nan = std::nan("");
  for (const Expr& e : {Max(Operand(0), Operand(1)), Min(Operand(0), Operand(1))}) {
    EXPECT_TRUE(std::isnan(Evaluate<double>(e, {nan, 1})));
    EXPECT_TRUE(std::isnan(Evaluate<double>(e, {1, nan})));
  }
}

TEST(ScalarTest, Simplifies) {
  const Expr x = Operand(0);
  for (const Expr& same : {x + 0.0, 0.0 + x, x * 1.0, 1.0 * x, x - 0.0, x / 1.0, -(-x), Select(1.0, x, Exp(x))}) {
    EXPECT_EQ(same.get(), x.get()) << Text(same);
  }
  EXPECT_EQ(Text(x * 0.0), "r0=const(0) -> r0");
  EXPECT_EQ(Text(x * -1.0), "r0=operand(0) r0=neg(r0) -> r0");
  EXPECT_EQ(Text(Exp(0.0) + 2.0 * Expr(3.0)), "r0=const(7) -> r0");
  EXPECT_EQ(Text(RoundExpr(DType::kBF16, 1.001)), "r0=const(1) -> r0");
  // What would change a rounding stays.
  EXPECT_EQ(Linearize({(x + 1.0) - 1.0}).instructions.size(), 4u);
  EXPECT_EQ(Linearize({x / 3.0}).instructions.back().prim, Prim::kDiv);
}

TEST(ScalarTest, LinearizesWithSharedSubexpressionsAndFewRegisters) {
  const Expr x = Operand(0), y = Operand(1);
  // Built twice, computed once.
  const Expr twice = Exp(x * y) + Sin(Exp(x * y));
  EXPECT_EQ(Text(twice), "r0=operand(0) r1=operand(1) r0=mul(r0,r1) r0=exp(r0) r1=sin(r0) r0=add(r0,r1) -> r0");
  const ScalarProgram two = Linearize({x + y, x * y});
  EXPECT_EQ(two.ToString(), "r0=operand(0) r1=operand(1) r2=add(r0,r1) r0=mul(r0,r1) -> r2 r0");
  EXPECT_EQ(Linearize({x, x}).ToString(), "r0=operand(0) -> r0 r0");
  // A long chain needs three registers: the value, the factor that every link shares, and a constant.
  Expr chain = x;
  for (int i = 0; i < 100; ++i) chain = chain * 0.5 + static_cast<double>(i);
  EXPECT_EQ(Linearize({chain}).num_registers, 3);
  // A DAG with 2^60 paths is linear work.
  Expr dag = x;
  for (int i = 0; i < 60; ++i) dag = dag + dag;
  EXPECT_EQ(Linearize({dag}).instructions.size(), 61u);
  EXPECT_EQ(Evaluate<double>(Derivative(dag, 0), {1.0}), 0x1p60);
}

TEST(ScalarTest, DerivativesMatchCentralDifferences) {
  const Expr x = Operand(0), y = Operand(1);
  const std::vector<Expr> expressions = {-x * y,
                                         Abs(x) + Abs(y),
                                         Exp(x * y),
                                         Log(Abs(x) + 0.1),
                                         Sqrt(x * x + 0.3),
                                         Tanh(x - y),
                                         Erf(x * 1.3),
                                         Sin(x * y),
                                         Cos(x + 2.0 * y),
                                         x / (y * y + 1.0),
                                         x / (2.0 + Sin(x)),
                                         3.0 / (y * y + 0.5),
                                         Max(x, y),
                                         Min(x, y * 2.0),
                                         Pow(x * x + 0.2, y),
                                         Pow(x * x + 0.2, 2.5),
                                         Pow(2.0, y),
                                         Select(Less(x, y), x * x, y * x),
                                         Sigmoid(3.0 * x),
                                         (x - y) * (1.0 - x),
                                         2.0 - x,
                                         Select(Less(Uniform(2, 5), 0.5), x * 3.0, 0.0)};
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const Expr& e : expressions) {
    for (int64_t operand = 0; operand < 2; ++operand) {
      const Expr derivative = Derivative(e, operand);
      for (int trial = 0; trial < 20; ++trial) {
        std::vector<double> at = {normal(random), normal(random)};
        const double exact = Evaluate<double>(derivative, at);
        const double h = 1e-6;
        std::vector<double> up = at, down = at;
        up[static_cast<size_t>(operand)] += h;
        down[static_cast<size_t>(operand)] -= h;
        const double difference = (Evaluate<double>(e, up) - Evaluate<double>(e, down)) / (2 * h);
        EXPECT_NEAR(exact, difference, 1e-6 * (1 + std::abs(exact)))
            << Text(e) << " by operand " << operand << " at " << at[0] << ", " << at[1] << ": " << Text(derivative);
      }
    }
  }
}

TEST(ScalarTest, DerivativesAtTiesAndEdges) {
  const Expr x = Operand(0), y = Operand(1);
  EXPECT_EQ(Evaluate<double>(Derivative(Max(x, y), 0), {2, 2}), 1);
  EXPECT_EQ(Evaluate<double>(Derivative(Max(x, y), 1), {2, 2}), 0);
  EXPECT_EQ(Evaluate<double>(Derivative(Min(x, y), 0), {2, 2}), 1);
  EXPECT_EQ(Evaluate<double>(Derivative(Min(x, y), 1), {2, 2}), 0);
  EXPECT_EQ(Evaluate<double>(Derivative(Abs(x), 0), {0}), 0);
  EXPECT_EQ(Evaluate<double>(Derivative(Pow(x, y), 1), {0, 2}), 0);
  EXPECT_EQ(Text(Derivative(x * x + y, 2)), "r0=const(0) -> r0");
  EXPECT_EQ(Text(Derivative(RoundExpr(DType::kBF16, x), 0)), "r0=const(1) -> r0");
  EXPECT_EQ(Text(Derivative(Less(x, y), 0)), "r0=const(0) -> r0");
  // Far tails stay finite in f32.
  const Expr silu = x * Sigmoid(x);
  for (const float at : {-1e30f, -1000.0f, -100.0f, -88.0f, 88.0f, 100.0f, 1e30f}) {
    EXPECT_TRUE(std::isfinite(Evaluate<float>(silu, {at}))) << at;
    EXPECT_NEAR(Evaluate<float>(Derivative(silu, 0), {at}), at > 0 ? 1.0f : 0.0f, 1e-6f) << at;
  }
}

TEST(ScalarTest, DerivativeReusesTheFunction) {
  // tanh appears once in tanh'.
  int tanhs = 0;
  for (const ScalarInstruction& i : Linearize({Derivative(Tanh(Operand(0)), 0)}).instructions) {
    tanhs += i.prim == Prim::kTanh;
  }
  EXPECT_EQ(tanhs, 1);
}

TEST(ScalarTest, OperandsReadAndSubstitute) {
  const Expr e = Select(Less(Uniform(3, 9), 0.5), Operand(5) * Operand(1), Operand(5));
  EXPECT_THAT(OperandsRead({e}), ElementsAre(1, 3, 5));
  EXPECT_THAT(OperandsRead({Expr(1.0)}), ElementsAre());
  std::vector<Expr> to(6);
  to[1] = Operand(2);
  to[3] = Operand(0);
  to[5] = Operand(1) + 1.0;
  EXPECT_THAT(OperandsRead({Substitute(e, to)}), ElementsAre(0, 1, 2));
  EXPECT_EQ(Evaluate<double>(Substitute(e, to), {0, 2, 3}), 9);
  EXPECT_DEATH(Substitute(Uniform(0, 1), {Operand(0) + 1.0}), "random state");
  EXPECT_DEATH(Substitute(Operand(1), {Operand(0)}), "1");
}

TEST(ScalarTest, TextIsExactBothWays) {
  const Expr x = Operand(0);
  const ScalarProgram program = Linearize({RoundExpr(DType::kBF16, x * 0.1) + Uniform(2, 4000000000u), Pow(x, kInf),
                                           Max(x, -0.0) + 1.0 / 3.0, Select(x, x, 1e-300)});
  const std::string text = program.ToString();
  ASSERT_OK_AND_ASSIGN(const ScalarProgram back, ParseScalarProgram(text));
  EXPECT_EQ(back.ToString(), text);
  EXPECT_EQ(back.num_registers, program.num_registers);
  EXPECT_THAT(text, HasSubstr("uniform(2,4000000000)"));
  EXPECT_THAT(text, HasSubstr("const(-0)"));
  EXPECT_THAT(text, HasSubstr("round(bf16,"));
  for (size_t i = 0; i < program.instructions.size(); ++i) {
    EXPECT_EQ(back.instructions[i].constant, program.instructions[i].constant) << i;
  }
  for (const PrimRow& row : AllPrims()) EXPECT_EQ(&Row(row.prim), &row) << row.name;
  // Every row's program survives the trip.
  for (const OpDef& op : ElementwiseOps()) {
    for (const OpSample& sample : op.samples()) {
      std::vector<TensorType> types;
      for (const SampleOperand& operand : sample.operands) types.push_back(operand.type);
      Attrs attrs = sample.attrs;
      ASSERT_OK(InferTypes(op, types, attrs));  // Completes them.
      const std::string row_text = Linearize(op.expr(attrs)).ToString();
      ASSERT_OK_AND_ASSIGN(const ScalarProgram parsed, ParseScalarProgram(row_text));
      EXPECT_EQ(parsed.ToString(), row_text) << op.name;
    }
  }
}

TEST(ScalarTest, ParserRefusesWhatItCannotRun) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "no results"},
      {"r0=operand(0)", "no results"},
      {"r0=operand(0) ->", "no results"},
      {"-> r0", "before it is written"},
      {"r0=operand(0) -> r1", "before it is written"},
      {"r0=neg(r1) -> r0", "before it is written"},
      {"r0=neg(r0) -> r0", "before it is written"},
      {"r0=operand(-1) -> r0", "operand number"},
      {"r0=operand(99999) -> r0", "operand number"},
      {"r0=operand(0) r0=frob(r0) -> r0", "unknown primitive \"frob\""},
      {"r0=operand(0) r0=add(r0) -> r0", "takes 2 arguments, 1 given"},
      {"r0=operand(0) r0=neg(r0,r0) -> r0", "takes 1 arguments, 2 given"},
      {"r0=const(x) -> r0", "not a number"},
      {"r0=uniform(0,-1) -> r0", "32-bit"},
      {"r0=operand(0) r0=round(i32,r0) -> r0", "floating point"},
      {"r99999=operand(0) -> r99999", "register r0 to r4095"},
      {"r-1=operand(0) -> r-1", "register"},
      {"q=operand(0) -> q", "register"},
      {"r0 -> r0", "rN=primitive"},
      {"r0=operand(0", "rN=primitive"},
      {"(=) -> r0", "rN=primitive"},
      {"r0=operand(0) -> r0 -> r0", "not a register"},
  };
  for (const auto& [text, message] : cases) {
    EXPECT_THAT(ParseScalarProgram(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message))) << text;
  }
  std::string long_text = "r0=operand(0)";
  for (int i = 0; i < 4096; ++i) absl::StrAppend(&long_text, " r0=neg(r0)");
  EXPECT_THAT(ParseScalarProgram(long_text + " -> r0"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 4096")));
}

TEST(ScalarTest, UniformFollowsItsCounter) {
  const int32_t rng[4] = {-5, 7, 11, 100};
  for (const int64_t sample : {0, 3}) {
    for (const int64_t element : {0, 1, 6, 1023}) {
      const auto words = Philox({static_cast<uint32_t>(-5), 7},
                                {static_cast<uint32_t>(element / 4), 42, 11, static_cast<uint32_t>(100 + sample)});
      EXPECT_EQ(UniformAt(rng, 42, sample, element), UniformFromBits(words[static_cast<size_t>(element % 4)]));
    }
  }
  double sum = 0;
  for (int64_t i = 0; i < 10000; ++i) sum += UniformAt(rng, 1, 0, i);
  EXPECT_NEAR(sum / 10000, 0.5, 0.02);
}

// --- The rows
// ----------------------------------------------------------------------------------------------------------

const OpDef& Find(absl::string_view name) {
  for (const OpDef& op : ElementwiseOps()) {
    if (op.name == name) return op;
  }
  ADD_FAILURE() << name;
  return ElementwiseOps()[0];
}

TEST(ElementwiseRowsTest, ValuesOfActivations) {
  const auto value = [](absl::string_view op, double x) { return Evaluate<double>(Find(op).expr({})[0], {x, 3.0}); };
  // torch.nn.functional at f64.
  EXPECT_NEAR(value("gelu", 1.0), 0.8411919906082768, 1e-12);
  EXPECT_NEAR(value("gelu_erf", 1.0), 0.8413447460685429, 1e-12);
  EXPECT_NEAR(value("silu", 1.0), 0.7310585786300049, 1e-12);
  EXPECT_NEAR(value("swiglu", 1.0), 3 * 0.7310585786300049, 1e-12);
  EXPECT_NEAR(value("geglu", 1.0), 3 * 0.8411919906082768, 1e-12);
  EXPECT_EQ(value("relu", -1.0), 0);
  EXPECT_EQ(value("relu", 2.0), 2);
  EXPECT_EQ(Evaluate<double>(Derivative(Find("relu").expr({})[0], 0), {0.0}), 0);
  EXPECT_TRUE(std::isnan(value("relu", std::nan(""))));
}

TEST(ElementwiseRowsTest, AdamWFollowsPyTorch) {
  // One step of torch.optim.AdamW(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2) by hand.
  const double p = 0.5, m = 0.1, v = 0.04, g = 0.3, lr = 0.1, b1 = 0.9, b2 = 0.99, eps = 1e-8, wd = 0.2;
  const double c1 = 1 - b1 * b1, c2 = 1 - b2 * b2, gs = 0.5;
  const auto step = [&](absl::string_view op, bool decay) {
    const std::vector<double> operands = {p, m, v, g, lr, b1, b2, eps, wd, c1, c2, gs};
    std::vector<double> results(3);
    EvaluateScalar<double>(
        Linearize(Find(op).expr({{"decay", decay}, {"apply", false}})), operands, [](int64_t, uint32_t) { return 0.0; },
        absl::MakeSpan(results));
    return results;
  };
  for (const bool decay : {false, true}) {
    const double gw = g * gs, ga = g * gs + (decay ? wd * p : 0);
    const double mw = b1 * m + (1 - b1) * gw, vw = b2 * v + (1 - b2) * gw * gw;
    const double ma = b1 * m + (1 - b1) * ga, va = b2 * v + (1 - b2) * ga * ga;
    const double pw = p * (decay ? 1 - lr * wd : 1) - lr / c1 * mw / (std::sqrt(vw) / std::sqrt(c2) + eps);
    const double pa = p - lr / c1 * ma / (std::sqrt(va) / std::sqrt(c2) + eps);
    EXPECT_THAT(step("adamw", decay), ElementsAre(testing::DoubleNear(pw, 1e-14), testing::DoubleNear(mw, 1e-14),
                                                  testing::DoubleNear(vw, 1e-14)));
    EXPECT_THAT(step("adam", decay), ElementsAre(testing::DoubleNear(pa, 1e-14), testing::DoubleNear(ma, 1e-14),
                                                 testing::DoubleNear(va, 1e-14)));
  }
}

TEST(ElementwiseRowsTest, ClipScale) {
  const Expr e = Find("clip_scale").expr({})[0];
  EXPECT_NEAR(Evaluate<double>(e, {4.0, 1.0}), 1.0 / (4.0 + 1e-6), 1e-12);
  EXPECT_EQ(Evaluate<double>(e, {0.5, 1.0}), 1);
  EXPECT_EQ(Evaluate<double>(e, {4.0, 0.0}), 1);
  EXPECT_EQ(Evaluate<double>(e, {4.0, -1.0}), 1);
  EXPECT_TRUE(std::isnan(Evaluate<double>(e, {std::nan(""), 1.0})));
}

TEST(ElementwiseRowsTest, TypesAndTheirErrors) {
  const auto infer = [](absl::string_view name, std::vector<TensorType> operands, Attrs attrs = {}) {
    return Find(name).infer(operands, attrs);
  };
  const TensorType x{DType::kBF16, {2, 3, 4}}, row{DType::kF32, {4}}, rng{DType::kI32, {4}}, scalar{DType::kF32, {}};
  EXPECT_THAT(*infer("add", {x, row}), ElementsAre(x));
  EXPECT_THAT(*infer("add", {row, x}), ElementsAre(TensorType{DType::kF32, {2, 3, 4}}));
  EXPECT_THAT(*infer("mul", {x, {DType::kF32, {2, 3, 1}}}), ElementsAre(x));
  EXPECT_THAT(*infer("cast", {x}, {{"to", DType::kF16}}), ElementsAre(TensorType{DType::kF16, {2, 3, 4}}));
  EXPECT_THAT(*infer("dropout", {x, rng}, {{"rate", 0.1}, {"key", int64_t{3}}}), ElementsAre(x));
  const auto invalid = [](const std::string& message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_THAT(infer("add", {x, {DType::kF32, {5}}}), invalid("[2,3,4] and [5]"));
  EXPECT_THAT(infer("add", {x, rng}), invalid("operand 1 is i32[4]"));
  EXPECT_THAT(infer("cast", {x}, {{"to", DType::kI32}}), invalid("to is i32"));
  EXPECT_THAT(infer("cast", {rng}, {{"to", DType::kF32}}), invalid("i32[4]"));
  EXPECT_THAT(infer("scale", {x}, {{"factor", kInf}}), invalid("factor"));
  EXPECT_THAT(infer("dropout", {x, rng}, {{"rate", 1.0}, {"key", int64_t{3}}}), invalid("rate is 1"));
  EXPECT_THAT(infer("dropout", {x, rng}, {{"rate", 0.1}, {"key", int64_t{-1}}}), invalid("key is -1"));
  EXPECT_THAT(infer("dropout", {x, row}, {{"rate", 0.1}, {"key", int64_t{1}}}), invalid("rng is f32[4]"));
  EXPECT_THAT(infer("clip_scale", {scalar, row}), invalid("max_norm is f32[4]"));
  std::vector<TensorType> adamw(12, scalar);
  adamw[0] = {DType::kF32, {3, 4}}, adamw[1] = {DType::kBF16, {3, 4}}, adamw[2] = adamw[0], adamw[3] = adamw[1];
  EXPECT_THAT(*infer("adamw", adamw, {{"decay", true}}), ElementsAre(adamw[0], adamw[1], adamw[2]));
  adamw[3] = row;
  EXPECT_THAT(infer("adamw", adamw, {{"decay", true}}), invalid("operand g is f32[4]"));
  // Every sample infers.
  for (const OpDef& op : ElementwiseOps()) {
    for (const OpSample& sample : op.samples()) {
      std::vector<TensorType> types;
      for (const SampleOperand& operand : sample.operands) types.push_back(operand.type);
      Attrs attrs = sample.attrs;
      EXPECT_OK(InferTypes(op, types, attrs)) << op.name;
      EXPECT_OK(OperandNames(op, attrs, static_cast<int64_t>(types.size()))) << op.name;
    }
  }
}

}  // namespace
}  // namespace mt
