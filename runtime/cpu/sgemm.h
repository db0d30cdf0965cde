// The inner kernels of f32 matrix products, for CPUs with AVX-512: Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (2008). An element of a product of packed panels is one chain of fused multiply-adds in the
// order of the depth: its bits depend on neither the panels' sizes nor its place in them.
#ifndef MT_RUNTIME_CPU_SGEMM_H_
#define MT_RUNTIME_CPU_SGEMM_H_

#include <cstdint>

namespace mt {

// Whether this CPU has them; where it has not, nothing below may be called.
bool HasSgemmKernels();

// Packs a block [n, depth] of the left factor in units of CpuPanels::kUnitRows rows, the elements of a unit column
// after column. Element (i, k) is from[i * ld + k] or, transposed, from[k * ld + i]. The last unit is filled up with
// zeros.
void PackRows(const float* from, int64_t ld, bool transposed, int64_t n, int64_t depth, float* to);
// A block [depth, n] of the right factor in units of CpuPanels::kUnitCols columns, row after row. Element (k, j) is
// from[k * ld + j] or, transposed, from[j * ld + k].
void PackCols(const float* from, int64_t ld, bool transposed, int64_t n, int64_t depth, float* to);

// C [rows, cols] = start + A B, with B packed by PackCols.
struct PanelProduct {
  int64_t rows = 0, cols = 0, depth = 0;
  // By PackRows where `packed_a`; else as PackRows has it `from`.
  const float* a = nullptr;
  bool packed_a = false;
  int64_t lda = 0;
  bool transpose_a = false;
  const float* b = nullptr;
  int64_t packed_depth = 0;  // What b was packed with: depth or more.
  // Element (i, j) is start[i * start_step + j]: C itself, or one row for all; null: zeros.
  const float* start = nullptr;
  int64_t start_step = 0;
  float* c = nullptr;
  int64_t ldc = 0;
};
void MultiplyPanels(const PanelProduct& p);

}  // namespace mt

#endif  // MT_RUNTIME_CPU_SGEMM_H_
