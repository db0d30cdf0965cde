// Gradients of whole modules against central differences in f64, and what the backward graph looks like.
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "ir/builder.h"
#include "ir/evaluator.h"
#include "ir/text.h"
#include "ir/verifier.h"
#include "passes/pass_manager.h"
#include "passes/registry.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// The passes by name, always-on ones too, in this order.
absl::Status RunPasses(Module& module, const std::vector<const PassDef*>& passes) {
  Pipeline pipeline;
  for (const PassDef* pass : passes) pipeline.steps.push_back({.pass = pass, .options = {}});
  PassContext context;
  return RunPipeline(module, pipeline, context);
}

double Loss(const Graph& graph, const std::map<std::string, HostTensor<double>>& inputs) {
  absl::StatusOr<std::map<std::string, HostTensor<double>>> outputs =
      EvaluateGraph<double>(graph, inputs, /*round=*/false);
  CHECK(outputs.ok()) << outputs.status();
  return outputs->at("loss").values[0];
}

// Every parameter: up to `samples` elements by themselves, and all elements at once along a random direction.
void CheckGradients(Module& module, int64_t vocab, int samples, uint64_t seed) {
  const std::unique_ptr<Module> forward = module.Clone();
  ASSERT_OK(RunPasses(module, {&kAutodiffPass}));
  const Graph& before = *forward->FindGraph("train");
  const Graph& after = *module.FindGraph("train");
  std::map<std::string, HostTensor<double>> inputs = MakeInputs<double>(before, vocab, seed);
  ASSERT_OK_AND_ASSIGN(const auto outputs, EvaluateGraph<double>(after, inputs, /*round=*/false));
  EXPECT_EQ(outputs.at("loss").values[0], Loss(before, inputs));
  int64_t parameters = 0;
  for (const Node* input : before.inputs()) {
    if (input->role() != Role::kParameter) continue;
    ++parameters;
    const std::string& name = input->name();
    const std::vector<double>& gradient = outputs.at(absl::StrCat("grad.", name)).values;
    const std::vector<double> values = inputs.at(name).values;
    ASSERT_EQ(gradient.size(), values.size()) << name;
    double norm = 0;
    for (const double g : gradient) norm += g * g;
    norm = std::sqrt(norm);
    const auto difference = [&](const std::vector<double>& direction) {
      constexpr double kStep = 1e-5;
      double losses[2];
      for (const int side : {0, 1}) {
        std::vector<double>& moved = inputs.at(name).values;
        for (size_t i = 0; i < values.size(); ++i) moved[i] = values[i] + (side == 0 ? kStep : -kStep) * direction[i];
        losses[side] = Loss(before, inputs);
      }
      inputs.at(name).values = values;
      return (losses[0] - losses[1]) / (2 * kStep);
    };
    for (int s = 0; s < samples; ++s) {
      const size_t i = static_cast<size_t>(Fnv1a(absl::StrCat(name, s)) % values.size());
      std::vector<double> direction(values.size(), 0.0);
      direction[i] = 1;
      EXPECT_NEAR(gradient[i], difference(direction), 1e-6 * (1 + norm)) << name << "[" << i << "]";
    }
    const SampleOperand normal{.type = input->result().type()};
    const std::vector<double> direction = FillSample<double>(normal, {}, Fnv1a(name)).values;
    double along = 0;
    for (size_t i = 0; i < gradient.size(); ++i) along += gradient[i] * direction[i];
    EXPECT_NEAR(along, difference(direction), 1e-5 * (1 + norm)) << name;
    // A gradient that is zero everywhere would agree with nothing being computed.
    EXPECT_GT(norm, 1e-6) << name;
  }
  EXPECT_GT(parameters, 0);
}

TEST(AutodiffTest, AgreesWithCentralDifferences) {
  for (SmallModule& small : SmallModules()) {
    SCOPED_TRACE(small.name);
    CheckGradients(*small.module, small.name == "perceptron" ? 5 : 11, 3, 7);
  }
}

