#include "runtime/cuda/cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/tensor_type.h"

namespace mt {
namespace {

#define MT_CUBLASLT_FUNCTIONS(X)          \
  X(cublasLtCreate)                       \
  X(cublasLtDestroy)                      \
  X(cublasLtGetVersion)                   \
  X(cublasLtGetStatusString)              \
  X(cublasLtMatmul)                       \
  X(cublasLtMatmulDescCreate)             \
  X(cublasLtMatmulDescDestroy)            \
  X(cublasLtMatmulDescSetAttribute)       \
  X(cublasLtMatrixLayoutCreate)           \
  X(cublasLtMatrixLayoutDestroy)          \
  X(cublasLtMatrixLayoutSetAttribute)     \
  X(cublasLtMatmulPreferenceCreate)       \
  X(cublasLtMatmulPreferenceDestroy)      \
  X(cublasLtMatmulPreferenceSetAttribute) \
  X(cublasLtMatmulAlgoGetHeuristic)       \
  X(cublasLtMatmulAlgoCheck)              \
  X(cublasLtMatmulAlgoConfigGetAttribute)

struct Library {
#define MT_DECLARE(name) decltype(&::name) name = nullptr;
  MT_CUBLASLT_FUNCTIONS(MT_DECLARE)
#undef MT_DECLARE
};

struct Loaded {
  absl::Status status;
  Library library;
};

Loaded Load() {
  Loaded loaded;
  void* handle = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (handle == nullptr) handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    loaded.status = absl::FailedPreconditionError(
        "libcublasLt.so (13 or 12) cannot be loaded; install the CUDA toolkit's cuBLAS or put its folder on "
        "LD_LIBRARY_PATH");
    return loaded;
  }
#define MT_LOOK_UP(name)                                                                                \
  loaded.library.name = reinterpret_cast<decltype(loaded.library.name)>(dlsym(handle, #name));          \
  if (loaded.library.name == nullptr) {                                                                 \
    loaded.status = absl::FailedPreconditionError("libcublasLt has no " #name "; install a newer one"); \
    return loaded;                                                                                      \
  }
  MT_CUBLASLT_FUNCTIONS(MT_LOOK_UP)
#undef MT_LOOK_UP
  return loaded;
}

absl::StatusOr<cudaDataType_t> DataType(const std::string& dtype) {
  if (dtype == "f32") return CUDA_R_32F;
  if (dtype == "bf16") return CUDA_R_16BF;
  if (dtype == "f16") return CUDA_R_16F;
  return absl::InvalidArgumentError(absl::StrCat("matmul of ", dtype, "; expected f32, bf16 or f16"));
}

std::string DescribeMatmul(const proto::CudaMatmulProto& m) {
  return absl::StrCat("matmul ", m.batch(), " x [", m.m(), ",", m.k(), "] x [", m.k(), ",", m.n(), "] ", m.dtype(),
                      " -> ", m.result_dtype());
}

uint32_t AlignmentOf(CUdeviceptr address) {
  uint32_t bytes = 256;
  while (address % bytes != 0) bytes /= 2;
  return bytes;
}

// Owns the descriptors of one matmul.
class BoundMatmul : public CublasLtMatmul {
 public:
  BoundMatmul(const Library& library, cublasLtHandle_t handle) : library_(library), handle_(handle) {}
  ~BoundMatmul() override {
    for (cublasLtMatrixLayout_t layout : {a_, b_, c_, d_}) {
      if (layout != nullptr) library_.cublasLtMatrixLayoutDestroy(layout);
    }
    if (operation_ != nullptr) library_.cublasLtMatmulDescDestroy(operation_);
  }
  BoundMatmul(const BoundMatmul&) = delete;
  BoundMatmul& operator=(const BoundMatmul&) = delete;

  absl::Status Create(const proto::CudaMatmulProto& m, const CudaMatmulPointers& at, CUstream stream);

  absl::StatusOr<std::vector<std::string>> Propose(int most) const override;
  int64_t WorkspaceBytes(const std::string& algorithm) const override;
  std::string Describe(const std::string& algorithm) const override;

  absl::Status Run(const std::string& algorithm) const override {
    cublasLtMatmulAlgo_t algo;
    CHECK(algorithm.size() == sizeof(algo));
    std::memcpy(&algo, algorithm.data(), sizeof(algo));
    const float one = 1, beta = beta_;
    // The library's matrices lie by columns: d' = b' a', each the transpose of ours, which costs nothing.
    const cublasStatus_t status =
        library_.cublasLtMatmul(handle_, operation_, &one, Pointer(at_.b), a_, Pointer(at_.a), b_, &beta,
                                Pointer(at_.accumulator == 0 ? at_.d : at_.accumulator), c_, Pointer(at_.d), d_, &algo,
                                Pointer(at_.workspace), workspace_bytes_, reinterpret_cast<cudaStream_t>(stream_));
    return Check(status, "cublasLtMatmul");
  }

 private:
  static void* Pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

  absl::Status Check(cublasStatus_t status, absl::string_view what) const {
    if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(what, ": ", library_.cublasLtGetStatusString(status)));
  }
  absl::Status Layout(cublasLtMatrixLayout_t& layout, cudaDataType_t type, int64_t rows, int64_t columns, int64_t batch,
                      int64_t stride) {
    RETURN_IF_ERROR(Check(library_.cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows),
                                                              static_cast<uint64_t>(columns), rows),
                          "cublasLtMatrixLayoutCreate"));
    const int32_t count = static_cast<int32_t>(batch);
    RETURN_IF_ERROR(Check(
        library_.cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
        "batch count"));
    return Check(library_.cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                                           sizeof(stride)),
                 "batch stride");
  }
  template <typename T>
  absl::Status Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    return Check(library_.cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof(value)),
                 "cublasLtMatmulDescSetAttribute");
  }

  const Library& library_;
  cublasLtHandle_t handle_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr, d_ = nullptr;
  CudaMatmulPointers at_;
  std::string what_;
  float beta_ = 0;
  size_t workspace_bytes_ = 0;
  CUstream stream_ = nullptr;
};

