#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/kernel.h"

namespace mt {
namespace {

float FromBf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; a NaN stays one.
uint16_t ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

float LoadAs(const std::byte* data, bool bf16, int64_t at) {
  return bf16 ? FromBf16(reinterpret_cast<const uint16_t*>(data)[at]) : reinterpret_cast<const float*>(data)[at];
}

// One tile of one instruction: everything but the batch index is known at load.
struct Tile {
  CpuMatmulTiling t;
  const std::byte *a, *b, *bias, *accumulator;  // Of the whole operands; bias and accumulator may be null.
  std::byte* c;
  bool bias_bf16, accumulator_bf16, c_bf16;
  int64_t first_batch, batches, first_row, rows, first_col, cols;
  float* scratch;

  int64_t ARow(int64_t i, int64_t k) const { return t.transpose_a ? k * t.rows + i : i * t.depth + k; }
  int64_t BRow(int64_t k, int64_t j) const { return t.transpose_b ? j * t.depth + k : k * t.cols + j; }

  void RunF32(int64_t n) const;
  void RunBf16(int64_t n) const;
};

// What the sum starts from: the accumulator, or the bias, or both; returns the beta that keeps it.
float StartSum(const Tile& tile, int64_t n, int64_t row, int64_t rows, int64_t col, int64_t cols, float* sum,
               int64_t ld) {
  if (tile.bias == nullptr && tile.accumulator == nullptr) return 0;
  for (int64_t i = 0; i < rows; ++i) {
    float* out = sum + i * ld;
    const int64_t at = (n * tile.t.rows + row + i) * tile.t.cols + col;
    if (tile.accumulator != nullptr) {
      for (int64_t j = 0; j < cols; ++j) out[j] = LoadAs(tile.accumulator, tile.accumulator_bf16, at + j);
      if (tile.bias == nullptr) continue;
      for (int64_t j = 0; j < cols; ++j) out[j] += LoadAs(tile.bias, tile.bias_bf16, col + j);
    } else {
      for (int64_t j = 0; j < cols; ++j) out[j] = LoadAs(tile.bias, tile.bias_bf16, col + j);
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

// bf16 operands, products and sums in f32, rounded once at the end.
void Tile::RunBf16(int64_t n) const {
  const uint16_t* ha = reinterpret_cast<const uint16_t*>(a) + n * t.rows * t.depth;
  const uint16_t* hb = reinterpret_cast<const uint16_t*>(b) + n * t.depth * t.cols;
  const int64_t most_rows = std::min(t.tile_rows, t.kBlockRows), most_cols = std::min(t.tile_cols, t.kBlockCols);
  const int64_t most_depth = std::min(t.depth, t.kBlockDepth);
  float* block_a = scratch;
  float* block_b = block_a + most_rows * most_depth;
  float* sum = block_b + most_depth * most_cols;
  for (int64_t j = first_col; j < first_col + cols; j += most_cols) {
    const int64_t nj = std::min(most_cols, first_col + cols - j);
    for (int64_t i = first_row; i < first_row + rows; i += most_rows) {
      const int64_t ni = std::min(most_rows, first_row + rows - i);
      float beta = StartSum(*this, n, i, ni, j, nj, sum, nj);
      for (int64_t k = 0; k < t.depth; k += most_depth) {
        const int64_t nk = std::min(most_depth, t.depth - k);
        for (int64_t r = 0; r < ni; ++r) {
          for (int64_t x = 0; x < nk; ++x) block_a[r * nk + x] = FromBf16(ha[ARow(i + r, k + x)]);
        }
        for (int64_t x = 0; x < nk; ++x) {
          for (int64_t s = 0; s < nj; ++s) block_b[x * nj + s] = FromBf16(hb[BRow(k + x, j + s)]);
        }
        RunSgemm({.rows = ni,
                  .cols = nj,
                  .depth = nk,
                  .a = block_a,
                  .lda = nk,
                  .b = block_b,
                  .ldb = nj,
                  .beta = beta,
                  .c = sum,
                  .ldc = nj});
        beta = 1;
      }
      for (int64_t r = 0; r < ni; ++r) {
        const int64_t at = (n * t.rows + i + r) * t.cols + j;
        for (int64_t s = 0; s < nj; ++s) {
          if (c_bf16) {
            reinterpret_cast<uint16_t*>(c)[at + s] = ToBf16(sum[r * nj + s]);
          } else {
            reinterpret_cast<float*>(c)[at + s] = sum[r * nj + s];
          }
        }
      }
    }
  }
}

absl::StatusOr<Thunk> BindMatmul(const KernelCall& call, ThreadPool& pool) {
  RETURN_IF_ERROR(LoadBlas());
  ReserveBlasBuffers(pool.num_threads());
  std::vector<TensorType> types;
  for (const Tensor& operand : call.operands) {
    types.push_back(operand.type);
    if (operand.type.dtype != DType::kF32 && operand.type.dtype != DType::kBF16) {
      return absl::UnimplementedError(absl::StrCat("no ", DTypeName(operand.type.dtype), " matmul on the cpu"));
    }
  }
  const CpuMatmulTiling t = TileCpuMatmul(types, call.attrs);
  if (std::max({t.rows, t.cols, t.depth}) > std::numeric_limits<int>::max()) {
    return absl::UnimplementedError("a matmul with a dimension over 2^31 on the cpu");
  }
  const bool has_bias = call.attrs.Bool("bias"), accumulate = call.attrs.Bool("accumulator");
  const auto is_bf16 = [](const Tensor& tensor) { return tensor.type.dtype == DType::kBF16; };
  Tile whole{.t = t,
             .a = call.operands[0].data,
             .b = call.operands[1].data,
             .bias = has_bias ? call.operands[2].data : nullptr,
             .accumulator = accumulate ? call.operands.back().data : nullptr,
             .c = call.results[0].data,
             .bias_bf16 = has_bias && is_bf16(call.operands[2]),
             .accumulator_bf16 = accumulate && is_bf16(call.operands.back()),
             .c_bf16 = is_bf16(call.results[0])};
  const bool bf16 = is_bf16(call.operands[0]);

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
  const std::function<void(int64_t)> run = [tiles, bf16](int64_t i) {
    const Tile& tile = (*tiles)[static_cast<size_t>(i)];
    for (int64_t n = tile.first_batch; n < tile.first_batch + tile.batches; ++n) {
      bf16 ? tile.RunBf16(n) : tile.RunF32(n);
    }
  };
  return Thunk([&pool, run, count = static_cast<int64_t>(tiles->size())] { pool.Run(count, run); });
}

constexpr CpuKernel kKernels[] = {{"matmul", BindMatmul}};

}  // namespace

absl::Span<const CpuKernel> CpuMatmulKernels() { return kKernels; }

}  // namespace mt
