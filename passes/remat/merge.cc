#include "passes/remat/merge.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/region.h"

namespace mt {
namespace {

using Kind = RegionStep::Kind;

size_t At(int64_t i) { return static_cast<size_t>(i); }

// What a node does, as a region over its operands; null: none that is known here.
std::shared_ptr<const Region> RegionOf(const Node& node) {
  if (node.op().name == "fused") {
    const Attrs& attrs = node.attrs();
    absl::StatusOr<std::shared_ptr<const Region>> region =
        ParseRegion(attrs.Int("rows"), attrs.Int("width"), attrs.Get<std::string>("region"));
    CHECK(region.ok()) << region.status();
    return *std::move(region);
  }
  if (!node.op().is_element_wise() || node.num_results() != 1) return nullptr;
  const TensorType& type = node.result_types()[0];
  const int64_t elements = type.num_elements();
  if (type.dims.empty() || elements < 2) return nullptr;
  RegionBuilder builder(elements / type.dim(-1), type.dim(-1));
  std::vector<int> values;
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < node.operands().size(); ++i) {
    const TensorType& operand = node.operands()[i].type();
    const bool is_random = operand.dtype == DType::kI32;
    if (!is_random && operand.dims != type.dims && operand.num_elements() != 1) return nullptr;
    numbers.push_back(is_random ? static_cast<int64_t>(i) : -1);
    values.push_back(is_random                   ? -1
                     : operand.dims == type.dims ? builder.Load(static_cast<int64_t>(i))
                                                 : builder.Row(static_cast<int64_t>(i)));
  }
  const int value = builder.Compute(node.op().expr(node.attrs())[0], values, numbers, elements / type.dims[0]);
  builder.AddResult(RegionResult::Kind::kFull, builder.Round(type.dtype, value), type);
  return std::make_shared<const Region>(builder.Build());
}

// Whether nothing of the forward and backward pass reads what the node makes.
bool IsSink(const Node& node) {
  return node.phase() == Phase::kBackward && std::all_of(node.uses().begin(), node.uses().end(), [](const Use& use) {
           return use.node->phase() == Phase::kOptimizer || (use.node->op().is_view && IsSink(*use.node));
         });
}

// Whether sinks alone read what the node makes, themselves or through views, but for `reader`.
bool OnlySinksRead(const Node& node, const Node* reader) {
  return std::all_of(node.uses().begin(), node.uses().end(), [&](const Use& use) {
    if (use.node->op().is_view) return OnlySinksRead(*use.node, nullptr);
    return use.node == reader || IsSink(*use.node);
  });
}

class Merger {
 public:
  explicit Merger(Graph& graph) : graph_(graph) {}

  absl::StatusOr<bool> Run() {
    const std::vector<Node*> nodes = graph_.Nodes();
    const auto is_fused = [](const Node* node) { return !node->is_input() && node->op().name == "fused"; };
    if (std::none_of(nodes.begin(), nodes.end(), is_fused)) return false;
    for (Node* node : nodes) {
      if (node->is_input() || node->recompute_of() == nullptr || node->phase() != Phase::kBackward ||
          graph_.IsOutput(node)) {
        continue;
      }
      const std::shared_ptr<const Region> region = RegionOf(*node);
      if (region == nullptr) continue;
      Node* reader = ReaderOf(*node, *region);
      if (reader == nullptr) continue;
      std::vector<Part> parts = Parts(reader);
      parts.insert(parts.end() - 1, {node, region});
      const std::optional<Merged> merged = Merge(parts);
      if (!merged) continue;
      parts_[reader] = std::move(parts);
      merged_into_[node] = reader;
    }
    if (merged_into_.empty()) return false;
    RETURN_IF_ERROR(Rebuild());
    return true;
  }

 private:
  struct Part {
    Node* node = nullptr;
    std::shared_ptr<const Region> region;
  };
  // A region of several parts, what it reads, and the values that are its results.
  struct Merged {
    Region region;
    std::vector<Value> operands, results;
  };

  // The parts of a backward node, itself last.
  std::vector<Part> Parts(Node* node) const {
    const auto at = parts_.find(node);
    if (at != parts_.end()) return at->second;
    return {{node, RegionOf(*node)}};
  }

  // The backward node that a recomputed one can be part of. The others that read the recomputed value come after it
  // then, and nothing of the backward pass waits for them.
  Node* ReaderOf(const Node& node, const Region& region) const {
    for (const RegionStep& step : region.steps) {
      if (step.kind != Kind::kLoad) continue;
      const Value& shared = node.operands()[At(step.index)];
      if (shared.type().num_elements() != region.rows * region.width) continue;
      for (const Use& use : shared.node->uses()) {
        Node* reader = use.node;
        if (reader->operands()[At(use.operand)] != shared || reader->phase() != Phase::kBackward ||
            reader->recompute_of() != nullptr || graph_.IsOutput(reader)) {
          continue;
        }
        const std::shared_ptr<const Region> of_reader = RegionOf(*reader);
        if (of_reader == nullptr || of_reader->rows != region.rows || of_reader->width != region.width) continue;
        if (OnlySinksRead(node, reader) && !IsSink(*reader)) return reader;
      }
    }
    return nullptr;
  }

