// Attention. By width and dtype: 16-bit operands on tensor cores (flash.cuh), tiles in f32 (attention_tiles.cuh), and
// for widths that are no multiple of 16 a warp a row (attention_rows.cuh).
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"

namespace mt {
namespace {

constexpr int64_t kTile = 64;

// What a launch needs to know of the shapes.
struct Shape {
  Shape(const CudaCall& call, const TensorType& q, const TensorType& k)
      : dtype(q.dtype), batch(q.dim(0)), heads(q.dim(1)), kv_heads(k.dim(1)), length(q.dim(2)), width(q.dim(3)) {
    const bool fits_tiles = width % 16 == 0 && width <= 128;
    const int64_t limit = CudaSharedBytes(call.target) - 1024;  // The kernels have numbers of rows there, too.
    on_tensor_cores = fits_tiles && dtype != DType::kF32 && call.target.sm >= 80 && FlashBytes(6) <= limit;
    in_tiles = on_tensor_cores || (fits_tiles && TileBytes(4) <= limit);
  }
  int64_t tiles() const { return CeilDiv(length, kTile); }
  // Shared memory for `count` tiles of rows, and, where they are not held in registers, one of weights.
  int64_t FlashBytes(int64_t count) const { return count * kTile * (width + 8) * 2; }
  int64_t TileBytes(int64_t count) const { return (count * kTile * (width + 4) + kTile * (kTile + 4)) * 4; }
  absl::string_view skeleton() const {
    return on_tensor_cores ? "flash.cuh" : in_tiles ? "attention_tiles.cuh" : "attention_rows.cuh";
  }

  DType dtype;
  int64_t batch, heads, kv_heads, length, width;
  bool in_tiles, on_tensor_cores;
};

std::string Source(const CudaCall& call, const Shape& shape, bool forward) {
  const Attrs& attrs = *call.attrs;
  const double rate = attrs.Double("rate");
  const auto flag = [](absl::string_view name, bool value) {
    return absl::StrCat("constexpr bool ", name, " = ", value ? "true" : "false", ";\n");
  };
  const auto number = [](absl::string_view name, double value) {
    return absl::StrCat("constexpr float ", name, " = ", FloatLiteral(value), ";\n");
  };
  return absl::StrCat(forward ? "#define MT_FORWARD\n" : "", "typedef ", CudaType(shape.dtype), " T;\n",
                      Constant("kBatch", shape.batch), Constant("kHeads", shape.heads),
                      Constant("kGroup", shape.heads / shape.kv_heads), Constant("kLength", shape.length),
                      Constant("kWidth", shape.width), Constant("kQueries", shape.batch * shape.heads * shape.length),
                      Constant("kWindow", attrs.Int("window")), Constant("kKey", attrs.Int("key")),
                      flag("kCausal", attrs.Bool("causal")), flag("kDropout", rate > 0),
                      flag("kBf16", shape.dtype == DType::kBF16), number("kScale", attrs.Double("scale")),
                      number("kRate", rate), number("kKeep", 1.0 / (1.0 - rate)), CudaText("attention_common.cuh"),
                      forward || shape.on_tensor_cores ? "" : CudaText("attention_delta.cuh"),
                      CudaText(shape.skeleton()));
}

// The random state, or what stands in its place where nothing is dropped.
CudaPlace RandomState(const CudaCall& call, int index) { return OperandPlace(call.attrs->Bool("rng") ? index : 0); }

absl::Status EmitForward(const CudaCall& call, CudaSteps& steps) {
  const Shape shape(call, call.operands[0], call.operands[1]);
  CudaLaunch launch{.source = Source(call, shape, /*forward=*/true), .block = {128, 1, 1}};
  launch.arguments = {OperandPlace(0),      OperandPlace(1), OperandPlace(2),
                      RandomState(call, 3), ResultPlace(0),  ResultPlace(1)};
  launch.function = shape.on_tensor_cores ? "mt_flash" : "mt_attention";
  if (shape.in_tiles) {
    launch.grid[0] = shape.batch * shape.heads * shape.tiles();
    launch.block[0] = shape.on_tensor_cores ? 128 : 256;
    launch.shared_bytes = shape.on_tensor_cores ? shape.FlashBytes(5) : shape.TileBytes(3);
  } else {
    launch.grid[0] = CeilDiv(shape.batch * shape.heads * shape.length, 4);
  }
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

absl::Status EmitBackward(const CudaCall& call, CudaSteps& steps) {
  const Shape shape(call, call.operands[1], call.operands[2]);
  const std::string source = Source(call, shape, /*forward=*/false);
  const CudaPlace dout = OperandPlace(0), out = OperandPlace(4), delta = WorkspacePlace();
  const int64_t queries = shape.batch * shape.heads * shape.length, keys = shape.batch * shape.kv_heads * shape.length;
  const std::vector<CudaPlace> reads = {dout,  OperandPlace(1),     OperandPlace(2), OperandPlace(3), OperandPlace(5),
                                        delta, RandomState(call, 6)};
  const auto with = [&](std::initializer_list<CudaPlace> results) {
    std::vector<CudaPlace> arguments = reads;
    arguments.insert(arguments.end(), results);
    return arguments;
  };
  CudaLaunch sums{.source = source, .arguments = {dout, out, delta}};
  CudaLaunch dkv{.source = source, .block = {128, 1, 1}, .arguments = with({ResultPlace(1), ResultPlace(2)})};
  CudaLaunch dq{.source = source, .block = {128, 1, 1}, .arguments = with({ResultPlace(0)})};
  const absl::string_view prefix = shape.on_tensor_cores ? "mt_flash" : "mt_attention";
  sums.function = absl::StrCat(prefix, "_delta");
  dkv.function = absl::StrCat(prefix, "_dkv");
  dq.function = absl::StrCat(prefix, "_dq");
  if (shape.on_tensor_cores) {
    const int64_t threads = shape.width % 64 == 0 ? 8 : shape.width % 32 == 0 ? 4 : 2;
    sums.grid[0] = CeilDiv(queries * threads, 256);
    sums.block[0] = 256;
  } else {
    sums.grid[0] = CeilDiv(queries, 4);
    sums.block[0] = 128;
  }
  if (shape.in_tiles) {
    dkv.grid[0] = shape.batch * shape.kv_heads * shape.tiles();
    dq.grid[0] = shape.batch * shape.heads * shape.tiles();
    dkv.block[0] = dq.block[0] = shape.on_tensor_cores ? 128 : 256;
    dkv.shared_bytes = dq.shared_bytes = shape.on_tensor_cores ? shape.FlashBytes(6) : shape.TileBytes(4);
  } else {
    dkv.grid[0] = CeilDiv(keys, 4);
    dq.grid[0] = CeilDiv(queries, 4);
  }
  steps.Launch(std::move(sums));
  steps.Launch(std::move(dkv));
  steps.Launch(std::move(dq));
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {{"flash_attention", EmitForward}, {"flash_attention_backward", EmitBackward}};

}  // namespace

absl::Span<const CudaEmitter> CudaAttentionEmitters() { return kEmitters; }

}  // namespace mt
