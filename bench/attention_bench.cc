// Times attention forward and backward on a GPU, through a plan as a model has it: a JSON line for each shape.
//   attention_bench [--dtype=bf16|f16|f32|tf32] [--dropout=RATE] [--packed] [--portable] [B,H,G,T,D[,WINDOW]] ...
// Causal; G key-value heads; TFLOP/s of the pairs that are seen. --packed: q, k and v are columns of one tensor.
// --portable: the kernels that every chip has. Without shapes: those of bench/attention_peer.py. Each run follows a
// fill of memory larger than the L2 cache.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "bench/random_floats.h"
#include "codegen/cuda/code.h"
#include "codegen/memory/buffer_assignment.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "ir/op.h"
#include "ir/target.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"

namespace mt {
namespace {

constexpr int64_t kFlushBytes = int64_t{128} << 20;  // More than any L2 cache.

struct Shape {
  int64_t batch, heads, kv_heads, length, width, window = -1;
};
constexpr Shape kShapes[] = {{125, 12, 12, 256, 64}, {64, 8, 8, 512, 64},     {32, 12, 12, 1024, 64},
                             {8, 12, 12, 4096, 64},  {2, 12, 12, 16384, 64},  {8, 16, 16, 4096, 128},
                             {32, 8, 8, 512, 128},   {2, 16, 16, 16384, 128}, {2, 12, 12, 16384, 64, 1024}};

struct Options {
  DType dtype = DType::kBF16;
  double dropout = 0;
  bool tf32 = false, packed = false, portable = false;
  std::vector<Shape> shapes;
};

absl::StatusOr<Options> Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    absl::string_view arg = argv[i];
    if (absl::ConsumePrefix(&arg, "--dtype=") && (arg == "bf16" || arg == "f16" || arg == "f32" || arg == "tf32")) {
      options.tf32 = arg == "tf32";
      options.dtype = options.tf32 ? DType::kF32 : *ParseDType(arg);
    } else if (absl::ConsumePrefix(&arg, "--dropout=") && absl::SimpleAtod(arg, &options.dropout) &&
               options.dropout > 0 && options.dropout < 1) {
    } else if (arg == "--packed") {
      options.packed = true;
    } else if (arg == "--portable") {
      options.portable = true;
    } else {
      std::vector<int64_t> sizes;
      bool good = true;
      for (const absl::string_view part : absl::StrSplit(arg, ',')) {
        int64_t size = 0;
        good = good && absl::SimpleAtoi(part, &size) && size > 0 && size <= int64_t{1} << 20;
        sizes.push_back(size);
      }
      if (!good || (sizes.size() != 5 && sizes.size() != 6) || sizes[1] % sizes[2] != 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("\"", argv[i], "\": expected B,H,G,T,D or B,H,G,T,D,WINDOW with G a divisor of H, or ",
                         "--dtype=bf16|f16|f32|tf32, --dropout=RATE, --packed, --portable"));
      }
      options.shapes.push_back(
          {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes.size() == 6 ? sizes[5] : int64_t{-1}});
    }
  }
  if (options.shapes.empty()) options.shapes.assign(std::begin(kShapes), std::end(kShapes));
  return options;
}

