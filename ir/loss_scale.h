// The rule of dynamic loss scaling. Source: Micikevicius et al., "Mixed Precision Training" (2018), section 3.2, with
// the constants of PyTorch's GradScaler and the limit of NVIDIA's Apex.
#ifndef MT_IR_LOSS_SCALE_H_
#define MT_IR_LOSS_SCALE_H_

#include <algorithm>
#include <cstdint>

namespace mt {

inline constexpr float kLargestLossScale = 0x1p24f;
// Gradients that are not finite even at this scale are no overflow of the scaling's making.
inline constexpr float kSmallestLossScale = 0x1p-14f;

struct LossScale {
  float scale;
  int32_t good_steps;  // Since the scale changed.
};

// After a step whose gradients were finite or not.
inline LossScale NextLossScale(const LossScale& now, bool finite, int32_t interval) {
  if (!finite) return {std::max(now.scale * 0.5f, kSmallestLossScale), 0};
  if (now.good_steps + 1 < interval) return {now.scale, now.good_steps + 1};
  return {std::min(now.scale * 2.0f, std::max(now.scale, kLargestLossScale)), 0};
}

}  // namespace mt

#endif  // MT_IR_LOSS_SCALE_H_
