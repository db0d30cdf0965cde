#include "passes/remat_solver.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "ir/base/status_macros.h"
#include "passes/remat_split.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

constexpr int64_t kMaxSteps = 1'000'000;  // Transitions of the layer DP, about 50 ns each.
constexpr size_t kMaxCandidates = 384;

// The chain decided up to some block: bytes held for the backward pass, the most bytes of any block's backward pass
// so far, seconds recomputed.
struct ChainState {
  int64_t saved = 0, peak = 0;
  double seconds = 0;
  int parent = -1, option = 0;
};

// Leaves out states that are worse in all three, then thins to about `limit`: the cheapest in each cell of a grid.
void Prune(std::vector<ChainState>& states, size_t limit) {
  std::sort(states.begin(), states.end(), [](const ChainState& a, const ChainState& b) {
    return std::make_tuple(a.seconds, a.saved, a.peak, a.parent, a.option) <
           std::make_tuple(b.seconds, b.saved, b.peak, b.parent, b.option);
  });
  std::map<int64_t, int64_t> least_peak;  // By saved bytes; falls as they rise.
  size_t kept = 0;
  for (const ChainState& state : states) {
    auto at = least_peak.upper_bound(state.saved);
    if (at != least_peak.begin() && std::prev(at)->second <= state.peak) continue;
    while (at != least_peak.end() && at->second >= state.peak) at = least_peak.erase(at);
    least_peak[state.saved] = state.peak;
    states[kept++] = state;
  }
  states.resize(kept);
  if (kept <= limit) return;
  int64_t low_saved = states[0].saved, high_saved = low_saved, low_peak = states[0].peak, high_peak = low_peak;
  for (const ChainState& state : states) {
    low_saved = std::min(low_saved, state.saved);
    high_saved = std::max(high_saved, state.saved);
    low_peak = std::min(low_peak, state.peak);
    high_peak = std::max(high_peak, state.peak);
  }
  const double side = std::sqrt(static_cast<double>(limit));
  const auto cell = [&](int64_t value, int64_t low, int64_t high) {
    return high == low ? 0
                       : static_cast<int>(static_cast<double>(value - low) / static_cast<double>(high - low) * side);
  };
  absl::flat_hash_set<std::pair<int, int>> taken;
  kept = 0;
  for (const ChainState& state : states) {
    const bool is_extreme = state.saved == low_saved || state.peak == low_peak;
    if (!taken.insert({cell(state.saved, low_saved, high_saved), cell(state.peak, low_peak, high_peak)}).second &&
        !is_extreme) {
      continue;
    }
    states[kept++] = state;
  }
  states.resize(kept);
}

// At most `limit` options of a menu, evenly over it, with the first and the last.
std::vector<const RematOption*> Thinned(const RematMenu& menu, size_t limit) {
  std::vector<const RematOption*> thinned;
  const size_t n = menu.options.size();
  for (size_t i = 0; i < n; ++i) {
    if (n <= limit || i * (limit - 1) / (n - 1) != (i - 1) * (limit - 1) / (n - 1) || i == 0) {
      thinned.push_back(&menu.options[i]);
    }
  }
  return thinned;
}

}  // namespace

RematProblem::RematProblem(const Graph& graph, const Roofline& roofline) : graph_(graph.Clone()) {
  SplitFusedNodes(*graph_);
  chain_ = FindRematBlocks(*graph_);
  const int n = static_cast<int>(chain_.blocks.size());
  // The last block of a kind but one stands for all: its neighbours are its like on both sides.
  std::vector<int> stands_for;
  std::vector<int> seen;
  for (int b = 0; b < n; ++b) {
    const size_t kind = At(chain_.blocks[At(b)].kind);
    if (kind >= stands_for.size()) {
      stands_for.resize(kind + 1, b);
      seen.resize(kind + 1, 0);
    }
    if (++seen[kind] == 2) stands_for[kind] = b;
  }
  for (const int b : stands_for) menus_.push_back(MakeRematMenu(chain_, b, roofline));
  growth_after_.assign(At(n), 0);
  for (int b = n - 2; b >= 0; --b) growth_after_[At(b)] = growth_after_[At(b + 1)] + menu(b + 1).growth_bytes;
  for (const Node* node : chain_.shared) {
    if (node->op().is_view || !MayRecompute(*node)) continue;
    const bool late = std::any_of(node->uses().begin(), node->uses().end(),
                                  [](const Use& use) { return use.node->phase() != Phase::kForward; });
    if (!late) continue;
    for (const TensorType& type : node->result_types()) shared_bytes_ += type.byte_size();
    shared_seconds_ += NodeSeconds(*node, roofline);
  }
}

