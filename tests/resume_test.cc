// A run that was stopped and goes on ends with the bits of one that was not.
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/tools.h"
#include "proto/event.pb.h"
#include "proto/run_config.pb.h"
#include "runtime/checkpoint/states.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/prep.h"
#include "runtime/train/run_folder.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class ResumeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("resume_test");
    ASSERT_OK_AND_ASSIGN(vocab_, PrepareCharacters(folder_->path(), GeneratedText(8), {50, 30, 20}));
  }
  static void TearDownTestSuite() { delete folder_; }

  struct Loaded {
    std::unique_ptr<Executor> executor;
    std::unique_ptr<Trainer> trainer;
  };
  static absl::StatusOr<Loaded> Load(const proto::PlanProto& plan) {
    Loaded loaded;
    ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeCpuBackend(1));
    ASSIGN_OR_RETURN(loaded.executor, Executor::Load(plan, std::move(backend)));
    loaded.executor->InitializeStates(5);
    // So large that the first steps of fp16 are skipped.
    if (const BoundTensor* scale = loaded.executor->FindState("loss_scale")) *scale->data_as<float>() = 0x1p21f;
    ASSIGN_OR_RETURN(loaded.trainer, Trainer::Create(*loaded.executor, folder_->Path("corpus")));
    return loaded;
  }
  static uint64_t Hash(Executor& executor) {
    std::vector<SavedState> states;
    SnapshotStates(executor, &states);
    uint64_t hash = 0;
    for (const SavedState& state : states) hash = Fnv1a(state.bytes, Fnv1a(state.tensor.name, hash + 1));
    return hash;
  }

  static ProcessFolder* folder_;
  static int64_t vocab_;
};

ProcessFolder* ResumeTest::folder_ = nullptr;
int64_t ResumeTest::vocab_ = 0;

// Every step of every pipeline is a place to stop: within and at the edge of an epoch, before and after evaluations
// that the learning rate follows, among skipped steps.
TEST_F(ResumeTest, BitForBitAtEveryStep) {
  constexpr int64_t kSteps = 7;
  struct Config {
    const char* passes;
    int64_t batch = 8, microbatches = 1;
    std::string optimizer = "adamw";
  };
  const Config configs[] = {{"none"},
                            {"flash,fuse"},
                            {"bf16,flash,chunked_loss,pad_vocab"},
                            {"remat"},
                            {"fp16"},
                            {"fp16,flash:window=4,fuse,remat"},
                            {"adamw8bit"},
                            {"adamw8bit,pad_vocab,bf16"},
                            {"accumulate:2", 8, 2},
                            {"accumulate:4,chunked_loss,fuse", 8, 4},
                            {"fp16,accumulate:2", 8, 2},
                            {"bf16,accumulate:2,adamw8bit,remat", 12, 2},
                            {"none", 12, 1, "adam"},
                            {"tf32,pad_vocab", 6}};
  int64_t resumed_runs = 0, skipped_runs = 0, epoch_edges = 0;
  for (const Config& config : configs) {
    SCOPED_TRACE(absl::StrCat(config.passes, ", batch ", config.batch));
    ASSERT_OK_AND_ASSIGN(
        std::unique_ptr<Module> module,
        LoadModel("tiny_char", {.batch = config.batch,
                                .sequence = 16,
                                .vocab_size = vocab_,
                                .sets = {"layers=1", "width=64", "heads=2", "ffn_width=96", "dropout=0.1"},
                                .microbatches = config.microbatches}));
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan,
                         Compile(std::move(module), {.passes = config.passes, .optimizer = config.optimizer}));
    TrainOptions options;
    options.steps = kSteps;
    options.schedule = LrShape::kPlateau;
    options.patience = 1;
    options.warmup_steps = 1;
    options.eval_every = 2;
    options.eval_batches = 1;
    options.scalars.lr = 3e-2;
    options.scalars.seed = 5;
    const std::string saves = folder_->Path("saves");
    std::filesystem::remove_all(saves);
    std::filesystem::create_directories(saves);

    ASSERT_OK_AND_ASSIGN(const Loaded whole, Load(plan));
    TrainHooks hooks;
    hooks.saves_after = [](int64_t) { return true; };
    hooks.on_save = [&](const TrainState& state) {
      Checkpoint checkpoint = {.step = state.steps, .model = "tiny_char", .progress = ToJson(state)};
      checkpoint.identity = checkpoint.environment = nlohmann::ordered_json::object();
      SnapshotStates(*whole.executor, &checkpoint.states);
      return WriteCheckpoint(saves, checkpoint, 100);
    };
    ASSERT_OK_AND_ASSIGN(const TrainResult result, whole.trainer->Train(options, hooks));
    const uint64_t expected = Hash(*whole.executor);
    skipped_runs += result.skipped_steps > 0 && result.skipped_steps < kSteps ? 1 : 0;
    ASSERT_OK_AND_ASSIGN(const CorpusReader* reader, whole.trainer->Reader("train"));
    const int64_t sequences = reader->num_sequences(16);
    epoch_edges += sequences < kSteps * config.batch ? 1 : 0;
    EXPECT_EQ(result.samples, kSteps * config.batch);

    for (int64_t stop = 0; stop < kSteps; ++stop) {
      SCOPED_TRACE(stop);
      ASSERT_OK_AND_ASSIGN(const Loaded again, Load(plan));
      TrainOptions rest = options;
      if (stop > 0) {
        ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                             CheckpointReader::Open(absl::StrCat(saves, "/", CheckpointName(stop))));
        ASSERT_OK_AND_ASSIGN(const std::vector<std::string> fresh, RestoreStates(*again.executor, *checkpoint));
        EXPECT_THAT(fresh, ::testing::IsEmpty());
        ASSERT_OK_AND_ASSIGN(rest.from, TrainStateFromJson(checkpoint->progress()));
        ++resumed_runs;
      }
      ASSERT_OK_AND_ASSIGN(const TrainResult resumed, again.trainer->Train(rest, {}));
      EXPECT_EQ(Hash(*again.executor), expected);
      EXPECT_EQ(resumed.last_loss, result.last_loss);
      EXPECT_EQ(resumed.steps, result.steps);
      EXPECT_EQ(resumed.samples, result.samples);
      EXPECT_EQ(resumed.tokens, result.tokens);
      EXPECT_EQ(resumed.skipped_steps, result.skipped_steps);
      EXPECT_EQ(resumed.plateau.factor, result.plateau.factor);
    }
  }
  std::printf("%lld resumed runs, %lld pipelines with skipped steps, %lld over an epoch's edge\n",
              static_cast<long long>(resumed_runs), static_cast<long long>(skipped_runs),
              static_cast<long long>(epoch_edges));
  EXPECT_GE(resumed_runs, 64);
  EXPECT_GE(skipped_runs, 2);
  EXPECT_GE(epoch_edges, 5);
}

