// Inputs of kernels under measurement.
#ifndef MT_BENCH_RANDOM_FLOATS_H_
#define MT_BENCH_RANDOM_FLOATS_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "ir/base/philox.h"
#include "ir/tensor_type.h"

namespace mt {

// Floats of `dtype` with random signs and mantissas, between 1/8 and 2.
inline std::string RandomFloats(DType dtype, size_t count) {
  const uint32_t bits = static_cast<uint32_t>(8 * ByteSize(dtype));
  const uint32_t mantissa = dtype == DType::kF32 ? 23 : dtype == DType::kF16 ? 10 : 7;
  const uint32_t bias = dtype == DType::kF16 ? 15 : 127;
  std::string bytes(count * bits / 8, '\0');
  for (size_t i = 0; i < count; ++i) {
    const auto words = Philox({1, 2}, {static_cast<uint32_t>(i), 0, 0, 0});
    const uint32_t value =
        (words[0] & 1) << (bits - 1) | (bias - words[1] % 4) << mantissa | words[2] >> (32 - mantissa);
    std::memcpy(&bytes[i * bits / 8], &value, bits / 8);  // Little-endian.
  }
  return bytes;
}

}  // namespace mt

#endif  // MT_BENCH_RANDOM_FLOATS_H_
