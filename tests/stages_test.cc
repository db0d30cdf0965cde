// Runs that go through several plans over one set of states, and the order in which samples come.
#include "runtime/train/stages.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "runtime/checkpoint/states.h"
#include "runtime/data/permutation.h"
#include "runtime/data/prep.h"
#include "runtime/data/sample_order.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// Documents of many lengths; no two are equal.
std::string TextOfManyLengths(int documents) {
  std::string text;
  for (int d = 0; d < documents; ++d) {
    absl::StrAppend(&text, "nr ", d, ":");
    for (int w = 0; w < (d * 7) % 23; ++w) absl::StrAppend(&text, " stone");
    text += "\n\n";
  }
  return text;
}

class SampleOrderTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("sample_order_test");
    ASSERT_OK(PrepareCharacters(folder_->path(), TextOfManyLengths(60)));
  }
  static void TearDownTestSuite() { delete folder_; }

  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(reader_, CorpusReader::Open(folder_->Path("corpus"), "train"));
    text_.resize(static_cast<size_t>(reader_->num_tokens()));
    ASSERT_OK(reader_->Read(0, absl::MakeSpan(text_)));
  }
  std::unique_ptr<SampleOrder> Order(SampleOrder::Options options) {
    absl::StatusOr<std::unique_ptr<SampleOrder>> order = SampleOrder::Create(*reader_, options);
    EXPECT_OK(order);
    return *std::move(order);
  }
  // The tokens of so many samples, one after another. Labels must be the next tokens.
  static std::vector<int32_t> Tokens(const SampleOrder& order, int64_t first, int64_t count, int64_t seq_len) {
    std::vector<int32_t> tokens(static_cast<size_t>(count * seq_len)), labels(tokens.size());
    EXPECT_OK(order.Samples(first, count, seq_len, absl::MakeSpan(tokens), absl::MakeSpan(labels)));
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      if ((i + 1) % static_cast<size_t>(seq_len) != 0) {
        EXPECT_EQ(labels[i], tokens[i + 1]) << i;
      }
    }
    return tokens;
  }
  static std::vector<int32_t> Part(const std::vector<int32_t>& tokens, int64_t first, int64_t last) {
    return std::vector<int32_t>(tokens.begin() + first, tokens.begin() + last);
  }
  std::vector<std::vector<int32_t>> Documents(const std::vector<int32_t>& tokens) const {
    std::vector<std::vector<int32_t>> documents(1);
    for (const int32_t token : tokens) {
      documents.back().push_back(token);
      if (token == reader_->manifest().end_of_document) documents.emplace_back();
    }
    documents.pop_back();  // What is left of one.
    return documents;
  }

  static ProcessFolder* folder_;
  std::unique_ptr<CorpusReader> reader_;
  std::vector<int32_t> text_;
};

ProcessFolder* SampleOrderTest::folder_ = nullptr;

TEST_F(SampleOrderTest, APlaceIsTheSameForEveryLength) {
  const auto order = Order({.block_tokens = 32, .seed = 3});
  const int64_t epoch = order->epoch_tokens();
  EXPECT_EQ(epoch, (reader_->num_tokens() - 1) / 32 * 32);
  const std::vector<int32_t> whole = Tokens(*order, 0, 2 * epoch / 32, 32);
  for (const int64_t seq : {1, 4, 8, 16}) {
    EXPECT_EQ(Tokens(*order, 0, 2 * epoch / seq, seq), whole) << seq;
    EXPECT_EQ(Tokens(*order, 7, 5, seq), Part(whole, 7 * seq, 12 * seq)) << seq;
  }
  // An epoch takes each block once.
  for (const int64_t start : {int64_t{0}, epoch}) {
    std::multiset<std::vector<int32_t>> blocks, expected;
    for (int64_t at = 0; at < epoch; at += 32) {
      blocks.insert(Part(whole, start + at, start + at + 32));
      expected.insert(Part(text_, at, at + 32));
    }
    EXPECT_EQ(blocks, expected);
  }
  EXPECT_NE(Part(whole, 0, 64), Part(whole, epoch, epoch + 64));
}

