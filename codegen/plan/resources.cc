#include "codegen/plan/resources.h"

#include <algorithm>
#include <memory>
#include <string>

#include "ir/base/check.h"

namespace mt {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxTiles = 16;
// Work that is worth a tile of its own: tens of microseconds of one core.
constexpr double kMinTileFlops = 2e6;
// A smaller product of matrices stays on one thread, in the buffers that each has.
constexpr double kMinPanelFlops = 2 * kMinTileFlops;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t unit) { return CeilDiv(a, unit) * unit; }

int64_t CpuMatmulWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs& attrs) {
  const CpuMatmulTiling tiling = TileCpuMatmul(operands, attrs);
  if (tiling.panels) return CpuPanelsOf(tiling.rows, tiling.cols, tiling.depth).bytes;
  return tiling.tiles * tiling.tile_bytes;
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

int64_t CpuAttentionWorkspaceOf(absl::Span<const TensorType> operands, const Attrs& attrs, bool backward) {
  const CpuAttentionTiling tiling = TileCpuAttention(LayoutOfAttention(operands, attrs, backward), backward);
  return tiling.slots * tiling.slot_bytes;
}
int64_t CpuAttentionWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>, const Attrs& attrs) {
  return CpuAttentionWorkspaceOf(operands, attrs, /*backward=*/false);
}
int64_t CpuAttentionBackwardWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>,
                                      const Attrs& attrs) {
  return CpuAttentionWorkspaceOf(operands, attrs, /*backward=*/true);
}

// Each head's sums.
int64_t CpuCachedAttentionWorkspace(absl::Span<const TensorType>, absl::Span<const TensorType> results, const Attrs&) {
  return F32Bytes(results[0].num_elements());
}

int64_t CpuChunkedLossWorkspace(absl::Span<const TensorType> operands, absl::Span<const TensorType>,
                                const Attrs& attrs) {
  return TileCpuChunkedLoss(operands[0], operands[1], attrs).workspace_bytes;
}

// Of attributes that infer has seen.
int64_t CpuFusedWorkspace(absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs& attrs) {
  const absl::StatusOr<std::shared_ptr<const Region>> region =
      ParseRegion(attrs.Int("rows"), attrs.Int("width"), attrs.Get<std::string>("region"));
  CHECK(region.ok()) << region.status();
  return CpuRegionWorkspace(**region);
}

struct WorkspaceRow {
  absl::string_view op;
  int64_t (*bytes)(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs);
};
constexpr WorkspaceRow kCpuRows[] = {
    {"matmul", CpuMatmulWorkspace},
    {"layer_norm_backward", CpuNormBackwardWorkspace},
    {"rms_norm_backward", CpuNormBackwardWorkspace},
    {"softmax_cross_entropy", CpuLossWorkspace},
    {"global_norm", CpuGlobalNormWorkspace},
    {"flash_attention", CpuAttentionWorkspace},
    {"flash_attention_backward", CpuAttentionBackwardWorkspace},
    {"flash_attention_packed", CpuAttentionWorkspace},
    {"flash_attention_packed_backward", CpuAttentionBackwardWorkspace},
    {"cached_attention", CpuCachedAttentionWorkspace},
    {"chunked_loss", CpuChunkedLossWorkspace},
    {"chunked_loss_grad", CpuChunkedLossWorkspace},
    {"chunked_loss_bias_grad", CpuChunkedLossWorkspace},
    {"fused", CpuFusedWorkspace},
};

}  // namespace

int64_t CpuRegionWorkspace(const Region& region) {
  int64_t columns = 0;
  for (const RegionResult& result : region.results) columns += result.kind == RegionResult::Kind::kColumns ? 1 : 0;
  return columns * CpuRowChunks(region.rows).count * F32Bytes(region.width);
}

RowChunks CpuRowChunks(int64_t rows) {
  const int64_t chunk = std::max<int64_t>(32, CeilDiv(rows, 64));
  return {.rows = chunk, .count = CeilDiv(rows, chunk)};
}

