#include "runtime/train/run_log.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

std::string Rate(double per_second) {
  if (per_second >= 1e6) return absl::StrFormat("%.2fM", per_second / 1e6);
  if (per_second >= 1e3) return absl::StrFormat("%.1fk", per_second / 1e3);
  return absl::StrFormat("%.0f", per_second);
}

// JSON has no NaN.
Json Number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

Json StepJson(const StepMetrics& m, const StepContext& context) {
  Json json = {
      {"step", m.step},
      {"loss", Number(m.loss)},
      {"lr", m.lr},
      {"grad_norm", Number(m.grad_norm)},
      {"step_seconds", m.step_seconds},
      {"tokens_per_second", m.tokens_per_second},
      {"mfu", context.seconds_at_peak > 0 && m.step_seconds > 0 ? Json(context.seconds_at_peak / m.step_seconds)
                                                                : Json(nullptr)}};
  if (m.loss_scale) {
    json["loss_scale"] = *m.loss_scale;
    json["skipped"] = m.skipped;
  }
  json["seq"] = m.sequence;
  if (!context.plan.empty()) json["plan"] = context.plan;
  return json;
}

std::vector<std::pair<std::string, double>> EventsOf(const StepMetrics& step) {
  std::vector<std::pair<std::string, double>> scalars = {{"train/loss", step.loss},
                                                         {"train/perplexity", std::exp(step.loss)},
                                                         {"train/lr", step.lr},
                                                         {"train/grad_norm", step.grad_norm},
                                                         {"train/tokens_per_second", step.tokens_per_second}};
  if (step.loss_scale) scalars.push_back({"train/loss_scale", *step.loss_scale});
  return scalars;
}

// Negative where nothing says when the run ends.
double SecondsLeft(const StepMetrics& m, const StepContext& context) {
  double left = -1;
  if (context.steps > 0) {
    left = m.elapsed_seconds / static_cast<double>(m.step) * static_cast<double>(context.steps - m.step);
  }
  if (context.max_seconds < 0) return left;
  const double limit = context.max_seconds - m.elapsed_seconds;
  return left < 0 ? limit : std::min(left, limit);
}

}  // namespace

std::string LossText(const EvalMetrics& eval) {
  return absl::StrFormat("loss %.4f  ppl %.2f", eval.loss, std::exp(eval.loss));
}

std::string StepLine(const StepMetrics& m, const StepContext& context) {
  std::string line = absl::StrCat("step ", m.step);
  if (context.steps > 0) {
    absl::StrAppendFormat(&line, "/%d %.1f%%", context.steps,
                          100.0 * static_cast<double>(m.step) / static_cast<double>(context.steps));
  }
  const std::string norm = std::isfinite(m.grad_norm) ? absl::StrFormat("%.2f", m.grad_norm) : "inf";
  absl::StrAppendFormat(&line, " | loss %.4f ppl %.2f | lr %.2e | gnorm %s | %s tok/s | %s", m.loss, std::exp(m.loss),
                        m.lr, norm, Rate(m.tokens_per_second), FormatBytes(context.arena_bytes));
  if (m.loss_scale) absl::StrAppendFormat(&line, " | scale %g%s", *m.loss_scale, m.skipped ? ", skipped" : "");
  const double left = SecondsLeft(m, context);
  if (left >= 0) absl::StrAppend(&line, " | ETA ", FormatDuration(left));
  return line;
}

RunLog::RunLog(int64_t every) : every_(every), terminal_(::isatty(STDOUT_FILENO) != 0) {}

RunLog::~RunLog() {
  if (metrics_ != nullptr) std::fclose(metrics_);
}

absl::Status RunLog::Open(const std::string& folder, bool tensorboard, int64_t step) {
  if (folder.empty()) return absl::OkStatus();
  metrics_path_ = absl::StrCat(folder, "/", kMetricsFile);
  RETURN_IF_ERROR(OpenMetrics());
  return tensorboard ? events_.Open(folder, step) : absl::OkStatus();
}

absl::Status RunLog::OpenMetrics() {
  if (metrics_ != nullptr) std::fclose(metrics_);
  metrics_ = std::fopen(metrics_path_.c_str(), "ae");
  if (metrics_ != nullptr) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(metrics_path_, ": cannot create: ", std::strerror(errno)));
}

absl::Status RunLog::GoBack(int64_t step) {
  // Its lines were cut by the folder, which put another file in its place.
  RETURN_IF_ERROR(OpenMetrics());
  return events_.GoBack(step);
}

absl::Status RunLog::Append(const Json& line) {
  if (metrics_ == nullptr) return absl::OkStatus();
  const std::string text = absl::StrCat(line.dump(), "\n");
  if (std::fwrite(text.data(), 1, text.size(), metrics_) != text.size() || std::fflush(metrics_) != 0) {
    return absl::DataLossError(absl::StrCat(metrics_path_, ": write failed: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

absl::Status RunLog::Step(const StepMetrics& metrics, const StepContext& context) {
  const bool last = metrics.step == context.steps;
  if (terminal_) {
    std::printf("\r%s\x1b[K", StepLine(metrics, context).c_str());
    open_line_ = true;
    if (last) Break();
  } else if (last || metrics.step == 1 || metrics.step % every_ == 0) {
    std::printf("%s\n", StepLine(metrics, context).c_str());
  }
  std::fflush(stdout);
  RETURN_IF_ERROR(events_.Append(metrics.step, EventsOf(metrics)));
  return Append(StepJson(metrics, context));
}

absl::Status RunLog::Eval(int64_t step, const EvalMetrics& eval, const StepContext& context) {
  Break();
  std::printf("step %lld | %s %s\n", static_cast<long long>(step), eval.split.c_str(), LossText(eval).c_str());
  std::fflush(stdout);
  RETURN_IF_ERROR(FinalEval(step, eval));
  Json json = {{"step", step}, {"split", eval.split}, {"eval_loss", eval.loss}, {"seq", eval.sequence}};
  if (!context.plan.empty()) json["plan"] = context.plan;
  return Append(json);
}

absl::Status RunLog::Sample(int64_t step, const std::string& text) {
  Break();
  std::printf("step %lld | sample: %s\n", static_cast<long long>(step), text.c_str());
  std::fflush(stdout);
  RETURN_IF_ERROR(events_.AppendText(step, "sample", text));
  return Append({{"step", step}, {"sample", text}});
}

absl::Status RunLog::FinalEval(int64_t step, const EvalMetrics& eval) {
  return events_.Append(step, {{eval.split + "/loss", eval.loss}, {eval.split + "/perplexity", std::exp(eval.loss)}});
}

void RunLog::Break() {
  if (open_line_) std::printf("\n");
  open_line_ = false;
}

}  // namespace mt
