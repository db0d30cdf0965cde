// Training, measuring and tracing on a backend that does its work later and whose memory the host cannot touch: what a
// GPU is to the runtime, on any machine. And buffers between guards.
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "runtime/data/prep.h"
#include "runtime/trace.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The cpu backend behind a device's manners. Addresses of the arena are no addresses of this process. Nothing is done
// before somebody waits for it; with `eager_inputs`, copies of inputs are done as early as they may be.
class DelayedBackend : public Backend {
 public:
  explicit DelayedBackend(bool eager_inputs) : eager_inputs_(eager_inputs) {
    absl::StatusOr<std::unique_ptr<Backend>> cpu = MakeCpuBackend(1);
    CHECK(cpu.ok()) << cpu.status();
    cpu_ = *std::move(cpu);
  }
  absl::string_view name() const override { return "cpu"; }
  bool host_addressable() const override { return false; }
  int64_t programs_in_flight() const override { return 2; }
  absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) override {
    arena_bytes_ = bytes;
    ASSIGN_OR_RETURN(arena_, cpu_->AllocateArena(bytes));
    return kElsewhere;
  }
  absl::StatusOr<std::byte*> AllocateGuarded(int64_t) override { return absl::UnimplementedError("no guards"); }
  void CopyToDevice(std::byte* to, const void* from, int64_t bytes) override {
    Synchronize();
    std::memcpy(Real(to), from, static_cast<size_t>(bytes));
  }
  void CopyToHost(void* to, const std::byte* from, int64_t bytes) override {
    Synchronize();
    std::memcpy(to, Real(const_cast<std::byte*>(from)), static_cast<size_t>(bytes));
  }
  void Fill(std::byte* to, uint8_t value, int64_t bytes) override {
    Push(Lane::kThunks, {.work = [=, this] { std::memset(Real(to), value, static_cast<size_t>(bytes)); }});
  }
  absl::StatusOr<Thunk> Bind(const KernelCall& call) override {
    KernelCall real = call;
    for (std::vector<Tensor>* tensors : {&real.operands, &real.results}) {
      for (Tensor& tensor : *tensors) tensor.data = Real(tensor.data);
    }
    if (real.workspace != nullptr) real.workspace = Real(real.workspace);
    ASSIGN_OR_RETURN(Thunk thunk, cpu_->Bind(real));
    return Thunk([this, thunk = std::move(thunk)] { Push(Lane::kThunks, {.work = thunk}); });
  }
  void Copy(Lane lane, void* to, const void* from, int64_t bytes) override {
    std::byte *real_to = Real(static_cast<std::byte*>(to)),
              *real_from = Real(static_cast<std::byte*>(const_cast<void*>(from)));
    Push(lane, {.work = [=] { std::memcpy(real_to, real_from, static_cast<size_t>(bytes)); }});
  }
  int64_t Record(Lane lane) override {
    lane_of_.push_back(lane);
    reached_.push_back(false);
    const int64_t point = static_cast<int64_t>(reached_.size()) - 1;
    Push(lane, {.point = point});
    return point;
  }
  void WaitIn(Lane lane, int64_t point) override { Push(lane, {.waits_for = point}); }
  void WaitOnHost(int64_t point) override {
    ++waits_;
    RunTo(point);
  }
  void Synchronize() override {
    ++synchronized_;
    while (RunOne(Lane::kThunks)) continue;
  }
  int waits() const { return waits_; }
  int synchronized() const { return synchronized_; }

 private:
  struct Item {
    std::function<void()> work = {};
    int64_t waits_for = -1, point = -1;
  };
  static inline std::byte* const kElsewhere = reinterpret_cast<std::byte*>(uintptr_t{0xdead} << 48);

  std::byte* Real(std::byte* at) const {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(kElsewhere);
    return offset < static_cast<uintptr_t>(arena_bytes_) ? arena_ + offset : at;
  }
  std::deque<Item>& Queue(Lane lane) { return lane == Lane::kThunks ? thunks_ : inputs_; }
  void Push(Lane lane, Item item) {
    Queue(lane).push_back(std::move(item));
    while (eager_inputs_ && lane == Lane::kInputs && RunOne(lane)) continue;
  }
  void RunTo(int64_t point) {
    while (!reached_[static_cast<size_t>(point)]) ASSERT_TRUE(RunOne(lane_of_[static_cast<size_t>(point)]));
  }
  bool RunOne(Lane lane) {
    if (Queue(lane).empty()) return false;
    const Item item = std::move(Queue(lane).front());
    Queue(lane).pop_front();
    if (item.waits_for >= 0) RunTo(item.waits_for);
    if (item.point >= 0) reached_[static_cast<size_t>(item.point)] = true;
    if (item.work) item.work();
    return true;
  }

  const bool eager_inputs_;
  std::unique_ptr<Backend> cpu_;
  std::byte* arena_ = nullptr;
  int64_t arena_bytes_ = 0;
  std::deque<Item> thunks_, inputs_;
  std::vector<Lane> lane_of_;
  std::vector<bool> reached_;
  int waits_ = 0, synchronized_ = 0;
};

