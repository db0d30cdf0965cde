// The training loop over a real corpus: schedules, warnings, determinism, weights, and what it refuses.
#include "runtime/train/trainer.h"

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/file.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/data/prep.h"
#include "runtime/train/report.h"
#include "runtime/train/run_log.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(LrScheduleTest, HandValues) {
  const LrSchedule cosine(LrShape::kCosine, 1.0, 0.1, 4, 3);
  EXPECT_DOUBLE_EQ(cosine.At(0, 0), 0.25);
  EXPECT_DOUBLE_EQ(cosine.At(1, 0), 0.5);
  EXPECT_DOUBLE_EQ(cosine.At(3, 0), 1.0);
  EXPECT_DOUBLE_EQ(cosine.At(4, 0), 1.0);
  EXPECT_NEAR(cosine.At(9, 0.5), 0.55, 1e-12);       // 0.1 + 0.9 / 2
  EXPECT_NEAR(cosine.At(9, 1.0 / 3), 0.775, 1e-12);  // 0.1 + 0.9 * (1 + 1/2) / 2
  EXPECT_NEAR(cosine.At(9, 1), 0.1, 1e-12);
  EXPECT_NEAR(cosine.At(9, 7), 0.1, 1e-12);

  const LrSchedule linear(LrShape::kLinear, 2.0, 0.5, 0, 3);
  EXPECT_DOUBLE_EQ(linear.At(0, 0), 2.0);
  EXPECT_DOUBLE_EQ(linear.At(5, 0.25), 1.75);
  EXPECT_DOUBLE_EQ(linear.At(5, 1), 1.0);

  const LrSchedule constant(LrShape::kConstant, 3e-4, 0.1, 10, 3);
  EXPECT_DOUBLE_EQ(constant.At(4, 0), 1.5e-4);
  EXPECT_DOUBLE_EQ(constant.At(10, 0.9), 3e-4);
  EXPECT_DOUBLE_EQ(constant.At(100, 1), 3e-4);
}

TEST(LrScheduleTest, PlateauHalvesAfterPatienceAndStopsAtTheMinimum) {
  LrSchedule plateau(LrShape::kPlateau, 1.0, 0.2, 2, 2);
  EXPECT_DOUBLE_EQ(plateau.At(0, 0), 0.5);
  EXPECT_DOUBLE_EQ(plateau.At(2, 0.5), 1.0);
  plateau.Observe(4.0);
  plateau.Observe(4.5);
  EXPECT_DOUBLE_EQ(plateau.At(5, 0.5), 1.0);
  plateau.Observe(3.5);  // Better: the count begins again.
  plateau.Observe(3.6);
  EXPECT_DOUBLE_EQ(plateau.At(5, 0.5), 1.0);
  plateau.Observe(3.5);  // As good as the best is no better.
  EXPECT_DOUBLE_EQ(plateau.At(5, 0.5), 0.5);
  for (int i = 0; i < 4; ++i) plateau.Observe(9);
  EXPECT_DOUBLE_EQ(plateau.At(5, 0.5), 0.2);
}

TEST(LrScheduleTest, NamesRoundTrip) {
  for (const LrShape shape : {LrShape::kCosine, LrShape::kLinear, LrShape::kConstant, LrShape::kPlateau}) {
    ASSERT_OK_AND_ASSIGN(const LrShape parsed, ParseLrShape(LrShapeName(shape)));
    EXPECT_EQ(parsed, shape);
  }
  EXPECT_THAT(ParseLrShape("zigzag"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("zigzag"), HasSubstr("plateau"))));
}

TEST(TrainWarningsTest, SayWhatARunCannotMean) {
  const TrainOptions plain = {.eval_every = 0};
  EXPECT_THAT(TrainWarnings(plain, 100, 4, 50), IsEmpty());
  TrainOptions warmup = plain;
  warmup.warmup_steps = 100;
  EXPECT_THAT(TrainWarnings(warmup, 100, 4, 50),
              ElementsAre(AllOf(HasSubstr("warmup (100) >= steps (100)"), HasSubstr("only at the last step"))));
  warmup.warmup_steps = 101;
  EXPECT_THAT(TrainWarnings(warmup, 100, 4, 50), ElementsAre(HasSubstr("never reaches")));
  warmup.warmup_steps = 99;
  EXPECT_THAT(TrainWarnings(warmup, 100, 4, 50), IsEmpty());
  EXPECT_THAT(TrainWarnings(plain, 100, 51, 50), ElementsAre(HasSubstr("batch (51) > the corpus's 50 sequences")));
  TrainOptions plateau = plain;
  plateau.schedule = LrShape::kPlateau;
  EXPECT_THAT(TrainWarnings(plateau, 100, 4, 50), ElementsAre(HasSubstr("--eval-every")));
  TrainOptions late = plain;
  late.eval_every = 100;
  EXPECT_THAT(TrainWarnings(late, 100, 4, 50), ElementsAre(HasSubstr("eval-every (100) >= steps (100)")));
}

