// Attention backward on Hopper; Dao, "FlashAttention-2" (2023), algorithm 2, as two kernels: dk and dv with the keys of
// a block held and queries coming through a ring (MT_KEYS), dq with the queries held (MT_QUERIES), so that each result
// is summed in one block's registers, in one order. kWarpgroups warpgroups of 64 held rows each against kBlockRows rows
// of the other kind; one more warpgroup copies. Weights and their gradients stay in registers. Constants before this
// text, beside those of hopper.cuh: kBatch, kSlots, kHeadsAtOnce (heads that are worked on at one time: query heads for
// dq, key-value heads for dk and dv), kBlocks (of a multiprocessor), kRegisters (of a thread that computes), kAhead
// (the next scores are multiplied while the last sums are: more registers), kHeld (2: the rows held next are copied
// while these are; else 1).
static_assert(kSlots > kWarpgroups * 64 / kBlockRows, "a warpgroup lets that many blocks pass by at one time");
constexpr int kRows = 64 * kWarpgroups, kThreads = 128 * (kWarpgroups + 1);
constexpr int kTiles = ((int)kLength + kRows - 1) / kRows;
constexpr int kHeldBox = 64 * kRowBytes, kHeldBytes = kHeldBox * kChunks;
constexpr int kHeldOfWork = 2 * kWarpgroups * kHeldBytes;
constexpr int kBox = kBlockRows * kRowBytes, kTileBytes = kBox * kChunks, kSlotBytes = 2 * kTileBytes;

// Which rows of which head are held.
struct Work {
  int b, head, first;
};
template <int kHeadsOfAll>
__device__ __forceinline__ Work FindWork(int index, bool last_first) {
  const int group = index / ((int)kHeadsAtOnce * kTiles), in_group = index % ((int)kHeadsAtOnce * kTiles);
  const int left = (int)kBatch * kHeadsOfAll - group * (int)kHeadsAtOnce;
  const int together = left < kHeadsAtOnce ? left : (int)kHeadsAtOnce;
  const int head = group * (int)kHeadsAtOnce + in_group % together, tile = in_group / together;
  return {head / kHeadsOfAll, head % kHeadsOfAll, (last_first ? kTiles - 1 - tile : tile) * kRows};
}
// The held rows of two operands: one thread.
__device__ __forceinline__ void CopyHeld(const TensorMap& left, const TensorMap& right, u32 to, u32 barrier,
                                         const Work& work) {
  ArriveExpecting(barrier, kHeldOfWork);
#pragma unroll
  for (int w = 0; w < kWarpgroups; ++w) {
    CopyTile(left, to + w * kHeldBytes, kHeldBox, barrier, work.first + w * 64, work.head, work.b);
    CopyTile(right, to + (kWarpgroups + w) * kHeldBytes, kHeldBox, barrier, work.first + w * 64, work.head, work.b);
  }
}

// Held rows' memory, once the results that lie there were read; all threads of a warp.
__device__ __forceinline__ void GiveBack(u32 barrier) {
  if (threadIdx.x % 128 == 0) {
    WaitForStores();
    Arrive(barrier);
  }
  __syncwarp();
}

// Of 64 held rows of two operands with the block's rows of two: scores, and gradients of weights; a group each.
template <int N>
__device__ __forceinline__ void MultiplyBoth(u32 held_left, u32 held_right, u32 block, float (&scores)[N],
                                             float (&dp)[N]) {
  Pin(dp);
  Pin(scores);
  FenceProducts();
  RowsTimesRows(held_left, kHeldBox, block, kBox, scores);
  CommitProducts();
  RowsTimesRows(held_right, kHeldBox, block + kTileBytes, kBox, dp);
  CommitProducts();
}

