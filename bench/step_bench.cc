// Times training steps of a zoo model on random tokens and prints one JSON line: what bench/steps.py runs beside
// PyTorch. A step on a GPU is timed from the batch on the device to the updated weights.
//   step_bench tiny_char --batch=4 [--seq=N] [--target=cpu|cuda] [--passes=LIST] [--threads=N] [--steps=N] [--by-op]
//     [--matmul-algos=timed|heuristic|report]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"
#include "models/model.h"
#include "runtime/cpu/thread_pool.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/train/trainer.h"

namespace mt {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Options {
  std::string model, passes = "default", target = "cpu", matmul_algos = "timed";
  ModelOptions model_options;
  int64_t threads = 0, steps = 12, warmup = 2;
  bool by_op = false;
};

absl::StatusOr<Options> Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    absl::string_view arg = argv[i];
    int64_t value = 0;
    const auto number = [&](absl::string_view name) {
      absl::string_view text = arg;
      return absl::ConsumePrefix(&text, name) && absl::SimpleAtoi(text, &value) && value > 0;
    };
    if (number("--batch=")) {
      options.model_options.batch = value;
    } else if (number("--seq=")) {
      options.model_options.sequence = value;
    } else if (number("--threads=")) {
      options.threads = value;
    } else if (number("--steps=")) {
      options.steps = value;
    } else if (absl::ConsumePrefix(&arg, "--passes=")) {
      options.passes = std::string(arg);
    } else if (absl::ConsumePrefix(&arg, "--target=")) {
      options.target = std::string(arg);
    } else if (absl::ConsumePrefix(&arg, "--matmul-algos=") &&
               (arg == "timed" || arg == "heuristic" || arg == "report")) {
      options.matmul_algos = std::string(arg);
    } else if (arg == "--by-op") {
      options.by_op = true;
    } else if (options.model.empty() && arg.substr(0, 1) != "-") {
      options.model = std::string(arg);
    } else {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", arg,
          "\": usage: step_bench MODEL [--batch=N] [--seq=N] [--target=cpu|cuda] [--passes=LIST] [--threads=N] "
          "[--steps=N] [--by-op] [--matmul-algos=timed|heuristic|report]"));
    }
  }
  if (options.model.empty()) return absl::InvalidArgumentError("a MODEL is needed");
  return options;
}

absl::StatusOr<std::unique_ptr<Backend>> BackendOf(const Options& options) {
  if (options.target != "cpu") {
    CudaOptions cuda;
    cuda.time_matmuls = options.matmul_algos != "heuristic";
    cuda.warn = [](const std::string& warning) { std::fprintf(stderr, "warning: %s\n", warning.c_str()); };
    if (options.matmul_algos == "report") {
      cuda.report = [](const std::string& line) { std::printf("%s\n", line.c_str()); };
    }
    return MakeCudaBackend(0, std::move(cuda));
  }
  return MakeCpuBackend(static_cast<int>(options.threads));
}

