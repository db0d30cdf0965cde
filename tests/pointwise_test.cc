#include "runtime/cpu/pointwise.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/attrs.h"
#include "ir/op.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/vector_math.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();

// --- Vector math
// -------------------------------------------------------------------------------------------------------

std::vector<float> EveryKindOfFloat() {
  std::vector<float> values = {
      0.0f,      -0.0f,         1.0f,           -1.0f,     kInf,      -kInf,      std::nanf(""), 0x1p-149f, -0x1p-149f,
      0x1p-126f, 3.4028235e38f, -3.4028235e38f, 88.72284f, 88.72283f, -87.33655f, -103.97208f,   -104.0f,   0.70710678f,
      1e-30f,    3.95f,         0.99999994f,    10.0f,     524288.0f, 524289.0f,  1e10f,         -1e30f};
  // All exponents and signs.
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 40009) {
    float value;
    const uint32_t low = static_cast<uint32_t>(bits);
    std::memcpy(&value, &low, sizeof value);
    values.push_back(value);
  }
  // Denser where the functions live.
  for (int i = -200000; i <= 200000; ++i) values.push_back(static_cast<float>(i) * 5.3e-4f);
  for (int i = -50000; i <= 50000; ++i) values.push_back(static_cast<float>(i) * 1.1e-4f);
  return values;
}

// Distance in units of the last place of the result, subnormals included.
double Ulps(float actual, double expected) {
  const float rounded = static_cast<float>(expected);
  if (std::isnan(expected)) return std::isnan(actual) ? 0 : kInf;
  if (std::isinf(rounded) || std::isinf(actual)) {
    // Just below the largest finite value either neighbour will do.
    return actual == rounded || (std::isinf(rounded) != std::isinf(actual) && std::abs(expected) > 3.4028e38 &&
                                 std::abs(expected) < 3.4029e38 && std::signbit(actual) == std::signbit(rounded))
               ? 0
               : kInf;
  }
  int exponent;
  std::frexp(rounded, &exponent);
  return std::abs(static_cast<double>(actual) - expected) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

TEST(VectorMathTest, FunctionsAreAccurateEverywhere) {
  struct Function {
    Prim prim;
    double (*exact)(double);
    double ulps;
  };
  const Function functions[] = {
      {Prim::kExp, std::exp, 2},
      {Prim::kLog, std::log, 2},
      {Prim::kTanh, std::tanh, 4},
      {Prim::kErf, std::erf, 4},
      {Prim::kSin, std::sin, 4},
      {Prim::kCos, std::cos, 4},
      {Prim::kSqrt, std::sqrt, 0.5},
      {Prim::kNeg, [](double x) { return -x; }, 0},
      {Prim::kAbs, [](double x) { return std::abs(x); }, 0},
  };
  const std::vector<float> x = EveryKindOfFloat();
  std::vector<float> y(x.size());
  for (const Function& f : functions) {
    BestVectorMath().unary[static_cast<size_t>(f.prim)](y.data(), x.data(), static_cast<int64_t>(x.size()));
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double ulps = Ulps(y[i], f.exact(x[i]));
      if (ulps > worst) worst = ulps, at = x[i];
    }
    EXPECT_LE(worst, f.ulps) << Row(f.prim).name << " at " << at;
    RecordProperty(std::string(Row(f.prim).name), absl::StrCat(worst));
  }
  const auto tanh = BestVectorMath().unary[static_cast<size_t>(Prim::kTanh)];
  float zeros[2] = {0.0f, -0.0f};
  tanh(zeros, zeros, 2);
  EXPECT_FALSE(std::signbit(zeros[0]));
  EXPECT_TRUE(std::signbit(zeros[1]));
}

