// Element-wise and row nodes that follow one another to one node.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/region.h"
#include "passes/registry.h"

namespace mt {
namespace {

// Elements of the registers of one row where the region needs whole rows: they stay near the core.
constexpr int64_t kMaxRowElements = int64_t{48} << 10;
// A node between two that are fused may make this much; what the two keep alive stays alive over it.
constexpr int64_t kSmallBytes = int64_t{16} << 10;

enum class Kind { kNone, kElementWise, kNorm, kNormBackward, kColumnSum };

// Rows and width of the matrix that a node works on.
struct Space {
  int64_t rows = 0, width = 0;
  friend bool operator==(const Space& a, const Space& b) { return a.rows == b.rows && a.width == b.width; }
};

Space SpaceOf(const TensorType& type) {
  if (type.dims.empty()) return {1, 1};
  return {type.num_elements() / type.dim(-1), type.dim(-1)};
}

enum class Access { kNone, kLoad, kRow, kRandom };

// How an element-wise node with results of dimensions `to` reads an operand; kNone: as no region can.
Access AccessOf(const TensorType& operand, const Dims& to, const Space& space) {
  if (operand.dtype == DType::kI32) return Access::kRandom;
  const int64_t n = operand.num_elements(), elements = space.rows * space.width;
  if (n == elements && n > 1) return Access::kLoad;
  if (n == 1) return Access::kRow;
  const size_t rank = operand.dims.size(), missing = to.size() - rank;
  bool is_suffix = true, is_prefix = missing == 0 && operand.dims.back() == 1;
  size_t first = 0;
  while (first < rank && operand.dims[first] == 1) ++first;
  for (size_t d = 0; d < rank; ++d) {
    is_suffix = is_suffix && (d < first || operand.dims[d] == to[missing + d]);
    is_prefix = is_prefix && (d + 1 == rank || operand.dims[d] == to[missing + d]);
  }
  if (is_suffix) return Access::kLoad;
  return is_prefix ? Access::kRow : Access::kNone;
}

bool IsSmallFloat(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16; }

Kind KindOf(const Node& node, const Graph& graph) {
  if (node.is_input() || node.recompute_of() != nullptr || node.op().remat == RematPolicy::kMustSave)
    return Kind::kNone;
  const absl::string_view op = node.op().name;
  const bool is_norm = op == "layer_norm" || op == "rms_norm";
  const bool is_norm_backward = op == "layer_norm_backward" || op == "rms_norm_backward";
  if (!node.op().is_element_wise() && !is_norm && !is_norm_backward && op != "reduce_sum") return Kind::kNone;
  for (const Output& output : graph.outputs()) {
    if (output.donates != nullptr && output.value.node == &node) return Kind::kNone;  // Computed into its state.
  }
  for (const TensorType& type : node.result_types()) {
    if (!IsSmallFloat(type.dtype)) return Kind::kNone;
  }
  for (const Value& operand : node.operands()) {
    const bool is_random = node.op().is_element_wise() && operand.type().dtype == DType::kI32;
    if (!IsSmallFloat(operand.type().dtype) && !is_random) return Kind::kNone;
  }
  if (is_norm) return Kind::kNorm;
  if (is_norm_backward) return Kind::kNormBackward;
  if (op == "reduce_sum") {
    const TensorType& x = node.operands()[0].type();
    IntList all_but_last;
    for (int64_t d = 0; d + 1 < x.rank(); ++d) all_but_last.push_back(d);
    const Space space = SpaceOf(x);
    const bool sums_columns = node.attrs().Get<IntList>("dims") == all_but_last && space.rows > 1 && space.width > 1;
    return sums_columns ? Kind::kColumnSum : Kind::kNone;
  }
  if (node.num_results() != 1) return Kind::kNone;
  const TensorType& type = node.result_types()[0];
  for (const Value& operand : node.operands()) {
    if (AccessOf(operand.type(), type.dims, SpaceOf(type)) == Access::kNone) return Kind::kNone;
  }
  return Kind::kElementWise;
}

Space SpaceOf(const Node& node, Kind kind) {
  if (kind == Kind::kNorm || kind == Kind::kColumnSum) return SpaceOf(node.operands()[0].type());
  return SpaceOf(node.result_types()[0]);
}

struct Group {
  std::vector<int> members;  // Places in the order, increasing.
  int at = 0;                // Where it runs: the place of one of them.
};

// A region, and what it reads and makes.
struct Built {
  Region region;
  std::vector<Value> operands, results;
};

class Fuser {
 public:
  explicit Fuser(Graph& graph) : graph_(graph), order_(graph.TopologicalOrder()) {
    for (size_t i = 0; i < order_.size(); ++i) {
      place_[order_[i]] = static_cast<int>(i);
      kinds_.push_back(KindOf(*order_[i], graph));
      spaces_.push_back(kinds_[i] == Kind::kNone ? Space{} : SpaceOf(*order_[i], kinds_[i]));
      groups_.push_back({.members = {static_cast<int>(i)}, .at = static_cast<int>(i)});
      group_of_.push_back(static_cast<int>(i));
      has_backward_ = has_backward_ || order_[i]->phase() == Phase::kBackward;
    }
  }

