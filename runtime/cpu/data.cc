// Kernels that move data or reduce it: shapes, heads, reductions, embeddings, positions, the norm of all gradients.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/simd.h"

namespace mt {
namespace {

constexpr int64_t kElementsPerTask = int64_t{32} << 10;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Indices = absl::InlinedVector<int64_t, 8>;

Indices StridesOf(absl::Span<const int64_t> dims) {
  Indices strides(dims.size(), 1);
  for (size_t d = dims.size(); d-- > 1;) strides[d - 1] = strides[d] * dims[d];
  return strides;
}

absl::Status Unsupported(const KernelCall& call, DType dtype) {
  return absl::UnimplementedError(absl::StrCat("the cpu backend has no ", call.op->name, " for ", DTypeName(dtype)));
}

// One task list made of several; the tasks of all run in one go.
struct Tasks {
  struct Part {
    int64_t count;
    std::function<void(int64_t)> run;
  };
  std::vector<Part> parts;

  void Add(int64_t count, std::function<void(int64_t)> run) { parts.push_back({count, std::move(run)}); }
  Thunk Bind(ThreadPool& pool) && {
    if (parts.size() == 1) return ParallelThunk(pool, parts[0].count, std::move(parts[0].run));
    int64_t total = 0;
    for (const Part& part : parts) total += part.count;
    auto shared = std::make_shared<const std::vector<Part>>(std::move(parts));
    return ParallelThunk(pool, total, [shared](int64_t task) {
      size_t i = 0;
      for (; task >= (*shared)[i].count; ++i) task -= (*shared)[i].count;
      (*shared)[i].run(task);
    });
  }
};

// --- Strided copies: every op that only moves elements.

// to[sum i_d to_strides[d]] = from[sum i_d from_strides[d]] for all i; strides in elements; a from_stride of 0 repeats.
struct StridedCopy {
  const std::byte* from;
  std::byte* to;
  int64_t element_bytes;
  Indices dims, from_strides, to_strides;
};

// Drops dimensions of 1 and merges neighbours that are contiguous on both sides; at least one dimension is left.
void Simplify(StridedCopy& copy) {
  Indices dims, from, to;
  for (size_t d = 0; d < copy.dims.size(); ++d) {
    if (copy.dims[d] == 1) continue;
    if (!dims.empty() && from.back() == copy.from_strides[d] * copy.dims[d] &&
        to.back() == copy.to_strides[d] * copy.dims[d]) {
      dims.back() *= copy.dims[d];
      from.back() = copy.from_strides[d];
      to.back() = copy.to_strides[d];
    } else {
      dims.push_back(copy.dims[d]);
      from.push_back(copy.from_strides[d]);
      to.push_back(copy.to_strides[d]);
    }
  }
  if (dims.empty()) {
    dims = {1};
    from = {1};
    to = {1};
  }
  copy.dims = std::move(dims);
  copy.from_strides = std::move(from);
  copy.to_strides = std::move(to);
}

// Calls f(from offset, to offset) for the outer indices [begin, end) of `copy` without its last `inner` dimensions.
template <typename F>
void ForEachOuter(const StridedCopy& copy, size_t inner, int64_t begin, int64_t end, F f) {
  const size_t outer = copy.dims.size() - inner;
  int64_t index[kMaxRank + 2];
  int64_t from = 0, to = 0, rest = begin;
  for (size_t d = outer; d-- > 0;) {
    index[d] = rest % copy.dims[d];
    rest /= copy.dims[d];
    from += index[d] * copy.from_strides[d];
    to += index[d] * copy.to_strides[d];
  }
  for (int64_t i = begin; i < end; ++i) {
    f(from, to);
    for (size_t d = outer; d-- > 0;) {
      from += copy.from_strides[d];
      to += copy.to_strides[d];
      if (++index[d] < copy.dims[d]) break;
      from -= copy.dims[d] * copy.from_strides[d];
      to -= copy.dims[d] * copy.to_strides[d];
      index[d] = 0;
    }
  }
}

constexpr int64_t kTile = 32;

// The last two dimensions are a transpose: from_strides {1, s}, to_strides {t, 1}.
template <typename E>
void TransposeTile(const E* from, int64_t s, E* to, int64_t t, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[i * t + j] = from[i + j * s];
  }
}

template <typename E>
void AddCopyTasks(StridedCopy copy, Tasks& tasks) {
  const auto outer_count = [&](size_t inner) {
    int64_t n = 1;
    for (size_t d = 0; d + inner < copy.dims.size(); ++d) n *= copy.dims[d];
    return n;
  };
  const size_t last = copy.dims.size() - 1;
  const auto unit = std::find(copy.from_strides.begin(), copy.from_strides.end(), 1);
  if (copy.from_strides[last] > 1 && copy.to_strides[last] == 1 && unit != copy.from_strides.end()) {
    // The dimension that is contiguous in `from` goes to the last place but one.
    for (size_t d = static_cast<size_t>(unit - copy.from_strides.begin()); d + 1 < last; ++d) {
      std::swap(copy.dims[d], copy.dims[d + 1]);
      std::swap(copy.from_strides[d], copy.from_strides[d + 1]);
      std::swap(copy.to_strides[d], copy.to_strides[d + 1]);
    }
    const int64_t rows = copy.dims[last - 1], columns = copy.dims[last];
    const int64_t strips = CeilDiv(rows, kTile);  // A task is a strip of tiles.
    tasks.Add(outer_count(2) * strips, [copy, rows, columns, strips, last](int64_t task) {
      const int64_t outer = task / strips, i = task % strips * kTile;
      ForEachOuter(copy, 2, outer, outer + 1, [&](int64_t from, int64_t to) {
        const E* source = reinterpret_cast<const E*>(copy.from) + from + i;
        E* target = reinterpret_cast<E*>(copy.to) + to + i * copy.to_strides[last - 1];
        for (int64_t j = 0; j < columns; j += kTile) {
          TransposeTile(source + j * copy.from_strides[last], copy.from_strides[last], target + j,
                        copy.to_strides[last - 1], std::min(kTile, rows - i), std::min(kTile, columns - j));
        }
      });
    });
    return;
  }
  const int64_t n = copy.dims[last], segment = std::min(n, kElementsPerTask), segments = CeilDiv(n, segment);
  const int64_t outer = outer_count(1), per_task = segments > 1 ? 1 : std::max<int64_t>(1, kElementsPerTask / n);
  tasks.Add(CeilDiv(outer, per_task) * segments, [copy, n, segment, segments, outer, per_task, last](int64_t task) {
    const int64_t begin = task / segments * per_task, j = task % segments * segment, m = std::min(segment, n - j);
    const int64_t step = copy.from_strides[last], to_step = copy.to_strides[last];
    ForEachOuter(copy, 1, begin, std::min(outer, begin + per_task), [&](int64_t from, int64_t to) {
      const E* source = reinterpret_cast<const E*>(copy.from) + from + j * step;
      E* target = reinterpret_cast<E*>(copy.to) + to + j * to_step;
      if (step == 1 && to_step == 1) {
        std::memcpy(target, source, static_cast<size_t>(m) * sizeof(E));
      } else if (step == 0 && to_step == 1) {
        std::fill_n(target, m, *source);
      } else {
        for (int64_t k = 0; k < m; ++k) target[k * to_step] = source[k * step];
      }
    });
  });
}

void AddCopy(StridedCopy copy, Tasks& tasks) {
  Simplify(copy);
  switch (copy.element_bytes) {
    case 1:
      return AddCopyTasks<uint8_t>(std::move(copy), tasks);
    case 2:
      return AddCopyTasks<uint16_t>(std::move(copy), tasks);
    case 4:
      return AddCopyTasks<uint32_t>(std::move(copy), tasks);
    default:
      return AddCopyTasks<uint64_t>(std::move(copy), tasks);
  }
}

// Copies the box of `dims` between two tensors, each with its strides and an offset in elements.
void AddBox(const Tensor& from, const Indices& from_strides, int64_t from_offset, const Tensor& to,
            const Indices& to_strides, int64_t to_offset, absl::Span<const int64_t> dims, Tasks& tasks) {
  const int64_t bytes = ByteSize(from.type.dtype);
  AddCopy({.from = from.data + from_offset * bytes,
           .to = to.data + to_offset * bytes,
           .element_bytes = bytes,
           .dims = Indices(dims.begin(), dims.end()),
           .from_strides = from_strides,
           .to_strides = to_strides},
          tasks);
}

absl::StatusOr<Thunk> BindTranspose(const KernelCall& call, ThreadPool& pool) {
  const Tensor &x = call.operands[0], &y = call.results[0];
  const Indices strides = StridesOf(x.type.dims);
  Indices permuted;
  for (const int64_t p : call.attrs.Get<IntList>("perm")) permuted.push_back(strides[static_cast<size_t>(p)]);
  Tasks tasks;
  AddBox(x, permuted, 0, y, StridesOf(y.type.dims), 0, y.type.dims, tasks);
  return std::move(tasks).Bind(pool);
}

absl::StatusOr<Thunk> BindSlice(const KernelCall& call, ThreadPool& pool) {
  const Tensor &x = call.operands[0], &y = call.results[0];
  const Indices strides = StridesOf(x.type.dims);
  Tasks tasks;
  AddBox(x, strides, call.attrs.Int("start") * strides[static_cast<size_t>(call.attrs.Int("dim"))], y,
         StridesOf(y.type.dims), 0, y.type.dims, tasks);
  return std::move(tasks).Bind(pool);
}

// Zeros the box of `dims` of `to`.
void AddZeros(const Tensor& to, const Indices& to_strides, int64_t to_offset, absl::Span<const int64_t> dims,
              Tasks& tasks) {
  alignas(8) static constexpr std::byte kZero[8] = {};
  Tensor zero = {const_cast<std::byte*>(kZero), to.type};
  AddBox(zero, Indices(dims.size(), 0), 0, to, to_strides, to_offset, dims, tasks);
}

absl::StatusOr<Thunk> BindPad(const KernelCall& call, ThreadPool& pool) {
  const Tensor &x = call.operands[0], &y = call.results[0];
  const size_t dim = static_cast<size_t>(call.attrs.Int("dim"));
  const int64_t before = call.attrs.Int("before"), after = call.attrs.Int("after");
  const Indices strides = StridesOf(y.type.dims);
  Tasks tasks;
  AddBox(x, StridesOf(x.type.dims), 0, y, strides, before * strides[dim], x.type.dims, tasks);
  Dims edge = y.type.dims;
  if (before > 0) {
    edge[dim] = before;
    AddZeros(y, strides, 0, edge, tasks);
  }
  if (after > 0) {
    edge[dim] = after;
    AddZeros(y, strides, (before + x.type.dims[dim]) * strides[dim], edge, tasks);
  }
  return std::move(tasks).Bind(pool);
}

absl::StatusOr<Thunk> BindConcat(const KernelCall& call, ThreadPool& pool) {
  const Tensor& y = call.results[0];
  const size_t dim = static_cast<size_t>(call.attrs.Int("dim"));
  const Indices strides = StridesOf(y.type.dims);
  Tasks tasks;
  int64_t before = 0;
  for (const Tensor& x : call.operands) {
    AddBox(x, StridesOf(x.type.dims), 0, y, strides, before * strides[dim], x.type.dims, tasks);
    before += x.type.dims[dim];
  }
  return std::move(tasks).Bind(pool);
}

absl::StatusOr<Thunk> BindBroadcast(const KernelCall& call, ThreadPool& pool) {
  const Tensor &x = call.operands[0], &y = call.results[0];
  const Indices own = StridesOf(x.type.dims);
  Indices strides(y.type.dims.size(), 0);
  const size_t missing = strides.size() - own.size();
  for (size_t d = 0; d < own.size(); ++d) {
    if (x.type.dims[d] != 1) strides[missing + d] = own[d];
  }
  Tasks tasks;
  AddBox(x, strides, 0, y, StridesOf(y.type.dims), 0, y.type.dims, tasks);
  return std::move(tasks).Bind(pool);
}

// Copies between heads [B, H, T, D] and columns from first_head * D of rows [B, T, width].
void AddHeads(const Tensor& heads, const Tensor& rows, int64_t first_head, bool to_heads, Tasks& tasks) {
  const int64_t t = heads.type.dim(2), d = heads.type.dim(3), width = rows.type.dim(2);
  const Indices of_rows = {t * width, d, width, 1}, of_heads = StridesOf(heads.type.dims);
  if (to_heads) {
    AddBox(rows, of_rows, first_head * d, heads, of_heads, 0, heads.type.dims, tasks);
  } else {
    AddBox(heads, of_heads, 0, rows, of_rows, first_head * d, heads.type.dims, tasks);
  }
}

absl::StatusOr<Thunk> BindToHeads(const KernelCall& call, ThreadPool& pool) {
  Tasks tasks;
  int64_t first_head = 0;
  for (const Tensor& heads : call.results) {
    AddHeads(heads, call.operands[0], first_head, true, tasks);
    first_head += heads.type.dim(1);
  }
  return std::move(tasks).Bind(pool);
}

absl::StatusOr<Thunk> BindFromHeads(const KernelCall& call, ThreadPool& pool) {
  Tasks tasks;
  int64_t first_head = 0;
  for (const Tensor& heads : call.operands) {
    AddHeads(heads, call.results[0], first_head, false, tasks);
    first_head += heads.type.dim(1);
  }
  return std::move(tasks).Bind(pool);
}

// --- Reductions.

enum class Fold { kSum, kMean, kMax };

struct ReduceArgs {
  const std::byte* x;
  std::byte* y;
  Fold fold;
  int64_t outer, reduced, inner;  // x [outer, reduced, inner], y [outer, inner].
  int64_t rows_per_task;          // inner == 1
  int64_t column_tasks;           // inner > 1: tasks for each outer index
};

template <bool kMax>
MT_CPU_INLINE F32x16 Combine(const F32x16& a, const F32x16& b) {
  return kMax ? Larger(a, b) : a + b;
}
template <bool kMax>
constexpr float kStart = kMax ? -std::numeric_limits<float>::infinity() : 0.0f;

// Both foldings of a template NAME<T, kMax>.
#define MT_REDUCE_KERNELS(Name)                                     \
  template <typename T>                                             \
  MT_CPU_INLINE void Name##Sum(const ReduceArgs& a, int64_t task) { \
    Name<T, false>(a, task);                                        \
  }                                                                 \
  template <typename T>                                             \
  MT_CPU_INLINE void Name##Max(const ReduceArgs& a, int64_t task) { \
    Name<T, true>(a, task);                                         \
  }                                                                 \
  MT_STORAGE_KERNELS(Name##Sum, ReduceArgs)                         \
  MT_STORAGE_KERNELS(Name##Max, ReduceArgs)

// Over the last dimension: a lane each 16th element.
template <typename T, bool kMax>
MT_CPU_INLINE void ReduceRows(const ReduceArgs& a, int64_t task) {
  const int64_t end = std::min(a.outer, (task + 1) * a.rows_per_task);
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x) + r * a.reduced;
    F32x16 folded = Splat(kStart<kMax>);
    for (int64_t j = 0; j < a.reduced; j += kLanes) {
      folded = Combine<kMax>(folded, LoadBlock(x + j, a.reduced - j, kStart<kMax>));
    }
    float y = kMax ? Largest(folded) : Sum(folded);
    if (a.fold == Fold::kMean) y /= static_cast<float>(a.reduced);
    StoreOne(reinterpret_cast<T*>(a.y) + r, y);
  }
}
MT_REDUCE_KERNELS(ReduceRows)

