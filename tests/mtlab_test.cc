// mtlab as a process: a suite that is killed and continues, what it leaves behind, and bad input.
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "bench/lab/suite.h"
#include "passes/pipeline.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kSuite[] = R"(name: "small"
model: "tiny_char"
set: "layers=1"
set: "width=32"
set: "heads=2"
batch: 2
seq: 16
train { steps: 12 lr: 1e-2 warmup: 2 }
runs { name: "baseline" passes: "none" }
runs { name: "flash_attn" passes: "flash" }
runs { name: "window_4" passes: "flash:window=4" }
)";

class MtlabTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("mtlab_test");
    folder_->Write("text", GeneratedText(60));
    const Outcome prepared = folder_->Run("mtcorpus prep --input text --out corpus --tokenizer char");
    ASSERT_EQ(prepared.code, 0) << prepared.err;
    folder_->Write("small.textproto", kSuite);
  }
  static void TearDownTestSuite() { delete folder_; }

  static Outcome Run(const std::string& command) { return folder_->Run(command); }
  static void ExpectError(const std::string& command, int code, const ::testing::Matcher<const std::string&>& message) {
    folder_->ExpectError(command, code, message);
  }
  static std::string Metrics(const std::string& out, const std::string& run) {
    return absl::StrCat(out, "/corpus_", run, "_metrics.json");
  }

  static ProcessFolder* folder_;
};

ProcessFolder* MtlabTest::folder_ = nullptr;

TEST_F(MtlabTest, AKilledSuiteContinues) {
  // Long enough that the second run cannot end between the first one's results and the signal.
  const std::string command = "mtlab run small.textproto --data corpus --steps 400 --out killed";
  const Outcome killed = Run(absl::StrCat(command, " > log 2>&1 & pid=$!\nwhile [ ! -e ", Metrics("killed", "baseline"),
                                          " ] && kill -0 $pid; do sleep 0.01; done\nkill -9 $pid; wait $pid; echo $?"));
  EXPECT_EQ(killed.out, "137\n");
  EXPECT_FALSE(folder_->Exists(Metrics("killed", "flash_attn")));
  const std::string first = folder_->Read(Metrics("killed", "baseline"));
  ASSERT_NE(first, "");
  // The run that was under way has died with it, and holds no lock.
  const Outcome rest = Run(command);
  ASSERT_EQ(rest.code, 0) << rest.err;
  EXPECT_THAT(rest.out, HasSubstr("[1/3] baseline         finished before, kept\n"));
  EXPECT_EQ(folder_->Read(Metrics("killed", "baseline")), first);
  for (const char* run : {"baseline", "flash_attn", "window_4"}) {
    EXPECT_TRUE(folder_->Exists(Metrics("killed", run))) << run;
    const nlohmann::json memory = folder_->ReadJson(absl::StrCat("killed/corpus_", run, "_memory.json"));
    EXPECT_EQ(memory["planned"]["arena_bytes"], memory["measured"]["arena_bytes"]) << run;
    EXPECT_EQ(memory["agree"], true) << run;
  }
  const Outcome again = Run(command);
  EXPECT_EQ(again.code, 0);
  EXPECT_THAT(again.out, Not(HasSubstr("compiles")));

  // SIGTERM is passed on: the tool ends as interrupted, and says how to continue.
  const Outcome stopped =
      Run("mtlab run small.textproto --data corpus --steps 100000 --out stopped > log 2> err & pid=$!\n"
          "while [ ! -e stopped/runs/corpus_baseline/train/metrics.jsonl ] && kill -0 $pid; do sleep 0.01; done\n"
          "kill -TERM $pid; wait $pid; echo $?; cat err");
  EXPECT_THAT(stopped.out, AllOf(HasSubstr("130\n"), HasSubstr("interrupted"), HasSubstr("continues")));
  EXPECT_FALSE(folder_->Exists(Metrics("stopped", "baseline")));
}