void RematProblem::SetTotals(RematChoice& choice, const std::vector<const RematOption*>& options) const {
  const size_t n = chain_.blocks.size();
  choice.seconds = choice.keep_shared ? 0 : shared_seconds_;
  const int64_t shared = choice.keep_shared ? shared_bytes_ : 0;
  choice.peak_bytes = 0;
  int64_t held = shared;  // By the blocks before.
  int64_t in_group = 0;   // Inputs of the group's blocks that are recomputed.
  for (size_t b = 0; b < n; ++b) {
    const RematOption& option = *options[b];
    choice.seconds += option.seconds;
    choice.peak_bytes = std::max(choice.peak_bytes, held + in_group + growth_after_[b] + option.peak_bytes);
    const bool inside = choice.group[b] > 0 && b + 1 < n && choice.group[b + 1] == choice.group[b];
    if (inside) {
      choice.seconds += menu(static_cast<int>(b)).forward_seconds;
      in_group += option.saved_bytes;
    } else {
      in_group = 0;
      held += option.saved_bytes;
    }
  }
}

RematChoice RematProblem::Choice(RematOption RematMenu::*option, bool keep_shared) const {
  RematChoice choice{.kept = {}, .group = std::vector<int>(chain_.blocks.size(), 0), .keep_shared = keep_shared};
  std::vector<const RematOption*> options;
  for (size_t b = 0; b < chain_.blocks.size(); ++b) {
    options.push_back(&(menu(static_cast<int>(b)).*option));
    choice.kept.push_back(options.back()->kept);
  }
  SetTotals(choice, options);
  return choice;
}

RematChoice RematProblem::Free() const { return Choice(&RematMenu::free, /*keep_shared=*/false); }
RematChoice RematProblem::Full() const { return Choice(&RematMenu::full, /*keep_shared=*/false); }
RematChoice RematProblem::None() const {
  RematChoice choice{.kept = {}, .group = std::vector<int>(chain_.blocks.size(), 0)};
  std::vector<const RematOption*> options;
  for (size_t b = 0; b < chain_.blocks.size(); ++b) {
    options.push_back(&menu(static_cast<int>(b)).options[0]);
    choice.kept.push_back(std::vector<bool>(chain_.blocks[b].nodes.size(), true));
  }
  SetTotals(choice, options);
  return choice;
}

std::vector<RematChoice> RematProblem::Candidates() const {
  const size_t n = chain_.blocks.size();
  const size_t menu_limit = n <= 8 ? 64 : 24;
  std::vector<std::vector<const RematOption*>> menus;
  for (const RematMenu& menu : menus_) menus.push_back(Thinned(menu, menu_limit));
  const size_t state_limit = At(std::clamp<int64_t>(kMaxSteps / static_cast<int64_t>(n * menu_limit), 64, 4096));

  std::vector<std::vector<ChainState>> layers(n + 1);
  layers[0].push_back({.saved = shared_bytes_, .option = 1});
  if (shared_bytes_ > 0) layers[0].push_back({.seconds = shared_seconds_, .option = 0});
  for (size_t b = 0; b < n; ++b) {
    const std::vector<const RematOption*>& options = menus[At(chain_.blocks[b].kind)];
    std::vector<ChainState>& next = layers[b + 1];
    for (size_t s = 0; s < layers[b].size(); ++s) {
      const ChainState& state = layers[b][s];
      for (size_t o = 0; o < options.size(); ++o) {
        const RematOption& option = *options[o];
        next.push_back({.saved = state.saved + option.saved_bytes,
                        .peak = std::max(state.peak, state.saved + growth_after_[b] + option.peak_bytes),
                        .seconds = state.seconds + option.seconds,
                        .parent = static_cast<int>(s),
                        .option = static_cast<int>(o)});
      }
    }
    Prune(next, state_limit);
  }

  // By seconds, each with a lower peak than all cheaper ones. None() comes first: it costs nothing.
  std::vector<ChainState> last = layers[n];
  std::sort(last.begin(), last.end(), [](const ChainState& a, const ChainState& b) {
    return std::make_pair(a.seconds, a.peak) < std::make_pair(b.seconds, b.peak);
  });
  std::vector<RematChoice> candidates = {None()};
  int64_t lowest = candidates[0].peak_bytes;
  for (const ChainState& state : last) lowest = std::min(lowest, state.peak);
  const int64_t step = (candidates[0].peak_bytes - lowest) / static_cast<int64_t>(kMaxCandidates);
  for (const ChainState& state : last) {
    if (state.seconds <= 0) continue;
    const int64_t before = candidates.back().peak_bytes;
    if (state.peak >= before || (state.peak > lowest && before - state.peak < step)) continue;
    RematChoice choice{.kept = std::vector<std::vector<bool>>(n),
                       .group = std::vector<int>(n, 0),
                       .seconds = state.seconds,
                       .peak_bytes = state.peak};
    const ChainState* at = &state;
    for (size_t b = n; b > 0; --b) {
      choice.kept[b - 1] = menus[At(chain_.blocks[b - 1].kind)][At(at->option)]->kept;
      at = &layers[b - 1][At(at->parent)];
    }
    choice.keep_shared = at->option == 1;
    candidates.push_back(std::move(choice));
  }
  AddGroups(candidates);
  return candidates;
}

