// mtrun as a process: bad input gives one line, the right exit code and nothing half-written; what its modes print.
#include <sys/mount.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "runtime/data/corpus.h"
#include "runtime/data/crc32c.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class MtrunTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("mtrun_cli_test");
    folder_->Write("text", GeneratedText(60));
    const Outcome prepared = folder_->Run("mtcorpus prep --input text --out corpus --tokenizer char");
    ASSERT_EQ(prepared.code, 0) << prepared.err;
    const Outcome compiled = folder_->Run(
        "mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2 --batch 4 --seq 32 -o tiny.plan");
    ASSERT_EQ(compiled.code, 0) << compiled.err;
  }
  static void TearDownTestSuite() { delete folder_; }

  static Outcome Run(const std::string& command) { return folder_->Run(command); }
  static void ExpectError(const std::string& command, int code, const ::testing::Matcher<const std::string&>& message) {
    folder_->ExpectError(command, code, message);
  }

  static ProcessFolder* folder_;
};

ProcessFolder* MtrunTest::folder_ = nullptr;

TEST_F(MtrunTest, PlansThatCannotBeRead) {
  ExpectError("mtrun nowhere.plan --data corpus --out run", 4, HasSubstr("nowhere.plan"));
  const std::string plan = folder_->Read("tiny.plan");
  ASSERT_GT(plan.size(), 1000u);
  folder_->Write("short.plan", plan.substr(0, plan.size() - 7));
  ExpectError("mtrun short.plan --data corpus --out run", 4, AllOf(HasSubstr("short.plan"), HasSubstr("truncated")));
  std::string edited = plan;
  edited[edited.size() / 2] ^= 4;
  folder_->Write("edited.plan", edited);
  ExpectError("mtrun edited.plan --data corpus --out run", 4, AllOf(HasSubstr("edited.plan"), HasSubstr("edited")));
  folder_->Write("text.plan", "This is no plan.");
  ExpectError("mtrun text.plan --dry-run", 4, HasSubstr("not a plan"));
  folder_->Write("empty.plan", "");
  ExpectError("mtrun empty.plan --dry-run", 4, HasSubstr("empty.plan"));
}

TEST_F(MtrunTest, Usage) {
  ExpectError("mtrun tiny.plan", 2, AllOf(HasSubstr("--data"), HasSubstr("mtcorpus prep")));
  ExpectError("mtrun tiny.plan --data corpus --steps abc", 2, AllOf(HasSubstr("--steps"), HasSubstr("abc")));
  ExpectError("mtrun tiny.plan --data corpus --steps -3", 2, HasSubstr("--steps"));
  ExpectError("mtrun tiny.plan --data corpus --matmul-algos best", 2, AllOf(HasSubstr("best"), HasSubstr("heuristic")));
  ExpectError("mtrun tiny.plan --data corpus --matmul-algos heuristic", 2,
              AllOf(HasSubstr("cuBLASLt"), HasSubstr("cpu")));
  ExpectError("mtrun tiny.plan --data corpus --batch 4", 2, AllOf(HasSubstr("--batch"), HasSubstr("mtc")));
  ExpectError("mtrun tiny.plan --data corpus --stpes 4", 2, HasSubstr("--steps"));
  ExpectError("mtrun tiny.plan --data corpus --lr-schedule zigzag", 2,
              AllOf(HasSubstr("zigzag"), HasSubstr("plateau")));
  ExpectError("mtrun tiny.plan --data corpus --eval dev", 2, HasSubstr("dev"));
  ExpectError("mtrun --data corpus", 2, HasSubstr("PLAN"));
}

TEST_F(MtrunTest, CorporaThatCannotBeUsed) {
  ExpectError("mtrun tiny.plan --data nowhere --out run", 4, HasSubstr("nowhere"));
  folder_->Write("few", "stone\n\nriver\n\nlight\n\nletter\n\nsilent winter\n\n");
  ASSERT_EQ(Run("mtcorpus prep --input few --out short_corpus --tokenizer corpus/tokenizer.json").code, 0);
  ExpectError("mtrun tiny.plan --data short_corpus --out run", 4, AllOf(HasSubstr("32"), HasSubstr("--seq")));
}

