// Attention in blocks: Dao, "FlashAttention-2" (2023), algorithms 1 and 2. The [T, T] weights exist block by block, and
// blocks that no query sees are skipped.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/attention_layout.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/sgemm.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t unit) { return CeilDiv(a, unit) * unit; }

struct Attention {
  CpuAttentionTiling t;
  AttentionLayout layout;
  float scale, rate, keep;  // keep: 1 / (1 - rate)
  bool causal;
  int64_t window;  // -1: none
  uint32_t key;
  const std::byte *q, *k, *v, *dout, *out;  // The last two: backward alone.
  std::byte *result, *dq, *dk, *dv;         // Forward: result alone.
  float* lse;                               // Written by forward, read by backward.
  const int32_t* rng;                       // Null: no dropout.
  float* workspace;
  VectorMath::Unary exp, log;
  const VectorMath* math;

  int64_t FirstKey(int64_t query) const { return causal && window >= 0 ? std::max<int64_t>(0, query - window) : 0; }
  int64_t LastKey(int64_t query) const { return causal ? query + 1 : t.length; }
};

// A block of scores, [rows, ld] of which `keys` columns hold.
struct Block {
  int64_t batch, head;
  int64_t first_query, rows, first_key, keys;
};

// The columns of row r of the block that its query sees, [first, last), and the whole vectors around them.
struct Columns {
  int64_t first, last, begin, end;
};
MT_CPU_INLINE Columns ColumnsOf(const Attention& a, const Block& block, int64_t r) {
  const int64_t query = block.first_query + r;
  const int64_t first = std::max<int64_t>(a.FirstKey(query) - block.first_key, 0);
  const int64_t last = std::min(a.LastKey(query) - block.first_key, block.keys);
  return {first, last, first / kLanes * kLanes, (last + kLanes - 1) / kLanes * kLanes};
}

// v with `fill` in the lanes of columns [j, j + 16) that the row does not see.
MT_CPU_INLINE F32x16 KeepSeen(const F32x16& v, const Columns& c, int64_t j, float fill) {
  if (__builtin_expect(j >= c.first && j + kLanes <= c.last, 1)) return v;
  constexpr I32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F32x16 low = kLane < static_cast<int32_t>(c.first - j) ? Splat(fill) : v;
  return kLane < static_cast<int32_t>(c.last - j) ? low : Splat(fill);
}

// The random numbers of the columns seen, to uniforms[begin, last).
void DrawUniforms(const Attention& a, const Block& block, int64_t r, const Columns& c, float* uniforms) {
  const UniformPlace place = {.seed_low = static_cast<uint32_t>(a.rng[0]),
                              .seed_high = static_cast<uint32_t>(a.rng[1]),
                              .step = static_cast<uint32_t>(a.rng[2]),
                              .sample = static_cast<uint32_t>(a.rng[3]) + static_cast<uint32_t>(block.batch),
                              .key = a.key};
  const int64_t row = (block.head * a.t.length + block.first_query + r) * a.t.length + block.first_key;
  a.math->uniform(uniforms + c.begin, place, row + c.begin, c.last - c.begin);
}

MT_CPU_INLINE void ZeroUnseen(float* row, const Columns& c, int64_t keys) {
  std::memset(row, 0, static_cast<size_t>(c.begin) * sizeof(float));
  if (c.end < keys) std::memset(row + c.end, 0, static_cast<size_t>(keys - c.end) * sizeof(float));
}

// Numbers of the rows of a block of queries.
struct Statistics {
  float *max, *sum;           // Of the scaled scores so far, and of e^(score - max).
  float *shrink, *block_sum;  // Forward. Backward: max is the log-sum-exp and sum that of dout out.
};

