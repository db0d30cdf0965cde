// Pieces of CUDA C++ text that the emitters share.
#ifndef MT_CODEGEN_CUDA_SOURCE_H_
#define MT_CODEGEN_CUDA_SOURCE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "codegen/cuda/kernel.h"
#include "ir/region.h"
#include "ir/tensor_type.h"

namespace mt {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// "float", "bf16", "f16", "double", "int", "u8": types of prelude.cuh.
absl::string_view CudaType(DType dtype);
// Of 1, 2, 4, 8 or 16 bytes: "u8" ... "Bytes16".
absl::string_view CudaUnit(int64_t bytes);
// The f32 nearest to `value`, exactly.
std::string FloatLiteral(double value);
// `value`, exactly.
std::string DoubleLiteral(double value);
// "u32" where indices up to `elements` fit, else "u64".
absl::string_view IndexType(int64_t elements);
// "mt_layer_norm": the function of an op.
std::string FunctionName(absl::string_view op);
// "constexpr i64 kRows = 12;\n"
std::string Constant(absl::string_view name, int64_t value);

// The largest of 8, 4, 2 and 1 that divides all of `sizes`.
int64_t VectorOf(std::initializer_list<int64_t> sizes);

// Threads that share a row of `width` elements, each with vectors of RowVector(width) of them: by the width alone, so
// that a sum over a row has one tree.
int64_t RowThreads(int64_t width);
inline int64_t RowVector(int64_t width) { return VectorOf({width}); }

// Lanes that the rows of a chunk of a column sum are dealt to in turn, and lanes that chunks are dealt to; lanes are
// added in order.
inline constexpr int64_t kCudaRowLanes = 8, kCudaChunkLanes = 16;

// The steps of a region whose operand i and result i are those of the call; column sums are cut in its workspace.
// Errors: Unimplemented.
absl::Status EmitRegion(const CudaCall& call, const Region& region, CudaSteps& steps);
// Those of an element-wise row.
absl::Status EmitElementWise(const CudaCall& call, CudaSteps& steps);

// Blocks that make `count` threads, of at most 256 each. `exact`: there are no others, so that the text needs no count
// and kernels of other lengths are the same module.
struct CudaThreads {
  int64_t block = 256, blocks = 1;
  bool exact = false;
};
CudaThreads CutCudaThreads(int64_t count);
// The number of a thread, as text of type `index`.
std::string ThreadText(absl::string_view index);

// Reads of places that a kernel takes: one argument an operand, then one a result.
std::vector<CudaPlace> AllPlaces(const CudaCall& call);

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_SOURCE_H_
