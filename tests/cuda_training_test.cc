// Training on a CUDA device: the CPU's losses, and the same bits however a plan was made and is run. Without a device
// the tests skip and say so. What was found is printed, one JSON object a line.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/cuda/code.h"
#include "codegen/plan/gpu.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/json.h"
#include "ir/target.h"
#include "runtime/checkpoint/states.h"
#include "runtime/cuda/backend.h"
#include "runtime/data/prep.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

// A cut of a zoo model whose heads are as wide as those of the large ones.
struct Cut {
  std::string spec;
  std::vector<std::string> sets;
  double lr;
};
const Cut kGpt = {"tiny_char", {"layers=2", "width=128", "heads=2", "dropout=0.1"}, 3e-3};
const Cut kLlama = {"llama_160m", {"layers=2", "width=256", "heads=4", "kv_heads=2", "ffn_width=512"}, 5e-4};

struct Trained {
  std::vector<double> losses;
  uint64_t hash = 0;  // Of all states at the end.
  int64_t skipped = 0;
};

class CudaTraining : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("cuda_training_test");
    ASSERT_OK_AND_ASSIGN(vocab_, PrepareCharacters(folder_->path(), GeneratedText(200)));
  }
  static void TearDownTestSuite() { delete folder_; }
  void SetUp() override {
    const absl::StatusOr<CudaDeviceInfo> info = DescribeCudaDevice(0);
    if (!info.ok()) GTEST_SKIP() << info.status().message();
    ASSERT_OK_AND_ASSIGN(target_, TargetOfDevice(info->sm));
    device_ = info->name;
  }

  absl::StatusOr<proto::PlanProto> PlanOf(const Cut& cut, const std::string& passes, bool on_device) const {
    CompileOptions options;
    options.passes = passes;
    options.target = on_device ? target_.ToString() : "cpu";
    options.device_code = on_device;
    ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(options));
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(cut.spec, {.batch = 8,
                                                                          .sequence = 128,
                                                                          .vocab_size = vocab_,
                                                                          .sets = cut.sets,
                                                                          .microbatches = MicrobatchesOf(pipeline)}));
    return Compile(std::move(module), options);
  }

  struct How {
    double lr = 0;
    Placement placement = Placement::kArena;
    bool time_matmuls = true;
    float loss_scale = 0;  // To begin with; 0: the plan's.
  };
  static absl::StatusOr<Trained> Train(proto::PlanProto plan, int64_t steps, const How& how) {
    std::unique_ptr<Backend> backend;
    ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
    if (target.is_cuda()) {
      ASSIGN_OR_RETURN(backend, MakeCudaBackend(0, {.time_matmuls = how.time_matmuls}));
    } else {
      ASSIGN_OR_RETURN(backend, MakeCpuBackend(0));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Executor> executor,
                     Executor::Load(std::move(plan), std::move(backend), how.placement));
    executor->InitializeStates(3);
    if (how.loss_scale > 0) {
      const BoundTensor* scale = executor->FindState("loss_scale");
      if (scale == nullptr) return absl::NotFoundError("the plan has no loss scale");
      executor->backend().CopyToDevice(scale->data, &how.loss_scale, sizeof(how.loss_scale));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Trainer> trainer, Trainer::Create(*executor, folder_->Path("corpus")));
    TrainOptions options = Steps(steps);
    options.warmup_steps = 5;
    options.scalars.seed = 3;
    options.scalars.lr = how.lr;
    Trained outcome;
    TrainHooks hooks;
    hooks.on_step = [&](const StepMetrics& step) {
      outcome.losses.push_back(step.loss);
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(const TrainResult result, trainer->Train(options, hooks));
    outcome.skipped = result.skipped_steps;
    std::vector<SavedState> states;
    SnapshotStates(*executor, &states);
    for (const SavedState& state : states) {
      outcome.hash = Fnv1a(state.bytes, Fnv1a(state.tensor.name, outcome.hash + 1));
    }
    return outcome;
  }
  void Print(const Json& line) const {
    Json all = {{"device", device_}};
    all.update(line);
    std::cout << all.dump() << std::endl;
  }

  static ProcessFolder* folder_;
  static int64_t vocab_;
  Target target_;
  std::string device_;
};

