// Times every distinct instruction of zoo models' steps on a GPU, alone, at the size it has there: an op with its
// shapes and attributes. Prints a JSON line each, then a table sorted by what a step loses against the ceiling, which
// is measured in the same run: a matmul of 8192 x 8192 x 8192 of the operands' dtype, and a copy on the device.
//   kernel_bench MODEL[:BATCH] ... [--target=cuda] [--seq=N] [--passes=LIST] [--matmul-algos=timed|heuristic|report]
// Each run follows a fill of memory larger than the L2 cache; operands are those of a step.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "bench/random_floats.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "models/model.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"
#include "runtime/train/trainer.h"

namespace mt {
namespace {

constexpr int64_t kFlushBytes = int64_t{128} << 20;  // More than any L2 cache.
constexpr int64_t kCopyBytes = int64_t{1} << 30;
constexpr int64_t kMatmulSize = 8192;

struct Options {
  std::vector<std::pair<std::string, ModelOptions>> models;
  std::string target = "cuda", passes = "default", matmul_algos = "timed";
};

absl::StatusOr<Options> Parse(int argc, char** argv) {
  Options options;
  int64_t sequence = 0;
  for (int i = 1; i < argc; ++i) {
    absl::string_view arg = argv[i];
    if (absl::ConsumePrefix(&arg, "--passes=")) {
      options.passes = std::string(arg);
    } else if (absl::ConsumePrefix(&arg, "--target=")) {
      options.target = std::string(arg);
    } else if (absl::ConsumePrefix(&arg, "--matmul-algos=") &&
               (arg == "timed" || arg == "heuristic" || arg == "report")) {
      options.matmul_algos = std::string(arg);
    } else if (absl::ConsumePrefix(&arg, "--seq=") && absl::SimpleAtoi(arg, &sequence) && sequence > 0) {
    } else if (arg.substr(0, 1) != "-") {
      const std::vector<std::string> parts = absl::StrSplit(arg, ':');
      ModelOptions model;
      int64_t batch = 0;
      if (parts.size() > 2 || (parts.size() == 2 && (!absl::SimpleAtoi(parts[1], &batch) || batch < 1))) {
        return absl::InvalidArgumentError(absl::StrCat("\"", argv[i], "\": expected MODEL or MODEL:BATCH"));
      }
      if (batch > 0) model.batch = batch;
      options.models.emplace_back(parts[0], model);
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", argv[i], "\": usage: kernel_bench MODEL[:BATCH] ... [--target=cuda] [--seq=N] ",
                       "[--passes=LIST] [--matmul-algos=timed|heuristic|report]"));
    }
  }
  if (options.models.empty()) return absl::InvalidArgumentError("a MODEL is needed");
  if (!absl::StartsWith(options.target, "cuda")) {
    return absl::InvalidArgumentError(absl::StrCat("--target=", options.target,
                                                   ": kernels are timed by the clock of a GPU; expected cuda (a step "
                                                   "on the CPU, by op: step_bench MODEL --by-op)"));
  }
  for (auto& [name, model] : options.models) {
    if (sequence > 0) model.sequence = sequence;
  }
  return options;
}

absl::StatusOr<std::unique_ptr<Backend>> Gpu(const Options& options) {
  CudaOptions cuda;
  cuda.time_matmuls = options.matmul_algos != "heuristic";
  cuda.warn = [](const std::string& warning) { std::fprintf(stderr, "warning: %s\n", warning.c_str()); };
  if (options.matmul_algos == "report") {
    cuda.report = [](const std::string& line) { std::printf("%s\n", line.c_str()); };
  }
  return MakeCudaBackend(0, std::move(cuda));
}

// The median of some runs, `between` run before each and not counted.
double MedianSeconds(Backend& backend, const Thunk& thunk, const Thunk& between) {
  const auto median = [&](int runs) {
    const std::vector<double> ends = backend.Time(2 * runs, [&](int i) { i % 2 == 0 ? between() : thunk(); });
    std::vector<double> seconds;
    for (size_t i = 1; i < ends.size(); i += 2) seconds.push_back(ends[i] - ends[i - 1]);
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  };
  const double once = median(2);
  return median(std::clamp(static_cast<int>(0.03 / std::max(once, 1e-6)), 5, 21));
}

absl::StatusOr<Thunk> AsGraph(Backend& backend, Thunk thunk) {
  ASSIGN_OR_RETURN(Thunk graph, backend.Capture({thunk}));
  return graph ? graph : thunk;
}

struct Ceilings {
  std::map<std::string, double> flops_per_second;  // By "bf16", "f16", "tf32", "f32".
  double bytes_per_second = 0;
};

std::string MatmulKind(DType dtype, bool tf32) { return tf32 ? "tf32" : std::string(DTypeName(dtype)); }

