// What a run shows and leaves behind when it ends: the box, memory.json, summary.json.
#ifndef MT_RUNTIME_TRAIN_REPORT_H_
#define MT_RUNTIME_TRAIN_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/base/json.h"
#include "runtime/data/corpus.h"
#include "runtime/drift.h"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/train/trainer.h"

namespace mt {

inline constexpr char kSummaryFile[] = "summary.json";
inline constexpr char kMemoryFile[] = "memory.json";

// Rows of a box of text, left column padded.
using BoxRows = std::vector<std::pair<std::string, std::string>>;
std::string Box(absl::string_view title, const BoxRows& rows);

// Of the memory that the arena is in.
struct MemoryUse {
  int64_t process_bytes = 0;  // The process's peak on the host; on a device what it holds of it now.
  int64_t context_bytes = 0;  // Of these, beside the arena.
  bool others_too = false;    // Nobody can tell the processes on the device apart.
};
MemoryUse MemoryUseOf(Executor& executor);

struct RunTimes {
  double load_seconds = 0, weights_seconds = 0;
  double first_step_seconds = 0, start_seconds = 0;  // Of the first step; from the process's start to its end.
};

struct RunOutcome {
  TrainResult result;
  int64_t from_step = 0;                                 // Where it was taken up.
  std::vector<std::pair<EvalMetrics, SplitInfo>> evals;  // At the end, over whole splits.
  std::optional<Measurement> measurement;
  std::optional<Drift> drift;
  RunTimes times;
};

// What the box says, but for the files.
absl::StatusOr<BoxRows> OutcomeRows(Executor& executor, const RunOutcome& outcome, const MemoryUse& memory);
// Without what the command line says.
nlohmann::ordered_json OutcomeJson(Executor& executor, const RunOutcome& outcome);

// Planned and, where there is a measurement, measured bytes under the same keys; then the process.
nlohmann::ordered_json MemoryJson(const Executor& executor, const std::optional<Measurement>& measurement,
                                  const MemoryUse& memory);

// CPU model, usable CPUs, memory, and what the backend runs on.
nlohmann::ordered_json HardwareJson(const Backend& backend);
// Of what was built in.
nlohmann::ordered_json VersionsJson();

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_REPORT_H_