TEST_F(MtrunTest, AnotherVocabularyIsFixedByThePrintedCommand) {
  std::string text = GeneratedText(60);
  for (char& c : text) c = c == 'e' ? 'Q' : c;
  folder_->Write("other_text", absl::StrCat(text, "0123456789 ABCDEF\n"));
  ASSERT_EQ(Run("mtcorpus prep --input other_text --out other --tokenizer bpe:270").code, 0);
  ASSERT_EQ(Run("cp tiny.plan mine.plan").code, 0);
  ExpectError("mtrun mine.plan --data other --steps 2", 4,
              AllOf(HasSubstr("corpus other has a vocabulary of 270"), HasSubstr("mine.plan was compiled for")));
  const std::string message = Run("mtrun mine.plan --data other --steps 2").err;
  const size_t at = message.find("mtc compile");
  ASSERT_NE(at, std::string::npos) << message;
  const Outcome fixed = Run(message.substr(at));
  ASSERT_EQ(fixed.code, 0) << message.substr(at) << fixed.err;
  const Outcome trained = Run("mtrun mine.plan --data other --steps 2");
  EXPECT_EQ(trained.code, 0) << trained.err;
  // The same model, but for the vocabulary.
  const std::string described = Run("mtc inspect mine.plan --text").out;
  EXPECT_THAT(described, AllOf(HasSubstr("[270,32]"), HasSubstr("tiny_char")));
}

TEST_F(MtrunTest, AnotherTokenizerOfAsManyTokensIsNamedAndRefused) {
  std::string text = GeneratedText(60);
  for (char& c : text) c = c == 'e' ? 'Q' : c;
  folder_->Write("swapped_text", text);
  ASSERT_EQ(Run("mtcorpus prep --input swapped_text --out swapped --tokenizer char").code, 0);
  ASSERT_OK_AND_ASSIGN(const Manifest ours, ReadManifest(folder_->Path("corpus")));
  ASSERT_OK_AND_ASSIGN(const Manifest swapped, ReadManifest(folder_->Path("swapped")));
  ASSERT_EQ(ours.vocab_size, swapped.vocab_size);
  const std::string here = absl::StrFormat("%016x", swapped.tokenizer_hash);
  const std::string there = absl::StrFormat("%016x", ours.tokenizer_hash);
  ASSERT_NE(here, there);

  // Beside the shards.
  ASSERT_EQ(Run("cp -r corpus mixed && cp swapped/tokenizer.json mixed").code, 0);
  ExpectError("mtrun tiny.plan --data mixed --steps 1", 4,
              AllOf(HasSubstr("mixed/tokenizer.json"), HasSubstr(here), HasSubstr(there), HasSubstr("mtcorpus prep")));
  ASSERT_EQ(Run("rm mixed/tokenizer.json").code, 0);
  ExpectError("mtrun tiny.plan --data mixed --steps 1", 4, HasSubstr("mixed/tokenizer.json"));

  // Against the plan's corpus; the printed command mends it.
  ASSERT_EQ(Run("cp tiny.plan mine.plan").code, 0);
  const char* run_it = "mtrun mine.plan --data swapped --steps 2";
  ExpectError(run_it, 4, AllOf(HasSubstr("corpus swapped"), HasSubstr(here), HasSubstr("mine.plan"), HasSubstr(there)));
  const std::string message = Run(run_it).err;
  const Outcome fixed = Run(message.substr(message.find("mtc compile")));
  ASSERT_EQ(fixed.code, 0) << message << fixed.err;
  EXPECT_EQ(Run(run_it).code, 0);

  // A plan that was compiled for no corpus takes any, but a run keeps to its own.
  const Outcome compiled =
      Run(absl::StrCat("mtc compile tiny_char --set layers=1,width=32,heads=2,vocab_size=", ours.vocab_size,
                       " --batch 4 --seq 32 -o any.plan"));
  ASSERT_EQ(compiled.code, 0) << compiled.err;
  ExpectError("mtrun any.plan --schedule tiny.plan:1 --data swapped --steps 3", 4, HasSubstr("plan tiny.plan was"));
  ASSERT_EQ(Run("mtrun any.plan --data corpus --steps 2 --save-every 1 --out first").code, 0);
  EXPECT_EQ(Run("mtrun any.plan --data swapped --steps 2").code, 0);
  ExpectError("mtrun any.plan --data swapped --steps 2 --save-every 1 --out first", 2,
              AllOf(HasSubstr("tokenizer is char, hash " + there), HasSubstr(here), HasSubstr("--fresh")));
  for (const char* flag : {"--init first", "--resume first --steps 4", "--init first --generate river"}) {
    const Outcome refused = Run(absl::StrCat("mtrun any.plan --data swapped ", flag));
    EXPECT_EQ(refused.code, 4) << flag;
    EXPECT_THAT(refused.err, AllOf(HasSubstr("first was trained with tokenizer char, hash " + there), HasSubstr(here),
                                   HasSubstr("mtcorpus prep --tokenizer")))
        << flag;
  }
  EXPECT_EQ(Run("mtrun any.plan --data corpus --init first --steps 1").code, 0);
  EXPECT_EQ(Run("mtrun any.plan --data swapped --init first/model.safetensors --steps 1").code, 0);
}

