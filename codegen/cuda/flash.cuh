// Attention of 16-bit operands on tensor cores (mma.sync m16n8k16), 64 queries by 64 keys at a time, four warps of 16
// rows; Dao, "FlashAttention-2" (2023), algorithms 1 and 2. The backward computes the scores twice, once for dq and
// once for dk and dv, so that each result is summed in one block's registers, in one order. Widths 16 to 128, multiples
// of 16. Constants before this text, beside those of attention_common.cuh: kBatch; kBf16.
constexpr int kTile = 64, kTiles = (kLength + kTile - 1) / kTile;
constexpr int kStride = kWidth + 8;  // Of a row in shared memory: rows of a matrix lie in different banks.
constexpr int kTileElements = kTile * kStride;
constexpr int kDepth = kWidth / 16;  // Steps of 16 along a row.

__device__ __forceinline__ void Commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Rows first ... first + 63 of a head, kRow elements from row to row, to shared memory; zeros behind its end.
template <i64 kRow>
__device__ __forceinline__ void CopyTile(const T* head, int first, T* to) {
  constexpr int kUnits = kWidth / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kUnits; i += 128) {
    const int row = i / kUnits, unit = i % kUnits;
    const bool there = first + row < kLength;
    const T* from = head + (u64)(there ? first + row : 0) * kRow + unit * 8;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(to + row * kStride + unit * 8)),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
  }
}
// Numbers of those rows; zeros behind the end.
__device__ __forceinline__ void CopyNumbers(const float* head, int first, float factor, float* to) {
  if (threadIdx.x < kTile) to[threadIdx.x] = first + threadIdx.x < kLength ? head[first + threadIdx.x] * factor : 0.0f;
}

__device__ __forceinline__ void LoadMatrices(u32 (&to)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(u32 (&to)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void Multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#define MT_MMA(type)                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "                  \
               "{%8,%9}, {%0,%1,%2,%3};\n"                            \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if (kBf16) {
    MT_MMA("bf16");
  } else {
    MT_MMA("f16");
  }
#undef MT_MMA
}
__device__ __forceinline__ u32 PackTwo(float low, float high) {
  return (u32)FromFloat<T>(low).bits | (u32)FromFloat<T>(high).bits << 16;
}

// Rows 16 warp ... of `a` [64, kWidth] times the transpose of `b` [64, kWidth].
__device__ __forceinline__ void RowsTimesRows(const T* a, const T* b, float (&c)[8][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    u32 left[4];
    LoadMatrices(left, SharedAddress(a + (warp * 16 + lane % 16) * kStride + d * 16 + lane / 16 * 8));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      u32 right[4];
      LoadMatrices(right, SharedAddress(b + (n * 16 + lane % 8 + lane / 16 * 8) * kStride + d * 16 + lane / 8 % 2 * 8));
      Multiply(c[2 * n], left, right[0], right[1]);
      Multiply(c[2 * n + 1], left, right[2], right[3]);
    }
  }
}
// sums [16, kWidth] += p [16, 64] (as a product above leaves it) times b [64, kWidth].
__device__ __forceinline__ void AddWeighted(const float (&p)[8][4], const T* b, float (&sums)[2 * kDepth][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const u32 left[4] = {PackTwo(p[2 * s][0], p[2 * s][1]), PackTwo(p[2 * s][2], p[2 * s][3]),
                         PackTwo(p[2 * s + 1][0], p[2 * s + 1][1]), PackTwo(p[2 * s + 1][2], p[2 * s + 1][3])};
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      u32 right[4];
      LoadTransposed(right, SharedAddress(b + (s * 16 + lane % 16) * kStride + d * 16 + lane / 16 * 8));
      Multiply(sums[2 * d], left, right[0], right[1]);
      Multiply(sums[2 * d + 1], left, right[2], right[3]);
    }
  }
}
// The warp's 16 rows, times `upper` (rows 0-7) or `lower`, to rows first ... of a head, by way of `tile`, which no
// other warp touches there.
template <i64 kRow>
__device__ __forceinline__ void StoreRows(const float (&sums)[2 * kDepth][4], float upper, float lower, T* tile,
                                          T* head, int first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* rows = tile + warp * 16 * kStride;
#pragma unroll
  for (int d = 0; d < 2 * kDepth; ++d) {
    *(u32*)(rows + lane / 4 * kStride + d * 8 + lane % 4 * 2) = PackTwo(sums[d][0] * upper, sums[d][1] * upper);
    *(u32*)(rows + (lane / 4 + 8) * kStride + d * 8 + lane % 4 * 2) = PackTwo(sums[d][2] * lower, sums[d][3] * lower);
  }
  __syncwarp();
  constexpr int kUnits = kWidth / 8;
#pragma unroll
  for (int i = lane; i < 16 * kUnits; i += 32) {
    const int row = i / kUnits, unit = i % kUnits, at = first + warp * 16 + row;
    if (at < kLength)
      *(Bytes16*)(head + (u64)at * kRow + unit * 8) = *(const Bytes16*)(rows + row * kStride + unit * 8);
  }
}