// Scores to weights e^(scale score - max), with dropout, where max is the largest score of the row so far. max is
// brought up to date; shrink = old max - new max, block_sum that of the weights before dropout.
MT_CPU_CLONES void SoftmaxBlock(const Attention& a, const Block& block, float* scores, const Statistics& statistics,
                                float* uniforms) {
  for (int64_t r = 0; r < block.rows; ++r) {
    float* row = scores + r * a.t.keys;
    const Columns c = ColumnsOf(a, block, r);
    statistics.shrink[r] = statistics.block_sum[r] = 0;
    if (c.first >= c.last) {
      std::memset(row, 0, static_cast<size_t>(block.keys) * sizeof(float));
      continue;
    }
    F32x16 largest = Splat(kLowest);
    for (int64_t j = c.begin; j < c.end; j += kLanes) {
      const F32x16 v = KeepSeen(Load(row + j) * a.scale, c, j, kLowest);
      Store(row + j, v);
      largest = Larger(v, largest);
    }
    const float before = statistics.max[r], now = std::max(before, Largest(largest));
    for (int64_t j = c.begin; j < c.end; j += kLanes) Store(row + j, Load(row + j) - now);
    a.exp(row + c.begin, row + c.begin, c.end - c.begin);
    F32x16 sum = Splat(0);
    for (int64_t j = c.begin; j < c.end; j += kLanes) sum += Load(row + j);
    statistics.max[r] = now;
    statistics.shrink[r] = before - now;
    statistics.block_sum[r] = Sum(sum);
    if (a.rng != nullptr) {
      DrawUniforms(a, block, r, c, uniforms);
      for (int64_t j = c.begin; j < c.end; j += kLanes) {
        Store(row + j, Load(uniforms + j) < a.rate ? Splat(0) : Load(row + j) * a.keep);
      }
    }
    ZeroUnseen(row, c, block.keys);
  }
}

// Scores to weights p with dropout, products dout v^T to the scores' gradients scale p (dropout(product) - sum).
MT_CPU_CLONES void SoftmaxBackwardBlock(const Attention& a, const Block& block, float* scores, float* products,
                                        const Statistics& statistics, float* uniforms) {
  for (int64_t r = 0; r < block.rows; ++r) {
    float *row = scores + r * a.t.keys, *product = products + r * a.t.keys;
    const Columns c = ColumnsOf(a, block, r);
    if (c.first >= c.last) {
      std::memset(row, 0, static_cast<size_t>(block.keys) * sizeof(float));
      std::memset(product, 0, static_cast<size_t>(block.keys) * sizeof(float));
      continue;
    }
    const float lse = statistics.max[r], sum = statistics.sum[r];
    for (int64_t j = c.begin; j < c.end; j += kLanes) {
      Store(row + j, KeepSeen(Load(row + j) * a.scale - lse, c, j, kLowest));
    }
    a.exp(row + c.begin, row + c.begin, c.end - c.begin);
    if (a.rng != nullptr) {
      DrawUniforms(a, block, r, c, uniforms);
      for (int64_t j = c.begin; j < c.end; j += kLanes) {
        const F32x16 p = Load(row + j), keep = Load(uniforms + j) < a.rate ? Splat(0) : Splat(a.keep);
        Store(product + j, KeepSeen(a.scale * p * (Load(product + j) * keep - sum), c, j, 0));
        Store(row + j, p * keep);
      }
    } else {
      for (int64_t j = c.begin; j < c.end; j += kLanes) {
        Store(product + j, KeepSeen(a.scale * Load(row + j) * (Load(product + j) - sum), c, j, 0));
      }
    }
    ZeroUnseen(row, c, block.keys);
    ZeroUnseen(product, c, block.keys);
  }
}

// rows [n, width] *= factors [n]
MT_CPU_CLONES void ScaleRows(float* rows, const float* factors, int64_t n, int64_t width) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < width; ++i) rows[r * width + i] *= factors[r];
  }
}

// n rows of f32, `stride` elements from one to the next.
struct Rows {
  const float* data;
  int64_t stride;
};

