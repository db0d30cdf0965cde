// out = softmax(scale q K^T) V of one position over the keys and values before it; a block for each head, a team of
// kTeam lanes for each key, with a running maximum and sum of its own; teams are added in order. The first head of a
// group writes the position's row of its caches, and all others where they are not written in place.
// Constants before this text: T, kGroup (heads that share a key-value head), kLength, kWidth, kWindow (-1:
// none), kVector, kTeam, kScale.
constexpr int kThreads = 256, kTeams = kThreads / (int)kTeam, kAtOnce = 4;
constexpr int kParts = ((int)kWidth + (int)(kTeam * kVector) - 1) / (int)(kTeam * kVector);

__device__ __forceinline__ float NegativeInfinity() { return __uint_as_float(0xff800000u); }

// What a lane holds of a row: kParts vectors, kTeam vectors apart; zeros behind its end.
__device__ __forceinline__ void LoadRow(const T* row, float (&to)[kParts][kVector]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int d = (p * (int)kTeam + threadIdx.x % kTeam) * (int)kVector;
    if (d < kWidth) {
      Load<kVector, false>(row + d, to[p]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[p][i] = 0;
    }
  }
}
__device__ __forceinline__ void Write(const T* row, const T* before, T* after, u64 position) {
#pragma unroll 1
  for (u64 i = threadIdx.x; after != before && i < kLength * kWidth; i += kThreads) {
    if (i / kWidth != position) after[i] = before[i];
  }
#pragma unroll 1
  for (u64 i = threadIdx.x; i < kWidth; i += kThreads) after[position * kWidth + i] = row[i];
}

extern "C" __global__ void __launch_bounds__(256)
    mt_cached_attention(const T* q, const T* k, const T* v, const T* k_cache, const T* v_cache, const int* at, T* out,
                        T* k_after, T* v_after) {
  __shared__ float sums_of[kTeams][kWidth], largest_of[kTeams], total_of[kTeams], factor_of[kTeams];
  const int position = *at, team = threadIdx.x / kTeam;
  const u64 g = blockIdx.x / kGroup, cache = g * kLength * kWidth;
  q += blockIdx.x * kWidth;
  out += blockIdx.x * kWidth;
  k += g * kWidth;
  v += g * kWidth;
  k_cache += cache;
  v_cache += cache;
  const int first = kWindow >= 0 && position > kWindow ? position - (int)kWindow : 0;
  float mine[kParts][kVector], sums[kParts][kVector] = {}, largest = NegativeInfinity(), total = 0;
  LoadRow(q, mine);
  for (int s0 = first; s0 <= position; s0 += kTeams * kAtOnce) {
    float scores[kAtOnce], next = largest;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int s = s0 + j * kTeams + team;
      float row[kParts][kVector], dot = 0;
      if (s <= position) {
        LoadRow(s == position ? k : k_cache + (u64)s * kWidth, row);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) dot = fmaf(mine[p][i], row[p][i], dot);
        }
      }
#pragma unroll
      for (int step = (int)kTeam / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      scores[j] = s <= position ? dot * kScale : NegativeInfinity();
      next = fmaxf(next, scores[j]);
    }
    if (next == NegativeInfinity()) continue;
    const float shrink = expf(largest - next);
    largest = next;
    total *= shrink;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[p][i] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int s = s0 + j * kTeams + team;
      if (s > position) continue;
      const float weight = expf(scores[j] - next);
      float row[kParts][kVector];
      LoadRow(s == position ? v : v_cache + (u64)s * kWidth, row);
      total += weight;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[p][i] = fmaf(weight, row[p][i], sums[p][i]);
      }
    }
  }
  if (threadIdx.x % kTeam == 0) {
    largest_of[team] = largest;
    total_of[team] = total;
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const int d = (p * (int)kTeam + threadIdx.x % kTeam) * (int)kVector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (d < kWidth) sums_of[team][d + i] = sums[p][i];
    }
  }
  __syncthreads();
  float all = NegativeInfinity(), divisor = 0;
#pragma unroll 8
  for (int t = 0; t < kTeams; ++t) all = fmaxf(all, largest_of[t]);
  if (threadIdx.x < kTeams) factor_of[threadIdx.x] = expf(largest_of[threadIdx.x] - all);
  __syncthreads();
#pragma unroll 8
  for (int t = 0; t < kTeams; ++t) divisor += total_of[t] * factor_of[t];
#pragma unroll 1
  for (int d = threadIdx.x; d < kWidth; d += kThreads) {
    float sum = 0;
#pragma unroll 8
    for (int t = 0; t < kTeams; ++t) sum = fmaf(sums_of[t][d], factor_of[t], sum);
    out[d] = FromFloat<T>(sum / divisor);
  }
  if (blockIdx.x % kGroup != 0) return;
  Write(k, k_cache, k_after + cache, (u64)position);
  Write(v, v_cache, v_after + cache, (u64)position);
}