  absl::StatusOr<bool> Run() {
    for (size_t i = 0; i < order_.size(); ++i) {
      if (kinds_[i] == Kind::kNone) continue;
      for (const Value& operand : order_[i]->operands()) {
        TryMerge(place_.at(operand.node), static_cast<int>(i));
      }
      // What reads the same tensor. Forward they stay apart where there is a backward pass: one may be computed again
      // without the other.
      if (kinds_[i] == Kind::kColumnSum || (has_backward_ && order_[i]->phase() == Phase::kForward)) continue;
      for (const Value& operand : order_[i]->operands()) {
        if (SpaceOf(operand.type()) == spaces_[i] && spaces_[i].rows * spaces_[i].width > 1) {
          for (const Use& use : operand.node->uses()) {
            const int other = place_.at(use.node);
            if (other < static_cast<int>(i) && use.node->operands()[static_cast<size_t>(use.operand)] == operand) {
              TryMerge(other, static_cast<int>(i));
            }
          }
        }
      }
    }
    bool any = false;
    for (size_t i = 0; i < order_.size(); ++i) any = any || IsFused(static_cast<int>(i));
    if (!any) return false;
    RETURN_IF_ERROR(Rebuild());
    return true;
  }

 private:
  const Group& GroupOf(int i) const { return groups_[static_cast<size_t>(group_of_[static_cast<size_t>(i)])]; }
  bool IsFused(int i) const { return GroupOf(i).members.size() > 1; }
  // Where a node runs.
  int At(const Node* node) const { return GroupOf(place_.at(node)).at; }
  Kind KindAt(int i) const { return kinds_[static_cast<size_t>(i)]; }
  Node* NodeAt(int i) const { return order_[static_cast<size_t>(i)]; }

  // Makes one group of those of `a` and `b` where that is allowed and does not keep anything alive for longer.
  void TryMerge(int a, int b) {
    const int ga = group_of_[static_cast<size_t>(a)], gb = group_of_[static_cast<size_t>(b)];
    if (ga == gb || KindAt(a) == Kind::kNone || KindAt(b) == Kind::kNone) return;
    if (!(spaces_[static_cast<size_t>(a)] == spaces_[static_cast<size_t>(b)])) return;
    if (NodeAt(a)->phase() != NodeAt(b)->phase()) return;
    Group merged;
    const Group &first = groups_[static_cast<size_t>(ga)], &second = groups_[static_cast<size_t>(gb)];
    std::merge(first.members.begin(), first.members.end(), second.members.begin(), second.members.end(),
               std::back_inserter(merged.members));
    // Sums over columns are small: they may be computed earlier. All others run where the last of them does.
    merged.at = -1;
    for (const int m : merged.members) {
      if (KindAt(m) != Kind::kColumnSum) merged.at = std::max(merged.at, m);
    }
    if (merged.at < 0 || !IsLegal(merged)) return;
    const absl::StatusOr<Built> built = Build(merged);
    if (!built.ok() || !IsWithinLimits(*built)) return;
    for (const int m : merged.members) group_of_[static_cast<size_t>(m)] = gb;
    groups_[static_cast<size_t>(ga)].members.clear();
    groups_[static_cast<size_t>(gb)] = std::move(merged);
  }

