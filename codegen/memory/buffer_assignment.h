// Values to buffers, buffers to offsets: the plan of a module whose passes are done.
#ifndef MT_CODEGEN_MEMORY_BUFFER_ASSIGNMENT_H_
#define MT_CODEGEN_MEMORY_BUFFER_ASSIGNMENT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "codegen/memory/arena_packer.h"
#include "ir/graph.h"
#include "proto/plan.pb.h"

namespace mt {

struct PlanOptions {
  std::string target = "cpu";
  PackOptions pack;  // The alignment is the plan's.
  bool instructions =
      true;  // False: arena, buffers and statistics only, for PlanMemory; such a plan is not executable.
};

// Where the time went.
struct PlanTimes {
  double schedule_seconds = 0, assign_seconds = 0, pack_seconds = 0;
};

// Schedules each graph, assigns buffers and packs them. States lie first, in the module's order, at the same place in
// all programs; the transient buffers of each program are packed above them, over the same bytes. Classes: states by
// role; gradients are backward values that the optimizer reads; io are data, step inputs and metrics; workspaces; the
// rest are activations. Sets everything of the plan but passes, notes, compile_seconds and compiler.
// Errors: Internal, ResourceExhausted (an arena past kMaxArenaBytes).
absl::StatusOr<proto::PlanProto> PlanModule(const Module& module, const PlanOptions& options,
                                            PlanTimes* times = nullptr);

}  // namespace mt

#endif  // MT_CODEGEN_MEMORY_BUFFER_ASSIGNMENT_H_
