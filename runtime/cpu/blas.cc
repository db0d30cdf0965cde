#include "runtime/cpu/blas.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "ir/base/check.h"

namespace mt {
namespace {

// CBLAS's constants and the symbol's type; integers are 32 bits in Debian's and Ubuntu's build.
constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
using SgemmFn = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a,
                         int lda, const float* b, int ldb, float beta, float* c, int ldc);

struct Library {
  absl::Status status;
  SgemmFn sgemm = nullptr;
  void* (*take_buffer)(int) = nullptr;  // OpenBLAS's own, which each call uses.
  void (*give_buffer)(void*) = nullptr;
  std::string version;
};

// OpenBLAS's name for the kernels of this CPU's widest instruction set; nullptr: let it look.
const char* CoreType() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return "SkylakeX";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "Haswell";
#endif
  return nullptr;
}

Library Load() {
  // Read by the library's constructor, so they must be set before it is loaded. Threads are our pool's.
  setenv("OPENBLAS_NUM_THREADS", "1", /*overwrite=*/1);
  if (const char* core = CoreType(); core != nullptr) setenv("OPENBLAS_CORETYPE", core, /*overwrite=*/0);
  Library library;
  void* handle = nullptr;
  for (const char* name : {"libopenblas.so.0", "libopenblas.so"}) {
    if (handle == nullptr) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (handle != nullptr) library.sgemm = reinterpret_cast<SgemmFn>(dlsym(handle, "cblas_sgemm"));
  if (library.sgemm == nullptr) {
    library.status = absl::FailedPreconditionError(
        "libopenblas.so.0 with cblas_sgemm cannot be loaded; install it (Debian and Ubuntu: apt-get install "
        "libopenblas0-pthread)");
    return library;
  }
  library.take_buffer = reinterpret_cast<void* (*)(int)>(dlsym(handle, "blas_memory_alloc"));
  library.give_buffer = reinterpret_cast<void (*)(void*)>(dlsym(handle, "blas_memory_free"));
  const auto text = [&](const char* symbol) -> std::string {
    auto* fn = reinterpret_cast<char* (*)()>(dlsym(handle, symbol));
    return fn == nullptr ? "" : fn();
  };
  const std::vector<std::string> words = absl::StrSplit(text("openblas_get_config"), ' ');
  library.version = absl::StrCat(words.size() > 1 ? absl::StrCat(words[0], " ", words[1]) : "OpenBLAS", " ",
                                 text("openblas_get_corename"));
  return library;
}

const Library*& Loaded() {
  static const Library* library = nullptr;
  return library;
}

}  // namespace

absl::Status LoadBlas() {
  static const Library& library = *new Library(Load());
  Loaded() = &library;
  return library.status;
}

void ReserveBlasBuffers(int threads) {
  const Library& library = *Loaded();
  if (library.take_buffer == nullptr || library.give_buffer == nullptr) return;
  std::vector<void*> buffers;
  for (int i = 0; i < std::min(threads, 64); ++i) buffers.push_back(library.take_buffer(0));
  for (void* buffer : buffers) library.give_buffer(buffer);
}

void RunSgemm(const Sgemm& s) {
  Loaded()->sgemm(kRowMajor, s.transpose_a ? kTrans : kNoTrans, s.transpose_b ? kTrans : kNoTrans,
                  static_cast<int>(s.rows), static_cast<int>(s.cols), static_cast<int>(s.depth), 1.0f, s.a,
                  static_cast<int>(s.lda), s.b, static_cast<int>(s.ldb), s.beta, s.c, static_cast<int>(s.ldc));
}

std::string BlasVersion() { return Loaded() == nullptr ? "" : Loaded()->version; }

}  // namespace mt
