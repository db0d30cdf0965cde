// Attention backward on Hopper where a block holds all keys of a head (at most 256 of at most 64 columns): the weights
// are computed once for dq, dk and dv. Blocks go from key-value head to key-value head; a warp copies the next head's
// keys and values while this one's are worked on, two more sum dout out of its queries. Two warpgroups have up to two
// tiles of 64 keys each; for 64 queries at a time each sums dk and dv of its own, and then, out of all gradients of
// scores, which lie in shared memory, half the columns of dq. Constants before this text, beside those of hopper.cuh:
// kBatch, kSlots.
constexpr int kTiles = ((int)kLength + 63) / 64, kKvHeads = (int)(kHeads / kGroup);
constexpr int kTileBytes = 64 * kRowBytes, kSlotBytes = 3 * kTileBytes, kHeldBytes = 2 * kTiles * kTileBytes;
constexpr int kGradsBytes = 64 * 128;  // Gradients of scores: 64 keys by 64 queries.

// Whether some of queries 64 i ... see some of keys 64 j ...
__device__ __forceinline__ bool SeesSome(int i, int j) {
  return j < kTiles && (!kCausal || (j <= i && (kWindow < 0 || j * 64 + 63 + kWindow >= i * 64)));
}

extern "C" __global__ void __launch_bounds__(384, 1)
    mt_flash_hopper_head(const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap q,
                         const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                         const __grid_constant__ TensorMap out, const float* lse, const int* rng,
                         const __grid_constant__ TensorMap dq, const __grid_constant__ TensorMap dk,
                         const __grid_constant__ TensorMap dv) {
  extern __shared__ u8 memory[];
  const u32 held = (SharedAddress(memory) + 1023) & ~1023u, grads = held + 2 * kHeldBytes;
  const u32 halves = grads + kTiles * kGradsBytes, tiles = halves + kTileBytes;  // halves: of dq.
  const u32 numbers = tiles + kSlots * kSlotBytes;
  const u32 held_full = numbers + kSlots * 512, held_empty = held_full + 16, grads_full = held_empty + 16,
            grads_empty = grads_full + 8, full = grads_empty + 8, summed = full + 8 * kSlots,
            empty = summed + 8 * kSlots;
  const int warpgroup = Warpgroup(), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      InitBarrier(held_full + 8 * i, 1);
      InitBarrier(held_empty + 8 * i, 2);
    }
    InitBarrier(grads_full, 8);
    InitBarrier(grads_empty, 8);
    for (int i = 0; i < kSlots; ++i) {
      InitBarrier(full + 8 * i, 1);
      InitBarrier(summed + 8 * i, 64);
      InitBarrier(empty + 8 * i, 8);
    }
    FenceBarriers();
  }
  __syncthreads();
  constexpr int kWork = (int)kBatch * kKvHeads;
  Ring<2> heads;
  Ring<kSlots> ring;
  if (warpgroup == 2) {
    GiveRegistersBack<24>();
    if (threadIdx.x % 128 == 0) {
#pragma unroll 1
      for (int work = blockIdx.x; work < kWork; work += gridDim.x) {
        const int b = work / kKvHeads, g = work % kKvHeads;
        const u32 to = held + heads.slot * kHeldBytes, barrier = held_full + 8 * heads.slot;
        Wait(held_empty + 8 * heads.slot, heads.parity ^ 1);
        ArriveExpecting(barrier, kHeldBytes);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          CopyTile(k, to + j * kTileBytes, kTileBytes, barrier, j * 64, g, b);
          CopyTile(v, to + (kTiles + j) * kTileBytes, kTileBytes, barrier, j * 64, g, b);
        }
        heads.Next();
#pragma unroll 1
        for (int i = 0; i < (int)kGroup * kTiles; ++i) {
          const u32 at = tiles + ring.slot * kSlotBytes, filled = full + 8 * ring.slot;
          Wait(empty + 8 * ring.slot, ring.parity ^ 1);
          ArriveExpecting(filled, kSlotBytes);
          CopyTile(q, at, kTileBytes, filled, i % kTiles * 64, g * (int)kGroup + i / kTiles, b);
          CopyTile(dout, at + kTileBytes, kTileBytes, filled, i % kTiles * 64, g * (int)kGroup + i / kTiles, b);
          CopyTile(out, at + 2 * kTileBytes, kTileBytes, filled, i % kTiles * 64, g * (int)kGroup + i / kTiles, b);
          ring.Next();
        }
      }
    } else if (threadIdx.x % 128 >= 64) {  // The lse of a row, and the sum of dout out, by a thread.
      const int row = threadIdx.x % 64;
#pragma unroll 1
      for (int work = blockIdx.x; work < kWork; work += gridDim.x) {
#pragma unroll 1
        for (int i = 0; i < (int)kGroup * kTiles; ++i) {
          const int t = i % kTiles * 64 + row;
          const float row_lse = t < kLength ? lse[((u64)work * kGroup + i / kTiles) * kLength + t] * kLog2E : 0.0f;
          Wait(full + 8 * ring.slot, ring.parity);
          const u32 douts = tiles + ring.slot * kSlotBytes + kTileBytes;
          float sum = 0;
#pragma unroll 2
          for (int d = 0; d < kRowBytes; d += 16) {
            const u32 at = douts + Swizzled(row, d);
            sum = AddProducts(GetUnit(at), GetUnit(at + kTileBytes), sum);
          }
          const u32 to = numbers + ring.slot * 512 + row * 4;
          asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to), "f"(row_lse) : "memory");
          asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to + 256), "f"(sum) : "memory");
          Arrive(summed + 8 * ring.slot);
          ring.Next();
        }
      }
    }
    return;
  }
  TakeRegisters<240>();
  Ring<1> grads_ring;
  float dk_sums[2][kWidth / 2], dv_sums[2][kWidth / 2], scores[32], dp[32], dq_sums[kWidth / 4];
  u32 weights[4][4], ds[4][4];
