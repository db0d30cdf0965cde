#include "codegen/compile.h"

#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "passes/pipeline.h"

namespace mt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

absl::StatusOr<Roofline> TargetRoofline(absl::string_view target) {
  // Two cores of a current server CPU.
  if (target == "cpu") return Roofline{.matmul_flops_per_second = 2e11, .bytes_per_second = 2e10};
  if (target == "cuda" || absl::StartsWith(target, "cuda:")) {
    return absl::UnimplementedError(absl::StrCat("target ", target, " does not exist yet; use --target cpu"));
  }
  return absl::InvalidArgumentError(absl::StrCat("target ", target, " is not known; use --target cpu"));
}

absl::StatusOr<MemoryPlan> PlanMemory(const Module& module, absl::string_view target) {
  PlanOptions options;
  options.target = std::string(target);
  ASSIGN_OR_RETURN(const proto::PlanProto plan, PlanModule(module, options));
  MemoryPlan memory;
  memory.arena_bytes = plan.arena_bytes();
  memory.lower_bound_bytes = plan.lower_bound_bytes();
  memory.persistent_bytes = plan.persistent_bytes();
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.peak_bytes() != plan.arena_bytes() || program.instructions().empty()) continue;
    memory.peak_node = program.instructions(program.peak_instruction()).name();
    break;
  }
  return memory;
}

absl::StatusOr<Pipeline> PipelineOf(const CompileOptions& options) {
  ASSIGN_OR_RETURN(Pipeline pipeline, ParsePipeline(options.passes, options.target));
  RETURN_IF_ERROR(pipeline.SetOption("optimizer", "kind", options.optimizer));
  return pipeline;
}

absl::StatusOr<proto::PlanProto> Compile(std::unique_ptr<Module> module, const CompileOptions& options,
                                         CompileReport* report) {
  CompileReport unused;
  if (report == nullptr) report = &unused;
  const Clock::time_point start = Clock::now();

  PassContext context;
  ASSIGN_OR_RETURN(context.roofline, TargetRoofline(options.target));
  context.target = options.target;
  context.dump_dir = options.dump_dir;
  context.plan_memory = [&](const Module& m) { return PlanMemory(m, options.target); };
  ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(options));
  report->pipeline = pipeline.ToString();
  RETURN_IF_ERROR(RunPipeline(*module, pipeline, context, &report->passes));
  report->warnings = context.warnings;
  report->passes_seconds = SecondsSince(start);

  PlanOptions plan_options;
  plan_options.target = options.target;
  ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(*module, plan_options, &report->times));
  plan.set_passes(report->pipeline);
  plan.set_compiler(absl::StrCat("mtc ", Version()));
  for (const auto& [name, note] : options.notes) (*plan.mutable_notes())[name] = note;

  const Clock::time_point verify_start = Clock::now();
  const absl::Status verified = VerifyPlan(plan);
  if (!verified.ok()) {
    return absl::InternalError(absl::StrCat("the plan of ", plan.model(), " does not hold: ", verified.message()));
  }
  report->verify_seconds = SecondsSince(verify_start);
  report->total_seconds = SecondsSince(start);
  plan.set_compile_seconds(report->total_seconds);
  if (options.memory_bytes && plan.arena_bytes() > *options.memory_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("the plan of ", plan.model(), " needs ",
                                                     FormatBytes(plan.arena_bytes()), " (", plan.arena_bytes(),
                                                     " bytes), --memory allows ", FormatBytes(*options.memory_bytes),
                                                     " (", *options.memory_bytes, " bytes); reduce --batch or --seq"));
  }
  return plan;
}

}  // namespace mt