// 5 x 8 tokens, 3 x 16, then 32 to the end of the epoch: nothing twice, less than a sequence left out at each change.
TEST_F(SampleOrderTest, LongerSequencesGoOnWhereShorterOnesStopped) {
  const auto order = Order({.block_tokens = 32, .seed = 3});
  const std::vector<int32_t> whole = Tokens(*order, 0, order->epoch_tokens() / 32, 32);
  TrainState state;
  CountInSequences(8, &state);
  EXPECT_EQ(Tokens(*order, state.samples, 5, 8), Part(whole, 0, 40));
  state.samples += 5;
  CountInSequences(16, &state);
  EXPECT_EQ(Tokens(*order, state.samples, 3, 16), Part(whole, 48, 96));
  state.samples += 3;
  CountInSequences(32, &state);
  EXPECT_EQ(state.samples, 3);
  EXPECT_EQ(Tokens(*order, state.samples, 2, 32), Part(whole, 96, 160));
}

TEST(CountInSequencesTest, TheNextPlaceThatIsNotEarlier) {
  const auto counted = [](int64_t samples, int64_t from, int64_t to) {
    TrainState state;
    state.samples = samples;
    state.sequence = from;
    state.mean_loss = 2;
    state.mean_steps = 20;
    CountInSequences(to, &state);
    EXPECT_EQ(state.sequence, to);
    EXPECT_EQ(state.mean_steps, from == to ? 20 : 0) << "another length has another loss";
    return state.samples;
  };
  EXPECT_EQ(counted(5, 8, 8), 5);
  EXPECT_EQ(counted(4, 8, 16), 2);
  EXPECT_EQ(counted(5, 8, 16), 3);
  EXPECT_EQ(counted(5, 16, 8), 10);
  EXPECT_EQ(counted(5, 48, 64), 4);
  EXPECT_EQ(counted(0, 48, 64), 0);
  // Numbers of a checkpoint that somebody made up.
  EXPECT_GT(counted(int64_t{1} << 62, int64_t{1} << 31, 1), 0);
  EXPECT_EQ(counted(int64_t{1} << 62, 1, int64_t{1} << 31), int64_t{1} << 31);
}

TEST(CommonBlockTest, IsWhatAllLengthsDivide) {
  EXPECT_EQ(CommonBlock({16}), 16);
  EXPECT_EQ(CommonBlock({8, 16, 32}), 32);
  EXPECT_EQ(CommonBlock({48, 64}), 192);
  EXPECT_EQ(CommonBlock({(int64_t{1} << 31) - 1, int64_t{1} << 31, (int64_t{1} << 31) - 3}),
            std::numeric_limits<int64_t>::max());
}

TEST_F(SampleOrderTest, DocumentsFromShortToLong) {
  const int64_t all = reader_->num_tokens();
  const auto order = Order({.block_tokens = 16, .seed = 3, .tokens_by_length = all});
  const int64_t samples = order->epoch_tokens() / 16;
  const std::vector<int32_t> first = Tokens(*order, 0, samples, 16);
  // Each document of the corpus, but for the tail, and none is shorter than the one before it.
  std::vector<std::vector<int32_t>> documents = Documents(first), expected = Documents(text_);
  EXPECT_GE(documents.size() + 2, expected.size());
  EXPECT_GT(documents.back().size(), 4 * documents.front().size());
  for (size_t i = 1; i < documents.size(); ++i) EXPECT_LE(documents[i - 1].size(), documents[i].size()) << i;
  for (const std::vector<int32_t>& document : documents) {
    const auto found = std::find(expected.begin(), expected.end(), document);
    ASSERT_NE(found, expected.end());
    expected.erase(found);
  }
  // Equal lengths come in another order with another seed; lengths do not.
  const std::vector<std::vector<int32_t>> other =
      Documents(Tokens(*Order({.block_tokens = 16, .seed = 4, .tokens_by_length = all}), 0, samples, 16));
  ASSERT_EQ(other.size(), documents.size());
  EXPECT_NE(other, documents);
  for (size_t i = 0; i < other.size(); ++i) EXPECT_EQ(other[i].size(), documents[i].size());
  // Later epochs are as they are without.
  const auto plain = Order({.block_tokens = 16, .seed = 3});
  EXPECT_EQ(Tokens(*order, samples, 2 * samples, 16), Tokens(*plain, samples, 2 * samples, 16));
  EXPECT_NE(first, Tokens(*plain, 0, samples, 16));
  // Any start, any length: the same text.
  EXPECT_EQ(Tokens(*order, 5, 4, 8), Part(first, 40, 72));
  EXPECT_EQ(Tokens(*order, samples - 1, 2, 16), Tokens(*order, 2 * samples - 2, 4, 8));
}

