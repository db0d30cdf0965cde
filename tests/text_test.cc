#include "ir/text.h"

#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "ir/builder.h"
#include "tests/random_graph.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kMlp[] = R"(module @mlp {
  fact batch = 32
  fact offset = -1
  state "fc1.weight": f32[784,128] parameter init=normal(0.02)
  state "padded": f32[64,8] optimizer_state init=zeros logical=[50,8]
}
graph @train stage=training {
  input %x: f32[32,784] data
  input %fc1.weight: f32[784,128] parameter
  input %lr: f32[] step
  %0: bf16[784,128] = cast(%fc1.weight) {to=bf16}
  %1: bf16[32,784] = cast(%x) {to=bf16} "h0/in-put"
  %2: bf16[32,128] = matmul(%1, %0) "fc1"
  %3: bf16[32,128] = gelu(%2) "a \"quoted\" name"
  %4: f32[] = reduce_mean(%3) {dims=[0,1]} backward
  %5: bf16[32,128] = gelu(%2) "a \"quoted\" name" recompute_of=%3
  output "loss" %lr
  output "other" %4
  output "again" %5
}
graph @eval stage=forward {
  input %x: f32[2] data
  output "x" %x
}
)";

TEST(TextTest, ModuleReadsBackAsWritten) {
  // reduce_mean gives the dtype of its operand.
  const std::string text = absl::StrReplaceAll(kMlp, {{"%4: f32[]", "%4: bf16[]"}});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> module, ParseModule(text));
  EXPECT_EQ(Print(*module), text);
  EXPECT_EQ(module->FindState("padded")->logical_dims, (Dims{50, 8}));
  EXPECT_EQ(module->fact("offset"), -1);
  const Graph& train = *module->FindGraph("train");
  EXPECT_EQ(train.stage(), Stage::kTraining);
  const Node* again = train.FindOutput("again")->value.node;
  EXPECT_EQ(again->recompute_of()->name(), "a \"quoted\" name");
  EXPECT_EQ(train.FindOutput("other")->value.node->phase(), Phase::kBackward);
}

TEST(TextTest, TypesAreChecked) {
  EXPECT_THAT(ParseModule(kMlp), StatusIs(absl::StatusCode::kInvalidArgument,
                                          AllOf(HasSubstr("line 15:"), HasSubstr("f32[]"), HasSubstr("gives bf16[]"))));
}

TEST(TextTest, NumbersNeedNotBeInOrderAndCommentsAreSkipped) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(R"(
// A comment.
graph @g {
  input %x: f32[2] data

    %7: f32[2] = neg( %x )
  // %9 is not there.
  %3:f32[2]=add(%7,%x)
  output "y"   %3
})"));
  EXPECT_EQ(Print(*graph), R"(graph @g stage=forward {
  input %x: f32[2] data
  %0: f32[2] = neg(%x)
  %1: f32[2] = add(%0, %x)
  output "y" %1
}
)");
}

TEST(TextTest, DonationReadsBack) {
  const std::string text = R"(graph @g stage=optimized {
  input %w: f32[2] parameter
  %0: f32[2] = neg(%w) "update" optimizer
  output "w" %0 donates %w
}
)";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(text));
  EXPECT_EQ(graph->outputs()[0].donates, graph->FindInput("w"));
  EXPECT_EQ(Print(*graph), text);
}

TEST(TextTest, MultipleResultsAreNumberedEach) {
  Graph graph("g");
  Builder builder(graph);
  const Value x = builder.Input("x", {DType::kF32, {4, 8}}, Role::kData);
  const Value gamma = builder.Input("gamma", {DType::kF32, {8}}, Role::kParameter);
  const std::vector<Value> norm = builder.Ops("rms_norm", {x, gamma}, {{"eps", 0.1}}, "norm");
  const Value y = builder.Op("neg", {norm[0]});
  graph.AddOutput(y, "y");
  graph.AddOutput(norm[1], "rstd");
  ASSERT_OK(builder.status());
  const std::string text = Print(graph);
  EXPECT_THAT(text, HasSubstr("  %0: f32[4,8], %1: f32[4] = rms_norm(%x, %gamma) {eps=0.1} \"norm\"\n  %2:"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> back, ParseGraph(text));
  EXPECT_EQ(Print(*back), text);
}

// A repeat whose inputs are ready before the inputs of what it repeats comes first in the text.
TEST(TextTest, RecomputeMayComeBeforeItsOriginal) {
  const std::string text = R"(graph @g stage=forward {
  input %x: f32[2] data
  %0: f32[2] = tanh(%x) recompute_of=%2
  %1: f32[2] = neg(%x)
  %2: f32[2] = tanh(%1)
  %3: f32[2] = add(%0, %2)
  output "y" %3
}
)";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(text));
  EXPECT_EQ(Print(*graph), text);
}

