#include "ir/evaluator.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/text.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename T>
HostTensor<T> Tensor(DType dtype, Dims dims, std::vector<T> values) {
  HostTensor<T> tensor{{dtype, std::move(dims)}, std::move(values), {}};
  CHECK_EQ(static_cast<int64_t>(tensor.values.size()), tensor.type.num_elements());
  return tensor;
}

// Infers and evaluates one op.
template <typename T>
absl::StatusOr<std::vector<HostTensor<T>>> Evaluate(absl::string_view name, std::vector<HostTensor<T>> operands,
                                                    Attrs attrs = {}, bool round = true) {
  const OpDef& op = *FindOp(name);
  std::vector<TensorType> types;
  std::vector<const HostTensor<T>*> pointers;
  for (const HostTensor<T>& operand : operands) {
    types.push_back(operand.type);
    pointers.push_back(&operand);
  }
  ASSIGN_OR_RETURN(const std::vector<TensorType> results, InferTypes(op, types, attrs));
  return EvaluateOp<T>(op, attrs, pointers, results, round);
}

TEST(EvaluatorTest, ElementWiseByHand) {
  ASSERT_OK_AND_ASSIGN(auto sum, Evaluate<float>("add", {Tensor<float>(DType::kF32, {2, 3}, {1, 2, 3, 4, 5, 6}),
                                                         Tensor<float>(DType::kF32, {3}, {10, 20, 30})}));
  EXPECT_THAT(sum[0].values, ElementsAre(11, 22, 33, 14, 25, 36));
  EXPECT_EQ(sum[0].type, (TensorType{DType::kF32, {2, 3}}));
  ASSERT_OK_AND_ASSIGN(auto outer, Evaluate<double>("mul", {Tensor<double>(DType::kF64, {2, 1}, {2, 3}),
                                                            Tensor<double>(DType::kF64, {1, 3}, {5, 7, 11})}));
  EXPECT_THAT(outer[0].values, ElementsAre(10, 14, 22, 15, 21, 33));
  ASSERT_OK_AND_ASSIGN(
      auto scalar, Evaluate<float>("sub", {Tensor<float>(DType::kF32, {}, {5}), Tensor<float>(DType::kF32, {}, {2})}));
  EXPECT_THAT(scalar[0].values, ElementsAre(3));
}

// Every broadcast of up to four dimensions, against the definition.
TEST(EvaluatorTest, BroadcastingAgreesWithItsDefinition) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 300; ++round) {
    const int64_t rank = static_cast<int64_t>(random() % 5);
    Dims dims;
    for (int64_t d = 0; d < rank; ++d) dims.push_back(1 + static_cast<int64_t>(random() % 4));
    std::vector<HostTensor<double>> operands;
    for (int i = 0; i < 2; ++i) {
      Dims mine(dims.begin() + static_cast<int64_t>(random() % static_cast<uint64_t>(rank + 1)), dims.end());
      for (int64_t& d : mine) {
        if (random() % 3 == 0) d = 1;
      }
      operands.push_back(FillSample<double>({.type = {DType::kF64, mine}}, {}, random()));
    }
    ASSERT_OK_AND_ASSIGN(const Dims result, BroadcastDims(operands[0].type.dims, operands[1].type.dims));
    ASSERT_OK_AND_ASSIGN(auto sum, Evaluate<double>("sub", operands));
    ASSERT_EQ(sum[0].type.dims, result);
    for (int64_t flat = 0; flat < sum[0].type.num_elements(); ++flat) {
      double expected = 0;
      for (int i = 0; i < 2; ++i) {
        const Dims& mine = operands[static_cast<size_t>(i)].type.dims;
        int64_t rest = flat, at = 0, stride = 1;
        for (int64_t d = 0; d < static_cast<int64_t>(result.size()); ++d) {
          const int64_t size = result[result.size() - 1 - static_cast<size_t>(d)];
          if (d < static_cast<int64_t>(mine.size())) {
            const int64_t own = mine[mine.size() - 1 - static_cast<size_t>(d)];
            at += (own == 1 ? 0 : rest % size) * stride;
            stride *= own;
          }
          rest /= size;
        }
        const double value = operands[static_cast<size_t>(i)].values[static_cast<size_t>(at)];
        expected += i == 0 ? value : -value;
      }
      EXPECT_EQ(sum[0].values[static_cast<size_t>(flat)], expected);
    }
  }
}