// Over a part of the epoch: the blocks that come first anyhow, sorted; the others as they would have come.
TEST_F(SampleOrderTest, DocumentsFromShortToLongOverAPart) {
  const auto whole = Order({.block_tokens = 16, .seed = 3, .tokens_by_length = reader_->num_tokens()});
  const auto part = Order({.block_tokens = 16, .seed = 3, .tokens_by_length = 16 * 20 - 7});
  const int64_t blocks = whole->epoch_tokens() / 16;
  const Permutation permutation(blocks, 3, 0);
  std::vector<int64_t> places;
  for (int64_t i = 0; i < blocks; ++i) places.push_back(permutation(i));
  std::sort(places.begin(), places.begin() + 20);
  const std::vector<int32_t> sorted = Tokens(*whole, 0, blocks, 16), got = Tokens(*part, 0, blocks, 16);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t place = places[static_cast<size_t>(i)];
    EXPECT_EQ(Part(got, 16 * i, 16 * i + 16), Part(sorted, 16 * place, 16 * place + 16)) << i;
  }
  EXPECT_EQ(Tokens(*part, blocks, blocks, 16), Tokens(*whole, blocks, blocks, 16));
}

TEST(PlannedStepsTest, OverStages) {
  const std::vector<StageShape> stages = {
      {.steps = 10, .batch = 4, .sequence = 8}, {.steps = 5, .batch = 2, .sequence = 16}, {.batch = 2, .sequence = 32}};
  EXPECT_EQ(TokensOfSteps(0, stages), 0);
  EXPECT_EQ(TokensOfSteps(10, stages), 320);
  EXPECT_EQ(TokensOfSteps(12, stages), 320 + 64);
  EXPECT_EQ(TokensOfSteps(18, stages), 320 + 160 + 3 * 64);
  TrainOptions options;
  options.steps = 100;
  EXPECT_EQ(PlannedSteps(options, stages, 6400), 100);
  options.max_tokens = 321;
  EXPECT_EQ(PlannedSteps(options, stages, 6400), 11);
  options.max_tokens = 320 + 160 + 65;
  EXPECT_EQ(PlannedSteps(options, stages, 6400), 17);
  options.max_tokens = 33;
  EXPECT_EQ(PlannedSteps(options, stages, 6400), 2);
  TrainOptions epochs;  // One, where nothing is said.
  EXPECT_EQ(PlannedSteps(epochs, stages, 320 + 160 + 640), 15 + 10);
  epochs.epochs = 0.5;
  EXPECT_EQ(PlannedSteps(epochs, stages, 640), 10);
  epochs.epochs.reset();
  epochs.max_minutes = 1;
  EXPECT_EQ(PlannedSteps(epochs, stages, 640), 0);
}

TEST(TokensByLengthTest, IsAnEpochOrAPartOfTheRun) {
  const std::vector<StageShape> stages = {{.steps = 10, .batch = 4, .sequence = 8}, {.batch = 2, .sequence = 32}};
  const auto tokens = [&](const std::string& text, int64_t steps) {
    return TokensByLength(text, steps, stages, 1000).value_or(-1);
  };
  EXPECT_EQ(tokens("", 20), 0);
  EXPECT_EQ(tokens("length", 0), 1000);
  EXPECT_EQ(tokens("length", 12), 320 + 128);
  EXPECT_EQ(tokens("length", 120), 1000);
  EXPECT_EQ(tokens("length:0.5", 20), 320);
  EXPECT_EQ(tokens("length:0.51", 20), 320 + 64);
  EXPECT_EQ(tokens("length:1", 1000), 1000);
  for (const char* wrong :
       {"len", "length:", "length:0", "length:1.01", "length:nan", "length:-1", "length:x", ":0.5"}) {
    EXPECT_THAT(TokensByLength(wrong, 20, stages, 1000),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(wrong), HasSubstr("length:0.3"))));
  }
  EXPECT_THAT(TokensByLength("length:0.5", 0, stages, 1000),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--steps")));
}

