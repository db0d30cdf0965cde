// Rematerialization: the same bits, the blocks it finds, budgets in planned bytes, and how near the choices are to the
// best there are.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/report/tally.h"
#include "ir/base/file.h"
#include "ir/cost.h"
#include "ir/text.h"
#include "models/model.h"
#include "passes/pass_manager.h"
#include "passes/registry.h"
#include "passes/remat/budget.h"
#include "tests/small_modules.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr Roofline kRoofline = {.matmul_flops_per_second = 2e11, .bytes_per_second = 2e10};

PassContext PlanningContext() {
  PassContext context;
  context.roofline = kRoofline;
  context.plan_memory = [](const Module& module) { return PlanMemory(module, "cpu"); };
  context.estimate_memory = [](const Module& module) { return EstimateMemory(module, "cpu"); };
  context.describe_peak = [](const Module& module) { return DescribePeak(module, "cpu"); };
  return context;
}

std::unique_ptr<Module> MustRun(std::unique_ptr<Module> module, const std::string& passes) {
  absl::StatusOr<Pipeline> pipeline = ParsePipeline(passes);
  CHECK_OK(pipeline.status());
  PassContext context = PlanningContext();
  CHECK_OK(RunPipeline(*module, *pipeline, context));
  return module;
}

std::unique_ptr<Module> MustLoad(const std::string& spec, const std::vector<std::string>& sets) {
  ModelOptions options;
  options.sets = sets;
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(spec, options);
  CHECK_OK(module.status());
  return *std::move(module);
}

// --- Bits

std::unique_ptr<Module> ModelForRuns() {
  ModelOptions options{.batch = 2, .sequence = 24, .vocab_size = 30};
  options.sets = {"layers=4", "width=16", "heads=2", "dropout=0.2", "tied_head=true"};
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel("tiny_char", options);
  CHECK_OK(module.status());
  return *std::move(module);
}

struct Trained {
  std::string bits;  // Losses of all steps and the states behind them.
  int64_t arena_bytes = 0;
  int recomputed = 0;
};

Trained Train(const std::string& passes, int steps) {
  absl::StatusOr<proto::PlanProto> plan = Compile(ModelForRuns(), {.passes = passes});
  CHECK_OK(plan.status());
  Trained run{.bits = "", .arena_bytes = plan->arena_bytes()};
  run.recomputed = Summarize(*plan, *MainProgram(*plan)).recomputed;
  absl::StatusOr<std::unique_ptr<LoadedPlan>> loaded = LoadForTest(*std::move(plan));
  CHECK_OK(loaded.status());
  const auto add = [&](const BoundTensor& tensor) {
    run.bits.append(reinterpret_cast<const char*>(tensor.data), static_cast<size_t>(tensor.type.byte_size()));
  };
  for (int step = 0; step < steps; ++step) {
    CHECK_OK((*loaded)->Prepare(step));
    (*loaded)->train->Run();
    (*loaded)->executor->backend().Synchronize();
    add(*(*loaded)->train->FindOutput("loss"));
  }
  for (const BoundTensor& state : (*loaded)->executor->states()) add(state);
  return run;
}

TEST(RematTest, AHundredStepsWithDropoutAreTheSameBits) {
  for (const std::string stem : {"none", "flash", "bf16,flash,chunked_loss,pad_vocab,fuse"}) {
    SCOPED_TRACE(stem);
    const Trained none = Train(stem, 100);
    EXPECT_EQ(none.recomputed, 0);
    const std::unique_ptr<Module> module = MustRun(ModelForRuns(), stem);
    const PassContext context = PlanningContext();
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RematBudget> planner,
                         RematBudget::Make(*module, *module->FindGraph("train"), kRoofline, context));
    ASSERT_OK_AND_ASSIGN(const int64_t last, planner->Smallest());
    ASSERT_OK_AND_ASSIGN(const MemoryPlan smallest, planner->PlanOf(last));
    std::vector<std::string> modes = {"remat", "remat:free"};
    for (const int64_t percent : {0, 30, 60, 90}) {
      const int64_t budget = smallest.arena_bytes + (none.arena_bytes - smallest.arena_bytes) * percent / 100;
      modes.push_back(absl::StrCat("remat:budget=", budget, "B"));
    }
    const std::string prefix = stem == "none" ? "" : absl::StrCat(stem, ",");
    for (const std::string& mode : modes) {
      SCOPED_TRACE(mode);
      const Trained run = Train(absl::StrCat(prefix, mode), 100);
      EXPECT_GT(run.recomputed, 0);
      EXPECT_LT(run.arena_bytes, none.arena_bytes);
      EXPECT_EQ(run.bits, none.bits);
    }
  }
}

