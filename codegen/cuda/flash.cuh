// Attention on tensor cores by mma.sync: m16n8k16 of 16-bit operands, m16n8k8 of f32 ones, which are rounded to TF32.
// Four warps hold kPatches times 16 rows each, and kOthers rows of the other operands pass by at a time; Dao,
// "FlashAttention-2" (2023), algorithms 1 and 2. The backward computes the scores twice, once for dq and once for dk
// and dv, so that each result is summed in one block's registers, in one order. Widths 16 to 128, multiples of 16.
// Constants before this text, beside those of attention_common.cuh: kBatch; kBf16; kPatches; kOthers, 16, 32 or 64;
// kSlots for rows that pass by: 2, or 1, which waits for its copies.
constexpr int kWarpRows = 16 * kPatches, kTile = 4 * kWarpRows, kTiles = (kLength + kTile - 1) / kTile,
              kOtherTiles = (kLength + kOthers - 1) / kOthers;
constexpr int kUnit = 16 / sizeof(T);    // Elements of 16 bytes.
constexpr int kStride = kWidth + kUnit;  // Of a row in shared memory: rows of a matrix lie in different banks.
constexpr int kTileElements = kTile * kStride, kOtherElements = kOthers * kStride;
constexpr int kSums = kWidth / 8;     // Columns of 8 of a result.
constexpr int kScores = kOthers / 8;  // Columns of 8 of scores.

__device__ __forceinline__ void Commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Rows first ... first + kRows - 1 of a head, kRow elements from row to row, to shared memory; zeros behind its end.
template <int kRows, i64 kRow>
__device__ __forceinline__ void CopyRows(const T* head, int first, T* to) {
  constexpr int kUnits = kWidth / kUnit;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kUnits; i += 128) {
    const int row = i / kUnits, unit = i % kUnits;
    const bool there = first + row < kLength;
    const T* from = head + (u64)(there ? first + row : 0) * kRow + unit * kUnit;
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(to + row * kStride + unit * kUnit)),
        "l"(from), "r"(there ? 16 : 0)
        : "memory");
  }
}
// Numbers of kOthers rows; zeros behind the end.
__device__ __forceinline__ void CopyNumbers(const float* head, int first, float factor, float* to) {
  if (threadIdx.x < kOthers) {
    to[threadIdx.x] = first + threadIdx.x < kLength ? head[first + threadIdx.x] * factor : 0.0f;
  }
}

// Four matrices of 8 rows of 16 bytes: a thread gets word lane % 4 of row lane / 4 of each.
__device__ __forceinline__ void LoadMatrices(u32 (&to)[4], const T* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(from))
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(u32 (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(from))
               : "memory");
}
#define MT_MMA(shape, type)                                                   \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type        \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
__device__ __forceinline__ void Multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (sizeof(T) == 4) {
    MT_MMA("m16n8k8", "tf32");
  } else if (kBf16) {
    MT_MMA("m16n8k16", "bf16");
  } else {
    MT_MMA("m16n8k16", "f16");
  }
}
#undef MT_MMA
// The tensor cores take no notice of an f32's last 13 bits: to the nearest that has none.
__device__ __forceinline__ u32 RoundToTf32(u32 x) { return x + 0x1000; }
__device__ __forceinline__ void RoundOperand(u32 (&x)[4]) {
  if (sizeof(T) == 2) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = RoundToTf32(x[i]);
}

// The warp's rows of `a` [kTile, kWidth] times the transpose of `b` [kOthers, kWidth].
__device__ __forceinline__ void RowsTimesRows(const T* a, const T* b, float (&c)[kPatches][kScores][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < kPatches; ++m) {
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0;
    }
  }
