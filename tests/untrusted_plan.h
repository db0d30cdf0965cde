// What tools do with a plan from anywhere, once the verifier has accepted it.
#ifndef MT_TESTS_UNTRUSTED_PLAN_H_
#define MT_TESTS_UNTRUSTED_PLAN_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "codegen/plan/plan.h"
#include "ir/base/check.h"
#include "runtime/executor.h"
#include "runtime/train/trainer.h"

namespace mt {

// The reports of mtc inspect and mtrun.
inline void ReportPlan(const proto::PlanProto& plan) {
  PlanText(plan);
  for (const proto::ProgramProto& program : plan.programs()) {
    const ProgramSummary summary = Summarize(plan, program);
    CHECK_EQ(Sum(summary.at_peak), program.lower_bound_bytes());
    LiveBuffers(plan, program, program.peak_instruction());
    for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kOptimizer}) {
      for (const auto& [first, last] : WrittenRanges(plan, program, phase, true)) {
        CHECK(0 <= first && first < last && last <= plan.arena_bytes()) << first << " " << last;
      }
    }
  }
  SummarizeStep(plan);
}

// One run of each program as the trainer feeds it, with each of its buffers in memory of its own where the backend
// computes. False where loader or trainer refuse the plan.
inline bool RunPlan(const proto::PlanProto& plan, std::unique_ptr<Backend> backend) {
  const bool computes = backend->name() != "null";
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Load(plan, std::move(backend), computes ? Placement::kGuard : Placement::kArena);
  if (!executor.ok()) return false;
  const absl::StatusOr<std::unique_ptr<Trainer>> trainer = Trainer::Create(**executor, "");
  if (!trainer.ok()) return false;
  const int64_t vocab = plan.facts().at("vocab_size");
  const int64_t positions = (*trainer)->batch() / (*trainer)->microbatches() * (*trainer)->sequence();
  if (positions > 4096 || vocab > 1 << 20) return false;
  std::vector<int32_t> tokens(static_cast<size_t>(positions)), labels(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<int32_t>(vocab - 1 - static_cast<int64_t>(i * 7) % vocab);
    labels[i] = i % 5 == 3 ? kIgnoredLabel : static_cast<int32_t>(static_cast<int64_t>(i * 5) % vocab);
  }
  (*executor)->InitializeStates(1);
  for (const char* name : {"train", "apply", "eval"}) {
    const Program* program = (*executor)->FindProgram(name);
    if (program == nullptr) continue;
    absl::StatusOr<StepInputs> inputs = StepInputs::Bind(**executor, *program, vocab);
    if (!inputs.ok()) continue;
    inputs->SetBatch(tokens, labels);
    inputs->SetScalars({.seed = 3, .step = 1, .lr = 1e-3});
    program->RunRange(0, program->proto().instructions_size());
    (*executor)->backend().Synchronize();
    if (computes) CHECK_EQ((*executor)->backend().DamagedGuard(), -1) << "program " << name;
  }
  return true;
}

// All of it; plans of large arenas are not computed. True where it was.
inline bool UsePlan(const proto::PlanProto& plan) {
  ReportPlan(plan);
  RunPlan(plan, MakeNullBackend());
  if (plan.arena_bytes() > int64_t{4} << 20) return false;
  absl::StatusOr<std::unique_ptr<Backend>> cpu = MakeCpuBackend(1);
  CHECK(cpu.ok()) << cpu.status();
  return RunPlan(plan, *std::move(cpu));
}

}  // namespace mt

#endif  // MT_TESTS_UNTRUSTED_PLAN_H_