constexpr int64_t kColumnBlocks = 4;
constexpr int64_t kColumns = kColumnBlocks * kLanes;  // Columns of a task.

// Over a dimension that is not the last: the rows of a chunk one after another, the chunks in a tree, as a binary
// counter. Chunks and tree are those of all column sums (CpuRowChunks, AddChunks).
template <typename T, bool kMax>
MT_CPU_INLINE void ReduceColumns(const ReduceArgs& a, int64_t task) {
  const int64_t begin = task % a.column_tasks * kColumns, columns = std::min(kColumns, a.inner - begin);
  const T* x = reinterpret_cast<const T*>(a.x) + task / a.column_tasks * a.reduced * a.inner + begin;
  T* y = reinterpret_cast<T*>(a.y) + task / a.column_tasks * a.inner + begin;
  F32x16 levels[8][kColumnBlocks];  // levels[k]: the fold of 2^k chunks that waits for its neighbour.
  F32x16 folded[kColumnBlocks];
  const int64_t chunk_rows = CpuRowChunks(a.reduced).rows;
  int64_t chunk = 0;
  for (int64_t r = 0; r < a.reduced; r += chunk_rows, ++chunk) {
    for (int64_t b = 0; b < kColumnBlocks; ++b) folded[b] = Splat(kStart<kMax>);
    const int64_t end = std::min(a.reduced, r + chunk_rows);
    if (columns == kColumns) {
      for (int64_t i = r; i < end; ++i) {
        for (int64_t b = 0; b < kColumnBlocks; ++b) {
          folded[b] = Combine<kMax>(folded[b], Load(x + i * a.inner + b * kLanes));
        }
      }
    } else {
      for (int64_t i = r; i < end; ++i) {
        for (int64_t b = 0; b * kLanes < columns; ++b) {
          folded[b] = Combine<kMax>(folded[b], LoadBlock(x + i * a.inner + b * kLanes, columns - b * kLanes));
        }
      }
    }
    int64_t level = 0;
    for (; (chunk >> level & 1) != 0; ++level) {
      for (int64_t b = 0; b < kColumnBlocks; ++b) folded[b] = Combine<kMax>(levels[level][b], folded[b]);
    }
    for (int64_t b = 0; b < kColumnBlocks; ++b) levels[level][b] = folded[b];
  }
  bool first = true;
  for (int64_t level = 0; chunk >> level != 0; ++level) {
    if ((chunk >> level & 1) == 0) continue;
    for (int64_t b = 0; b < kColumnBlocks; ++b) {
      folded[b] = first ? levels[level][b] : Combine<kMax>(levels[level][b], folded[b]);
    }
    first = false;
  }
  for (int64_t b = 0; b * kLanes < columns; ++b) {
    if (a.fold == Fold::kMean) folded[b] /= static_cast<float>(a.reduced);
    StoreBlock(y + b * kLanes, folded[b], columns - b * kLanes);
  }
}
MT_REDUCE_KERNELS(ReduceColumns)

