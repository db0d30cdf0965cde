// mtc as a process: what it prints, where it says it and the exit code.
#include <filesystem>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "tests/process.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class MtcTest : public ::testing::Test {
 protected:
  std::string Path(const std::string& name) const { return folder_.Path(name); }
  void Write(const std::string& name, const std::string& text) const { folder_.Write(name, text); }
  // Runs `mtc ARGUMENTS` in the test's folder; `before` stands before it.
  Outcome Mtc(const std::string& arguments, const std::string& before = "") const {
    return folder_.Run(absl::StrCat(before, " mtc ", arguments));
  }
  void ExpectError(const std::string& arguments, int code,
                   const ::testing::Matcher<const std::string&>& message) const {
    folder_.ExpectError(absl::StrCat("mtc ", arguments), code, message);
  }

  const ProcessFolder folder_{"mtc_cli_test"};
};

constexpr char kSpec[] = "name: \"toy\" layers: 1 width: 16 heads: 2 vocab_size: 32 max_sequence: 8 batch: 2\n";

TEST_F(MtcTest, CompilesAndInspects) {
  Write("toy.textproto", kSpec);
  const Outcome compiled = Mtc("compile toy.textproto");
  ASSERT_EQ(compiled.code, 0) << compiled.err;
  EXPECT_THAT(compiled.out, AllOf(HasSubstr("passes   flash:window=model"), HasSubstr("wrote toy.plan"),
                                  HasSubstr("parameters"), HasSubstr("train: ")));
  ASSERT_TRUE(fs::exists(Path("toy.plan")));

  const Outcome of_plan = Mtc("inspect toy.plan --json"), of_spec = Mtc("inspect toy.textproto --json");
  ASSERT_EQ(of_plan.code, 0) << of_plan.err;
  ASSERT_EQ(of_spec.code, 0) << of_spec.err;
  nlohmann::json a = nlohmann::json::parse(of_plan.out, nullptr, false);
  nlohmann::json b = nlohmann::json::parse(of_spec.out, nullptr, false);
  ASSERT_TRUE(a.is_object());
  a.erase("compile_seconds");
  b.erase("compile_seconds");
  EXPECT_EQ(a, b);
  EXPECT_EQ(a["batch"], 2);
  EXPECT_EQ(a["seq"], 8);

  const Outcome text = Mtc("inspect toy.plan --text");
  EXPECT_EQ(text.code, 0);
  EXPECT_THAT(
      text.out,
      StartsWith("plan \"toy\" target=cpu passes=\"flash:window=model,chunked_loss:chunks=auto,fuse\" version=1\n"));
  const Outcome table = Mtc("inspect toy.plan");
  EXPECT_EQ(table.code, 0);
  EXPECT_THAT(table.out, HasSubstr("of the lower bound"));
}

TEST_F(MtcTest, FlagsReachTheModel) {
  Write("toy.textproto", kSpec);
  const Outcome outcome = Mtc("inspect toy.textproto --set layers=3,width=32 --batch 5 --seq 4 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const nlohmann::json json = nlohmann::json::parse(outcome.out, nullptr, false);
  EXPECT_EQ(json["batch"], 5);
  EXPECT_EQ(json["seq"], 4);
  const nlohmann::json one = nlohmann::json::parse(Mtc("inspect toy.textproto --json").out, nullptr, false);
  EXPECT_GT(json["model"]["parameters"], one["model"]["parameters"]);
}

TEST_F(MtcTest, TheCorpusGivesTheVocabulary) {
  Write("toy.textproto", kSpec);
  fs::create_directories(Path("corpus"));
  Write("corpus/manifest.json", R"({"vocab_size": 77, "tokenizer_hash": "00000000deadbeef"})");
  ASSERT_EQ(Mtc("compile toy.textproto --data corpus").code, 0);
  EXPECT_THAT(Mtc("inspect toy.plan --text").out,
              AllOf(HasSubstr("fact vocab_size = 77\n"), HasSubstr("note tokenizer_hash = \"00000000deadbeef\"\n")));
  fs::remove(Path("toy.plan"));
  ExpectError("compile toy.textproto --data nowhere", 4, HasSubstr("mtcorpus prep"));
  for (const char* text : {"", "[]", "{}", R"({"vocab_size": -1, "tokenizer_hash": "x"})", R"({"vocab_size": 77})",
                           R"({"vocab_size": "77", "tokenizer_hash": "x"})"}) {
    Write("corpus/manifest.json", text);
    ExpectError("compile toy.textproto --data corpus", 4, HasSubstr("corpus/manifest.json"));
  }
}

TEST_F(MtcTest, PrintsThePipeline) {
  Write("toy.textproto", kSpec);
  const Outcome outcome = Mtc("inspect toy.textproto --print-pipeline");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("autodiff"), HasSubstr("optimizer:kind=adamw"), HasSubstr("(always)")));
}