// One corpus of characters for all tests.
class TrainerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("trainer_test");
    ASSERT_OK_AND_ASSIGN(vocab_, PrepareCharacters(folder_->path(), GeneratedText(60)));
  }
  static void TearDownTestSuite() { delete folder_; }
  static std::string Data() { return folder_->Path("corpus"); }
  static std::string Path(const std::string& name) { return folder_->Path(name); }
  static proto::PlanProto Plan(std::vector<std::string> more = {}, int64_t batch = 4, int64_t sequence = 32) {
    return TinyPlan(std::move(more), batch, sequence, vocab_);
  }

  struct Loaded {
    std::unique_ptr<Executor> executor;
    std::unique_ptr<Trainer> trainer;
  };
  static absl::StatusOr<Loaded> Load(proto::PlanProto plan, int threads = 2) {
    Loaded loaded;
    ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeCpuBackend(threads));
    ASSIGN_OR_RETURN(loaded.executor, Executor::Load(std::move(plan), std::move(backend)));
    loaded.executor->InitializeStates(0);
    ASSIGN_OR_RETURN(loaded.trainer, Trainer::Create(*loaded.executor, Data()));
    return loaded;
  }

  static ProcessFolder* folder_;
  static int64_t vocab_;
};

ProcessFolder* TrainerTest::folder_ = nullptr;
int64_t TrainerTest::vocab_ = 0;

TEST_F(TrainerTest, LearnsAndTellsOfEveryStep) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  TrainOptions options = Steps(60);
  options.warmup_steps = 5;
  options.eval_every = 20;
  options.eval_batches = 2;
  std::vector<StepMetrics> steps;
  std::vector<std::pair<int64_t, EvalMetrics>> evals;
  TrainHooks hooks;
  hooks.on_step = [&](const StepMetrics& m) {
    steps.push_back(m);
    return absl::OkStatus();
  };
  hooks.on_eval = [&](int64_t step, const EvalMetrics& m) {
    evals.emplace_back(step, m);
    return absl::OkStatus();
  };
  ASSERT_OK_AND_ASSIGN(const EvalMetrics before, loaded.trainer->Evaluate("val", 0));
  ASSERT_OK_AND_ASSIGN(const TrainResult result, loaded.trainer->Train(options, hooks));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics after, loaded.trainer->Evaluate("val", 0));
  EXPECT_NEAR(before.loss, std::log(static_cast<double>(vocab_)), 0.1);
  EXPECT_LT(after.loss, before.loss - 1);
  EXPECT_EQ(result.steps, 60);
  EXPECT_EQ(result.tokens, 60 * 4 * 32);
  EXPECT_FALSE(result.interrupted);
  ASSERT_EQ(steps.size(), 60u);
  for (size_t i = 0; i < steps.size(); ++i) {
    EXPECT_EQ(steps[i].step, static_cast<int64_t>(i) + 1);
    EXPECT_GT(steps[i].grad_norm, 0);
    EXPECT_GT(steps[i].step_seconds, 0);
    EXPECT_NEAR(steps[i].tokens_per_second * steps[i].step_seconds, 4 * 32, 1e-6);
  }
  EXPECT_DOUBLE_EQ(steps[0].lr, 3e-3 / 5);
  EXPECT_DOUBLE_EQ(steps[5].lr, 3e-3);
  EXPECT_LT(steps[59].lr, 4e-4);
  EXPECT_EQ(result.last_loss, steps[59].loss);
  ASSERT_EQ(evals.size(), 2u);  // Not after the last step, which the caller evaluates.
  EXPECT_EQ(evals[0].first, 20);
  EXPECT_EQ(evals[1].second.tokens, 2 * 4 * 32);
  EXPECT_LT(evals[1].second.loss, evals[0].second.loss);

  // Every label of the split once.
  ASSERT_OK_AND_ASSIGN(const CorpusReader* val, loaded.trainer->Reader("val"));
  ASSERT_NE(val, nullptr);
  EXPECT_EQ(after.tokens, val->num_tokens() - 1);
}