TEST(EvaluatorTest, RowsWithSeveralResults) {
  const HostTensor<double> p = Tensor<double>(DType::kF32, {2}, {1, 2});
  const HostTensor<double> zero = Tensor<double>(DType::kF32, {2}, {0, 0});
  const HostTensor<double> g = Tensor<double>(DType::kF32, {2}, {4, -4});
  const auto scalar = [](double value) { return Tensor<double>(DType::kF32, {}, {value}); };
  // First step: m = 0.1 g, v = 0.001 g^2; corrected they are g and g^2: p - lr * sign(g).
  ASSERT_OK_AND_ASSIGN(
      auto results, Evaluate<double>("adamw",
                                     {p, zero, zero, g, scalar(0.5), scalar(0.9), scalar(0.999), scalar(0), scalar(0),
                                      scalar(1 - 0.9), scalar(1 - 0.999), scalar(1)},
                                     {{"decay", true}}, false));
  ASSERT_EQ(results.size(), 3u);
  EXPECT_NEAR(results[0].values[0], 0.5, 1e-12);
  EXPECT_NEAR(results[0].values[1], 2.5, 1e-12);
  EXPECT_NEAR(results[1].values[0], 0.4, 1e-12);
  EXPECT_NEAR(results[2].values[1], 0.016, 1e-12);
}

TEST(EvaluatorTest, ResultsAreRoundedToTheirType) {
  // bf16 keeps 8 bits, ties to even: 1 + 2^-8 is half way down to 1, 1 + 3 * 2^-8 half way up to 1 + 2^-6.
  ASSERT_OK_AND_ASSIGN(auto low,
                       Evaluate<float>("cast", {Tensor<float>(DType::kF32, {3}, {1.00390625f, 1.01171875f, 0.1f})},
                                       {{"to", DType::kBF16}}));
  EXPECT_THAT(low[0].values, ElementsAre(1.0f, 1.015625f, 0.10009765625f));
  ASSERT_OK_AND_ASSIGN(auto unrounded, Evaluate<double>("cast", {Tensor<double>(DType::kF32, {1}, {0.1})},
                                                        {{"to", DType::kBF16}}, false));
  EXPECT_EQ(unrounded[0].values[0], 0.1);
  ASSERT_OK_AND_ASSIGN(auto single, Evaluate<double>("neg", {Tensor<double>(DType::kF32, {1}, {0.1})}));
  EXPECT_EQ(single[0].values[0], -static_cast<double>(0.1f));
  ASSERT_OK_AND_ASSIGN(auto kept, Evaluate<double>("neg", {Tensor<double>(DType::kF64, {1}, {0.1})}));
  EXPECT_EQ(kept[0].values[0], -0.1);
  ASSERT_OK_AND_ASSIGN(auto half,
                       Evaluate<float>("cast", {Tensor<float>(DType::kF32, {2}, {0.1f, 1e6f})}, {{"to", DType::kF16}}));
  EXPECT_THAT(half[0].values, ElementsAre(0.0999755859375f, std::numeric_limits<float>::infinity()));
}

// The fast rounding is RoundTo, for every kind of float.
TEST(EvaluatorTest, BF16RoundingIsThatOfRoundTo) {
  std::mt19937_64 random(2);
  std::vector<float> values;
  for (int i = 0; i < 20000; ++i) {
    // All exponents; and close to half way between two neighbours.
    uint32_t bits = static_cast<uint32_t>(random());
    if (i % 2 == 0) bits = (bits & 0xFFFF0000u) | (0x7FFFu + static_cast<uint32_t>(random() % 3));
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isnan(value)) values.push_back(value);
  }
  for (const float special : {0.0f, -0.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max(),
                              std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::min()}) {
    values.push_back(special);
  }
  const Dims dims = {static_cast<int64_t>(values.size())};
  ASSERT_OK_AND_ASSIGN(auto low,
                       Evaluate<float>("cast", {Tensor<float>(DType::kF32, dims, values)}, {{"to", DType::kBF16}}));
  for (size_t i = 0; i < values.size(); ++i) {
    const float expected = static_cast<float>(RoundTo(DType::kBF16, values[i]));
    EXPECT_EQ(low[0].values[i], expected) << values[i];
    EXPECT_EQ(std::signbit(low[0].values[i]), std::signbit(expected));
  }
  ASSERT_OK_AND_ASSIGN(auto nan,
                       Evaluate<float>("cast", {Tensor<float>(DType::kF32, {1}, {NAN})}, {{"to", DType::kBF16}}));
  EXPECT_TRUE(std::isnan(nan[0].values[0]));
}

