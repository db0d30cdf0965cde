// Sixteen-lane vectors for the CPU kernels: the same lanes on every instruction set, so the same bits.
//
// A kernel is an always-inlined template over the element's storage, called from a function marked MT_CPU_CLONES, which
// the compiler builds for each instruction set. Reductions keep one accumulator a lane and end in Sum's fixed tree.
#ifndef MT_RUNTIME_CPU_SIMD_H_
#define MT_RUNTIME_CPU_SIMD_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "runtime/backend.h"
#include "runtime/cpu/thread_pool.h"

// Vectors wider than the baseline's registers are passed only to functions that are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && !defined(MT_SANITIZED)
#define MT_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MT_CPU_CLONES  // Sanitizers start after the loader has chosen a clone.
#endif
#define MT_CPU_INLINE inline __attribute__((always_inline))

namespace mt {

constexpr int64_t kLanes = 16;
using F32x16 = float __attribute__((vector_size(64)));
using I32x16 = int32_t __attribute__((vector_size(64)));
using U32x16 = uint32_t __attribute__((vector_size(64)));
using U16x16 = uint16_t __attribute__((vector_size(32)));

// Storage of a bf16 element: the high half of an f32.
struct BF16Bits {
  uint16_t bits;
};
// Storage of an f16 element, of IEEE 754: 1 bit of sign, 5 of exponent, 10 of mantissa.
struct F16Bits {
  uint16_t bits;
};

MT_CPU_INLINE F32x16 Splat(float value) { return value - F32x16{}; }

MT_CPU_INLINE F32x16 Load(const float* p) {
  F32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MT_CPU_INLINE F32x16 Load(const BF16Bits* p) {
  U16x16 half;
  std::memcpy(&half, p, sizeof(half));
  return reinterpret_cast<F32x16>(__builtin_convertvector(half, U32x16) << 16);
}

MT_CPU_INLINE F32x16 Load(const F16Bits* p) {
  U16x16 half;
  std::memcpy(&half, p, sizeof(half));
  const U32x16 bits = __builtin_convertvector(half, U32x16);
  const U32x16 magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
  // As an f32 the exponent is 112 too small; the product is right for subnormals, too. Infinity and NaN are not.
  const U32x16 finite = reinterpret_cast<U32x16>(reinterpret_cast<F32x16>(magnitude) * 0x1p112f);
  return reinterpret_cast<F32x16>((magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite) | sign);
}

MT_CPU_INLINE void Store(float* p, const F32x16& v) { std::memcpy(p, &v, sizeof(v)); }
// Rounds to nearest, ties to even; a NaN stays one.
MT_CPU_INLINE void Store(BF16Bits* p, const F32x16& v) {
  const U32x16 bits = reinterpret_cast<U32x16>(v);
  const U32x16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32x16 nan = (bits >> 16) | 0x40u;
  const U16x16 half = __builtin_convertvector(v == v ? rounded : nan, U16x16);
  std::memcpy(p, &half, sizeof(half));
}

MT_CPU_INLINE void Store(F16Bits* p, const F32x16& v) {
  const U32x16 bits = reinterpret_cast<U32x16>(v);
  const U32x16 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const U32x16 normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded, in the low bits.
  const U32x16 subnormal = reinterpret_cast<U32x16>(reinterpret_cast<F32x16>(magnitude) + 0.5f) - 0x3F000000u;
  const U32x16 zero = {}, infinite = zero + 0x7C00u, nan = zero + 0x7E00u;
  U32x16 result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? infinite : result;  // 65520 and more
  result = magnitude > 0x7F800000u ? nan : result;
  const U16x16 half = __builtin_convertvector(result | sign, U16x16);
  std::memcpy(p, &half, sizeof(half));
}

// v with `fill` in lanes n and above.
MT_CPU_INLINE F32x16 KeepLanes(const F32x16& v, int64_t n, float fill) {
  if (__builtin_expect(n >= kLanes, 1)) return v;
  constexpr I32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return kLane < static_cast<int32_t>(n) ? v : Splat(fill);
}

// The first n < 16 lanes; the others are `fill`, or are not written.
template <typename T>
MT_CPU_INLINE F32x16 LoadPart(const T* p, int64_t n, float fill = 0) {
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return KeepLanes(Load(part), n, fill);
}
template <typename T>
MT_CPU_INLINE void StorePart(T* p, const F32x16& v, int64_t n) {
  T part[kLanes];
  Store(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// Lanes [0, n) of a block that may be the last, shorter one of a row.
template <typename T>
MT_CPU_INLINE F32x16 LoadBlock(const T* p, int64_t n, float fill = 0) {
  return __builtin_expect(n >= kLanes, 1) ? Load(p) : LoadPart(p, n, fill);
}
template <typename T>
MT_CPU_INLINE void StoreBlock(T* p, const F32x16& v, int64_t n) {
  if (__builtin_expect(n >= kLanes, 1)) {
    Store(p, v);
  } else {
    StorePart(p, v, n);
  }
}
// As LoadBlock and StoreBlock, of a row that goes on for `room` elements, n or more of them: what lies beyond n in the
// row may be read and is overwritten with `fill`.
template <typename T>
MT_CPU_INLINE F32x16 LoadInRow(const T* p, int64_t n, int64_t room, float fill = 0) {
  return __builtin_expect(room >= kLanes, 1) ? KeepLanes(Load(p), n, fill) : LoadPart(p, n, fill);
}
template <typename T>
MT_CPU_INLINE void StoreInRow(T* p, const F32x16& v, int64_t n, int64_t room, float fill = 0) {
  if (__builtin_expect(room >= kLanes, 1)) {
    Store(p, KeepLanes(v, n, fill));
  } else {
    StorePart(p, v, n);
  }
}

MT_CPU_INLINE F32x16 Larger(const F32x16& a, const F32x16& b) { return a > b ? a : b; }

// A fixed tree: lanes 8 apart, then 4, 2, 1.
MT_CPU_INLINE float Sum(const F32x16& v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof(lane));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}
MT_CPU_INLINE float Largest(const F32x16& v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof(lane));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
}

MT_CPU_INLINE float LoadOne(const float* p) { return *p; }
MT_CPU_INLINE float LoadOne(const BF16Bits* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
MT_CPU_INLINE float LoadOne(const F16Bits* p) { return LoadPart(p, 1)[0]; }
MT_CPU_INLINE void StoreOne(float* p, float value) { *p = value; }
template <typename T>
MT_CPU_INLINE void StoreOne(T* p, float value) {
  StorePart(p, Splat(value), 1);
}

// The dtypes that kernels store elements in; they compute in f32.
inline bool IsStorage(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16; }

// A float operand whose dtype is known at run time only: vectors such as gamma, read again for every row.
struct FloatPointer {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;  // REQUIRES: IsStorage.

  MT_CPU_INLINE F32x16 Block(int64_t at, int64_t n) const {
    if (dtype == DType::kBF16) return LoadBlock(reinterpret_cast<const BF16Bits*>(data) + at, n);
    if (dtype == DType::kF16) return LoadBlock(reinterpret_cast<const F16Bits*>(data) + at, n);
    return LoadBlock(reinterpret_cast<const float*>(data) + at, n);
  }
};
MT_CPU_INLINE void StoreBlockAs(std::byte* data, DType dtype, int64_t at, const F32x16& v, int64_t n) {
  if (dtype == DType::kBF16) {
    StoreBlock(reinterpret_cast<BF16Bits*>(data) + at, v, n);
  } else if (dtype == DType::kF16) {
    StoreBlock(reinterpret_cast<F16Bits*>(data) + at, v, n);
  } else {
    StoreBlock(reinterpret_cast<float*>(data) + at, v, n);
  }
}

// One kernel in its storage types: `Of(dtype)` is null for others.
template <typename Fn>
struct StorageKernels {
  Fn f32, bf16, f16;

  Fn Of(DType dtype) const {
    return dtype == DType::kF32 ? f32 : dtype == DType::kBF16 ? bf16 : dtype == DType::kF16 ? f16 : nullptr;
  }
};
// From a template KERNEL<T>(const Args&, int64_t task): KERNELKernels, built for each instruction set.
#define MT_STORAGE_KERNELS(KERNEL, Args)                                                            \
  MT_CPU_CLONES void KERNEL##F32(const Args& args, int64_t task) { KERNEL<float>(args, task); }     \
  MT_CPU_CLONES void KERNEL##BF16(const Args& args, int64_t task) { KERNEL<BF16Bits>(args, task); } \
  MT_CPU_CLONES void KERNEL##F16(const Args& args, int64_t task) { KERNEL<F16Bits>(args, task); }   \
  constexpr StorageKernels<void (*)(const Args&, int64_t)> KERNEL##Kernels = {KERNEL##F32, KERNEL##BF16, KERNEL##F16};

// A thunk that runs body(0), ..., body(tasks - 1) on the pool.
inline Thunk ParallelThunk(ThreadPool& pool, int64_t tasks, std::function<void(int64_t)> body) {
  return [&pool, tasks, body = std::move(body)] { pool.Run(tasks, body); };
}

}  // namespace mt

#endif  // MT_RUNTIME_CPU_SIMD_H_
