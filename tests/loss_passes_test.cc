// chunked_loss and pad_vocab in compiled plans: losses, memory, and padding that is nothing but zeros.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/report/inspect.h"
#include "ir/base/json.h"
#include "ir/dynamic_map.h"
#include "ir/evaluator.h"
#include "ir/graph_io.h"
#include "passes/pass_manager.h"
#include "runtime/checkpoint/weights.h"
#include "tests/small_modules.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kVocab = 41;  // Padded to 64.

proto::PlanProto PlanWith(const std::string& passes, std::vector<std::string> more = {}, int64_t vocab = kVocab,
                          CompileReport* report = nullptr) {
  std::vector<std::string> sets = {"layers=1", "width=32", "heads=2"};
  sets.insert(sets.end(), more.begin(), more.end());
  absl::StatusOr<std::unique_ptr<Module>> module =
      LoadModel("tiny_char", {.batch = 2, .sequence = 16, .vocab_size = vocab, .sets = sets});
  CHECK(module.ok()) << module.status();
  CompileOptions options;
  options.passes = passes;
  absl::StatusOr<proto::PlanProto> plan = Compile(*std::move(module), options, report);
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

std::unique_ptr<LoadedPlan> MustLoad(const proto::PlanProto& plan) {
  absl::StatusOr<std::unique_ptr<LoadedPlan>> loaded = LoadForTest(plan);
  CHECK(loaded.ok()) << loaded.status();
  (*loaded)->scalars.weight_decay = 0.1;
  (*loaded)->scalars.grad_clip = 0.5;
  return *std::move(loaded);
}

std::vector<float> Train(LoadedPlan& loaded, int64_t steps) {
  std::vector<float> losses;
  for (int64_t step = 0; step < steps; ++step) {
    CHECK_OK(loaded.Prepare(step));
    loaded.train->Run();
    losses.push_back(*loaded.train->FindOutput("loss")->data_as<float>());
  }
  return losses;
}
std::vector<float> Losses(const proto::PlanProto& plan, int64_t steps) { return Train(*MustLoad(plan), steps); }

// loss_sum and count of the eval program on the inputs of a step.
std::pair<float, float> Evaluate(LoadedPlan& loaded) {
  const Program* eval = loaded.executor->FindProgram("eval");
  absl::StatusOr<StepInputs> inputs = StepInputs::Bind(*loaded.executor, *eval, loaded.vocab);
  CHECK(inputs.ok()) << inputs.status();
  std::swap(*loaded.inputs, *inputs);
  CHECK_OK(loaded.Prepare());
  std::swap(*loaded.inputs, *inputs);
  eval->Run();
  return {*eval->FindOutput("loss_sum")->data_as<float>(), *eval->FindOutput("count")->data_as<float>()};
}

void ExpectNear(const std::vector<float>& a, const std::vector<float>& b, double relative) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], relative * std::abs(b[i])) << "step " << i;
}

const proto::ProgramProto& TrainProgram(const proto::PlanProto& plan) {
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.name() == "train") return program;
  }
  CHECK(false) << "no train program";
}

int64_t Instructions(const proto::ProgramProto& program, const std::string& op) {
  int64_t count = 0;
  for (const proto::InstructionProto& instruction : program.instructions()) count += instruction.op() == op ? 1 : 0;
  return count;
}

// Chunks by shapes alone, and by what kind of device it is.
TEST(ChunkedLoss, ChunksFollowFromShapes) {
  const auto chunks = [](const char* spec, int64_t batch, const char* target) -> int64_t {
    absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(spec, {.batch = batch, .vocab_size = {}, .sets = {}});
    CHECK(module.ok()) << module.status();
    CompileReport report;
    const absl::StatusOr<proto::PlanProto> plan =
        PassesAndPlan(*std::move(module), {.target = target, .passes = "flash,chunked_loss,pad_vocab"}, report);
    CHECK(plan.ok()) << plan.status();
    for (const proto::InstructionProto& instruction : plan->programs(0).instructions()) {
      if (!absl::StartsWith(instruction.op(), "chunked_loss")) continue;
      const absl::StatusOr<Attrs> attrs = AttrsFromProto(instruction.attrs());
      CHECK(attrs.ok()) << attrs.status();
      return attrs->Int("chunks");
    }
    return 0;
  };
  EXPECT_EQ(chunks("so_small", 64, "cpu"), 32);     // 16,384 rows of 256, 512 a chunk.
  EXPECT_EQ(chunks("so_small", 64, "cuda"), 16);    // 1,024.
  EXPECT_EQ(chunks("gpt2_wide32k", 16, "cpu"), 8);  // 4,096 rows of 768; 32,000 classes.
  EXPECT_EQ(chunks("gpt2_wide32k", 16, "cuda"), 4);
  EXPECT_EQ(chunks("gpt2_wide32k", 125, "cuda"), 8);  // 32,000 rows: 4,000.
  EXPECT_EQ(chunks("tiny_char", 4, "cuda"), 1);
}

