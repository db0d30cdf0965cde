#include "codegen/compile.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/report/inspect.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "models/model.h"
#include "tests/random_graph.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;

std::string TestFile(const std::string& name) {
  return absl::StrCat(::testing::TempDir(), "/compile_test-", getpid(), "-", name);
}

proto::PlanProto SmallPlan() {
  absl::StatusOr<proto::PlanProto> plan = Compile(SmallTransformer(""), {});
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

TEST(CompileTest, EqualModulesGiveEqualPlans) {
  proto::PlanProto a = SmallPlan(), b = SmallPlan();
  a.clear_compile_seconds();
  b.clear_compile_seconds();
  EXPECT_EQ(SerializePlan(a), SerializePlan(b));
}

TEST(CompileTest, SaysWhatIsWrong) {
  const auto compile = [](const CompileOptions& options) { return Compile(SmallTransformer(""), options); };
  EXPECT_THAT(compile({.target = "cuda:sm_91"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean cuda:sm_90?")));
  EXPECT_THAT(compile({.target = "abacus"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("abacus")));
  EXPECT_THAT(compile({.passes = "no_such_pass"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no_such_pass")));
  EXPECT_THAT(compile({.memory_bytes = 1000}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("--memory allows 1000 B (1000 bytes)")));
  EXPECT_OK(compile({.memory_bytes = SmallPlan().arena_bytes()}));
}

TEST(CompileTest, NotesAndFactsArriveInThePlan) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan,
                       Compile(SmallTransformer("", 3, 4), {.notes = {{"tokenizer_hash", "00ff"}}}));
  EXPECT_EQ(plan.notes().at("tokenizer_hash"), "00ff");
  EXPECT_EQ(plan.facts().at("batch"), 3);
  EXPECT_EQ(plan.facts().at("sequence"), 4);
  EXPECT_GT(plan.facts().at("parameters"), 0);
  EXPECT_EQ(plan.passes(), "flash:window=model,chunked_loss:chunks=auto,fuse");
  EXPECT_GT(plan.compile_seconds(), 0);
}

TEST(CompileTest, PlanMemoryIsWhatThePlanSays) {
  std::unique_ptr<Module> module = SmallTransformer("");
  PassContext context;
  ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("default"));
  ASSERT_OK(RunPipeline(*module, pipeline, context));
  ASSERT_OK_AND_ASSIGN(const MemoryPlan memory, PlanMemory(*module, "cpu"));
  const proto::PlanProto plan = SmallPlan();
  EXPECT_EQ(memory.arena_bytes, plan.arena_bytes());
  EXPECT_EQ(memory.lower_bound_bytes, plan.lower_bound_bytes());
  EXPECT_EQ(memory.persistent_bytes, plan.persistent_bytes());
  ASSERT_OK_AND_ASSIGN(const PeakText peak, DescribePeak(*module, "cpu"));
  EXPECT_EQ(peak.node, plan.programs(0).instructions(plan.programs(0).peak_instruction()).name());
  EXPECT_FALSE(peak.live.empty());
}

// How near the arena is to the lower bound, printed for all of the zoo.
TEST(CompileTest, TheZooLiesWithinTwoPercentOfItsLowerBound) {
  ASSERT_FALSE(ZooModels().empty());
  for (const std::string& name : ZooModels()) {
    SCOPED_TRACE(name);
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Module> module, LoadModel(name, {}));
    CompileReport report;
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, Compile(std::move(module), {}, &report));
    const double ratio = static_cast<double>(plan.arena_bytes()) / static_cast<double>(plan.lower_bound_bytes());
    std::printf("%-16s arena %14lld bytes, %.5f of its lower bound (%s), planned in %.3f s\n", name.c_str(),
                static_cast<long long>(plan.arena_bytes()), ratio, plan.proof().c_str(),
                report.times.schedule_seconds + report.times.assign_seconds + report.times.pack_seconds);
    EXPECT_LE(ratio, 1.02);
  }
}

TEST(CompileTest, ParameterCountsOfTheZoo) {
  const auto parameters = [](const std::string& name) {
    absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(name, {});
    CHECK(module.ok()) << module.status();
    return (*module)->num_parameters();
  };
  EXPECT_EQ(parameters("gpt2_wide32k"), 134367744);
  EXPECT_EQ(parameters("gpt2_124m"), 124439808);
}

// --- The file

TEST(PlanFileTest, RoundTrip) {
  const proto::PlanProto plan = SmallPlan();
  const std::string path = TestFile("round.plan");
  ASSERT_OK(SavePlan(plan, path));
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto read, LoadPlan(path));
  EXPECT_EQ(SerializePlan(read), SerializePlan(plan));
  EXPECT_EQ(PlanText(read), PlanText(plan));
  std::filesystem::remove(path);
}

TEST(PlanFileTest, EveryTruncationIsRefused) {
  const std::string bytes = SerializePlan(SmallPlan());
  for (size_t length = 0; length < bytes.size(); length += length < 64 ? 1 : bytes.size() / 50) {
    EXPECT_THAT(ParsePlan(absl::string_view(bytes).substr(0, length), "x.plan"),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("x.plan: truncated")))
        << length;
  }
  EXPECT_OK(ParsePlan(bytes, "x.plan"));
}

TEST(PlanFileTest, EveryEditIsRefused) {
  const std::string bytes = SerializePlan(SmallPlan());
  for (size_t at = 0; at < bytes.size(); at += at < 64 ? 1 : 97) {
    std::string edited = bytes;
    edited[at] = static_cast<char>(edited[at] ^ 0x10);
    EXPECT_THAT(ParsePlan(edited, "x.plan"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("x.plan: ")))
        << at;
  }
  EXPECT_THAT(ParsePlan(bytes + "!", "x.plan"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("edited")));
  std::string payload = bytes;
  payload[bytes.size() / 2] ^= 1;
  EXPECT_THAT(ParsePlan(payload, "x.plan"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("checksum")));
  std::string version = bytes;
  version[8] = 2;
  EXPECT_THAT(ParsePlan(version, "x.plan"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("version 2, this build reads version 1")));
  EXPECT_THAT(ParsePlan("name: \"a spec\"", "x.plan"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not a plan")));
}

TEST(PlanFileTest, AMissingFileAndAFullDisk) {
  EXPECT_THAT(LoadPlan(TestFile("missing.plan")), StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing.plan")));
  EXPECT_THAT(SavePlan(SmallPlan(), TestFile("no-folder/x.plan")),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("x.plan")));
}

// --- What inspect prints

void ExpectIntegers(const nlohmann::json& json, const std::string& path) {
  if (json.is_number() && !absl::EndsWith(path, "seconds")) {
    EXPECT_TRUE(json.is_number_integer()) << path;
  }
  if (!json.is_structured()) return;
  for (const auto& [key, value] : json.items()) ExpectIntegers(value, absl::StrCat(path, "/", key));
}

std::vector<std::string> Keys(const nlohmann::json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

TEST(InspectTest, JsonHasTheKeysOfTheContract) {
  const proto::PlanProto plan = SmallPlan();
  const nlohmann::json json = nlohmann::json::parse(PlanJson(plan), nullptr, false);
  ASSERT_TRUE(json.is_object());
  using ::testing::UnorderedElementsAre;
  EXPECT_THAT(Keys(json),
              UnorderedElementsAre("model", "target", "batch", "seq", "passes", "memory", "dtypes", "recomputed_ops",
                                   "recomputed", "flops", "bytes", "instructions", "compile_seconds"));
  EXPECT_THAT(Keys(json["recomputed"]), UnorderedElementsAre("flops", "bytes", "seconds", "program_seconds", "ops"));
  EXPECT_GT(json["recomputed"]["program_seconds"], 0.0);
  EXPECT_THAT(Keys(json["dtypes"]),
              UnorderedElementsAre("parameters", "gradients", "optimizer_state", "activations", "workspace", "io"));
  EXPECT_THAT(Keys(json["model"]), UnorderedElementsAre("name", "parameters"));
  const nlohmann::json& memory = json["memory"];
  EXPECT_THAT(Keys(memory),
              UnorderedElementsAre("peak_bytes", "lower_bound_bytes", "proof", "persistent_bytes", "padding_bytes",
                                   "alignment_bytes", "by_class", "by_phase", "by_program", "peak_instruction"));
  EXPECT_THAT(Keys(memory["by_class"]),
              UnorderedElementsAre("parameters", "gradients", "optimizer_state", "activations", "workspace", "io"));
  EXPECT_THAT(Keys(memory["by_phase"]), UnorderedElementsAre("forward", "backward", "optimizer"));
  EXPECT_THAT(Keys(memory["by_phase"]["backward"]), UnorderedElementsAre("live_bytes", "written_bytes"));
  EXPECT_THAT(Keys(memory["by_program"]), UnorderedElementsAre("train", "eval", "generate"));
  ExpectIntegers(json, "");
  EXPECT_EQ(memory["peak_bytes"], plan.arena_bytes());
  int64_t sum = 0;
  for (const auto& [name, bytes] : memory["by_class"].items()) sum += bytes.get<int64_t>();
  EXPECT_EQ(sum, plan.lower_bound_bytes());
  int64_t live = 0;
  for (const auto& [name, phase] : memory["by_phase"].items()) {
    live = std::max(live, phase["live_bytes"].get<int64_t>());
    EXPECT_GT(phase["written_bytes"].get<int64_t>(), 0) << name;
  }
  EXPECT_EQ(live, FindProgram(plan, "train")->lower_bound_bytes());
}

TEST(InspectTest, TheTableNamesProgramsClassesAndTheProof) {
  const std::string table = PlanTable(SmallPlan());
  for (const char* word : {"train: ", "eval: ", "parameters", "gradients", "optimizer_state", "activations",
                           "workspace", "forward", "backward", "optimizer", "of the lower bound", "largest live"}) {
    EXPECT_THAT(table, HasSubstr(word));
  }
}

}  // namespace
}  // namespace mt
