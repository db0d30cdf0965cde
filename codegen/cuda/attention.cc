// Attention. By width and precision: on tensor cores (on sm_90 attention_hopper.cc, else attention_flash.cc), tiles in
// f32 (attention_tiles.cuh), and for widths that are no multiple of 16 a warp a row (attention_rows.cuh).
#include "codegen/cuda/attention.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"

namespace mt {
namespace {

constexpr int64_t kTile = 64;

// Which kernels run, and the shared memory that they take.
struct Shape : CudaAttention {
  Shape(const CudaCall& call, bool backward) : CudaAttention(call, backward) {
    const int64_t limit = CudaSharedBytes(call.target) - 1024;  // The kernels have numbers of rows there, too.
    in_tiles = width % 16 == 0 && width <= 128 && TileBytes(4) <= limit;
  }
  int64_t tiles() const { return CeilDiv(length, kTile); }
  // Shared memory for `count` tiles of rows and one of weights.
  int64_t TileBytes(int64_t count) const { return (count * kTile * (width + 4) + kTile * (kTile + 4)) * 4; }

  bool in_tiles;
};

std::string Source(const CudaCall& call, const Shape& shape, bool forward) {
  return absl::StrCat(forward ? "#define MT_FORWARD\n" : "", AttentionConstants(call, shape),
                      forward ? "" : CudaText("attention_delta.cuh"),
                      CudaText(shape.in_tiles ? "attention_tiles.cuh" : "attention_rows.cuh"));
}

absl::Status EmitForward(const CudaCall& call, CudaSteps& steps) {
  const Shape shape(call, /*backward=*/false);
  if (HasHopperAttention(call, shape)) {
    EmitHopperForward(call, shape, steps);
    return absl::OkStatus();
  }
  if (HasFlashAttention(call, shape)) {
    EmitFlashForward(call, shape, steps);
    return absl::OkStatus();
  }
  CudaLaunch launch{.source = Source(call, shape, /*forward=*/true), .function = "mt_attention", .block = {128, 1, 1}};
  launch.arguments = {shape.q, shape.k, shape.v, shape.rng, shape.out, shape.lse};
  if (shape.in_tiles) {
    launch.grid[0] = shape.batch * shape.heads * shape.tiles();
    launch.block[0] = 256;
    launch.shared_bytes = shape.TileBytes(3);
  } else {
    launch.grid[0] = CeilDiv(shape.queries(), 4);
  }
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

absl::Status EmitBackward(const CudaCall& call, CudaSteps& steps) {
  const Shape shape(call, /*backward=*/true);
  if (HasHopperAttention(call, shape)) {
    EmitHopperBackward(call, shape, steps);
    return absl::OkStatus();
  }
  if (HasFlashAttention(call, shape)) {
    EmitFlashBackward(call, shape, steps);
    return absl::OkStatus();
  }
  const std::string source = Source(call, shape, /*forward=*/false);
  const std::vector<CudaPlace> reads = {shape.dout, shape.q, shape.k, shape.v, shape.lse, shape.delta, shape.rng};
  const auto with = [&](std::initializer_list<CudaPlace> results) {
    std::vector<CudaPlace> arguments = reads;
    arguments.insert(arguments.end(), results);
    return arguments;
  };
  CudaLaunch sums{.source = source, .function = "mt_attention_delta", .block = {128, 1, 1}};
  sums.arguments = {shape.dout, shape.out, shape.delta};
  sums.grid[0] = CeilDiv(shape.queries(), 4);
  CudaLaunch dkv{.source = source, .function = "mt_attention_dkv", .block = {128, 1, 1}};
  dkv.arguments = with({shape.dk, shape.dv});
  CudaLaunch dq{.source = source, .function = "mt_attention_dq", .block = {128, 1, 1}};
  dq.arguments = with({shape.dq});
  if (shape.in_tiles) {
    dkv.grid[0] = shape.batch * shape.kv_heads * shape.tiles();
    dq.grid[0] = shape.batch * shape.heads * shape.tiles();
    dkv.block[0] = dq.block[0] = 256;
    dkv.shared_bytes = dq.shared_bytes = shape.TileBytes(4);
  } else {
    dkv.grid[0] = CeilDiv(shape.keys(), 4);
    dq.grid[0] = CeilDiv(shape.queries(), 4);
  }
  steps.Launch(std::move(sums));
  steps.Launch(std::move(dkv));
  steps.Launch(std::move(dq));
  return absl::OkStatus();
}

absl::Status EmitCached(const CudaCall& call, CudaSteps& steps) {
  constexpr int64_t kThreads = 256, kMostWidth = 1024;  // Of the sums in shared memory, 48 KiB at most.
  const TensorType &q = call.operands[0], &cache = call.operands[3];
  const int64_t width = cache.dim(3), vector = VectorOf({width});
  if (width > kMostWidth) {
    return absl::UnimplementedError(absl::StrCat("cached_attention has no kernel for heads of ", width, " elements; ",
                                                 kMostWidth, " are the most"));
  }
  int64_t team = 1;
  while (team < 32 && team * vector < width) team *= 2;
  CudaLaunch launch{.function = "mt_cached_attention",
                    .grid = {q.dim(0) * q.dim(1), 1, 1},
                    .block = {kThreads, 1, 1},
                    .arguments = AllPlaces(call)};
  launch.source = absl::StrCat(
      "typedef ", CudaType(q.dtype), " T;\n", Constant("kGroup", q.dim(1) / cache.dim(1)),
      Constant("kLength", cache.dim(2)), Constant("kWidth", width), Constant("kWindow", call.attrs->Int("window")),
      Constant("kVector", vector), Constant("kTeam", team),
      "constexpr float kScale = ", FloatLiteral(call.attrs->Double("scale")), ";\n", CudaText("cached_attention.cuh"));
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {{"cached_attention", EmitCached},
                                     {"flash_attention", EmitForward},
                                     {"flash_attention_backward", EmitBackward},
                                     {"flash_attention_packed", EmitForward},
                                     {"flash_attention_packed_backward", EmitBackward}};

std::string Strides(absl::string_view name, const HeadStrides& strides) {
  return absl::StrCat(Constant(absl::StrCat(name, "Batch"), strides.batch),
                      Constant(absl::StrCat(name, "Head"), strides.head),
                      Constant(absl::StrCat(name, "Row"), strides.row));
}

}  // namespace

CudaAttention::CudaAttention(const CudaCall& call, bool backward)
    : AttentionLayout(LayoutOfAttention(call.operands, *call.attrs, backward)) {
  const int64_t k_bytes = k_offset * ByteSize(dtype), v_bytes = v_offset * ByteSize(dtype);
  q = OperandPlace(first_operand);
  k = OperandPlace(first_operand + (packed ? 0 : 1), k_bytes);
  v = OperandPlace(first_operand + (packed ? 0 : 2), v_bytes);
  dq = ResultPlace(0);
  dk = ResultPlace(packed ? 0 : 1, k_bytes);
  dv = ResultPlace(packed ? 0 : 2, v_bytes);
  dout = OperandPlace(0);
  delta = WorkspacePlace();
  out = backward ? OperandPlace(statistics) : ResultPlace(0);
  lse = backward ? OperandPlace(statistics + 1) : ResultPlace(1);
  rng = OperandPlace(call.attrs->Bool("rng") ? statistics + (backward ? 2 : 0) : 0);
}

std::string AttentionConstants(const CudaCall& call, const CudaAttention& attention) {
  const Attrs& attrs = *call.attrs;
  const double rate = attrs.Double("rate");
  const auto flag = [](absl::string_view name, bool value) {
    return absl::StrCat("constexpr bool ", name, " = ", value ? "true" : "false", ";\n");
  };
  const auto number = [](absl::string_view name, double value) {
    return absl::StrCat("constexpr float ", name, " = ", FloatLiteral(value), ";\n");
  };
  return absl::StrCat(
      "typedef ", CudaType(attention.dtype), " T;\n", Strides("kQ", attention.q_strides),
      Strides("kK", attention.kv_strides), Strides("kO", attention.out_strides), Strides("kDQ", attention.q_strides),
      Strides("kDK", attention.kv_strides), Constant("kBatch", attention.batch), Constant("kHeads", attention.heads),
      Constant("kGroup", attention.group()), Constant("kLength", attention.length), Constant("kWidth", attention.width),
      Constant("kQueries", attention.queries()), Constant("kWindow", attrs.Int("window")),
      Constant("kKey", attrs.Int("key")), flag("kCausal", attrs.Bool("causal")), flag("kDropout", rate > 0),
      flag("kBf16", attention.dtype == DType::kBF16), number("kScale", attrs.Double("scale")), number("kRate", rate),
      number("kKeep", 1.0 / (1.0 - rate)), CudaText("attention_common.cuh"));
}

absl::Span<const CudaEmitter> CudaAttentionEmitters() { return kEmitters; }

}  // namespace mt
