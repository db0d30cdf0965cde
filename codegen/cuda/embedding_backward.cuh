// dtable[v] = sum of dy[i] over the i with ids[i] = v, in the order given, + accumulator. A block sums kChunk positions
// of the order, which is sorted by id; what goes on in another chunk is left as a partial sum: slot 0 of a chunk what
// began before it, slot 1 what begins in it. The second kernel puts those together.
// Constants before this text: T (of dy), R (of the results), kPositions, kWidth, kChunk, kVector, kThreads (that share
// a row), kGroups (of them in a block of the first kernel, each with an id at a time), kAccumulate.
__device__ __forceinline__ void AddTo(R* to, const R* accumulator, u64 at, float (&sum)[kVector]) {
  if (kAccumulate) {
    float old[kVector];
    Load<kVector, false>(accumulator + at, old);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += old[i];
  }
  Store<kVector>(to + at, sum);
}

extern "C" __global__ void __launch_bounds__(kThreads* kGroups)
    mt_embedding_backward(const T* dy, const int* ids, const int* order, const R* accumulator, R* to, float* partial) {
  __shared__ int positions[kChunk];
  __shared__ int values[kChunk + 2];  // One before, one after; -1: none.
  __shared__ int begins[kChunk];      // Where an id begins, in any order.
  __shared__ int count_of_begins;
  const i64 first = (i64)blockIdx.x * kChunk;
  const int n = (int)(kPositions - first < kChunk ? kPositions - first : kChunk);
  if (threadIdx.x == 0) count_of_begins = 0;
  for (int i = threadIdx.x; i < n + 2; i += kThreads * kGroups) {
    const i64 at = first + i - 1;
    const int position = at >= 0 && at < kPositions ? order[at] : -1;
    if (i >= 1 && i <= n) positions[i - 1] = position;
    values[i] = position >= 0 ? ids[position] : -1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads * kGroups) {
    if (i == 0 || values[i] != values[i + 1]) begins[atomicAdd(&count_of_begins, 1)] = i;
  }
  __syncthreads();
  const u32 c = (blockIdx.y * kThreads + threadIdx.x % kThreads) * kVector;
  if (c >= kWidth) return;
  for (int next = threadIdx.x / kThreads; next < count_of_begins; next += kGroups) {
    const int begin = begins[next], id = values[begin + 1];
    float sum[kVector] = {};
    int end = begin;
    while (end < n && values[end + 1] == id) {
      // Some at a time, so that their reads overlap.
      float read[4][kVector];
      int count = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (count == i && end + i < n && values[end + i + 1] == id) {
          Load<kVector, true>(dy + (u64)positions[end + i] * kWidth + c, read[i]);
          count = i + 1;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[j] += read[i][j];
        }
      }
      end += count;
    }
    const bool began_before = begin == 0 && values[0] == id, goes_on = end == n && values[n + 1] == id;
    if (!began_before && !goes_on) {
      AddTo(to, accumulator, (u64)id * kWidth + c, sum);
    } else {
      Store<kVector>(partial + ((u64)blockIdx.x * 2 + (began_before ? 0 : 1)) * kWidth + c, sum);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    mt_embedding_join(const int* ids, const int* order, const float* partial, const R* accumulator, R* to) {
  const auto id_at = [&](i64 at) { return ids[order[at]]; };
  i64 chunk = blockIdx.x;
  const i64 next = (chunk + 1) * kChunk;
  if (next >= kPositions) return;
  const int id = id_at(next - 1);
  if (id_at(next) != id) return;
  // What goes on from this chunk has to begin in it.
  if (chunk > 0 && id_at(chunk * kChunk) == id && id_at(chunk * kChunk - 1) == id) return;
  const u32 c = (blockIdx.y * kThreads + threadIdx.x) * kVector;
  if (c >= kWidth) return;
  float sum[kVector];
  Load<kVector, true>(partial + (chunk * 2 + 1) * kWidth + c, sum);
  while (true) {
    ++chunk;
    float more[kVector];
    Load<kVector, true>(partial + chunk * 2 * kWidth + c, more);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += more[i];
    const i64 end = (chunk + 1) * kChunk;
    if (end >= kPositions || id_at(end - 1) != id || id_at(end) != id) break;
  }
  AddTo(to, accumulator, (u64)id * kWidth + c, sum);
}

// Where the result does not lie over the accumulator, its rows start as those of the accumulator.
extern "C" __global__ void __launch_bounds__(256) mt_embedding_copy(const R* accumulator, R* to) {
  if (accumulator == to) return;
  for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < kTable; i += (u64)gridDim.x * 256) to[i] = accumulator[i];
}
