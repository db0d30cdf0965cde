// Kernels that work row by row on matrices: normalizations, softmax, cross entropy.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/reductions.h"
#include "runtime/cpu/simd.h"
#include "runtime/cpu/vector_math.h"

namespace mt {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows a task takes: about 32 Ki elements.
int64_t RowsPerTask(int64_t width) { return std::max<int64_t>(1, (int64_t{32} << 10) / width); }

template <typename Args>
using Kernel = void (*)(const Args& args, int64_t task);

template <typename Args>
absl::StatusOr<Kernel<Args>> Pick(const KernelCall& call, DType dtype, const StorageKernels<Kernel<Args>>& kernels) {
  if (const Kernel<Args> kernel = kernels.Of(dtype)) return kernel;
  return absl::UnimplementedError(absl::StrCat("the cpu backend has no ", call.op->name, " for ", DTypeName(dtype)));
}

absl::StatusOr<FloatPointer> FloatOperand(const KernelCall& call, const Tensor& tensor) {
  if (IsStorage(tensor.type.dtype)) return FloatPointer{tensor.data, tensor.type.dtype};
  return absl::UnimplementedError(
      absl::StrCat("the cpu backend has no ", call.op->name, " with ", tensor.type.ToString()));
}

// A matrix operand's shape.
struct Matrix {
  int64_t rows, width;
};
Matrix MatrixOf(const TensorType& type) { return {type.num_elements() / type.dim(-1), type.dim(-1)}; }

// layer_norm and rms_norm (mean == nullptr)

struct NormArgs {
  const std::byte* x;
  std::byte* y;
  FloatPointer gamma, beta;  // beta.data may be null.
  float *mean, *rstd;
  float eps;
  int64_t rows, width, rows_per_task;
};

template <typename T>
MT_CPU_INLINE void Norm(const NormArgs& a, int64_t task) {
  const int64_t n = a.width, end = std::min(a.rows, (task + 1) * a.rows_per_task);
  const float inverse_n = 1.0f / static_cast<float>(n);
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x) + r * n;
    T* y = reinterpret_cast<T*>(a.y) + r * n;
    float mean = 0;
    if (a.mean != nullptr) {
      F32x16 sum = Splat(0);
      for (int64_t j = 0; j < n; j += kLanes) sum += LoadBlock(x + j, n - j);
      mean = Sum(sum) * inverse_n;
      a.mean[r] = mean;
    }
    F32x16 squares = Splat(0);
    for (int64_t j = 0; j < n; j += kLanes) {
      const F32x16 d = LoadBlock(x + j, n - j, mean) - mean;
      squares += d * d;
    }
    const float rstd = 1.0f / std::sqrt(Sum(squares) * inverse_n + a.eps);
    a.rstd[r] = rstd;
    for (int64_t j = 0; j < n; j += kLanes) {
      F32x16 v = (LoadBlock(x + j, n - j) - mean) * rstd * a.gamma.Block(j, n - j);
      if (a.beta.data != nullptr) v += a.beta.Block(j, n - j);
      StoreBlock(y + j, v, n - j);
    }
  }
}
MT_STORAGE_KERNELS(Norm, NormArgs)

absl::StatusOr<Thunk> BindNorm(const KernelCall& call, ThreadPool& pool, bool layer_norm) {
  const Matrix m = MatrixOf(call.operands[0].type);
  NormArgs args = {.x = call.operands[0].data,
                   .y = call.results[0].data,
                   .gamma = {},
                   .beta = {},
                   .mean = layer_norm ? call.results[1].as<float>() : nullptr,
                   .rstd = call.results[layer_norm ? 2 : 1].as<float>(),
                   .eps = static_cast<float>(call.attrs.Double("eps")),
                   .rows = m.rows,
                   .width = m.width,
                   .rows_per_task = RowsPerTask(m.width)};
  ASSIGN_OR_RETURN(args.gamma, FloatOperand(call, call.operands[1]));
  if (layer_norm && call.attrs.Bool("beta")) {
    ASSIGN_OR_RETURN(args.beta, FloatOperand(call, call.operands[2]));
  }
  ASSIGN_OR_RETURN(const Kernel<NormArgs> kernel, Pick(call, call.operands[0].type.dtype, NormKernels));
  return ParallelThunk(pool, CeilDiv(m.rows, args.rows_per_task), [args, kernel](int64_t task) { kernel(args, task); });
}

