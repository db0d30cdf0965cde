// Counts heap allocations at every entry point of the C library and of C++ while it is told to.
//
// The counters live in this library's malloc, calloc, realloc, memalign family and anonymous mmap, which stand before
// the C library's for the whole process: other libraries are counted, too. Not under sanitizers, which bring their own.
#ifndef MT_RUNTIME_ALLOCATIONS_H_
#define MT_RUNTIME_ALLOCATIONS_H_

#include <cstdint>

namespace mt {

// Blocks smaller than this hold no tensors and are counted apart.
inline constexpr int64_t kSmallAllocationBytes = 4096;

struct AllocationCounts {
  int64_t count = 0, bytes = 0;              // Of blocks of at least kSmallAllocationBytes.
  int64_t small_count = 0, small_bytes = 0;  // Of the others.
};

// False where the build cannot count (sanitizers); the counts are then 0.
bool CanCountAllocations();
void StartCountingAllocations();
AllocationCounts StopCountingAllocations();

}  // namespace mt

#endif  // MT_RUNTIME_ALLOCATIONS_H_
