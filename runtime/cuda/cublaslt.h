// Matmuls by cuBLASLt, loaded when it is asked for.
#ifndef MT_RUNTIME_CUDA_CUBLASLT_H_
#define MT_RUNTIME_CUDA_CUBLASLT_H_

#include <cuda.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/cuda.pb.h"
#include "runtime/backend.h"

namespace mt {

// Addresses of a CudaMatmulProto's places; null where it has none.
struct CudaMatmulPointers {
  CUdeviceptr a = 0, b = 0, bias = 0, accumulator = 0, d = 0, workspace = 0;
};

// "1 x [32000,768] x [768,3072]^T + bias, bf16 -> bf16, ...": all that the library's proposals depend on, on one device
// by one version: the problem, the workspace's bytes and how the addresses are aligned.
std::string MatmulProblem(const proto::CudaMatmulProto& matmul, const CudaMatmulPointers& pointers);

// One matmul at its addresses: layouts and epilogue are set. An algorithm is an opaque string of the library's version.
class CublasLtMatmul {
 public:
  virtual ~CublasLtMatmul() = default;
  // At most `most` algorithms that fit the workspace and sum in a fixed order, the library's first choice first.
  // Errors: Unimplemented (it has none; names the problem).
  virtual absl::StatusOr<std::vector<std::string>> Propose(int most) const = 0;
  // What the algorithm takes of the workspace, from its start.
  virtual int64_t WorkspaceBytes(const std::string& algorithm) const = 0;
  // For people: "id 66, tile 128x256, ...".
  virtual std::string Describe(const std::string& algorithm) const = 0;
  // Enqueues it. Errors: Internal (the library refuses).
  virtual absl::Status Run(const std::string& algorithm) const = 0;
};

class CublasLt {
 public:
  virtual ~CublasLt() = default;
  // 130001 for 13.0.1.
  virtual int64_t version() const = 0;
  // Errors: InvalidArgument (dtype, batch).
  virtual absl::StatusOr<std::shared_ptr<const CublasLtMatmul>> Bind(const proto::CudaMatmulProto& matmul,
                                                                     const CudaMatmulPointers& pointers,
                                                                     CUstream stream) = 0;
};

// For the current context. Errors: FailedPrecondition where libcublasLt cannot be loaded.
absl::StatusOr<std::unique_ptr<CublasLt>> LoadCublasLt();

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_CUBLASLT_H_
