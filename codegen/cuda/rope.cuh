// y = x [rows, T, D] with pairs rotated by t frequency[i]. A thread turns kVector pairs of some rows of one t.
// A grid of T by threads for all rows. Constants before this text: Element, kRows (all dimensions before T; 0: as many
// as there are threads for), kWidth (D), kVector, kRowsPerThread, kInterleaved, kSign, kPosition (t counts from
// *position; else nothing is read there); kFrequency[D / 2] in f64.
constexpr int kPairs = (int)kWidth / 2, kVectors = kPairs / (int)kVector;

extern "C" __global__ void __launch_bounds__(256) mt_rope(const Element* x, const int* position, Element* y) {
  const u64 t = blockIdx.x, length = gridDim.x;
  const u64 item = blockIdx.y * (u64)blockDim.x + threadIdx.x;
  const int first = (int)(item % kVectors) * (int)kVector;
  const u64 row = item / kVectors * kRowsPerThread;
  if (kRows > 0 && row >= kRows) return;
  const double angle_at = (double)(t + (kPosition ? (u64)*position : 0));
  float c[kVector], s[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const double angle = angle_at * kFrequency[first + i];
    const double turns = rint(angle * 0.15915494309189535);
    const float rest = (float)fma(-turns, 6.283185307179586, angle);
    sincosf(rest, &s[i], &c[i]);
    s[i] *= kSign;
  }
#pragma unroll 2
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (kRows > 0 && row + r >= kRows) return;
    const u64 at = ((row + r) * length + t) * kWidth;
    if (kInterleaved) {
      float a[2 * kVector];
      Load<2 * kVector, false>(x + at + 2 * first, a);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float u = a[2 * i], v = a[2 * i + 1];
        a[2 * i] = u * c[i] - v * s[i];
        a[2 * i + 1] = v * c[i] + u * s[i];
      }
      Store<2 * kVector>(y + at + 2 * first, a);
    } else {
      float a[kVector], b[kVector];
      Load<kVector, false>(x + at + first, a);
      Load<kVector, false>(x + at + kPairs + first, b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float u = a[i], v = b[i];
        a[i] = u * c[i] - v * s[i];
        b[i] = v * c[i] + u * s[i];
      }
      Store<kVector>(y + at + first, a);
      Store<kVector>(y + at + kPairs + first, b);
    }
  }
}
