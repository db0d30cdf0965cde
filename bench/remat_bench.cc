// Rematerialization without running anything: for each model one JSON line with the planned arena and what is live at
// the peak for none, remat:free, remat and the smallest budget, and a sweep over budgets between the smallest arena and
// the one without recomputation.
//
//   remat_bench [--budgets N] [--passes LIST] [--target T] [--set NAME=VALUE] [MODEL ...]
//
// violations: budgets whose plan is larger. monotone: a larger budget never costs more. unexplained: budgets used to
// less than 98 % where the next cheaper candidate was not shown to be larger. bound_gap: seconds of the choice over the
// Lagrangian bound of the menus at its peak, as a share of the step, the most of all budgets (groups of blocks left
// out). exact_gap: the same over the menus' optimum, where that can be found: the bound mixes options of a block, which
// for few blocks no choice can. budget_gap: over the menus' optimum at the budget itself, what the choice's plan leaves
// unused added to its peak: the spacing of the candidates is in it, and how far plans differ from the model.
// by_plan_alone: choices left out of both, which the plan, not the model, says are
// smaller than cheaper ones.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "codegen/compile.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/cost.h"
#include "ir/target.h"
#include "models/model.h"
#include "passes/pass_manager.h"
#include "passes/remat/budget.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

struct Settings {
  int64_t budgets = 100;
  std::string passes = "flash", target = "cpu";
  std::vector<std::string> sets;
};

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

