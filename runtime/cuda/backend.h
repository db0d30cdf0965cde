// The CUDA backend: runs the steps that a plan holds, and knows nothing of ops.
#ifndef MT_RUNTIME_CUDA_BACKEND_H_
#define MT_RUNTIME_CUDA_BACKEND_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/backend.h"

namespace mt {

struct CudaDeviceInfo {
  int index = 0;
  std::string name = {};  // "NVIDIA H200"
  int sm = 0;             // Compute capability times 10: 90.
};
// Errors: FailedPrecondition (no driver, no device), InvalidArgument for a number that no device has (says how many
// there are), Unimplemented (built without CUDA).
absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int index);

// Opens device `index`. Errors: FailedPrecondition (no driver, no device, no cuBLASLt), InvalidArgument (no such
// device), Unimplemented (built without CUDA).
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index);

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_BACKEND_H_
