// What changes in a process and on its device between two steps, though nothing should.
#ifndef MT_RUNTIME_DRIFT_H_
#define MT_RUNTIME_DRIFT_H_

#include <cstdint>

#include "runtime/allocations.h"
#include "runtime/backend.h"

namespace mt {

struct Drift {
  AllocationCounts allocations;  // Zeros where CanCountAllocations() is false.
  int64_t device_bytes = 0, process_bytes = 0;
};

class DriftWatch {
 public:
  // The first steps still load code and touch pages.
  static constexpr int64_t kFirstStep = 10;
  void Start(Backend& backend);
  Drift Stop(Backend& backend);  // Since Start.

 private:
  int64_t device_bytes_ = 0, process_bytes_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_DRIFT_H_