// What a plan for a device has: a second buffer for each data input of "train", behind everything else.
void AddStaging(proto::PlanProto& plan) {
  for (int p = 0; p < plan.programs_size(); ++p) {
    proto::ProgramProto& program = *plan.mutable_programs(p);
    if (program.name() != "train") continue;
    for (proto::ProgramInput& input : *program.mutable_inputs()) {
      if (input.role() != "data") continue;
      proto::BufferProto& buffer = *plan.add_buffers();
      buffer.set_name(absl::StrCat(input.name(), ".next"));
      buffer.set_offset(AlignedBytes(plan, plan.arena_bytes()));
      buffer.set_size_bytes(plan.buffers(program.tensors(input.tensor()).buffer()).size_bytes());
      buffer.set_memory_class(proto::IO);
      buffer.set_program(p);
      buffer.set_last(program.instructions_size() - 1);
      plan.set_arena_bytes(buffer.offset() + AlignedBytes(plan, buffer.size_bytes()));
      program.set_peak_bytes(plan.arena_bytes());
      input.set_staging(plan.buffers_size() - 1);
    }
  }
}

class DeviceTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("device_test");
    ASSERT_OK_AND_ASSIGN(vocab_, PrepareCharacters(folder_->path(), GeneratedText(60)));
  }
  static void TearDownTestSuite() { delete folder_; }

  static absl::StatusOr<proto::PlanProto> PlanOf(const std::string& passes) {
    CompileOptions options;
    options.passes = passes;
    ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(options));
    const ModelOptions model = {.batch = 4,
                                .sequence = 32,
                                .vocab_size = vocab_,
                                .sets = {"layers=1", "width=32", "heads=2"},
                                .microbatches = MicrobatchesOf(pipeline)};
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel("tiny_char", model));
    return Compile(std::move(module), options);
  }

  // All that a run tells, as text.
  static std::string Trained(proto::PlanProto plan, std::unique_ptr<Backend> backend, TrainOptions options,
                             int interrupt_after = 1 << 30, Placement placement = Placement::kArena) {
    absl::StatusOr<std::unique_ptr<Executor>> executor = Executor::Load(std::move(plan), std::move(backend), placement);
    CHECK(executor.ok()) << executor.status();
    (*executor)->InitializeStates(0);
    absl::StatusOr<std::unique_ptr<Trainer>> trainer = Trainer::Create(**executor, folder_->Path("corpus"));
    CHECK(trainer.ok()) << trainer.status();
    std::string text;
    TrainHooks hooks;
    hooks.on_step = [&](const StepMetrics& m) {
      absl::StrAppend(&text, m.step, " ", m.loss, " ", m.grad_norm, " ", m.lr, "\n");
      return absl::OkStatus();
    };
    hooks.on_eval = [&](int64_t step, const EvalMetrics& eval) {
      absl::StrAppend(&text, "eval ", step, " ", eval.loss, " ", eval.tokens, "\n");
      return absl::OkStatus();
    };
    int asked = 0;
    hooks.interrupted = [&] { return ++asked > interrupt_after; };
    absl::StatusOr<TrainResult> result = (*trainer)->Train(options, hooks);
    if (result.ok() && result->paused) {
      options.from = *result;
      options.pause_after.reset();
      result = (*trainer)->Train(options, hooks);
    }
    if (!result.ok()) return absl::StrCat(text, result.status().message());
    const absl::StatusOr<EvalMetrics> eval = (*trainer)->Evaluate("val", 0);
    CHECK(eval.ok()) << eval.status();
    return absl::StrCat(text, result->steps, " steps, ", result->tokens, " tokens, ", result->last_loss, ", val ",
                        eval->loss, result->interrupted ? ", interrupted" : "");
  }
  static std::unique_ptr<Backend> Cpu() { return std::move(MakeCpuBackend(1)).value(); }

  static ProcessFolder* folder_;
  static int64_t vocab_;
};