// dots [n] = the sum of a b over each row
MT_CPU_CLONES void RowDots(const Rows& a, const Rows& b, int64_t n, int64_t width, float* dots) {
  for (int64_t r = 0; r < n; ++r) {
    F32x16 sum = Splat(0);
    for (int64_t i = 0; i < width; i += kLanes) {
      sum += LoadBlock(a.data + r * a.stride + i, width - i) * LoadBlock(b.data + r * b.stride + i, width - i);
    }
    dots[r] = Sum(sum);
  }
}

// Rows of an operand, from element `first` on, as f32: in place, or widened into `scratch`.
Rows Widened(const Attention& a, const std::byte* data, int64_t first, int64_t stride, int64_t rows, float* scratch) {
  const int64_t width = a.t.width, bytes = ByteSize(a.layout.dtype);
  if (a.t.f32) return {reinterpret_cast<const float*>(data) + first, stride};
  const auto load = a.math->load[static_cast<size_t>(a.layout.dtype)];
  data += first * bytes;
  if (stride == width) {
    load(scratch, data, rows * width);
  } else {
    for (int64_t r = 0; r < rows; ++r) load(scratch + r * width, data + r * stride * bytes, width);
  }
  return {scratch, width};
}
// The other way; `from` has rows of the head's width.
void Round(const Attention& a, const float* from, std::byte* data, int64_t first, int64_t stride, int64_t rows) {
  const int64_t width = a.t.width, bytes = ByteSize(a.layout.dtype);
  const auto store = a.math->store[static_cast<size_t>(a.layout.dtype)];
  data += first * bytes;
  if (stride == width) {
    store(data, from, rows * width);
  } else {
    for (int64_t r = 0; r < rows; ++r) store(data + r * stride * bytes, from + r * width, width);
  }
}

// Of all queries of a unit; `at` moves to a block of them.
Statistics StatisticsOf(const Attention& a, float* scratch) {
  float* const at = scratch + a.t.statistics;
  float* const factors = scratch + a.t.factors;
  return {at, at + RoundUp(a.t.chunk, kLanes), factors, factors + RoundUp(a.t.queries, kLanes)};
}
Statistics At(const Statistics& s, int64_t query) { return {s.max + query, s.sum + query, s.shrink, s.block_sum}; }

// The right factor of a product: [depth, cols], or, transposed, [cols, depth]; packed once for several products where
// there are kernels for that.
struct Right {
  Rows rows;
  bool transposed;
  const float* packed;
  int64_t depth;
};
Right PackRight(const Rows& rows, bool transposed, int64_t depth, int64_t cols, float* packed) {
  if (!HasSgemmKernels()) return {rows, transposed, nullptr, depth};
  PackCols(rows.data, rows.stride, transposed, cols, depth, packed);
  return {rows, transposed, packed, depth};
}

// c [rows, cols] = a b, or c + a b.
void Multiply(const Rows& a, bool transpose_a, const Right& b, int64_t rows, int64_t cols, int64_t depth, bool keep,
              float* c, int64_t ldc) {
  RunSgemm({.transpose_a = transpose_a,
            .transpose_b = b.transposed,
            .rows = rows,
            .cols = cols,
            .depth = depth,
            .a = a.data,
            .lda = a.stride,
            .b = b.rows.data,
            .ldb = b.rows.stride,
            .beta = keep ? 1.0f : 0.0f,
            .c = c,
            .ldc = ldc,
            .packed_b = b.packed,
            .packed_depth = b.depth});
}

// A block of queries against one of keys.
struct Visit {
  bool empty, is_first;  // None of them sees any; the first block of keys that they see.
  int64_t keys;          // That any of them sees.
};
Visit VisitOf(const Attention& a, const Block& block) {
  const int64_t first = a.FirstKey(block.first_query) / a.t.keys * a.t.keys;
  const int64_t last = a.LastKey(block.first_query + block.rows - 1);
  return {block.first_key < first || block.first_key >= last, block.first_key == first,
          std::min(a.t.keys, last - block.first_key)};
}

