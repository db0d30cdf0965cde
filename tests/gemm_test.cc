#include "runtime/cpu/gemm.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/sgemm.h"

namespace mt {
namespace {

constexpr float kGuard = -12345;

float Number(int64_t i, int64_t salt) { return static_cast<float>((i * 7919 + salt * 104729) % 2003) / 1001.5f - 1; }

// Matrices with rows longer than they are wide; C is surrounded by guards.
struct Problem {
  int64_t rows, cols, depth;
  bool transpose_a, transpose_b, keep;

  int64_t lda() const { return (transpose_a ? rows : depth) + 3; }
  int64_t ldb() const { return (transpose_b ? depth : cols) + 5; }
  int64_t ldc() const { return cols + 7; }
  std::vector<float> Matrix(int64_t n, int64_t salt) const {
    std::vector<float> v(static_cast<size_t>(n));
    for (size_t i = 0; i < v.size(); ++i) v[i] = Number(static_cast<int64_t>(i), salt);
    return v;
  }
  std::vector<float> A() const { return Matrix((transpose_a ? depth : rows) * lda(), 1); }
  std::vector<float> B() const { return Matrix((transpose_b ? cols : depth) * ldb(), 2); }
  std::vector<float> C() const {
    std::vector<float> c(static_cast<size_t>(rows * ldc()), kGuard);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) c[static_cast<size_t>(i * ldc() + j)] = Number(i * cols + j, 3);
    }
    return c;
  }
  Gemm::Shape shape() const { return {rows, cols, depth, transpose_a, transpose_b, lda(), ldb(), ldc()}; }
};

std::vector<float> RunOnPool(const Problem& p, int threads, const float* bias = nullptr,
                             Gemm::Start (*start_of)(float*, const Problem&) = nullptr) {
  ThreadPool pool(threads);
  EXPECT_TRUE(LoadBlas().ok());
  ReserveBlasBuffers(threads);
  std::vector<float> c = p.C();
  const size_t scratch = static_cast<size_t>(CpuPanelsOf(p.rows, p.cols, p.depth).bytes) / sizeof(float);
  std::vector<float> panels(scratch + 16, kGuard);
  Gemm gemm(pool, p.shape(), bias, start_of == nullptr ? nullptr : start_of(c.data(), p));
  gemm.Run(p.A().data(), p.B().data(), p.keep, c.data(), panels.data());
  for (size_t i = scratch; i < panels.size(); ++i) EXPECT_EQ(panels[i], kGuard) << "behind the workspace";
  return c;
}

std::vector<float> RunOnThread(const Problem& p) {
  std::vector<float> c = p.C();
  const std::vector<float> a = p.A(), b = p.B();
  RunSgemm({.transpose_a = p.transpose_a,
            .transpose_b = p.transpose_b,
            .rows = p.rows,
            .cols = p.cols,
            .depth = p.depth,
            .a = a.data(),
            .lda = p.lda(),
            .b = b.data(),
            .ldb = p.ldb(),
            .beta = p.keep ? 1.0f : 0.0f,
            .c = c.data(),
            .ldc = p.ldc()});
  return c;
}

void ExpectProduct(const Problem& p, const std::vector<float>& c) {
  const std::vector<float> a = p.A(), b = p.B(), before = p.C();
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.ldc(); ++j) {
      const size_t at = static_cast<size_t>(i * p.ldc() + j);
      if (j >= p.cols) {
        ASSERT_EQ(c[at], kGuard) << "right of row " << i;
        continue;
      }
      double sum = p.keep ? static_cast<double>(before[at]) : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < p.depth; ++k) {
        const float left = a[static_cast<size_t>(p.transpose_a ? k * p.lda() + i : i * p.lda() + k)];
        const float right = b[static_cast<size_t>(p.transpose_b ? j * p.ldb() + k : k * p.ldb() + j)];
        sum += static_cast<double>(left) * static_cast<double>(right);
        size += std::fabs(static_cast<double>(left) * static_cast<double>(right));
      }
      ASSERT_NEAR(static_cast<double>(c[at]), sum, 1e-6 * size + 1e-12) << i << ", " << j;
    }
  }
}

class GemmTest : public testing::TestWithParam<std::tuple<bool, bool, bool>> {};

// Every count of rows and columns left over in a unit, several blocks of the depth, several passes.
TEST_P(GemmTest, AgreesWithTheSumWhateverTheThreads) {
  const auto [transpose_a, transpose_b, keep] = GetParam();
  std::vector<Problem> problems;
  for (int64_t n = 1; n <= 33; ++n) {
    problems.push_back({n, 34 - n, 2 * n - 1, transpose_a, transpose_b, keep});
  }
  problems.push_back({45, 70, 1030, transpose_a, transpose_b, keep});
  problems.push_back({2100, 40, 20, transpose_a, transpose_b, keep});
  problems.push_back({30, 2100, 20, transpose_a, transpose_b, keep});
  problems.push_back({150, 600, 70, transpose_a, transpose_b, keep});
  for (const Problem& p : problems) {
    SCOPED_TRACE(testing::Message() << p.rows << " x " << p.cols << " x " << p.depth);
    const std::vector<float> c = RunOnPool(p, 1);
    ExpectProduct(p, c);
    EXPECT_EQ(RunOnPool(p, 3), c);
    const std::vector<float> alone = RunOnThread(p);
    ExpectProduct(p, alone);
    if (!HasSgemmKernels()) continue;  // A library may cut a tile's sums by the tile's size.
    EXPECT_EQ(alone, c) << "an element's bits depend on the depth alone";
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, GemmTest, testing::Combine(testing::Bool(), testing::Bool(), testing::Bool()));

TEST(GemmStartTest, EachBoxStartsOnce) {
  const Problem p{300, 700, 600, false, false, /*keep=*/false};
  const auto start_of = [](float* c, const Problem& of) -> Gemm::Start {
    return [c, of](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      const std::vector<float> before = of.C();
      for (int64_t i = row; i < row + rows; ++i) {
        for (int64_t j = col; j < col + cols; ++j) {
          const size_t at = static_cast<size_t>(i * of.ldc() + j);
          c[at] = before[at];
        }
      }
    };
  };
  Problem kept = p;
  kept.keep = true;
  EXPECT_EQ(RunOnPool(p, 3, /*bias=*/nullptr, start_of), RunOnPool(kept, 1));
}

TEST(GemmStartTest, ABiasIsAddedFirst) {
  const Problem p{40, 70, 600, false, true, /*keep=*/false};
  std::vector<float> bias(70);
  for (size_t j = 0; j < bias.size(); ++j) bias[j] = Number(static_cast<int64_t>(j), 4);
  const std::vector<float> c = RunOnPool(p, 2, bias.data()), without = RunOnPool(p, 2);
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.cols; ++j) {
      const size_t at = static_cast<size_t>(i * p.ldc() + j);
      ASSERT_NEAR(c[at], without[at] + bias[static_cast<size_t>(j)], 1e-4) << i << ", " << j;
    }
  }
}

}  // namespace
}  // namespace mt
