// The manager's own promises: it catches passes that lie or break the module, names them, dumps, reports, and is quick.
#include "passes/pass_manager.h"

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "ir/base/file.h"
#include "ir/builder.h"
#include "ir/text.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

PassDef MakePass(PassFn run, bool any_stage = true) {
  return {.name = "probe", .summary = "A pass of this test.", .any_stage = any_stage, .run = run};
}

absl::Status RunOne(Module& module, const PassDef& pass, PassContext context = {}) {
  Pipeline pipeline;
  pipeline.steps.push_back({.pass = &pass, .options = {}});
  return RunPipeline(module, pipeline, context);
}

// Doubles what the loss is.
absl::StatusOr<bool> DoubleLoss(Module& module, bool claim) {
  Graph& train = *module.FindGraph("train");
  Builder builder(train);
  std::vector<Output> outputs = train.outputs();
  outputs[0].value = builder.Scale(outputs[0].value, 2.0);
  train.SetOutputs(outputs);
  RETURN_IF_ERROR(builder.status());
  return claim;
}

TEST(PassManagerTest, CatchesAFalseClaim) {
  std::unique_ptr<Module> module = MustParse(kPerceptron);
  const PassDef hides = MakePass([](Module& m, const Attrs&, PassContext&) { return DoubleLoss(m, false); });
  EXPECT_THAT(RunOne(*module, hides),
              StatusIs(absl::StatusCode::kInternal,
                       HasSubstr("pass probe says that it did not change the module, but the module is another")));
  const PassDef boasts = MakePass([](Module&, const Attrs&, PassContext&) -> absl::StatusOr<bool> { return true; });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), boasts),
              StatusIs(absl::StatusCode::kInternal,
                       HasSubstr("pass probe says that it changed the module, but the module is the same")));
  const PassDef honest = MakePass([](Module& m, const Attrs&, PassContext&) { return DoubleLoss(m, true); });
  EXPECT_OK(RunOne(*MustParse(kPerceptron), honest));
}

// A change of a state or a fact is a change, too.
TEST(PassManagerTest, SeesChangesOutsideGraphs) {
  const PassDef state = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    m.MutableState("gain")->init = {.kind = Init::Kind::kZeros};
    return false;
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), state), StatusIs(absl::StatusCode::kInternal, HasSubstr("is another")));
  const PassDef fact = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    m.facts()["batch"] = 17;
    return false;
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), fact), StatusIs(absl::StatusCode::kInternal, HasSubstr("is another")));
}

TEST(PassManagerTest, NamesThePassThatBreaksTheModule) {
  const PassDef breaks = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    Graph& train = *m.FindGraph("train");
    train.AddOutput(train.outputs()[0].value, "loss");
    return true;
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), breaks),
              StatusIs(absl::StatusCode::kInternal,
                       AllOf(HasSubstr("pass probe broke the module: "), HasSubstr("two outputs are named \"loss\""))));
}

TEST(PassManagerTest, NamesThePassThatMakesACycle) {
  const PassDef knots = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    Graph& train = *m.FindGraph("train");
    for (Node* node : train.Nodes()) {
      if (!node->is_input() && node->name() == "gain") train.SetOperand(node, 0, node->result());
    }
    return true;
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), knots),
              StatusIs(absl::StatusCode::kInternal, "pass probe broke the module: graph @train has a cycle"));
}

TEST(PassManagerTest, NamesThePassThatFails) {
  const PassDef fails = MakePass([](Module&, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    return absl::ResourceExhaustedError("no schedule fits");
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), fails),
              StatusIs(absl::StatusCode::kResourceExhausted, "pass probe: no schedule fits"));
}