  std::optional<Merged> Merge(const std::vector<Part>& parts) const {
    const Region& last = *parts.back().region;
    RegionBuilder builder(last.rows, last.width);
    Merged merged;
    absl::flat_hash_map<Value, int> inner;  // Results of earlier parts.
    const auto operand = [&](const Value& value) {
      const auto at = std::find(merged.operands.begin(), merged.operands.end(), value);
      if (at != merged.operands.end()) return static_cast<int64_t>(at - merged.operands.begin());
      merged.operands.push_back(value);
      return static_cast<int64_t>(merged.operands.size()) - 1;
    };
    for (const Part& part : parts) {
      std::vector<int> number;
      for (const RegionStep& step : part.region->steps) {
        const auto arg = [&](int a) { return a < 0 ? -1 : number[At(a)]; };
        int value = -1;
        if (step.kind == Kind::kLoad || step.kind == Kind::kRow) {
          const Value& from = part.node->operands()[At(step.index)];
          const auto made = inner.find(from);
          if (made != inner.end()) {
            value = made->second;
          } else {
            if (IsOfPart(parts, from)) return std::nullopt;
            value = step.kind == Kind::kLoad ? builder.Load(operand(from)) : builder.Row(operand(from));
          }
        } else if (step.kind == Kind::kUniform) {
          const int64_t state = operand(part.node->operands()[At(step.index)]);
          value = builder.Compute(Uniform(0, step.key), {-1}, {state}, step.sample_elements);
        } else if (step.kind == Kind::kConstant) {
          value = builder.Constant(step.constant);
        } else if (step.kind == Kind::kRowSum) {
          value = builder.RowSum(arg(step.a));
        } else if (step.prim == Prim::kRound) {
          value = builder.Round(step.dtype, arg(step.a));
        } else {
          value = builder.Make(step.prim, arg(step.a), arg(step.b), arg(step.c));
        }
        number.push_back(value);
      }
      for (size_t r = 0; r < part.region->results.size(); ++r) {
        const RegionResult& result = part.region->results[r];
        const Value made = part.node->result(static_cast<int>(r));
        if (part.region->StoresExactly(result)) inner[made] = number[At(result.value)];
        bool leaves = part.node == parts.back().node;
        for (const Use& use : part.node->uses()) {
          leaves = leaves || (use.node != parts.back().node && use.node->operands()[At(use.operand)] == made);
        }
        if (!leaves) continue;
        builder.AddResult(result.kind, number[At(result.value)], result.type);
        merged.results.push_back(made);
      }
    }
    merged.region = builder.Build();
    if (!merged.region.IsWorthOneKernel(merged.operands.size())) return std::nullopt;
    return merged;
  }

  static bool IsOfPart(const std::vector<Part>& parts, const Value& value) {
    return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.node == value.node; });
  }

  // All nodes anew, so that their ids follow the order in which they run.
  absl::Status Rebuild() {
    const Phase phase = graph_.phase();
    const std::vector<Node*> order = graph_.TopologicalOrder();
    for (Node* node : order) {
      if (!node->is_input() && !merged_into_.contains(node)) RETURN_IF_ERROR(Emit(node));
    }
    graph_.set_phase(phase);
    std::vector<Output> outputs = graph_.outputs();
    for (Output& output : outputs) output.value = Now(output.value);
    graph_.SetOutputs(std::move(outputs));
    for (size_t i = order.size(); i-- > 0;) {
      if (!order[i]->is_input()) graph_.RemoveNode(order[i]);
    }
    return absl::OkStatus();
  }

  Value Now(const Value& value) const {
    const auto at = now_.find(value);
    return at == now_.end() ? value : at->second;
  }

  // Makes the node, and before it what it reads.
  absl::Status Emit(Node* wanted) {
    std::vector<Node*> todo = {wanted};
    while (!todo.empty()) {
      Node* node = todo.back();
      if (node_now_.contains(node)) {
        todo.pop_back();
        continue;
      }
      const auto parts = parts_.find(node);
      std::optional<Merged> merged;
      if (parts != parts_.end()) merged = Merge(parts->second);
      const absl::Span<const Value> reads = merged ? absl::MakeConstSpan(merged->operands) : node->operands();
      std::vector<Value> operands;
      for (const Value& read : reads) {
        const auto into = merged_into_.find(read.node);
        Node* producer = into == merged_into_.end() ? read.node : into->second;
        if (!producer->is_input() && !node_now_.contains(producer)) {
          todo.push_back(producer);
          break;
        }
        operands.push_back(Now(read));
      }
      if (operands.size() < reads.size()) continue;
      todo.pop_back();
      if (merged) {
        graph_.set_phase(node->phase());
        ASSIGN_OR_RETURN(Node * fused, graph_.AddNode(*FindOp("fused"), operands,
                                                      {{"rows", merged->region.rows},
                                                       {"width", merged->region.width},
                                                       {"region", merged->region.ToString()}},
                                                      node->name()));
        for (size_t r = 0; r < merged->results.size(); ++r) {
          now_[merged->results[r]] = fused->result(static_cast<int>(r));
        }
        node_now_[node] = fused;
        continue;
      }
      ASSIGN_OR_RETURN(Node * copy, graph_.CloneNode(*node, operands, /*recompute=*/false));
      if (node->recompute_of() != nullptr) {
        const auto original = node_now_.find(node->recompute_of());
        graph_.SetNodeRecomputeOf(copy, original == node_now_.end() ? node->recompute_of() : original->second);
      }
      for (int r = 0; r < node->num_results(); ++r) now_[node->result(r)] = copy->result(r);
      node_now_[node] = copy;
    }
    return absl::OkStatus();
  }

  Graph& graph_;
  absl::flat_hash_map<Node*, std::vector<Part>> parts_;  // By backward node; itself last.
  absl::flat_hash_map<const Node*, Node*> merged_into_;
  absl::flat_hash_map<Value, Value> now_;
  absl::flat_hash_map<const Node*, Node*> node_now_;
};

}  // namespace

absl::StatusOr<bool> MergeRecomputed(Graph& graph) { return Merger(graph).Run(); }

}  // namespace mt
