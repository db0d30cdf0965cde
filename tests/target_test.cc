#include "ir/target.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "codegen/compile.h"
#include "codegen/cuda/resources.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/plan/resources.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(TargetTest, Parses) {
  for (const std::string name :
       {"cpu", "cuda:sm_75", "cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120"}) {
    ASSERT_OK_AND_ASSIGN(const Target target, ParseTarget(name));
    EXPECT_EQ(target.ToString(), name);
    EXPECT_EQ(target.is_cuda(), name != "cpu");
    EXPECT_EQ(ContextBytes(target) > 0, target.is_cuda());
    const Roofline roofline = TargetRoofline(target);
    EXPECT_GT(roofline.matmul_flops_per_second, 0);
    EXPECT_GT(roofline.bytes_per_second, 0);
    EXPECT_EQ(target.Computes(DType::kBF16), name != "cuda:sm_75");
    EXPECT_TRUE(target.Computes(DType::kF16));
  }
  ASSERT_OK_AND_ASSIGN(const Target cuda, ParseTarget("cuda"));
  EXPECT_EQ(cuda.ToString(), "cuda:sm_90");
  for (const std::string bad : {"", "abacus", "cuda:", "cuda:sm_91", "cuda:90", "CPU", "cuda:sm_90 "}) {
    EXPECT_THAT(ParseTarget(bad), StatusIs(absl::StatusCode::kInvalidArgument,
                                           AllOf(HasSubstr("is not known"), HasSubstr("cpu, cuda, cuda:sm_75"))));
  }
}

// A matmul takes what it multiplies: f32, TF32 or 16 bits.
TEST(TargetTest, SecondsByDType) {
  const Roofline roofline{.matmul_flops_per_second = 10,
                          .tf32_flops_per_second = 50,
                          .matmul16_flops_per_second = 100,
                          .bytes_per_second = 1e9};
  const OpDef& matmul = *FindOp("matmul");
  const OpDef& add = *FindOp("add");
  const Cost cost{.flops = 1000};
  const TensorType f32{DType::kF32, {8, 8}}, bf16{DType::kBF16, {8, 8}}, f16{DType::kF16, {8, 8}};
  EXPECT_DOUBLE_EQ(OpSeconds(matmul, {f32, f32}, {}, cost, roofline), 100);
  EXPECT_DOUBLE_EQ(OpSeconds(matmul, {f32, f32}, {{"tf32", true}}, cost, roofline), 20);
  EXPECT_DOUBLE_EQ(OpSeconds(matmul, {bf16, bf16}, {}, cost, roofline), 10);
  EXPECT_DOUBLE_EQ(OpSeconds(matmul, {f16, f16}, {}, cost, roofline), 10);
  EXPECT_DOUBLE_EQ(OpSeconds(add, {bf16, bf16}, {}, cost, roofline), 100);  // Not what matmul units do.
  EXPECT_DOUBLE_EQ(OpSeconds(matmul, {bf16, bf16}, {}, cost, {.matmul_flops_per_second = 10}), 100);
}

int64_t Workspace(const std::string& target, const std::string& op, std::vector<TensorType> operands, Attrs attrs) {
  const OpDef* row = FindOp(op);
  CHECK(row != nullptr) << op;
  const absl::StatusOr<std::vector<TensorType>> results = InferTypes(*row, operands, attrs);
  CHECK(results.ok()) << results.status();
  return WorkspaceBytes(target, *row, operands, *results, attrs);
}

TEST(TargetTest, CudaWorkspaces) {
  const TensorType a{DType::kBF16, {64, 32}}, b{DType::kBF16, {32, 64}};
  EXPECT_EQ(Workspace("cuda:sm_90", "matmul", {a, b}, {}), 32 << 20);
  EXPECT_EQ(Workspace("cuda:sm_120", "matmul", {a, b}, {}), 32 << 20);
  EXPECT_EQ(Workspace("cuda:sm_80", "matmul", {a, b}, {}), 4 << 20);
  EXPECT_EQ(Workspace("no_such_target", "matmul", {a, b}, {}), 0);
  EXPECT_EQ(Workspace("cuda", "add", {a, a}, {}), 0);

  // Attention forward holds all but its results on the chip, the backward one sum for each query.
  for (const int64_t length : {256, 512}) {
    const TensorType q{DType::kBF16, {2, 3, length, 64}}, lse{DType::kF32, {2, 3, length}};
    EXPECT_EQ(Workspace("cuda", "flash_attention_backward", {q, q, q, q, q, lse}, {{"scale", 0.125}}),
              2 * 3 * length * 4);
    EXPECT_EQ(Workspace("cuda", "flash_attention", {q, q, q}, {{"scale", 0.125}}), 0);
  }

  // Chunks of a sum depend on its length alone and cover it.
  for (const int64_t length : {1, 31, 32, 33, 8192, 8193, 65536, 1000003}) {
    const CudaChunks chunks = CutCudaSum(length);
    EXPECT_LE(chunks.count, 256);
    EXPECT_GE(chunks.length * chunks.count, length);
    EXPECT_LT(chunks.length * (chunks.count - 1), length);
  }
  const TensorType x{DType::kF32, {1024, 16}};
  EXPECT_EQ(Workspace("cuda", "reduce_sum", {x}, {{"dims", IntList{0}}}), 32 * 16 * 4);
  EXPECT_EQ(Workspace("cuda", "reduce_sum", {TensorType{DType::kF32, {1 << 20, 16}}}, {{"dims", IntList{1}}}), 0);
}

