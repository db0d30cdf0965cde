// Every claim of the verifier: a graph is corrupted behind its back, and the error names what was done.
#include "ir/verifier.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/text.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const TensorType kMatrix{DType::kF32, {2, 3}};

// The graph's accessors give constant views of what it owns; a corruption writes through them.
template <typename T>
T& Writable(const T& value) {
  return const_cast<T&>(value);
}

template <typename... Parts>
void ExpectBroken(const Graph& graph, const Parts&... parts) {
  const absl::Status status = VerifyGraph(graph);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("graph @g: "), HasSubstr(parts)...)));
}

class VerifierTest : public ::testing::Test {
 protected:
  VerifierTest() : graph_("g"), builder_(graph_) {
    x_ = builder_.Input("x", kMatrix, Role::kData);
    w_ = builder_.Input("w", kMatrix, Role::kParameter);
    a_ = builder_.Op("scale", {x_}, {{"factor", 2.0}}, "a");
    b_ = builder_.Op("mul", {a_, w_}, {}, "b");
    loss_ = builder_.Op("reduce_sum", {b_}, {{"dims", IntList{0, 1}}}, "sum");
    graph_.AddOutput(loss_, "loss");
    CHECK_OK(builder_.status());
    CHECK_OK(VerifyGraph(graph_));
  }
  // The state w with an update of this value.
  void Donate(Value value, absl::string_view name = "w") {
    graph_.SetOutputs({{loss_, "loss", nullptr}, {value, std::string(name), w_.node}});
  }

  Graph graph_;
  Builder builder_;
  Value x_, w_, a_, b_, loss_;
};

TEST_F(VerifierTest, Cycle) {
  graph_.SetOperand(a_.node, 0, b_);
  ExpectBroken(graph_, "a cycle", "(scale \"a\") reads", "(mul \"b\")");
}

TEST_F(VerifierTest, ANodeThatReadsItself) {
  graph_.SetOperand(a_.node, 0, a_);
  ExpectBroken(graph_, "a cycle: node 2 (scale \"a\"), and so on");
}

TEST_F(VerifierTest, UseListMissesARead) {
  Writable(b_.node->operands()[0]) = x_;
  ExpectBroken(graph_, "(scale \"a\"): its use list says operand 0", "reads something else");
}

TEST_F(VerifierTest, UseListSaysAReadTwice) {
  builder_.Op("add", {a_, a_}, {}, "twice");
  ASSERT_OK(VerifyGraph(graph_));
  Writable(a_.node->uses()[1]) = a_.node->uses()[2];
  ExpectBroken(graph_, "(scale \"a\"): its use list says operand 1 of ", "twice");
}

TEST_F(VerifierTest, UseListIsShorterThanTheReads) {
  Graph other("other");
  const Value y = *other.AddInput("y", kMatrix, Role::kData);
  const Value spare = builder_.Op("neg", {y}, {}, "spare");
  Writable(spare.node->operands()[0]) = x_;
  ExpectBroken(graph_, "input %x: 2 operands read it, but its use list has 1");
}

TEST_F(VerifierTest, UseListNamesAStranger) {
  Graph other("other");
  Builder builder(other);
  const Value y = builder.Op("neg", {builder.Input("y", kMatrix, Role::kData)});
  Writable(a_.node->uses()[0]).node = y.node;
  ExpectBroken(graph_, "its use list names a node that is not in the graph");
}

TEST_F(VerifierTest, OperandOfAnotherGraph) {
  Graph other("other");
  const Value y = *other.AddInput("y", kMatrix, Role::kData);
  Writable(a_.node->operands()[0]) = y;
  ExpectBroken(graph_, "(scale \"a\"): operand 0 is a node that is not in the graph");
}

TEST_F(VerifierTest, OperandIndexOutOfRange) {
  Writable(a_.node->operands()[0]).index = 1;
  ExpectBroken(graph_, "(scale \"a\"): operand 0 is result 1 of input %x, which has 1");
  Writable(a_.node->operands()[0]).index = -1;
  ExpectBroken(graph_, "operand 0 is result -1");
}

