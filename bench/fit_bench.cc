// How long `mtc fit` takes: one JSON line for each model and pipeline, with the answer, the number of plans, and
// seconds of the wall and of the CPU.
//
//   fit_bench [--target cuda] [--memory 24GiB] [--passes LIST]... [MODEL ...]
#include <ctime>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/choose.h"
#include "codegen/fit.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"

namespace mt {
namespace {

absl::Status Measure(const std::string& model, const std::string& target, int64_t memory_bytes,
                     std::vector<std::string> pipelines) {
  Job job{.spec = model};
  job.options.target = target;
  const bool named = !pipelines.empty();
  if (!named) pipelines = FitPipelines(job);
  for (const std::string& passes : pipelines) {
    job.options.passes = passes;
    const std::clock_t start = std::clock();
    const absl::StatusOr<FitResult> answer = FitLargest(job, FitAxis::kBatch, memory_bytes);
    if (!named && answer.status().code() == absl::StatusCode::kInvalidArgument) continue;  // Nothing for a pass to do.
    RETURN_IF_ERROR(answer);
    const FitResult& fit = *answer;
    const nlohmann::ordered_json json = {{"model", model},
                                         {"target", target},
                                         {"memory_bytes", memory_bytes},
                                         {"passes", fit.passes},
                                         {"batch", fit.largest},
                                         {"needs_bytes", fit.needs_bytes},
                                         {"short_bytes", fit.short_bytes},
                                         {"plans", fit.planned.size()},
                                         {"monotone", fit.monotone},
                                         {"seconds", fit.seconds},
                                         {"cpu_seconds", static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC}};
    std::cout << json.dump() << std::endl;
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  std::string target = "cuda:sm_90";
  int64_t memory_bytes = int64_t{24} << 30;
  std::vector<std::string> models, pipelines;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--target" && has_value) {
      target = argv[++i];
    } else if (argument == "--memory" && has_value) {
      const absl::StatusOr<int64_t> bytes = mt::ParseBytes(argv[++i]);
      if (!bytes.ok()) {
        std::cerr << bytes.status().message() << "\n";
        return 2;
      }
      memory_bytes = *bytes;
    } else if (argument == "--passes" && has_value) {
      pipelines.emplace_back(argv[++i]);
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: fit_bench [--target cuda] [--memory 24GiB] [--passes LIST]... [MODEL ...]\n";
      return 2;
    } else {
      models.push_back(argument);
    }
  }
  if (models.empty()) models = {"lab4", "so_small", "gpt2_124m", "gpt2_wide32k", "llama_160m"};
  for (const std::string& model : models) {
    const absl::Status status = mt::Measure(model, target, memory_bytes, pipelines);
    if (!status.ok()) {
      std::cerr << model << ": " << status.message() << "\n";
      return 1;
    }
  }
  return 0;
}
