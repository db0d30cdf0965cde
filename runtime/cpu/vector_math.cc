#include "runtime/cpu/vector_math.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

// Each loop is a template that is inlined into one wrapper for each instruction set. (Not target_clones: its resolvers
// run before a sanitizer's runtime is up, and a test could not call the sets one by one.) Built with -O3 and without
// errno and traps of floating point; nothing that changes a value.
#define MT_INLINE inline __attribute__((always_inline))

namespace mt {
namespace {

MT_INLINE uint32_t Bits(float x) { return __builtin_bit_cast(uint32_t, x); }
MT_INLINE float FromBits(uint32_t x) { return __builtin_bit_cast(float, x); }

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// ln 2 in two parts; a multiple below 2^9 of the first is exact.
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kLog2E = 0x1.715476p+0f;
// x + kRounder - kRounder rounds |x| < 2^22 to a whole number, which the low bits of the sum hold.
constexpr float kRounder = 0x1.8p23f;

MT_INLINE float Abs(float x) { return FromBits(Bits(x) & 0x7FFFFFFFu); }
MT_INLINE float CopySign(float magnitude, float sign) {
  return FromBits((Bits(magnitude) & 0x7FFFFFFFu) | (Bits(sign) & 0x80000000u));
}

// e^x - 1 = 2^n (1 + p) - 1, p returned, with |ln(1 + p)| <= ln 2 / 2; the polynomial is a minimax fit of
// (e^r - 1 - r) / r^2 by relative error of e^r - 1, 1.4e-8. REQUIRES: |x| < 150 or NaN.
MT_INLINE float ReducedExpm1(float x, uint32_t& n) {
  const float shifted = x * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  n = Bits(shifted) - Bits(kRounder);
  const float r = (x - whole * kLn2High) - whole * kLn2Low;
  float p = 0.00138825073f;
  p = p * r + 0.00836659595f;
  p = p * r + 0.0416672006f;
  p = p * r + 0.166665435f;
  p = p * r + 0.49999997f;
  return r + (r * r) * p;
}

// 2^n for -126 <= n <= 127.
MT_INLINE float PowerOf2(uint32_t n) { return FromBits((n + 127) << 23); }

MT_INLINE float Exp(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  uint32_t n;
  const float p = ReducedExpm1(x, n);
  // In two steps: 2^n itself may be infinite or subnormal.
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(n) >> 1);
  return (1.0f + p) * PowerOf2(half) * PowerOf2(n - half);
}

// (e^2|x| - 1) / (e^2|x| + 1).
MT_INLINE float Tanh(float x) {
  float a = Abs(x);
  a = a > 10.0f ? 10.0f : a;
  uint32_t n;
  const float p = ReducedExpm1(a + a, n);
  const float scale = PowerOf2(n);
  const float t = scale * p + (scale - 1.0f);
  return CopySign(t / (t + 2.0f), x);
}

// x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); minimax fit of (ln(1+f) - f + f^2/2) / f^3, 8e-10 of ln(1+f).
MT_INLINE float Log(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float y = subnormal ? x * 0x1p24f : x;
  const uint32_t shifted = Bits(y) - 0x3F3504F3u;  // sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23) - (subnormal ? 24.0f : 0.0f);
  const float f = FromBits((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float q = 0.0674663857f;
  q = q * f + -0.116756514f;
  q = q * f + 0.118881628f;
  q = q * f + -0.124055892f;
  q = q * f + 0.142195523f;
  q = q * f + -0.166679963f;
  q = q * f + 0.200021192f;
  q = q * f + -0.250000089f;
  q = q * f + 0.333333135f;
  const float square = f * f;
  float result = (square * f) * q + e * kLn2Low;
  result = result - 0.5f * square;
  result = (f + result) + e * kLn2High;
  result = x == kInfinity ? kInfinity : result;
  result = x == 0.0f ? -kInfinity : result;
  return x >= 0.0f ? result : kNaN;
}

// |x| < 1: x P(x^2), minimax fit of erf(x)/x, 1.2e-9. Above: 1 - e^-Q(|x|), fit of -ln erfc by relative error of the
// whole, 2e-11; 1 from 3.95 on.
MT_INLINE float Erf(float x) {
  float a = Abs(x);
  const float square = a * a;
  float p = 7.8539073e-05f;
  p = p * square + -0.000801020884f;
  p = p * square + 0.00518832961f;
  p = p * square + -0.0268538129f;
  p = p * square + 0.112835854f;
  p = p * square + -0.37612626f;
  p = p * square + 1.12837911f;
  const float small = a * p;
  const float clamped = a > 3.95f ? 3.95f : a;
  float q = 2.16976241e-05f;
  q = q * clamped + -0.000441472803f;
  q = q * clamped + 0.00420528557f;
  q = q * clamped + -0.0252103414f;
  q = q * clamped + 0.108422101f;
  q = q * clamped + 0.633216381f;
  q = q * clamped + 1.12958026f;
  q = q * clamped + -0.000188468475f;
  uint32_t n;
  const float r = ReducedExpm1(-q, n);
  const float scale = PowerOf2(n);
  const float large = a >= 3.95f ? 1.0f : (1.0f - scale) - scale * r;
  return CopySign(a < 1.0f ? small : large, x) + (x - x);  // x - x: NaN stays.
}

// Largest |x| that is reduced by n pi/2 here: n times the first part of pi/2 is exact in f64 up to it.
constexpr float kMostReduced = 0x1p19f;

// sin (quarter 0) or cos (quarter 1) for |x| <= kMostReduced, by sin and cos of the remainder of x / (pi/2).
MT_INLINE float SinCos(float x, uint32_t quarter) {
  const float shifted = x * 0x1.45f306p-1f + kRounder;
  const float whole = shifted - kRounder;
  const double wide = whole;
  const float r = static_cast<float>((static_cast<double>(x) - wide * 0x1.921fb544p+0) - wide * 0x1.0b4611a626331p-34);
  const uint32_t n = Bits(shifted) - Bits(kRounder) + quarter;
  const float square = r * r;
  float s = 2.71802605e-06f;
  s = s * square + -0.000198393027f;
  s = s * square + 0.00833332911f;
  s = s * square + -0.166666672f;
  const float sine = r + (r * square) * s;
  float c = -2.72048482e-07f;
  c = c * square + 2.47994485e-05f;
  c = c * square + -0.00138888834f;
  c = c * square + 0.0416666679f;
  const float cosine = (1.0f - 0.5f * square) + (square * square) * c;
  const float value = (n & 1u) != 0 ? cosine : sine;
  return FromBits(Bits(value) ^ ((n & 2u) << 30));
}

// --- Loops
// -------------------------------------------------------------------------------------------------------------

struct NegOp {
  static MT_INLINE float Do(float a) { return -a; }
};
struct AbsOp {
  static MT_INLINE float Do(float a) { return Abs(a); }
};
struct ExpOp {
  static MT_INLINE float Do(float a) { return Exp(a); }
};
struct LogOp {
  static MT_INLINE float Do(float a) { return Log(a); }
};
struct SqrtOp {
  static MT_INLINE float Do(float a) { return __builtin_sqrtf(a); }
};
struct TanhOp {
  static MT_INLINE float Do(float a) { return Tanh(a); }
};
struct ErfOp {
  static MT_INLINE float Do(float a) { return Erf(a); }
};
struct AddOp {
  static MT_INLINE float Do(float a, float b) { return a + b; }
};
struct SubOp {
  static MT_INLINE float Do(float a, float b) { return a - b; }
};
struct MulOp {
  static MT_INLINE float Do(float a, float b) { return a * b; }
};
struct DivOp {
  static MT_INLINE float Do(float a, float b) { return a / b; }
};
struct MaxOp {
  static MT_INLINE float Do(float a, float b) { return (a >= b) | (a != a) ? a : b; }
};
struct MinOp {
  static MT_INLINE float Do(float a, float b) { return (a <= b) | (a != a) ? a : b; }
};
struct LessOp {
  static MT_INLINE float Do(float a, float b) { return a < b ? 1.0f : 0.0f; }
};
struct PowOp {
  static MT_INLINE float Do(float a, float b) { return __builtin_powf(a, b); }
};

template <typename Op>
MT_INLINE void UnaryLoop(float* dst, const float* a, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Op::Do(a[i]);
}
template <typename Op>
MT_INLINE void VVLoop(float* dst, const float* a, const float* b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Op::Do(a[i], b[i]);
}
template <typename Op>
MT_INLINE void VSLoop(float* dst, const float* a, float b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Op::Do(a[i], b);
}
template <typename Op>
MT_INLINE void SVLoop(float* dst, float a, const float* b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Op::Do(a, b[i]);
}

// Pairs: the operand is in the type, so that each loop reads only what it needs.
template <VectorMath::First kFirst>
MT_INLINE float DoFirst(const float* a, const float* b, float s, int64_t i) {
  if constexpr (kFirst == VectorMath::kAddVV) return a[i] + b[i];
  if constexpr (kFirst == VectorMath::kAddVS) return a[i] + s;
  if constexpr (kFirst == VectorMath::kSubVV) return a[i] - b[i];
  if constexpr (kFirst == VectorMath::kSubVS) return a[i] - s;
  if constexpr (kFirst == VectorMath::kSubSV) return s - a[i];
  if constexpr (kFirst == VectorMath::kMulVV) return a[i] * b[i];
  if constexpr (kFirst == VectorMath::kMulVS) return a[i] * s;
}
template <VectorMath::Second kSecond>
MT_INLINE float DoSecond(float t, const float* c, float u, int64_t i) {
  if constexpr (kSecond == VectorMath::kAddV) return t + c[i];
  if constexpr (kSecond == VectorMath::kAddS) return t + u;
  if constexpr (kSecond == VectorMath::kSubV) return t - c[i];
  if constexpr (kSecond == VectorMath::kSubS) return t - u;
  if constexpr (kSecond == VectorMath::kFromV) return c[i] - t;
  if constexpr (kSecond == VectorMath::kFromS) return u - t;
  if constexpr (kSecond == VectorMath::kMulV) return t * c[i];
  if constexpr (kSecond == VectorMath::kMulS) return t * u;
}
template <VectorMath::First kFirst, VectorMath::Second kSecond>
MT_INLINE void PairLoop(float* dst, const float* a, const float* b, float s, const float* c, float u, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = DoSecond<kSecond>(DoFirst<kFirst>(a, b, s, i), c, u, i);
}

MT_INLINE void FillLoop(float* dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = value;
}

template <uint32_t kQuarter>
MT_INLINE void SinCosLoop(float* dst, const float* a, int64_t n) {
  constexpr int64_t kBlock = 256;
  float block[kBlock];  // dst may be a, which the second look needs.
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    uint32_t far = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      block[i] = SinCos(a[start + i], kQuarter);
      far |= Abs(a[start + i]) > kMostReduced ? 1u : 0u;
    }
    if (far != 0) {
      for (int64_t i = 0; i < count; ++i) {
        const float x = a[start + i];
        if (Abs(x) > kMostReduced) block[i] = kQuarter == 0 ? __builtin_sinf(x) : __builtin_cosf(x);
      }
    }
    for (int64_t i = 0; i < count; ++i) dst[start + i] = block[i];
  }
}

MT_INLINE void SelectVVLoop(float* dst, const float* c, const float* a, const float* b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float yes = a[i], no = b[i];
    dst[i] = c[i] != 0.0f ? yes : no;
  }
}
MT_INLINE void SelectVSLoop(float* dst, const float* c, const float* a, float b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float yes = a[i];
    dst[i] = c[i] != 0.0f ? yes : b;
  }
}
MT_INLINE void SelectSVLoop(float* dst, const float* c, float a, const float* b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float no = b[i];
    dst[i] = c[i] != 0.0f ? a : no;
  }
}
MT_INLINE void SelectSSLoop(float* dst, const float* c, float a, float b, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = c[i] != 0.0f ? a : b;
}