TEST(EvaluatorTest, DropoutDrawsFromTheLogicalCoordinate) {
  const HostTensor<float> x = Tensor<float>(DType::kF32, {2, 3, 2}, std::vector<float>(12, 1.0f));
  HostTensor<float> rng{{DType::kI32, {4}}, {}, {7, 8, 9, 10}};
  ASSERT_OK_AND_ASSIGN(auto dropped, Evaluate<float>("dropout", {x, rng}, {{"rate", 0.5}, {"key", int64_t{77}}}));
  int64_t kept = 0;
  for (int64_t i = 0; i < 12; ++i) {
    const float u = UniformAt(rng.ints, 77, i / 6, i % 6);
    EXPECT_EQ(dropped[0].values[static_cast<size_t>(i)], u >= 0.5f ? 2.0f : 0.0f) << i;
    kept += u >= 0.5f ? 1 : 0;
  }
  EXPECT_GT(kept, 0);
  EXPECT_LT(kept, 12);
  // The second sample alone, as another rank would see it, drops the same elements.
  HostTensor<float> second = rng;
  second.ints[3] += 1;
  ASSERT_OK_AND_ASSIGN(
      auto alone,
      Evaluate<float>("dropout", {Tensor<float>(DType::kF32, {1, 3, 2}, std::vector<float>(6, 1.0f)), second},
                      {{"rate", 0.5}, {"key", int64_t{77}}}));
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(alone[0].values[i], dropped[0].values[6 + i]);
}

TEST(EvaluatorTest, ViewsAndCollectivesOfOneRankCopy) {
  const HostTensor<float> x = Tensor<float>(DType::kF32, {2, 2}, {1, 2, 3, 4});
  ASSERT_OK_AND_ASSIGN(auto flat, Evaluate<float>("reshape", {x}, {{"dims", IntList{4}}}));
  EXPECT_THAT(flat[0].values, ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(flat[0].type.dims, Dims{4});
  HostTensor<float> ids{{DType::kI32, {2}}, {}, {5, -1}};
  ASSERT_OK_AND_ASSIGN(auto column, Evaluate<float>("reshape", {ids}, {{"dims", IntList{2, 1}}}));
  EXPECT_THAT(column[0].ints, ElementsAre(5, -1));
  ASSERT_OK_AND_ASSIGN(auto reduced, Evaluate<float>("all_reduce", {x}));
  EXPECT_EQ(reduced[0].values, x.values);
  EXPECT_THAT(Evaluate<float>("reduce_scatter", {x}, {{"dim", int64_t{0}}, {"ranks", int64_t{2}}}),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("needs more than one rank")));
}

constexpr char kGraph[] = R"(graph @g stage=forward {
  input %x: f32[2,3] data
  input %w: f32[3,2] parameter
  input %unused: i32[2] data
  %0: f32[2,2] = matmul(%x, %w) "fc"
  %1: f32[2,2] = scale(%0) {factor=0.5}
  %2: f32[] = reduce_sum(%1) {dims=[0,1]}
  output "loss" %2
  output "w" %w
  output "h" %1
}
)";

std::map<std::string, HostTensor<float>> Inputs() {
  return {{"x", Tensor<float>(DType::kF32, {2, 3}, {1, 2, 3, 4, 5, 6})},
          {"w", Tensor<float>(DType::kF32, {3, 2}, {1, 0, 0, 1, 2, 2})},
          {"unused", {{DType::kI32, {2}}, {}, {0, 1}}},
          {"of_another_graph", Tensor<float>(DType::kF32, {}, {1})}};
}

TEST(EvaluatorTest, GraphByHand) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(kGraph));
  ASSERT_OK_AND_ASSIGN(const auto outputs, EvaluateGraph<float>(*graph, Inputs()));
  ASSERT_EQ(outputs.size(), 3u);
  EXPECT_THAT(outputs.at("h").values, ElementsAre(3.5, 4, 8, 8.5));
  EXPECT_THAT(outputs.at("loss").values, ElementsAre(24));
  EXPECT_THAT(outputs.at("w").values, ElementsAre(1, 0, 0, 1, 2, 2));
}

