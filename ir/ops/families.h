// The families of op rows. Adding a family: its function here and one line in ir/op_registry.cc.
#ifndef MT_IR_OPS_FAMILIES_H_
#define MT_IR_OPS_FAMILIES_H_

#include "absl/types/span.h"
#include "ir/op.h"

namespace mt {

absl::Span<const OpDef> ElementwiseOps();
absl::Span<const OpDef> MatmulOps();
absl::Span<const OpDef> ShapeOps();
absl::Span<const OpDef> ReductionOps();
absl::Span<const OpDef> EmbeddingOps();
absl::Span<const OpDef> PositionOps();
absl::Span<const OpDef> HeadOps();
absl::Span<const OpDef> SoftmaxOps();
absl::Span<const OpDef> AttentionOps();
absl::Span<const OpDef> CachedAttentionOps();
absl::Span<const OpDef> NormalizationOps();
absl::Span<const OpDef> LossOps();
absl::Span<const OpDef> ChunkedLossOps();
absl::Span<const OpDef> OptimizerOps();
absl::Span<const OpDef> CollectiveOps();
absl::Span<const OpDef> FusedOps();

}  // namespace mt

#endif  // MT_IR_OPS_FAMILIES_H_
