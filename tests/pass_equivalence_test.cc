// Every pass, and every pair of passes, computes what was computed before: bitwise, or within the row's tolerance.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/evaluator.h"
#include "ir/text.h"
#include "passes/pass_manager.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using Tensors = std::map<std::string, HostTensor<float>>;

constexpr int64_t kVocab = 5;  // The smallest of the modules: ids fit all of them.

// The step with the options that default pipelines give it, or with required options where it has some.
PipelineStep StepOf(const PassDef& pass) {
  PipelineStep step{.pass = &pass, .options = {}};
  for (const PassOption& option : pass.options) {
    const absl::string_view text = option.default_text.empty() ? "2" : option.default_text;
    absl::StatusOr<AttrValue> value = ParseOptionValue(option, text);
    CHECK(value.ok()) << pass.name << ": " << value.status();
    step.options.Set(option.name, *value);
  }
  return step;
}

absl::Status RunSteps(Module& module, const std::vector<const PassDef*>& passes) {
  Pipeline pipeline;
  for (const PassDef* pass : passes) pipeline.steps.push_back(StepOf(*pass));
  PassContext context;
  return RunPipeline(module, pipeline, context);
}

Stage StageOf(const Module& module) { return module.FindGraph("train")->stage(); }

// The module at every stage.
std::vector<SmallModule> AtEveryStage(const SmallModule& small) {
  std::vector<SmallModule> stages;
  stages.push_back({small.name, small.module->Clone()});
  stages.push_back({small.name, small.module->Clone()});
  CHECK_OK(RunSteps(*stages[1].module, {&kAutodiffPass}));
  stages.push_back({small.name, stages[1].module->Clone()});
  CHECK_OK(RunSteps(*stages[2].module, {&kOptimizerPass}));
  return stages;
}

// Outputs that both have agree: bit for bit where `tolerance` is 0, else relative to the largest element.
void ExpectSameOutputs(const Module& before, const Module& after, double tolerance) {
  for (const auto& graph : before.graphs()) {
    SCOPED_TRACE(absl::StrCat("graph @", graph->name()));
    const Graph* changed = after.FindGraph(graph->name());
    ASSERT_NE(changed, nullptr);
    const Tensors inputs = MakeInputs<float>(*graph, kVocab, 5);
    Tensors changed_inputs = inputs;
    for (auto& [name, tensor] : MakeInputs<float>(*changed, kVocab, 5)) {
      const TensorType type = tensor.type;
      const auto [at, is_new] = changed_inputs.emplace(name, std::move(tensor));
      // Rows that a pass has added are zero.
      if (is_new || at->second.type == type) continue;
      at->second.type = type;
      at->second.values.resize(static_cast<size_t>(type.num_elements()), 0.0f);
    }
    ASSERT_OK_AND_ASSIGN(const Tensors old_outputs, EvaluateGraph<float>(*graph, inputs));
    ASSERT_OK_AND_ASSIGN(const Tensors new_outputs, EvaluateGraph<float>(*changed, changed_inputs));
    int64_t compared = 0;
    for (const auto& [name, old_output] : old_outputs) {
      const auto at = new_outputs.find(name);
      // The optimizer consumes gradients; nothing else may vanish.
      if (at == new_outputs.end() && absl::StartsWith(name, "grad.")) continue;
      ASSERT_NE(at, new_outputs.end()) << name;
      ++compared;
      ASSERT_EQ(at->second.type.dims, old_output.type.dims) << name;
      EXPECT_EQ(at->second.ints, old_output.ints) << name;
      double largest = 0, difference = 0;
      for (size_t i = 0; i < old_output.values.size(); ++i) {
        const float a = old_output.values[i], b = at->second.values[i];
        ASSERT_FALSE(std::isnan(a)) << name;
        if (tolerance == 0) {
          ASSERT_EQ(std::memcmp(&a, &b, sizeof(a)), 0) << name << "[" << i << "]: " << a << " became " << b;
        }
        largest = std::max(largest, std::abs(static_cast<double>(a)));
        difference = std::max(difference, std::abs(static_cast<double>(a) - b));
      }
      EXPECT_LE(difference, tolerance * largest) << name;
    }
    EXPECT_GT(compared, 0);
  }
}