TEST_F(TrainerTest, TheSameSeedGivesTheSameLosses) {
  const auto losses = [&](int threads, uint64_t seed) {
    std::vector<double> values;
    absl::StatusOr<Loaded> loaded = Load(Plan({"dropout=0.1"}), threads);
    CHECK(loaded.ok()) << loaded.status();
    TrainOptions options = Steps(8);
    options.scalars.seed = seed;
    TrainHooks hooks;
    hooks.on_step = [&](const StepMetrics& m) {
      values.push_back(m.loss);
      values.push_back(m.grad_norm);
      return absl::OkStatus();
    };
    CHECK(loaded->trainer->Train(options, hooks).ok());
    return values;
  };
  const std::vector<double> one = losses(1, 5);
  EXPECT_EQ(losses(1, 5), one);
  EXPECT_EQ(losses(2, 5), one);
  EXPECT_EQ(losses(3, 5), one);
  EXPECT_NE(losses(1, 6), one);
}

TEST_F(TrainerTest, WeightsComeBackFromTheFile) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  ASSERT_OK(loaded.trainer->Train(Steps(10), {}));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics trained, loaded.trainer->Evaluate("val", 0));
  const std::string path = Path("weights.safetensors");
  ASSERT_OK(SaveWeights(*loaded.executor, path));

  ASSERT_OK_AND_ASSIGN(const Loaded again, Load(Plan()));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics untrained, again.trainer->Evaluate("val", 0));
  EXPECT_GT(untrained.loss, trained.loss + 0.1);
  ASSERT_OK(LoadWeights(*again.executor, path));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics read, again.trainer->Evaluate("val", 0));
  EXPECT_EQ(read.loss, trained.loss);
  EXPECT_EQ(read.tokens, trained.tokens);

  ASSERT_OK_AND_ASSIGN(const Loaded other_batch, Load(Plan({}, 2, 32)));
  ASSERT_OK(LoadWeights(*other_batch.executor, path));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics same, other_batch.trainer->Evaluate("val", 0));
  EXPECT_NEAR(same.loss, trained.loss, 1e-5);
  EXPECT_EQ(same.tokens, trained.tokens);

  ASSERT_OK_AND_ASSIGN(const Loaded wider, Load(Plan({"width=64"})));
  EXPECT_THAT(LoadWeights(*wider.executor, path),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr(",32]"), HasSubstr(",64]"))));
  ASSERT_OK_AND_ASSIGN(const Loaded deeper, Load(Plan({"layers=2"})));
  EXPECT_THAT(LoadWeights(*deeper.executor, path),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("has no tensor"), HasSubstr(path))));
  EXPECT_THAT(LoadWeights(*again.executor, Path("nowhere")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(TrainerTest, StopsWhereTheLossIsNotFinite) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  TrainOptions options = Steps(50);
  options.scalars.lr = 1e30;
  options.scalars.grad_clip = 0;
  options.schedule = LrShape::kConstant;
  int64_t told = 0;
  TrainHooks hooks;
  hooks.on_step = [&](const StepMetrics&) {
    ++told;
    return absl::OkStatus();
  };
  const absl::StatusOr<TrainResult> result = loaded.trainer->Train(options, hooks);
  EXPECT_THAT(result, StatusIs(absl::StatusCode::kOutOfRange,
                               AllOf(HasSubstr(absl::StrCat("step ", told + 1, ": ")), HasSubstr("--lr"))));
  EXPECT_LT(told, 10);
}

TEST_F(TrainerTest, AnInterruptStopsBetweenSteps) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  int64_t done = 0;
  TrainHooks hooks;
  hooks.on_step = [&](const StepMetrics& m) {
    done = m.step;
    return absl::OkStatus();
  };
  hooks.interrupted = [&] { return done == 3; };
  ASSERT_OK_AND_ASSIGN(const TrainResult result, loaded.trainer->Train(Steps(50), hooks));
  EXPECT_TRUE(result.interrupted);
  EXPECT_EQ(result.steps, 3);
}

TEST_F(TrainerTest, AHooksErrorEndsTheRun) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  TrainHooks hooks;
  hooks.on_step = [](const StepMetrics&) { return absl::DataLossError("disk is full"); };
  EXPECT_THAT(loaded.trainer->Train(Steps(3), hooks), StatusIs(absl::StatusCode::kDataLoss, "disk is full"));
}