TEST(ChunkedLossTest, TrainsAsTheWrittenOutHead) {
  for (const char* tied : {"tied_head=true", "tied_head=false"}) {
    SCOPED_TRACE(tied);
    const std::vector<float> written = Losses(PlanWith("none", {tied, "dropout=0.1"}), 12);
    for (const char* passes : {"chunked_loss", "chunked_loss:chunks=3", "chunked_loss:chunks=32"}) {
      SCOPED_TRACE(passes);
      ExpectNear(Losses(PlanWith(passes, {tied, "dropout=0.1"}), 12), written, 1e-5);
    }
  }
}

// 16-bit operands: the written-out logits are rounded, those of the op are not.
TEST(ChunkedLossTest, TrainsIn16BitsAsTheWrittenOutHead) {
  for (const char* precision : {"bf16", "fp16"}) {
    for (const char* tied : {"tied_head=true", "tied_head=false"}) {
      SCOPED_TRACE(absl::StrCat(precision, " ", tied));
      const std::string passes = absl::StrCat(precision, ",chunked_loss:chunks=3,pad_vocab");
      ExpectNear(Losses(PlanWith(passes, {tied}), 8), Losses(PlanWith(precision, {tied}), 8), 5e-3);
    }
  }
}

TEST(ChunkedLossTest, FusingAndRecomputingChangeNoBit) {
  const std::string passes = "flash,chunked_loss:chunks=3,pad_vocab";
  const std::vector<float> plain = Losses(PlanWith(passes, {"dropout=0.1"}), 6);
  for (const char* more : {",fuse", ",remat", ",fuse,remat:free"}) {
    EXPECT_EQ(Losses(PlanWith(passes + more, {"dropout=0.1"}), 6), plain) << more;
  }
}

// The backward op computes the loss: no forward one is left beside it, and no tensor holds the logits.
TEST(ChunkedLossTest, OneOpAndNoLogits) {
  for (const char* tied : {"tied_head=true", "tied_head=false"}) {
    const proto::PlanProto written = PlanWith("none", {tied}), plan = PlanWith("chunked_loss:chunks=3", {tied});
    const proto::ProgramProto& train = TrainProgram(plan);
    EXPECT_EQ(Instructions(train, "chunked_loss"), 0);
    EXPECT_EQ(Instructions(train, "chunked_loss_grad"), 1);
    EXPECT_EQ(Instructions(train, "softmax_cross_entropy"), 0);
    const auto logits = [](const proto::TensorProto& tensor) {
      return tensor.type().dims_size() == 3 && tensor.type().dims(2) == kVocab;
    };
    for (const proto::TensorProto& tensor : train.tensors()) EXPECT_FALSE(logits(tensor)) << tensor.name();
    // Three head matmuls, as written out.
    const double flops = static_cast<double>(Summarize(plan, train).flops);
    const double expected = static_cast<double>(Summarize(written, TrainProgram(written)).flops);
    EXPECT_NEAR(flops, expected, 0.01 * expected);
    for (const proto::ProgramProto& program : plan.programs()) {
      if (program.name() != "eval") continue;
      EXPECT_EQ(Instructions(program, "chunked_loss"), 1);
      EXPECT_EQ(Instructions(program, "count_labels"), 1);
    }
  }
}

