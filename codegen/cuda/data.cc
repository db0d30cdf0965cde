// Moves of data, reductions, embeddings, positions and heads.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"
#include "ir/region.h"

namespace mt {
namespace {

constexpr int64_t kBlock = 256;

// The largest access of at most 16 bytes that divides all of `bytes`.
int64_t UnitOf(std::initializer_list<int64_t> bytes) {
  int64_t unit = 16;
  for (const int64_t b : bytes) unit = std::gcd(unit, b);
  return unit;
}

// A launch with a thread for each e = 0 ... count - 1, and the text that declares e.
CudaLaunch ThreadEach(const std::string& function, int64_t count, std::string& number) {
  const absl::string_view index = IndexType(count);
  const CudaThreads threads = CutCudaThreads(count);
  number = absl::StrCat("  const ", index, " e = ", ThreadText(index), ";\n");
  if (!threads.exact) absl::StrAppend(&number, "  if (e >= ", count, "u) return;\n");
  return {.function = function, .grid = {threads.blocks, 1, 1}, .block = {threads.block, 1, 1}};
}

// A kernel that writes units e = 0 ... count - 1 of `to`; `body` is the text of what happens to `e`, with x and y of
// `type`.
void EmitUnits(absl::string_view op, int64_t unit, int64_t count, absl::string_view body, CudaPlace from, CudaPlace to,
               CudaSteps& steps) {
  const std::string function = FunctionName(op);
  const absl::string_view type = CudaUnit(unit);
  std::string number;
  CudaLaunch launch = ThreadEach(function, count, number);
  launch.arguments = {from, to};
  launch.source = absl::StrCat("extern \"C\" __global__ void __launch_bounds__(256) ", function, "(const ", type,
                               "* x, ", type, "* y) {\n", number, body, "}\n");
  steps.Launch(std::move(launch));
}

// The sum of strides[d] times index d of position @ in `dims`, as text; "0" where there is none.
std::string PlaceText(absl::string_view position, absl::Span<const int64_t> dims, absl::Span<const int64_t> strides) {
  std::vector<std::string> terms;
  int64_t inner = 1;
  for (size_t d = dims.size(); d-- > 0;) {
    if (dims[d] != 1 && strides[d] != 0) {
      const std::string quotient = inner == 1 ? std::string(position) : absl::StrCat(position, " / ", inner, "u");
      const bool is_first =
          std::all_of(dims.begin(), dims.begin() + static_cast<int64_t>(d), [](int64_t n) { return n == 1; });
      const std::string index = is_first ? quotient : absl::StrCat(quotient, " % ", dims[d], "u");
      terms.push_back(strides[d] == 1 ? index : absl::StrCat("(", index, ") * ", strides[d], "u"));
    }
    inner *= dims[d];
  }
  return terms.empty() ? "0" : absl::StrJoin(terms, " + ");
}

std::vector<int64_t> StridesOf(absl::Span<const int64_t> dims) {
  std::vector<int64_t> strides(dims.size(), 1);
  for (size_t d = dims.size(); d-- > 1;) strides[d - 1] = strides[d] * dims[d];
  return strides;
}

// Without dimensions of 1, and with those merged that follow one another in both layouts.
std::pair<std::vector<int64_t>, std::vector<int64_t>> MergeDims(absl::Span<const int64_t> dims,
                                                                absl::Span<const int64_t> strides) {
  std::vector<int64_t> d, s;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] == 1) continue;
    if (!d.empty() && s.back() == strides[i] * dims[i]) {
      d.back() *= dims[i];
      s.back() = strides[i];
    } else {
      d.push_back(dims[i]);
      s.push_back(strides[i]);
    }
  }
  return {d, s};
}

