// Precision: what the passes make of whole models, what plans hold, and that training goes as in f32.
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/text.h"
#include "passes/pass_manager.h"
#include "passes/registry.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

constexpr int64_t kBatch = 2, kSequence = 24, kVocab = 40, kWidth = 32;

std::vector<std::string> Sets(absl::string_view model) {
  std::vector<std::string> sets = {"layers=2", absl::StrCat("width=", kWidth), "heads=4", "ffn_width=64"};
  if (model == "llama_160m") sets.push_back("kv_heads=2");
  return sets;
}

std::unique_ptr<Module> Model(const std::string& name, std::vector<std::string> more = {}) {
  std::vector<std::string> sets = Sets(name);
  sets.insert(sets.end(), more.begin(), more.end());
  auto module =
      LoadModel(name, {.batch = kBatch, .sequence = kSequence, .vocab_size = kVocab, .sets = std::move(sets)});
  CHECK_OK(module.status());
  return *std::move(module);
}

std::unique_ptr<Module> Optimized(const std::string& name, const std::string& passes) {
  std::unique_ptr<Module> module = Model(name);
  absl::StatusOr<Pipeline> pipeline = ParsePipeline(passes);
  CHECK_OK(pipeline.status());
  PassContext context;
  CHECK_OK(RunPipeline(*module, *pipeline, context));
  return module;
}

proto::PlanProto PlanOf(std::unique_ptr<Module> module, const std::string& passes) {
  absl::StatusOr<proto::PlanProto> plan = Compile(std::move(module), {.passes = passes});
  CHECK_OK(plan.status());
  return *std::move(plan);
}

class EveryModel : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Zoo, EveryModel, ::testing::Values("tiny_char", "lab4", "llama_160m", "so_small"),
                         [](const auto& info) { return info.param; });

// Every kernel takes the operands that the pass gives it, and writes what is planned.
TEST_P(EveryModel, RunsAsPlanned) {
  for (const std::string passes :
       {"bf16", "fp16", "bf16:residual=f32,flash", "fp16:residual=f32,flash", "tf32",
        "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free", "fp16,flash,chunked_loss,pad_vocab,fuse,remat"}) {
    SCOPED_TRACE(passes);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LoadedPlan> loaded, LoadForTest(PlanOf(Model(GetParam()), passes)));
    ASSERT_OK_AND_ASSIGN(const Measurement measured, loaded->Measure());
    EXPECT_THAT(measured.differences, ::testing::IsEmpty());
    EXPECT_TRUE(measured.same_over_poisons);
    EXPECT_NEAR(*loaded->train->FindOutput("loss")->data_as<float>(), std::log(static_cast<double>(kVocab)), 0.2);
  }
}

// Parameters and what the optimizer holds are f32; weights are 16-bit only behind a cast. No activation is f32, nor any
// gradient of one, and a weight's gradient is 16-bit but where several are summed.
TEST_P(EveryModel, HoldsNoActivationInF32) {
  for (const auto& [passes, low] :
       {std::pair("bf16,flash", DType::kBF16), std::pair("fp16,flash", DType::kF16), std::pair("bf16", DType::kBF16),
        std::pair("bf16,flash,chunked_loss,pad_vocab,fuse,remat:free", DType::kBF16)}) {
    SCOPED_TRACE(passes);
    const std::unique_ptr<Module> module = Optimized(GetParam(), passes);
    for (const State& state : module->states()) {
      if (IsFloat(state.type.dtype)) {
        EXPECT_EQ(state.type.dtype, DType::kF32) << state.name;
      }
    }
    int64_t low_values = 0;
    for (const auto& graph : module->graphs()) {
      for (const Node* node : graph->Nodes()) {
        if (node->is_input() || node->phase() == Phase::kOptimizer) continue;
        for (const TensorType& type : node->result_types()) {
          low_values += type.dtype == low ? 1 : 0;
          if (type.dtype != DType::kF32 || type.num_elements() < kBatch * kSequence * kWidth) continue;
          // Sums of a weight's gradients.
          if (node->phase() == Phase::kBackward && absl::c_any_of(module->states(), [&](const State& state) {
                return state.role == Role::kParameter && state.type == type;
              })) {
            continue;
          }
          ADD_FAILURE() << "graph @" << graph->name() << ": " << node->op().name << " \"" << node->name() << "\" is "
                        << type.ToString();
        }
      }
    }
    EXPECT_GE(low_values, 50);
  }
}

