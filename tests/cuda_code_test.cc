// Device code without a device: every sample of every row is emitted, within its workspace, and compiles; every model
// of the zoo gets device code; what is wrong with a plan's device code is refused.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "codegen/compile.h"
#include "codegen/cuda/code.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"
#include "codegen/plan/cubin.h"
#include "codegen/plan/nvrtc.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/op.h"
#include "ir/target.h"
#include "models/model.h"
#include "tests/op_checks.h"
#include "tests/test_util.h"

namespace mt {
namespace {

bool HasCompiler() { return CudaCompilerVersion().ok(); }

Target Sm(int sm) { return {.device = Target::Device::kCuda, .sm = sm}; }

bool Computes(const Target& target, absl::Span<const TensorType> types) {
  return std::all_of(types.begin(), types.end(), [&](const TensorType& type) { return target.Computes(type.dtype); });
}

// One sample, emitted.
struct Emitted {
  std::string name;
  bool is_element_wise = false;
  std::vector<TensorType> operands, results;
  int64_t workspace_bytes = 0;
  CudaSteps steps;
};

std::vector<Emitted> EmitAll(const Target& target) {
  std::vector<Emitted> all;
  for (const OpDef* op : AllOps()) {
    if (!NeedsKernel(*op) || op->effect == Effect::kCollective) continue;
    int number = 0;
    for (const OpSample& sample : op->samples()) {
      Emitted emitted{.name = absl::StrCat(op->name, " sample ", number++), .is_element_wise = op->is_element_wise()};
      for (const SampleOperand& operand : sample.operands) emitted.operands.push_back(operand.type);
      Attrs attrs = sample.attrs;
      absl::StatusOr<std::vector<TensorType>> results = InferTypes(*op, emitted.operands, attrs);
      EXPECT_TRUE(results.ok()) << emitted.name << ": " << results.status();
      if (!results.ok()) continue;
      emitted.results = *std::move(results);
      if (!Computes(target, emitted.operands) || !Computes(target, emitted.results)) continue;
      emitted.workspace_bytes = CudaWorkspaceBytes(target, *op, emitted.operands, emitted.results, attrs);
      absl::StatusOr<CudaSteps> steps = EmitCuda({.target = target,
                                                  .op = op,
                                                  .attrs = &attrs,
                                                  .operands = emitted.operands,
                                                  .results = emitted.results,
                                                  .workspace_bytes = emitted.workspace_bytes});
      EXPECT_TRUE(steps.ok()) << emitted.name << ": " << steps.status();
      if (!steps.ok()) continue;
      emitted.steps = *std::move(steps);
      all.push_back(std::move(emitted));
    }
  }
  return all;
}

// Compiles the sources of every `stride`-th sample, those of element-wise rows `sparser` times as seldom.
void CompileAll(const Target& target, size_t stride, size_t sparser) {
  std::map<std::string, std::string> names;  // Source -> a sample that has it.
  size_t number = 0;
  for (const Emitted& emitted : EmitAll(target)) {
    if (number++ % (stride * (emitted.is_element_wise ? sparser : 1)) != 0) continue;
    for (const CudaSteps::Step& step : emitted.steps.steps()) {
      if (step.proto.has_launch()) names.emplace(step.source, emitted.name);
    }
  }
  EXPECT_GT(names.size(), 10u);
  const std::vector<std::pair<std::string, std::string>> work(names.begin(), names.end());
  std::atomic<size_t> next{0};
  std::vector<std::string> errors(work.size());
  const auto run = [&] {
    for (size_t i = next++; i < work.size(); i = next++) {
      const auto& [source, name] = work[i];
      const absl::StatusOr<std::string> cubin = CompileCudaSource(absl::StrCat(CudaPrelude(), "\n", source), target);
      if (!cubin.ok()) errors[i] = absl::StrCat(name, ": ", cubin.status().message(), "\n", source);
    }
  };
  std::thread other(run);
  run();
  other.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(CudaCode, EverySampleIsEmittedWithinItsPlaces) {
  for (const Emitted& emitted : EmitAll(Sm(90))) {
    const auto check = [&](const proto::CudaPlaceProto& place, int64_t bytes) {
      int64_t size = 0;
      switch (place.base()) {
        case proto::CudaPlaceProto::OPERAND:
          ASSERT_LT(static_cast<size_t>(place.index()), emitted.operands.size()) << emitted.name;
          size = emitted.operands[static_cast<size_t>(place.index())].byte_size();
          break;
        case proto::CudaPlaceProto::RESULT:
          ASSERT_LT(static_cast<size_t>(place.index()), emitted.results.size()) << emitted.name;
          size = emitted.results[static_cast<size_t>(place.index())].byte_size();
          break;
        default:
          size = emitted.workspace_bytes;
      }
      EXPECT_GE(place.byte_offset(), 0) << emitted.name;
      EXPECT_LE(place.byte_offset() + bytes, size) << emitted.name;
    };
    EXPECT_FALSE(emitted.steps.steps().empty()) << emitted.name;
    for (const CudaSteps::Step& step : emitted.steps.steps()) {
      for (const proto::CudaPlaceProto& place : step.proto.launch().arguments()) check(place, 1);
      if (step.proto.has_fill()) check(step.proto.fill().place(), step.proto.fill().bytes());
      if (step.proto.has_matmul()) {
        check(step.proto.matmul().workspace(), step.proto.matmul().workspace_bytes());
      }
    }
  }
}

TEST(CudaCode, SamplesCompile) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  CompileAll(Sm(90), 2, 4);  // All of them compile where a GPU runs them: cuda_conformance_test.
}

TEST(CudaCode, SamplesCompileForOtherChips) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  for (const int sm : {75, 80, 120}) CompileAll(Sm(sm), 29, 2);
}

// A plan of the zoo.
proto::PlanProto PlanOf(const std::string& spec, const std::string& passes, const std::string& target, int64_t batch) {
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(spec, {.batch = batch, .vocab_size = {}, .sets = {}});
  CHECK(module.ok()) << module.status();
  CompileReport report;
  absl::StatusOr<proto::PlanProto> plan =
      PassesAndPlan(*std::move(module), {.target = target, .passes = passes}, report);
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

proto::PlanProto TinyCode(const std::string& passes = "bf16,fuse") {
  proto::PlanProto plan = PlanOf("tiny_char", passes, "cuda:sm_90", 4);
  CHECK_OK(EmitCudaCode(plan));
  return plan;
}

TEST(CudaCode, EveryModelOfTheZooGetsDeviceCode) {
  for (const char* spec :
       {"chatgot_85m", "chatgot_tiny", "gpt2_124m", "gpt2_wide32k", "lab4", "llama_160m", "so_small", "tiny_char"}) {
    for (const char* passes :
         {"none", "default", "fp16,flash,fuse,remat,adamw8bit", "tf32,chunked_loss,accumulate:2"}) {
      proto::PlanProto plan = PlanOf(spec, passes, "cuda:sm_90", 8);
      CudaCodeReport report;
      EXPECT_OK(EmitCudaCode(plan, &report)) << spec << " " << passes;
      EXPECT_OK(VerifyPlan(plan)) << spec << " " << passes;
      EXPECT_GT(report.launches, 50) << spec << " " << passes;
      EXPECT_GT(report.matmuls, 5) << spec << " " << passes;
      EXPECT_LT(report.modules, 200) << spec << " " << passes;
    }
  }
}

TEST(CudaCode, EqualSourcesAreOneModule) {
  const proto::PlanProto plan = TinyCode();
  std::set<std::string> sources;
  std::set<int> used;
  int launches = 0;
  for (const proto::CudaModuleProto& module : plan.cuda().modules()) {
    EXPECT_TRUE(sources.insert(module.source()).second);
    EXPECT_TRUE(absl::StartsWith(module.source(), CudaPrelude()));
  }
  for (const proto::CudaProgramProto& program : plan.cuda().programs()) {
    for (const proto::CudaInstructionProto& instruction : program.instructions()) {
      for (const proto::CudaStepProto& step : instruction.steps()) {
        if (!step.has_launch()) continue;
        used.insert(step.launch().module());
        ++launches;
        EXPECT_TRUE(absl::StrContains(plan.cuda().modules(step.launch().module()).source(),
                                      absl::StrCat(" ", step.launch().function(), "(")));
      }
    }
  }
  EXPECT_EQ(used.size(), sources.size());
  EXPECT_GT(launches, 2 * static_cast<int>(sources.size()));
  // And the same plan again gives the same bytes.
  EXPECT_EQ(SerializePlan(plan).size(), SerializePlan(TinyCode()).size());
}

int CountOf(absl::string_view text, absl::string_view what) {
  int count = 0;
  for (size_t at = text.find(what); at != absl::string_view::npos; at = text.find(what, at + 1)) ++count;
  return count;
}

// Short kernels are one module, each under a name of its own.
TEST(CudaCode, ShortKernelsShareModules) {
  const proto::PlanProto plan = TinyCode();
  std::map<int, std::set<std::string>> functions;
  for (const proto::CudaProgramProto& program : plan.cuda().programs()) {
    for (const proto::CudaInstructionProto& instruction : program.instructions()) {
      for (const proto::CudaStepProto& step : instruction.steps()) {
        if (step.has_launch()) functions[step.launch().module()].insert(step.launch().function());
      }
    }
  }
  const auto most = std::max_element(functions.begin(), functions.end(),
                                     [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  EXPECT_GT(most->second.size(), 5u);
  const std::string& source = plan.cuda().modules(most->first).source();
  for (const std::string& name : most->second) EXPECT_EQ(CountOf(source, absl::StrCat(" ", name, "(")), 1) << name;
  EXPECT_EQ(CountOf(source, "__global__"), static_cast<int>(most->second.size()));
}

// A norm and the region that stands for it are one kernel but for its name: so they give the same bits.
TEST(CudaCode, NormsAreTheirRegions) {
  const TensorType x = {DType::kBF16, {6, 40}}, c = {DType::kF32, {40}}, row = {DType::kF32, {6}};
  const auto source = [](absl::string_view op, Attrs attrs, std::vector<TensorType> operands) {
    absl::StatusOr<std::vector<TensorType>> results = InferTypes(*FindOp(op), operands, attrs);
    CHECK(results.ok()) << results.status();
    const absl::StatusOr<CudaSteps> steps = EmitCuda({.target = Sm(90),
                                                      .op = FindOp(op),
                                                      .attrs = &attrs,
                                                      .operands = operands,
                                                      .results = *results,
                                                      .workspace_bytes = 1 << 20});
    CHECK(steps.ok()) << steps.status();
    std::string text;
    for (const CudaSteps::Step& step : steps->steps()) {
      absl::StrAppend(&text, absl::StrReplaceAll(step.source, {{FunctionName(op), "f"}}));
    }
    return text;
  };
  const std::string norm = source("rms_norm_backward", {}, {x, x, c, row});
  const std::string region = source(
      "fused",
      {{"rows", int64_t{6}},
       {"width", int64_t{40}},
       {"region", std::string("v0=load(0) v1=load(1) v2=load(2) v3=row(3) v4=mul(v1,v3) v5=mul(v0,v2) v6=mul(v5,v4) "
                              "v7=rowsum(v6) v8=const(0.025) v9=mul(v7,v8) v10=mul(v4,v9) v11=sub(v5,v10) "
                              "v12=mul(v3,v11) v13=mul(v0,v4) -> full(v12,bf16[6,40]) columns(v13,f32[40])")}},
      {x, x, c, row});
  EXPECT_EQ(norm, region);
}

TEST(CudaCode, VerifierRefusesWhatDoesNotHold) {
  const proto::PlanProto good = TinyCode("none");
  EXPECT_OK(VerifyPlan(good));
  // The first step of a kind in program 0.
  const auto find = [](proto::PlanProto& plan, auto is) -> proto::CudaStepProto* {
    for (proto::CudaInstructionProto& instruction : *plan.mutable_cuda()->mutable_programs(0)->mutable_instructions()) {
      for (proto::CudaStepProto& step : *instruction.mutable_steps()) {
        if (is(step)) return &step;
      }
    }
    return nullptr;
  };
  const auto launch = [&](proto::PlanProto& plan) {
    return find(plan, [](const proto::CudaStepProto& s) { return s.has_launch(); })->mutable_launch();
  };
  const auto matmul = [&](proto::PlanProto& plan) {
    return find(plan, [](const proto::CudaStepProto& s) { return s.has_matmul(); })->mutable_matmul();
  };
  const auto fill = [&](proto::PlanProto& plan) {
    return find(plan, [](const proto::CudaStepProto& s) { return s.has_fill(); })->mutable_fill();
  };
  using Plan = proto::PlanProto;
  const struct {
    std::function<void(Plan&)> spoil;
    const char* message;
  } cases[] = {
      {[&](Plan& p) { launch(p)->set_module(p.cuda().modules_size()); }, "module"},
      {[&](Plan& p) { launch(p)->set_module(-1); }, "module -1"},
      {[&](Plan& p) { launch(p)->set_function("a b"); }, "no identifier"},
      {[&](Plan& p) { launch(p)->set_grid(0, 0); }, "a grid of 0 blocks"},
      {[&](Plan& p) { launch(p)->set_grid(1, 1 << 16); }, "a grid of 65536 blocks"},
      {[&](Plan& p) { launch(p)->set_block(0, 1025); }, "a block of 1025 threads"},
      {[&](Plan& p) { launch(p)->set_block(1, 1024); }, "more than 1024 threads"},
      {[&](Plan& p) { launch(p)->set_shared_bytes(1 << 20); }, "of shared memory"},
      {[&](Plan& p) { launch(p)->mutable_arguments(0)->set_index(99); }, "operand 99"},
      {[&](Plan& p) { launch(p)->mutable_arguments(0)->set_byte_offset(int64_t{1} << 40); }, "argument 0: byte"},
      {[&](Plan& p) { launch(p)->mutable_arguments(0)->set_byte_offset(-4); }, "byte -4"},
      {[&](Plan& p) { launch(p)->mutable_arguments(0)->clear_base(); }, "no operand, result or workspace"},
      {[&](Plan& p) { matmul(p)->set_m(matmul(p)->m() + 1); }, "bytes where x0 has"},
      {[&](Plan& p) { matmul(p)->set_k(0); }, "a size of 0"},
      {[&](Plan& p) { matmul(p)->set_batch(int64_t{1} << 40); }, "a size of"},
      {[&](Plan& p) {
         matmul(p)->set_stride_a(-1);
         matmul(p)->set_batch(2);
       },
       "too large"},
      {[&](Plan& p) { matmul(p)->set_dtype("f64"); }, "dtypes"},
      {[&](Plan& p) { *matmul(p)->mutable_d() = matmul(p)->a(); }, "would be written"},
      {[&](Plan& p) { matmul(p)->set_workspace_bytes(int64_t{1} << 40); }, "workspace"},
      {[&](Plan& p) { fill(p)->set_bytes(int64_t{1} << 40); }, "place"},
      {[&](Plan& p) { fill(p)->mutable_place()->set_base(proto::CudaPlaceProto::OPERAND); }, "would be written"},
      {[&](Plan& p) { find(p, [](const auto& s) { return s.has_fill(); })->clear_fill(); }, "neither launch"},
      {[&](Plan& p) { p.mutable_cuda()->mutable_programs(0)->mutable_instructions()->RemoveLast(); },
       "instructions of"},
      {[&](Plan& p) { p.mutable_cuda()->mutable_programs()->RemoveLast(); }, "programs of"},
      {[&](Plan& p) { p.mutable_cuda()->mutable_modules(0)->clear_source(); }, "neither source nor cubin"},
      {[&](Plan& p) { p.mutable_cuda()->mutable_modules(0)->set_cubin("ELF"); }, "checksum"},
  };
  for (const auto& c : cases) {
    Plan plan = good;
    c.spoil(plan);
    EXPECT_THAT(VerifyPlan(plan), StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::HasSubstr(c.message)))
        << c.message;
  }
}

TEST(CudaCode, MoreBlocksThanAGridHasAreAnError) {
  CudaSteps steps;
  steps.Launch({.source = "", .function = "f", .grid = {0x7fffffff, 0xffff, 1}, .block = {32, 1, 1}});
  EXPECT_OK(steps.status());
  steps.Launch({.source = "", .function = "g", .grid = {int64_t{1} << 31, 1, 1}, .block = {32, 1, 1}});
  EXPECT_THAT(steps.status(), StatusIs(absl::StatusCode::kUnimplemented,
                                       ::testing::AllOf(::testing::HasSubstr("g would need 2147483648"),
                                                        ::testing::HasSubstr("smaller batch"))));
  CudaSteps rows;
  rows.Launch({.source = "", .function = "h", .grid = {1, 0x10000, 1}, .block = {32, 1, 1}});
  EXPECT_THAT(rows.status(), StatusIs(absl::StatusCode::kUnimplemented, ::testing::HasSubstr("dimension 1")));
}

// The first launch of program 0 that takes tensor maps; null: there is none.
proto::CudaLaunchProto* LaunchWithMaps(proto::PlanProto& plan) {
  for (proto::CudaInstructionProto& instruction : *plan.mutable_cuda()->mutable_programs(0)->mutable_instructions()) {
    for (proto::CudaStepProto& step : *instruction.mutable_steps()) {
      if (step.launch().maps_size() > 0) return step.mutable_launch();
    }
  }
  return nullptr;
}

TEST(CudaCode, HopperHasAttentionOfItsOwn) {
  proto::PlanProto plan = PlanOf("tiny_char", "flash,bf16", "cuda:sm_90", 4);
  ASSERT_OK(EmitCudaCode(plan));
  ASSERT_NE(LaunchWithMaps(plan), nullptr);
  EXPECT_EQ(LaunchWithMaps(plan)->function(), "mt_flash_hopper");
  ASSERT_OK(EmitCudaCode(plan, nullptr, /*portable=*/true));
  EXPECT_EQ(LaunchWithMaps(plan), nullptr);
  proto::PlanProto other = PlanOf("tiny_char", "flash,bf16", "cuda:sm_80", 4);
  ASSERT_OK(EmitCudaCode(other));
  EXPECT_EQ(LaunchWithMaps(other), nullptr);
}

// The steps of attention [1, 2, 200, width] and of its backward, one after the other.
std::vector<CudaSteps::Step> AttentionSteps(const Target& target, DType dtype, bool tf32, int64_t width) {
  const TensorType q = {dtype, {1, 2, 200, width}}, lse = {DType::kF32, {1, 2, 200}};
  std::vector<CudaSteps::Step> all;
  for (const bool backward : {false, true}) {
    const OpDef* const op = FindOp(backward ? "flash_attention_backward" : "flash_attention");
    const std::vector<TensorType> operands =
        backward ? std::vector<TensorType>{q, q, q, q, q, lse} : std::vector<TensorType>{q, q, q};
    Attrs attrs = {{"scale", 0.25}, {"tf32", tf32}};
    const absl::StatusOr<std::vector<TensorType>> results = InferTypes(*op, operands, attrs);
    CHECK(results.ok()) << results.status();
    const absl::StatusOr<CudaSteps> steps =
        EmitCuda({.target = target,
                  .op = op,
                  .attrs = &attrs,
                  .operands = operands,
                  .results = *results,
                  .workspace_bytes = CudaWorkspaceBytes(target, *op, operands, *results, attrs),
                  .portable = true});
    CHECK(steps.ok()) << steps.status();
    all.insert(all.end(), steps->steps().begin(), steps->steps().end());
  }
  return all;
}

TEST(CudaCode, AttentionIsOnTensorCoresWhereItsPrecisionAllowsIt) {
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    for (const int64_t width : {16, 32, 48, 64, 96, 128}) {
      for (const auto& [dtype, tf32] :
           {std::pair(DType::kF32, false), std::pair(DType::kF32, true), std::pair(DType::kF16, false)}) {
        SCOPED_TRACE(absl::StrCat("sm_", sm, " ", DTypeName(dtype), tf32 ? " tf32" : "", " width ", width));
        const std::vector<CudaSteps::Step> steps = AttentionSteps(Sm(sm), dtype, tf32, width);
        ASSERT_EQ(steps.size(), 4u);
        const bool on_cores = sm >= 80 && (tf32 || dtype == DType::kF16);
        for (const CudaSteps::Step& step : steps) {
          EXPECT_EQ(absl::StartsWith(step.proto.launch().function(), "mt_flash"), on_cores);
          EXPECT_LE(step.proto.launch().shared_bytes() + 1024, CudaSharedBytes(Sm(sm)));
        }
      }
    }
  }
}

TEST(CudaCode, AttentionOfTf32Compiles) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  for (const auto& [sm, width] : {std::pair(80, 64), std::pair(86, 128), std::pair(120, 32)}) {
    std::set<std::string> sources;
    for (const CudaSteps::Step& step : AttentionSteps(Sm(sm), DType::kF32, /*tf32=*/true, width)) {
      sources.insert(step.source);
    }
    for (const std::string& source : sources) {
      EXPECT_OK(CompileCudaSource(absl::StrCat(CudaPrelude(), "\n", source), Sm(sm)).status())
          << "sm_" << sm << " width " << width;
    }
  }
}

TEST(CudaCode, VerifierRefusesTensorMapsThatDoNotHold) {
  const proto::PlanProto good = TinyCode("flash,bf16");
  EXPECT_OK(VerifyPlan(good));
  using Launch = proto::CudaLaunchProto;
  const struct {
    std::function<void(Launch&)> spoil;
    const char* message;
  } cases[] = {
      {[](Launch& l) { l.mutable_maps(0)->set_argument(99); }, "a tensor map is argument 99"},
      {[](Launch& l) { l.mutable_maps(1)->set_argument(l.maps(0).argument()); }, "out of order"},
      {[](Launch& l) { l.mutable_maps(0)->set_dtype("f32"); }, "dtype \"f32\""},
      {[](Launch& l) { l.mutable_maps(0)->mutable_sizes()->RemoveLast(); }, "3 sizes, 3 strides"},
      {[](Launch& l) { l.mutable_maps(0)->set_sizes(1, 0); }, "a size of 0"},
      {[](Launch& l) { l.mutable_maps(0)->set_sizes(1, int64_t{1} << 30); }, "bytes where"},
      {[](Launch& l) { l.mutable_maps(0)->set_box(1, 257); }, "a box of 257"},
      {[](Launch& l) { l.mutable_maps(0)->set_box(0, 4); }, "rows of 8 bytes"},
      {[](Launch& l) { l.mutable_maps(0)->set_strides(0, 12); }, "a stride of 12"},
      {[](Launch& l) { l.mutable_maps(0)->set_strides(2, int64_t{1} << 62); }, "a stride of"},
      {[](Launch& l) { l.mutable_maps(0)->set_swizzle_bytes(48); }, "a swizzle of 48"},
      {[](Launch& l) { l.mutable_arguments(l.maps(0).argument())->set_byte_offset(8); }, "no multiple of 16"},
  };
  for (const auto& c : cases) {
    proto::PlanProto plan = good;
    ASSERT_NE(LaunchWithMaps(plan), nullptr);
    c.spoil(*LaunchWithMaps(plan));
    EXPECT_THAT(VerifyPlan(plan), StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::HasSubstr(c.message)))
        << c.message;
  }
}

