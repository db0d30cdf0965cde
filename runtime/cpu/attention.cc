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

Statistics StatisticsOf(const Attention& a, float* scratch) {
  const int64_t n = RoundUp(a.t.queries, kLanes);
  float* at = scratch + a.t.statistics;
  return {at, at + n, at + 2 * n, at + 3 * n};
}

// out and lse of one block of queries of one head.
void RunForward(const Attention& a, int64_t unit, float* scratch) {
  const CpuAttentionTiling& t = a.t;
  const int64_t blocks = CeilDiv(t.length, t.queries), pair = unit / blocks;
  Block block{.batch = pair / t.heads, .head = pair % t.heads};
  block.first_query = unit % blocks * t.queries;
  block.rows = std::min(t.queries, t.length - block.first_query);
  const HeadStrides &of_q = a.layout.q_strides, &of_kv = a.layout.kv_strides, &of_out = a.layout.out_strides;
  const int64_t first_kv = of_kv.At(block.batch, block.head / a.layout.group(), 0);
  const int64_t last_key = a.LastKey(block.first_query + block.rows - 1);
  const Statistics s = StatisticsOf(a, scratch);
  float *scores = scratch + t.scores, *sums = scratch + t.sums;
  const Rows q =
      Widened(a, a.q, of_q.At(block.batch, block.head, block.first_query), of_q.row, block.rows, scratch + t.q);
  std::fill_n(s.max, block.rows, kLowest);
  std::fill_n(s.sum, block.rows, 0.0f);
  bool is_first = true;
  for (int64_t key = a.FirstKey(block.first_query); key < last_key; key += t.keys) {
    block.first_key = key;
    block.keys = std::min(t.keys, last_key - key);
    const Rows k = Widened(a, a.k, first_kv + of_kv.row * key, of_kv.row, block.keys, scratch + t.k);
    const Rows v = Widened(a, a.v, first_kv + of_kv.row * key, of_kv.row, block.keys, scratch + t.v);
    RunSgemm({.transpose_b = true,
              .rows = block.rows,
              .cols = block.keys,
              .depth = t.width,
              .a = q.data,
              .lda = q.stride,
              .b = k.data,
              .ldb = k.stride,
              .c = scores,
              .ldc = t.keys});
    SoftmaxBlock(a, block, scores, s, scratch + t.uniforms);
    if (!is_first) {
      a.exp(s.shrink, s.shrink, block.rows);
      ScaleRows(sums, s.shrink, block.rows, t.width);
    }
    for (int64_t r = 0; r < block.rows; ++r) {
      s.sum[r] = is_first ? s.block_sum[r] : s.sum[r] * s.shrink[r] + s.block_sum[r];
    }
    RunSgemm({.rows = block.rows,
              .cols = t.width,
              .depth = block.keys,
              .a = scores,
              .lda = t.keys,
              .b = v.data,
              .ldb = v.stride,
              .beta = is_first ? 0.0f : 1.0f,
              .c = sums,
              .ldc = t.width});
    is_first = false;
  }
  for (int64_t r = 0; r < block.rows; ++r) s.shrink[r] = 1.0f / s.sum[r];
  ScaleRows(sums, s.shrink, block.rows, t.width);
  Round(a, sums, a.result, of_out.At(block.batch, block.head, block.first_query), of_out.row, block.rows);
  a.log(s.sum, s.sum, block.rows);
  float* lse = a.lse + a.layout.Query(block.batch, block.head, block.first_query);
  for (int64_t r = 0; r < block.rows; ++r) lse[r] = s.max[r] + s.sum[r];
}

