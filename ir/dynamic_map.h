// The 256 values that an 8-bit code of the optimizer's moments stands for: a sign, a decimal exponent of as many bits
// as it needs, a linear fraction in the rest. Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
// (2022), section 1.3 and figure 2; sections 2.1 for blocks and 2.2 for the unsigned variant.
#ifndef MT_IR_DYNAMIC_MAP_H_
#define MT_IR_DYNAMIC_MAP_H_

#include <array>
#include <cstdint>
#include <cstring>

namespace mt {

// Elements that share one scale, the largest magnitude among them.
inline constexpr int64_t kQuantizedBlock = 256;

class DynamicMap {
 public:
  // For first moments, in [-0.993, 1]; for second moments, in [0, 1].
  static const DynamicMap& Signed();
  static const DynamicMap& Unsigned();

  // Increasing.
  const std::array<float, 256>& values() const { return values_; }
  uint8_t zero() const { return zero_; }  // The code of 0.

  // Encode gives a code above `code` to what is larger than this; of the last code: infinity.
  float Middle(uint8_t code) const { return middles_[code]; }

  // The code of the value nearest to x, the smaller one of two as near. REQUIRES: -1 <= x <= 1 (others give some code).
  uint8_t Encode(float x) const {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint8_t code = least_[bits >> 16];
    return static_cast<uint8_t>(code + (x > middles_[code] ? 1 : 0));
  }

 private:
  explicit DynamicMap(bool is_signed);

  std::array<float, 256> values_;
  std::array<float, 256> middles_;  // Between a value and the next; after the last: infinity.
  // By the upper half of a float: the code of the smallest float that begins so. No two middles are as close as that.
  std::array<uint8_t, 65536> least_;
  uint8_t zero_ = 0;
};

}  // namespace mt

#endif  // MT_IR_DYNAMIC_MAP_H_
