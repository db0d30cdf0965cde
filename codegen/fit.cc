#include "codegen/fit.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 24;
// Instructions planned in search of sizes below the boundary that do not fit, after the first kFewest sizes.
constexpr int64_t kScanInstructions = 2'500;
constexpr int kFewest = 2;
constexpr int64_t kScanShare = 20;  // 1 / 20 of what grows.

// What one size takes.
struct Point {
  int64_t needs_bytes = 0;  // The largest int64 where it could not be planned.
  int64_t fixed_bytes = 0;  // States and context.
  int64_t instructions = 0;
  double step_seconds = 0;
  std::string error;  // Why it could not be planned.
};

class Fitter {
 public:
  Fitter(const Job& job, FitAxis axis, int64_t memory_bytes) : job_(job), axis_(axis), memory_bytes_(memory_bytes) {}

  absl::StatusOr<FitResult> Run() {
    const auto start = std::chrono::steady_clock::now();
    ASSIGN_OR_RETURN(const proto::ModelSpec spec, LoadSpec(job_.spec, job_.model));
    max_sequence_ = spec.max_sequence();
    ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(job_.options));
    step_ = axis_ == FitAxis::kBatch ? MicrobatchesOf(pipeline) : 1;

    const Point first = Plan(1);
    // A budget that even the smallest size does not keep to is an answer.
    if (!first.error.empty() && first_error_.code() != absl::StatusCode::kResourceExhausted) return first_error_;
    if (first.needs_bytes > memory_bytes_) {
      SetNext(1, first);
    } else {
      int64_t fits = Boundary(first);
      fits = ScanDown(fits, first);
      result_.largest = fits * step_;
      result_.needs_bytes = points_.at(fits).needs_bytes;
      result_.step_seconds = points_.at(fits).step_seconds;
      SetNext(fits + 1, Plan(fits + 1));
    }
    if (result_.passes.empty()) result_.passes = pipeline.ToString();
    int64_t before = 0;
    for (const auto& [units, point] : points_) {
      if (!point.error.empty()) continue;
      result_.planned[units * step_] = point.needs_bytes;
      result_.monotone = result_.monotone && point.needs_bytes >= before;
      before = point.needs_bytes;
    }
    result_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result_;
  }

 private:
  bool Fits(const Point& point) const { return point.needs_bytes <= memory_bytes_; }

  void SetNext(int64_t units, const Point& point) {
    result_.limit = point.error;
    if (!point.error.empty()) return;
    result_.next = units * step_;
    result_.next_needs_bytes = point.needs_bytes;
    result_.short_bytes = point.needs_bytes - memory_bytes_;
  }

  // Plans a size once. A size beyond what tensors can be or a budget can hold counts as one that does not fit.
  const Point& Plan(int64_t units) {
    const auto [at, is_new] = points_.try_emplace(units);
    if (!is_new) return at->second;
    Point& point = at->second;
    const absl::Status planned = PlanInto(units * step_, point);
    if (!planned.ok()) {
      if (units == 1) first_error_ = planned;
      point = Point{.needs_bytes = std::numeric_limits<int64_t>::max(), .error = std::string(planned.message())};
    }
    return point;
  }

  absl::Status PlanInto(int64_t size, Point& point) {
    Job job = job_;
    if (axis_ == FitAxis::kBatch) {
      job.model.batch = size;
    } else {
      job.model.sequence = size;
      if (size > max_sequence_) job.model.sets.push_back(absl::StrCat("max_sequence=", size));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
    ASSIGN_OR_RETURN(const Needs needs, PassesAndNeeds(std::move(module), job.options));
    if (result_.passes.empty()) result_.passes = needs.passes;
    point = {.needs_bytes = needs.needs_bytes,
             .fixed_bytes = needs.fixed_bytes,
             .instructions = needs.instructions,
             .step_seconds = needs.step_seconds};
    return absl::OkStatus();
  }

  // A size that fits, the next of which does not. `first` is that of 1, which fits.
  int64_t Boundary(const Point& first) {
    int64_t low = 1, high = kLargestSize / step_ + 1;  // `high` does not fit, or is past the limit.
    bool high_known = false;
    // As if all but states and context grew with the size.
    double rate = static_cast<double>(first.needs_bytes - first.fixed_bytes);
    double guess = rate > 0 ? static_cast<double>(memory_bytes_ - first.fixed_bytes) / rate : 2;
    int64_t last = 1;
    int crawled = 0;  // Sizes in a row that were the next one.
    int slow = 0;     // Guesses that did not halve what is between `low` and `high`.
    while (high - low > 1) {
      const int64_t width = high - low;
      int64_t units = static_cast<int64_t>(
          std::clamp(guess, static_cast<double>(low + 1), static_cast<double>(std::min(high - 1, low * 1024))));
      if (slow >= 3) units = high_known ? low + width / 2 : std::min(high - 1, low * 2);
      const Point& point = Plan(units);
      const int64_t before = last;
      crawled = !high_known && units == before + 1 ? crawled + 1 : 0;
      last = units;
      if (Fits(point)) {
        low = units;
      } else {
        high = units;
        high_known = true;
      }
      if (high == kLargestSize / step_ + 1 && low == high - 1) {
        points_[high] = Point{.needs_bytes = std::numeric_limits<int64_t>::max(),
                              .error = absl::StrCat("sizes above ", kLargestSize, " are not looked at")};
      }
      slow = (high - low) * 2 > width && high_known ? slow + 1 : 0;
      // The secant through this size and the one before; where one of them has no plan, the middle.
      const Point& other = Plan(before);
      if (!point.error.empty() || !other.error.empty()) {
        guess = static_cast<double>(low) + static_cast<double>(high - low) / 2;
        continue;
      }
      rate = static_cast<double>(point.needs_bytes - other.needs_bytes) / static_cast<double>(units - before);
      guess = rate > 0 ? static_cast<double>(units) + static_cast<double>(memory_bytes_ - point.needs_bytes) / rate
                       : static_cast<double>(low) * 2;
      // Where the secant says that the nearest size is the boundary, its other side is next.
      if (Fits(point) && guess < static_cast<double>(units + 1)) guess = static_cast<double>(units + 1);
      if (!Fits(point) && guess > static_cast<double>(units - 1)) guess = static_cast<double>(units - 1);
    }
    return low;
  }

  int64_t ScanDown(int64_t fits, const Point& first) {
    const int64_t grown = points_.at(fits).needs_bytes - first.needs_bytes;
    const int64_t enough = memory_bytes_ - grown / kScanShare;
    int64_t work = 0;
    int64_t answer = fits;
    for (int64_t units = fits - 1; units > 1; --units) {
      const Point& point = Plan(units);
      if (!Fits(point)) answer = units - 1;
      work += std::max<int64_t>(point.instructions, 100);
      if (fits - units >= kFewest && (work > kScanInstructions || point.needs_bytes <= enough)) break;
    }
    return answer;
  }

  const Job& job_;
  const FitAxis axis_;
  const int64_t memory_bytes_;
  int64_t max_sequence_ = 0;
  int64_t step_ = 1;                 // Sizes are multiples of it: units x step.
  std::map<int64_t, Point> points_;  // By units.
  absl::Status first_error_;
  FitResult result_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Module>> LoadModule(const Job& job) {
  ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(job.options));
  ModelOptions model = job.model;
  model.microbatches = MicrobatchesOf(pipeline);
  return LoadModel(job.spec, model);
}

absl::StatusOr<FitResult> FitLargest(const Job& job, FitAxis axis, int64_t memory_bytes) {
  return Fitter(job, axis, memory_bytes).Run();
}

}  // namespace mt
