// From a module to a plan, end to end.
#ifndef MT_CODEGEN_COMPILE_H_
#define MT_CODEGEN_COMPILE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "codegen/cuda/code.h"
#include "codegen/memory/buffer_assignment.h"
#include "ir/graph.h"
#include "passes/pass.h"
#include "passes/pass_manager.h"
#include "passes/pipeline.h"
#include "proto/plan.pb.h"

namespace mt {

struct CompileOptions {
  std::string target = "cpu";
  std::string passes = "default";            // Pipeline text.
  std::string optimizer = "adamw";           // Or "adam".
  std::string dump_dir;                      // Empty: no dumps.
  bool device_code = false;                  // A plan for CUDA gets its kernels.
  std::optional<int64_t> memory_bytes;       // The arena and the target's context may not be larger.
  std::map<std::string, std::string> notes;  // Copied into the plan.
};

struct CompileReport {
  Pipeline pipeline;  // What ran.
  std::vector<PassReport> passes;
  std::vector<std::string> warnings;  // Of the passes; one line each.
  PlanTimes times;
  CudaCodeReport cuda;  // Where the plan has device code.
  double passes_seconds = 0, verify_seconds = 0, total_seconds = 0;
  double step_seconds = 0;  // Estimate of a step: each op at the target's roofline, one after the other.
};

// Order, offsets and bytes of a module: PassContext::plan_memory and estimate_memory.
absl::StatusOr<MemoryPlan> PlanMemory(const Module& module, absl::string_view target);
absl::StatusOr<MemoryPlan> EstimateMemory(const Module& module, absl::string_view target);
// PassContext::describe_peak.
absl::StatusOr<PeakText> DescribePeak(const Module& module, absl::string_view target);

// What runs for these options: the passes of the text and those that always run, with the optimizer set. Compile leaves
// out what `default` names and the module has nothing for.
absl::StatusOr<Pipeline> PipelineOf(const CompileOptions& options);

// How many microbatches make up a batch: ModelOptions::microbatches. 1 where the pipeline does not accumulate.
int64_t MicrobatchesOf(const Pipeline& pipeline);

// Runs the pipeline and plans; the plan is not verified. Errors: InvalidArgument (target, pipeline text, contradiction,
// a dtype that the target does not compute in), Internal (our bug).
absl::StatusOr<proto::PlanProto> PassesAndPlan(std::unique_ptr<Module> module, const CompileOptions& options,
                                               CompileReport& report);

// What that plan takes and says, without the plan: for those who plan many.
struct Needs {
  std::string passes;       // Canonical text.
  int64_t needs_bytes = 0;  // Arena and context: NeededBytes.
  int64_t fixed_bytes = 0;  // States and context.
  int64_t instructions = 0;
  double step_seconds = 0;  // CompileReport::step_seconds.
};
// Errors: those of PassesAndPlan.
absl::StatusOr<Needs> PassesAndNeeds(std::unique_ptr<Module> module, const CompileOptions& options);

// The same as PassesAndPlan, with the plan verified, held against memory_bytes and given its device code. Errors: also
// ResourceExhausted (larger than memory_bytes; names both), Unimplemented (no kernel for an instruction). `report` may
// be null.
absl::StatusOr<proto::PlanProto> Compile(std::unique_ptr<Module> module, const CompileOptions& options,
                                         CompileReport* report = nullptr);

// What a plan takes of the device: the arena and the target's context. REQUIRES: a verified plan.
int64_t NeededBytes(const proto::PlanProto& plan);

}  // namespace mt

#endif  // MT_CODEGEN_COMPILE_H_
