#include "codegen/plan/resources.h"

#include <algorithm>

namespace mt {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxSlots = 16;
// Work that is worth a slot of its own: tens of microseconds of one core.
constexpr int64_t kMinSlotFlops = 2'000'000;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t unit) { return CeilDiv(a, unit) * unit; }

int64_t CpuMatmulWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs& attrs) {
  const CpuMatmulTiling tiling = TileCpuMatmul(operands, attrs);
  return tiling.slots * tiling.slot_bytes;
}

int64_t F32Bytes(int64_t elements) { return elements * ByteSize(DType::kF32); }

// Column sums of each chunk of rows: of dgamma and dbeta, or of dgamma alone.
int64_t CpuNormBackwardWorkspace(absl::Span<const TensorType>, absl::Span<const TensorType> results, const Attrs&) {
  const int64_t width = results[0].dim(-1);
  return F32Bytes(CpuRowChunks(results[0].num_elements() / width).count * width *
                  (static_cast<int64_t>(results.size()) - 1));
}

// Loss and count of each chunk of rows, in f64.
int64_t CpuLossWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs&) {
  return CpuRowChunks(operands[1].num_elements()).count * 2 * ByteSize(DType::kF64);
}

// The sum of squares of each chunk of each operand, in f64.
int64_t CpuGlobalNormWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs&) {
  int64_t chunks = 0;
  for (const TensorType& operand : operands) chunks += CeilDiv(operand.num_elements(), kCpuNormChunk);
  return chunks * ByteSize(DType::kF64);
}

struct WorkspaceRow {
  absl::string_view target;  // Prefix: "cuda" stands for every architecture.
  absl::string_view op;
  int64_t (*bytes)(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs);
};
constexpr WorkspaceRow kRows[] = {
    {"cpu", "matmul", CpuMatmulWorkspace},
    {"cpu", "layer_norm_backward", CpuNormBackwardWorkspace},
    {"cpu", "rms_norm_backward", CpuNormBackwardWorkspace},
    {"cpu", "softmax_cross_entropy", CpuLossWorkspace},
    {"cpu", "global_norm", CpuGlobalNormWorkspace},
};

}  // namespace

RowChunks CpuRowChunks(int64_t rows) {
  const int64_t chunk = std::max<int64_t>(32, CeilDiv(rows, 64));
  return {.rows = chunk, .count = CeilDiv(rows, chunk)};
}

CpuMatmulTiling TileCpuMatmul(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType &a = operands[0], &b = operands[1];
  CpuMatmulTiling t;
  t.transpose_a = attrs.Bool("transpose_a");
  t.transpose_b = attrs.Bool("transpose_b");
  t.depth = a.dim(t.transpose_a ? -2 : -1);
  t.cols = b.dim(t.transpose_b ? -2 : -1);
  t.batch = b.rank() == 2 ? 1 : b.num_elements() / (b.dim(-1) * b.dim(-2));
  t.rows = a.num_elements() / (t.depth * t.batch);
  t.tile_batch = t.batch;
  t.tile_rows = t.rows;
  t.tile_cols = t.cols;
  // In double: the product may pass 2^63 for plans that no CPU will run.
  const double flops = 2.0 * static_cast<double>(t.batch) * static_cast<double>(t.rows) * static_cast<double>(t.cols) *
                       static_cast<double>(t.depth);
  const int64_t wanted =
      static_cast<int64_t>(std::clamp(flops / static_cast<double>(kMinSlotFlops), 1.0, static_cast<double>(kMaxSlots)));
  if (t.batch >= wanted) {
    t.tile_batch = CeilDiv(t.batch, wanted);
  } else if (t.batch > 1) {
    t.tile_batch = 1;
  } else if (t.rows >= t.cols) {
    t.tile_rows = std::min(t.rows, RoundUp(CeilDiv(t.rows, wanted), 32));
  } else {
    t.tile_cols = std::min(t.cols, RoundUp(CeilDiv(t.cols, wanted), 64));
  }
  t.slots = CeilDiv(t.batch, t.tile_batch) * CeilDiv(t.rows, t.tile_rows) * CeilDiv(t.cols, t.tile_cols);
  // What oneDNN's blocked matmul copies: a panel of b of 64 columns by up to 1,024 rows, and, where a is transposed, a
  // block of it.
  const int64_t width = ByteSize(a.dtype);
  int64_t bytes = 64 * std::min<int64_t>(t.depth, 1024) * width + (24 << 10);
  if (t.transpose_a) bytes += std::min<int64_t>(RoundUp(t.tile_rows, 16) * t.depth * width, 704 << 10);
  t.slot_bytes = RoundUp(bytes, kAlignment);
  return t;
}

int64_t WorkspaceBytes(absl::string_view target, const OpDef& op, absl::Span<const TensorType> operands,
                       absl::Span<const TensorType> results, const Attrs& attrs) {
  for (const WorkspaceRow& row : kRows) {
    if (row.op == op.name && target.substr(0, row.target.size()) == row.target) {
      return row.bytes(operands, results, attrs);
    }
  }
  return 0;
}

}  // namespace mt