absl::Status Main(const Options& options) {
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(options.model, options.model_options));
  const int64_t parameters = module->num_parameters(), vocab = module->fact("vocab_size");
  const int64_t batch = module->fact("batch"), sequence = module->fact("sequence");
  ASSIGN_OR_RETURN(
      proto::PlanProto plan,
      Compile(std::move(module), {.target = options.target, .passes = options.passes, .device_code = true}));
  const int64_t arena_bytes = plan.arena_bytes();
  const std::string passes = plan.passes();
  const ProgramSummary summary = Summarize(plan, *MainProgram(plan));
  ASSIGN_OR_RETURN(std::unique_ptr<Backend> owned, BackendOf(options));
  Backend& backend = *owned;
  const int64_t used_before = backend.UsedDeviceBytes();
  const Clock::time_point load_start = Clock::now();
  ASSIGN_OR_RETURN(std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), std::move(owned)));
  const double load_seconds = Seconds(load_start);
  executor->InitializeStates(1);
  const Program* program = executor->FindProgram("train");
  ASSIGN_OR_RETURN(StepInputs inputs, StepInputs::Bind(*executor, *program, vocab));
  std::vector<int32_t> tokens(static_cast<size_t>(batch * sequence)), labels(tokens.size());
  std::vector<double> seconds;
  double loss = 0;
  for (int64_t step = 0; step < options.warmup + options.steps; ++step) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto words = Philox({1, 0}, {static_cast<uint32_t>(i), static_cast<uint32_t>(step % 4), 0, 0});
      tokens[i] = static_cast<int32_t>(words[0] % static_cast<uint32_t>(vocab));
      labels[i] = static_cast<int32_t>(words[1] % static_cast<uint32_t>(vocab));
    }
    Clock::time_point start = Clock::now();
    inputs.SetBatch(tokens, labels);
    inputs.SetScalars({.seed = 1, .step = step, .first_sample = step * batch, .lr = 3e-4});
    if (!backend.host_addressable()) {
      backend.Synchronize();
      start = Clock::now();
    }
    program->Run();
    float read = 0;
    backend.CopyToHost(&read, program->FindOutput("loss")->data, sizeof(read));
    loss = read;
    if (step >= options.warmup) seconds.push_back(Seconds(start));
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const nlohmann::ordered_json line = {{"peer", absl::StrCat("mt ", Version())},
                                       {"model", options.model},
                                       {"mode", passes},
                                       {"batch", batch},
                                       {"seq", sequence},
                                       {"params", parameters},
                                       {"threads", options.threads == 0 ? AvailableCpus() : options.threads},
                                       {"load_ms", load_seconds * 1e3},
                                       {"step_ms", median * 1e3},
                                       {"min_ms", seconds.front() * 1e3},
                                       {"tok_s", static_cast<double>(batch * sequence) / median},
                                       {"gflop_s", static_cast<double>(summary.flops) / median / 1e9},
                                       {"arena_mib", static_cast<double>(arena_bytes) / (1 << 20)},
                                       {"peak_rss_mib", static_cast<double>(PeakResidentBytes()) / (1 << 20)},
                                       {"loss", loss}};
  if (!backend.host_addressable()) {
    std::fprintf(stderr, "device: %.1f MiB taken since the context was made\n",
                 static_cast<double>(backend.UsedDeviceBytes() - used_before) / (1 << 20));
  }
  std::printf("%s\n", line.dump().c_str());
  if (!options.by_op) return absl::OkStatus();

  struct Total {
    double seconds = 0, flops = 0, bytes = 0;
    int count = 0;
  };
  std::map<std::string, Total> totals;
  inputs.SetBatch(tokens, labels);  // Their buffers are used again within a step.
  inputs.SetScalars({.seed = 1, .lr = 3e-4});
  for (int i = 0; i < program->proto().instructions_size(); ++i) {
    const proto::InstructionProto& instruction = program->proto().instructions(i);
    const Clock::time_point start = Clock::now();
    program->RunRange(i, i + 1);
    backend.Synchronize();
    Total& total = totals[instruction.op()];
    total.seconds += Seconds(start);
    total.flops += static_cast<double>(instruction.flops());
    total.bytes += static_cast<double>(instruction.bytes());
    ++total.count;
  }
  std::vector<std::pair<std::string, Total>> rows(totals.begin(), totals.end());
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  std::printf("%-34s %6s %9s %9s %9s\n", "op", "count", "ms", "GFLOP/s", "GB/s");
  for (const auto& [op, t] : rows) {
    std::printf("%-34s %6d %9.3f %9.1f %9.1f\n", op.c_str(), t.count, t.seconds * 1e3, t.flops / t.seconds / 1e9,
                t.bytes / t.seconds / 1e9);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const absl::StatusOr<mt::Options> options = mt::Parse(argc, argv);
  return mt::ReportStatus(options.ok() ? mt::Main(*options) : options.status());
}
