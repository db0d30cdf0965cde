#include "runtime/cuda/matmul_timer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "codegen/plan/nvrtc.h"
#include "ir/base/json.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/target.h"

namespace mt {
namespace {

constexpr int64_t kDigestBytes = 8;
constexpr unsigned kBlocks = 1024, kThreads = 256;
// A run shorter than this is timed several times over.
constexpr double kShortSeconds = 40e-6;
constexpr int kMostRepeats = 16, kMostRuns = 2;

// Operands that show in which order a sum over k was made. Elements have random mantissas and exponents from -8 to 3;
// the second half of k repeats the first, with the other sign in every other column of b: there the exact sum is zero
// and what is left is rounding. c and the bias are small, or zero.
constexpr char kSource[] = R"(
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ u64 Mix(u64 x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// kind 0: a, 1: b, 2: c or bias. Elements along k are `stride` apart. A float of kMantissa bits, its exponent biased.
template <typename Bits>
__device__ __forceinline__ void Fill(Bits* p, u64 count, u64 stride, u64 k, u32 kind, u32 mantissa, u32 bias) {
  const u64 half = k / 2, step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    u64 element = i;
    bool negate = false, zero = false;
    u32 least = bias - 8, exponents = 12;
    if (kind == 2) {
      zero = (i >> 1 & 1) == 0;
      least = bias - 12;
      exponents = 8;
    } else {
      const u64 at = i / stride % k;
      zero = at == 2 * half && k > 1;
      if (at >= half && half > 0) {
        element -= half * stride;
        negate = kind == 1 && (stride == 1 ? i / k : i % stride) % 2 == 0;
      }
    }
    const u64 random = Mix(element * 4 + kind);
    const u32 sign = (u32)(random & 1) ^ (negate ? 1 : 0), exponent = least + (u32)((random >> 1 & 0xff) % exponents);
    const u32 bits = sign << (8 * sizeof(Bits) - 1) | exponent << mantissa | (u32)(random >> 32) >> (32 - mantissa);
    p[i] = zero ? (Bits)0 : (Bits)bits;
  }
}
extern "C" __global__ void mt_fill16(u16* p, u64 count, u64 stride, u64 k, u32 kind, u32 mantissa, u32 bias) {
  Fill(p, count, stride, k, kind, mantissa, bias);
}
extern "C" __global__ void mt_fill32(u32* p, u64 count, u64 stride, u64 k, u32 kind, u32 mantissa, u32 bias) {
  Fill(p, count, stride, k, kind, mantissa, bias);
}

// *digest += a sum over the places that does not depend on its order.
extern "C" __global__ void mt_digest(const u16* p, u64 count, u64* digest) {
  const u64 step = (u64)gridDim.x * blockDim.x;
  u64 sum = 0;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) sum += Mix(i << 16 | p[i]);
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) atomicAdd(digest, sum);
}
)";

// Elements that `batch` matrices of rows x columns span.
uint64_t Span(int64_t batch, int64_t stride, int64_t rows, int64_t columns) {
  return static_cast<uint64_t>((stride == 0 ? 0 : (batch - 1) * stride) + rows * columns);
}

uint64_t BytesOf(const std::string& dtype) { return dtype == "f32" ? 4 : 2; }

std::string CachePath() {
  const std::string folder = CacheFolder();
  return folder.empty() ? "" : absl::StrCat(folder, "/matmuls.json");
}

}  // namespace

// One problem in the arena.
class MatmulTimer::Trials : public MatmulTrials {
 public:
  Trials(MatmulTimer& timer, const proto::CudaMatmulProto& m, const CudaMatmulPointers& at,
         const CublasLtMatmul& matmul, const std::vector<std::string>& algorithms)
      : timer_(timer), driver_(timer.driver_), m_(m), at_(at), matmul_(matmul), algorithms_(algorithms) {}

  // Writes the operands.
  absl::Status Begin() {
    const bool ta = m_.transpose_a(), tb = m_.transpose_b();
    RETURN_IF_ERROR(Fill(at_.a, m_.dtype(), a_elements(), ta ? m_.m() : 1, 0));
    RETURN_IF_ERROR(Fill(at_.b, m_.dtype(), b_elements(), tb ? 1 : m_.n(), 1));
    if (at_.bias == 0) return absl::OkStatus();
    return Fill(at_.bias, m_.result_dtype(), static_cast<uint64_t>(m_.n()), 1, 2);
  }
  // Makes everything zero again and waits for it.
  absl::Status End() {
    const uint64_t size = BytesOf(m_.dtype()), result_size = BytesOf(m_.result_dtype());
    absl::Status status = Zero(at_.a, a_elements() * size);
    status.Update(Zero(at_.b, b_elements() * size));
    status.Update(Zero(at_.d, d_elements() * result_size));
    if (at_.bias != 0) status.Update(Zero(at_.bias, static_cast<uint64_t>(m_.n()) * result_size));
    if (at_.accumulator != 0) status.Update(Zero(at_.accumulator, d_elements() * result_size));
    status.Update(Zero(at_.workspace, static_cast<uint64_t>(m_.workspace_bytes())));
    status.Update(Wait());
    return status;
  }

