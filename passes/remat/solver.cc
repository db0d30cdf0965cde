#include "passes/remat/solver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "ir/base/status_macros.h"
#include "passes/remat/merge.h"
#include "passes/remat/split.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

constexpr int64_t kMaxSteps = 4'000'000;  // Transitions of the layer DP, a few ns each.
constexpr size_t kMinCells = 512, kMaxCells = 16384;
constexpr size_t kMaxCandidates = 384;
constexpr double kSameSeconds = 1.005;  // Seconds of candidates that may stand for each other.

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
    // Once for each block whose backward pass reads it.
    absl::flat_hash_set<int> readers;
    for (const Use& use : node->uses()) {
      const auto block = chain_.backward_of.find(use.node);
      if (block != chain_.backward_of.end()) readers.insert(block->second);
    }
    shared_seconds_ += NodeSeconds(*node, roofline) * static_cast<double>(std::max<size_t>(readers.size(), 1));
  }
}

void RematProblem::SetTotals(Assignment& assignment, absl::Span<const int> group) const {
  const size_t n = chain_.blocks.size();
  assignment.seconds = assignment.keep_shared ? 0 : shared_seconds_;
  assignment.peak_bytes = 0;
  int64_t held = assignment.keep_shared ? shared_bytes_ : 0;  // By the blocks before.
  int64_t in_group = 0;                                       // Inputs of the group's blocks that are recomputed.
  for (size_t b = 0; b < n; ++b) {
    const RematOption& option = *assignment.options[b];
    assignment.seconds += option.seconds;
    assignment.last_bytes = held + in_group + PeakOf(b, option);
    assignment.peak_bytes = std::max(assignment.peak_bytes, assignment.last_bytes);
    const bool inside = !group.empty() && group[b] > 0 && b + 1 < n && group[b + 1] == group[b];
    if (inside) {
      assignment.seconds += menu(static_cast<int>(b)).forward_seconds;
      in_group += option.saved_bytes;
    } else {
      in_group = 0;
      held += option.saved_bytes;
    }
  }
}

RematChoice RematProblem::ChoiceOf(Assignment assignment) const {
  SetTotals(assignment, {});
  RematChoice choice{.kept = {},
                     .group = std::vector<int>(chain_.blocks.size(), 0),
                     .keep_shared = assignment.keep_shared,
                     .seconds = assignment.seconds,
                     .peak_bytes = assignment.peak_bytes,
                     .last_bytes = assignment.last_bytes};
  for (const RematOption* option : assignment.options) choice.kept.push_back(option->kept);
  return choice;
}

bool RematProblem::IsInLast(absl::string_view node) const {
  if (chain_.blocks.empty()) return false;
  const std::vector<Node*>& last = chain_.blocks.back().backward;
  return std::any_of(last.begin(), last.end(), [&](const Node* n) { return n->name() == node; });
}

RematChoice RematProblem::Free() const {
  Assignment assignment{.keep_shared = false};
  for (const RematBlock& block : chain_.blocks) assignment.options.push_back(&menus_[At(block.kind)].free);
  return ChoiceOf(std::move(assignment));
}

RematChoice RematProblem::Full() const {
  Assignment assignment{.keep_shared = false};
  for (const RematBlock& block : chain_.blocks) assignment.options.push_back(&menus_[At(block.kind)].full);
  return ChoiceOf(std::move(assignment));
}

RematChoice RematProblem::None() const {
  Assignment assignment;
  for (const RematBlock& block : chain_.blocks) assignment.options.push_back(&menus_[At(block.kind)].options[0]);
  RematChoice choice = ChoiceOf(std::move(assignment));
  for (size_t b = 0; b < choice.kept.size(); ++b) choice.kept[b].assign(choice.kept[b].size(), true);
  return choice;
}

