// Scratch memory that an op's kernel may use on a target: the planner reserves it, the kernel gets exactly that.
#ifndef MT_CODEGEN_PLAN_RESOURCES_H_
#define MT_CODEGEN_PLAN_RESOURCES_H_

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/op.h"

namespace mt {

// Bytes of workspace for one instruction; 0 for most. Depends on shapes and target alone, never on the machine at hand
// or the number of its threads: the same plan everywhere.
int64_t WorkspaceBytes(absl::string_view target, const OpDef& op, absl::Span<const TensorType> operands,
                       absl::Span<const TensorType> results, const Attrs& attrs);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_RESOURCES_H_