TEST(TextTest, RandomModulesReadBack) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const std::unique_ptr<Module> module = RandomModule(seed, {.nodes = 4 + static_cast<int64_t>(seed % 40)});
    const std::string text = Print(*module);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> back, ParseModule(text));
    ASSERT_EQ(Print(*back), text);
    EXPECT_EQ(back->Fingerprint(), module->Fingerprint());
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> graph, ParseGraph(Print(*module->graphs()[0])));
    EXPECT_EQ(graph->Fingerprint(), module->graphs()[0]->Fingerprint());
  }
}

// Wherever a byte of a file is lost, doubled or changed, the parser answers: with an error, or with a valid graph.
TEST(TextTest, DamagedTextIsAnErrorOrAGraph) {
  std::mt19937_64 random(7);
  int64_t errors = 0;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    std::string text = Print(*RandomModule(seed % 10, {.nodes = 8}));
    const size_t at = random() % text.size();
    switch (random() % 4) {
      case 0:
        text.erase(at, 1 + random() % 3);
        break;
      case 1:
        text.insert(at, 1, text[random() % text.size()]);
        break;
      case 2:
        text[at] = static_cast<char>(random());
        break;
      default:
        text.resize(at);
    }
    const absl::StatusOr<std::unique_ptr<Module>> module = ParseModule(text);
    if (!module.ok()) {
      EXPECT_EQ(module.status().code(), absl::StatusCode::kInvalidArgument) << module.status();
      ++errors;
      continue;
    }
    const std::string printed = Print(**module);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> again, ParseModule(printed));
    EXPECT_EQ(Print(*again), printed);
  }
  EXPECT_GT(errors, 1000);
}

struct BadLine {
  const char* line;
  const char* error;
};

class TextErrorTest : public ::testing::TestWithParam<BadLine> {};

// The line is the fourth of a graph with %x: f32[2,3] and %0 = neg(%x).
TEST_P(TextErrorTest, NamesTheLineAndTheFact) {
  const std::string text =
      absl::StrCat("graph @g stage=forward {\n  input %x: f32[2,3] data\n  %0: f32[2,3] = neg(%x)\n", GetParam().line,
                   "\n  output \"y\" %0\n}\n");
  EXPECT_THAT(ParseGraph(text),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("line 4: "), HasSubstr(GetParam().error))));
}

INSTANTIATE_TEST_SUITE_P(
    Lines, TextErrorTest,
    ::testing::Values(BadLine{"%1: f32[2,3] = ned(%x)", "unknown op \"ned\"; did you mean neg?"},
                      BadLine{"%1: f32[2,3] = input()", "unknown op \"input\""},
                      BadLine{"%1: f32[2,3] = neg(%7)", "%7 is not defined above"},
                      BadLine{"%1: f32[2,3] = neg(%1)", "%1 is not defined above"},
                      BadLine{"%1: f32[2,3] = neg(%z)", "%z is no input of graph @g"},
                      BadLine{"%1: f32[2,3] = neg(%x, %x)", "neg"},
                      BadLine{"%0: f32[2,3] = neg(%x)", "%0 is defined already"},
                      BadLine{"%1: f32[2,3], %1: f32[2,3] = neg(%x)", "%1 is defined already"},
                      BadLine{"%1: f32[2,3], %2: f32[2,3] = neg(%x)", "neg has 1 results; 2 are named"},
                      BadLine{"%-1: f32[2,3] = neg(%x)", "%-1 is negative"},
                      BadLine{"%y: f32[2,3] = neg(%x)", "expected input, output, } or %NUMBER"},
                      BadLine{"%99999999999999999999: f32[2,3] = neg(%x)", "expected input, output, } or %NUMBER"},
                      BadLine{"%1: f32[2,4] = neg(%x)", "%1 is written as f32[2,4], but neg gives f32[2,3]"},
                      BadLine{"%1: f32[2,0] = neg(%x)", "every dimension must be at least 1"},
                      BadLine{"%1: f32[1,1,1,1,1,1,1,1,1] = neg(%x)", "at most 8"},
                      BadLine{"%1: f32[9999999999,9999999999] = neg(%x)", "the limit for one tensor"},
                      BadLine{"%1: q8[2,3] = neg(%x)", "unknown dtype"},
                      BadLine{"%1: f32 = neg(%x)", "expected a type such as f32[32,128]"},
                      BadLine{"%1: f32[2,3] = neg(%x", "expected , or )"},
                      BadLine{"%1: f32[2,3] = neg %x", "expected ( and the operands"},
                      BadLine{"%1: f32[2,3] neg(%x)", "expected = OP(OPERANDS)"},
                      BadLine{"%1: f32[2,3] = neg(%x) {a=1}", "neg has no attribute \"a\"; known: none"},
                      BadLine{"%1: f32[2,3] = scale(%x) {factor=1.0, factor=1.0}", "factor is given twice"},
                      BadLine{"%1: f32[2,3] = scale(%x) {factor=high}", "\"high\" is not a double"},
                      BadLine{"%1: f32[2,3] = scale(%x) {factor 1.0}", "expected NAME=VALUE"},
                      BadLine{"%1: f32[2,3] = scale(%x) {factor=1.0", "expected , or }"},
                      BadLine{"%1: f32[2,3] = scale(%x)", "factor"},
                      BadLine{"%1: f32[2,3] = neg(%x) \"open", "expected the node's name in quotes"},
                      BadLine{"%1: f32[2,3] = neg(%x) sideways", "in this order at \"sideways\""},
                      BadLine{"%1: f32[2,3] = neg(%x) recompute_of=%x", "expected %NUMBER after recompute_of="},
                      BadLine{"%1: f32[2,3] = neg(%x) recompute_of=%5", "recompute_of=%5 is not a node"},
                      BadLine{"input %x: f32[2] data", "exists already"},
                      BadLine{"input %5: f32[2] data", "\"5\" cannot name an input"},
                      BadLine{"input %y: f32[2] dataa", "\"dataa\" is no role"},
                      BadLine{"input %y: f32[2] data x", "expected the end of the line at \"x\""},
                      BadLine{"output y %0", "expected the output's name in quotes"},
                      BadLine{"output \"z\" %8", "%8 is not defined above"},
                      BadLine{"output \"z\" %0 donates %0", "donates a value that is no input"},
                      BadLine{"outputs \"z\" %0", "expected input, output, } or %NUMBER"},
                      BadLine{"\xff\x01 %", "\\377\\001"}));

