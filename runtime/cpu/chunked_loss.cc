// The head matmul and the cross entropy, chunk by chunk, in f32 whatever the operands are stored in.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/gemm.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// Elements whose exponentials are computed at a time, in a buffer that stays in the first cache; a multiple of kLanes.
constexpr int64_t kExpBlock = 512;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A factor of a product: element (i, k) of the matrix is element i * stride + k, or, transposed, k * stride + i, of
// what is stored.
struct Factor {
  const std::byte* data;
  DType dtype;
  int64_t stride;
  bool transposed;

  bool is_f32() const { return dtype == DType::kF32; }
  int64_t At(int64_t i, int64_t k) const { return transposed ? k * stride + i : i * stride + k; }
};

// Rows and columns of a product that one task computes.
struct Tile {
  int64_t row, rows, col, cols;
};

// [rows, cols] at (row, col) of the matrix as f32, in the order it is stored in: widened into `scratch` unless it is.
struct Block {
  const float* data;
  int64_t stride;
};
Block Widen(const Factor& f, int64_t row, int64_t rows, int64_t col, int64_t cols, float* scratch,
            const VectorMath& math) {
  const int64_t at = f.At(row, col);
  if (f.is_f32()) return {reinterpret_cast<const float*>(f.data) + at, f.stride};
  if (f.transposed) std::swap(rows, cols);
  for (int64_t r = 0; r < rows; ++r) {
    math.load[static_cast<size_t>(f.dtype)](scratch + r * cols, f.data + (at + r * f.stride) * ByteSize(f.dtype), cols);
  }
  return {scratch, cols};
}

// c [tile] = a b + beta c, where c points to the tile's first element.
void Multiply(const Factor& a, const Factor& b, int64_t depth, const Tile& tile, float beta, float* c, int64_t ldc,
              float* scratch, const VectorMath& math) {
  using Blocks = CpuMatmulTiling;
  const bool whole = a.is_f32() && b.is_f32();
  const int64_t most_rows = whole ? tile.rows : Blocks::kBlockRows, most_cols = whole ? tile.cols : Blocks::kBlockCols;
  const int64_t most_depth = whole ? depth : Blocks::kBlockDepth;
  float* const scratch_b = scratch + Blocks::kBlockRows * Blocks::kBlockDepth;
  for (int64_t j = 0; j < tile.cols; j += most_cols) {
    const int64_t nj = std::min(most_cols, tile.cols - j);
    for (int64_t k = 0; k < depth; k += most_depth) {
      const int64_t nk = std::min(most_depth, depth - k);
      const Block block_b = Widen(b, k, nk, tile.col + j, nj, scratch_b, math);
      for (int64_t i = 0; i < tile.rows; i += most_rows) {
        const int64_t ni = std::min(most_rows, tile.rows - i);
        const Block block_a = Widen(a, tile.row + i, ni, k, nk, scratch, math);
        RunSgemm({.transpose_a = a.transposed,
                  .transpose_b = b.transposed,
                  .rows = ni,
                  .cols = nj,
                  .depth = nk,
                  .a = block_a.data,
                  .lda = block_a.stride,
                  .b = block_b.data,
                  .ldb = block_b.stride,
                  .beta = k == 0 ? beta : 1.0f,
                  .c = c + i * ldc + j,
                  .ldc = ldc});
      }
    }
  }
}

// The tiles of [rows, depth] x [depth, cols], as a matmul of f32 operands has them.
std::vector<Tile> TilesOf(int64_t rows, int64_t depth, int64_t cols) {
  const TensorType operands[] = {{DType::kF32, {rows, depth}}, {DType::kF32, {depth, cols}}};
  const CpuMatmulTiling t = TileCpuMatmul(operands, {{"transpose_a", false}, {"transpose_b", false}});
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < rows; i += t.tile_rows) {
    for (int64_t j = 0; j < cols; j += t.tile_cols) {
      tiles.push_back({i, std::min(t.tile_rows, rows - i), j, std::min(t.tile_cols, cols - j)});
    }
  }
  return tiles;
}

