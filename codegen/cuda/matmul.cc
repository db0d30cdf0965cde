// Matmuls go to cuBLASLt; the chunked loss is three of them and a kernel of rows for each chunk.
#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/rows.h"
#include "codegen/cuda/source.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/resources.h"
#include "ir/region.h"

namespace mt {
namespace {

int64_t Aligned(int64_t bytes) { return CeilDiv(bytes, kPlanAlignment) * kPlanAlignment; }

// to [n] = from [n] in another dtype.
void EmitConvert(DType from_dtype, DType to_dtype, int64_t n, CudaPlace from, CudaPlace to, CudaSteps& steps) {
  const CudaThreads threads = CutCudaThreads(n);
  CudaLaunch launch{.function = "mt_convert", .grid = {threads.blocks, 1, 1}, .block = {threads.block, 1, 1}};
  launch.arguments = {from, to};
  launch.source =
      absl::StrCat("extern \"C\" __global__ void __launch_bounds__(256) mt_convert(const ", CudaType(from_dtype),
                   "* x, ", CudaType(to_dtype), "* y) {\n  const u64 e = ", ThreadText("u64"), ";\n",
                   threads.exact ? "" : absl::StrCat("  if (e >= ", n, ") return;\n"), "  y[e] = FromFloat<",
                   CudaType(to_dtype), ">(ToFloat(x[e]));\n}\n");
  steps.Launch(std::move(launch));
}

// What a matmul's bias is read from: cuBLASLt takes one of the result's dtype alone. Another one is rounded to it at
// the start of the workspace, which `*used_bytes` then says.
CudaPlace BiasPlace(const TensorType& bias, DType result, CudaPlace place, CudaPlace workspace, int64_t* used_bytes,
                    CudaSteps& steps) {
  *used_bytes = 0;
  if (bias.dtype == result) return place;
  EmitConvert(bias.dtype, result, bias.num_elements(), place, workspace, steps);
  *used_bytes = Aligned(bias.num_elements() * ByteSize(result));
  return workspace;
}

absl::Status EmitMatmul(const CudaCall& call, CudaSteps& steps) {
  const TensorType &a = call.operands[0], &b = call.operands[1], &d = call.results[0];
  if (a.dtype == DType::kF64) return absl::UnimplementedError("there is no f64 matmul");
  proto::CudaMatmulProto matmul;
  const bool ta = call.attrs->Bool("transpose_a"), tb = call.attrs->Bool("transpose_b");
  const int64_t k = a.dim(ta ? -2 : -1), n = b.dim(tb ? -2 : -1);
  const int64_t batch = b.rank() == 2 ? 1 : b.num_elements() / (b.dim(-1) * b.dim(-2));
  const int64_t m = a.num_elements() / (k * batch);
  matmul.set_batch(batch);
  matmul.set_m(m);
  matmul.set_n(n);
  matmul.set_k(k);
  matmul.set_transpose_a(ta);
  matmul.set_transpose_b(tb);
  if (batch > 1) {
    matmul.set_stride_a(m * k);
    matmul.set_stride_b(k * n);
    matmul.set_stride_d(m * n);
  }
  matmul.set_dtype(std::string(DTypeName(a.dtype)));
  matmul.set_result_dtype(std::string(DTypeName(d.dtype)));
  matmul.set_tf32(call.attrs->Bool("tf32"));
  SetPlace(OperandPlace(0), *matmul.mutable_a());
  SetPlace(OperandPlace(1), *matmul.mutable_b());
  SetPlace(ResultPlace(0), *matmul.mutable_d());
  int next = 2;
  int64_t used = 0;
  if (call.attrs->Bool("bias")) {
    const CudaPlace bias = BiasPlace(call.operands[static_cast<size_t>(next)], d.dtype, OperandPlace(next),
                                     WorkspacePlace(), &used, steps);
    SetPlace(bias, *matmul.mutable_bias());
    ++next;
  }
  if (used >= call.workspace_bytes) return absl::UnimplementedError(absl::StrCat("a bias of ", used, " bytes"));
  if (call.attrs->Bool("accumulator")) SetPlace(OperandPlace(next), *matmul.mutable_accumulator());
  SetPlace(WorkspacePlace(used), *matmul.mutable_workspace());
  matmul.set_workspace_bytes(call.workspace_bytes - used);
  steps.Matmul(matmul);
  return absl::OkStatus();
}

// to[c] = (first ? 0 : to[c]) + the sum of column c of dlogits [rows, columns]: as the columns of a region are summed.
void EmitColumnSums(DType dtype, int64_t rows, int64_t columns, bool first, CudaPlace from, CudaPlace partial,
                    CudaPlace to, CudaSteps& steps) {
  const CudaChunks chunks = CutCudaSum(rows);
  const std::string source = absl::StrCat(
      "typedef ", CudaType(dtype), " T;\n", Constant("kKept", columns), Constant("kReduced", rows),
      Constant("kLength", chunks.length), Constant("kCount", chunks.count), "typedef Sum Op;\n",
      "constexpr bool kDivides = false;\nconstexpr float kDivisor = 1.0f;\n", "#define MT_ADD ", first ? 0 : 1,
      "\n__device__ __forceinline__ u64 KeptPlace(u64 k) { return k; }\n",
      "__device__ __forceinline__ u64 ReducedPlace(u64 r) { return r * ", columns, "; }\n", CudaText("reduce.cuh"));
  steps.Launch({.source = source,
                .function = "mt_reduce",
                .grid = {CeilDiv(columns, 32), chunks.count, 1},
                .block = {256, 1, 1},
                .arguments = {from, partial}});
  steps.Launch({.source = source,
                .function = "mt_reduce_chunks",
                .grid = {CeilDiv(columns, 32), 1, 1},
                .block = {512, 1, 1},
                .arguments = {partial, to}});
}

// Places in the workspace, as resources.cc adds them up: a chunk of logits, each row's loss, that of the matmuls, the
// chunk sums of the bias's gradient.
absl::Status EmitChunkedLoss(const CudaCall& call, CudaSteps& steps) {
  const bool backward = call.op->name != "chunked_loss", bias_grad = call.op->name == "chunked_loss_bias_grad";
  const bool has_bias = bias_grad || (!backward && call.attrs->Bool("bias"));
  const int bias_at = backward ? 4 : 3;
  const bool accumulate = backward && call.attrs->Bool("accumulator");
  const TensorType &x = call.operands[0], &w = call.operands[1];
  const int64_t width = x.dim(-1), rows = x.num_elements() / width, vocab = w.dim(0), size = ByteSize(x.dtype);
  const int64_t classes = call.attrs->Int("classes") == 0 ? vocab : call.attrs->Int("classes");
  const int64_t chunks = call.attrs->Int("chunks"), most = CeilDiv(rows, chunks);
  const int64_t losses_at = Aligned(most * vocab * size), matmul_at = losses_at + Aligned(rows * 4),
                sums_at = matmul_at + CublasLtWorkspaceBytes(call.target);
  const std::string dtype(DTypeName(x.dtype));
  const bool tf32 = call.attrs->Bool("tf32");
  const CudaPlace logits = WorkspacePlace();

  const auto product = [&](int64_t m, int64_t n, int64_t k, bool ta, bool tb, CudaPlace a, CudaPlace b, CudaPlace d) {
    proto::CudaMatmulProto matmul;
    matmul.set_batch(1);
    matmul.set_m(m);
    matmul.set_n(n);
    matmul.set_k(k);
    matmul.set_transpose_a(ta);
    matmul.set_transpose_b(tb);
    matmul.set_dtype(dtype);
    matmul.set_result_dtype(dtype);
    matmul.set_tf32(tf32);
    SetPlace(a, *matmul.mutable_a());
    SetPlace(b, *matmul.mutable_b());
    SetPlace(d, *matmul.mutable_d());
    SetPlace(WorkspacePlace(matmul_at), *matmul.mutable_workspace());
    matmul.set_workspace_bytes(CublasLtWorkspaceBytes(call.target));
    return matmul;
  };
  for (int64_t c = 0; c < chunks; ++c) {
    // As equal as they can be, the longer ones first.
    const int64_t least = rows / chunks, longer = rows % chunks;
    const int64_t first = c * least + std::min(c, longer), n = least + (c < longer ? 1 : 0);
    const CudaPlace x_rows = OperandPlace(0, first * width * size);
    steps.Matmul(product(n, vocab, width, false, true, x_rows, OperandPlace(1), logits));
    LossRows loss{.dtype = x.dtype,
                  .rows = n,
                  .columns = vocab,
                  .classes = classes,
                  .logits = logits,
                  .labels = OperandPlace(2, first * 4),
                  .losses = WorkspacePlace(losses_at + first * 4),
                  .dloss = {},
                  .log_sums = {},
                  .bias = {}};
    if (backward) loss.dloss = OperandPlace(3);
    if (has_bias) {
      loss.bias = OperandPlace(bias_at);
      loss.bias_dtype = call.operands[static_cast<size_t>(bias_at)].dtype;
    }
    EmitLossRows(loss, call.target, steps);
    if (!backward) continue;
    // dx may be x: its rows of this chunk are read for the last time here.
    proto::CudaMatmulProto dw = product(vocab, width, n, true, false, logits, x_rows, ResultPlace(0));
    dw.set_result_dtype("f32");
    if (c > 0) {
      SetPlace(ResultPlace(0), *dw.mutable_accumulator());
    } else if (accumulate) {
      SetPlace(OperandPlace(static_cast<int>(call.operands.size()) - 1), *dw.mutable_accumulator());
    }
    steps.Matmul(dw);
    if (bias_grad) {
      EmitColumnSums(x.dtype, n, vocab, c == 0, logits, WorkspacePlace(sums_at), ResultPlace(3), steps);
    }
    steps.Matmul(product(n, width, vocab, false, false, logits, OperandPlace(1), ResultPlace(1, first * width * size)));
  }
  EmitLossSum(rows, WorkspacePlace(losses_at), ResultPlace(backward ? 2 : 0), steps);
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {
    {"matmul", EmitMatmul},
    {"chunked_loss", EmitChunkedLoss},
    {"chunked_loss_grad", EmitChunkedLoss},
    {"chunked_loss_bias_grad", EmitChunkedLoss},
};

}  // namespace

absl::Span<const CudaEmitter> CudaMatmulEmitters() { return kEmitters; }

}  // namespace mt
