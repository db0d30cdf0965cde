#include "codegen/doctor.h"

#include <dlfcn.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "codegen/compile.h"
#include "codegen/plan/gpu.h"
#include "codegen/plan/nvrtc.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "google/protobuf/stubs/common.h"
#include "ir/base/file.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/builder.h"
#include "ir/target.h"
#include "models/model.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using Verdict = Diagnosis::Verdict;

// "" where the file is not there.
std::string Read(const std::string& path) { return ReadFile(path, 1 << 22).value_or(""); }

// The value of the first line "KEY ... : VALUE" of a /proc file.
std::string Field(const std::string& text, absl::string_view key) {
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(':', 1));
    if (absl::StripAsciiWhitespace(parts.first) == key) return std::string(absl::StripAsciiWhitespace(parts.second));
  }
  return "";
}

Diagnosis Cpu() {
  const std::string info = Read("/proc/cpuinfo");
  const std::vector<std::string> flags = absl::StrSplit(Field(info, "flags"), ' ', absl::SkipEmpty());
  std::vector<std::string> features;
  for (const char* feature : {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"}) {
    if (std::find(flags.begin(), flags.end(), feature) != flags.end()) features.push_back(feature);
  }
  std::string model = Field(info, "model name");
  if (model.empty()) model = "unknown model";
  if (std::find(features.begin(), features.end(), "avx2") == features.end()) {
    return {Verdict::kWarn, "cpu", absl::StrCat(model, ", without AVX2: it works, slowly")};
  }
  return {Verdict::kOk, "cpu", absl::StrCat(model, " (", absl::StrJoin(features, " "), ")")};
}

Diagnosis Cores() {
  const int64_t all = sysconf(_SC_NPROCESSORS_ONLN);
  cpu_set_t set;
  CPU_ZERO(&set);
  int64_t usable = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : all;
  std::string why;
  // cgroup v2: "QUOTA PERIOD" in microseconds, or "max PERIOD".
  const std::vector<std::string> quota =
      absl::StrSplit(Read("/sys/fs/cgroup/cpu.max"), absl::ByAnyChar(" \n"), absl::SkipEmpty());
  int64_t used = 0, period = 0;
  if (quota.size() == 2 && absl::SimpleAtoi(quota[0], &used) && absl::SimpleAtoi(quota[1], &period) && period > 0) {
    const int64_t limit = std::max<int64_t>(1, (used + period - 1) / period);
    if (limit < usable) why = ", by the cgroup's limit";
    usable = std::min(usable, limit);
  }
  if (why.empty() && usable < all) why = ", by affinity";
  return {Verdict::kOk, "cores", absl::StrCat(usable, " of ", all, " usable", why)};
}

Diagnosis Memory() {
  const std::string available = Field(Read("/proc/meminfo"), "MemAvailable");
  int64_t kib = 0;
  if (!absl::SimpleAtoi(absl::StripSuffix(available, " kB"), &kib)) {
    return {Verdict::kWarn, "memory", "/proc/meminfo does not say how much is available"};
  }
  int64_t bytes = kib * 1024, limit = 0, current = 0;
  std::string why;
  if (absl::SimpleAtoi(Read("/sys/fs/cgroup/memory.max"), &limit) &&
      absl::SimpleAtoi(Read("/sys/fs/cgroup/memory.current"), &current) && limit - current < bytes) {
    bytes = std::max<int64_t>(0, limit - current);
    why = ", by the cgroup's limit";
  }
  const bool enough = bytes >= int64_t{1} << 30;
  return {enough ? Verdict::kOk : Verdict::kWarn, "memory",
          absl::StrCat(FormatBytes(bytes), " available", why, enough ? "" : ": enough for the smallest models only")};
}

// The BLAS is loaded when a plan runs, so it is looked for in the same way.
Diagnosis Libraries() {
  const std::string protobuf =
      absl::StrCat("protobuf ", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
  void* blas = dlopen("libopenblas.so.0", RTLD_LAZY | RTLD_LOCAL);
  if (blas == nullptr) {
    return {Verdict::kFix, "libraries",
            absl::StrCat(protobuf, "; libopenblas.so.0 is missing: apt-get install libopenblas0-pthread")};
  }
  const auto config = reinterpret_cast<char* (*)()>(dlsym(blas, "openblas_get_config"));
  const std::vector<std::string> words = absl::StrSplit(config == nullptr ? "OpenBLAS" : config(), ' ');
  return {Verdict::kOk, "libraries",
          absl::StrCat(protobuf, ", ", words[0], words.size() > 1 ? " " : "", words.size() > 1 ? words[1] : "")};
}

// A GPU is not needed; one that is there and cannot be used is worth a warning.
Diagnosis Gpu() {
  const absl::StatusOr<CudaDeviceInfo> gpu = DescribeCudaDevice(0);
  if (!gpu.ok()) {
    std::error_code error;
    const bool there = fs::exists("/dev/nvidiactl", error);
    return {there ? Verdict::kWarn : Verdict::kOk, "gpu", std::string(gpu.status().message())};
  }
  const absl::StatusOr<Target> target = TargetOfDevice(gpu->sm);
  if (!target.ok()) return {Verdict::kWarn, "gpu", absl::StrCat(gpu->name, ": ", target.status().message())};
  return {Verdict::kOk, "gpu", absl::StrCat(gpu->name, ", sm_", gpu->sm, ": target ", target->ToString())};
}

// What plans for cuda are made with, and run with.
Diagnosis Cuda() {
  const absl::StatusOr<std::string> compiler = CudaCompilerVersion();
  void* matmuls = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (matmuls == nullptr) matmuls = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
  }
  const std::string finding = absl::StrCat(
      compiler.ok() ? absl::StrCat(*compiler, ": plans for cuda hold kernels")
                    : absl::StrCat(compiler.status().message(), ": plans for cuda hold sources"),
      "; ", matmuls != nullptr ? "cuBLASLt is there" : "no libcublasLt.so (13 or 12): plans for cuda do not run here");
  const bool needed = DescribeCudaDevice(0).ok();
  return {needed && (!compiler.ok() || matmuls == nullptr) ? Verdict::kWarn : Verdict::kOk, "cuda", finding};
}

Diagnosis Zoo() {
  const std::vector<std::string> zoo = ZooModels();
  if (zoo.empty()) {
    return {Verdict::kFix, "zoo",
            absl::StrCat("no models in ", ModelsFolder(), "; install again or run from the checkout")};
  }
  return {Verdict::kOk, "zoo", absl::StrCat(zoo.size(), " models in ", ModelsFolder())};
}

Diagnosis Runner() {
  const std::string path = absl::StrCat(ExecutableFolder(), "/mtrun");
  if (access(path.c_str(), X_OK) != 0) {
    return {Verdict::kFix, "mtrun", absl::StrCat("not at ", path, "; build it with ./mt build")};
  }
  return {Verdict::kOk, "mtrun", path};
}

// A linear regression: one matmul, a squared error.
absl::StatusOr<std::unique_ptr<Module>> TinyModule() {
  auto module = std::make_unique<Module>("tiny");
  const TensorType x_type{DType::kF32, {4, 8}}, w_type{DType::kF32, {8, 4}};
  RETURN_IF_ERROR(module->AddState({.name = "w",
                                    .type = w_type,
                                    .logical_dims = w_type.dims,
                                    .role = Role::kParameter,
                                    .init = {.kind = Init::Kind::kNormal, .stddev = 0.02}}));
  Graph& graph = *module->AddGraph("train");
  Builder builder(graph);
  const Value x = builder.Input("x", x_type, Role::kData);
  const Value w = builder.Input("w", w_type, Role::kParameter);
  const Value y = builder.Op("matmul", {x, w}, {}, "y");
  const Value loss = builder.Op("reduce_mean", {builder.Mul(y, y)}, {{"dims", IntList{0, 1}}}, "loss");
  RETURN_IF_ERROR(builder.status());
  graph.AddOutput(loss, "loss");
  return module;
}

absl::StatusOr<int64_t> PlanCheck() {
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, TinyModule());
  ASSIGN_OR_RETURN(const proto::PlanProto plan, Compile(std::move(module), {}));
  ASSIGN_OR_RETURN(const proto::PlanProto read, ParsePlan(SerializePlan(plan), "tiny"));
  RETURN_IF_ERROR(VerifyPlan(read));
  if (PlanText(read) != PlanText(plan)) return absl::InternalError("a plan changes by being written and read");
  return plan.arena_bytes();
}

Diagnosis Plan() {
  const absl::StatusOr<int64_t> bytes = PlanCheck();
  if (!bytes.ok()) return {Verdict::kFix, "plan", std::string(bytes.status().message())};
  return {Verdict::kOk, "plan", absl::StrCat("a tiny model compiles into ", *bytes, " bytes, verified and read back")};
}

}  // namespace

std::vector<Diagnosis> Examine() {
  return {Cpu(), Cores(), Memory(), Libraries(), Gpu(), Cuda(), Zoo(), Runner(), Plan()};
}

std::string FormatDiagnoses(const std::vector<Diagnosis>& diagnoses) {
  std::string text;
  for (const Diagnosis& d : diagnoses) {
    const char* verdict = d.verdict == Verdict::kOk ? "ok" : d.verdict == Verdict::kWarn ? "warn" : "fix";
    absl::StrAppendFormat(&text, "%-5s %-10s %s\n", verdict, d.subject, d.finding);
  }
  return text;
}

}  // namespace mt