TEST_F(VerifierTest, TypeOtherThanInferred) {
  Writable(a_.node->result_types()[0]).dims[0] = 4;
  ExpectBroken(graph_, "(scale \"a\"): results are f32[4,3], but scale of f32[2,3] gives f32[2,3]");
}

TEST_F(VerifierTest, TypesThatDoNotFitTheOp) {
  Writable(w_.node->result_types()[0]).dims[1] = 7;
  ExpectBroken(graph_, "(mul \"b\"): ", "[2,7]");
}

TEST_F(VerifierTest, BadInputType) {
  Writable(w_.node->result_types()[0]).dims[1] = 0;
  ExpectBroken(graph_, "input %w: f32[2,0]");
}

TEST_F(VerifierTest, AttributeMissing) {
  Writable(a_.node->attrs()).Erase("factor");
  ExpectBroken(graph_, "(scale \"a\"): attribute factor (double) is missing");
}

TEST_F(VerifierTest, AttributeWithADefaultMissing) {
  Writable(loss_.node->attrs()).Erase("keep_dims");
  ExpectBroken(graph_,
               "(reduce_sum \"sum\"): attributes are {dims=[0,1]}; complete they are {dims=[0,1], keep_dims=false}");
}

TEST_F(VerifierTest, AttributeUnknownOrOfAnotherKind) {
  Writable(a_.node->attrs()).Set("extra", true);
  ExpectBroken(graph_, "unknown attribute extra");
  Writable(a_.node->attrs()).Erase("extra");
  Writable(a_.node->attrs()).Set("factor", std::string("two"));
  ExpectBroken(graph_, "factor=\"two\" is a string");
  Writable(a_.node->attrs()).Set("factor", std::numeric_limits<double>::quiet_NaN());
  ExpectBroken(graph_, "attribute factor is nan");
}

TEST_F(VerifierTest, InputNames) {
  Writable(w_.node->name()) = "x";
  ExpectBroken(graph_, "two inputs are named %x");
  Writable(w_.node->name()) = "a b";
  ExpectBroken(graph_, "\"a b\" cannot name an input");
  Writable(w_.node->name()) = "12";
  ExpectBroken(graph_, "\"12\" cannot name an input");
}

TEST_F(VerifierTest, InputList) {
  Writable(graph_.inputs()[1]) = x_.node;
  ExpectBroken(graph_, "input %x is listed twice among the inputs");
  Writable(graph_.inputs()[1]) = a_.node;
  ExpectBroken(graph_, "(scale \"a\") is listed among the inputs; expected an input");
}

TEST_F(VerifierTest, GraphName) {
  Writable(graph_.name()) = "no name";
  EXPECT_THAT(VerifyGraph(graph_), StatusIs(absl::StatusCode::kInternal, HasSubstr("\"no name\" cannot name a graph")));
}

TEST_F(VerifierTest, OutputNames) {
  graph_.AddOutput(a_, "loss");
  ExpectBroken(graph_, "two outputs are named \"loss\"");
  graph_.SetOutputs({{loss_, "", nullptr}});
  ExpectBroken(graph_, "an output has no name");
}

TEST_F(VerifierTest, OutputOfAnotherGraph) {
  Graph other("other");
  graph_.AddOutput(*other.AddInput("y", kMatrix, Role::kData), "y");
  ExpectBroken(graph_, "output \"y\" is a value that is not in the graph");
  graph_.SetOutputs({{Value{loss_.node, 1}, "loss", nullptr}});
  ExpectBroken(graph_, "output \"loss\" is a value that is not in the graph");
}

TEST_F(VerifierTest, DonationIsOfAState) {
  Donate(b_);
  EXPECT_OK(VerifyGraph(graph_));
  graph_.AddOutput(a_, "x", x_.node);
  ExpectBroken(graph_, "output \"x\" donates input %x, whose role is data; expected a state");
  graph_.SetOutputs({{a_, "a", a_.node}});
  ExpectBroken(graph_, "output \"a\" donates something that is no input of the graph");
}

