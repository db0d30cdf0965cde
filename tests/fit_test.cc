#include "codegen/fit.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/choose.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/report/peak.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "passes/registry.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

Job SmallJob(const std::string& passes, const std::string& target = "cpu") {
  Job job{.spec = "tiny_char"};
  job.model.sets = {"layers=1", "width=32", "heads=2", "ffn_width=64", "vocab_size=50", "max_sequence=16"};
  job.options.passes = passes;
  job.options.target = target;
  return job;
}

int64_t NeedsAt(Job job, int64_t batch, int64_t sequence) {
  job.model.batch = batch;
  job.model.sequence = sequence;
  if (sequence > 16) job.model.sets.push_back(absl::StrCat("max_sequence=", sequence));
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModule(job);
  CHECK(module.ok()) << module.status();
  CompileReport report;
  const absl::StatusOr<proto::PlanProto> plan = PassesAndPlan(*std::move(module), job.options, report);
  CHECK(plan.ok()) << plan.status();
  return NeededBytes(*plan);
}

// Planning every size from 1 on: what each takes.
std::vector<int64_t> NeedsFromOne(const Job& job, FitAxis axis, int64_t fixed, int64_t last) {
  std::vector<int64_t> needs = {0};
  for (int64_t size = 1; size <= last; ++size) {
    needs.push_back(axis == FitAxis::kBatch ? NeedsAt(job, size, fixed) : NeedsAt(job, fixed, size));
  }
  return needs;
}

// The largest size such that it and all smaller ones take at most this much.
int64_t BruteForce(const std::vector<int64_t>& needs, int64_t memory_bytes) {
  int64_t size = 1;
  while (size < static_cast<int64_t>(needs.size()) && needs[static_cast<size_t>(size)] <= memory_bytes) ++size;
  CHECK(size < static_cast<int64_t>(needs.size())) << "not enough sizes";
  return size - 1;
}

TEST(FitTest, IsWhatPlanningEveryBatchGives) {
  for (const std::string& passes : FitPipelines(SmallJob("default"))) {
    Job job = SmallJob(passes);
    job.model.sequence = 16;
    if (FitLargest(job, FitAxis::kBatch, 1).status().code() == absl::StatusCode::kInvalidArgument) continue;
    const std::vector<int64_t> needs = NeedsFromOne(job, FitAxis::kBatch, 16, 40);
    for (const size_t batch : {3, 35}) {
      for (const int64_t memory : {needs[batch], needs[batch] - 1}) {
        ASSERT_OK_AND_ASSIGN(const FitResult fit, FitLargest(job, FitAxis::kBatch, memory));
        EXPECT_EQ(fit.largest, BruteForce(needs, memory)) << passes;
        EXPECT_EQ(fit.needs_bytes, needs[static_cast<size_t>(fit.largest)]) << passes;
        EXPECT_EQ(fit.next, fit.largest + 1);
        EXPECT_EQ(fit.next_needs_bytes, needs[static_cast<size_t>(fit.next)]) << passes;
        EXPECT_EQ(fit.short_bytes, fit.next_needs_bytes - memory);
        EXPECT_GT(fit.short_bytes, 0);
        EXPECT_EQ(fit.planned.at(fit.largest), fit.needs_bytes);
        EXPECT_EQ(fit.planned.count(fit.largest - 1), 1u) << "the sizes below were not looked at";
      }
    }
  }
}

TEST(FitTest, IsWhatPlanningEverySequenceGives) {
  for (const std::string passes : {"none", "flash"}) {
    Job job = SmallJob(passes);
    job.model.batch = 2;
    const std::vector<int64_t> needs = NeedsFromOne(job, FitAxis::kSequence, 2, 45);
    ASSERT_OK_AND_ASSIGN(const FitResult fit, FitLargest(job, FitAxis::kSequence, needs[37]));
    EXPECT_EQ(fit.largest, BruteForce(needs, needs[37])) << passes;
    EXPECT_GE(fit.largest, 37);
  }
}

TEST(FitTest, CountsTheContextOfTheTarget) {
  const Job job = SmallJob("none", "cuda:sm_80");
  const int64_t context = ContextBytes(*ParseTarget("cuda:sm_80"));
  ASSERT_GT(context, 0);
  const int64_t memory = NeedsAt(job, 9, 16);
  EXPECT_GT(memory, context);
  ASSERT_OK_AND_ASSIGN(const FitResult fit, FitLargest(job, FitAxis::kBatch, memory));
  EXPECT_GE(fit.largest, 9);
  EXPECT_EQ(fit.largest, BruteForce(NeedsFromOne(job, FitAxis::kBatch, 16, 12), memory));
}