// False also where the pass has nothing to do.
bool CanRun(const PassDef& pass, const Module& module) {
  if (pass.applies != nullptr && !pass.applies(module)) return false;
  return pass.any_stage || pass.requires_stage == StageOf(module);
}

// Modules that have what the clean-up passes look for, besides the small ones.
std::vector<SmallModule> Corpus() {
  std::vector<SmallModule> modules = SmallModules();
  modules.push_back({"clutter", MustParse(R"(
module @clutter {
  state "w": f32[4,3] parameter init=normal(1)
}
graph @train stage=forward {
  input %x: f32[5,4] data
  input %unused: f32[2] data
  input %rng: i32[4] step
  input %w: f32[4,3] parameter
  %0: f32[3,4] = transpose(%w) {perm=[1,0]}
  %1: f32[4,3] = transpose(%0) {perm=[1,0]}
  %2: f32[12] = reshape(%1) {dims=[12]}
  %3: f32[2,6] = reshape(%2) {dims=[2,6]}
  %4: f32[4,3] = reshape(%3) {dims=[4,3]}
  %5: f32[5,3] = matmul(%x, %4) "a"
  %6: f32[5,3] = matmul(%x, %w) "b"
  %7: f32[5,3] = scale(%6) {factor=1.0}
  %8: f32[5,3] = dropout(%7, %rng) {rate=0.0, key=3}
  %9: f32[5,3] = mul(%5, %8)
  %10: f64[5,3] = cast(%9) {to=f64}
  %11: f32[5,3] = cast(%10) {to=f32}
  %12: bf16[5,3] = cast(%11) {to=bf16}
  %13: f32[5,3] = cast(%12) {to=f32}
  %14: f32[5,3] = scale(%13) {factor=0.1}
  %15: f32[5,3] = scale(%14) {factor=3.0}
  %16: f32[5,3] = neg(%15)
  %17: f32[5,3] = neg(%16)
  %18: f32[5,3] = tanh(%17) "nobody reads this"
  %19: f32[] = reduce_sum(%17) {dims=[0,1]}
  output "loss" %19
  output "again" %13
}
)")});
  return modules;
}

TEST(PassEquivalenceTest, EveryPass) {
  int runs = 0, changes = 0;
  for (const SmallModule& small : Corpus()) {
    for (const SmallModule& staged : AtEveryStage(small)) {
      for (const PassDef* pass : Passes().Unique()) {
        if (!CanRun(*pass, *staged.module)) continue;
        SCOPED_TRACE(absl::StrCat(small.name, " at ", StageName(StageOf(*staged.module)), ": ", pass->name));
        const std::unique_ptr<Module> after = staged.module->Clone();
        ASSERT_OK(RunSteps(*after, {pass}));
        ExpectSameOutputs(*staged.module, *after, pass->tolerance);
        ++runs;
        changes += after->Fingerprint() != staged.module->Fingerprint() ? 1 : 0;
      }
    }
  }
  EXPECT_GE(runs, 50);
  EXPECT_GE(changes, 15);
}

TEST(PassEquivalenceTest, EveryPairOfPasses) {
  for (const SmallModule& small : Corpus()) {
    for (const SmallModule& staged : AtEveryStage(small)) {
      for (const PassDef* first : Passes().Unique()) {
        if (!CanRun(*first, *staged.module)) continue;
        const std::unique_ptr<Module> between = staged.module->Clone();
        ASSERT_OK(RunSteps(*between, {first}));
        for (const PassDef* second : Passes().Unique()) {
          if (second == first || !CanRun(*second, *between)) continue;
          SCOPED_TRACE(absl::StrCat(small.name, " at ", StageName(StageOf(*staged.module)), ": ", first->name, ", ",
                                    second->name));
          const std::unique_ptr<Module> after = between->Clone();
          ASSERT_OK(RunSteps(*after, {second}));
          ExpectSameOutputs(*staged.module, *after, first->tolerance + second->tolerance);
        }
      }
    }
  }
}

// Cleaning up before or after differentiation gives the same updates of every parameter and moment.
TEST(PassEquivalenceTest, WholePipelineAgainstTheBareOne) {
  for (const SmallModule& small : Corpus()) {
    SCOPED_TRACE(small.name);
    const std::unique_ptr<Module> bare = small.module->Clone(), whole = small.module->Clone();
    ASSERT_OK(RunSteps(*bare, {&kAutodiffPass, &kOptimizerPass}));
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, ParsePipeline("none"));
    PassContext context;
    ASSERT_OK(RunPipeline(*whole, pipeline, context));
    // CSE on the forward graph may sum gradients in another order: not bitwise.
    ExpectSameOutputs(*bare, *whole, 1e-5);
  }
}

// A second run of a clean-up pass finds nothing to do.
TEST(PassEquivalenceTest, CleanUpsAreIdempotent) {
  for (const SmallModule& small : Corpus()) {
    for (const SmallModule& staged : AtEveryStage(small)) {
      for (const PassDef* pass : {&kDcePass, &kCsePass, &kCanonicalizePass}) {
        SCOPED_TRACE(absl::StrCat(small.name, ": ", pass->name));
        ASSERT_OK(RunSteps(*staged.module, {pass}));
        const std::string once = Print(*staged.module);
        ASSERT_OK(RunSteps(*staged.module, {pass}));
        EXPECT_EQ(Print(*staged.module), once);
      }
    }
  }
}

// A recompute is the same computation as what it repeats, and is kept all the same.
TEST(CseTest, KeepsRecomputesApart) {
  const std::unique_ptr<Module> module = MustParse(R"(
module @m {
  state "w": f32[2,2] parameter init=ones
}
graph @train stage=forward {
  input %w: f32[2,2] parameter
  %0: f32[2,2] = tanh(%w) "act"
  %1: f32[2,2] = tanh(%w) "act" recompute_of=%0
  %2: f32[2,2] = tanh(%w) "act" recompute_of=%0
  %3: f32[2,2] = tanh(%w) "other"
  %4: f32[2,2] = tanh(%w) "other" recompute_of=%3
  %5: f32[2,2] = mul(%0, %1)
  %6: f32[2,2] = mul(%5, %2)
  %7: f32[2,2] = mul(%6, %3)
  %8: f32[2,2] = mul(%7, %4)
  %9: f32[] = reduce_sum(%8) {dims=[0,1]}
  output "loss" %9
}
)");
  ASSERT_OK(RunSteps(*module, {&kCsePass}));
  int recomputes = 0, originals = 0;
  for (const Node* node : module->FindGraph("train")->Nodes()) {
    if (node->is_input() || node->op().name != "tanh") continue;
    (node->recompute_of() != nullptr ? recomputes : originals) += 1;
  }
  EXPECT_EQ(originals, 2);
  EXPECT_EQ(recomputes, 2);  // Two repeats of the same node are one; repeats of different nodes are not.
}

// Order and number of collectives are part of the program: ranks meet in them.
TEST(CleanUpTest, CollectivesStay) {
  const std::unique_ptr<Module> module = MustParse(R"(
module @m {
  state "w": f32[2,2] parameter init=ones
}
graph @train stage=forward {
  input %w: f32[2,2] parameter
  %0: f32[2,2] = all_reduce(%w) "one"
  %1: f32[2,2] = all_reduce(%w) "two"
  %2: f32[2,2] = all_reduce(%w) "unread"
  %3: f32[2,2] = mul(%0, %1)
  %4: f32[] = reduce_sum(%3) {dims=[0,1]}
  output "loss" %4
}
)");
  const std::string before = Print(*module);
  ASSERT_OK(RunSteps(*module, {&kDcePass, &kCsePass, &kCanonicalizePass}));
  EXPECT_EQ(Print(*module), before);
}

}  // namespace
}  // namespace mt
