// What a run tells while it trains: a line a step on the terminal, metrics.jsonl, TensorBoard's events.
#ifndef MT_RUNTIME_TRAIN_RUN_LOG_H_
#define MT_RUNTIME_TRAIN_RUN_LOG_H_

#include <cstdint>
#include <cstdio>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "ir/base/json.h"
#include "runtime/train/event_file.h"
#include "runtime/train/trainer.h"

namespace mt {

inline constexpr char kMetricsFile[] = "metrics.jsonl";

// "loss 4.8612  ppl 129.18"
std::string LossText(const EvalMetrics& eval);

// What stays the same from step to step, to tell the others by.
struct StepContext {
  int64_t steps = 0;        // That the run will take; 0: not known.
  double max_seconds = -1;  // That it may take; negative: as long as it likes.
  int64_t arena_bytes = 0;
  std::string plan;            // Of a run that goes through several.
  double seconds_at_peak = 0;  // What a step's FLOPs, without recomputed ones, take at the device's peak; 0: not known.
};

class RunLog {
 public:
  // Of the steps, a terminal shows each in place; elsewhere each `every` gets a line.
  explicit RunLog(int64_t every);
  ~RunLog();
  RunLog(const RunLog&) = delete;
  RunLog& operator=(const RunLog&) = delete;

  // Goes on in `folder` after `step`. Without it nothing is written but to the terminal. Errors: DataLoss.
  absl::Status Open(const std::string& folder, bool tensorboard, int64_t step);
  // What was written of later steps no longer holds. Errors: DataLoss.
  absl::Status GoBack(int64_t step);

  // Written through. Errors: DataLoss.
  absl::Status Step(const StepMetrics& metrics, const StepContext& context);
  absl::Status Eval(int64_t step, const EvalMetrics& eval, const StepContext& context);
  // What the model writes after a step, valid UTF-8.
  absl::Status Sample(int64_t step, const std::string& text);
  // Of the run's end, which the box shows.
  absl::Status FinalEval(int64_t step, const EvalMetrics& eval);
  // Ends the line that a terminal shows, for another text.
  void Break();

 private:
  absl::Status OpenMetrics();
  absl::Status Append(const nlohmann::ordered_json& line);

  const int64_t every_;
  const bool terminal_;
  bool open_line_ = false;
  std::string metrics_path_;
  std::FILE* metrics_ = nullptr;  // Null where nothing is written.
  EventFile events_;
};

// "step 120/1335 9.0% | loss 4.861 ppl 129.2 | lr 4.9e-4 | gnorm 0.83 | 80.1k tok/s | 21.9 MiB | ETA 0:07:52"
std::string StepLine(const StepMetrics& metrics, const StepContext& context);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_RUN_LOG_H_
