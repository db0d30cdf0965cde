// What every kernel begins with: types, conversions (round to nearest even), 16-byte vectors, sums in a fixed order,
// Philox. Needs no header, so that sources compile wherever NVRTC is.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
struct alignas(8) Bytes8 {
  u32 x, y;
};
struct alignas(16) Bytes16 {
  u32 x, y, z, w;
};

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(double x) { return (float)x; }
__device__ __forceinline__ float ToFloat(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float ToFloat(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double FromFloat<double>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 FromFloat<bf16>(float x) {
  bf16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const u32 bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fff : (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  return y;
}
template <>
__device__ __forceinline__ f16 FromFloat<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <typename T>
__device__ __forceinline__ float Round(float x) {
  return ToFloat(FromFloat<T>(x));
}
#if __CUDA_ARCH__ >= 800
// The upper one of a pair lies where the bits of a float are; this conversion is faster than that of one element.
template <>
__device__ __forceinline__ float Round<bf16>(float x) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(x), "f"(0.0f));
  return __uint_as_float(bits);
}
#endif

template <typename T>
struct IsBf16 {
  static constexpr bool kIs = false;
};
template <>
struct IsBf16<bf16> {
  static constexpr bool kIs = true;
};

// Two elements of 16 bits by one conversion, where there is one.
template <typename T>
struct Pair {
  static constexpr bool kIs = false;
  __device__ __forceinline__ static u32 Of(float, float) { return 0; }
};
#if __CUDA_ARCH__ >= 800
template <>
struct Pair<bf16> {
  static constexpr bool kIs = true;
  __device__ __forceinline__ static u32 Of(float first, float second) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
  }
};
template <>
struct Pair<f16> {
  static constexpr bool kIs = true;
  __device__ __forceinline__ static u32 Of(float first, float second) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
  }
};
#endif

// The elements of a word in memory as floats, and a word of floats: for types whose units of 16 bytes are read and
// written without a union, which takes the compiler longer.
template <typename T>
struct Word {
  static constexpr int kElements = 0;
};
template <>
struct Word<float> {
  static constexpr int kElements = 1;
  __device__ __forceinline__ static void Get(u32 word, float* to) { to[0] = __uint_as_float(word); }
  __device__ __forceinline__ static u32 Of(const float* from) { return __float_as_uint(from[0]); }
};
template <typename T>
__device__ __forceinline__ u32 WordOfTwo(const float* from) {
  if (Pair<T>::kIs) return Pair<T>::Of(from[0], from[1]);
  return (u32)FromFloat<T>(from[0]).bits | (u32)FromFloat<T>(from[1]).bits << 16;
}
template <>
struct Word<bf16> {
  static constexpr int kElements = 2;
  __device__ __forceinline__ static void Get(u32 word, float* to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ __forceinline__ static u32 Of(const float* from) { return WordOfTwo<bf16>(from); }
};
template <>
struct Word<f16> {
  static constexpr int kElements = 2;
  __device__ __forceinline__ static void Get(u32 word, float* to) {
    f16 low, high;
    low.bits = (u16)word;
    high.bits = (u16)(word >> 16);
    to[0] = ToFloat(low);
    to[1] = ToFloat(high);
  }
  __device__ __forceinline__ static u32 Of(const float* from) { return WordOfTwo<f16>(from); }
};

// N elements at `p`, a multiple of min(16, N sizeof(T)) bytes, as floats; by accesses of at most 16 bytes. `kConstant`:
// nothing writes there while the kernel runs.
template <int kBytes>
struct Access;
template <>
struct Access<1> {
  typedef u8 Type;
};
template <>
struct Access<2> {
  typedef u16 Type;
};
template <>
struct Access<4> {
  typedef u32 Type;
};
template <>
struct Access<8> {
  typedef Bytes8 Type;
};
template <>
struct Access<16> {
  typedef Bytes16 Type;
};
__device__ __forceinline__ u8 LoadConstant(const u8* p) { return __ldg(p); }
__device__ __forceinline__ u16 LoadConstant(const u16* p) { return __ldg(p); }
__device__ __forceinline__ u32 LoadConstant(const u32* p) { return __ldg(p); }
__device__ __forceinline__ Bytes8 LoadConstant(const Bytes8* p) {
  const uint2 v = __ldg((const uint2*)p);
  Bytes8 bytes = {v.x, v.y};
  return bytes;
}
__device__ __forceinline__ Bytes16 LoadConstant(const Bytes16* p) {
  const uint4 v = __ldg((const uint4*)p);
  Bytes16 bytes = {v.x, v.y, v.z, v.w};
  return bytes;
}

template <int N, typename T>
struct Pack {
  static constexpr int kBytes = N * (int)sizeof(T) < 16 ? N * (int)sizeof(T) : 16;
  static constexpr int kCount = N * (int)sizeof(T) / kBytes;
  typedef typename Access<kBytes>::Type Unit;
  union {
    Unit units[kCount];
    T elements[N];
    u32 pairs[N * (int)sizeof(T) < 4 ? 1 : N * (int)sizeof(T) / 4];
  };
  __device__ __forceinline__ Pack() {}
};

template <int N, bool kConstant, typename T>
__device__ __forceinline__ void Load(const T* p, float (&to)[N]) {
  constexpr int kWord = Word<T>::kElements;
  if constexpr (kWord > 0 && N % (4 * kWord) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4 * kWord) {
      const Bytes16* from = (const Bytes16*)(p + i);
      const Bytes16 unit = kConstant ? LoadConstant(from) : *from;
      Word<T>::Get(unit.x, to + i);
      Word<T>::Get(unit.y, to + i + kWord);
      Word<T>::Get(unit.z, to + i + 2 * kWord);
      Word<T>::Get(unit.w, to + i + 3 * kWord);
    }
  } else {
    typedef Pack<N, T> P;
    P pack;
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      const typename P::Unit* unit = (const typename P::Unit*)p + i;
      if (kConstant) {
        pack.units[i] = LoadConstant(unit);
      } else {
        pack.units[i] = *unit;
      }
    }
    if (IsBf16<T>::kIs && N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        to[i] = __uint_as_float(pack.pairs[i / 2] << 16);
        to[(i + 1) % N] = __uint_as_float(pack.pairs[i / 2] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = ToFloat(pack.elements[i]);
    }
  }
}

