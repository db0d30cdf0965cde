// Attention in f32 arithmetic for any dtype: 64 queries by 64 keys at a time, 256 threads with 4 by 4 of the products
// each; the algorithms and the order of sums of flash.cuh. Widths 16 to 128, multiples of 16.
// Constants before this text, beside those of attention_common.cuh: kBatch.
constexpr int kTile = 64, kTiles = (kLength + kTile - 1) / kTile;
constexpr int kStride = kWidth + 4, kWeightStride = kTile + 4;  // Of rows in shared memory.
constexpr int kTileElements = kTile * kStride;
constexpr int kColumns = kWidth / 16;  // Of a row of kWidth, the elements of one thread.

// Where thread x of 16 has its i-th element.
__device__ __forceinline__ int Column(int x, int i) {
  return kWidth % 64 == 0 ? i / 4 * 64 + x * 4 + i % 4 : x * kColumns + i;
}

// Rows first ... first + 63 of a head, kRow elements from row to row; zeros behind its end.
template <i64 kRow>
__device__ __forceinline__ void CopyTile(const T* head, int first, float* to) {
  for (int i = threadIdx.x; i < kTile * kWidth / 4; i += 256) {
    const int row = i / (kWidth / 4), column = i % (kWidth / 4) * 4;
    float x[4] = {};
    if (first + row < kLength) Load<4, true>(head + (u64)(first + row) * kRow + column, x);
    *(float4*)(to + row * kStride + column) = make_float4(x[0], x[1], x[2], x[3]);
  }
}
__device__ __forceinline__ void CopyNumbers(const float* head, int first, float* to) {
  if (threadIdx.x < kTile) to[threadIdx.x] = first + threadIdx.x < kLength ? head[first + threadIdx.x] : 0.0f;
}

// c[i][j] = row 4 y + i of a times row x + 16 j of b.
__device__ __forceinline__ void RowsTimesRows(const float* a, const float* b, float (&c)[4][4]) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) c[i][j] = 0;
  }
#pragma unroll 4
  for (int d = 0; d < kWidth; d += 4) {
    float4 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = *(const float4*)(a + (y * 4 + i) * kStride + d);
      right[i] = *(const float4*)(b + (x + 16 * i) * kStride + d);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[i][j] = fmaf(left[i].x, right[j].x, c[i][j]);
        c[i][j] = fmaf(left[i].y, right[j].y, c[i][j]);
        c[i][j] = fmaf(left[i].z, right[j].z, c[i][j]);
        c[i][j] = fmaf(left[i].w, right[j].w, c[i][j]);
      }
    }
  }
}
__device__ __forceinline__ void StoreWeights(const float (&p)[4][4], float* weights) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) weights[(y * 4 + i) * kWeightStride + x + 16 * j] = p[i][j];
  }
}
// sums[i] += row 4 y + i of the weights times b.
__device__ __forceinline__ void AddWeighted(const float* weights, const float* b, float (&sums)[4][kColumns]) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 2
  for (int s = 0; s < kTile; s += 4) {
    float4 left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = *(const float4*)(weights + (y * 4 + i) * kWeightStride + s);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float right[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) right[j] = b[(s + k) * kStride + Column(x, j)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = k == 0 ? left[i].x : k == 1 ? left[i].y : k == 2 ? left[i].z : left[i].w;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(w, right[j], sums[i][j]);
      }
    }
  }
}
template <i64 kRow>
__device__ __forceinline__ void StoreRows(const float (&sums)[4][kColumns], const float (&factor)[4], T* head,
                                          int first) {
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + y * 4 + i;
    if (row >= kLength) continue;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      head[(u64)row * kRow + Column(x, j)] = FromFloat<T>(sums[i][j] * factor[i]);
    }
  }
}

// Over the 16 threads that share rows.
template <typename Op>
__device__ __forceinline__ float RowFold(float v) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) v = Op::Of(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}
__device__ __forceinline__ int EndOfKeyTiles(int first) {
  return kCausal && first + kTile < kLength ? first / kTile + 1 : kTiles;
}

#ifdef MT_FORWARD
extern "C" __global__ void __launch_bounds__(256)
    mt_attention(const T* q, const T* k, const T* v, const int* rng, T* out, float* lse) {
  extern __shared__ Bytes16 memory[];
  float *my_q = (float*)memory, *keys = my_q + kTileElements, *values = keys + kTileElements,
        *weights = values + kTileElements;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;  // The longest first.
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  CopyTile<kQRow>(q + b * kQBatch + h * kQHead, first, my_q);
  const int x = threadIdx.x % 16, t = first + threadIdx.x / 16 * 4;
  float sums[4][kColumns] = {}, largest[4], total[4] = {}, factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) largest[i] = NegativeInfinity();
  for (int j = FirstKey(first) / kTile; j < EndOfKeyTiles(first); ++j) {
    __syncthreads();
    CopyTile<kKRow>(k, j * kTile, keys);
    CopyTile<kKRow>(v, j * kTile, values);
    __syncthreads();
    float p[4][4];
    RowsTimesRows(my_q, keys, p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float next = largest[i];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[i][c] = Sees(t + i, j * kTile + x + 16 * c) ? p[i][c] * kScale : NegativeInfinity();
        next = fmaxf(next, p[i][c]);
      }
      next = RowFold<Largest>(next);
      const float base = next == NegativeInfinity() ? 0.0f : next, shrink = expf(largest[i] - base);
      largest[i] = next;
      float sum = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[i][c] = expf(p[i][c] - base);
        sum += p[i][c];
        if (kDropout && p[i][c] > 0) p[i][c] *= Keep(rng, b, h, t + i, j * kTile + x + 16 * c);
      }
      total[i] = total[i] * shrink + RowFold<Sum>(sum);