TEST_F(ResumeTest, LimitsAndEarlyStop) {
  ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(TinyPlan({}, 4, 16, vocab_)));
  const auto planned = [&](const TrainOptions& options) { return loaded.trainer->PlannedSteps(options).value_or(-1); };
  TrainOptions tokens;
  tokens.max_tokens = 4 * 16 * 3 + 1;
  EXPECT_EQ(planned(tokens), 4);
  tokens.steps = 3;
  EXPECT_EQ(planned(tokens), 3);
  TrainOptions options;
  options.steps = 1000;
  options.scalars.lr = 0;  // Nothing gets better.
  options.eval_every = 2;
  options.eval_batches = 1;
  options.early_stop = 3;
  ASSERT_OK_AND_ASSIGN(const TrainResult result, loaded.trainer->Train(options, {}));
  EXPECT_TRUE(result.stopped_early);
  EXPECT_EQ(result.steps, 8) << "the first evaluation is the best, three more are not better";
  // One that was stopped there stays there.
  options.from = result;
  ASSERT_OK_AND_ASSIGN(const TrainResult again, loaded.trainer->Train(options, {}));
  EXPECT_TRUE(again.stopped_early);
  EXPECT_EQ(again.steps, 8);
}

TEST(TrainStateTest, ComesBackToTheBit) {
  TrainState state;
  state.steps = 7;
  state.samples = int64_t{1} << 40;
  state.last_loss = 0.1 + 0.2;
  state.seconds = 1e-300;
  state.plateau.best = 2.0 / 3;
  state.best_val = std::numeric_limits<double>::infinity();
  const nlohmann::json json = nlohmann::json::parse(ToJson(state).dump());
  ASSERT_OK_AND_ASSIGN(const TrainState back, TrainStateFromJson(json));
  EXPECT_EQ(back.steps, 7);
  EXPECT_EQ(back.samples, state.samples);
  EXPECT_EQ(back.last_loss, state.last_loss);
  EXPECT_EQ(back.seconds, state.seconds);
  EXPECT_EQ(back.plateau.best, state.plateau.best);
  for (const char* wrong : {"-1", "\"x\"", "1.5", "null", "[]"}) {
    nlohmann::json bad = json;
    bad["samples"] = nlohmann::json::parse(wrong);
    EXPECT_THAT(TrainStateFromJson(bad), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("samples")));
  }
  nlohmann::json lacking = json;
  lacking.erase("seconds");
  EXPECT_THAT(TrainStateFromJson(lacking), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("seconds")));
  EXPECT_THAT(TrainStateFromJson(nlohmann::json::array()),
              StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::_));
}