#pragma unroll 1
  for (int work = blockIdx.x; work < kWork; work += gridDim.x) {
    const int b = work / kKvHeads, g = work % kKvHeads;
    const u32 keys = held + heads.slot * kHeldBytes, values = keys + kTiles * kTileBytes;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) dk_sums[0][i] = dk_sums[1][i] = dv_sums[0][i] = dv_sums[1][i] = 0;
    Wait(held_full + 8 * heads.slot, heads.parity);
#pragma unroll 1
    for (int h = g * (int)kGroup; h < (g + 1) * (int)kGroup; ++h) {
#pragma unroll 1
      for (int i = 0; i < kTiles; ++i) {
        const int slot = ring.slot;
        const u32 queries = tiles + slot * kSlotBytes, douts = queries + kTileBytes;
        const u32 my_numbers = numbers + slot * 512 + lane % 4 * 8;
        const auto number = [&](int n, int which, float(&to)[2]) {  // Of columns 8 n ... of this thread.
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n"
                       : "=f"(to[0]), "=f"(to[1])
                       : "r"(my_numbers + which * 256 + n * 32)
                       : "memory");
        };
        Wait(full + 8 * slot, ring.parity);
        Wait(summed + 8 * slot, ring.parity);
        ring.Next();
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int j = x == 0 ? warpgroup : 3 - warpgroup;  // Causal: as many tiles for each.
          if (!SeesSome(i, j)) continue;
          Pin(scores);
          Pin(dp);
          FenceProducts();
          RowsTimesRows(keys + j * kTileBytes, kTileBytes, queries, kTileBytes, scores);
          CommitProducts();
          RowsTimesRows(values + j * kTileBytes, kTileBytes, douts, kTileBytes, dp);
          CommitProducts();
          const int s = j * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4, t = i * 64 + lane % 4 * 2;
          const bool all = i * 64 + 64 <= kLength && j * 64 + 64 <= kLength &&
                           (!kCausal || (j < i && (kWindow < 0 || j * 64 + kWindow >= i * 64 + 63)));
          u32 kept[1];
          if (kDropout) KeptOfKeys(rng, b, h, i * 64, s, kept);
          WaitProducts<1>();
          Pin(scores);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float row_lse[2];
            number(n, 0, row_lse);
#pragma unroll
            for (int c = 4 * n; c < 4 * n + 4; ++c) scores[c] = Exp2(fmaf(scores[c], kScale2, -row_lse[c % 2]));
          }
          if (!all) {
#pragma unroll
            for (int c = 0; c < 32; ++c) {
              const int query = t + c / 4 * 8 + c % 2, key = s + c / 2 % 2 * 8;
              const bool sees = key < kLength && query < kLength &&
                                (!kCausal || (key <= query && (kWindow < 0 || key + (int)kWindow >= query)));
              if (!sees) scores[c] = 0;
            }
          }
          if (kDropout) {
            float dropped[32];
#pragma unroll
            for (int c = 0; c < 32; ++c) dropped[c] = kept[0] >> c & 1 ? scores[c] * kKeep : 0.0f;
            PackWeights(dropped, weights);
          } else {
            PackWeights(scores, weights);
          }
          Pin(dv_sums[x]);
          Pin(weights);
          FenceProducts();
          AddWeighted(weights, douts, kTileBytes, dv_sums[x]);
          CommitProducts();
          WaitProducts<1>();
          Pin(dp);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            float row_delta[2];
            number(n, 1, row_delta);
