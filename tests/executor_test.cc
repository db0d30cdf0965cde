// Loading and running plans: bits, errors, the null backend.
#include "runtime/executor.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string Bytes(const BoundTensor& tensor) {
  return std::string(reinterpret_cast<const char*>(tensor.data), static_cast<size_t>(tensor.type.byte_size()));
}

std::string AllStates(const Executor& executor) {
  std::string bytes;
  for (const BoundTensor& state : executor.states()) bytes += Bytes(state);
  return bytes;
}

// Losses of `steps` steps, and the states after them.
std::string TrainedBits(LoadedPlan& loaded, int64_t steps) {
  std::string bits;
  for (int64_t step = 0; step < steps; ++step) {
    CHECK(loaded.Prepare(step).ok());
    loaded.train->Run();
    loaded.executor->backend().Synchronize();
    bits += Bytes(*loaded.train->FindOutput("loss"));
  }
  return bits + AllStates(*loaded.executor);
}

std::vector<float> TrainedLosses(const std::string& passes, const std::vector<std::string>& sets, int64_t steps) {
  ModelOptions options{.batch = 2, .sequence = 40, .vocab_size = 30};
  options.sets = {"layers=2", "width=32", "heads=4", "dropout=0.2"};
  options.sets.insert(options.sets.end(), sets.begin(), sets.end());
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel("tiny_char", options);
  CHECK_OK(module.status());
  absl::StatusOr<proto::PlanProto> plan = Compile(*std::move(module), {.passes = passes});
  CHECK_OK(plan.status());
  absl::StatusOr<std::unique_ptr<LoadedPlan>> loaded = LoadForTest(*std::move(plan));
  CHECK_OK(loaded.status());
  std::vector<float> losses;
  for (int64_t step = 0; step < steps; ++step) {
    CHECK_OK((*loaded)->Prepare(step));
    (*loaded)->train->Run();
    losses.push_back(*reinterpret_cast<const float*>((*loaded)->train->FindOutput("loss")->data));
  }
  return losses;
}

// Twenty steps with dropout: the same weights dropped, the same masks, the same gradients.
TEST(ExecutorTest, FlashLearnsAsTheWrittenOutGraph) {
  const std::vector<std::string> models[] = {{}, {"kv_heads=2"}, {"attention_window=9"}};
  for (const std::vector<std::string>& sets : models) {
    const std::vector<float> written = TrainedLosses("none", sets, 20), flash = TrainedLosses("flash", sets, 20);
    for (size_t step = 0; step < written.size(); ++step) {
      EXPECT_NEAR(flash[step], written[step], 1e-5 * written[step]) << "step " << step;
    }
    EXPECT_NE(written.front(), written.back());
  }
  const std::vector<float> own = TrainedLosses("none", {"attention_window=9"}, 20);
  const std::vector<float> option = TrainedLosses("flash:window=9", {}, 20);
  for (size_t step = 0; step < own.size(); ++step) EXPECT_NEAR(option[step], own[step], 1e-5 * own[step]);
}

TEST(ExecutorTest, TheSameSeedGivesTheSameBits) {
  const proto::PlanProto plan = TinyPlan({"dropout=0.2", "layers=2"});
  ASSERT_OK_AND_ASSIGN(const auto reference, LoadForTest(plan, 1));
  const std::string expected = TrainedBits(*reference, 5);
  for (const int threads : {1, 2, 3}) {
    ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(plan, threads));
    EXPECT_TRUE(TrainedBits(*loaded, 5) == expected) << threads << " threads";
  }
  const std::string path = absl::StrCat(::testing::TempDir(), "/executor_test-", getpid(), ".plan");
  ASSERT_OK(SavePlan(plan, path));
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto read, LoadPlan(path));
  std::filesystem::remove(path);
  ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(read, 2));
  EXPECT_TRUE(TrainedBits(*loaded, 5) == expected) << "saved and loaded";

  ASSERT_OK_AND_ASSIGN(const auto other, LoadForTest(plan, 2));
  other->scalars.seed = 8;
  EXPECT_FALSE(TrainedBits(*other, 5) == expected) << "the seed of dropout has no effect";
}

TEST(ExecutorTest, TheArenasLayoutDoesNotMatter) {
  // All transient buffers moved up: other addresses, the same bits.
  proto::PlanProto plan = TinyPlan({"dropout=0.2"});
  ASSERT_OK_AND_ASSIGN(const auto reference, LoadForTest(plan, 2));
  const std::string expected = TrainedBits(*reference, 3);
  constexpr int64_t kShift = 256 * 37;
  for (proto::BufferProto& buffer : *plan.mutable_buffers()) {
    if (buffer.program() != -1) buffer.set_offset(buffer.offset() + kShift);
  }
  plan.set_arena_bytes(plan.arena_bytes() + kShift);
  ASSERT_OK_AND_ASSIGN(const auto shifted, LoadForTest(plan, 2));
  EXPECT_TRUE(TrainedBits(*shifted, 3) == expected);
}

// Nothing is read beside a table or a row, whatever a damaged plan leads to where ids are expected; the loss says so.
TEST(ExecutorTest, IdsThatAreNoneMakeTheLossNan) {
  for (const char* passes : {"none", "default"}) {
    for (const char* input : {"tokens", "labels", "order"}) {
      for (const int32_t id : {-100'000'000, 100'000'000}) {
        SCOPED_TRACE(absl::StrCat(passes, " ", input, " ", id));
        ASSERT_OK_AND_ASSIGN(
            auto module,
            LoadModel("tiny_char",
                      {.batch = 2, .sequence = 8, .vocab_size = 12, .sets = {"layers=1", "width=16", "heads=2"}}));
        ASSERT_OK_AND_ASSIGN(proto::PlanProto plan, Compile(std::move(module), {.passes = passes}));
        ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(std::move(plan), 1));
        ASSERT_OK(loaded->Prepare());
        loaded->train->FindInput(input)->data_as<int32_t>()[3] = id;
        loaded->train->Run();
        const float loss = *loaded->train->FindOutput("loss")->data_as<float>();
        // No label: not counted. The order decides which gradients are summed, and the loss is known before.
        const bool counts = std::string(input) == "tokens" || (std::string(input) == "labels" && id > 0);
        EXPECT_EQ(std::isnan(loss), counts) << loss;
      }
    }
  }
}

