// AdamW over 8-bit moments: a warp for each block of 256 elements, 8 a lane. Only operations that IEEE 754 rounds
// exactly, in the order of the row's reference, so that codes are the same everywhere.
// Constants before this text: P, G (dtypes of p and g), kElements, kDecay, kApply; kSigned, kUnsigned (values) and
// kSignedMiddles, kUnsignedMiddles (between a value and the next), 256 floats each.
__device__ __forceinline__ u8 Encode(float x, const float* middles) {
  u32 low = 0, high = 255;  // The first code whose middle x does not pass.
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (x > middles[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return (u8)low;
}

extern "C" __global__ void __launch_bounds__(256)
    mt_adamw8bit(const P* p, const u8* m, const u8* v, const float* m_scale, const float* v_scale, const G* g,
                 const float* lr_, const float* beta1_, const float* beta2_, const float* eps_,
                 const float* weight_decay_, const float* correction1_, const float* correction2_,
                 const float* grad_scale_, const float* apply, P* p_new, u8* m_new, u8* v_new, float* m_scale_new,
                 float* v_scale_new) {
  __shared__ float tables[4][256];
  tables[0][threadIdx.x] = kSigned[threadIdx.x];
  tables[1][threadIdx.x] = kUnsigned[threadIdx.x];
  tables[2][threadIdx.x] = kSignedMiddles[threadIdx.x];
  tables[3][threadIdx.x] = kUnsignedMiddles[threadIdx.x];
  __syncthreads();
  const u32 lane = threadIdx.x % 32;
  const i64 block = (i64)blockIdx.x * 8 + threadIdx.x / 32, first = block * 256 + lane * 8;
  if (block * 256 >= kElements) return;
  const float lr = *lr_, beta1 = *beta1_, beta2 = *beta2_, eps = *eps_, weight_decay = *weight_decay_,
              correction1 = *correction1_, correction2 = *correction2_, grad_scale = *grad_scale_;
  const bool skip = kApply && *apply == 0;
  const float old_m_scale = m_scale[block], old_v_scale = v_scale[block];
  const int n = first >= kElements ? 0 : kElements - first < 8 ? (int)(kElements - first) : 8;
  Pack<8, u8> m_codes, v_codes;
  float ps[8], gs[8], ms[8], vs[8];
  if (n == 8) {
    m_codes.units[0] = *(const Bytes8*)(m + first);
    v_codes.units[0] = *(const Bytes8*)(v + first);
    Load<8, false>(p + first, ps);
    Load<8, false>(g + first, gs);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      m_codes.elements[i] = v_codes.elements[i] = 0;
      ps[i] = gs[i] = 0;
      if (i < n) {
        m_codes.elements[i] = m[first + i];
        v_codes.elements[i] = v[first + i];
        ps[i] = ToFloat(p[first + i]);
        gs[i] = ToFloat(g[first + i]);
      }
    }
  }
  float m_largest = 0, v_largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float gradient = gs[i] * grad_scale;
    const float m_old = tables[0][m_codes.elements[i]] * old_m_scale;
    const float v_old = tables[1][v_codes.elements[i]] * old_v_scale;
    ms[i] = beta1 * m_old + (1.0f - beta1) * gradient;
    vs[i] = beta2 * v_old + (1.0f - beta2) * (gradient * gradient);
    if (i < n) {
      m_largest = fmaxf(m_largest, fabsf(ms[i]));
      v_largest = fmaxf(v_largest, vs[i]);
    }
    const float decayed = kDecay ? ps[i] - lr * weight_decay * ps[i] : ps[i];
    const float updated = decayed - lr / correction1 * ms[i] / (sqrtf(vs[i]) / sqrtf(correction2) + eps);
    ps[i] = skip ? ps[i] : updated;
  }
  m_largest = WarpFold<Largest>(m_largest);
  v_largest = WarpFold<Largest>(v_largest);
  if (!skip) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      m_codes.elements[i] = Encode(m_largest > 0 ? ms[i] / m_largest : 0, tables[2]);
      v_codes.elements[i] = Encode(v_largest > 0 ? vs[i] / v_largest : 0, tables[3]);
    }
  }
  if (n == 8) {
    Store<8>(p_new + first, ps);
    *(Bytes8*)(m_new + first) = m_codes.units[0];
    *(Bytes8*)(v_new + first) = v_codes.units[0];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < n) {
        p_new[first + i] = FromFloat<P>(ps[i]);
        m_new[first + i] = m_codes.elements[i];
        v_new[first + i] = v_codes.elements[i];
      }
    }
  }
  if (lane == 0) {
    m_scale_new[block] = skip ? old_m_scale : m_largest;
    v_scale_new[block] = skip ? old_v_scale : v_largest;
  }
}
