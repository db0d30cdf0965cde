// The cheapest choice whose planned arena fits a budget.
#ifndef MT_PASSES_REMAT_BUDGET_H_
#define MT_PASSES_REMAT_BUDGET_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ir/graph.h"
#include "passes/pass.h"
#include "passes/remat/solver.h"

namespace mt {

// The candidates of one graph of a module, each planned when it is asked for, and once.
class RematBudget {
 public:
  // Where planning is cheap, plans all candidates and leaves out those that are no smaller than a cheaper one. The
  // list does not depend on any budget. `module`, its `graph` and `context` must outlive the object and not change.
  // Errors: those of context.plan_memory.
  static absl::StatusOr<std::unique_ptr<RematBudget>> Make(const Module& module, const Graph& graph,
                                                           const Roofline& roofline, const PassContext& context);

  struct Found {
    int64_t candidate = 0;  // Index; the one before, if it is not 0, is larger than the budget.
    const RematChoice* choice = nullptr;
    MemoryPlan plan;
  };
  // The cheapest choice that fits, by bisection, so that a larger budget never costs more seconds. Null: none fits.
  absl::StatusOr<std::optional<Found>> Find(int64_t budget);

  // The smallest plan's candidate, and the plan of a candidate.
  absl::StatusOr<int64_t> Smallest();
  absl::StatusOr<MemoryPlan> PlanOf(int64_t candidate);
  // Errors: those of context.describe_peak. REQUIRES: there is one.
  absl::StatusOr<PeakText> PeakOf(int64_t candidate);

  const RematProblem& problem() const { return problem_; }
  const std::vector<RematChoice>& candidates() const { return candidates_; }
  double solver_seconds() const { return solver_seconds_; }  // Without planning.
  int64_t planned() const { return planned_; }

 private:
  RematBudget(const Module& module, const Graph& graph, const Roofline& roofline, const PassContext& context)
      : module_(module), graph_(graph), context_(context), problem_(graph, roofline) {}

  std::unique_ptr<Module> States() const;
  std::unique_ptr<Module> Others() const;  // The module's other graphs.
  absl::StatusOr<std::unique_ptr<Module>> ModuleOf(size_t candidate);
  absl::Status FindLastExtra();
  absl::Status Prepare();
  absl::Status PlanAll(size_t first, size_t last);
  absl::Status PrepareGrouped();
  // Bounds of what PlanOf says: the arena is not above arena_bytes, not below lower_bound_bytes.
  absl::StatusOr<MemoryPlan> BoundsOf(size_t candidate);
  absl::StatusOr<bool> Fits(size_t candidate, int64_t budget);
  absl::StatusOr<bool> IsSmaller(size_t a, size_t b);

  const Module& module_;
  const Graph& graph_;
  const PassContext& context_;
  PassContext unused_;
  RematProblem problem_;
  std::vector<RematChoice> candidates_;
  struct Known {
    std::optional<MemoryPlan> plan, bounds;  // Of PlanOf and BoundsOf.
  };
  std::vector<Known> known_;  // Of each candidate.
  MemoryPlan others_;         // Of the module's other graphs: a floor under the arena.
  size_t ungrouped_ = 0;      // Candidates before the first with groups.
  bool grouped_ready_ = false;
  double solver_seconds_ = 0;
  int64_t planned_ = 0;
};

}  // namespace mt

#endif  // MT_PASSES_REMAT_BUDGET_H_