#pragma unroll
  for (int d = 0; d < kWidth; d += 2 * kUnit) {
    u32 left[kPatches][4];
#pragma unroll
    for (int m = 0; m < kPatches; ++m) {
      LoadMatrices(left[m], a + (warp * kWarpRows + m * 16 + lane % 16) * kStride + d + lane / 16 * kUnit);
      RoundOperand(left[m]);
    }
#pragma unroll
    for (int n = 0; n < kScores; n += 2) {
      u32 right[4];
      LoadMatrices(right, b + (n * 8 + lane % 8 + lane / 16 * 8) * kStride + d + lane / 8 % 2 * kUnit);
      RoundOperand(right);
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
        Multiply(c[m][n], left[m], right[0], right[1]);
        Multiply(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// By the type of the operands: how weights are multiplied with rows, and in which columns the sums are.
template <typename E>
struct Weighted {
  __device__ __forceinline__ static u32 PackTwo(float low, float high) {
    return (u32)FromFloat<E>(low).bits | (u32)FromFloat<E>(high).bits << 16;
  }
  // sums += p (as a product above leaves it) times b [kOthers, kWidth].
  __device__ __forceinline__ static void Add(const float (&p)[kPatches][kScores][4], const E* b,
                                             float (&sums)[kPatches][kSums][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kScores; s += 2) {
      u32 left[kPatches][4];
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m][i] = PackTwo(p[m][s + i / 2][i % 2 * 2], p[m][s + i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int d = 0; d < kSums; d += 2) {
        u32 right[4];
        LoadTransposed(right, b + (s * 8 + lane % 16) * kStride + d * 8 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < kPatches; ++m) {
          Multiply(sums[m][d], left[m], right[0], right[1]);
          Multiply(sums[m][d + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
  // The warp's rows, rows 8 i ... of them times factor[i], to rows first ... of a head, by way of `tile`, which no
  // other warp touches there.
  template <i64 kRow>
  __device__ __forceinline__ static void Store(const float (&sums)[kPatches][kSums][4],
                                               const float (&factor)[2 * kPatches], E* tile, E* head, int first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    E* rows = tile + warp * kWarpRows * kStride;
#pragma unroll
    for (int r = 0; r < 2 * kPatches; ++r) {
#pragma unroll
      for (int d = 0; d < kSums; ++d) {
        const float(&sum)[4] = sums[r / 2][d];
        *(u32*)(rows + (lane / 4 + 8 * r) * kStride + d * 8 + lane % 4 * 2) =
            PackTwo(sum[r % 2 * 2] * factor[r], sum[r % 2 * 2 + 1] * factor[r]);
      }
    }
    __syncwarp();
    constexpr int kUnits = kWidth / 8;
#pragma unroll
    for (int i = lane; i < kWarpRows * kUnits; i += 32) {
      const int row = i / kUnits, unit = i % kUnits, at = first + warp * kWarpRows + row;
      if (at < kLength)
        *(Bytes16*)(head + (u64)at * kRow + unit * 8) = *(const Bytes16*)(rows + row * kStride + unit * 8);
    }
  }
};

// A product's columns may be any: of an m16n8k8, column k is key 2 (k % 4) + k / 4, so that weights stay in their
// threads, and column n of matrix i is kVector n + i, so that a thread loads and stores neighbours.
template <>
struct Weighted<float> {
  static constexpr int kVector = kWidth % 32 == 0 ? 4 : 2;
  __device__ __forceinline__ static void Add(const float (&p)[kPatches][kScores][4], const float* b,
                                             float (&sums)[kPatches][kSums][4]) {
    typedef Pack<kVector, float> Vector;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kScores; ++s) {
      u32 left[kPatches][4];
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m][i] = RoundToTf32(__float_as_uint(p[m][s][i % 2 * 2 + i / 2]));
      }
      const float* row = b + (s * 8 + lane % 4 * 2) * kStride + lane / 4 * kVector;
#pragma unroll
      for (int d = 0; d < kSums; d += kVector) {
        Vector even, odd;
        even.units[0] = *(const typename Vector::Unit*)(row + d * 8);
        odd.units[0] = *(const typename Vector::Unit*)(row + kStride + d * 8);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const u32 b0 = RoundToTf32(even.pairs[i]), b1 = RoundToTf32(odd.pairs[i]);
#pragma unroll
          for (int m = 0; m < kPatches; ++m) Multiply(sums[m][d + i], left[m], b0, b1);
        }
      }
    }
  }
  template <i64 kRow>
  __device__ __forceinline__ static void Store(const float (&sums)[kPatches][kSums][4],
                                               const float (&factor)[2 * kPatches], float*, float* head, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2 * kPatches; ++r) {
      const int at = first + threadIdx.x / 32 * kWarpRows + lane / 4 + 8 * r;
      if (at >= kLength) continue;
#pragma unroll
      for (int d = 0; d < kSums; d += kVector) {
        float x[2 * kVector];
#pragma unroll
        for (int i = 0; i < 2 * kVector; ++i) x[i] = sums[r / 2][d + i % kVector][r % 2 * 2 + i / kVector] * factor[r];
        ::Store<2 * kVector>(head + (u64)at * kRow + d * 8 + lane % 4 * 2 * kVector, x);
      }
    }
  }
};
typedef Weighted<T> Rows;

// Tiles of kOthers keys that queries first ... first + kTile - 1 see: [begin, end).
__device__ __forceinline__ int BeginOfKeyTiles(int first) { return FirstKey(first) / kOthers; }
__device__ __forceinline__ int EndOfKeyTiles(int first) {
  return kCausal && first + kTile < kLength ? (first + kTile - 1) / kOthers + 1 : kOtherTiles;
}
// Whether all of `queries` queries from `query` on see all of `keys` keys from `key` on; whether any may see any.
__device__ __forceinline__ bool SeesAll(int query, int queries, int key, int keys) {
  return query + queries <= kLength && key + keys <= kLength &&
         (!kCausal || (key + keys - 1 <= query && (kWindow < 0 || key + kWindow >= query + queries - 1)));
}
__device__ __forceinline__ bool SeesAny(int query, int queries, int key, int keys) {
  return query < kLength && key < kLength &&
         (!kCausal || (key < query + queries && (kWindow < 0 || key + keys - 1 + kWindow >= query)));
}

// Whether four neighbouring keys of a query have their numbers from one draw.
constexpr bool kFours = kLength % 4 == 0;
// Bit i: key s + i, s a multiple of 4, of query t is kept. REQUIRES: kFours.
__device__ __forceinline__ u32 KeptFour(const int* rng, u64 b, u64 h, int t, int s) {
  float u[4];
  Uniforms<4>(rng, (u32)kKey, b, (h * kLength + t) * kLength + s, u);
  return (u[0] < kRate ? 0 : 1) | (u[1] < kRate ? 0 : 2) | (u[2] < kRate ? 0 : 4) | (u[3] < kRate ? 0 : 8);
}
__device__ __forceinline__ float Factor(u32 bits, int at) { return bits >> at & 1 ? kKeep : 0.0f; }
// Queries are rows: of queries t and t + 8, of keys s and s + 1, s twice the lane's place among its four. All lanes.
__device__ __forceinline__ void KeepOfQueries(const int* rng, u64 b, u64 h, int t, int s, float (&keep)[4]) {
  if (kFours) {  // Two lanes have four keys: each draws for one query.
    const int odd = threadIdx.x % 2;
    const u32 mine = KeptFour(rng, b, h, t + 8 * odd, s - 2 * odd), other = __shfl_xor_sync(0xffffffffu, mine, 1);
    const u32 upper = odd ? other : mine, lower = odd ? mine : other;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keep[i] = Factor(upper, 2 * odd + i);
      keep[2 + i] = Factor(lower, 2 * odd + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep[i] = Keep(rng, b, h, t + i / 2 * 8, s + i % 2);
  }
}
// Keys are rows: of keys s and s + 8, of queries t and t + 1. All lanes.
__device__ __forceinline__ void KeepOfKeys(const int* rng, u64 b, u64 h, int t, int s, float (&keep)[4]) {
  if (kFours) {  // Four lanes have four keys and the same queries: each draws for one query and half.
    const int lane = threadIdx.x % 32, place = lane / 4 % 4;
    const u32 mine = KeptFour(rng, b, h, t + place % 2, s - place + place / 2 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      keep[i] = Factor(__shfl_sync(0xffffffffu, mine, lane % 4 + lane / 16 * 16 + 4 * i), place);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep[i] = Keep(rng, b, h, t + i % 2, s + i / 2 * 8);
  }
}

#if defined MT_FORWARD
extern "C" __global__ void __launch_bounds__(128)
    mt_flash(const T* q, const T* k, const T* v, const int* rng, T* out, float* lse) {
  extern __shared__ Bytes16 memory[];
  T *my_q = (T*)memory, *others = my_q + kTileElements;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;  // The longest first.
  q += b * kQBatch + h * kQHead;
  out += b * kOBatch + h * kOHead;
  lse += head * kLength;
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int begin = BeginOfKeyTiles(first), end = EndOfKeyTiles(first);
  const auto keys = [&](int j) { return others + j % kSlots * 2 * kOtherElements; };
  const auto copy = [&](int j) {
    CopyRows<kOthers, kKRow>(k, j * kOthers, keys(j));
    CopyRows<kOthers, kKRow>(v, j * kOthers, keys(j) + kOtherElements);
  };
  CopyRows<kTile, kQRow>(q, first, my_q);
  copy(begin);
  Commit();
  const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * kWarpRows, t = row + lane / 4;  // And t + 8 ...
  float sums[kPatches][kSums][4] = {}, largest[2 * kPatches], total[2 * kPatches] = {};
#pragma unroll
  for (int r = 0; r < 2 * kPatches; ++r) largest[r] = NegativeInfinity();
  for (int j = begin; j < end; ++j) {
    const int ahead = j + kSlots - 1;
    if (ahead > begin && ahead < end) copy(ahead);
    Commit();
    WaitCopies<kSlots - 1>();
    __syncthreads();
    if (SeesAny(row, kWarpRows, j * kOthers, kOthers)) {
      float p[kPatches][kScores][4];
      RowsTimesRows(my_q, keys(j), p);
      const bool all = SeesAll(row, kWarpRows, j * kOthers, kOthers);
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
        float next[2] = {largest[2 * m], largest[2 * m + 1]};
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& score = p[m][n][i];
            score *= kScale2;
            const int s = j * kOthers + n * 8 + lane % 4 * 2 + i % 2;
            if (!all && !Sees(t + m * 16 + i / 2 * 8, s)) score = NegativeInfinity();
            next[i / 2] = fmaxf(next[i / 2], score);
          }
        }
        float shrink[2], base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 1));
          next[r] = fmaxf(next[r], __shfl_xor_sync(0xffffffffu, next[r], 2));
          base[r] = next[r] == NegativeInfinity() ? 0.0f : next[r];
          shrink[r] = Exp2(largest[2 * m + r] - base[r]);
          largest[2 * m + r] = next[r];
          total[2 * m + r] *= shrink[r];
        }
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            p[m][n][i] = Exp2(p[m][n][i] - base[i / 2]);
            total[2 * m + i / 2] += p[m][n][i];
          }
          if (kDropout) {
            float keep[4];
            KeepOfQueries(rng, b, h, t + m * 16, j * kOthers + n * 8 + lane % 4 * 2, keep);
#pragma unroll
            for (int i = 0; i < 4; ++i) p[m][n][i] *= keep[i];
          }
        }
#pragma unroll
        for (int d = 0; d < kSums; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][d][i] *= shrink[i / 2];
        }
      }
      Rows::Add(p, keys(j) + kOtherElements, sums);
    }
    __syncthreads();
  }
  float factor[2 * kPatches];
