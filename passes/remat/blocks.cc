#include "passes/remat/blocks.h"

#include <algorithm>

#include "ir/base/hash.h"
#include "ir/cost.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

constexpr int kMaxPeriod = 64;  // Stretches that one block of a model is cut into.
constexpr int kMaxRuns = 32;    // Kinds of repeated blocks that are looked for.

bool IsForward(const Node& node) { return !node.is_input() && node.phase() == Phase::kForward; }

// A part of the chain between two cuts.
struct Stretch {
  std::vector<Node*> nodes;
  size_t flow_nodes = 0;  // Without constants.
  uint64_t hash = 0;
};

class BlockFinder {
 public:
  explicit BlockFinder(const Graph& graph) : order_(graph.TopologicalOrder()) {}

  RematChain Run() {
    FindChain();
    Cut();
    AddConstants();
    for (size_t i = 0; i < stretches_.size(); ++i) stretches_[i].hash = Hash(stretches_[i], static_cast<int>(i));
    const int n = static_cast<int>(stretches_.size());
    FindRuns(0, n);
    if (runs_ == 0) {
      // Two by two: the halves of a layer.
      const auto is_large = [&](int i) { return i + 1 < n && stretches_[At(i)].flow_nodes > 1; };
      for (int i = 0; i < n; i += std::max(1, units_[At(i)])) units_[At(i)] = is_large(i) ? 1 + is_large(i + 1) : 0;
    }
    MakeBlocks();
    return std::move(chain_);
  }

 private:
  // The forward nodes that depend on a parameter and on data: what flows through the model.
  void FindChain() {
    absl::flat_hash_map<const Node*, int> depends;  // Bits: 1 data, 2 parameter.
    for (Node* node : order_) {
      if (node->is_input()) {
        depends[node] = node->role() == Role::kData ? 1 : node->role() == Role::kParameter ? 2 : 0;
        continue;
      }
      position_[node] = static_cast<int>(position_.size());
      if (node->phase() != Phase::kForward) {
        chain_.late.push_back(node);
        continue;
      }
      int bits = 0;
      for (const Value& operand : node->operands()) bits |= depends[operand.node];
      depends[node] = bits;
      (bits == 3 ? flow_ : constants_).push_back(node);
    }
  }

  // Ends a stretch where all that is read further on are results of one node.
  void Cut() {
    const int n = static_cast<int>(flow_.size());
    absl::flat_hash_map<const Node*, int> index;
    for (int i = 0; i < n; ++i) index[flow_[At(i)]] = i;
    std::vector<int> last(At(n));  // Of a node behind views: its last reader.
    for (int i = 0; i < n; ++i) {
      last[At(i)] = i;
      for (const Value& operand : flow_[At(i)]->operands()) {
        const auto root = index.find(BehindViews(operand).node);
        if (root != index.end()) last[At(root->second)] = i;
      }
    }
    std::vector<std::vector<int>> closing(At(n));
    int open = 0;
    stretches_.emplace_back();
    for (int i = 0; i < n; ++i) {
      stretches_.back().nodes.push_back(flow_[At(i)]);
      ++stretches_.back().flow_nodes;
      if (last[At(i)] > i) {
        ++open;
        closing[At(last[At(i)])].push_back(i);
      }
      open -= static_cast<int>(closing[At(i)].size());
      if (open == 1 && i + 1 < n && !flow_[At(i + 1)]->op().is_view) stretches_.emplace_back();
    }
    for (size_t s = 0; s < stretches_.size(); ++s) {
      for (const Node* node : stretches_[s].nodes) stretch_of_[node] = static_cast<int>(s);
    }
    units_.assign(stretches_.size(), 0);
  }