class StagesTest : public ::testing::Test {
 protected:
  static RunStage Of(const std::string& name, const std::string& passes = "none", std::vector<std::string> more = {},
                     int64_t sequence = 16, const std::string& optimizer = "adamw") {
    std::vector<std::string> sets = {"layers=1", "width=32", "heads=2"};
    sets.insert(sets.end(), more.begin(), more.end());
    absl::StatusOr<std::unique_ptr<Module>> module =
        LoadModel("tiny_char", {.batch = 2, .sequence = sequence, .vocab_size = 40, .sets = sets});
    CHECK(module.ok()) << module.status();
    absl::StatusOr<proto::PlanProto> plan = Compile(*std::move(module), {.passes = passes, .optimizer = optimizer});
    CHECK(plan.ok()) << plan.status();
    return {.path = name, .plan = *std::move(plan)};
  }
};

TEST_F(StagesTest, StatesMustBeTheSame) {
  const RunStage plain = Of("plain");
  for (const char* passes : {"bf16,pad_vocab", "fp16", "remat,fuse", "flash,chunked_loss"}) {
    EXPECT_OK(CheckSameStates(plain, Of("other", passes, {}, 32))) << passes;
    EXPECT_OK(CheckSameStates(Of("other", passes, {}, 32), plain)) << passes;
  }
  EXPECT_OK(CheckSameStates(Of("a", "adamw8bit"), Of("b", "adamw8bit,pad_vocab,bf16")));
  const auto differs = [&](const RunStage& other, const ::testing::Matcher<std::string>& message) {
    EXPECT_THAT(
        CheckSameStates(plain, other),
        StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("plain and other"), message, HasSubstr("--set"))));
    EXPECT_THAT(CheckSameStates(other, plain), StatusIs(absl::StatusCode::kInvalidArgument, message));
  };
  differs(Of("other", "none", {"width=64"}), AllOf(HasSubstr("weight is f32["), HasSubstr("64")));
  differs(Of("other", "none", {"layers=2"}), HasSubstr("h1."));
  differs(Of("other", "adamw8bit"), HasSubstr("adamw"));
  differs(Of("other", "none", {}, 16, "adam"), HasSubstr("adam"));
}