TEST(PassManagerTest, ChecksStages) {
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), kOptimizerPass),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       "pass optimizer needs stage training, but graph @train is at stage forward"));
  PassDef promises =
      MakePass([](Module& m, const Attrs&, PassContext&) { return DoubleLoss(m, true); }, /*any_stage=*/false);
  promises.provides_stage = Stage::kTraining;
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), promises),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       "pass probe promises stage training, but graph @train is at stage forward"));
  const PassDef moves = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    m.FindGraph("train")->set_stage(Stage::kTraining);
    return true;
  });
  EXPECT_THAT(RunOne(*MustParse(kPerceptron), moves),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("probe")));
}

TEST(PassManagerTest, NeedsAGraphCalledTrain) {
  const std::string text = absl::StrReplaceAll(kPerceptron, {{"@train", "@eval"}});
  EXPECT_THAT(RunOne(*MustParse(text), kCsePass),
              StatusIs(absl::StatusCode::kInvalidArgument, "module @mlp has no graph @train"));
}

TEST(PassManagerTest, RemovesDeadNodesAfterEachPass) {
  std::unique_ptr<Module> module = MustParse(kPerceptron);
  const int64_t before = module->FindGraph("train")->num_nodes();
  const PassDef litters = MakePass([](Module& m, const Attrs&, PassContext&) -> absl::StatusOr<bool> {
    Builder builder(*m.FindGraph("train"));
    builder.Scale(builder.Scale(m.FindGraph("train")->outputs()[0].value, 3.0), 4.0);
    RETURN_IF_ERROR(builder.status());
    return true;
  });
  EXPECT_OK(RunOne(*module, litters));
  EXPECT_EQ(module->FindGraph("train")->num_nodes(), before);
}

TEST(PassManagerTest, DumpsAndReports) {
  PassContext context;
  context.dump_dir = absl::StrCat(::testing::TempDir(), "/pass_manager_dumps");
  std::unique_ptr<Module> module = MustParse(kPerceptron);
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("none"));
  std::vector<PassReport> reports;
  ASSERT_OK(RunPipeline(*module, pipeline, context, &reports));
  ASSERT_EQ(reports.size(), pipeline.steps.size());

  ASSERT_OK_AND_ASSIGN(const std::string input, ReadFile(absl::StrCat(context.dump_dir, "/00.input.mtir")));
  EXPECT_EQ(input, Print(*MustParse(kPerceptron)));
  std::string last;
  for (size_t i = 0; i < reports.size(); ++i) {
    const std::string name = absl::StrCat(context.dump_dir, "/0", i + 1, ".", reports[i].pass, ".",
                                          reports[i].changed ? "changed" : "unchanged", ".mtir");
    ASSERT_OK_AND_ASSIGN(last, ReadFile(name));
    EXPECT_OK(ParseModule(last)) << name;
  }
  EXPECT_EQ(last, Print(*module));

  EXPECT_EQ(reports[0].pass, "dce");
  EXPECT_FALSE(reports[0].changed);
  const PassReport& forward = reports[0];
  const PassReport& optimized = reports.back();
  EXPECT_EQ(optimized.pass, "optimizer");
  EXPECT_TRUE(optimized.changed);
  EXPECT_EQ(optimized.nodes, module->FindGraph("train")->num_nodes());
  // The two matmuls: 2 * 4 * 6 * 8 and 2 * 4 * 8 * 5 FLOPs.
  EXPECT_GE(forward.flops, 704);
  // Backward: the same for the weights, and for x of the second.
  EXPECT_GE(optimized.flops, 2 * 704 + 320);
  EXPECT_GT(forward.bytes, 0);
  EXPECT_GT(optimized.bytes, forward.bytes);
  EXPECT_GT(forward.peak_live_bytes, 4 * 8 * 4);
  for (const PassReport& report : reports) EXPECT_GE(report.seconds, 0);
  EXPECT_THAT(FormatPassReports(reports), AllOf(HasSubstr("autodiff"), HasSubstr("unchanged"), HasSubstr("peak live")));
}

