// Hopper's asynchronous machinery (PTX ISA 9.0, chapter 9): mbarriers, the bulk tensor copy engine, wgmma over tiles
// in shared memory. Constants before this text: T (16 bits), kWidth (32, 64 or 128); and the functions Wgmma that
// codegen/cuda/attention_hopper.cc writes.
//
// A tile of r rows lies in shared memory as kChunks boxes of r rows of kColumns elements, one behind the other; the
// 16-byte units of a row are permuted as the copy engine does it (the swizzle of kRowBytes), so that neither reading
// along rows nor along columns meets bank conflicts. Boxes begin at multiples of 1024 bytes.
struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr int kColumns = kWidth < 64 ? (int)kWidth : 64, kChunks = (int)kWidth / kColumns;
constexpr int kRowBytes = 2 * kColumns;  // Of a box: 64 or 128.

// Two elements of T.
__device__ __forceinline__ u32 PackTwo(float low, float high) { return Pair<T>::Of(low, high); }
template <int kRegisters>
__device__ __forceinline__ void GiveRegistersBack() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// mbarriers, by their address in shared memory. A phase ends when as many threads have arrived as Init said and all
// bytes that were expected have come; Wait(parity) returns when phase `parity` (0, 1, 0, ...) has ended.
__device__ __forceinline__ void InitBarrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void FenceBarriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ __forceinline__ void ArriveExpecting(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void Arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void Wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}
// Barrier `id` (1 to 15) of the 128 threads of a warpgroup, or of `kThreads`.
template <int kThreads = 128>
__device__ __forceinline__ void SyncThreads(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

// Rows row ... of head `head` of sample `batch`, as many as the map's box has, to the tile at `to`; zeros behind the
// last. One thread.
__device__ __forceinline__ void CopyTile(const TensorMap& map, u32 to, int box_bytes, u32 barrier, int row, int head,
                                         int batch) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];\n" ::"r"(to + c * box_bytes),
        "l"(&map), "r"(c * kColumns), "r"(row), "r"(head), "r"(batch), "r"(barrier)
        : "memory");
  }
}
// The other way; rows behind the last are left out. The memory may be written again after WaitForStores.
__device__ __forceinline__ void StoreBox(const TensorMap& map, u32 from, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n" ::"l"(&map),
               "r"(column), "r"(row), "r"(head), "r"(batch), "r"(from)
               : "memory");
}
__device__ __forceinline__ void CommitStores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
__device__ __forceinline__ void StoreTile(const TensorMap& map, u32 from, int box_bytes, int row, int head, int batch) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) StoreBox(map, from + c * box_bytes, c * kColumns, row, head, batch);
  CommitStores();
}
__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
// What this thread wrote to shared memory is seen by the copy engine and by wgmma.
__device__ __forceinline__ void FenceShared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Where byte `byte` of row `row` of a box lies.
template <int kBytes = kRowBytes>
__device__ __forceinline__ u32 Swizzled(int row, int byte) {
  const u32 at = row * kBytes + byte;
  return at ^ (at >> 3 & (kBytes / 16 - 1) << 4);
}
// 16 bytes of shared memory.
__device__ __forceinline__ Bytes16 GetUnit(u32 at) {
  Bytes16 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
// sum + the products of the elements of x and of y, in order.
__device__ __forceinline__ float AddProducts(const Bytes16& x, const Bytes16& y, float sum) {
  const u32 a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    T low[2], high[2];
    low[0].bits = (u16)a[i], high[0].bits = (u16)(a[i] >> 16);
    low[1].bits = (u16)b[i], high[1].bits = (u16)(b[i] >> 16);
    sum = fmaf(ToFloat(high[0]), ToFloat(high[1]), fmaf(ToFloat(low[0]), ToFloat(low[1]), sum));
  }
  return sum;
}

// A matrix operand of wgmma whose box begins at `address` (a multiple of 16 bytes), in its permuted order. Of a matrix
// whose 64 contiguous elements run along m or n, `leading_bytes` lie from box to box.
template <int kBytes = kRowBytes>
__device__ __forceinline__ u64 Matrix(u32 address, int leading_bytes = 16) {
  constexpr u64 kLayout = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(8 * kBytes >> 4) << 32 |
         kLayout << 62;
}

// Before the first wgmma over registers or after they were written; after the last of a group; and to wait until all
// but the last `kLeft` groups are done. `Pin` keeps the compiler from moving what is done to registers over these.
__device__ __forceinline__ void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
}
template <int N>
__device__ __forceinline__ void Pin(float (&c)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N>
__device__ __forceinline__ void Pin(u32 (&p)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(p[i / 4][i % 4])::"memory");
}

// Thread t of a warpgroup holds of a product of 64 rows and 2 N columns c[4 n + i]: row 16 (t / 32) + t % 32 / 4 +
// 8 (i / 2), column 8 n + t % 4 * 2 + i % 2.