// --- What is recomputed

TEST(RematTest, ThePlanSaysWhatIsRecomputed) {
  const auto ops = [](const std::string& passes) {
    absl::StatusOr<proto::PlanProto> plan = Compile(ModelForRuns(), {.passes = passes});
    CHECK_OK(plan.status());
    std::map<std::string, int64_t> counts;
    for (const Recomputed& group : RecomputationOf(*plan, *MainProgram(*plan)).ops) {
      counts[group.op] += group.count;
      EXPECT_GT(group.bytes, 0) << group.op;
    }
    EXPECT_EQ(RecomputationOf(*plan, *FindProgram(*plan, "eval")).count, 0);
    return counts;
  };
  EXPECT_THAT(ops("flash"), ::testing::IsEmpty());
  const std::map<std::string, int64_t> free = ops("flash,remat:free");
  EXPECT_EQ(free.count("matmul") + free.count("flash_attention_packed"), 0u);
  EXPECT_EQ(free.at("layer_norm"), 9);  // Two a layer and the last.
  EXPECT_EQ(free.at("gelu"), 4);
  const std::map<std::string, int64_t> full = ops("flash,remat");
  EXPECT_EQ(full.at("matmul"), 3 * 4);  // All of a layer but the last, whose result the next block's input holds.
  EXPECT_EQ(full.at("flash_attention_packed"), 4);
}

// --- Blocks

int Units(const Module& module) {
  const RematChain chain = FindRematBlocks(*module.FindGraph("train"));
  int units = 0;
  std::vector<int> kinds;
  for (const RematBlock& block : chain.blocks) {
    if (!block.is_unit) continue;
    ++units;
    kinds.push_back(block.kind);
    EXPECT_EQ(block.outputs.size(), 1u);
  }
  EXPECT_EQ(std::count(kinds.begin(), kinds.end(), kinds.empty() ? 0 : kinds[0]), units);
  return units;
}

TEST(RematBlocksTest, FindsTheLayersOfEveryKindOfModel) {
  for (const std::string passes : {"none", "flash"}) {
    EXPECT_EQ(Units(*MustRun(ModelForRuns(), passes)), 4) << passes;
    EXPECT_EQ(
        Units(*MustRun(SmallTransformer("layers: 3 norm: RMS_NORM positions: ROTARY activation: SWIGLU"), passes)), 3);
    EXPECT_EQ(
        Units(*MustRun(SmallTransformer("layers: 5 norm_placement: POST positions: SINUSOIDAL dropout: 0.1"), passes)),
        5);
    EXPECT_EQ(Units(*MustRun(MustLoad("parallel_block", {}), passes)), 2);
  }
  // Nothing repeats: the two halves of the one layer.
  EXPECT_EQ(Units(*MustRun(SmallTransformer("layers: 1"), "none")), 1);
}

// --- Budgets

TEST(RematBudgetTest, SweepOverBudgets) {
  const std::vector<std::string> models[] = {{"lab4", "layers=3"}, {"gpt2_124m", "layers=3"}};
  for (const std::vector<std::string>& model : models) {
    SCOPED_TRACE(model[0]);
    const std::unique_ptr<Module> module = MustRun(MustLoad(model[0], {model[1]}), "flash");
    const PassContext context = PlanningContext();
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RematBudget> planner,
                         RematBudget::Make(*module, *module->FindGraph("train"), kRoofline, context));
    ASSERT_OK_AND_ASSIGN(const int64_t last, planner->Smallest());
    ASSERT_OK_AND_ASSIGN(const MemoryPlan smallest, planner->PlanOf(last));
    ASSERT_OK_AND_ASSIGN(const MemoryPlan none, planner->PlanOf(0));
    double before = std::numeric_limits<double>::infinity();
    constexpr int64_t kBudgets = 25;
    for (int64_t i = 0; i < kBudgets; ++i) {
      const int64_t budget = smallest.arena_bytes + (none.arena_bytes - smallest.arena_bytes) / (kBudgets - 1) * i;
      ASSERT_OK_AND_ASSIGN(const std::optional<RematBudget::Found> found, planner->Find(budget));
      ASSERT_TRUE(found.has_value());
      EXPECT_LE(found->plan.arena_bytes, budget);
      EXPECT_LE(found->choice->seconds, before);
      before = found->choice->seconds;
      if (found->candidate == 0) continue;
      ASSERT_OK_AND_ASSIGN(const MemoryPlan cheaper, planner->PlanOf(found->candidate - 1));
      EXPECT_LT(planner->candidates()[static_cast<size_t>(found->candidate - 1)].seconds, found->choice->seconds);
      EXPECT_GT(cheaper.arena_bytes, budget);
    }
    ASSERT_OK_AND_ASSIGN(const std::optional<RematBudget::Found> none_fits, planner->Find(smallest.arena_bytes - 1));
    EXPECT_FALSE(none_fits.has_value());
  }
}