TEST(DifferencesTest, NamesEachKey) {
  EXPECT_THAT(Differences({{"a", 1}, {"b", "x"}, {"c", 2.5}}, {{"a", 1}, {"b", "y"}, {"d", nullptr}}),
              ElementsAre("b is x there, y here", "c is 2.5 there, not given here"));
}

// As a user does it.
class ResumeCommandTest : public ResumeTest {
 protected:
  static void SetUpTestSuite() {
    ResumeTest::SetUpTestSuite();
    const Outcome compiled = Run(
        "mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2,dropout=0.1 --batch 4 --seq 16 "
        "--passes none -o tiny.plan && mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2,dropout=0.1 "
        "--batch 4 --seq 16 --passes bf16,pad_vocab -o bf16.plan");
    ASSERT_EQ(compiled.code, 0) << compiled.err;
  }
  static Outcome Run(const std::string& command) { return folder_->Run(command); }
  static std::string Listing(const std::string& name) { return Run("ls " + name).out; }
  // Lines without times.
  static std::vector<std::string> Metrics(const std::string& run) {
    std::vector<std::string> lines;
    for (const absl::string_view line : absl::StrSplit(folder_->Read(run + "/metrics.jsonl"), '\n')) {
      nlohmann::json json = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
      if (!json.is_object()) continue;
      json.erase("step_seconds");
      json.erase("tokens_per_second");
      lines.push_back(json.dump());
    }
    return lines;
  }
};

constexpr char kRun[] = "mtrun tiny.plan --data corpus --lr 1e-2 --steps 40 --save-every 7 --eval-every 10 ";

TEST_F(ResumeCommandTest, AFinishedRunPrintsItsBox) {
  const Outcome first = Run(absl::StrCat(kRun, "--out done"));
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(Listing("done"), "memory.json\nmetrics.jsonl\nmodel.safetensors\nstep-35\nstep-40\nsummary.json\n");
  const std::string summary = folder_->Read("done/summary.json");
  const Outcome again = Run(absl::StrCat(kRun, "--out done --threads 1 --log-every 5"));
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, AllOf(HasSubstr("tiny_char: 40 steps"), HasSubstr("val  "), HasSubstr("--fresh to repeat"),
                               Not(HasSubstr("step 1/"))));
  EXPECT_EQ(folder_->Read("done/summary.json"), summary);
  // Anything else is another run.
  folder_->ExpectError(absl::StrCat(kRun, "--out done --lr 2e-2 --seed 3"), 2,
                       AllOf(HasSubstr("lr is 0.01 there, 0.02 here"), HasSubstr("seed is 0 there, 3 here"),
                             HasSubstr("--fresh"), HasSubstr("--out")));
  folder_->ExpectError("mtrun bf16.plan --data corpus --lr 1e-2 --steps 40 --save-every 7 --eval-every 10 --out done",
                       2, AllOf(HasSubstr("passes is"), HasSubstr("plan is")));
  // More steps from its last checkpoint, elsewhere; also by another plan.
  const Outcome more = Run(absl::StrCat("mtrun tiny.plan --data corpus --lr 1e-2 --steps 45 --resume done --out more"));
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_THAT(more.out, AllOf(HasSubstr("goes on from done/step-40, step 40"), HasSubstr("step 41/45")));
  const Outcome other = Run("mtrun bf16.plan --data corpus --lr 1e-2 --steps 37 --resume done/step-35/ --out other");
  EXPECT_EQ(other.code, 0) << other.err;
  EXPECT_THAT(other.out, AllOf(HasSubstr("goes on from done/step-35, step 35"), Not(HasSubstr("fresh"))));
  EXPECT_EQ(Run("mtrun tiny.plan --data corpus --init done/step-35 --eval val").code, 0);
  folder_->ExpectError("mtrun tiny.plan --data corpus --resume nowhere", 4, HasSubstr("nowhere"));
  folder_->ExpectError("mtrun tiny.plan --data corpus --steps 1 --keep 3", 2, HasSubstr("--out"));
}

