// What a plan runs on, and what passes and the planner know about it. The one place where target text is read.
#ifndef MT_IR_TARGET_H_
#define MT_IR_TARGET_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/cost.h"
#include "ir/tensor_type.h"

namespace mt {

struct Target {
  enum class Device { kCpu, kCuda };
  Device device = Device::kCpu;
  int sm = 0;  // CUDA: compute capability times 10: 75, 80, 86, 89, 90, 100 or 120.

  bool is_cuda() const { return device == Device::kCuda; }
  std::string ToString() const;  // "cpu", "cuda:sm_90": ParseTarget reads it back.
  // How its matmul rate, bandwidth and context were come by: "an H200's, measured".
  absl::string_view provenance() const;
  // Whether its kernels compute in `dtype`: cuda:sm_75 has no bf16.
  bool Computes(DType dtype) const;
};

// "cpu", "cuda:sm_90"; "cuda" is cuda:sm_90. Errors: InvalidArgument that lists them.
absl::StatusOr<Target> ParseTarget(absl::string_view text);

// The target of a GPU of compute capability sm / 10: itself, or the largest known one whose kernels it runs. Errors:
// NotFound (older than all of them, or of a family that is not known).
absl::StatusOr<Target> TargetOfDevice(int sm);

// The rates that passes weigh with; a constant for each target, so that plans do not depend on the machine that
// compiles.
Roofline TargetRoofline(const Target& target);

// Device memory that a process has beside the arena: the driver's context and loaded kernels. 0 for the CPU, where the
// arena alone is what counts.
int64_t ContextBytes(const Target& target);

}  // namespace mt

#endif  // MT_IR_TARGET_H_
