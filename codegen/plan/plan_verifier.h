// What must hold for a plan before it is saved (mtc) and before it is loaded (mtrun). Independent of the planner: it
// reads the plan and the op rows, nothing else.
#ifndef MT_CODEGEN_PLAN_PLAN_VERIFIER_H_
#define MT_CODEGEN_PLAN_PLAN_VERIFIER_H_

#include "absl/status/status.h"
#include "proto/plan.pb.h"

namespace mt {

// Structure: version, indices in range, alignment, sizes and offsets inside the arena, states in the persistent part
// and nothing else there, no two buffers that are live at one instruction share a byte (a sweep, O(n log n)).
// Meaning: rows exist, attributes are complete, types are what InferTypes says; a tensor is read only between its
// definition and the next write to its buffer; results share a buffer with an operand only where the row allows it
// (InPlacePairs, is_view) and with no other operand; accesses lie in live ranges; workspaces are private and at least
// WorkspaceBytes; states are written only to be donated; outputs live to the end.
// Statistics: arena_bytes, peak_bytes, lower_bound_bytes and peak_instruction are what the buffers say.
// Errors: FailedPrecondition naming program, instruction, both buffers or tensors, and both facts.
absl::Status VerifyPlan(const proto::PlanProto& plan);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_PLAN_VERIFIER_H_
