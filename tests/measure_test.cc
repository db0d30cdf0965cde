// The measurement: it agrees with good plans to the byte, and sees what is wrong in every other.
#include "runtime/measure.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// The cpu backend, with each thunk replaced by what `wrap` makes of it.
class WrappedBackend : public Backend {
 public:
  using Wrap = std::function<Thunk(const KernelCall&, Thunk)>;
  explicit WrappedBackend(Wrap wrap) : wrap_(std::move(wrap)) {
    absl::StatusOr<std::unique_ptr<Backend>> cpu = MakeCpuBackend(1);
    CHECK(cpu.ok()) << cpu.status();
    cpu_ = *std::move(cpu);
  }
  absl::string_view name() const override { return cpu_->name(); }
  absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) override { return cpu_->AllocateArena(bytes); }
  void CopyToDevice(std::byte* to, const void* from, int64_t bytes) override { cpu_->CopyToDevice(to, from, bytes); }
  void CopyToHost(void* to, const std::byte* from, int64_t bytes) override { cpu_->CopyToHost(to, from, bytes); }
  void Fill(std::byte* to, uint8_t value, int64_t bytes) override { cpu_->Fill(to, value, bytes); }
  absl::StatusOr<Thunk> Bind(const KernelCall& call) override {
    ASSIGN_OR_RETURN(Thunk thunk, cpu_->Bind(call));
    return wrap_(call, std::move(thunk));
  }
  void Synchronize() override { cpu_->Synchronize(); }
  absl::StatusOr<std::byte*> AllocateGuarded(int64_t bytes) override { return cpu_->AllocateGuarded(bytes); }
  int64_t DamagedGuard() override { return cpu_->DamagedGuard(); }

 private:
  Wrap wrap_;
  std::unique_ptr<Backend> cpu_;
};

// The measurement with one kernel of the plan wrapped: the first of `op`.
Measurement MeasureWrapped(absl::string_view op, const std::function<Thunk(const KernelCall&, Thunk)>& wrap) {
  bool done = false;
  auto backend = std::make_unique<WrappedBackend>([&](const KernelCall& call, Thunk thunk) {
    if (done || call.op->name != op) return thunk;
    done = true;
    return wrap(call, std::move(thunk));
  });
  auto loaded = LoadForTest(TinyPlan(), 1, std::move(backend));
  CHECK(loaded.ok()) << loaded.status();
  CHECK(done) << "the plan has no " << op;
  absl::StatusOr<Measurement> measurement = (*loaded)->Measure();
  CHECK(measurement.ok()) << measurement.status();
  return *std::move(measurement);
}

struct NamedPlan {
  std::string name;
  std::function<proto::PlanProto()> make;
};

class PlannedIsMeasured : public ::testing::TestWithParam<NamedPlan> {};

