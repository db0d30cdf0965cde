// Sums of squares in f64, in an order that the number of elements fixes. Constants before this text: kChunk, kThreads.
__device__ __forceinline__ double BlockSum(double x) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = x;
  __syncthreads();
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// This thread's part of chunk `chunk` of the n elements at x: vectors of 8 in turn, summed in f32 by place in the
// vector.
template <typename T>
__device__ __forceinline__ double SumSquares(const T* x, u64 n, u32 chunk) {
  const u64 first = (u64)chunk * kChunk, end = first + kChunk, last = end < n ? end : n;
  float sums[8] = {};
  u64 i = first + threadIdx.x * 8;
#pragma unroll 1
  for (; i + 8 <= last; i += kThreads * 8) {
    float h[8];
    Load<8, true>(x + i, h);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] += h[j] * h[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float h = i + j < last ? ToFloat(x[i + j]) : 0.0f;
    sums[j] += h * h;
  }
  double sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += sums[j];
  return sum;
}