CpuPanels CpuPanelsOf(int64_t rows, int64_t cols, int64_t depth) {
  // Blocks of nearly one size.
  const auto block = [](int64_t n, int64_t most, int64_t unit) {
    return std::min(n, RoundUp(CeilDiv(n, CeilDiv(n, most)), unit));
  };
  CpuPanels p = {.rows = block(rows, CpuPanels::kMostRows, CpuPanels::kUnitRows),
                 .cols = block(cols, CpuPanels::kMostCols, CpuPanels::kUnitCols),
                 .depth = block(depth, CpuPanels::kMostDepth, 1)};
  p.b = RoundUp(RoundUp(p.rows, CpuPanels::kUnitRows) * p.depth, kAlignment / ByteSize(DType::kF32));
  p.bytes = RoundUp(F32Bytes(p.b + RoundUp(p.cols, CpuPanels::kUnitCols) * p.depth), kAlignment);
  return p;
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
  // In double: the product may pass 2^63 for plans that no CPU will run.
  const double flops = 2.0 * static_cast<double>(t.batch) * static_cast<double>(t.rows) * static_cast<double>(t.cols) *
                       static_cast<double>(t.depth);
  const int64_t wanted = static_cast<int64_t>(std::clamp(flops / kMinTileFlops, 1.0, static_cast<double>(kMaxTiles)));
  t.tile_batch = CeilDiv(t.batch, std::min(t.batch, wanted));
  t.tile_rows = t.rows;
  t.tile_cols = t.cols;
  if (t.batch == 1) {
    // A tile packs its rows of a and its columns of b: the grid that packs least, in the library's units.
    double least = 0;
    for (int64_t across = 1; across <= wanted; ++across) {
      const int64_t down = wanted / across;
      const int64_t rows = std::min(t.rows, RoundUp(CeilDiv(t.rows, down), 32));
      const int64_t cols = std::min(t.cols, RoundUp(CeilDiv(t.cols, across), 32));
      const int64_t tiles = CeilDiv(t.rows, rows) * CeilDiv(t.cols, cols);
      const double packed = static_cast<double>(CeilDiv(t.cols, cols)) * static_cast<double>(t.rows) +
                            static_cast<double>(CeilDiv(t.rows, rows)) * static_cast<double>(t.cols);
      // Fewer than wanted tiles leave threads idle.
      const double cost = packed * static_cast<double>(wanted) / static_cast<double>(tiles);
      if (across == 1 || cost < least) {
        least = cost;
        t.tile_rows = rows;
        t.tile_cols = cols;
      }
    }
  }
  t.tiles = CeilDiv(t.batch, t.tile_batch) * CeilDiv(t.rows, t.tile_rows) * CeilDiv(t.cols, t.tile_cols);
  t.panels = t.batch == 1 && a.dtype == DType::kF32 && flops >= kMinPanelFlops;
  t.tile_bytes = 0;
  if (a.dtype != DType::kF32) {
    const int64_t rows = std::min(t.tile_rows, t.kBlockRows), cols = std::min(t.tile_cols, t.kBlockCols);
    const int64_t depth = std::min(t.depth, t.kBlockDepth);
    t.tile_bytes = RoundUp(F32Bytes(rows * depth + depth * cols + rows * cols), kAlignment);
  }
  return t;
}