// y[i...] = x[sum of strides i]: dims and strides of the result, in elements of `bytes`.
void EmitStrided(absl::string_view op, int64_t bytes, std::vector<int64_t> dims, std::vector<int64_t> strides,
                 CudaSteps& steps) {
  auto [d, s] = MergeDims(dims, strides);
  if (d.empty()) {
    d.push_back(1);
    s.push_back(1);
  }
  int64_t unit = bytes;
  if (s.back() == 1) {
    unit = UnitOf({d.back() * bytes});
    for (size_t i = 0; i + 1 < d.size(); ++i) unit = std::gcd(unit, s[i] * bytes);
    const int64_t k = unit / bytes;
    d.back() /= k;
    for (size_t i = 0; i + 1 < d.size(); ++i) s[i] /= k;
  }
  const int64_t count = std::accumulate(d.begin(), d.end(), int64_t{1}, std::multiplies<int64_t>());
  EmitUnits(op, unit, count, absl::StrCat("  y[e] = x[", PlaceText("e", d, s), "];\n"), OperandPlace(0), ResultPlace(0),
            steps);
}

// Through tiles of 32 x 32, where x's last dimension is not that of the result.
void EmitTiles(absl::string_view op, int64_t bytes, const std::vector<int64_t>& dims,
               const std::vector<int64_t>& strides, CudaSteps& steps) {
  // a: the result's last dimension; b: x's last dimension.
  const size_t a = dims.size() - 1;
  size_t b = 0;
  while (strides[b] != 1 || dims[b] == 1) ++b;
  const std::vector<int64_t> to = StridesOf(dims);
  std::vector<int64_t> rest, from_strides, to_strides;
  int64_t batch = 1;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i == a || i == b) continue;
    rest.push_back(dims[i]);
    from_strides.push_back(strides[i]);
    to_strides.push_back(to[i]);
    batch *= dims[i];
  }
  const int64_t tiles_a = CeilDiv(dims[a], 32), tiles_b = CeilDiv(dims[b], 32);
  const std::string function = FunctionName(op);
  const absl::string_view type = CudaUnit(bytes);
  CudaLaunch launch{.function = function, .grid = {batch * tiles_a * tiles_b, 1, 1}, .block = {32, 8, 1}};
  launch.arguments = {OperandPlace(0), ResultPlace(0)};
  launch.source = absl::StrCat(
      "extern \"C\" __global__ void __launch_bounds__(256) ", function, "(const ", type, "* x, ", type,
      "* y) {\n  __shared__ ", type, " tile[32][33];\n  const u64 n = blockIdx.x / ", tiles_a * tiles_b,
      "u;\n  const u64 a0 = blockIdx.x / ", tiles_b, "u % ", tiles_a, "u * 32, b0 = blockIdx.x % ", tiles_b,
      "u * 32;\n  const u64 from = ", PlaceText("n", rest, from_strides), ", to = ", PlaceText("n", rest, to_strides),
      ";\n#pragma unroll\n  for (int i = threadIdx.y; i < 32; i += 8) {\n    const u64 a = a0 + i, b = b0 + ",
      "threadIdx.x;\n    if (a < ", dims[a], " && b < ", dims[b], ") tile[i][threadIdx.x] = x[from + a * ", strides[a],
      " + b];\n  }\n  __syncthreads();\n#pragma unroll\n  for (int i = threadIdx.y; i < 32; i += 8) {\n    const u64 b "
      "= ",
      "b0 + i, a = a0 + threadIdx.x;\n    if (a < ", dims[a], " && b < ", dims[b], ") y[to + b * ", to[b],
      " + a] = tile[threadIdx.x][i];\n  }\n}\n");
  steps.Launch(std::move(launch));
}

absl::Status EmitTranspose(const CudaCall& call, CudaSteps& steps) {
  const TensorType& x = call.operands[0];
  const std::vector<int64_t> from = StridesOf(x.dims);
  std::vector<int64_t> dims, strides;
  for (const int64_t p : call.attrs->Get<IntList>("perm")) {
    dims.push_back(x.dim(p));
    strides.push_back(from[static_cast<size_t>(p)]);
  }
  auto [d, s] = MergeDims(dims, strides);
  if (d.empty() || s.back() == 1) {
    EmitStrided("transpose", ByteSize(x.dtype), d, s, steps);
  } else {
    EmitTiles("transpose", ByteSize(x.dtype), d, s, steps);
  }
  return absl::OkStatus();
}