void RematProblem::AddGroups(std::vector<RematChoice>& candidates) const {
  // The longest run of units.
  const int n = static_cast<int>(chain_.blocks.size());
  int first = 0, count = 0;
  for (int b = 0, start = 0; b < n; ++b) {
    if (!chain_.blocks[At(b)].is_unit) {
      start = b + 1;
    } else if (b + 1 - start > count) {
      first = start;
      count = b + 1 - start;
    }
  }
  const RematChoice full = Full();
  std::vector<const RematOption*> options;
  for (int b = 0; b < n; ++b) options.push_back(&menu(b).full);
  std::vector<RematChoice> grouped = {full};
  const int largest = std::min(count, 2 + 2 * static_cast<int>(std::sqrt(static_cast<double>(count))));
  for (int size = 2; size <= largest; ++size) {
    // The groups that free most are those whose backward pass comes last.
    for (int groups = 1; groups * size <= count; ++groups) {
      RematChoice choice = full;
      for (int i = 0; i < groups * size; ++i) choice.group[At(first + i)] = 1 + i / size;
      SetTotals(choice, options);
      grouped.push_back(std::move(choice));
    }
  }
  std::stable_sort(grouped.begin(), grouped.end(),
                   [](const RematChoice& a, const RematChoice& b) { return a.seconds < b.seconds; });
  for (RematChoice& choice : grouped) {
    if (choice.peak_bytes >= candidates.back().peak_bytes || choice.seconds <= candidates.back().seconds) continue;
    candidates.push_back(std::move(choice));
  }
}

double RematProblem::LowerBoundSeconds(int64_t peak_bytes) const {
  // min sum t  s.t.  sum of saved over all blocks but the last, and the last one's peak, <= peak_bytes; dual in one
  // multiplier, concave, so that a golden section on its logarithm finds the best.
  const size_t n = chain_.blocks.size();
  const auto dual = [&](double price) {
    double sum = -price * static_cast<double>(peak_bytes);
    for (size_t b = 0; b < n; ++b) {
      double least = std::numeric_limits<double>::infinity();
      for (const RematOption& option : menu(static_cast<int>(b)).options) {
        const int64_t bytes = b + 1 < n ? option.saved_bytes : option.peak_bytes;
        least = std::min(least, option.seconds + price * static_cast<double>(bytes));
      }
      sum += least;
    }
    return sum + std::min(shared_seconds_, price * static_cast<double>(shared_bytes_));
  };
  double low = -40, high = 0, best = 0;
  constexpr double kGolden = 0.6180339887498949;
  for (int i = 0; i < 80; ++i) {
    const double a = high - kGolden * (high - low), b = low + kGolden * (high - low);
    const double at_a = dual(std::exp(a)), at_b = dual(std::exp(b));
    best = std::max({best, at_a, at_b});
    (at_a < at_b ? low : high) = at_a < at_b ? a : b;
  }
  return best;
}

