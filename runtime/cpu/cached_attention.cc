// Attention of one position over cached keys and values, a task for each head.
#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

constexpr int64_t kKeys = 64;  // Scores of a block.

struct Cache {
  const std::byte *row, *before;  // [G, D] of this position; [G, T, D] as it was.
  std::byte* after;
};

struct CachedAttention {
  const std::byte* q;
  std::byte* out;
  Cache k, v;
  const int32_t* position;
  float* sums;                           // [H, D]
  int64_t group, length, width, window;  // H / G, T, D, N
  float scale;
  VectorMath::Unary exp;
};

template <typename T>
MT_CPU_INLINE const T* RowOf(const Cache& cache, int64_t g, int64_t s, int64_t position, const CachedAttention& a) {
  if (s == position) return reinterpret_cast<const T*>(cache.row) + g * a.width;
  return reinterpret_cast<const T*>(cache.before) + (g * a.length + s) * a.width;
}

// Puts the row into the cache of g; other rows are there already where it is written in place.
template <typename T>
MT_CPU_INLINE void Write(const Cache& cache, int64_t g, int64_t position, const CachedAttention& a) {
  const size_t row_bytes = static_cast<size_t>(a.width) * sizeof(T);
  const size_t first = static_cast<size_t>(g * a.length) * row_bytes;
  if (cache.after != cache.before) {
    std::memcpy(cache.after + first, cache.before + first, static_cast<size_t>(a.length) * row_bytes);
  }
  std::memcpy(cache.after + first + static_cast<size_t>(position) * row_bytes,
              cache.row + static_cast<size_t>(g) * row_bytes, row_bytes);
}

// Task: head h of all samples' heads. Heads read the caches as they were, all but row `position`, which is the only one
// that is written in place.
template <typename T>
MT_CPU_INLINE void Cached(const CachedAttention& a, int64_t h) {
  const int64_t position = *a.position, g = h / a.group, d = a.width;
  const int64_t first = a.window < 0 ? 0 : std::max<int64_t>(0, position - a.window);
  const T* q = reinterpret_cast<const T*>(a.q) + h * d;
  float* sums = a.sums + h * d;
  std::fill_n(sums, d, 0.0f);
  float scores[kKeys], largest = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t s0 = first; s0 <= position; s0 += kKeys) {
    const int64_t n = std::min(kKeys, position + 1 - s0);
    float now = largest;
    for (int64_t j = 0; j < n; ++j) {
      const T* k = RowOf<T>(a.k, g, s0 + j, position, a);
      F32x16 dot = Splat(0);
      for (int64_t i = 0; i < d; i += kLanes) dot += LoadBlock(q + i, d - i) * LoadBlock(k + i, d - i);
      scores[j] = Sum(dot) * a.scale;
      now = std::max(now, scores[j]);
    }
    float shrink = largest - now;
    for (int64_t j = 0; j < n; ++j) scores[j] -= now;
    a.exp(&shrink, &shrink, 1);
    a.exp(scores, scores, n);
    largest = now;
    total *= shrink;
    for (int64_t j = 0; j < n; ++j) total += scores[j];
    for (int64_t i = 0; i < d; i += kLanes) {
      F32x16 sum = LoadBlock(sums + i, d - i) * shrink;
      for (int64_t j = 0; j < n; ++j) sum += LoadBlock(RowOf<T>(a.v, g, s0 + j, position, a) + i, d - i) * scores[j];
      StoreBlock(sums + i, sum, d - i);
    }
  }
  T* out = reinterpret_cast<T*>(a.out) + h * d;
  for (int64_t i = 0; i < d; i += kLanes) StoreBlock(out + i, LoadBlock(sums + i, d - i) / total, d - i);
  if (h % a.group != 0) return;
  Write<T>(a.k, g, position, a);
  Write<T>(a.v, g, position, a);
}
MT_STORAGE_KERNELS(Cached, CachedAttention)

absl::StatusOr<Thunk> BindCached(const KernelCall& call, ThreadPool& pool) {
  const TensorType &q = call.operands[0].type, &cache = call.operands[3].type;
  const auto kernel = CachedKernels.Of(q.dtype);
  if (kernel == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("the cpu backend has no ", call.op->name, " for ", DTypeName(q.dtype)));
  }
  const CachedAttention args = {
      .q = call.operands[0].data,
      .out = call.results[0].data,
      .k = {.row = call.operands[1].data, .before = call.operands[3].data, .after = call.results[1].data},
      .v = {.row = call.operands[2].data, .before = call.operands[4].data, .after = call.results[2].data},
      .position = call.operands[5].as<int32_t>(),
      .sums = reinterpret_cast<float*>(call.workspace),
      .group = q.dim(1) / cache.dim(1),
      .length = cache.dim(2),
      .width = cache.dim(3),
      .window = call.attrs.Int("window"),
      .scale = static_cast<float>(call.attrs.Double("scale")),
      .exp = BestVectorMath().unary[static_cast<size_t>(Prim::kExp)]};
  return ParallelThunk(pool, q.dim(0) * q.dim(1), [args, kernel](int64_t head) { kernel(args, head); });
}

constexpr CpuKernel kKernels[] = {{"cached_attention", BindCached}};

}  // namespace

absl::Span<const CpuKernel> CpuCachedAttentionKernels() { return kKernels; }

}  // namespace mt
