// Products of f32 matrices on all threads of a pool.
#ifndef MT_RUNTIME_CPU_GEMM_H_
#define MT_RUNTIME_CPU_GEMM_H_

#include <cstdint>
#include <functional>

#include "codegen/plan/resources.h"
#include "runtime/cpu/thread_pool.h"

namespace mt {

// C [rows, cols] = A B + what C holds, a bias, or neither; row-major, leading dimensions in elements. A is [rows,
// depth] or, transposed, [depth, rows]; B likewise.
//
// With the kernels of runtime/cpu/sgemm.h blocks of both are packed once for all threads, then tiles of C run side by
// side; without them the tiles go to the BLAS.
class Gemm {
 public:
  struct Shape {
    int64_t rows = 0, cols = 0, depth = 0;
    bool transpose_a = false, transpose_b = false;
    int64_t lda = 0, ldb = 0, ldc = 0;
  };
  // Writes what the sums of this box start from to C; called once for each box, before they are computed.
  using Start = std::function<void(int64_t row, int64_t rows, int64_t col, int64_t cols)>;

  // bias [cols]: what the sums of each row start from. At most one of bias, start and a `keep` of Run.
  Gemm(ThreadPool& pool, const Shape& shape, const float* bias = nullptr, Start start = nullptr);
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // `panels`: CpuPanelsOf(rows, cols, depth).bytes of scratch. keep: adds to C. Allocates nothing; one
  // Run at a time.
  void Run(const float* a, const float* b, bool keep, float* c, float* panels);

 private:
  // One block of the product: of C's rows and columns and of the depth.
  struct Pass {
    int64_t row, rows, col, cols, k, depth;
  };
  void RunPass();
  void Pack(int64_t task) const;
  void Multiply(int64_t task) const;

  ThreadPool& pool_;
  const Shape shape_;
  const CpuPanels panels_;
  const bool packs_a_;
  const float* const bias_;
  const Start start_;
  const std::function<void(int64_t)> pack_, multiply_;

  // Of the run and the pass under way.
  const float *a_ = nullptr, *b_ = nullptr;
  float *c_ = nullptr, *scratch_ = nullptr;
  bool keep_ = false;
  Pass pass_ = {};
  int64_t a_tasks_ = 0, b_tasks_ = 0, row_tasks_ = 0, col_tasks_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_CPU_GEMM_H_
