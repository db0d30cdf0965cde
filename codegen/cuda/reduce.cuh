// Folds x over some of its dimensions. Chunk c of the reduced positions [c kLength, (c + 1) kLength) is dealt to 8
// lanes in turn, the lanes are added in order, and the chunks of a result are dealt to 16 lanes that are added in
// order: the tree of the column sums of a region. Constants before this text: T, Op, kKept, kReduced, kLength, kCount,
// kDivides, kDivisor; KeptPlace(k) and ReducedPlace(r), whose sum is where an element is. MT_WIDE: a block goes through
// all chunks, which need no workspace.
constexpr u32 kRowLanes = 8, kChunkLanes = 16;

// The chunk's sum for column x of the block, in the threads of lane 0.
__device__ __forceinline__ float FoldChunk(const T* from, u64 k, u64 chunk, float (&shared)[kRowLanes][32]) {
  const u32 x = threadIdx.x % 32, lane = threadIdx.x / 32;
  const u64 first = chunk * kLength, end = first + kLength, last = end < kReduced ? end : kReduced;
  float sum = Op::Start();
  if (k < kKept) {
    const T* at = from + KeptPlace(k);
#pragma unroll 4
    for (u64 r = first + lane; r < last; r += kRowLanes) sum = Op::Of(sum, ToFloat(at[ReducedPlace(r)]));
  }
  __syncthreads();
  shared[lane][x] = sum;
  __syncthreads();
  float total = Op::Start();
  if (lane == 0) {
#pragma unroll
    for (int l = 0; l < kRowLanes; ++l) total = Op::Of(total, shared[l][x]);
  }
  return total;
}

__device__ __forceinline__ T Finished(float total) { return FromFloat<T>(kDivides ? total / kDivisor : total); }

#ifdef MT_WIDE
extern "C" __global__ void __launch_bounds__(256) mt_reduce(const T* from, T* to) {
  __shared__ float shared[kRowLanes][32];
  const u64 k = (u64)blockIdx.x * 32 + threadIdx.x % 32;
  float lanes[kChunkLanes];
#pragma unroll
  for (int i = 0; i < kChunkLanes; ++i) lanes[i] = Op::Start();
  for (u64 chunk = 0; chunk < kCount; chunk += kChunkLanes) {
#pragma unroll
    for (int i = 0; i < kChunkLanes; ++i) {
      if (chunk + i < kCount) lanes[i] = Op::Of(lanes[i], FoldChunk(from, k, chunk + i, shared));
    }
  }
  if (threadIdx.x >= 32 || k >= kKept) return;
  float total = Op::Start();
#pragma unroll
  for (int i = 0; i < kChunkLanes; ++i) total = Op::Of(total, lanes[i]);
  to[k] = Finished(total);
}
#else
extern "C" __global__ void __launch_bounds__(256) mt_reduce(const T* from, float* partial) {
  __shared__ float shared[kRowLanes][32];
  const u64 k = (u64)blockIdx.x * 32 + threadIdx.x % 32;
  const float total = FoldChunk(from, k, blockIdx.y, shared);
  if (threadIdx.x < 32 && k < kKept) partial[blockIdx.y * kKept + k] = total;
}

// MT_ADD: adds to a result in f32.
#ifdef MT_ADD
typedef float Result;
#else
typedef T Result;
#endif
extern "C" __global__ void __launch_bounds__(512) mt_reduce_chunks(const float* partial, Result* to) {
  __shared__ float shared[kChunkLanes][32];
  const u32 x = threadIdx.x % 32, lane = threadIdx.x / 32;
  const u64 k = (u64)blockIdx.x * 32 + x;
  float sum = Op::Start();
  if (k < kKept) {
    for (u64 chunk = lane; chunk < kCount; chunk += kChunkLanes) sum = Op::Of(sum, partial[chunk * kKept + k]);
  }
  shared[lane][x] = sum;
  __syncthreads();
  if (lane != 0 || k >= kKept) return;
  float total = Op::Start();
#pragma unroll
  for (int i = 0; i < kChunkLanes; ++i) total = Op::Of(total, shared[i][x]);
#ifdef MT_ADD
  to[k] = MT_ADD ? to[k] + total : total;
#else
  to[k] = Finished(total);
#endif
}
#endif
