#include <algorithm>
#include <memory>
#include <vector>

#include "codegen/plan/resources.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/onednn.h"

namespace mt {
namespace {

absl::StatusOr<Thunk> BindMatmul(const KernelCall& call, ThreadPool& pool) {
  std::vector<TensorType> types;
  for (const Tensor& operand : call.operands) types.push_back(operand.type);
  const CpuMatmulTiling t = TileCpuMatmul(types, call.attrs);
  const Tensor &a = call.operands[0], &b = call.operands[1], &c = call.results[0];
  const bool has_bias = call.attrs.Bool("bias"), accumulate = call.attrs.Bool("accumulator");
  const Tensor* bias = has_bias ? &call.operands[2] : nullptr;
  const Tensor* accumulator = accumulate ? &call.operands.back() : nullptr;

  DnnMatmulShape whole;
  whole.depth = t.depth;
  whole.a_batch_stride = t.rows * t.depth;
  whole.a_row_stride = t.transpose_a ? 1 : t.depth;
  whole.a_col_stride = t.transpose_a ? t.rows : 1;
  whole.b_batch_stride = t.depth * t.cols;
  whole.b_row_stride = t.transpose_b ? 1 : t.cols;
  whole.b_col_stride = t.transpose_b ? t.depth : 1;
  whole.c_batch_stride = t.rows * t.cols;
  whole.c_row_stride = t.cols;
  whole.a = a.type.dtype;
  whole.b = b.type.dtype;
  whole.c = c.type.dtype;
  whole.has_bias = has_bias;
  whole.accumulate = accumulate;
  if (has_bias) whole.bias = bias->type.dtype;

  auto tiles = std::make_shared<std::vector<std::unique_ptr<DnnMatmul>>>();
  std::byte* scratch = call.workspace;
  for (int64_t n = 0; n < t.batch; n += t.tile_batch) {
    for (int64_t i = 0; i < t.rows; i += t.tile_rows) {
      for (int64_t j = 0; j < t.cols; j += t.tile_cols) {
        DnnMatmulShape shape = whole;
        shape.batch = std::min(t.tile_batch, t.batch - n);
        shape.rows = std::min(t.tile_rows, t.rows - i);
        shape.cols = std::min(t.tile_cols, t.cols - j);
        ASSIGN_OR_RETURN(
            std::unique_ptr<DnnMatmul> tile,
            DnnMatmul::Create(shape, a.data + (n * whole.a_batch_stride + i * whole.a_row_stride) * ByteSize(whole.a),
                              b.data + (n * whole.b_batch_stride + j * whole.b_col_stride) * ByteSize(whole.b),
                              has_bias ? bias->data + j * ByteSize(whole.bias) : nullptr,
                              c.data + (n * whole.c_batch_stride + i * whole.c_row_stride + j) * ByteSize(whole.c),
                              scratch, call.workspace == nullptr ? 0 : t.slot_bytes));
        tiles->push_back(std::move(tile));
        if (scratch != nullptr) scratch += t.slot_bytes;
      }
    }
  }
  const std::function<void(int64_t)> run = [tiles](int64_t i) { (*tiles)[static_cast<size_t>(i)]->Run(); };
  const int64_t count = static_cast<int64_t>(tiles->size());
  const bool copy = accumulate && accumulator->data != c.data;
  return Thunk([&pool, run, count, copy, from = copy ? accumulator->data : nullptr, to = c.data,
                bytes = static_cast<size_t>(c.type.byte_size())] {
    if (copy) std::copy_n(from, bytes, to);
    pool.Run(count, run);
  });
}

constexpr CpuKernel kKernels[] = {{"matmul", BindMatmul}};

}  // namespace

absl::Span<const CpuKernel> CpuMatmulKernels() { return kKernels; }

}  // namespace mt
