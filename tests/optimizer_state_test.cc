// Microbatches, 8-bit moments and loss scaling: what they compute beside one large batch in f32, and what they leave
// alone.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/base/file.h"
#include "ir/builder.h"
#include "ir/dynamic_map.h"
#include "ir/loss_scale.h"
#include "runtime/data/prep.h"
#include "tests/process.h"
#include "tests/small_modules.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// --- The maps and the rule

TEST(DynamicMapTest, ValuesOfThePaper) {
  for (const DynamicMap* map : {&DynamicMap::Signed(), &DynamicMap::Unsigned()}) {
    const auto& values = map->values();
    EXPECT_TRUE(std::is_sorted(values.begin(), values.end()));
    EXPECT_EQ(std::adjacent_find(values.begin(), values.end()), values.end());
    EXPECT_EQ(values.back(), 1.0f);
    EXPECT_EQ(values[map->zero()], 0.0f);
  }
  EXPECT_EQ(DynamicMap::Unsigned().zero(), 0);
  EXPECT_EQ(DynamicMap::Signed().zero(), 127);
  // The first decade has one value of either sign, in the middle of [0.1, 1] e-6; two without a sign.
  EXPECT_FLOAT_EQ(DynamicMap::Signed().values()[128], 0.55e-6f);
  EXPECT_FLOAT_EQ(DynamicMap::Signed().values()[126], -0.55e-6f);
  EXPECT_FLOAT_EQ(DynamicMap::Unsigned().values()[1], 0.325e-6f);
  EXPECT_FLOAT_EQ(DynamicMap::Unsigned().values()[2], 0.775e-6f);
  // The last one has 64 (128) parts.
  EXPECT_FLOAT_EQ(DynamicMap::Signed().values()[254], 1.0f - 0.9f / 128);
  EXPECT_FLOAT_EQ(DynamicMap::Signed().values()[0], -(1.0f - 0.9f / 128));
  EXPECT_FLOAT_EQ(DynamicMap::Unsigned().values()[254], 1.0f - 0.9f / 256);
}

TEST(DynamicMapTest, EncodeFindsTheNearest) {
  for (const DynamicMap* map : {&DynamicMap::Signed(), &DynamicMap::Unsigned()}) {
    const bool is_signed = map == &DynamicMap::Signed();
    const auto& values = map->values();
    const auto check = [&](float x) {
      const uint8_t code = map->Encode(x);
      const double distance = std::abs(static_cast<double>(values[code]) - x);
      double least = std::numeric_limits<double>::infinity();
      for (const float value : values) least = std::min(least, std::abs(static_cast<double>(value) - x));
      ASSERT_LE(distance, least * (1 + 1e-4)) << x;  // Values and middles are rounded to f32.
    };
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(map->Encode(values[i]), i);
      if (i == 0) continue;
      const float middle = (values[i - 1] + values[i]) / 2;
      for (const float x : {middle, std::nextafter(middle, 2.0f), std::nextafter(middle, -2.0f)}) check(x);
    }
    for (int i = 0; i <= 20000; ++i) {
      const float x = static_cast<float>(i) / 20000.0f;
      check(x);
      check(x * x * x * 1e-3f);
      if (is_signed) check(-x);
      if (is_signed) check(-x * x * x * 1e-3f);
    }
    check(0.0f);
    check(std::numeric_limits<float>::denorm_min());
  }
}

TEST(LossScaleTest, DoublesAfterTheIntervalAndHalvesAtOnce) {
  LossScale scale = {65536.0f, 0};
  for (int i = 0; i < 1999; ++i) scale = NextLossScale(scale, true, 2000);
  EXPECT_EQ(scale.scale, 65536.0f);
  EXPECT_EQ(scale.good_steps, 1999);
  scale = NextLossScale(scale, true, 2000);
  EXPECT_EQ(scale.scale, 131072.0f);
  EXPECT_EQ(scale.good_steps, 0);
  scale = NextLossScale({scale.scale, 1500}, false, 2000);
  EXPECT_EQ(scale.scale, 65536.0f);
  EXPECT_EQ(scale.good_steps, 0);
  EXPECT_EQ(NextLossScale({kLargestLossScale, 0}, true, 1).scale, kLargestLossScale);
  EXPECT_EQ(NextLossScale({kSmallestLossScale, 0}, false, 1).scale, kSmallestLossScale);
}

// --- Plans

// A loss scale at which the gradients of the models below pass the range of f32.
constexpr float kHuge = std::numeric_limits<float>::max();

