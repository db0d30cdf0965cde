// Matmuls by cuBLASLt, loaded when it is asked for.
#ifndef MT_RUNTIME_CUDA_CUBLASLT_H_
#define MT_RUNTIME_CUDA_CUBLASLT_H_

#include <cuda.h>

#include <memory>

#include "absl/status/statusor.h"
#include "proto/cuda.pb.h"
#include "runtime/backend.h"

namespace mt {

// Addresses of a CudaMatmulProto's places; null where it has none.
struct CudaMatmulPointers {
  CUdeviceptr a = 0, b = 0, bias = 0, accumulator = 0, d = 0, workspace = 0;
};

class CublasLt {
 public:
  virtual ~CublasLt() = default;
  // Everything is chosen here: layouts, epilogue and the algorithm (the library's first choice for this problem that
  // fits the workspace and sums in a fixed order). The thunk enqueues it on `stream`.
  // Errors: InvalidArgument (dtype), Unimplemented (the library has no algorithm; names the problem).
  virtual absl::StatusOr<Thunk> Bind(const proto::CudaMatmulProto& matmul, const CudaMatmulPointers& pointers,
                                     CUstream stream) = 0;
};

// For the current context. Errors: FailedPrecondition where libcublasLt cannot be loaded.
absl::StatusOr<std::unique_ptr<CublasLt>> LoadCublasLt();

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_CUBLASLT_H_
