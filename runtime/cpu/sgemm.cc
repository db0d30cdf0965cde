#include "runtime/cpu/sgemm.h"

#include "ir/base/check.h"

#if defined(__x86_64__)

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own header.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <utility>

#include "codegen/plan/resources.h"

#define MT_AVX512 __attribute__((target("avx512f")))

namespace mt {
namespace {

constexpr int kRows = CpuPanels::kUnitRows, kCols = CpuPanels::kUnitCols, kLanes = 16;
static_assert(kCols == 2 * kLanes && kRows <= kLanes);

__mmask16 FirstLanes(int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1); }

// M <= kRows rows of a by a unit of columns of b: 2 M sums in registers. Element (i, k) of a is a[k * lda + i] where
// kAcross, else a[i * lda + k].
template <int M, bool kAcross>
MT_AVX512 void MultiplyUnits(const float* a, int64_t lda, const float* b, int64_t depth, const float* start,
                             int64_t start_step, float* c, int64_t ldc, __mmask16 left, __mmask16 right) {
  constexpr int64_t kAhead = 16;  // Rows of b, two cache lines each.
  __m512 sum[M][2];
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    _mm_prefetch(c + i * ldc, _MM_HINT_T0);
    _mm_prefetch(c + i * ldc + kLanes, _MM_HINT_T0);
  }
  // Every third row: an address holds no multiple of lda but 0, 1 and 2.
  const float* third[(M + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < M; i += 3) third[i / 3] = a + i * lda;
  for (int64_t k = 0; k < depth; ++k) {
    _mm_prefetch(b + kAhead * kCols, _MM_HINT_T0);
    _mm_prefetch(b + kAhead * kCols + kLanes, _MM_HINT_T0);
    const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      const __m512 ai = _mm512_set1_ps(kAcross ? a[i] : third[i / 3][i % 3 * lda]);
      sum[i][0] = _mm512_fmadd_ps(ai, b0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(ai, b1, sum[i][1]);
    }
    if (kAcross) {
      a += lda;
    } else {
#pragma GCC unroll 5
      for (int i = 0; i < M; i += 3) ++third[i / 3];
    }
    b += kCols;
  }
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) {
    float* const row = c + i * ldc;
    if (start != nullptr) {
      const float* const from = start + i * start_step;
      sum[i][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(left, from), sum[i][0]);
      sum[i][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(right, from + kLanes), sum[i][1]);
    }
    _mm512_mask_storeu_ps(row, left, sum[i][0]);
    _mm512_mask_storeu_ps(row + kLanes, right, sum[i][1]);
  }
}

using UnitsFn = void (*)(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                         __mmask16, __mmask16);
template <bool kAcross, int... kIndex>
constexpr std::array<UnitsFn, kRows> UnitKernels(std::integer_sequence<int, kIndex...>) {
  return {MultiplyUnits<kIndex + 1, kAcross>...};
}
constexpr std::array<UnitsFn, kRows> kAcrossKernels = UnitKernels<true>(std::make_integer_sequence<int, kRows>());
constexpr std::array<UnitsFn, kRows> kAlongKernels = UnitKernels<false>(std::make_integer_sequence<int, kRows>());

// Rows to columns, of 16 x 16.
MT_AVX512 inline __attribute__((always_inline)) void Transpose(__m512* rows) {
  __m512 t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    rows[i] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(reinterpret_cast<__m512d>(t[i]), reinterpret_cast<__m512d>(t[i + 2])));
    rows[i + 1] =
        _mm512_castpd_ps(_mm512_unpackhi_pd(reinterpret_cast<__m512d>(t[i]), reinterpret_cast<__m512d>(t[i + 2])));
    rows[i + 2] =
        _mm512_castpd_ps(_mm512_unpacklo_pd(reinterpret_cast<__m512d>(t[i + 1]), reinterpret_cast<__m512d>(t[i + 3])));
    rows[i + 3] =
        _mm512_castpd_ps(_mm512_unpackhi_pd(reinterpret_cast<__m512d>(t[i + 1]), reinterpret_cast<__m512d>(t[i + 3])));
  }
  constexpr int kEven = 0x88, kOdd = 0xDD;  // Quarters 0 and 2, or 1 and 3, of both.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], kEven);
    t[4 + i] = _mm512_shuffle_f32x4(rows[i], rows[4 + i], kOdd);
    t[8 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], kEven);
    t[12 + i] = _mm512_shuffle_f32x4(rows[8 + i], rows[12 + i], kOdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], kEven);
    rows[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], kOdd);
  }
}