// Dimensions that are reduced and kept in turns: an element of y after another, in f64.
struct ScatteredReduce {
  const std::byte* x;
  std::byte* y;
  Fold fold;
  StridedCopy kept, reduced;  // Only dims and from_strides are read.
  int64_t count, reduced_count;
};
template <typename T>
void ReduceScattered(const ScatteredReduce& a, int64_t task) {
  const T* x = reinterpret_cast<const T*>(a.x);
  const int64_t begin = task * 256;
  int64_t at = begin;
  ForEachOuter(a.kept, 0, begin, std::min(a.count, begin + 256), [&](int64_t base, int64_t) {
    double folded = a.fold == Fold::kMax ? -std::numeric_limits<double>::infinity() : 0.0;
    ForEachOuter(a.reduced, 0, 0, a.reduced_count, [&](int64_t offset, int64_t) {
      const double v = static_cast<double>(LoadOne(x + base + offset));
      folded = a.fold == Fold::kMax ? std::max(folded, v) : folded + v;
    });
    if (a.fold == Fold::kMean) folded /= static_cast<double>(a.reduced_count);
    StoreOne(reinterpret_cast<T*>(a.y) + at++, static_cast<float>(folded));
  });
}

constexpr StorageKernels<void (*)(const ScatteredReduce&, int64_t)> kReduceScattered = {
    ReduceScattered<float>, ReduceScattered<BF16Bits>, ReduceScattered<F16Bits>};

