#include "ir/dynamic_map.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ir/base/check.h"

namespace mt {

DynamicMap::DynamicMap(bool is_signed) {
  // Decade d of 7 has 2^d fractions, the middles of as many equal parts of [0.1, 1]; the unsigned map spends the sign's
  // bit on the fraction. 0 and 1 make 256.
  constexpr int kDecades = 7;
  std::vector<double> values = {0.0, 1.0};
  for (int decade = 0; decade < kDecades; ++decade) {
    const int parts = 1 << (is_signed ? decade : decade + 1);
    const double unit = std::pow(10.0, decade - (kDecades - 1));
    for (int i = 0; i < parts; ++i) {
      const double value = unit * (0.1 + 0.9 * (i + 0.5) / parts);
      values.push_back(value);
      if (is_signed) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  CHECK_EQ(values.size(), values_.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values_[i] = static_cast<float>(values[i]);
    middles_[i] = i + 1 < values.size() ? static_cast<float>((values[i] + values[i + 1]) / 2)
                                        : std::numeric_limits<float>::infinity();
    if (values[i] == 0) zero_ = static_cast<uint8_t>(i);
  }
  for (uint32_t high = 0; high < least_.size(); ++high) {
    const uint32_t bits = high << 16 | (high >= 0x8000 ? 0xffffu : 0);  // Of negative floats the largest magnitude.
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    const auto code = std::find_if(middles_.begin(), middles_.end(), [x](float middle) { return !(x > middle); });
    least_[high] = static_cast<uint8_t>(code - middles_.begin());
  }
}

const DynamicMap& DynamicMap::Signed() {
  static const DynamicMap& map = *new DynamicMap(true);
  return map;
}

const DynamicMap& DynamicMap::Unsigned() {
  static const DynamicMap& map = *new DynamicMap(false);
  return map;
}

}  // namespace mt