// Blocks of keys that queries first ... first + 63 see: [begin, end).
__device__ __forceinline__ int BeginOfKeyTiles(int first) { return FirstKey(first) / kTile; }
__device__ __forceinline__ int EndOfKeyTiles(int first) {
  return kCausal && first + kTile < kLength ? first / kTile + 1 : kTiles;
}
// Whether all of these 64 queries see all of those 64 keys.
__device__ __forceinline__ bool SeesAll(int query, int key) {
  return query + kTile <= kLength && key + kTile <= kLength &&
         (!kCausal || (key + kTile - 1 <= query && (kWindow < 0 || key + kWindow >= query + kTile - 1)));
}

#ifdef MT_FORWARD
extern "C" __global__ void __launch_bounds__(128)
    mt_flash(const T* q, const T* k, const T* v, const int* rng, T* out, float* lse) {
  extern __shared__ Bytes16 memory[];
  T* tiles = (T*)memory;
  T* my_q = tiles;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;  // The longest first.
  q += b * kQBatch + h * kQHead;
  out += b * kOBatch + h * kOHead;
  lse += head * kLength;
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int begin = BeginOfKeyTiles(first), end = EndOfKeyTiles(first);
  const auto keys = [&](int j) { return tiles + (1 + 2 * (j % 2)) * kTileElements; };
  CopyTile<kQRow>(q, first, my_q);
  CopyTile<kKRow>(k, begin * kTile, keys(begin));
  CopyTile<kKRow>(v, begin * kTile, keys(begin) + kTileElements);
  Commit();
  const int lane = threadIdx.x % 32, t = first + threadIdx.x / 32 * 16 + lane / 4;  // And t + 8.
  float sums[2 * kDepth][4] = {}, largest[2] = {NegativeInfinity(), NegativeInfinity()}, total[2] = {};
  for (int j = begin; j < end; ++j) {
    if (j + 1 < end) {
      CopyTile<kKRow>(k, (j + 1) * kTile, keys(j + 1));
      CopyTile<kKRow>(v, (j + 1) * kTile, keys(j + 1) + kTileElements);
    }
    Commit();
    WaitCopies<1>();
    __syncthreads();
    float p[8][4];
    RowsTimesRows(my_q, keys(j), p);
    const bool all = SeesAll(first, j * kTile);
    float next[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] *= kScale2;
        if (!all && !Sees(t + i / 2 * 8, j * kTile + n * 8 + lane % 4 * 2 + i % 2)) p[n][i] = NegativeInfinity();
        next[i / 2] = fmaxf(next[i / 2], p[n][i]);
      }
    }
    float shrink[2], base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 1));
      next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 2));
      base[r] = next[r] == NegativeInfinity() ? 0.0f : next[r];
      shrink[r] = Exp2(largest[r] - base[r]);
      largest[r] = next[r];
      total[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[n][i] = Exp2(p[n][i] - base[i / 2]);
        total[i / 2] += p[n][i];
      }
      if (kDropout) {
        const int s = j * kTile + n * 8 + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float keep[2];
          KeepPair(rng, b, h, t + 8 * r, s, keep);
          p[n][2 * r] *= keep[0];
          p[n][2 * r + 1] *= keep[1];
        }
      }
    }
