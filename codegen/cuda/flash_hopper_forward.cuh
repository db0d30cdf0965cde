// Attention forward on Hopper: kWarpgroups warpgroups of 64 queries each, kBlockKeys keys at a time, which come through
// a ring of kSlots tiles; Shah et al., "FlashAttention-3" (2024), algorithm 2: the scores of the next keys and the sums
// over these are multiplied while the softmax of the next is taken. Weights stay in registers. Blocks go from tile to
// tile of queries, and their copies run ahead. Constants before this text, beside those of hopper.cuh: kBatch,
// kHeadsAtOnce (heads whose keys and values are worked on at one time), kBlocks (of a multiprocessor), kRegisters (of a
// thread that computes, beside a warpgroup that copies; 0: its first thread copies, too).
constexpr bool kCopyWarps = kRegisters > 0;
constexpr int kRows = 64 * kWarpgroups, kThreads = 128 * (kWarpgroups + kCopyWarps);
constexpr int kTiles = ((int)kLength + kRows - 1) / kRows, kWork = (int)(kBatch * kHeads) * kTiles;
constexpr int kRowsBox = 64 * kRowBytes, kKeysBox = kBlockKeys * kRowBytes;
constexpr int kKeysBytes = kKeysBox * kChunks, kQueriesBytes = kRowsBox * kChunks;