// Where the seed needs the loss itself, the forward op stays: nothing waits for itself.
TEST(ChunkedLossTest, ASeedThatDependsOnTheLoss) {
  const char* text = R"(
module @m {
  state "head": f32[11,4] parameter init=normal(0.3)
}
graph @train stage=forward {
  input %x: f32[6,4] data
  input %labels: i32[6] data
  input %head: f32[11,4] parameter
  %0: f32[6,11] = matmul(%x, %head) {transpose_b=true} "head"
  %1: f32[], %2: f32[], %3: f32[6] = softmax_cross_entropy(%0, %labels) "loss"
  %4: f32[] = mul(%1, %1) "square"
  output "loss" %4
}
)";
  const std::unique_ptr<Module> written = MustParse(text), chunked = MustParse(text);
  PassContext context;
  ASSERT_OK_AND_ASSIGN(const Pipeline none, ParsePipeline("none"));
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("chunked_loss:chunks=2"));
  ASSERT_OK(RunPipeline(*written, none, context));
  ASSERT_OK(RunPipeline(*chunked, pipeline, context));
  const Graph& before = *written->FindGraph("train");
  const auto inputs = MakeInputs<float>(before, 11, 3);
  ASSERT_OK_AND_ASSIGN(const auto expected, EvaluateGraph<float>(before, inputs));
  ASSERT_OK_AND_ASSIGN(const auto got, EvaluateGraph<float>(*chunked->FindGraph("train"), inputs));
  for (const char* name : {"loss", "grad_norm"}) {
    EXPECT_NEAR(got.at(name).values[0], expected.at(name).values[0], 1e-5 * std::abs(expected.at(name).values[0]));
  }
}

TEST(ChunkedLossTest, EvaluatesAsTheWrittenOutHead) {
  const auto written = MustLoad(PlanWith("none")), chunked = MustLoad(PlanWith("chunked_loss:chunks=5,pad_vocab"));
  const auto [sum, count] = Evaluate(*written);
  const auto [chunked_sum, chunked_count] = Evaluate(*chunked);
  EXPECT_NEAR(chunked_sum, sum, 1e-5 * sum);
  EXPECT_EQ(chunked_count, count);
  EXPECT_EQ(count, 29);  // Every 11th of 32 labels is ignored.
}

class LossPassesMeasured : public ::testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(LossPassesMeasured, PlannedIsMeasured) {
  const auto& [passes, set] = GetParam();
  const proto::PlanProto plan = PlanWith(passes, {set});
  ASSERT_OK(VerifyPlan(plan));
  ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(plan));
  ASSERT_OK_AND_ASSIGN(const Measurement m, loaded->Measure());
  EXPECT_THAT(m.differences, IsEmpty());
  EXPECT_TRUE(m.agrees());
  EXPECT_EQ(m.measured_arena_bytes, m.planned_arena_bytes);
  EXPECT_EQ(m.allocations.count, 0);
}

INSTANTIATE_TEST_SUITE_P(Passes, LossPassesMeasured,
                         ::testing::Values(std::pair("chunked_loss", "tied_head=true"),
                                           std::pair("chunked_loss:chunks=3,pad_vocab", "tied_head=true"),
                                           std::pair("chunked_loss:chunks=3,pad_vocab", "tied_head=false"),
                                           std::pair("pad_vocab", "tied_head=false")));

// Padding.

// Bytes of each state that are no logical element's.
std::map<std::string, std::string> Padding(const LoadedPlan& loaded) {
  std::map<std::string, std::string> padding;
  for (const proto::StatePlacement& placement : loaded.executor->plan().states()) {
    const proto::StateProto& state = placement.state();
    const BoundTensor* bound = loaded.executor->FindState(state.name());
    int64_t logical = ByteSize(bound->type.dtype);
    for (const int64_t d : state.logical_dims()) logical *= d;
    const int64_t bytes = bound->type.byte_size() - logical;
    if (bytes == 0) continue;
    padding[state.name()] =
        std::string(reinterpret_cast<const char*>(bound->data) + logical, static_cast<size_t>(bytes));
  }
  return padding;
}

// Every logical element of every state.
std::map<std::string, std::string> Logical(const LoadedPlan& loaded) {
  std::map<std::string, std::string> states;
  for (const proto::StatePlacement& placement : loaded.executor->plan().states()) {
    const proto::StateProto& state = placement.state();
    const BoundTensor* bound = loaded.executor->FindState(state.name());
    int64_t logical = ByteSize(bound->type.dtype);
    for (const int64_t d : state.logical_dims()) logical *= d;
    states[state.name()] = std::string(reinterpret_cast<const char*>(bound->data), static_cast<size_t>(logical));
  }
  return states;
}

