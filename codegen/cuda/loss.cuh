// Softmax cross entropy over rows of logits, kThreads threads a row: the log-sum-exp and the loss of each row, and,
// where MT_BACKWARD, the gradient dloss (softmax - [label]) over the logits.
// Constants before this text: T, kRows (0: as many as there are threads for), kColumns, kClasses, kThreads, kBlock,
// kBlocks (that a processor shall hold at once), kVector; kHold: a row stays in shared memory, by kRowBytes, so that
// its logits are read once; else they are read again. Bias, the dtype of a bias that is added to every row, where
// MT_BIAS. A row whose label is negative has no loss and no gradient.
typedef Pack<kVector, T> Logits;
constexpr int kStep = (int)(kThreads * kVector);             // From vector to vector of a thread.
constexpr int kWhole = (int)(kClasses / kVector * kVector);  // Columns of vectors with classes alone.
template <bool kValue>
struct Is {
  static constexpr bool kIs = kValue;
};

__device__ __forceinline__ void Copy(const T* from, Logits& to) {
#pragma unroll
  for (int i = 0; i < Logits::kCount; ++i) to.units[i] = ((const typename Logits::Unit*)from)[i];
}
__device__ __forceinline__ void Copy(const Logits& from, T* to) {
#pragma unroll
  for (int i = 0; i < Logits::kCount; ++i) ((typename Logits::Unit*)to)[i] = from.units[i];
}

// `kRagged`: the vector goes on behind the last class, where logits count as minus infinity.
template <bool kRagged>
__device__ __forceinline__ void Unpack(const Logits& pack, const void* bias, int c, float (&to)[kVector]) {
  constexpr int kWord = Word<T>::kElements;
  if (kVector < kWord) {
    to[0] = ToFloat(pack.elements[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector / kWord; ++i) Word<T>::Get(pack.pairs[i], to + i * kWord);
  }
#ifdef MT_BIAS
  float b[kVector];
  Load<kVector, true>((const Bias*)bias + c, b);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] += b[i];
#endif
  if (kRagged) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i >= kClasses) to[i] = __uint_as_float(0xff800000u);
    }
  }
}

// e^x for x <= 0; what f32 holds as no normal number is 0.
__device__ __forceinline__ float Exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896341f));
  return y;
}

// `log_sums` may be null.
__device__ __forceinline__ void LossRow(T* x, const int* labels, const float* dloss, const void* bias, float* log_sums,
                                        float* losses) {
  __shared__ float fold[32];
  extern __shared__ Bytes16 rows[];  // A row for each kThreads threads, where kHold; a thread reads what it wrote.
  const u32 lane = threadIdx.x % kThreads;
  const u64 row = (u64)blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (kRows > 0 && row >= kRows) return;
  x += row * kColumns;
  const int label = labels[row];
  float at_label = 0;
  if (lane == 0 && label >= 0) {
    at_label = ToFloat(x[label]);
#ifdef MT_BIAS
    at_label += ToFloat(((const Bias*)bias)[label]);
#endif
  }
  T* const held = (T*)((u8*)rows + threadIdx.x / kThreads * kRowBytes);
  // The largest so far, and the sum of exponentials relative to it.
  float largest = -3.402823466e+38f, sum = 0;
  const auto add = [&](int c, auto ragged) {
    Logits pack;
    Copy(x + c, pack);
    if (kHold) Copy(pack, held + c);
    float h[kVector];
    Unpack<ragged.kIs>(pack, bias, c, h);
    float most = largest;
#pragma unroll
    for (int i = 0; i < kVector; ++i) most = fmaxf(most, h[i]);
    sum *= Exp(largest - most);
    largest = most;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += Exp(h[i] - largest);
  };
  int c = lane * kVector;
#pragma unroll 4
  for (; c < kWhole; c += kStep) add(c, Is<false>());
  if (kWhole < kClasses && c < kClasses) add(c, Is<true>());
  const float most = Fold<Largest, kThreads>(largest, fold);
  const float log_sum = most + logf(Fold<Sum, kThreads>(sum * Exp(largest - most), fold));
  if (lane == 0) {
    losses[row] = label < 0 ? 0.0f : log_sum - at_label;
    if (log_sums != nullptr) log_sums[row] = log_sum;
  }
#ifdef MT_BACKWARD
  // The label's logit has been read.
  if (kThreads == 32) __syncwarp();
  c = lane * kVector;
  if (label >= 0) {
    const float factor = *dloss;
    const auto differ = [&](int c, auto ragged) {
      Logits pack;
      Copy(kHold ? held + c : x + c, pack);
      float h[kVector];
      Unpack<ragged.kIs>(pack, bias, c, h);
#pragma unroll
      for (int i = 0; i < kVector; ++i) h[i] = Exp(h[i] - log_sum);
      if (c <= label && label < c + kVector) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) h[i] -= c + i == label ? 1.0f : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) h[i] *= factor;
      Store<kVector>(x + c, h);
    };
#pragma unroll 4
    for (; c < kWhole; c += kStep) differ(c, Is<false>());
    if (kWhole < kClasses && c < kClasses) {
      differ(c, Is<true>());
      c += kStep;
    }
  }
  const float zeros[kVector] = {};
#pragma unroll 1
  for (; c < kColumns; c += kStep) Store<kVector>(x + c, zeros);
#endif
}

#if defined(MT_BIAS) && defined(MT_BACKWARD)
extern "C" __global__ void __launch_bounds__(kBlock, kBlocks)
    mt_loss_rows(T* x, const int* labels, float* losses, const float* dloss, const void* bias) {
  LossRow(x, labels, dloss, bias, nullptr, losses);
}
#elif defined(MT_BACKWARD)
extern "C" __global__ void __launch_bounds__(kBlock, kBlocks)
    mt_loss_rows(T* x, const int* labels, float* losses, const float* dloss) {
  LossRow(x, labels, dloss, nullptr, nullptr, losses);
}
#elif defined(MT_BIAS)
extern "C" __global__ void __launch_bounds__(kBlock, kBlocks)
    mt_loss_rows(T* x, const int* labels, float* losses, const void* bias) {
  LossRow(x, labels, nullptr, bias, nullptr, losses);
}
#elif defined(MT_LOG_SUMS)
extern "C" __global__ void __launch_bounds__(kBlock, kBlocks)
    mt_loss_rows(T* x, const int* labels, float* losses, float* log_sums) {
  LossRow(x, labels, nullptr, nullptr, log_sums, losses);
}
#else
extern "C" __global__ void __launch_bounds__(kBlock, kBlocks) mt_loss_rows(T* x, const int* labels, float* losses) {
  LossRow(x, labels, nullptr, nullptr, nullptr, losses);
}
#endif
