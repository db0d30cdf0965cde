// Philox4x32-10, the counter-based generator of every random number in a model.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), section 4.3.
#ifndef MT_IR_BASE_PHILOX_H_
#define MT_IR_BASE_PHILOX_H_

#include <array>
#include <cstdint>

namespace mt {

// Four independent 32-bit words for one (key, counter). Pure; the same everywhere.
inline std::array<uint32_t, 4> Philox(std::array<uint32_t, 2> key, std::array<uint32_t, 4> counter) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 24 random bits: exact in f32 and f64 alike.
inline float UniformFromBits(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

}  // namespace mt

#endif  // MT_IR_BASE_PHILOX_H_