TEST_F(ResumeCommandTest, ASignalSavesAndTheSameCommandGoesOn) {
  const Outcome whole = Run(absl::StrCat(kRun, "--out whole"));
  ASSERT_EQ(whole.code, 0) << whole.err;
  const std::string command =
      "mtrun tiny.plan --data corpus --lr 1e-2 --steps 3000 --save-every 1000 --eval-every 1000 --eval-batches 1 "
      "--out ";
  for (const char* signal : {"INT", "TERM"}) {
    const std::string out = absl::StrCat("stopped_", signal);
    const Outcome stopped =
        Run(absl::StrCat(command, out, " & pid=$!\nwhile [ ! -s ", out,
                         "/metrics.jsonl ] && kill -0 $pid; do sleep 0.01; done\nkill -", signal, " $pid\nwait $pid"));
    EXPECT_EQ(stopped.code, 130) << stopped.err;
    EXPECT_THAT(stopped.err, AllOf(HasSubstr("interrupted after step "), HasSubstr("the same command goes on")));
    EXPECT_FALSE(folder_->Exists(out + "/model.safetensors"));
    EXPECT_EQ(folder_->ReadJson(out + "/summary.json")["interrupted"], true);
    EXPECT_EQ(Run(absl::StrCat("mtrun tiny.plan --data corpus --init ", out, " --eval val")).code, 0);
    folder_->ExpectError(absl::StrCat(command, out, " --beta2 0.99"), 2, HasSubstr("beta2 is 0.95 there, 0.99 here"));
  }
}

// Killed at random times, the same command brings every run to the same end.
TEST_F(ResumeCommandTest, KilledRunsEndAsTheOthers) {
  const Outcome whole = Run(absl::StrCat(kRun, "--out reference"));
  ASSERT_EQ(whole.code, 0) << whole.err;
  int64_t kills = 6;
  if (const char* wanted = std::getenv("MT_KILLS")) kills = std::atoll(wanted);
  int64_t killed = 0, resumed = 0, runs = 0;
  while (killed < kills) {
    ++runs;
    Run("rm -rf killed");
    for (int64_t attempt = 0;; ++attempt) {
      // From the start of the process on, and long enough for a few steps; another time in each run, since a quick
      // machine ends some before they are killed.
      const int64_t turn = (killed * 7 + runs * 5 + attempt) % 17;
      const std::string wait = absl::StrFormat("%.3f", 0.01 + 0.013 * static_cast<double>(turn));
      const Outcome outcome = Run(absl::StrCat(kRun, "--out killed --log-every 1000 & pid=$!\nsleep ", wait,
                                               "\nkill -9 $pid 2> /dev/null\nwait $pid 2> /dev/null"));
      const bool at_end = attempt > 30;
      resumed += absl::StrContains(outcome.out, "goes on from") ? 1 : 0;
      EXPECT_THAT(outcome.err, Not(HasSubstr("passed over")));
      if (outcome.code == 0) break;
      ASSERT_EQ(outcome.code, 137) << outcome.err;
      ++killed;
      if (folder_->Exists("killed")) {
        const absl::StatusOr<NewestCheckpoint> newest = FindNewestCheckpoint(folder_->Path("killed"));
        ASSERT_OK(newest);
        EXPECT_THAT(newest->damaged, ::testing::IsEmpty());
        const int64_t told = static_cast<int64_t>(Metrics("killed").size());
        const int64_t saved = newest->checkpoint == nullptr ? 0 : newest->checkpoint->step();
        EXPECT_LE(told - saved, 2 * 7 + 4) << "more than the interval and the save under way was lost";
      }
      if (killed >= kills || at_end) {
        const Outcome rest = Run(absl::StrCat(kRun, "--out killed"));
        ASSERT_EQ(rest.code, 0) << rest.err;
        resumed += absl::StrContains(rest.out, "goes on from") ? 1 : 0;
        break;
      }
    }
    EXPECT_EQ(Listing("killed"), Listing("reference"));
    EXPECT_EQ(Metrics("killed"), Metrics("reference"));
    EXPECT_EQ(folder_->Read("killed/model.safetensors"), folder_->Read("reference/model.safetensors"));
    EXPECT_EQ(folder_->Read("killed/step-40/optimizer.safetensors"),
              folder_->Read("reference/step-40/optimizer.safetensors"));
  }
  std::printf("%lld kills over %lld runs, %lld of them went on from a checkpoint\n", static_cast<long long>(killed),
              static_cast<long long>(runs), static_cast<long long>(resumed));
}

