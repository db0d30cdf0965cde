// A backend: memory, and kernels bound once to final pointers.
#ifndef MT_RUNTIME_BACKEND_H_
#define MT_RUNTIME_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/op.h"
#include "ir/tensor_type.h"
#include "proto/plan.pb.h"

namespace mt {

// A tensor at its final address.
struct Tensor {
  std::byte* data = nullptr;
  TensorType type;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// One instruction with everything that is known at load.
struct KernelCall {
  const OpDef* op = nullptr;
  Attrs attrs;
  std::vector<Tensor> operands, results;
  std::byte* workspace = nullptr;
  int64_t workspace_bytes = 0;
  std::string name;
  const proto::CudaInstructionProto* cuda = nullptr;  // What runs on a CUDA device; plans for other targets have none.
};

// A bound instruction: no names, no allocation, no shape checks. Runs each step.
using Thunk = std::function<void()>;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual absl::string_view name() const = 0;
  // Whether the host may read and write the arena through its pointers.
  virtual bool host_addressable() const { return true; }
  // Makes the plan's kernels ready, before the arena is allocated. Errors: FailedPrecondition (the plan is for another
  // device, or damaged).
  virtual absl::Status LoadCode(const proto::PlanProto&) { return absl::OkStatus(); }
  // The one arena, zeroed, aligned to 256 bytes; lives as long as the backend. Errors: ResourceExhausted with the bytes
  // wanted and the bytes that are there, before anything is allocated.
  virtual absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) = 0;
  virtual void CopyToDevice(std::byte* to, const void* from, int64_t bytes) = 0;
  virtual void CopyToHost(void* to, const std::byte* from, int64_t bytes) = 0;
  virtual void Fill(std::byte* to, uint8_t value, int64_t bytes) = 0;
  // Errors: Unimplemented (no kernel for these dtypes), InvalidArgument.
  virtual absl::StatusOr<Thunk> Bind(const KernelCall& call) = 0;
  // All thunks of a program as one, where the device can take them at once; an empty thunk where it cannot.
  virtual absl::StatusOr<Thunk> Capture(const std::vector<Thunk>&) { return Thunk(); }
  // Waits until everything bound and run so far is done.
  virtual void Synchronize() = 0;
  // Bytes that are taken on the device, by everybody; 0 where the device is the host.
  virtual int64_t UsedDeviceBytes() { return 0; }
};

// threads = 0: what affinity and the cgroup allow.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int threads);
// Counts instead of computing: any plan can be dry-run anywhere. Allocates nothing; CopyToHost gives zeros.
std::unique_ptr<Backend> MakeNullBackend();

}  // namespace mt

#endif  // MT_RUNTIME_BACKEND_H_