struct Model {
  std::string passes = "none";
  int64_t batch = 4, microbatches = 1, sequence = 16, vocab = 40;
  std::vector<std::string> sets = {"layers=1", "width=32", "heads=2", "dropout=0.1", "init_stddev=0.1"};
};

std::unique_ptr<Module> Load(const Model& model) {
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel("tiny_char", {.batch = model.batch,
                                                                           .sequence = model.sequence,
                                                                           .vocab_size = model.vocab,
                                                                           .sets = model.sets,
                                                                           .microbatches = model.microbatches});
  CHECK(module.ok()) << module.status();
  return *std::move(module);
}

proto::PlanProto PlanOf(const Model& model) {
  absl::StatusOr<proto::PlanProto> plan = Compile(Load(model), {.passes = model.passes});
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

// With loss scaling as fp16 asks for it, in f32. The scale starts at 1.
proto::PlanProto ScaledPlan(const Model& model, int64_t interval) {
  std::unique_ptr<Module> module = Load(model);
  Graph& train = *module->FindGraph("train");
  CHECK_OK(module->AddState({.name = "loss_scale",
                             .type = {DType::kF32, {}},
                             .logical_dims = {},
                             .role = Role::kOptimizerState,
                             .init = {.kind = Init::Kind::kOnes}}));
  CHECK_OK(module->AddState({.name = "loss_scale.good_steps",
                             .type = {DType::kI32, {}},
                             .logical_dims = {},
                             .role = Role::kOptimizerState,
                             .init = {}}));
  Builder builder(train);
  const Value scale = builder.Input("loss_scale", {DType::kF32, {}}, Role::kOptimizerState);
  train.AddOutput(builder.Mul(train.FindOutput("loss")->value, scale), "scaled_loss");
  CHECK_OK(builder.status());
  absl::StatusOr<Pipeline> pipeline = ParsePipeline(model.passes);
  CHECK(pipeline.ok()) << pipeline.status();
  CHECK_OK(pipeline->SetOption("optimizer", "loss_scale_interval", absl::StrCat(interval)));
  PassContext context;
  CHECK_OK(RunPipeline(*module, *pipeline, context));
  absl::StatusOr<proto::PlanProto> plan = PlanModule(*module, {});
  CHECK(plan.ok()) << plan.status();
  CHECK_OK(VerifyPlan(*plan));
  return *std::move(plan);
}

// A plan on the CPU, fed without a corpus: tokens and labels depend on (step, sample, position) alone, and how many
// labels of a sample are ignored differs from sample to sample.
class PlanRun {
 public:
  explicit PlanRun(proto::PlanProto plan, int threads = 2) {
    vocab_ = plan.facts().at("vocab_size");
    sequence_ = plan.facts().at("sequence");
    const auto fact = plan.facts().find("microbatches");
    microbatches_ = fact == plan.facts().end() ? 1 : fact->second;
    batch_ = plan.facts().at("batch");
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend(threads);
    CHECK(backend.ok());
    absl::StatusOr<std::unique_ptr<Executor>> loaded = Executor::Load(std::move(plan), *std::move(backend));
    CHECK(loaded.ok()) << loaded.status();
    executor_ = *std::move(loaded);
    train_ = executor_->FindProgram("train");
    apply_ = executor_->FindProgram("apply");
    inputs_ = *StepInputs::Bind(*executor_, *train_, vocab_);
    if (apply_ != nullptr) apply_inputs_ = *StepInputs::Bind(*executor_, *apply_, vocab_);
    executor_->InitializeStates(scalars.seed);
  }

  StepScalars scalars = {.seed = 7, .lr = 1e-2};

  void Prepare(int64_t step, int64_t microbatch) {
    const int64_t samples = batch_ / microbatches_;
    std::vector<int32_t> ids, labels;
    for (int64_t s = 0; s < samples; ++s) {
      const int64_t sample = step * batch_ + microbatch * samples + s;
      for (int64_t t = 0; t < sequence_; ++t) {
        const uint64_t bits = Fnv1a("token", static_cast<uint64_t>(sample * 1000 + t));
        ids.push_back(static_cast<int32_t>(bits % static_cast<uint64_t>(vocab_)));
        const bool ignored = t < sample % 5 * 3;
        labels.push_back(ignored ? -1 : static_cast<int32_t>((bits >> 20) % static_cast<uint64_t>(vocab_)));
      }
    }
    inputs_->SetBatch(ids, labels);
    scalars.step = step;
    scalars.first_sample = step * batch_ + microbatch * samples;
    inputs_->SetScalars(scalars);
  }
  void Apply() {
    apply_inputs_->SetScalars(scalars);
    apply_->Run();
  }
  // The first `microbatches` of the step's, all where negative.
  void Step(int64_t step, int64_t microbatches = -1) {
    for (int64_t i = 0; i < (microbatches < 0 ? microbatches_ : microbatches); ++i) {
      Prepare(step, i);
      train_->Run();
    }
    if (apply_ != nullptr) Apply();
  }

  float Output(absl::string_view name) const {
    return *(apply_ != nullptr ? apply_ : train_)->FindOutput(name)->data_as<float>();
  }
  absl::Span<const float> Floats(absl::string_view state) const {
    const BoundTensor* tensor = executor_->FindState(state);
    CHECK(tensor != nullptr) << std::string(state);
    return {tensor->data_as<float>(), static_cast<size_t>(tensor->type.num_elements())};
  }
  float* Scalar(absl::string_view state) { return executor_->FindState(state)->data_as<float>(); }
  // The bytes of every state by name.
  std::map<std::string, std::string> States() const {
    std::map<std::string, std::string> states;
    for (const BoundTensor& state : executor_->states()) {
      states[state.name] =
          std::string(reinterpret_cast<const char*>(state.data), static_cast<size_t>(state.type.byte_size()));
    }
    return states;
  }
  absl::StatusOr<Measurement> Measure() {
    const auto restore = [this] {
      executor_->InitializeStates(scalars.seed);
      return absl::OkStatus();
    };
    const auto prepare = [this] {
      Prepare(0, 0);
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(Measurement measured, MeasureProgram(*executor_, *train_, prepare, restore));
    if (apply_ == nullptr) return measured;
    const auto prepare_apply = [this] {
      apply_inputs_->SetScalars(scalars);
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(const Measurement applied, MeasureProgram(*executor_, *apply_, prepare_apply, restore));
    return Together(measured, applied);
  }
  Executor& executor() { return *executor_; }

 private:
  std::unique_ptr<Executor> executor_;
  const Program *train_ = nullptr, *apply_ = nullptr;
  std::optional<StepInputs> inputs_, apply_inputs_;
  int64_t vocab_ = 0, sequence_ = 0, batch_ = 0, microbatches_ = 1;
};

double LargestDifference(absl::Span<const float> a, absl::Span<const float> b, double& largest) {
  CHECK_EQ(a.size(), b.size());
  double difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i])));
    difference = std::max(difference, std::abs(static_cast<double>(a[i]) - b[i]));
  }
  return difference;
}