absl::StatusOr<Thunk> BindLayerNorm(const KernelCall& call, ThreadPool& pool) { return BindNorm(call, pool, true); }
absl::StatusOr<Thunk> BindRmsNorm(const KernelCall& call, ThreadPool& pool) { return BindNorm(call, pool, false); }

// Their backward: each task takes a chunk of rows and leaves the chunk's column sums in the workspace; then tasks over
// columns add the chunks up in a fixed tree.

struct NormBackwardArgs {
  const std::byte *dy, *x;
  FloatPointer gamma;
  const float *mean, *rstd;  // mean == nullptr: rms_norm.
  std::byte* dx;
  std::byte *dgamma, *dbeta;      // dtype of gamma; dbeta == nullptr: rms_norm.
  float *gamma_sums, *beta_sums;  // [chunks, width]
  int64_t rows, width, chunk_rows, chunks;
};

template <typename T>
MT_CPU_INLINE void NormBackward(const NormBackwardArgs& a, int64_t chunk) {
  const int64_t n = a.width, begin = chunk * a.chunk_rows, end = std::min(a.rows, begin + a.chunk_rows);
  const float inverse_n = 1.0f / static_cast<float>(n);
  float* gamma_sums = a.gamma_sums + chunk * n;
  float* beta_sums = a.mean == nullptr ? nullptr : a.beta_sums + chunk * n;
  std::memset(gamma_sums, 0, static_cast<size_t>(n) * sizeof(float));
  if (beta_sums != nullptr) std::memset(beta_sums, 0, static_cast<size_t>(n) * sizeof(float));
  for (int64_t r = begin; r < end; ++r) {
    const T* dy = reinterpret_cast<const T*>(a.dy) + r * n;
    const T* x = reinterpret_cast<const T*>(a.x) + r * n;
    T* dx = reinterpret_cast<T*>(a.dx) + r * n;
    const float mean = a.mean == nullptr ? 0.0f : a.mean[r], rstd = a.rstd[r];
    F32x16 sum = Splat(0), dot = Splat(0);
    for (int64_t j = 0; j < n; j += kLanes) {  // dy is 0 beyond the row.
      const F32x16 xhat = (LoadBlock(x + j, n - j) - mean) * rstd;
      const F32x16 g = LoadBlock(dy + j, n - j) * a.gamma.Block(j, n - j);
      sum += g;
      dot += g * xhat;
    }
    const float mean_g = a.mean == nullptr ? 0.0f : Sum(sum) * inverse_n, mean_dot = Sum(dot) * inverse_n;
    for (int64_t j = 0; j < n; j += kLanes) {
      const F32x16 xhat = (LoadBlock(x + j, n - j) - mean) * rstd;
      const F32x16 d = LoadBlock(dy + j, n - j);
      const F32x16 g = d * a.gamma.Block(j, n - j);
      StoreBlock(dx + j, rstd * (g - mean_g - xhat * mean_dot), n - j);
      StoreBlock(gamma_sums + j, LoadBlock(gamma_sums + j, n - j) + d * xhat, n - j);
      if (beta_sums != nullptr) StoreBlock(beta_sums + j, LoadBlock(beta_sums + j, n - j) + d, n - j);
    }
  }
}
MT_STORAGE_KERNELS(NormBackward, NormBackwardArgs)

// Columns [begin, end) of all chunks' sums, rounded into `to`.
void FinishColumns(float* sums, int64_t chunks, int64_t width, int64_t begin, int64_t end, std::byte* to, DType dtype) {
  AddChunks(sums, chunks, width, begin, end);
  BestVectorMath().store[static_cast<size_t>(dtype)](to + begin * ByteSize(dtype), sums + begin, end - begin);
}

