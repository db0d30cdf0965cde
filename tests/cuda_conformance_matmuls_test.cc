// The choice of matmul algorithms on a device: whatever is timed or remembered, the same bits. Without a device the
// tests skip and say so.
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/cuda/code.h"
#include "codegen/memory/buffer_assignment.h"
#include "ir/base/json.h"
#include "ir/base/philox.h"
#include "ir/builder.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"
#include "tests/process.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class MatmulsOnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::StatusOr<CudaDeviceInfo> info = DescribeCudaDevice(0);
    if (!info.ok()) GTEST_SKIP() << info.status().message();
    target_ = absl::StrCat("cuda:sm_", info->sm);
    ASSERT_EQ(::setenv("XDG_CACHE_HOME", folder_.path().c_str(), 1), 0);
  }
  void TearDown() override { ::unsetenv("XDG_CACHE_HOME"); }

  std::string CacheText() const { return folder_.Read("mt/matmuls.json"); }

  // Every kind of matmul that plans have; one program.
  absl::StatusOr<proto::PlanProto> Plan() const {
    Module module("matmuls");
    Builder builder(*module.AddGraph("train"));
    int index = 0;
    const auto input = [&](DType dtype, Dims dims) {
      return builder.Input(absl::StrCat("x", index++), {dtype, std::move(dims)}, Role::kData);
    };
    const auto add = [&](std::vector<Value> operands, Attrs attrs) {
      const std::string name = absl::StrCat("y", builder.graph().outputs().size());
      builder.graph().AddOutput(builder.Op("matmul", operands, std::move(attrs), name), name);
    };
    for (const DType dtype : {DType::kF16, DType::kF32}) {
      add({input(dtype, {1024, 256}), input(dtype, {256, 768})}, {});
      add({input(dtype, {1000, 264}), input(dtype, {520, 264}), input(dtype, {520})},
          {{"transpose_b", true}, {"bias", true}});
      add({input(dtype, {4096, 256}), input(dtype, {4096, 512}), input(DType::kF32, {256, 512})},
          {{"transpose_a", true}, {"accumulator", true}});
      add({input(dtype, {8, 100, 64}), input(dtype, {8, 100, 64})}, {{"transpose_b", true}});
      add({input(dtype, {33, 65}), input(dtype, {65, 17})}, {});
    }
    add({input(DType::kF32, {1024, 256}), input(DType::kF32, {256, 768})}, {{"tf32", true}});
    RETURN_IF_ERROR(builder.status());
    ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(module, {.target = target_}));
    RETURN_IF_ERROR(AddCudaCode(plan, ""));
    return plan;
  }

  // Loads and runs it. What lies in the arena after loading goes to `loaded`.
  absl::StatusOr<std::map<std::string, std::string>> Run(CudaOptions options, std::string* loaded = nullptr) const {
    ASSIGN_OR_RETURN(proto::PlanProto plan, Plan());
    ASSIGN_OR_RETURN(std::unique_ptr<Backend> owned, MakeCudaBackend(0, std::move(options)));
    Backend& backend = *owned;
    ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(owned)));
    if (loaded != nullptr) {
      loaded->resize(static_cast<size_t>(executor->plan().arena_bytes()));
      backend.CopyToHost(loaded->data(), executor->arena(), executor->plan().arena_bytes());
    }
    const Program& program = *executor->FindProgram("train");
    for (const BoundTensor& tensor : program.inputs()) {
      std::string bytes(static_cast<size_t>(tensor.type.byte_size()), '\0');
      // Floats between 1 and 2, and their negatives.
      const size_t size = static_cast<size_t>(ByteSize(tensor.type.dtype));
      for (size_t i = 0; i < bytes.size(); i += size) {
        const uint32_t random = Philox({7, 7}, {static_cast<uint32_t>(i), 0, 0, 0})[0];
        const uint32_t value = size == 4 ? (random & 0x807fffff) | 0x3f800000 : (random & 0x83ff) | 0x3c00;
        std::memcpy(&bytes[i], &value, size);
      }
      backend.CopyToDevice(tensor.data, bytes.data(), tensor.type.byte_size());
    }
    program.Run();
    std::map<std::string, std::string> results;
    for (const BoundTensor& tensor : program.outputs()) {
      std::string& bytes = results[tensor.name];
      bytes.resize(static_cast<size_t>(tensor.type.byte_size()));
      backend.CopyToHost(bytes.data(), tensor.data, tensor.type.byte_size());
    }
    return results;
  }

  CudaOptions Timed() {
    return {.warn = [this](const std::string& warning) { warnings_.push_back(warning); }};
  }

  ProcessFolder folder_{"cuda_conformance_matmuls_test"};
  std::string target_;
  std::vector<std::string> warnings_;
};

TEST_F(MatmulsOnCuda, TimedAndRememberedGiveTheFirstsBits) {
  ASSERT_OK_AND_ASSIGN(const auto first, Run({.time_matmuls = false}));
  EXPECT_THAT(first, SizeIs(11));
  EXPECT_EQ(CacheText(), "") << "nothing is remembered of what was not timed";
  std::string arena;
  ASSERT_OK_AND_ASSIGN(const auto timed, Run(Timed(), &arena));
  EXPECT_TRUE(timed == first);
  EXPECT_EQ(arena.find_first_not_of('\0'), std::string::npos) << "timing leaves the arena zero";
  const std::string cache = CacheText();
  EXPECT_EQ(nlohmann::json::parse(cache, nullptr, false)["algorithms"].size(), 11u);
  ASSERT_OK_AND_ASSIGN(const auto remembered, Run(Timed()));
  EXPECT_TRUE(remembered == first);
  EXPECT_EQ(CacheText(), cache) << "everything was known";
  EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(MatmulsOnCuda, WhatTheLibraryDoesNotProposeIsNotRun) {
  ASSERT_OK_AND_ASSIGN(const auto first, Run(Timed()));
  const std::string cache = CacheText();
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(cache, nullptr, false);
  for (auto& [problem, algorithm] : json["algorithms"].items()) algorithm = std::string(128, 'f');
  folder_.Write("mt/matmuls.json", json.dump());
  ASSERT_OK_AND_ASSIGN(const auto again, Run(Timed()));
  EXPECT_TRUE(again == first);
  EXPECT_EQ(CacheText().find(std::string(128, 'f')), std::string::npos) << "all were chosen anew";
  folder_.Write("mt/matmuls.json", cache.substr(0, cache.size() / 2));
  ASSERT_OK_AND_ASSIGN(const auto damaged, Run(Timed()));
  EXPECT_TRUE(damaged == first);
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("matmuls.json")));
}

TEST_F(MatmulsOnCuda, AReportShowsWhatWasTimed) {
  std::vector<std::string> lines;
  CudaOptions options = Timed();
  options.report = [&](const std::string& line) { lines.push_back(line); };
  ASSERT_OK(Run(options).status());
  ASSERT_THAT(lines, SizeIs(11));
  for (const std::string& line : lines) {
    const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
    ASSERT_FALSE(json.is_discarded()) << line;
    const size_t chosen = json["chosen"].get<size_t>();
    ASSERT_LT(chosen, json["candidates"].size());
    EXPECT_TRUE(json["candidates"][chosen]["same_bits"].get<bool>());
    EXPECT_TRUE(json["candidates"][0]["same_bits"].get<bool>());
    EXPECT_GT(json["candidates"][0]["us"].get<double>(), 0.0);
  }
}

}  // namespace
}  // namespace mt