absl::Status BoundMatmul::Create(const proto::CudaMatmulProto& m, const CudaMatmulPointers& at, CUstream stream) {
  at_ = at;
  what_ = DescribeMatmul(m);
  stream_ = stream;
  beta_ = at.accumulator == 0 ? 0 : 1;
  workspace_bytes_ = static_cast<size_t>(m.workspace_bytes());
  if (m.batch() > INT32_MAX)
    return absl::InvalidArgumentError(absl::StrCat(DescribeMatmul(m), ": the batch is too large"));
  ASSIGN_OR_RETURN(const cudaDataType_t type, DataType(m.dtype()));
  ASSIGN_OR_RETURN(const cudaDataType_t result_type, DataType(m.result_dtype()));
  RETURN_IF_ERROR(Check(library_.cublasLtMatmulDescCreate(
                            &operation_, m.tf32() ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
                        "cublasLtMatmulDescCreate"));
  RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSA, m.transpose_b() ? CUBLAS_OP_T : CUBLAS_OP_N));
  RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSB, m.transpose_a() ? CUBLAS_OP_T : CUBLAS_OP_N));
  if (at.bias != 0) {
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS));
    RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, Pointer(at.bias)));
  }
  const auto rows_of = [](bool transposed, int64_t rows, int64_t columns) { return transposed ? columns : rows; };
  RETURN_IF_ERROR(Layout(a_, type, rows_of(m.transpose_b(), m.n(), m.k()), rows_of(m.transpose_b(), m.k(), m.n()),
                         m.batch(), m.stride_b()));
  RETURN_IF_ERROR(Layout(b_, type, rows_of(m.transpose_a(), m.k(), m.m()), rows_of(m.transpose_a(), m.m(), m.k()),
                         m.batch(), m.stride_a()));
  RETURN_IF_ERROR(Layout(c_, result_type, m.n(), m.m(), m.batch(), m.stride_d()));
  return Layout(d_, result_type, m.n(), m.m(), m.batch(), m.stride_d());
}

absl::StatusOr<std::vector<std::string>> BoundMatmul::Propose(int most) const {
  cublasLtMatmulPreference_t preference = nullptr;
  RETURN_IF_ERROR(Check(library_.cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate"));
  // Sums split over k are added in the workspace, in a fixed order.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  absl::Status status =
      Check(library_.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &workspace_bytes_, sizeof(size_t)),
            "workspace limit");
  status.Update(Check(library_.cublasLtMatmulPreferenceSetAttribute(
                          preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof(reductions)),
                      "reduction schemes"));
  for (const auto& [attribute, address] :
       {std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, at_.b),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, at_.a),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, at_.accumulator == 0 ? at_.d : at_.accumulator),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, at_.d)}) {
    const uint32_t bytes = AlignmentOf(address);
    status.Update(Check(library_.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &bytes, sizeof(bytes)),
                        "alignment"));
  }
  std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<size_t>(most));
  int count = 0;
  cublasStatus_t asked = CUBLAS_STATUS_SUCCESS;
  if (status.ok()) {
    asked = library_.cublasLtMatmulAlgoGetHeuristic(handle_, operation_, a_, b_, c_, d_, preference, most, found.data(),
                                                    &count);
  }
  library_.cublasLtMatmulPreferenceDestroy(preference);
  RETURN_IF_ERROR(status);
  std::vector<std::string> algorithms;
  for (int i = 0; i < count && asked == CUBLAS_STATUS_SUCCESS; ++i) {
    const cublasLtMatmulHeuristicResult_t& result = found[static_cast<size_t>(i)];
    if (result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize > workspace_bytes_) continue;
    algorithms.emplace_back(reinterpret_cast<const char*>(&result.algo), sizeof(result.algo));
  }
  if (algorithms.empty()) {
    return absl::UnimplementedError(absl::StrCat("cuBLASLt has no algorithm for ", what_, " in ", workspace_bytes_,
                                                 " bytes of workspace: ", library_.cublasLtGetStatusString(asked)));
  }
  return algorithms;
}