// Every activation, and grouped heads with biases.
TEST(AutodiffTest, EveryKindOfBlock) {
  for (const char* activation : {"GELU_ERF", "SILU", "GEGLU"}) {
    SCOPED_TRACE(activation);
    const std::unique_ptr<Module> module = SmallTransformer(
        absl::StrCat("layers: 1 kv_heads: 1 attention_bias: true mlp_bias: true activation: ", activation), 2, 3);
    CheckGradients(*module, 11, 2, 3);
  }
}

// A graph of element-wise ops with random edges and random broadcasts between [3,4], [1,4], [4], [3,1] and [].
std::unique_ptr<Module> RandomElementWise(uint64_t seed) {
  auto module = std::make_unique<Module>("random");
  Graph& graph = *module->AddGraph("train");
  Builder builder(graph);
  std::vector<Value> values;
  auto next = [state = seed](size_t bound) mutable {
    state = Fnv1a("next", state);
    return static_cast<size_t>((state >> 20) % bound);
  };
  const std::vector<Dims> shapes = {{3, 4}, {1, 4}, {4}, {3, 1}, {}};
  for (size_t i = 0; i < shapes.size(); ++i) {
    const TensorType type{DType::kF32, shapes[i]};
    const std::string name = absl::StrCat("p", i);
    CHECK_OK(module->AddState({.name = name, .type = type, .logical_dims = {}, .role = Role::kParameter, .init = {}}));
    values.push_back(builder.Input(name, type, Role::kParameter));
  }
  const std::vector<absl::string_view> unary = {"tanh", "gelu", "silu", "gelu_erf", "neg"};
  const std::vector<absl::string_view> binary = {"add", "mul", "sub", "swiglu", "geglu", "add"};
  const size_t parameters = values.size();
  for (size_t i = 0; i < 14; ++i) {
    const Value a = values[next(values.size())];
    // The first rounds read every parameter.
    const Value b = values[i < parameters ? i : next(values.size())];
    const bool both = i < parameters || next(3) > 0;
    const std::string name = absl::StrCat("n", i);
    values.push_back(both ? builder.Op(binary[next(binary.size())], {a, b}, {}, name)
                          : builder.Op(unary[next(unary.size())], {a}, {}, name));
  }
  // All of them count: the loss is the mean of the sum.
  Value sum = builder.Op("broadcast", {values[parameters]}, {{"dims", IntList{3, 4}}});
  for (size_t i = parameters + 1; i < values.size(); ++i) sum = builder.Add(sum, builder.Op("tanh", {values[i]}));
  graph.AddOutput(builder.Op("reduce_mean", {sum}, {{"dims", IntList{0, 1}}}), "loss");
  CHECK_OK(builder.status());
  return module;
}

TEST(AutodiffTest, RandomGraphs) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    const std::unique_ptr<Module> module = RandomElementWise(seed);
    CheckGradients(*module, 5, 2, seed);
  }
}

TEST(AutodiffTest, BackwardNodesAreNamedAndPhased) {
  const std::unique_ptr<Module> module = SmallTransformer("tied_head: true norm_bias: true dropout: 0.1");
  const int64_t forward_nodes = module->FindGraph("train")->num_nodes();
  ASSERT_OK(RunPasses(*module, {&kAutodiffPass}));
  const Graph& train = *module->FindGraph("train");
  EXPECT_EQ(train.stage(), Stage::kTraining);
  EXPECT_EQ(module->FindGraph("eval")->stage(), Stage::kForward);
  int64_t backward = 0;
  for (const Node* node : train.Nodes()) {
    if (node->phase() == Phase::kForward) continue;
    ++backward;
    EXPECT_EQ(node->phase(), Phase::kBackward);
    EXPECT_THAT(node->name(), ::testing::EndsWith(".grad"));
    EXPECT_THAT(node->name(), Not(HasSubstr(".grad.")));
  }
  EXPECT_GT(backward, forward_nodes / 2);
  EXPECT_EQ(train.phase(), Phase::kForward);
}