TEST_F(StagesTest, SchedulesAreRead) {
  ProcessFolder folder("stages_test_plans");
  const RunStage plain = Of("plain");
  ASSERT_OK(SavePlan(Of("short", "none", {}, 8).plan, folder.Path("short:1.plan")));
  ASSERT_OK(SavePlan(Of("wide", "none", {"width=64"}).plan, folder.Path("wide.plan")));
  const auto read = [&](const std::string& schedule) { return ReadStages(schedule, "plain.plan", plain.plan); };
  ASSERT_OK_AND_ASSIGN(const std::vector<RunStage> alone, read(""));
  ASSERT_EQ(alone.size(), 1u);
  EXPECT_EQ(alone[0].shape.sequence, 16);
  EXPECT_THAT(StagesIdentity(alone), IsEmpty());
  const std::string path = folder.Path("short:1.plan");
  ASSERT_OK_AND_ASSIGN(const std::vector<RunStage> stages, read(absl::StrCat(path, ":10,", path, ":5")));
  ASSERT_EQ(stages.size(), 3u);
  EXPECT_EQ(stages[1].first_step, 10);
  EXPECT_EQ(stages[2].first_step, 15);
  EXPECT_EQ(stages[1].shape.sequence, 8);
  for (const auto& [step, stage] : std::map<int64_t, size_t>{{0, 0}, {9, 0}, {10, 1}, {14, 1}, {15, 2}, {1000, 2}}) {
    EXPECT_EQ(StageAfter(stages, step), stage) << step;
  }
  EXPECT_THAT(StagesText(stages, 20),
              AllOf(HasSubstr("stage 1/3: steps 1-10, "), HasSubstr("stage 2/3: steps 11-15, "),
                    HasSubstr("stage 3/3: steps 16-20, plain.plan, batch 2 x 16 tokens, arena "),
                    HasSubstr("one arena at a time: ")));
  EXPECT_THAT(StagesText(stages, 0), HasSubstr("steps 16 on, plain.plan"));
  EXPECT_EQ(PeakArenaBytes(stages), std::max(stages[0].plan.arena_bytes(), plain.plan.arena_bytes()));
  EXPECT_EQ(StagesIdentity(stages)["stage 2 steps"], 5);

  constexpr auto kUsage = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(read("cosine"), StatusIs(kUsage, HasSubstr("--lr-schedule cosine")));
  for (const char* wrong : {"short.plan", "short.plan:", ":5", "short.plan:0", "short.plan:-1", "short.plan:1e3", ",",
                            "short.plan:99999999999999999999"}) {
    EXPECT_THAT(read(wrong), StatusIs(kUsage, HasSubstr("PLAN:STEPS"))) << wrong;
  }
  EXPECT_THAT(read(absl::StrCat(path, ":5,")), StatusIs(kUsage, HasSubstr("PLAN:STEPS")));
  EXPECT_THAT(read("nowhere.plan:5"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere.plan")));
  EXPECT_THAT(read(folder.Path("wide.plan:5")), StatusIs(kUsage, HasSubstr("do not train the same states")));
}

// What goes over is what a checkpoint would hold, whatever padding and precision.
TEST_F(StagesTest, StatesGoOver) {
  const auto load = [](const proto::PlanProto& plan) {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend(1);
    CHECK(backend.ok());
    absl::StatusOr<std::unique_ptr<Executor>> executor = Executor::Load(plan, *std::move(backend));
    CHECK(executor.ok()) << executor.status();
    (*executor)->InitializeStates(11);
    return *std::move(executor);
  };
  for (const auto& [from_passes, to_passes] :
       std::vector<std::pair<std::string, std::string>>{{"none", "none"},
                                                        {"none", "bf16,pad_vocab"},
                                                        {"fp16,pad_vocab", "fp16"},
                                                        {"adamw8bit", "adamw8bit,pad_vocab"},
                                                        {"accumulate:2", "fp16"}}) {
    SCOPED_TRACE(absl::StrCat(from_passes, " to ", to_passes));
    const std::unique_ptr<Executor> from = load(Of("from", from_passes).plan);
    // Numbers that nothing else has.
    for (const BoundTensor& state : from->states()) {
      if (state.role != Role::kParameter && state.role != Role::kOptimizerState) continue;
      if (state.type.dtype != DType::kF32) continue;
      int64_t elements = 1;
      for (const proto::StatePlacement& placement : from->plan().states()) {
        if (placement.state().name() != state.name) continue;
        for (const int64_t d : placement.state().logical_dims()) elements *= d;
        if (placement.state().logical_dims_size() == 0) elements = state.type.num_elements();
      }
      for (int64_t i = 0; i < elements; ++i) state.data_as<float>()[i] = static_cast<float>(i % 1000) / 64 + 1;
    }
    std::vector<SavedState> states, again;
    SnapshotStates(*from, &states);
    const std::unique_ptr<Executor> to = load(Of("to", to_passes, {}, 32).plan);
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> fresh, RestoreStates(*to, states));
    SnapshotStates(*to, &again);
    std::map<std::string, std::string> there;
    for (const SavedState& state : again) there[state.tensor.name] = state.bytes;
    for (const SavedState& state : states) {
      if (!there.contains(state.tensor.name)) {
        EXPECT_THAT(state.tensor.name, HasSubstr("loss_scale"));
        continue;
      }
      const std::string& bytes = there[state.tensor.name];
      const size_t size = std::min(bytes.size(), state.bytes.size());
      EXPECT_EQ(bytes.substr(0, size), state.bytes.substr(0, size)) << state.tensor.name;
    }
    EXPECT_EQ(fresh.empty(), !absl::StrContains(to_passes, "fp16") || absl::StrContains(from_passes, "fp16"));
  }
}

// As a user does it.
class ScheduleTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("schedule_test");
    folder_->Write("text", absl::StrCat(GeneratedText(20), TextOfManyLengths(60)));
    const std::string compile = "mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2,dropout=0.1 ";
    const Outcome made = Run(absl::StrCat("mtcorpus prep --input text --out corpus --tokenizer char && ", compile,
                                          "--batch 8 --seq 8 --passes none -o short.plan && ", compile,
                                          "--batch 4 --seq 16 --passes bf16,pad_vocab -o mid.plan && ", compile,
                                          "--batch 3 --seq 32 --passes none -o long.plan && ", compile,
                                          "--batch 3 --seq 32 --passes none --optimizer adam -o adam.plan"));
    ASSERT_EQ(made.code, 0) << made.err;
  }
  static void TearDownTestSuite() { delete folder_; }

  static Outcome Run(const std::string& command) { return folder_->Run(command); }
  // Lines without times.
  static std::vector<nlohmann::json> Metrics(const std::string& run) {
    std::vector<nlohmann::json> lines;
    for (const absl::string_view line : absl::StrSplit(folder_->Read(run + "/metrics.jsonl"), '\n')) {
      nlohmann::json json = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
      if (!json.is_object()) continue;
      json.erase("step_seconds");
      json.erase("tokens_per_second");
      lines.push_back(std::move(json));
    }
    return lines;
  }
  static void ExpectSameEnd(const std::string& a, const std::string& b, int64_t steps) {
    const std::string optimizer = absl::StrCat("/step-", steps, "/optimizer.safetensors");
    EXPECT_EQ(folder_->Read(a + "/model.safetensors"), folder_->Read(b + "/model.safetensors"));
    EXPECT_FALSE(folder_->Read(a + optimizer).empty());
    EXPECT_EQ(folder_->Read(a + optimizer), folder_->Read(b + optimizer));
    EXPECT_EQ(Metrics(a), Metrics(b));
  }

  static ProcessFolder* folder_;
};