ProcessFolder* CudaTraining::folder_ = nullptr;
int64_t CudaTraining::vocab_ = 0;

TEST_F(CudaTraining, FollowsTheLossesOfTheCpu) {
  struct Case {
    const Cut& cut;
    const char* passes;
    double tolerance;
  };
  const Case cases[] = {{kGpt, "none", 1e-4},
                        {kLlama, "none", 1e-4},
                        {kGpt, "flash,chunked_loss,pad_vocab,fuse,remat:free", 1e-4},
                        {kLlama, "flash:window=32,chunked_loss,fuse", 1e-4},
                        {kGpt, "accumulate:2,fuse,remat", 1e-4},
                        {kGpt, "adamw8bit,flash,fuse", 1e-3},  // A last bit decides between two of 256 values.
                        {kGpt, "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free", 1e-2},
                        {kLlama, "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free", 1e-2},
                        {kGpt, "bf16,fuse", 1e-2},
                        {kGpt, "fp16,flash,fuse", 1e-2}};
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(c.cut.spec, ", ", c.passes));
    if (!target_.Computes(DType::kBF16) && absl::StrContains(c.passes, "bf16")) continue;
    ASSERT_OK_AND_ASSIGN(proto::PlanProto on_cpu, PlanOf(c.cut, c.passes, false));
    ASSERT_OK_AND_ASSIGN(proto::PlanProto on_device, PlanOf(c.cut, c.passes, true));
    ASSERT_OK_AND_ASSIGN(const Trained cpu, Train(std::move(on_cpu), 50, {.lr = c.cut.lr}));
    ASSERT_OK_AND_ASSIGN(const Trained device, Train(std::move(on_device), 50, {.lr = c.cut.lr}));
    ASSERT_EQ(cpu.losses.size(), 50);
    ASSERT_EQ(device.losses.size(), 50);
    EXPECT_LT(cpu.losses.back(), 0.9 * cpu.losses.front());
    double worst = 0;
    size_t worst_step = 0;
    for (size_t i = 0; i < cpu.losses.size(); ++i) {
      const double difference = std::abs(device.losses[i] - cpu.losses[i]) / std::abs(cpu.losses[i]);
      if (difference >= worst) worst_step = i + 1;
      worst = std::max(worst, difference);
    }
    EXPECT_LE(worst, c.tolerance);
    Print({{"check", "cuda against cpu"},
           {"model", c.cut.spec},
           {"passes", c.passes},
           {"steps", 50},
           {"first_loss", cpu.losses.front()},
           {"last_loss", cpu.losses.back()},
           {"worst_relative_difference", worst},
           {"at_step", worst_step},
           {"tolerance", c.tolerance}});
  }
}

