#include "ir/graph.h"

#include "ir/builder.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const TensorType kMatrix{DType::kF32, {2, 3}};

// x -> tanh (a) -> neg (b) -> add(a, b) (c), output c.
struct Chain {
  Chain() : graph("g"), builder(graph) {
    x = builder.Input("x", kMatrix, Role::kData);
    a = builder.Op("tanh", {x}, {}, "a");
    b = builder.Op("neg", {a}, {}, "b");
    c = builder.Op("add", {a, b}, {}, "c");
    graph.AddOutput(c, "y");
    CHECK_OK(builder.status());
  }
  Graph graph;
  Builder builder;
  Value x, a, b, c;
};

TEST(GraphTest, InputsHaveUniqueNamesAndValidTypes) {
  Graph graph("g");
  ASSERT_OK(graph.AddInput("x", kMatrix, Role::kData));
  EXPECT_THAT(graph.AddInput("x", kMatrix, Role::kStep),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("\"x\""), HasSubstr("exists"))));
  EXPECT_THAT(graph.AddInput("", kMatrix, Role::kData),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name")));
  EXPECT_THAT(graph.AddInput("z", {DType::kF32, {0}}, Role::kData),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f32[0]")));
  EXPECT_EQ(graph.FindInput("x")->role(), Role::kData);
  EXPECT_EQ(graph.FindInput("z"), nullptr);
}

TEST(GraphTest, AddNodeInfersTypesAndNamesTheNodeInErrors) {
  Chain chain;
  EXPECT_EQ(chain.c.type(), kMatrix);
  ASSERT_OK_AND_ASSIGN(const Value odd, chain.graph.AddInput("odd", {DType::kF32, {5}}, Role::kData));
  EXPECT_THAT(chain.graph.AddNode(*FindOp("add"), {chain.a, odd}, {}, "h0.sum"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("add"), HasSubstr("h0.sum"))));
  EXPECT_THAT(chain.graph.AddNode(*FindOp("add"), {chain.a}, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("add")));
}

TEST(GraphTest, UseListsFollowEveryEdit) {
  Chain chain;
  EXPECT_EQ(chain.a.node->uses().size(), 2u);
  chain.graph.SetOperand(chain.c.node, 0, chain.x);
  EXPECT_EQ(chain.a.node->uses().size(), 1u);
  EXPECT_EQ(chain.x.node->uses().size(), 2u);
  chain.graph.ReplaceAllUses(chain.b, chain.a);
  EXPECT_TRUE(chain.b.node->uses().empty());
  EXPECT_EQ(chain.c.node->operands()[1], chain.a);
  chain.graph.RemoveNode(chain.b.node);
  EXPECT_EQ(chain.graph.num_nodes(), 3);
  EXPECT_OK(VerifyGraph(chain.graph));
}

TEST(GraphTest, ReplaceAllUsesReachesOutputsAndSparesTheException) {
  Chain chain;
  const Value wrapped = chain.builder.Op("abs", {chain.c}, {}, "wrapped");
  chain.graph.ReplaceAllUses(chain.c, wrapped, wrapped.node);
  EXPECT_EQ(chain.graph.FindOutput("y")->value, wrapped);
  EXPECT_EQ(wrapped.node->operands()[0], chain.c);
  EXPECT_OK(VerifyGraph(chain.graph));
}

TEST(GraphTest, RemoveInput) {
  Chain chain;
  ASSERT_OK_AND_ASSIGN(const Value unused, chain.graph.AddInput("unused", kMatrix, Role::kData));
  chain.graph.RemoveInput(unused.node);
  EXPECT_EQ(chain.graph.FindInput("unused"), nullptr);
  EXPECT_OK(VerifyGraph(chain.graph));
}

TEST(GraphDeathTest, NodesInUseStay) {
  Chain chain;
  EXPECT_DEATH(chain.graph.RemoveNode(chain.a.node), "check failed");
  EXPECT_DEATH(chain.graph.RemoveNode(chain.c.node), "check failed");
  EXPECT_DEATH(chain.graph.RemoveInput(chain.x.node), "check failed");
}

TEST(GraphTest, TopologicalOrderPutsOperandsFirstThenSmallestIds) {
  Chain chain;
  // A late node that an early one reads.
  const Value late = chain.builder.Op("exp", {chain.x}, {}, "late");
  chain.graph.SetOperand(chain.b.node, 0, late);
  std::vector<std::string> names;
  for (const Node* node : chain.graph.TopologicalOrder()) names.push_back(node->name());
  EXPECT_EQ(names, (std::vector<std::string>{"x", "a", "late", "b", "c"}));
}

TEST(GraphTest, FingerprintIgnoresIds) {
  Chain chain, other;
  EXPECT_EQ(chain.graph.Fingerprint(), other.graph.Fingerprint());
  const Value extra = other.builder.Op("exp", {other.x}, {}, "extra");
  EXPECT_NE(chain.graph.Fingerprint(), other.graph.Fingerprint());
  other.graph.RemoveNode(extra.node);
  EXPECT_EQ(chain.graph.Fingerprint(), other.graph.Fingerprint());
  other.graph.SetNodeName(other.a.node, "renamed");
  EXPECT_NE(chain.graph.Fingerprint(), other.graph.Fingerprint());
}

