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
#include "codegen/buffer_assignment.h"
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
  std::optional<int64_t> memory_bytes;       // The arena may not be larger.
  std::map<std::string, std::string> notes;  // Copied into the plan.
};

struct CompileReport {
  std::string pipeline;  // Canonical text.
  std::vector<PassReport> passes;
  std::vector<std::string> warnings;  // Of the passes; one line each.
  PlanTimes times;
  double passes_seconds = 0, verify_seconds = 0, total_seconds = 0;
};

// The bytes per second and FLOP/s that passes weigh with; a constant for each target, so that plans do not depend on
// the machine that compiles. Errors: Unimplemented for a target that does not exist yet.
absl::StatusOr<Roofline> TargetRoofline(absl::string_view target);

// Order, offsets and bytes of a module: PassContext::plan_memory.
absl::StatusOr<MemoryPlan> PlanMemory(const Module& module, absl::string_view target);

// What runs for these options: the passes of the text and those that always run, with the optimizer set.
absl::StatusOr<Pipeline> PipelineOf(const CompileOptions& options);

// Runs the pipeline, plans, verifies the plan. Errors: InvalidArgument (pipeline text, contradiction), Unimplemented
// (target), ResourceExhausted (larger than memory_bytes; names both), Internal (our bug). `report` may be null.
absl::StatusOr<proto::PlanProto> Compile(std::unique_ptr<Module> module, const CompileOptions& options,
                                         CompileReport* report = nullptr);

}  // namespace mt

#endif  // MT_CODEGEN_COMPILE_H_
