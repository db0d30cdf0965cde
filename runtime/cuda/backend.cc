#include "runtime/cuda/backend.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/nvrtc.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "proto/cuda.pb.h"
#include "proto/plan.pb.h"
#include "runtime/cuda/cublaslt.h"
#include "runtime/cuda/driver.h"

namespace mt {
namespace {

CUdeviceptr Address(const void* at) { return reinterpret_cast<CUdeviceptr>(at); }

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaDriver& driver, CudaDeviceInfo info) : driver_(driver), info_(std::move(info)) {}
  ~CudaBackend() override;

  absl::Status Open();

  absl::string_view name() const override { return "cuda"; }
  bool host_addressable() const override { return false; }
  absl::Status LoadCode(const proto::PlanProto& plan) override;
  absl::StatusOr<std::byte*> AllocateArena(int64_t bytes) override;
  void CopyToDevice(std::byte* to, const void* from, int64_t bytes) override;
  void CopyToHost(void* to, const std::byte* from, int64_t bytes) override;
  void Fill(std::byte* to, uint8_t value, int64_t bytes) override {
    Must(driver_.cuMemsetD8Async(Address(to), value, static_cast<size_t>(bytes), stream_), "filling device memory");
  }
  absl::StatusOr<Thunk> Bind(const KernelCall& call) override;
  absl::StatusOr<Thunk> Capture(const std::vector<Thunk>& thunks) override;
  void Synchronize() override { Must(driver_.cuStreamSynchronize(stream_), "waiting for the device"); }
  int64_t UsedDeviceBytes() override {
    size_t free = 0, total = 0;
    Must(driver_.cuMemGetInfo(&free, &total), "asking for free memory");
    return static_cast<int64_t>(total - free);
  }

 private:
  // After load, a call fails only where the device or our code does: there is nothing to go on with.
  void Must(CUresult result, absl::string_view what) const {
    const absl::Status status = CudaStatus(driver_, result, what);
    CHECK(status.ok()) << status;
  }
  absl::Status Status(CUresult result, absl::string_view what) const { return CudaStatus(driver_, result, what); }
  absl::StatusOr<Thunk> BindLaunch(const KernelCall& call, const proto::CudaLaunchProto& launch);
  // Where a place lies: the verifier has seen that it is one.
  static CUdeviceptr PlaceOf(const KernelCall& call, const proto::CudaPlaceProto& place);

  static constexpr int64_t kStagingBytes = int64_t{4} << 20;

  const CudaDriver& driver_;
  const CudaDeviceInfo info_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr;
  CUdeviceptr arena_ = 0;
  std::byte* staging_ = nullptr;  // Pinned, for copies.
  std::unique_ptr<CublasLt> cublaslt_;
  std::vector<CUmodule> modules_;
  std::vector<CUgraphExec> graphs_;
};

CudaBackend::~CudaBackend() {
  if (context_ == nullptr) return;
  driver_.cuStreamSynchronize(stream_);
  for (const CUgraphExec graph : graphs_) driver_.cuGraphExecDestroy(graph);
  for (const CUmodule module : modules_) driver_.cuModuleUnload(module);
  cublaslt_.reset();
  if (arena_ != 0) driver_.cuMemFree(arena_);
  if (staging_ != nullptr) driver_.cuMemFreeHost(staging_);
  if (stream_ != nullptr) driver_.cuStreamDestroy(stream_);
  driver_.cuDevicePrimaryCtxRelease(device_);
}

absl::Status CudaBackend::Open() {
  RETURN_IF_ERROR(Status(driver_.cuDeviceGet(&device_, info_.index), "opening the device"));
  RETURN_IF_ERROR(Status(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "making a context on the device"));
  RETURN_IF_ERROR(Status(driver_.cuCtxSetCurrent(context_), "entering the context"));
  RETURN_IF_ERROR(Status(driver_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "making a stream"));
  void* staging = nullptr;
  RETURN_IF_ERROR(Status(driver_.cuMemHostAlloc(&staging, static_cast<size_t>(kStagingBytes), 0), "pinning memory"));
  staging_ = static_cast<std::byte*>(staging);
  ASSIGN_OR_RETURN(cublaslt_, LoadCublasLt());
  return absl::OkStatus();
}

