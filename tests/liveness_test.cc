#include "ir/liveness.h"

#include "ir/builder.h"
#include "ir/cost.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using Range = std::pair<int64_t, int64_t>;

// Positions: x 0, w 1, a 2, flat 3 (a view of a), b 4, c 5, late 6. Each value has 6 elements, 24 bytes.
//   a = neg(x); flat = reshape(a); b = tanh(w); c = add(flat, flat); late = exp(b); outputs c, late.
class LivenessTest : public ::testing::Test {
 protected:
  LivenessTest() : graph_("g"), builder_(graph_) {
    x_ = builder_.Input("x", {DType::kF32, {2, 3}}, Role::kData);
    w_ = builder_.Input("w", {DType::kF32, {2, 3}}, Role::kParameter);
    a_ = builder_.Op("neg", {x_});
    flat_ = builder_.Reshape(a_, {6});
    b_ = builder_.Op("tanh", {w_});
    c_ = builder_.Op("add", {flat_, flat_});
    late_ = builder_.Op("exp", {b_});
    graph_.AddOutput(late_, "late");
    CHECK_OK(builder_.status());
  }
  Range RangeOf(const Value& value) {
    const LiveRange range = LiveRanges(graph_, graph_.TopologicalOrder()).at(value);
    return {range.first, range.last};
  }

  Graph graph_;
  Builder builder_;
  Value x_, w_, a_, flat_, b_, c_, late_;
};

TEST_F(LivenessTest, RangesByHand) {
  EXPECT_EQ(RangeOf(x_), Range(0, 2));
  EXPECT_EQ(RangeOf(w_), Range(0, 4));
  EXPECT_EQ(RangeOf(a_), Range(2, 5));  // Through its view.
  EXPECT_EQ(RangeOf(flat_), Range(3, 5));
  EXPECT_EQ(RangeOf(b_), Range(4, 6));
  EXPECT_EQ(RangeOf(c_), Range(5, 5));  // Nobody reads it.
  EXPECT_EQ(RangeOf(late_), Range(6, 6));
}

TEST_F(LivenessTest, OutputsLiveToTheEndAndViewsOfThemKeepWhatTheyView) {
  graph_.AddOutput(c_, "c");
  EXPECT_EQ(RangeOf(c_), Range(5, 6));
  const Value again = builder_.Reshape(flat_, {3, 2});  // Position 7; flat and a with it.
  graph_.AddOutput(again, "again");
  EXPECT_EQ(RangeOf(c_), Range(5, 7));
  EXPECT_EQ(RangeOf(again), Range(7, 7));
  EXPECT_EQ(RangeOf(flat_), Range(3, 7));
  EXPECT_EQ(RangeOf(a_), Range(2, 7));
}

TEST_F(LivenessTest, InputsThatAreOutputsLiveToTheEnd) {
  graph_.AddOutput(x_, "x");
  EXPECT_EQ(RangeOf(x_), Range(0, 6));
}

TEST_F(LivenessTest, AnotherOrderGivesOtherRanges) {
  // x, w, b, late, a, flat, c: now at most two values at once.
  const std::vector<Node*> order = {x_.node, w_.node, b_.node, late_.node, a_.node, flat_.node, c_.node};
  const auto ranges = LiveRanges(graph_, order);
  EXPECT_EQ(ranges.at(b_).first, 2);
  EXPECT_EQ(ranges.at(b_).last, 3);
  EXPECT_EQ(ranges.at(late_).last, 6);
  EXPECT_EQ(ranges.at(a_).first, 4);
  // At c: late, a (through flat) and c.
  EXPECT_EQ(PeakLiveBytes(graph_, order), 3 * 24);
}