// The rows of one chunk: losses, and logits overwritten by dlogits.
struct RowsArgs {
  float *logits, *losses;
  const int32_t* labels;
  const float* dloss;  // Null: the loss alone.
  int64_t rows, classes, rows_per_task;
  VectorMath::Unary exp;
};

MT_CPU_CLONES void LossRows(const RowsArgs& a, int64_t task) {
  const int64_t n = a.classes, end = std::min(a.rows, (task + 1) * a.rows_per_task);
  const bool backward = a.dloss != nullptr;
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    float* x = a.logits + r * n;
    const int32_t label = a.labels[r];
    if (label < 0 || label >= n) {
      // A label that is no class makes the loss NaN and reads nothing.
      a.losses[r] = label < 0 ? 0 : std::numeric_limits<float>::quiet_NaN();
      if (backward) std::memset(x, 0, static_cast<size_t>(n) * sizeof(float));
      continue;
    }
    const float at_label = x[label];
    F32x16 largest = Splat(kLowest);
    for (int64_t j = 0; j < n; j += kLanes) largest = Larger(LoadBlock(x + j, n - j, kLowest), largest);
    const float max = Largest(largest);
    F32x16 sum = Splat(0);
    float buffer[kExpBlock];
    for (int64_t at = 0; at < n; at += kExpBlock) {
      const int64_t m = std::min(kExpBlock, n - at);
      int64_t j = 0;
      for (; j < m; j += kLanes) Store(buffer + j, LoadBlock(x + at + j, m - j, kLowest) - max);
      a.exp(buffer, buffer, j);  // Whole vectors: the loop is slow on the rest of one.
      for (int64_t i = m; i < j; ++i) buffer[i] = 0;
      for (j = 0; j < m; j += kLanes) {
        sum += Load(buffer + j);
        if (backward) StoreBlock(x + at + j, Load(buffer + j), m - j);
      }
    }
    const float total = Sum(sum);
    a.losses[r] = max + std::log(total) - at_label;
    if (!backward) continue;
    const float factor = *a.dloss / total;
    for (int64_t j = 0; j < n; j += kLanes) StoreBlock(x + j, LoadBlock(x + j, n - j) * factor, n - j);
    x[label] -= *a.dloss;
  }
}

constexpr int64_t kColumnsPerTask = 256, kRowsPerSum = 64;

// dbias[columns of the task] += column sums of dlogits [rows, classes].
MT_CPU_CLONES void AddColumnSums(const float* dlogits, int64_t rows, int64_t classes, float* dbias, int64_t task) {
  const int64_t end = std::min(classes, (task + 1) * kColumnsPerTask);
  for (int64_t j = task * kColumnsPerTask; j < end; j += kLanes) {
    F32x16 total = LoadBlock(dbias + j, end - j);
    for (int64_t first = 0; first < rows; first += kRowsPerSum) {
      F32x16 sum = Splat(0);
      for (int64_t r = first; r < std::min(rows, first + kRowsPerSum); ++r) {
        sum += LoadBlock(dlogits + r * classes + j, end - j);
      }
      total += sum;
    }
    StoreBlock(dbias + j, total, end - j);
  }
}

// One instruction. Everything is known at load but which chunk is under way.
struct Job {
  CpuChunkedLossTiling t;
  Factor x, w;  // x [rows, width]; w [vocab, width].
  FloatPointer bias;
  std::byte *workspace, *dx;  // dx, dw and dbias are null for the loss alone.
  float *dw, *dbias;
  const float* accumulator;
  float* loss_sum;
  RowsArgs rows_args;  // Of the chunk.
  const int32_t* labels;
  const VectorMath* math;
  // The three products, for chunks of the two lengths there are: the longer ones come first. Of f32 operands, as
  // matmuls compute them; of others, in tiles.
  struct Products {
    std::unique_ptr<Gemm> logits, dx, dw;
  };
  std::array<Products, 2> products;
  std::array<std::vector<Tile>, 2> logits_tiles, dx_tiles, dw_tiles;

  // The chunk under way.
  CpuChunkedLossTiling::Chunk chunk = {0, 0};
  bool is_first = true;
  size_t length = 0;  // 0: as the first chunk.