// After one step from the same weights, first moments are the clipped gradients times 1 - beta1.
void ExpectSameGradients(const PlanRun& a, const PlanRun& b, double tolerance) {
  int64_t compared = 0;
  for (const auto& [name, bytes] : a.States()) {
    if (!absl::StartsWith(name, "adamw.m.")) continue;
    double largest = 0;
    const double difference = LargestDifference(a.Floats(name), b.Floats(name), largest);
    EXPECT_GT(largest, 0) << name;
    EXPECT_LE(difference, tolerance * largest) << name;
    ++compared;
  }
  EXPECT_GE(compared, 10);
}

// Sums over tokens in another order: a few units in the last place of f32.
constexpr double kSummation = 2e-5;

TEST(AccumulateTest, MicrobatchesAreOneLargeBatch) {
  PlanRun whole(PlanOf({.batch = 8}));
  whole.Step(0);
  const float loss = whole.Output("loss"), norm = whole.Output("grad_norm");
  for (const int64_t microbatches : {1, 2, 4, 8}) {
    SCOPED_TRACE(microbatches);
    const std::string passes = absl::StrCat("accumulate:", microbatches);
    PlanRun run(PlanOf({.passes = passes, .batch = 8, .microbatches = microbatches}));
    EXPECT_EQ(run.executor().plan().facts().at("batch"), 8);
    run.Step(0);
    EXPECT_NEAR(run.Output("loss"), loss, kSummation * loss);
    EXPECT_NEAR(run.Output("grad_norm"), norm, kSummation * norm);
    ExpectSameGradients(whole, run, kSummation);
    for (const auto& [name, bytes] : run.States()) {
      if (!absl::StartsWith(name, "grad.") && !absl::StartsWith(name, "accumulated.")) continue;
      EXPECT_EQ(bytes, std::string(bytes.size(), '\0')) << name << " is not zeroed";
    }
  }
}

