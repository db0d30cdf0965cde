#include "codegen/memory/schedule.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "codegen/compile.h"
#include "ir/builder.h"
#include "passes/pass_manager.h"
#include "passes/pipeline.h"
#include "tests/random_graph.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

constexpr int64_t kAlignment = 256;
const TensorType kBig{DType::kF32, {64, 64}};  // 16 KiB
constexpr int64_t kBigBytes = 16384;

PlanGraph MustMake(const Graph& graph) {
  absl::StatusOr<PlanGraph> plan = MakePlanGraph(graph, "cpu", kAlignment);
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

std::vector<std::string> Names(const PlanGraph& graph, const std::vector<int>& order) {
  std::vector<std::string> names;
  for (const int n : order) names.push_back(graph.nodes[static_cast<size_t>(n)].node->name());
  return names;
}

int64_t IndexOf(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) - names.begin();
}

std::vector<int> Identity(const PlanGraph& graph) {
  std::vector<int> order;
  for (size_t i = 0; i < graph.nodes.size(); ++i) order.push_back(static_cast<int>(i));
  return order;
}

// Every node once, and every edge of the graph forwards.
void ExpectLegal(const PlanGraph& graph, const std::vector<int>& order) {
  std::map<const Node*, size_t> position;
  for (size_t i = 0; i < order.size(); ++i) position[graph.nodes[static_cast<size_t>(order[i])].node] = i;
  ASSERT_EQ(position.size(), graph.nodes.size());
  for (const PlanNode& node : graph.nodes) {
    for (const Value& operand : node.node->operands()) {
      if (operand.node->is_input()) continue;
      EXPECT_LT(position.at(operand.node), position.at(node.node));
    }
  }
  for (const Output& output : graph.graph->outputs()) {
    if (output.donates == nullptr || output.value.node->is_input()) continue;
    for (const Use& use : output.donates->uses()) {
      if (use.node != output.value.node && !output.value.node->op().is_view) {
        EXPECT_LT(position.at(use.node), position.at(output.value.node)) << output.name;
      }
    }
  }
}

TEST(ShareBuffersTest, ResultsTakeOverDyingOperands) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", kBig, Role::kData);
  const Value a = builder.Op("tanh", {x}, {}, "a");
  const Value b = builder.Op("tanh", {a}, {}, "b");    // In place: a dies here.
  const Value v = builder.Reshape(b, {4096});          // A view of b.
  const Value c = builder.Op("tanh", {v}, {}, "c");    // In place of b's buffer.
  const Value d = builder.Op("add", {c, c}, {}, "d");  // In place: both operands may be written over.
  ASSERT_OK(builder.status());
  graph.AddOutput(d, "d");
  const PlanGraph plan = MustMake(graph);
  const Sharing sharing = ShareBuffers(plan, Identity(plan));
  EXPECT_EQ(sharing.buffers.size(), 2u);  // x, and one for all others: the input is never written.
  EXPECT_EQ(sharing.peak_bytes, 2 * kBigBytes);
  EXPECT_EQ(sharing.buffers[0].last, 0);
  EXPECT_EQ(sharing.buffers[1].first, 0);
  EXPECT_EQ(sharing.buffers[1].last, 4);
}

TEST(ShareBuffersTest, AnOperandThatIsReadLaterIsKept) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", kBig, Role::kData);
  const Value a = builder.Op("tanh", {x}, {}, "a");
  const Value b = builder.Op("exp", {a}, {}, "b");  // a is read again: a buffer of its own.
  const Value c = builder.Mul(a, b);
  ASSERT_OK(builder.status());
  graph.AddOutput(c, "c");
  const PlanGraph plan = MustMake(graph);
  const Sharing sharing = ShareBuffers(plan, Identity(plan));
  EXPECT_EQ(sharing.buffers.size(), 3u);
  EXPECT_EQ(sharing.peak_bytes, 2 * kBigBytes);
}

TEST(ShareBuffersTest, AnOutputIsNotWrittenOver) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", kBig, Role::kData);
  const Value a = builder.Op("tanh", {x}, {}, "a");
  const Value b = builder.Op("tanh", {a}, {}, "b");
  ASSERT_OK(builder.status());
  graph.AddOutput(a, "a");
  graph.AddOutput(b, "b");
  const PlanGraph plan = MustMake(graph);
  const Sharing sharing = ShareBuffers(plan, Identity(plan));
  EXPECT_EQ(sharing.buffers.size(), 3u);
}

