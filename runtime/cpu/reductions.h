// The trees of sums that kernels share: the same lanes and chunks, so the same bits whoever adds them up.
#ifndef MT_RUNTIME_CPU_REDUCTIONS_H_
#define MT_RUNTIME_CPU_REDUCTIONS_H_

#include <cstdint>

namespace mt {

// sums[r] = sum of row r of x [rows, width]: 16 lanes, then their tree.
void RowSums(const float* x, int64_t rows, int64_t width, float* sums);

// Columns [begin, end) of the partial sums of `chunks` chunks of rows, sums [chunks, width]: added up into the first
// row, neighbours first. The others are overwritten.
void AddChunks(float* sums, int64_t chunks, int64_t width, int64_t begin, int64_t end);
constexpr int64_t kColumnsPerTask = 256;  // That one task adds up.

}  // namespace mt

#endif  // MT_RUNTIME_CPU_REDUCTIONS_H_
