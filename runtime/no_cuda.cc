// What a build without CUDA says in the place of runtime/cuda.
#include "runtime/cuda/backend.h"

#ifndef MT_HAS_CUDA

namespace mt {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int, CudaOptions) { return OpenCudaLibrary().status(); }

}  // namespace mt

#endif  // MT_HAS_CUDA
