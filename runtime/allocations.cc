#include "runtime/allocations.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

namespace mt {
namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> count{0}, bytes{0}, small_count{0}, small_bytes{0};

#if !defined(MT_SANITIZED) && defined(__GLIBC__)
#define MT_COUNTS_ALLOCATIONS 1
void Count(size_t size) {
  if (!counting.load(std::memory_order_relaxed)) return;
  const bool small = size < static_cast<size_t>(kSmallAllocationBytes);
  (small ? small_count : count).fetch_add(1, std::memory_order_relaxed);
  (small ? small_bytes : bytes).fetch_add(static_cast<int64_t>(size), std::memory_order_relaxed);
}
#else
#define MT_COUNTS_ALLOCATIONS 0
#endif

}  // namespace

bool CanCountAllocations() { return MT_COUNTS_ALLOCATIONS != 0; }

void StartCountingAllocations() {
  count = bytes = small_count = small_bytes = 0;
  counting = true;
}

AllocationCounts StopCountingAllocations() {
  counting = false;
  return {count, bytes, small_count, small_bytes};
}

}  // namespace mt

#if MT_COUNTS_ALLOCATIONS
// glibc lets a program define these; the originals stay reachable under these names.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* block, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) noexcept {
  mt::Count(size);
  return __libc_malloc(size);
}
void* calloc(size_t n, size_t size) noexcept {
  mt::Count(n * size);
  return __libc_calloc(n, size);
}
void* realloc(void* block, size_t size) noexcept {
  mt::Count(size);
  return __libc_realloc(block, size);
}
void* memalign(size_t alignment, size_t size) noexcept {
  mt::Count(size);
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) noexcept {
  mt::Count(size);
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** block, size_t alignment, size_t size) noexcept {
  mt::Count(size);
  void* memory = __libc_memalign(alignment, size);
  if (memory == nullptr) return ENOMEM;
  *block = memory;
  return 0;
}
void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) noexcept {
  if ((flags & MAP_ANONYMOUS) != 0) mt::Count(length);
  return reinterpret_cast<void*>(::syscall(SYS_mmap, address, length, protection, flags, fd, offset));
}
}
#endif