TEST(TextTest, WholeTextErrors) {
  const auto expect = [](absl::string_view text, const std::string& error) {
    EXPECT_THAT(ParseGraph(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(error))) << text;
  };
  expect("", "line 0: the text ends here; expected graph @NAME");
  expect("graph @g stage=forward {\n", "line 1: the text ends here; expected } at the end of graph @g");
  expect("graph g {\n}\n", "expected @NAME");
  expect("graph @7 {\n}\n", "\"7\" is no name");
  expect("graph @g stage=late {\n}\n", "\"late\" is no stage");
  expect("graph @g {\n}\n}\n", "line 3: \"}\" follows the graph");
  expect("module @m {\n}\n", "expected graph @NAME");
  // What the verifier says is the text's fault, too.
  expect("graph @g stage=training {\n}\n", "no output \"loss\"");
  EXPECT_THAT(ParseGraph(std::string(kMaxTextBytes + 1, ' ')),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 67108864 are allowed")));
}

TEST(TextTest, ModuleErrors) {
  const auto expect = [](absl::string_view text, const std::string& error) {
    EXPECT_THAT(ParseModule(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(error))) << text;
  };
  expect("graph @g {\n}\n", "expected module @NAME {");
  expect("module @m {\n  fact a = x\n}\n", "line 2: expected fact NAME = NUMBER");
  expect("module @m {\n  fact a = 1\n  fact a = 2\n}\n", "line 3: fact a is given twice");
  expect("module @m {\n  state \"s\": f32[2] data\n}\n", "has role data");
  expect("module @m {\n  state \"s\": f32[2] parameter init=random\n}\n", "is not an initial value");
  expect("module @m {\n  state \"s\": f32[2] parameter logical=[3]\n}\n", "logical dims [3] do not fit in f32[2]");
  expect("module @m {\n  state \"s\": f32[2] parameter logical=[2]x\n}\n", "expected init=INIT");
  expect("module @m {\n  state \"a b\": f32[2] parameter\n}\n", "cannot name a state");
  expect("module @m {\n  stat\n}\n", "expected fact NAME = NUMBER, state");
  expect("module @m {\n}\ngraph @g {\n}\ngraph @g {\n}\n", "line 5: graph @g exists already");
  expect("module @m {\n}\ngraph @g {\n  input %s: f32[2] parameter\n}\n", "not among the module's states");
}

TEST(TextTest, CountsAreLimited) {
  std::string text = "graph @g {\n";
  for (int64_t i = 0; i <= kMaxInputs; ++i) absl::StrAppend(&text, "  input %x", i, ": f32[1] data\n");
  absl::StrAppend(&text, "}\n");
  EXPECT_THAT(ParseGraph(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 16384 inputs")));
}

TEST(TextTest, Names) {
  for (const absl::string_view good : {"x", "h0.attn.qkv.weight", "a-b/c_d", "0.weight", "-"}) {
    EXPECT_TRUE(IsTextName(good)) << good;
  }
  for (const std::string& bad : {std::string(), std::string("12"), std::string("a b"), std::string("a:0"),
                                 std::string("\""), std::string("é"), std::string(513, 'a')}) {
    EXPECT_FALSE(IsTextName(bad)) << bad;
  }
}

}  // namespace
}  // namespace mt