  // A constant that one stretch alone reads (the cast of its weight) is part of it.
  void AddConstants() {
    constexpr int kNobody = -1, kSeveral = -2;
    for (auto node = constants_.rbegin(); node != constants_.rend(); ++node) {
      int reader = kNobody;
      for (const Use& use : (*node)->uses()) {
        if (!IsForward(*use.node)) continue;
        const auto at = stretch_of_.find(use.node);
        const int stretch = at == stretch_of_.end() ? kSeveral : at->second;
        reader = reader == kNobody || reader == stretch ? stretch : kSeveral;
      }
      if (reader < 0) {
        chain_.shared.push_back(*node);
      } else {
        stretch_of_[*node] = reader;
        stretches_[At(reader)].nodes.push_back(*node);
      }
    }
    std::reverse(chain_.shared.begin(), chain_.shared.end());
    const auto earlier = [&](const Node* a, const Node* b) { return position_.at(a) < position_.at(b); };
    for (Stretch& stretch : stretches_) std::sort(stretch.nodes.begin(), stretch.nodes.end(), earlier);
  }

  // What a stretch computes: ops, types, wiring, cost, and which of its values the backward reads. Attributes show in
  // types and cost; a dropout's key may differ.
  uint64_t Hash(const Stretch& stretch, int index) const {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto word = [&](uint64_t w) {
      hash = (hash ^ w) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    };
    absl::flat_hash_map<const Node*, size_t> number;
    for (const Node* node : stretch.nodes) {
      number.emplace(node, number.size());
      word(Fnv1a(node->op().name));
      const Cost cost = NodeCost(*node);
      word(static_cast<uint64_t>(cost.flops));
      word(static_cast<uint64_t>(cost.bytes_read) + static_cast<uint64_t>(cost.bytes_written));
      for (const TensorType& type : node->result_types()) {
        word(static_cast<uint64_t>(type.dtype));
        word(type.dims.size());
        for (const int64_t dim : type.dims) word(static_cast<uint64_t>(dim));
      }
      for (const Value& operand : node->operands()) {
        const auto at = number.find(operand.node);
        word(at == number.end() ? ~uint64_t{0} : at->second);
        word(static_cast<uint64_t>(operand.index));
      }
      const bool handed_on = std::any_of(node->uses().begin(), node->uses().end(), [&](const Use& use) {
        const auto at = stretch_of_.find(use.node);
        return at != stretch_of_.end() && at->second != index;
      });
      word(handed_on ? 1 : 0);
      if (handed_on) continue;
      for (int r = 0; r < node->num_results(); ++r) {
        word(std::any_of(node->uses().begin(), node->uses().end(),
                         [&](const Use& use) {
                           return use.node->phase() != Phase::kForward &&
                                  use.node->operands()[At(use.operand)].index == r;
                         })
                 ? 1
                 : 0);
      }
    }
    return hash;
  }

  // Marks the run of equal stretches that covers most nodes of [begin, end), then looks before and behind it.
  void FindRuns(int begin, int end) {
    int best_start = 0, best_period = 0, best_count = 0;
    int64_t best_covered = 0;
    std::vector<int64_t> nodes_before = {0};
    for (int i = begin; i < end; ++i) {
      nodes_before.push_back(nodes_before.back() + static_cast<int64_t>(stretches_[At(i)].nodes.size()));
    }
    for (int period = 1; period <= std::min(kMaxPeriod, (end - begin) / 2); ++period) {
      int equal = 0;  // Stretches before `i` that are as the one a period on.
      for (int i = begin; i + period <= end; ++i) {
        if (i + period < end && stretches_[At(i)].hash == stretches_[At(i + period)].hash) {
          ++equal;
          continue;
        }
        const int count = equal / period + 1, start = i - equal;
        equal = 0;
        if (count < 2) continue;
        const int64_t covered = nodes_before[At(start + count * period - begin)] - nodes_before[At(start - begin)];
        // A run of single ops is no block.
        if (covered <= best_covered || covered < 2 * count) continue;
        best_covered = covered;
        best_start = start;
        best_period = period;
        best_count = count;
      }
    }
    if (best_period == 0) return;
    if (++runs_ > kMaxRuns) return;
    for (int i = 0; i < best_count; ++i) units_[At(best_start + i * best_period)] = best_period;
    FindRuns(begin, best_start);
    FindRuns(best_start + best_count * best_period, end);
  }