#pragma unroll
      for (int d = 0; d < kColumns; ++d) sums[i][d] *= shrink;
    }
    StoreWeights(p, weights);
    __syncwarp();  // A row's weights come from the 16 threads that read them.
    AddWeighted(weights, values, sums);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    factor[i] = 1.0f / total[i];
    if (x == 0 && t + i < kLength) lse[head * kLength + t + i] = largest[i] + logf(total[i]);
  }
  StoreRows<kORow>(sums, factor, out + b * kOBatch + h * kOHead, first);
}
#else
extern "C" __global__ void __launch_bounds__(256)
    mt_attention_dq(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                    const int* rng, T* dq) {
  extern __shared__ Bytes16 memory[];
  float *my_q = (float*)memory, *my_dout = my_q + kTileElements, *keys = my_dout + kTileElements,
        *values = keys + kTileElements, *weights = values + kTileElements;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  CopyTile<kQRow>(q + b * kQBatch + h * kQHead, first, my_q);
  CopyTile<kORow>(dout + b * kOBatch + h * kOHead, first, my_dout);
  const int x = threadIdx.x % 16, t = first + threadIdx.x / 16 * 4;
  float sums[4][kColumns] = {}, my_lse[4], my_delta[4], factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    my_lse[i] = t + i < kLength ? lse[head * kLength + t + i] : 0.0f;
    my_delta[i] = t + i < kLength ? delta[head * kLength + t + i] : 0.0f;
    factor[i] = kScale;
  }
  for (int j = FirstKey(first) / kTile; j < EndOfKeyTiles(first); ++j) {
    __syncthreads();
    CopyTile<kKRow>(k, j * kTile, keys);
    CopyTile<kKRow>(v, j * kTile, values);
    __syncthreads();
    float p[4][4], dp[4][4];
    RowsTimesRows(my_q, keys, p);
    RowsTimesRows(my_dout, values, dp);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int s = j * kTile + x + 16 * c;
        const bool sees = Sees(t + i, s);
        const float keep = kDropout && sees ? Keep(rng, b, h, t + i, s) : 1.0f;
        p[i][c] = sees ? expf(p[i][c] * kScale - my_lse[i]) * (dp[i][c] * keep - my_delta[i]) : 0.0f;
      }
    }
    StoreWeights(p, weights);
    __syncwarp();
    AddWeighted(weights, keys, sums);
  }
  StoreRows<kDQRow>(sums, factor, dq + b * kDQBatch + h * kDQHead, first);
}

extern "C" __global__ void __launch_bounds__(256)
    mt_attention_dkv(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                     const int* rng, T* dk, T* dv) {
  extern __shared__ Bytes16 memory[];
  __shared__ float row_lse[kTile], row_delta[kTile];
  float *my_k = (float*)memory, *my_v = my_k + kTileElements, *queries = my_v + kTileElements,
        *douts = queries + kTileElements, *weights = douts + kTileElements;
  constexpr u32 kKvHeads = kHeads / kGroup;
  const u32 heads = kBatch * kKvHeads;
  const u64 head = blockIdx.x % heads, b = head / kKvHeads, g = head % kKvHeads;
  const int first = (int)(blockIdx.x / heads) * kTile;
  CopyTile<kKRow>(k + b * kKBatch + g * kKHead, first, my_k);
  CopyTile<kKRow>(v + b * kKBatch + g * kKHead, first, my_v);
  const int begin = kCausal ? first / kTile : 0;
  const int end = kCausal && kWindow >= 0 && first + kTile + kWindow < kLength
                      ? (first + kTile - 1 + (int)kWindow) / kTile + 1
                      : kTiles;
  const int x = threadIdx.x % 16, s = first + threadIdx.x / 16 * 4;
  float dk_sums[4][kColumns] = {}, dv_sums[4][kColumns] = {};
  const float scale[4] = {kScale, kScale, kScale, kScale}, one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (u64 h = g * kGroup; h < (g + 1) * kGroup; ++h) {
    const u64 row = (b * kHeads + h) * kLength;
    for (int i = begin; i < end; ++i) {
      __syncthreads();
      CopyTile<kQRow>(q + b * kQBatch + h * kQHead, i * kTile, queries);
      CopyTile<kORow>(dout + b * kOBatch + h * kOHead, i * kTile, douts);
      CopyNumbers(lse + row, i * kTile, row_lse);
      CopyNumbers(delta + row, i * kTile, row_delta);
      __syncthreads();
      float p[4][4], dp[4][4];
      RowsTimesRows(my_k, queries, p);
      RowsTimesRows(my_v, douts, dp);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = x + 16 * c, t = i * kTile + column;
          const bool sees = Sees(t, s + r);
          const float weight = sees ? expf(p[r][c] * kScale - row_lse[column]) : 0.0f;
          const float keep = kDropout && sees ? Keep(rng, b, h, t, s + r) : 1.0f;
          dp[r][c] = weight * (dp[r][c] * keep - row_delta[column]);
          p[r][c] = weight * keep;
        }
      }
      StoreWeights(p, weights);
      __syncwarp();
      AddWeighted(weights, douts, dv_sums);
      __syncwarp();
      StoreWeights(dp, weights);
      __syncwarp();
      AddWeighted(weights, queries, dk_sums);
    }
  }
  StoreRows<kDKRow>(dk_sums, scale, dk + b * kDKBatch + g * kDKHead, first);
  StoreRows<kDKRow>(dv_sums, one, dv + b * kDKBatch + g * kDKHead, first);
}
#endif
