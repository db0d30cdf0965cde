#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/gemm.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

// One tile of one instruction: everything but the batch index is known at load.
struct Tile {
  CpuMatmulTiling t;
  const std::byte *a, *b, *bias, *accumulator;  // Of the whole operands; bias and accumulator may be null.
  std::byte* c;
  DType operands, bias_dtype, result;  // An accumulator has the dtype of the result.
  int64_t first_batch, batches, first_row, rows, first_col, cols;
  float* scratch;
  const VectorMath* math;

  int64_t ARow(int64_t i, int64_t k) const { return t.transpose_a ? k * t.rows + i : i * t.depth + k; }
  int64_t BRow(int64_t k, int64_t j) const { return t.transpose_b ? j * t.depth + k : k * t.cols + j; }
  // Elements at, ..., at + n - 1 of an operand, widened.
  void Load(const std::byte* data, DType dtype, int64_t at, int64_t n, float* to) const {
    math->load[static_cast<size_t>(dtype)](to, data + at * ByteSize(dtype), n);
  }
  // The box of `rows` x `cols` at element `at` of a matrix whose rows are `stride` apart, widened, row after row.
  void LoadBox(const std::byte* data, int64_t at, int64_t rows, int64_t cols, int64_t stride, float* to) const {
    for (int64_t r = 0; r < rows; ++r) Load(data, operands, at + r * stride, cols, to + r * cols);
  }

  void RunF32(int64_t n) const;
  void RunWidened(int64_t n) const;
};

// What the sum starts from: the accumulator, or the bias, or both; returns the beta that keeps it.
float StartSum(const Tile& tile, int64_t n, int64_t row, int64_t rows, int64_t col, int64_t cols, float* sum,
               int64_t ld) {
  if (tile.bias == nullptr && tile.accumulator == nullptr) return 0;
  // f32 operands have an f32 bias; the blocks of others are narrow.
  float widened[CpuMatmulTiling::kBlockCols];
  const float* bias = nullptr;
  if (tile.bias != nullptr && tile.bias_dtype == DType::kF32) {
    bias = reinterpret_cast<const float*>(tile.bias) + col;
  } else if (tile.bias != nullptr) {
    tile.Load(tile.bias, tile.bias_dtype, col, cols, widened);
    bias = widened;
  }
  const VectorMath::Binary add = tile.math->vv[static_cast<size_t>(Prim::kAdd)];
  for (int64_t i = 0; i < rows; ++i) {
    float* out = sum + i * ld;
    if (tile.accumulator != nullptr) {
      tile.Load(tile.accumulator, tile.result, (n * tile.t.rows + row + i) * tile.t.cols + col, cols, out);
      if (bias != nullptr) add(out, out, bias, cols);
    } else {
      std::copy_n(bias, cols, out);
    }
  }
  return 1;
}

void Tile::RunF32(int64_t n) const {
  const float* fa = reinterpret_cast<const float*>(a) + n * t.rows * t.depth;
  const float* fb = reinterpret_cast<const float*>(b) + n * t.depth * t.cols;
  float* fc = reinterpret_cast<float*>(c) + (n * t.rows + first_row) * t.cols + first_col;
  const bool in_place = accumulator == c && bias == nullptr;
  const float beta = in_place ? 1.0f : StartSum(*this, n, first_row, rows, first_col, cols, fc, t.cols);
  RunSgemm({.transpose_a = t.transpose_a,
            .transpose_b = t.transpose_b,
            .rows = rows,
            .cols = cols,
            .depth = t.depth,
            .a = fa + ARow(first_row, 0),
            .lda = t.transpose_a ? t.rows : t.depth,
            .b = fb + BRow(0, first_col),
            .ldb = t.transpose_b ? t.depth : t.cols,
            .beta = beta,
            .c = fc,
            .ldc = t.cols});
}

// 16-bit operands, products and sums in f32, rounded once at the end.
void Tile::RunWidened(int64_t n) const {
  const int64_t of_a = n * t.rows * t.depth, of_b = n * t.depth * t.cols;
  const int64_t most_rows = std::min(t.tile_rows, t.kBlockRows), most_cols = std::min(t.tile_cols, t.kBlockCols);
  const int64_t most_depth = std::min(t.depth, t.kBlockDepth);
  float* block_a = scratch;
  float* block_b = block_a + most_rows * most_depth;
  float* sum = block_b + most_depth * most_cols;
  const auto store = math->store[static_cast<size_t>(result)];
  for (int64_t j = first_col; j < first_col + cols; j += most_cols) {
    const int64_t nj = std::min(most_cols, first_col + cols - j);
    for (int64_t i = first_row; i < first_row + rows; i += most_rows) {
      const int64_t ni = std::min(most_rows, first_row + rows - i);
      float beta = StartSum(*this, n, i, ni, j, nj, sum, nj);
      for (int64_t k = 0; k < t.depth; k += most_depth) {
        const int64_t nk = std::min(most_depth, t.depth - k);
        // The boxes keep the operands' own layouts: whole rows are widened.
        const int64_t a_rows = t.transpose_a ? nk : ni, a_cols = t.transpose_a ? ni : nk;
        const int64_t b_rows = t.transpose_b ? nj : nk, b_cols = t.transpose_b ? nk : nj;
        LoadBox(a, of_a + ARow(i, k), a_rows, a_cols, t.transpose_a ? t.rows : t.depth, block_a);
        LoadBox(b, of_b + BRow(k, j), b_rows, b_cols, t.transpose_b ? t.depth : t.cols, block_b);
        RunSgemm({.transpose_a = t.transpose_a,
                  .transpose_b = t.transpose_b,
                  .rows = ni,
                  .cols = nj,
                  .depth = nk,
                  .a = block_a,
                  .lda = a_cols,
                  .b = block_b,
                  .ldb = b_cols,
                  .beta = beta,
                  .c = sum,
                  .ldc = nj});
        beta = 1;
      }
      for (int64_t r = 0; r < ni; ++r) {
        store(c + ((n * t.rows + i + r) * t.cols + j) * ByteSize(result), sum + r * nj, nj);
      }
    }
  }
}