TEST(GraphTest, CloneIsEqualAndIndependent) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::unique_ptr<Graph> graph = RandomGraph(seed);
    const std::string before = Print(*graph);
    const std::unique_ptr<Graph> clone = graph->Clone();
    EXPECT_EQ(Print(*clone), before);
    EXPECT_OK(VerifyGraph(*clone));
    Builder builder(*clone);
    clone->SetOutputs({{builder.Op("neg", {clone->outputs()[0].value}), "loss", nullptr}});
    EXPECT_EQ(Print(*graph), before);
    EXPECT_NE(Print(*clone), before);
  }
}

TEST(GraphTest, RecomputeIsMarkedAndForgetsARemovedOriginal) {
  Chain chain;
  ASSERT_OK_AND_ASSIGN(Node * again, chain.graph.CloneNode(*chain.b.node, {chain.a}, true));
  EXPECT_EQ(again->recompute_of(), chain.b.node);
  ASSERT_OK_AND_ASSIGN(Node * third, chain.graph.CloneNode(*again, {chain.a}, true));
  EXPECT_EQ(third->recompute_of(), chain.b.node);
  chain.graph.ReplaceAllUses(chain.b, again->result());
  EXPECT_OK(VerifyGraph(chain.graph));
  chain.graph.RemoveNode(chain.b.node);
  EXPECT_EQ(again->recompute_of(), nullptr);
  EXPECT_OK(VerifyGraph(chain.graph));
}

// Who made a node is known to clones and to nothing else.
TEST(GraphTest, NodesRememberWhatMadeThem) {
  Chain chain;
  EXPECT_EQ(chain.a.node->made_by(), "");
  const uint64_t before = chain.graph.Fingerprint();
  chain.graph.set_made_by("remat");
  ASSERT_OK_AND_ASSIGN(const Node* node, chain.graph.AddNode(*FindOp("neg"), {chain.c}, {}, "d"));
  EXPECT_EQ(node->made_by(), "remat");
  ASSERT_OK_AND_ASSIGN(const Node* copy, chain.graph.CloneNode(*chain.a.node, chain.a.node->operands(), true));
  EXPECT_EQ(copy->made_by(), "") << "a clone keeps what it was";
  const std::unique_ptr<Graph> clone = chain.graph.Clone();
  EXPECT_EQ(clone->Nodes().at(4)->made_by(), "remat");

  Chain same;
  EXPECT_EQ(same.graph.Fingerprint(), before);
  ASSERT_OK(same.graph.AddNode(*FindOp("neg"), {same.c}, {}, "d"));
  ASSERT_OK(same.graph.CloneNode(*same.a.node, same.a.node->operands(), true));
  EXPECT_EQ(same.graph.Fingerprint(), chain.graph.Fingerprint());
  EXPECT_EQ(Print(same.graph), Print(chain.graph));
}

TEST(ModuleTest, StatesFactsAndGraphs) {
  Module module("m");
  ASSERT_OK(module.AddState({.name = "w", .type = {DType::kF32, {64, 8}}, .logical_dims = {50, 8}}));
  ASSERT_OK(module.AddState({.name = "w.m", .type = {DType::kF32, {64, 8}}, .role = Role::kOptimizerState}));
  EXPECT_THAT(module.AddState({.name = "w", .type = kMatrix}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("exists")));
  EXPECT_THAT(module.AddState({.name = "d", .type = kMatrix, .role = Role::kData}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("data")));
  EXPECT_EQ(module.num_parameters(), 400);
  EXPECT_EQ(module.fact("batch", 7), 7);
  module.facts()["batch"] = 3;
  EXPECT_EQ(module.fact("batch"), 3);
  Graph* graph = module.AddGraph("train");
  EXPECT_EQ(module.FindGraph("train"), graph);
  EXPECT_EQ(module.FindGraph("eval"), nullptr);
  const std::unique_ptr<Module> clone = module.Clone();
  EXPECT_EQ(clone->Fingerprint(), module.Fingerprint());
  clone->facts()["batch"] = 4;
  EXPECT_NE(clone->Fingerprint(), module.Fingerprint());
}

TEST(ModuleTest, InitReadsBack) {
  for (const std::string text : {"zeros", "ones", "normal(0.02)"}) {
    ASSERT_OK_AND_ASSIGN(const Init init, ParseInit(text));
    EXPECT_EQ(init.ToString(), text);
  }
  for (const std::string text : {"", "normal", "normal(-1.0)", "normal(inf)", "uniform(1.0)"}) {
    EXPECT_THAT(ParseInit(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("initial value"))) << text;
  }
}

}  // namespace
}  // namespace mt
