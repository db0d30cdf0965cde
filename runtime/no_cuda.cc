// What a build without CUDA says in the place of runtime/cuda.
#include "absl/status/status.h"
#include "runtime/cuda/backend.h"

#ifndef MT_HAS_CUDA

namespace mt {
namespace {

absl::Status BuiltWithout() {
  return absl::UnimplementedError(
      "this program was built without CUDA (MT_CUDA); build it where the toolkit's headers are, or compile the plan "
      "with "
      "--target cpu");
}

}  // namespace

absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int) { return BuiltWithout(); }
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int, CudaOptions) { return BuiltWithout(); }

}  // namespace mt

#endif  // MT_HAS_CUDA