// out and lse of one chunk of queries of one head.
void RunForward(const Attention& a, int64_t unit, float* scratch) {
  const CpuAttentionTiling& t = a.t;
  const int64_t chunks = CeilDiv(t.length, t.chunk), pair = unit / chunks;
  const int64_t first = unit % chunks * t.chunk, queries = std::min(t.chunk, t.length - first);
  Block block{.batch = pair / t.heads, .head = pair % t.heads};
  const HeadStrides &of_q = a.layout.q_strides, &of_kv = a.layout.kv_strides, &of_out = a.layout.out_strides;
  const int64_t first_kv = of_kv.At(block.batch, block.head / a.layout.group(), 0);
  const Statistics of_chunk = StatisticsOf(a, scratch);
  float *scores = scratch + t.scores, *out = scratch + t.sums;
  std::fill_n(of_chunk.max, queries, kLowest);
  std::fill_n(of_chunk.sum, queries, 0.0f);
  const int64_t last_key = a.LastKey(first + queries - 1);
  for (int64_t key = a.FirstKey(first) / t.keys * t.keys; key < last_key; key += t.keys) {
    const int64_t keys = std::min(t.keys, last_key - key), at = first_kv + of_kv.row * key;
    const Right k = PackRight(Widened(a, a.k, at, of_kv.row, keys, scratch + t.k), /*transposed=*/true, t.width, keys,
                              scratch + t.packed_keys);
    const Right v = PackRight(Widened(a, a.v, at, of_kv.row, keys, scratch + t.v), /*transposed=*/false, keys, t.width,
                              scratch + t.packed_values);
    block.first_key = key;
    for (int64_t query = 0; query < queries; query += t.queries) {
      block.first_query = first + query;
      block.rows = std::min(t.queries, queries - query);
      const Visit visit = VisitOf(a, block);
      if (visit.empty) continue;
      block.keys = visit.keys;
      const Rows q =
          Widened(a, a.q, of_q.At(block.batch, block.head, block.first_query), of_q.row, block.rows, scratch + t.q);
      const Statistics s = At(of_chunk, query);
      float* const sums = out + query * t.width;
      Multiply(q, false, k, block.rows, block.keys, t.width, /*keep=*/false, scores, t.keys);
      SoftmaxBlock(a, block, scores, s, scratch + t.uniforms);
      if (!visit.is_first) {
        a.exp(s.shrink, s.shrink, block.rows);
        ScaleRows(sums, s.shrink, block.rows, t.width);
      }
      for (int64_t r = 0; r < block.rows; ++r) {
        s.sum[r] = visit.is_first ? s.block_sum[r] : s.sum[r] * s.shrink[r] + s.block_sum[r];
      }
      Multiply({scores, t.keys}, false, v, block.rows, t.width, block.keys, !visit.is_first, sums, t.width);
    }
  }
  float* const lse = a.lse + a.layout.Query(block.batch, block.head, first);
  for (int64_t query = 0; query < queries; query += t.queries) {
    const int64_t rows = std::min(t.queries, queries - query);
    const Statistics s = At(of_chunk, query);
    for (int64_t r = 0; r < rows; ++r) s.shrink[r] = 1.0f / s.sum[r];
    ScaleRows(out + query * t.width, s.shrink, rows, t.width);
  }
  Round(a, out, a.result, of_out.At(block.batch, block.head, first), of_out.row, queries);
  a.log(of_chunk.sum, of_chunk.sum, queries);
  for (int64_t r = 0; r < queries; ++r) lse[r] = of_chunk.max[r] + of_chunk.sum[r];
}

