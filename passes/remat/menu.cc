#include "passes/remat/menu.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

// How many passes over its bytes a value may cost to count as free: norms, activations and dropout need two to three.
constexpr double kFreePasses = 4;
// Subsets x nodes.
constexpr size_t kMaxWork = size_t{1} << 21;

// A piece of memory in the simulation: a value of the block, kept or recomputed, or a gradient.
struct Piece {
  int64_t bytes = 0;
  int reads = 0;       // By the backward pass; those of recomputed nodes come on top.
  bool stays = false;  // Read after the block's backward pass.
};

// A node of the block or of its backward pass, over pieces.
struct Step {
  absl::InlinedVector<int, 6> operands;                  // Pieces; -1: something that is there anyway.
  absl::InlinedVector<int, 4> results;                   // Pieces.
  absl::InlinedVector<std::pair<int, int>, 2> in_place;  // Pieces: result, operand.
};

struct ForwardStep : Step {
  double seconds = 0;
  bool heavy = false;
  bool may_recompute = false;
  int node = 0;                           // Index into the block's nodes.
  absl::InlinedVector<int, 4> consumers;  // Forward steps of the block that read a result.
  bool read_late = false;                 // The backward pass reads a result that is no output.
  bool output_only = true;                // All its results are outputs: nothing to decide.
  bool constant = true;                   // Nothing that depends on data flows into it.
};

class MenuMaker {
 public:
  MenuMaker(const RematChain& chain, int block, const Roofline& roofline)
      : block_(chain.blocks[At(block)]), roofline_(roofline) {
    AddForward(chain);
    AddBackward();
  }

  RematMenu Run() {
    RematMenu menu;
    FindChoices();
    const size_t n = forward_.size();
    std::vector<bool> kept(n);
    // What nothing that is recomputed needs is not held, so that keeping all is keeping what the backward pass reads.
    std::fill(kept.begin(), kept.end(), true);
    for (const int s : dropped_always_) kept[At(s)] = false;
    const std::vector<bool> all = kept;
    const size_t choices = choices_.size();
    std::vector<Choice> found;
    for (uint32_t mask = 0; mask < (1u << choices); ++mask) {
      kept = all;
      for (size_t c = 0; c < choices; ++c) {
        if ((mask >> c & 1) == 0) continue;
        for (const int s : choices_[c]) kept[At(s)] = false;
      }
      found.push_back(Evaluate(kept, mask));
    }
    // The peak is simulated for what is not worse in bytes and seconds, or for all where they are few.
    const bool all_peaks = found.size() <= 512;
    std::sort(found.begin(), found.end(), [](const Choice& a, const Choice& b) {
      return std::make_tuple(a.seconds, a.saved_bytes, a.mask) < std::make_tuple(b.seconds, b.saved_bytes, b.mask);
    });
    int64_t least = -1;
    for (Choice& choice : found) {
      if (!all_peaks && least >= 0 && choice.saved_bytes >= least) continue;
      least = least < 0 ? choice.saved_bytes : std::min(least, choice.saved_bytes);
      choice.peak_bytes = Simulate(KeptOf(all, choice.mask), &menu.growth_bytes);
    }
    // By seconds: what is better in bytes or in peak than all cheaper ones stays.
    std::map<int64_t, int64_t> best_peak;  // By saved bytes; falls as they rise.
    const Choice* free = nullptr;
    double free_value = 0;
    for (const Choice& choice : found) {
      if (!choice.heavy) {
        const double value =
            static_cast<double>(choice.saved_bytes) + choice.seconds * roofline_.bytes_per_second / kFreePasses;
        if (free == nullptr || value < free_value) {
          free = &choice;
          free_value = value;
        }
      }
      if (choice.peak_bytes < 0) continue;
      auto at = best_peak.upper_bound(choice.saved_bytes);
      if (at != best_peak.begin() && std::prev(at)->second <= choice.peak_bytes) continue;
      while (at != best_peak.end() && at->second >= choice.peak_bytes) at = best_peak.erase(at);
      best_peak[choice.saved_bytes] = choice.peak_bytes;
      menu.options.push_back(OptionOf(KeptOf(all, choice.mask), choice));
    }
    menu.free = OptionOf(KeptOf(all, free->mask), *free);
    if (menu.free.peak_bytes < 0) menu.free.peak_bytes = Simulate(KeptOf(all, free->mask), nullptr);
    menu.full = menu.free;
    if (block_.is_unit) {
      for (size_t s = 0; s < n; ++s) kept[s] = !forward_[s].may_recompute;
      Choice full = Evaluate(kept, 0);
      full.peak_bytes = Simulate(kept, nullptr);
      menu.full = OptionOf(kept, full);
    }
    for (const ForwardStep& step : forward_) menu.forward_seconds += step.seconds;
    return menu;
  }