  bool IsMember(const Group& group, const Node* node) const {
    return std::binary_search(group.members.begin(), group.members.end(), place_.at(node));
  }

  bool IsLegal(const Group& group) const {
    int earliest = group.at;
    for (const int m : group.members) {
      const Node& node = *NodeAt(m);
      earliest = std::min(earliest, m);
      for (const Value& operand : node.operands()) {
        if (!IsMember(group, operand.node)) {
          if (At(operand.node) >= group.at) return false;
          continue;
        }
        // Only values of the whole matrix pass from one member to another.
        if (!(SpaceOf(operand.type()) == SpaceOf(node, KindAt(m))) || operand.index != 0) return false;
      }
      for (const Use& use : node.uses()) {
        if (!IsMember(group, use.node) && At(use.node) <= group.at) return false;
      }
    }
    // What the earlier members read and make stays alive up to the last one: nothing of size may come between.
    for (int i = earliest; i < group.at; ++i) {
      const Node& node = *NodeAt(i);
      if (node.is_input() || node.op().is_view || IsMember(group, &node) || GroupOf(i).at != i) continue;
      int64_t bytes = 0;
      for (const Value& operand : node.operands()) bytes = std::max(bytes, operand.type().byte_size());
      for (const TensorType& type : node.result_types()) bytes = std::max(bytes, type.byte_size());
      if (bytes > kSmallBytes) return false;
    }
    return true;
  }

  bool IsWithinLimits(const Built& built) const {
    if (!built.region.IsWorthOneKernel(built.operands.size())) return false;
    bool needs_rows = false;
    for (const RegionStep& step : built.region.steps) needs_rows |= step.kind == RegionStep::Kind::kRowSum;
    for (const RegionResult& result : built.region.results) needs_rows |= result.kind == RegionResult::Kind::kRow;
    if (!needs_rows) return true;
    // Most values of elements that wait for a later step.
    std::vector<TensorType> types;
    for (const Value& operand : built.operands) types.push_back(operand.type());
    const std::vector<Extent> extents = built.region.Extents(types);
    std::vector<size_t> last(extents.size(), 0);
    for (size_t i = 0; i < built.region.steps.size(); ++i) {
      for (const int arg : {built.region.steps[i].a, built.region.steps[i].b, built.region.steps[i].c}) {
        if (arg >= 0) last[static_cast<size_t>(arg)] = i;
      }
    }
    for (const RegionResult& result : built.region.results) last[static_cast<size_t>(result.value)] = extents.size();
    int64_t most = 0;
    for (size_t i = 0; i < extents.size(); ++i) {
      int64_t live = 0;
      for (size_t v = 0; v <= i; ++v) live += extents[v] == Extent::kElement && last[v] >= i ? 1 : 0;
      most = std::max(most, live);
    }
    return most * built.region.width <= kMaxRowElements;
  }