TEST(ScheduleTest, ReducesOneBigValueBeforeTheNextIsMade) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", {DType::kF32, {64, 1}}, Role::kData);
  std::vector<Value> big, small;
  for (int i = 0; i < 4; ++i) big.push_back(builder.Op("broadcast", {x}, {{"dims", IntList{64, 64}}}));
  for (const Value& b : big) small.push_back(builder.Op("reduce_sum", {b}, {{"dims", IntList{0, 1}}}));
  Value sum = small[0];
  for (int i = 1; i < 4; ++i) sum = builder.Add(sum, small[static_cast<size_t>(i)]);
  ASSERT_OK(builder.status());
  graph.AddOutput(sum, "sum");
  const PlanGraph plan = MustMake(graph);
  EXPECT_EQ(ShareBuffers(plan, Identity(plan)).peak_bytes, 4 * kBigBytes + kAlignment);
  const std::vector<int> order = Schedule(plan);
  ExpectLegal(plan, order);
  EXPECT_LE(ShareBuffers(plan, order).peak_bytes, kBigBytes + 4 * kAlignment);
}

TEST(ScheduleTest, MakesAConstantOnlyWhereItIsRead) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", {DType::kF32, {1, 64}}, Role::kData);
  const Value wide = builder.Op("broadcast", {x}, {{"dims", IntList{64, 64}}}, "wide");  // Early, but read last.
  const Value a = builder.Op("exp", {x}, {}, "a");
  const Value b = builder.Op("broadcast", {a}, {{"dims", IntList{64, 64}}}, "b");
  const Value c = builder.Op("matmul", {b, b}, {}, "c");
  const Value d = builder.Op("reduce_sum", {c}, {{"dims", IntList{0}}}, "d");
  const Value e = builder.Op("mul", {wide, d}, {}, "e");
  ASSERT_OK(builder.status());
  graph.AddOutput(e, "e");
  const PlanGraph plan = MustMake(graph);
  const std::vector<int> order = Schedule(plan);
  ExpectLegal(plan, order);
  const std::vector<std::string> names = Names(plan, order);
  EXPECT_GT(IndexOf(names, "wide"), IndexOf(names, "d"));
  // The wide value is gone from the peak; x waits for it.
  EXPECT_EQ(ShareBuffers(plan, Identity(plan)).peak_bytes - ShareBuffers(plan, order).peak_bytes,
            kBigBytes - kAlignment);
}

TEST(ScheduleTest, ReadersOfAStateComeBeforeItsWriter) {
  Graph graph("g");
  Builder builder(graph);
  const Value w = builder.Input("w", kBig, Role::kParameter);
  const Value x = builder.Input("x", kBig, Role::kData);
  const Value updated = builder.Op("sub", {w, x}, {}, "update");
  const Value read = builder.Op("matmul", {x, w}, {}, "read");
  const Value loss = builder.Op("reduce_sum", {read}, {{"dims", IntList{0, 1}}}, "loss");
  ASSERT_OK(builder.status());
  graph.AddOutput(loss, "loss");
  graph.AddOutput(updated, "w", w.node);
  EXPECT_FALSE(NeedsDonationCopies(graph));
  const PlanGraph plan = MustMake(graph);
  const std::vector<int> order = Schedule(plan);
  ExpectLegal(plan, order);
  const Sharing sharing = ShareBuffers(plan, order);
  // The update is written into the state's buffer: nothing but x, the product and the sum is ever live.
  for (size_t v = 0; v < plan.values.size(); ++v) {
    if (plan.values[v].value != updated) continue;
    EXPECT_EQ(sharing.buffer_of[v], sharing.buffer_of[0]);
  }
}

