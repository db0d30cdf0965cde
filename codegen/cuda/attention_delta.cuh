// delta[row] = the sum of dout out.
extern "C" __global__ void __launch_bounds__(128) mt_attention_delta(const T* dout, const T* out, float* delta) {
  const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= kQueries) return;
  float sum = 0;
  for (int d = threadIdx.x % 32; d < kWidth; d += 32) {
    sum = fmaf(ToFloat(dout[row * kWidth + d]), ToFloat(out[row * kWidth + d]), sum);
  }
  sum = WarpFold<Sum>(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}