  float* logits() const { return reinterpret_cast<float*>(workspace + t.logits); }
  float* losses() const { return reinterpret_cast<float*>(workspace + t.losses); }
  float* scratch(int64_t task) const { return reinterpret_cast<float*>(workspace + t.scratch + task * t.tile_bytes); }
  Factor XOfChunk() const { return {x.data + chunk.first * t.width * ByteSize(x.dtype), x.dtype, t.width, false}; }
  Factor Dlogits(bool transposed) const {
    return {reinterpret_cast<const std::byte*>(logits()), DType::kF32, t.classes, transposed};
  }

  // The bias, in this box of the logits.
  void StartLogits(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    float* c = logits() + row * t.classes + col;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        StoreBlock(c + i * t.classes + j, bias.Block(col + j, cols - j), cols - j);
      }
    }
  }

  void Logits(int64_t task) const {
    const Tile& tile = logits_tiles[length][static_cast<size_t>(task)];
    float* c = logits() + tile.row * t.classes + tile.col;
    if (bias.data != nullptr) StartLogits(tile.row, tile.rows, tile.col, tile.cols);
    Multiply(XOfChunk(), {w.data, w.dtype, t.width, true}, t.width, tile, bias.data != nullptr ? 1.0f : 0.0f, c,
             t.classes, scratch(task), *math);
  }

  bool AddsToDw() const { return !is_first || accumulator != nullptr; }

  void Dw(int64_t task) const {
    const Tile& tile = dw_tiles[length][static_cast<size_t>(task)];
    float* c = dw + tile.row * t.width + tile.col;
    Multiply(Dlogits(/*transposed=*/true), XOfChunk(), chunk.rows, tile, AddsToDw() ? 1.0f : 0.0f, c, t.width,
             scratch(task), *math);
  }

  void Dx(int64_t task) const {
    const Tile& tile = dx_tiles[length][static_cast<size_t>(task)];
    const Factor b = {w.data, w.dtype, t.width, false};
    const auto at = [&](int64_t row, int64_t col) { return (chunk.first + row) * t.width + col; };
    if (x.is_f32()) {
      Multiply(Dlogits(false), b, t.classes, tile, 0, reinterpret_cast<float*>(dx) + at(tile.row, tile.col), t.width,
               scratch(task), *math);
      return;
    }
    using Blocks = CpuMatmulTiling;
    float* sum = scratch(task) + Blocks::kBlockRows * Blocks::kBlockDepth + Blocks::kBlockDepth * Blocks::kBlockCols;
    for (int64_t i = 0; i < tile.rows; i += Blocks::kBlockRows) {
      for (int64_t j = 0; j < tile.cols; j += Blocks::kBlockCols) {
        const Tile block = {tile.row + i, std::min(Blocks::kBlockRows, tile.rows - i), tile.col + j,
                            std::min(Blocks::kBlockCols, tile.cols - j)};
        Multiply(Dlogits(false), b, t.classes, block, 0, sum, block.cols, scratch(task), *math);
        for (int64_t r = 0; r < block.rows; ++r) {
          math->store[static_cast<size_t>(x.dtype)](dx + at(block.row + r, block.col) * ByteSize(x.dtype),
                                                    sum + r * block.cols, block.cols);
        }
      }
    }
  }

  bool in_panels() const { return x.is_f32() && w.is_f32() && t.workspace_bytes > t.scratch; }

  void MakeProducts(ThreadPool& pool, int64_t rows, bool backward, Products& to) const {
    Gemm::Start bias_start;
    if (bias.data != nullptr) {
      bias_start = [this](int64_t row, int64_t n, int64_t col, int64_t cols) { StartLogits(row, n, col, cols); };
    }
    to.logits = std::make_unique<Gemm>(pool,
                                       Gemm::Shape{.rows = rows,
                                                   .cols = t.classes,
                                                   .depth = t.width,
                                                   .transpose_b = true,
                                                   .lda = t.width,
                                                   .ldb = t.width,
                                                   .ldc = t.classes},
                                       /*bias=*/nullptr, std::move(bias_start));
    if (!backward) return;
    to.dw = std::make_unique<Gemm>(pool, Gemm::Shape{.rows = t.classes,
                                                     .cols = t.width,
                                                     .depth = rows,
                                                     .transpose_a = true,
                                                     .lda = t.classes,
                                                     .ldb = t.width,
                                                     .ldc = t.width});
    to.dx = std::make_unique<Gemm>(
        pool, Gemm::Shape{
                  .rows = rows, .cols = t.width, .depth = t.classes, .lda = t.classes, .ldb = t.width, .ldc = t.width});
  }
  float* panels() const { return scratch(0); }
  const float* XRows() const { return reinterpret_cast<const float*>(x.data) + chunk.first * t.width; }
  const float* W() const { return reinterpret_cast<const float*>(w.data); }
  void RunLogits() const { products[length].logits->Run(XRows(), W(), /*keep=*/false, logits(), panels()); }
  void RunDw() const { products[length].dw->Run(logits(), XRows(), AddsToDw(), dw, panels()); }
  void RunDx() const {
    float* const to = reinterpret_cast<float*>(dx) + chunk.first * t.width;
    products[length].dx->Run(logits(), W(), /*keep=*/false, to, panels());
  }

  // Padding has no gradient, but what the accumulator brings.
  void StartGradients() {
    if (accumulator == nullptr) {
      std::fill_n(dw + t.classes * t.width, (t.vocab - t.classes) * t.width, 0.0f);
    } else if (accumulator != dw) {
      std::copy_n(accumulator, t.vocab * t.width, dw);
    }
    if (dbias != nullptr) std::fill_n(dbias, t.vocab, 0.0f);
  }

  // As softmax_cross_entropy sums, whatever the chunks.
  void SumLosses() const {
    const RowChunks sums = CpuRowChunks(t.rows);
    double total = 0;
    for (int64_t first = 0; first < t.rows; first += sums.rows) {
      double sum = 0;
      for (int64_t r = first; r < std::min(t.rows, first + sums.rows); ++r) sum += static_cast<double>(losses()[r]);
      total += sum;
    }
    *loss_sum = static_cast<float>(total);
  }
};