void NormColumnSums(const NormBackwardArgs& a, int64_t task) {
  const int64_t begin = task * kColumnsPerTask, end = std::min(a.width, begin + kColumnsPerTask);
  FinishColumns(a.gamma_sums, a.chunks, a.width, begin, end, a.dgamma, a.gamma.dtype);
  if (a.dbeta != nullptr) FinishColumns(a.beta_sums, a.chunks, a.width, begin, end, a.dbeta, a.gamma.dtype);
}

absl::StatusOr<Thunk> BindNormBackward(const KernelCall& call, ThreadPool& pool, bool layer_norm) {
  const Matrix m = MatrixOf(call.operands[1].type);
  const RowChunks chunks = CpuRowChunks(m.rows);
  CHECK_GE(call.workspace_bytes, chunks.count * m.width * (layer_norm ? 2 : 1) * static_cast<int64_t>(sizeof(float)))
      << call.name;
  NormBackwardArgs args = {.dy = call.operands[0].data,
                           .x = call.operands[1].data,
                           .gamma = {},
                           .mean = layer_norm ? call.operands[3].as<float>() : nullptr,
                           .rstd = call.operands[layer_norm ? 4 : 3].as<float>(),
                           .dx = call.results[0].data,
                           .dgamma = call.results[1].data,
                           .dbeta = layer_norm ? call.results[2].data : nullptr,
                           .gamma_sums = reinterpret_cast<float*>(call.workspace),
                           .beta_sums = reinterpret_cast<float*>(call.workspace) + chunks.count * m.width,
                           .rows = m.rows,
                           .width = m.width,
                           .chunk_rows = chunks.rows,
                           .chunks = chunks.count};
  ASSIGN_OR_RETURN(args.gamma, FloatOperand(call, call.operands[2]));
  ASSIGN_OR_RETURN(const Kernel<NormBackwardArgs> kernel, Pick(call, call.operands[1].type.dtype, NormBackwardKernels));
  const std::function<void(int64_t)> rows = [args, kernel](int64_t task) { kernel(args, task); };
  const std::function<void(int64_t)> columns = [args](int64_t task) { NormColumnSums(args, task); };
  return Thunk([&pool, rows, columns, row_tasks = chunks.count, column_tasks = CeilDiv(m.width, kColumnsPerTask)] {
    pool.Run(row_tasks, rows);
    pool.Run(column_tasks, columns);
  });
}

