// Loads a plan: one arena, indices turned into addresses, every instruction bound to a thunk. A step is a loop over
// thunks: no names, no maps, no allocation, no shape checks.
#ifndef MT_RUNTIME_EXECUTOR_H_
#define MT_RUNTIME_EXECUTOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/graph.h"
#include "proto/plan.pb.h"
#include "runtime/backend.h"

namespace mt {

// An input, output or state at its address.
struct BoundTensor {
  std::string name;
  Role role = Role::kData;  // Inputs and states.
  TensorType type;
  std::byte* data = nullptr;
  std::byte* staging = nullptr;  // Inputs: where the next batch waits while the program runs; null where there is none.

  // REQUIRES: a host-addressable backend.
  template <typename T>
  T* data_as() const {
    return reinterpret_cast<T*>(data);
  }
};

class Program {
 public:
  const proto::ProgramProto& proto() const { return *proto_; }
  absl::Span<const BoundTensor> inputs() const { return inputs_; }
  absl::Span<const BoundTensor> outputs() const { return outputs_; }
  // Null where there is none.
  const BoundTensor* FindInput(absl::string_view name) const;
  const BoundTensor* FindOutput(absl::string_view name) const;

  // One execution.
  void Run() const {
    if (whole_) return whole_();
    for (const Thunk& thunk : thunks_) thunk();
  }
  // Only instructions first..last-1 of the plan; views run no code.
  void RunRange(int first, int last) const;

 private:
  friend class Executor;
  const proto::ProgramProto* proto_ = nullptr;
  std::vector<BoundTensor> inputs_, outputs_;
  std::vector<Thunk> thunks_;
  Thunk whole_;                   // All of them, where that is more than one after another.
  std::vector<int> first_thunk_;  // Of each instruction; one more at the end.
};

// Where buffers lie: at the plan's offsets of one arena, or, to find who writes where it should not, each in memory of
// its own with guards around it. Then nothing shares bytes, a program runs instruction by instruction, and a write
// beside a buffer ends the process with the instruction's name, or at once where it meets memory that is not there.
enum class Placement { kArena, kGuard };

class Executor {
 public:
  // REQUIRES: the plan passed VerifyPlan. Errors: ResourceExhausted (larger than the memory at hand, before anything is
  // allocated), Unimplemented (no kernel; names the instruction), InvalidArgument (the backend is not the plan's
  // target).
  static absl::StatusOr<std::unique_ptr<Executor>> Load(proto::PlanProto plan, std::unique_ptr<Backend> backend,
                                                        Placement placement = Placement::kArena);

  const proto::PlanProto& plan() const { return plan_; }
  Backend& backend() { return *backend_; }
  // Null under Placement::kGuard.
  std::byte* arena() const { return arena_; }
  const Program* FindProgram(absl::string_view name) const;
  absl::Span<const BoundTensor> states() const { return states_; }
  const BoundTensor* FindState(absl::string_view name) const;

  // Sets every state to its initial value from (seed, name, element); padding is zero.
  void InitializeStates(uint64_t seed);

 private:
  Executor() = default;
  std::byte* Address(const proto::TensorProto& tensor) const {
    return buffers_[static_cast<size_t>(tensor.buffer())] + tensor.byte_offset();
  }
  absl::Status Place(Placement placement);
  absl::StatusOr<BoundTensor> BindTensor(const proto::TensorProto& proto, absl::string_view name) const;
  absl::StatusOr<KernelCall> MakeCall(const proto::ProgramProto& program, const proto::InstructionProto& instruction,
                                      const proto::CudaInstructionProto* cuda) const;
  void RunGuarded(const Program& program);

  proto::PlanProto plan_;
  std::unique_ptr<Backend> backend_;
  std::byte* arena_ = nullptr;
  std::vector<std::byte*> buffers_;  // Where each buffer of the plan lies.
  std::vector<BoundTensor> states_;
  std::vector<std::unique_ptr<Program>> programs_;
};

}  // namespace mt

#endif  // MT_RUNTIME_EXECUTOR_H_