// Dropout is on. What recomputes or fuses, where buffers lie, whether a program is one graph (between guards it is
// not), where a matmul's algorithm came from: none changes a bit of the states after 20 steps.
TEST_F(CudaTraining, TheSameBitsHoweverAPlanWasMadeAndIsRun) {
  struct Family {
    const Cut& cut;
    std::string passes;
    float loss_scale = 0;
  };
  const Family families[] = {{kGpt, "none"},
                             {kGpt, "tf32,flash"},
                             {kGpt, "bf16,flash,chunked_loss,pad_vocab"},
                             {kLlama, "bf16,flash,chunked_loss"},
                             {kGpt, "bf16,flash:window=32,accumulate:2"},
                             {kGpt, "fp16,flash,adamw8bit", 0x1p24f}};
  const char* old_cache = std::getenv("XDG_CACHE_HOME");
  const std::optional<std::string> kept = old_cache == nullptr ? std::nullopt : std::optional<std::string>(old_cache);
  const auto use_cache = [&](const std::optional<std::string>& folder) {
    if (folder) {
      setenv("XDG_CACHE_HOME", folder->c_str(), 1);
    } else {
      unsetenv("XDG_CACHE_HOME");
    }
  };
  for (const Family& family : families) {
    if (!target_.Computes(DType::kBF16) && absl::StrContains(family.passes, "bf16")) continue;
    std::map<std::string, proto::PlanProto> plans;
    for (const char* more : {"", "fuse", "remat", "fuse,remat", "fuse,remat:free"}) {
      const std::string passes = family.passes == "none" && *more != '\0' ? more
                                 : *more == '\0'                          ? family.passes
                                                                          : absl::StrCat(family.passes, ",", more);
      ASSERT_OK_AND_ASSIGN(plans[passes], PlanOf(family.cut, passes, true));
    }
    const proto::PlanProto& plain = plans[family.passes];
    const std::string full = family.passes == "none" ? "fuse,remat" : family.passes + ",fuse,remat";
    std::map<std::string, Trained> outcomes;
    const auto run = [&](const std::string& name, const proto::PlanProto& plan, How how) {
      how.lr = family.cut.lr;
      how.loss_scale = family.loss_scale;
      ASSERT_OK_AND_ASSIGN(outcomes[name], Train(plan, 20, how));
    };
    for (const auto& [passes, plan] : plans) ASSERT_NO_FATAL_FAILURE(run(passes, plan, {}));
    ASSERT_NO_FATAL_FAILURE(run("again", plain, {}));
    ASSERT_NO_FATAL_FAILURE(run("heuristic algorithms", plain, {.time_matmuls = false}));
    ASSERT_NO_FATAL_FAILURE(run("no graph, other places", plain, {.placement = Placement::kGuard}));
    ASSERT_NO_FATAL_FAILURE(
        run("no graph, other places, fuse and remat", plans[full], {.placement = Placement::kGuard}));
    use_cache(folder_->Path("cache"));
    std::filesystem::remove_all(folder_->Path("cache"));
    run("empty cache of algorithms", plain, {});
    EXPECT_TRUE(std::filesystem::exists(folder_->Path("cache/mt/matmuls.json")));
    run("full cache of algorithms", plain, {});
    use_cache(kept);
    const Trained& expected = outcomes[family.passes];
    std::vector<std::string> runs;
    for (const auto& [name, outcome] : outcomes) {
      EXPECT_EQ(outcome.hash, expected.hash) << family.cut.spec << ", " << family.passes << ": " << name;
      EXPECT_EQ(outcome.losses, expected.losses) << family.cut.spec << ", " << family.passes << ": " << name;
      runs.push_back(name);
    }
    if (family.loss_scale > 0) {
      EXPECT_GT(expected.skipped, 0);
      EXPECT_LT(expected.skipped, 20);
    }
    Print({{"check", "same bits"},
           {"model", family.cut.spec},
           {"passes", family.passes},
           {"steps", 20},
           {"skipped_steps", expected.skipped},
           {"hash", absl::StrFormat("%016x", expected.hash)},
           {"runs", runs}});
  }
}

// The checksum says nothing where somebody computed it again: then the driver must refuse, or the run go on.
TEST_F(CudaTraining, KernelsDamagedBehindTheirChecksum) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanOf(kGpt, "fuse", true));
  ASSERT_GT(plan.cuda().modules_size(), 0);
  ASSERT_FALSE(plan.cuda().modules(0).cubin().empty()) << "NVRTC is not here";
  struct Damage {
    const char* what;
    std::function<void(std::string&)> apply;
  };
  const Damage damages[] = {{"cut in half", [](std::string& cubin) { cubin.resize(cubin.size() / 2); }},
                            {"other magic", [](std::string& cubin) { cubin[1] = 'X'; }},
                            {"sections beyond the end", [](std::string& cubin) { cubin[0x2f] = '\x7f'; }},
                            {"text", [](std::string& cubin) { cubin.assign(cubin.size(), 'a'); }}};
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.what);
    proto::PlanProto damaged = plan;
    proto::CudaModuleProto& module = *damaged.mutable_cuda()->mutable_modules(0);
    damage.apply(*module.mutable_cubin());
    module.set_checksum(Fnv1a(module.cubin()));
    const absl::StatusOr<Trained> outcome = Train(damaged, 1, {.lr = 1e-3});
    EXPECT_EQ(outcome.status().code(), absl::StatusCode::kFailedPrecondition) << outcome.status();
    EXPECT_THAT(std::string(outcome.status().message()), HasSubstr("compile the plan again"));
    Print({{"check", "damaged kernel"}, {"damage", damage.what}, {"message", outcome.status().message()}});
  }
}

}  // namespace
}  // namespace mt