TEST_F(VerifierTest, DonationIsOfTheStateOfItsName) {
  Donate(b_, "v");
  ExpectBroken(graph_, "output \"v\" donates input %w; expected the input of its own name");
}

TEST_F(VerifierTest, DonationKeepsTheType) {
  Donate(builder_.Cast(b_, DType::kBF16));
  ExpectBroken(graph_, "output \"w\" is bf16[2,3] and donates input %w, which is f32[2,3]; expected the same type");
}

TEST_F(VerifierTest, TwoOutputsOfOneDonor) {
  Donate(b_);
  graph_.AddOutput(a_, "w", w_.node);
  ExpectBroken(graph_, "two outputs are named \"w\"");
}

TEST_F(VerifierTest, RecomputeOfAnEqualNode) {
  ASSERT_OK_AND_ASSIGN(Node * again, graph_.CloneNode(*a_.node, {x_}, true));
  EXPECT_OK(VerifyGraph(graph_));
  graph_.SetNodeRecomputeOf(again, b_.node);
  ExpectBroken(graph_, "recompute_of refers to node 3 (mul \"b\"); expected another node of the same op");
  graph_.SetNodeRecomputeOf(again, again);
  ExpectBroken(graph_, "expected another node of the same op");
  graph_.SetNodeRecomputeOf(again, x_.node);
  ExpectBroken(graph_, "recompute_of refers to input %x");
  graph_.SetNodeRecomputeOf(again, a_.node);
  Writable(again->attrs()).Set("factor", 3.0);
  ExpectBroken(graph_, "expected another node of the same op, attributes and result types");
}

TEST_F(VerifierTest, RecomputeOfANodeElsewhere) {
  ASSERT_OK_AND_ASSIGN(Node * again, graph_.CloneNode(*a_.node, {x_}, true));
  const std::unique_ptr<Graph> other = graph_.Clone();
  graph_.SetNodeRecomputeOf(again, other->TopologicalOrder()[2]);
  ExpectBroken(graph_, "recompute_of refers to a node that is not in the graph");
}

TEST_F(VerifierTest, CollectivesAndSavedOpsAreNotRepeated) {
  const Value reduced = builder_.Op("all_reduce", {a_}, {}, "reduced");
  ASSERT_OK(builder_.status());
  ASSERT_OK(graph_.CloneNode(*reduced.node, {a_}, true));
  ExpectBroken(graph_, "repeats", "all_reduce may not be recomputed");
  Graph other("g");
  Builder builder(other);
  std::vector<Value> operands;
  for (int i = 0; i < 4; ++i) operands.push_back(builder.Input(absl::StrCat("p", i), kMatrix, Role::kData));
  for (int i = 0; i < 8; ++i) {
    operands.push_back(builder.Input(absl::StrCat("s", i), {DType::kF32, {}}, Role::kStep));
  }
  const std::vector<Value> step = builder.Ops("adamw", operands, {{"decay", true}}, "update");
  ASSERT_OK(builder.status());
  ASSERT_OK(VerifyGraph(other));
  ASSERT_OK(other.CloneNode(*step[0].node, operands, true));
  ExpectBroken(other, "adamw may not be recomputed");
}

TEST_F(VerifierTest, ForwardHasForwardNodesOnly) {
  graph_.SetNodePhase(b_.node, Phase::kBackward);
  ExpectBroken(graph_, "(mul \"b\") is of phase backward; at stage forward");
  graph_.set_stage(Stage::kTraining);
  EXPECT_OK(VerifyGraph(graph_));
}

TEST_F(VerifierTest, TrainingHasALoss) {
  graph_.set_stage(Stage::kTraining);
  EXPECT_OK(VerifyGraph(graph_));
  graph_.SetOutputs({{loss_, "lose", nullptr}});
  ExpectBroken(graph_, "no output \"loss\"", "training");
}