absl::StatusOr<Thunk> BindReduce(const KernelCall& call, ThreadPool& pool, Fold fold) {
  const Tensor &x = call.operands[0], &y = call.results[0];
  const DType dtype = x.type.dtype;
  if (!IsStorage(dtype)) return Unsupported(call, dtype);
  // Neighbouring dimensions of one kind are one; those of size 1 are none.
  std::vector<std::pair<int64_t, bool>> groups;  // Size, reduced.
  for (size_t d = 0; d < x.type.dims.size(); ++d) {
    const IntList& dims = call.attrs.Get<IntList>("dims");
    const bool reduced = std::find(dims.begin(), dims.end(), static_cast<int64_t>(d)) != dims.end();
    if (x.type.dims[d] == 1) continue;
    if (!groups.empty() && groups.back().second == reduced) {
      groups.back().first *= x.type.dims[d];
    } else {
      groups.push_back({x.type.dims[d], reduced});
    }
  }
  int64_t reduced_groups = 0;
  for (const auto& [size, reduced] : groups) reduced_groups += reduced ? 1 : 0;
  if (reduced_groups <= 1) {
    ReduceArgs args = {.x = x.data,
                       .y = y.data,
                       .fold = fold,
                       .outer = 1,
                       .reduced = 1,
                       .inner = 1,
                       .rows_per_task = 1,
                       .column_tasks = 1};
    for (const auto& [size, reduced] : groups) {
      (reduced ? args.reduced : args.reduced > 1 ? args.inner : args.outer) = size;
    }
    if (args.inner == 1) {
      args.rows_per_task = std::max<int64_t>(1, kElementsPerTask / args.reduced);
      const auto kernel = (fold == Fold::kMax ? ReduceRowsMaxKernels : ReduceRowsSumKernels).Of(dtype);
      return ParallelThunk(pool, CeilDiv(args.outer, args.rows_per_task),
                           [args, kernel](int64_t task) { kernel(args, task); });
    }
    args.column_tasks = CeilDiv(args.inner, kColumns);
    const auto kernel = (fold == Fold::kMax ? ReduceColumnsMaxKernels : ReduceColumnsSumKernels).Of(dtype);
    return ParallelThunk(pool, args.outer * args.column_tasks, [args, kernel](int64_t task) { kernel(args, task); });
  }
  ScatteredReduce args = {
      .x = x.data, .y = y.data, .fold = fold, .kept = {}, .reduced = {}, .count = 1, .reduced_count = 1};
  Indices sizes;
  for (const auto& [size, reduced] : groups) sizes.push_back(size);
  const Indices strides = StridesOf(sizes);
  for (size_t g = 0; g < groups.size(); ++g) {
    StridedCopy& part = groups[g].second ? args.reduced : args.kept;
    part.dims.push_back(groups[g].first);
    part.from_strides.push_back(strides[g]);
    part.to_strides.push_back(0);
    (groups[g].second ? args.reduced_count : args.count) *= groups[g].first;
  }
  const auto kernel = kReduceScattered.Of(dtype);
  return ParallelThunk(pool, CeilDiv(args.count, 256), [args, kernel](int64_t task) { kernel(args, task); });
}