TEST(CudaCode, CubinsAreKeptAndDamageIsNoticed) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  namespace fs = std::filesystem;
  const fs::path cache = fs::path(::testing::TempDir()) / absl::StrCat("cuda_cache_", ::getpid());
  const char* const before = std::getenv("XDG_CACHE_HOME");
  const std::string kept = before == nullptr ? "" : before;
  ::setenv("XDG_CACHE_HOME", cache.c_str(), 1);
  const std::string source = "extern \"C\" __global__ void f(float* x) { x[threadIdx.x] = sinf(x[threadIdx.x]); }\n";
  ASSERT_OK_AND_ASSIGN(const std::string cubin, CompileCudaSource(source, Sm(90)));
  ASSERT_OK_AND_ASSIGN(const std::string other, CompileCudaSource(source, Sm(80)));
  EXPECT_NE(cubin, other);
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(cache)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  ASSERT_EQ(files.size(), 2u);
  ASSERT_OK_AND_ASSIGN(const std::vector<CubinFunction> functions, CubinFunctions(cubin));
  ASSERT_EQ(functions.size(), 1u);
  EXPECT_EQ(functions[0].name, "f");
  EXPECT_GT(functions[0].registers, 4);
  for (const size_t size : {size_t{0}, size_t{10}, size_t{100}, cubin.size() / 2}) {
    EXPECT_FALSE(CubinFunctions(absl::string_view(cubin).substr(0, size)).ok());
  }
  for (const fs::path& file : files) {
    ASSERT_OK_AND_ASSIGN(std::string bytes, ReadFile(file.string()));
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    ASSERT_OK(WriteFile(file.string(), bytes));
  }
  ASSERT_OK_AND_ASSIGN(const std::string again, CompileCudaSource(source, Sm(90)));
  EXPECT_EQ(CubinFunctions(again)->size(), 1u);
  // A cache that cannot be written to costs time alone.
  fs::remove_all(cache);
  ASSERT_OK(WriteFile(cache.string(), "a file"));
  EXPECT_OK(CompileCudaSource(source, Sm(90)).status());
  EXPECT_THAT(CudaCacheProblem(), ::testing::HasSubstr("are not kept in"));
  fs::remove(cache);
  if (before == nullptr) {
    ::unsetenv("XDG_CACHE_HOME");
  } else {
    ::setenv("XDG_CACHE_HOME", kept.c_str(), 1);
  }
}