// c = a b^T of tiles with kWidth columns: 64 rows of `a`, whose boxes have a_bytes, and 2 N rows of `b`.
template <int N>
__device__ __forceinline__ void RowsTimesRows(u32 a, int a_bytes, u32 b, int b_bytes, float (&c)[N]) {
#pragma unroll
  for (int d = 0; d < kWidth / 16; ++d) {
    const int chunk = d * 16 / kColumns, byte = d * 32 % kRowBytes;
    Wgmma<0, 0>(c, Matrix(a + chunk * a_bytes + byte), Matrix(b + chunk * b_bytes + byte), d > 0);
  }
}
// sums [64, kWidth] += p [64, 16 K], as Pack leaves it, times the tile b [16 K, kWidth].
template <int K, int N>
__device__ __forceinline__ void AddWeighted(const u32 (&p)[K][4], u32 b, int b_bytes, float (&sums)[N]) {
#pragma unroll
  for (int s = 0; s < K; ++s) Wgmma<1>(sums, p[s], Matrix(b + s * 16 * kRowBytes, b_bytes), 1);
}
template <int N, int K>
__device__ __forceinline__ void PackWeights(const float (&c)[N], u32 (&p)[K][4]) {
  static_assert(N == 8 * K, "16 columns are 8 sums");
#pragma unroll
  for (int s = 0; s < K; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[s][i] = PackTwo(c[8 * s + 2 * i], c[8 * s + 2 * i + 1]);
  }
}
// Sums, times `upper` (rows 0-7 of each 16) or `lower`, to the 64 rows at `to` in shared memory: boxes of rows of
// kBytes.
template <int kBytes = kRowBytes, int N>
__device__ __forceinline__ void PutTile(const float (&sums)[N], float upper, float lower, u32 to) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < N / 4; ++n) {
    const u32 box = to + n * 16 / kBytes * 64 * kBytes;
    const int byte = n * 16 % kBytes + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(box + Swizzled<kBytes>(row, byte)),
                 "r"(PackTwo(sums[4 * n] * upper, sums[4 * n + 1] * upper))
                 : "memory");
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(box + Swizzled<kBytes>(row + 8, byte)),
                 "r"(PackTwo(sums[4 * n + 2] * lower, sums[4 * n + 3] * lower))
                 : "memory");
  }
}

// Of this thread, known to be one number for its warp.
__device__ __forceinline__ int Warpgroup() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0); }

// A ring of kSlots tiles: who fills it and who empties it go through it in one order.
template <int kSlots>
struct Ring {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void Next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The barriers of two rings, for all threads of a block: what is held, filled by one arrival and emptied by one of each
// warpgroup; and tiles, filled by `filling` arrivals and emptied by one of each warp.
template <int kHeldSlots, int kTileSlots>
__device__ __forceinline__ void InitRings(u32 held_full, u32 held_empty, u32 full, int filling, u32 empty,
                                          int warpgroups) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kHeldSlots; ++i) {
      InitBarrier(held_full + 8 * i, 1);
      InitBarrier(held_empty + 8 * i, warpgroups);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      InitBarrier(full + 8 * i, filling);
      InitBarrier(empty + 8 * i, 4 * warpgroups);
    }
    FenceBarriers();
  }
  __syncthreads();
}

// Which weights of a block are not dropped: bit i of word w is that of weight c[32 w + i] of a product. Each number of
// Philox is made by one thread of those that need it, where rows of weights hold whole groups of four.
//
// Of a product of queries t (and t + 8) of this thread by keys s ... of the block, s a multiple of 4.
template <int N>
__device__ __forceinline__ void KeptOfQueries(const int* rng, int b, int h, int t, int s, u32 (&kept)[N]) {
  const int lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
  for (int w = 0; w < N; ++w) {
    u32 mine = 0;
    if (kLength % 4 == 0) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float u[4];
        const u64 row = (u64)h * kLength + t + 8 * odd;
        Uniforms<4>(rng, (u32)kKey, b, row * kLength + s + w * 64 + n * 8 + lane % 4 / 2 * 4, u);
#pragma unroll
        for (int i = 0; i < 4; ++i) mine |= (u[i] < kRate ? 0u : 1u) << (4 * n + i);
      }
      const u32 other = __shfl_xor_sync(0xffffffffu, mine, 1);
      const u32 upper = odd ? other : mine, lower = odd ? mine : other;
      kept[w] = (upper >> 2 * odd & 0x33333333u) | (lower >> 2 * odd & 0x33333333u) << 2;
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int key = s + w * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        mine |= (Keep(rng, b, h, t + i / 2 % 2 * 8, key) != 0 ? 1u : 0u) << i;
      }
      kept[w] = mine;
    }
  }
}
// Of a product of keys s (and s + 8) of this thread by queries t ... of the block.
template <int N>
__device__ __forceinline__ void KeptOfKeys(const int* rng, int b, int h, int t, int s, u32 (&kept)[N]) {
  const int lane = threadIdx.x % 32, own = lane / 4 % 4, column = t + lane % 4 * 2;
#pragma unroll
  for (int w = 0; w < N; ++w) {
    u32 mine = 0;
    if (kLength % 4 == 0) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float u[4];
        const u64 row = (u64)h * kLength + column + w * 64 + n * 8 + own % 2;
        Uniforms<4>(rng, (u32)kKey, b, row * kLength + s - own + own / 2 * 8, u);
#pragma unroll
        for (int i = 0; i < 4; ++i) mine |= (u[i] < kRate ? 0u : 1u) << (4 * n + i);
      }
      kept[w] = (mine >> own & 0x11111111u) << own;
#pragma unroll
      for (int k = 1; k < 4; ++k) {
        kept[w] |= (__shfl_xor_sync(0xffffffffu, mine, 4 * k) >> own & 0x11111111u) << (own ^ k);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int query = column + w * 64 + i / 4 * 8 + i % 2;
        mine |= (Keep(rng, b, h, query, s + i / 2 % 2 * 8) != 0 ? 1u : 0u) << i;
      }
      kept[w] = mine;
    }
  }
}