TEST_F(LivenessTest, PeakByHand) {
  // At c: a (through its view), b and c.
  EXPECT_EQ(PeakLiveBytes(graph_, graph_.TopologicalOrder()), 3 * 24);
  // With the sum in bf16, which is half.
  const Value low = builder_.Cast(a_, DType::kBF16);
  graph_.AddOutput(low, "low");
  // At the cast, position 7: a lives to here, and late.
  EXPECT_EQ(PeakLiveBytes(graph_, graph_.TopologicalOrder()), 3 * 24);
  graph_.AddOutput(b_, "b");
  // At the cast: a, b, late and the 12 bytes of low.
  EXPECT_EQ(PeakLiveBytes(graph_, graph_.TopologicalOrder()), 3 * 24 + 12);
}

TEST(LivenessPropertyTest, PeakIsTheLargestSumAtAnyPosition) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const std::unique_ptr<Graph> graph = RandomGraph(seed, {.nodes = 30});
    const std::vector<Node*> order = graph->TopologicalOrder();
    const auto ranges = LiveRanges(*graph, order);
    int64_t peak = 0;
    for (int64_t position = 0; position < static_cast<int64_t>(order.size()); ++position) {
      int64_t live = 0;
      for (const auto& [value, range] : ranges) {
        EXPECT_LE(range.first, range.last);
        if (value.node->is_input() || value.node->op().is_view) continue;
        if (range.first <= position && position <= range.last) live += value.type().byte_size();
      }
      peak = std::max(peak, live);
    }
    EXPECT_EQ(PeakLiveBytes(*graph, order), peak) << seed;
  }
}

TEST_F(LivenessTest, AnOrderThatIsNoneDies) {
  EXPECT_DEATH(LiveRanges(graph_, {x_.node}), "check failed");
  EXPECT_DEATH(LiveRanges(graph_, {x_.node, w_.node, flat_.node, a_.node, b_.node, c_.node, late_.node}),
               "not topological");
}

TEST_F(LivenessTest, CostsByHand) {
  // neg: 6 operations, 24 bytes in and out; add reads the same operand twice.
  EXPECT_EQ(NodeCost(*a_.node).flops, 6);
  EXPECT_EQ(NodeCost(*a_.node).bytes_read, 24);
  EXPECT_EQ(NodeCost(*a_.node).bytes_written, 24);
  EXPECT_EQ(NodeCost(*c_.node).bytes_read, 48);
  EXPECT_EQ(NodeCost(*flat_.node).bytes_read, 0);
  EXPECT_EQ(NodeCost(*x_.node).bytes_written, 0);
  const Cost total = GraphCost(graph_);
  EXPECT_EQ(total.flops, 4 * 6);
  EXPECT_EQ(total.bytes_read, 5 * 24);
  EXPECT_EQ(total.bytes_written, 4 * 24);
}

TEST(CostTest, SumsSaturate) {
  Graph graph("g");
  Builder builder(graph);
  Value x = builder.Input("x", {DType::kF64, {kMaxElements}}, Role::kData);
  // 2^47 bytes a node.
  for (int i = 0; i < (1 << 16) + 1; ++i) x = builder.Op("neg", {x});
  ASSERT_OK(builder.status());
  EXPECT_EQ(GraphCost(graph).bytes_read, std::numeric_limits<int64_t>::max());
}

TEST(CostTest, RooflineIsTheSlowerOfTheTwo) {
  const Roofline roofline{.matmul_flops_per_second = 100, .bytes_per_second = 10};
  EXPECT_DOUBLE_EQ(RooflineSeconds({.flops = 1000, .bytes_read = 20, .bytes_written = 30}, roofline), 10);
  EXPECT_DOUBLE_EQ(RooflineSeconds({.flops = 100, .bytes_read = 20, .bytes_written = 30}, roofline), 5);
  EXPECT_DOUBLE_EQ(RooflineSeconds({.flops = 100, .bytes_read = 20, .bytes_written = 30}, {.bytes_per_second = 5}), 10);
  EXPECT_DOUBLE_EQ(RooflineSeconds({.flops = 100, .bytes_read = 20, .bytes_written = 30}, {}), 0);
}

}  // namespace
}  // namespace mt