absl::StatusOr<Thunk> BindChunkedLoss(const KernelCall& call, ThreadPool& pool, bool backward, bool has_bias) {
  RETURN_IF_ERROR(LoadBlas());
  ReserveBlasBuffers(pool.num_threads());
  const TensorType &x = call.operands[0].type, &w = call.operands[1].type;
  const size_t bias_at = backward ? 4 : 3;
  if (!IsStorage(x.dtype) || (has_bias && !IsStorage(call.operands[bias_at].type.dtype))) {
    return absl::UnimplementedError(absl::StrCat("no ", DTypeName(x.dtype), " ", call.op->name, " on the cpu"));
  }
  auto job = std::make_shared<Job>();
  const CpuChunkedLossTiling t = TileCpuChunkedLoss(x, w, call.attrs);
  if (std::max({t.chunk_rows, t.vocab, t.width}) > std::numeric_limits<int>::max()) {
    return absl::UnimplementedError("a matmul with a dimension over 2^31 on the cpu");
  }
  CHECK_GE(call.workspace_bytes, t.workspace_bytes) << call.name;
  job->t = t;
  job->x = {call.operands[0].data, x.dtype, t.width, false};
  job->w = {call.operands[1].data, w.dtype, t.width, false};
  job->labels = call.operands[2].as<int32_t>();
  if (has_bias) job->bias = {call.operands[bias_at].data, call.operands[bias_at].type.dtype};
  job->workspace = call.workspace;
  job->loss_sum = call.results[backward ? 2 : 0].as<float>();
  job->dx = backward ? call.results[1].data : nullptr;
  job->dw = backward ? call.results[0].as<float>() : nullptr;
  job->dbias = backward && has_bias ? call.results[3].as<float>() : nullptr;
  job->accumulator = backward && call.attrs.Bool("accumulator") ? call.operands.back().as<float>() : nullptr;
  job->math = &BestVectorMath();
  job->rows_args = {.logits = job->logits(),
                    .losses = nullptr,
                    .labels = nullptr,
                    .dloss = backward ? call.operands[3].as<float>() : nullptr,
                    .rows = 0,
                    .classes = t.classes,
                    .rows_per_task = std::max<int64_t>(1, (int64_t{32} << 10) / t.classes),
                    .exp = job->math->unary[static_cast<size_t>(Prim::kExp)]};
  for (size_t length = 0; length < 2; ++length) {
    const int64_t rows = t.At(length == 0 ? 0 : t.chunks - 1).rows;
    if (job->in_panels()) {
      job->MakeProducts(pool, rows, backward, job->products[length]);
      continue;
    }
    job->logits_tiles[length] = TilesOf(rows, t.width, t.classes);
    if (!backward) continue;
    job->dw_tiles[length] = TilesOf(t.classes, rows, t.width);
    job->dx_tiles[length] = TilesOf(rows, t.classes, t.width);
  }
  using Body = std::function<void(int64_t)>;
  Job* const j = job.get();
  const Body logits = [job](int64_t task) { job->Logits(task); };
  const Body rows = [j](int64_t task) { LossRows(j->rows_args, task); };
  const Body dw = [j](int64_t task) { j->Dw(task); };
  const Body dx = [j](int64_t task) { j->Dx(task); };
  const Body dbias = [j](int64_t task) { AddColumnSums(j->logits(), j->chunk.rows, j->t.classes, j->dbias, task); };
  return Thunk([j, &pool, backward, logits, rows, dw, dx, dbias] {
    const auto count = [](const std::vector<Tile>& tiles) { return static_cast<int64_t>(tiles.size()); };
    if (backward) j->StartGradients();
    const int64_t longest = j->t.At(0).rows;
    for (int64_t c = 0; c < j->t.chunks; ++c) {
      j->chunk = j->t.At(c);
      j->is_first = c == 0;
      j->length = j->chunk.rows == longest ? 0 : 1;
      if (j->in_panels()) {
        j->RunLogits();
      } else {
        pool.Run(count(j->logits_tiles[j->length]), logits);
      }
      j->rows_args.losses = j->losses() + j->chunk.first;
      j->rows_args.labels = j->labels + j->chunk.first;
      j->rows_args.rows = j->chunk.rows;
      pool.Run(CeilDiv(j->chunk.rows, j->rows_args.rows_per_task), rows);
      if (!backward) continue;
      // dx may be x: its rows of this chunk are read for the last time here.
      if (j->in_panels()) {
        j->RunDw();
      } else {
        pool.Run(count(j->dw_tiles[j->length]), dw);
      }
      if (j->dbias != nullptr) pool.Run(CeilDiv(j->t.classes, kColumnsPerTask), dbias);
      if (j->in_panels()) {
        j->RunDx();
      } else {
        pool.Run(count(j->dx_tiles[j->length]), dx);
      }
    }
    j->SumLosses();
  });
}

