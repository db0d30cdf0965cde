#include "runtime/data/permutation.h"

#include <bit>

#include "ir/base/check.h"
#include "ir/base/philox.h"

namespace mt {

Permutation::Permutation(int64_t n, uint64_t seed, uint64_t stream) : n_(n), seed_(seed), stream_(stream) {
  CHECK(n >= 1 && n <= int64_t{1} << 62) << "a permutation of " << n << " elements";
  const int bits = std::bit_width(static_cast<uint64_t>(n - 1));
  low_bits_ = bits / 2;
  high_bits_ = bits - low_bits_;
}

uint64_t Permutation::Round(uint64_t half, uint32_t round) const {
  const std::array<uint32_t, 4> word = Philox(
      {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)},
      {static_cast<uint32_t>(half), round, static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)});
  return uint64_t{word[0]} | uint64_t{word[1]} << 32;
}

int64_t Permutation::operator()(int64_t index) const {
  CHECK(index >= 0 && index < n_) << index << " is not below " << n_;
  const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
  const uint64_t high_mask = (uint64_t{1} << high_bits_) - 1;
  uint64_t value = static_cast<uint64_t>(index);
  do {
    uint64_t low = value & low_mask;
    uint64_t high = value >> low_bits_;
    for (uint32_t round = 0; round < 8; round += 2) {
      low ^= Round(high, round) & low_mask;
      high ^= Round(low, round + 1) & high_mask;
    }
    value = high << low_bits_ | low;
  } while (value >= static_cast<uint64_t>(n_));
  return static_cast<int64_t>(value);
}

}  // namespace mt