#ifdef MT_QUERIES
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    mt_flash_hopper_dq(const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap q,
                       const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const T* out,
                       const float* lse, const int* rng, const __grid_constant__ TensorMap dq, float* delta) {
  extern __shared__ u8 memory[];
  constexpr int kWork = (int)(kBatch * kHeads) * kTiles;
  const u32 held = (SharedAddress(memory) + 1023) & ~1023u, tiles = held + kHeld * kHeldOfWork;
  const u32 held_full = tiles + kSlots * kSlotBytes, held_empty = held_full + 16, full = held_empty + 16,
            empty = full + 8 * kSlots;
  const int warpgroup = Warpgroup(), lane = threadIdx.x % 32;
  InitRings<kHeld, kSlots>(held_full, held_empty, full, 1, empty, kWarpgroups);
  const auto begin_of = [](const Work& work) { return FirstKey(work.first) / kBlockRows; };
  const auto end_of = [](const Work& work) {
    const int last = kCausal && work.first + kRows < kLength ? work.first + kRows : (int)kLength;
    return (last + kBlockRows - 1) / kBlockRows;
  };
  Ring<kSlots> ring;
  Ring<kHeld> held_ring;
  if (warpgroup == kWarpgroups) {
    GiveRegistersBack<24>();
    if (threadIdx.x % 128 == 0) {
#pragma unroll 1
      for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
        const Work work = FindWork<(int)kHeads>(index, true);
        Wait(held_empty + 8 * held_ring.slot, held_ring.parity ^ 1);
        CopyHeld(q, dout, held + held_ring.slot * kHeldOfWork, held_full + 8 * held_ring.slot, work);
        held_ring.Next();
        const int begin = begin_of(work);
#pragma unroll 1
        for (int j = end_of(work) - 1; j >= begin; --j) {
          const u32 to = tiles + ring.slot * kSlotBytes, barrier = full + 8 * ring.slot;
          Wait(empty + 8 * ring.slot, ring.parity ^ 1);
          ArriveExpecting(barrier, kSlotBytes);
          CopyTile(k, to, kBox, barrier, j * kBlockRows, work.head / (int)kGroup, work.b);
          CopyTile(v, to + kTileBytes, kBox, barrier, j * kBlockRows, work.head / (int)kGroup, work.b);
          ring.Next();
        }
      }
    }
    return;
  }
  TakeRegisters<kRegisters>();
  float scores[kBlockRows / 2], dp[kBlockRows / 2], sums[kWidth / 2], my_lse[2], my_delta[2];
  u32 ds[kBlockRows / 16][4];
#pragma unroll 1
  for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
    const Work work = FindWork<(int)kHeads>(index, true);
    const int b = work.b, h = work.head, begin = begin_of(work), end = end_of(work);
    const int my_row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // And 8 behind.
    const int my_first = work.first + warpgroup * 64, t = my_first + my_row;
    const u32 queries = held + held_ring.slot * kHeldOfWork + warpgroup * kHeldBytes;
    const u32 douts = queries + kWarpgroups * kHeldBytes;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums[i] = 0;
    // A quarter of out's rows t and t + 8; four threads share a row.
    constexpr int kUnits = (int)kWidth / 32;
    const int my_column = lane % 4 * (int)(kWidth / 4);
    Bytes16 out_units[2][kUnits];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool there = t + 8 * r < kLength;
      my_lse[r] = there ? lse[((u64)b * kHeads + h) * kLength + t + 8 * r] * kLog2E : 0.0f;
      const T* row = out + b * kOBatch + h * kOHead + (there ? t + 8 * r : 0) * kORow + my_column;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) out_units[r][u] = LoadConstant((const Bytes16*)row + u);
    }
    // Blocks of keys that some of these 64 queries see; the others of the block pass by. Queries behind the last take
    // one block, too.
    const int my_end = kCausal && my_first + 64 < end * kBlockRows ? (my_first + 63) / kBlockRows + 1 : end;
    const int first_seen = FirstKey(my_first) / kBlockRows, my_begin = first_seen < my_end ? first_seen : my_end - 1;
    const auto take = [&] {  // The next block, when it is there.
      const int slot = ring.slot;
      Wait(full + 8 * slot, ring.parity);
      ring.Next();
      return slot;
    };
    const auto release = [&](int slot) {
      if (lane == 0) Arrive(empty + 8 * slot);
    };
    const auto multiply = [&](int slot) { MultiplyBoth(queries, douts, tiles + slot * kSlotBytes, scores, dp); };
    Wait(held_full + 8 * held_ring.slot, held_ring.parity);
#pragma unroll 1
    for (int j = end; j > my_end; --j) release(take());
    int slot = take();
    multiply(slot);
    if (kHeld == 2 && index != blockIdx.x) GiveBack(held_empty + 8 * (held_ring.slot ^ 1));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      my_delta[r] = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int column = my_column + u * 8;
        my_delta[r] =
            AddProducts(GetUnit(douts + column / kColumns * kHeldBox + Swizzled(my_row + 8 * r, column % kColumns * 2)),
                        out_units[r][u], my_delta[r]);
      }
      my_delta[r] += __shfl_xor_sync(0xffffffffu, my_delta[r], 1);
      my_delta[r] += __shfl_xor_sync(0xffffffffu, my_delta[r], 2);
      if (lane % 4 == 0 && t + 8 * r < kLength) delta[((u64)b * kHeads + h) * kLength + t + 8 * r] = my_delta[r];
    }
