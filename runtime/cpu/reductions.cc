#include "runtime/cpu/reductions.h"

#include "runtime/cpu/simd.h"

namespace mt {

MT_CPU_CLONES void RowSums(const float* x, int64_t rows, int64_t width, float* sums) {
  for (int64_t r = 0; r < rows; ++r, x += width) {
    F32x16 sum = Splat(0);
    for (int64_t j = 0; j < width; j += kLanes) sum += LoadBlock(x + j, width - j);
    sums[r] = Sum(sum);
  }
}

MT_CPU_CLONES void AddChunks(float* sums, int64_t chunks, int64_t width, int64_t begin, int64_t end) {
  for (int64_t stride = 1; stride < chunks; stride *= 2) {
    for (int64_t c = 0; c + stride < chunks; c += 2 * stride) {
      float* a = sums + c * width;
      const float* b = sums + (c + stride) * width;
      for (int64_t j = begin; j < end; j += kLanes) {
        StoreBlock(a + j, LoadBlock(a + j, end - j) + LoadBlock(b + j, end - j), end - j);
      }
    }
  }
}

}  // namespace mt