 private:
  struct Choice {
    uint32_t mask = 0;
    int64_t saved_bytes = 0, peak_bytes = -1;
    double seconds = 0;
    bool heavy = false;
  };

  int PieceOf(const Value& value) const {
    const auto at = piece_.find(BehindViews(value));
    return at == piece_.end() ? -1 : at->second;
  }

  void AddInPlace(const Node& node, Step& step) const {
    for (const auto& [r, k] : InPlacePairs(node.op(), node.operand_types(), node.result_types(), node.attrs())) {
      step.in_place.push_back({step.results[At(r)], step.operands[At(k)]});
    }
  }

  void AddForward(const RematChain& chain) {
    absl::flat_hash_map<const Node*, int> step_of;
    for (size_t i = 0; i < block_.nodes.size(); ++i) {
      const Node& node = *block_.nodes[i];
      if (node.op().is_view) continue;
      ForwardStep step;
      step.node = static_cast<int>(i);
      step.seconds = NodeSeconds(node, roofline_);
      step.heavy = node.op().remat == RematPolicy::kPreferSave;
      step.may_recompute = MayRecompute(node);
      for (const Value& operand : node.operands()) {
        const Node* producer = BehindViews(operand).node;
        step.operands.push_back(PieceOf(operand));
        const auto at = step_of.find(producer);
        if (at == step_of.end()) {
          step.constant = step.constant && !chain.block_of.contains(producer) &&
                          !(producer->is_input() && producer->role() == Role::kData);
          continue;
        }
        step.constant = step.constant && forward_[At(at->second)].constant;
        if (step.operands.back() >= 0) {
          forward_[At(at->second)].consumers.push_back(static_cast<int>(forward_.size()));
        }
      }
      for (int r = 0; r < node.num_results(); ++r) {
        const Value value = node.result(r);
        step.results.push_back(static_cast<int>(pieces_.size()));
        // What a unit hands on is kept by the one who decides about the next block.
        const bool is_output = block_.is_unit && block_.outputs.contains(value);
        piece_[value] = is_output ? -1 : static_cast<int>(pieces_.size());
        producer_.push_back(static_cast<int>(forward_.size()));
        is_output_.push_back(is_output);
        pieces_.push_back({.bytes = value.type().byte_size()});
        step.output_only = step.output_only && is_output;
        if (is_output) output_bytes_ += IsReadLate(node, r) ? value.type().byte_size() : 0;
      }
      AddInPlace(node, step);
      step_of[&node] = static_cast<int>(forward_.size());
      forward_.push_back(std::move(step));
    }
  }

  // Whether anything of a later phase reads the result or a view of it.
  static bool IsReadLate(const Node& node, int result) {
    for (const Use& use : node.uses()) {
      if (use.node->operands()[At(use.operand)].index != result) continue;
      if (use.node->phase() != Phase::kForward) return true;
      if (use.node->op().is_view && IsReadLate(*use.node, 0)) return true;
    }
    return false;
  }

