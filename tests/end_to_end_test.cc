// Text to trained model through the real programs.
#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "codegen/plan/plan.h"
#include "ir/base/check.h"
#include "runtime/allocations.h"
#include "runtime/data/safetensors.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

extern char** environ;

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

std::vector<Json> JsonLines(const std::string& text) {
  std::vector<Json> lines;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    lines.push_back(Json::parse(line.begin(), line.end(), nullptr, false));
  }
  return lines;
}

std::vector<double> Losses(const std::vector<Json>& lines) {
  std::vector<double> losses;
  for (const Json& line : lines) {
    if (line.contains("loss")) losses.push_back(line["loss"]);
  }
  return losses;
}

class EndToEnd : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("end_to_end_test");
    folder_->Write("text", GeneratedText(80));
    const Outcome prepared = folder_->Run("mtcorpus prep --input text --out corpus --tokenizer char");
    ASSERT_EQ(prepared.code, 0) << prepared.err;
  }
  static void TearDownTestSuite() { delete folder_; }
  static Outcome Run(const std::string& command) { return folder_->Run(command); }

  static ProcessFolder* folder_;
};

ProcessFolder* EndToEnd::folder_ = nullptr;

TEST_F(EndToEnd, TrainsBelowTheUnigramEntropyAndWritesEverything) {
  Outcome step =
      Run("mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2,dropout=0.05 --batch 8 --seq 32 -o "
          "tiny.plan");
  ASSERT_EQ(step.code, 0) << step.err;
  step = Run(
      "mtrun tiny.plan --data corpus --steps 150 --lr 1e-2 --warmup 10 --log-every 50 --eval-every 70 --eval-batches 1 "
      "--measure --out run");
  ASSERT_EQ(step.code, 0) << step.err;
  EXPECT_THAT(step.out,
              AllOf(HasSubstr("planned = measured"), HasSubstr("bigram cross-entropy"), HasSubstr("step 150")));
  EXPECT_EQ(step.err, "");

  const std::vector<Json> lines = JsonLines(folder_->Read("run/metrics.jsonl"));
  int64_t steps = 0, evals = 0;
  for (const Json& line : lines) {
    ASSERT_TRUE(line.is_object());
    if (line.contains("eval_loss")) {
      ++evals;
      EXPECT_EQ(line["split"], "val");
      continue;
    }
    EXPECT_EQ(line["step"], ++steps);
    std::set<std::string> keys;
    for (const auto& [key, value] : line.items()) keys.insert(key);
    EXPECT_THAT(keys, ::testing::UnorderedElementsAre("step", "loss", "lr", "grad_norm", "step_seconds",
                                                      "tokens_per_second", "mfu", "seq"));
    EXPECT_TRUE(line["step"].is_number_integer());
  }
  EXPECT_EQ(steps, 150);
  EXPECT_EQ(evals, 2);

  const Json summary = folder_->ReadJson("run/summary.json");
  ASSERT_TRUE(summary.is_object());
  for (const char* split : {"val", "test"}) {
    const Json& eval = summary["eval"][split];
    std::printf("%s: loss %.4f, unigram entropy %.4f, bigram entropy %.4f\n", split, eval["loss"].get<double>(),
                eval["unigram_entropy"].get<double>(), eval["bigram_entropy"].get<double>());
    EXPECT_LT(eval["loss"], eval["unigram_entropy"]);
    EXPECT_NEAR(eval["perplexity"], std::exp(eval["loss"].get<double>()), 1e-9);
  }
  for (const char* key :
       {"model", "target", "passes", "plan_fingerprint", "steps", "config", "versions", "hardware", "command"}) {
    EXPECT_TRUE(summary.contains(key)) << key;
  }
  EXPECT_EQ(summary["steps"], 150);
  EXPECT_EQ(summary["tokens"], 150 * 8 * 32);
  EXPECT_EQ(summary["interrupted"], false);

  const Json memory = folder_->ReadJson("run/memory.json");
  ASSERT_TRUE(memory.is_object());
  EXPECT_EQ(memory["agree"], true);
  EXPECT_EQ(memory["planned"], memory["measured"]);
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, LoadPlan(folder_->Path("tiny.plan")));
  EXPECT_EQ(memory["planned"]["arena_bytes"], FindProgram(plan, "train")->peak_bytes());
  for (const char* phase : {"forward", "backward", "optimizer"}) {
    EXPECT_GT(memory["measured"]["by_phase"][phase]["written_bytes"], 0) << phase;
  }
  EXPECT_GT(memory["process_bytes"], plan.arena_bytes());
  EXPECT_GT(memory["context_bytes"], 0);
  EXPECT_EQ(memory["allocations_after_load"], CanCountAllocations() ? Json(0) : Json(nullptr));

  // Names and shapes of the weights are the plan's parameters.
  ASSERT_OK_AND_ASSIGN(const auto weights, SafetensorsReader::Open(folder_->Path("run/model.safetensors")));
  size_t parameters = 0;
  for (const proto::StatePlacement& placement : plan.states()) {
    if (placement.state().role() != "parameter") continue;
    ++parameters;
    const SafetensorsTensor* tensor = weights->Find(placement.state().name());
    ASSERT_NE(tensor, nullptr) << placement.state().name();
    EXPECT_EQ(tensor->type, SafetensorsType::kF32);
    EXPECT_EQ(tensor->shape,
              std::vector<int64_t>(placement.state().type().dims().begin(), placement.state().type().dims().end()));
  }
  EXPECT_EQ(weights->tensors().size(), parameters);

  // The weights give the loss of the run.
  const Outcome eval = Run("mtrun tiny.plan --data corpus --init run --eval val");
  ASSERT_EQ(eval.code, 0) << eval.err;
  EXPECT_THAT(eval.out, HasSubstr(absl::StrFormat("loss %.4f", summary["eval"]["val"]["loss"].get<double>())));

  // The command in the summary repeats the run to the bit.
  const Outcome again = Run(absl::StrCat(summary["command"].get<std::string>(), " --fresh --threads 1"));
  ASSERT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(Losses(JsonLines(folder_->Read("run/metrics.jsonl"))), Losses(lines));

  // Starting from them is better than starting from nothing.
  ASSERT_EQ(Run("mtrun tiny.plan --data corpus --init run --steps 1 --out more").code, 0);
  EXPECT_LT(Losses(JsonLines(folder_->Read("more/metrics.jsonl")))[0], Losses(lines)[0] - 0.5);
}