TEST(RematBudgetTest, ThePassKeepsItsPromise) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto none, Compile(MustLoad("lab4", {"layers=2"}), {.passes = "flash"}));
  const int64_t budget = none.persistent_bytes() + (none.arena_bytes() - none.persistent_bytes()) * 2 / 3;
  ASSERT_OK_AND_ASSIGN(
      const proto::PlanProto plan,
      Compile(MustLoad("lab4", {"layers=2"}), {.passes = absl::StrCat("flash,remat:budget=", budget, "B")}));
  EXPECT_LE(plan.arena_bytes(), budget);
  EXPECT_GT(RecomputationOf(plan, *MainProgram(plan)).count, 0);
  // A budget that needs nothing changes nothing.
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto roomy,
                       Compile(MustLoad("lab4", {"layers=2"}),
                               {.passes = absl::StrCat("flash,remat:budget=", none.arena_bytes(), "B")}));
  EXPECT_EQ(roomy.arena_bytes(), none.arena_bytes());
  EXPECT_EQ(roomy.fingerprint(), none.fingerprint());
}

TEST(RematBudgetTest, SaysWhatIsWrong) {
  const auto compile = [](const std::string& passes) {
    return Compile(MustLoad("lab4", {"layers=2"}), {.passes = passes});
  };
  const absl::StatusOr<proto::PlanProto> small = compile("flash,remat:budget=100MiB");
  ASSERT_THAT(small, StatusIs(absl::StatusCode::kResourceExhausted,
                              AllOf(HasSubstr("budget=100MiB is too small for lab4"), HasSubstr("the peak is at "),
                                    HasSubstr("are live"), HasSubstr("Use remat:budget="))));
  // The budget that it names works.
  const std::vector<std::string> parts = absl::StrSplit(small.status().message(), "Use remat:budget=");
  const std::string named = std::string(absl::StrSplit(parts[1], ' ').begin()->data(), parts[1].find(' '));
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto fits, compile(absl::StrCat("flash,remat:budget=", named)));
  EXPECT_THAT(compile("remat:budget=8Gb"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("8GiB")));
  EXPECT_THAT(compile("remat:free:budget=8GiB"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("leave one")));
}

// --- Against the best there is

