// What a run leaves behind, and reading it back.
//
// In the results folder, each written at once and whole:
//   DATASET_TECHNIQUE_metrics.json   losses, perplexities, times, shapes, flags; its presence says that the run is done
//   DATASET_TECHNIQUE_memory.json    bytes by class and phase, planned and measured
//   experiment_summary.json          every run of the last suite, and all results
//   comparison_report.txt            the tables
//   runs/DATASET_TECHNIQUE/          the plan, the tools' own output and mtrun's --out
#ifndef MT_BENCH_LAB_RESULTS_H_
#define MT_BENCH_LAB_RESULTS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ir/base/json.h"

namespace mt {

using Json = nlohmann::ordered_json;

inline constexpr int kResultsVersion = 1;

std::string MetricsPath(const std::string& folder, const std::string& dataset, const std::string& technique);
std::string MemoryPath(const std::string& folder, const std::string& dataset, const std::string& technique);
std::string RunFolder(const std::string& folder, const std::string& dataset, const std::string& technique);

// A file of JSON, an object. Errors: NotFound, FailedPrecondition (names file and position).
absl::StatusOr<Json> ReadJson(const std::string& path);
// Indented, with what is no UTF-8 replaced; at once and whole.
absl::Status WriteJson(const std::string& path, const Json& json);

// One finished run.
struct Result {
  std::string path;  // Of its metrics.
  Json metrics, memory;
  std::string technique, dataset;
  int64_t index = 0;  // In its suite.
  int64_t batch = 0, sequence = 0, parameters = 0, steps = 0;
  double val_loss = 0, val_perplexity = 0;     // NaN where the corpus has no val split.
  double train_seconds = 0, step_seconds = 0;  // step_seconds: the median.
  // Of the median step, which a busy moment of the machine does not move.
  double step_tokens_per_second() const {
    return step_seconds > 0 ? static_cast<double>(batch) * static_cast<double>(sequence) / step_seconds : 0;
  }
  int64_t planned_bytes = 0, measured_bytes = 0;
  bool planned_is_measured = false;
  int64_t forward_bytes = 0, backward_bytes = 0, optimizer_bytes = 0;
  int64_t recomputed_ops = 0;
  std::string passes, losses_hash, activations;
  std::vector<std::string> warnings;
};

// The finished runs of a results folder, by dataset and place in the suite; `experiments`: these techniques alone, all
// where it is empty. Errors: NotFound (no folder, no results, no such experiment), FailedPrecondition (a file that
// mtlab did not write, or that was edited; names the key).
absl::StatusOr<std::vector<Result>> ReadResults(const std::string& folder, const std::vector<std::string>& experiments);

}  // namespace mt

#endif  // MT_BENCH_LAB_RESULTS_H_
