#include "passes/remat/budget.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "passes/registry.h"

namespace mt {
namespace {

// Candidates x nodes up to which all candidates are planned.
constexpr int64_t kPlanAllWork = 60'000;
constexpr size_t kMaxGrouped = 12;  // Candidates with groups that are planned.

bool HasGroups(const RematChoice& choice) {
  return std::any_of(choice.group.begin(), choice.group.end(), [](int g) { return g > 0; });
}

}  // namespace

absl::StatusOr<std::unique_ptr<RematBudget>> RematBudget::Make(const Module& module, const Graph& graph,
                                                               const Roofline& roofline, const PassContext& context) {
  const auto start = std::chrono::steady_clock::now();
  std::unique_ptr<RematBudget> budget(new RematBudget(module, graph, roofline, context));
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  RETURN_IF_ERROR(budget->FindLastExtra());
  const auto restart = std::chrono::steady_clock::now();
  budget->candidates_ = budget->problem_.Candidates();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - restart).count();
  budget->solver_seconds_ = seconds;
  RETURN_IF_ERROR(budget->Prepare());
  return budget;
}

absl::Status RematBudget::FindLastExtra() {
  // The other graphs' part of the arena is the same whatever this one recomputes.
  const std::unique_ptr<Module> others = Others();
  if (!others->graphs().empty()) {
    ASSIGN_OR_RETURN(others_, context_.plan_memory(*others));
  }
  // What the plan has at the last block beyond the model is seen where that is the peak: mostly where nothing is
  // recomputed, else where the most is.
  candidates_ = {problem_.None(), problem_.Full()};
  known_.resize(2);
  for (const size_t i : {size_t{0}, size_t{1}}) {
    ASSIGN_OR_RETURN(const MemoryPlan plan, BoundsOf(i));
    if (plan.lower_bound_bytes <= others_.arena_bytes) continue;
    ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, ModuleOf(i));
    ASSIGN_OR_RETURN(const PeakText peak, context_.describe_peak(*module));
    if (!problem_.IsInLast(peak.node)) continue;
    const int64_t extra = plan.lower_bound_bytes - plan.persistent_bytes - candidates_[i].last_bytes;
    problem_.set_last_extra_bytes(std::max<int64_t>(extra, 0));
    break;
  }
  candidates_.resize(1);
  known_.resize(1);
  return absl::OkStatus();
}

absl::Status RematBudget::Prepare() {
  known_.resize(candidates_.size());  // The first is None() still.
  const auto end_of_ungrouped = std::find_if(candidates_.begin(), candidates_.end(), HasGroups);
  ungrouped_ = static_cast<size_t>(end_of_ungrouped - candidates_.begin());
  if (static_cast<int64_t>(ungrouped_) * graph_.num_nodes() <= kPlanAllWork) return PlanAll(0, ungrouped_);
  // The last has to be the smallest.
  constexpr int kMostLeftOut = 4;
  for (int i = 0; i < kMostLeftOut && ungrouped_ > 1; ++i) {
    ASSIGN_OR_RETURN(const bool is_smaller, IsSmaller(ungrouped_ - 1, ungrouped_ - 2));
    if (is_smaller) break;
    --ungrouped_;
    candidates_.erase(candidates_.begin() + static_cast<int64_t>(ungrouped_));
    known_.erase(known_.begin() + static_cast<int64_t>(ungrouped_));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<RematBudget::Found>> RematBudget::Find(int64_t budget) {
  size_t low = 0, high = ungrouped_ - 1;
  ASSIGN_OR_RETURN(const bool fits, Fits(high, budget));
  if (!fits) {
    if (!grouped_ready_) RETURN_IF_ERROR(PrepareGrouped());
    low = ungrouped_;
    high = candidates_.size() - 1;
    if (high < low) return std::nullopt;
    ASSIGN_OR_RETURN(const bool last_fits, Fits(high, budget));
    if (!last_fits) return std::nullopt;
  }
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    ASSIGN_OR_RETURN(const bool middle_fits, Fits(middle, budget));
    if (middle_fits) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Found found{.candidate = static_cast<int64_t>(low), .choice = &candidates_[low], .plan = {}};
  ASSIGN_OR_RETURN(found.plan, PlanOf(found.candidate));
  return found;
}

absl::StatusOr<int64_t> RematBudget::Smallest() {
  if (!grouped_ready_) RETURN_IF_ERROR(PrepareGrouped());
  int64_t smallest = static_cast<int64_t>(ungrouped_) - 1;
  for (int64_t i = smallest + 1; i < static_cast<int64_t>(candidates_.size()); ++i) {
    ASSIGN_OR_RETURN(const MemoryPlan plan, PlanOf(i));
    ASSIGN_OR_RETURN(const MemoryPlan before, PlanOf(smallest));
    if (plan.arena_bytes < before.arena_bytes) smallest = i;
  }
  return smallest;
}

std::unique_ptr<Module> RematBudget::States() const {
  auto module = std::make_unique<Module>(module_.name());
  module->facts() = module_.facts();
  for (const State& state : module_.states()) CHECK_OK(module->AddState(state));
  return module;
}

std::unique_ptr<Module> RematBudget::Others() const {
  std::unique_ptr<Module> others = States();
  for (const auto& graph : module_.graphs()) {
    if (graph.get() != &graph_) others->AddGraph(graph->Clone());
  }
  return others;
}

absl::StatusOr<std::unique_ptr<Module>> RematBudget::ModuleOf(size_t candidate) {
  std::unique_ptr<Module> module = States();
  Graph& graph = *module->AddGraph(graph_.Clone());
  ASSIGN_OR_RETURN(const bool changed, ApplyRemat(graph, candidates_[candidate]));
  if (changed) RETURN_IF_ERROR(kDcePass.run(*module, Attrs(), unused_));
  return module;
}

absl::StatusOr<MemoryPlan> RematBudget::PlanOf(int64_t candidate) {
  const size_t i = static_cast<size_t>(candidate);
  if (known_[i].plan) return *known_[i].plan;
  ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, ModuleOf(i));
  ASSIGN_OR_RETURN(MemoryPlan plan, context_.plan_memory(*module));
  if (others_.arena_bytes > plan.arena_bytes) plan = others_;
  ++planned_;
  known_[i].plan = plan;
  return plan;
}

absl::StatusOr<PeakText> RematBudget::PeakOf(int64_t candidate) {
  ASSIGN_OR_RETURN(const MemoryPlan plan, PlanOf(candidate));
  if (plan.arena_bytes == others_.arena_bytes) return context_.describe_peak(*Others());
  ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, ModuleOf(static_cast<size_t>(candidate)));
  return context_.describe_peak(*module);
}