bool SameBits(const float* a, const float* b, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

// Also: a prefix of any length gives the same as the whole, so that tails are no different.
TEST(VectorMathTest, EveryInstructionSetGivesTheSameBits) {
  const std::vector<float> x = EveryKindOfFloat();
  std::vector<float> w(x.rbegin(), x.rend());
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<float> expected(x.size()), actual(x.size());
  const VectorMath& best = BestVectorMath();
  const auto compare = [&](const VectorMath& math, absl::string_view what, auto run) {
    run(best, expected.data(), n);
    run(math, actual.data(), n);
    EXPECT_TRUE(SameBits(expected.data(), actual.data(), x.size())) << math.name << " " << what;
    std::fill(actual.begin(), actual.end(), 0.0f);
    run(math, actual.data(), 37);
    EXPECT_TRUE(SameBits(expected.data(), actual.data(), 37)) << math.name << " " << what;
    EXPECT_EQ(actual[37], 0.0f);
  };
  for (const VectorMath& math : AllVectorMath()) {
    for (const PrimRow& row : AllPrims()) {
      const size_t p = static_cast<size_t>(row.prim);
      if (math.unary[p] != nullptr) {
        compare(math, row.name, [&](const VectorMath& m, float* to, int64_t k) { m.unary[p](to, x.data(), k); });
      }
      EXPECT_EQ(math.vv[p] != nullptr, row.arity == 2) << row.name;
      EXPECT_EQ(math.unary[p] != nullptr, row.arity == 1 && row.prim != Prim::kRound) << row.name;
      if (row.arity != 2) continue;
      compare(math, row.name, [&](const VectorMath& m, float* to, int64_t k) { m.vv[p](to, x.data(), w.data(), k); });
      compare(math, row.name, [&](const VectorMath& m, float* to, int64_t k) { m.vs[p](to, x.data(), 0.3f, k); });
      compare(math, row.name, [&](const VectorMath& m, float* to, int64_t k) { m.sv[p](to, 0.3f, x.data(), k); });
    }
    compare(math, "select",
            [&](const VectorMath& m, float* to, int64_t k) { m.select_vv(to, x.data(), w.data(), x.data(), k); });
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      const size_t d = static_cast<size_t>(dtype);
      compare(math, DTypeName(dtype), [&](const VectorMath& m, float* to, int64_t k) { m.round[d](to, x.data(), k); });
    }
    compare(math, "uniform", [&](const VectorMath& m, float* to, int64_t k) { m.uniform(to, {1, 2, 3, 4, 5}, 3, k); });
  }
}

TEST(VectorMathTest, ArithmeticIsThatOfTheReference) {
  const std::vector<float> x = EveryKindOfFloat();
  std::vector<float> w = x, y(x.size());
  std::shuffle(w.begin(), w.end(), std::mt19937(3));
  for (const Prim prim :
       {Prim::kAdd, Prim::kSub, Prim::kMul, Prim::kDiv, Prim::kMax, Prim::kMin, Prim::kLess, Prim::kPow}) {
    BestVectorMath().vv[static_cast<size_t>(prim)](y.data(), x.data(), w.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      const float expected = EvaluatePrim<float>(prim, x[i], w[i], 0, DType::kF32);
      ASSERT_TRUE(SameBits(&y[i], &expected, 1)) << Row(prim).name << " " << x[i] << " " << w[i] << ": " << y[i];
    }
  }
}

TEST(VectorMathTest, ConversionsRoundLikeTheTypes) {
  const std::vector<float> x = EveryKindOfFloat();
  std::vector<float> rounded(x.size()), back(x.size());
  std::vector<std::byte> stored(x.size() * 8);
  const int64_t n = static_cast<int64_t>(x.size());
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    const size_t d = static_cast<size_t>(dtype);
    BestVectorMath().store[d](stored.data(), x.data(), n);
    BestVectorMath().load[d](back.data(), stored.data(), n);
    for (size_t i = 0; i < x.size(); ++i) {
      const float expected = static_cast<float>(RoundTo(dtype, x[i]));
      ASSERT_TRUE(SameBits(&back[i], &expected, 1)) << DTypeName(dtype) << " " << x[i] << ": " << back[i];
    }
    if (BestVectorMath().round[d] == nullptr) continue;
    BestVectorMath().round[d](rounded.data(), x.data(), n);
    EXPECT_TRUE(SameBits(rounded.data(), back.data(), x.size())) << DTypeName(dtype);
  }
}