// Units of kUnit lines of `depth` elements each: line i's element k comes to to[k * kUnit + i]. It is from[k * ld + i]
// where `across`, else from[i * ld + k].
template <int kUnit>
MT_AVX512 void PackUnits(const float* from, int64_t ld, bool across, int64_t n, int64_t depth, float* to) {
  for (int64_t first = 0; first < n; first += kUnit, to += kUnit * depth) {
    for (int64_t i = 0; i < kUnit; i += kLanes) {
      const int64_t lines = std::clamp<int64_t>(n - first - i, 0, std::min(kLanes, kUnit));
      const __mmask16 written = FirstLanes(kUnit - i);
      if (across) {
        const __mmask16 read = FirstLanes(lines);
        const float* line = from + first + i;
        for (int64_t k = 0; k < depth; ++k, line += ld) {
          _mm512_mask_storeu_ps(to + k * kUnit + i, written, _mm512_maskz_loadu_ps(read, line));
        }
        continue;
      }
      const float* line = from + (first + i) * ld;
      for (int64_t k = 0; k < depth; k += kLanes) {
        const __mmask16 read = FirstLanes(depth - k);
        __m512 block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          block[r] = r < lines ? _mm512_maskz_loadu_ps(read, line + r * ld + k) : _mm512_setzero_ps();
        }
        Transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          if (r < depth - k) _mm512_mask_storeu_ps(to + (k + r) * kUnit + i, written, block[r]);
        }
      }
    }
  }
}

}  // namespace

bool HasSgemmKernels() {
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") != 0;
  }();
  return has;
}

void PackRows(const float* from, int64_t ld, bool transposed, int64_t n, int64_t depth, float* to) {
  PackUnits<kRows>(from, ld, transposed, n, depth, to);
}

void PackCols(const float* from, int64_t ld, bool transposed, int64_t n, int64_t depth, float* to) {
  PackUnits<kCols>(from, ld, !transposed, n, depth, to);
}

// A unit of b is in the first two caches while all rows pass by.
void MultiplyPanels(const PanelProduct& p) {
  const std::array<UnitsFn, kRows>& kernels = p.packed_a || p.transpose_a ? kAcrossKernels : kAlongKernels;
  const int64_t lda = p.packed_a ? kRows : p.lda;
  const int64_t row_step = p.packed_a ? p.depth : p.transpose_a ? 1 : p.lda;
  for (int64_t j = 0; j < p.cols; j += kCols) {
    const __mmask16 left = FirstLanes(p.cols - j), right = FirstLanes(p.cols - j - kLanes);
    for (int64_t i = 0; i < p.rows; i += kRows) {
      const UnitsFn kernel = kernels[static_cast<size_t>(std::min<int64_t>(kRows, p.rows - i) - 1)];
      const float* start = p.start == nullptr ? nullptr : p.start + i * p.start_step + j;
      kernel(p.a + i * row_step, lda, p.b + j * p.packed_depth, p.depth, start, p.start_step, p.c + i * p.ldc + j,
             p.ldc, left, right);
    }
  }
}

}  // namespace mt

#else

namespace mt {

bool HasSgemmKernels() { return false; }
void PackRows(const float*, int64_t, bool, int64_t, int64_t, float*) { CHECK(false) << "HasSgemmKernels()"; }
void PackCols(const float*, int64_t, bool, int64_t, int64_t, float*) { CHECK(false) << "HasSgemmKernels()"; }
void MultiplyPanels(const PanelProduct&) { CHECK(false) << "HasSgemmKernels()"; }

}  // namespace mt

#endif
