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
};

// Where the time went.
struct PlanTimes {
  double schedule_seconds = 0, assign_seconds = 0, pack_seconds = 0;
};

// Schedules each graph, assigns buffers and packs them. States lie first, in the module's order, at the same place in
// all programs; the transient buffers of each program are packed above them, over the same bytes. Classes: states by
// role; gradients are backward values that the optimizer reads; io are data, step inputs and metrics; workspaces; the
// rest are activations. A program that keeps caches comes last, and is left out where it would take more than the
// others: generation does not make training larger. Sets everything of the plan but passes, notes, compile_seconds and
// compiler. Errors: Internal, ResourceExhausted (an arena past kMaxArenaBytes).
absl::StatusOr<proto::PlanProto> PlanModule(const Module& module, const PlanOptions& options,
                                            PlanTimes* times = nullptr);

// What the plan of a module takes.
struct ArenaSize {
  int64_t arena_bytes = 0, lower_bound_bytes = 0, persistent_bytes = 0;
  int64_t instructions = 0;
};

// PlanModule's figures without its plan: several times as fast. Errors: the same.
absl::StatusOr<ArenaSize> SizeArena(const Module& module, const PlanOptions& options);

}  // namespace mt

#endif  // MT_CODEGEN_MEMORY_BUFFER_ASSIGNMENT_H_
