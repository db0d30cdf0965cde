// Kernels over rows of logits that the loss and the chunked loss share.
#ifndef MT_CODEGEN_CUDA_ROWS_H_
#define MT_CODEGEN_CUDA_ROWS_H_

#include <cstdint>
#include <optional>

#include "codegen/cuda/kernel.h"
#include "ir/target.h"
#include "ir/tensor_type.h"

namespace mt {

// One launch of loss.cuh: logits [rows, columns], labels [rows], losses f32 [rows].
struct LossRows {
  DType dtype;
  int64_t rows, columns, classes;
  CudaPlace logits, labels, losses;
  std::optional<CudaPlace> dloss;     // Given: the gradient is written over the logits.
  std::optional<CudaPlace> log_sums;  // f32 [rows]; not with dloss.
  std::optional<CudaPlace> bias;      // [columns]
  DType bias_dtype = DType::kF32;
};
void EmitLossRows(const LossRows& loss, const Target& target, CudaSteps& steps);

// *sum = the sum of losses f32 [rows].
void EmitLossSum(int64_t rows, CudaPlace losses, CudaPlace sum, CudaSteps& steps);
// *count = how many of labels i32 [rows] are not negative, as f32.
void EmitCountLabels(int64_t rows, CudaPlace labels, CudaPlace count, CudaSteps& steps);

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_ROWS_H_