ProcessFolder* DeviceTest::folder_ = nullptr;
int64_t DeviceTest::vocab_ = 0;

TEST_F(DeviceTest, TrainsAsIfTheHostHadWaited) {
  for (const char* passes : {"none", "accumulate:2"}) {
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanOf(passes));
    proto::PlanProto staged = plan;
    AddStaging(staged);
    TrainOptions options = Steps(12);
    options.eval_every = 5;
    options.eval_batches = 2;
    options.schedule = LrShape::kPlateau;
    options.patience = 1;
    const std::string expected = Trained(plan, Cpu(), options);
    EXPECT_THAT(expected, HasSubstr("\neval 10 "));
    for (const bool eager : {false, true}) {
      SCOPED_TRACE(absl::StrCat(passes, eager ? ", early copies" : ", late copies"));
      EXPECT_EQ(Trained(staged, std::make_unique<DelayedBackend>(eager), options), expected);
      EXPECT_EQ(Trained(plan, std::make_unique<DelayedBackend>(eager), options), expected) << "without staging";
      for (const int64_t pause : {5, 7}) {
        TrainOptions paused = options;
        paused.pause_after = pause;
        EXPECT_EQ(Trained(staged, std::make_unique<DelayedBackend>(eager), paused), expected) << pause;
      }
    }
    const std::string interrupted = Trained(plan, Cpu(), options, 7);
    EXPECT_THAT(interrupted, HasSubstr("7 steps"));
    EXPECT_EQ(Trained(staged, std::make_unique<DelayedBackend>(true), options, 7), interrupted);
  }
}

TEST_F(DeviceTest, AStepThatIsNotFiniteIsNamedThoughTheNextOneHasBegun) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanOf("none"));
  TrainOptions options = Steps(40);
  options.scalars.lr = 1e30;
  const std::string expected = Trained(plan, Cpu(), options);
  EXPECT_THAT(expected, HasSubstr("not finite; try a smaller --lr"));
  EXPECT_EQ(Trained(plan, std::make_unique<DelayedBackend>(false), options), expected);
}

TEST_F(DeviceTest, TheHostWaitsOnceAStepForTheOneBefore) {
  ASSERT_OK_AND_ASSIGN(proto::PlanProto plan, PlanOf("none"));
  AddStaging(plan);
  auto backend = std::make_unique<DelayedBackend>(false);
  const DelayedBackend& device = *backend;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Executor> executor, Executor::Load(plan, std::move(backend)));
  executor->InitializeStates(0);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Trainer> trainer, Trainer::Create(*executor, folder_->Path("corpus")));
  std::vector<int> synchronized;
  TrainHooks hooks;
  hooks.on_step = [&](const StepMetrics&) {
    synchronized.push_back(device.synchronized());
    return absl::OkStatus();
  };
  ASSERT_OK(trainer->Train(Steps(10), hooks));
  ASSERT_EQ(synchronized.size(), 10u);
  EXPECT_EQ(synchronized.front(), synchronized.back());
}