// A row whose CPU kernel takes scratch has a rule for CUDA, too, or a reason here to have none.
TEST(TargetTest, EveryScratchIsStated) {
  const std::map<std::string, std::string> without = {
      {"flash_attention", "a block holds all but its results on the chip"},
      {"flash_attention_packed", "a block holds all but its results on the chip"},
      {"cached_attention", "a block keeps its running sums on the chip"},
  };
  for (const OpDef* op : AllOps()) {
    if (!op->samples) continue;
    int64_t cpu = 0, cuda = 0;
    for (const OpSample& sample : op->samples()) {
      std::vector<TensorType> operands;
      for (const SampleOperand& operand : sample.operands) operands.push_back(operand.type);
      Attrs attrs = sample.attrs;
      ASSERT_OK_AND_ASSIGN(const std::vector<TensorType> results, InferTypes(*op, operands, attrs));
      cpu = std::max(cpu, WorkspaceBytes("cpu", *op, operands, results, attrs));
      cuda = std::max(cuda, WorkspaceBytes("cuda:sm_90", *op, operands, results, attrs));
    }
    if (without.count(std::string(op->name)) > 0) continue;
    EXPECT_TRUE(cpu == 0 || cuda > 0) << op->name << ": state its workspace in codegen/cuda/resources.cc";
  }
}

proto::PlanProto CudaPlan() {
  absl::StatusOr<proto::PlanProto> plan = Compile(SmallTransformer(""), {.target = "cuda", .passes = "none"});
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

TEST(TargetTest, CudaPlansStageTheNextBatch) {
  const proto::PlanProto plan = CudaPlan();
  EXPECT_EQ(plan.target(), "cuda:sm_90");
  for (const proto::ProgramProto& program : plan.programs()) {
    for (const proto::ProgramInput& input : program.inputs()) {
      EXPECT_EQ(input.has_staging(), input.role() == "data") << input.name();
      if (!input.has_staging()) continue;
      const proto::BufferProto& buffer = plan.buffers(input.staging());
      EXPECT_EQ(buffer.name(), input.name() + ".next");
      EXPECT_EQ(buffer.size_bytes(), plan.buffers(program.tensors(input.tensor()).buffer()).size_bytes());
      EXPECT_EQ(buffer.first(), 0);
      EXPECT_EQ(buffer.last(), program.instructions_size() - 1);
    }
  }
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto cpu, Compile(SmallTransformer(""), {.passes = "none"}));
  for (const proto::ProgramInput& input : cpu.programs(0).inputs()) EXPECT_FALSE(input.has_staging());
}

TEST(TargetTest, TheVerifierKnowsStaging) {
  const proto::PlanProto good = CudaPlan();
  ASSERT_OK(VerifyPlan(good));
  const auto first_data = [](proto::PlanProto& plan) {
    for (proto::ProgramInput& input : *plan.mutable_programs(0)->mutable_inputs()) {
      if (input.has_staging()) return &input;
    }
    return static_cast<proto::ProgramInput*>(nullptr);
  };
  struct Case {
    void (*corrupt)(proto::PlanProto& plan, proto::ProgramInput& input);
    std::string message;
  };
  const Case cases[] = {
      {[](proto::PlanProto&, proto::ProgramInput& input) { input.clear_staging(); }, "lacks a staging buffer"},
      {[](proto::PlanProto& plan, proto::ProgramInput& input) { input.set_staging(plan.buffers_size()); },
       "staging buffer"},
      {[](proto::PlanProto&, proto::ProgramInput& input) { input.set_staging(-1); }, "staging buffer -1"},
      {[](proto::PlanProto& plan, proto::ProgramInput& input) {
         input.set_staging(plan.programs(0).tensors(input.tensor()).buffer());
       },
       "not a staging buffer of this program alone"},
      {[](proto::PlanProto&, proto::ProgramInput& input) { input.set_staging(0); }, "not a staging buffer"},
      {[](proto::PlanProto& plan, proto::ProgramInput& input) {
         proto::BufferProto& buffer = *plan.mutable_buffers(input.staging());
         buffer.set_last(buffer.last() - 1);
       },
       "it must hold them from 0 to"},
      {[](proto::PlanProto& plan, proto::ProgramInput&) { plan.set_target("cuda:sm_42"); }, "cuda:sm_42"},
  };
  for (const Case& c : cases) {
    proto::PlanProto plan = good;
    c.corrupt(plan, *first_data(plan));
    EXPECT_THAT(VerifyPlan(plan), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(c.message)));
  }
}

TEST(TargetTest, RefusesADTypeThatItDoesNotComputeIn) {
  constexpr char kText[] = R"(
module @m {
  state "w": f32[4,4] parameter
}
graph @train stage=forward {
  input %x: f32[4,4] data
  input %w: f32[4,4] parameter
  %0: bf16[4,4] = cast(%x) {to=bf16} "narrow"
  %1: f32[4,4] = cast(%0) {to=f32} "wide"
  %2: f32[4,4] = matmul(%1, %w) "fc"
  %3: f32[] = reduce_sum(%2) {dims=[0,1]} "loss"
  output "loss" %3
}
)";
  EXPECT_THAT(Compile(MustParse(kText), {.target = "cuda:sm_75", .passes = "none"}),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("cuda:sm_75 does not compute in bf16"),
                                                                 HasSubstr("narrow"), HasSubstr("fp16"))));
  EXPECT_OK(Compile(MustParse(kText), {.target = "cuda:sm_80", .passes = "none"}));
}

}  // namespace
}  // namespace mt
