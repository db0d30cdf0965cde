// What CUDA kernels may take beside their operands and results, stated before the kernels: a plan holds it, and a
// kernel asks for no more. Declared for plans in codegen/plan/resources.h (CudaWorkspaceBytes); here is what kernels
// are cut by.
//
// In place: every pair of the rows holds for every architecture, because a CUDA kernel reads all that it needs of an
// element (element-wise rows, rope), a row (norms, softmax, the gradient of the loss: held in registers, in shared
// memory or by a cluster) or a tile (an accumulator is C = D to cuBLASLt) before it writes there. Kernels that read a
// tensor from several blocks (attention, embedding, reductions, transposes) have no pairs in their rows.
#ifndef MT_CODEGEN_CUDA_RESOURCES_H_
#define MT_CODEGEN_CUDA_RESOURCES_H_

#include <cstdint>

#include "ir/target.h"
#include "ir/tensor_type.h"

namespace mt {

// cuBLASLt's scratch: a constant limit for each architecture. Instructions run in order, so all matmuls of a program
// lie over the same bytes or over whatever else is dead while they run.
int64_t CublasLtWorkspaceBytes(const Target& target);

// Shared memory that one block may have. NVIDIA, "CUDA C++ Programming Guide", technical specifications.
int64_t CudaSharedBytes(const Target& target);

// Sums over `length` elements or rows are cut into chunks that blocks sum on their own; the partial sums are added in
// the order of the chunks. By the length alone, so that a sum has one tree whatever else a shape holds.
struct CudaChunks {
  int64_t length;  // Of one chunk; the last may be smaller.
  int64_t count;   // At most 256.
};
CudaChunks CutCudaSum(int64_t length);

// A reduction with at least this many results keeps its chunks in registers; fewer write partial sums.
inline constexpr int64_t kCudaWideReduction = int64_t{1} << 16;
// Elements of one partial sum of global_norm.
inline constexpr int64_t kCudaNormChunk = int64_t{64} << 10;
// Sorted positions that one block of embedding_backward sums; an id that goes on in the next block is summed by parts.
inline constexpr int64_t kCudaEmbeddingChunk = 256;

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_RESOURCES_H_