// Every kind of model and pass: tied heads add twice to one sum.
TEST(AccumulateTest, WithTiedHeadsAndFlash) {
  const std::vector<std::string> tied = {"layers=2", "width=32", "heads=2", "dropout=0.2", "tied_head=true"};
  for (const char* passes : {"none", "flash"}) {
    SCOPED_TRACE(passes);
    PlanRun whole(PlanOf({.passes = passes, .batch = 6, .sets = tied}));
    const std::string more =
        absl::StrCat(absl::string_view(passes) == "none" ? "" : absl::StrCat(passes, ","), "accumulate:3");
    PlanRun run(PlanOf({.passes = more, .batch = 6, .microbatches = 3, .sets = tied}));
    for (int64_t step = 0; step < 3; ++step) {
      whole.Step(step);
      run.Step(step);
      if (step == 0) ExpectSameGradients(whole, run, kSummation);
      EXPECT_NEAR(run.Output("loss"), whole.Output("loss"), 1e-4 * whole.Output("loss"));
    }
  }
}

TEST(AccumulateTest, AShortLastGroupUsesItsOwnTokenCount) {
  // 2 of 4 microbatches of 2 sequences, and all of 2: the same samples.
  PlanRun group(PlanOf({.passes = "accumulate:4", .batch = 8, .microbatches = 4}));
  group.Step(0, 2);
  PlanRun whole(PlanOf({.batch = 4}));
  whole.Step(0);
  EXPECT_NEAR(group.Output("loss"), whole.Output("loss"), kSummation * whole.Output("loss"));
  EXPECT_NEAR(group.Output("grad_norm"), whole.Output("grad_norm"), kSummation * whole.Output("grad_norm"));
  ExpectSameGradients(whole, group, kSummation);
}

TEST(AccumulateTest, TheSameBitsAlways) {
  const Model model = {.passes = "accumulate:2", .batch = 4, .microbatches = 2};
  const proto::PlanProto plan = PlanOf(model);
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto read, ParsePlan(SerializePlan(plan), "p"));
  PlanRun one(plan, 1), three(read, 3);
  for (int64_t step = 0; step < 3; ++step) {
    one.Step(step);
    three.Step(step);
  }
  EXPECT_EQ(one.States(), three.States());
}

TEST(AccumulateTest, SumsLieInTheirStatesAlone) {
  const Model tied = {.passes = "accumulate:2",
                      .batch = 4,
                      .microbatches = 2,
                      .vocab = 500,
                      .sets = {"layers=1", "width=32", "heads=2", "tied_head=true"}};
  const proto::PlanProto plan = PlanOf(tied);
  int64_t sums = 0;
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (buffer.memory_class() != proto::GRADIENTS) continue;
    EXPECT_EQ(buffer.program(), -1) << buffer.name();
    sums += buffer.size_bytes();
  }
  int64_t parameters = 0;
  for (const proto::StatePlacement& placement : plan.states()) {
    if (placement.state().role() == "parameter") parameters += plan.buffers(placement.buffer()).size_bytes();
  }
  EXPECT_EQ(sums, parameters + 8);  // And the sums of loss and tokens.
  // The head's and the embedding's gradient of the one table, in turn in its sum's buffer.
  int64_t found = 0;
  const proto::ProgramProto& train = *FindProgram(plan, "train");
  for (const proto::InstructionProto& instruction : train.instructions()) {
    if (instruction.phase() != "backward") continue;
    for (const int result : instruction.results()) {
      const proto::TensorProto& tensor = train.tensors(result);
      if (tensor.type().dims_size() != 2 || tensor.type().dims(0) != 500 || tensor.type().dims(1) != 32) continue;
      EXPECT_EQ(plan.buffers(tensor.buffer()).name(), "grad.embed.tokens.weight");
      ++found;
    }
  }
  EXPECT_EQ(found, 2);
}

