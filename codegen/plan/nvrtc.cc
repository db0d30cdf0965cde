#include "codegen/plan/nvrtc.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"

#ifdef MT_HAS_CUDA
#include <dlfcn.h>
#include <nvrtc.h>
#endif

namespace mt {

#ifndef MT_HAS_CUDA

absl::StatusOr<std::string> CudaCompilerVersion() {
  return absl::UnimplementedError("built without CUDA: cmake found no cuda.h, nvrtc.h and cublasLt.h");
}
absl::StatusOr<std::string> CompileCudaSource(absl::string_view, const Target&) {
  return CudaCompilerVersion().status();
}
std::string CudaCacheProblem() { return ""; }

#else

namespace {

constexpr int64_t kMaxCubinBytes = int64_t{64} << 20;

#define MT_NVRTC_FUNCTIONS(X) \
  X(nvrtcVersion)             \
  X(nvrtcGetErrorString)      \
  X(nvrtcCreateProgram)       \
  X(nvrtcDestroyProgram)      \
  X(nvrtcCompileProgram)      \
  X(nvrtcGetCUBINSize)        \
  X(nvrtcGetCUBIN)            \
  X(nvrtcGetProgramLogSize)   \
  X(nvrtcGetProgramLog)

struct Nvrtc {
#define MT_DECLARE(name) decltype(&::name) name = nullptr;
  MT_NVRTC_FUNCTIONS(MT_DECLARE)
#undef MT_DECLARE
  std::string version;
  std::vector<std::string> options;
};

// `--minimal` leaves out what of CUDA's runtime no kernel here uses: 8 of the 35 ms that the smallest takes.
std::vector<std::string> OptionsOf(int major, int minor) {
  std::vector<std::string> options = {"--std=c++17", "--fmad=false", "--device-as-default-execution-space"};
  if (major > 12 || (major == 12 && minor >= 4)) options.push_back("--minimal");
  return options;
}

absl::StatusOr<Nvrtc> OpenNvrtc() {
  std::vector<std::string> names = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* folder = std::getenv(variable)) names.push_back(absl::StrCat(folder, "/lib64/libnvrtc.so"));
  }
  names.push_back("/usr/local/cuda/lib64/libnvrtc.so");
  void* library = nullptr;
  for (const std::string& name : names) {
    if (library == nullptr) library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    return absl::NotFoundError(absl::StrCat("no NVRTC: none of ", absl::StrJoin(names, ", "), " can be opened"));
  }
  Nvrtc nvrtc;
#define MT_LOOK_UP(name)                                                      \
  nvrtc.name = reinterpret_cast<decltype(&::name)>(::dlsym(library, #name));  \
  if (nvrtc.name == nullptr) {                                                \
    return absl::NotFoundError("no NVRTC that has " #name ": it is too old"); \
  }
  MT_NVRTC_FUNCTIONS(MT_LOOK_UP)
#undef MT_LOOK_UP
  int major = 0, minor = 0;
  nvrtc.nvrtcVersion(&major, &minor);
  nvrtc.version = absl::StrCat("nvrtc ", major, ".", minor);
  nvrtc.options = OptionsOf(major, minor);
  return nvrtc;
}

const absl::StatusOr<Nvrtc>& TheNvrtc() {
  static const absl::StatusOr<Nvrtc>& nvrtc = *new absl::StatusOr<Nvrtc>(OpenNvrtc());
  return nvrtc;
}

// "sm_90a": what wgmma and setmaxnreg need.
std::string Architecture(const Target& target) { return absl::StrCat("sm_", target.sm, target.sm == 90 ? "a" : ""); }

// The first error of a log and what it points to.
std::string FirstError(absl::string_view log) {
  const std::vector<absl::string_view> lines = absl::StrSplit(log, '\n');
  for (size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].find("error") == absl::string_view::npos) continue;
    return absl::StrCat(lines[i], i + 1 < lines.size() ? absl::StrCat(" ", lines[i + 1]) : "");
  }
  return std::string(log.substr(0, 500));
}

absl::StatusOr<std::string> Compile(const Nvrtc& nvrtc, const std::string& source, const Target& target) {
  nvrtcProgram program = nullptr;
  nvrtcResult result = nvrtc.nvrtcCreateProgram(&program, source.c_str(), "kernel.cu", 0, nullptr, nullptr);
  if (result != NVRTC_SUCCESS) return absl::InternalError(absl::StrCat("NVRTC: ", nvrtc.nvrtcGetErrorString(result)));
  std::vector<std::string> texts = nvrtc.options;
  texts.push_back(absl::StrCat("--gpu-architecture=", Architecture(target)));
  std::vector<const char*> options;
  for (const std::string& text : texts) options.push_back(text.c_str());
  result = nvrtc.nvrtcCompileProgram(program, static_cast<int>(options.size()), options.data());
  std::string cubin, log;
  size_t bytes = 0;
  if (result != NVRTC_SUCCESS) {
    if (nvrtc.nvrtcGetProgramLogSize(program, &bytes) == NVRTC_SUCCESS) {
      log.resize(bytes);
      nvrtc.nvrtcGetProgramLog(program, log.data());
    }
  } else {
    result = nvrtc.nvrtcGetCUBINSize(program, &bytes);
    cubin.resize(bytes);
    if (result == NVRTC_SUCCESS) result = nvrtc.nvrtcGetCUBIN(program, cubin.data());
  }
  nvrtc.nvrtcDestroyProgram(&program);
  if (result == NVRTC_SUCCESS) return cubin;
  return absl::InternalError(absl::StrCat("a kernel does not compile for ", target.ToString(), " with ", nvrtc.version,
                                          ": ", nvrtc.nvrtcGetErrorString(result), ": ", FirstError(log)));
}

std::mutex& ProblemMutex() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}
std::string& Problem() {
  static std::string& problem = *new std::string;
  return problem;
}