TEST(FitTest, NothingFits) {
  ASSERT_OK_AND_ASSIGN(const FitResult fit, FitLargest(SmallJob("none"), FitAxis::kBatch, 1000));
  EXPECT_EQ(fit.largest, 0);
  EXPECT_EQ(fit.needs_bytes, 0);
  EXPECT_EQ(fit.next, 1);
  EXPECT_EQ(fit.next_needs_bytes, NeedsAt(SmallJob("none"), 1, 16));
  EXPECT_EQ(fit.short_bytes, fit.next_needs_bytes - 1000);
}

TEST(FitTest, Errors) {
  Job raw = SmallJob("none");
  raw.spec = "parallel_block";
  raw.model.sets.clear();
  EXPECT_THAT(FitLargest(raw, FitAxis::kBatch, 1 << 30),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("raw graph")));
  EXPECT_THAT(FitLargest(SmallJob("no_such_pass"), FitAxis::kBatch, 1 << 30),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no_such_pass")));
}

TEST(ChooseTest, WithPass) {
  EXPECT_EQ(WithPass("default", "remat"), "+remat");
  EXPECT_EQ(WithPass("none", "remat"), "remat");
  EXPECT_EQ(WithPass("bf16,flash", "remat:free"), "bf16,flash,remat:free");
  EXPECT_EQ(WithPass("bf16,remat:free", "remat"), "bf16,remat");
  EXPECT_EQ(WithPass("+bf16,-flash", "remat"), "+bf16,-flash,+remat");
  EXPECT_EQ(WithPass("default,+chunked-loss:chunks=4", "chunked_loss"), "+chunked_loss");
  EXPECT_EQ(WithPass("none,+flash", "remat"), "flash,remat");
}

// Long enough that attention and the loss are what counts.
Job LongJob(const std::string& passes) {
  Job job{.spec = "tiny_char"};
  job.model.sets = {"layers=2", "width=128", "heads=2", "ffn_width=256", "vocab_size=50", "max_sequence=1024"};
  job.options.passes = passes;
  job.model.batch = 8;
  return job;
}

absl::StatusOr<std::pair<proto::PlanProto, double>> PlanOf(const Job& job) {
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
  CompileReport report;
  ASSIGN_OR_RETURN(proto::PlanProto plan, Compile(std::move(module), job.options, &report));
  return std::make_pair(std::move(plan), report.step_seconds);
}

TEST(ChooseTest, TakesTheFastestThatFits) {
  Job job = LongJob("none");
  ASSERT_OK_AND_ASSIGN(const auto planned, PlanOf(job));
  const int64_t needs = NeededBytes(planned.first);
  // What fits as it is stays as it is.
  ASSERT_OK_AND_ASSIGN(const Choice as_is, ChoosePasses(job, needs));
  ASSERT_EQ(as_is.chosen, 0);
  EXPECT_EQ(as_is.candidates[0].pipeline, "none");

  ASSERT_OK_AND_ASSIGN(const Choice choice, ChoosePasses(job, needs - 1));
  ASSERT_GE(choice.chosen, 0);
  const Candidate& chosen = choice.candidates[static_cast<size_t>(choice.chosen)];
  EXPECT_LT(chosen.needs_bytes, needs);
  for (const Candidate& other : choice.candidates) {
    if (other.needs_bytes >= needs) continue;
    EXPECT_LE(chosen.step_seconds, other.step_seconds) << other.pipeline;
  }
  // What it says is what a plan of these passes takes.
  job.options.passes = chosen.passes;
  ASSERT_OK_AND_ASSIGN(const auto again, PlanOf(job));
  EXPECT_EQ(NeededBytes(again.first), chosen.needs_bytes);
  EXPECT_EQ(again.first.passes(), chosen.pipeline);
  EXPECT_EQ(again.second, chosen.step_seconds);
  const std::string table = FormatChoice(choice, "cpu", needs - 1);
  EXPECT_THAT(table, AllOf(HasSubstr("\n> "), HasSubstr(absl::StrCat("  ", chosen.pipeline, "\n"))));

  ASSERT_OK_AND_ASSIGN(const Choice none, ChoosePasses(job, 1000));
  EXPECT_EQ(none.chosen, -1);
}

