#include "runtime/train/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"

namespace mt {
namespace {
constexpr absl::string_view kNames[] = {"cosine", "linear", "constant", "plateau"};
}  // namespace

absl::StatusOr<LrShape> ParseLrShape(absl::string_view name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (kNames[i] == name) return static_cast<LrShape>(i);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", name, "\" is not a schedule of the learning rate; known: cosine, linear, constant, plateau"));
}

absl::string_view LrShapeName(LrShape shape) { return kNames[static_cast<size_t>(shape)]; }

double LrSchedule::At(int64_t step, double progress) const {
  if (step < warmup_steps_) return peak_ * static_cast<double>(step + 1) / static_cast<double>(warmup_steps_);
  progress = std::clamp(progress, 0.0, 1.0);
  double share = 1;
  if (shape_ == LrShape::kCosine) share = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  if (shape_ == LrShape::kLinear) share = 1 - progress;
  if (shape_ == LrShape::kPlateau) return peak_ * std::max(plateau_.factor, min_ratio_);
  if (shape_ == LrShape::kConstant) return peak_;
  return peak_ * (min_ratio_ + (1 - min_ratio_) * share);
}

void LrSchedule::Observe(double val_loss) {
  if (val_loss < plateau_.best) {
    plateau_.best = val_loss;
    plateau_.bad_evals = 0;
  } else if (++plateau_.bad_evals >= patience_) {
    plateau_.factor *= 0.5;
    plateau_.bad_evals = 0;
  }
}

}  // namespace mt