TEST_F(EndToEnd, OneCommandCompilesAndTrains) {
  const Outcome outcome =
      Run("mtc train tiny_char --data corpus --set layers=1,width=32,heads=2 --batch 4 --seq 16 --steps 3 --lr 1e-2 "
          "--out one_command");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(JsonLines(folder_->Read("one_command/metrics.jsonl")).size(), 3u);
}

TEST_F(EndToEnd, LlamaStyleTrains) {
  Outcome step = Run(
      "mtc compile llama_160m --data corpus --set layers=2,width=48,heads=4,kv_heads=2,ffn_width=96 --batch 4 --seq 32 "
      "-o llama.plan && "
      "mtrun llama.plan --data corpus --steps 120 --lr 1e-2 --warmup 10 --log-every 60 --measure --out llama");
  ASSERT_EQ(step.code, 0) << step.err;
  const Json summary = folder_->ReadJson("llama/summary.json");
  EXPECT_LT(summary["eval"]["val"]["loss"], summary["eval"]["val"]["unigram_entropy"]);
  EXPECT_EQ(folder_->ReadJson("llama/memory.json")["agree"], true);
}

// What the comment of the raw graph says: its vocabulary is its own, the corpus is made to fit.
TEST_F(EndToEnd, TheRawGraphTrains) {
  std::string text;
  uint64_t state = 99;
  for (int i = 0; i < 6000; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t word = (state >> 33) % 400;
    for (uint64_t k = 0, bits = word * 2654435761u + 17; k < 3; ++k, bits /= 60) {
      text += "bdfgklmnprst"[bits % 12];
      text += "aeiou"[bits / 12 % 5];
    }
    text += i % 10 == 9 ? "\n" : " ";
    if (i % 100 == 99) text += "\n";
  }
  folder_->Write("syllables", text);
  Outcome step = Run("mtcorpus prep --input syllables --out bpe --tokenizer bpe:512");
  ASSERT_EQ(step.code, 0) << step.err;
  step =
      Run("mtc compile parallel_block --data bpe -o parallel.plan && "
          "mtrun parallel.plan --data bpe --steps 60 --lr 1e-2 --warmup 5 --log-every 30 --measure --out parallel");
  ASSERT_EQ(step.code, 0) << step.err;
  const Json summary = folder_->ReadJson("parallel/summary.json");
  std::printf("val loss %.4f, unigram entropy %.4f\n", summary["eval"]["val"]["loss"].get<double>(),
              summary["eval"]["val"]["unigram_entropy"].get<double>());
  EXPECT_LT(summary["eval"]["val"]["loss"], summary["eval"]["val"]["unigram_entropy"]);
  EXPECT_EQ(folder_->ReadJson("parallel/memory.json")["agree"], true);

  // With a corpus of another vocabulary both tools print what makes a fitting one.
  for (const char* command : {"mtc compile parallel_block --data corpus", "mtrun parallel.plan --data corpus"}) {
    const Outcome refused = Run(command);
    EXPECT_NE(refused.code, 0);
    EXPECT_THAT(refused.err, HasSubstr("mtcorpus prep --input TEXT --out DIR --tokenizer bpe:512")) << command;
  }
}