absl::StatusOr<Thunk> BindLayerNormBackward(const KernelCall& call, ThreadPool& pool) {
  return BindNormBackward(call, pool, true);
}
absl::StatusOr<Thunk> BindRmsNormBackward(const KernelCall& call, ThreadPool& pool) {
  return BindNormBackward(call, pool, false);
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

using ExpLoop = VectorMath::Unary;
ExpLoop BestExp() { return BestVectorMath().unary[static_cast<size_t>(Prim::kExp)]; }

// Elements whose exponentials are computed at a time, in a buffer that stays in the first cache; a multiple of kLanes.
constexpr int64_t kExpBlock = 512;

// buffer[i] = e^(x[i] scale - max) for i in [0, n), 0 up to a multiple of kLanes. n <= kExpBlock; the row goes on for
// `room` elements.
template <typename T>
MT_CPU_INLINE void ExpBlock(ExpLoop exp, const T* x, int64_t n, int64_t room, float scale, float max, float* buffer) {
  int64_t j = 0;
  for (; j < n; j += kLanes) Store(buffer + j, LoadInRow(x + j, n - j, room - j) * scale - max);
  exp(buffer, buffer, j);  // Whole vectors: the loop is slow on the rest of one.
  for (int64_t i = n; i < j; ++i) buffer[i] = 0;
}

// softmax

struct SoftmaxArgs {
  const std::byte *x, *dy;  // Backward: x is y.
  std::byte* y;             // Backward: dx.
  float scale;
  bool causal;
  int64_t window;  // -1: none
  int64_t rows, width, rows_per_task;
  ExpLoop exp;
};

// The columns that a row sees: [first, last). All others are 0.
struct Visible {
  int64_t first, last;
};
MT_CPU_INLINE Visible VisibleColumns(const SoftmaxArgs& a, int64_t row) {
  if (!a.causal) return {0, a.width};
  const int64_t t = row % a.width;
  return {a.window < 0 || a.window > t ? 0 : t - a.window, t + 1};
}

template <typename T>
MT_CPU_INLINE void ZeroOutside(T* row, const Visible& v, int64_t width) {
  std::memset(row, 0, static_cast<size_t>(v.first) * sizeof(T));
  std::memset(row + v.last, 0, static_cast<size_t>(width - v.last) * sizeof(T));
}

template <typename T>
MT_CPU_INLINE void Softmax(const SoftmaxArgs& a, int64_t task) {
  const int64_t end = std::min(a.rows, (task + 1) * a.rows_per_task);
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    const Visible visible = VisibleColumns(a, r);
    const T* x = reinterpret_cast<const T*>(a.x) + r * a.width + visible.first;
    T* y = reinterpret_cast<T*>(a.y) + r * a.width + visible.first;
    const int64_t n = visible.last - visible.first, room = a.width - visible.first;
    F32x16 largest = Splat(kLowest);
    for (int64_t j = 0; j < n; j += kLanes) {
      // The scale may be negative: lanes beyond the row are set after it.
      const F32x16 v = LoadInRow(x + j, n - j, room - j) * a.scale;
      largest = Larger(KeepLanes(v, n - j, kLowest), largest);
    }
    const float max = Largest(largest);
    F32x16 sum = Splat(0);
    float buffer[kExpBlock];
    for (int64_t at = 0; at < n; at += kExpBlock) {
      const int64_t m = std::min(kExpBlock, n - at);
      ExpBlock(a.exp, x + at, m, room - at, a.scale, max, buffer);
      for (int64_t j = 0; j < m; j += kLanes) {
        const F32x16 e = Load(buffer + j);
        sum += e;
        // What is not yet rounded can wait in y itself, but for 16 bits, where it is computed again.
        if constexpr (sizeof(T) == sizeof(float)) StoreInRow(y + at + j, e, m - j, room - at - j);
      }
    }
    const float inverse = 1.0f / Sum(sum);
    for (int64_t at = 0; at < n; at += kExpBlock) {
      const int64_t m = std::min(kExpBlock, n - at);
      if constexpr (sizeof(T) == sizeof(float)) {
        for (int64_t j = 0; j < m; j += kLanes) {
          StoreInRow(y + at + j, LoadInRow(y + at + j, m - j, room - at - j) * inverse, m - j, room - at - j);
        }
      } else {
        ExpBlock(a.exp, x + at, m, room - at, a.scale, max, buffer);
        for (int64_t j = 0; j < m; j += kLanes) {
          StoreInRow(y + at + j, Load(buffer + j) * inverse, m - j, room - at - j);
        }
      }
    }
    ZeroOutside(y - visible.first, visible, a.width);
  }
}
MT_STORAGE_KERNELS(Softmax, SoftmaxArgs)

template <typename T>
MT_CPU_INLINE void SoftmaxBackward(const SoftmaxArgs& a, int64_t task) {
  const int64_t end = std::min(a.rows, (task + 1) * a.rows_per_task);
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    const Visible visible = VisibleColumns(a, r);
    const int64_t at = r * a.width + visible.first, n = visible.last - visible.first, room = a.width - visible.first;
    const T* dy = reinterpret_cast<const T*>(a.dy) + at;
    const T* y = reinterpret_cast<const T*>(a.x) + at;
    T* dx = reinterpret_cast<T*>(a.y) + at;
    F32x16 dot = Splat(0);
    for (int64_t j = 0; j < n; j += kLanes) {
      dot += LoadInRow(dy + j, n - j, room - j) * LoadInRow(y + j, n - j, room - j);
    }
    const float sum = Sum(dot);
    for (int64_t j = 0; j < n; j += kLanes) {
      const F32x16 v = a.scale * LoadInRow(y + j, n - j, room - j) * (LoadInRow(dy + j, n - j, room - j) - sum);
      StoreInRow(dx + j, v, n - j, room - j);
    }
    ZeroOutside(dx - visible.first, visible, a.width);
  }
}
MT_STORAGE_KERNELS(SoftmaxBackward, SoftmaxArgs)

