// y = softmax(scale x + mask), a row for each kThreads threads, and its gradient dx = scale y (dy - sum of dy y).
// Constants before this text: T, kRows, kColumns, kThreads, kBlock, kVector, kSlots, kHold, kCausal, kWindow, kScale.
struct Visible {
  int first, last;
};
__device__ __forceinline__ Visible VisibleColumns(u64 row) {
  Visible v = {0, (int)kColumns};
  if (kCausal) {
    const int t = (int)(row % kColumns);
    v.last = t + 1;
    if (kWindow >= 0 && t > kWindow) v.first = t - (int)kWindow;
  }
  return v;
}

// scale x of the visible columns of vector j, -infinity elsewhere.
__device__ __forceinline__ void LoadScores(const T* x, int c, Visible v, float (&to)[kVector]) {
  const bool any = c < v.last && c + kVector > v.first;
  if (any) Load<kVector, false>(x + c, to);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const bool visible = any && c + i >= v.first && c + i < v.last;
    to[i] = visible ? to[i] * kScale : __uint_as_float(0xff800000u);
  }
}

#ifdef MT_FORWARD
extern "C" __global__ void __launch_bounds__(kBlock) mt_softmax(const T* x, T* y) {
  __shared__ float fold[32];
  const u32 lane = threadIdx.x % kThreads;
  const u64 row = (u64)blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= kRows) return;
  const Visible v = VisibleColumns(row);
  x += row * kColumns;
  y += row * kColumns;
  float held[kHold ? kSlots : 1][kVector];
  float largest = __uint_as_float(0xff800000u), sum = 0;
#pragma unroll kUnroll
  for (int j = 0; j < kSlots; ++j) {
    const int c = (j * kThreads + lane) * kVector;
    if (c >= kColumns) break;
    float(&h)[kVector] = held[kHold ? j : 0];
    LoadScores(x, c, v, h);
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, h[i]);
  }
  largest = Fold<Largest, kThreads>(largest, fold);
#pragma unroll kUnroll
  for (int j = 0; j < kSlots; ++j) {
    const int c = (j * kThreads + lane) * kVector;
    if (c >= kColumns) break;
    float(&h)[kVector] = held[kHold ? j : 0];
    if (!kHold) LoadScores(x, c, v, h);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      h[i] = expf(h[i] - largest);
      sum += h[i];
    }
  }
  const float factor = 1.0f / Fold<Sum, kThreads>(sum, fold);
#pragma unroll kUnroll
  for (int j = 0; j < kSlots; ++j) {
    const int c = (j * kThreads + lane) * kVector;
    if (c >= kColumns) break;
    float(&h)[kVector] = held[kHold ? j : 0];
    if (!kHold) {
      LoadScores(x, c, v, h);
#pragma unroll
      for (int i = 0; i < kVector; ++i) h[i] = expf(h[i] - largest);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) h[i] *= factor;
    Store<kVector>(y + c, h);
  }
}
#else
extern "C" __global__ void __launch_bounds__(kBlock) mt_softmax_backward(const T* dy, const T* y, T* dx) {
  __shared__ float fold[32];
  const u32 lane = threadIdx.x % kThreads;
  const u64 row = (u64)blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= kRows) return;
  const Visible v = VisibleColumns(row);
  dy += row * kColumns;
  y += row * kColumns;
  dx += row * kColumns;
  float held_y[kHold ? kSlots : 1][kVector], held_dy[kHold ? kSlots : 1][kVector];
  float sum = 0;
#pragma unroll kUnroll
  for (int j = 0; j < kSlots; ++j) {
    const int c = (j * kThreads + lane) * kVector;
    if (c >= kColumns) break;
    float(&p)[kVector] = held_y[kHold ? j : 0];
    float(&d)[kVector] = held_dy[kHold ? j : 0];
    if (c < v.last && c + kVector > v.first) {
      Load<kVector, false>(y + c, p);
      Load<kVector, false>(dy + c, d);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (c + i >= v.first && c + i < v.last) sum += d[i] * p[i];
      }
    }
  }
  const float dot = Fold<Sum, kThreads>(sum, fold);
#pragma unroll kUnroll
  for (int j = 0; j < kSlots; ++j) {
    const int c = (j * kThreads + lane) * kVector;
    if (c >= kColumns) break;
    float(&p)[kVector] = held_y[kHold ? j : 0];
    float(&d)[kVector] = held_dy[kHold ? j : 0];
    const bool any = c < v.last && c + kVector > v.first;
    if (!kHold && any) {
      Load<kVector, false>(y + c, p);
      Load<kVector, false>(dy + c, d);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      p[i] = any && c + i >= v.first && c + i < v.last ? kScale * p[i] * (d[i] - dot) : 0.0f;
    }
    Store<kVector>(dx + c, p);
  }
}
#endif