TEST(DonationTest, ACopyIsInsertedWhereTheWriterCannotWorkInPlace) {
  Graph graph("g");
  Builder builder(graph);
  const Value w = builder.Input("w", kBig, Role::kParameter);
  const Value u = builder.Input("u", kBig, Role::kParameter);
  const Value x = builder.Input("x", kBig, Role::kData);
  const Value product = builder.Op("matmul", {w, x}, {}, "product");  // Reads w and cannot be written over it.
  ASSERT_OK(builder.status());
  graph.AddOutput(product, "w", w.node);
  graph.AddOutput(product, "u", u.node);  // The same value again.
  graph.AddOutput(w, "old");              // The old value of a state that is written.
  EXPECT_TRUE(NeedsDonationCopies(graph));
  ASSERT_OK_AND_ASSIGN(const int copies, InsertDonationCopies(graph));
  EXPECT_EQ(copies, 3);
  EXPECT_FALSE(NeedsDonationCopies(graph));
  const PlanGraph plan = MustMake(graph);
  ExpectLegal(plan, Schedule(plan));
}

TEST(ScheduleTest, CollectivesKeepTheirOrder) {
  Graph graph("g");
  Builder builder(graph);
  std::vector<std::string> expected;
  for (int i = 0; i < 6; ++i) {
    const Value x =
        builder.Input("x" + std::to_string(i), i % 2 == 0 ? kBig : TensorType{DType::kF32, {1}}, Role::kData);
    const Value y = builder.Op("all_reduce", {x}, {}, "reduce" + std::to_string(i));
    graph.AddOutput(y, "y" + std::to_string(i));
    expected.push_back("reduce" + std::to_string(i));
  }
  ASSERT_OK(builder.status());
  const PlanGraph plan = MustMake(graph);
  EXPECT_EQ(Names(plan, Schedule(plan)), expected);
}

// Live ranges by definition: for each position, the buffers with a value written before or here and read here or later.
int64_t OraclePeak(const PlanGraph& graph, const std::vector<int>& order, const Sharing& sharing) {
  const int64_t n = static_cast<int64_t>(order.size());
  std::vector<int64_t> first(sharing.buffers.size(), n), last(sharing.buffers.size(), -1);
  const auto touch = [&](int value, int64_t position) {
    const size_t b = static_cast<size_t>(sharing.buffer_of[static_cast<size_t>(value)]);
    first[b] = std::min(first[b], position);
    last[b] = std::max(last[b], position);
  };
  for (int v = 0; v < graph.num_inputs; ++v) touch(v, 0);
  std::map<const Node*, int64_t> position;
  for (int64_t i = 0; i < n; ++i) {
    const PlanNode& node = graph.nodes[static_cast<size_t>(order[static_cast<size_t>(i)])];
    for (const int v : node.operands) touch(v, i);
    for (const int v : node.results) touch(v, i);
  }
  for (size_t v = 0; v < graph.values.size(); ++v) {
    for (const Output& output : graph.graph->outputs()) {
      if (output.value == graph.values[v].value) touch(static_cast<int>(v), n - 1);
    }
  }
  int64_t peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t live = graph.nodes[static_cast<size_t>(order[static_cast<size_t>(i)])].aligned_workspace_bytes;
    for (size_t b = 0; b < first.size(); ++b) {
      if (sharing.buffers[b].state < 0 && first[b] <= i && i <= last[b]) live += sharing.buffers[b].bytes;
    }
    peak = std::max(peak, live);
  }
  return peak;
}

TEST(ScheduleTest, RandomGraphsAreLegalAndNoWorseThanTheTopologicalOrder) {
  int lower = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    std::unique_ptr<Module> module = RandomModule(seed, {.nodes = 24});
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("none"));
    PassContext context;
    ASSERT_OK(RunPipeline(*module, pipeline, context));
    const PlanGraph plan = MustMake(*module->FindGraph("train"));
    const std::vector<int> order = Schedule(plan);
    ExpectLegal(plan, order);
    const Sharing sharing = ShareBuffers(plan, order);
    EXPECT_EQ(sharing.peak_bytes, OraclePeak(plan, order, sharing));
    const int64_t before = ShareBuffers(plan, Identity(plan)).peak_bytes;
    EXPECT_LE(sharing.peak_bytes, before);
    if (sharing.peak_bytes < before) ++lower;
  }
  EXPECT_GT(lower, 0);
}

}  // namespace
}  // namespace mt