// Queries first ... of head h of sample b, and blocks [begin, end) of keys that they see. Tiles of kHeadsAtOnce heads
// after one another, the longest first.
struct Work {
  int head, b, h, first, begin, end;
};
__device__ __forceinline__ Work FindWork(int index) {
  const int group = index / ((int)kHeadsAtOnce * kTiles), in_group = index % ((int)kHeadsAtOnce * kTiles);
  const int left = (int)(kBatch * kHeads) - group * (int)kHeadsAtOnce;
  const int together = left < kHeadsAtOnce ? left : (int)kHeadsAtOnce;
  Work work;
  work.head = group * (int)kHeadsAtOnce + in_group % together;
  work.b = work.head / (int)kHeads;
  work.h = work.head % (int)kHeads;
  work.first = (kTiles - 1 - in_group / together) * kRows;
  work.begin = FirstKey(work.first) / kBlockKeys;
  const int last = kCausal && work.first + kRows < kLength ? work.first + kRows : (int)kLength;
  work.end = (last + kBlockKeys - 1) / kBlockKeys;
  return work;
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    mt_flash_hopper(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap v, const int* rng, const __grid_constant__ TensorMap out,
                    float* lse) {
  extern __shared__ u8 memory[];
  constexpr int kHeldBytes = kWarpgroups * kQueriesBytes;  // Queries of one work; there is room for two.
  const u32 held = (SharedAddress(memory) + 1023) & ~1023u, tiles = held + 2 * kHeldBytes;
  const u32 held_full = tiles + kSlots * kKeysBytes, held_empty = held_full + 16, full = held_empty + 16,
            empty = full + 8 * kSlots;
  const int warpgroup = Warpgroup(), lane = threadIdx.x % 32;
  InitRings<2, kSlots>(held_full, held_empty, full, 1, empty, kWarpgroups);

  // Who copies. Of each work: queries; keys of the last block, then keys of each block before it and values of the one
  // behind, at last values of the first.
  Ring<kSlots> filled;
  Ring<2> held_filled;
  Work ahead;  // The work whose tiles are copied.
  int next_index = blockIdx.x, item = 0, items = 0, copied = 0, begun = 0;
  const auto copy = [&] {
    if (item == items) {
      ahead = FindWork(next_index);
      next_index += gridDim.x;
      item = 0;
      items = 2 * (ahead.end - ahead.begin);
      ++begun;
      const u32 to = held + held_filled.slot * kHeldBytes, barrier = held_full + 8 * held_filled.slot;
      Wait(held_empty + 8 * held_filled.slot, held_filled.parity ^ 1);
      ArriveExpecting(barrier, kHeldBytes);
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        CopyTile(q, to + w * kQueriesBytes, kRowsBox, barrier, ahead.first + w * 64, ahead.h, ahead.b);
      }
      held_filled.Next();
    }
    const bool values = item == items - 1 || (item > 0 && item % 2 == 0);
    const int block = item == items - 1 ? ahead.begin : values ? ahead.end - item / 2 : ahead.end - 1 - (item + 1) / 2;
    Wait(empty + 8 * filled.slot, filled.parity ^ 1);
    ArriveExpecting(full + 8 * filled.slot, kKeysBytes);
    CopyTile(values ? v : k, tiles + filled.slot * kKeysBytes, kKeysBox, full + 8 * filled.slot, block * kBlockKeys,
             ahead.h / (int)kGroup, ahead.b);
    filled.Next();
    ++item;
    ++copied;
  };
  if (kCopyWarps && warpgroup == kWarpgroups) {
    GiveRegistersBack<24>();
    if (threadIdx.x % 128 == 0) {
#pragma unroll 1
      while (item < items || next_index < kWork) copy();
    }
    return;
  }
  if (kCopyWarps) TakeRegisters<kCopyWarps ? kRegisters : 24>();
  int released = 0, stored = 0;  // Tiles that this warpgroup is done with; works whose queries' memory it gave back.
  // Without a warpgroup that copies: as much as this one has left room for.
  const auto refill = [&] {
    if (kCopyWarps) return;
    if (threadIdx.x == 0) {
#pragma unroll 1
      while (copied < released + kSlots && (item < items || (next_index < kWork && begun < stored + 2))) copy();
    }
    __syncwarp();
  };
  Ring<kSlots> ring;
  Ring<2> held_ring;
  const auto take = [&] {  // The next tile, when it is there.
    const int slot = ring.slot;
    Wait(full + 8 * slot, ring.parity);
    ring.Next();
    return slot;
  };
  const auto release = [&](int slot) {
    if (lane == 0) Arrive(empty + 8 * slot);
    ++released;
  };
  // The queries' memory of the work before this one, when its results were read out of it.
  const auto give_back = [&] {
    if (threadIdx.x % 128 == 0) {
      WaitForStores();
      Arrive(held_empty + 8 * (held_ring.slot ^ 1));
    }
    ++stored;
    __syncwarp();
  };
  refill();
#pragma unroll 1
  for (int index = blockIdx.x; index < kWork; index += gridDim.x) {
    const Work work = FindWork(index);
    const int head = work.head, b = work.b, h = work.h, begin = work.begin, end = work.end;
    const int my_first = work.first + warpgroup * 64;
    const int t = my_first + threadIdx.x % 128 / 32 * 16 + lane / 4;  // And t + 8.
    const u32 queries = held + held_ring.slot * kHeldBytes + warpgroup * kQueriesBytes;
    float scores[kBlockKeys / 2], sums[kWidth / 2], largest[2] = {NegativeInfinity(), NegativeInfinity()},
                                                    total[2] = {};
    u32 weights[kBlockKeys / 16][4];
    float shrink[2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums[i] = 0;
    // Weights of block j out of its scores, and by how much what was summed before shrinks.
    const auto soften = [&](int j) {
      const int s = j * kBlockKeys + lane % 4 * 2;
      const bool all =
          (j + 1) * kBlockKeys <= kLength && (!kCausal || ((j + 1) * kBlockKeys - 1 <= my_first &&
                                                           (kWindow < 0 || j * kBlockKeys + kWindow >= my_first + 63)));
      if (!all) {
#pragma unroll
        for (int i = 0; i < kBlockKeys / 2; ++i) {
          const int key = s + i / 4 * 8 + i % 2, query = t + i / 2 % 2 * 8;
          const bool sees =
              key < kLength && (!kCausal || (key <= query && (kWindow < 0 || key + (int)kWindow >= query)));
          if (!sees) scores[i] = NegativeInfinity();
        }
      }
      float base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float next = largest[r];
#pragma unroll
        for (int n = 0; n < kBlockKeys / 8; ++n)
          next = fmaxf(next, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        base[r] = next == NegativeInfinity() ? 0.0f : next * kScale2;
        shrink[r] = Exp2(fmaf(largest[r], kScale2, -base[r]));
        largest[r] = next;
        total[r] *= shrink[r];
      }
#pragma unroll
      for (int i = 0; i < kBlockKeys / 2; ++i) {
        scores[i] = Exp2(fmaf(scores[i], kScale2, -base[i / 2 % 2]));
        total[i / 2 % 2] += scores[i];
      }
      if (kDropout) {
        u32 kept[kBlockKeys / 64];
        KeptOfQueries(rng, b, h, t, j * kBlockKeys, kept);
#pragma unroll
        for (int i = 0; i < kBlockKeys / 2; ++i) scores[i] = kept[i / 32] >> i % 32 & 1 ? scores[i] * kKeep : 0.0f;
      }
    };

    // Blocks of keys that some of these 64 queries see; the others of the block pass by. Queries behind the last take
    // one block, too.
    const int my_end = kCausal && my_first + 64 < end * kBlockKeys ? (my_first + 63) / kBlockKeys + 1 : end;
    const int first_seen = FirstKey(my_first) / kBlockKeys, my_begin = first_seen < my_end ? first_seen : my_end - 1;
    Wait(held_full + 8 * held_ring.slot, held_ring.parity);
    int keys = take();
#pragma unroll 1
    for (int j = end; j > my_end; --j) {
      release(keys);
      refill();
      keys = take();
      release(take());
    }
    Pin(scores);
    FenceProducts();
    RowsTimesRows(queries, kRowsBox, tiles + keys * kKeysBytes, kKeysBox, scores);
    CommitProducts();
    WaitProducts<0>();
    Pin(scores);
    release(keys);
    soften(my_end - 1);
    if (index != blockIdx.x) give_back();
    PackWeights(scores, weights);
#pragma unroll 1
    for (int j = my_end - 2; j >= my_begin; --j) {
      keys = take();
      Pin(scores);
      Pin(sums);
      Pin(weights);
      FenceProducts();
      RowsTimesRows(queries, kRowsBox, tiles + keys * kKeysBytes, kKeysBox, scores);
      CommitProducts();
      const int values = take();
      FenceProducts();
      AddWeighted(weights, tiles + values * kKeysBytes, kKeysBox, sums);
      CommitProducts();
      refill();
      WaitProducts<1>();
      Pin(scores);
      release(keys);
      soften(j);
      WaitProducts<0>();
      Pin(sums);
      release(values);
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sums[i] *= shrink[i / 2 % 2];
      PackWeights(scores, weights);
    }
    if (my_begin > begin) release(take());
    const int values = take();
    Pin(sums);
    Pin(weights);
    FenceProducts();
    AddWeighted(weights, tiles + values * kKeysBytes, kKeysBox, sums);
    CommitProducts();
    refill();
#pragma unroll 1
    for (int i = 2 * (my_begin - begin) - 1; i > 0; --i) release(take());
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
      total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
      factor[r] = 1.0f / total[r];
      if (lane % 4 == 0 && t + 8 * r < kLength) {
        lse[(u64)head * kLength + t + 8 * r] = largest[r] * kScale2 * kLn2 + logf(total[r]);
      }
    }
    WaitProducts<0>();
    Pin(sums);
    release(values);
    refill();
    SyncThreads(1 + warpgroup);
    PutTile(sums, factor[0], factor[1], queries);
    FenceShared();
    SyncThreads(1 + warpgroup);
    if (threadIdx.x % 128 == 0) StoreTile(out, queries, kRowsBox, my_first, h, b);
    __syncwarp();
    held_ring.Next();
  }
  if (threadIdx.x % 128 == 0) WaitForStores();
}