absl::Status CudaBackend::LoadCode(const proto::PlanProto& plan) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
  // A cubin runs on devices of its own major version and at least its minor; sm_90a on 9.0 alone.
  const bool runs = target.sm / 10 == info_.sm / 10 && target.sm <= info_.sm;
  if (!runs) {
    return absl::FailedPreconditionError(absl::StrCat("the plan is for ", plan.target(), ", device ", info_.index, " (",
                                                      info_.name, ") is sm_", info_.sm,
                                                      "; compile it with --target cuda:sm_", info_.sm));
  }
  if (plan.cuda().programs_size() != plan.programs_size()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the plan of ", plan.model(), " holds no device code; compile it again with this mtc"));
  }
  for (int i = 0; i < plan.cuda().modules_size(); ++i) {
    const proto::CudaModuleProto& proto = plan.cuda().modules(i);
    std::string cubin = proto.cubin();
    if (cubin.empty()) {
      ASSIGN_OR_RETURN(cubin, CompileCudaSource(proto.source(), target));
    }
    CUmodule module = nullptr;
    RETURN_IF_ERROR(Status(driver_.cuModuleLoadDataEx(&module, cubin.data(), 0, nullptr, nullptr),
                           absl::StrCat("loading kernel ", i, " of the plan")));
    modules_.push_back(module);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> CudaBackend::AllocateArena(int64_t bytes) {
  CHECK(arena_ == 0) << "one arena a backend";
  size_t free = 0, total = 0;
  RETURN_IF_ERROR(Status(driver_.cuMemGetInfo(&free, &total), "asking for free memory"));
  const int64_t available = static_cast<int64_t>(free);
  if (bytes > available) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the plan needs an arena of ", FormatBytes(bytes), " (", bytes, " bytes); device ", info_.index,
                     " (", info_.name, ") has ", FormatBytes(available), " free of ",
                     FormatBytes(static_cast<int64_t>(total)), ": ", FormatBytes(bytes - available),
                     " short. Other processes may hold memory (nvidia-smi lists them); else compile ",
                     "with a smaller --batch or --memory ", available >> 20, "MiB"));
  }
  RETURN_IF_ERROR(Status(driver_.cuMemAlloc(&arena_, static_cast<size_t>(std::max<int64_t>(bytes, 1))),
                         absl::StrCat("allocating an arena of ", FormatBytes(bytes))));
  Fill(reinterpret_cast<std::byte*>(arena_), 0, bytes);
  return reinterpret_cast<std::byte*>(arena_);
}

void CudaBackend::CopyToDevice(std::byte* to, const void* from, int64_t bytes) {
  const std::byte* source = static_cast<const std::byte*>(from);
  for (int64_t done = 0; done < bytes; done += kStagingBytes) {
    const size_t part = static_cast<size_t>(std::min(kStagingBytes, bytes - done));
    Synchronize();  // The staging buffer may still be read.
    std::memcpy(staging_, source + done, part);
    Must(driver_.cuMemcpyHtoDAsync(Address(to + done), staging_, part, stream_), "copying to the device");
  }
}

void CudaBackend::CopyToHost(void* to, const std::byte* from, int64_t bytes) {
  std::byte* target = static_cast<std::byte*>(to);
  for (int64_t done = 0; done < bytes; done += kStagingBytes) {
    const size_t part = static_cast<size_t>(std::min(kStagingBytes, bytes - done));
    Must(driver_.cuMemcpyDtoHAsync(staging_, Address(from + done), part, stream_), "copying from the device");
    Synchronize();
    std::memcpy(target + done, staging_, part);
  }
}

CUdeviceptr CudaBackend::PlaceOf(const KernelCall& call, const proto::CudaPlaceProto& place) {
  const size_t index = static_cast<size_t>(place.index());
  const std::byte* base = call.workspace;
  if (place.base() == proto::CudaPlaceProto::OPERAND) base = call.operands[index].data;
  if (place.base() == proto::CudaPlaceProto::RESULT) base = call.results[index].data;
  return Address(base + place.byte_offset());
}