#pragma unroll 1
    for (int j = my_end - 1;; --j) {
      const int s = j * kBlockRows + lane % 4 * 2;
      const bool all =
          (j + 1) * kBlockRows <= kLength && (!kCausal || ((j + 1) * kBlockRows - 1 <= my_first &&
                                                           (kWindow < 0 || j * kBlockRows + kWindow >= my_first + 63)));
      u32 kept[kBlockRows / 64];
      if (kDropout) KeptOfQueries(rng, b, h, t, j * kBlockRows, kept);
      WaitProducts<1>();
      Pin(scores);
#pragma unroll
      for (int i = 0; i < kBlockRows / 2; ++i) scores[i] = Exp2(fmaf(scores[i], kScale2, -my_lse[i / 2 % 2]));
      if (!all) {
#pragma unroll
        for (int i = 0; i < kBlockRows / 2; ++i) {
          const int key = s + i / 4 * 8 + i % 2, query = t + i / 2 % 2 * 8;
          const bool sees =
              key < kLength && (!kCausal || (key <= query && (kWindow < 0 || key + (int)kWindow >= query)));
          if (!sees) scores[i] = 0;
        }
      }
      WaitProducts<0>();
      Pin(dp);
#pragma unroll
      for (int i = 0; i < kBlockRows / 2; ++i) {
        if (kDropout) dp[i] = kept[i / 32] >> i % 32 & 1 ? dp[i] * kKeep : 0.0f;
        scores[i] *= dp[i] - my_delta[i / 2 % 2];
      }
      PackWeights(scores, ds);
      Pin(ds);
      Pin(sums);
      FenceProducts();
      AddWeighted(ds, tiles + slot * kSlotBytes, kBox, sums);
      CommitProducts();
      if (j == my_begin) break;
      const int used = slot;
      if (!kAhead) WaitProducts<0>();
      slot = take();
      multiply(slot);
      if (kAhead) WaitProducts<2>();
      release(used);
    }
    WaitProducts<0>();
    release(slot);
    Pin(sums);
#pragma unroll 1
    for (int j = my_begin; j > begin; --j) release(take());
    SyncThreads(1 + warpgroup);
    PutTile(sums, kScale, kScale, queries);
    FenceShared();
    SyncThreads(1 + warpgroup);
    if (threadIdx.x % 128 == 0) StoreTile(dq, queries, kHeldBox, my_first, h, b);
    __syncwarp();
    if (kHeld == 1) GiveBack(held_empty);
    held_ring.Next();
  }
  if (threadIdx.x % 128 == 0) WaitForStores();
}
#endif