absl::StatusOr<Thunk> BindReduceSum(const KernelCall& call, ThreadPool& pool) {
  return BindReduce(call, pool, Fold::kSum);
}
absl::StatusOr<Thunk> BindReduceMean(const KernelCall& call, ThreadPool& pool) {
  return BindReduce(call, pool, Fold::kMean);
}
absl::StatusOr<Thunk> BindReduceMax(const KernelCall& call, ThreadPool& pool) {
  return BindReduce(call, pool, Fold::kMax);
}

// --- Embedding.

absl::StatusOr<Thunk> BindEmbedding(const KernelCall& call, ThreadPool& pool) {
  const Tensor& table = call.operands[0];
  const int64_t row_bytes = table.type.dim(1) * ByteSize(table.type.dtype);
  const int64_t n = call.operands[1].type.num_elements(), rows = table.type.dim(0);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / table.type.dim(1));
  return ParallelThunk(pool, CeilDiv(n, per_task),
                       [from = table.data, to = call.results[0].data, ids = call.operands[1].as<int32_t>(), row_bytes,
                        n, rows, per_task](int64_t task) {
                         const size_t bytes = static_cast<size_t>(row_bytes);
                         for (int64_t i = task * per_task; i < std::min(n, (task + 1) * per_task); ++i) {
                           if (0 <= ids[i] && ids[i] < rows) {
                             std::memcpy(to + i * row_bytes, from + ids[i] * row_bytes, bytes);
                           } else {
                             std::memset(to + i * row_bytes, 0xff, bytes);  // NaN: there is no such row.
                           }
                         }
                       });
}