absl::Status Measure(const std::string& spec, const Settings& settings) {
  ModelOptions options;
  options.sets = settings.sets;
  ASSIGN_OR_RETURN(const Target target, ParseTarget(settings.target));
  const std::string target_name = target.ToString();
  PassContext context;
  context.roofline = TargetRoofline(target);
  context.target = target_name;
  context.plan_memory = [&](const Module& m) { return PlanMemory(m, target_name); };
  context.estimate_memory = [&](const Module& m) { return EstimateMemory(m, target_name); };
  context.describe_peak = [&](const Module& m) { return DescribePeak(m, target_name); };
  const auto prepared = [&](const std::string& passes) -> absl::StatusOr<std::unique_ptr<Module>> {
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(spec, options));
    ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf({.target = target_name, .passes = passes}));
    RETURN_IF_ERROR(RunPipeline(*module, pipeline, context));
    return module;
  };
  ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, prepared(settings.passes));
  const Graph& graph = *module->FindGraph("train");
  const double step_seconds = GraphSeconds(graph, context.roofline);

  Json json = {{"model", spec}, {"passes", settings.passes}, {"target", target_name}};
  const auto describe = [&](const MemoryPlan& plan, const PeakText& peak, double seconds) {
    return Json{
        {"arena_bytes", plan.arena_bytes},
        {"over_lower_bound", static_cast<double>(plan.arena_bytes) / static_cast<double>(plan.lower_bound_bytes)},
        {"overhead", seconds / step_seconds},
        {"peak", peak.node},
        {"live", peak.live}};
  };
  const std::string stem = settings.passes == "none" ? "" : absl::StrCat(settings.passes, ",");
  const RematProblem problem(graph, context.roofline);
  for (const std::string& mode : {std::string("remat:free"), std::string("remat")}) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Module> changed, prepared(absl::StrCat(stem, mode)));
    ASSIGN_OR_RETURN(const MemoryPlan plan, context.plan_memory(*changed));
    ASSIGN_OR_RETURN(const PeakText peak, context.describe_peak(*changed));
    json[mode] = describe(plan, peak, (mode == "remat" ? problem.Full() : problem.Free()).seconds);
  }

  const auto start = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(const std::unique_ptr<RematBudget> planner,
                   RematBudget::Make(*module, graph, context.roofline, context));
  ASSIGN_OR_RETURN(const int64_t last, planner->Smallest());
  ASSIGN_OR_RETURN(const MemoryPlan smallest, planner->PlanOf(last));
  ASSIGN_OR_RETURN(const MemoryPlan none, planner->PlanOf(0));
  ASSIGN_OR_RETURN(const std::optional<RematBudget::Found> floor, planner->Find(smallest.arena_bytes));
  if (!floor) return absl::InternalError("the smallest plan does not fit itself");
  ASSIGN_OR_RETURN(const PeakText none_peak, planner->PeakOf(0));
  ASSIGN_OR_RETURN(const PeakText smallest_peak, planner->PeakOf(last));
  json["none"] = describe(none, none_peak, 0);
  json["smallest"] = describe(smallest, smallest_peak, floor->choice->seconds);

  int64_t violations = 0, unexplained = 0, exact = 0;
  bool monotone = true;
  double before = 0, worst_use = 1, gap = 0, exact_gap = 0, budget_gap = 0;
  int64_t exact_known = 0, plan_alone = 0;
  const int64_t count = std::max<int64_t>(settings.budgets, 2);
  for (int64_t i = count - 1; i >= 0; --i) {
    const int64_t budget = smallest.arena_bytes + (none.arena_bytes - smallest.arena_bytes) / (count - 1) * i;
    ASSIGN_OR_RETURN(const std::optional<RematBudget::Found> found, planner->Find(budget));
    if (!found || found->plan.arena_bytes > budget) {
      ++violations;
      continue;
    }
    monotone = monotone && found->choice->seconds >= before;
    before = found->choice->seconds;
    const double use = static_cast<double>(found->plan.arena_bytes) / static_cast<double>(budget);
    worst_use = std::min(worst_use, use);
    if (use >= 0.98) ++exact;
    if (use < 0.98 && found->candidate > 0) {
      ASSIGN_OR_RETURN(const MemoryPlan cheaper, planner->PlanOf(found->candidate - 1));
      if (cheaper.arena_bytes <= budget) ++unexplained;
    }
    const std::vector<int>& group = found->choice->group;
    if (std::any_of(group.begin(), group.end(), [](int g) { return g > 0; })) continue;
    // What the model does not know to be smaller than a cheaper choice, but the plan does.
    const bool by_plan_alone =
        found->candidate > 0 &&
        planner->candidates()[static_cast<size_t>(found->candidate - 1)].peak_bytes <= found->choice->peak_bytes;
    if (by_plan_alone) {
      ++plan_alone;
      continue;
    }
    const double bound = planner->problem().LowerBoundSeconds(found->choice->peak_bytes);
    gap = std::max(gap, (found->choice->seconds - bound) / (step_seconds + bound));
    constexpr size_t kMostStates = 100'000;
    const std::optional<double> least = planner->problem().LeastSeconds(found->choice->peak_bytes, kMostStates);
    if (!least) continue;
    ++exact_known;
    exact_gap = std::max(exact_gap, (found->choice->seconds - *least) / (step_seconds + *least));
    const int64_t unused = budget - found->plan.arena_bytes;
    const std::optional<double> possible =
        planner->problem().LeastSeconds(found->choice->peak_bytes + unused, kMostStates);
    if (!possible) continue;
    budget_gap = std::max(budget_gap, (found->choice->seconds - *possible) / (step_seconds + *possible));
  }
  json["sweep"] = {{"budgets", count},
                   {"violations", violations},
                   {"monotone", monotone},
                   {"unexplained", unexplained},
                   {"used_98_percent", exact},
                   {"worst_use", worst_use},
                   {"bound_gap", gap},
                   {"exact_gap", exact_gap},
                   {"exact_known", exact_known},
                   {"budget_gap", budget_gap},
                   {"by_plan_alone", plan_alone},
                   {"candidates", planner->candidates().size()},
                   {"planned", planner->planned()},
                   {"solver_seconds", planner->solver_seconds()},
                   {"seconds", SecondsSince(start)}};
  std::cout << json.dump() << std::endl;
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  mt::Settings settings;
  std::vector<std::string> models;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--budgets" && has_value && absl::SimpleAtoi(argv[i + 1], &settings.budgets)) {
      ++i;
    } else if (argument == "--passes" && has_value) {
      settings.passes = argv[++i];
    } else if (argument == "--target" && has_value) {
      settings.target = argv[++i];
    } else if (argument == "--set" && has_value) {
      settings.sets.push_back(argv[++i]);
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: remat_bench [--budgets N] [--passes LIST] [--target T] [--set NAME=VALUE] [MODEL ...]\n";
      return 2;
    } else {
      models.push_back(argument);
    }
  }
  if (models.empty()) models = {"lab4", "gpt2_wide32k", "gpt2_124m"};
  for (const std::string& model : models) {
    const absl::Status status = mt::Measure(model, settings);
    if (!status.ok()) {
      std::cerr << model << ": " << status.message() << "\n";
      return 1;
    }
  }
  return 0;
}