// The records of TensorBoard's files, read as its reader does.
TEST_F(ResumeCommandTest, TensorBoardReadsTheEvents) {
  ASSERT_EQ(Run("mtrun tiny.plan --data corpus --lr 1e-2 --steps 4 --eval-every 2 --tensorboard --out events").code, 0);
  const Outcome listing = Run("cat events/events.out.tfevents.*");
  const std::string& bytes = listing.out;
  const auto number = [&](size_t at, int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; ++i)
      value |= uint64_t{static_cast<uint8_t>(bytes[at + static_cast<size_t>(i)])} << 8 * i;
    return value;
  };
  const auto unmasked = [](uint64_t masked) {
    const uint32_t rotated = static_cast<uint32_t>(masked) - 0xa282ead8u;
    return (rotated << 15) | (rotated >> 17);
  };
  std::vector<proto::EventProto> events;
  for (size_t at = 0; at < bytes.size();) {
    ASSERT_LE(at + 16, bytes.size());
    const size_t size = number(at, 8);
    ASSERT_EQ(unmasked(number(at + 8, 4)), Crc32c(absl::string_view(bytes).substr(at, 8)));
    ASSERT_LE(at + 16 + size, bytes.size());
    const absl::string_view data = absl::string_view(bytes).substr(at + 12, size);
    ASSERT_EQ(unmasked(number(at + 12 + size, 4)), Crc32c(data));
    ASSERT_TRUE(events.emplace_back().ParseFromArray(data.data(), static_cast<int>(data.size())));
    at += 16 + size;
  }
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(events[0].file_version(), "brain.Event:2");
  EXPECT_EQ(events[1].session_log().status(), proto::SessionLogProto::START);
  EXPECT_EQ(events[1].step(), 1);
  std::map<std::string, std::vector<std::pair<int64_t, float>>> scalars;
  for (const proto::EventProto& event : events) {
    EXPECT_GT(event.wall_time(), 1e9);
    for (const proto::SummaryProto::Value& value : event.summary().value()) {
      scalars[value.tag()].push_back({event.step(), value.simple_value()});
    }
  }
  std::vector<std::pair<int64_t, float>> losses;
  for (const absl::string_view line : absl::StrSplit(folder_->Read("events/metrics.jsonl"), '\n', absl::SkipEmpty())) {
    const nlohmann::json json = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
    if (json.contains("loss")) losses.push_back({json["step"], json["loss"].get<float>()});
  }
  EXPECT_EQ(losses.size(), 4u);
  EXPECT_EQ(scalars["train/loss"], losses);
  EXPECT_EQ(scalars["train/lr"].size(), 4u);
  EXPECT_EQ(scalars["val/loss"].size(), 2u) << "during the run and at its end";
  EXPECT_EQ(scalars["test/perplexity"].size(), 1u);
}