// One product of f32 matrices.
Thunk BindPanels(const Tile& whole, const KernelCall& call, ThreadPool& pool) {
  const CpuMatmulTiling& t = whole.t;
  CHECK_GE(call.workspace_bytes, CpuPanelsOf(t.rows, t.cols, t.depth).bytes) << call.name;
  const bool in_place = whole.accumulator == whole.c && whole.bias == nullptr;
  const float* const bias = whole.accumulator == nullptr ? reinterpret_cast<const float*>(whole.bias) : nullptr;
  Gemm::Start start;
  if (!in_place && whole.accumulator != nullptr) {
    start = [whole](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      float* const sum = reinterpret_cast<float*>(whole.c) + row * whole.t.cols + col;
      StartSum(whole, 0, row, rows, col, cols, sum, whole.t.cols);
    };
  }
  const Gemm::Shape shape = {.rows = t.rows,
                             .cols = t.cols,
                             .depth = t.depth,
                             .transpose_a = t.transpose_a,
                             .transpose_b = t.transpose_b,
                             .lda = t.transpose_a ? t.rows : t.depth,
                             .ldb = t.transpose_b ? t.depth : t.cols,
                             .ldc = t.cols};
  auto gemm = std::make_shared<Gemm>(pool, shape, bias, std::move(start));
  const float *a = reinterpret_cast<const float*>(whole.a), *b = reinterpret_cast<const float*>(whole.b);
  return [gemm, a, b, in_place, c = reinterpret_cast<float*>(whole.c),
          panels = reinterpret_cast<float*>(call.workspace)] { gemm->Run(a, b, in_place, c, panels); };
}

absl::StatusOr<Thunk> BindMatmul(const KernelCall& call, ThreadPool& pool) {
  RETURN_IF_ERROR(LoadBlas());
  ReserveBlasBuffers(pool.num_threads());
  std::vector<TensorType> types;
  for (const Tensor& operand : call.operands) {
    types.push_back(operand.type);
    if (!IsStorage(operand.type.dtype)) {
      return absl::UnimplementedError(absl::StrCat("no ", DTypeName(operand.type.dtype), " matmul on the cpu"));
    }
  }
  const CpuMatmulTiling t = TileCpuMatmul(types, call.attrs);
  if (std::max({t.rows, t.cols, t.depth}) > std::numeric_limits<int>::max()) {
    return absl::UnimplementedError("a matmul with a dimension over 2^31 on the cpu");
  }
  const bool has_bias = call.attrs.Bool("bias"), accumulate = call.attrs.Bool("accumulator");
  Tile whole{.t = t,
             .a = call.operands[0].data,
             .b = call.operands[1].data,
             .bias = has_bias ? call.operands[2].data : nullptr,
             .accumulator = accumulate ? call.operands.back().data : nullptr,
             .c = call.results[0].data,
             .operands = call.operands[0].type.dtype,
             .bias_dtype = has_bias ? call.operands[2].type.dtype : DType::kF32,
             .result = call.results[0].type.dtype,
             .math = &BestVectorMath()};
  const bool widened = whole.operands != DType::kF32;

  if (t.panels) return BindPanels(whole, call, pool);
  auto tiles = std::make_shared<std::vector<Tile>>();
  for (int64_t n = 0; n < t.batch; n += t.tile_batch) {
    for (int64_t i = 0; i < t.rows; i += t.tile_rows) {
      for (int64_t j = 0; j < t.cols; j += t.tile_cols) {
        Tile tile = whole;
        tile.first_batch = n;
        tile.batches = std::min(t.tile_batch, t.batch - n);
        tile.first_row = i;
        tile.rows = std::min(t.tile_rows, t.rows - i);
        tile.first_col = j;
        tile.cols = std::min(t.tile_cols, t.cols - j);
        tile.scratch = reinterpret_cast<float*>(call.workspace + static_cast<int64_t>(tiles->size()) * t.tile_bytes);
        tiles->push_back(tile);
      }
    }
  }
  const std::function<void(int64_t)> run = [tiles, widened](int64_t i) {
    const Tile& tile = (*tiles)[static_cast<size_t>(i)];
    for (int64_t n = tile.first_batch; n < tile.first_batch + tile.batches; ++n) {
      widened ? tile.RunWidened(n) : tile.RunF32(n);
    }
  };
  return Thunk([&pool, run, count = static_cast<int64_t>(tiles->size())] { pool.Run(count, run); });
}

constexpr CpuKernel kKernels[] = {{"matmul", BindMatmul}};

}  // namespace

absl::Span<const CpuKernel> CpuMatmulKernels() { return kKernels; }

}  // namespace mt