#pragma unroll
  for (int r = 0; r < 2 * kPatches; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    factor[r] = 1.0f / total[r];
    if (lane % 4 == 0 && t + 8 * r < kLength) lse[t + 8 * r] = largest[r] * kLn2 + logf(total[r]);
  }
  Rows::Store<kORow>(sums, factor, my_q, out, first);
}
#elif defined MT_QUERIES
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
  T *my_q = (T*)memory, *my_dout = my_q + kTileElements, *others = my_dout + kTileElements;
  const u32 heads = kBatch * kHeads;
  const u64 head = blockIdx.x % heads, b = head / kHeads, h = head % kHeads;
  const int first = (kTiles - 1 - (int)(blockIdx.x / heads)) * kTile;
  q += b * kQBatch + h * kQHead;
  dout += b * kOBatch + h * kOHead;
  dq += b * kDQBatch + h * kDQHead;
  k += b * kKBatch + h / kGroup * kKHead;
  v += b * kKBatch + h / kGroup * kKHead;
  const int begin = BeginOfKeyTiles(first), end = EndOfKeyTiles(first);
  const auto keys = [&](int j) { return others + j % kSlots * 2 * kOtherElements; };
  const auto copy = [&](int j) {
    CopyRows<kOthers, kKRow>(k, j * kOthers, keys(j));
    CopyRows<kOthers, kKRow>(v, j * kOthers, keys(j) + kOtherElements);
  };
  CopyRows<kTile, kQRow>(q, first, my_q);
  CopyRows<kTile, kORow>(dout, first, my_dout);
  copy(begin);
  Commit();
  const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * kWarpRows, t = row + lane / 4;
  float my_lse[2 * kPatches], my_delta[2 * kPatches], factor[2 * kPatches], sums[kPatches][kSums][4] = {};
