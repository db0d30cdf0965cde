#include "codegen/compile.h"

#include <chrono>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/cuda_code.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/report/peak.h"
#include "ir/base/check.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/cost.h"
#include "ir/target.h"
#include "passes/pipeline.h"

namespace mt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

absl::StatusOr<MemoryPlan> MemoryOf(const Module& module, const PlanOptions& options) {
  ASSIGN_OR_RETURN(const ArenaSize size, SizeArena(module, options));
  return MemoryPlan{.arena_bytes = size.arena_bytes,
                    .lower_bound_bytes = size.lower_bound_bytes,
                    .persistent_bytes = size.persistent_bytes};
}

PlanOptions WithoutSearches(absl::string_view target) {
  PlanOptions options{.target = std::string(target)};
  options.pack.search_limit = 0;
  return options;
}

}  // namespace

absl::StatusOr<MemoryPlan> PlanMemory(const Module& module, absl::string_view target) {
  return MemoryOf(module, {.target = std::string(target)});
}

absl::StatusOr<MemoryPlan> EstimateMemory(const Module& module, absl::string_view target) {
  return MemoryOf(module, WithoutSearches(target));
}

absl::StatusOr<PeakText> DescribePeak(const Module& module, absl::string_view target) {
  // What is live at the peak hangs on the order alone.
  ASSIGN_OR_RETURN(const proto::PlanProto plan, PlanModule(module, WithoutSearches(target)));
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.peak_bytes() != plan.arena_bytes() || program.instructions().empty()) continue;
    return PeakText{.node = program.instructions(program.peak_instruction()).name(),
                    .live = LargestText(PeakOf(plan, program), 3)};
  }
  return PeakText{};
}

absl::StatusOr<Pipeline> PipelineOf(const CompileOptions& options) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(options.target));
  ASSIGN_OR_RETURN(Pipeline pipeline, ParsePipeline(options.passes, target.ToString()));
  RETURN_IF_ERROR(pipeline.SetOption("optimizer", "kind", options.optimizer));
  return pipeline;
}

int64_t MicrobatchesOf(const Pipeline& pipeline) {
  for (const PipelineStep& step : pipeline.steps) {
    if (step.pass == &kAccumulatePass) return step.options.Int("microbatches");
  }
  return 1;
}

namespace {

// Nothing may be of a dtype that the target's kernels do not compute in.
absl::Status CheckDTypes(const Module& module, const Target& target) {
  const auto check = [&](const TensorType& type, absl::string_view what) {
    if (target.Computes(type.dtype)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("target ", target.ToString(), " does not compute in ",
                                                   DTypeName(type.dtype), ", the dtype of ", what,
                                                   "; use fp16 instead of bf16 in --passes"));
  };
  for (const State& state : module.states()) RETURN_IF_ERROR(check(state.type, absl::StrCat("state ", state.name)));
  for (const auto& graph : module.graphs()) {
    for (const Node* node : graph->Nodes()) {
      for (const TensorType& type : node->result_types()) {
        RETURN_IF_ERROR(check(type, absl::StrCat("node \"", node->name(), "\" of graph @", graph->name())));
      }
    }
  }
  return absl::OkStatus();
}

// A step of the optimizer: its microbatches, then the update where that is a graph of its own.
double StepSeconds(const Module& module, const Roofline& roofline, int64_t microbatches) {
  double seconds = 0;
  if (const Graph* train = module.FindGraph("train")) {
    seconds += static_cast<double>(microbatches) * GraphSeconds(*train, roofline);
  }
  if (const Graph* apply = module.FindGraph("apply")) seconds += GraphSeconds(*apply, roofline);
  return seconds;
}

// Runs the pipeline, with what it says of the passes where `describe`. Sets what `report` has to say of it.
absl::Status RunPasses(Module& module, const CompileOptions& options, const Target& target, bool describe,
                       CompileReport& report) {
  const std::string target_text = target.ToString();
  PassContext context;
  context.roofline = TargetRoofline(target);
  context.target = target_text;
  context.dump_dir = options.dump_dir;
  context.plan_memory = [&](const Module& m) { return PlanMemory(m, target_text); };
  context.estimate_memory = [&](const Module& m) { return EstimateMemory(m, target_text); };
  context.describe_peak = [&](const Module& m) { return DescribePeak(m, target_text); };
  ASSIGN_OR_RETURN(report.pipeline, PipelineOf(options));
  report.pipeline.KeepWhatApplies(module);
  RETURN_IF_ERROR(RunPipeline(module, report.pipeline, context, describe ? &report.passes : nullptr));
  report.warnings = context.warnings;
  RETURN_IF_ERROR(CheckDTypes(module, target));
  report.step_seconds = StepSeconds(module, context.roofline, MicrobatchesOf(report.pipeline));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Needs> PassesAndNeeds(std::unique_ptr<Module> module, const CompileOptions& options) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(options.target));
  CompileReport report;
  RETURN_IF_ERROR(RunPasses(*module, options, target, /*describe=*/false, report));
  ASSIGN_OR_RETURN(const ArenaSize size, SizeArena(*module, {.target = target.ToString()}));
  return Needs{.passes = report.pipeline.ToString(),
               .needs_bytes = size.arena_bytes + ContextBytes(target),
               .fixed_bytes = size.persistent_bytes + ContextBytes(target),
               .instructions = size.instructions,
               .step_seconds = report.step_seconds};
}