// dq of the heads that share a key-value head, and its dk and dv, summed over heads and queries in order.
void RunBackward(const Attention& a, int64_t unit, float* scratch) {
  const CpuAttentionTiling& t = a.t;
  const HeadStrides &of_q = a.layout.q_strides, &of_kv = a.layout.kv_strides, &of_out = a.layout.out_strides;
  const int64_t group = a.layout.group(), first_kv = of_kv.At(unit / t.kv_heads, unit % t.kv_heads, 0);
  const Statistics of_unit = StatisticsOf(a, scratch);
  float *scores = scratch + t.scores, *products = scratch + t.products, *dk = scratch + t.dk, *dv = scratch + t.dv;
  const int64_t dq_row = t.f32 ? of_q.row : t.width;
  Block block{.batch = unit / t.kv_heads};
  // Calls body for each block of queries of each head with its first query among those of the unit.
  const auto for_queries = [&](const auto& body) {
    for (int64_t member = 0; member < group; ++member) {
      block.head = unit % t.kv_heads * group + member;
      for (block.first_query = 0; block.first_query < t.length; block.first_query += t.queries) {
        block.rows = std::min(t.queries, t.length - block.first_query);
        body(member * t.length + block.first_query);
      }
    }
  };
  const auto of_block = [&](const std::byte* data, const HeadStrides& strides, float* widened) {
    const int64_t first = strides.At(block.batch, block.head, block.first_query);
    return Widened(a, data, first, strides.row, block.rows, widened);
  };
  for_queries([&](int64_t query) {
    const Rows out = of_block(a.out, of_out, scratch + t.q), dout = of_block(a.dout, of_out, scratch + t.dout);
    RowDots(dout, out, block.rows, t.width, of_unit.sum + query);
    const float* lse = a.lse + a.layout.Query(block.batch, block.head, block.first_query);
    std::copy_n(lse, block.rows, of_unit.max + query);
  });
  for (int64_t key = 0; key < t.length; key += t.keys) {
    const int64_t keys = std::min(t.keys, t.length - key), at = first_kv + of_kv.row * key;
    std::fill_n(dk, keys * t.width, 0.0f);
    std::fill_n(dv, keys * t.width, 0.0f);
    const Rows k_rows = Widened(a, a.k, at, of_kv.row, keys, scratch + t.k);
    const Rows v_rows = Widened(a, a.v, at, of_kv.row, keys, scratch + t.v);
    const Right k_across = PackRight(k_rows, /*transposed=*/true, t.width, keys, scratch + t.packed_keys);
    const Right v_across = PackRight(v_rows, /*transposed=*/true, t.width, keys, scratch + t.packed_values);
    const Right k = PackRight(k_rows, /*transposed=*/false, keys, t.width, scratch + t.packed_rows);
    block.first_key = key;
    for_queries([&](int64_t query) {
      const Visit visit = VisitOf(a, block);
      if (visit.empty) return;
      block.keys = visit.keys;
      const Rows q = of_block(a.q, of_q, scratch + t.q), dout = of_block(a.dout, of_out, scratch + t.dout);
      Multiply(q, false, k_across, block.rows, block.keys, t.width, /*keep=*/false, scores, t.keys);
      Multiply(dout, false, v_across, block.rows, block.keys, t.width, /*keep=*/false, products, t.keys);
      SoftmaxBackwardBlock(a, block, scores, products, At(of_unit, query), scratch + t.uniforms);
      float* const dq = t.f32 ? reinterpret_cast<float*>(a.dq) + of_q.At(block.batch, block.head, block.first_query)
                              : scratch + t.sums + query * t.width;
      Multiply({products, t.keys}, false, k, block.rows, t.width, block.keys, !visit.is_first, dq, dq_row);
      const Right dout_right = PackRight(dout, /*transposed=*/false, block.rows, t.width, scratch + t.packed_dout);
      const Right q_right = PackRight(q, /*transposed=*/false, block.rows, t.width, scratch + t.packed_queries);
      Multiply({scores, t.keys}, true, dout_right, block.keys, t.width, block.rows, /*keep=*/true, dv, t.width);
      Multiply({products, t.keys}, true, q_right, block.keys, t.width, block.rows, /*keep=*/true, dk, t.width);
    });
    Round(a, dk, a.dk, at, of_kv.row, keys);
    Round(a, dv, a.dv, at, of_kv.row, keys);
  }
  if (t.f32) return;
  for_queries([&](int64_t query) {
    const int64_t first = of_q.At(block.batch, block.head, block.first_query);
    Round(a, scratch + t.sums + query * t.width, a.dq, first, of_q.row, block.rows);
  });
}