template <int N, typename T>
__device__ __forceinline__ void Store(T* p, const float (&from)[N]) {
  constexpr int kWord = Word<T>::kElements;
  if constexpr (kWord > 0 && N % (4 * kWord) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4 * kWord) {
      const Bytes16 unit = {Word<T>::Of(from + i), Word<T>::Of(from + i + kWord), Word<T>::Of(from + i + 2 * kWord),
                            Word<T>::Of(from + i + 3 * kWord)};
      *(Bytes16*)(p + i) = unit;
    }
  } else {
    typedef Pack<N, T> P;
    P pack;
    if (Pair<T>::kIs && N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) pack.pairs[i / 2] = Pair<T>::Of(from[i], from[(i + 1) % N]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.elements[i] = FromFloat<T>(from[i]);
    }
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) ((typename P::Unit*)p)[i] = pack.units[i];
  }
}

#if __CUDA_ARCH__ >= 800
// 16 bytes into shared memory, while the thread goes on.
__device__ __forceinline__ void CopyAsync(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void CommitAsync() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kLeft groups are there, for the thread that copied them.
template <int kLeft>
__device__ __forceinline__ void WaitAsync() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
#endif

struct Sum {
  __device__ __forceinline__ static float Start() { return 0; }
  __device__ __forceinline__ static float Of(float a, float b) { return a + b; }
};
struct Largest {
  __device__ __forceinline__ static float Start() { return __uint_as_float(0xff800000u); }
  __device__ __forceinline__ static float Of(float a, float b) { return fmaxf(a, b); }
};

// Over the 32 lanes of a warp; every lane gets the same bits.
template <typename Op>
__device__ __forceinline__ float WarpFold(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = Op::Of(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Over `kThreads` threads: a warp, or the whole block, warp after warp. `shared` holds a float for each warp of the
// block; all threads must come here.
template <typename Op, int kThreads>
__device__ __forceinline__ float Fold(float x, float* shared) {
  x = WarpFold<Op>(x);
  if (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = shared[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) total = Op::Of(total, shared[i]);
  __syncthreads();
  return total;
}

// Philox4x32-10; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), section 4.3.
__device__ __forceinline__ uint4 Philox(u32 k0, u32 k1, u32 c0, u32 c1, u32 c2, u32 c3) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}
__device__ __forceinline__ float UniformFromBits(u32 bits) { return (float)(bits >> 8) * 5.9604644775390625e-08f; }

// Numbers for `N` elements from `element` of sample `sample`; rng: seed low, seed high, step, first sample. Where N is
// a multiple of 4, so is `element`.
template <int N>
__device__ __forceinline__ void Uniforms(const int* rng, u32 key, u64 sample, u64 element, float (&to)[N]) {
  const u32 k0 = (u32)rng[0], k1 = (u32)rng[1], step = (u32)rng[2], at = (u32)rng[3] + (u32)sample;
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const uint4 words = Philox(k0, k1, (u32)(element / 4) + i / 4, key, step, at);
      to[i + 0] = UniformFromBits(words.x);
      to[(i + 1) % N] = UniformFromBits(words.y);
      to[(i + 2) % N] = UniformFromBits(words.z);
      to[(i + 3) % N] = UniformFromBits(words.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint4 words = Philox(k0, k1, (u32)((element + i) / 4), key, step, at);
      const u32 w = (u32)((element + i) % 4);
      to[i] = UniformFromBits(w == 0 ? words.x : w == 1 ? words.y : w == 2 ? words.z : words.w);
    }
  }
}

// The primitives of ir/scalar.h that are no single operation.
// tanh x within 4e-7 of it: below 0.6 by a polynomial fitted to (tanh x / x - 1) / x^2, above by 1 - 2 / (e^2x + 1).
__device__ __forceinline__ float Tanh(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fabsf(x) * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e + 1.0f));
  const float s = x * x;
  float p = fmaf(0.0156126171f, s, -0.0522117950f);
  p = fmaf(p, s, 0.133131161f);
  p = fmaf(p, s, -0.333325982f);
  return fabsf(x) < 0.6f ? fmaf(p * s, x, x) : copysignf(fmaf(-2.0f, r, 1.0f), x);
}
// The same within 2e-7, but without the digits of a small result: for 1 + tanh x and (tanh x)^2.
__device__ __forceinline__ float TanhNearOne(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 2.885390082f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e + 1.0f));
  return fmaf(-2.0f, r, 1.0f);
}
__device__ __forceinline__ float MaxOf(float a, float b) { return a >= b || a != a ? a : b; }
__device__ __forceinline__ float MinOf(float a, float b) { return a <= b || a != a ? a : b; }