// Every subset of what one small graph may drop, each really planned.
TEST(RematOptimalityTest, BruteForceOverOneBlock) {
  std::vector<std::unique_ptr<Module>> modules;
  modules.push_back(MustRun(MustLoad("lab4", {"layers=1"}), "flash"));
  modules.push_back(MustRun(MustLoad("llama_160m", {"layers=1"}), "flash"));
  for (const std::unique_ptr<Module>& module : modules) {
    SCOPED_TRACE(module->name());
    const Graph& graph = *module->FindGraph("train");
    const PassContext context = PlanningContext();
    // One block of everything, with no output that has to stay.
    const auto whole = [](const Graph& g) {
      RematChain chain;
      chain.blocks.emplace_back();
      for (Node* node : g.TopologicalOrder()) {
        if (node->is_input()) continue;
        if (node->phase() != Phase::kForward) {
          chain.late.push_back(node);
          continue;
        }
        chain.block_of[node] = 0;
        chain.blocks[0].nodes.push_back(node);
      }
      return chain;
    };
    const RematChain chain = whole(graph);
    const std::vector<Node*>& nodes = chain.blocks[0].nodes;
    // What is large, and read by the backward pass or by several.
    std::vector<size_t> large;
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Node& node = *nodes[i];
      if (node.op().is_view || !MayRecompute(node) || node.result().type().byte_size() < (int64_t{1} << 20)) continue;
      const bool late = std::any_of(node.uses().begin(), node.uses().end(), [](const Use& use) {
        return use.node->phase() != Phase::kForward || use.node->op().is_view;
      });
      if (late || node.uses().size() > 1) large.push_back(i);
    }
    // The largest few: each one more doubles the plans.
    constexpr size_t kMost = 9;
    std::stable_sort(large.begin(), large.end(), [&](size_t a, size_t b) {
      return nodes[a]->result().type().byte_size() > nodes[b]->result().type().byte_size();
    });
    ASSERT_GE(large.size(), 6u);
    large.resize(std::min(large.size(), kMost));
    struct Point {
      int64_t arena_bytes;
      double seconds;
    };
    std::vector<Point> points;
    for (uint32_t mask = 0; mask < (1u << large.size()); ++mask) {
      RematChoice choice{.kept = {std::vector<bool>(nodes.size(), false)}, .group = {0}};
      for (size_t i = 0; i < nodes.size(); ++i) {
        choice.kept[0][i] = std::any_of(nodes[i]->uses().begin(), nodes[i]->uses().end(),
                                        [](const Use& use) { return use.node->phase() != Phase::kForward; });
      }
      for (size_t i = 0; i < large.size(); ++i) choice.kept[0][large[i]] = (mask >> i & 1) != 0;
      const std::unique_ptr<Module> copy = module->Clone();
      Graph& changed = *copy->FindGraph("train");
      ASSERT_OK(ApplyRemat(changed, whole(changed), choice));
      PassContext unused;
      ASSERT_OK(kDcePass.run(*copy, Attrs(), unused));
      double seconds = 0;
      for (const Node* node : changed.Nodes()) {
        if (!node->is_input() && node->recompute_of() != nullptr) seconds += NodeSeconds(*node, kRoofline);
      }
      ASSERT_OK_AND_ASSIGN(const MemoryPlan plan, context.plan_memory(*copy));
      points.push_back({plan.arena_bytes, seconds});
    }
    const double step_seconds = GraphSeconds(graph, kRoofline);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RematBudget> planner,
                         RematBudget::Make(*module, graph, kRoofline, context));
    ASSERT_OK_AND_ASSIGN(const int64_t last, planner->Smallest());
    ASSERT_OK_AND_ASSIGN(const MemoryPlan smallest, planner->PlanOf(last));
    ASSERT_OK_AND_ASSIGN(const MemoryPlan none, planner->PlanOf(0));
    for (int64_t i = 0; i <= 20; ++i) {
      const int64_t budget = smallest.arena_bytes + (none.arena_bytes - smallest.arena_bytes) * i / 20;
      double best = std::numeric_limits<double>::infinity();
      for (const Point& point : points) {
        if (point.arena_bytes <= budget) best = std::min(best, point.seconds);
      }
      ASSERT_OK_AND_ASSIGN(const std::optional<RematBudget::Found> found, planner->Find(budget));
      ASSERT_TRUE(found.has_value());
      EXPECT_LE(step_seconds + found->choice->seconds, 1.01 * (step_seconds + best)) << "budget " << budget;
    }
  }
}