absl::StatusOr<Thunk> Bind(const KernelCall& call, ThreadPool& pool, bool backward) {
  std::vector<TensorType> types;
  for (const Tensor& operand : call.operands) types.push_back(operand.type);
  const AttentionLayout layout = LayoutOfAttention(types, call.attrs, backward);
  if (!IsStorage(layout.dtype)) {
    return absl::UnimplementedError(
        absl::StrCat("the cpu backend has no ", call.op->name, " for ", DTypeName(layout.dtype)));
  }
  if (std::max({layout.length, layout.width, layout.q_strides.row}) > std::numeric_limits<int32_t>::max()) {
    return absl::UnimplementedError(
        absl::StrCat("the cpu backend has no ", call.op->name, " with a dimension over 2^31"));
  }
  // The `part`-th of q, k and v, or of their gradients, which start at tensors[first].
  const auto part = [&](absl::Span<const Tensor> tensors, int first, int part, int64_t offset) {
    return tensors[static_cast<size_t>(first + (layout.packed ? 0 : part))].data + offset * ByteSize(layout.dtype);
  };
  RETURN_IF_ERROR(LoadBlas());
  ReserveBlasBuffers(pool.num_threads());
  const VectorMath& math = BestVectorMath();
  const double rate = call.attrs.Double("rate");
  Attention a = {.t = TileCpuAttention(layout, backward),
                 .layout = layout,
                 .scale = static_cast<float>(call.attrs.Double("scale")),
                 .rate = static_cast<float>(rate),
                 .keep = static_cast<float>(1.0 / (1.0 - rate)),
                 .causal = call.attrs.Bool("causal"),
                 .window = call.attrs.Int("window"),
                 .key = static_cast<uint32_t>(call.attrs.Int("key")),
                 .q = part(call.operands, layout.first_operand, 0, 0),
                 .k = part(call.operands, layout.first_operand, 1, layout.k_offset),
                 .v = part(call.operands, layout.first_operand, 2, layout.v_offset),
                 .rng = rate > 0 ? call.operands.back().as<int32_t>() : nullptr,
                 .workspace = reinterpret_cast<float*>(call.workspace),
                 .exp = math.unary[static_cast<size_t>(Prim::kExp)],
                 .log = math.unary[static_cast<size_t>(Prim::kLog)],
                 .math = &math};
  if (backward) {
    a.dout = call.operands[0].data;
    a.out = call.operands[static_cast<size_t>(layout.statistics)].data;
    a.lse = call.operands[static_cast<size_t>(layout.statistics) + 1].as<float>();
    a.dq = part(call.results, 0, 0, 0);
    a.dk = part(call.results, 0, 1, layout.k_offset);
    a.dv = part(call.results, 0, 2, layout.v_offset);
  } else {
    a.result = call.results[0].data;
    a.lse = call.results[1].as<float>();
  }
  return ParallelThunk(pool, a.t.slots, [a](int64_t slot) {
    float* scratch = a.workspace + slot * a.t.slot_bytes / ByteSize(DType::kF32);
    const int64_t end = (slot + 1) * a.t.units / a.t.slots;
    for (int64_t unit = slot * a.t.units / a.t.slots; unit < end; ++unit) {
      a.t.backward ? RunBackward(a, unit, scratch) : RunForward(a, unit, scratch);
    }
  });
}

absl::StatusOr<Thunk> BindForward(const KernelCall& call, ThreadPool& pool) { return Bind(call, pool, false); }
absl::StatusOr<Thunk> BindBackward(const KernelCall& call, ThreadPool& pool) { return Bind(call, pool, true); }

constexpr CpuKernel kKernels[] = {{"flash_attention", BindForward},
                                  {"flash_attention_backward", BindBackward},
                                  {"flash_attention_packed", BindForward},
                                  {"flash_attention_packed_backward", BindBackward}};

}  // namespace

absl::Span<const CpuKernel> CpuAttentionKernels() { return kKernels; }

}  // namespace mt