#ifdef MT_KEYS
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    mt_flash_hopper_dkv(const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap q,
                        const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const float* lse,
                        const float* delta, const int* rng, const __grid_constant__ TensorMap dk,
                        const __grid_constant__ TensorMap dv) {
  extern __shared__ u8 memory[];
  constexpr int kKvHeads = (int)(kHeads / kGroup);
  constexpr int kWork = (int)kBatch * kKvHeads * kTiles;
  const u32 held = (SharedAddress(memory) + 1023) & ~1023u, tiles = held + kHeld * kHeldOfWork;
  const u32 numbers = tiles + kSlots * kSlotBytes;  // Of each slot: the lse of its rows, then their deltas.
  const u32 held_full = numbers + kSlots * 8 * kBlockRows, held_empty = held_full + 16, full = held_empty + 16,
            empty = full + 8 * kSlots;
  const int warpgroup = Warpgroup(), lane = threadIdx.x % 32;
  InitRings<kHeld, kSlots>(held_full, held_empty, full, 1 + 32, empty, kWarpgroups);
  // The first keys are seen by the most queries. Blocks of queries that see some of them: [begin, begin + blocks).
  const auto begin_of = [](const Work& work) { return kCausal ? work.first / kBlockRows : 0; };
  const auto last_of = [](const Work& work) {
    return kCausal && kWindow >= 0 && work.first + kRows - 1 + kWindow < kLength ? work.first + kRows - 1 + (int)kWindow
                                                                                 : (int)kLength - 1;
  };
  Ring<kSlots> ring;
  Ring<kHeld> held_ring;
  if (warpgroup == kWarpgroups) {
    GiveRegistersBack<24>();
    const int warp = threadIdx.x % 128 / 32;
    if (threadIdx.x % 128 == 0) {
#pragma unroll 1
      for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
        const Work work = FindWork<kKvHeads>(index, false);
        Wait(held_empty + 8 * held_ring.slot, held_ring.parity ^ 1);
        CopyHeld(k, v, held + held_ring.slot * kHeldOfWork, held_full + 8 * held_ring.slot, work);
        held_ring.Next();
        const int begin = begin_of(work) * kBlockRows, last = last_of(work);
#pragma unroll 1
        for (int h = work.head * (int)kGroup; h < (work.head + 1) * (int)kGroup; ++h) {
#pragma unroll 1
          for (int at = begin; at <= last; at += kBlockRows) {
            const u32 to = tiles + ring.slot * kSlotBytes, barrier = full + 8 * ring.slot;
            Wait(empty + 8 * ring.slot, ring.parity ^ 1);
            ArriveExpecting(barrier, kSlotBytes);
            CopyTile(q, to, kBox, barrier, at, h, work.b);
            CopyTile(dout, to + kTileBytes, kBox, barrier, at, h, work.b);
            ring.Next();
          }
        }
      }
    } else if (warp == 1) {
#pragma unroll 1
      for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
        const Work work = FindWork<kKvHeads>(index, false);
        const int begin = begin_of(work) * kBlockRows, last = last_of(work);
#pragma unroll 1
        for (int h = work.head * (int)kGroup; h < (work.head + 1) * (int)kGroup; ++h) {
          const u64 row = ((u64)work.b * kHeads + h) * kLength;
#pragma unroll 1
          for (int at = begin; at <= last; at += kBlockRows) {
            float values[kBlockRows / 32][2];
#pragma unroll
            for (int n = 0; n < kBlockRows / 32; ++n) {
              const int t = at + n * 32 + lane;
              values[n][0] = t < kLength ? lse[row + t] * kLog2E : 0.0f;
              values[n][1] = t < kLength ? delta[row + t] : 0.0f;
            }
            Wait(empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
            for (int n = 0; n < kBlockRows / 32; ++n) {
              const u32 to = numbers + ring.slot * 8 * kBlockRows + (n * 32 + lane) * 4;
              asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to), "f"(values[n][0]) : "memory");
              asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to + 4 * kBlockRows), "f"(values[n][1]) : "memory");
            }
            Arrive(full + 8 * ring.slot);
            ring.Next();
          }
        }
      }
    }
    return;
  }
  TakeRegisters<kRegisters>();
  float scores[kBlockRows / 2], dp[kBlockRows / 2], dk_sums[kWidth / 2], dv_sums[kWidth / 2];
  u32 weights[kBlockRows / 16][4], ds[kBlockRows / 16][4];
