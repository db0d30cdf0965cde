// Attention for any dtype and width: a warp for each query (forward, dq) or key (dk, dv), 32 of the others at a time.
constexpr int kPart = (kWidth + 31) / 32;  // Of a row of kWidth, the elements of one lane.

// a[0 ... kWidth) b[0 ... kWidth), in order; a in shared memory.
__device__ __forceinline__ float Dot(const float* a, const T* b) {
  float sum = 0;
#pragma unroll 8
  for (int d = 0; d < kWidth; ++d) sum = fmaf(a[d], ToFloat(b[d]), sum);
  return sum;
}
__device__ __forceinline__ void LoadRow(const T* from, float* to) {
  for (int d = threadIdx.x % 32; d < kWidth; d += 32) to[d] = ToFloat(from[d]);
}
// sum += weight row
__device__ __forceinline__ void AddRow(float weight, const T* row, float (&sum)[kPart]) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int d = i * 32 + threadIdx.x % 32;
    if (d < kWidth) sum[i] = fmaf(weight, ToFloat(row[d]), sum[i]);
  }
}
__device__ __forceinline__ void StoreRow(const float (&from)[kPart], float factor, T* to) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int d = i * 32 + threadIdx.x % 32;
    if (d < kWidth) to[d] = FromFloat<T>(from[i] * factor);
  }
}

#ifdef MT_FORWARD
extern "C" __global__ void __launch_bounds__(128)
    mt_attention(const T* q, const T* k, const T* v, const int* rng, T* out, float* lse) {
  __shared__ float held[4][kWidth];
  const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= kQueries) return;
  const int lane = threadIdx.x % 32, t = (int)(row % kLength);
  const u64 head = row / kLength, b = head / kHeads, h = head % kHeads;
  float* mine = held[threadIdx.x / 32];
  LoadRow(q + b * kQBatch + h * kQHead + t * kQRow, mine);
  __syncwarp();
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int first = FirstKey(t), end = EndOfKeys(t);
  float sums[kPart] = {}, largest = NegativeInfinity(), total = 0;
  for (int s0 = first; s0 < end; s0 += 32) {
    const int s = s0 + lane;
    const float score = s < end ? Dot(mine, k + (u64)s * kKRow) * kScale : NegativeInfinity();
    const float next = fmaxf(largest, WarpFold<Largest>(score));
    const float shrink = expf(largest - next);
    float p = expf(score - next);
    total = total * shrink + WarpFold<Sum>(p);
    largest = next;
    if (kDropout && s < end) p *= Keep(rng, b, h, t, s);
#pragma unroll
    for (int i = 0; i < kPart; ++i) sums[i] *= shrink;
    for (int j = 0; j < 32 && s0 + j < end; ++j) {
      AddRow(__shfl_sync(0xffffffffu, p, j), v + (u64)(s0 + j) * kKRow, sums);
    }
  }
  StoreRow(sums, 1.0f / total, out + b * kOBatch + h * kOHead + t * kORow);
  if (lane == 0) lse[row] = largest + logf(total);
}
#else
extern "C" __global__ void __launch_bounds__(128)
    mt_attention_dq(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                    const int* rng, T* dq) {
  __shared__ float held[4][2][kWidth];
  const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= kQueries) return;
  const int lane = threadIdx.x % 32, t = (int)(row % kLength);
  const u64 head = row / kLength, b = head / kHeads, h = head % kHeads;
  float(&mine)[2][kWidth] = held[threadIdx.x / 32];
  LoadRow(q + b * kQBatch + h * kQHead + t * kQRow, mine[0]);
  LoadRow(dout + b * kOBatch + h * kOHead + t * kORow, mine[1]);
  __syncwarp();
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int end = EndOfKeys(t);
  const float my_lse = lse[row], my_delta = delta[row];
  float sums[kPart] = {};
  for (int s0 = FirstKey(t); s0 < end; s0 += 32) {
    const int s = s0 + lane;
    float ds = 0;
    if (s < end) {
      const float p = expf(Dot(mine[0], k + (u64)s * kKRow) * kScale - my_lse);
      const float keep = kDropout ? Keep(rng, b, h, t, s) : 1.0f;
      ds = p * (keep * Dot(mine[1], v + (u64)s * kKRow) - my_delta);
    }
    for (int j = 0; j < 32 && s0 + j < end; ++j) {
      AddRow(__shfl_sync(0xffffffffu, ds, j), k + (u64)(s0 + j) * kKRow, sums);
    }
  }
  StoreRow(sums, kScale, dq + b * kDQBatch + h * kDQHead + t * kDQRow);
}

extern "C" __global__ void __launch_bounds__(128)
    mt_attention_dkv(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                     const int* rng, T* dk, T* dv) {
  __shared__ float held[4][2][kWidth];
  const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= kQueries / kGroup) return;
  const int lane = threadIdx.x % 32, s = (int)(row % kLength);
  const u64 head = row / kLength, b = head / (kHeads / kGroup), g = head % (kHeads / kGroup);
  float(&mine)[2][kWidth] = held[threadIdx.x / 32];
  LoadRow(k + b * kKBatch + g * kKHead + s * kKRow, mine[0]);
  LoadRow(v + b * kKBatch + g * kKHead + s * kKRow, mine[1]);
  __syncwarp();
  const int first = kCausal ? s : 0;
  const int end = kCausal && kWindow >= 0 && s + kWindow + 1 < kLength ? s + (int)kWindow + 1 : (int)kLength;
  float dk_sums[kPart] = {}, dv_sums[kPart] = {};
  for (u64 h = g * kGroup; h < (g + 1) * kGroup; ++h) {
    const u64 base = (b * kHeads + h) * kLength;
    const T *my_q = q + b * kQBatch + h * kQHead, *my_dout = dout + b * kOBatch + h * kOHead;
    for (int t0 = first; t0 < end; t0 += 32) {
      const int t = t0 + lane;
      float p = 0, ds = 0;
      if (t < end) {
        p = expf(Dot(mine[0], my_q + t * kQRow) * kScale - lse[base + t]);
        const float keep = kDropout ? Keep(rng, b, h, t, s) : 1.0f;
        ds = p * (keep * Dot(mine[1], my_dout + t * kORow) - delta[base + t]);
        p *= keep;
      }
      for (int j = 0; j < 32 && t0 + j < end; ++j) {
        AddRow(__shfl_sync(0xffffffffu, ds, j), my_q + (t0 + j) * kQRow, dk_sums);
        AddRow(__shfl_sync(0xffffffffu, p, j), my_dout + (t0 + j) * kORow, dv_sums);
      }
    }
  }
  StoreRow(dk_sums, kScale, dk + b * kDKBatch + g * kDKHead + s * kDKRow);
  StoreRow(dv_sums, 1.0f, dv + b * kDKBatch + g * kDKHead + s * kDKRow);
}
#endif