struct EmbeddingBackwardArgs {
  const std::byte* dy;
  const int32_t *ids, *order;
  const std::byte* accumulator;  // Null: none. Else of the result's dtype.
  std::byte* dtable;
  DType result;
  int64_t positions, vocab, width, vocab_per_task;
};

// The rows of a range of ids; each is summed in `order`, whichever task has it.
template <typename T>
MT_CPU_INLINE void EmbeddingBackward(const EmbeddingBackwardArgs& a, int64_t task) {
  const int64_t begin = task * a.vocab_per_task, end = std::min(a.vocab, begin + a.vocab_per_task), n = a.width;
  const int64_t result_bytes = a.result == DType::kF32 ? 4 : 2;
  // What is no position has no id of the table: nothing beside the operands is read, whatever they hold.
  const auto id_at = [&](int64_t k) -> int64_t {
    return 0 <= a.order[k] && a.order[k] < a.positions ? a.ids[a.order[k]] : a.vocab;
  };
  int64_t low = 0, high = a.positions;  // The first place in `order` with an id >= begin.
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (id_at(middle) < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool in_place = a.accumulator == a.dtable;
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = low;
    while (low < a.positions && id_at(low) == v) ++low;
    std::byte* to = a.dtable + v * n * result_bytes;
    if (low == first) {
      if (a.accumulator == nullptr) {
        std::memset(to, 0, static_cast<size_t>(n * result_bytes));
      } else if (!in_place) {
        std::memcpy(to, a.accumulator + v * n * result_bytes, static_cast<size_t>(n * result_bytes));
      }
      continue;
    }
    const FloatPointer earlier = {a.accumulator == nullptr ? nullptr : a.accumulator + v * n * result_bytes, a.result};
    for (int64_t j = 0; j < n; j += kLanes) {
      F32x16 sum = Splat(0);
      for (int64_t k = first; k < low; ++k) {
        sum += LoadBlock(reinterpret_cast<const T*>(a.dy) + a.order[k] * n + j, n - j);
      }
      if (a.accumulator != nullptr) sum = earlier.Block(j, n - j) + sum;
      StoreBlockAs(to, a.result, j, sum, n - j);
    }
  }
}
MT_STORAGE_KERNELS(EmbeddingBackward, EmbeddingBackwardArgs)

absl::StatusOr<Thunk> BindEmbeddingBackward(const KernelCall& call, ThreadPool& pool) {
  const DType dy = call.operands[0].type.dtype, result = call.results[0].type.dtype;
  for (const DType dtype : {dy, result}) {
    if (!IsStorage(dtype)) return Unsupported(call, dtype);
  }
  const int64_t vocab = call.results[0].type.dim(0), width = call.results[0].type.dim(1);
  const EmbeddingBackwardArgs args = {
      .dy = call.operands[0].data,
      .ids = call.operands[1].as<int32_t>(),
      .order = call.operands[2].as<int32_t>(),
      .accumulator = call.attrs.Bool("accumulator") ? call.operands[3].data : nullptr,
      .dtable = call.results[0].data,
      .result = result,
      .positions = call.operands[1].type.num_elements(),
      .vocab = vocab,
      .width = width,
      // A character's row may have thousands of positions: no more than a 64th of the table in one task.
      .vocab_per_task = std::max<int64_t>(1, std::min(kElementsPerTask / width, vocab / 64))};
  const auto kernel = EmbeddingBackwardKernels.Of(dy);
  return ParallelThunk(pool, CeilDiv(vocab, args.vocab_per_task), [args, kernel](int64_t task) { kernel(args, task); });
}

// --- Positions. Angles t * frequency in f64: exact at every 16th t, turned by one frequency in between.

constexpr int64_t kTurns = 16;

struct Frequency {
  double value, cos, sin;
};

// theta^(-2i / width) for i in [0, count).
std::shared_ptr<const std::vector<Frequency>> Frequencies(double theta, int64_t width, int64_t count) {
  auto frequencies = std::make_shared<std::vector<Frequency>>();
  for (int64_t i = 0; i < count; ++i) {
    const double f = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(width));
    frequencies->push_back({f, std::cos(f), std::sin(f)});
  }
  return frequencies;
}

