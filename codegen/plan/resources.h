// Scratch memory that an op's kernel may use on a target: the planner reserves it, the kernel gets exactly that.
#ifndef MT_CODEGEN_PLAN_RESOURCES_H_
#define MT_CODEGEN_PLAN_RESOURCES_H_

#include <algorithm>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attention_layout.h"
#include "ir/op.h"
#include "ir/region.h"
#include "ir/target.h"

namespace mt {

// Bytes of workspace for one instruction; 0 for most, and for a target that ParseTarget does not know. Depends on
// shapes and target alone, never on the machine at hand or the number of its threads: the same plan everywhere.
int64_t WorkspaceBytes(absl::string_view target, const OpDef& op, absl::Span<const TensorType> operands,
                       absl::Span<const TensorType> results, const Attrs& attrs);
// The same for a CUDA target: codegen/cuda/resources.cc.
int64_t CudaWorkspaceBytes(const Target& target, const OpDef& op, absl::Span<const TensorType> operands,
                           absl::Span<const TensorType> results, const Attrs& attrs);

// Whether a program has a second buffer for each of its data inputs, live throughout: the host puts the next batch
// there while a step runs. So on CUDA, whose steps the host does not wait for.
bool StagesInputs(absl::string_view target);

// How the CPU multiplies two f32 matrices, [rows, depth] x [depth, cols]: block by block, both blocks packed side by
// side in the workspace, where the CPU has the kernels for it. The depth is cut by its length alone.
struct CpuPanels {
  static constexpr int64_t kUnitRows = 14, kUnitCols = 32;  // Both are packed in such units.
  static constexpr int64_t kMostRows = 2048, kMostCols = 2048, kMostDepth = 512;

  int64_t rows, cols, depth;  // Of one block; the last one of a dimension may be smaller.
  int64_t b;                  // Elements of f32 from the start of the packed block of a to that of b.
  int64_t bytes;
};
CpuPanels CpuPanelsOf(int64_t rows, int64_t cols, int64_t depth);

// How the CPU cuts a matmul into tiles that run side by side, unless it is one product of f32 matrices (CpuPanels).
// f32 operands go to the BLAS as they are; others are widened block by block in the tile's scratch: a [kBlockRows,
// kBlockDepth], b [kBlockDepth, kBlockCols] and the sum [kBlockRows, kBlockCols], all f32.
struct CpuMatmulTiling {
  static constexpr int64_t kBlockRows = 128, kBlockCols = 256, kBlockDepth = 512;

  int64_t batch, rows, cols, depth;  // batch x ([rows, depth] x [depth, cols])
  bool transpose_a, transpose_b;
  int64_t tile_batch, tile_rows, tile_cols;  // Of one tile; the last one of a dimension may be smaller.
  int64_t tiles;                             // At most 16.
  int64_t tile_bytes;                        // Scratch for one; 0 for f32.
  bool panels;                               // One product of f32 matrices: no tiles, but CpuPanelsOf(...).
};
CpuMatmulTiling TileCpuMatmul(absl::Span<const TensorType> operands, const Attrs& attrs);

// How the CPU cuts attention and its backward, packed or not: blocks of keys against blocks of queries, in at most 16
// slots that run side by side. A slot takes consecutive units in turn: `chunk` queries of one head, or, backward, all
// heads that share a key-value head. A block of keys and values is packed once for all queries of its unit.
struct CpuAttentionTiling {
  static constexpr int64_t kQueries = 64, kKeys = 256, kChunk = 8 * kQueries, kMaxSlots = 16;

  int64_t batch, heads, kv_heads, length, width;
  bool f32, backward;
  int64_t queries, keys;  // Of one block; the last ones may be smaller. `keys` is a multiple of 32.
  int64_t chunk;          // Queries of a unit; backward: those of all its heads.
  int64_t units, slots;

  // Scratch of one slot, as elements of f32 from its start, in this order.
  int64_t scores;                       // [queries, keys]
  int64_t products;                     // [queries, keys]; backward alone
  int64_t uniforms;                     // [keys]
  int64_t statistics;                   // 2 x [chunk rounded up to 16]
  int64_t factors;                      // 2 x [queries rounded up to 16]; forward alone
  int64_t sums;                         // [chunk, width]: out; backward dq of 16-bit operands
  int64_t q, dout;                      // [queries, width]; 16-bit operands, widened
  int64_t k, v;                         // [keys, width]; 16-bit operands, widened
  int64_t packed_keys, packed_values;   // Of the block: transposed k; v, or, backward, transposed v.
  int64_t packed_rows;                  // Backward alone: k; both of packed_width.
  int64_t packed_queries, packed_dout;  // Backward alone.
  int64_t dk, dv;                       // [keys, width]; backward alone
  int64_t slot_bytes;
};
CpuAttentionTiling TileCpuAttention(const AttentionLayout& layout, bool backward);

// How the CPU runs chunked_loss and its backward: chunk after chunk, each product of a chunk in at most 16 tiles as of
// a matmul. Operands of 16 bits are widened in a tile's scratch, block by block, as a matmul's are.
struct CpuChunkedLossTiling {
  int64_t rows, width, vocab;  // Of x and w.
  int64_t classes;             // Columns of logits; the rows of w after them are padding.
  int64_t chunks, chunk_rows;  // chunk_rows: of the largest chunk.
  // Bytes from the start of the workspace, in this order.
  int64_t logits;   // [chunk_rows, classes] f32
  int64_t losses;   // [rows] f32
  int64_t scratch;  // A tile's: blocks of both operands and of their product. Of f32: what CpuPanelsOf takes.
  int64_t tile_bytes, workspace_bytes;

  // Chunk c: rows [first, first + rows).
  struct Chunk {
    int64_t first, rows;
  };
  Chunk At(int64_t c) const {
    const int64_t least = rows / chunks, longer = rows % chunks;
    return {c * least + std::min(c, longer), least + (c < longer ? 1 : 0)};
  }
};
CpuChunkedLossTiling TileCpuChunkedLoss(const TensorType& x, const TensorType& w, const Attrs& attrs);

// How the CPU cuts sums over rows: at most 64 chunks of at least 32 rows, each with its own partial sums.
struct RowChunks {
  int64_t rows;  // Of one chunk; the last may be smaller.
  int64_t count;
};
RowChunks CpuRowChunks(int64_t rows);

// The column sums of each chunk of a region's rows, f32 [column results, chunks, width].
int64_t CpuRegionWorkspace(const Region& region);

// Elements of one partial sum of global_norm.
inline constexpr int64_t kCpuNormChunk = int64_t{64} << 10;

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_RESOURCES_H_
