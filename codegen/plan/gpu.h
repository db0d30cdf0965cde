// Which GPU is here; asked of the driver, which is opened when it is wanted.
#ifndef MT_CODEGEN_PLAN_GPU_H_
#define MT_CODEGEN_PLAN_GPU_H_

#include <string>

#include "absl/status/statusor.h"

namespace mt {

struct CudaDeviceInfo {
  int index = 0;
  std::string name = {};  // "NVIDIA H200"
  int sm = 0;             // Compute capability times 10: 90.
  int processors = 0;     // Streaming multiprocessors: 132.
};

// libcuda, opened and initialised once: a handle for dlsym. Errors: FailedPrecondition (no driver, or no device that it
// can use), Unimplemented (built without CUDA).
absl::StatusOr<void*> OpenCudaLibrary();

// Errors: those of OpenCudaLibrary, FailedPrecondition (no device), InvalidArgument for a number that no device has
// (says how many there are).
absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int index);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_GPU_H_
