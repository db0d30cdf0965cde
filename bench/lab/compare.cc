#include "bench/lab/compare.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "ir/base/units.h"

namespace mt {
namespace {

constexpr double kMb = 1 << 20;

const Result& BaselineOf(const std::vector<Result>& results, const Result& result) {
  const Result* first = nullptr;
  for (const Result& other : results) {
    if (other.dataset != result.dataset) continue;
    if (other.technique == "baseline") return other;
    if (first == nullptr) first = &other;
  }
  return *first;
}

double Speedup(const Result& baseline, const Result& result) {
  return baseline.step_tokens_per_second() > 0 ? result.step_tokens_per_second() / baseline.step_tokens_per_second()
                                               : 0;
}

std::string Mb(int64_t bytes) { return absl::StrFormat("%.2f", static_cast<double>(bytes) / kMb); }

std::string Perplexity(double value) { return std::isnan(value) ? "-" : absl::StrFormat("%.2f", value); }

std::string Title(absl::string_view text) {
  const std::string line(80, '=');
  return absl::StrCat(line, "\n", text, "\n", line, "\n");
}

// Names as they are shown: with the data set where there are several.
std::vector<std::string> Labels(const std::vector<Result>& results) {
  std::set<std::string> datasets;
  for (const Result& result : results) datasets.insert(result.dataset);
  std::vector<std::string> labels;
  for (const Result& result : results) {
    labels.push_back(datasets.size() > 1 ? absl::StrCat(result.dataset, "_", result.technique) : result.technique);
  }
  return labels;
}

// One line for each run that differs from the baseline's setting in more than its technique.
std::string Unequal(const std::vector<Result>& results) {
  std::string text;
  for (const Result& result : results) {
    const Result& baseline = BaselineOf(results, result);
    std::vector<std::string> differs;
    if (result.batch != baseline.batch)
      differs.push_back(absl::StrCat("batch ", result.batch, ", not ", baseline.batch));
    if (result.sequence != baseline.sequence) {
      differs.push_back(absl::StrCat("sequence ", result.sequence, ", not ", baseline.sequence));
    }
    if (result.steps != baseline.steps) differs.push_back(absl::StrCat(result.steps, " steps, not ", baseline.steps));
    if (differs.empty()) continue;
    absl::StrAppend(&text, "  ", result.technique, " is no equal of ", baseline.technique, ": ",
                    absl::StrJoin(differs, "; "), "\n");
  }
  return text;
}

// Runs that trained through the same losses, to the bit.
std::string SameLosses(const std::vector<Result>& results) {
  std::string text;
  std::map<std::pair<std::string, std::string>, const Result*> first;
  for (const Result& result : results) {
    const auto [at, is_new] = first.try_emplace({result.dataset, result.losses_hash}, &result);
    if (is_new) continue;
    absl::StrAppend(&text, "  ", result.technique, ": the same loss as ", at->second->technique, " in each of ",
                    result.steps, " steps, to the bit\n");
  }
  return text;
}

}  // namespace

std::string ComparisonReport(const std::vector<Result>& results) {
  const std::vector<std::string> labels = Labels(results);
  size_t width = 20;
  for (const std::string& label : labels) width = std::max(width, label.size());
  const int w = static_cast<int>(width);

  std::string text = Title("EXPERIMENT COMPARISON TABLE");
  std::string head =
      absl::StrFormat("%-*s %-12s %-12s %-15s %-15s %-15s %-8s %s", w, "Technique", "Batch Size", "Val PPL",
                      "Train Time", "Peak Mem (MB)", "Parameters", "Speedup", "Planned = measured");
  absl::StrAppend(&text, head, "\n", std::string(head.size(), '-'), "\n");
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    absl::StrAppendFormat(&text, "%-*s %-12d %-12s %-15s %-15s %-15s %-8s %s\n", w, labels[i], r.batch,
                          Perplexity(r.val_perplexity), absl::StrFormat("%.1fs", r.train_seconds), Mb(r.measured_bytes),
                          FormatCount(r.parameters), absl::StrFormat("%.2fx", Speedup(BaselineOf(results, r), r)),
                          r.planned_is_measured ? absl::StrCat("yes, ", FormatCount(r.measured_bytes), " bytes")
                                                : absl::StrCat("NO, ", FormatCount(r.planned_bytes), " planned"));
  }
  absl::StrAppend(&text, "MB: 2^20 bytes. Sequence length ", results[0].sequence, ", ", results[0].steps,
                  " steps. Speedup: tokens per second of the median step, to ",
                  BaselineOf(results, results[0]).technique, ".\n\n");