TEST_F(MtcTest, DumpsTheModuleAfterEachPass) {
  Write("toy.textproto", kSpec);
  ASSERT_EQ(Mtc("inspect toy.textproto --dump-dir dumps").code, 0);
  EXPECT_TRUE(fs::exists(Path("dumps/00.input.mtir")));
  int dumps = 0;
  for (const auto& entry : fs::directory_iterator(Path("dumps"))) dumps += entry.path().extension() == ".mtir";
  EXPECT_GT(dumps, 3);
}

TEST_F(MtcTest, UsageErrors) {
  Write("toy.textproto", kSpec);
  ExpectError("", 2, HasSubstr("compile"));
  ExpectError("conpile toy.textproto", 2, HasSubstr("compile"));
  ExpectError("compile", 2, HasSubstr("SPEC"));
  ExpectError("compile toy.textproto --bacth 4", 2, HasSubstr("--batch"));
  ExpectError("compile toy.textproto --batch 0", 2, HasSubstr("--batch"));
  ExpectError("compile toy.textproto --batch 99999999999999999999", 2, HasSubstr("--batch"));
  ExpectError("compile toy.textproto --lr 1e-3", 2, HasSubstr("mtrun"));
  ExpectError("compile toy.textproto --passes no_such_pass", 2, HasSubstr("no_such_pass"));
  ExpectError("compile toy.textproto --target cuda:sm_91", 2, HasSubstr("did you mean cuda:sm_90?"));
  ExpectError("compile toy.textproto --memory 8Gb", 2, HasSubstr("did you mean 8GiB?"));
  ExpectError("fit toy.textproto --memory 8Gb", 2, HasSubstr("did you mean 8GiB?"));
  ExpectError("fit toy.textproto", 2, HasSubstr("--memory is needed"));
  ExpectError("fit toy.textproto --memory 1GiB --batch 2 --seq 4", 2, HasSubstr("nothing is left to fit"));
  ExpectError("fit toy.textproto --memory 1GiB --passes no_such_pass", 2, HasSubstr("no_such_pass"));
  ExpectError("fit parallel_block --memory 1GiB", 2, HasSubstr("raw graph"));
  ExpectError("compile toy.textproto --batch max --target cuda", 2, HasSubstr("--memory 24GiB"));
  ExpectError("compile toy.textproto --set layers=many", 2, HasSubstr("layers"));
  ExpectError("compile toy.textproto --set leyers=2", 2, HasSubstr("layers"));
  ExpectError("inspect toy.textproto --json --text", 2, HasSubstr("exclude"));
  ExpectError("passes no_such_pass", 2, HasSubstr("autodiff"));
  ExpectError("ops gleu", 2, HasSubstr("gelu"));
}

