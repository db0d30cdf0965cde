// Runs scalar programs over tensors: element-wise ops and fused regions.
#ifndef MT_RUNTIME_CPU_POINTWISE_H_
#define MT_RUNTIME_CPU_POINTWISE_H_

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "ir/region.h"
#include "ir/scalar.h"
#include "runtime/backend.h"
#include "runtime/cpu/thread_pool.h"
#include "runtime/cpu/vector_math.h"

namespace mt {

// results[k] = program.outputs[k] at every element, rounded to its dtype. Results have one shape, to which the operands
// broadcast; operands that kUniform names are i32[4]. A result may lie exactly over an operand of its type. Random
// numbers belong to the logical element: dimension 0 is the sample. Bits depend on neither pool, `math` nor addresses.
// Errors: InvalidArgument where any of this does not hold, Unimplemented for programs that need too many registers.
absl::StatusOr<Thunk> BindScalarProgram(const ScalarProgram& program, absl::Span<const Tensor> operands,
                                        absl::Span<const Tensor> results, ThreadPool& pool,
                                        const VectorMath& math = BestVectorMath());

// The region over its operands, in one pass; column sums take `workspace` (CpuRegionWorkspace bytes). A result may lie
// exactly over an operand of its type that the region reads at the same place alone. The same bits and errors as above.
absl::StatusOr<Thunk> BindRegion(const Region& region, absl::Span<const Tensor> operands,
                                 absl::Span<const Tensor> results, std::byte* workspace, ThreadPool& pool,
                                 const VectorMath& math = BestVectorMath());

}  // namespace mt

#endif  // MT_RUNTIME_CPU_POINTWISE_H_
