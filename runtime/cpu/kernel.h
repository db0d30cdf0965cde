// CPU kernels: one row for each op that is neither element-wise nor a view.
#ifndef MT_RUNTIME_CPU_KERNEL_H_
#define MT_RUNTIME_CPU_KERNEL_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "runtime/backend.h"
#include "runtime/cpu/thread_pool.h"

namespace mt {

// Checks the dtypes it supports (Unimplemented otherwise) and captures everything; the thunk only computes. Work is cut
// into tasks by shapes alone, reductions by the reduced length alone, so that bits depend on neither threads nor arena.
using CpuBindFn = absl::StatusOr<Thunk> (*)(const KernelCall& call, ThreadPool& pool);

struct CpuKernel {
  absl::string_view op;
  CpuBindFn bind;
};

// Families, each in its own file; listed in runtime/cpu/backend.cc.
absl::Span<const CpuKernel> CpuMatmulKernels();
absl::Span<const CpuKernel> CpuRowKernels();  // normalizations, softmax, loss
absl::Span<const CpuKernel> CpuAttentionKernels();
absl::Span<const CpuKernel> CpuCachedAttentionKernels();
absl::Span<const CpuKernel> CpuChunkedLossKernels();
absl::Span<const CpuKernel> CpuDataKernels();  // shape ops, reductions, embedding, rope, heads, global norm
absl::Span<const CpuKernel> CpuOptimizerKernels();

absl::Span<const CpuKernel> CpuFusedKernels();  // fused regions; in pointwise.cc

// Element-wise ops: the register program, tile by tile.
absl::StatusOr<Thunk> BindPointwise(const KernelCall& call, ThreadPool& pool);

}  // namespace mt

#endif  // MT_RUNTIME_CPU_KERNEL_H_
