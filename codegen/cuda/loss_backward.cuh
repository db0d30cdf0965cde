// dlogits = dloss (exp(logits - lse) - [label]); 0 in rows without a label and in columns that are no class.
// Constants before this text: T, kRows, kColumns, kClasses, kVector, kTiles: blocks of 256 vectors a row.
extern "C" __global__ void __launch_bounds__(256)
    mt_loss_backward(const float* dloss, const T* logits, const int* labels, const float* log_sums, T* to) {
  const u64 row = blockIdx.x / kTiles;
  const int c = (int)(blockIdx.x % kTiles * 256 + threadIdx.x) * kVector;
  if (c >= kColumns) return;
  const int label = labels[row];
  const float factor = *dloss, log_sum = log_sums[row];
  float h[kVector];
  Load<kVector, false>(logits + row * kColumns + c, h);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    h[i] = label < 0 || c + i >= kClasses ? 0.0f : factor * (expf(h[i] - log_sum) - (c + i == label ? 1.0f : 0.0f));
  }
  Store<kVector>(to + row * kColumns + c, h);
}