TEST(AccumulateTest, RefusesWhatItCannotSum) {
  const absl::StatusOr<std::unique_ptr<Module>> module = LoadModel("tiny_char", {.batch = 8, .microbatches = 3});
  EXPECT_THAT(module, StatusIs(absl::StatusCode::kInvalidArgument,
                               AllOf(HasSubstr("accumulate:3 does not divide the batch of 8"), HasSubstr(":2 or :4"))));
  EXPECT_THAT(LoadModel("parallel_block", {.batch = 9, .microbatches = 2}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("written for batch 8"), HasSubstr("2 of them are 16, not 9"))));
  EXPECT_OK(LoadModel("parallel_block", {.batch = 16, .microbatches = 2}));
  for (const char* text : {"accumulate:0", "accumulate:microbatches=0"}) {
    EXPECT_THAT(ParsePipeline(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected at least 1")));
  }
  EXPECT_THAT(ParsePipeline("accumulate"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("accumulate:microbatches=VALUE")));
  EXPECT_THAT(ParsePipeline("accumulate:2.5"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("kind int")));
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("accumulate:8"));
  EXPECT_EQ(pipeline.ToString(), "accumulate:microbatches=8");
  EXPECT_EQ(MicrobatchesOf(pipeline), 8);
  ASSERT_OK_AND_ASSIGN(const Pipeline none, ParsePipeline("none"));
  EXPECT_EQ(MicrobatchesOf(none), 1);

  const std::unique_ptr<Module> sum = MustParse(R"(
module @m {
  state "w": f32[4] parameter init=ones
}
graph @train stage=forward {
  input %w: f32[4] parameter
  %0: f32[] = reduce_sum(%w) {dims=[0]} "total"
  output "loss" %0
}
)");
  EXPECT_THAT(Compile(sum->Clone(), {.passes = "accumulate:2"}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"loss\" is reduce_sum \"total\""), HasSubstr("div(loss_sum, count)"))));
}

// --- 8-bit moments

int64_t StateBytes(const proto::PlanProto& plan) {
  int64_t bytes = 0;
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (buffer.memory_class() == proto::OPTIMIZER_STATE) bytes += buffer.size_bytes();
  }
  return bytes;
}

TEST(Adamw8bitTest, StateBytes) {
  for (const char* name : {"tiny_char", "lab4", "gpt2_124m"}) {
    absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(name, {.batch = 2, .sequence = 32});
    ASSERT_OK(module);
    PassContext context;
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("adamw8bit"));
    ASSERT_OK(RunPipeline(**module, pipeline, context));
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanModule(**module, {}));
    const double per_parameter =
        static_cast<double>(StateBytes(plan)) / static_cast<double>((*module)->num_parameters());
    EXPECT_LE(per_parameter, 2.1) << name;
    EXPECT_GE(per_parameter, 2.03) << name;
  }
}

TEST(Adamw8bitTest, SmallParametersKeepF32) {
  const proto::PlanProto plan = PlanOf({.passes = "adamw8bit"});
  std::map<std::string, std::string> types;
  for (const proto::StatePlacement& placement : plan.states()) {
    types[placement.state().name()] = placement.state().type().dtype();
  }
  EXPECT_EQ(types.at("adamw.m.h0.mlp.up.weight"), "u8");  // 32 x 128
  EXPECT_EQ(types.at("adamw.v.h0.mlp.up.weight"), "u8");
  EXPECT_EQ(types.at("adamw.m_scale.h0.mlp.up.weight"), "f32");
  EXPECT_EQ(types.at("adamw.v_scale.h0.mlp.up.weight"), "f32");
  EXPECT_EQ(types.at("adamw.m.h0.attn.out.weight"), "f32");  // 32 x 32
  EXPECT_EQ(types.count("adamw.m_scale.h0.attn.out.weight"), 0u);
}

TEST(Adamw8bitTest, RefusesAnotherOptimizer) {
  EXPECT_THAT(Compile(Load({}), {.passes = "adamw8bit", .optimizer = "adam"}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("no parameter is updated by adamw"), HasSubstr("--optimizer adamw"))));
}

// What padding adds at the end of a table, zero with zero gradients, stays zero and changes nothing else.
TEST(Adamw8bitTest, ZerosStayZero) {
  const OpDef& op = *FindOp("adamw8bit");
  const TensorType p = {DType::kF32, {300}}, codes = {DType::kU8, {300}}, scales = {DType::kF32, {2}},
                   one = {DType::kF32, {}};
  std::vector<HostTensor<float>> operands;
  for (const TensorType& type : {p, codes, codes, scales, scales, p}) operands.push_back(MakeHostTensor<float>(type));
  for (const float value : {0.1f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.1f, 0.05f, 1.0f}) {
    operands.push_back(MakeHostTensor<float>(one));
    operands.back().values[0] = value;
  }
  for (size_t i = 0; i < 270; ++i) {
    operands[0].values[i] = 1.0f;
    operands[5].values[i] = 0.01f * static_cast<float>(i + 1);
  }
  Attrs attrs = {{"decay", true}};
  std::vector<TensorType> types;
  std::vector<const HostTensor<float>*> pointers;
  for (const HostTensor<float>& operand : operands) {
    types.push_back(operand.type);
    pointers.push_back(&operand);
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<TensorType> results, InferTypes(op, types, attrs));
  ASSERT_OK_AND_ASSIGN(const auto updated, EvaluateOp<float>(op, attrs, pointers, results));
  for (size_t i = 0; i < 300; ++i) {
    if (i < 270) {
      EXPECT_LT(updated[0].values[i], 1.0f) << i;
      EXPECT_GT(updated[1].ints[i], DynamicMap::Signed().zero()) << i;
    } else {
      EXPECT_EQ(updated[0].values[i], 0.0f) << i;
      EXPECT_EQ(updated[1].ints[i], DynamicMap::Signed().zero()) << i;
      EXPECT_EQ(updated[2].ints[i], 0) << i;
    }
  }
  EXPECT_FLOAT_EQ(updated[3].values[1], 0.1f * 2.70f);
}