TEST(ExecutorTest, RangesAreTheProgramInPieces) {
  const proto::PlanProto plan = TinyPlan();
  ASSERT_OK_AND_ASSIGN(const auto whole, LoadForTest(plan));
  ASSERT_OK_AND_ASSIGN(const auto pieces, LoadForTest(plan));
  const std::string expected = TrainedBits(*whole, 1);
  ASSERT_OK(pieces->Prepare(0));
  const int count = pieces->train->proto().instructions_size();
  for (int i = 0; i < count; i += 3) pieces->train->RunRange(i, std::min(i + 3, count));
  EXPECT_TRUE(Bytes(*pieces->train->FindOutput("loss")) + AllStates(*pieces->executor) == expected);
}

TEST(ExecutorTest, InitialStatesComeFromTheSeedAndTheName) {
  const proto::PlanProto plan = TinyPlan();
  ASSERT_OK_AND_ASSIGN(const auto a, LoadForTest(plan));
  ASSERT_OK_AND_ASSIGN(const auto b, LoadForTest(plan));
  const std::string first = AllStates(*a->executor);
  EXPECT_TRUE(first == AllStates(*b->executor));
  b->executor->InitializeStates(123);
  EXPECT_FALSE(first == AllStates(*b->executor));
  b->executor->InitializeStates(7);
  EXPECT_TRUE(first == AllStates(*b->executor));
  int parameters = 0, zeros = 0, ones = 0;
  for (const BoundTensor& state : a->executor->states()) {
    const bool f32 = state.type.dtype == DType::kF32;
    if (state.role == Role::kOptimizerState) {
      EXPECT_EQ(Bytes(state), std::string(static_cast<size_t>(state.type.byte_size()), '\0')) << state.name;
      ++zeros;
    }
    if (state.role == Role::kParameter) ++parameters;
    if (f32 && state.role == Role::kParameter && absl::EndsWith(state.name, "weight") && state.type.rank() == 1) {
      EXPECT_EQ(state.data_as<float>()[0], 1.0f) << state.name;
      ++ones;
    }
  }
  EXPECT_GT(parameters, 5);
  EXPECT_GT(zeros, parameters);
  EXPECT_GT(ones, 1);
}

TEST(ExecutorTest, LooksUpByName) {
  ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(TinyPlan()));
  const Executor& executor = *loaded->executor;
  EXPECT_NE(executor.FindProgram("eval"), nullptr);
  EXPECT_EQ(executor.FindProgram("fly"), nullptr);
  EXPECT_EQ(executor.FindState("no.such.weight"), nullptr);
  EXPECT_EQ(loaded->train->FindInput("loss"), nullptr);
  EXPECT_EQ(loaded->train->FindOutput("tokens"), nullptr);
  ASSERT_NE(loaded->train->FindInput("tokens"), nullptr);
  EXPECT_EQ(loaded->train->FindInput("tokens")->type.ToString(), "i32[2,16]");
}

TEST(ExecutorTest, RefusesWhatItCannotRun) {
  const proto::PlanProto good = TinyPlan();
  const auto load = [](const proto::PlanProto& plan) {
    absl::StatusOr<std::unique_ptr<Backend>> backend = MakeCpuBackend(1);
    CHECK(backend.ok());
    return Executor::Load(plan, *std::move(backend));
  };
  proto::PlanProto plan = good;
  plan.set_target("cuda:sm_90");
  EXPECT_THAT(load(plan),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("cuda:sm_90"), HasSubstr("cpu"))));

  plan = good;
  plan.set_arena_bytes(int64_t{1} << 45);
  const int64_t before = ResidentBytes();
  EXPECT_THAT(load(plan), StatusIs(absl::StatusCode::kResourceExhausted,
                                   AllOf(HasSubstr("35184372088832 bytes"), HasSubstr("short"), HasSubstr("--batch"))));
  EXPECT_LT(ResidentBytes(), before + (16 << 20));

  plan = good;
  plan.mutable_programs(0)->mutable_instructions(0)->set_op("all_reduce");
  plan.mutable_programs(0)->mutable_instructions(0)->set_name("here");
  EXPECT_THAT(load(plan), StatusIs(absl::StatusCode::kUnimplemented,
                                   AllOf(HasSubstr("instruction 0, all_reduce \"here\""), HasSubstr("no kernel"))));
  EXPECT_THAT(MakeCpuBackend(-1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
}

TEST(ExecutorTest, NullRunsAnyPlanAnywhere) {
  proto::PlanProto plan = TinyPlan();
  plan.set_target("cuda:sm_90");
  plan.set_arena_bytes(int64_t{1} << 45);
  ASSERT_OK_AND_ASSIGN(const auto executor, Executor::Load(plan, MakeNullBackend()));
  for (const proto::ProgramProto& program : plan.programs()) executor->FindProgram(program.name())->Run();
  float loss = 1;
  executor->backend().CopyToHost(&loss, executor->FindProgram("train")->FindOutput("loss")->data, sizeof(loss));
  EXPECT_EQ(loss, 0);
  executor->InitializeStates(1);
}

}  // namespace
}  // namespace mt