// The kernel's own figure for the largest resident set of one process: mtrun's, one step.
int64_t PeakOfOneStep(const std::string& plan, const std::string& corpus) {
  const std::string tool = absl::StrCat(MT_BINARY_DIR, "/bin/mtrun");
  std::vector<std::string> arguments = {tool, plan, "--data", corpus, "--steps", "1", "--threads", "2"};
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = 0;
  CHECK_EQ(posix_spawn(&pid, tool.c_str(), &actions, nullptr, argv.data(), environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  int status = 0;
  rusage usage = {};
  CHECK_EQ(wait4(pid, &status, 0, &usage), pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0) << plan << ": " << status;
  return int64_t{usage.ru_maxrss} << 10;
}

TEST_F(EndToEnd, PeakResidentBytesDifferAsThePlansDo) {
#ifdef MT_SANITIZED
  GTEST_SKIP() << "a sanitizer's shadow memory grows with the arena";
#endif
  int64_t arena[2] = {}, peak[2] = {};
  const int64_t batches[2] = {4, 16};
  for (int i = 0; i < 2; ++i) {
    const std::string plan = absl::StrCat("rss", batches[i], ".plan");
    const Outcome compiled =
        Run(absl::StrCat("mtc compile lab4 --data corpus --set layers=2,width=64,heads=4,",
                         "ffn_width=128 --seq 512 --passes none --batch ", batches[i], " -o ", plan));
    ASSERT_EQ(compiled.code, 0) << compiled.err;
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto proto, LoadPlan(folder_->Path(plan)));
    arena[i] = proto.arena_bytes();
    peak[i] = PeakOfOneStep(folder_->Path(plan), folder_->Path("corpus"));
  }
  const double planned = static_cast<double>(arena[1] - arena[0]), measured = static_cast<double>(peak[1] - peak[0]);
  std::printf("batch 4 and 16: arenas differ by %.1f MiB, peak resident sets by %.1f MiB: ratio %.4f\n",
              planned / (1 << 20), measured / (1 << 20), measured / planned);
  EXPECT_GE(planned, 100 << 20);
  EXPECT_NEAR(measured / planned, 1, 0.02);
}

}  // namespace
}  // namespace mt