  void AddBackward() {
    absl::flat_hash_map<const Node*, bool> mine;
    for (const Node* node : block_.backward) mine[node] = true;
    for (const Node* node : SinksFirst()) {
      Step step;
      for (const Value& operand : node->operands()) {
        const Value root = BehindViews(operand);
        int piece = PieceOf(root);
        if (piece < 0 && !root.node->is_input() && root.node->phase() != Phase::kForward) {
          // A gradient that comes in.
          piece = AddPiece(root);
          incoming_.push_back(piece);
          pieces_[At(piece)].stays = ReadElsewhere(*root.node, root.index, mine);
        }
        if (piece >= 0) ++pieces_[At(piece)].reads;
        if (piece >= 0 && piece < static_cast<int>(producer_.size()))
          forward_[At(producer_[At(piece)])].read_late = true;
        step.operands.push_back(piece);
      }
      for (int r = 0; r < node->num_results(); ++r) {
        const int piece = AddPiece(node->result(r));
        pieces_[At(piece)].stays = ReadElsewhere(*node, r, mine);
        if (ReadByOptimizer(*node, r)) growing_.push_back(piece);
        step.results.push_back(piece);
      }
      AddInPlace(*node, step);
      backward_.push_back(std::move(step));
    }
    // What later blocks' backward passes read of this one's values counts as read here: it is held until then.
    for (const auto& [value, piece] : piece_) {
      if (piece < 0 || piece >= static_cast<int>(producer_.size()) || pieces_[At(piece)].reads > 0) continue;
      if (!IsReadLate(*value.node, value.index)) continue;
      pieces_[At(piece)].reads = 1;
      pieces_[At(piece)].stays = true;
      forward_[At(producer_[At(piece)])].read_late = true;
    }
  }

