// The CUDA driver, loaded when it is asked for: a program built with CUDA starts where there is none.
#ifndef MT_RUNTIME_CUDA_DRIVER_H_
#define MT_RUNTIME_CUDA_DRIVER_H_

#include <cuda.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

// The driver's entry points that we use, under their own names (cuda.h maps some to versions of themselves).
#define MT_CUDA_DRIVER_FUNCTIONS(X) \
  X(cuGetErrorName)                 \
  X(cuGetErrorString)               \
  X(cuDeviceGet)                    \
  X(cuDeviceGetPCIBusId)            \
  X(cuDevicePrimaryCtxRetain)       \
  X(cuDevicePrimaryCtxRelease)      \
  X(cuCtxSetCurrent)                \
  X(cuMemGetInfo)                   \
  X(cuMemAlloc)                     \
  X(cuMemFree)                      \
  X(cuMemHostAlloc)                 \
  X(cuMemFreeHost)                  \
  X(cuMemcpyAsync)                  \
  X(cuMemcpyHtoDAsync)              \
  X(cuMemcpyDtoHAsync)              \
  X(cuMemsetD8Async)                \
  X(cuStreamCreate)                 \
  X(cuStreamDestroy)                \
  X(cuStreamSynchronize)            \
  X(cuStreamWaitEvent)              \
  X(cuEventCreate)                  \
  X(cuEventDestroy)                 \
  X(cuEventRecord)                  \
  X(cuEventSynchronize)             \
  X(cuEventRecordWithFlags)         \
  X(cuEventElapsedTime)             \
  X(cuStreamBeginCapture)           \
  X(cuStreamEndCapture)             \
  X(cuGraphInstantiate)             \
  X(cuGraphLaunch)                  \
  X(cuGraphDestroy)                 \
  X(cuGraphExecDestroy)             \
  X(cuModuleLoadDataEx)             \
  X(cuModuleUnload)                 \
  X(cuModuleGetFunction)            \
  X(cuFuncSetAttribute)             \
  X(cuTensorMapEncodeTiled)         \
  X(cuLaunchKernel)
struct CudaDriver {
#define MT_DECLARE(name) decltype(&::name) name = nullptr;
  MT_CUDA_DRIVER_FUNCTIONS(MT_DECLARE)
#undef MT_DECLARE
  // Null in drivers before CUDA 12.3. The pointers to void are to edge data, which we give none of.
  CUresult(CUDAAPI* cuStreamGetCaptureInfo_v3)(CUstream, CUstreamCaptureStatus*, cuuint64_t*, CUgraph*,
                                               const CUgraphNode**, const void**, size_t*) = nullptr;
  CUresult(CUDAAPI* cuStreamUpdateCaptureDependencies_v2)(CUstream, CUgraphNode*, const void*, size_t,
                                                          unsigned) = nullptr;
};

// libcuda's functions. Errors: those of OpenCudaLibrary, FailedPrecondition (the driver is too old).
absl::StatusOr<const CudaDriver*> LoadCudaDriver();

// Ok, or an error that says what was done and what the driver says: ResourceExhausted where memory ran out, Internal
// otherwise.
absl::Status CudaStatus(const CudaDriver& driver, CUresult result, absl::string_view what);

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_DRIVER_H_