// A cache file: 8 bytes of FNV-1a of the cubin, the cubin.
std::string Checksum(absl::string_view cubin) {
  const uint64_t hash = Fnv1a(cubin);
  std::string bytes(sizeof(hash), '\0');
  std::memcpy(bytes.data(), &hash, sizeof(hash));
  return bytes;
}

}  // namespace

absl::StatusOr<std::string> CudaCompilerVersion() {
  RETURN_IF_ERROR(TheNvrtc().status());
  return TheNvrtc()->version;
}

std::string CudaCacheProblem() {
  const std::lock_guard<std::mutex> lock(ProblemMutex());
  return Problem();
}

absl::StatusOr<std::string> CompileCudaSource(absl::string_view source, const Target& target) {
  CHECK(target.is_cuda()) << target.ToString();
  RETURN_IF_ERROR(TheNvrtc().status());
  const Nvrtc& nvrtc = *TheNvrtc();
  std::string folder = CacheFolder(), path;
  if (!folder.empty()) {
    absl::StrAppend(&folder, "/cubins");
    const std::string key =
        absl::StrCat(nvrtc.version, "\n", Architecture(target), "\n", absl::StrJoin(nvrtc.options, " "), "\n", source);
    path = absl::StrFormat("%s/%016x%016x", folder, Fnv1a(key), Fnv1a(key, 0x9ae16a3b2f90404fu));
    const absl::StatusOr<std::string> kept = ReadFile(path, kMaxCubinBytes);
    if (kept.ok() && kept->size() > 8 && kept->substr(0, 8) == Checksum(absl::string_view(*kept).substr(8))) {
      return kept->substr(8);
    }
  }
  ASSIGN_OR_RETURN(std::string cubin, Compile(nvrtc, std::string(source), target));
  if (!path.empty()) {
    absl::Status written = MakeFolder(folder);
    if (written.ok()) written = WriteFile(path, absl::StrCat(Checksum(cubin), cubin));
    if (!written.ok()) {
      const std::lock_guard<std::mutex> lock(ProblemMutex());
      Problem() = absl::StrCat("compiled kernels are not kept in ", folder, ": ", written.message());
    }
  }
  return cubin;
}

#endif  // MT_HAS_CUDA

}  // namespace mt