  absl::StatusOr<Built> Build(const Group& group) const {
    const Space space = spaces_[static_cast<size_t>(group.members.back())];
    RegionBuilder b(space.rows, space.width);
    Built built;
    absl::flat_hash_map<Value, int> inner;  // Values of the region that members make.
    absl::flat_hash_map<Value, int64_t> number;
    const auto operand = [&](const Value& value) {
      const auto [at, is_new] = number.emplace(value, static_cast<int64_t>(built.operands.size()));
      if (is_new) built.operands.push_back(value);
      return at->second;
    };
    const auto load = [&](const Value& value) {
      const auto at = inner.find(value);
      return at != inner.end() ? at->second : b.Load(operand(value));
    };
    const auto row = [&](const Value& value) { return b.Row(operand(value)); };
    const auto make = [&](const Node& node, int index, RegionResult::Kind kind, int value) {
      const Value result = node.result(index);
      const TensorType& type = result.type();
      if (kind == RegionResult::Kind::kFull) {
        value = b.Round(type.dtype, value);
        inner[result] = value;
      }
      bool leaves = false;
      for (const Use& use : node.uses()) {
        const bool reads = use.node->operands()[static_cast<size_t>(use.operand)] == result;
        leaves = leaves || (reads && !IsMember(group, use.node));
      }
      for (const Output& output : graph_.outputs()) leaves = leaves || output.value == result;
      if (!leaves) return;
      b.AddResult(kind, value, type);
      built.results.push_back(result);
    };
    for (const int m : group.members) {
      const Node& node = *NodeAt(m);
      const absl::Span<const Value> from = node.operands();
      const double inverse = 1.0 / static_cast<double>(space.width);
      const auto mean = [&](int value) { return b.Make(Prim::kMul, b.RowSum(value), b.Constant(inverse)); };
      switch (KindAt(m)) {
        case Kind::kNone:
          break;
        case Kind::kElementWise: {
          const TensorType& type = node.result_types()[0];
          std::vector<int> values(from.size(), -1);
          std::vector<int64_t> numbers(from.size(), -1);
          for (size_t i = 0; i < from.size(); ++i) {
            const Access access = AccessOf(from[i].type(), type.dims, space);
            if (access == Access::kRandom) {
              numbers[i] = operand(from[i]);
            } else if (access == Access::kLoad || inner.contains(from[i])) {
              values[i] = load(from[i]);
            } else {
              values[i] = row(from[i]);
            }
          }
          const int64_t samples = type.dims.empty() ? 1 : type.dims[0];
          const int value = b.Compute(node.op().expr(node.attrs())[0], values, numbers, type.num_elements() / samples);
          make(node, 0, RegionResult::Kind::kFull, value);
          break;
        }
        case Kind::kNorm: {
          const bool centers = node.op().name == "layer_norm";
          const int x = load(from[0]), gamma = load(from[1]);
          const int center = centers ? mean(x) : -1;
          const int d = centers ? b.Make(Prim::kSub, x, center) : x;
          const int variance = mean(b.Make(Prim::kMul, d, d));
          const int shifted = b.Make(Prim::kAdd, variance, b.Constant(node.attrs().Double("eps")));
          const int rstd = b.Make(Prim::kDiv, b.Constant(1), b.Make(Prim::kSqrt, shifted));
          int y = b.Make(Prim::kMul, b.Make(Prim::kMul, d, rstd), gamma);
          if (centers && node.attrs().Bool("beta")) y = b.Make(Prim::kAdd, y, load(from[2]));
          make(node, 0, RegionResult::Kind::kFull, y);
          if (centers) make(node, 1, RegionResult::Kind::kRow, center);
          make(node, centers ? 2 : 1, RegionResult::Kind::kRow, rstd);
          break;
        }
        case Kind::kNormBackward: {
          const bool centers = node.op().name == "layer_norm_backward";
          const int dy = load(from[0]), x = load(from[1]), gamma = load(from[2]);
          const int rstd = row(from[centers ? 4 : 3]);
          const int d = centers ? b.Make(Prim::kSub, x, row(from[3])) : x;
          const int xhat = b.Make(Prim::kMul, d, rstd), g = b.Make(Prim::kMul, dy, gamma);
          const int centered = centers ? b.Make(Prim::kSub, g, mean(g)) : g;
          const int along = b.Make(Prim::kMul, xhat, mean(b.Make(Prim::kMul, g, xhat)));
          const int dx = b.Make(Prim::kMul, rstd, b.Make(Prim::kSub, centered, along));
          make(node, 0, RegionResult::Kind::kFull, dx);
          make(node, 1, RegionResult::Kind::kColumns, b.Make(Prim::kMul, dy, xhat));
          if (centers) make(node, 2, RegionResult::Kind::kColumns, dy);
          break;
        }
        case Kind::kColumnSum:
          make(node, 0, RegionResult::Kind::kColumns, load(from[0]));
          break;
      }
    }
    built.region = b.Build();
    // Operands that only steps read which no result needs are none.
    std::vector<int64_t> renumbered(built.operands.size(), -1);
    std::vector<Value> kept;
    for (RegionStep& step : built.region.steps) {
      if (step.kind != RegionStep::Kind::kLoad && step.kind != RegionStep::Kind::kRow &&
          step.kind != RegionStep::Kind::kUniform) {
        continue;
      }
      int64_t& to = renumbered[static_cast<size_t>(step.index)];
      if (to < 0) {
        to = static_cast<int64_t>(kept.size());
        kept.push_back(built.operands[static_cast<size_t>(step.index)]);
      }
      step.index = to;
    }
    built.operands = std::move(kept);
    if (built.results.empty() || built.region.steps.empty()) return absl::InvalidArgumentError("nothing leaves");
    return built;
  }

