// Rematerialization: the backward pass recomputes what the forward pass does not keep for it.
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "passes/registry.h"
#include "passes/remat/budget.h"
#include "passes/remat/solver.h"

namespace mt {
namespace {

constexpr absl::string_view kNoBudget = "none";

// Ratios alone matter to what is chosen; where the driver gives no roofline, ten FLOPs take as long as a byte.
Roofline RooflineOf(const PassContext& context) {
  if (context.roofline.bytes_per_second > 0) return context.roofline;
  return {.matmul_flops_per_second = 2e11, .bytes_per_second = 2e10};
}

bool HasBackward(const Graph& graph) {
  bool backward = false;
  for (const Node* node : graph.Nodes()) {
    if (node->is_input()) continue;
    if (node->recompute_of() != nullptr) return false;
    backward = backward || node->phase() == Phase::kBackward;
  }
  return backward;
}

absl::Status TooSmall(const Module& module, int64_t budget, const MemoryPlan& smallest, const PeakText& peak) {
  return absl::ResourceExhaustedError(absl::StrCat(
      "budget=", CanonicalBytes(budget), " is too small for ", module.name(),
      ": recomputing all that may be, it needs ", smallest.arena_bytes, " bytes (", FormatBytes(smallest.arena_bytes),
      "), of them ", smallest.persistent_bytes, " for parameters and optimizer state; the peak is at ", peak.node,
      ", where ", peak.live, " are live. Use remat:budget=", CanonicalBytes(smallest.arena_bytes),
      " or more, or a smaller --batch or --seq"));
}

absl::StatusOr<bool> Remat(Module& module, const Attrs& options, PassContext& context) {
  const bool free = options.Get<bool>("free");
  const std::string& budget_text = options.Get<std::string>("budget");
  std::optional<int64_t> budget;
  if (budget_text != kNoBudget) {
    ASSIGN_OR_RETURN(budget, ParseBytes(budget_text));
    if (free) {
      return absl::InvalidArgumentError(
          "remat:free and remat:budget are two ways to choose what is recomputed; leave one of them out");
    }
    if (!context.plan_memory || !context.estimate_memory || !context.describe_peak)
      return absl::FailedPreconditionError("remat:budget needs a planner");
  }
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    if (!HasBackward(*graph)) continue;
    if (!budget) {
      const RematProblem problem(*graph, RooflineOf(context));
      ASSIGN_OR_RETURN(const bool changes, ApplyRemat(*graph, free ? problem.Free() : problem.Full()));
      changed = changed || changes;
      continue;
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<RematBudget> planner,
                     RematBudget::Make(module, *graph, RooflineOf(context), context));
    ASSIGN_OR_RETURN(const std::optional<RematBudget::Found> found, planner->Find(*budget));
    if (!found) {
      ASSIGN_OR_RETURN(const int64_t candidate, planner->Smallest());
      ASSIGN_OR_RETURN(const MemoryPlan smallest, planner->PlanOf(candidate));
      ASSIGN_OR_RETURN(const PeakText peak, planner->PeakOf(candidate));
      return TooSmall(module, *budget, smallest, peak);
    }
    ASSIGN_OR_RETURN(const bool changes, ApplyRemat(*graph, *found->choice));
    changed = changed || changes;
  }
  return changed;
}

constexpr PassOption kOptions[] = {
    {.name = "free",
     .kind = AttrKind::kBool,
     .doc = "only what costs next to nothing: norms, activations, dropout, casts; no matmul, no attention",
     .default_text = "false"},
    {.name = "budget",
     .kind = AttrKind::kString,
     .doc = "the cheapest choice whose planned arena, parameters included, is at most this: 8GiB",
     .default_text = kNoBudget},
};
constexpr absl::string_view kAlsoKnownAs[] = {
    "gradient_checkpointing", "activation_checkpointing", "checkpoint", "checkpointing", "recompute",
    "rematerialization"};

}  // namespace

const PassDef kRematPass = {
    .name = "remat",
    .summary =
        "The backward pass recomputes each block from its input; free: only what costs next to nothing; budget: "
        "only as much as makes the arena fit.",
    .options = kOptions,
    .requires_stage = Stage::kOptimized,
    .provides_stage = Stage::kOptimized,
    .source =
        "Chen et al., \"Training Deep Nets with Sublinear Memory Cost\" (2016); budget: Jain et al., \"Checkmate\" "
        "(2020), with a menu for each kind of block and a DP over layers",
    .also_known_as = kAlsoKnownAs,
    .run = Remat,
};

}  // namespace mt