ProcessFolder* ScheduleTest::folder_ = nullptr;

constexpr char kRun[] =
    "mtrun long.plan --schedule short.plan:10,mid.plan:8 --data corpus --lr 1e-2 --lr-schedule plateau --patience 1 "
    "--steps 26 --save-every 1 --keep 100 --eval-every 5 --eval-batches 2 ";

TEST_F(ScheduleTest, ThreeStages) {
  const Outcome outcome = Run(absl::StrCat(kRun, "--out three --measure"));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("stage 1/3: steps 1-10, short.plan, batch 8 x 8 tokens, arena "),
                                 HasSubstr("stage 3/3: steps 19-26, long.plan, batch 3 x 32 tokens, arena "),
                                 HasSubstr("one arena at a time: "), HasSubstr("step 26/26"), HasSubstr("val  ")));
  int64_t agreements = 0;
  for (const absl::string_view line : absl::StrSplit(outcome.out, '\n')) {
    agreements += absl::StrContains(line, "planned = measured; same bits") ? 1 : 0;
  }
  EXPECT_EQ(agreements, 3) << outcome.out;
  for (const nlohmann::json& line : Metrics("three")) {
    const int64_t step = line["step"];
    EXPECT_EQ(line["seq"], step <= 10 ? 8 : step <= 18 ? 16 : 32) << line;
    EXPECT_EQ(line["plan"], step <= 10 ? "short.plan" : step <= 18 ? "mid.plan" : "long.plan") << line;
  }
  const nlohmann::json summary = folder_->ReadJson("three/summary.json");
  EXPECT_EQ(summary["steps"], 26);
  EXPECT_EQ(summary["tokens"], 10 * 64 + 8 * 64 + 8 * 96);
  ASSERT_EQ(summary["stages"].size(), 3u);
  EXPECT_EQ(summary["stages"][1]["seq"], 16);
  EXPECT_EQ(summary["stages"][1]["first_step"], 11);
  const nlohmann::json memory = folder_->ReadJson("three/memory.json");
  ASSERT_EQ(memory["stages"].size(), 3u);
  for (const nlohmann::json& stage : memory["stages"]) EXPECT_EQ(stage["measured_arena_bytes"], stage["arena_bytes"]);
  // Nothing is passed over but the seven sequences of 16 that no sequence of 32 starts at.
  const nlohmann::json progress = folder_->ReadJson("three/step-26/manifest.json")["progress"];
  EXPECT_EQ(progress["samples"], (10 * 64 + 8 * 64) / 32 + 8 * 3);
  EXPECT_EQ(progress["sequence"], 32);
}