#pragma unroll 1
  for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
    const Work work = FindWork<kKvHeads>(index, false);
    const int b = work.b, begin = begin_of(work), last = last_of(work);
    const int turns = (int)kGroup * (last / kBlockRows + 1 - begin);
    const int my_first = work.first + warpgroup * 64;
    const int s = my_first + threadIdx.x % 128 / 32 * 16 + lane / 4;  // And s + 8.
    const u32 keys = held + held_ring.slot * kHeldOfWork + warpgroup * kHeldBytes;
    const u32 values = keys + kWarpgroups * kHeldBytes;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) dk_sums[i] = dv_sums[i] = 0;
    const auto release = [&](int slot) {
      if (lane == 0) Arrive(empty + 8 * slot);
    };
    int slot = 0, turn = -1, h = work.head * (int)kGroup, at = begin * kBlockRows - kBlockRows;
    // To the next block of queries, rows at ... of head h, of which some see some of these 64 keys; the others pass by.
    const auto next = [&] {
      while (++turn < turns) {
        at += kBlockRows;
        if (at > last) {
          at = begin * kBlockRows;
          ++h;
        }
        slot = ring.slot;
        Wait(full + 8 * slot, ring.parity);
        ring.Next();
        if (!kCausal ||
            (at + kBlockRows > my_first && (kWindow < 0 || my_first + 63 + kWindow >= at) && my_first < kLength))
          return true;
        release(slot);
      }
      return false;
    };
    const auto multiply = [&] { MultiplyBoth(keys, values, tiles + slot * kSlotBytes, scores, dp); };
    Wait(held_full + 8 * held_ring.slot, held_ring.parity);
    int used = 0;
    const bool some = next();
    if (kHeld == 2 && index != blockIdx.x) GiveBack(held_empty + 8 * (held_ring.slot ^ 1));
    if (some) {
      multiply();
#pragma unroll 1
      while (true) {
        const u32 queries = tiles + slot * kSlotBytes;
        const u32 my_numbers = numbers + slot * 8 * kBlockRows + lane % 4 * 8;
        const int my_at = at, my_h = h;
        used = slot;
        const bool all =
            at + kBlockRows <= kLength && my_first + 64 <= kLength &&
            (!kCausal || (my_first + 63 <= at && (kWindow < 0 || my_first + kWindow >= at + kBlockRows - 1)));
        const auto number = [&](int n, int which, float(&to)[2]) {  // Of columns 8 n ... of this thread.
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
                       : "=f"(to[0]), "=f"(to[1])
                       : "r"(my_numbers + which * 4 * kBlockRows + n * 32)
                       : "memory");
        };
        u32 kept[kBlockRows / 64];
        if (kDropout) KeptOfKeys(rng, b, my_h, my_at, s, kept);
        WaitProducts<1>();
        Pin(scores);
#pragma unroll
        for (int n = 0; n < kBlockRows / 8; ++n) {
          float row_lse[2];
          number(n, 0, row_lse);
#pragma unroll
          for (int c = 4 * n; c < 4 * n + 4; ++c) scores[c] = Exp2(fmaf(scores[c], kScale2, -row_lse[c % 2]));
        }
        if (!all) {
#pragma unroll
          for (int c = 0; c < kBlockRows / 2; ++c) {
            const int t = my_at + lane % 4 * 2 + c / 4 * 8 + c % 2, key = s + c / 2 % 2 * 8;
            const bool sees =
                key < kLength && t < kLength && (!kCausal || (key <= t && (kWindow < 0 || key + (int)kWindow >= t)));
            if (!sees) scores[c] = 0;
          }
        }
        if (kDropout) {
          float dropped[kBlockRows / 2];
#pragma unroll
          for (int c = 0; c < kBlockRows / 2; ++c) dropped[c] = kept[c / 32] >> c % 32 & 1 ? scores[c] * kKeep : 0.0f;
          PackWeights(dropped, weights);
        } else {
          PackWeights(scores, weights);
        }
        Pin(dv_sums);
        Pin(weights);
        FenceProducts();
        AddWeighted(weights, queries + kTileBytes, kBox, dv_sums);
        CommitProducts();
        WaitProducts<1>();
        Pin(dp);
#pragma unroll
        for (int n = 0; n < kBlockRows / 8; ++n) {
          float row_delta[2];
          number(n, 1, row_delta);
#pragma unroll
          for (int c = 4 * n; c < 4 * n + 4; ++c) {
            if (kDropout) dp[c] = kept[c / 32] >> c % 32 & 1 ? dp[c] * kKeep : 0.0f;
            scores[c] *= dp[c] - row_delta[c % 2];
          }
        }
        PackWeights(scores, ds);
        Pin(dk_sums);
        Pin(ds);
        FenceProducts();
        AddWeighted(ds, queries, kBox, dk_sums);
        CommitProducts();
        if (!kAhead) WaitProducts<0>();
        if (!next()) break;
        multiply();
        if (kAhead) WaitProducts<2>();
        release(used);
      }
      WaitProducts<0>();
      release(used);
    }
    Pin(dk_sums);
    Pin(dv_sums);
    SyncThreads(1 + warpgroup);
    PutTile(dk_sums, kScale, kScale, keys);
    PutTile(dv_sums, 1.0f, 1.0f, values);
    FenceShared();
    SyncThreads(1 + warpgroup);
    if (threadIdx.x % 128 == 0) {
      StoreTile(dk, keys, kHeldBox, my_first, work.head, b);
      StoreTile(dv, values, kHeldBox, my_first, work.head, b);
    }
    __syncwarp();
    if (kHeld == 1) GiveBack(held_empty);
    held_ring.Next();
  }
  if (threadIdx.x % 128 == 0) WaitForStores();
}
#endif
