// Device code without a device: every sample of every row is emitted, within its workspace, and compiles; every model
// of the zoo gets device code.
#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/cuda/code.h"
#include "codegen/cuda/kernel.h"
#include "codegen/plan/nvrtc.h"
#include "codegen/plan/resources.h"
#include "ir/op.h"
#include "ir/target.h"
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
      Emitted emitted{.name = absl::StrCat(op->name, " sample ", number++)};
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

void CompileAll(const Target& target, size_t stride) {
  std::map<std::string, std::string> names;  // Source -> a sample that has it.
  for (const Emitted& emitted : EmitAll(target)) {
    for (const CudaSteps::Step& step : emitted.steps.steps()) {
      if (step.proto.has_launch()) names.emplace(step.source, emitted.name);
    }
  }
  EXPECT_GT(names.size(), 100u);
  std::vector<std::pair<std::string, std::string>> work(names.begin(), names.end());
  std::atomic<size_t> next{0};
  std::vector<std::string> errors(work.size());
  const auto run = [&] {
    for (size_t i = stride * next++; i < work.size(); i = stride * next++) {
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

TEST(CudaCode, EverySampleCompiles) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  CompileAll(Sm(90), 1);
}

TEST(CudaCode, SamplesCompileForOtherChips) {
  if (!HasCompiler()) GTEST_SKIP() << CudaCompilerVersion().status();
  for (const int sm : {75, 80, 120}) CompileAll(Sm(sm), 13);
}

}  // namespace
}  // namespace mt