std::vector<std::vector<RematProblem::Tail>> RematProblem::BestTails() const {
  const size_t n = chain_.blocks.size();
  const int64_t most = None().peak_bytes;
  std::vector<int64_t> least_saved(n + 1, 0);  // By the blocks before.
  for (size_t b = 0; b < n; ++b) {
    const std::vector<RematOption>& options = menu(static_cast<int>(b)).options;
    least_saved[b + 1] =
        least_saved[b] + std::min_element(options.begin(), options.end(), [](const auto& x, const auto& y) {
                           return x.saved_bytes < y.saved_bytes;
                         })->saved_bytes;
  }
  std::vector<std::vector<Tail>> tails(n + 1);
  tails[n].push_back({.live = std::numeric_limits<int64_t>::min() / 2});
  std::vector<std::optional<Tail>> cells;
  for (size_t b = n; b-- > 0;) {
    const std::vector<Tail>& behind = tails[b + 1];
    const auto live_of = [&](const RematOption& option, const Tail& tail) {
      return std::max(PeakOf(b, option), option.saved_bytes + tail.live);
    };
    // What is no better than another option even where the blocks behind take the least has no use here.
    std::vector<const RematOption*> options;
    for (const RematOption& option : menu(static_cast<int>(b)).options) {  // By seconds.
      const bool worse = std::any_of(options.begin(), options.end(), [&](const RematOption* other) {
        return other->saved_bytes <= option.saved_bytes && live_of(*other, behind[0]) <= live_of(option, behind[0]);
      });
      if (!worse) options.push_back(&option);
    }
    // The least first: it stays whatever it costs.
    Tail least{.live = std::numeric_limits<int64_t>::max()};
    for (const RematOption* option : options) {
      const Tail tail{live_of(*option, behind[0]), behind[0].seconds + option->seconds, 0, option};
      if (tail.live < least.live) least = tail;
    }
    const int64_t range = std::max<int64_t>(most - least_saved[b] - least.live, 0);
    const size_t count = std::clamp(At(kMaxSteps) / (n * options.size()), kMinCells, kMaxCells);
    const double scale = static_cast<double>(count - 1) / static_cast<double>(std::max<int64_t>(range, 1));
    cells.assign(count, std::nullopt);
    for (const RematOption* option : options) {
      for (size_t t = 0; t < behind.size(); ++t) {
        const Tail tail{live_of(*option, behind[t]), behind[t].seconds + option->seconds, static_cast<int>(t), option};
        if (tail.live - least.live > range) break;  // `behind` is sorted.
        std::optional<Tail>& cell = cells[static_cast<size_t>(static_cast<double>(tail.live - least.live) * scale)];
        if (!cell || std::tie(tail.seconds, tail.live) < std::tie(cell->seconds, cell->live)) cell = tail;
      }
    }
    std::vector<Tail>& here = tails[b];
    here.push_back(least);
    for (const std::optional<Tail>& cell : cells) {
      if (!cell || cell->seconds >= here.back().seconds) continue;
      if (cell->live == here.back().live) here.pop_back();
      here.push_back(*cell);
    }
  }
  return tails;
}

std::vector<RematChoice> RematProblem::Candidates() const {
  const size_t n = chain_.blocks.size();
  if (n == 0) return {None()};
  const std::vector<std::vector<Tail>> tails = BestTails();
  struct Found {
    double seconds;
    int64_t peak_bytes;
    const Tail* tail;
    bool keep_shared;
  };
  std::vector<Found> found;
  for (const Tail& tail : tails[0]) {
    found.push_back({tail.seconds, shared_bytes_ + tail.live, &tail, true});
    if (shared_bytes_ > 0) found.push_back({shared_seconds_ + tail.seconds, tail.live, &tail, false});
  }
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return std::tie(a.seconds, a.peak_bytes) < std::tie(b.seconds, b.peak_bytes);
  });
  const auto assignment_of = [&](const Found& choice) {
    Assignment assignment{.keep_shared = choice.keep_shared};
    const Tail* tail = choice.tail;
    for (size_t b = 0; b < n; ++b) {
      assignment.options.push_back(tail->option);
      tail = &tails[b + 1][At(tail->behind)];
    }
    return assignment;
  };
  // By seconds, each with a lower peak than all cheaper ones. None() comes first: it costs nothing.
  std::vector<RematChoice> candidates = {None()};
  const Found& lowest = *std::min_element(found.begin(), found.end(),
                                          [](const Found& a, const Found& b) { return a.peak_bytes < b.peak_bytes; });
  const int64_t step = (candidates[0].peak_bytes - lowest.peak_bytes) / static_cast<int64_t>(kMaxCandidates);
  const auto add = [&](const Found& choice) {
    candidates.push_back(ChoiceOf(assignment_of(choice)));
    candidates.back().seconds = choice.seconds;  // Not added up in another order.
  };
  // Passed over, as its peak is hardly below that of the candidate before: the first such, and the last.
  const Found *first_passed = nullptr, *last_passed = nullptr;
  for (const Found& choice : found) {
    if (choice.seconds <= 0) continue;
    if (choice.peak_bytes >= (last_passed != nullptr ? last_passed->peak_bytes : candidates.back().peak_bytes)) {
      continue;
    }
    // What comes next is no stand-in for it where it takes more time.
    if (first_passed != nullptr && choice.seconds > kSameSeconds * first_passed->seconds) {
      add(*last_passed);
      first_passed = last_passed = nullptr;
    }
    if (choice.peak_bytes > lowest.peak_bytes && candidates.back().peak_bytes - choice.peak_bytes < step) {
      if (first_passed == nullptr) first_passed = &choice;
      last_passed = &choice;
    } else {
      add(choice);
      first_passed = last_passed = nullptr;
    }
  }
  // By the plan, keeping the blocks' inputs alone may be smaller than the model says.
  const RematChoice full = Full();
  if (full.seconds > candidates.back().seconds) candidates.push_back(full);
  Assignment smallest = assignment_of(lowest);
  SetTotals(smallest, {});
  AddGroups(smallest, candidates);
  return candidates;
}

