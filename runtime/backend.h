// A backend: memory, and kernels bound once to final pointers.
#ifndef MT_RUNTIME_BACKEND_H_
#define MT_RUNTIME_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
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

// Work done in order, one thing after another: thunks, and the copies of inputs beside them.
enum class Lane { kThunks, kInputs };

class Backend {
 public:
  virtual ~Backend() = default;
  virtual absl::string_view name() const = 0;
  // What it runs on and with, for a run's records: ("gpu", "NVIDIA H200"), ("cublaslt", "130101").
  virtual std::vector<std::pair<std::string, std::string>> Description() const { return {}; }
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
  // By how much the device's free memory has shrunk since before it was opened: what this process takes of it, context
  // and libraries included, while no other process comes or goes. -1 where nobody can say.
  virtual int64_t ProcessDeviceBytes() { return 0; }

  // What the host does not wait for. The defaults are those of a backend whose thunks have run when they return.
  // Programs that may be under way while the host goes on; 1: none.
  virtual int64_t programs_in_flight() const { return 1; }
  // Memory of the host that Copy reads and writes; lives as long as the backend.
  virtual absl::StatusOr<std::byte*> AllocatePinned(int64_t bytes);
  // Copies within and between the arena and pinned memory, in its turn in the lane.
  virtual void Copy(Lane lane, void* to, const void* from, int64_t bytes);
  // A point in a lane, reached when everything put there before is done; what follows in a lane can wait for it, or the
  // host.
  virtual int64_t Record(Lane) { return 0; }
  virtual void WaitIn(Lane, int64_t /*point*/) {}
  virtual void WaitOnHost(int64_t /*point*/) {}

  // Hashes of each kGranuleBytes from `from`; the last granule may be smaller. REQUIRES: as many hashes as granules.
  virtual void HashGranules(const std::byte* from, int64_t bytes, absl::Span<uint64_t> hashes);
  // Runs run(0) ... run(count - 1), each of them thunks: seconds from before the first to after each.
  virtual std::vector<double> Time(int count, const std::function<void(int)>& run);

  // Memory of its own for one buffer, not zeroed, with bytes around it that nobody may touch. Errors:
  // ResourceExhausted.
  virtual absl::StatusOr<std::byte*> AllocateGuarded(int64_t bytes) = 0;
  // Of all guarded buffers, in the order of allocation: the first one whose surroundings were written; -1: none, as far
  // as this backend can see. REQUIRES: synchronized.
  virtual int64_t DamagedGuard() { return -1; }

 private:
  std::vector<std::unique_ptr<std::byte[]>> pinned_;
};

inline constexpr int64_t kGranuleBytes = 256;
// Of at most kGranuleBytes bytes; what is missing counts as zeros.
uint64_t HashGranule(const std::byte* granule, int64_t bytes);

// threads = 0: what affinity and the cgroup allow.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int threads);
// Counts instead of computing: any plan can be dry-run anywhere. Allocates nothing; CopyToHost gives zeros.
std::unique_ptr<Backend> MakeNullBackend();

}  // namespace mt

#endif  // MT_RUNTIME_BACKEND_H_