TEST_F(MtlabTest, TheTableAndTheFiles) {
  const Outcome outcome = Run("mtlab run small.textproto --data corpus --out table");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  for (const char* column : {"EXPERIMENT COMPARISON TABLE", "Technique", "Batch Size", "Val PPL", "Train Time",
                             "Peak Mem (MB)", "Parameters", "Speedup", "Planned = measured", "yes, "}) {
    EXPECT_THAT(outcome.out, HasSubstr(column));
  }
  const nlohmann::json metrics = folder_->ReadJson(Metrics("table", "window_4"));
  EXPECT_EQ(metrics["steps"], 12);
  EXPECT_EQ(metrics["losses"].size(), 12u);
  EXPECT_EQ(metrics["batch_size"], 2);
  EXPECT_EQ(metrics["sequence_length"], 16);
  EXPECT_EQ(metrics["passes"], "flash:window=4");
  EXPECT_EQ(metrics["dtypes"]["parameters"], "f32");
  EXPECT_GT(metrics["val_perplexity"], 1.0);
  EXPECT_EQ(metrics["config"]["lr"], 1e-2);
  EXPECT_THAT(metrics["commands"]["compile"].get<std::string>(), HasSubstr("mtc compile tiny_char --data corpus"));

  const nlohmann::json summary = folder_->ReadJson("table/experiment_summary.json");
  ASSERT_EQ(summary["results"].size(), 3u);
  EXPECT_EQ(summary["results"][0]["speedup"], 1.0);
  EXPECT_EQ(summary["results"][0]["same_losses_as_baseline"], true);
  EXPECT_EQ(summary["results"][2]["same_losses_as_baseline"], false) << "a window of 4 is another model";
  EXPECT_EQ(summary["runs"][2]["status"], "finished");
  EXPECT_THAT(outcome.out, HasSubstr(folder_->Read("table/comparison_report.txt")));

  const Outcome compared = Run("mtlab compare --results-dir table --experiments window_4,baseline");
  EXPECT_EQ(compared.code, 0) << compared.err;
  EXPECT_THAT(compared.out, AllOf(HasSubstr("window_4"), Not(HasSubstr("flash_attn "))));
  const Outcome json = Run("mtlab compare --results-dir table --json");
  EXPECT_EQ(nlohmann::json::parse(json.out, nullptr, false)["results"].size(), 3u);
}

TEST_F(MtlabTest, FinishedRunsAreOfTheSameSettings) {
  const std::string command = "mtlab run small.textproto --data corpus --out settings --only baseline";
  ASSERT_EQ(Run(command + " --steps 3").code, 0);
  ExpectError(command + " --steps 4", 2, AllOf(HasSubstr("other settings"), HasSubstr("--fresh")));
  ExpectError(command + " --steps 3 --batch 4", 2, HasSubstr("--batch 4"));
  EXPECT_EQ(Run(command + " --steps 4 --fresh").code, 0);
  EXPECT_EQ(folder_->ReadJson(Metrics("settings", "baseline"))["steps"], 4);
}

TEST_F(MtlabTest, AFailedRunDoesNotKeepTheOthersFromRunning) {
  folder_->Write("fails.textproto", absl::StrCat(kSuite,
                                                 "runs { name: \"bad\" passes: \"flash:window=0\" }\n"
                                                 "runs { name: \"last\" passes: \"none\" }\n"));
  const Outcome outcome = Run("mtlab run fails.textproto --data corpus --out fails --only bad,last --steps 2");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("error: run bad: "), HasSubstr("window")));
  EXPECT_TRUE(folder_->Exists(Metrics("fails", "last")));
  const nlohmann::json runs = folder_->ReadJson("fails/experiment_summary.json")["runs"];
  EXPECT_EQ(runs[0]["status"], "failed");
  EXPECT_EQ(runs[1]["status"], "finished");
}