TEST_P(PlannedIsMeasured, ToTheByte) {
  const proto::PlanProto plan = GetParam().make();
  ASSERT_OK(VerifyPlan(plan));
  for (const int threads : {1, 3}) {
    SCOPED_TRACE(threads);
    ASSERT_OK_AND_ASSIGN(const auto loaded, LoadForTest(plan, threads));
    ASSERT_OK_AND_ASSIGN(const Measurement m, loaded->Measure());
    EXPECT_THAT(m.differences, IsEmpty());
    EXPECT_TRUE(m.same_over_poisons);
    EXPECT_TRUE(m.agrees());
    EXPECT_EQ(m.measured_arena_bytes, m.planned_arena_bytes);
    EXPECT_EQ(m.planned_arena_bytes, loaded->train->proto().peak_bytes());
    ASSERT_EQ(m.phases.size(), 3u);
    for (const PhaseMeasurement& phase : m.phases) {
      EXPECT_GT(phase.planned_bytes, 0) << phase.phase;
      EXPECT_EQ(phase.measured_bytes, phase.planned_bytes) << phase.phase;
    }
    EXPECT_EQ(m.counted_allocations, CanCountAllocations());
    EXPECT_EQ(m.allocations.count, 0);
    if (threads == 3) {
      std::printf("%s: arena %lld bytes planned and measured\n", GetParam().name.c_str(),
                  static_cast<long long>(m.measured_arena_bytes));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, PlannedIsMeasured,
    ::testing::Values(NamedPlan{"gpt", [] { return TinyPlan(); }},
                      NamedPlan{"two_layers",
                                [] {
                                  return TinyPlan({"layers=2", "tied_head=true"});
                                }},
                      NamedPlan{"dropout", [] { return TinyPlan({"dropout=0.2"}); }},
                      NamedPlan{"post_norm",
                                [] {
                                  return TinyPlan({"norm_placement=POST", "positions=SINUSOIDAL", "activation=RELU"});
                                }},
                      NamedPlan{"llama",
                                [] {
                                  return MustCompile("llama_160m", {.batch = 2,
                                                                    .sequence = 16,
                                                                    .vocab_size = 50,
                                                                    .sets = {"layers=2", "width=48", "heads=4",
                                                                             "kv_heads=2", "ffn_width=64"}});
                                }},
                      NamedPlan{"parallel_block", [] { return MustCompile("parallel_block", {}); }}),
    [](const auto& info) { return info.param.name; });

TEST(MeasureTest, RestoresStatesAndTrainsOnAsIfNothingHadBeen) {
  const auto losses = [](bool measure) {
    auto loaded = LoadForTest(TinyPlan({"dropout=0.1"}));
    CHECK(loaded.ok()) << loaded.status();
    if (measure) CHECK((*loaded)->Measure().ok());
    std::vector<float> values;
    for (int64_t step = 0; step < 4; ++step) {
      CHECK((*loaded)->Prepare(step).ok());
      (*loaded)->train->Run();
      values.push_back(*(*loaded)->train->FindOutput("loss")->data_as<float>());
    }
    return values;
  };
  EXPECT_EQ(losses(true), losses(false));
}

TEST(MeasureTest, NeedsAStepThatIsComputed) {
  ASSERT_OK_AND_ASSIGN(const auto executor, Executor::Load(TinyPlan(), MakeNullBackend()));
  const auto nothing = [] { return absl::OkStatus(); };
  EXPECT_THAT(MeasureProgram(*executor, *executor->FindProgram("train"), nothing, nothing),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("null")));
}

// Plans corrupted after they were verified.

struct Corruption {
  std::string what;
  proto::PlanProto plan;
};

// Loads without verifying. Every corruption that the verifier would refuse must be in the report.
std::string Differences(const Corruption& corruption) {
  auto loaded = LoadForTest(corruption.plan, 1);
  if (!loaded.ok()) return std::string(loaded.status().message());  // A kernel refused its operands.
  absl::StatusOr<Measurement> m = (*loaded)->Measure();
  CHECK(m.ok()) << corruption.what << ": " << m.status();
  std::string text;
  for (const std::string& line : m->differences) absl::StrAppend(&text, line, "\n");
  EXPECT_EQ(m->agrees(), text.empty()) << corruption.what;
  return text;
}

bool FitsTheArena(const proto::PlanProto& plan, const proto::BufferProto& buffer) {
  return buffer.offset() >= 0 && buffer.size_bytes() > 0 &&
         buffer.offset() + AlignedBytes(plan, buffer.size_bytes()) <= plan.arena_bytes();
}

int TrainIndex(const proto::PlanProto& plan) {
  for (int i = 0; i < plan.programs_size(); ++i) {
    if (plan.programs(i).name() == "train") return i;
  }
  return -1;
}

// Small enough that every buffer can be tried.
proto::PlanProto SmallestPlan() { return TinyPlan({"width=16", "ffn_width=32"}, 1, 8, 24); }

TEST(CorruptedPlanTest, EveryOffsetAndSizeThatTheVerifierRefusesIsReported) {
  const proto::PlanProto good = SmallestPlan();
  ASSERT_OK(VerifyPlan(good));
  const int train = TrainIndex(good);
  struct Kind {
    std::string name;
    std::function<void(proto::BufferProto&)> apply;
    int tried = 0, harmless = 0;
  };
  Kind kinds[] = {
      {"offset + 256", [](proto::BufferProto& b) { b.set_offset(b.offset() + 256); }},
      {"offset - 256", [](proto::BufferProto& b) { b.set_offset(b.offset() - 256); }},
      {"offset + 2048", [](proto::BufferProto& b) { b.set_offset(b.offset() + 2048); }},
      {"offset = 0", [](proto::BufferProto& b) { b.set_offset(0); }},
      {"size halved", [](proto::BufferProto& b) { b.set_size_bytes(b.size_bytes() / 2); }},
      {"size + 256", [](proto::BufferProto& b) { b.set_size_bytes(b.size_bytes() + 256); }},
      {"size doubled", [](proto::BufferProto& b) { b.set_size_bytes(2 * b.size_bytes() + 256); }},
  };
  int missed = 0;
  for (Kind& kind : kinds) {
    for (int b = 0; b < good.buffers_size(); ++b) {
      Corruption corruption{absl::StrCat("buffer ", b, " ", good.buffers(b).name(), ": ", kind.name), good};
      proto::BufferProto& buffer = *corruption.plan.mutable_buffers(b);
      if (buffer.program() != -1 && buffer.program() != train) continue;
      // A larger workspace is a waste that no kernel can show; a smaller one, kernels refuse at load.
      if (buffer.memory_class() == proto::WORKSPACE && absl::StartsWith(kind.name, "size")) continue;
      kind.apply(buffer);
      if (buffer.offset() == good.buffers(b).offset() && buffer.size_bytes() == good.buffers(b).size_bytes()) continue;
      if (!FitsTheArena(good, buffer)) continue;
      const absl::Status verified = VerifyPlan(corruption.plan);
      // Moved into a hole: but for its statistics, another good plan.
      const bool moved = buffer.size_bytes() == good.buffers(b).size_bytes();
      if (verified.ok() || (moved && absl::StrContains(std::string(verified.message()), "peak_bytes is"))) {
        ++kind.harmless;
        continue;
      }
      ++kind.tried;
      if (!Differences(corruption).empty()) continue;
      ++missed;
      ADD_FAILURE() << corruption.what << " is not reported; the verifier says: " << verified.message();
    }
    EXPECT_GT(kind.tried, 0) << kind.name;
    std::printf("%-14s %d corrupted plans reported, %d still good plans\n", kind.name.c_str(), kind.tried,
                kind.harmless);
  }
  EXPECT_EQ(missed, 0);
}

TEST(CorruptedPlanTest, TheReportNamesBufferAndInstruction) {
  proto::PlanProto plan = SmallestPlan();
  // The token embedding's activation onto the first state.
  const proto::ProgramProto& train = plan.programs(TrainIndex(plan));
  const int result = train.instructions(0).results(0);
  const int buffer = train.tensors(result).buffer();
  plan.mutable_buffers(buffer)->set_offset(0);
  const std::string text = Differences({"first result onto the states", plan});
  EXPECT_THAT(text, HasSubstr(absl::StrCat("instruction 0, ", train.instructions(0).op())));
  EXPECT_THAT(text, HasSubstr(absl::StrCat("in live buffer 0 \"", plan.buffers(0).name(), "\"")));
  EXPECT_THAT(text, HasSubstr(absl::StrCat("buffer ", buffer, " ")));
}

TEST(CorruptedPlanTest, RedirectedResultsAreReported) {
  const proto::PlanProto good = SmallestPlan();
  const int index = TrainIndex(good);
  const proto::ProgramProto& train = good.programs(index);
  int tried = 0;
  for (int i = 0; i < train.instructions_size(); ++i) {
    const OpDef* op = FindOp(train.instructions(i).op());
    if (op->is_view || train.instructions(i).results_size() == 0) continue;
    const int result = train.instructions(i).results(0);
    // The next tensor of the same type in another buffer.
    for (int t = 0; t < train.tensors_size(); ++t) {
      const int other = (result + 1 + t) % train.tensors_size();
      if (train.tensors(other).buffer() == train.tensors(result).buffer()) continue;
      if (train.tensors(other).type().SerializeAsString() != train.tensors(result).type().SerializeAsString()) continue;
      Corruption corruption{absl::StrCat("instruction ", i, " ", op->name, " into tensor ", other), good};
      corruption.plan.mutable_programs(index)->mutable_instructions(i)->set_results(0, other);
      const absl::Status verified = VerifyPlan(corruption.plan);
      if (verified.ok()) continue;
      ++tried;
      EXPECT_NE(Differences(corruption), "")
          << corruption.what << " is not reported; the verifier says: " << verified.message();
      break;
    }
  }
  EXPECT_GT(tried, 20);
  std::printf("%d redirected results reported\n", tried);
}

// Libraries and kernels that do what the plan does not say.

TEST(MeasureTest, AllocationsBehindThePlanTurnTheReportRed) {
  if (!CanCountAllocations()) GTEST_SKIP() << "this build cannot count allocations (sanitizers)";
  const Measurement m = MeasureWrapped("gelu", [](const KernelCall&, Thunk thunk) {
    return [thunk] {
      thunk();
      volatile char* block = static_cast<char*>(std::malloc(1 << 20));
      block[12345] = 1;
      std::free(const_cast<char*>(block));
    };
  });
  EXPECT_FALSE(m.agrees());
  EXPECT_EQ(m.allocations.count, 1);
  EXPECT_EQ(m.allocations.bytes, 1 << 20);
  EXPECT_THAT(m.differences, ElementsAre(HasSubstr("1 allocations outside the plan, 1.0 MiB")));
}

TEST(MeasureTest, SmallBlocksAreCountedApart) {
  if (!CanCountAllocations()) GTEST_SKIP() << "this build cannot count allocations (sanitizers)";
  const Measurement m = MeasureWrapped("gelu", [](const KernelCall&, Thunk thunk) {
    return [thunk] {
      thunk();
      volatile char* block = static_cast<char*>(std::malloc(100));
      block[3] = 1;
      std::free(const_cast<char*>(block));
    };
  });
  EXPECT_TRUE(m.agrees());
  EXPECT_GE(m.allocations.small_count, 1);
}

TEST(MeasureTest, AKernelThatReadsBeforeItWritesIsSeen) {
  const Measurement m = MeasureWrapped("gelu", [](const KernelCall& call, Thunk thunk) {
    return [result = call.results[0], thunk] {
      const float stale = result.as<float>()[5];
      thunk();
      if (stale > 1) result.as<float>()[5] += 0.5f;
    };
  });
  EXPECT_FALSE(m.same_over_poisons);
  EXPECT_THAT(m.differences, Contains(HasSubstr("read before it is written")));
}

TEST(MeasureTest, AKernelThatLeavesBytesOutIsSeen) {
  // The last 256 bytes of its result keep what they held.
  const Measurement m = MeasureWrapped("gelu", [](const KernelCall& call, Thunk thunk) {
    return [result = call.results[0], thunk] {
      std::byte* tail = result.data + result.type.byte_size() - 256;
      std::byte before[256];
      std::memcpy(before, tail, 256);
      thunk();
      std::memcpy(tail, before, 256);
    };
  });
  EXPECT_FALSE(m.agrees());
}

TEST(MeasureTest, AKernelThatWritesIntoAParameterIsSeen) {
  const Measurement m = MeasureWrapped("matmul", [](const KernelCall& call, Thunk thunk) {
    return [weight = call.operands[1], thunk] {
      thunk();
      weight.as<float>()[0] += 1;
    };
  });
  EXPECT_FALSE(m.agrees());
  EXPECT_THAT(m.differences, Contains(HasSubstr("256 bytes were written outside the plan")));
}

TEST(MeasureTest, PeakResidentBytesFollowsTheProcess) {
#ifdef MT_SANITIZED
  GTEST_SKIP() << "a sanitizer keeps what was freed";
#endif
  const int64_t before = ResidentBytes();
  ASSERT_GT(before, 0);
  {
    std::vector<char> block(64 << 20, 1);
    EXPECT_GE(ResidentBytes(), before + (60 << 20));
    EXPECT_EQ(block[block.size() / 2], 1);
  }
  EXPECT_GE(PeakResidentBytes(), before + (60 << 20));
  ResetPeakResidentBytes();
  EXPECT_LT(PeakResidentBytes(), before + (32 << 20));
}

}  // namespace
}  // namespace mt