absl::Status EmitBroadcast(const CudaCall& call, CudaSteps& steps) {
  const TensorType &x = call.operands[0], &y = call.results[0];
  const std::vector<int64_t> from = StridesOf(x.dims);
  std::vector<int64_t> strides(y.dims.size(), 0);
  const size_t missing = y.dims.size() - x.dims.size();
  for (size_t d = 0; d < x.dims.size(); ++d) strides[missing + d] = x.dims[d] == 1 ? 0 : from[d];
  EmitStrided("broadcast", ByteSize(x.dtype), {y.dims.begin(), y.dims.end()}, strides, steps);
  return absl::OkStatus();
}

// Elements before dimension `dim`, and bytes of one index of it.
struct Cut {
  int64_t outer = 1, inner_bytes = 1;
};
Cut CutAt(const TensorType& type, int64_t dim) {
  Cut cut;
  for (int64_t d = 0; d < type.rank(); ++d) (d < dim ? cut.outer : cut.inner_bytes) *= d == dim ? 1 : type.dim(d);
  cut.inner_bytes *= ByteSize(type.dtype);
  return cut;
}

absl::Status EmitSlice(const CudaCall& call, CudaSteps& steps) {
  const TensorType &x = call.operands[0], &y = call.results[0];
  const int64_t dim = call.attrs->Int("dim");
  const Cut cut = CutAt(x, dim);
  const int64_t run = y.dim(dim) * cut.inner_bytes, pitch = x.dim(dim) * cut.inner_bytes,
                start = call.attrs->Int("start") * cut.inner_bytes, unit = UnitOf({run, pitch, start});
  EmitUnits("slice", unit, cut.outer * run / unit,
            absl::StrCat("  y[e] = x[e / ", run / unit, "u * ", pitch / unit, "ull + e % ", run / unit, "u + ",
                         start / unit, "u];\n"),
            OperandPlace(0), ResultPlace(0), steps);
  return absl::OkStatus();
}

absl::Status EmitPad(const CudaCall& call, CudaSteps& steps) {
  const TensorType &x = call.operands[0], &y = call.results[0];
  const int64_t dim = call.attrs->Int("dim");
  const Cut cut = CutAt(x, dim);
  const int64_t run = x.dim(dim) * cut.inner_bytes, pitch = y.dim(dim) * cut.inner_bytes,
                before = call.attrs->Int("before") * cut.inner_bytes, unit = UnitOf({run, pitch, before});
  EmitUnits("pad", unit, cut.outer * pitch / unit,
            absl::StrCat("  const u64 at = e % ", pitch / unit, "u - ", before / unit, "ull;\n  ", CudaUnit(unit),
                         " value = {};\n  if (at < ", run / unit, "u) value = x[e / ", pitch / unit, "u * ", run / unit,
                         "ull + at];\n  y[e] = value;\n"),
            OperandPlace(0), ResultPlace(0), steps);
  return absl::OkStatus();
}

absl::Status EmitConcat(const CudaCall& call, CudaSteps& steps) {
  const int64_t dim = call.attrs->Int("dim");
  const TensorType& y = call.results[0];
  const Cut cut = CutAt(y, dim);
  const int64_t pitch = y.dim(dim) * cut.inner_bytes;
  int64_t start = 0;
  for (size_t i = 0; i < call.operands.size(); ++i) {
    const int64_t run = call.operands[i].dim(dim) * cut.inner_bytes, unit = UnitOf({run, pitch, start});
    EmitUnits("concat", unit, cut.outer * run / unit,
              absl::StrCat("  y[e / ", run / unit, "u * ", pitch / unit, "ull + e % ", run / unit, "u + ", start / unit,
                           "u] = x[e];\n"),
              OperandPlace(static_cast<int>(i)), ResultPlace(0), steps);
    start += run;
  }
  return absl::OkStatus();
}

