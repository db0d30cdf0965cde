// One vectorised loop for each scalar primitive, conversion and random draw, compiled for several instruction sets.
//
// All sets give the same bits: the loops are branch-free, every operation rounds once, and nothing is contracted.
// dst may be equal to any source; other overlaps are not allowed. n >= 0.
#ifndef MT_RUNTIME_CPU_VECTOR_MATH_H_
#define MT_RUNTIME_CPU_VECTOR_MATH_H_

#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/scalar.h"
#include "ir/tensor_type.h"

namespace mt {

// The place of a run of random numbers; see UniformAt in ir/scalar.h.
struct UniformPlace {
  uint32_t seed_low = 0, seed_high = 0, step = 0, sample = 0, key = 0;
};

struct VectorMath {
  static constexpr size_t kPrims = static_cast<size_t>(Prim::kRound) + 1;
  static constexpr size_t kDTypes = static_cast<size_t>(DType::kU8) + 1;

  absl::string_view name;  // "avx512", "avx2", "default"

  // Indexed by Prim; null where the primitive has another arity. Relative errors: exp, log 1e-7 and 2 ulp; tanh, erf,
  // sin, cos 4 ulp; the others round correctly. pow is that of the C library.
  using Unary = void (*)(float* dst, const float* a, int64_t n);
  using Binary = void (*)(float* dst, const float* a, const float* b, int64_t n);
  using BinaryVectorScalar = void (*)(float* dst, const float* a, float b, int64_t n);
  using BinaryScalarVector = void (*)(float* dst, float a, const float* b, int64_t n);
  Unary unary[kPrims];
  Binary vv[kPrims];
  BinaryVectorScalar vs[kPrims];
  BinaryScalarVector sv[kPrims];

  // Two operations of arithmetic in one loop, each with its own rounding: t = first(a, b or s), dst = second(t, c or
  // u).
  enum First { kAddVV, kAddVS, kSubVV, kSubVS, kSubSV, kMulVV, kMulVS, kFirsts };      // kSubSV: s - a
  enum Second { kAddV, kAddS, kSubV, kSubS, kFromV, kFromS, kMulV, kMulS, kSeconds };  // kFromV: c - t
  using Pair = void (*)(float* dst, const float* a, const float* b, float s, const float* c, float u, int64_t n);
  Pair pair[kFirsts][kSeconds];

  void (*fill)(float* dst, float value, int64_t n);

  // dst = c != 0 ? a : b; a and b vectors (v) or scalars (s).
  void (*select_vv)(float* dst, const float* c, const float* a, const float* b, int64_t n);
  void (*select_vs)(float* dst, const float* c, const float* a, float b, int64_t n);
  void (*select_sv)(float* dst, const float* c, float a, const float* b, int64_t n);
  void (*select_ss)(float* dst, const float* c, float a, float b, int64_t n);

  // Indexed by DType: widens to f32, rounds from f32 (to nearest even), rounds in place of f32 (null for f32 and f64).
  // Null for integers.
  void (*load[kDTypes])(float* dst, const std::byte* from, int64_t n);
  void (*store[kDTypes])(std::byte* to, const float* a, int64_t n);
  Unary round[kDTypes];

  // Elements first..first+n-1 of the sample.
  void (*uniform)(float* dst, const UniformPlace& place, int64_t first, int64_t n);
};

// Those that this CPU runs, best first.
absl::Span<const VectorMath> AllVectorMath();
inline const VectorMath& BestVectorMath() { return AllVectorMath()[0]; }

}  // namespace mt

#endif  // MT_RUNTIME_CPU_VECTOR_MATH_H_
