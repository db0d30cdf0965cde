// The CUDA backend: runs the steps that a plan holds, and knows nothing of ops.
#ifndef MT_RUNTIME_CUDA_BACKEND_H_
#define MT_RUNTIME_CUDA_BACKEND_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "codegen/plan/gpu.h"
#include "runtime/backend.h"

namespace mt {

struct CudaOptions {
  // Each matmul takes the fastest of cuBLASLt's proposals that give the bits of its first one: out of the user's cache,
  // or timed while the plan is loaded. Else the first one.
  bool time_matmuls = true;
  std::function<void(const std::string&)> warn = {};  // Gets one line each; null: nobody does.
  // Gets a line of JSON for each problem: what was proposed and what it took. Then the cache is not read.
  std::function<void(const std::string&)> report = {};
};

// Opens device `index`. Errors: FailedPrecondition (no driver, no device, no cuBLASLt), InvalidArgument (no such
// device), Unimplemented (built without CUDA).
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index, CudaOptions options = {});

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_BACKEND_H_