// The layer DP against an integer program over the same menus, solved by COIN-OR CBC.
TEST(RematOptimalityTest, IntegerProgramOverLayers) {
  if (std::system("command -v cbc > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "cbc is not installed; apt-get install coinor-cbc";
  }
  const std::string path = absl::StrCat(::testing::TempDir(), "/remat_test-", getpid());
  for (const std::string layers : {"layers=2", "layers=4"}) {
    SCOPED_TRACE(layers);
    const std::unique_ptr<Module> module = MustRun(MustLoad("lab4", {layers}), "flash");
    const RematProblem problem(*module->FindGraph("train"), kRoofline);
    const std::vector<RematChoice> candidates = problem.Candidates();
    const int n = static_cast<int>(problem.chain().blocks.size());
    const double unit = problem.Full().seconds / 1e4;  // Of the objective.
    int64_t lowest = candidates[0].peak_bytes;
    for (const RematChoice& choice : candidates) lowest = std::min(lowest, choice.peak_bytes);
    for (int64_t i = 1; i < 6; ++i) {
      const int64_t peak = lowest + (candidates[0].peak_bytes - lowest) * i / 6;
      std::string objective, rows, binaries;
      for (int b = 0; b < n; ++b) {
        std::string pick = absl::StrCat(" pick", b, ":"), limit = absl::StrCat(" peak", b, ":");
        for (int before = 0; before < b; ++before) {
          const std::vector<RematOption>& options = problem.menu(before).options;
          for (size_t o = 0; o < options.size(); ++o) {
            absl::StrAppendFormat(&limit, " + %.6f y%d_%d", static_cast<double>(options[o].saved_bytes) / 1048576,
                                  before, o);
          }
        }
        const std::vector<RematOption>& options = problem.menu(b).options;
        for (size_t o = 0; o < options.size(); ++o) {
          const std::string variable = absl::StrCat("y", b, "_", o);
          absl::StrAppendFormat(&objective, " + %.9f %s", options[o].seconds / unit, variable);
          absl::StrAppend(&pick, " + ", variable);
          absl::StrAppendFormat(&limit, " + %.6f %s", static_cast<double>(options[o].peak_bytes) / 1048576, variable);
          absl::StrAppend(&binaries, " ", variable, "\n");
        }
        absl::StrAppendFormat(&rows, "%s = 1\n%s <= %.6f\n", pick, limit,
                              static_cast<double>(peak - problem.growth_after(b)) / 1048576);
      }
      ASSERT_OK(WriteFile(path + ".lp", absl::StrCat("Minimize\n obj:", objective, "\nSubject To\n", rows, "Binary\n",
                                                     binaries, "End\n")));
      const std::string command =
          absl::StrCat("cbc ", path, ".lp ratioGap 0 solve solution ", path, ".out > /dev/null 2>&1");
      ASSERT_EQ(std::system(command.c_str()), 0);
      ASSERT_OK_AND_ASSIGN(const std::string solution, ReadFile(path + ".out"));
      const std::vector<std::string> words =
          absl::StrSplit(solution.substr(0, solution.find('\n')), ' ', absl::SkipEmpty());
      double optimum = 0;
      ASSERT_EQ(words[0], "Optimal") << solution.substr(0, 200);
      ASSERT_TRUE(absl::SimpleAtod(words.back(), &optimum));
      optimum *= unit;
      double ours = std::numeric_limits<double>::infinity();
      for (const RematChoice& choice : candidates) {
        if (choice.peak_bytes <= peak) ours = std::min(ours, choice.seconds);
      }
      EXPECT_LE(ours, 1.01 * optimum + 1e-9);
      EXPECT_GE(ours, 0.9999 * optimum - 1e-9);
      EXPECT_LE(problem.LowerBoundSeconds(peak), 1.0001 * optimum + 1e-9);
      const std::optional<double> least = problem.LeastSeconds(peak, size_t{1} << 16);
      ASSERT_TRUE(least.has_value());
      EXPECT_NEAR(*least, optimum, 0.0001 * optimum + 1e-9);
    }
    // None of the candidates could be cheaper at its own peak.
    int checked = 0;
    for (size_t i = 1; i < candidates.size() && candidates[i].peak_bytes < candidates[i - 1].peak_bytes; i += 8) {
      if (absl::c_any_of(candidates[i].group, [](int g) { return g > 0; })) break;
      const std::optional<double> least = problem.LeastSeconds(candidates[i].peak_bytes, size_t{1} << 16);
      ASSERT_TRUE(least.has_value());
      EXPECT_NEAR(candidates[i].seconds, *least, 1e-6 * *least) << i;
      ++checked;
    }
    EXPECT_GE(checked, 5);
  }
  std::remove((path + ".lp").c_str());
  std::remove((path + ".out").c_str());
}

// Below the floor of all blocks' inputs, groups of blocks keep the first one's alone.
TEST(RematBudgetTest, GroupsOfBlocksGoBelowTheBlockInputs) {
  const std::vector<std::string> sets = {"layers=24",     "width=64",      "heads=2",
                                         "ffn_width=128", "vocab_size=64", "max_sequence=512"};
  ModelOptions options{.batch = 16, .sequence = 512};
  options.sets = sets;
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Module> loaded, LoadModel("lab4", options));
  const std::unique_ptr<Module> module = MustRun(std::move(loaded), "flash");
  const PassContext context = PlanningContext();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<RematBudget> planner,
                       RematBudget::Make(*module, *module->FindGraph("train"), kRoofline, context));
  ASSERT_OK_AND_ASSIGN(const int64_t last, planner->Smallest());
  ASSERT_OK_AND_ASSIGN(const MemoryPlan smallest, planner->PlanOf(last));
  const std::unique_ptr<Module> blocks = module->Clone();
  Graph& graph = *blocks->FindGraph("train");
  const RematProblem problem(graph, kRoofline);
  ASSERT_OK(ApplyRemat(graph, problem.Full()));
  ASSERT_OK_AND_ASSIGN(const MemoryPlan full, context.plan_memory(*blocks));
  EXPECT_LT(smallest.arena_bytes, full.arena_bytes * 8 / 10);
}

}  // namespace
}  // namespace mt
