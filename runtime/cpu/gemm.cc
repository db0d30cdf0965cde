#include "runtime/cpu/gemm.h"

#include <algorithm>
#include <utility>

#include "runtime/cpu/blas.h"
#include "runtime/cpu/sgemm.h"

namespace mt {
namespace {

// Work of one task: tens of microseconds of one core.
constexpr int64_t kElementsPerPack = int64_t{64} << 10;
constexpr double kMinTaskFlops = 2e6;
constexpr int64_t kMaxRowTasks = 16;
// Columns of a tile: a packed block of b of that width stays in the second cache.
constexpr int64_t kTileCols = 512;
// For so few columns rows of a are read where they lie, unless they are so far apart that they share too few places of
// the first cache: there the kernel is a tenth slower than on packed rows, and packing costs more.
constexpr int64_t kFewCols = 128, kMaxDirectStride = 512;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part `i` of `parts` of n things in whole units.
struct Range {
  int64_t first, count;
};
Range PartOf(int64_t n, int64_t unit, int64_t i, int64_t parts) {
  const int64_t units = CeilDiv(n, unit);
  const int64_t first = units * i / parts * unit, end = std::min(n, units * (i + 1) / parts * unit);
  return {first, end - first};
}

}  // namespace

Gemm::Gemm(ThreadPool& pool, const Shape& shape, const float* bias, Start start)
    : pool_(pool),
      shape_(shape),
      panels_(CpuPanelsOf(shape.rows, shape.cols, shape.depth)),
      packs_a_(shape.transpose_a || shape.cols > kFewCols || shape.lda > kMaxDirectStride),
      bias_(bias),
      start_(std::move(start)),
      pack_([this](int64_t task) { Pack(task); }),
      multiply_([this](int64_t task) { Multiply(task); }) {}

void Gemm::Run(const float* a, const float* b, bool keep, float* c, float* panels) {
  a_ = a;
  b_ = b;
  c_ = c;
  keep_ = keep;
  scratch_ = panels;
  const int64_t pass_depth = HasSgemmKernels() ? panels_.depth : shape_.depth;
  for (int64_t col = 0; col < shape_.cols; col += panels_.cols) {
    for (int64_t k = 0; k < shape_.depth; k += pass_depth) {
      for (int64_t row = 0; row < shape_.rows; row += panels_.rows) {
        pass_ = {row, std::min(panels_.rows, shape_.rows - row), col, std::min(panels_.cols, shape_.cols - col),
                 k,   std::min(pass_depth, shape_.depth - k)};
        RunPass();
      }
    }
  }
}

void Gemm::RunPass() {
  const int64_t row_units = CeilDiv(pass_.rows, CpuPanels::kUnitRows);
  if (HasSgemmKernels()) {
    const auto tasks = [&](int64_t n, int64_t unit) {
      return std::clamp<int64_t>(n * pass_.depth / kElementsPerPack, 1, CeilDiv(n, unit));
    };
    a_tasks_ = packs_a_ ? tasks(pass_.rows, CpuPanels::kUnitRows) : 0;
    b_tasks_ = tasks(pass_.cols, CpuPanels::kUnitCols);
    pool_.Run(a_tasks_ + b_tasks_, pack_);
  }
  col_tasks_ = CeilDiv(pass_.cols, kTileCols);
  const double flops = 2.0 * static_cast<double>(pass_.rows * pass_.cols) * static_cast<double>(pass_.depth);
  const double most = std::min<double>(kMaxRowTasks, flops / kMinTaskFlops / static_cast<double>(col_tasks_));
  row_tasks_ = std::clamp<int64_t>(static_cast<int64_t>(most), 1, row_units);
  pool_.Run(row_tasks_ * col_tasks_, multiply_);
}

void Gemm::Pack(int64_t task) const {
  const int64_t depth = pass_.depth;
  if (task < a_tasks_) {
    const Range rows = PartOf(pass_.rows, CpuPanels::kUnitRows, task, a_tasks_);
    const int64_t row = pass_.row + rows.first;
    const float* from = a_ + (shape_.transpose_a ? pass_.k * shape_.lda + row : row * shape_.lda + pass_.k);
    PackRows(from, shape_.lda, shape_.transpose_a, rows.count, depth, scratch_ + rows.first * depth);
    return;
  }
  const Range cols = PartOf(pass_.cols, CpuPanels::kUnitCols, task - a_tasks_, b_tasks_);
  const int64_t col = pass_.col + cols.first;
  const float* from = b_ + (shape_.transpose_b ? col * shape_.ldb + pass_.k : pass_.k * shape_.ldb + col);
  PackCols(from, shape_.ldb, shape_.transpose_b, cols.count, depth, scratch_ + panels_.b + cols.first * depth);
}

// Tasks of the same columns follow one another: they share a block of b.
void Gemm::Multiply(int64_t task) const {
  const Range rows = PartOf(pass_.rows, CpuPanels::kUnitRows, task % row_tasks_, row_tasks_);
  const Range cols = PartOf(pass_.cols, CpuPanels::kUnitCols, task / row_tasks_, col_tasks_);
  const int64_t row = pass_.row + rows.first, col = pass_.col + cols.first;
  float* const c = c_ + row * shape_.ldc + col;
  const bool is_first = pass_.k == 0, keep = keep_ || start_ != nullptr || !is_first;
  if (is_first && start_ != nullptr) start_(row, rows.count, col, cols.count);
  if (HasSgemmKernels()) {
    const float* const bias = is_first && bias_ != nullptr ? bias_ + col : nullptr;
    MultiplyPanels({.rows = rows.count,
                    .cols = cols.count,
                    .depth = pass_.depth,
                    .a = packs_a_ ? scratch_ + rows.first * pass_.depth : a_ + row * shape_.lda + pass_.k,
                    .packed_a = packs_a_,
                    .lda = shape_.lda,
                    .b = scratch_ + panels_.b + cols.first * pass_.depth,
                    .packed_depth = pass_.depth,
                    .start = keep ? c : bias,
                    .start_step = keep ? shape_.ldc : 0,
                    .c = c,
                    .ldc = shape_.ldc});
    return;
  }
  if (bias_ != nullptr) {
    for (int64_t i = 0; i < rows.count; ++i) std::copy_n(bias_ + col, cols.count, c + i * shape_.ldc);
  }
  RunSgemm({.transpose_a = shape_.transpose_a,
            .transpose_b = shape_.transpose_b,
            .rows = rows.count,
            .cols = cols.count,
            .depth = shape_.depth,
            .a = a_ + (shape_.transpose_a ? row : row * shape_.lda),
            .lda = shape_.lda,
            .b = b_ + (shape_.transpose_b ? col * shape_.ldb : col),
            .ldb = shape_.ldb,
            .beta = keep || bias_ != nullptr ? 1.0f : 0.0f,
            .c = c,
            .ldc = shape_.ldc});
}

}  // namespace mt
