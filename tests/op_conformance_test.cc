// Every row of the op table × its samples: types, reference, gradient, cost, round trips, and every backend's kernel.
// A new op is tested by being in the table.
#include <set>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/op.h"
#include "tests/op_checks.h"
#include "tests/test_util.h"

namespace mt {
namespace {

class OpConformance : public ::testing::TestWithParam<const OpDef*> {
 protected:
  const OpDef& op() const { return *GetParam(); }
};
class OpGradient : public OpConformance {};
class OpOnCpu : public OpConformance {};

TEST_P(OpConformance, RowIsComplete) { CheckRowIsComplete(op()); }
TEST_P(OpConformance, ReferenceFillsWhatInferSays) { CheckReferenceFillsWhatInferSays(op()); }
TEST_P(OpConformance, ResultDims) { CheckResultDims(op()); }
TEST_P(OpConformance, CostCountsOperandsAndResults) { CheckCostCountsOperandsAndResults(op()); }
TEST_P(OpConformance, InPlacePairsFit) { CheckInPlacePairsFit(op()); }
TEST_P(OpConformance, TextAndProtoRoundTrip) { CheckTextAndProtoRoundTrip(op()); }
TEST_P(OpGradient, IsCentralDifference) { CheckIsCentralDifference(op()); }
TEST_P(OpOnCpu, AgreesWithReference) { CheckAgreesWithReference(op()); }
TEST_P(OpOnCpu, SameBitsAlways) { CheckSameBitsAlways(op()); }

std::string TestName(const ::testing::TestParamInfo<const OpDef*>& info) {
  std::string name(info.param->name);
  absl::c_replace(name, '.', '_');
  return name;
}

// Whoever adds a row that is on one of these lists says so here.

TEST(OpTable, RowsWithoutGradient) {
  std::set<absl::string_view> names;
  for (const OpDef* op : AllOps()) {
    if (!IsDifferentiable(*op) && !absl::StrContains(op->name, ".grad")) names.insert(op->name);
  }
  EXPECT_THAT(names,
              ::testing::UnorderedElementsAre(
                  "adam", "adam_step", "adamw", "adamw8bit", "all_gather", "all_reduce", "cached_attention",
                  "chunked_loss_bias_grad", "chunked_loss_grad", "clip_scale", "count_labels", "embedding_backward",
                  "fill", "flash_attention_backward", "flash_attention_packed_backward", "fused", "global_norm",
                  "layer_norm_backward", "loss_scale_step", "reduce_max", "reduce_scatter", "rms_norm_backward",
                  "sinusoid", "softmax_backward", "softmax_cross_entropy_backward"));
}

TEST(OpTable, RowsWithoutCpuKernel) {
  std::set<absl::string_view> names;
  for (const OpDef* op : AllOps()) {
    if (!NeedsKernel(*op)) names.insert(op->name);
  }
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("all_gather", "all_reduce", "reduce_scatter", "reshape"));
}

TEST(OpTable, ErrorsNameOperandFactAndExpectation) {
  const auto f32 = [](Dims dims) { return TensorType{DType::kF32, std::move(dims)}; };
  const auto i32 = [](Dims dims) { return TensorType{DType::kI32, std::move(dims)}; };
  const int64_t huge = int64_t{1} << 43;
  struct Case {
    absl::string_view op;
    std::vector<TensorType> operands;
    Attrs attrs;
    std::string message;
  };
  const Case cases[] = {
      {"matmul",
       {f32({32, 784}), f32({768, 128})},
       {},
       "operand b has 768 rows, a has 784 columns; they must be equal"},
      {"matmul", {f32({2, 3, 4}), f32({3, 4, 5})}, {}, "must have the same leading dimensions"},
      {"matmul", {f32({2, 3}), {DType::kBF16, {3, 4}}}, {}, "must have the same dtype"},
      {"matmul", {f32({3}), f32({3, 4})}, {}, "operand a is f32[3], 1 dimensions; it must have at least 2"},
      {"matmul", {f32({2, 3}), f32({3, 4}), f32({3})}, {{"bias", true}}, "its dimensions must be [4]"},
      {"matmul", {f32({2, 3}), f32({3, 4})}, {{"bias", true}}, "2 operands given; expected 3: a, b, bias"},
      {"matmul", {f32({huge, 1}), f32({1, huge})}, {}, "the limit for one tensor"},
      {"reshape", {f32({2, 3})}, {{"dims", IntList{4}}}, "f32[2,3], 6 elements; attribute dims [4] has 4"},
      {"reshape", {f32({2, 3})}, {{"dims", IntList{-2, -3}}}, "every dimension must be at least 1"},
      {"transpose", {f32({2, 3})}, {{"perm", IntList{0, 0}}}, "must be an order of the 2 dimensions"},
      {"slice",
       {f32({4})},
       {{"dim", int64_t{0}}, {"start", int64_t{1}}, {"limit", int64_t{5}}},
       "0 <= start < limit <= 4"},
      {"slice",
       {f32({4})},
       {{"dim", int64_t{1}}, {"start", int64_t{0}}, {"limit", int64_t{1}}},
       "attribute dim is 1; it must be from 0 to 0"},
      {"pad",
       {f32({4})},
       {{"dim", int64_t{0}}, {"before", int64_t{-1}}, {"after", int64_t{0}}},
       "attribute before is -1"},
      {"concat", {f32({2, 3}), f32({2, 4})}, {{"dim", int64_t{0}}}, "operand x1 is f32[2,4]; it must be f32[2,3]"},
      {"concat", {}, {{"dim", int64_t{0}}}, "it must have at least one"},
      {"broadcast", {f32({3})}, {{"dims", IntList{3, 2}}}, "does not broadcast to attribute dims [3,2]"},
      {"reduce_sum", {f32({2, 3})}, {{"dims", IntList{1, 0}}}, "in increasing order, at least one"},
      {"reduce_sum", {i32({2, 3})}, {{"dims", IntList{0}}}, "operand x is i32[2,3]; it must be floating point"},
      {"embedding", {f32({9, 4}), i32({2, 3}), i32({5})}, {}, "operand order is i32[5]; it must be i32[6]"},
      {"embedding", {f32({9, 4}), f32({2, 3}), i32({6})}, {}, "operand ids is f32[2,3]; its dtype must be i32"},
      {"sinusoid", {}, {{"length", huge}, {"width", huge}}, "the limit for one tensor"},
      {"rope", {f32({2, 3})}, {}, "its last dimension must be even"},
      {"split_heads", {f32({1, 2, 10})}, {{"heads", int64_t{4}}, {"kv_heads", int64_t{3}}}, "it must divide heads, 4"},
      {"split_heads", {f32({1, 2, 10})}, {{"heads", int64_t{2}}, {"kv_heads", int64_t{2}}}, "multiple of 6"},
      {"unmerge_heads", {f32({1, 2, 10})}, {{"heads", int64_t{4}}}, "multiple of heads, 4"},
      {"softmax", {f32({2, 3})}, {{"causal", true}}, "a causal mask needs [..., 1 T, T]"},
      {"softmax", {f32({2, 3})}, {{"window", int64_t{1}}}, "it needs causal=true"},
      {"flash_attention",
       {f32({2, 4, 5, 8}), f32({2, 3, 5, 8}), f32({2, 3, 5, 8})},
       {},
       "its 3 heads must divide those of q, 4"},
      {"flash_attention",
       {f32({2, 4, 5, 8}), f32({2, 4, 6, 8}), f32({2, 4, 6, 8})},
       {},
       "operand k is f32[2,4,6,8]; it must be f32[2,4,5,8]"},
      {"flash_attention",
       {f32({2, 4, 5, 8}), f32({2, 4, 5, 8}), f32({2, 4, 5, 8})},
       {{"rate", 0.5}},
       "attribute rate is 0.5; it needs rng=true"},
      {"flash_attention_packed",
       {f32({2, 5, 10})},
       {{"heads", int64_t{4}}, {"kv_heads", int64_t{3}}},
       "it must divide heads, 4"},
      {"flash_attention_packed",
       {f32({2, 5, 10})},
       {{"heads", int64_t{2}}, {"kv_heads", int64_t{2}}},
       "operand qkv is f32[2,5,10]; its last dimension must be a multiple of 6"},
      {"flash_attention_packed_backward",
       {f32({2, 5, 16}), f32({2, 5, 24}), f32({2, 5, 8}), f32({2, 2, 5})},
       {{"heads", int64_t{2}}, {"kv_heads", int64_t{2}}},
       "operand dout is f32[2,5,16]; it must be f32[2,5,8]"},
      {"layer_norm", {f32({2, 3}), f32({4}), f32({4})}, {}, "operand gamma is f32[4]; its dimensions must be [3]"},
      {"softmax_cross_entropy", {f32({2, 3}), i32({3})}, {}, "operand labels is i32[3]; it must be i32[2]"},
      {"softmax_cross_entropy",
       {f32({2, 3}), i32({2})},
       {{"classes", int64_t{4}}},
       "attribute classes is 4; it must be from 0 to 3"},
      {"chunked_loss",
       {f32({2, 3}), f32({7, 4}), i32({2})},
       {{"chunks", int64_t{1}}},
       "operand w is f32[7,4]; it must be f32[7,3]"},
      {"chunked_loss",
       {f32({2, 3}), f32({7, 3}), i32({3})},
       {{"chunks", int64_t{1}}},
       "operand labels is i32[3]; it must be i32[2]"},
      {"chunked_loss",
       {f32({2, 3}), f32({7, 3}), i32({2})},
       {{"chunks", int64_t{3}}},
       "attribute chunks is 3; it must be from 1 to 2"},
      {"chunked_loss",
       {f32({2, 3}), f32({7, 3}), i32({2})},
       {{"chunks", int64_t{1}}, {"classes", int64_t{8}}},
       "attribute classes is 8; it must be from 0 to 7"},
      {"chunked_loss",
       {f32({2, 3}), f32({7, 3}), i32({2}), f32({6})},
       {{"chunks", int64_t{1}}, {"bias", true}},
       "operand bias is f32[6]; its dimensions must be [7]"},
      {"chunked_loss",
       {f32({int64_t{1} << 40, 1}), f32({int64_t{1} << 40, 1}), i32({int64_t{1} << 40})},
       {{"chunks", int64_t{1}}},
       "more logits than the limit for one tensor"},
      {"chunked_loss_grad",
       {f32({2, 3}), f32({7, 3}), i32({2}), f32({1})},
       {{"chunks", int64_t{1}}},
       "operand dloss is f32[1]; it must be f32[]"},
      {"chunked_loss_grad",
       {f32({2, 3}), f32({7, 3}), i32({2}), f32({}), f32({3, 7})},
       {{"chunks", int64_t{1}}, {"accumulator", true}},
       "operand accumulator is f32[3,7]; it must be f32[7,3]"},
      {"adam_step", {i32({}), f32({}), f32({})}, {}, "operand beta1 is f32[]; it must be f64[]"},
      {"global_norm", {}, {}, "it must have at least one"},
      {"reduce_scatter", {f32({6})}, {{"dim", int64_t{0}}, {"ranks", int64_t{4}}}, "must be a multiple of ranks, 4"},
  };
  for (const Case& c : cases) {
    Attrs attrs = c.attrs;
    EXPECT_THAT(InferTypes(*FindOp(c.op), c.operands, attrs),
                StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr(c.message)))
        << c.op;
  }
}