TEST_F(MtcTest, BadModels) {
  Write("toy.textproto", kSpec);
  ExpectError("compile no_such_model", 4, AllOf(HasSubstr("tiny_char"), HasSubstr("gpt2_124m")));
  ExpectError("compile tiny_chr", 4, HasSubstr("did you mean tiny_char?"));
  Write("field.textproto", "name: \"x\" layers: 1 widht: 16\n");
  ExpectError("compile field.textproto", 2, HasSubstr("width"));
  ExpectError("compile toy.textproto --set heads=3", 2, HasSubstr("heads"));
  ExpectError("compile toy.textproto --seq 9", 2, HasSubstr("9"));
  ExpectError("compile toy.textproto --set width=-16", 2, HasSubstr("width"));
  ExpectError("compile toy.textproto --set width=9223372036854775807,heads=1", 2, HasSubstr("width"));
  ExpectError("compile toy.textproto --batch 4611686018427387904", 2, HasSubstr("batch"));
  Write("cycle.graph.textproto",
        "name: \"c\" graphs { name: \"train\" nodes { id: \"a\" op: \"tanh\" operands: \"b\" } nodes { id: \"b\" op: "
        "\"tanh\" operands: \"a\" } outputs { name: \"loss\" value: \"a\" } }");
  ExpectError("compile cycle.graph.textproto", 2, HasSubstr("cycl"));
  Write("types.graph.textproto",
        "name: \"t\" graphs { name: \"train\" inputs { name: \"x\" type { dtype: \"f32\" dims: 2 dims: 3 } role: "
        "\"data\" } "
        "nodes { id: \"y\" op: \"matmul\" operands: \"x\" operands: \"x\" } outputs { name: \"loss\" value: \"y\" } }");
  ExpectError("compile types.graph.textproto", 2, HasSubstr("matmul"));
}

TEST_F(MtcTest, DoesNotFit) {
  Write("toy.textproto", kSpec);
  const Outcome outcome = Mtc("compile toy.textproto --memory 1KiB");
  EXPECT_EQ(outcome.code, 3);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err,
              AllOf(StartsWith("error: plan does not fit\n  needs "), HasSubstr("--memory allows 1.0 KiB: "),
                    HasSubstr("\n  peak at train "), HasSubstr("\n  largest live: ")));
  EXPECT_FALSE(fs::exists(Path("toy.plan")));
  EXPECT_EQ(Mtc("compile toy.textproto --memory 1GiB").code, 0);
}

TEST_F(MtcTest, MemoryChoosesThePasses) {
  const std::string model = "inspect tiny_char --batch 4 --set layers=2 ";
  const nlohmann::json whole = nlohmann::json::parse(Mtc(model + "--json").out, nullptr, false);
  const int64_t needs = whole["memory"]["peak_bytes"];
  const Outcome outcome = Mtc(absl::StrCat(model, "--print-pipeline --memory ", needs - 1, "B"));
  // Which passes there are decides whether one fits.
  if (outcome.code == 0) {
    EXPECT_THAT(outcome.out,
                AllOf(HasSubstr("the fastest that fits is taken"), HasSubstr("\n> "),
                      Not(HasSubstr(absl::StrCat("passes   ", whole["passes"].get<std::string>(), "\n")))));
  } else {
    EXPECT_EQ(outcome.code, 3) << outcome.err;
  }
  // With --passes it is these or nothing.
  EXPECT_EQ(Mtc(absl::StrCat(model, "--passes default --memory ", needs - 1, "B")).code, 3);
  EXPECT_EQ(Mtc(absl::StrCat(model, "--passes default --memory ", needs, "B")).code, 0);
}