// The median of some runs, each after `between`, which does not count.
double MedianSeconds(Backend& backend, const Thunk& thunk, const Thunk& between) {
  constexpr int kRuns = 21;
  const std::vector<double> ends = backend.Time(2 * kRuns, [&](int i) { i % 2 == 0 ? between() : thunk(); });
  std::vector<double> seconds;
  for (size_t i = 1; i < ends.size(); i += 2) seconds.push_back(ends[i] - ends[i - 1]);
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

absl::Status BenchShape(const Options& options, const Shape& shape, const std::string& target) {
  Module module("attention");
  Builder builder(*module.AddGraph("train"));
  const auto input = [&](const char* name, std::vector<int64_t> dims) {
    return builder.Input(name, {options.dtype, Dims(dims.begin(), dims.end())}, Role::kData);
  };
  const std::vector<int64_t> queries = {shape.batch, shape.heads, shape.length, shape.width},
                             keys = {shape.batch, shape.kv_heads, shape.length, shape.width};
  Attrs attrs = {{"scale", 1.0 / std::sqrt(static_cast<double>(shape.width))},
                 {"window", shape.window},
                 {"rate", options.dropout},
                 {"rng", options.dropout > 0},
                 {"tf32", options.tf32}};
  std::string op = "flash_attention";
  std::vector<Value> operands;
  Value dout;
  if (options.packed) {
    op = "flash_attention_packed";
    attrs.Set("heads", shape.heads);
    attrs.Set("kv_heads", shape.kv_heads);
    operands = {input("qkv", {shape.batch, shape.length, (shape.heads + 2 * shape.kv_heads) * shape.width})};
    dout = input("dout", {shape.batch, shape.length, shape.heads * shape.width});
  } else {
    operands = {input("q", queries), input("k", keys), input("v", keys)};
    dout = input("dout", queries);
  }
  std::vector<Value> rng;
  if (options.dropout > 0) rng = {builder.Input("rng", {DType::kI32, {4}}, Role::kData)};
  operands.insert(operands.end(), rng.begin(), rng.end());
  const std::vector<Value> results = builder.Ops(op, operands, attrs, "forward");
  RETURN_IF_ERROR(builder.status());
  operands.insert(operands.begin(), dout);
  operands.insert(operands.end() - static_cast<ptrdiff_t>(rng.size()), results.begin(), results.end());
  const std::vector<Value> grads = builder.Ops(absl::StrCat(op, "_backward"), operands, attrs, "backward");
  RETURN_IF_ERROR(builder.status());
  for (size_t i = 0; i < grads.size(); ++i) builder.graph().AddOutput(grads[i], absl::StrCat("gradient", i));
  ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(module, {.target = target}));
  RETURN_IF_ERROR(AddCudaCode(plan, "", nullptr, options.portable));
  const int64_t flush_at = plan.arena_bytes();
  plan.set_arena_bytes(flush_at + kFlushBytes);

  ASSIGN_OR_RETURN(std::unique_ptr<Backend> owned, MakeCudaBackend(0));
  Backend& backend = *owned;
  ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(owned)));
  const Program& program = *executor->FindProgram("train");
  const std::string random = RandomFloats(options.dtype, (size_t{1} << 20) - 24);  // Heads get different ones.
  for (const BoundTensor& tensor : program.inputs()) {
    for (int64_t at = 0; at < tensor.type.byte_size(); at += static_cast<int64_t>(random.size())) {
      backend.CopyToDevice(tensor.data + at, random.data(),
                           std::min(tensor.type.byte_size() - at, static_cast<int64_t>(random.size())));
    }
  }
  const Thunk flush = [&] { backend.Fill(executor->arena() + flush_at, 1, kFlushBytes); };
  program.Run();
  const double seen = shape.window >= 0 && shape.window < shape.length
                          ? static_cast<double>(shape.window + 1) * static_cast<double>(shape.length)
                          : 0.5 * static_cast<double>(shape.length) * static_cast<double>(shape.length);
  const double product = 2.0 * static_cast<double>(shape.batch * shape.heads) * seen * static_cast<double>(shape.width);
  const double forward = MedianSeconds(
      backend, [&] { program.RunRange(0, 1); }, flush);
  const double backward = MedianSeconds(
      backend, [&] { program.RunRange(1, 2); }, flush);
  std::printf("%s\n", nlohmann::ordered_json({{"who", options.portable ? "mt portable" : "mt"},
                                              {"B", shape.batch},
                                              {"H", shape.heads},
                                              {"G", shape.kv_heads},
                                              {"T", shape.length},
                                              {"D", shape.width},
                                              {"window", shape.window},
                                              {"dtype", options.tf32 ? "tf32" : std::string(DTypeName(options.dtype))},
                                              {"dropout", options.dropout},
                                              {"packed", options.packed},
                                              {"deterministic", true},
                                              {"forward_ms", forward * 1e3},
                                              {"backward_ms", backward * 1e3},
                                              {"forward_tflop_s", 2 * product / forward / 1e12},
                                              {"backward_tflop_s", 5 * product / backward / 1e12}})
                          .dump()
                          .c_str());
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Main(const Options& options) {
  ASSIGN_OR_RETURN(const CudaDeviceInfo info, DescribeCudaDevice(0));
  const std::string target = absl::StrCat("cuda:sm_", info.sm);
  for (const Shape& shape : options.shapes) RETURN_IF_ERROR(BenchShape(options, shape, target));
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const absl::StatusOr<mt::Options> options = mt::Parse(argc, argv);
  return mt::ReportStatus(options.ok() ? mt::Main(*options) : options.status());
}
