// What all attention kernels share. Constants before this text: T, the strides of attention.h, kHeads, kGroup (heads
// that share a key-value head), kLength, kWidth, kCausal, kWindow (-1: none), kScale, kDropout, kRate, kKeep
// (1 / (1 - rate)), kKey.
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kScale2 = kScale * kLog2E;  // Scores are taken to base 2.

__device__ __forceinline__ float NegativeInfinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 SharedAddress(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ bool Sees(int t, int s) {
  if (s >= kLength || t >= kLength) return false;
  return !kCausal || (s <= t && (kWindow < 0 || s + kWindow >= t));
}
__device__ __forceinline__ int FirstKey(int t) { return kCausal && kWindow >= 0 && t > kWindow ? t - (int)kWindow : 0; }
__device__ __forceinline__ int EndOfKeys(int t) { return kCausal && t < kLength ? t + 1 : (int)kLength; }

// What the weight of (query t, key s) of head h in sample b is multiplied with.
__device__ __forceinline__ float Keep(const int* rng, u64 b, u64 h, int t, int s) {
  float u[1];
  Uniforms<1>(rng, (u32)kKey, b, (h * kLength + t) * kLength + s, u);
  return u[0] < kRate ? 0.0f : kKeep;
}
// Of keys s and s + 1, s even.
__device__ __forceinline__ void KeepPair(const int* rng, u64 b, u64 h, int t, int s, float (&keep)[2]) {
  if (kLength % 2 == 0) {
    const u64 element = (h * kLength + t) * kLength + s;
    float u[4];
    Uniforms<4>(rng, (u32)kKey, b, element / 4 * 4, u);
    const bool upper = element % 4 == 2;
    keep[0] = (upper ? u[2] : u[0]) < kRate ? 0.0f : kKeep;
    keep[1] = (upper ? u[3] : u[1]) < kRate ? 0.0f : kKeep;
  } else {
    keep[0] = Keep(rng, b, h, t, s);
    keep[1] = Keep(rng, b, h, t, s + 1);
  }
}