TEST_F(MtcTest, TheLargestBatch) {
  Write("toy.textproto", kSpec);
  const Outcome fit = Mtc("fit toy.textproto --memory 1MiB --passes none --passes default --json");
  ASSERT_EQ(fit.code, 0) << fit.err;
  const nlohmann::json json = nlohmann::json::parse(fit.out, nullptr, false);
  // Neither --batch nor --seq: the largest batch, and the longest of one sequence.
  ASSERT_EQ(json["rows"].size(), 4u) << fit.out;
  EXPECT_EQ(json["rows"][0]["of"], "batch");
  EXPECT_EQ(json["rows"][1]["of"], "seq");
  EXPECT_EQ(json["rows"][1]["batch"], 1);
  EXPECT_GT(json["rows"][1]["seq"], 8);
  EXPECT_EQ(json["target"], "cpu");
  EXPECT_EQ(json["memory_bytes"], 1 << 20);
  EXPECT_EQ(json["context_bytes"], 0);
  const nlohmann::json& row = json["rows"][0];
  EXPECT_EQ(row["passes"], "none");
  EXPECT_EQ(row["seq"], 8);
  EXPECT_EQ(row["next"]["size"], row["batch"].get<int64_t>() + 1);
  EXPECT_GT(row["batch"], 2);
  const nlohmann::json max = nlohmann::json::parse(
      Mtc("inspect toy.textproto --batch max --memory 1MiB --passes none --json").out, nullptr, false);
  EXPECT_EQ(max["batch"], row["batch"]);
  EXPECT_EQ(max["memory"]["peak_bytes"], row["needs_bytes"]);
  EXPECT_THAT(Mtc("compile toy.textproto --batch max --memory 1MiB --passes none").out,
              HasSubstr(absl::StrCat("batch    ", row["batch"].get<int64_t>(), ", the largest that fits 1.0 MiB; ")));
  EXPECT_THAT(Mtc("fit toy.textproto --memory 1MiB").out,
              AllOf(HasSubstr("the next"), HasSubstr(" short"), HasSubstr("none")));
  const Outcome longest = Mtc("fit toy.textproto --memory 1MiB --batch 2 --passes none --json");
  ASSERT_EQ(longest.code, 0) << longest.err;
  const nlohmann::json seq = nlohmann::json::parse(longest.out, nullptr, false)["rows"][0];
  EXPECT_EQ(seq["batch"], 2);
  EXPECT_GT(seq["seq"], 8);
  EXPECT_EQ(Mtc(absl::StrCat("compile toy.textproto --batch 2 --passes none --memory 1MiB --seq ",
                             seq["seq"].get<int64_t>(), " --set max_sequence=", seq["seq"].get<int64_t>()))
                .code,
            0);
  EXPECT_EQ(Mtc("compile toy.textproto --batch max --memory 1KiB").code, 3);
}

TEST_F(MtcTest, CudaPlansArePlanned) {
  Write("toy.textproto", kSpec);
  const Outcome table = Mtc("inspect toy.textproto --target cuda");
  ASSERT_EQ(table.code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("target   cuda:sm_90\n"));
  EXPECT_THAT(Mtc("inspect toy.textproto --target cuda --text").out, HasSubstr("tokens.next"));
  // What fusion takes beside recomputation is said.
  EXPECT_THAT(Mtc("inspect lab4 --target cuda --passes bf16,flash,chunked_loss,pad_vocab,fuse,remat").out,
              HasSubstr("\nfuse     the arena is "));
}

TEST_F(MtcTest, BadPlans) {
  Write("toy.textproto", kSpec);
  ASSERT_EQ(Mtc("compile toy.textproto").code, 0);
  ASSERT_OK_AND_ASSIGN(const std::string bytes, ReadFile(Path("toy.plan")));
  Write("short.plan", bytes.substr(0, bytes.size() - 10));
  ExpectError("inspect short.plan", 4, HasSubstr("truncated"));
  std::string edited = bytes;
  edited[bytes.size() / 2] = static_cast<char>(edited[bytes.size() / 2] ^ 1);
  Write("edited.plan", edited);
  ExpectError("inspect edited.plan", 4, HasSubstr("edited"));
  Write("other.plan", "not a plan at all");
  ExpectError("inspect other.plan", 4, HasSubstr("not a plan"));
  ExpectError("inspect missing.plan", 4, HasSubstr("missing.plan"));
  ExpectError("inspect toy.plan --batch 4", 2, HasSubstr("--batch"));
}

