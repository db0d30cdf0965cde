#include "codegen/cuda/resources.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <string>

#include "codegen/plan/plan.h"
#include "codegen/plan/resources.h"
#include "ir/attention_layout.h"
#include "ir/base/check.h"
#include "ir/region.h"

namespace mt {
namespace {

using Types = absl::Span<const TensorType>;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A product of sizes, rounded up to the arena's alignment: one part of a workspace. Past what an arena may hold it
// stays there, so that sums of parts do not overflow.
int64_t Part(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > kMaxArenaBytes) return kMaxArenaBytes;
  }
  return CeilDiv(product, kPlanAlignment) * kPlanAlignment;
}

constexpr int64_t kF32 = 4, kF64 = 8;

int64_t Rows(const TensorType& type) { return type.num_elements() / type.dim(-1); }

int64_t Matmul(const Target& target, Types, Types, const Attrs&) { return CublasLtWorkspaceBytes(target); }

// Column sums of dgamma and dbeta (or dgamma alone) of each chunk of rows.
int64_t NormBackward(const Target&, Types, Types results, const Attrs&) {
  return Part({CutCudaSum(Rows(results[0])).count, results[0].dim(-1), static_cast<int64_t>(results.size()) - 1, kF32});
}

// A partial result for each chunk of what is reduced.
int64_t Reduction(const Target&, Types operands, Types results, const Attrs&) {
  const int64_t kept = results[0].num_elements();
  if (kept >= kCudaWideReduction) return 0;
  const CudaChunks chunks = CutCudaSum(operands[0].num_elements() / kept);
  return chunks.count == 1 ? 0 : Part({chunks.count, kept, kF32});
}

// Each row's loss; the rows are summed afterwards.
int64_t Loss(const Target&, Types operands, Types, const Attrs&) { return Part({operands[1].num_elements(), kF32}); }

// The sum of squares of each chunk of each operand.
int64_t GlobalNorm(const Target&, Types operands, Types, const Attrs&) {
  int64_t chunks = 0;
  for (const TensorType& operand : operands) chunks += CeilDiv(operand.num_elements(), kCudaNormChunk);
  return Part({chunks, kF64});
}

// The first and the last sum of each chunk of sorted positions.
int64_t EmbeddingBackward(const Target&, Types operands, Types results, const Attrs&) {
  return Part({CeilDiv(operands[1].num_elements(), kCudaEmbeddingChunk), 2, results[0].dim(-1), kF32});
}

// The forward kernel holds all but its results on the chip: the log-sum-exp is a result, so the plan has it anyway. The
// backward: sum(dout * out) of each query. The scores are computed twice, for dq and for dk and dv, so that each sum is
// made in one block's registers, in one order.
int64_t AttentionBackward(const Target&, Types operands, Types, const Attrs& attrs) {
  return Part({LayoutOfAttention(operands, attrs, /*backward=*/true).queries(), kF32});
}

// x [rows, C], w [V, C]: one chunk of logits in the dtype of x, which their gradient is written over; each row's loss;
// the matmuls' workspace; and the chunk sums of a bias's gradient.
int64_t ChunkedLossAt(const Target& target, const TensorType& x, const TensorType& w, const Attrs& attrs, bool bias) {
  const int64_t rows = Rows(x), classes = w.dim(0), chunk = CeilDiv(rows, std::max<int64_t>(1, attrs.Int("chunks")));
  return Part({chunk, classes, ByteSize(x.dtype)}) + Part({rows, kF32}) + CublasLtWorkspaceBytes(target) +
         (bias ? Part({std::min<int64_t>(256, CeilDiv(chunk, 32)), classes, kF32}) : 0);  // Any chunk's CutCudaSum.
}
int64_t ChunkedLoss(const Target& target, Types operands, Types, const Attrs& attrs) {
  return ChunkedLossAt(target, operands[0], operands[1], attrs, false);
}
int64_t ChunkedLossBiasGrad(const Target& target, Types operands, Types, const Attrs& attrs) {
  return ChunkedLossAt(target, operands[0], operands[1], attrs, true);
}

// The column sums of each chunk of a region's rows. `infer` has seen the attributes.
int64_t Fused(const Target&, Types, Types, const Attrs& attrs) {
  const absl::StatusOr<std::shared_ptr<const Region>> region =
      ParseRegion(attrs.Int("rows"), attrs.Int("width"), attrs.Get<std::string>("region"));
  CHECK(region.ok()) << region.status();
  int64_t columns = 0;
  for (const RegionResult& result : (*region)->results) {
    columns += result.kind == RegionResult::Kind::kColumns ? 1 : 0;
  }
  return columns == 0 ? 0 : Part({columns, CutCudaSum((*region)->rows).count, (*region)->width, kF32});
}

// What is not here needs none: element-wise rows, moves of data, softmax and norms forward (a row is held by a block or
// a cluster), the optimizers, attention forward.
struct WorkspaceRow {
  absl::string_view op;
  int64_t (*bytes)(const Target& target, Types operands, Types results, const Attrs& attrs);
};
constexpr WorkspaceRow kRows[] = {
    {"matmul", Matmul},
    {"layer_norm_backward", NormBackward},
    {"rms_norm_backward", NormBackward},
    {"reduce_sum", Reduction},
    {"reduce_mean", Reduction},
    {"reduce_max", Reduction},
    {"softmax_cross_entropy", Loss},
    {"global_norm", GlobalNorm},
    {"embedding_backward", EmbeddingBackward},
    {"flash_attention_backward", AttentionBackward},
    {"flash_attention_packed_backward", AttentionBackward},
    {"chunked_loss", ChunkedLoss},
    {"chunked_loss_grad", ChunkedLoss},
    {"chunked_loss_bias_grad", ChunkedLossBiasGrad},
    {"fused", Fused},
};

}  // namespace

int64_t CublasLtWorkspaceBytes(const Target& target) {
  // 32 MiB are what NVIDIA recommends for Hopper and later, and what split-K needs there; 4 MiB before.
  return target.sm >= 90 ? int64_t{32} << 20 : int64_t{4} << 20;
}

int64_t CudaSharedBytes(const Target& target) {
  switch (target.sm) {
    case 75:
      return int64_t{64} << 10;
    case 80:
      return int64_t{163} << 10;
    case 90:
    case 100:
      return int64_t{227} << 10;
    default:
      return int64_t{99} << 10;
  }
}

CudaChunks CutCudaSum(int64_t length) {
  const int64_t chunk = std::max<int64_t>(32, CeilDiv(length, 256));
  return {.length = chunk, .count = CeilDiv(length, chunk)};
}

int64_t CudaWorkspaceBytes(const Target& target, const OpDef& op, Types operands, Types results, const Attrs& attrs) {
  for (const WorkspaceRow& row : kRows) {
    if (row.op == op.name) return row.bytes(target, operands, results, attrs);
  }
  return 0;
}

}  // namespace mt