TEST(VectorMathTest, UniformIsThatOfTheReference) {
  const int32_t rng[4] = {-1, 17, 5, 1000};
  const UniformPlace place = {.seed_low = 0xFFFFFFFFu, .seed_high = 17, .step = 5, .sample = 1003, .key = 99};
  std::vector<float> y(1000);
  for (const int64_t first : {0, 1, 2, 3, 250, 4 * 64 + 1}) {
    BestVectorMath().uniform(y.data(), place, first, 1000);
    for (int64_t i = 0; i < 1000; ++i) EXPECT_EQ(y[static_cast<size_t>(i)], UniformAt(rng, 99, 3, first + i)) << i;
  }
}

// --- Programs over tensors
// ---------------------------------------------------------------------------------------------

// A tensor with its storage; `at` reads any dtype as f32.
struct Buffer {
  TensorType type;
  std::vector<std::byte> bytes;

  explicit Buffer(TensorType t) : type(std::move(t)), bytes(static_cast<size_t>(type.byte_size()) + 64) {}
  Tensor tensor() { return {bytes.data(), type}; }
  float at(int64_t i) const {
    float value = 0;
    BestVectorMath().load[static_cast<size_t>(type.dtype)](&value, bytes.data() + i * ByteSize(type.dtype), 1);
    return value;
  }
  void set(int64_t i, float value) {
    BestVectorMath().store[static_cast<size_t>(type.dtype)](bytes.data() + i * ByteSize(type.dtype), &value, 1);
  }
};

Buffer Random(const TensorType& type, std::mt19937& random, bool positive = false) {
  Buffer buffer(type);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < type.num_elements(); ++i) {
    const float value = normal(random);
    buffer.set(i, positive ? std::abs(value) + 0.1f : value);
  }
  return buffer;
}

// Index of the element of an operand that belongs to element `flat` of the result.
int64_t SourceOf(const Dims& operand, const Dims& result, int64_t flat) {
  int64_t source = 0, stride = 1;
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t size = result[result.size() - 1 - i], own = i < operand.size() ? operand[operand.size() - 1 - i] : 1;
    if (own != 1) source += flat % size * stride;
    stride *= own;
    flat /= size;
  }
  return source;
}

const int32_t kRng[4] = {12345, -7, 3, 40};

// One element of each result by EvaluateScalar, rounded.
std::vector<float> Expected(const ScalarProgram& program, const std::vector<Buffer>& operands,
                            const std::vector<TensorType>& results, int64_t flat) {
  const Dims& dims = results[0].dims;
  std::vector<float> values, out(results.size());
  for (const Buffer& operand : operands) {
    values.push_back(IsFloat(operand.type.dtype) ? operand.at(SourceOf(operand.type.dims, dims, flat)) : 0);
  }
  const int64_t per_sample = dims.empty() ? 1 : results[0].num_elements() / dims[0];
  EvaluateScalar<float>(
      program, values,
      [&](int64_t, uint32_t key) { return UniformAt(kRng, key, flat / per_sample, flat % per_sample); },
      absl::MakeSpan(out));
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(RoundTo(results[i].dtype, out[i]));
  return out;
}

Buffer RngBuffer() {
  Buffer buffer({DType::kI32, {4}});
  std::memcpy(buffer.bytes.data(), kRng, sizeof kRng);
  return buffer;
}

// Runs the program and compares with the reference; returns the results.
std::vector<Buffer> RunAndCheck(const ScalarProgram& program, std::vector<Buffer> operands,
                                const std::vector<TensorType>& types, ThreadPool& pool, double tolerance,
                                const std::string& what, const VectorMath& math = BestVectorMath()) {
  std::vector<Buffer> results;
  std::vector<Tensor> operand_tensors, result_tensors;
  for (const TensorType& type : types) results.emplace_back(type);
  for (Buffer& operand : operands) operand_tensors.push_back(operand.tensor());
  for (Buffer& result : results) result_tensors.push_back(result.tensor());
  const absl::StatusOr<Thunk> thunk = BindScalarProgram(program, operand_tensors, result_tensors, pool, math);
  EXPECT_OK(thunk) << what;
  if (!thunk.ok()) return results;
  (*thunk)();
  int64_t wrong = 0;
  for (int64_t i = 0; i < types[0].num_elements(); ++i) {
    const std::vector<float> expected = Expected(program, operands, types, i);
    for (size_t r = 0; r < types.size(); ++r) {
      const double step = types[r].dtype == DType::kBF16 ? 0x1p-7 : types[r].dtype == DType::kF16 ? 0x1p-10 : 0;
      const float actual = results[r].at(i);
      const bool same = (std::isnan(actual) && std::isnan(expected[r])) || actual == expected[r] ||
                        std::abs(actual - expected[r]) <= (tolerance + step) * (std::abs(expected[r]) + 0.01);
      if (!same && ++wrong < 5) {
        ADD_FAILURE() << what << " result " << r << " element " << i << ": " << actual << ", expected " << expected[r];
      }
    }
  }
  return results;
}

