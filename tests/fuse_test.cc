// The pass fuse: the same bits as without it, on the cpu backend and over training; regions that a file hands in.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/region.h"
#include "ir/text.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

proto::PlanProto PlanOf(const std::string& model, const std::string& passes, std::vector<std::string> sets,
                        int64_t batch = 2, int64_t sequence = 40) {
  absl::StatusOr<std::unique_ptr<Module>> module =
      LoadModel(model, {.batch = batch, .sequence = sequence, .vocab_size = 40, .sets = std::move(sets)});
  CHECK(module.ok()) << module.status();
  absl::StatusOr<proto::PlanProto> plan = Compile(*std::move(module), {.passes = passes});
  CHECK(plan.ok()) << passes << ": " << plan.status();
  return *std::move(plan);
}

int CountOf(const proto::PlanProto& plan, absl::string_view program, absl::string_view op) {
  int count = 0;
  for (const proto::InstructionProto& instruction : FindProgram(plan, program)->instructions()) {
    count += instruction.op() == op ? 1 : 0;
  }
  return count;
}

struct Trained {
  std::vector<float> losses;
  std::string states;
};

Trained Train(proto::PlanProto plan, int64_t steps, int threads) {
  const auto split = plan.facts().find("microbatches");
  const int64_t microbatches = split == plan.facts().end() ? 1 : split->second;
  absl::StatusOr<std::unique_ptr<LoadedPlan>> loaded = LoadForTest(std::move(plan), threads);
  CHECK(loaded.ok()) << loaded.status();
  (*loaded)->tokens /= microbatches;
  Trained trained;
  for (int64_t step = 0; step < steps; ++step) {
    CHECK_OK((*loaded)->Prepare(step));
    (*loaded)->train->Run();
    trained.losses.push_back(*reinterpret_cast<const float*>((*loaded)->train->FindOutput("loss")->data));
  }
  for (const BoundTensor& state : (*loaded)->executor->states()) {
    trained.states.append(reinterpret_cast<const char*>(state.data), static_cast<size_t>(state.type.byte_size()));
  }
  return trained;
}

const std::vector<std::string> kGpt = {"layers=2", "width=48", "heads=2", "dropout=0.2"};
const std::vector<std::string> kLlama = {"layers=2",     "width=40",        "heads=2",          "kv_heads=1",
                                         "ffn_width=96", "norm=RMS_NORM",   "positions=ROTARY", "activation=SWIGLU",
                                         "dropout=0.1",  "norm_bias=false", "mlp_bias=false"};

// More than one chunk of rows, a last one that is shorter, rows that are no whole number of vectors.
TEST(FuseTest, HundredStepsAreTheSameToTheBit) {
  struct Case {
    std::vector<std::string> sets;
    std::string passes;
  };
  for (const Case& c : {Case{kGpt, "flash"}, Case{kLlama, "flash"}, Case{kGpt, "flash,bf16"},
                        Case{kLlama, "flash,bf16"}, Case{kGpt, "flash,fp16"}}) {
    SCOPED_TRACE(absl::StrCat(c.sets[4 % c.sets.size()], " ", c.passes));
    const Trained without = Train(PlanOf("tiny_char", c.passes, c.sets), 100, 2);
    const proto::PlanProto fused = PlanOf("tiny_char", absl::StrCat(c.passes, ",fuse"), c.sets);
    EXPECT_GE(CountOf(fused, "train", "fused"), 8);
    const Trained with = Train(fused, 100, 3);
    EXPECT_EQ(with.losses, without.losses);
    EXPECT_TRUE(with.states == without.states);
    EXPECT_NE(without.losses.front(), without.losses.back());
  }
}