CpuAttentionTiling TileCpuAttention(const AttentionLayout& layout, bool backward) {
  constexpr int64_t kVector = 16;
  CpuAttentionTiling t = {.batch = layout.batch,
                          .heads = layout.heads,
                          .kv_heads = layout.kv_heads,
                          .length = layout.length,
                          .width = layout.width,
                          .f32 = layout.dtype == DType::kF32,
                          .backward = backward};
  t.queries = std::min(t.length, t.kQueries);
  t.keys = RoundUp(std::min(t.length, t.kKeys), CpuPanels::kUnitCols);
  t.chunk = backward ? t.heads / t.kv_heads * t.length : std::min(t.length, t.kChunk);
  t.units = t.batch * (backward ? t.kv_heads : t.heads * CeilDiv(t.length, t.chunk));
  t.slots = std::min(t.units, t.kMaxSlots);
  int64_t end = 0;
  const auto take = [&](int64_t elements) {
    const int64_t at = end;
    end += RoundUp(elements, kVector);
    return at;
  };
  const int64_t packed_width = RoundUp(t.width, CpuPanels::kUnitCols), block = t.queries * t.width;
  t.scores = take(t.queries * t.keys);
  t.products = take(backward ? t.queries * t.keys : 0);
  t.uniforms = take(t.keys);
  t.statistics = take(2 * RoundUp(t.chunk, kVector));
  t.factors = take(backward ? 0 : 2 * RoundUp(t.queries, kVector));
  t.sums = take(backward && t.f32 ? 0 : t.chunk * t.width);
  t.q = take(t.f32 ? 0 : block);
  t.dout = take(!t.f32 && backward ? block : 0);
  t.k = take(t.f32 ? 0 : t.keys * t.width);
  t.v = take(t.f32 ? 0 : t.keys * t.width);
  t.packed_keys = take(t.width * t.keys);
  t.packed_values = take(backward ? t.width * t.keys : t.keys * packed_width);
  t.packed_rows = take(backward ? t.keys * packed_width : 0);
  t.packed_queries = take(backward ? t.queries * packed_width : 0);
  t.packed_dout = take(backward ? t.queries * packed_width : 0);
  t.dk = take(backward ? t.keys * t.width : 0);
  t.dv = take(backward ? t.keys * t.width : 0);
  t.slot_bytes = RoundUp(F32Bytes(end), kAlignment);
  return t;
}

CpuChunkedLossTiling TileCpuChunkedLoss(const TensorType& x, const TensorType& w, const Attrs& attrs) {
  CpuChunkedLossTiling t;
  t.width = x.dim(-1);
  t.rows = x.num_elements() / t.width;
  t.vocab = w.dim(0);
  t.classes = attrs.Int("classes") == 0 ? t.vocab : attrs.Int("classes");
  t.chunks = attrs.Int("chunks");
  t.chunk_rows = CeilDiv(t.rows, t.chunks);
  t.tile_bytes = 0;
  if (x.dtype != DType::kF32) {
    constexpr int64_t kRows = CpuMatmulTiling::kBlockRows, kCols = CpuMatmulTiling::kBlockCols;
    constexpr int64_t kDepth = CpuMatmulTiling::kBlockDepth;
    t.tile_bytes = F32Bytes(kRows * kDepth + kDepth * kCols + kRows * kCols);
  }
  t.logits = 0;
  t.losses = t.logits + RoundUp(F32Bytes(t.chunk_rows * t.classes), kAlignment);
  t.scratch = t.losses + RoundUp(F32Bytes(t.rows), kAlignment);
  int64_t scratch_bytes = kMaxTiles * t.tile_bytes;
  const double flops = 2.0 * static_cast<double>(t.chunk_rows) * static_cast<double>(t.classes * t.width);
  if (x.dtype == DType::kF32 && w.dtype == DType::kF32 && flops >= kMinPanelFlops) {
    for (const int64_t rows : {t.chunk_rows, t.At(t.chunks - 1).rows}) {
      scratch_bytes =
          std::max({scratch_bytes, CpuPanelsOf(rows, t.classes, t.width).bytes,
                    CpuPanelsOf(t.classes, t.width, rows).bytes, CpuPanelsOf(rows, t.width, t.classes).bytes});
    }
  }
  t.workspace_bytes = t.scratch + scratch_bytes;
  return t;
}

int64_t WorkspaceBytes(absl::string_view target, const OpDef& op, absl::Span<const TensorType> operands,
                       absl::Span<const TensorType> results, const Attrs& attrs) {
  const absl::StatusOr<Target> parsed = ParseTarget(target);
  if (!parsed.ok()) return 0;
  if (parsed->is_cuda()) return CudaWorkspaceBytes(*parsed, op, operands, results, attrs);
  for (const WorkspaceRow& row : kCpuRows) {
    if (row.op == op.name) return row.bytes(operands, results, attrs);
  }
  return 0;
}

bool StagesInputs(absl::string_view target) {
  const absl::StatusOr<Target> parsed = ParseTarget(target);
  return parsed.ok() && parsed->is_cuda();
}

}  // namespace mt