TEST(PointwiseTest, EveryRowAndSampleFollowsItsExpression) {
  ThreadPool pool(2);
  std::mt19937 random(5);
  for (const OpDef* op : AllOps()) {
    if (!op->is_element_wise()) continue;
    for (const OpSample& sample : op->samples()) {
      std::vector<Buffer> operands;
      std::vector<TensorType> types;
      for (const SampleOperand& operand : sample.operands) {
        types.push_back(operand.type);
        operands.push_back(IsFloat(operand.type.dtype)
                               ? Random(operand.type, random, operand.fill != SampleOperand::Fill::kNormal)
                               : RngBuffer());
      }
      Attrs attrs = sample.attrs;
      ASSERT_OK_AND_ASSIGN(const std::vector<TensorType> results, InferTypes(*op, types, attrs));
      RunAndCheck(Linearize(op->expr(attrs)), operands, results, pool, 1e-5, absl::StrCat(op->name));
    }
  }
}

TEST(PointwiseTest, EveryBroadcastAtEverySize) {
  ThreadPool pool(3);
  std::mt19937 random(6);
  const Expr expr = Operand(0) * Operand(1) - Operand(2);
  struct Case {
    Dims a, b, c;
  };
  const Case cases[] = {
      {{5000}, {5000}, {5000}},           // across tiles
      {{7, 600}, {600}, {7, 1}},          // rows of a tile each
      {{7, 600}, {1, 600}, {}},           //
      {{40, 17}, {17}, {40, 1}},          // many rows a tile
      {{3, 3000}, {3000}, {3, 1}},        // rows longer than a tile
      {{4, 1, 6, 5}, {3, 1, 5}, {6, 1}},  // all of it
      {{2, 3, 4}, {2, 1, 4}, {1, 3, 1}}, {{1}, {1, 1}, {}},
      {{100, 100}, {1}, {100, 100}},     {{2, 3, 2, 3, 2, 3, 2, 3}, {3, 1, 3, 1, 3, 1, 3}, {2, 1, 2, 1, 2, 1, 2, 1}},
  };
  for (const Case& c : cases) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
      absl::StatusOr<Dims> dims = BroadcastDims(c.a, c.b);
      ASSERT_OK(dims);
      dims = BroadcastDims(*dims, c.c);
      ASSERT_OK(dims);
      const std::string what = absl::StrCat(DTypeName(dtype), DimsToString(c.a), DimsToString(c.b), DimsToString(c.c));
      RunAndCheck(Linearize({expr}),
                  {Random({dtype, c.a}, random), Random({dtype, c.b}, random), Random({DType::kF32, c.c}, random)},
                  {{dtype, *dims}}, pool, 0, what);
    }
  }
}