// A token above the vocabulary, under right checksums everywhere.
TEST_F(MtrunTest, ATokenAboveTheVocabularyIsRefused) {
  ASSERT_EQ(Run("cp -r corpus bad_corpus").code, 0);
  const std::string name = "bad_corpus/train-00000.bin";
  std::string shard = folder_->Read(name);
  ASSERT_GT(shard.size(), 1000u);
  uint64_t tokens = 0;
  std::memcpy(&tokens, shard.data() + 16, 8);
  ASSERT_LT(tokens * 2, uint64_t{1} << 20) << "one block";
  const size_t bytes = tokens * 2, padded = (bytes + 3) / 4 * 4;
  ASSERT_EQ(shard.size(), 64 + padded + 4);
  const uint16_t wrong = 999;
  std::memcpy(shard.data() + 64 + 2 * 5, &wrong, 2);
  const auto put_crc = [&](size_t at, absl::string_view of) {
    const uint32_t crc = Crc32c(of);
    std::memcpy(shard.data() + at, &crc, 4);
    return crc;
  };
  put_crc(64 + padded, absl::string_view(shard).substr(64, bytes));
  put_crc(56, absl::string_view(shard).substr(64 + padded, 4));
  const uint32_t crc = put_crc(60, absl::string_view(shard).substr(0, 60));
  folder_->Write(name, shard);
  ASSERT_OK_AND_ASSIGN(Manifest manifest, ReadManifest(folder_->Path("bad_corpus")));
  manifest.splits[0].shards[0].crc = crc;
  folder_->Write("bad_corpus/manifest.json", manifest.Serialize());
  ExpectError("mtrun tiny.plan --data bad_corpus --steps 50 --out bad_run", 4,
              AllOf(HasSubstr("train-00000.bin"), HasSubstr("999")));
}

TEST_F(MtrunTest, APlanLargerThanTheMemoryIsRefusedBeforeAllocation) {
  const Outcome compiled = Run("mtc compile gpt2_124m --data corpus --batch 4096 -o large.plan");
  ASSERT_EQ(compiled.code, 0) << compiled.err;
  ExpectError("mtrun large.plan --data corpus --steps 1 --out large_run", 3,
              AllOf(HasSubstr("GiB"), HasSubstr("--batch"), HasSubstr("; the peak is at train "),
                    HasSubstr("what would fit: mtc fit gpt2_124m --memory ")));
  EXPECT_EQ(Run("mtrun large.plan --dry-run").code, 0);
}