// What the CPU makes of these operands; empty where it fails.
std::vector<HostTensor<double>> RunOnCpu(absl::string_view op, std::vector<HostTensor<double>> operands, Attrs attrs) {
  const OpDef& row = *FindOp(op);
  Prepared p{.op = &row, .attrs = std::move(attrs), .operands = std::move(operands), .what = std::string(op)};
  for (const HostTensor<double>& operand : p.operands) p.operand_types.push_back(operand.type);
  absl::StatusOr<std::vector<TensorType>> types = InferTypes(row, p.operand_types, p.attrs);
  EXPECT_OK(types);
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend(2);
  EXPECT_OK(backend);
  std::vector<HostTensor<double>> results;
  if (!types.ok() || !backend.ok()) return results;
  p.result_types = *types;
  const absl::StatusOr<std::vector<std::string>> bytes = RunOnBackend(**backend, p, 0xFF);
  EXPECT_OK(bytes);
  for (size_t r = 0; bytes.ok() && r < bytes->size(); ++r) {
    results.push_back(ReadTensor(reinterpret_cast<const std::byte*>((*bytes)[r].data()), p.result_types[r]));
  }
  return results;
}

// Heads that are columns of rows give the bits that heads of their own give, split and merged: the same sums in the
// same order, the same numbers drawn for the same weights.
TEST(AttentionLayouts, PackedIsSplitAndMerged) {
  for (const Prepared& p : PrepareSamples(*FindOp("flash_attention_packed"))) {
    SCOPED_TRACE(p.what);
    const Attrs heads = {{"heads", p.attrs.Int("heads")}, {"kv_heads", p.attrs.Int("kv_heads")}};
    Attrs attrs;
    for (const AttrSpec& attr : FindOp("flash_attention")->attrs) attrs.Set(attr.name, *p.attrs.Find(attr.name));
    const std::vector<HostTensor<double>> packed = RunOnCpu("flash_attention_packed", p.operands, p.attrs);
    std::vector<HostTensor<double>> operands = RunOnCpu("split_heads", {p.operands[0]}, heads);
    if (p.attrs.Bool("rng")) operands.push_back(p.operands[1]);
    const std::vector<HostTensor<double>> apart = RunOnCpu("flash_attention", operands, attrs);
    ASSERT_EQ(packed.size(), 2u);
    ASSERT_EQ(apart.size(), 2u);
    EXPECT_EQ(packed[0].values, RunOnCpu("merge_heads", {apart[0]}, {})[0].values);
    EXPECT_EQ(packed[1].values, apart[1].values);
    EXPECT_EQ(packed[1].type, apart[1].type);

    const HostTensor<double> dout = FillSample<double>({.type = packed[0].type}, {}, 77);
    operands.insert(operands.begin(), RunOnCpu("unmerge_heads", {dout}, {{"heads", p.attrs.Int("heads")}})[0]);
    operands.insert(operands.begin() + 4, apart.begin(), apart.end());
    const std::vector<HostTensor<double>> grads = RunOnCpu("flash_attention_backward", operands, attrs);
    operands = {dout, p.operands[0], packed[0], packed[1]};
    if (p.attrs.Bool("rng")) operands.push_back(p.operands[1]);
    const std::vector<HostTensor<double>> grad = RunOnCpu("flash_attention_packed_backward", operands, p.attrs);
    ASSERT_EQ(grad.size(), 1u);
    EXPECT_EQ(grad[0].values, RunOnCpu("join_heads", grads, {})[0].values);
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, OpConformance, ::testing::ValuesIn(AllOps().begin(), AllOps().end()), TestName);
INSTANTIATE_TEST_SUITE_P(Rows, OpGradient, ::testing::ValuesIn(DifferentiableOps()), TestName);
INSTANTIATE_TEST_SUITE_P(Rows, OpOnCpu, ::testing::ValuesIn(OpsWithKernels()), TestName);

}  // namespace
}  // namespace mt