#pragma unroll
  for (int r = 0; r < 2 * kPatches; ++r) {
    const bool there = t + 8 * r < kLength;
    my_lse[r] = there ? lse[head * kLength + t + 8 * r] * kLog2E : 0.0f;
    my_delta[r] = there ? delta[head * kLength + t + 8 * r] : 0.0f;
    factor[r] = kScale;
  }
  for (int j = begin; j < end; ++j) {
    const int ahead = j + kSlots - 1;
    if (ahead > begin && ahead < end) copy(ahead);
    Commit();
    WaitCopies<kSlots - 1>();
    __syncthreads();
    if (SeesAny(row, kWarpRows, j * kOthers, kOthers)) {
      float p[kPatches][kScores][4], dp[kPatches][kScores][4];
      RowsTimesRows(my_q, keys(j), p);
      RowsTimesRows(my_dout, keys(j) + kOtherElements, dp);
      const bool all = SeesAll(row, kWarpRows, j * kOthers, kOthers);
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
          const int s = j * kOthers + n * 8 + lane % 4 * 2;
          float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
          if (kDropout) KeepOfQueries(rng, b, h, t + m * 16, s, keep);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = 2 * m + i / 2;
            const bool sees = all || Sees(t + 8 * r, s + i % 2);
            const float weight = sees ? Exp2(p[m][n][i] * kScale2 - my_lse[r]) : 0.0f;
            p[m][n][i] = weight * (dp[m][n][i] * keep[i] - my_delta[r]);
          }
        }
      }
      Rows::Add(p, keys(j), sums);
    }
    __syncthreads();
  }
  Rows::Store<kDQRow>(sums, factor, my_q, dq, first);
}