TEST_F(MtrunTest, AFinishedRunIsNotOverwritten) {
  ASSERT_EQ(Run("mtrun tiny.plan --data corpus --steps 2 --out done").code, 0);
  const std::string summary = folder_->Read("done/summary.json");
  ExpectError("mtrun tiny.plan --data corpus --steps 3 --out done", 2, AllOf(HasSubstr("done"), HasSubstr("--fresh")));
  EXPECT_EQ(folder_->Read("done/summary.json"), summary);
  const Outcome fresh = Run("mtrun tiny.plan --data corpus --steps 3 --out done --fresh");
  EXPECT_EQ(fresh.code, 0) << fresh.err;
  EXPECT_EQ(folder_->ReadJson("done/summary.json")["steps"], 3);
}

TEST_F(MtrunTest, NumericFailure) {
  const Outcome outcome = Run("mtrun tiny.plan --data corpus --steps 40 --lr 1e30 --grad-clip 0 --out burst");
  EXPECT_EQ(outcome.code, 5);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("not finite"), HasSubstr("--lr")));
  EXPECT_FALSE(folder_->Exists("burst/model.safetensors"));
  EXPECT_FALSE(folder_->Exists("burst/summary.json"));
}

TEST_F(MtrunTest, FailedWrites) {
  ExpectError("mtrun tiny.plan --data corpus --steps 1 --out /dev/full/run", 7, HasSubstr("/dev/full/run"));
  const Outcome trace = Run("mtrun tiny.plan --data corpus --steps 1 --trace /dev/full/trace.json");
  EXPECT_EQ(trace.code, 7) << trace.err;
  EXPECT_THAT(trace.err, HasSubstr("/dev/full/trace.json"));
  EXPECT_EQ(Run("mtrun tiny.plan --data corpus --steps 1 > /dev/full; exit $?").code, 7);
}

TEST_F(MtrunTest, AFullDisk) {
  const std::string disk = folder_->Path("disk");
  ASSERT_EQ(Run("mkdir disk").code, 0);
  // The log of a step or two fits, the weights do not.
  if (::mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=32k") != 0) {
    GTEST_SKIP() << "a small tmpfs cannot be mounted here: " << std::strerror(errno);
  }
  const Outcome outcome = Run("mtrun tiny.plan --data corpus --steps 2 --out disk/run");
  EXPECT_EQ(outcome.code, 7) << outcome.out;
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("error: "), HasSubstr("disk/run/model.safetensors")));
  EXPECT_EQ(Run("ls disk/run").out, "metrics.jsonl\n");
  const Outcome log = Run("mtrun tiny.plan --data corpus --steps 400 --log-every 100 --out disk/run");
  EXPECT_EQ(log.code, 7) << log.out;
  EXPECT_THAT(log.err, AllOf(HasSubstr("disk/run/metrics.jsonl"), HasSubstr("No space")));
  EXPECT_EQ(::umount(disk.c_str()), 0) << std::strerror(errno);
}

TEST_F(MtrunTest, AnInterruptSavesACheckpoint) {
  const Outcome outcome =
      Run("mtrun tiny.plan --data corpus --max-minutes 5 --out stopped & pid=$!\n"
          "for i in $(seq 1200); do [ -s stopped/metrics.jsonl ] && break; sleep 0.05; done\n"
          "kill -INT $pid\n"
          "wait $pid");
  EXPECT_EQ(outcome.code, 130) << outcome.err;
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("interrupted after step"), HasSubstr("saved")));
  const nlohmann::json summary = folder_->ReadJson("stopped/summary.json");
  EXPECT_EQ(summary["interrupted"], true);
  EXPECT_GE(summary["steps"], 1);
  EXPECT_TRUE(folder_->Exists(absl::StrCat("stopped/step-", summary["steps"].dump(), "/model.safetensors")));
  const Outcome eval = Run("mtrun tiny.plan --data corpus --init stopped --eval val");
  EXPECT_EQ(eval.code, 0) << eval.err;
}