absl::StatusOr<Thunk> BindSoftmaxKernel(const KernelCall& call, ThreadPool& pool, bool backward) {
  const Tensor& x = call.operands.back();
  const Matrix m = MatrixOf(x.type);
  const SoftmaxArgs args = {.x = x.data,
                            .dy = backward ? call.operands[0].data : nullptr,
                            .y = call.results[0].data,
                            .scale = static_cast<float>(call.attrs.Double("scale")),
                            .causal = call.attrs.Bool("causal"),
                            .window = call.attrs.Int("window"),
                            .rows = m.rows,
                            .width = m.width,
                            .rows_per_task = RowsPerTask(m.width),
                            .exp = BestExp()};
  ASSIGN_OR_RETURN(const Kernel<SoftmaxArgs> kernel,
                   Pick(call, x.type.dtype, backward ? SoftmaxBackwardKernels : SoftmaxKernels));
  return ParallelThunk(pool, CeilDiv(m.rows, args.rows_per_task), [args, kernel](int64_t task) { kernel(args, task); });
}

absl::StatusOr<Thunk> BindSoftmax(const KernelCall& call, ThreadPool& pool) {
  return BindSoftmaxKernel(call, pool, false);
}
absl::StatusOr<Thunk> BindSoftmaxBackward(const KernelCall& call, ThreadPool& pool) {
  return BindSoftmaxKernel(call, pool, true);
}

// Columns of the logits that are classes.
int64_t ClassesOf(const KernelCall& call, const Matrix& logits) {
  return call.attrs.Int("classes") == 0 ? logits.width : call.attrs.Int("classes");
}

// softmax_cross_entropy: each task takes a chunk of rows and leaves its sum in the workspace.

struct LossArgs {
  const std::byte* logits;
  const int32_t* labels;
  float *loss_sum, *count, *lse;
  double* sums;  // [chunks, 2]: loss, count
  int64_t rows, width, classes, chunk_rows, chunks;
  ExpLoop exp;
};

template <typename T>
MT_CPU_INLINE void Loss(const LossArgs& a, int64_t chunk) {
  const int64_t n = a.classes, begin = chunk * a.chunk_rows, end = std::min(a.rows, begin + a.chunk_rows);
  double loss = 0, count = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.logits) + r * a.width;
    F32x16 largest = Splat(kLowest);
    for (int64_t j = 0; j < n; j += kLanes) largest = Larger(LoadBlock(x + j, n - j, kLowest), largest);
    const float max = Largest(largest);
    F32x16 sum = Splat(0);
    float buffer[kExpBlock];
    for (int64_t at = 0; at < n; at += kExpBlock) {
      const int64_t m = std::min(kExpBlock, n - at);
      ExpBlock(a.exp, x + at, m, n - at, 1.0f, max, buffer);
      for (int64_t j = 0; j < m; j += kLanes) sum += Load(buffer + j);
    }
    const float lse = max + std::log(Sum(sum));
    a.lse[r] = lse;
    if (a.labels[r] < 0) continue;
    // A label that is no class makes the loss NaN and reads nothing.
    loss += a.labels[r] < n ? static_cast<double>(lse - LoadOne(x + a.labels[r]))
                            : std::numeric_limits<double>::quiet_NaN();
    count += 1;
  }
  a.sums[2 * chunk] = loss;
  a.sums[2 * chunk + 1] = count;
}
MT_STORAGE_KERNELS(Loss, LossArgs)