  // The backward pass as the planner may order it: what makes a gradient of a parameter runs as soon as the gradient
  // that it reads is there. Views are left out.
  std::vector<const Node*> SinksFirst() const {
    std::vector<std::pair<size_t, const Node*>> keyed;
    absl::flat_hash_map<const Node*, size_t> key_of;
    for (const Node* node : block_.backward) {
      if (node->op().is_view) continue;
      size_t key = 2 * (keyed.size() + 1);
      const auto is_optimizer = [](const Use& use) { return use.node->phase() == Phase::kOptimizer; };
      if (std::all_of(node->uses().begin(), node->uses().end(), is_optimizer)) {
        // A gradient that comes in is there from the start.
        size_t after = 0;
        bool follows = false;
        for (const Value& operand : node->operands()) {
          const Node* producer = BehindViews(operand).node;
          follows = follows || (!producer->is_input() && producer->phase() != Phase::kForward);
          const auto at = key_of.find(producer);
          if (at != key_of.end()) after = std::max(after, at->second);
        }
        if (follows) key = after + 1;
      }
      key_of[node] = key;
      keyed.push_back({key, node});
    }
    std::stable_sort(keyed.begin(), keyed.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<const Node*> order;
    for (const auto& [key, node] : keyed) order.push_back(node);
    return order;
  }

  int AddPiece(const Value& value) {
    const int piece = static_cast<int>(pieces_.size());
    piece_[value] = piece;
    pieces_.push_back({.bytes = value.type().byte_size()});
    return piece;
  }

  static bool ReadElsewhere(const Node& node, int result, const absl::flat_hash_map<const Node*, bool>& mine) {
    for (const Use& use : node.uses()) {
      if (use.node->operands()[At(use.operand)].index != result) continue;
      if (!mine.contains(use.node)) return true;
      if (use.node->op().is_view && ReadElsewhere(*use.node, 0, mine)) return true;
    }
    return false;
  }

  static bool ReadByOptimizer(const Node& node, int result) {
    for (const Use& use : node.uses()) {
      if (use.node->operands()[At(use.operand)].index != result) continue;
      if (use.node->phase() == Phase::kOptimizer) return true;
      if (use.node->op().is_view && ReadByOptimizer(*use.node, 0)) return true;
    }
    return false;
  }

  int64_t ResultBytes(const ForwardStep& step) const {
    int64_t bytes = 0;
    for (const int piece : step.results) bytes += pieces_[At(piece)].bytes;
    return bytes;
  }

  // What there is to decide: nodes whose results the backward pass reads, and others from which recomputing may start.
  void FindChoices() {
    const int n = static_cast<int>(forward_.size());
    std::vector<bool> useless(At(n), false);
    std::vector<int> constants, decided;
    for (int s = n - 1; s >= 0; --s) {
      const ForwardStep& step = forward_[At(s)];
      if (!step.may_recompute || step.output_only) continue;
      if (!step.read_late) {
        // Keeping it serves its readers alone. It is no better than keeping them where they are one node of no more
        // bytes, or are kept anyway or of no use either.
        absl::InlinedVector<int, 4> readers;
        for (const int c : step.consumers) {
          const ForwardStep& consumer = forward_[At(c)];
          const bool is_kept = !consumer.may_recompute || consumer.output_only;
          if (!is_kept && std::find(readers.begin(), readers.end(), c) == readers.end()) readers.push_back(c);
        }
        const bool one_smaller = readers.size() == 1 && (useless[At(readers[0])] ||
                                                         ResultBytes(forward_[At(readers[0])]) <= ResultBytes(step));
        useless[At(s)] = readers.empty() || one_smaller;
      }
      if (useless[At(s)]) {
        dropped_always_.push_back(s);
      } else if (step.constant) {
        constants.push_back(s);
      } else {
        decided.push_back(s);
      }
    }
    // Casts of weights and the like go together.
    if (!constants.empty()) choices_.push_back(constants);
    std::stable_sort(decided.begin(), decided.end(),
                     [&](int a, int b) { return ResultBytes(forward_[At(a)]) > ResultBytes(forward_[At(b)]); });
    // A block of very many nodes has fewer choices: the work stays small.
    size_t limit = kMaxChoices;
    while (limit > 1 && forward_.size() << limit > kMaxWork) --limit;
    for (const int s : decided) {
      if (choices_.size() < limit) choices_.push_back({s});
    }
  }

  std::vector<bool> KeptOf(const std::vector<bool>& all, uint32_t mask) const {
    std::vector<bool> kept = all;
    for (size_t c = 0; c < choices_.size(); ++c) {
      if ((mask >> c & 1) == 0) continue;
      for (const int s : choices_[c]) kept[At(s)] = false;
    }
    return kept;
  }

  bool IsDecided(const ForwardStep& step) const { return step.may_recompute && !step.output_only; }

  // Which nodes run again.
  void FindNeeded(const std::vector<bool>& kept) {
    needed_.assign(forward_.size(), false);
    for (size_t s = forward_.size(); s-- > 0;) {
      const ForwardStep& step = forward_[s];
      if (kept[s] || !IsDecided(step)) continue;
      bool needed = step.read_late;
      for (size_t c = 0; !needed && c < step.consumers.size(); ++c) needed = needed_[At(step.consumers[c])];
      needed_[s] = needed;
    }
  }

  Choice Evaluate(const std::vector<bool>& kept, uint32_t mask) {
    FindNeeded(kept);
    Choice choice{.mask = mask, .saved_bytes = output_bytes_};
    for (size_t s = 0; s < forward_.size(); ++s) {
      const ForwardStep& step = forward_[s];
      if (needed_[s]) {
        choice.seconds += step.seconds;
        choice.heavy = choice.heavy || step.heavy;
        continue;
      }
      bool read_again = false;
      for (const int c : step.consumers) read_again = read_again || needed_[At(c)];
      for (const int piece : step.results) {
        // Which result a recomputed reader takes is told apart below, by the simulation.
        if (pieces_[At(piece)].reads > 0 || (read_again && IsReadAgain(piece))) {
          choice.saved_bytes += is_output_[At(piece)] ? 0 : pieces_[At(piece)].bytes;
        }
      }
    }
    return choice;
  }

  bool IsReadAgain(int piece) const {
    for (const int c : forward_[At(producer_[At(piece)])].consumers) {
      if (!needed_[At(c)]) continue;
      const auto& operands = forward_[At(c)].operands;
      if (std::find(operands.begin(), operands.end(), piece) != operands.end()) return true;
    }
    return false;
  }

  // Runs the backward pass with what it lacks recomputed just before its first reader. Returns the most bytes live.
  int64_t Simulate(const std::vector<bool>& kept, int64_t* growth) {
    FindNeeded(kept);
    reads_.resize(pieces_.size());
    for (size_t p = 0; p < pieces_.size(); ++p) reads_[p] = pieces_[p].reads;
    done_.assign(forward_.size(), false);
    held_.assign(pieces_.size(), 0);
    for (size_t s = 0; s < forward_.size(); ++s) {
      if (!needed_[s]) continue;
      for (const int piece : forward_[s].operands) {
        if (piece >= 0) ++reads_[At(piece)];
      }
    }
    live_ = most_ = 0;
    for (size_t s = 0; s < forward_.size(); ++s) {
      if (needed_[s]) continue;
      for (const int piece : forward_[s].results) {
        if (reads_[At(piece)] > 0 && !is_output_[At(piece)]) Hold(piece, pieces_[At(piece)].bytes);
      }
    }
    for (const int piece : incoming_) Hold(piece, pieces_[At(piece)].bytes);
    most_ = live_;
    for (const Step& step : backward_) {
      for (const int piece : step.operands) {
        if (piece >= 0 && piece < static_cast<int>(producer_.size())) Recompute(producer_[At(piece)]);
      }
      Execute(step);
    }
    if (growth != nullptr) {
      *growth = 0;
      for (const int piece : growing_) *growth += pieces_[At(piece)].bytes;
    }
    return most_;
  }

  void Hold(int piece, int64_t bytes) {
    held_[At(piece)] = bytes;
    live_ += bytes;
  }

  void Recompute(int s) {
    if (!needed_[At(s)] || done_[At(s)]) return;
    done_[At(s)] = true;
    const ForwardStep& step = forward_[At(s)];
    for (const int piece : step.operands) {
      if (piece >= 0) Recompute(producer_[At(piece)]);
    }
    Execute(step);
  }

  void Execute(const Step& step) {
    for (const int piece : step.results) {
      bool over = false;
      for (const auto& [result, operand] : step.in_place) {
        if (result != piece || operand < 0 || reads_[At(operand)] != 1 || pieces_[At(operand)].stays ||
            held_[At(operand)] != pieces_[At(piece)].bytes) {
          continue;
        }
        held_[At(operand)] = 0;
        held_[At(piece)] = pieces_[At(piece)].bytes;
        over = true;
        break;
      }
      if (!over) Hold(piece, pieces_[At(piece)].bytes);
    }
    most_ = std::max(most_, live_);
    for (const int piece : step.operands) {
      if (piece >= 0) --reads_[At(piece)];
    }
    for (const int piece : step.operands) Release(piece);
    for (const int piece : step.results) Release(piece);
  }

  void Release(int piece) {
    if (piece < 0 || reads_[At(piece)] > 0 || pieces_[At(piece)].stays) return;
    live_ -= held_[At(piece)];
    held_[At(piece)] = 0;
  }

  RematOption OptionOf(const std::vector<bool>& kept, const Choice& choice) const {
    RematOption option{.kept = std::vector<bool>(block_.nodes.size(), true),
                       .saved_bytes = choice.saved_bytes,
                       .peak_bytes = choice.peak_bytes,
                       .seconds = choice.seconds};
    for (size_t s = 0; s < forward_.size(); ++s) {
      if (IsDecided(forward_[s])) option.kept[At(forward_[s].node)] = kept[s];
    }
    return option;
  }

  const RematBlock& block_;
  const Roofline& roofline_;
  std::vector<ForwardStep> forward_;
  std::vector<Step> backward_;
  std::vector<Piece> pieces_;    // Results of the forward steps first.
  std::vector<int> producer_;    // By piece of the forward: its step.
  std::vector<bool> is_output_;  // By piece of the forward: what a unit hands on.
  absl::flat_hash_map<Value, int> piece_;
  std::vector<int> incoming_, growing_;
  std::vector<std::vector<int>> choices_;  // Forward steps that are kept or dropped together.
  std::vector<int> dropped_always_;
  int64_t output_bytes_ = 0;

  // Of one simulation.
  std::vector<bool> needed_, done_;
  std::vector<int> reads_;
  std::vector<int64_t> held_;
  int64_t live_ = 0, most_ = 0;
};

}  // namespace

RematMenu MakeRematMenu(const RematChain& chain, int block, const Roofline& roofline) {
  return MenuMaker(chain, block, roofline).Run();
}

}  // namespace mt
