// Chooses the algorithm of each matmul of a plan while it is loaded: from the user's cache, or by timing the library's
// proposals in the arena.
#ifndef MT_RUNTIME_CUDA_MATMUL_TIMER_H_
#define MT_RUNTIME_CUDA_MATMUL_TIMER_H_

#include <cuda.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/cuda.pb.h"
#include "runtime/cuda/backend.h"
#include "runtime/cuda/cublaslt.h"
#include "runtime/cuda/driver.h"
#include "runtime/matmul_choice.h"

namespace mt {

class MatmulTimer {
 public:
  // The current context is the device's. The cache is $XDG_CACHE_HOME/mt/matmuls.json, or ~/.cache/mt/matmuls.json, and
  // names the device's model and the library's version before each problem.
  MatmulTimer(const CudaDriver& driver, CUstream stream, const CudaDeviceInfo& info, int64_t library_version,
              const CudaOptions& options);
  ~MatmulTimer();
  MatmulTimer(const MatmulTimer&) = delete;
  MatmulTimer& operator=(const MatmulTimer&) = delete;

  // The algorithm of this matmul. Where it is timed, operands, result and workspace are written, and zero afterwards.
  // Whatever cannot be timed takes the library's first choice. Errors: Unimplemented (the library has no algorithm).
  absl::StatusOr<std::string> Choose(const proto::CudaMatmulProto& m, const CudaMatmulPointers& at,
                                     const CublasLtMatmul& matmul);
  // Keeps what was chosen; what stands in the way is a warning.
  void Save();

 private:
  class Trials;
  static constexpr int kProposals = 16;

  // Compiles the kernels that fill and digest, once.
  absl::Status Prepare();
  void Warn();

  const CudaDriver& driver_;
  const CUstream stream_;
  const CudaDeviceInfo info_;
  const CudaOptions options_;
  const std::string device_;  // Before each problem's name in the cache.
  MatmulCache cache_;
  std::map<std::string, std::string> chosen_;
  bool prepared_ = false;
  absl::Status ready_;
  CUmodule module_ = nullptr;
  CUfunction fill16_ = nullptr, fill32_ = nullptr, digest_ = nullptr;
  std::vector<CUevent> events_;
};

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_MATMUL_TIMER_H_