#else
extern "C" __global__ void __launch_bounds__(128)
    mt_flash_dkv(const T* dout, const T* q, const T* k, const T* v, const float* lse, const float* delta,
                 const int* rng, T* dk, T* dv) {
  extern __shared__ Bytes16 memory[];
  __shared__ float row_lse[kSlots][kOthers], row_delta[kSlots][kOthers];
  T *my_k = (T*)memory, *my_v = my_k + kTileElements, *others = my_v + kTileElements;
  constexpr u32 kKvHeads = kHeads / kGroup;
  const u32 heads = kBatch * kKvHeads;
  const u64 head = blockIdx.x % heads, b = head / kKvHeads, g = head % kKvHeads;
  const int first = (int)(blockIdx.x / heads) * kTile;  // The first keys are seen by the most queries.
  k += b * kKBatch + g * kKHead;
  v += b * kKBatch + g * kKHead;
  dk += b * kDKBatch + g * kDKHead;
  dv += b * kDKBatch + g * kDKHead;
  const int begin = kCausal ? first / kOthers : 0;
  const int end = kCausal && kWindow >= 0 && first + kTile + kWindow < kLength
                      ? (first + kTile - 1 + (int)kWindow) / kOthers + 1
                      : kOtherTiles;
  const int turns = (int)kGroup * (end - begin);
  const auto queries = [&](int i) { return others + i % kSlots * 2 * kOtherElements; };
  const auto copy = [&](int i) {
    const u64 h = g * kGroup + i / (end - begin), row = (b * kHeads + h) * kLength;
    const int at = (begin + i % (end - begin)) * kOthers;
    CopyRows<kOthers, kQRow>(q + b * kQBatch + h * kQHead, at, queries(i));
    CopyRows<kOthers, kORow>(dout + b * kOBatch + h * kOHead, at, queries(i) + kOtherElements);
    CopyNumbers(lse + row, at, kLog2E, row_lse[i % kSlots]);
    CopyNumbers(delta + row, at, 1.0f, row_delta[i % kSlots]);
  };
  CopyRows<kTile, kKRow>(k, first, my_k);
  CopyRows<kTile, kKRow>(v, first, my_v);
  copy(0);
  Commit();
  const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * kWarpRows, s = row + lane / 4;  // And s + 8 ...
  float dk_sums[kPatches][kSums][4] = {}, dv_sums[kPatches][kSums][4] = {}, scale[2 * kPatches], one[2 * kPatches];
#pragma unroll
  for (int r = 0; r < 2 * kPatches; ++r) {
    scale[r] = kScale;
    one[r] = 1.0f;
  }
  for (int i = 0; i < turns; ++i) {
    const int ahead = i + kSlots - 1;
    if (ahead > 0 && ahead < turns) copy(ahead);
    Commit();
    WaitCopies<kSlots - 1>();
    __syncthreads();
    const u64 h = g * kGroup + i / (end - begin);
    const int at = (begin + i % (end - begin)) * kOthers;
    if (SeesAny(at, kOthers, row, kWarpRows)) {
      float p[kPatches][kScores][4], dp[kPatches][kScores][4];
      RowsTimesRows(my_k, queries(i), p);
      RowsTimesRows(my_v, queries(i) + kOtherElements, dp);
      const bool all = SeesAll(at, kOthers, row, kWarpRows);
#pragma unroll
      for (int m = 0; m < kPatches; ++m) {
#pragma unroll
        for (int n = 0; n < kScores; ++n) {
          float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
          if (kDropout) KeepOfKeys(rng, b, h, at + n * 8 + lane % 4 * 2, s + m * 16, keep);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int column = n * 8 + lane % 4 * 2 + c % 2;
            const bool sees = all || Sees(at + column, s + m * 16 + c / 2 * 8);
            const float weight = sees ? Exp2(p[m][n][c] * kScale2 - row_lse[i % kSlots][column]) : 0.0f;
            dp[m][n][c] = weight * (dp[m][n][c] * keep[c] - row_delta[i % kSlots][column]);
            p[m][n][c] = weight * keep[c];
          }
        }
      }
      Rows::Add(p, queries(i) + kOtherElements, dv_sums);
      Rows::Add(dp, queries(i), dk_sums);
    }
    __syncthreads();
  }
  Rows::Store<kDKRow>(dk_sums, scale, my_k, dk, first);
  Rows::Store<kDKRow>(dv_sums, one, my_v, dv, first);
}
#endif