// --- Loss scaling

TEST(LossScalingTest, ASkippedStepChangesNothingButTheScale) {
  for (const char* passes : {"none", "adamw8bit", "accumulate:2", "accumulate:2,adamw8bit"}) {
    SCOPED_TRACE(passes);
    const int64_t microbatches = absl::StrContains(passes, "accumulate") ? 2 : 1;
    PlanRun run(ScaledPlan({.passes = passes, .batch = 4, .microbatches = microbatches}, 2000));
    run.Step(0);
    run.Step(1);
    EXPECT_EQ(run.Output("applied"), 1.0f);
    const float scale = kHuge;
    *run.Scalar("loss_scale") = scale;
    const std::map<std::string, std::string> before = run.States();
    run.Step(2);
    EXPECT_EQ(run.Output("applied"), 0.0f);
    EXPECT_FALSE(std::isfinite(run.Output("grad_norm")));
    EXPECT_TRUE(std::isfinite(run.Output("loss")));
    std::map<std::string, std::string> after = run.States();
    EXPECT_EQ(*run.Scalar("loss_scale"), scale / 2);
    EXPECT_EQ(after["loss_scale.good_steps"], std::string(4, '\0'));
    EXPECT_NE(before.at("loss_scale.good_steps"), after["loss_scale.good_steps"]);
    after["loss_scale"] = before.at("loss_scale");
    after["loss_scale.good_steps"] = before.at("loss_scale.good_steps");
    for (const auto& [name, bytes] : before) EXPECT_EQ(after[name] == bytes, true) << name << " changed";
  }
}

TEST(LossScalingTest, TheScaleIsTakenOutAgain) {
  for (const char* passes : {"none", "accumulate:2"}) {
    SCOPED_TRACE(passes);
    const int64_t microbatches = absl::StrContains(passes, "accumulate") ? 2 : 1;
    const Model model = {.passes = passes, .batch = 4, .microbatches = microbatches};
    PlanRun plain(PlanOf(model)), scaled(ScaledPlan(model, 2000));
    *scaled.Scalar("loss_scale") = 65536.0f;
    plain.Step(0);
    scaled.Step(0);
    EXPECT_FLOAT_EQ(scaled.Output("loss"), plain.Output("loss"));
    EXPECT_FLOAT_EQ(scaled.Output("grad_norm"), plain.Output("grad_norm"));
    ExpectSameGradients(plain, scaled, 1e-6);
    EXPECT_EQ(*scaled.Scalar("loss_scale"), 65536.0f);
  }
}

TEST(LossScalingTest, GrowsAfterGoodStepsInARow) {
  PlanRun run(ScaledPlan({}, 3));
  *run.Scalar("loss_scale") = 4.0f;
  std::vector<float> scales;
  for (int64_t step = 0; step < 8; ++step) {
    if (step == 4) *run.Scalar("loss_scale") = kHuge;
    run.Step(step);
    if (step == 4) *run.Scalar("loss_scale") = 4.0f;
    scales.push_back(*run.Scalar("loss_scale"));
  }
  EXPECT_THAT(scales, ::testing::ElementsAre(4, 4, 8, 8, 4, 4, 4, 8));
}

// --- Planned = measured

TEST(OptimizerStateMeasureTest, PlannedIsMeasured) {
  const std::vector<std::string> sets = {"layers=1", "width=64", "heads=2", "dropout=0.1"};
  for (const char* passes : {"accumulate:2", "adamw8bit", "accumulate:2,adamw8bit,flash"}) {
    SCOPED_TRACE(passes);
    const int64_t microbatches = absl::StrContains(passes, "accumulate") ? 2 : 1;
    const Model model = {.passes = passes, .batch = 4, .microbatches = microbatches, .sets = sets};
    for (const bool scaled : {false, true}) {
      PlanRun run(scaled ? ScaledPlan(model, 2000) : PlanOf(model));
      ASSERT_OK_AND_ASSIGN(const Measurement m, run.Measure());
      EXPECT_THAT(m.differences, ::testing::IsEmpty());
      EXPECT_TRUE(m.agrees());
      EXPECT_EQ(m.measured_arena_bytes, run.executor().plan().arena_bytes());
    }
  }
}