// The tied table: the head's product comes first, the embedding's rows are summed into it, and no add is left.
TEST(AutodiffTest, TiedTableUsesTheAccumulator) {
  const std::unique_ptr<Module> module = SmallTransformer("tied_head: true positions: NONE");
  ASSERT_OK(RunPasses(*module, {&kAutodiffPass}));
  const Output* gradient = module->FindGraph("train")->FindOutput("grad.embed.tokens.weight");
  ASSERT_NE(gradient, nullptr);
  const Node* last = gradient->value.node;
  EXPECT_EQ(last->op().name, "embedding_backward");
  EXPECT_TRUE(last->attrs().Bool("accumulator"));
  EXPECT_EQ(last->operands().back().node->op().name, "matmul");
}

// x * x, x + x and a value that reaches the loss along several roads: the same gradient may arrive more than once, and
// one of the roads ends in an op with an accumulator.
TEST(AutodiffTest, GradientsThatShareAValue) {
  const std::unique_ptr<Module> module = MustParse(R"(
module @shared {
  state "w": f32[3,3] parameter init=normal(1)
  state "v": f32[3,3] parameter init=normal(1)
}
graph @train stage=forward {
  input %w: f32[3,3] parameter
  input %v: f32[3,3] parameter
  %0: f32[3,3] = matmul(%w, %w) "square"
  %1: f32[3,3] = add(%0, %0) "twice"
  %2: f32[3,3] = add(%1, %v) "sum"
  %3: f32[3,3] = matmul(%2, %v) "product"
  %4: f32[3,3] = mul(%3, %2) "gate"
  %5: f32[3,3] = matmul(%4, %w) {transpose_a=true} "back"
  %6: f32[] = reduce_mean(%5) {dims=[0,1]} "mean"
  output "loss" %6
}
)");
  CheckGradients(*module, 1, 5, 1);
}

// The gradient of "s" goes unchanged to "p" and "q", and on from "p" to "p1", which has one already: the product that
// made it must not be summed into there, because "q" still needs it by itself.
TEST(AutodiffTest, GradientsThatTwoValuesHold) {
  const std::unique_ptr<Module> module = MustParse(R"(
module @held {
  state "w": f32[3,3] parameter init=normal(1)
  state "v": f32[3,3] parameter init=normal(1)
}
graph @train stage=forward {
  input %x: f32[3,3] data
  input %w: f32[3,3] parameter
  input %v: f32[3,3] parameter
  %0: f32[3,3] = tanh(%w) "p1"
  %1: f32[3,3] = tanh(%v) "q"
  %2: f32[3,3] = add(%0, %x) "p"
  %3: f32[3,3] = add(%2, %1) "s"
  %4: f32[3,3] = matmul(%3, %v) "product"
  %5: f32[3,3] = mul(%4, %0) "gate"
  %6: f32[] = reduce_mean(%5) {dims=[0,1]} "mean"
  output "loss" %6
}
)");
  CheckGradients(*module, 1, 5, 1);
}

TEST(AutodiffTest, ErrorsNameWhatIsWrong) {
  const auto run = [](absl::string_view text) {
    const std::unique_ptr<Module> module = MustParse(text);
    return RunPasses(*module, {&kAutodiffPass});
  };
  const std::string good(kPerceptron);
  EXPECT_THAT(
      run(absl::StrReplaceAll(good, {{"output \"loss\"", "output \"total\""}})),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pass autodiff: graph @train has no output \"loss\"")));
  EXPECT_THAT(run(absl::StrReplaceAll(good, {{"output \"loss\" %9", "output \"loss\" %8"}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f32[4]; expected a floating-point scalar")));
  EXPECT_THAT(run(absl::StrReplaceAll(good, {{"mul(%2, %gain)", "mul(%2, %2)"}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("parameter gain does not influence the loss")));
  EXPECT_THAT(
      run(absl::StrReplaceAll(good, {{"state \"gain\"", "state \"idle\": f32[2] parameter\n  state \"gain\""}})),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("parameter idle does not influence the loss")));
  const absl::Status no_gradient = run(R"(
module @m {
  state "w": f32[2,2] parameter init=ones
}
graph @train stage=forward {
  input %w: f32[2,2] parameter
  %0: f32[] = global_norm(%w) "norm"
  output "loss" %0
}
)");
  EXPECT_THAT(no_gradient, StatusIs(absl::StatusCode::kInvalidArgument,
                                    HasSubstr("global_norm \"norm\" has no gradient, but lies between")));
}

}  // namespace
}  // namespace mt