namespace {

class Applier {
 public:
  Applier(Graph& graph, const RematChain& chain, const RematChoice& choice)
      : graph_(graph), chain_(chain), choice_(choice) {
    for (size_t b = 0; b < chain.blocks.size(); ++b) {
      const RematBlock& block = chain.blocks[b];
      for (size_t i = 0; i < block.nodes.size(); ++i) kept_[block.nodes[i]] = choice.kept[b][i];
    }
    for (const Node* node : chain.shared) kept_[node] = choice.keep_shared;
    for (const Output& output : graph.outputs()) graph_outputs_.insert(output.value);
  }

  absl::StatusOr<bool> Run() {
    for (Node* reader : chain_.late) {
      for (size_t i = 0; i < reader->operands().size(); ++i) {
        const std::optional<Clone> clone = CloneOf(reader->operands()[i], /*in_group=*/false);
        if (!clone) continue;
        RETURN_IF_ERROR(Make(*clone));
        const int index = reader->operands()[i].index;
        graph_.SetOperand(reader, static_cast<int>(i), clones_.at(*clone)->result(index));
      }
    }
    return !clones_.empty();
  }

 private:
  // A node that runs again: for its own block's backward pass, or to get at the inputs of a group's blocks.
  using Clone = std::pair<Node*, bool>;

  // The clone that a reader takes instead of the value; none: the value is there.
  std::optional<Clone> CloneOf(const Value& value, bool in_group) const {
    const Value root = BehindViews(value);
    Node* node = root.node;
    if (!MayRecompute(*node) || graph_outputs_.contains(root)) return std::nullopt;
    const auto block = chain_.block_of.find(node);
    if (block != chain_.block_of.end()) {
      const size_t b = At(block->second);
      if (chain_.blocks[b].is_unit && chain_.blocks[b].outputs.contains(root)) {
        const int group = choice_.group[b];
        if (group == 0 || b + 1 == chain_.blocks.size() || choice_.group[b + 1] != group) return std::nullopt;
        return Clone(value.node, true);
      }
    }
    const auto kept = kept_.find(node);
    if (kept == kept_.end() || kept->second) return std::nullopt;
    return Clone(value.node, in_group && block != chain_.block_of.end());
  }

  // Makes the clone and, before it, those that it reads.
  absl::Status Make(const Clone& wanted) {
    std::vector<Clone> todo = {wanted};
    while (!todo.empty()) {
      const Clone next = todo.back();
      if (clones_.contains(next)) {
        todo.pop_back();
        continue;
      }
      std::vector<Value> operands;
      for (const Value& operand : next.first->operands()) {
        const std::optional<Clone> clone = CloneOf(operand, next.second);
        if (!clone) {
          operands.push_back(operand);
          continue;
        }
        const auto made = clones_.find(*clone);
        if (made == clones_.end()) {
          todo.push_back(*clone);
          break;
        }
        operands.push_back(made->second->result(operand.index));
      }
      if (operands.size() < next.first->operands().size()) continue;
      ASSIGN_OR_RETURN(Node * copy, graph_.CloneNode(*next.first, operands, /*recompute=*/true));
      graph_.SetNodePhase(copy, Phase::kBackward);
      clones_[next] = copy;
      todo.pop_back();
    }
    return absl::OkStatus();
  }

  Graph& graph_;
  const RematChain& chain_;
  const RematChoice& choice_;
  absl::flat_hash_map<const Node*, bool> kept_;
  absl::flat_hash_set<Value> graph_outputs_;
  absl::flat_hash_map<Clone, Node*> clones_;
};

}  // namespace

absl::StatusOr<bool> ApplyRemat(Graph& graph, const RematChain& chain, const RematChoice& choice) {
  return Applier(graph, chain, choice).Run();
}

absl::StatusOr<bool> ApplyRemat(Graph& graph, const RematChoice& choice) {
  const std::vector<FusedPart> parts = SplitFusedNodes(graph);
  const RematChain chain = FindRematBlocks(graph);
  ASSIGN_OR_RETURN(const bool changed, ApplyRemat(graph, chain, choice));
  JoinFusedNodes(graph, parts);
  return changed;
}

}  // namespace mt
