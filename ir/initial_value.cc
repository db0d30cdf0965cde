#include "ir/initial_value.h"

#include <cmath>
#include <numbers>

#include "ir/base/hash.h"
#include "ir/base/philox.h"

namespace mt {

void InitialValues(const Init& init, uint64_t seed, absl::string_view name, int64_t first, absl::Span<float> out) {
  if (init.kind != Init::Kind::kNormal) {
    const double constant = init.kind == Init::Kind::kConstant ? init.value : init.kind == Init::Kind::kOnes ? 1 : 0;
    for (float& value : out) value = static_cast<float>(constant);
    return;
  }
  const uint64_t hash = Fnv1a(name);
  for (size_t i = 0; i < out.size();) {
    const uint64_t element = static_cast<uint64_t>(first) + i;
    const uint64_t pair = element / 2;
    const auto words = Philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                              {static_cast<uint32_t>(pair), static_cast<uint32_t>(pair >> 32),
                               static_cast<uint32_t>(hash), static_cast<uint32_t>(hash >> 32)});
    const double u1 = (static_cast<double>(words[0]) + 1.0) * 0x1p-32;
    const double u2 = static_cast<double>(words[1]) * 0x1p-32;
    const double radius = std::sqrt(-2.0 * std::log(u1)) * init.stddev;
    const double angle = 2.0 * std::numbers::pi * u2;
    if (element % 2 == 0) out[i++] = static_cast<float>(radius * std::cos(angle));
    if (i < out.size()) out[i++] = static_cast<float>(radius * std::sin(angle));
  }
}

}  // namespace mt