TEST(FuseTest, IsTheSameToTheBitWithOtherTechniques) {
  for (const char* passes : {"none", "flash,chunked_loss,pad_vocab", "flash,bf16,remat", "flash,remat:free",
                             "flash,accumulate:2", "flash,adamw8bit"}) {
    SCOPED_TRACE(passes);
    const Trained without = Train(PlanOf("tiny_char", passes, kGpt), 4, 2);
    const std::string with = std::string(passes) == "none" ? "fuse" : absl::StrCat(passes, ",fuse");
    const Trained fused = Train(PlanOf("tiny_char", with, kGpt), 4, 2);
    EXPECT_EQ(fused.losses, without.losses);
    EXPECT_TRUE(fused.states == without.states);
  }
}

TEST(FuseTest, FewerInstructionsNoMoreMemory) {
  for (const auto& sets : {kGpt, kLlama}) {
    const proto::PlanProto without = PlanOf("tiny_char", "flash", sets, 4, 128);
    const proto::PlanProto with = PlanOf("tiny_char", "flash,fuse", sets, 4, 128);
    EXPECT_LE(with.arena_bytes(), without.arena_bytes());
    const ProgramSummary before = Summarize(without, *FindProgram(without, "train"));
    const ProgramSummary after = Summarize(with, *FindProgram(with, "train"));
    EXPECT_LT(after.instructions, before.instructions);
    EXPECT_LT(after.bytes, before.bytes);
    for (const char* program : {"train", "eval"}) {
      EXPECT_LE(CountOf(with, program, "layer_norm") + CountOf(with, program, "rms_norm"), 1) << program;
      EXPECT_EQ(CountOf(with, program, "add"), 0) << program;
    }
  }
}

// Regions that come with a file.

TEST(RegionTest, TextIsExact) {
  const std::string text =
      "v0=load(0) v1=row(1) v2=const(0.10000000000000001) v3=uniform(2,4294967295,4) v4=mul(v0,v1) v5=round(bf16,v4) "
      "v6=select(v3,v5,v2) v7=rowsum(v6) -> full(v6,bf16[2,4]) row(v7,f32[2]) columns(v5,f32[4])";
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<const Region> region, ParseRegion(2, 4, text));
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<const Region> again, ParseRegion(2, 4, region->ToString()));
  EXPECT_EQ(again->ToString(), region->ToString());
  EXPECT_THAT(region->ToString(), HasSubstr("v2=const(0.1) v3=uniform(2,4294967295,4)"));
}