// Every pair of arithmetic that one loop may do, against loops of their own (the values are wanted, too).
TEST(PointwiseTest, PairsRoundEachStep) {
  ThreadPool pool(1);
  std::mt19937 random(12);
  const TensorType type{DType::kF32, {2, 300}};
  const std::vector<Buffer> operands = {Random(type, random), Random(type, random), Random(type, random),
                                        Random({DType::kF32, {}}, random), Random({DType::kF32, {}}, random)};
  for (const Prim first : {Prim::kAdd, Prim::kSub, Prim::kMul}) {
    for (const Prim second : {Prim::kAdd, Prim::kSub, Prim::kMul}) {
      for (int way = 0; way < 16; ++way) {
        const Expr vector = Operand(0), other = Operand((way & 1) != 0 ? 1 : 3), last = Operand((way & 2) != 0 ? 2 : 4);
        const Expr t = (way & 4) != 0 ? Make(first, {vector, other}) : Make(first, {other, vector});
        const Expr y = (way & 8) != 0 ? Make(second, {t, last}) : Make(second, {last, t});
        const auto one = RunAndCheck(Linearize({y}), operands, {type}, pool, 0, absl::StrCat("pair ", way));
        const auto two = RunAndCheck(Linearize({y, t}), operands, {type, type}, pool, 0, absl::StrCat("apart ", way));
        EXPECT_EQ(one[0].bytes, two[0].bytes) << Row(first).name << " " << Row(second).name << " " << way;
      }
    }
  }
}

// Scalars are worked out once: the same bits as element by element, and as vectors of equal elements.
TEST(PointwiseTest, HoistedScalarsHaveTheSameBits) {
  ThreadPool pool(1);
  const Expr x = Operand(0), s = Operand(1);
  const ScalarProgram program = Linearize(
      {x * Tanh(Exp(s) / 3.0) + Select(Less(s, 0.5), Sin(s), Max(s, 2.0)) - RoundExpr(DType::kBF16, s * 0.3)});
  std::mt19937 random(7);
  for (int trial = 0; trial < 20; ++trial) {
    Buffer value = Random({DType::kF32, {}}, random), many({DType::kF32, {300}}),
           x_buffer = Random({DType::kF32, {300}}, random);
    for (int64_t i = 0; i < 300; ++i) many.set(i, value.at(0));
    const auto one = RunAndCheck(program, {x_buffer, value}, {{DType::kF32, {300}}}, pool, 1e-5, "scalar");
    const auto all = RunAndCheck(program, {x_buffer, many}, {{DType::kF32, {300}}}, pool, 1e-5, "vector");
    EXPECT_EQ(one[0].bytes, all[0].bytes);
  }
}

TEST(PointwiseTest, RandomNumbersBelongToTheElement) {
  std::mt19937 random(8);
  const ScalarProgram program = Linearize({Select(Less(Uniform(1, 77), 0.4), 0.0, Operand(0)) + Uniform(1, 78)});
  for (const Dims& dims : {Dims{}, Dims{50}, Dims{40, 3}, Dims{3, 41}, Dims{5, 7, 301}, Dims{2, 5000}}) {
    ThreadPool pool(2);
    RunAndCheck(program, {Random({DType::kF32, dims}, random), RngBuffer()}, {{DType::kF32, dims}}, pool, 0,
                DimsToString(dims));
  }
}

TEST(PointwiseTest, InPlaceIsOutOfPlace) {
  ThreadPool pool(2);
  std::mt19937 random(9);
  const Expr a = Operand(0), b = Operand(1), c = Operand(2);
  // Results that are wanted after the operand below them is read again, copies, and swaps.
  const std::vector<std::vector<Expr>> programs = {
      {a + b},
      {a * b, a - b},
      {a * b, Exp(a), a + b + c},
      {b, a},
      {b, c, a},
      {RoundExpr(DType::kF32, b), a * 2.0},
      {Expr(3.0), a + b},
      {a + b, a + b},
      {(a + 1.0) * b, (a + 1.0) * b * a, c * b},
  };
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const TensorType type{dtype, {3, 2000}};
    for (const std::vector<Expr>& exprs : programs) {
      const ScalarProgram program = Linearize(exprs);
      const std::vector<Buffer> operands = {Random(type, random), Random(type, random), Random(type, random)};
      const std::vector<TensorType> types(exprs.size(), type);
      const std::vector<Buffer> apart = RunAndCheck(program, operands, types, pool, 1e-5, program.ToString());
      // Every way to lay the results over operands, or over none.
      int ways = 1;
      for (size_t r = 0; r < exprs.size(); ++r) ways *= 4;
      for (int way = 0; way < ways; ++way) {
        std::vector<Buffer> over = operands;
        std::vector<Buffer> fresh;
        fresh.reserve(exprs.size());
        std::vector<Tensor> operand_tensors, result_tensors;
        for (Buffer& operand : over) operand_tensors.push_back(operand.tensor());
        bool used[4] = {};
        bool legal = true;
        for (size_t r = 0, w = static_cast<size_t>(way); r < exprs.size(); ++r, w /= 4) {
          legal = legal && (w % 4 == 3 || !used[w % 4]);
          used[w % 4] = true;
          result_tensors.push_back(w % 4 == 3 ? fresh.emplace_back(type).tensor() : operand_tensors[w % 4]);
        }
        if (!legal) continue;
        ASSERT_OK_AND_ASSIGN(const Thunk thunk, BindScalarProgram(program, operand_tensors, result_tensors, pool));
        thunk();
        for (size_t r = 0; r < exprs.size(); ++r) {
          EXPECT_EQ(std::memcmp(result_tensors[r].data, apart[r].bytes.data(), static_cast<size_t>(type.byte_size())),
                    0)
              << program.ToString() << " way " << way << " result " << r;
        }
      }
    }
  }
}