// Heads [B, H, T, D] of each part, and rows [B, T, all heads D].
absl::Status EmitHeads(const CudaCall& call, absl::Span<const TensorType> parts, bool to_heads, CudaSteps& steps) {
  const TensorType& first = parts[0];
  const int64_t t = first.dim(2), row_bytes = first.dim(3) * ByteSize(first.dtype), unit = UnitOf({row_bytes});
  const int64_t d = row_bytes / unit;
  int64_t heads = 0;
  for (const TensorType& part : parts) heads += part.dim(1);
  const int64_t count = first.dim(0) * t * heads * d;
  const absl::string_view index = IndexType(count), type = CudaUnit(unit);
  const std::string function = FunctionName(call.op->name);
  std::vector<std::string> args;
  std::string moves;
  int64_t before = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t h = parts[i].dim(1);
    args.push_back(absl::StrCat(to_heads ? "" : "const ", type, "* h", i));
    absl::StrAppend(&moves, "  if (head >= ", before, " && head < ", before + h, ") {\n    const ", index,
                    " at = ((n * ", h, " + head - ", before, ") * ", t, " + t) * ", d, " + d;\n    ",
                    to_heads ? absl::StrCat("h", i, "[at] = rows[e];\n") : absl::StrCat("rows[e] = h", i, "[at];\n"),
                    "  }\n");
    before += h;
  }
  const std::string rows = absl::StrCat(to_heads ? "const " : "", type, "* rows");
  if (to_heads) {
    args.insert(args.begin(), rows);
  } else {
    args.push_back(rows);
  }
  std::string number;
  CudaLaunch launch = ThreadEach(function, count, number);
  launch.arguments = AllPlaces(call);
  launch.source =
      absl::StrCat("extern \"C\" __global__ void __launch_bounds__(256) ", function, "(", absl::StrJoin(args, ", "),
                   ") {\n", number, "  const ", index, " d = e % ", d, "u, head = e / ", d, "u % ", heads,
                   "u, t = e / ", d * heads, "u % ", t, "u, n = e / ", d * heads * t, "u;\n", moves, "}\n");
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}
absl::Status EmitToHeads(const CudaCall& call, CudaSteps& steps) { return EmitHeads(call, call.results, true, steps); }
absl::Status EmitFromHeads(const CudaCall& call, CudaSteps& steps) {
  return EmitHeads(call, call.operands, false, steps);
}

absl::Status EmitReduce(const CudaCall& call, CudaSteps& steps) {
  const TensorType& x = call.operands[0];
  const bool is_max = call.op->name == "reduce_max", is_mean = call.op->name == "reduce_mean";
  std::vector<bool> reduced(x.dims.size(), false);
  for (const int64_t d : call.attrs->Get<IntList>("dims")) reduced[static_cast<size_t>(d)] = true;
  const std::vector<int64_t> strides = StridesOf(x.dims);
  std::vector<int64_t> kept_dims, kept_strides, dims, reduced_strides;
  bool leading = true, seen_kept = false;
  for (size_t d = 0; d < x.dims.size(); ++d) {
    if (x.dims[d] == 1) continue;
    (reduced[d] ? dims : kept_dims).push_back(x.dims[d]);
    (reduced[d] ? reduced_strides : kept_strides).push_back(strides[d]);
    leading = leading && !(reduced[d] && seen_kept);
    seen_kept = seen_kept || !reduced[d];
  }
  const auto product = [](const std::vector<int64_t>& list) {
    return std::accumulate(list.begin(), list.end(), int64_t{1}, std::multiplies<int64_t>());
  };
  const int64_t kept = product(kept_dims), length = product(dims);
  const bool wide = kept >= kCudaWideReduction;
  if (call.op->name == "reduce_sum" && leading && !wide) {
    RegionBuilder b(length, kept);
    b.AddResult(RegionResult::Kind::kColumns, b.Load(0), {x.dtype, {kept}});
    return EmitRegion(call, b.Build(), steps);
  }
  const CudaChunks chunks = CutCudaSum(length);
  const bool in_registers = wide || chunks.count == 1;
  std::string source = absl::StrCat(
      in_registers ? "#define MT_WIDE\n" : "", "typedef ", CudaType(x.dtype), " T;\ntypedef ",
      is_max ? "Largest" : "Sum", " Op;\n", Constant("kKept", kept), Constant("kReduced", length),
      Constant("kLength", chunks.length), Constant("kCount", chunks.count),
      "constexpr bool kDivides = ", is_mean ? "true" : "false",
      ";\nconstexpr float kDivisor = ", FloatLiteral(static_cast<double>(length)),
      ";\n__device__ __forceinline__ u64 KeptPlace(u64 k) { return ", PlaceText("k", kept_dims, kept_strides),
      "; }\n__device__ __forceinline__ u64 ReducedPlace(u64 r) { return ", PlaceText("r", dims, reduced_strides),
      "; }\n", CudaText("reduce.cuh"));
  CudaLaunch launch{.source = source, .function = "mt_reduce", .grid = {CeilDiv(kept, 32), 1, 1}, .block = {256, 1, 1}};
  launch.arguments = {OperandPlace(0), in_registers ? ResultPlace(0) : WorkspacePlace()};
  if (in_registers) {
    steps.Launch(std::move(launch));
    return absl::OkStatus();
  }
  launch.grid[1] = chunks.count;
  steps.Launch(std::move(launch));
  steps.Launch({.source = std::move(source),
                .function = "mt_reduce_chunks",
                .grid = {CeilDiv(kept, 32), 1, 1},
                .block = {512, 1, 1},
                .arguments = {WorkspacePlace(), ResultPlace(0)}});
  return absl::OkStatus();
}

