// Scratch memory that an op's kernel may use on a target: the planner reserves it, the kernel gets exactly that.
#ifndef MT_CODEGEN_PLAN_RESOURCES_H_
#define MT_CODEGEN_PLAN_RESOURCES_H_

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/op.h"

namespace mt {

// Bytes of workspace for one instruction; 0 for most. Depends on shapes and target alone, never on the machine at hand
// or the number of its threads: the same plan everywhere.
int64_t WorkspaceBytes(absl::string_view target, const OpDef& op, absl::Span<const TensorType> operands,
                       absl::Span<const TensorType> results, const Attrs& attrs);

// How the CPU cuts a matmul into tiles that run side by side. f32 operands go to the BLAS as they are; others are
// widened block by block in the tile's scratch: a [kBlockRows, kBlockDepth], b [kBlockDepth, kBlockCols] and the sum
// [kBlockRows, kBlockCols], all f32.
struct CpuMatmulTiling {
  static constexpr int64_t kBlockRows = 128, kBlockCols = 256, kBlockDepth = 512;

  int64_t batch, rows, cols, depth;  // batch x ([rows, depth] x [depth, cols])
  bool transpose_a, transpose_b;
  int64_t tile_batch, tile_rows, tile_cols;  // Of one tile; the last one of a dimension may be smaller.
  int64_t tiles;                             // At most 16.
  int64_t tile_bytes;                        // Scratch for one; 0 for f32.
};
CpuMatmulTiling TileCpuMatmul(absl::Span<const TensorType> operands, const Attrs& attrs);

// How the CPU cuts sums over rows: at most 64 chunks of at least 32 rows, each with its own partial sums.
struct RowChunks {
  int64_t rows;  // Of one chunk; the last may be smaller.
  int64_t count;
};
RowChunks CpuRowChunks(int64_t rows);

// Elements of one partial sum of global_norm.
inline constexpr int64_t kCpuNormChunk = int64_t{64} << 10;

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_RESOURCES_H_