  absl::StatusOr<uint64_t> Digest(size_t i) override {
    const uint64_t bytes = d_elements() * BytesOf(m_.result_dtype());
    RETURN_IF_ERROR(Status(driver_.cuMemsetD8Async(at_.d, 0xFF, bytes, timer_.stream_), "filling"));
    if (at_.accumulator != 0) RETURN_IF_ERROR(Fill(at_.accumulator, m_.result_dtype(), d_elements(), 1, 2));
    RETURN_IF_ERROR(matmul_.Run(algorithms_[i]));
    RETURN_IF_ERROR(Zero(at_.workspace, kDigestBytes));
    CUdeviceptr from = at_.d, to = at_.workspace;
    uint64_t halves = bytes / 2;
    void* arguments[] = {&from, &halves, &to};
    RETURN_IF_ERROR(Launch(timer_.digest_, arguments));
    uint64_t digest = 0;
    RETURN_IF_ERROR(
        Status(driver_.cuMemcpyDtoHAsync(&digest, at_.workspace, sizeof(digest), timer_.stream_), "copying"));
    RETURN_IF_ERROR(Wait());
    return digest;
  }

  absl::StatusOr<double> Seconds(size_t i, int runs) override {
    ASSIGN_OR_RETURN(double seconds, Measure(i, runs));
    if (i == 0 && runs == 1 && repeats_ == 1 && seconds < kShortSeconds) {
      repeats_ = std::min(kMostRepeats, static_cast<int>(std::ceil(kShortSeconds / std::max(seconds, 1e-6))));
      ASSIGN_OR_RETURN(seconds, Measure(i, runs));
    }
    return seconds;
  }

 private:
  uint64_t a_elements() const { return Span(m_.batch(), m_.stride_a(), m_.m(), m_.k()); }
  uint64_t b_elements() const { return Span(m_.batch(), m_.stride_b(), m_.k(), m_.n()); }
  uint64_t d_elements() const { return Span(m_.batch(), m_.stride_d(), m_.m(), m_.n()); }
  absl::Status Status(CUresult result, absl::string_view what) const { return CudaStatus(driver_, result, what); }
  absl::Status Wait() { return Status(driver_.cuStreamSynchronize(timer_.stream_), "timing matmuls"); }
  absl::Status Zero(CUdeviceptr at, uint64_t bytes) {
    return Status(driver_.cuMemsetD8Async(at, 0, bytes, timer_.stream_), "filling");
  }
  absl::Status Launch(CUfunction function, void** arguments) {
    return Status(
        driver_.cuLaunchKernel(function, kBlocks, 1, 1, kThreads, 1, 1, 0, timer_.stream_, arguments, nullptr),
        "launching");
  }
  absl::Status Fill(CUdeviceptr at, const std::string& dtype, uint64_t count, int64_t k_stride, uint32_t kind) {
    uint64_t stride = static_cast<uint64_t>(k_stride), k = static_cast<uint64_t>(m_.k());
    uint32_t mantissa = dtype == "f32" ? 23 : dtype == "f16" ? 10 : 7, bias = dtype == "f16" ? 15 : 127;
    void* arguments[] = {&at, &count, &stride, &k, &kind, &mantissa, &bias};
    return Launch(dtype == "f32" ? timer_.fill32_ : timer_.fill16_, arguments);
  }

  // The median of `runs` times, each between two events of one graph.
  absl::StatusOr<double> Measure(size_t i, int runs) {
    CUstream stream = timer_.stream_;
    RETURN_IF_ERROR(Status(driver_.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "capturing"));
    absl::Status status;
    for (int run = 0; run < runs && status.ok(); ++run) {
      const auto record = [&](int event) {
        status.Update(Status(driver_.cuEventRecordWithFlags(timer_.events_[static_cast<size_t>(event)], stream,
                                                            CU_EVENT_RECORD_EXTERNAL),
                             "recording an event"));
      };
      record(2 * run);
      for (int repeat = 0; repeat < repeats_; ++repeat) status.Update(matmul_.Run(algorithms_[i]));
      record(2 * run + 1);
    }
    CUgraph graph = nullptr;
    status.Update(Status(driver_.cuStreamEndCapture(stream, &graph), "ending the capture"));
    CUgraphExec executable = nullptr;
    if (status.ok()) status = Status(driver_.cuGraphInstantiate(&executable, graph, 0), "making a graph");
    if (graph != nullptr) driver_.cuGraphDestroy(graph);
    if (status.ok()) status = Status(driver_.cuGraphLaunch(executable, stream), "launching");
    status.Update(Wait());
    if (executable != nullptr) driver_.cuGraphExecDestroy(executable);
    RETURN_IF_ERROR(status);
    std::vector<double> times;
    for (int run = 0; run < runs; ++run) {
      float milliseconds = 0;
      const size_t first = static_cast<size_t>(2 * run);
      RETURN_IF_ERROR(
          Status(driver_.cuEventElapsedTime(&milliseconds, timer_.events_[first], timer_.events_[first + 1]),
                 "reading events"));
      times.push_back(1e-3 * static_cast<double>(milliseconds) / repeats_);
    }
    std::sort(times.begin(), times.end());
    return times[(times.size() - 1) / 2];
  }