absl::Status MeasureMatmul(const Options& options, const std::string& target, DType dtype, bool tf32,
                           Ceilings& ceilings) {
  Module module("ceiling");
  Builder builder(*module.AddGraph("train"));
  const TensorType type{dtype, {kMatmulSize, kMatmulSize}};
  const Value a = builder.Input("a", type, Role::kData), b = builder.Input("b", type, Role::kData);
  const Value d = builder.Op("matmul", {a, b}, {{"tf32", tf32}}, "matmul");
  RETURN_IF_ERROR(builder.status());
  builder.graph().AddOutput(d, "d");
  ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(module, {.target = target}));
  RETURN_IF_ERROR(AddCudaCode(plan, ""));
  plan.set_arena_bytes(plan.arena_bytes() + kFlushBytes + 2 * kCopyBytes);
  const int64_t scratch = plan.arena_bytes() - kFlushBytes - 2 * kCopyBytes;
  ASSIGN_OR_RETURN(std::unique_ptr<Backend> owned, Gpu(options));
  Backend& backend = *owned;
  ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(owned)));
  const Program& program = *executor->FindProgram("train");
  const std::string random = RandomFloats(dtype, size_t{1} << 20);
  for (const BoundTensor& input : program.inputs()) {
    for (int64_t at = 0; at < input.type.byte_size(); at += static_cast<int64_t>(random.size())) {
      backend.CopyToDevice(input.data + at, random.data(),
                           std::min(input.type.byte_size() - at, static_cast<int64_t>(random.size())));
    }
  }
  std::byte* const from = executor->arena() + scratch;
  const Thunk flush = [&] { backend.Fill(from + 2 * kCopyBytes, 1, kFlushBytes); };
  const double seconds = MedianSeconds(
      backend, [&] { program.Run(); }, flush);
  ceilings.flops_per_second[MatmulKind(dtype, tf32)] = 2 * std::pow(kMatmulSize, 3) / seconds;
  if (ceilings.bytes_per_second == 0) {
    const auto copy = [&] { backend.Copy(Lane::kThunks, from + kCopyBytes, from, kCopyBytes); };
    ceilings.bytes_per_second = 2.0 * kCopyBytes / MedianSeconds(backend, copy, flush);
  }
  return absl::OkStatus();
}

struct Row {
  std::string model, op, types, attrs, name;
  int count = 0;
  double seconds = 0, flops = 0, bytes = 0, ceiling_seconds = 0;
  double lost_seconds() const { return count * (seconds - ceiling_seconds); }
};

absl::StatusOr<std::string> TypesText(const proto::ProgramProto& program, const proto::InstructionProto& instruction) {
  std::vector<std::string> sides;
  for (const auto* tensors : {&instruction.operands(), &instruction.results()}) {
    std::string text;
    for (const int32_t t : *tensors) {
      ASSIGN_OR_RETURN(const TensorType type, TypeFromProto(program.tensors(t).type()));
      absl::StrAppend(&text, text.empty() ? "" : " ", type.ToString());
    }
    sides.push_back(std::move(text));
  }
  return absl::StrCat(sides[0], " -> ", sides[1]);
}

nlohmann::ordered_json Json(const Row& row) {
  return {{"model", row.model},
          {"op", row.op},
          {"types", row.types},
          {"attrs", row.attrs.substr(0, 200)},
          {"name", row.name},
          {"count", row.count},
          {"ms", row.seconds * 1e3},
          {"tflop_s", row.flops / row.seconds / 1e12},
          {"gb_s", row.bytes / row.seconds / 1e9},
          {"ceiling_ms", row.ceiling_seconds * 1e3},
          {"of_ceiling", row.ceiling_seconds / row.seconds},
          {"lost_ms", row.lost_seconds() * 1e3}};
}