#pragma unroll
    for (int d = 0; d < 2 * kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[d][i] *= shrink[i / 2];
    }
    AddWeighted(p, keys(j) + kTileElements, sums);
    __syncthreads();
  }
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    factor[r] = 1.0f / total[r];
    if (lane % 4 == 0 && t + 8 * r < kLength) lse[t + 8 * r] = largest[r] * kLn2 + logf(total[r]);
  }
  StoreRows<kORow>(sums, factor[0], factor[1], my_q, out, first);
}
#else
// delta[row] = the sum of dout out: a group of kWidth / 8 threads, or fewer, for each row.
extern "C" __global__ void __launch_bounds__(256) mt_flash_delta(const T* dout, const T* out, float* delta) {
  constexpr int kThreads = kWidth % 64 == 0 ? 8 : kWidth % 32 == 0 ? 4 : 2;
  const u64 row = ((u64)blockIdx.x * 256 + threadIdx.x) / kThreads;
  float sum = 0;
  if (row < kQueries) {
    const u64 head = row / kLength, at = head / kHeads * kOBatch + head % kHeads * kOHead + row % kLength * kORow;
#pragma unroll
    for (int d = threadIdx.x % kThreads * 8; d < kWidth; d += kThreads * 8) {
      float a[8], b[8];
      Load<8, true>(dout + at + d, a);
      Load<8, true>(out + at + d, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
    }
  }
#pragma unroll
  for (int step = kThreads / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (row < kQueries && threadIdx.x % kThreads == 0) delta[row] = sum;
}

extern "C" __global__ void __launch_bounds__(128)
    mt_flash_dq(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta, const int* rng,
                T* dq) {
  extern __shared__ Bytes16 memory[];
  T* tiles = (T*)memory;
  T *my_q = tiles, *my_dout = tiles + kTileElements;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;
  q += b * kQBatch + h * kQHead;
  dout += b * kOBatch + h * kOHead;
  dq += b * kDQBatch + h * kDQHead;
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int begin = BeginOfKeyTiles(first), end = EndOfKeyTiles(first);
  const auto keys = [&](int j) { return tiles + (2 + 2 * (j % 2)) * kTileElements; };
  CopyTile<kQRow>(q, first, my_q);
  CopyTile<kORow>(dout, first, my_dout);
  CopyTile<kKRow>(k, begin * kTile, keys(begin));
  CopyTile<kKRow>(v, begin * kTile, keys(begin) + kTileElements);
  Commit();
  const int lane = threadIdx.x % 32, t = first + threadIdx.x / 32 * 16 + lane / 4;
  float my_lse[2], my_delta[2], sums[2 * kDepth][4] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool there = t + 8 * r < kLength;
    my_lse[r] = there ? lse[head * kLength + t + 8 * r] * kLog2E : 0.0f;
    my_delta[r] = there ? delta[head * kLength + t + 8 * r] : 0.0f;
  }
  for (int j = begin; j < end; ++j) {
    if (j + 1 < end) {
      CopyTile<kKRow>(k, (j + 1) * kTile, keys(j + 1));
      CopyTile<kKRow>(v, (j + 1) * kTile, keys(j + 1) + kTileElements);
    }
    Commit();
    WaitCopies<1>();
    __syncthreads();
    float p[8][4], dp[8][4];
    RowsTimesRows(my_q, keys(j), p);
    RowsTimesRows(my_dout, keys(j) + kTileElements, dp);
    const bool all = SeesAll(first, j * kTile);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int s = j * kTile + n * 8 + lane % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float keep[2] = {1.0f, 1.0f};
        if (kDropout) KeepPair(rng, b, h, t + 8 * r, s, keep);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool sees = all || Sees(t + 8 * r, s + i);
          const float weight = sees ? Exp2(p[n][2 * r + i] * kScale2 - my_lse[r]) : 0.0f;
          p[n][2 * r + i] = weight * (dp[n][2 * r + i] * keep[i] - my_delta[r]);
        }
      }
    }
    AddWeighted(p, keys(j), sums);
    __syncthreads();
  }
  StoreRows<kDQRow>(sums, kScale, kScale, my_q, dq, first);
}