TEST(PadVocabTest, PaddingStaysZeroUnderClippingAndDecay) {
  for (const char* passes : {"pad_vocab", "pad_vocab,chunked_loss:chunks=3", "pad_vocab,bf16,chunked_loss,fuse"}) {
    for (const char* tied : {"tied_head=true", "tied_head=false"}) {
      SCOPED_TRACE(absl::StrCat(passes, " ", tied));
      const auto loaded = MustLoad(PlanWith(passes, {tied, "dropout=0.1"}));
      Train(*loaded, 20);
      const std::map<std::string, std::string> padding = Padding(*loaded);
      // Weights and both moments.
      EXPECT_EQ(padding.size(), absl::EndsWith(tied, "true") ? 3u : 6u);
      for (const auto& [name, bytes] : padding) {
        EXPECT_EQ(bytes.size(), static_cast<size_t>((64 - kVocab) * 32 * 4)) << name;
        EXPECT_EQ(std::count(bytes.begin(), bytes.end(), '\0'), static_cast<int64_t>(bytes.size())) << name;
      }
    }
  }
}

// 4,096 elements and more: the moments are 8-bit codes; those of the padding stand for zero.
TEST(PadVocabTest, PaddingStaysZeroUnder8BitMoments) {
  for (const char* tied : {"tied_head=true", "tied_head=false"}) {
    SCOPED_TRACE(tied);
    const auto loaded = MustLoad(PlanWith("pad_vocab,chunked_loss,adamw8bit", {tied, "width=64"}));
    ExpectNear(Train(*loaded, 20), Losses(PlanWith("pad_vocab,chunked_loss", {tied, "width=64"}), 20), 0.05);
    const std::map<std::string, std::string> padding = Padding(*loaded);
    EXPECT_EQ(padding.size(), absl::EndsWith(tied, "true") ? 3u : 6u);
    for (const auto& [name, bytes] : padding) {
      const char zero = static_cast<char>(absl::StartsWith(name, "adamw.m.")   ? DynamicMap::Signed().zero()
                                          : absl::StartsWith(name, "adamw.v.") ? DynamicMap::Unsigned().zero()
                                                                               : 0);
      EXPECT_EQ(std::count(bytes.begin(), bytes.end(), zero), static_cast<int64_t>(bytes.size())) << name;
    }
  }
}

// The kernels of chunked_loss compute the classes alone: the same bits. The written-out head sums dx over more columns.
TEST(PadVocabTest, TrainsAsUnpadded) {
  for (const char* tied : {"tied_head=true", "tied_head=false"}) {
    SCOPED_TRACE(tied);
    const auto unpadded = MustLoad(PlanWith("chunked_loss:chunks=3", {tied}));
    const auto padded = MustLoad(PlanWith("chunked_loss:chunks=3,pad_vocab", {tied}));
    EXPECT_EQ(Logical(*padded), Logical(*unpadded)) << "initial states";
    EXPECT_EQ(Train(*padded, 10), Train(*unpadded, 10));
    EXPECT_EQ(Logical(*padded), Logical(*unpadded)) << "states after ten steps";
    EXPECT_EQ(Evaluate(*padded), Evaluate(*unpadded));
    ExpectNear(Losses(PlanWith("pad_vocab", {tied}), 10), Losses(PlanWith("none", {tied}), 10), 1e-6);
  }
}

TEST(PadVocabTest, WhatAUserSeesIsTheTrueVocabulary) {
  const proto::PlanProto unpadded = PlanWith("none"), padded = PlanWith("pad_vocab");
  EXPECT_EQ(padded.facts().at("vocab_size"), kVocab);
  EXPECT_EQ(padded.facts().at("parameters"), unpadded.facts().at("parameters"));
  const auto json = [](const proto::PlanProto& plan) { return nlohmann::json::parse(PlanJson(plan)); };
  EXPECT_EQ(json(padded)["model"]["parameters"], json(unpadded)["model"]["parameters"]);
  EXPECT_EQ(json(padded)["memory"]["padding_bytes"], 2 * 3 * (64 - kVocab) * 32 * 4);
  EXPECT_EQ(json(unpadded)["memory"]["padding_bytes"], 0);
  EXPECT_THAT(PlanTable(padded), HasSubstr("padding  17.2 KiB"));
  EXPECT_THAT(PlanTable(unpadded), ::testing::Not(HasSubstr("padding")));
}

