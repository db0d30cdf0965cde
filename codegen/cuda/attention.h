// What the emitters of attention share: shapes, where each operand's heads lie, and the constants before the kernels.
//
// Element d of row t of head h in sample b of an operand lies at b Batch + h Head + t Row + d elements behind its
// place. As the kernels see it:
//   kQBatch, kQHead, kQRow     q
//   kKBatch, kKHead, kKRow     k and v
//   kOBatch, kOHead, kORow     out and dout
//   kDQBatch, kDQHead, kDQRow  dq
//   kDKBatch, kDKHead, kDKRow  dk and dv
// All are multiples of the width. lse and delta (the sums of dout out) are f32 [B, H, T].
#ifndef MT_CODEGEN_CUDA_ATTENTION_H_
#define MT_CODEGEN_CUDA_ATTENTION_H_

#include <string>

#include "codegen/cuda/kernel.h"
#include "ir/attention_layout.h"

namespace mt {

// Of flash_attention, of flash_attention_packed and of their backwards.
struct CudaAttention : AttentionLayout {
  CudaAttention(const CudaCall& call, bool backward);

  CudaPlace q, k, v, out, lse;
  CudaPlace rng;                      // Any operand where nothing is dropped.
  CudaPlace dout, delta, dq, dk, dv;  // Backward alone; delta is the workspace.
};

// attention_hopper.cc: kernels of wgmma and the bulk tensor copy engine, and whether there are any.
bool HasHopperAttention(const CudaCall& call, const CudaAttention& attention);
void EmitHopperForward(const CudaCall& call, const CudaAttention& attention, CudaSteps& steps);
void EmitHopperBackward(const CudaCall& call, const CudaAttention& attention, CudaSteps& steps);

// attention_flash.cc: kernels of mma.sync for the other chips and for TF32, and whether there are any.
bool HasFlashAttention(const CudaCall& call, const CudaAttention& attention);
void EmitFlashForward(const CudaCall& call, const CudaAttention& attention, CudaSteps& steps);
void EmitFlashBackward(const CudaCall& call, const CudaAttention& attention, CudaSteps& steps);

// "typedef ... T;", the strides above, kBatch, kHeads, kGroup (heads that share a key-value head), kLength, kWidth,
// kQueries, kWindow, kKey, kCausal, kDropout, kBf16, kScale, kRate and kKeep, then the text of attention_common.cuh.
std::string AttentionConstants(const CudaCall& call, const CudaAttention& attention);

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_ATTENTION_H_