// Calls f(k, cos, sin) for the angles (t + k) * frequency, k in [0, n).
template <typename F>
MT_CPU_INLINE void Turn(const Frequency& frequency, int64_t t, int64_t n, F f) {
  double c = std::cos(static_cast<double>(t) * frequency.value), s = std::sin(static_cast<double>(t) * frequency.value);
  for (int64_t k = 0; k < n; ++k) {
    f(k, static_cast<float>(c), static_cast<float>(s));
    const double next = c * frequency.cos - s * frequency.sin;
    s = s * frequency.cos + c * frequency.sin;
    c = next;
  }
}

// cos and sin of t * frequency, the bits that Turn gives for t among others.
MT_CPU_INLINE void TurnTo(const Frequency& frequency, int64_t t, float* cos, float* sin) {
  Turn(frequency, t / kTurns * kTurns, t % kTurns + 1, [&](int64_t, float c, float s) {
    *cos = c;
    *sin = s;
  });
}

// The operand "position", or null.
const int32_t* PositionOf(const KernelCall& call) {
  return call.attrs.Bool("position") ? call.operands.back().as<int32_t>() : nullptr;
}

absl::StatusOr<Thunk> BindSinusoid(const KernelCall& call, ThreadPool& pool) {
  const int64_t length = call.attrs.Int("length"), width = call.attrs.Int("width");
  if (const int32_t* position = PositionOf(call)) {
    return ParallelThunk(pool, length,
                         [y = call.results[0].as<float>(), width, position,
                          frequencies = Frequencies(10000.0, width, CeilDiv(width, 2))](int64_t t) {
                           for (int64_t j = 0; j < width; j += 2) {
                             float c, s;
                             TurnTo((*frequencies)[static_cast<size_t>(j / 2)], *position + t, &c, &s);
                             y[t * width + j] = s;
                             if (j + 1 < width) y[t * width + j + 1] = c;
                           }
                         });
  }
  return ParallelThunk(pool, CeilDiv(length, kTurns),
                       [y = call.results[0].as<float>(), length, width,
                        frequencies = Frequencies(10000.0, width, CeilDiv(width, 2))](int64_t task) {
                         const int64_t t = task * kTurns, n = std::min(kTurns, length - t);
                         for (int64_t j = 0; j < width; j += 2) {
                           Turn((*frequencies)[static_cast<size_t>(j / 2)], t, n, [&](int64_t k, float c, float s) {
                             y[(t + k) * width + j] = s;
                             if (j + 1 < width) y[(t + k) * width + j + 1] = c;
                           });
                         }
                       });
}

constexpr int64_t kPairs = 64;  // Pairs whose angles are kept at a time.

struct RopeArgs {
  const std::byte* x;
  std::byte* y;
  int64_t outer, length, half;  // x [outer, length, 2 half]
  bool inverse, interleaved;
  const Frequency* frequencies;  // [half]
  const int32_t* position;       // Of row 0; null: 0.
};

// Rotates the pairs [first, first + n) of one row.
template <typename T>
MT_CPU_INLINE void RotateRow(const T* x, T* y, const float* cos, const float* sin, int64_t half, int64_t first,
                             int64_t n, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = 2 * (first + i);
      const float a = LoadOne(x + at), b = LoadOne(x + at + 1);
      StoreOne(y + at, a * cos[i] - b * sin[i]);
      StoreOne(y + at + 1, b * cos[i] + a * sin[i]);
    }
    return;
  }
  x += first;
  y += first;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32x16 a = LoadBlock(x + i, n - i), b = LoadBlock(x + half + i, n - i);
    const F32x16 c = Load(cos + i), s = Load(sin + i);
    StoreBlock(y + i, a * c - b * s, n - i);
    StoreBlock(y + half + i, b * c + a * s, n - i);
  }
}

// A task: 16 positions of every row block.
template <typename T>
MT_CPU_INLINE void Rope(const RopeArgs& a, int64_t task) {
  const int64_t t = task * kTurns, positions = std::min(kTurns, a.length - t);
  float cos[kTurns][kPairs], sin[kTurns][kPairs];
  for (int64_t first = 0; first < a.half; first += kPairs) {
    const int64_t n = std::min(kPairs, a.half - first);
    for (int64_t i = 0; i < kPairs; ++i) {
      if (i >= n) {  // Lanes that are loaded and not stored.
        for (int64_t k = 0; k < positions; ++k) cos[k][i] = sin[k][i] = 0;
        continue;
      }
      if (a.position != nullptr) {
        for (int64_t k = 0; k < positions; ++k) {
          TurnTo(a.frequencies[first + i], *a.position + t + k, &cos[k][i], &sin[k][i]);
          if (a.inverse) sin[k][i] = -sin[k][i];
        }
        continue;
      }
      Turn(a.frequencies[first + i], t, positions, [&](int64_t k, float c, float s) {
        cos[k][i] = c;
        sin[k][i] = a.inverse ? -s : s;
      });
    }
    for (int64_t o = 0; o < a.outer; ++o) {
      for (int64_t k = 0; k < positions; ++k) {
        const int64_t at = (o * a.length + t + k) * 2 * a.half;
        RotateRow(reinterpret_cast<const T*>(a.x) + at, reinterpret_cast<T*>(a.y) + at, cos[k], sin[k], a.half, first,
                  n, a.interleaved);
      }
    }
  }
}
MT_STORAGE_KERNELS(Rope, RopeArgs)