TEST_F(TrainerTest, PlannedSteps) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  ASSERT_OK_AND_ASSIGN(const CorpusReader* train, loaded.trainer->Reader("train"));
  const int64_t epoch = (train->num_sequences(32) + 3) / 4;
  const auto planned = [&](const TrainOptions& options) { return loaded.trainer->PlannedSteps(options).value_or(-1); };
  EXPECT_EQ(planned({.steps = 17}), 17);
  EXPECT_EQ(planned({}), epoch);
  EXPECT_EQ(planned({.epochs = 2.5}), std::ceil(2.5 * static_cast<double>(train->num_sequences(32)) / 4));
  EXPECT_EQ(planned({.max_minutes = 1}), 0);
  EXPECT_EQ(planned({.steps = 0}), 0);
  ASSERT_OK_AND_ASSIGN(const TrainResult none, loaded.trainer->Train(Steps(0), {}));
  EXPECT_EQ(none.steps, 0);
  TrainOptions timed;
  timed.max_minutes = 0.002;  // 120 ms
  ASSERT_OK_AND_ASSIGN(const TrainResult short_run, loaded.trainer->Train(timed, {}));
  EXPECT_GT(short_run.steps, 0);
  EXPECT_GE(short_run.seconds, 0.12);
}

TEST_F(TrainerTest, RefusesInputsThatNobodyFeeds) {
  proto::PlanProto plan = Plan();
  for (proto::ProgramProto& program : *plan.mutable_programs()) {
    if (program.name() != "train") continue;
    for (proto::ProgramInput& input : *program.mutable_inputs()) {
      if (input.name() == "tokens") input.set_name("pixels");
    }
  }
  EXPECT_THAT(Load(plan).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("program train has an input pixels: i32[4,32]"), HasSubstr("tokens, labels"))));
}

TEST_F(TrainerTest, RefusesPlansThatItCannotTrain) {
  proto::PlanProto plan = Plan();
  plan.mutable_facts()->erase("sequence");
  EXPECT_THAT(Load(plan).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no fact \"sequence\"")));
  plan = Plan();
  (*plan.mutable_facts())["batch"] = 5;
  EXPECT_THAT(Load(plan).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("batch 5")));
  plan = Plan();
  for (proto::ProgramProto& program : *plan.mutable_programs()) {
    for (proto::ProgramOutput& output : *program.mutable_outputs()) {
      if (output.name() == "loss") output.set_name("pain");
    }
  }
  EXPECT_THAT(Load(plan).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no output \"loss\"")));
}

TEST_F(TrainerTest, SplitsThatAreNotThere) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Plan()));
  EXPECT_THAT(loaded.trainer->Evaluate("dev", 0), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dev")));

  ASSERT_OK(WriteFile(Path("short"), "winter light.\n"));
  PrepOptions options;
  options.input = Path("short");
  options.output = Path("short_corpus");
  options.tokenizer = Data() + "/tokenizer.json";
  options.split = {100, 0, 0};
  ASSERT_OK(PrepareCorpus(options));
  ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(*loaded.executor, Path("short_corpus")));
  EXPECT_THAT(trainer->Prepare({}),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("32 tokens"), HasSubstr("--seq"))));
  ASSERT_OK_AND_ASSIGN(const EvalMetrics none, trainer->Evaluate("val", 0));
  EXPECT_EQ(none.tokens, 0);
}

TEST_F(TrainerTest, AnotherVocabularyIsNamedWithTheCommandThatFixesIt) {
  ASSERT_OK_AND_ASSIGN(const Manifest manifest, ReadManifest(Data()));
  EXPECT_OK(CheckVocabulary(Plan(), "p.plan", manifest, Data()));
  EXPECT_THAT(CheckVocabulary(TinyPlan({}, 2, 16, 77), "my plan", manifest, Data()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr(absl::StrCat("vocabulary of ", vocab_)), HasSubstr("compiled for 77"),
                             HasSubstr("mtc compile tiny_char --data"), HasSubstr("-o 'my plan'"))));
}

TEST(ReportTest, StepLineAndBox) {
  StepMetrics m = {.step = 120, .loss = 4.861, .lr = 4.9e-4, .grad_norm = 0.83, .tokens_per_second = 80123};
  m.elapsed_seconds = 46.62;
  EXPECT_EQ(StepLine(m, {.steps = 1335, .arena_bytes = 22963814}),
            "step 120/1335 9.0% | loss 4.8610 ppl 129.15 | lr 4.90e-04 | gnorm 0.83 | 80.1k tok/s | 21.9 MiB | ETA "
            "0:07:52");
  EXPECT_THAT(StepLine(m, {.arena_bytes = 1 << 20}), AllOf(HasSubstr("step 120 |"), ::testing::Not(HasSubstr("ETA"))));
  EXPECT_EQ(Box("run", {{"a", "1"}, {"long", "żółw"}}),
            "┌─ run ──────┐\n"
            "│ a     1    │\n"
            "│ long  żółw │\n"
            "└────────────┘\n");
}

}  // namespace
}  // namespace mt