// dq of the heads that share a key-value head, and its dk and dv, summed over heads and queries in order.
void RunBackward(const Attention& a, int64_t unit, float* scratch) {
  const CpuAttentionTiling& t = a.t;
  const HeadStrides &of_q = a.layout.q_strides, &of_kv = a.layout.kv_strides, &of_out = a.layout.out_strides;
  const int64_t group = a.layout.group(), first_kv = of_kv.At(unit / t.kv_heads, unit % t.kv_heads, 0);
  const Statistics s = StatisticsOf(a, scratch);
  float *scores = scratch + t.scores, *products = scratch + t.products;
  float* dk = t.f32 ? reinterpret_cast<float*>(a.dk) + first_kv : scratch + t.dk;
  float* dv = t.f32 ? reinterpret_cast<float*>(a.dv) + first_kv : scratch + t.dv;
  const int64_t dkv_row = t.f32 ? of_kv.row : t.width;
  for (int64_t key = 0; key < t.length; ++key) {
    std::fill_n(dk + key * dkv_row, t.width, 0.0f);
    std::fill_n(dv + key * dkv_row, t.width, 0.0f);
  }
  Block block{.batch = unit / t.kv_heads};
  for (int64_t member = 0; member < group; ++member) {
    block.head = unit % t.kv_heads * group + member;
    for (block.first_query = 0; block.first_query < t.length; block.first_query += t.queries) {
      block.rows = std::min(t.queries, t.length - block.first_query);
      const int64_t first_q = of_q.At(block.batch, block.head, block.first_query);
      const int64_t first_out = of_out.At(block.batch, block.head, block.first_query);
      const int64_t last_key = a.LastKey(block.first_query + block.rows - 1);
      float* dq = t.f32 ? reinterpret_cast<float*>(a.dq) + first_q : scratch + t.sums;
      const Rows dout = Widened(a, a.dout, first_out, of_out.row, block.rows, scratch + t.dout);
      const Rows out = Widened(a, a.out, first_out, of_out.row, block.rows, scratch + t.q);
      RowDots(dout, out, block.rows, t.width, s.sum);
      const Rows q = Widened(a, a.q, first_q, of_q.row, block.rows, scratch + t.q);
      std::copy_n(a.lse + a.layout.Query(block.batch, block.head, block.first_query), block.rows, s.max);
      float beta = 0;
      for (int64_t key = a.FirstKey(block.first_query); key < last_key; key += t.keys) {
        block.first_key = key;
        block.keys = std::min(t.keys, last_key - key);
        const Rows k = Widened(a, a.k, first_kv + of_kv.row * key, of_kv.row, block.keys, scratch + t.k);
        const Rows v = Widened(a, a.v, first_kv + of_kv.row * key, of_kv.row, block.keys, scratch + t.v);
        Sgemm of_scores{.transpose_b = true, .rows = block.rows, .cols = block.keys, .depth = t.width};
        of_scores.ldc = t.keys;
        of_scores.a = q.data;
        of_scores.lda = q.stride;
        of_scores.b = k.data;
        of_scores.ldb = k.stride;
        of_scores.c = scores;
        RunSgemm(of_scores);
        of_scores.a = dout.data;
        of_scores.lda = dout.stride;
        of_scores.b = v.data;
        of_scores.c = products;
        RunSgemm(of_scores);
        SoftmaxBackwardBlock(a, block, scores, products, s, scratch + t.uniforms);
        RunSgemm({.rows = block.rows,
                  .cols = t.width,
                  .depth = block.keys,
                  .a = products,
                  .lda = t.keys,
                  .b = k.data,
                  .ldb = k.stride,
                  .beta = beta,
                  .c = dq,
                  .ldc = t.f32 ? of_q.row : t.width});
        beta = 1;
        Sgemm of_keys{.transpose_a = true, .rows = block.keys, .cols = t.width, .depth = block.rows};
        of_keys.lda = t.keys;
        of_keys.ldc = dkv_row;
        of_keys.beta = 1;
        of_keys.a = scores;
        of_keys.b = dout.data;
        of_keys.ldb = dout.stride;
        of_keys.c = dv + key * dkv_row;
        RunSgemm(of_keys);
        of_keys.a = products;
        of_keys.b = q.data;
        of_keys.ldb = q.stride;
        of_keys.c = dk + key * dkv_row;
        RunSgemm(of_keys);
      }
      if (!t.f32) Round(a, dq, a.dq, first_q, of_q.row, block.rows);
    }
  }
  if (t.f32) return;
  Round(a, dk, a.dk, first_kv, of_kv.row, t.length);
  Round(a, dv, a.dv, first_kv, of_kv.row, t.length);
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