absl::StatusOr<Thunk> BindRope(const KernelCall& call, ThreadPool& pool) {
  const TensorType& type = call.operands[0].type;
  const auto kernel = RopeKernels.Of(type.dtype);
  if (kernel == nullptr) return Unsupported(call, type.dtype);
  const auto frequencies = Frequencies(call.attrs.Double("theta"), type.dim(-1), type.dim(-1) / 2);
  const RopeArgs args = {.x = call.operands[0].data,
                         .y = call.results[0].data,
                         .outer = type.num_elements() / (type.dim(-1) * type.dim(-2)),
                         .length = type.dim(-2),
                         .half = type.dim(-1) / 2,
                         .inverse = call.attrs.Bool("inverse"),
                         .interleaved = call.attrs.Bool("interleaved"),
                         .frequencies = frequencies->data(),
                         .position = PositionOf(call)};
  return ParallelThunk(pool, CeilDiv(args.length, kTurns),
                       [args, kernel, frequencies](int64_t task) { kernel(args, task); });
}

// --- The norm of all gradients.

struct NormChunk {
  const std::byte* data;
  int64_t count;
  double* sum;
};

using F64x8 = double __attribute__((vector_size(64)));

// Squares are summed in f64: they may pass the range of f32.
template <typename T>
MT_CPU_INLINE void SumOfSquares(const NormChunk& chunk, int64_t) {
  const T* x = reinterpret_cast<const T*>(chunk.data);
  const int64_t n = chunk.count;
  F64x8 sum[2] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32x16 v = LoadBlock(x + j, n - j);
    const F64x8 low = __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), F64x8);
    const F64x8 high = __builtin_convertvector(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15), F64x8);
    sum[0] += low * low;
    sum[1] += high * high;
  }
  const F64x8 both = sum[0] + sum[1];
  *chunk.sum = ((both[0] + both[4]) + (both[2] + both[6])) + ((both[1] + both[5]) + (both[3] + both[7]));
}
MT_STORAGE_KERNELS(SumOfSquares, NormChunk)

absl::StatusOr<Thunk> BindGlobalNorm(const KernelCall& call, ThreadPool& pool) {
  struct Part {
    NormChunk chunk;
    void (*run)(const NormChunk&, int64_t);
  };
  auto parts = std::make_shared<std::vector<Part>>();
  double* sums = reinterpret_cast<double*>(call.workspace);
  for (const Tensor& g : call.operands) {
    const auto kernel = SumOfSquaresKernels.Of(g.type.dtype);
    if (kernel == nullptr) return Unsupported(call, g.type.dtype);
    const int64_t n = g.type.num_elements();
    for (int64_t at = 0; at < n; at += kCpuNormChunk) {
      parts->push_back({.chunk = {.data = g.data + at * ByteSize(g.type.dtype),
                                  .count = std::min(kCpuNormChunk, n - at),
                                  .sum = sums + parts->size()},
                        .run = kernel});
    }
  }
  const int64_t count = static_cast<int64_t>(parts->size());
  CHECK_GE(call.workspace_bytes, count * static_cast<int64_t>(sizeof(double))) << call.name;
  const std::function<void(int64_t)> body = [parts](int64_t task) {
    const Part& part = (*parts)[static_cast<size_t>(task)];
    part.run(part.chunk, 0);
  };
  return Thunk([&pool, body, count, sums, norm = call.results[0].as<float>()] {
    pool.Run(count, body);
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += sums[i];
    *norm = static_cast<float>(std::sqrt(total));
  });
}

constexpr CpuKernel kKernels[] = {
    {"transpose", BindTranspose},
    {"slice", BindSlice},
    {"pad", BindPad},
    {"concat", BindConcat},
    {"broadcast", BindBroadcast},
    {"split_heads", BindToHeads},
    {"unmerge_heads", BindToHeads},
    {"join_heads", BindFromHeads},
    {"merge_heads", BindFromHeads},
    {"reduce_sum", BindReduceSum},
    {"reduce_mean", BindReduceMean},
    {"reduce_max", BindReduceMax},
    {"embedding", BindEmbedding},
    {"embedding_backward", BindEmbeddingBackward},
    {"sinusoid", BindSinusoid},
    {"rope", BindRope},
    {"global_norm", BindGlobalNorm},
};

}  // namespace

absl::Span<const CpuKernel> CpuDataKernels() { return kKernels; }

}  // namespace mt