absl::Status BenchModel(const Options& options, const std::string& name, const ModelOptions& model_options,
                        Ceilings& ceilings, std::vector<Row>& rows) {
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(name, model_options));
  const int64_t vocab = module->fact("vocab_size");
  const size_t tokens_in_batch = static_cast<size_t>(module->fact("batch") * module->fact("sequence"));
  ASSIGN_OR_RETURN(
      proto::PlanProto plan,
      Compile(std::move(module), {.target = options.target, .passes = options.passes, .device_code = true}));
  const int64_t flush_at = plan.arena_bytes();
  plan.set_arena_bytes(flush_at + kFlushBytes);

  const proto::ProgramProto* main = FindProgram(plan, "train");
  if (main == nullptr) return absl::InvalidArgumentError(absl::StrCat(name, " has no program \"train\""));
  struct Found {
    Row row;
    std::string kind;  // Of the ceiling for its FLOPs.
    int instruction = 0;
  };
  std::vector<Found> found;
  std::map<std::string, size_t> by_key;
  for (int i = 0; i < main->instructions_size(); ++i) {
    const proto::InstructionProto& instruction = main->instructions(i);
    const OpDef& op = *FindOp(instruction.op());
    if (op.is_view) continue;
    ASSIGN_OR_RETURN(const Attrs attrs, AttrsFromProto(instruction.attrs()));
    Found f{.instruction = i};
    f.row = {
        .model = name, .op = instruction.op(), .attrs = AttrsToString(op.attrs, attrs), .name = instruction.name()};
    ASSIGN_OR_RETURN(f.row.types, TypesText(*main, instruction));
    const auto [at, is_new] = by_key.emplace(absl::StrCat(f.row.op, f.row.attrs, f.row.types), found.size());
    if (is_new) {
      f.row.flops = static_cast<double>(instruction.flops());
      f.row.bytes = static_cast<double>(instruction.bytes());
      const AttrValue* tf32 = attrs.Find("tf32");
      const bool uses_tf32 = tf32 != nullptr && std::get<bool>(*tf32);
      DType dtype = DType::kF32;
      if (!instruction.operands().empty()) {
        ASSIGN_OR_RETURN(const TensorType type, TypeFromProto(main->tensors(instruction.operands(0)).type()));
        if (IsFloat(type.dtype) && type.dtype != DType::kF64) dtype = type.dtype;
      }
      f.kind = MatmulKind(dtype, uses_tf32);
      if (ceilings.flops_per_second.count(f.kind) == 0) {
        RETURN_IF_ERROR(MeasureMatmul(options, plan.target(), dtype, uses_tf32, ceilings));
      }
      found.push_back(std::move(f));
    }
    ++found[at->second].row.count;
  }

  ASSIGN_OR_RETURN(std::unique_ptr<Backend> owned, Gpu(options));
  Backend& backend = *owned;
  ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(owned)));
  executor->InitializeStates(1);
  const Program* program = executor->FindProgram("train");
  ASSIGN_OR_RETURN(StepInputs inputs, StepInputs::Bind(*executor, *program, vocab));
  std::vector<int32_t> tokens(tokens_in_batch), labels(tokens_in_batch);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto words = Philox({1, 0}, {static_cast<uint32_t>(i), 0, 0, 0});
    tokens[i] = static_cast<int32_t>(words[0] % static_cast<uint32_t>(vocab));
    labels[i] = static_cast<int32_t>(words[1] % static_cast<uint32_t>(vocab));
  }
  const auto begin_step = [&] {
    inputs.SetBatch(tokens, labels);
    inputs.SetScalars({.seed = 1, .lr = 3e-4});
  };
  const Thunk flush = [&] { backend.Fill(executor->arena() + flush_at, 1, kFlushBytes); };
  begin_step();
  program->Run();
  double sum = 0;
  for (Found& f : found) {
    ASSIGN_OR_RETURN(const Thunk thunk,
                     AsGraph(backend, [program, i = f.instruction] { program->RunRange(i, i + 1); }));
    begin_step();
    program->RunRange(0, f.instruction);
    f.row.seconds = MedianSeconds(backend, thunk, flush);
    f.row.ceiling_seconds =
        std::max(f.row.flops / ceilings.flops_per_second[f.kind], f.row.bytes / ceilings.bytes_per_second);
    sum += f.row.count * f.row.seconds;
    std::printf("%s\n", Json(f.row).dump().c_str());
    rows.push_back(std::move(f.row));
  }
  // A whole step overwrites the batch.
  const double step = MedianSeconds(
      backend, [&] { program->Run(); }, begin_step);
  std::printf("%s\n", nlohmann::ordered_json({{"model", name},
                                              {"passes", executor->plan().passes()},
                                              {"step_ms", step * 1e3},
                                              {"sum_of_kernels_ms", sum * 1e3}})
                          .dump()
                          .c_str());
  return absl::OkStatus();
}

absl::Status Main(const Options& options) {
  Ceilings ceilings;
  std::vector<Row> rows;
  for (const auto& [name, model_options] : options.models) {
    RETURN_IF_ERROR(BenchModel(options, name, model_options, ceilings, rows));
  }
  nlohmann::ordered_json line = {{"copy_gb_s", ceilings.bytes_per_second / 1e9}};
  for (const auto& [kind, flops] : ceilings.flops_per_second) line[absl::StrCat(kind, "_tflop_s")] = flops / 1e12;
  std::printf("%s\n\n", nlohmann::ordered_json({{"ceilings", line}}).dump().c_str());

  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.lost_seconds() > b.lost_seconds(); });
  std::printf("%8s %5s %9s %8s %8s %7s  %s\n", "lost ms", "times", "us", "TFLOP/s", "GB/s", "ceiling", "what");
  for (const Row& row : rows) {
    std::printf("%8.3f %5d %9.1f %8.1f %8.0f %6.0f%%  %s %s %s\n", row.lost_seconds() * 1e3, row.count,
                row.seconds * 1e6, row.flops / row.seconds / 1e12, row.bytes / row.seconds / 1e9,
                100 * row.ceiling_seconds / row.seconds, row.op.c_str(), row.name.c_str(),
                row.types.substr(0, 120).c_str());
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const absl::StatusOr<mt::Options> options = mt::Parse(argc, argv);
  return mt::ReportStatus(options.ok() ? mt::Main(*options) : options.status());
}