  void MakeBlocks() {
    absl::flat_hash_map<uint64_t, int> kinds;
    const auto add = [&](size_t first, size_t last, bool is_unit) {
      RematBlock block;
      block.is_unit = is_unit;
      uint64_t hash = is_unit ? 1 : 2;
      for (size_t s = first; s < last; ++s) {
        const Stretch& stretch = stretches_[s];
        hash = (hash ^ stretch.hash) * 0x9e3779b97f4a7c15u;
        block.nodes.insert(block.nodes.end(), stretch.nodes.begin(), stretch.nodes.end());
      }
      block.kind = kinds.emplace(hash, static_cast<int>(kinds.size())).first->second;
      for (const Node* node : block.nodes) chain_.block_of[node] = static_cast<int>(chain_.blocks.size());
      chain_.blocks.push_back(std::move(block));
    };
    const size_t n = stretches_.size();
    for (size_t i = 0; i < n;) {
      if (units_[i] > 0) {
        add(i, i + At(units_[i]), true);
        i += At(units_[i]);
        continue;
      }
      size_t end = i;
      while (end < n && units_[end] == 0) ++end;
      add(i, end, false);
      i = end;
    }
    for (size_t b = 0; b < chain_.blocks.size(); ++b) {
      for (const Node* node : chain_.blocks[b].nodes) {
        for (const Use& use : node->uses()) {
          if (!IsForward(*use.node)) continue;
          const auto reader = chain_.block_of.find(use.node);
          if (reader != chain_.block_of.end() && reader->second == static_cast<int>(b)) continue;
          chain_.blocks[b].outputs.insert(BehindViews(use.node->operands()[At(use.operand)]));
        }
      }
    }
    // The backward graph goes through the blocks from the last to the first. What reads forward values alone may stand
    // anywhere and says nothing about where it has got to.
    const int last = static_cast<int>(chain_.blocks.size()) - 1;
    int current = last;
    for (Node* node : chain_.late) {
      if (node->phase() != Phase::kBackward) continue;
      int reads = -1;
      bool follows = false;
      for (const Value& operand : node->operands()) {
        const Value root = BehindViews(operand);
        follows = follows || (!root.node->is_input() && root.node->phase() != Phase::kForward);
        const auto block = chain_.block_of.find(root.node);
        if (block == chain_.block_of.end()) continue;
        // What a block hands on is the next one's.
        const int reader = block->second + (chain_.blocks[At(block->second)].outputs.contains(root) ? 1 : 0);
        reads = std::max(reads, std::min(reader, last));
      }
      if (reads >= 0 && follows) current = std::min(current, reads);
      const int owner = reads >= 0 && !follows ? reads : current;
      chain_.blocks[At(owner)].backward.push_back(node);
      chain_.backward_of[node] = owner;
    }
  }

  const std::vector<Node*> order_;
  absl::flat_hash_map<const Node*, int> position_;
  std::vector<Node*> flow_, constants_;
  std::vector<Stretch> stretches_;
  absl::flat_hash_map<const Node*, int> stretch_of_;
  std::vector<int> units_;  // By stretch: how many from here on make a block of the model; 0: none begins here.
  int runs_ = 0;
  RematChain chain_;
};

}  // namespace

Value BehindViews(Value value) {
  while (!value.node->is_input() && value.node->op().is_view) value = value.node->operands()[0];
  return value;
}

RematChain FindRematBlocks(const Graph& graph) { return BlockFinder(graph).Run(); }

bool MayRecompute(const Node& node) {
  return IsForward(node) && node.op().effect == Effect::kNone && node.op().remat != RematPolicy::kMustSave;
}

}  // namespace mt