void RematProblem::AddGroups(const Assignment& lowest, std::vector<RematChoice>& candidates) const {
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
  Assignment full{.keep_shared = false};
  for (int b = 0; b < n; ++b) full.options.push_back(&menu(b).full);
  std::vector<RematChoice> grouped;
  const int largest = std::min(count, 2 + 2 * static_cast<int>(std::sqrt(static_cast<double>(count))));
  for (const Assignment* others : {static_cast<const Assignment*>(&full), &lowest}) {
    for (int size = 2; size <= largest; ++size) {
      // The groups that free most are those whose backward pass comes last.
      for (int groups = 1; groups * size <= count; ++groups) {
        Assignment assignment = *others;
        assignment.keep_shared = false;
        std::vector<int> group(At(n), 0);
        for (int i = 0; i < groups * size; ++i) {
          group[At(first + i)] = 1 + i / size;
          assignment.options[At(first + i)] = full.options[At(first + i)];
        }
        SetTotals(assignment, group);
        RematChoice choice{.kept = {},
                           .group = std::move(group),
                           .keep_shared = false,
                           .seconds = assignment.seconds,
                           .peak_bytes = assignment.peak_bytes,
                           .last_bytes = assignment.last_bytes};
        for (const RematOption* option : assignment.options) choice.kept.push_back(option->kept);
        grouped.push_back(std::move(choice));
      }
    }
  }
  std::stable_sort(grouped.begin(), grouped.end(),
                   [](const RematChoice& a, const RematChoice& b) { return a.seconds < b.seconds; });
  int64_t smallest = std::min(candidates.back().peak_bytes, lowest.peak_bytes);
  for (RematChoice& choice : grouped) {
    if (choice.peak_bytes >= smallest || choice.seconds <= candidates.back().seconds) continue;
    smallest = choice.peak_bytes;
    candidates.push_back(std::move(choice));
  }
}

double RematProblem::LowerBoundSeconds(int64_t peak_bytes) const {
  // For each of the last blocks: min sum t  s.t.  the bytes saved before it, its own peak and the gradients behind it
  // <= peak_bytes. The dual in one multiplier is concave; a golden section on its logarithm finds the best. The
  // tightest of these holds for all.
  constexpr int kBlocks = 8;
  const int n = static_cast<int>(chain_.blocks.size());
  double bound = 0;
  for (int limited = std::max(0, n - kBlocks); limited < n; ++limited) {
    const double budget = static_cast<double>(peak_bytes - growth_after_[At(limited)]);
    const auto dual = [&](double price) {
      double sum = -price * budget;
      for (int b = 0; b <= limited; ++b) {
        double least = std::numeric_limits<double>::infinity();
        for (const RematOption& option : menu(b).options) {
          const int64_t bytes = b < limited ? option.saved_bytes : PeakOf(At(b), option) - growth_after_[At(b)];
          least = std::min(least, option.seconds + price * static_cast<double>(bytes));
        }
        sum += least;
      }
      return sum + std::min(shared_seconds_, price * static_cast<double>(shared_bytes_));
    };
    double low = -40, high = 0;
    constexpr double kGolden = 0.6180339887498949;
    for (int i = 0; i < 60; ++i) {
      const double x = high - kGolden * (high - low), y = low + kGolden * (high - low);
      const double at_x = dual(std::exp(x)), at_y = dual(std::exp(y));
      bound = std::max({bound, at_x, at_y});
      (at_x < at_y ? low : high) = at_x < at_y ? x : y;
    }
  }
  return bound;
}

