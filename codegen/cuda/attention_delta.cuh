// delta[row] = the sum of dout out over row t of head h, row = (b kHeads + h) kLength + t.
extern "C" __global__ void __launch_bounds__(128) mt_attention_delta(const T* dout, const T* out, float* delta) {
  const u64 row = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= kQueries) return;
  const u64 head = row / kLength, at = head / kHeads * kOBatch + head % kHeads * kOHead + row % kLength * kORow;
  float sum = 0;
  for (int d = threadIdx.x % 32; d < kWidth; d += 32) {
    sum = fmaf(ToFloat(dout[at + d]), ToFloat(out[at + d]), sum);
  }
  sum = WarpFold<Sum>(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}