absl::StatusOr<MemoryPlan> RematBudget::BoundsOf(size_t candidate) {
  Known& known = known_[candidate];
  if (known.plan) {
    MemoryPlan bounds = *known.plan;
    bounds.lower_bound_bytes = bounds.arena_bytes;
    return bounds;
  }
  if (!known.bounds) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, ModuleOf(candidate));
    ASSIGN_OR_RETURN(MemoryPlan bounds, context_.estimate_memory(*module));
    bounds.arena_bytes = std::max(bounds.arena_bytes, others_.arena_bytes);
    bounds.lower_bound_bytes = std::max(bounds.lower_bound_bytes, others_.arena_bytes);
    known.bounds = bounds;
  }
  return *known.bounds;
}

absl::StatusOr<bool> RematBudget::IsSmaller(size_t a, size_t b) {
  ASSIGN_OR_RETURN(const MemoryPlan a_bounds, BoundsOf(a));
  ASSIGN_OR_RETURN(const MemoryPlan b_bounds, BoundsOf(b));
  if (a_bounds.arena_bytes < b_bounds.lower_bound_bytes) return true;
  if (a_bounds.lower_bound_bytes >= b_bounds.arena_bytes) return false;
  ASSIGN_OR_RETURN(const MemoryPlan a_plan, PlanOf(static_cast<int64_t>(a)));
  ASSIGN_OR_RETURN(const MemoryPlan b_plan, PlanOf(static_cast<int64_t>(b)));
  return a_plan.arena_bytes < b_plan.arena_bytes;
}

absl::StatusOr<bool> RematBudget::Fits(size_t candidate, int64_t budget) {
  ASSIGN_OR_RETURN(const MemoryPlan bounds, BoundsOf(candidate));
  if (bounds.arena_bytes <= budget) return true;
  if (bounds.lower_bound_bytes > budget) return false;
  ASSIGN_OR_RETURN(const MemoryPlan plan, PlanOf(static_cast<int64_t>(candidate)));
  return plan.arena_bytes <= budget;
}

// Plans [first, last) and leaves out what is no smaller than a cheaper one.
absl::Status RematBudget::PlanAll(size_t first, size_t last) {
  int64_t smallest = std::numeric_limits<int64_t>::max();
  if (first > 0) {
    ASSIGN_OR_RETURN(const MemoryPlan before, PlanOf(static_cast<int64_t>(first) - 1));
    smallest = before.arena_bytes;
  }
  size_t kept = first;
  for (size_t i = first; i < last; ++i) {
    ASSIGN_OR_RETURN(const MemoryPlan plan, PlanOf(static_cast<int64_t>(i)));
    if (plan.arena_bytes >= smallest) continue;
    smallest = plan.arena_bytes;
    if (kept != i) {
      candidates_[kept] = std::move(candidates_[i]);
      known_[kept] = std::move(known_[i]);
    }
    ++kept;
  }
  const auto erase = [&](auto& list) {
    list.erase(list.begin() + static_cast<int64_t>(kept), list.begin() + static_cast<int64_t>(last));
  };
  erase(candidates_);
  erase(known_);
  if (last <= ungrouped_) ungrouped_ -= last - kept;
  return absl::OkStatus();
}

absl::Status RematBudget::PrepareGrouped() {
  grouped_ready_ = true;
  const size_t count = candidates_.size() - ungrouped_;
  if (count > kMaxGrouped) {
    size_t kept = ungrouped_;
    for (size_t i = 0; i < kMaxGrouped; ++i) {
      const size_t from = ungrouped_ + (i + 1) * count / kMaxGrouped - 1;
      if (from != kept) candidates_[kept] = std::move(candidates_[from]);
      ++kept;
    }
    candidates_.resize(kept);
    known_.resize(kept);
  }
  return PlanAll(ungrouped_, candidates_.size());
}

}  // namespace mt