absl::Status EmitEmbedding(const CudaCall& call, CudaSteps& steps) {
  const TensorType& table = call.operands[0];
  const int64_t row_bytes = table.dim(1) * ByteSize(table.dtype), unit = UnitOf({row_bytes}), n = row_bytes / unit;
  const int64_t count = call.operands[1].num_elements() * n;
  const absl::string_view type = CudaUnit(unit);
  std::string number;
  CudaLaunch launch = ThreadEach("mt_embedding", count, number);
  launch.arguments = {OperandPlace(0), OperandPlace(1), ResultPlace(0)};
  launch.source = absl::StrCat("extern \"C\" __global__ void __launch_bounds__(256) mt_embedding(const ", type,
                               "* table, const int* ids, ", type, "* y) {\n", number, "  y[e] = table[(u64)ids[e / ", n,
                               "u] * ", n, " + e % ", n, "u];\n}\n");
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

absl::Status EmitEmbeddingBackward(const CudaCall& call, CudaSteps& steps) {
  const TensorType &dy = call.operands[0], &table = call.results[0];
  const int64_t width = dy.dim(-1), positions = call.operands[1].num_elements(), vector = RowVector(width);
  const int64_t vectors = width / vector, threads = std::min<int64_t>(256, CeilDiv(vectors, 32) * 32);
  const int64_t chunks = CeilDiv(positions, kCudaEmbeddingChunk), groups = std::min<int64_t>(8, 768 / threads);
  const bool accumulate = call.attrs->Bool("accumulator");
  const std::string source = absl::StrCat(
      "typedef ", CudaType(dy.dtype), " T;\ntypedef ", CudaType(table.dtype), " R;\n",
      Constant("kPositions", positions), Constant("kWidth", width), Constant("kChunk", kCudaEmbeddingChunk),
      Constant("kVector", vector), Constant("kThreads", threads), Constant("kGroups", groups),
      Constant("kTable", table.num_elements()), "constexpr bool kAccumulate = ", accumulate ? "true" : "false", ";\n",
      CudaText("embedding_backward.cuh"));
  // Without an accumulator, the kernels do not read the place that stands for it.
  const CudaPlace accumulator = accumulate ? OperandPlace(3) : ResultPlace(0);
  if (accumulate) {
    steps.Launch({.source = source,
                  .function = "mt_embedding_copy",
                  .grid = {std::min<int64_t>(1024, CeilDiv(table.num_elements(), kBlock)), 1, 1},
                  .block = {kBlock, 1, 1},
                  .arguments = {accumulator, ResultPlace(0)}});
  } else {
    steps.Fill(ResultPlace(0), table.byte_size(), 0);
  }
  const std::array<int64_t, 3> grid = {chunks, CeilDiv(vectors, threads), 1};
  steps.Launch({.source = source,
                .function = "mt_embedding_backward",
                .grid = grid,
                .block = {threads * groups, 1, 1},
                .arguments = {OperandPlace(0), OperandPlace(1), OperandPlace(2), accumulator, ResultPlace(0),
                              WorkspacePlace()}});
  if (chunks > 1) {
    steps.Launch({.source = source,
                  .function = "mt_embedding_join",
                  .grid = grid,
                  .block = {threads, 1, 1},
                  .arguments = {OperandPlace(1), OperandPlace(2), WorkspacePlace(), accumulator, ResultPlace(0)}});
  }
  return absl::OkStatus();
}

absl::Status EmitSinusoid(const CudaCall& call, CudaSteps& steps) {
  const int64_t length = call.attrs->Int("length"), width = call.attrs->Int("width"), count = length * width;
  CudaLaunch launch{.function = "mt_sinusoid", .grid = {CeilDiv(count, kBlock), 1, 1}, .block = {kBlock, 1, 1}};
  const bool position = call.attrs->Bool("position");
  if (position) launch.arguments.push_back(OperandPlace(0));
  launch.arguments.push_back(ResultPlace(0));
  launch.source = absl::StrCat(
      "extern \"C\" __global__ void __launch_bounds__(256) mt_sinusoid(", position ? "const int* position, " : "",
      "float* y) {\n  const u64 e = blockIdx.x * 256ull + threadIdx.x;\n  if (e >= ", count,
      "ull) return;\n  const u64 t = e / ", width, position ? " + *position" : "", ", j = e % ", width,
      ";\n  const double angle = (double)t * pow(10000.0, -(double)(j / 2 * 2) / ",
      DoubleLiteral(static_cast<double>(width)), ");\n  y[e] = (float)(j % 2 == 0 ? sin(angle) : cos(angle));\n}\n");
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

absl::Status EmitRope(const CudaCall& call, CudaSteps& steps) {
  const TensorType& x = call.operands[0];
  const int64_t width = x.dim(-1), length = x.dim(-2), rows = x.num_elements() / (width * length);
  const int64_t vector = VectorOf({width / 2}), vectors = width / 2 / vector;
  // Angles are used for several rows, but not at the price of idle processors.
  const int64_t each = rows * length * vectors >= (int64_t{1} << 20) ? 8 : 1;
  std::vector<std::string> frequencies;
  for (int64_t i = 0; i < width / 2; ++i) {
    frequencies.push_back(DoubleLiteral(
        std::pow(call.attrs->Double("theta"), -2.0 * static_cast<double>(i) / static_cast<double>(width))));
  }
  const bool position = call.attrs->Bool("position");
  const CudaThreads threads = CutCudaThreads(CeilDiv(rows, each) * vectors);
  const bool exact = threads.exact && rows % each == 0;
  CudaLaunch launch{.function = "mt_rope", .grid = {length, threads.blocks, 1}, .block = {threads.block, 1, 1}};
  // Without a position, the kernel does not read the place that stands for it.
  launch.arguments = {OperandPlace(0), OperandPlace(position ? 1 : 0), ResultPlace(0)};
  launch.source = absl::StrCat("typedef ", CudaType(x.dtype), " Element;\n", Constant("kRows", exact ? 0 : rows),
                               Constant("kWidth", width), Constant("kVector", vector), Constant("kRowsPerThread", each),
                               "constexpr bool kInterleaved = ", call.attrs->Bool("interleaved") ? "true" : "false",
                               ";\nconstexpr bool kPosition = ", position ? "true" : "false",
                               ";\nconstexpr float kSign = ", call.attrs->Bool("inverse") ? "-1.0f" : "1.0f",
                               ";\n__constant__ double kFrequency[", width / 2, "] = {",
                               absl::StrJoin(frequencies, ", "), "};\n", CudaText("rope.cuh"));
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {
    {"transpose", EmitTranspose},
    {"slice", EmitSlice},
    {"pad", EmitPad},
    {"concat", EmitConcat},
    {"broadcast", EmitBroadcast},
    {"split_heads", EmitToHeads},
    {"unmerge_heads", EmitToHeads},
    {"join_heads", EmitFromHeads},
    {"merge_heads", EmitFromHeads},
    {"reduce_sum", EmitReduce},
    {"reduce_mean", EmitReduce},
    {"reduce_max", EmitReduce},
    {"embedding", EmitEmbedding},
    {"embedding_backward", EmitEmbeddingBackward},
    {"sinusoid", EmitSinusoid},
    {"rope", EmitRope},
};

}  // namespace

absl::Span<const CudaEmitter> CudaDataEmitters() { return kEmitters; }

}  // namespace mt