// --- Over a corpus

class CorpusTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("optimizer_state_test");
    ASSERT_OK_AND_ASSIGN(vocab_, PrepareCharacters(folder_->path(), GeneratedText(60)));
  }
  static void TearDownTestSuite() { delete folder_; }

  // What each step said.
  static std::vector<StepMetrics> Train(proto::PlanProto plan, int64_t steps, float loss_scale = 0) {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend(2);
    CHECK(backend.ok());
    absl::StatusOr<std::unique_ptr<Executor>> executor = Executor::Load(std::move(plan), *std::move(backend));
    CHECK(executor.ok()) << executor.status();
    (*executor)->InitializeStates(0);
    if (loss_scale != 0) *(*executor)->FindState("loss_scale")->data_as<float>() = loss_scale;
    absl::StatusOr<std::unique_ptr<Trainer>> trainer = Trainer::Create(**executor, folder_->Path("corpus"));
    CHECK(trainer.ok()) << trainer.status();
    TrainOptions options;
    options.steps = steps;
    options.scalars.lr = 3e-3;
    options.warmup_steps = std::min<int64_t>(steps / 10, 10);
    std::vector<StepMetrics> metrics;
    TrainHooks hooks;
    hooks.on_step = [&](const StepMetrics& step) {
      metrics.push_back(step);
      return absl::OkStatus();
    };
    const absl::StatusOr<TrainResult> result = (*trainer)->Train(options, hooks);
    status_ = result.status();
    if (result.ok()) result_ = *result;
    return metrics;
  }

  static ProcessFolder* folder_;
  static int64_t vocab_;
  static absl::Status status_;
  static TrainResult result_;
};

ProcessFolder* CorpusTest::folder_ = nullptr;
int64_t CorpusTest::vocab_ = 0;
absl::Status CorpusTest::status_;
TrainResult CorpusTest::result_;

TEST_F(CorpusTest, AccumulatedStepsFollowThoseOfOneBatch) {
  const Model model = {.batch = 8, .vocab = vocab_};
  Model split = model;
  split.passes = "accumulate:4";
  split.microbatches = 4;
  const std::vector<StepMetrics> whole = Train(PlanOf(model), 20), steps = Train(PlanOf(split), 20);
  ASSERT_EQ(steps.size(), 20u);
  for (size_t i = 0; i < steps.size(); ++i) {
    // Rounding is amplified from step to step.
    const double allowed = i == 0 ? kSummation : 2e-3;
    EXPECT_NEAR(steps[i].loss, whole[i].loss, allowed * whole[i].loss) << i;
    EXPECT_NEAR(steps[i].grad_norm, whole[i].grad_norm, (i == 0 ? kSummation : 2e-2) * whole[i].grad_norm) << i;
    EXPECT_NEAR(steps[i].tokens_per_second * steps[i].step_seconds, 8 * 16, 1e-6);
    EXPECT_FALSE(steps[i].loss_scale.has_value());
  }
  EXPECT_EQ(result_.tokens, 20 * 8 * 16);
}

TEST_F(CorpusTest, EightBitsLearnAsWellAsThirtyTwo) {
  Model model = {.batch = 8, .sequence = 32, .vocab = vocab_, .sets = {"layers=2", "width=64", "heads=2"}};
  const std::vector<StepMetrics> f32 = Train(PlanOf(model), 200);
  model.passes = "adamw8bit";
  const std::vector<StepMetrics> u8 = Train(PlanOf(model), 200);
  ASSERT_EQ(u8.size(), 200u);
  double f32_loss = 0, u8_loss = 0;
  for (size_t i = 180; i < 200; ++i) {
    f32_loss += f32[i].loss / 20;
    u8_loss += u8[i].loss / 20;
  }
  EXPECT_LT(f32_loss, f32[0].loss / 2);
  EXPECT_NEAR(u8_loss, f32_loss, 0.01 * f32_loss);
  EXPECT_NE(u8_loss, f32_loss);
}