// --- Conversions
// -------------------------------------------------------------------------------------------------------

struct F32 {
  using Storage = float;
  static MT_INLINE float Widen(float a) { return a; }
  static MT_INLINE float Narrow(float a) { return a; }
};
struct F64 {
  using Storage = double;
  static MT_INLINE float Widen(double a) { return static_cast<float>(a); }
  static MT_INLINE double Narrow(float a) { return static_cast<double>(a); }
};
struct BF16 {
  using Storage = uint16_t;
  static MT_INLINE float Widen(uint16_t a) { return FromBits(static_cast<uint32_t>(a) << 16); }
  static MT_INLINE uint16_t Narrow(float a) {
    const uint32_t bits = Bits(a);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>(a != a ? quiet : rounded);
  }
};
struct F16 {
  using Storage = uint16_t;
  static MT_INLINE float Widen(uint16_t a) {
    const uint32_t magnitude = static_cast<uint32_t>(a & 0x7FFFu) << 13, sign = static_cast<uint32_t>(a & 0x8000u)
                                                                                << 16;
    // As an f32 the exponent is 112 too small; the product is right for subnormals, too. Infinity and NaN are not.
    const float finite = FromBits(magnitude) * 0x1p112f;
    const uint32_t special = magnitude | 0x7F800000u;
    return FromBits((magnitude >= 0x0F800000u ? special : Bits(finite)) | sign);
  }
  static MT_INLINE uint16_t Narrow(float a) {
    const uint32_t sign = (Bits(a) >> 16) & 0x8000u, magnitude = Bits(a) & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded, in the low bits.
    const uint32_t subnormal = Bits(FromBits(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and more
    result = magnitude > 0x7F800000u ? 0x7E00u : result;
    return static_cast<uint16_t>(result | sign);
  }
};

template <typename Format>
MT_INLINE void LoadLoop(float* dst, const std::byte* from, int64_t n) {
  const auto* a = reinterpret_cast<const typename Format::Storage*>(from);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Format::Widen(a[i]);
}
template <typename Format>
MT_INLINE void StoreLoop(std::byte* to, const float* a, int64_t n) {
  auto* dst = reinterpret_cast<typename Format::Storage*>(to);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Format::Narrow(a[i]);
}
template <typename Format>
MT_INLINE void RoundLoop(float* dst, const float* a, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = Format::Widen(Format::Narrow(a[i]));
}

// --- Random numbers
// ----------------------------------------------------------------------------------------------------

MT_INLINE float ToUniform(uint32_t bits) { return static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f; }

// Philox4x32-10 as in ir/base/philox.h, a block of counters at a time.
MT_INLINE void UniformLoop(float* dst, const UniformPlace& place, int64_t first, int64_t n) {
  constexpr int64_t kCounters = 64;
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  float block[4 * kCounters];
  const int64_t end = first + n;
  for (int64_t start = first - first % 4; start < end; start += 4 * kCounters) {
    const uint32_t counter = static_cast<uint32_t>(start / 4);
    for (int64_t i = 0; i < kCounters; ++i) {
      c0[i] = counter + static_cast<uint32_t>(i);
      c1[i] = place.key;
      c2[i] = place.step;
      c3[i] = place.sample;
    }
    uint32_t key0 = place.seed_low, key1 = place.seed_high;
    for (int round = 0; round < 10; ++round) {
#pragma GCC ivdep
      for (int64_t i = 0; i < kCounters; ++i) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int64_t i = 0; i < kCounters; ++i) {
      block[4 * i] = ToUniform(c0[i]);
      block[4 * i + 1] = ToUniform(c1[i]);
      block[4 * i + 2] = ToUniform(c2[i]);
      block[4 * i + 3] = ToUniform(c3[i]);
    }
    const int64_t from = start < first ? first : start;
    const int64_t to = start + 4 * kCounters < end ? start + 4 * kCounters : end;
    for (int64_t i = from; i < to; ++i) dst[i - first] = block[i - start];
  }
}

// --- Instruction sets
// --------------------------------------------------------------------------------------------------

// Wrappers and table of one instruction set.
#define MT_INSTRUCTION_SET(SET, TARGET)                                                                                \
  struct SET {                                                                                                         \
    template <typename Op>                                                                                             \
    TARGET static void Unary(float* dst, const float* a, int64_t n) {                                                  \
      UnaryLoop<Op>(dst, a, n);                                                                                        \
    }                                                                                                                  \
    template <typename Op>                                                                                             \
    TARGET static void VV(float* dst, const float* a, const float* b, int64_t n) {                                     \
      VVLoop<Op>(dst, a, b, n);                                                                                        \
    }                                                                                                                  \
    template <typename Op>                                                                                             \
    TARGET static void VS(float* dst, const float* a, float b, int64_t n) {                                            \
      VSLoop<Op>(dst, a, b, n);                                                                                        \
    }                                                                                                                  \
    template <typename Op>                                                                                             \
    TARGET static void SV(float* dst, float a, const float* b, int64_t n) {                                            \
      SVLoop<Op>(dst, a, b, n);                                                                                        \
    }                                                                                                                  \
    template <VectorMath::First kFirst, VectorMath::Second kSecond>                                                    \
    TARGET static void Pair(float* dst, const float* a, const float* b, float s, const float* c, float u, int64_t n) { \
      PairLoop<kFirst, kSecond>(dst, a, b, s, c, u, n);                                                                \
    }                                                                                                                  \
    TARGET static void Fill(float* dst, float value, int64_t n) { FillLoop(dst, value, n); }                           \
    TARGET static void Sin(float* dst, const float* a, int64_t n) { SinCosLoop<0>(dst, a, n); }                        \
    TARGET static void Cos(float* dst, const float* a, int64_t n) { SinCosLoop<1>(dst, a, n); }                        \
    TARGET static void SelectVV(float* dst, const float* c, const float* a, const float* b, int64_t n) {               \
      SelectVVLoop(dst, c, a, b, n);                                                                                   \
    }                                                                                                                  \
    TARGET static void SelectVS(float* dst, const float* c, const float* a, float b, int64_t n) {                      \
      SelectVSLoop(dst, c, a, b, n);                                                                                   \
    }                                                                                                                  \
    TARGET static void SelectSV(float* dst, const float* c, float a, const float* b, int64_t n) {                      \
      SelectSVLoop(dst, c, a, b, n);                                                                                   \
    }                                                                                                                  \
    TARGET static void SelectSS(float* dst, const float* c, float a, float b, int64_t n) {                             \
      SelectSSLoop(dst, c, a, b, n);                                                                                   \
    }                                                                                                                  \
    template <typename Format>                                                                                         \
    TARGET static void Load(float* dst, const std::byte* from, int64_t n) {                                            \
      LoadLoop<Format>(dst, from, n);                                                                                  \
    }                                                                                                                  \
    template <typename Format>                                                                                         \
    TARGET static void Store(std::byte* to, const float* a, int64_t n) {                                               \
      StoreLoop<Format>(to, a, n);                                                                                     \
    }                                                                                                                  \
    template <typename Format>                                                                                         \
    TARGET static void Round(float* dst, const float* a, int64_t n) {                                                  \
      RoundLoop<Format>(dst, a, n);                                                                                    \
    }                                                                                                                  \
    TARGET static void Uniform(float* dst, const UniformPlace& place, int64_t first, int64_t n) {                      \
      UniformLoop(dst, place, first, n);                                                                               \
    }                                                                                                                  \
  };

#if defined(__x86_64__)
MT_INSTRUCTION_SET(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
MT_INSTRUCTION_SET(Avx2, __attribute__((target("avx2"))))
#endif
MT_INSTRUCTION_SET(Default, )

template <typename Set>
VectorMath MakeTable(absl::string_view name) {
  VectorMath t{};
  t.name = name;
  const auto at = [](auto& table, auto index) -> auto& { return table[static_cast<size_t>(index)]; };
  at(t.unary, Prim::kNeg) = Set::template Unary<NegOp>;
  at(t.unary, Prim::kAbs) = Set::template Unary<AbsOp>;
  at(t.unary, Prim::kExp) = Set::template Unary<ExpOp>;
  at(t.unary, Prim::kLog) = Set::template Unary<LogOp>;
  at(t.unary, Prim::kSqrt) = Set::template Unary<SqrtOp>;
  at(t.unary, Prim::kTanh) = Set::template Unary<TanhOp>;
  at(t.unary, Prim::kErf) = Set::template Unary<ErfOp>;
  at(t.unary, Prim::kSin) = Set::Sin;
  at(t.unary, Prim::kCos) = Set::Cos;
  const auto binary = [&]<typename Op>(Prim prim, std::type_identity<Op>) {
    at(t.vv, prim) = Set::template VV<Op>;
    at(t.vs, prim) = Set::template VS<Op>;
    at(t.sv, prim) = Set::template SV<Op>;
  };
  binary(Prim::kAdd, std::type_identity<AddOp>());
  binary(Prim::kSub, std::type_identity<SubOp>());
  binary(Prim::kMul, std::type_identity<MulOp>());
  binary(Prim::kDiv, std::type_identity<DivOp>());
  binary(Prim::kMax, std::type_identity<MaxOp>());
  binary(Prim::kMin, std::type_identity<MinOp>());
  binary(Prim::kPow, std::type_identity<PowOp>());
  binary(Prim::kLess, std::type_identity<LessOp>());
  const auto pairs = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    ((t.pair[kIndex / VectorMath::kSeconds][kIndex % VectorMath::kSeconds] =
          Set::template Pair<static_cast<VectorMath::First>(kIndex / VectorMath::kSeconds),
                             static_cast<VectorMath::Second>(kIndex % VectorMath::kSeconds)>),
     ...);
  };
  pairs(std::make_index_sequence<size_t{VectorMath::kFirsts} * VectorMath::kSeconds>());
  t.fill = Set::Fill;
  t.select_vv = Set::SelectVV;
  t.select_vs = Set::SelectVS;
  t.select_sv = Set::SelectSV;
  t.select_ss = Set::SelectSS;
  const auto format = [&]<typename Format>(DType dtype, std::type_identity<Format>) {
    at(t.load, dtype) = Set::template Load<Format>;
    at(t.store, dtype) = Set::template Store<Format>;
  };
  format(DType::kF32, std::type_identity<F32>());
  format(DType::kBF16, std::type_identity<BF16>());
  format(DType::kF16, std::type_identity<F16>());
  format(DType::kF64, std::type_identity<F64>());
  at(t.round, DType::kBF16) = Set::template Round<BF16>;
  at(t.round, DType::kF16) = Set::template Round<F16>;
  t.uniform = Set::Uniform;
  return t;
}

struct Tables {
  VectorMath tables[3];
  size_t count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables[count++] = MakeTable<Avx512>("avx512");
    }
    if (__builtin_cpu_supports("avx2")) tables[count++] = MakeTable<Avx2>("avx2");
#endif
    tables[count++] = MakeTable<Default>("default");
  }
};

}  // namespace

absl::Span<const VectorMath> AllVectorMath() {
  static const Tables tables;
  return absl::MakeConstSpan(tables.tables, tables.count);
}

}  // namespace mt