absl::StatusOr<Thunk> BindLoss(const KernelCall& call, ThreadPool& pool) {
  const Matrix m = MatrixOf(call.operands[0].type);
  const RowChunks chunks = CpuRowChunks(m.rows);
  CHECK_GE(call.workspace_bytes, 2 * chunks.count * static_cast<int64_t>(sizeof(double))) << call.name;
  const LossArgs args = {.logits = call.operands[0].data,
                         .labels = call.operands[1].as<int32_t>(),
                         .loss_sum = call.results[0].as<float>(),
                         .count = call.results[1].as<float>(),
                         .lse = call.results[2].as<float>(),
                         .sums = reinterpret_cast<double*>(call.workspace),
                         .rows = m.rows,
                         .width = m.width,
                         .classes = ClassesOf(call, m),
                         .chunk_rows = chunks.rows,
                         .chunks = chunks.count,
                         .exp = BestExp()};
  ASSIGN_OR_RETURN(const Kernel<LossArgs> kernel, Pick(call, call.operands[0].type.dtype, LossKernels));
  const std::function<void(int64_t)> body = [args, kernel](int64_t task) { kernel(args, task); };
  return Thunk([&pool, args, body] {
    pool.Run(args.chunks, body);
    double loss = 0, count = 0;
    for (int64_t c = 0; c < args.chunks; ++c) {
      loss += args.sums[2 * c];
      count += args.sums[2 * c + 1];
    }
    *args.loss_sum = static_cast<float>(loss);
    *args.count = static_cast<float>(count);
  });
}

struct LossBackwardArgs {
  const float* dloss;
  const std::byte* logits;
  const int32_t* labels;
  const float* lse;
  std::byte* dlogits;
  int64_t rows, width, classes, rows_per_task;
  ExpLoop exp;
};

template <typename T>
MT_CPU_INLINE void LossBackward(const LossBackwardArgs& a, int64_t task) {
  const int64_t n = a.classes, end = std::min(a.rows, (task + 1) * a.rows_per_task);
  const float dloss = *a.dloss;
  for (int64_t r = task * a.rows_per_task; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.logits) + r * a.width;
    T* dx = reinterpret_cast<T*>(a.dlogits) + r * a.width;
    const int32_t label = a.labels[r];
    const bool counts = 0 <= label && label < n;
    const int64_t zeros_from = counts ? n : 0;
    std::memset(dx + zeros_from, 0, static_cast<size_t>(a.width - zeros_from) * sizeof(T));
    if (!counts) continue;
    const float lse = a.lse[r];
    float buffer[kExpBlock];
    ExpBlock(a.exp, x + label, 1, n - label, 1.0f, lse, buffer);
    const F32x16 at_label = Splat((buffer[0] - 1.0f) * dloss);  // Before dx, which may be x, is written.
    for (int64_t at = 0; at < n; at += kExpBlock) {
      const int64_t m = std::min(kExpBlock, n - at);
      ExpBlock(a.exp, x + at, m, n - at, 1.0f, lse, buffer);
      for (int64_t j = 0; j < m; j += kLanes) StoreBlock(dx + at + j, Load(buffer + j) * dloss, m - j);
    }
    StoreBlock(dx + label, at_label, 1);
  }
}
MT_STORAGE_KERNELS(LossBackward, LossBackwardArgs)

absl::StatusOr<Thunk> BindLossBackward(const KernelCall& call, ThreadPool& pool) {
  const Matrix m = MatrixOf(call.operands[1].type);
  const LossBackwardArgs args = {.dloss = call.operands[0].as<float>(),
                                 .logits = call.operands[1].data,
                                 .labels = call.operands[2].as<int32_t>(),
                                 .lse = call.operands[3].as<float>(),
                                 .dlogits = call.results[0].data,
                                 .rows = m.rows,
                                 .width = m.width,
                                 .classes = ClassesOf(call, m),
                                 .rows_per_task = RowsPerTask(m.width),
                                 .exp = BestExp()};
  ASSIGN_OR_RETURN(const Kernel<LossBackwardArgs> kernel, Pick(call, call.operands[1].type.dtype, LossBackwardKernels));
  return ParallelThunk(pool, CeilDiv(m.rows, args.rows_per_task), [args, kernel](int64_t task) { kernel(args, task); });
}

constexpr CpuKernel kKernels[] = {
    {"layer_norm", BindLayerNorm},
    {"layer_norm_backward", BindLayerNormBackward},
    {"rms_norm", BindRmsNorm},
    {"rms_norm_backward", BindRmsNormBackward},
    {"softmax", BindSoftmax},
    {"softmax_backward", BindSoftmaxBackward},
    {"softmax_cross_entropy", BindLoss},
    {"softmax_cross_entropy_backward", BindLossBackward},
};

}  // namespace

absl::Span<const CpuKernel> CpuRowKernels() { return kKernels; }

}  // namespace mt
