// The optimizer's kernels that are neither element-wise nor reductions: scalars, and AdamW over 8-bit moments.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/dynamic_map.h"
#include "ir/loss_scale.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

absl::StatusOr<Thunk> BindAdamStep(const KernelCall& call, ThreadPool&) {
  return Thunk(
      [t = call.operands[0].as<int32_t>(), beta1 = call.operands[1].as<double>(), beta2 = call.operands[2].as<double>(),
       apply = call.attrs.Bool("apply") ? call.operands[3].as<float>() : nullptr, next = call.results[0].as<int32_t>(),
       correction1 = call.results[1].as<float>(), correction2 = call.results[2].as<float>()] {
        const int32_t step = *t + 1;
        *next = apply != nullptr && *apply == 0 ? step - 1 : step;
        *correction1 = static_cast<float>(1.0 - std::pow(*beta1, step));
        *correction2 = static_cast<float>(1.0 - std::pow(*beta2, step));
      });
}

absl::StatusOr<Thunk> BindLossScaleStep(const KernelCall& call, ThreadPool&) {
  return Thunk([scale = call.operands[0].as<float>(), good_steps = call.operands[1].as<int32_t>(),
                norm = call.operands[2].as<float>(), scale_next = call.results[0].as<float>(),
                good_steps_next = call.results[1].as<int32_t>(), apply = call.results[2].as<float>(),
                interval = static_cast<int32_t>(call.attrs.Int("interval"))] {
    const bool finite = std::isfinite(*norm);
    const LossScale next = NextLossScale({*scale, *good_steps}, finite, interval);
    *scale_next = next.scale;
    *good_steps_next = next.good_steps;
    *apply = finite ? 1 : 0;
  });
}

constexpr int64_t kBlocksPerTask = 64;

struct Adam8Args {
  const float *p, *m_scale, *v_scale;
  const uint8_t *m, *v;
  const std::byte* g;
  int64_t g_element_bytes;
  void (*load_g)(float* dst, const std::byte* from, int64_t n);
  VectorMath::Unary sqrt;
  // lr, beta1, beta2, eps, weight_decay, bias corrections, grad_scale.
  const float* scalars[8];
  const float* apply;  // Null: always.
  float *p_new, *m_scale_new, *v_scale_new;
  uint8_t *m_new, *v_new;
  int64_t elements;
  bool decay;
};

template <typename T>
void CopyUnlessInPlace(const T* from, T* to, int64_t n) {
  if (from != to) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

MT_CPU_INLINE F32x16 Magnitude(const F32x16& v) { return v < 0.0f ? -v : v; }

// Moments to codes: values[i] / largest of one block.
MT_CPU_INLINE void Encode(const DynamicMap& map, float* values, float largest, int64_t n, uint8_t* codes) {
  if (!(largest > 0)) {
    std::memset(codes, map.zero(), static_cast<size_t>(n));
    return;
  }
  for (int64_t j = 0; j < n; j += kLanes) Store(values + j, Load(values + j) / largest);
  for (int64_t i = 0; i < n; ++i) codes[i] = map.Encode(values[i]);
}

MT_CPU_CLONES void Adam8Block(const Adam8Args& a, int64_t block) {
  alignas(64) float m[kQuantizedBlock], v[kQuantizedBlock], g[kQuantizedBlock], root[kQuantizedBlock];
  const int64_t begin = block * kQuantizedBlock, n = std::min(kQuantizedBlock, a.elements - begin);
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  const float lr = *a.scalars[0], beta1 = *a.scalars[1], beta2 = *a.scalars[2], eps = *a.scalars[3];
  const float weight_decay = *a.scalars[4], correction1 = *a.scalars[5], correction2 = *a.scalars[6];
  const float grad_scale = *a.scalars[7];
  const auto& m_values = DynamicMap::Signed().values();
  const auto& v_values = DynamicMap::Unsigned().values();
  for (int64_t i = 0; i < n; ++i) {
    m[i] = m_values[a.m[begin + i]];
    v[i] = v_values[a.v[begin + i]];
  }
  a.load_g(g, a.g + begin * a.g_element_bytes, n);
  for (int64_t i = n; i < padded; ++i) m[i] = v[i] = g[i] = 0;
  const float m_scale = a.m_scale[block], v_scale = a.v_scale[block];
  F32x16 m_largest = Splat(0), v_largest = Splat(0);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const F32x16 gradient = Load(g + j) * grad_scale;
    const F32x16 m_new = beta1 * (Load(m + j) * m_scale) + (1.0f - beta1) * gradient;
    const F32x16 v_new = beta2 * (Load(v + j) * v_scale) + (1.0f - beta2) * (gradient * gradient);
    Store(m + j, m_new);
    Store(v + j, v_new);
    m_largest = Larger(Magnitude(m_new), m_largest);
    v_largest = Larger(v_new, v_largest);
  }
  a.sqrt(root, v, padded);
  const float rate = lr / correction1, decay = lr * weight_decay, root_correction = std::sqrt(correction2);
  for (int64_t j = 0; j < n; j += kLanes) {
    const F32x16 p = LoadBlock(a.p + begin + j, n - j);
    const F32x16 decayed = a.decay ? p - decay * p : p;
    const F32x16 p_new = decayed - rate * Load(m + j) / (Load(root + j) / root_correction + eps);
    StoreBlock(a.p_new + begin + j, p_new, n - j);
  }
  a.m_scale_new[block] = Largest(m_largest);
  a.v_scale_new[block] = Largest(v_largest);
  Encode(DynamicMap::Signed(), m, a.m_scale_new[block], n, a.m_new + begin);
  Encode(DynamicMap::Unsigned(), v, a.v_scale_new[block], n, a.v_new + begin);
}

