#include "runtime/backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/thread_pool.h"

namespace mt {
namespace {

using Family = absl::Span<const CpuKernel> (*)();
constexpr Family kFamilies[] = {CpuMatmulKernels,      CpuRowKernels,  CpuAttentionKernels, CpuCachedAttentionKernels,
                                CpuChunkedLossKernels, CpuDataKernels, CpuOptimizerKernels, CpuFusedKernels};

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int threads) : pool_(threads) {}
  ~CpuBackend() override {
    if (arena_ != nullptr) ::munmap(arena_, static_cast<size_t>(arena_bytes_));
    for (const Guarded& guarded : guarded_) ::munmap(guarded.mapping, static_cast<size_t>(guarded.mapping_bytes));
  }

  absl::string_view name() const override { return "cpu"; }

  absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) override {
    CHECK(arena_ == nullptr) << "one arena a backend";
    const int64_t available = AvailableMemoryBytes();
    if (bytes > available) {
      return absl::ResourceExhaustedError(absl::StrCat("the plan needs an arena of ", FormatBytes(bytes), " (", bytes,
                                                       " bytes); ", FormatBytes(available),
                                                       " of memory is available here: ", FormatBytes(bytes - available),
                                                       " short. Compile with a smaller --batch or --seq"));
    }
    arena_bytes_ = std::max<int64_t>(bytes, 1);
    void* memory =
        ::mmap(nullptr, static_cast<size_t>(arena_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat("cannot map an arena of ", FormatBytes(bytes), ": ", std::strerror(errno)));
    }
    // Fewer page faults in the first step and fewer TLB misses in all of them; a refusal costs nothing else.
    ::madvise(memory, static_cast<size_t>(arena_bytes_), MADV_HUGEPAGE);
    arena_ = static_cast<std::byte*>(memory);
    return arena_;
  }

  void CopyToDevice(std::byte* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void CopyToHost(void* to, const std::byte* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void Fill(std::byte* to, uint8_t value, int64_t bytes) override {
    std::memset(to, value, static_cast<size_t>(bytes));
  }

  absl::StatusOr<Thunk> Bind(const KernelCall& call) override {
    if (call.op->is_element_wise()) return BindPointwise(call, pool_);
    for (const Family family : kFamilies) {
      for (const CpuKernel& kernel : family()) {
        if (kernel.op == call.op->name) return kernel.bind(call, pool_);
      }
    }
    return absl::UnimplementedError(absl::StrCat("the cpu backend has no kernel for ", call.op->name));
  }

  void Synchronize() override {}

  absl::StatusOr<std::byte*> AllocateGuarded(int64_t bytes) override;
  int64_t DamagedGuard() override;

 private:
  // Pages that cannot be touched, the buffer as near to the second one as its alignment allows, and around it, up to
  // these pages, bytes of kGuardByte.
  struct Guarded {
    std::byte *mapping, *pages, *data;
    int64_t mapping_bytes, pages_bytes, bytes;
  };
  static constexpr std::byte kGuardByte{0xA5};
  static constexpr int64_t kGuardAlignment = 64;  // Of the widest vectors.

  ThreadPool pool_;
  std::vector<Guarded> guarded_;
  std::byte* arena_ = nullptr;
  int64_t arena_bytes_ = 0;
};

absl::StatusOr<std::byte*> CpuBackend::AllocateGuarded(int64_t bytes) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  const int64_t room = std::max<int64_t>((bytes + kGuardAlignment - 1) / kGuardAlignment, 1) * kGuardAlignment;
  Guarded g = {.bytes = bytes};
  g.pages_bytes = (room + page - 1) / page * page;
  g.mapping_bytes = g.pages_bytes + 2 * page;
  void* mapping = ::mmap(nullptr, static_cast<size_t>(g.mapping_bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED || ::mprotect(static_cast<std::byte*>(mapping) + page, static_cast<size_t>(g.pages_bytes),
                                          PROT_READ | PROT_WRITE) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot map a buffer of ", FormatBytes(bytes), " between guards: ", std::strerror(errno)));
  }
  g.mapping = static_cast<std::byte*>(mapping);
  g.pages = g.mapping + page;
  g.data = g.pages + g.pages_bytes - room;
  std::fill(g.pages, g.data, kGuardByte);
  std::fill(g.data + bytes, g.pages + g.pages_bytes, kGuardByte);
  guarded_.push_back(g);
  return g.data;
}

int64_t CpuBackend::DamagedGuard() {
  const auto intact = [](const std::byte* begin, const std::byte* end) {
    return std::all_of(begin, end, [](std::byte b) { return b == kGuardByte; });
  };
  for (size_t i = 0; i < guarded_.size(); ++i) {
    const Guarded& g = guarded_[i];
    if (!intact(g.pages, g.data) || !intact(g.data + g.bytes, g.pages + g.pages_bytes)) return static_cast<int64_t>(i);
  }
  return -1;
}

class NullBackend : public Backend {
 public:
  absl::string_view name() const override { return "null"; }
  // No memory stands behind the arena: addresses are only computed with.
  absl::StatusOr<std::byte*> AllocateArena(int64_t) override { return reinterpret_cast<std::byte*>(int64_t{1} << 20); }
  void CopyToDevice(std::byte*, const void*, int64_t) override {}
  void CopyToHost(void* to, const std::byte*, int64_t bytes) override {
    std::memset(to, 0, static_cast<size_t>(bytes));
  }
  void Fill(std::byte*, uint8_t, int64_t) override {}
  void Copy(Lane, void*, const void*, int64_t) override {}
  absl::StatusOr<std::byte*> AllocateGuarded(int64_t) override { return AllocateArena(0); }
  absl::StatusOr<Thunk> Bind(const KernelCall&) override {
    return Thunk([] {});
  }
  void Synchronize() override {}
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int threads) {
  if (threads < 0 || threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("threads = ", threads, "; expected 1 to 1024, or 0 for all"));
  }
  return std::make_unique<CpuBackend>(threads == 0 ? AvailableCpus() : threads);
}

std::unique_ptr<Backend> MakeNullBackend() { return std::make_unique<NullBackend>(); }

}  // namespace mt