// From each step on: in each stage, and at and beside its edges.
TEST_F(ScheduleTest, ResumesAnywhereToTheBit) {
  const Outcome whole = Run(absl::StrCat(kRun, "--out whole"));
  ASSERT_EQ(whole.code, 0) << whole.err;
  for (const int64_t stop : {3, 9, 10, 11, 14, 17, 18, 19, 25}) {
    SCOPED_TRACE(stop);
    ASSERT_EQ(Run("rm -rf again && cp -r whole again && rm again/summary.json").code, 0);
    for (int64_t step = stop + 1; step <= 26; ++step) ASSERT_EQ(Run(absl::StrCat("rm -r again/step-", step)).code, 0);
    const Outcome rest = Run(absl::StrCat(kRun, "--out again"));
    ASSERT_EQ(rest.code, 0) << rest.err;
    EXPECT_THAT(rest.out, AllOf(HasSubstr(absl::StrCat("step ", stop + 1, "/26")),
                                Not(HasSubstr(absl::StrCat("step ", stop, "/26")))));
    ExpectSameEnd("again", "whole", 26);
  }
  // Killed, wherever that is.
  Run("rm -rf again");
  for (int attempt = 0; attempt < 4; ++attempt) {
    Run(absl::StrCat(kRun, "--out again & pid=$!\nsleep 0.", attempt + 1, "\nkill -9 $pid 2> /dev/null\nwait $pid"));
  }
  ASSERT_EQ(Run(absl::StrCat(kRun, "--out again")).code, 0);
  ExpectSameEnd("again", "whole", 26);
  // Another schedule is another run.
  const auto refused = [&](const std::string& schedule, const ::testing::Matcher<const std::string&>& message) {
    folder_->ExpectError(absl::StrCat(kRun, "--out whole ", schedule), 2, AllOf(message, HasSubstr("--fresh")));
  };
  refused("--schedule short.plan:11,mid.plan:8", HasSubstr("stage 1 steps is 10 there, 11 here"));
  refused("--schedule short.plan:10,short.plan:8",
          AllOf(HasSubstr("stage 2 seq is 16 there, 8 here"), HasSubstr("stage 2 plan is ")));
  refused("--schedule short.plan:10", HasSubstr("stage 2 steps is 8 there, not given here"));
  refused("--curriculum length", HasSubstr("curriculum is not given there, length here"));
}

TEST_F(ScheduleTest, TheSamePlanInAllStagesIsNoSchedule) {
  const char* command =
      "mtrun short.plan --data corpus --lr 1e-2 --steps 12 --save-every 4 --eval-every 3 --tensorboard --out ";
  ASSERT_EQ(Run(absl::StrCat(command, "alone")).code, 0);
  const Outcome twice = Run(absl::StrCat(command, "twice --schedule short.plan:5,short.plan:2"));
  ASSERT_EQ(twice.code, 0) << twice.err;
  const std::string optimizer = "/step-12/optimizer.safetensors";
  EXPECT_EQ(folder_->Read("alone/model.safetensors"), folder_->Read("twice/model.safetensors"));
  EXPECT_EQ(folder_->Read("alone" + optimizer), folder_->Read("twice" + optimizer));
  std::vector<nlohmann::json> metrics = Metrics("twice");
  for (nlohmann::json& line : metrics) line.erase("plan");
  EXPECT_EQ(Metrics("alone"), metrics);
}