TEST_F(MtcTest, FailedWrites) {
  Write("toy.textproto", kSpec);
  ExpectError("compile toy.textproto -o no_folder/toy.plan", 7, HasSubstr("no_folder"));
  ExpectError("compile toy.textproto -o /dev/full/toy.plan", 7, HasSubstr("/dev/full"));
  const Outcome full = Mtc("models > /dev/full 2> full.err; code=$?; (exit $code)");
  EXPECT_EQ(full.code, 7) << full.err;
}

TEST_F(MtcTest, TrainBecomesMtrun) {
  if (!fs::exists(absl::StrCat(MT_BINARY_DIR, "/bin/mtrun"))) GTEST_SKIP() << "mtrun is not built";
  Write("toy.textproto", kSpec);
  const Outcome outcome = Mtc("train toy.textproto --out run --dry-run");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_TRUE(fs::exists(Path("run/toy.plan")));
  const Outcome unknown = Mtc("train toy.textproto --stesp 3");
  EXPECT_EQ(unknown.code, 2);
  EXPECT_THAT(unknown.err, HasSubstr("--steps"));
}

TEST_F(MtcTest, WarningsOfPasses) {
  const Outcome wide = Mtc("compile tiny_char --seq 16 --batch 2 --passes flash:window=15 -o wide.plan");
  EXPECT_EQ(wide.code, 0) << wide.err;
  EXPECT_EQ(wide.err, "warning: flash:window=15 reaches over all of T = 16 positions: this is full attention\n");
  const Outcome narrow = Mtc("compile tiny_char --seq 16 --batch 2 --passes flash:window=T/4 -o narrow.plan");
  EXPECT_EQ(narrow.code, 0) << narrow.err;
  EXPECT_EQ(narrow.err, "");
  EXPECT_THAT(narrow.out, HasSubstr("flash:window=T/4"));
  ExpectError("compile tiny_char --seq 16 --batch 2 --passes flash:window=0", 2, HasSubstr("window=0 is wrong"));
}

TEST_F(MtcTest, Documentation) {
  const Outcome models = Mtc("models");
  EXPECT_EQ(models.code, 0) << models.err;
  EXPECT_THAT(models.out, AllOf(HasSubstr("134,367,744"), HasSubstr("124,439,808"), HasSubstr("tiny_char")));
  EXPECT_THAT(Mtc("passes").out, AllOf(HasSubstr("autodiff"), HasSubstr("Pipelines:"), HasSubstr("default")));
  EXPECT_THAT(Mtc("passes optimizer").out,
              AllOf(HasSubstr("kind="), HasSubstr("training -> optimized"), HasSubstr("Loshchilov")));
  EXPECT_THAT(Mtc("ops").out, AllOf(HasSubstr("matmul"), HasSubstr("adamw"), Not(HasSubstr("grad0"))));
  EXPECT_THAT(Mtc("ops matmul").out, AllOf(HasSubstr("transpose_a"), HasSubstr("accumulator")));
  EXPECT_THAT(Mtc("--version").out, HasSubstr(std::string(Version())));
  EXPECT_EQ(Mtc("compile --help").code, 0);
}

TEST_F(MtcTest, DoctorExaminesTheMachine) {
  const Outcome outcome = Mtc("doctor");
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("cores"), HasSubstr("memory"), HasSubstr("OpenBLAS"), HasSubstr("gpu"),
                                 HasSubstr("a tiny model compiles into")));
  const bool has_mtrun = fs::exists(absl::StrCat(MT_BINARY_DIR, "/bin/mtrun"));
  EXPECT_EQ(outcome.code, has_mtrun ? 0 : 4) << outcome.err;
}

}  // namespace
}  // namespace mt