TEST_F(DeviceTest, MeasuresAndTraces) {
  proto::PlanProto plan = TinyPlan();
  AddStaging(plan);
  const auto measured = [&](std::unique_ptr<Backend> backend) -> absl::StatusOr<Measurement> {
    ASSIGN_OR_RETURN(const std::unique_ptr<LoadedPlan> loaded, LoadForTest(plan, 1, std::move(backend)));
    return loaded->Measure();
  };
  ASSERT_OK_AND_ASSIGN(const Measurement expected, measured(nullptr));
  ASSERT_OK_AND_ASSIGN(const Measurement device, measured(std::make_unique<DelayedBackend>(true)));
  EXPECT_THAT(device.differences, ElementsAre());
  EXPECT_TRUE(device.same_over_poisons);
  EXPECT_EQ(device.planned_arena_bytes, plan.arena_bytes());
  EXPECT_EQ(device.measured_arena_bytes, plan.arena_bytes());
  EXPECT_EQ(device.idle_workspace_bytes, 0);
  ASSERT_EQ(device.phases.size(), expected.phases.size());
  for (size_t p = 0; p < device.phases.size(); ++p) {
    EXPECT_GT(device.phases[p].measured_bytes, 0);
    EXPECT_EQ(device.phases[p].measured_bytes, device.phases[p].planned_bytes);
    EXPECT_EQ(device.phases[p].measured_bytes, expected.phases[p].measured_bytes);
    EXPECT_EQ(device.phases[p].workspace_bytes, expected.phases[p].workspace_bytes);
  }

  // Workspace at the top that nobody touches is not measured, and said to be that.
  proto::BufferProto& idle = *plan.add_buffers();
  idle.set_offset(plan.arena_bytes());
  idle.set_size_bytes(1 << 20);
  idle.set_memory_class(proto::WORKSPACE);
  plan.set_arena_bytes(plan.arena_bytes() + idle.size_bytes());
  for (proto::ProgramProto& program : *plan.mutable_programs()) {
    if (program.name() == "train") program.set_peak_bytes(plan.arena_bytes());
  }
  ASSERT_OK_AND_ASSIGN(const Measurement with_idle, measured(std::make_unique<DelayedBackend>(true)));
  EXPECT_EQ(with_idle.idle_workspace_bytes, 1 << 20);
  EXPECT_EQ(with_idle.measured_arena_bytes, device.measured_arena_bytes);

  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LoadedPlan> loaded,
                       LoadForTest(plan, 1, std::make_unique<DelayedBackend>(false)));
  const std::string path = folder_->Path("trace.json");
  ASSERT_OK(WriteTrace(*loaded->executor, {{loaded->train, [&] { return loaded->Prepare(); }}}, path));
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(path));
  const nlohmann::json trace = nlohmann::json::parse(text);
  double last = -1;
  int slices = 0;
  for (const nlohmann::json& event : trace["traceEvents"]) {
    if (event["ph"] != "X" || event["tid"] != 2) continue;
    ++slices;
    EXPECT_GE(event["ts"].get<double>(), last);
    last = event["ts"];
  }
  EXPECT_GT(slices, 20);
}

TEST_F(DeviceTest, GuardedBuffersGiveTheSameResults) {
  for (const char* passes : {"default", "bf16,accumulate:2"}) {
    ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanOf(passes));
    EXPECT_EQ(Trained(plan, Cpu(), Steps(3), 99, Placement::kGuard), Trained(plan, Cpu(), Steps(3)));
  }
}

// The cpu backend with a kernel that writes one byte too many.
class CarelessBackend : public Backend {
 public:
  explicit CarelessBackend(int64_t beside) : beside_(beside), cpu_(std::move(MakeCpuBackend(1)).value()) {}
  absl::string_view name() const override { return "cpu"; }
  absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) override { return cpu_->AllocateArena(bytes); }
  absl::StatusOr<std::byte*> AllocateGuarded(int64_t bytes) override { return cpu_->AllocateGuarded(bytes); }
  int64_t DamagedGuard() override { return cpu_->DamagedGuard(); }
  void CopyToDevice(std::byte* to, const void* from, int64_t bytes) override { cpu_->CopyToDevice(to, from, bytes); }
  void CopyToHost(void* to, const std::byte* from, int64_t bytes) override { cpu_->CopyToHost(to, from, bytes); }
  void Fill(std::byte* to, uint8_t value, int64_t bytes) override { cpu_->Fill(to, value, bytes); }
  void Synchronize() override {}
  absl::StatusOr<Thunk> Bind(const KernelCall& call) override {
    ASSIGN_OR_RETURN(Thunk thunk, cpu_->Bind(call));
    if (call.op->name != "global_norm") return thunk;
    std::byte* const behind = call.results[0].data + call.results[0].type.byte_size() + beside_;
    return Thunk([thunk = std::move(thunk), behind] {
      thunk();
      *behind = std::byte{1};
    });
  }

 private:
  const int64_t beside_;
  std::unique_ptr<Backend> cpu_;
};

using DeviceDeathTest = DeviceTest;

TEST_F(DeviceDeathTest, AWriteBesideAGuardedBufferEndsTheRunAndNamesTheInstruction) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanOf("none"));
  const auto run = [&](int64_t beside) {
    return Trained(plan, std::make_unique<CarelessBackend>(beside), Steps(1), 99, Placement::kGuard);
  };
  // The norm, four bytes: within the alignment. Then far beyond it, where no memory is.
  EXPECT_DEATH(run(0), "global_norm .*wrote beside buffer [0-9]+");
  EXPECT_DEATH(run(4096), "");
}

}  // namespace
}  // namespace mt