// A step that fails in the second stage goes back into the first, and through the edge again. A loss above the mean of
// the steps before it counts as a failure here; the mean is of 20 steps of one length, which the first stage has not.
TEST_F(ScheduleTest, SetbacksCrossTheEdge) {
  const Outcome outcome =
      Run("mtrun long.plan --schedule short.plan:18,mid.plan:22 --data corpus --steps 43 --save-every 41 "
          "--out bumps --lr 0 --spike 1e-9");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  std::vector<std::string> warnings = absl::StrSplit(outcome.err, '\n', absl::SkipEmpty());
  ASSERT_FALSE(warnings.empty());
  for (const std::string& warning : warnings) {
    EXPECT_THAT(warning, ::testing::ContainsRegex("warning: step (39|40): the loss rose .* back to step 0, "));
  }
  int64_t entered = 0;
  for (const absl::string_view line : absl::StrSplit(outcome.out, '\n')) {
    entered += absl::StartsWith(line, "stage 2/3: ") ? 1 : 0;
  }
  EXPECT_EQ(entered, 2 + static_cast<int64_t>(warnings.size())) << "once it is told beforehand";
  std::vector<int64_t> steps;
  for (const nlohmann::json& line : Metrics("bumps")) {
    if (!line.contains("loss")) continue;
    steps.push_back(line["step"]);
    EXPECT_EQ(line["seq"], steps.back() <= 18 ? 8 : steps.back() <= 40 ? 16 : 32) << line;
  }
  for (size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i], static_cast<int64_t>(i) + 1);
  EXPECT_EQ(steps.size(), 43u);
}

TEST_F(ScheduleTest, WhatCannotBe) {
  const std::string run = "mtrun long.plan --data corpus --steps 20 --out none ";
  folder_->ExpectError(run + "--schedule cosine", 2, HasSubstr("--lr-schedule cosine"));
  folder_->ExpectError(run + "--schedule short.plan", 2, HasSubstr("PLAN:STEPS"));
  folder_->ExpectError(run + "--schedule nowhere.plan:3", 4, HasSubstr("nowhere.plan"));
  folder_->ExpectError(run + "--schedule short.plan:20", 2,
                       AllOf(HasSubstr("20 steps"), HasSubstr("long.plan"), HasSubstr("--steps")));
  folder_->ExpectError(run + "--schedule adam.plan:5", 2, HasSubstr("do not train the same states"));
  folder_->ExpectError("mtrun long.plan --data corpus --eval val --schedule short.plan:5", 2, HasSubstr("--eval"));
  folder_->ExpectError(run + "--curriculum width", 2, AllOf(HasSubstr("width"), HasSubstr("length")));
  folder_->ExpectError(run + "--curriculum length:1.5", 2, HasSubstr("1.5"));
  folder_->ExpectError("mtrun long.plan --data corpus --max-minutes 1 --curriculum length:0.5", 2,
                       HasSubstr("--steps"));
}

TEST_F(ScheduleTest, Curriculum) {
  const std::string command =
      "mtrun long.plan --schedule short.plan:7 --data corpus --steps 16 --save-every 1 --keep 100 --seed 5 --out ";
  ASSERT_EQ(Run(command + "shuffled").code, 0);
  const Outcome sorted = Run(command + "sorted --curriculum length");
  ASSERT_EQ(sorted.code, 0) << sorted.err;
  EXPECT_THAT(sorted.out, HasSubstr("documents from short to long over the first "));
  EXPECT_NE(folder_->Read("sorted/model.safetensors"), folder_->Read("shuffled/model.safetensors"));
  ASSERT_EQ(Run(command + "half --curriculum length:0.5").code, 0);
  EXPECT_NE(folder_->Read("sorted/model.safetensors"), folder_->Read("half/model.safetensors"));
  ASSERT_EQ(Run("rm -rf again && cp -r half again && rm -r again/summary.json again/step-?? again/step-[6789]").code,
            0);
  const Outcome again = Run(command + "again --curriculum length:0.5");
  ASSERT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.out, HasSubstr("goes on from again/step-5"));
  ExpectSameEnd("again", "half", 16);
  folder_->ExpectError(command + "half --curriculum length", 2,
                       HasSubstr("curriculum is length:0.5 there, length here"));
}

}  // namespace
}  // namespace mt