TEST_P(EveryModel, TextRoundTrip) {
  for (const std::string passes : {"tf32", "bf16", "fp16,flash"}) {
    const std::string text = Print(*Optimized(GetParam(), passes));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> parsed, ParseModule(text));
    EXPECT_EQ(Print(*parsed), text);
  }
}

struct Trained {
  std::map<std::string, std::string> initial_weights;  // Name -> bytes.
  std::vector<double> losses;
};

// Steps over three batches in turn, dropout on.
Trained TrainSome(const std::string& passes, int64_t steps, int threads = 2) {
  auto loaded = LoadForTest(PlanOf(Model("tiny_char", {"dropout=0.1"}), passes), threads);
  CHECK_OK(loaded.status());
  Trained run;
  for (const BoundTensor& state : (*loaded)->executor->states()) {
    if (state.role != Role::kParameter) continue;
    run.initial_weights[state.name].assign(reinterpret_cast<const char*>(state.data),
                                           static_cast<size_t>(state.type.byte_size()));
  }
  (*loaded)->scalars.lr = 3e-3;
  for (int64_t step = 0; step < steps; ++step) {
    CHECK_OK((*loaded)->Prepare(step % 3));
    (*loaded)->train->Run();
    run.losses.push_back(*(*loaded)->train->FindOutput("loss")->data_as<float>());
  }
  return run;
}

TEST(PrecisionTest, TrainsAsF32) {
  constexpr int64_t kSteps = 40;
  const Trained f32 = TrainSome("none", kSteps);
  EXPECT_LT(f32.losses.back(), f32.losses.front() - 0.5);
  for (const std::string passes : {"tf32", "bf16", "bf16:residual=f32", "bf16,flash", "fp16", "fp16:residual=f32",
                                   "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free"}) {
    SCOPED_TRACE(passes);
    const PassDef* pass = Passes().Find(passes.substr(0, 4));
    ASSERT_NE(pass, nullptr);
    const Trained run = TrainSome(passes, kSteps);
    ASSERT_EQ(run.initial_weights.size(), f32.initial_weights.size());
    for (const auto& [name, bytes] : f32.initial_weights) {  // Rows that pad_vocab adds come last.
      EXPECT_TRUE(absl::StartsWith(run.initial_weights.at(name), bytes)) << name;
    }
    double worst = 0;
    for (size_t i = 0; i < run.losses.size(); ++i) {
      worst = std::max(worst, std::abs(run.losses[i] / f32.losses[i] - 1));
    }
    EXPECT_LE(worst, pass->tolerance);
    std::printf("%s: worst relative difference of a loss over %d steps %.2e\n", passes.c_str(),
                static_cast<int>(kSteps), worst);
    // It really rounds.
    if (pass != &kTf32Pass) {
      EXPECT_GT(worst, 1e-6);
    }
  }
}

TEST(PrecisionTest, OtherNamesAreUnderstood) {
  for (const auto& [typed, pass] : {std::pair("amp", "bf16"), std::pair("mixed-precision", "bf16"),
                                    std::pair("use_fp16", "fp16"), std::pair("allow_tf32", "tf32")}) {
    EXPECT_THAT(ParsePipeline(typed), StatusIs(absl::StatusCode::kInvalidArgument,
                                               ::testing::HasSubstr(absl::StrCat("did you mean \"", pass, "\"?"))));
  }
}

TEST(PrecisionTest, SameBitsOnAnyNumberOfThreads) {
  const Trained one = TrainSome("bf16", 5, 1), three = TrainSome("bf16", 5, 3);
  EXPECT_EQ(one.losses, three.losses);
}

}  // namespace
}  // namespace mt