std::optional<double> RematProblem::LeastSeconds(int64_t peak_bytes, size_t most_states) const {
  struct Sum {
    double seconds = 0;
    int64_t saved = 0;
  };
  std::vector<Sum> sums = {{0, shared_bytes_}, {shared_seconds_, 0}};
  for (size_t b = 0; b < chain_.blocks.size(); ++b) {
    std::vector<Sum> next;
    for (const Sum& sum : sums) {
      for (const RematOption& option : menu(static_cast<int>(b)).options) {
        if (sum.saved + PeakOf(b, option) > peak_bytes) continue;
        next.push_back({sum.seconds + option.seconds, sum.saved + option.saved_bytes});
      }
    }
    std::sort(next.begin(), next.end(), [](const Sum& x, const Sum& y) {
      return std::make_pair(x.seconds, x.saved) < std::make_pair(y.seconds, y.saved);
    });
    sums.clear();
    for (const Sum& sum : next) {
      if (sums.empty() || sum.saved < sums.back().saved) sums.push_back(sum);
    }
    if (sums.empty() || sums.size() > most_states) return std::nullopt;
  }
  return sums.front().seconds;
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
      const auto block = chain_.backward_of.find(reader);
      const Place place = {.block = block == chain_.backward_of.end() ? -1 : block->second};
      for (size_t i = 0; i < reader->operands().size(); ++i) {
        const std::optional<Clone> clone = CloneOf(reader->operands()[i], place);
        if (!clone) continue;
        RETURN_IF_ERROR(Make(*clone, place));
        const int index = reader->operands()[i].index;
        graph_.SetOperand(reader, static_cast<int>(i), clones_.at(*clone)->result(index));
      }
    }
    return !clones_.empty();
  }

 private:
  // Who reads: the backward pass of a block (-1: the optimizer), or the way to the inputs of a group's blocks.
  struct Place {
    int block = -1;
    bool in_group = false;
  };
  // A node that runs again, and for whom: kForBlock, kForGroup, or, for a constant that several blocks read,
  // kForReader + the block, so that none is held from one block to another.
  using Clone = std::pair<Node*, int>;
  static constexpr int kForBlock = 0, kForGroup = 1, kForReader = 3;

  // The clone that a reader takes instead of the value; none: the value is there.
  std::optional<Clone> CloneOf(const Value& value, const Place& place) const {
    const Value root = BehindViews(value);
    Node* node = root.node;
    if (!MayRecompute(*node) || graph_outputs_.contains(root)) return std::nullopt;
    const auto block = chain_.block_of.find(node);
    if (block != chain_.block_of.end()) {
      const size_t b = At(block->second);
      if (chain_.blocks[b].is_unit && chain_.blocks[b].outputs.contains(root)) {
        const int group = choice_.group[b];
        if (group == 0 || b + 1 == chain_.blocks.size() || choice_.group[b + 1] != group) return std::nullopt;
        return Clone(value.node, kForGroup);
      }
    }
    const auto kept = kept_.find(node);
    if (kept == kept_.end() || kept->second) return std::nullopt;
    if (block == chain_.block_of.end()) return Clone(value.node, kForReader + place.block);
    return Clone(value.node, place.in_group ? kForGroup : kForBlock);
  }

  // Makes the clone and, before it, those that it reads.
  absl::Status Make(const Clone& wanted, const Place& reader) {
    std::vector<Clone> todo = {wanted};
    while (!todo.empty()) {
      const Clone next = todo.back();
      if (clones_.contains(next)) {
        todo.pop_back();
        continue;
      }
      const Place place = {.block = reader.block, .in_group = next.second == kForGroup};
      std::vector<Value> operands;
      for (const Value& operand : next.first->operands()) {
        const std::optional<Clone> clone = CloneOf(operand, place);
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
  ASSIGN_OR_RETURN(const bool merged, MergeRecomputed(graph));
  return changed || merged;
}

}  // namespace mt
