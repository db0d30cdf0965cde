// Which blocks keep what: one list of candidates from no recomputation to the smallest plan.
#ifndef MT_PASSES_REMAT_SOLVER_H_
#define MT_PASSES_REMAT_SOLVER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/cost.h"
#include "ir/graph.h"
#include "passes/remat/blocks.h"
#include "passes/remat/menu.h"

namespace mt {

// What a graph keeps: for each block one flag a node (RematOption::kept).
struct RematChoice {
  std::vector<std::vector<bool>> kept;
  // By block: 0, or g > 0: it is one of a group of consecutive blocks that has this number, whose first block's input
  // alone is kept. The inputs of the others are recomputed when the group's backward pass begins.
  std::vector<int> group;
  bool keep_shared = true;  // Constants that several blocks read.
  double seconds = 0;       // Of what is recomputed.
  int64_t peak_bytes = 0;   // By the model: states, inputs and workspaces left out. The plan has the last word.
  int64_t last_bytes = 0;   // The same in the last block's backward pass.
};

// The blocks of a graph with their menus: what there is to choose from.
class RematProblem {
 public:
  RematProblem(const Graph& graph, const Roofline& roofline);

  const RematChain& chain() const { return chain_; }
  const RematMenu& menu(int block) const {
    return menus_[static_cast<size_t>(chain_.blocks[static_cast<size_t>(block)].kind)];
  }

  // Bytes of the gradients that wait for the optimizer when the backward pass of `block` begins.
  int64_t growth_after(int block) const { return growth_after_[static_cast<size_t>(block)]; }

  // Whether a node of that name is in the backward pass of the last block: head and loss.
  bool IsInLast(absl::string_view node) const;
  // What the plan takes there beyond what menus know: workspaces.
  void set_last_extra_bytes(int64_t bytes) { last_extra_bytes_ = bytes; }

  RematChoice None() const;  // Nothing is recomputed.
  RematChoice Free() const;  // Each block's `free`.
  RematChoice Full() const;  // Each block's `full`.
  // By seconds, ascending; the first is None(). peak_bytes fall, but for Full(), behind which come groups. Does not
  // depend on any budget.
  std::vector<RematChoice> Candidates() const;
  // No choice of the menus without groups and with a peak of at most `peak_bytes` takes fewer seconds: a Lagrangian
  // bound. For tests and benches.
  double LowerBoundSeconds(int64_t peak_bytes) const;
  // The fewest seconds of such a choice, exactly: block after block, every choice that is not worse than another in
  // both seconds and saved bytes. Null: there is none, or more than `most_states` would have to be looked at at once.
  // For tests and benches.
  std::optional<double> LeastSeconds(int64_t peak_bytes, size_t most_states) const;

 private:
  // One option a block.
  struct Assignment {
    std::vector<const RematOption*> options;
    bool keep_shared = true;
    double seconds = 0;
    int64_t peak_bytes = 0, last_bytes = 0;
  };

  // Of the block's backward pass, without what earlier blocks hold.
  int64_t PeakOf(size_t block, const RematOption& option) const {
    return growth_after_[block] + option.peak_bytes + (block + 1 == chain_.blocks.size() ? last_extra_bytes_ : 0);
  }
  // `group` as RematChoice::group; empty: no groups.
  void SetTotals(Assignment& assignment, absl::Span<const int> group) const;
  RematChoice ChoiceOf(Assignment assignment) const;
  // Chosen from some block to the end.
  struct Tail {
    int64_t live = 0;  // The most bytes in any of their backward passes, but for what the blocks before hold.
    double seconds = 0;
    int behind = 0;                       // Of the tails that begin one block later.
    const RematOption* option = nullptr;  // Of the first block.
  };
  // By block: the tails from there on of which none is worse in live bytes and seconds, by live bytes. As what the
  // blocks before hold lies under all of them alike, no better choice is lost, but among those whose live bytes differ
  // by less than a cell of a fine grid, where the cheapest stays.
  std::vector<std::vector<Tail>> BestTails() const;
  // `lowest`: the smallest peak without groups.
  void AddGroups(const Assignment& lowest, std::vector<RematChoice>& candidates) const;

  std::unique_ptr<Graph> graph_;       // A copy, with fused nodes in parts.
  RematChain chain_;                   // Of the copy.
  std::vector<RematMenu> menus_;       // By kind.
  std::vector<int64_t> growth_after_;  // By block: gradients that are there when its backward pass begins.
  int64_t last_extra_bytes_ = 0;
  int64_t shared_bytes_ = 0;
  double shared_seconds_ = 0;
};

// Makes the graph recompute what `choice`, made for a RematProblem of it, does not keep: clones, marked recompute_of,
// of phase backward, created in the order in which the backward pass first reads them, so that the canonical order runs
// each just before its first reader; some become parts of fused nodes (merge.h). Returns whether anything changed. Dead
// originals stay for DCE.
absl::StatusOr<bool> ApplyRemat(Graph& graph, const RematChoice& choice);
// The same for a chain of the graph itself.
absl::StatusOr<bool> ApplyRemat(Graph& graph, const RematChain& chain, const RematChoice& choice);

}  // namespace mt

#endif  // MT_PASSES_REMAT_SOLVER_H_