TEST_F(MtlabTest, BadInput) {
  ExpectError("mtlab run labb8 --data corpus", 4, AllOf(HasSubstr("labb8"), HasSubstr("did you mean lab8?")));
  ExpectError("mtlab run small.textproto", 2, AllOf(HasSubstr("--data"), HasSubstr("mtcorpus prep")));
  ExpectError("mtlab run small.textproto --data nowhere", 4, AllOf(HasSubstr("nowhere"), HasSubstr("mtcorpus prep")));
  ExpectError("mtlab run small.textproto --data corpus --only baselin", 2,
              AllOf(HasSubstr("baselin"), HasSubstr("did you mean baseline?")));
  ExpectError("mtlab run small.textproto --data corpus --only baseline --skip baseline", 2, HasSubstr("no run"));
  ExpectError("mtlab run small.textproto --data corpus --eval val", 2, HasSubstr("--eval"));
  ExpectError("mtlab run small.textproto --data corpus --passes flash", 2,
              AllOf(HasSubstr("--passes"), HasSubstr("mtc")));
  ExpectError("mtlab run small.textproto --data corpus --dataset a/b", 2, HasSubstr("a/b"));
  const std::map<std::string, std::string> suites = {
      {"model: \"m\" runs { name: \"a\" }", "name is missing"},
      {"name: \"s\" runs { name: \"a\" }", "model is missing"},
      {"name: \"s\" model: \"m\"", "no runs"},
      {"name: \"s\" model: \"m\" runs { name: \"a\" } runs { name: \"a\" }", "two runs are called a"},
      {"name: \"s\" model: \"m\" runs { name: \"../a\" }", "cannot name a run"},
      {"name: \"s\" model: \"m\" batch: -1 runs { name: \"a\" }", "negative"},
      {"name: \"s\"\nmodle: \"m\"", "line 2, column"},
  };
  for (const auto& [text, message] : suites) {
    folder_->Write("bad.textproto", text);
    ExpectError("mtlab run bad.textproto --data corpus", 2, AllOf(HasSubstr("bad.textproto"), HasSubstr(message)));
  }
  ExpectError("mtlab compare --results-dir nowhere", 4, AllOf(HasSubstr("nowhere"), HasSubstr("mtlab run")));
  ASSERT_EQ(Run("mkdir -p empty edited").code, 0);
  ExpectError("mtlab compare --results-dir empty", 4, HasSubstr("no run has finished"));
  folder_->Write("edited/corpus_a_metrics.json", "{\"version\": 1, \"technique\": 7}");
  ExpectError("mtlab compare --results-dir edited", 4, AllOf(HasSubstr("technique"), HasSubstr("a string")));
  folder_->Write("edited/corpus_a_metrics.json", "not JSON");
  ExpectError("mtlab compare --results-dir edited", 4, HasSubstr("not a JSON object"));
}

TEST(SuitesTest, ThoseThatComeWithMtAreComplete) {
  const std::vector<std::string> known = KnownSuites();
  EXPECT_THAT(known, ::testing::Contains("lab8"));
  for (const std::string& name : known) {
    ASSERT_OK_AND_ASSIGN(const proto::Suite suite, LoadSuite(name));
    EXPECT_EQ(suite.name(), name);
    for (const proto::RunSpec& run : suite.runs()) {
      EXPECT_OK(ParsePipeline(run.passes())) << name << " " << run.name();
    }
  }
  ASSERT_OK_AND_ASSIGN(const proto::Suite lab8, LoadSuite("lab8"));
  std::vector<std::string> names;
  for (const proto::RunSpec& run : lab8.runs()) names.push_back(run.name());
  EXPECT_THAT(names, ::testing::ElementsAre("baseline", "bf16", "flash_attn", "window_512", "window_256",
                                            "grad_checkpoint", "bf16_gradcp", "flash_gradcp"));
}

}  // namespace
}  // namespace mt