#pragma unroll
            for (int c = 4 * n; c < 4 * n + 4; ++c) {
              if (kDropout) dp[c] = kept[0] >> c & 1 ? dp[c] * kKeep : 0.0f;
              scores[c] *= dp[c] - row_delta[c % 2];
            }
          }
          PackWeights(scores, ds);
          Pin(dk_sums[x]);
          Pin(ds);
          FenceProducts();
          AddWeighted(ds, queries, kTileBytes, dk_sums[x]);
          CommitProducts();
          if (x == 0 || !SeesSome(i, warpgroup)) Wait(grads_empty, grads_ring.parity ^ 1);
          const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const u32 to = grads + j * kGradsBytes;
            asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to + Swizzled<128>(row, n * 16 + lane % 4 * 4)),
                         "r"(ds[n / 2][n % 2 * 2])
                         : "memory");
            asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to + Swizzled<128>(row + 8, n * 16 + lane % 4 * 4)),
                         "r"(ds[n / 2][n % 2 * 2 + 1])
                         : "memory");
          }
          WaitProducts<0>();
          Pin(dv_sums[x]);
          Pin(dk_sums[x]);
        }
        FenceShared();
        __syncwarp();
        if (lane == 0) {
          Arrive(empty + 8 * slot);
          Arrive(grads_full);
        }
        Wait(grads_full, grads_ring.parity);
        Pin(dq_sums);
        FenceProducts();
        const int begin = FirstKey(i * 64) / 64, end = kCausal ? i + 1 : kTiles;
#pragma unroll 1
        for (int j = begin; j < end; ++j) {
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            Wgmma<1, 1>(dq_sums, Matrix<128>(grads + j * kGradsBytes + s * 2048),
                        Matrix(keys + j * kTileBytes + s * 16 * kRowBytes + warpgroup * kRowBytes / 2),
                        s > 0 || j > begin);
          }
        }
        CommitProducts();
        WaitProducts<0>();
        Pin(dq_sums);
        if (lane == 0) Arrive(grads_empty);
        grads_ring.Next();
        if (threadIdx.x % 128 == 0) {
          WaitForStores();
          if (h == g * (int)kGroup && i == 0 && work != blockIdx.x) Arrive(held_empty + 8 * (heads.slot ^ 1));
        }
        SyncThreads(1 + warpgroup);
        const u32 half = halves + warpgroup * (kTileBytes / 2);
        PutTile<kRowBytes / 2>(dq_sums, kScale, kScale, half);
        FenceShared();
        SyncThreads(1 + warpgroup);
        if (threadIdx.x % 128 == 0) {
          StoreBox(dq, half, warpgroup * (int)(kWidth / 2), i * 64, h, b);
          CommitStores();
        }
        __syncwarp();
      }
    }
    // dk and dv lie where keys and values did, once nobody reads these.
    Wait(grads_empty, grads_ring.parity ^ 1);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int j = x == 0 ? warpgroup : 3 - warpgroup;
      if (j >= kTiles) continue;
      PutTile(dk_sums[x], kScale, kScale, keys + j * kTileBytes);
      PutTile(dv_sums[x], 1.0f, 1.0f, values + j * kTileBytes);
    }
    FenceShared();
    SyncThreads(1 + warpgroup);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int j = x == 0 ? warpgroup : 3 - warpgroup;
        if (j >= kTiles) continue;
        StoreTile(dk, keys + j * kTileBytes, kTileBytes, j * 64, g, b);
        StoreTile(dv, values + j * kTileBytes, kTileBytes, j * 64, g, b);
      }
    }
    __syncwarp();
    heads.Next();
  }
  if (threadIdx.x % 128 == 0) WaitForStores();
}
