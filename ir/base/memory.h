// What the operating system says about memory.
#ifndef MT_IR_BASE_MEMORY_H_
#define MT_IR_BASE_MEMORY_H_

#include <cstdint>

namespace mt {

// Bytes that can be had now: the kernel's estimate, within the cgroup's limit (v1 or v2).
int64_t AvailableMemoryBytes();

}  // namespace mt

#endif  // MT_IR_BASE_MEMORY_H_