absl::StatusOr<proto::PlanProto> PassesAndPlan(std::unique_ptr<Module> module, const CompileOptions& options,
                                               CompileReport& report) {
  const Clock::time_point start = Clock::now();
  ASSIGN_OR_RETURN(const Target target, ParseTarget(options.target));
  RETURN_IF_ERROR(RunPasses(*module, options, target, /*describe=*/true, report));
  report.passes_seconds = SecondsSince(start);

  PlanOptions plan_options;
  plan_options.target = target.ToString();
  ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(*module, plan_options, &report.times));
  for (const auto& graph : module->graphs()) {
    const bool there = absl::c_any_of(plan.programs(), [&](const auto& p) { return p.name() == graph->name(); });
    if (there) continue;
    report.warnings.push_back(absl::StrCat("program ", graph->name(),
                                           " is left out: with its caches it would take more ",
                                           "memory than training does; compile with a smaller --seq to have it"));
  }
  plan.set_passes(report.pipeline.ToString());
  plan.set_compiler(absl::StrCat("mtc ", Version()));
  for (const auto& [name, note] : options.notes) (*plan.mutable_notes())[name] = note;
  report.total_seconds = SecondsSince(start);
  return plan;
}

absl::StatusOr<proto::PlanProto> Compile(std::unique_ptr<Module> module, const CompileOptions& options,
                                         CompileReport* report) {
  CompileReport unused;
  if (report == nullptr) report = &unused;
  ASSIGN_OR_RETURN(proto::PlanProto plan, PassesAndPlan(std::move(module), options, *report));
  const Clock::time_point start = Clock::now();
  const absl::Status verified = VerifyPlan(plan);
  if (!verified.ok()) {
    return absl::InternalError(absl::StrCat("the plan of ", plan.model(), " does not hold: ", verified.message()));
  }
  report->verify_seconds = SecondsSince(start);
  report->total_seconds += report->verify_seconds;
  plan.set_compile_seconds(report->total_seconds);
  const int64_t needs = NeededBytes(plan);
  if (options.memory_bytes && needs > *options.memory_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the plan of ", plan.model(), " needs ", FormatBytes(needs), " (", needs, " bytes), --memory allows ",
        FormatBytes(*options.memory_bytes), " (", *options.memory_bytes, " bytes); reduce --batch or --seq"));
  }
  if (options.device_code && ParseTarget(plan.target())->is_cuda()) {
    RETURN_IF_ERROR(AddCudaCode(plan, options.dump_dir, &report->cuda));
    const absl::Status code = VerifyCudaCode(plan);
    if (!code.ok()) {
      return absl::InternalError(absl::StrCat("the device code of ", plan.model(), " does not hold: ", code.message()));
    }
    if (!report->cuda.warning.empty()) report->warnings.push_back(report->cuda.warning);
    report->total_seconds += report->cuda.emit_seconds + report->cuda.compile_seconds;
    plan.set_compile_seconds(report->total_seconds);
  }
  return plan;
}

int64_t NeededBytes(const proto::PlanProto& plan) {
  const absl::StatusOr<Target> target = ParseTarget(plan.target());
  CHECK(target.ok()) << target.status();
  return plan.arena_bytes() + ContextBytes(*target);
}

}  // namespace mt