TEST(ChooseTest, RefusalSaysWhatIsLiveAndWhatWouldFit) {
  const Job job = LongJob("none");
  ASSERT_OK_AND_ASSIGN(const auto planned, PlanOf(job));
  const auto& [plan, seconds] = planned;
  const int64_t memory = plan.arena_bytes() * 3 / 4;
  const absl::Status refusal = DoesNotFit(job, plan, seconds, memory, "--memory allows");
  EXPECT_EQ(refusal.code(), absl::StatusCode::kResourceExhausted);
  const std::vector<std::string> lines = absl::StrSplit(refusal.message(), '\n');
  ASSERT_GE(lines.size(), 6u) << refusal;
  const Peak peak = PeakOf(plan, LargestProgram(plan));
  EXPECT_EQ(lines[0], "plan does not fit");
  EXPECT_EQ(lines[1], absl::StrCat("  needs ", FormatBytes(plan.arena_bytes()), " at batch 8; --memory allows ",
                                   FormatBytes(memory), ": ", FormatBytes(plan.arena_bytes() - memory), " short"));
  EXPECT_THAT(lines[2], AllOf(StartsWith(absl::StrCat("  peak at train ", peak.name, ": parameters ")),
                              HasSubstr(" | optimizer_state "), HasSubstr(" | activations ")));
  EXPECT_THAT(lines[3], AllOf(StartsWith("  largest live: "), HasSubstr("f32[8,2,1024,1024] 64.0 MiB x 2")));
  EXPECT_EQ(lines[4], "  what would fit (each one planned just now):");
  // Each line is true: typed, it fits, and takes what the line says.
  bool has_batch = false, has_passes = false;
  for (size_t i = 5; i < lines.size(); ++i) {
    const std::vector<std::string> words = absl::StrSplit(lines[i], ' ', absl::SkipEmpty());
    ASSERT_GE(words.size(), 3u) << lines[i];
    Job fixed = job;
    absl::string_view flag = words[0];
    if (absl::ConsumePrefix(&flag, "--batch=")) {
      has_batch = true;
      int64_t batch = 0;
      ASSERT_TRUE(absl::SimpleAtoi(flag, &batch)) << lines[i];
      fixed.model.batch = batch;
    } else {
      ASSERT_TRUE(absl::ConsumePrefix(&flag, "--passes=")) << lines[i];
      has_passes = true;
      fixed.options.passes = std::string(flag);
      EXPECT_THAT(lines[i], HasSubstr("% (estimate)"));
    }
    ASSERT_OK_AND_ASSIGN(const auto fits, PlanOf(fixed));
    EXPECT_LE(NeededBytes(fits.first), memory) << lines[i];
    EXPECT_THAT(lines[i], HasSubstr(FormatBytes(NeededBytes(fits.first))));
  }
  EXPECT_TRUE(has_batch && has_passes) << refusal;
  // Nothing helps: it says so.
  EXPECT_THAT(DoesNotFit(job, plan, seconds, 1000, "this machine has").message(),
              AllOf(HasSubstr("this machine has 1000 B"), HasSubstr("nothing that was tried fits; the smallest: ")));
}

TEST(PeakTest, SumsToTheLowerBound) {
  for (const std::string target : {"cpu", "cuda"}) {
    Job job = LongJob("none");
    job.options.target = target;
    ASSERT_OK_AND_ASSIGN(const auto planned, PlanOf(job));
    const proto::PlanProto& plan = planned.first;
    for (const proto::ProgramProto& program : plan.programs()) {
      const Peak peak = PeakOf(plan, program);
      EXPECT_EQ(peak.live_bytes, program.lower_bound_bytes()) << program.name();
      EXPECT_EQ(Sum(peak.by_class), peak.live_bytes);
      int64_t sum = 0, before = peak.live_bytes;
      for (const LiveTensor& tensor : peak.tensors) {
        EXPECT_LE(tensor.bytes, before);
        before = tensor.bytes;
        sum += tensor.bytes;
      }
      EXPECT_EQ(sum, peak.live_bytes);
      EXPECT_EQ(Sum(peak.by_class), Sum(Summarize(plan, program).at_peak));
    }
  }
}

TEST(PeakTest, TensorsAlikeAreOne) {
  const Job job = LongJob("none");
  ASSERT_OK_AND_ASSIGN(const auto planned, PlanOf(job));
  const Peak peak = PeakOf(planned.first, LargestProgram(planned.first));
  bool found = false;
  for (const LiveTensor& tensor : peak.tensors) {
    if (tensor.name != "adamw.m.h*.mlp.up.weight" && tensor.name != "adam.m.h*.mlp.up.weight") continue;
    found = true;
    EXPECT_EQ(tensor.count(), 2);
    EXPECT_EQ(tensor.type, "f32[128,256]");
    EXPECT_EQ(tensor.bytes, 2 * 128 * 256 * 4);
  }
  std::string names;
  for (const LiveTensor& tensor : peak.tensors) absl::StrAppend(&names, tensor.name, " ", tensor.type, "\n");
  EXPECT_TRUE(found) << names;
}

}  // namespace
}  // namespace mt
