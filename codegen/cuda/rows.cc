// Norms, softmax and the loss: kernels of whole rows.
#include "codegen/cuda/rows.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"
#include "ir/region.h"

namespace mt {
namespace {

int64_t RowsOf(const TensorType& type) { return type.num_elements() / type.dim(-1); }

// Norms are regions, the same that `fuse` makes of them.
absl::Status EmitNorm(const CudaCall& call, CudaSteps& steps) {
  const bool centers = call.op->name == "layer_norm";
  const int64_t width = call.results[0].dim(-1);
  RegionBuilder b(RowsOf(call.results[0]), width);
  const double inverse = 1.0 / static_cast<double>(width);
  const auto mean = [&](int value) {
    const int sum = b.RowSum(value);
    return b.Make(Prim::kMul, sum, b.Constant(inverse));
  };
  const int x = b.Load(0), gamma = b.Load(1);
  const int center = centers ? mean(x) : -1;
  const int d = centers ? b.Make(Prim::kSub, x, center) : x;
  const int shifted = b.Make(Prim::kAdd, mean(b.Make(Prim::kMul, d, d)), b.Constant(call.attrs->Double("eps")));
  const int rstd = b.Make(Prim::kDiv, b.Constant(1), b.Make(Prim::kSqrt, shifted));
  int y = b.Make(Prim::kMul, b.Make(Prim::kMul, d, rstd), gamma);
  if (centers && call.attrs->Bool("beta")) y = b.Make(Prim::kAdd, y, b.Load(2));
  b.AddResult(RegionResult::Kind::kFull, y, call.results[0]);
  if (centers) b.AddResult(RegionResult::Kind::kRow, center, call.results[1]);
  b.AddResult(RegionResult::Kind::kRow, rstd, call.results.back());
  return EmitRegion(call, b.Build(), steps);
}

absl::Status EmitNormBackward(const CudaCall& call, CudaSteps& steps) {
  const bool centers = call.op->name == "layer_norm_backward";
  const int64_t width = call.results[0].dim(-1);
  RegionBuilder b(RowsOf(call.results[0]), width);
  const double inverse = 1.0 / static_cast<double>(width);
  const auto mean = [&](int value) {
    const int sum = b.RowSum(value);
    return b.Make(Prim::kMul, sum, b.Constant(inverse));
  };
  const int dy = b.Load(0), x = b.Load(1), gamma = b.Load(2), rstd = b.Row(centers ? 4 : 3);
  const int d = centers ? b.Make(Prim::kSub, x, b.Row(3)) : x;
  const int xhat = b.Make(Prim::kMul, d, rstd), g = b.Make(Prim::kMul, dy, gamma);
  const int centered = centers ? b.Make(Prim::kSub, g, mean(g)) : g;
  const int along = b.Make(Prim::kMul, xhat, mean(b.Make(Prim::kMul, g, xhat)));
  const int dx = b.Make(Prim::kMul, rstd, b.Make(Prim::kSub, centered, along));
  b.AddResult(RegionResult::Kind::kFull, dx, call.results[0]);
  b.AddResult(RegionResult::Kind::kColumns, b.Make(Prim::kMul, dy, xhat), call.results[1]);
  if (centers) b.AddResult(RegionResult::Kind::kColumns, dy, call.results[2]);
  return EmitRegion(call, b.Build(), steps);
}

absl::Status EmitSoftmax(const CudaCall& call, CudaSteps& steps) {
  const bool backward = call.op->name == "softmax_backward";
  const TensorType& type = call.results[0];
  const int64_t columns = type.dim(-1), rows = RowsOf(type), threads = RowThreads(columns);
  const int64_t vector = RowVector(columns), slots = CeilDiv(columns, threads * vector);
  const int64_t block = threads == 32 ? 256 : threads;
  const int64_t held = slots * vector * (backward ? 2 : 1);
  const bool hold = held <= (threads <= 256 ? 96 : threads == 512 ? 64 : 16);
  const auto flag = [](absl::string_view name, bool value) {
    return absl::StrCat("constexpr bool ", name, " = ", value ? "true" : "false", ";\n");
  };
  CudaLaunch launch{.function = FunctionName(call.op->name), .block = {block, 1, 1}, .arguments = AllPlaces(call)};
  launch.source = absl::StrCat(
      backward ? "" : "#define MT_FORWARD\n", "typedef ", CudaType(type.dtype), " T;\n", Constant("kRows", rows),
      Constant("kColumns", columns), Constant("kThreads", threads), Constant("kBlock", block),
      Constant("kVector", vector), Constant("kSlots", slots), Constant("kUnroll", hold ? slots : 1),
      Constant("kWindow", call.attrs->Int("window")), flag("kCausal", call.attrs->Bool("causal")), flag("kHold", hold),
      "constexpr float kScale = ", FloatLiteral(call.attrs->Double("scale")), ";\n", CudaText("softmax.cuh"));
  launch.grid[0] = CeilDiv(rows, block / threads);
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

int64_t ClassesOf(const TensorType& logits, const Attrs& attrs) {
  return attrs.Int("classes") == 0 ? logits.dim(-1) : attrs.Int("classes");
}

absl::Status EmitLoss(const CudaCall& call, CudaSteps& steps) {
  const TensorType& logits = call.operands[0];
  const int64_t rows = RowsOf(logits);
  EmitLossRows({.dtype = logits.dtype,
                .rows = rows,
                .columns = logits.dim(-1),
                .classes = ClassesOf(logits, *call.attrs),
                .logits = OperandPlace(0),
                .labels = OperandPlace(1),
                .losses = WorkspacePlace(),
                .dloss = {},
                .log_sums = ResultPlace(2),
                .bias = {}},
               call.target, steps);
  EmitLossSum(rows, WorkspacePlace(), ResultPlace(0), steps);
  EmitCountLabels(rows, OperandPlace(1), ResultPlace(1), steps);
  return absl::OkStatus();
}

absl::Status EmitLossBackward(const CudaCall& call, CudaSteps& steps) {
  const TensorType& logits = call.operands[1];
  const int64_t columns = logits.dim(-1), rows = RowsOf(logits), vector = RowVector(columns);
  const int64_t tiles = CeilDiv(columns, 256 * vector);
  CudaLaunch launch{.function = "mt_loss_backward", .block = {256, 1, 1}, .arguments = AllPlaces(call)};
  launch.source = absl::StrCat("typedef ", CudaType(logits.dtype), " T;\n", Constant("kColumns", columns),
                               Constant("kClasses", ClassesOf(logits, *call.attrs)), Constant("kVector", vector),
                               Constant("kTiles", tiles), CudaText("loss_backward.cuh"));
  launch.grid[0] = rows * tiles;
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

absl::Status EmitCount(const CudaCall& call, CudaSteps& steps) {
  EmitCountLabels(call.operands[0].num_elements(), OperandPlace(0), ResultPlace(0), steps);
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {
    {"layer_norm", EmitNorm},
    {"rms_norm", EmitNorm},
    {"layer_norm_backward", EmitNormBackward},
    {"rms_norm_backward", EmitNormBackward},
    {"softmax", EmitSoftmax},
    {"softmax_backward", EmitSoftmax},
    {"softmax_cross_entropy", EmitLoss},
    {"softmax_cross_entropy_backward", EmitLossBackward},
    {"count_labels", EmitCount},
};

}  // namespace

void EmitLossRows(const LossRows& loss, const Target& target, CudaSteps& steps) {
  // Several blocks of a few warps on a processor: one loads while another computes.
  const int64_t threads = loss.columns <= 1024 ? 32 : loss.columns <= 16384 ? 256 : 512;
  const int64_t block = std::max<int64_t>(threads, 256);
  CudaLaunch launch{.function = "mt_loss_rows", .block = {block, 1, 1}};
  // A row lies in shared memory between its two passes where a gradient is written over it. Of what a processor has,
  // the kernel's own and the system's take less than 2 KiB a block.
  const int64_t row_bytes = CeilDiv(loss.columns * ByteSize(loss.dtype), 16) * 16;
  const int64_t held_bytes = block / threads * row_bytes, shared_bytes = CudaSharedBytes(target);
  const bool hold = loss.dloss && held_bytes + (2 << 10) <= shared_bytes;
  if (hold) launch.shared_bytes = held_bytes;
  const int64_t fit = hold ? shared_bytes / (held_bytes + (2 << 10)) : 3, most_threads = target.sm == 75 ? 1024 : 1536;
  const int64_t blocks = std::min(fit, most_threads / block);
  launch.arguments = {loss.logits, loss.labels, loss.losses};
  launch.source = absl::StrCat(
      "typedef ", CudaType(loss.dtype), " T;\n", Constant("kRows", loss.rows % (block / threads) == 0 ? 0 : loss.rows),
      Constant("kColumns", loss.columns), Constant("kClasses", loss.classes), Constant("kThreads", threads),
      Constant("kBlock", block), Constant("kBlocks", blocks), Constant("kVector", RowVector(loss.columns)),
      Constant("kRowBytes", row_bytes), "constexpr bool kHold = ", hold ? "true" : "false", ";\n");
  if (loss.dloss) {
    absl::StrAppend(&launch.source, "#define MT_BACKWARD\n");
    launch.arguments.push_back(*loss.dloss);
  }
  if (loss.log_sums) {
    absl::StrAppend(&launch.source, "#define MT_LOG_SUMS\n");
    launch.arguments.push_back(*loss.log_sums);
  }
  if (loss.bias) {
    absl::StrAppend(&launch.source, "#define MT_BIAS\ntypedef ", CudaType(loss.bias_dtype), " Bias;\n");
    launch.arguments.push_back(*loss.bias);
  }
  absl::StrAppend(&launch.source, CudaText("loss.cuh"));
  launch.grid[0] = CeilDiv(loss.rows, block / threads);
  steps.Launch(std::move(launch));
}

void EmitLossSum(int64_t rows, CudaPlace losses, CudaPlace sum, CudaSteps& steps) {
  steps.Launch({.source = absl::StrCat(Constant("kRows", rows), CudaText("loss_sum.cuh")),
                .function = "mt_loss_sum",
                .block = {1024, 1, 1},
                .arguments = {losses, sum}});
}

void EmitCountLabels(int64_t rows, CudaPlace labels, CudaPlace count, CudaSteps& steps) {
  steps.Launch({.source = absl::StrCat(Constant("kRows", rows), CudaText("loss_sum.cuh")),
                .function = "mt_count_labels",
                .block = {1024, 1, 1},
                .arguments = {labels, count}});
}

absl::Span<const CudaEmitter> CudaRowEmitters() { return kEmitters; }

}  // namespace mt