  text += Title("MEMORY USAGE DETAILS");
  head = absl::StrFormat("%-*s %14s %14s %14s %14s %10s", w, "Technique", "Forward (MB)", "Backward (MB)",
                         "Optimizer (MB)", "Peak (MB)", "Saved");
  absl::StrAppend(&text, head, "\n", std::string(head.size(), '-'), "\n");
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    const double base = static_cast<double>(BaselineOf(results, r).planned_bytes);
    absl::StrAppendFormat(&text, "%-*s %14s %14s %14s %14s %9.1f%%\n", w, labels[i], Mb(r.forward_bytes),
                          Mb(r.backward_bytes), Mb(r.optimizer_bytes), Mb(r.planned_bytes),
                          base > 0 ? 100 * (1 - static_cast<double>(r.planned_bytes) / base) : 0.0);
  }

  absl::StrAppend(&text, "\n", Title("OPTIMIZATION TECHNIQUES SUMMARY"));
  head = absl::StrFormat("%-*s %12s %12s %12s %-14s %s", w, "Technique", "Step (ms)", "Tokens/s", "Recomputed",
                         "Activations", "Passes");
  absl::StrAppend(&text, head, "\n", std::string(head.size(), '-'), "\n");
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    absl::StrAppendFormat(&text, "%-*s %12.2f %12.1f %12d %-14s %s\n", w, labels[i], r.step_seconds * 1e3,
                          r.step_tokens_per_second(), r.recomputed_ops, r.activations, r.passes);
  }

  absl::StrAppend(&text, "\n", Title("ANALYSIS"));
  const auto best = [&](auto better) {
    const Result* best = &results[0];
    for (const Result& result : results) {
      if (better(result, *best)) best = &result;
    }
    return best;
  };
  const Result* small = best([](const Result& a, const Result& b) { return a.planned_bytes < b.planned_bytes; });
  const Result* fast =
      best([](const Result& a, const Result& b) { return a.step_tokens_per_second() > b.step_tokens_per_second(); });
  const Result* good = best([](const Result& a, const Result& b) {
    return !std::isnan(a.val_perplexity) && !(a.val_perplexity >= b.val_perplexity);
  });
  const Result& base = BaselineOf(results, *small);
  absl::StrAppendFormat(
      &text, "  least memory     %-*s %s MB, %.1f%% less than %s\n", w, small->technique, Mb(small->planned_bytes),
      base.planned_bytes > 0
          ? 100 * (1 - static_cast<double>(small->planned_bytes) / static_cast<double>(base.planned_bytes))
          : 0.0,
      base.technique);
  absl::StrAppendFormat(&text, "  fastest          %-*s %.1f tokens/s, %.2fx\n", w, fast->technique,
                        fast->step_tokens_per_second(), Speedup(BaselineOf(results, *fast), *fast));
  absl::StrAppendFormat(
      &text, "  best perplexity  %-*s %s, %+.2f to %s\n", w, good->technique, Perplexity(good->val_perplexity),
      good->val_perplexity - BaselineOf(results, *good).val_perplexity, BaselineOf(results, *good).technique);
  text += SameLosses(results);
  text += Unequal(results);
  for (size_t i = 0; i < results.size(); ++i) {
    for (const std::string& warning : results[i].warnings) absl::StrAppend(&text, "  ", labels[i], ": ", warning, "\n");
  }
  return text;
}

Json ComparisonJson(const std::vector<Result>& results) {
  Json all = Json::array();
  for (const Result& r : results) {
    const Result& baseline = BaselineOf(results, r);
    Json row = r.metrics;
    row.erase("losses");
    row["speedup"] = Speedup(baseline, r);
    row["memory_saved"] = baseline.planned_bytes > 0
                              ? 1 - static_cast<double>(r.planned_bytes) / static_cast<double>(baseline.planned_bytes)
                              : 0.0;
    row["memory"] = {{"planned_bytes", r.planned_bytes},
                     {"measured_bytes", r.measured_bytes},
                     {"planned_is_measured", r.planned_is_measured},
                     {"by_class", r.memory.value("by_class", Json())},
                     {"by_phase", r.memory.value("by_phase", Json())}};
    row["same_losses_as_baseline"] = r.losses_hash == baseline.losses_hash;
    all.push_back(std::move(row));
  }
  return all;
}

}  // namespace mt