// The sum over the tokens of a microbatch would pass the range of f16 at the scale that suits a mean.
TEST_F(CorpusTest, HalfPrecisionAccumulates) {
  Model model = {.passes = "accumulate:4", .batch = 8, .microbatches = 4, .vocab = vocab_};
  const std::vector<StepMetrics> f32 = Train(PlanOf(model), 20);
  model.passes = "fp16,accumulate:4";
  const std::vector<StepMetrics> f16 = Train(PlanOf(model), 20);
  ASSERT_EQ(f16.size(), 20u);
  for (size_t i = 0; i < f16.size(); ++i) {
    EXPECT_FALSE(f16[i].skipped) << i;
    EXPECT_EQ(f16[i].loss_scale, 65536.0) << i;
    EXPECT_NEAR(f16[i].loss, f32[i].loss, 0.01 * f32[i].loss) << i;
    EXPECT_NEAR(f16[i].grad_norm, f32[i].grad_norm, 0.05 * f32[i].grad_norm) << i;
  }
}

TEST_F(CorpusTest, SkippedStepsAreTold) {
  const Model model = {.vocab = vocab_};
  const std::vector<StepMetrics> steps = Train(ScaledPlan(model, 4), 12, kHuge);
  ASSERT_OK(status_);
  ASSERT_EQ(steps.size(), 12u);
  EXPECT_TRUE(steps[0].skipped);
  EXPECT_EQ(steps[0].loss_scale, static_cast<double>(kHuge / 2));
  EXPECT_FALSE(steps[11].skipped);
  int64_t skipped = 0;
  for (const StepMetrics& step : steps) {
    skipped += step.skipped ? 1 : 0;
    EXPECT_TRUE(step.skipped || std::isfinite(step.grad_norm));
    EXPECT_TRUE(std::isfinite(step.loss));
  }
  EXPECT_EQ(result_.skipped_steps, skipped);
  EXPECT_GE(skipped, 1);
}

// As a user does it.
TEST_F(CorpusTest, FromTheCommandLine) {
  const std::string common =
      "mtc compile tiny_char --data corpus --set layers=1,width=64,heads=2,dropout=0.1 --seq 32 ";
  folder_->ExpectError(absl::StrCat(common, "--batch 8 --passes accumulate:3 -o p.plan"), 2,
                       HasSubstr("accumulate:3 does not divide the batch of 8"));
  folder_->ExpectError(absl::StrCat(common, "--batch 8 --passes accumulate:0 -o p.plan"), 2,
                       HasSubstr("expected at least 1"));
  folder_->ExpectError(absl::StrCat(common, "--batch 8 --passes adamw8bit --optimizer adam -o p.plan"), 2,
                       HasSubstr("--optimizer adamw"));
  const Outcome compiled =
      folder_->Run(absl::StrCat(common, "--batch 8 --passes flash,adamw8bit,accumulate:4 -o p.plan"));
  ASSERT_EQ(compiled.code, 0) << compiled.err;
  EXPECT_THAT(compiled.out, AllOf(HasSubstr("accumulate:microbatches=4"), HasSubstr("adamw8bit"), HasSubstr("apply: "),
                                  HasSubstr("batch 8")));
  const Outcome dry = folder_->Run("mtrun p.plan --dry-run");
  EXPECT_EQ(dry.code, 0) << dry.err;
  EXPECT_THAT(dry.out, AllOf(HasSubstr("program train"), HasSubstr("program apply")));
  const Outcome run = folder_->Run("mtrun p.plan --data corpus --steps 4 --measure --trace t.json --out run");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("planned = measured"), HasSubstr("step 4/4")));
  const nlohmann::json trace = folder_->ReadJson("t.json");
  ASSERT_TRUE(trace.is_object());
  int64_t updates = 0, losses = 0;
  for (const nlohmann::json& event : trace["traceEvents"]) {
    updates += event["name"] == "adam_step" ? 1 : 0;
    losses += event["name"] == "softmax_cross_entropy" ? 1 : 0;
  }
  EXPECT_EQ(updates, 1);
  EXPECT_EQ(losses, 4);
  const nlohmann::json memory = folder_->ReadJson("run/memory.json");
  EXPECT_TRUE(memory["agree"].get<bool>());
  EXPECT_GT(memory["measured"]["by_phase"]["optimizer"]["written_bytes"].get<int64_t>(), 0);
  const Outcome eval = folder_->Run("mtrun p.plan --data corpus --eval val --init run");
  EXPECT_EQ(eval.code, 0) << eval.err;
  EXPECT_THAT(eval.out, HasSubstr("val: loss"));
}

}  // namespace
}  // namespace mt