TEST(RegionTest, WhatIsWrongIsRefused) {
  struct Case {
    int64_t rows, width;
    std::string text, message;
  };
  std::string many = "v0=load(0)";
  for (int i = 1; i <= 1024; ++i) absl::StrAppend(&many, " v", i, "=neg(v", i - 1, ")");
  const std::vector<Case> cases = {
      {2, 4, "", "no results"},
      {0, 4, "v0=load(0) -> full(v0,f32[])", "both must be at least 1"},
      {int64_t{1} << 40, int64_t{1} << 40, "v0=load(0) -> full(v0,f32[])", "their product at most"},
      {2, 4, "v1=load(0) -> full(v1,f32[2,4])", "expected v0=step(arguments)"},
      {2, 4, "v0=load(0) v1=add(v0,v1) -> full(v1,f32[2,4])", "v1 is read before it is made"},
      {2, 4, "v0=load(0) v1=add(v0,v99999999999) -> full(v1,f32[2,4])", "expected a value such as v0"},
      {2, 4, "v0=load(-1) -> full(v0,f32[2,4])", "expected an operand number below 64"},
      {2, 4, "v0=load(64) -> full(v0,f32[2,4])", "expected an operand number below 64"},
      {2, 4, "v0=load(0) v1=add(v0) -> full(v1,f32[2,4])", "add takes 2 arguments, 1 given"},
      {2, 4, "v0=operand(0) -> full(v0,f32[2,4])", "no step is named \"operand\""},
      {2, 4, "v0=const(nan) -> full(v0,f32[2,4])", "expected a finite number"},
      {2, 4, "v0=load(0) v1=round(i32,v0) -> full(v1,f32[2,4])", "expected a floating point dtype"},
      {2, 4, "v0=uniform(0,4294967296,4) -> full(v0,f32[2,4])", "32-bit"},
      {2, 4, "v0=uniform(0,1,3) -> full(v0,f32[2,4])", "must divide 8"},
      {2, 4, "v0=uniform(0,1,0) -> full(v0,f32[2,4])", "must divide 8"},
      {2, 4, "v0=load(0) -> full(v0,f32[2,5])", "of 8 elements"},
      {2, 4, "v0=load(0) -> full(v0,i32[2,4])", "floating point"},
      {2, 4, "v0=load(0) -> row(v0,f32[2])", "a number for each element, not for each row"},
      {2, 4, "v0=load(0) -> columns(v0,f32[2])", "of 4 elements"},
      {2, 4, "v0=load(0) -> diagonal(v0,f32[2])", "expected full(v0,type)"},
      {2, 4, "v0=load(0) -> full(v0,f32[2,-4])", "full(v0,f32[2,-4])"},
      {2, 4, absl::StrCat(many, " -> full(v0,f32[2,4])"), "more than 1024 steps"},
      {2, 4, std::string(300 << 10, ' '), "characters"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(ParseRegion(c.rows, c.width, c.text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(c.message)))
        << c.text.substr(0, 100);
  }
  ASSERT_OK_AND_ASSIGN(
      const std::shared_ptr<const Region> region,
      ParseRegion(6, 4, "v0=load(0) v1=row(1) v2=uniform(2,1,4) v3=mul(v0,v1) v4=mul(v2,v3) -> full(v4,f32[6,4])"));
  const TensorType x = {DType::kF32, {6, 4}}, row = {DType::kF32, {6}}, rng = {DType::kI32, {4}};
  EXPECT_OK(CheckRegionOperands(*region, {x, row, rng}));
  EXPECT_OK(CheckRegionOperands(*region, {{DType::kBF16, {3, 4}}, {DType::kF32, {}}, rng}));
  EXPECT_THAT(CheckRegionOperands(*region, {x, row}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2 operands")));
  EXPECT_THAT(CheckRegionOperands(*region, {x, row, row}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a random state is i32[4]")));
  EXPECT_THAT(CheckRegionOperands(*region, {{DType::kF32, {4, 4}}, row, rng}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("fewer whole rows of 4")));
  EXPECT_THAT(CheckRegionOperands(*region, {x, {DType::kF32, {3}}, rng}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("6 elements, one a row, or one")));
  EXPECT_THAT(CheckRegionOperands(*region, {rng, row, rng}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("must be floating point")));
}

// A plan whose regions were tampered with is refused with one error, before anything runs.
TEST(RegionTest, CorruptedPlanIsRefused) {
  const proto::PlanProto plan = PlanOf("tiny_char", "flash,fuse", kGpt);
  EXPECT_OK(VerifyPlan(plan));
  struct Case {
    std::string from, to;
  };
  int refused = 0;
  for (const Case& c : {Case{"load(0)", "load(63)"}, Case{"v0=", "v1="}, Case{"->", "- >"}, Case{"full(", "columns("},
                        Case{"f32[",
                             "f32["
                             "7,"}}) {
    proto::PlanProto changed = plan;
    bool found = false;
    for (proto::InstructionProto& instruction : *changed.mutable_programs(0)->mutable_instructions()) {
      if (instruction.op() != "fused" || found) continue;
      for (proto::AttrProto& attr : *instruction.mutable_attrs()) {
        if (attr.name() != "region" || !absl::StrContains(attr.string_value(), c.from)) continue;
        attr.set_string_value(absl::StrReplaceAll(attr.string_value(), {{c.from, c.to}}));
        found = true;
      }
    }
    ASSERT_TRUE(found) << c.from;
    const absl::Status status = VerifyPlan(changed);
    EXPECT_FALSE(status.ok()) << c.from;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("region"), ::testing::Not(HasSubstr("\n"))));
    refused += status.ok() ? 0 : 1;
  }
  EXPECT_EQ(refused, 5);
}

}  // namespace
}  // namespace mt