int64_t BoundMatmul::WorkspaceBytes(const std::string& algorithm) const {
  cublasLtMatmulAlgo_t algo;
  CHECK(algorithm.size() == sizeof(algo));
  std::memcpy(&algo, algorithm.data(), sizeof(algo));
  cublasLtMatmulHeuristicResult_t result;
  const cublasStatus_t status = library_.cublasLtMatmulAlgoCheck(handle_, operation_, a_, b_, c_, d_, &algo, &result);
  return static_cast<int64_t>(status == CUBLAS_STATUS_SUCCESS ? result.workspaceSize : workspace_bytes_);
}

std::string BoundMatmul::Describe(const std::string& algorithm) const {
  cublasLtMatmulAlgo_t algo;
  CHECK(algorithm.size() == sizeof(algo));
  std::memcpy(&algo, algorithm.data(), sizeof(algo));
  std::string text;
  for (const auto& [name, attribute] :
       {std::pair("id", CUBLASLT_ALGO_CONFIG_ID), std::pair("tile", CUBLASLT_ALGO_CONFIG_TILE_ID),
        std::pair("stages", CUBLASLT_ALGO_CONFIG_STAGES_ID), std::pair("split-k", CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
        std::pair("reduction", CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
        std::pair("swizzle", CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
        std::pair("custom", CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION)}) {
    int32_t value = 0;
    size_t written = 0;
    if (library_.cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written) ==
        CUBLAS_STATUS_SUCCESS) {
      absl::StrAppend(&text, text.empty() ? "" : ", ", name, " ", value);
    }
  }
  for (const auto& [name, attribute] : {std::pair("inner", CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
                                        std::pair("cluster", CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID)}) {
    uint16_t value = 0;
    size_t written = 0;
    if (library_.cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written) ==
        CUBLAS_STATUS_SUCCESS) {
      absl::StrAppend(&text, ", ", name, " ", value);
    }
  }
  return text;
}

class CublasLtLibrary : public CublasLt {
 public:
  CublasLtLibrary(const Library& library, cublasLtHandle_t handle) : library_(library), handle_(handle) {}
  ~CublasLtLibrary() override { library_.cublasLtDestroy(handle_); }

  int64_t version() const override { return static_cast<int64_t>(library_.cublasLtGetVersion()); }

  absl::StatusOr<std::shared_ptr<const CublasLtMatmul>> Bind(const proto::CudaMatmulProto& matmul,
                                                             const CudaMatmulPointers& pointers,
                                                             CUstream stream) override {
    auto bound = std::make_shared<BoundMatmul>(library_, handle_);
    RETURN_IF_ERROR(bound->Create(matmul, pointers, stream));
    return bound;
  }

 private:
  const Library& library_;
  cublasLtHandle_t handle_;
};

}  // namespace

std::string MatmulProblem(const proto::CudaMatmulProto& m, const CudaMatmulPointers& at) {
  const CUdeviceptr c = at.accumulator == 0 ? at.d : at.accumulator;
  return absl::StrCat(
      DescribeMatmul(m), m.transpose_a() ? ", a transposed" : "", m.transpose_b() ? ", b transposed" : "",
      m.tf32() ? ", tf32" : "", at.bias == 0 ? "" : ", bias", at.accumulator == 0 ? "" : ", accumulator",
      m.batch() == 1 ? "" : absl::StrCat(", strides ", m.stride_a(), " ", m.stride_b(), " ", m.stride_d()),
      ", alignment ", AlignmentOf(at.a), " ", AlignmentOf(at.b), " ", AlignmentOf(c), " ", AlignmentOf(at.d),
      ", workspace ", m.workspace_bytes());
}

absl::StatusOr<std::unique_ptr<CublasLt>> LoadCublasLt() {
  static const Loaded* loaded = new Loaded(Load());
  RETURN_IF_ERROR(loaded->status);
  cublasLtHandle_t handle = nullptr;
  const cublasStatus_t status = loaded->library.cublasLtCreate(&handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return absl::InternalError(absl::StrCat("cublasLtCreate: ", loaded->library.cublasLtGetStatusString(status)));
  }
  return std::make_unique<CublasLtLibrary>(loaded->library, handle);
}

}  // namespace mt
