// Products of f32 matrices on one thread: by the kernels of runtime/cpu/sgemm.h where this CPU has them, else by
// OpenBLAS, which is loaded when first needed and which only this file knows.
#ifndef MT_RUNTIME_CPU_BLAS_H_
#define MT_RUNTIME_CPU_BLAS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace mt {

// Where there are no own kernels: loads the library once, with its own threads off and the kernels for this CPU's
// instruction set: releases before 0.3.22 do not know recent CPUs and fall back to SSE3, at a tenth of the speed.
// OPENBLAS_CORETYPE, where set, is respected. Errors: FailedPrecondition (not found; names the package).
absl::Status LoadBlas();

// Takes the packing buffers that `threads` concurrent calls need, so that no later call allocates.
// REQUIRES: LoadBlas().
void ReserveBlasBuffers(int threads);

// C [rows, cols] = A B + beta C; row-major with leading dimensions in elements; A is [rows, depth] or, transposed,
// [depth, rows]; B likewise; beta is 0 or 1. On the calling thread; several threads may call at once. REQUIRES:
// LoadBlas().
struct Sgemm {
  bool transpose_a = false, transpose_b = false;
  int64_t rows = 0, cols = 0, depth = 0;
  const float* a = nullptr;
  int64_t lda = 0;
  const float* b = nullptr;
  int64_t ldb = 0;
  float beta = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  // With the kernels of runtime/cpu/sgemm.h: b as PackCols has packed it with this depth or more. Null: not yet.
  const float* packed_b = nullptr;
  int64_t packed_depth = 0;
};
void RunSgemm(const Sgemm& call);

// "OpenBLAS 0.3.21 Haswell" or "own kernels, AVX-512"; "" before LoadBlas().
std::string BlasVersion();

}  // namespace mt

#endif  // MT_RUNTIME_CPU_BLAS_H_
