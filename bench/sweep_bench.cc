// How much of an arena is fragmentation: one JSON line for each model, pipeline and target with the arena over its
// lower bound (the most bytes live at once) and the kind of proof, and a last line that sums up. Nothing is run.
//
//   sweep_bench [--target T]... [--passes LIST]... [MODEL ...]     default: the zoo, nine pipelines, cpu and cuda
//
// A pipeline that names a pass for which a model has nothing is left out, with the reason in its line.
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "codegen/compile.h"
#include "codegen/fit.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "models/model.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

struct Totals {
  int64_t pairs = 0, exact = 0, within_a_thousandth = 0, left_out = 0;
  double worst = 1;
  std::string worst_pair;
};

absl::StatusOr<Json> PlanPair(const std::string& model, const std::string& target, const std::string& passes) {
  Job job{.spec = model};
  job.options.target = target;
  job.options.passes = passes;
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
  CompileReport report;
  ASSIGN_OR_RETURN(const proto::PlanProto plan, PassesAndPlan(std::move(module), job.options, report));
  int64_t buffers = 0, recomputed = 0;
  for (const proto::BufferProto& buffer : plan.buffers()) buffers += buffer.program() >= 0 ? 1 : 0;
  for (const proto::ProgramProto& program : plan.programs()) {
    for (const proto::InstructionProto& instruction : program.instructions()) recomputed += instruction.recompute();
  }
  return Json{
      {"passes", plan.passes()},
      {"buffers", buffers},
      {"recomputed_ops", recomputed},
      {"arena_bytes", plan.arena_bytes()},
      {"lower_bound_bytes", plan.lower_bound_bytes()},
      {"over_lower_bound", static_cast<double>(plan.arena_bytes()) / static_cast<double>(plan.lower_bound_bytes())},
      {"proof", plan.proof()},
      {"pack_seconds", report.times.pack_seconds}};
}

// Errors: those that are no answer.
absl::Status Measure(const std::string& model, const std::string& target, const std::string& passes, Totals& totals) {
  Json line = {{"model", model}, {"target", target}, {"asked", passes}};
  const absl::StatusOr<Json> planned = PlanPair(model, target, passes);
  if (planned.ok()) {
    line.update(*planned);
    const double ratio = line["over_lower_bound"];
    ++totals.pairs;
    totals.exact += line["arena_bytes"] == line["lower_bound_bytes"];
    totals.within_a_thousandth += ratio <= 1.001;
    if (ratio > totals.worst) {
      totals.worst = ratio;
      totals.worst_pair = model + " " + target + " " + passes;
    }
  } else if (planned.status().code() == absl::StatusCode::kInvalidArgument) {
    line["left_out"] = std::string(planned.status().message());
    ++totals.left_out;
  } else {
    return planned.status();
  }
  std::cout << line.dump() << std::endl;
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  std::vector<std::string> targets, pipelines, models;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--target" && has_value) {
      targets.emplace_back(argv[++i]);
    } else if (argument == "--passes" && has_value) {
      pipelines.emplace_back(argv[++i]);
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: sweep_bench [--target T]... [--passes LIST]... [MODEL ...]\n";
      return 2;
    } else {
      models.push_back(argument);
    }
  }
  if (targets.empty()) targets = {"cpu", "cuda"};
  if (models.empty()) models = mt::ZooModels();
  if (pipelines.empty()) {
    pipelines = {"none",
                 "flash",
                 "flash,chunked_loss,fuse",
                 "remat:free",
                 "remat",
                 "flash,remat",
                 "flash,chunked_loss,fuse,remat",
                 "bf16,flash,chunked_loss,fuse,remat:free",
                 "bf16,flash,chunked_loss,fuse,remat,adamw8bit"};
  }
  mt::Totals totals;
  for (const std::string& model : models) {
    for (const std::string& target : targets) {
      for (const std::string& passes : pipelines) {
        const absl::Status status = mt::Measure(model, target, passes, totals);
        if (!status.ok()) {
          std::cerr << model << ", " << passes << ": " << status.message() << "\n";
          return 1;
        }
      }
    }
  }
  const nlohmann::ordered_json summary = {
      {"pairs", totals.pairs}, {"exact", totals.exact},           {"at_most_1.001", totals.within_a_thousandth},
      {"worst", totals.worst}, {"worst_pair", totals.worst_pair}, {"left_out", totals.left_out}};
  std::cout << nlohmann::ordered_json{{"summary", summary}}.dump() << std::endl;
  return 0;
}