TEST_F(VerifierTest, OptimizedUpdatesEveryParameter) {
  Donate(b_);
  graph_.set_stage(Stage::kOptimized);
  EXPECT_OK(VerifyGraph(graph_));
  ASSERT_OK(graph_.AddInput("v", kMatrix, Role::kParameter));
  ExpectBroken(graph_, "input %v is a parameter that no output donates; at stage optimized");
}

TEST(VerifierPropertyTest, RandomGraphsAreValid) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    EXPECT_OK(VerifyModule(*RandomModule(seed, {.nodes = 4 + static_cast<int64_t>(seed % 50)}))) << seed;
  }
}

class VerifyModuleTest : public ::testing::Test {
 protected:
  VerifyModuleTest() : module_("m") {
    CHECK_OK(module_.AddState({.name = "w", .type = kMatrix}));
    CHECK_OK(module_.AddState({.name = "v", .type = {DType::kF32, {64, 3}}, .logical_dims = {50, 3}}));
    Graph* graph = module_.AddGraph("train");
    graph->AddOutput(*graph->AddInput("w", kMatrix, Role::kParameter), "y");
    module_.facts()["batch"] = 2;
    CHECK_OK(VerifyModule(module_));
  }
  void ExpectModule(const std::string& error) {
    EXPECT_THAT(VerifyModule(module_), StatusIs(absl::StatusCode::kInternal, HasSubstr(error)));
  }
  Module module_;
};

TEST_F(VerifyModuleTest, GraphsAreVerified) {
  module_.graphs()[0]->set_stage(Stage::kTraining);
  ExpectModule("graph @train: there is no output \"loss\"");
}

TEST_F(VerifyModuleTest, StateInputsAgreeWithTheTable) {
  module_.MutableState("w")->type.dtype = DType::kBF16;
  ExpectModule("graph @train: input %w is f32[2,3] parameter, but the module's state is bf16[2,3] parameter");
  module_.MutableState("w")->type.dtype = DType::kF32;
  module_.MutableState("w")->role = Role::kOptimizerState;
  ExpectModule("but the module's state is f32[2,3] optimizer_state");
  module_.MutableState("w")->name = "u";
  ExpectModule("input %w is a parameter that is not among the module's states");
}

TEST_F(VerifyModuleTest, StatesAreWellFormed) {
  module_.MutableState("v")->logical_dims = {65, 3};
  ExpectModule("state v: logical dims [65,3] do not fit in f32[64,3]");
  module_.MutableState("v")->logical_dims = {50};
  ExpectModule("state v: logical dims [50] do not fit in f32[64,3]");
  module_.MutableState("v")->logical_dims = {0, 3};
  ExpectModule("state v: logical dims [0,3] do not fit");
  module_.MutableState("v")->logical_dims = {50, 3};
  module_.MutableState("v")->init.stddev = std::numeric_limits<double>::infinity();
  ExpectModule("state v: standard deviation inf");
  module_.MutableState("v")->init.stddev = 0;
  module_.MutableState("v")->role = Role::kStep;
  ExpectModule("state v has role step");
  module_.MutableState("v")->role = Role::kParameter;
  module_.MutableState("v")->type.dims[0] = -1;
  ExpectModule("state v: f32[-1,3]");
}

TEST_F(VerifyModuleTest, Names) {
  module_.MutableState("v")->name = "w";
  ExpectModule("two states are named w");
  module_.MutableState("w")->name = "7";
  ExpectModule("\"7\" cannot name a state");
  Writable(module_.states()[0]).name = "w";
  Writable(module_.states()[1]).name = "v";
  module_.facts()["a b"] = 1;
  ExpectModule("\"a b\" cannot name a fact");
  module_.facts().erase("a b");
  Writable(module_.AddGraph("eval")->name()) = "train";
  ExpectModule("two graphs are named @train");
  Writable(module_.name()) = "";
  ExpectModule("\"\" cannot name a module");
}

}  // namespace
}  // namespace mt
