// Learning rate over a run.
#ifndef MT_RUNTIME_TRAIN_LR_SCHEDULE_H_
#define MT_RUNTIME_TRAIN_LR_SCHEDULE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

enum class LrShape { kCosine, kLinear, kConstant, kPlateau };

absl::StatusOr<LrShape> ParseLrShape(absl::string_view name);  // "cosine", "linear", "constant", "plateau"
absl::string_view LrShapeName(LrShape shape);

// Linear warmup over the first `warmup_steps` steps, then the shape from `peak` to `peak * min_ratio`. Plateau halves
// the rate (not below the minimum) when `patience` evaluations in a row were no better than the best.
class LrSchedule {
 public:
  LrSchedule(LrShape shape, double peak, double min_ratio, int64_t warmup_steps, int64_t patience)
      : shape_(shape), peak_(peak), min_ratio_(min_ratio), warmup_steps_(warmup_steps), patience_(patience) {}

  // progress: the part of the run after the warmup that is done, 0 to 1.
  double At(int64_t step, double progress) const;
  // Tells the plateau shape about an evaluation; others ignore it.
  void Observe(double val_loss);

  // What the evaluations so far have left.
  struct Plateau {
    double best = 1e300;
    int64_t bad_evals = 0;
    double factor = 1;
  };
  const Plateau& plateau() const { return plateau_; }
  void set_plateau(const Plateau& plateau) { plateau_ = plateau; }

 private:
  LrShape shape_;
  double peak_, min_ratio_;
  int64_t warmup_steps_, patience_;
  Plateau plateau_;
};

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_LR_SCHEDULE_H_