absl::StatusOr<Thunk> CudaBackend::BindLaunch(const KernelCall& call, const proto::CudaLaunchProto& launch) {
  CUfunction function = nullptr;
  RETURN_IF_ERROR(Status(
      driver_.cuModuleGetFunction(&function, modules_[static_cast<size_t>(launch.module())], launch.function().c_str()),
      absl::StrCat("finding kernel ", launch.function())));
  if (launch.shared_bytes() > 48 << 10) {
    RETURN_IF_ERROR(Status(
        driver_.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared_bytes()),
        absl::StrCat("giving kernel ", launch.function(), " ", launch.shared_bytes(), " bytes of shared memory")));
  }
  struct Bound {
    CUfunction function;
    unsigned grid[3], block[3], shared_bytes;
    std::vector<CUdeviceptr> values;
    std::vector<void*> arguments;
  };
  auto bound = std::make_shared<Bound>();
  bound->function = function;
  for (int i = 0; i < 3; ++i) {
    bound->grid[i] = static_cast<unsigned>(launch.grid(i));
    bound->block[i] = static_cast<unsigned>(launch.block(i));
  }
  bound->shared_bytes = static_cast<unsigned>(launch.shared_bytes());
  for (const proto::CudaPlaceProto& place : launch.arguments()) {
    bound->values.push_back(PlaceOf(call, place));
  }
  for (CUdeviceptr& value : bound->values) bound->arguments.push_back(&value);
  return Thunk([this, bound = std::move(bound)] {
    const Bound& b = *bound;
    Must(driver_.cuLaunchKernel(b.function, b.grid[0], b.grid[1], b.grid[2], b.block[0], b.block[1], b.block[2],
                                b.shared_bytes, stream_, const_cast<void**>(b.arguments.data()), nullptr),
         "launching a kernel");
  });
}

absl::StatusOr<Thunk> CudaBackend::Bind(const KernelCall& call) {
  if (call.cuda == nullptr || call.cuda->steps().empty()) {
    return absl::FailedPreconditionError("the plan holds no device code for it; compile the plan again with this mtc");
  }
  std::vector<Thunk> thunks;
  for (const proto::CudaStepProto& step : call.cuda->steps()) {
    if (step.has_launch()) {
      ASSIGN_OR_RETURN(Thunk thunk, BindLaunch(call, step.launch()));
      thunks.push_back(std::move(thunk));
    } else if (step.has_matmul()) {
      const proto::CudaMatmulProto& m = step.matmul();
      CudaMatmulPointers at;
      at.a = PlaceOf(call, m.a());
      at.b = PlaceOf(call, m.b());
      at.d = PlaceOf(call, m.d());
      if (m.has_bias()) at.bias = PlaceOf(call, m.bias());
      if (m.has_accumulator()) at.accumulator = PlaceOf(call, m.accumulator());
      if (m.workspace_bytes() > 0) at.workspace = PlaceOf(call, m.workspace());
      ASSIGN_OR_RETURN(Thunk thunk, cublaslt_->Bind(m, at, stream_));
      thunks.push_back(std::move(thunk));
    } else if (step.has_fill()) {
      const CUdeviceptr at = PlaceOf(call, step.fill().place());
      const uint8_t value = static_cast<uint8_t>(step.fill().value());
      const size_t bytes = static_cast<size_t>(step.fill().bytes());
      thunks.push_back([this, at, value, bytes] {
        Must(driver_.cuMemsetD8Async(at, value, bytes, stream_), "filling device memory");
      });
    } else {
      return absl::FailedPreconditionError("the plan holds a step of a kind that this mtrun does not know");
    }
  }
  if (thunks.size() == 1) return std::move(thunks[0]);
  return Thunk([thunks = std::move(thunks)] {
    for (const Thunk& thunk : thunks) thunk();
  });
}

absl::StatusOr<Thunk> CudaBackend::Capture(const std::vector<Thunk>& thunks) {
  RETURN_IF_ERROR(Status(driver_.cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "capturing"));
  for (const Thunk& thunk : thunks) thunk();
  CUgraph graph = nullptr;
  RETURN_IF_ERROR(Status(driver_.cuStreamEndCapture(stream_, &graph), "ending the capture"));
  CUgraphExec executable = nullptr;
  const absl::Status made = Status(driver_.cuGraphInstantiate(&executable, graph, 0), "making a graph of the program");
  driver_.cuGraphDestroy(graph);
  RETURN_IF_ERROR(made);
  graphs_.push_back(executable);
  return Thunk([this, executable] { Must(driver_.cuGraphLaunch(executable, stream_), "launching the program"); });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index) {
  ASSIGN_OR_RETURN(const CudaDriver* driver, LoadCudaDriver());
  ASSIGN_OR_RETURN(CudaDeviceInfo info, DescribeCudaDevice(index));
  auto backend = std::make_unique<CudaBackend>(*driver, std::move(info));
  RETURN_IF_ERROR(backend->Open());
  return backend;
}

}  // namespace mt
