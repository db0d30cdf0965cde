// Whether every model of the zoo compiles for every GPU: each plan's kernels go through NVRTC, no GPU is needed. Of
// each plan the arena, the kernels, what the largest block takes of the shared memory there is, the most registers and
// the spilled bytes of a thread, and the seconds it took. Ends with 1 where a plan does not compile or does not fit.
//
//   targets_bench [--json] [--passes=LIST] [MODEL ...] [cuda:sm_N ...]       default: all of the zoo, all targets
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/compile.h"
#include "codegen/plan/cubin.h"
#include "codegen/plan/nvrtc.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "models/model.h"

namespace mt {
namespace {

// What a block may have, opted into (CUDA C++ Programming Guide, table of technical specifications).
int64_t SharedLimit(int sm) {
  switch (sm) {
    case 75:
      return int64_t{64} << 10;
    case 80:
      return int64_t{163} << 10;
    case 86:
    case 89:
    case 120:
      return int64_t{99} << 10;
    default:  // 90, 100
      return int64_t{227} << 10;
  }
}

struct Row {
  std::string model, target, passes;
  int64_t arena_bytes = 0, modules = 0, launches = 0, matmuls = 0;
  int64_t shared_bytes = 0, registers = 0, stack_bytes = 0;
  std::string largest, spills;  // The functions that these are of.
  double seconds = 0;
};

absl::StatusOr<Row> Compiled(const std::string& model, const Target& target, const std::string& passes) {
  Row row = {.model = model, .target = target.ToString()};
  CompileOptions options;
  options.target = row.target;
  options.passes = passes;
  options.device_code = true;
  CompileReport report;
  ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(options));
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(model, {.microbatches = MicrobatchesOf(pipeline)}));
  ASSIGN_OR_RETURN(const proto::PlanProto plan, Compile(std::move(module), options, &report));
  row.passes = plan.passes();
  row.arena_bytes = plan.arena_bytes();
  row.modules = report.cuda.modules;
  row.launches = report.cuda.launches;
  row.matmuls = report.cuda.matmuls;
  row.seconds = report.cuda.compile_seconds;
  // Static shared memory of each function, then with what its launches add.
  std::map<std::pair<int, std::string>, int64_t> shared;
  for (int m = 0; m < plan.cuda().modules_size(); ++m) {
    ASSIGN_OR_RETURN(const std::vector<CubinFunction> functions, CubinFunctions(plan.cuda().modules(m).cubin()));
    for (const CubinFunction& f : functions) {
      shared[{m, f.name}] = f.shared_bytes;
      row.registers = std::max(row.registers, f.registers);
      if (f.stack_bytes > row.stack_bytes) {
        row.stack_bytes = f.stack_bytes;
        row.spills = f.name;
      }
    }
  }
  for (const proto::CudaProgramProto& program : plan.cuda().programs()) {
    for (const proto::CudaInstructionProto& instruction : program.instructions()) {
      for (const proto::CudaStepProto& step : instruction.steps()) {
        if (!step.has_launch()) continue;
        const proto::CudaLaunchProto& launch = step.launch();
        const int64_t bytes = shared[{launch.module(), launch.function()}] + launch.shared_bytes();
        if (bytes <= row.shared_bytes) continue;
        row.shared_bytes = bytes;
        row.largest = launch.function();
      }
    }
  }
  return row;
}

int Main(int argc, char** argv) {
  std::vector<std::string> models, targets;
  std::string passes = "default";
  bool json = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json") {
      json = true;
    } else if (absl::StartsWith(argument, "--passes=")) {
      passes = argument.substr(argument.find('=') + 1);
    } else {
      (absl::StartsWith(argument, "cuda") ? targets : models).push_back(argument);
    }
  }
  const absl::StatusOr<std::string> compiler = CudaCompilerVersion();
  if (!compiler.ok()) {
    std::cerr << "error: " << compiler.status().message() << "\n";
    return 4;
  }
  if (models.empty()) models = ZooModels();
  if (targets.empty()) {
    for (const int sm : {75, 80, 86, 89, 90, 100, 120}) targets.push_back(absl::StrCat("cuda:sm_", sm));
  }
  if (!json) {
    std::cout << *compiler << "; passes: " << passes << "; shared: of the largest block, static and dynamic\n";
    std::cout << absl::StrFormat("%-15s %-12s %11s %7s %8s %7s %10s %10s %5s %6s %7s  %s\n", "model", "target", "arena",
                                 "modules", "launches", "matmuls", "shared", "limit", "regs", "stack", "seconds",
                                 "largest block, largest stack");
  }
  int failures = 0;
  for (const std::string& model : models) {
    for (const std::string& text : targets) {
      const absl::StatusOr<Target> target = ParseTarget(text);
      const absl::StatusOr<Row> row =
          target.ok() ? Compiled(model, *target, passes) : absl::StatusOr<Row>(target.status());
      if (!row.ok()) {
        ++failures;
        std::cout << (json
                          ? nlohmann::json{{"model", model}, {"target", text}, {"error", row.status().message()}}.dump()
                          : absl::StrFormat("%-15s %-12s FAILS: %s", model, text, row.status().message()))
                  << std::endl;
        continue;
      }
      const int64_t limit = SharedLimit(target->sm);
      if (row->shared_bytes > limit) ++failures;
      if (json) {
        std::cout << nlohmann::ordered_json{{"model", model},
                                            {"target", row->target},
                                            {"passes", row->passes},
                                            {"compiler", *compiler},
                                            {"arena_bytes", row->arena_bytes},
                                            {"modules", row->modules},
                                            {"launches", row->launches},
                                            {"matmuls", row->matmuls},
                                            {"shared_bytes", row->shared_bytes},
                                            {"shared_limit_bytes", limit},
                                            {"registers", row->registers},
                                            {"stack_bytes", row->stack_bytes},
                                            {"compile_seconds", row->seconds}}
                         .dump()
                  << std::endl;
        continue;
      }
      std::cout << absl::StrFormat("%-15s %-12s %11s %7d %8d %7d %10s %10s %5d %6d %7.1f  %s%s%s\n", model, row->target,
                                   FormatBytes(row->arena_bytes), row->modules, row->launches, row->matmuls,
                                   FormatBytes(row->shared_bytes), FormatBytes(limit), row->registers, row->stack_bytes,
                                   row->seconds, row->largest,
                                   row->stack_bytes > 0 ? absl::StrCat(", ", row->spills) : "",
                                   row->shared_bytes > limit ? " DOES NOT FIT" : "")
                << std::flush;
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) { return mt::Main(argc, argv); }