TEST_F(ResumeCommandTest, ConfigFilesAndWhereValuesComeFrom) {
  folder_->Write(
      "run.textproto",
      "# As the paper says.\nlr: 3e-3 weight_decay: 0.05 steps: 3\nlr_schedule: \"linear\" tensorboard: false");
  const Outcome shown = Run("mtrun tiny.plan --config run.textproto --steps 2 --data corpus --show-config");
  ASSERT_EQ(shown.code, 0) << shown.err;
  const auto row = [&](const std::string& name) {
    for (const absl::string_view line : absl::StrSplit(shown.out, '\n')) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
      if (!words.empty() && words[0] == name) return absl::StrJoin(words, " ");
    }
    return std::string();
  };
  EXPECT_EQ(row("lr"), "lr 0.003 run.textproto");
  EXPECT_EQ(row("lr-schedule"), "lr-schedule linear run.textproto");
  EXPECT_EQ(row("steps"), "steps 2 command line");
  EXPECT_EQ(row("beta2"), "beta2 0.95 default");
  EXPECT_EQ(row("out"), "out - default");
  const Outcome trained = Run("mtrun tiny.plan --config=run.textproto --data corpus --out configured");
  ASSERT_EQ(trained.code, 0) << trained.err;
  const nlohmann::json summary = folder_->ReadJson("configured/summary.json");
  EXPECT_EQ(summary["steps"], 3);
  EXPECT_EQ(summary["config"]["lr"], 3e-3);
  EXPECT_EQ(summary["config"]["weight_decay"], 0.05);
  // The command of the summary needs no file.
  ASSERT_EQ(Run("rm run.textproto").code, 0);
  const Outcome again = Run(summary["command"].get<std::string>());
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, HasSubstr("--fresh to repeat"));
  folder_->ExpectError("mtrun tiny.plan --config nowhere.textproto", 4, HasSubstr("nowhere.textproto"));
  folder_->Write("bad.textproto", "lr: 1e-3\nlearning: 3");
  folder_->ExpectError("mtrun tiny.plan --config bad.textproto", 2,
                       AllOf(HasSubstr("bad.textproto:2:"), HasSubstr("learning")));
  folder_->Write("bad.textproto", "lr: -1");
  folder_->ExpectError("mtrun tiny.plan --config bad.textproto", 2, AllOf(HasSubstr("--lr"), HasSubstr("below")));
  // Every field is a flag.
  const google::protobuf::Descriptor* fields = proto::RunConfig::descriptor();
  for (int i = 0; i < fields->field_count(); ++i) {
    const std::string name = absl::StrReplaceAll(fields->field(i)->name(), {{"_", "-"}});
    EXPECT_TRUE(std::any_of(kMtrun.flags.begin(), kMtrun.flags.end(), [&](const FlagDef& flag) {
      return flag.name == name;
    })) << name;
  }
}

// Steps that fail are undone with a smaller rate; where that does not help, the run ends and its checkpoint is good.
TEST_F(ResumeCommandTest, StepsThatFailAreUndone) {
  const Outcome burst =
      Run(absl::StrCat(kRun, "--out burst --lr-schedule constant --lr 1e30 --grad-clip 0 --warmup 30"));
  EXPECT_EQ(burst.code, 5) << burst.err;
  EXPECT_THAT(burst.err, AllOf(HasSubstr("warning: step "), HasSubstr("(20 of 20 times)"),
                               HasSubstr("went back 20 times"), HasSubstr("no number is of ")));
  EXPECT_FALSE(folder_->Exists("burst/summary.json"));
  const Outcome bumps = Run(absl::StrCat(kRun, "--out bumps --lr-schedule constant --lr 300 --grad-clip 0 --spike 3"));
  EXPECT_EQ(bumps.code, 0) << bumps.err;
  EXPECT_THAT(bumps.err, AllOf(HasSubstr("warning: step "), HasSubstr("with 0.5 of the learning rate"),
                               HasSubstr("back to step ")));
  EXPECT_EQ(folder_->ReadJson("bumps/summary.json")["steps"], 40);
  std::set<int64_t> steps;
  for (const std::string& line : Metrics("bumps")) {
    const nlohmann::json json = nlohmann::json::parse(line);
    if (json.contains("loss")) {
      EXPECT_TRUE(steps.insert(json["step"].get<int64_t>()).second) << line;
    }
  }
  EXPECT_EQ(steps.size(), 40u);
}

TEST_F(ResumeCommandTest, ADamagedCheckpointIsNamed) {
  ASSERT_EQ(Run(absl::StrCat(kRun, "--out hurt --keep 3")).code, 0);
  ASSERT_EQ(Run("rm hurt/summary.json && echo x >> hurt/step-40/optimizer.safetensors").code, 0);
  const Outcome outcome = Run(absl::StrCat(kRun, "--out hurt --keep 3"));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("warning: checkpoint passed over: "), HasSubstr("step-40/optimizer")));
  EXPECT_THAT(outcome.out, HasSubstr("goes on from hurt/step-35, step 35"));
  EXPECT_EQ(Listing("hurt"),
            "memory.json\nmetrics.jsonl\nmodel.safetensors\nstep-28\nstep-35\nstep-40\nsummary.json\n");
  ASSERT_EQ(Run("rm hurt/summary.json && rm hurt/step-*/manifest.json").code, 0);
  folder_->ExpectError(absl::StrCat(kRun, "--out hurt"), 4,
                       AllOf(HasSubstr("none of the checkpoints"), HasSubstr("--fresh")));
  EXPECT_EQ(Run(absl::StrCat(kRun, "--out hurt --fresh")).code, 0);
}

}  // namespace
}  // namespace mt