TEST(PointwiseTest, BitsDependOnNeitherThreadsNorInstructionSet) {
  std::mt19937 random(10);
  const OpDef* geglu = FindOp("geglu.grad0");
  ASSERT_NE(geglu, nullptr);
  const ScalarProgram program = Linearize(geglu->expr({}));
  std::vector<Buffer> operands;
  for (int i = 0; i < 3; ++i) operands.push_back(Random({DType::kF32, {3, 20001}}, random));
  ThreadPool one(1), four(4);
  const std::vector<TensorType> types = {{DType::kF32, {3, 20001}}};
  const auto expected = RunAndCheck(program, operands, types, one, 1e-4, "one thread");
  for (const VectorMath& math : AllVectorMath()) {
    const auto actual = RunAndCheck(program, operands, types, four, 1e-4, std::string(math.name), math);
    EXPECT_EQ(actual[0].bytes, expected[0].bytes) << math.name;
  }
}

// Random programs, one of them so long that the tile must shrink: the whole tensor has the bits of its elements alone.
TEST(PointwiseTest, RandomPrograms) {
  ThreadPool pool(2);
  std::mt19937 random(11);
  for (int trial = 0; trial < 30; ++trial) {
    std::vector<Expr> values = {Operand(0), Operand(1), Operand(2), Expr(0.7), Operand(3)};
    const int count = trial == 0 ? 300 : 25;
    for (int i = 0; i < count; ++i) {
      const Prim prims[] = {Prim::kNeg, Prim::kAbs, Prim::kTanh, Prim::kErf, Prim::kSin,  Prim::kCos,   Prim::kAdd,
                            Prim::kSub, Prim::kMul, Prim::kMax,  Prim::kMin, Prim::kLess, Prim::kSelect};
      const Prim prim = prims[random() % std::size(prims)];
      std::vector<Expr> args;
      for (int k = 0; k < Row(prim).arity; ++k) args.push_back(values[random() % values.size()]);
      // Bounded, so that differences in the last place do not grow.
      values.push_back(Min(Max(Make(prim, args), -2.0), 2.0));
    }
    std::vector<Expr> outputs;
    if (trial == 0) {
      Expr sum = 0.0;  // Summed from the last to the first: all stay live to the end.
      for (auto value = values.rbegin(); value != values.rend(); ++value) sum = sum + *value;
      outputs = {sum};
    } else {
      outputs = {values[values.size() - 1], values[values.size() - 2], values[values.size() - 3]};
    }
    const ScalarProgram program = Linearize(outputs);
    if (trial == 0) {
      EXPECT_GT(program.num_registers, 40);
    }
    const TensorType type{DType::kF32, {3, 777}};
    std::vector<Buffer> operands = {Random(type, random), Random({DType::kF32, {777}}, random),
                                    Random({DType::kBF16, {3, 1}}, random), Random({DType::kF32, {}}, random)};
    std::vector<Tensor> tensors;
    for (Buffer& operand : operands) tensors.push_back(operand.tensor());
    std::vector<Buffer> whole, single;
    std::vector<Tensor> whole_tensors, single_tensors;
    for (size_t r = 0; r < outputs.size(); ++r) {
      whole.emplace_back(type);
      single.emplace_back(TensorType{DType::kF32, {}});
    }
    for (size_t r = 0; r < outputs.size(); ++r) {
      whole_tensors.push_back(whole[r].tensor());
      single_tensors.push_back(single[r].tensor());
    }
    ASSERT_OK_AND_ASSIGN(const Thunk thunk, BindScalarProgram(program, tensors, whole_tensors, pool));
    thunk();
    for (int64_t i = 0; i < type.num_elements(); i += 97) {
      std::vector<Tensor> elements = tensors;
      for (size_t o = 0; o < elements.size(); ++o) {
        elements[o].data += SourceOf(operands[o].type.dims, type.dims, i) * ByteSize(operands[o].type.dtype);
        elements[o].type.dims = {};
      }
      ASSERT_OK_AND_ASSIGN(const Thunk one, BindScalarProgram(program, elements, single_tensors, pool));
      one();
      for (size_t r = 0; r < outputs.size(); ++r) {
        const float expected = single[r].at(0), actual = whole[r].at(i);
        ASSERT_TRUE(SameBits(&expected, &actual, 1)) << trial << " result " << r << " element " << i;
      }
    }
  }
}