extern "C" __global__ void __launch_bounds__(128)
    mt_flash_dkv(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                 const int* rng, T* dk, T* dv) {
  extern __shared__ Bytes16 memory[];
  __shared__ float row_lse[2][kTile], row_delta[2][kTile];
  T* tiles = (T*)memory;
  T *my_k = tiles, *my_v = tiles + kTileElements;
  constexpr u32 kKvHeads = kHeads / kGroup;
  const u32 heads = kBatch * kKvHeads;
  const u64 head = blockIdx.x % heads, b = head / kKvHeads, g = head % kKvHeads;
  const int first = (int)(blockIdx.x / heads) * kTile;  // The first keys are seen by the most queries.
  k += b * kKBatch + g * kKHead;
  v += b * kKBatch + g * kKHead;
  dk += b * kDKBatch + g * kDKHead;
  dv += b * kDKBatch + g * kDKHead;
  const int begin = kCausal ? first / kTile : 0;
  const int end = kCausal && kWindow >= 0 && first + kTile + kWindow < kLength
                      ? (first + kTile - 1 + (int)kWindow) / kTile + 1
                      : kTiles;
  const int turns = (int)kGroup * (end - begin);
  const auto queries = [&](int i) { return tiles + (2 + 2 * (i % 2)) * kTileElements; };
  const auto copy = [&](int i) {
    const u64 h = g * kGroup + i / (end - begin), row = (b * kHeads + h) * kLength;
    const int at = (begin + i % (end - begin)) * kTile;
    CopyTile<kQRow>(q + b * kQBatch + h * kQHead, at, queries(i));
    CopyTile<kORow>(dout + b * kOBatch + h * kOHead, at, queries(i) + kTileElements);
    CopyNumbers(lse + row, at, kLog2E, row_lse[i % 2]);
    CopyNumbers(delta + row, at, 1.0f, row_delta[i % 2]);
  };
  CopyTile<kKRow>(k, first, my_k);
  CopyTile<kKRow>(v, first, my_v);
  copy(0);
  Commit();
  const int lane = threadIdx.x % 32, s = first + threadIdx.x / 32 * 16 + lane / 4;  // And s + 8.
  float dk_sums[2 * kDepth][4] = {}, dv_sums[2 * kDepth][4] = {};
  for (int i = 0; i < turns; ++i) {
    if (i + 1 < turns) copy(i + 1);
    Commit();
    WaitCopies<1>();
    __syncthreads();
    const u64 h = g * kGroup + i / (end - begin);
    const int at = (begin + i % (end - begin)) * kTile;
    float p[8][4], dp[8][4];
    RowsTimesRows(my_k, queries(i), p);
    RowsTimesRows(my_v, queries(i) + kTileElements, dp);
    const bool all = SeesAll(at, first);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c % 2, t = at + column, key = s + c / 2 * 8;
        const bool sees = all || Sees(t, key);
        const float weight = sees ? Exp2(p[n][c] * kScale2 - row_lse[i % 2][column]) : 0.0f;
        const float keep = kDropout && sees ? Keep(rng, b, h, t, key) : 1.0f;
        dp[n][c] = weight * (dp[n][c] * keep - row_delta[i % 2][column]);
        p[n][c] = weight * keep;
      }
    }
    AddWeighted(p, queries(i) + kTileElements, dv_sums);
    AddWeighted(dp, queries(i), dk_sums);
    __syncthreads();
  }
  StoreRows<kDKRow>(dk_sums, kScale, kScale, my_k, dk, first);
  StoreRows<kDKRow>(dv_sums, 1.0f, 1.0f, my_v, dv, first);
}
#endif