TEST(PassManagerTest, OptimizerStatesInputsAndOutputs) {
  std::unique_ptr<Module> module = MustParse(kPerceptron);
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("none"));
  PassContext context;
  ASSERT_OK(RunPipeline(*module, pipeline, context));
  const Graph& train = *module->FindGraph("train");
  EXPECT_EQ(train.stage(), Stage::kOptimized);
  for (const Output& output : train.outputs()) {
    EXPECT_FALSE(absl::StartsWith(output.name, "grad.")) << output.name;
    const bool is_metric = output.name == "loss" || output.name == "grad_norm";
    EXPECT_EQ(output.donates == nullptr, is_metric) << output.name;
  }
  EXPECT_NE(train.FindOutput("grad_norm"), nullptr);
  for (const char* name : {"lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip"}) {
    const Node* input = train.FindInput(name);
    ASSERT_NE(input, nullptr) << name;
    EXPECT_EQ(input->role(), Role::kStep) << name;
  }
  ASSERT_NE(module->FindState("adamw.t"), nullptr);
  EXPECT_EQ(module->FindState("adamw.t")->type.ToString(), "i32[]");
  for (const char* name : {"fc1.weight", "fc1.bias", "gain", "fc2.weight"}) {
    for (const std::string& state :
         {std::string(name), absl::StrCat("adamw.m.", name), absl::StrCat("adamw.v.", name)}) {
      ASSERT_NE(module->FindState(state), nullptr) << state;
      ASSERT_NE(train.FindOutput(state), nullptr) << state;
      EXPECT_EQ(train.FindOutput(state)->donates, train.FindInput(state));
    }
    const Node* update = train.FindOutput(name)->value.node;
    EXPECT_EQ(update->op().name, "adamw");
    EXPECT_EQ(update->phase(), Phase::kOptimizer);
    // Biases do not decay.
    EXPECT_EQ(update->attrs().Bool("decay"), absl::string_view(name) != "fc1.bias") << name;
  }
}

TEST(PassManagerTest, OtherOptimizers) {
  for (const char* kind : {"adam", "none"}) {
    SCOPED_TRACE(kind);
    std::unique_ptr<Module> module = MustParse(kPerceptron);
    ASSERT_OK_AND_ASSIGN(Pipeline pipeline, ParsePipeline("none"));
    ASSERT_OK(pipeline.SetOption("optimizer", "kind", kind));
    PassContext context;
    ASSERT_OK(RunPipeline(*module, pipeline, context));
    const Graph& train = *module->FindGraph("train");
    if (absl::string_view(kind) == "adam") {
      EXPECT_EQ(train.FindOutput("gain")->value.node->op().name, "adam");
      EXPECT_NE(module->FindState("adam.m.gain"), nullptr);
    } else {
      EXPECT_EQ(train.stage(), Stage::kTraining);
      EXPECT_NE(train.FindOutput("grad.gain"), nullptr);
      EXPECT_EQ(module->states().size(), 4u);
    }
  }
}

// 96 layers of the largest zoo shape: planning has half a second in all, of which this is the greater part.
TEST(PassManagerTest, NinetySixLayersAreQuick) {
  std::unique_ptr<Module> module = SmallTransformer(
      "layers: 96 width: 768 heads: 12 ffn_width: 3072 attention_bias: true mlp_bias: true norm_bias: true dropout: "
      "0.1 "
      "vocab_size: 32000 max_sequence: 256",
      8, 256);
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("none"));
  PassContext context;
  std::vector<PassReport> reports;
  const auto start = std::chrono::steady_clock::now();
  ASSERT_OK(RunPipeline(*module, pipeline, context, &reports));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  RecordProperty("seconds", std::to_string(seconds.count()));
  std::cout << FormatPassReports(reports) << "total " << seconds.count() << " s\n";
  EXPECT_GT(module->FindGraph("train")->num_nodes(), 96 * 40);
  // Quadratic behaviour shows far above this, a busy machine or a sanitizer does not.
  EXPECT_LT(seconds.count(), 5.0);
}

}  // namespace
}  // namespace mt
