#include "runtime/cpu/blas.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "runtime/cpu/sgemm.h"

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

// So few columns do not pay for packing a.
constexpr int64_t kFewCols = 4 * CpuPanels::kUnitCols;

// Our own kernels' packing buffers: blocks of both factors for each concurrent call. They live as long as the process.
class Buffers {
 public:
  static constexpr int64_t kRows = 8 * CpuPanels::kUnitRows, kCols = 512;

  void Reserve(int n) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int i = count_.load(); i < std::min(n, kMost); ++i) {
      buffers_[i].data.reset(new (std::align_val_t{64}) float[(kRows + kCols) * CpuPanels::kMostDepth]);
      count_.store(i + 1);
    }
  }
  // Waits where all are taken.
  int Take() {
    while (true) {
      for (int i = 0; i < count_.load(std::memory_order_acquire); ++i) {
        if (!buffers_[i].taken.load(std::memory_order_relaxed) && !buffers_[i].taken.exchange(true)) return i;
      }
    }
  }
  void Give(int i) { buffers_[i].taken.store(false, std::memory_order_release); }
  float* data(int i) { return buffers_[i].data.get(); }

 private:
  static constexpr int kMost = 1024;  // Threads a pool may have.
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  struct Buffer {
    std::unique_ptr<float[], Delete> data;
    std::atomic<bool> taken{false};
  };
  std::mutex mutex_;
  std::atomic<int> count_{0};
  Buffer buffers_[kMost];
};
Buffers& OwnBuffers() {
  static Buffers& buffers = *new Buffers;
  return buffers;
}

// A product with b packed: its depth [k, k + depth).
PanelProduct WithPanel(const Sgemm& s, int64_t k, int64_t depth, const float* packed_b, int64_t packed_depth) {
  return {.rows = s.rows,
          .cols = s.cols,
          .depth = depth,
          .a = s.a + (s.transpose_a ? k * s.lda : k),
          .lda = s.lda,
          .transpose_a = s.transpose_a,
          .b = packed_b,
          .packed_depth = packed_depth,
          .start = k > 0 || s.beta != 0 ? s.c : nullptr,
          .start_step = s.ldc,
          .c = s.c,
          .ldc = s.ldc};
}

// The depth is cut by its length alone: an element's bits do not depend on where it stands.
void RunOwnSgemm(const Sgemm& s) {
  const int64_t most_depth = CpuPanelsOf(s.rows, s.cols, s.depth).depth;
  if (s.packed_b != nullptr && most_depth == s.depth) {
    return MultiplyPanels(WithPanel(s, 0, s.depth, s.packed_b, s.packed_depth));
  }
  const int buffer = OwnBuffers().Take();
  float* const packed_a = OwnBuffers().data(buffer);
  float* const packed_b = packed_a + Buffers::kRows * CpuPanels::kMostDepth;
  for (int64_t j = 0; j < s.cols; j += Buffers::kCols) {
    const int64_t cols = std::min(Buffers::kCols, s.cols - j);
    for (int64_t k = 0; k < s.depth; k += most_depth) {
      const int64_t depth = std::min(most_depth, s.depth - k);
      PackCols(s.b + (s.transpose_b ? j * s.ldb + k : k * s.ldb + j), s.ldb, s.transpose_b, cols, depth, packed_b);
      PanelProduct product = WithPanel(s, k, depth, packed_b, depth);
      product.cols = cols;
      const auto set_c = [&](float* c) {
        product.c = c;
        if (product.start != nullptr) product.start = c;
      };
      set_c(s.c + j);
      if (cols <= kFewCols) {
        MultiplyPanels(product);
        continue;
      }
      product.packed_a = true;
      product.a = packed_a;
      for (int64_t i = 0; i < s.rows; i += Buffers::kRows) {
        product.rows = std::min(Buffers::kRows, s.rows - i);
        set_c(s.c + i * s.ldc + j);
        PackRows(s.a + (s.transpose_a ? k * s.lda + i : i * s.lda + k), s.lda, s.transpose_a, product.rows, depth,
                 packed_a);
        MultiplyPanels(product);
      }
    }
  }
  OwnBuffers().Give(buffer);
}

const Library*& Loaded() {
  static const Library* library = nullptr;
  return library;
}

}  // namespace

absl::Status LoadBlas() {
  if (HasSgemmKernels()) return absl::OkStatus();
  static const Library& library = *new Library(Load());
  Loaded() = &library;
  return library.status;
}

void ReserveBlasBuffers(int threads) {
  if (HasSgemmKernels()) return OwnBuffers().Reserve(threads);
  const Library& library = *Loaded();
  if (library.take_buffer == nullptr || library.give_buffer == nullptr) return;
  std::vector<void*> buffers;
  for (int i = 0; i < std::min(threads, 64); ++i) buffers.push_back(library.take_buffer(0));
  for (void* buffer : buffers) library.give_buffer(buffer);
}

void RunSgemm(const Sgemm& s) {
  if (HasSgemmKernels()) return RunOwnSgemm(s);
  Loaded()->sgemm(kRowMajor, s.transpose_a ? kTrans : kNoTrans, s.transpose_b ? kTrans : kNoTrans,
                  static_cast<int>(s.rows), static_cast<int>(s.cols), static_cast<int>(s.depth), 1.0f, s.a,
                  static_cast<int>(s.lda), s.b, static_cast<int>(s.ldb), s.beta, s.c, static_cast<int>(s.ldc));
}

std::string BlasVersion() {
  if (HasSgemmKernels()) return "own kernels, AVX-512";
  return Loaded() == nullptr ? "" : Loaded()->version;
}

}  // namespace mt
