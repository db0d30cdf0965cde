// What a run shows and leaves behind: the line of a step, the box at the end, metrics.jsonl, memory.json, summary.json.
#ifndef MT_RUNTIME_TRAIN_REPORT_H_
#define MT_RUNTIME_TRAIN_REPORT_H_

#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/train/trainer.h"

namespace mt {

// "step 120/1335 9.0% | loss 4.861 ppl 129.2 | lr 4.9e-4 | gnorm 0.83 | 80.1k tok/s | 21.9 MiB | ETA 0:07:52"
std::string StepLine(const StepMetrics& metrics, int64_t steps, double seconds_left, int64_t arena_bytes);

// Rows of a box of text, left column padded.
std::string Box(absl::string_view title, const std::vector<std::pair<std::string, std::string>>& rows);

// One line a step, written through; the file is complete after every step.
class MetricsFile {
 public:
  MetricsFile() = default;
  ~MetricsFile();
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;
  absl::Status Open(const std::string& path);  // Goes on at the end of one that is there.
  absl::Status Append(const nlohmann::ordered_json& line);

 private:
  std::string path_;
  std::FILE* file_ = nullptr;
};

nlohmann::ordered_json StepJson(const StepMetrics& metrics);

// Planned and, where there is a measurement, measured bytes under the same keys; then the process.
nlohmann::ordered_json MemoryJson(const Executor& executor, const std::optional<Measurement>& measurement,
                                  int64_t process_bytes, int64_t context_bytes);

// CPU model, usable CPUs, memory, versions of what was built in.
nlohmann::ordered_json HardwareJson();
nlohmann::ordered_json VersionsJson();

// Final weights, DIR/model.safetensors: parameters under their names with their logical shapes.
absl::Status SaveWeights(Executor& executor, const std::string& path);
// Errors: NotFound, FailedPrecondition (a parameter is missing or has another shape; names both).
absl::Status LoadWeights(Executor& executor, const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_REPORT_H_