TEST_F(MtrunTest, Eval) {
  const Outcome eval = Run("mtrun tiny.plan --data corpus --eval test");
  ASSERT_EQ(eval.code, 0) << eval.err;
  EXPECT_THAT(eval.out, AllOf(HasSubstr("test: loss "), HasSubstr(" ppl "), HasSubstr(" tokens")));
  // Untrained: the logarithm of the vocabulary.
  ASSERT_OK_AND_ASSIGN(const Manifest manifest, ReadManifest(folder_->Path("corpus")));
  std::smatch match;
  ASSERT_TRUE(std::regex_search(eval.out, match, std::regex("loss ([0-9.]+)")));
  EXPECT_NEAR(std::stod(match[1]), std::log(static_cast<double>(manifest.vocab_size)), 0.1);
  ExpectError("mtrun tiny.plan --data corpus --init nowhere --eval val", 4, HasSubstr("nowhere"));
}

TEST_F(MtrunTest, DryRunCountsAndComputesNothing) {
  const Outcome dry = Run("mtrun tiny.plan --dry-run");
  ASSERT_EQ(dry.code, 0) << dry.err;
  EXPECT_THAT(dry.out, AllOf(HasSubstr("nothing computed"), HasSubstr("arena "), HasSubstr("program train: "),
                             HasSubstr("program eval: "), HasSubstr("FLOPs")));
}

TEST_F(MtrunTest, TraceIsChromesFormat) {
  const Outcome outcome = Run("mtrun tiny.plan --data corpus --steps 1 --trace trace.json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const nlohmann::json trace = folder_->ReadJson("trace.json");
  ASSERT_TRUE(trace.is_object());
  std::vector<std::string> phases;
  int counters = 0, instructions = 0;
  double last = 0;
  for (const nlohmann::json& event : trace["traceEvents"]) {
    if (event["ph"] == "X" && event["tid"] == 1) phases.push_back(event["name"]);
    if (event["ph"] == "X" && event["tid"] == 2) {
      ++instructions;
      EXPECT_GE(event["ts"], last);
      last = event["ts"];
      EXPECT_GE(event["dur"], 0);
      EXPECT_TRUE(event["args"].contains("path") && event["args"].contains("flops"));
    }
    if (event["ph"] != "C") continue;
    ++counters;
    EXPECT_EQ(event["args"].size(), 6u);
    EXPECT_GT(event["args"]["parameters"], 0);
    EXPECT_TRUE(event["args"].contains("activations"));
  }
  EXPECT_THAT(phases, ::testing::ElementsAre("forward", "backward", "optimizer"));
  EXPECT_GT(instructions, 50);
  EXPECT_GE(counters, instructions);
}

TEST_F(MtrunTest, WarningsGoToStandardError) {
  const Outcome outcome = Run("mtrun tiny.plan --data corpus --steps 2 --warmup 9");
  EXPECT_EQ(outcome.code, 0);
  EXPECT_THAT(outcome.err, HasSubstr("warning: warmup (9) >= steps (2)"));
  EXPECT_THAT(outcome.out, Not(HasSubstr("warning")));
}

TEST_F(MtrunTest, GuardedBuffersTrainAlike) {
  const auto last_step = [](const std::string& out) {
    const size_t at = out.find("step 3/3");
    return at == std::string::npos ? out : out.substr(at, out.find("gnorm", at) - at);
  };
  const Outcome arena = Run("mtrun tiny.plan --data corpus --steps 3");
  const Outcome guarded = Run("mtrun tiny.plan --data corpus --steps 3 --debug-arena guard");
  ASSERT_EQ(guarded.code, 0) << guarded.err;
  EXPECT_THAT(guarded.out, HasSubstr("each in memory of its own"));
  EXPECT_EQ(last_step(guarded.out), last_step(arena.out));
  ExpectError("mtrun tiny.plan --data corpus --debug-arena guard --measure", 2, HasSubstr("leave one of them out"));
  ExpectError("mtrun tiny.plan --data corpus --device 0", 2, HasSubstr("--device numbers a GPU"));
}

}  // namespace
}  // namespace mt