TEST(EvaluatorTest, InputsAreChecked) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(kGraph));
  auto inputs = Inputs();
  inputs.erase("w");
  EXPECT_THAT(EvaluateGraph<float>(*graph, inputs),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("graph @g: input %w (f32[3,2]) is not given")));
  inputs["w"] = Tensor<float>(DType::kF32, {2, 3}, {1, 0, 0, 1, 2, 2});
  EXPECT_THAT(EvaluateGraph<float>(*graph, inputs),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("input %w is f32[3,2]; given is f32[2,3]")));
  inputs["w"].type.dims = {3, 2};
  inputs["w"].values.pop_back();
  EXPECT_THAT(EvaluateGraph<float>(*graph, inputs),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f32[3,2] holds 5 floats and 0 integers")));
}

TEST(EvaluatorTest, RandomGraphsAgreeInBothPrecisionsAndAfterATripThroughText) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const std::unique_ptr<Graph> graph = RandomGraph(seed, {.nodes = 20, .low_precision = seed % 2 == 0});
    const auto inputs = RandomInputs<float>(*graph, seed);
    ASSERT_OK_AND_ASSIGN(const auto outputs, EvaluateGraph<float>(*graph, inputs));
    const float loss = outputs.at("loss").values[0];
    ASSERT_TRUE(std::isfinite(loss)) << seed;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> back, ParseGraph(Print(*graph)));
    ASSERT_OK_AND_ASSIGN(const auto again, EvaluateGraph<float>(*back, inputs));
    EXPECT_EQ(again.at("loss").values[0], loss) << seed;
    if (seed % 2 == 0) continue;
    ASSERT_OK_AND_ASSIGN(const auto exact, EvaluateGraph<double>(*graph, RandomInputs<double>(*graph, seed), false));
    EXPECT_NEAR(exact.at("loss").values[0], loss, 1e-4 * (1 + std::abs(loss))) << seed;
  }
}

TEST(FillSampleTest, EveryKind) {
  using Fill = SampleOperand::Fill;
  const auto floats = [](Fill fill) { return FillSample<float>({.type = {DType::kF32, {1000}}, .fill = fill}, {}, 5); };
  double sum = 0, squares = 0;
  for (const float value : floats(Fill::kNormal).values) sum += value, squares += value * value;
  EXPECT_NEAR(sum / 1000, 0, 0.1);
  EXPECT_NEAR(squares / 1000, 1, 0.1);
  for (const float value : floats(Fill::kPositive).values) EXPECT_TRUE(value >= 0.5f && value < 2.0f) << value;
  for (const float value : floats(Fill::kProbability).values) EXPECT_TRUE(value >= 0.0f && value < 1.0f) << value;
  EXPECT_NE(floats(Fill::kNormal).values, FillSample<float>({.type = {DType::kF32, {1000}}}, {}, 6).values);

  const HostTensor<float> ids =
      FillSample<float>({.type = {DType::kI32, {5, 7}}, .fill = Fill::kIds, .limit = -9}, {}, 5);
  for (size_t i = 0; i < 35; ++i) {
    EXPECT_TRUE(i % 7 == 6 ? ids.ints[i] == -1 : ids.ints[i] >= 0 && ids.ints[i] < 9) << i;
  }
  const std::vector<HostTensor<float>> earlier = {ids};
  const HostTensor<float> order =
      FillSample<float>({.type = {DType::kI32, {35}}, .fill = Fill::kOrder, .of = 0}, earlier, 5);
  for (size_t i = 1; i < 35; ++i) {
    const auto key = [&](size_t at) {
      return std::pair(ids.ints[static_cast<size_t>(order.ints[at])], order.ints[at]);
    };
    EXPECT_LT(key(i - 1), key(i));
  }
  EXPECT_EQ(FillSample<float>({.type = {DType::kI32, {4}}, .fill = Fill::kRandomState}, {}, 5).ints.size(), 4u);
  EXPECT_GE(FillSample<float>({.type = {DType::kI32, {}}, .fill = Fill::kStep}, {}, 5).ints[0], 1);
}

// The judge of f32 and of f64 see the same numbers; and they are values of the declared type.
TEST(FillSampleTest, BothPrecisionsGetTheSameValues) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const SampleOperand operand{.type = {dtype, {200}}};
    const HostTensor<float> single = FillSample<float>(operand, {}, 9);
    const HostTensor<double> twice = FillSample<double>(operand, {}, 9);
    for (size_t i = 0; i < 200; ++i) {
      EXPECT_EQ(static_cast<double>(single.values[i]), twice.values[i]);
      EXPECT_EQ(RoundTo(dtype, twice.values[i]), twice.values[i]);
    }
  }
}

}  // namespace
}  // namespace mt