  // The member that the region is named after.
  const Node& MainMember(const Group& group) const {
    const Node* main = NodeAt(group.at);
    for (const int m : group.members) {
      if (KindAt(m) == Kind::kNorm || KindAt(m) == Kind::kNormBackward) main = NodeAt(m);
    }
    return *main;
  }

  // All nodes anew, so that their ids follow the order in which they run.
  absl::Status Rebuild() {
    const Phase phase = graph_.phase();
    absl::flat_hash_map<Value, Value> now;
    absl::flat_hash_map<const Node*, Node*> node_now;
    const auto mapped = [&](const Value& value) {
      const auto at = now.find(value);
      return at == now.end() ? value : at->second;
    };
    for (size_t i = 0; i < order_.size(); ++i) {
      const Node& node = *order_[i];
      if (node.is_input()) continue;
      const Group& group = GroupOf(static_cast<int>(i));
      std::vector<Value> operands;
      if (group.members.size() == 1) {
        for (const Value& operand : node.operands()) operands.push_back(mapped(operand));
        ASSIGN_OR_RETURN(Node * copy, graph_.CloneNode(node, operands, /*recompute=*/false));
        const auto original = node_now.find(node.recompute_of());
        if (original != node_now.end()) graph_.SetNodeRecomputeOf(copy, original->second);
        node_now[&node] = copy;
        for (int r = 0; r < node.num_results(); ++r) now[node.result(r)] = copy->result(r);
      } else if (group.at == static_cast<int>(i)) {
        ASSIGN_OR_RETURN(const Built built, Build(group));
        for (const Value& operand : built.operands) operands.push_back(mapped(operand));
        graph_.set_phase(node.phase());
        ASSIGN_OR_RETURN(Node * fused, graph_.AddNode(*FindOp("fused"), operands,
                                                      {{"rows", built.region.rows},
                                                       {"width", built.region.width},
                                                       {"region", built.region.ToString()}},
                                                      MainMember(group).name()));
        for (size_t r = 0; r < built.results.size(); ++r) now[built.results[r]] = fused->result(static_cast<int>(r));
      }
    }
    graph_.set_phase(phase);
    std::vector<Output> outputs = graph_.outputs();
    for (Output& output : outputs) output.value = mapped(output.value);
    graph_.SetOutputs(std::move(outputs));
    for (size_t i = order_.size(); i-- > 0;) {
      if (!order_[i]->is_input()) graph_.RemoveNode(order_[i]);
    }
    return absl::OkStatus();
  }

  Graph& graph_;
  const std::vector<Node*> order_;
  absl::flat_hash_map<const Node*, int> place_;
  std::vector<Kind> kinds_;
  std::vector<Space> spaces_;
  std::vector<Group> groups_;
  std::vector<int> group_of_;
  bool has_backward_ = false;
};

absl::StatusOr<bool> Fuse(Module& module, const Attrs&, PassContext&) {
  bool changed = false;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(const bool fused, Fuser(*graph).Run());
    changed = changed || fused;
  }
  return changed;
}

constexpr absl::string_view kAlsoKnownAs[] = {"fusion", "kernel_fusion", "jit"};

}  // namespace

const PassDef kFusePass = {
    .name = "fuse",
    .summary = "Element-wise nodes, norms and column sums that follow one another become one: one pass over the data.",
    .requires_stage = Stage::kOptimized,
    .provides_stage = Stage::kOptimized,
    .source =
        "Niu et al., \"DNNFusion: Accelerating Deep Neural Networks Execution with Advanced Operator Fusion\" "
        "(PLDI 2021)",
    .also_known_as = kAlsoKnownAs,
    .run = Fuse,
};

}  // namespace mt