TEST(CudaCode, DumpShowsSourcesAndWhatTheyTake) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  proto::PlanProto plan = PlanOf("tiny_char", "none", "cuda:sm_90", 4);
  // A few instructions are enough.
  while (plan.programs_size() > 1) plan.mutable_programs()->RemoveLast();
  while (plan.programs(0).instructions_size() > 8) plan.mutable_programs(0)->mutable_instructions()->RemoveLast();
  const std::string folder = absl::StrCat(::testing::TempDir(), "/cuda_dump_", ::getpid());
  CudaCodeReport report;
  ASSERT_OK(AddCudaCode(plan, folder, &report));
  EXPECT_GT(report.modules, 1);
  ASSERT_OK_AND_ASSIGN(const std::string table, ReadFile(absl::StrCat(folder, "/cuda/kernels.txt")));
  EXPECT_THAT(table, ::testing::HasSubstr("registers"));
  EXPECT_THAT(table, ::testing::HasSubstr("mt_layer_norm"));
  ASSERT_OK_AND_ASSIGN(const std::string source, ReadFile(absl::StrCat(folder, "/cuda/000.cu")));
  EXPECT_EQ(source, plan.cuda().modules(0).source());
  for (const proto::CudaModuleProto& module : plan.cuda().modules()) {
    EXPECT_FALSE(module.cubin().empty());
    EXPECT_EQ(module.checksum(), Fnv1a(module.cubin()));
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace mt
