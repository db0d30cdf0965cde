#include "passes/remat/split.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "ir/base/check.h"
#include "ir/region.h"

namespace mt {
namespace {

using Kind = RegionStep::Kind;

size_t At(int64_t i) { return static_cast<size_t>(i); }

// A region that computes some results of another one from one of its results and operands that are there anyway.
struct Part {
  Region region;
  std::vector<int> results;   // Of the whole.
  std::vector<int> operands;  // Of the whole; -1: the given result.
};

// What stays for as long as the step runs: weights, random state, and constants made of them.
bool IsThereAnyway(const Value& operand) {
  Value value = operand;
  while (!value.node->is_input() && value.node->op().is_view) value = value.node->operands()[0];
  if (value.node->is_input()) return value.node->role() != Role::kData;
  const absl::Span<const Value> operands = value.node->operands();
  return value.node->phase() == Phase::kForward && std::all_of(operands.begin(), operands.end(), [](const Value& v) {
           return v.node->is_input() && v.node->role() != Role::kData;
         });
}

std::optional<Part> PartFrom(const Node& node, const Region& region, int given) {
  const RegionResult& source = region.results[At(given)];
  if (source.kind != RegionResult::Kind::kFull || !region.StoresExactly(source)) return std::nullopt;
  // Which steps follow from the given result and from what is there anyway.
  std::vector<bool> known(region.steps.size()), depends(region.steps.size());
  for (size_t i = 0; i < region.steps.size(); ++i) {
    const RegionStep& step = region.steps[i];
    if (static_cast<int>(i) == source.value) {
      known[i] = depends[i] = true;
      continue;
    }
    known[i] = true;
    if (step.kind == Kind::kLoad || step.kind == Kind::kRow || step.kind == Kind::kUniform) {
      known[i] = IsThereAnyway(node.operands()[At(step.index)]);
    }
    for (const int arg : {step.a, step.b, step.c}) {
      if (arg < 0) continue;
      known[i] = known[i] && known[At(arg)];
      depends[i] = depends[i] || depends[At(arg)];
    }
  }
  Part part;
  for (int r = 0; r < static_cast<int>(region.results.size()); ++r) {
    const size_t value = At(region.results[At(r)].value);
    if (r != given && region.results[At(r)].value != source.value && known[value] && depends[value]) {
      part.results.push_back(r);
    }
  }
  if (part.results.empty()) return std::nullopt;
  // The steps that these results need, with their operands in order of first use.
  std::vector<bool> needed(region.steps.size(), false);
  for (const int r : part.results) needed[At(region.results[At(r)].value)] = true;
  for (size_t i = region.steps.size(); i-- > 0;) {
    if (!needed[i] || static_cast<int>(i) == source.value) continue;
    for (const int arg : {region.steps[i].a, region.steps[i].b, region.steps[i].c}) {
      if (arg >= 0) needed[At(arg)] = true;
    }
  }
  const auto operand = [&](int index) {
    const auto at = std::find(part.operands.begin(), part.operands.end(), index);
    if (at != part.operands.end()) return static_cast<int64_t>(at - part.operands.begin());
    part.operands.push_back(index);
    return static_cast<int64_t>(part.operands.size()) - 1;
  };
  part.region.rows = region.rows;
  part.region.width = region.width;
  std::vector<int> number(region.steps.size(), -1);
  for (size_t i = 0; i < region.steps.size(); ++i) {
    if (!needed[i]) continue;
    RegionStep step = region.steps[i];
    if (static_cast<int>(i) == source.value) {
      step = {.kind = Kind::kLoad, .index = operand(-1)};
    } else if (step.kind == Kind::kLoad || step.kind == Kind::kRow || step.kind == Kind::kUniform) {
      step.index = operand(static_cast<int>(step.index));
    }
    for (int* arg : {&step.a, &step.b, &step.c}) {
      if (*arg >= 0) *arg = number[At(*arg)];
    }
    number[i] = static_cast<int>(part.region.steps.size());
    part.region.steps.push_back(step);
  }
  for (const int r : part.results) {
    RegionResult result = region.results[At(r)];
    result.value = number[At(result.value)];
    part.region.results.push_back(std::move(result));
  }
  return part;
}

}  // namespace

std::vector<FusedPart> SplitFusedNodes(Graph& graph) {
  std::vector<FusedPart> parts;
  const OpDef* fused = FindOp("fused");
  for (Node* node : graph.Nodes()) {
    if (node->is_input() || &node->op() != fused || node->phase() != Phase::kForward || node->num_results() < 2) {
      continue;
    }
    const Attrs& attrs = node->attrs();
    const absl::StatusOr<std::shared_ptr<const Region>> parsed =
        ParseRegion(attrs.Int("rows"), attrs.Int("width"), attrs.Get<std::string>("region"));
    CHECK(parsed.ok()) << parsed.status();
    const Region& region = **parsed;
    // From the result from which most others follow.
    std::optional<Part> best;
    int given = 0;
    for (int r = 0; r < node->num_results(); ++r) {
      std::optional<Part> part = PartFrom(*node, region, r);
      if (!part || (best && best->results.size() >= part->results.size())) continue;
      best = std::move(part);
      given = r;
    }
    if (!best) continue;
    std::vector<Value> operands;
    for (const int index : best->operands) {
      operands.push_back(index < 0 ? node->result(given) : node->operands()[At(index)]);
    }
    Attrs part_attrs = attrs;
    part_attrs.Set("region", best->region.ToString());
    const Phase phase = graph.phase();
    graph.set_phase(Phase::kForward);
    absl::StatusOr<Node*> added = graph.AddNode(*fused, operands, std::move(part_attrs), node->name());
    graph.set_phase(phase);
    CHECK(added.ok()) << added.status();
    for (size_t r = 0; r < best->results.size(); ++r) {
      graph.ReplaceAllUses(node->result(best->results[r]), (*added)->result(static_cast<int>(r)));
    }
    parts.push_back({.part = (*added)->id(), .whole = node->id(), .results = best->results});
  }
  return parts;
}

void JoinFusedNodes(Graph& graph, const std::vector<FusedPart>& parts) {
  if (parts.empty()) return;
  absl::flat_hash_map<int64_t, Node*> by_id;
  for (Node* node : graph.Nodes()) by_id[node->id()] = node;
  absl::flat_hash_map<const Node*, const Node*> whole_of;
  for (const FusedPart& joined : parts) {
    Node *part = by_id.at(joined.part), *whole = by_id.at(joined.whole);
    whole_of[part] = whole;
    for (size_t r = 0; r < joined.results.size(); ++r) {
      graph.ReplaceAllUses(part->result(static_cast<int>(r)), whole->result(joined.results[r]));
    }
  }
  for (const auto& [id, node] : by_id) {
    const auto whole = whole_of.find(node->recompute_of());
    if (whole != whole_of.end()) graph.SetNodeRecomputeOf(node, whole->second);
  }
  for (const FusedPart& joined : parts) graph.RemoveNode(by_id.at(joined.part));
}

}  // namespace mt