TEST(PadVocabTest, WeightsGoFromPaddedToUnpaddedAndBack) {
  const std::string folder = absl::StrCat(::testing::TempDir(), "/loss_passes_test-", getpid());
  std::filesystem::create_directories(folder);
  const std::string from_padded = folder + "/padded.safetensors", from_unpadded = folder + "/unpadded.safetensors";
  const auto unpadded = MustLoad(PlanWith("chunked_loss")), padded = MustLoad(PlanWith("chunked_loss,pad_vocab"));
  Train(*unpadded, 3);
  Train(*padded, 3);
  ASSERT_OK(SaveWeights(*unpadded->executor, from_unpadded));
  ASSERT_OK(SaveWeights(*padded->executor, from_padded));
  EXPECT_EQ(std::filesystem::file_size(from_padded), std::filesystem::file_size(from_unpadded));
  for (const std::string& file : {from_padded, from_unpadded}) {
    SCOPED_TRACE(file);
    const auto fresh_unpadded = MustLoad(PlanWith("none")), fresh_padded = MustLoad(PlanWith("pad_vocab"));
    ASSERT_OK(LoadWeights(*fresh_unpadded->executor, file));
    ASSERT_OK(LoadWeights(*fresh_padded->executor, file));
    for (const auto& [name, bytes] : Logical(*fresh_padded)) {
      if (absl::StartsWith(name, "adamw.")) continue;
      EXPECT_EQ(bytes, Logical(*padded).at(name)) << name;
      EXPECT_EQ(Logical(*fresh_unpadded).at(name), bytes) << name;
    }
    for (const auto& [name, bytes] : Padding(*fresh_padded))
      EXPECT_EQ(std::count(bytes.begin(), bytes.end(), '\0'), static_cast<int64_t>(bytes.size())) << name;
  }
  std::filesystem::remove_all(folder);
}

TEST(PadVocabTest, SaysWhenThereIsNothingToPad) {
  CompileReport report;
  const proto::PlanProto plan = PlanWith("pad_vocab", {}, 64, &report);
  EXPECT_THAT(report.warnings, ElementsAre(HasSubstr("the vocabulary, 64 rows, is a multiple of 64 as it is")));
  EXPECT_EQ(plan.arena_bytes(), PlanWith("none", {}, 64).arena_bytes());
  ASSERT_OK_AND_ASSIGN(const auto even, LoadModel("tiny_char", {.vocab_size = 64}));
  ASSERT_OK_AND_ASSIGN(const auto odd, LoadModel("tiny_char", {.vocab_size = 65}));
  EXPECT_FALSE(kPadVocabPass.applies(*even));
  EXPECT_TRUE(kPadVocabPass.applies(*odd));
  EXPECT_TRUE(kChunkedLossPass.applies(*even));
  EXPECT_FALSE(
      kChunkedLossPass.applies(*MustParse("module @m {\n}\ngraph @train stage=forward {\n  input %x: f32[] data\n"
                                          "  output \"loss\" %x\n}\n")));
}

// All that padding could change, in exact arithmetic of the references: nothing.
TEST(PadVocabTest, ReferencesGiveTheSameBits) {
  for (const SmallModule& small : SmallModules()) {
    SCOPED_TRACE(small.name);
    const std::unique_ptr<Module> unpadded = small.module->Clone(), padded = small.module->Clone();
    PassContext context;
    ASSERT_OK_AND_ASSIGN(const Pipeline none, ParsePipeline("none"));
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("pad_vocab:multiple=16"));
    ASSERT_OK(RunPipeline(*unpadded, none, context));
    ASSERT_OK(RunPipeline(*padded, pipeline, context));
    EXPECT_EQ(padded->num_parameters(), unpadded->num_parameters());
    const Graph &before = *unpadded->FindGraph("train"), &after = *padded->FindGraph("train");
    std::map<std::string, HostTensor<float>> inputs = MakeInputs<float>(before, 5, 5);
    ASSERT_OK_AND_ASSIGN(const auto expected, EvaluateGraph<float>(before, inputs));
    bool padding = false;
    for (const Node* input : after.inputs()) {
      HostTensor<float>& tensor = inputs.at(input->name());
      padding = padding || tensor.type != input->result().type();
      tensor.type = input->result().type();
      if (IsFloat(tensor.type.dtype)) tensor.values.resize(static_cast<size_t>(tensor.type.num_elements()), 0.0f);
    }
    EXPECT_TRUE(padding);
    ASSERT_OK_AND_ASSIGN(const auto got, EvaluateGraph<float>(after, inputs));
    ASSERT_EQ(got.size(), expected.size());
    for (const auto& [name, value] : expected) {
      const std::vector<float>& padded_values = got.at(name).values;
      ASSERT_GE(padded_values.size(), value.values.size()) << name;
      EXPECT_EQ(std::memcmp(padded_values.data(), value.values.data(), value.values.size() * sizeof(float)), 0) << name;
      for (size_t i = value.values.size(); i < padded_values.size(); ++i) EXPECT_EQ(padded_values[i], 0) << name;
    }
  }
}

}  // namespace
}  // namespace mt