void Adam8Task(const Adam8Args& a, int64_t task) {
  const int64_t blocks = (a.elements + kQuantizedBlock - 1) / kQuantizedBlock;
  const int64_t first = task * kBlocksPerTask, last = std::min(blocks, first + kBlocksPerTask);
  if (a.apply != nullptr && *a.apply == 0) {
    const int64_t begin = first * kQuantizedBlock, n = std::min(a.elements, last * kQuantizedBlock) - begin;
    CopyUnlessInPlace(a.p + begin, a.p_new + begin, n);
    CopyUnlessInPlace(a.m + begin, a.m_new + begin, n);
    CopyUnlessInPlace(a.v + begin, a.v_new + begin, n);
    CopyUnlessInPlace(a.m_scale + first, a.m_scale_new + first, last - first);
    CopyUnlessInPlace(a.v_scale + first, a.v_scale_new + first, last - first);
    return;
  }
  for (int64_t block = first; block < last; ++block) Adam8Block(a, block);
}

absl::StatusOr<Thunk> BindAdam8(const KernelCall& call, ThreadPool& pool) {
  const DType p = call.operands[0].type.dtype, g = call.operands[5].type.dtype;
  const VectorMath& math = BestVectorMath();
  Adam8Args args = {.p = call.operands[0].as<float>(),
                    .m_scale = call.operands[3].as<float>(),
                    .v_scale = call.operands[4].as<float>(),
                    .m = call.operands[1].as<uint8_t>(),
                    .v = call.operands[2].as<uint8_t>(),
                    .g = call.operands[5].data,
                    .g_element_bytes = ByteSize(g),
                    .load_g = math.load[static_cast<size_t>(g)],
                    .sqrt = math.unary[static_cast<size_t>(Prim::kSqrt)],
                    .scalars = {},
                    .apply = call.attrs.Bool("apply") ? call.operands[14].as<float>() : nullptr,
                    .p_new = call.results[0].as<float>(),
                    .m_scale_new = call.results[3].as<float>(),
                    .v_scale_new = call.results[4].as<float>(),
                    .m_new = call.results[1].as<uint8_t>(),
                    .v_new = call.results[2].as<uint8_t>(),
                    .elements = call.operands[0].type.num_elements(),
                    .decay = call.attrs.Bool("decay")};
  for (size_t i = 0; i < std::size(args.scalars); ++i) args.scalars[i] = call.operands[6 + i].as<float>();
  if (p != DType::kF32 || args.load_g == nullptr) {
    return absl::UnimplementedError(absl::StrCat("the cpu backend has no ", call.op->name, " for p ", DTypeName(p),
                                                 " and g ", DTypeName(g), "; p must be f32"));
  }
  // Made now: a step allocates nothing.
  DynamicMap::Signed();
  DynamicMap::Unsigned();
  const int64_t per_task = kBlocksPerTask * kQuantizedBlock;
  return ParallelThunk(pool, (args.elements + per_task - 1) / per_task,
                       [args](int64_t task) { Adam8Task(args, task); });
}

constexpr CpuKernel kKernels[] = {
    {"adam_step", BindAdamStep},
    {"loss_scale_step", BindLossScaleStep},
    {"adamw8bit", BindAdam8},
};

}  // namespace

absl::Span<const CpuKernel> CpuOptimizerKernels() { return kKernels; }

}  // namespace mt