  MatmulTimer& timer_;
  const CudaDriver& driver_;
  const proto::CudaMatmulProto& m_;
  const CudaMatmulPointers& at_;
  const CublasLtMatmul& matmul_;
  const std::vector<std::string>& algorithms_;
  int repeats_ = 1;
};

MatmulTimer::MatmulTimer(const CudaDriver& driver, CUstream stream, const CudaDeviceInfo& info, int64_t library_version,
                         const CudaOptions& options)
    : driver_(driver),
      stream_(stream),
      info_(info),
      options_(options),
      device_(absl::StrCat(info.name, ", sm_", info.sm, ", ", info.processors, " processors, cuBLASLt ",
                           library_version, ": ")),
      cache_(options.time_matmuls ? CachePath() : "") {
  Warn();
}

MatmulTimer::~MatmulTimer() {
  for (const CUevent event : events_) driver_.cuEventDestroy(event);
  if (module_ != nullptr) driver_.cuModuleUnload(module_);
}

void MatmulTimer::Warn() {
  for (const std::string& warning : cache_.TakeWarnings()) {
    if (options_.warn) options_.warn(warning);
  }
}

void MatmulTimer::Save() {
  cache_.Save();
  Warn();
}

absl::Status MatmulTimer::Prepare() {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(absl::StrCat("cuda:sm_", info_.sm)));
  ASSIGN_OR_RETURN(const std::string cubin, CompileCudaSource(kSource, target));
  RETURN_IF_ERROR(CudaStatus(driver_, driver_.cuModuleLoadDataEx(&module_, cubin.data(), 0, nullptr, nullptr),
                             "loading the kernels that time matmuls"));
  for (const auto& [function, name] :
       {std::pair(&fill16_, "mt_fill16"), std::pair(&fill32_, "mt_fill32"), std::pair(&digest_, "mt_digest")}) {
    RETURN_IF_ERROR(CudaStatus(driver_, driver_.cuModuleGetFunction(function, module_, name), name));
  }
  events_.resize(2 * kMostRuns);
  for (CUevent& event : events_) {
    RETURN_IF_ERROR(CudaStatus(driver_, driver_.cuEventCreate(&event, CU_EVENT_DEFAULT), "making an event"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> MatmulTimer::Choose(const proto::CudaMatmulProto& m, const CudaMatmulPointers& at,
                                                const CublasLtMatmul& matmul) {
  const std::string problem = absl::StrCat(device_, MatmulProblem(m, at));
  if (const auto known = chosen_.find(problem); known != chosen_.end()) return known->second;
  ASSIGN_OR_RETURN(const std::vector<std::string> algorithms, matmul.Propose(kProposals));
  std::string& chosen = chosen_[problem];
  chosen = algorithms[0];
  if (!options_.time_matmuls || m.workspace_bytes() < kDigestBytes) return chosen;
  if (const std::string* kept = cache_.Find(problem); kept != nullptr && !options_.report) {
    // Only what the library itself proposes is run.
    if (std::find(algorithms.begin(), algorithms.end(), *kept) != algorithms.end()) return chosen = *kept;
  }
  if (!prepared_) {
    prepared_ = true;
    ready_ = Prepare();
    if (!ready_.ok() && options_.warn) {
      options_.warn(absl::StrCat("matmuls take the library's first choice, none is timed: ", ready_.message()));
    }
  }
  if (!ready_.ok()) return chosen;
  Trials device(*this, m, at, matmul, algorithms);
  RETURN_IF_ERROR(device.Begin());
  std::vector<MatmulTrial> trials;
  const size_t index = ChooseMatmul(algorithms.size(), device, options_.report ? &trials : nullptr);
  RETURN_IF_ERROR(device.End());
  chosen = algorithms[index];
  cache_.Put(problem, chosen);
  if (options_.report) {
    nlohmann::ordered_json line = {{"matmul", problem}, {"chosen", index}};
    for (size_t i = 0; i < trials.size(); ++i) {
      line["candidates"].push_back({{"algorithm", matmul.Describe(algorithms[i])},
                                    {"same_bits", trials[i].same_bits},
                                    {"us", 1e6 * trials[i].seconds}});
    }
    options_.report(line.dump());
  }
  return chosen;
}

}  // namespace mt