absl::StatusOr<Thunk> BindForward(const KernelCall& call, ThreadPool& pool) {
  return BindChunkedLoss(call, pool, /*backward=*/false, call.attrs.Bool("bias"));
}
absl::StatusOr<Thunk> BindGrad(const KernelCall& call, ThreadPool& pool) {
  return BindChunkedLoss(call, pool, /*backward=*/true, /*has_bias=*/false);
}
absl::StatusOr<Thunk> BindBiasGrad(const KernelCall& call, ThreadPool& pool) {
  return BindChunkedLoss(call, pool, /*backward=*/true, /*has_bias=*/true);
}

absl::StatusOr<Thunk> BindCount(const KernelCall& call, ThreadPool&) {
  const int32_t* labels = call.operands[0].as<int32_t>();
  const int64_t n = call.operands[0].type.num_elements();
  float* count = call.results[0].as<float>();
  return Thunk([labels, n, count] {
    int64_t valid = 0;
    for (int64_t i = 0; i < n; ++i) valid += labels[i] >= 0 ? 1 : 0;
    *count = static_cast<float>(valid);
  });
}

constexpr CpuKernel kKernels[] = {
    {"chunked_loss", BindForward},
    {"chunked_loss_grad", BindGrad},
    {"chunked_loss_bias_grad", BindBiasGrad},
    {"count_labels", BindCount},
};

}  // namespace

absl::Span<const CpuKernel> CpuChunkedLossKernels() { return kKernels; }

}  // namespace mt
