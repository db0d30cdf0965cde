// Softmax cross entropy over rows of logits, kThreads threads a row: the log-sum-exp and the loss of each row, and,
// where MT_BACKWARD, the gradient dloss (softmax - [label]) over the logits.
// Constants before this text: T, kRows, kColumns, kClasses, kThreads, kBlock, kVector; Bias, the dtype of a bias that
// is added to every row, where MT_BIAS. A row whose label is negative has no loss and no gradient.
__device__ __forceinline__ void LoadLogits(const T* x, const void* bias, int c, float (&to)[kVector]) {
  Load<kVector, false>(x + c, to);
#ifdef MT_BIAS
  float b[kVector];
  Load<kVector, true>((const Bias*)bias + c, b);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] += b[i];
#endif
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (kClasses < kColumns && c + i >= kClasses) to[i] = __uint_as_float(0xff800000u);
  }
}

// `log_sums` may be null.
__device__ __forceinline__ void LossRow(T* x, const int* labels, const float* dloss, const void* bias, float* log_sums,
                                        float* losses) {
  __shared__ float fold[32];
  const u32 lane = threadIdx.x % kThreads;
  const u64 row = (u64)blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= kRows) return;
  x += row * kColumns;
  const int label = labels[row];
  // The largest so far, and the sum of exponentials relative to it.
  float largest = -3.402823466e+38f, sum = 0;
#pragma unroll 2
  for (int c = lane * kVector; c < kClasses; c += kThreads * kVector) {
    float h[kVector];
    LoadLogits(x, bias, c, h);
    float most = largest;
#pragma unroll
    for (int i = 0; i < kVector; ++i) most = fmaxf(most, h[i]);
    sum *= expf(largest - most);
    largest = most;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += expf(h[i] - largest);
  }
  const float most = Fold<Largest, kThreads>(largest, fold);
  const float log_sum = most + logf(Fold<Sum, kThreads>(sum * expf(largest - most), fold));
  if (lane == 0) {
    float at_label = 0;
    if (label >= 0) {
      at_label = ToFloat(x[label]);
#ifdef MT_BIAS
      at_label += ToFloat(((const Bias*)bias)[label]);
#endif
    }
    losses[row] = label < 0 ? 0.0f : log_sum - at_label;
    if (log_sums != nullptr) log_sums[row] = log_sum;
  }
#ifdef MT_BACKWARD
  const float factor = *dloss;
  // The label's logit has been read.
  if (kThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
#pragma unroll 2
  for (int c = lane * kVector; c < kColumns; c += kThreads * kVector) {
    float h[kVector];
    if (label >= 0) LoadLogits(x, bias, c, h);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      h[i] = label < 0 || c + i >= kClasses ? 0.0f : factor * (expf(h[i] - log_sum) - (c + i == label ? 1.0f : 0.0f));
    }
    Store<kVector>(x + c, h);
  }
#endif
}

#if defined(MT_BIAS) && defined(MT_BACKWARD)
extern "C" __global__ void __launch_bounds__(kBlock)
    mt_loss_rows(T* x, const int* labels, float* losses, const float* dloss, const void* bias) {
  LossRow(x, labels, dloss, bias, nullptr, losses);
}
#elif defined(MT_BACKWARD)
extern "C" __global__ void __launch_bounds__(kBlock)
    mt_loss_rows(T* x, const int* labels, float* losses, const float* dloss) {
  LossRow(x, labels, dloss, nullptr, nullptr, losses);
}
#elif defined(MT_BIAS)
extern "C" __global__ void __launch_bounds__(kBlock)
    mt_loss_rows(T* x, const int* labels, float* losses, const void* bias) {
  LossRow(x, labels, nullptr, bias, nullptr, losses);
}
#elif defined(MT_LOG_SUMS)
extern "C" __global__ void __launch_bounds__(kBlock)
    mt_loss_rows(T* x, const int* labels, float* losses, float* log_sums) {
  LossRow(x, labels, nullptr, nullptr, log_sums, losses);
}
#else
extern "C" __global__ void __launch_bounds__(kBlock) mt_loss_rows(T* x, const int* labels, float* losses) {
  LossRow(x, labels, nullptr, nullptr, nullptr, losses);
}
#endif
