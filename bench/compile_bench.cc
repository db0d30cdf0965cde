// How long compiling takes: one JSON line for each model of the zoo and for deep ones, with the seconds of each part
// (best of --repeats), those that the CPU was busy with all of it, and the arena over its lower bound. Without MODEL,
// where NVRTC is, also plans for a GPU with their kernels: compiled (`cold`, once) and out of the cache (`warm`).
//
//   compile_bench [--repeats N] [--passes LIST] [--set NAME=VALUE] [--target TARGET] [MODEL ...]
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "codegen/compile.h"
#include "codegen/plan/nvrtc.h"
#include "codegen/plan/plan.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "models/model.h"

namespace mt {
namespace {

struct Subject {
  std::string spec;
  ModelOptions options;
  std::string passes = "default", target = "cpu";
  std::string kernels;  // "cold" or "warm": with device code.
};

absl::Status Measure(const Subject& subject, int repeats) {
  CompileReport best;
  double cpu_seconds = 0;
  proto::PlanProto plan;
  for (int i = 0; i < repeats; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(subject.spec, subject.options));
    CompileReport report;
    CompileOptions options;
    options.target = subject.target;
    options.passes = subject.passes;
    options.device_code = !subject.kernels.empty();
    const std::clock_t start = std::clock();
    ASSIGN_OR_RETURN(plan, Compile(std::move(module), options, &report));
    const auto lower = [i](double& best, double now) { best = i == 0 ? now : std::min(best, now); };
    lower(best.passes_seconds, report.passes_seconds);
    lower(best.times.schedule_seconds, report.times.schedule_seconds);
    lower(best.times.assign_seconds, report.times.assign_seconds);
    lower(best.times.pack_seconds, report.times.pack_seconds);
    lower(best.verify_seconds, report.verify_seconds);
    lower(best.total_seconds, report.total_seconds);
    lower(cpu_seconds, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  int64_t instructions = 0;
  for (const proto::ProgramProto& program : plan.programs()) instructions += program.instructions_size();
  const auto layers = plan.facts().find("layers");
  const nlohmann::ordered_json json = {
      {"model", subject.spec},
      {"layers", layers == plan.facts().end() ? 0 : layers->second},
      {"target", plan.target()},
      {"kernels", subject.kernels},
      {"modules", plan.cuda().modules_size()},
      {"passes", plan.passes()},
      {"instructions", instructions},
      {"passes_seconds", best.passes_seconds},
      {"schedule_seconds", best.times.schedule_seconds},
      {"assign_seconds", best.times.assign_seconds},
      {"pack_seconds", best.times.pack_seconds},
      {"planning_seconds", best.times.schedule_seconds + best.times.assign_seconds + best.times.pack_seconds},
      {"verify_seconds", best.verify_seconds},
      {"total_seconds", best.total_seconds},
      {"cpu_seconds", cpu_seconds},
      {"arena_bytes", plan.arena_bytes()},
      {"lower_bound_bytes", plan.lower_bound_bytes()},
      {"arena_over_lower_bound",
       static_cast<double>(plan.arena_bytes()) / static_cast<double>(plan.lower_bound_bytes())},
      {"proof", plan.proof()}};
  std::cout << json.dump() << std::endl;
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  int repeats = 3;
  std::string passes = "default", target = "cpu";
  std::vector<std::string> sets;
  std::vector<mt::Subject> subjects;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--repeats" && i + 1 < argc && absl::SimpleAtoi(argv[i + 1], &repeats) && repeats > 0) {
      ++i;
    } else if (argument == "--passes" && i + 1 < argc) {
      passes = argv[++i];
    } else if (argument == "--set" && i + 1 < argc) {
      sets.push_back(argv[++i]);
    } else if (argument == "--target" && i + 1 < argc) {
      target = argv[++i];
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr
          << "usage: compile_bench [--repeats N] [--passes LIST] [--set NAME=VALUE] [--target TARGET] [MODEL ...]\n";
      return 2;
    } else {
      subjects.push_back({argument, {}});
    }
  }
  if (subjects.empty()) {
    for (const std::string& name : mt::ZooModels()) subjects.push_back({name, {}});
    for (const char* layers : {"layers=12", "layers=96"}) {
      mt::Subject deep{"gpt2_124m", {}};
      deep.options.sets = {layers};
      subjects.push_back(deep);
    }
    // Half of what it takes without recomputation.
    mt::Subject budgeted{"gpt2_124m", {}, "flash,remat:budget=24GiB"};
    budgeted.options.sets = {"layers=96"};
    subjects.push_back(budgeted);
    if (mt::CudaCompilerVersion().ok()) {
      budgeted.target = "cuda:sm_90";
      for (const char* kernels : {"cold", "warm"}) {
        subjects.push_back({"gpt2_124m", {}, "default", "cuda:sm_90", kernels});
        budgeted.kernels = kernels;
        subjects.push_back(budgeted);
      }
    }
  }
  // A cache of its own, empty at first.
  const std::string cache =
      (std::filesystem::temp_directory_path() / ("compile_bench-" + std::to_string(getpid()))).string();
  setenv("XDG_CACHE_HOME", cache.c_str(), 1);
  const auto clean = absl::MakeCleanup([&cache] { std::filesystem::remove_all(cache); });
  for (mt::Subject& subject : subjects) {
    if (subject.passes == "default") subject.passes = passes;
    if (subject.target == "cpu") subject.target = target;
    subject.options.sets.insert(subject.options.sets.end(), sets.begin(), sets.end());
    const absl::Status status = mt::Measure(subject, subject.kernels == "cold" ? 1 : repeats);
    if (!status.ok()) {
      std::cerr << subject.spec << ": " << status.message() << "\n";
      return 1;
    }
  }
  return 0;
}