TEST(PointwiseTest, RefusesWhatIsNoProgramOverTheseTensors) {
  ThreadPool pool(1);
  Buffer x({DType::kF32, {4, 8}}), row({DType::kF32, {8}}), wide({DType::kF32, {5, 8}}), ids({DType::kI32, {4, 8}}),
      rng = RngBuffer(), half({DType::kBF16, {4, 8}});
  const auto bind = [&](const Expr& expr, std::vector<Tensor> operands, std::vector<Tensor> results) {
    return BindScalarProgram(Linearize({expr}), operands, results, pool);
  };
  const auto invalid = [](const std::string& message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  const Expr sum = Operand(0) + Operand(1);
  EXPECT_OK(bind(sum, {x.tensor(), row.tensor()}, {x.tensor()}));
  EXPECT_THAT(bind(sum, {x.tensor()}, {x.tensor()}), invalid("reads operand 1"));
  EXPECT_THAT(bind(sum, {x.tensor(), wide.tensor()}, {x.tensor()}), invalid("operand 1 is f32[5,8]"));
  EXPECT_THAT(bind(sum, {x.tensor(), x.tensor()}, {row.tensor()}), invalid("broadcast to the result, f32[8]"));
  EXPECT_THAT(bind(sum, {x.tensor(), ids.tensor()}, {x.tensor()}), invalid("i32[4,8]"));
  EXPECT_THAT(bind(sum, {x.tensor(), x.tensor()}, {ids.tensor()}), invalid("result i32[4,8]"));
  EXPECT_THAT(bind(sum, {x.tensor(), x.tensor()}, {}), invalid("0 results given"));
  EXPECT_THAT(bind(Uniform(0, 1), {x.tensor()}, {x.tensor()}), invalid("random state is i32[4]"));
  EXPECT_OK(bind(Uniform(0, 1), {rng.tensor()}, {x.tensor()}));
  // Overlaps that would read what was written.
  Tensor shifted = wide.tensor();
  shifted.data += 4;
  shifted.type.dims = {4, 8};
  Tensor first = shifted;
  first.data -= 4;
  EXPECT_THAT(bind(sum, {first, first}, {shifted}), invalid("overlaps"));
  Tensor row_of_x = x.tensor();
  row_of_x.type.dims = {8};
  EXPECT_THAT(bind(sum, {x.tensor(), row_of_x}, {x.tensor()}), invalid("overlaps"));
  Tensor half_of_x = x.tensor();
  half_of_x.type.dtype = DType::kBF16;
  EXPECT_THAT(bind(sum, {half_of_x, row.tensor()}, {x.tensor()}), invalid("overlaps"));
  EXPECT_THAT(
      BindScalarProgram(Linearize({Operand(0), Operand(0) * 2.0}), {half.tensor()}, {x.tensor(), x.tensor()}, pool),
      invalid("results 0 and 1 overlap"));
}

}  // namespace
}  // namespace mt
