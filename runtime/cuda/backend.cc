#include "runtime/cuda/backend.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/cubin.h"
#include "codegen/plan/nvrtc.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "proto/cuda.pb.h"
#include "proto/plan.pb.h"
#include "runtime/cuda/cublaslt.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/matmul_timer.h"
#include "runtime/cuda/nvml.h"
#include "runtime/step_dependencies.h"

namespace mt {
namespace {

CUdeviceptr Address(const void* at) { return reinterpret_cast<CUdeviceptr>(at); }

// Bytes free on a device before this process opened it for the first time; -1: not known. What the first context takes
// does not all come back when it is gone.
int64_t FreeBefore(const std::string& pci_bus_id) {
  static auto& known = *new std::map<std::string, int64_t>;
  const auto [at, first] = known.insert({pci_bus_id, -1});
  if (!first) return at->second;
  const absl::StatusOr<NvmlMemory> memory = AskNvml(pci_bus_id);
  return at->second = memory.ok() ? memory->free_bytes : -1;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaDriver& driver, CudaDeviceInfo info, CudaOptions options)
      : driver_(driver), info_(std::move(info)), options_(std::move(options)) {}
  ~CudaBackend() override;

  absl::Status Open();

  absl::string_view name() const override { return "cuda"; }
  std::vector<std::pair<std::string, std::string>> Description() const override {
    return {{"gpu", info_.name}, {"driver", DriverVersion()}, {"cublaslt", absl::StrCat(cublaslt_->version())}};
  }
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
  int64_t ProcessDeviceBytes() override {
    size_t free = 0, total = 0;
    Must(driver_.cuMemGetInfo(&free, &total), "asking for free memory");
    return free_before_ < 0 ? -1 : free_before_ - static_cast<int64_t>(free);
  }

  // One that runs, and one that waits.
  int64_t programs_in_flight() const override { return 2; }
  absl::StatusOr<std::byte*> AllocatePinned(int64_t bytes) override;
  void Copy(Lane lane, void* to, const void* from, int64_t bytes) override {
    Must(driver_.cuMemcpyAsync(Address(to), Address(from), static_cast<size_t>(bytes), StreamOf(lane)), "copying");
  }
  int64_t Record(Lane lane) override {
    const int64_t point = next_point_++;
    Must(driver_.cuEventRecord(EventOf(point), StreamOf(lane)), "recording an event");
    return point;
  }
  // An event that has been recorded again since stands for a later point: that much is waited for, and no less.
  void WaitIn(Lane lane, int64_t point) override {
    Must(driver_.cuStreamWaitEvent(StreamOf(lane), EventOf(point), 0), "waiting for an event");
  }
  void WaitOnHost(int64_t point) override {
    Must(driver_.cuEventSynchronize(EventOf(point)), "waiting for the device");
  }
  void HashGranules(const std::byte* from, int64_t bytes, absl::Span<uint64_t> hashes) override;
  std::vector<double> Time(int count, const std::function<void(int)>& run) override;
  absl::StatusOr<std::byte*> AllocateGuarded(int64_t bytes) override;

 private:
  // After load, a call fails only where the device or our code does: there is nothing to go on with.
  void Must(CUresult result, absl::string_view what) const {
    const absl::Status status = CudaStatus(driver_, result, what);
    CHECK(status.ok()) << status;
  }
  absl::Status Status(CUresult result, absl::string_view what) const { return CudaStatus(driver_, result, what); }
  absl::StatusOr<Thunk> BindLaunch(const KernelCall& call, const proto::CudaLaunchProto& launch);
  absl::Status EncodeTensorMap(const proto::CudaTensorMapProto& map, CUdeviceptr at, CUtensorMap* to) const;
  // A part of an instruction, and the memory that it reads and writes.
  struct Step {
    Thunk run;
    std::vector<MemoryAccess> accesses;
    bool is_matmul = false;
  };
  // A program while it is captured.
  struct Recording {
    StepDependencies dependencies;
    std::vector<std::vector<CUgraphNode>> nodes;  // Of each step, the last ones.
    int last_large = -1;
  };
  std::vector<MemoryAccess> AccessesOf(const KernelCall& call, const proto::CudaStepProto& step) const;
  void RunStep(const Step& step);
  // What is captured next waits for these steps alone.
  void WaitForSteps(const std::vector<int>& steps);
  // Where a place lies: the verifier has seen that it is one.
  static CUdeviceptr PlaceOf(const KernelCall& call, const proto::CudaPlaceProto& place);

  CUstream StreamOf(Lane lane) const { return lane == Lane::kThunks ? stream_ : inputs_stream_; }
  CUevent EventOf(int64_t point) const { return events_[static_cast<size_t>(point) % events_.size()]; }
  absl::Status NotEnough(int64_t bytes, absl::string_view what) const;

  static constexpr int64_t kStagingBytes = int64_t{4} << 20;
  static constexpr size_t kEvents = 64;
  // A step over more bytes keeps the whole device busy, as a matmul does: in a graph these run one after another, all
  // others as soon as they may.
  static constexpr uint64_t kLargeBytes = uint64_t{40} << 20;

  const CudaDriver& driver_;
  const CudaDeviceInfo info_;
  const CudaOptions options_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr, inputs_stream_ = nullptr;
  std::vector<CUevent> events_;  // Points in the lanes, used in turn.
  int64_t next_point_ = 0;
  std::vector<CUevent> clock_;  // Events that take the time, made when they are asked for.
  std::string pci_bus_id_;
  int64_t free_before_ = -1;  // FreeBefore of the device.
  Target target_;             // The plan's.
  CUdeviceptr arena_ = 0;
  std::vector<CUdeviceptr> guarded_;
  std::byte* staging_ = nullptr;  // Pinned, for copies that the host waits for.
  std::vector<std::byte*> pinned_;
  CUfunction hash_ = nullptr;  // Hashes granules; null: not made yet, or there is no compiler.
  bool hash_tried_ = false;
  std::unique_ptr<CublasLt> cublaslt_;
  std::unique_ptr<MatmulTimer> matmul_timer_;
  std::vector<CUmodule> modules_;
  std::vector<CUgraphExec> graphs_;
  Recording* recording_ = nullptr;  // While a graph is captured.
};

CudaBackend::~CudaBackend() {
  if (context_ == nullptr) return;
  if (inputs_stream_ != nullptr) driver_.cuStreamSynchronize(inputs_stream_);
  if (stream_ != nullptr) driver_.cuStreamSynchronize(stream_);
  for (const CUgraphExec graph : graphs_) driver_.cuGraphExecDestroy(graph);
  for (const CUmodule module : modules_) driver_.cuModuleUnload(module);
  matmul_timer_.reset();
  cublaslt_.reset();
  for (const std::vector<CUevent>& events : {events_, clock_}) {
    for (const CUevent event : events) driver_.cuEventDestroy(event);
  }
  if (arena_ != 0) driver_.cuMemFree(arena_);
  for (const CUdeviceptr buffer : guarded_) driver_.cuMemFree(buffer);
  for (std::byte* memory : pinned_) driver_.cuMemFreeHost(memory);
  if (inputs_stream_ != nullptr) driver_.cuStreamDestroy(inputs_stream_);
  if (stream_ != nullptr) driver_.cuStreamDestroy(stream_);
  driver_.cuDevicePrimaryCtxRelease(device_);
}

absl::Status CudaBackend::Open() {
  RETURN_IF_ERROR(Status(driver_.cuDeviceGet(&device_, info_.index), "opening the device"));
  char bus_id[32] = {};
  RETURN_IF_ERROR(Status(driver_.cuDeviceGetPCIBusId(bus_id, sizeof(bus_id) - 1, device_), "naming the device's bus"));
  pci_bus_id_ = bus_id;
  free_before_ = FreeBefore(pci_bus_id_);
  RETURN_IF_ERROR(Status(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "making a context on the device"));
  RETURN_IF_ERROR(Status(driver_.cuCtxSetCurrent(context_), "entering the context"));
  RETURN_IF_ERROR(Status(driver_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "making a stream"));
  RETURN_IF_ERROR(Status(driver_.cuStreamCreate(&inputs_stream_, CU_STREAM_NON_BLOCKING), "making a stream"));
  for (size_t i = 0; i < kEvents; ++i) {
    CUevent event = nullptr;
    RETURN_IF_ERROR(Status(driver_.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "making an event"));
    events_.push_back(event);
  }
  ASSIGN_OR_RETURN(staging_, AllocatePinned(kStagingBytes));
  ASSIGN_OR_RETURN(cublaslt_, LoadCublasLt());
  matmul_timer_ = std::make_unique<MatmulTimer>(driver_, stream_, info_, cublaslt_->version(), options_);
  return absl::OkStatus();
}

absl::Status Damaged(const proto::CudaModuleProto& module, int index, absl::string_view why) {
  return absl::FailedPreconditionError(absl::StrCat(
      "the driver does not take module ", index, " of the plan (", why, "): it is damaged, or ", module.compiler(),
      " is newer than the driver; compile the plan again with mtc compile on this machine"));
}

absl::Status CudaBackend::LoadCode(const proto::PlanProto& plan) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
  // A cubin runs on devices of its own major version and at least its minor; sm_90a on 9.0 alone.
  const bool runs = target.sm / 10 == info_.sm / 10 && target.sm <= info_.sm;
  if (!runs) {
    const absl::StatusOr<Target> own = TargetOfDevice(info_.sm);
    return absl::FailedPreconditionError(
        absl::StrCat("the plan is for ", plan.target(), ", device ", info_.index, " (", info_.name, ") is ",
                     info_.sm < target.sm ? "an older sm_" : "sm_", info_.sm, "; compile it with --target ",
                     own.ok() ? own->ToString() : "cpu"));
  }
  target_ = target;
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
    // The driver is not told how long an image is.
    if (absl::StartsWith(cubin,
                         "\x7f"
                         "ELF")) {
      const absl::Status whole = CubinFunctions(cubin).status();
      if (!whole.ok()) return Damaged(proto, i, whole.message());
    }
    CUmodule module = nullptr;
    const CUresult loaded = driver_.cuModuleLoadDataEx(&module, cubin.data(), 0, nullptr, nullptr);
    if (loaded == CUDA_ERROR_INVALID_IMAGE || loaded == CUDA_ERROR_NO_BINARY_FOR_GPU ||
        loaded == CUDA_ERROR_INVALID_PTX || loaded == CUDA_ERROR_UNSUPPORTED_PTX_VERSION ||
        loaded == CUDA_ERROR_INVALID_SOURCE) {
      return Damaged(proto, i, CudaStatus(driver_, loaded, "loading").message());
    }
    RETURN_IF_ERROR(Status(loaded, absl::StrCat("loading module ", i, " of the plan")));
    modules_.push_back(module);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> CudaBackend::AllocateArena(int64_t bytes) {
  CHECK(arena_ == 0) << "one arena a backend";
  size_t free = 0, total = 0;
  RETURN_IF_ERROR(Status(driver_.cuMemGetInfo(&free, &total), "asking for free memory"));
  const absl::string_view what = "the plan needs an arena";
  if (bytes > static_cast<int64_t>(free)) return NotEnough(bytes, what);
  const CUresult made = driver_.cuMemAlloc(&arena_, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
  if (made == CUDA_ERROR_OUT_OF_MEMORY) return NotEnough(bytes, what);
  RETURN_IF_ERROR(Status(made, absl::StrCat("allocating an arena of ", FormatBytes(bytes))));
  Fill(reinterpret_cast<std::byte*>(arena_), 0, bytes);
  return reinterpret_cast<std::byte*>(arena_);
}

// Memory ran out: who has it.
absl::Status CudaBackend::NotEnough(int64_t bytes, absl::string_view what) const {
  size_t free = 0, total = 0;
  RETURN_IF_ERROR(Status(driver_.cuMemGetInfo(&free, &total), "asking for free memory"));
  const int64_t available = static_cast<int64_t>(free), reported = std::max<int64_t>(0, bytes - available);
  std::string holders;
  if (const absl::StatusOr<NvmlMemory> memory = AskNvml(pci_bus_id_); memory.ok()) holders = HoldersText(*memory);
  return absl::ResourceExhaustedError(
      absl::StrCat(what, " of ", FormatBytes(bytes), " (", bytes, " bytes); device ", info_.index, " (", info_.name,
                   ") has ", FormatBytes(available), " free of ", FormatBytes(static_cast<int64_t>(total)),
                   reported > 0 ? absl::StrCat(": ", FormatBytes(reported), " short") : ", in pieces",
                   holders.empty() ? "" : absl::StrCat("; ", holders), ". Compile with a smaller --batch or --memory ",
                   (available + ContextBytes(target_)) >> 20, "MiB"));
}

absl::StatusOr<std::byte*> CudaBackend::AllocateGuarded(int64_t bytes) {
  CUdeviceptr buffer = 0;
  const CUresult made = driver_.cuMemAlloc(&buffer, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
  if (made == CUDA_ERROR_OUT_OF_MEMORY) return NotEnough(bytes, "a plan whose buffers share nothing needs one more");
  RETURN_IF_ERROR(Status(made, absl::StrCat("allocating a buffer of ", FormatBytes(bytes))));
  guarded_.push_back(buffer);
  return reinterpret_cast<std::byte*>(buffer);
}

absl::StatusOr<std::byte*> CudaBackend::AllocatePinned(int64_t bytes) {
  void* memory = nullptr;
  RETURN_IF_ERROR(Status(driver_.cuMemHostAlloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1)), 0),
                         absl::StrCat("pinning ", FormatBytes(bytes), " of the host's memory")));
  pinned_.push_back(static_cast<std::byte*>(memory));
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return pinned_.back();
}

// A thread a granule, as HashGranule does it.
constexpr char kHashSource[] = R"(
extern "C" __global__ void mt_hash_granules(const unsigned long long* words, unsigned long long* hashes,
                                            unsigned long long granules) {
  const unsigned long long g = blockIdx.x * static_cast<unsigned long long>(blockDim.x) + threadIdx.x;
  if (g >= granules) return;
  unsigned long long lanes[4] = {1, 2, 3, 4};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const unsigned long long v = (lanes[i % 4] ^ words[g * 32 + i]) * 0x9E3779B97F4A7C15ull;
    lanes[i % 4] = v << 29 | v >> 35;
  }
  hashes[g] = ((lanes[0] * 31 + lanes[1]) * 31 + lanes[2]) * 31 + lanes[3];
}
)";

// On the device, where there is a compiler or a kept kernel; else by way of the host.
void CudaBackend::HashGranules(const std::byte* from, int64_t bytes, absl::Span<uint64_t> hashes) {
  if (!hash_tried_) {
    hash_tried_ = true;
    const absl::StatusOr<std::string> cubin = CompileCudaSource(kHashSource, target_);
    CUmodule module = nullptr;
    if (cubin.ok() && driver_.cuModuleLoadDataEx(&module, cubin->data(), 0, nullptr, nullptr) == CUDA_SUCCESS) {
      modules_.push_back(module);
      Must(driver_.cuModuleGetFunction(&hash_, module, "mt_hash_granules"), "finding the kernel that hashes");
    }
  }
  static_assert(kGranuleBytes == 32 * sizeof(uint64_t));
  constexpr int64_t kThreads = 128, kMost = kStagingBytes / int64_t{sizeof(uint64_t)};
  const int64_t whole = hash_ == nullptr || Address(from) % sizeof(uint64_t) != 0 ? 0 : bytes / kGranuleBytes;
  for (int64_t done = 0; done < whole; done += kMost) {
    uint64_t count = static_cast<uint64_t>(std::min(kMost, whole - done));
    CUdeviceptr words = Address(from + done * kGranuleBytes), out = Address(staging_);
    void* arguments[] = {&words, &out, &count};
    Must(driver_.cuLaunchKernel(hash_, static_cast<unsigned>((static_cast<int64_t>(count) + kThreads - 1) / kThreads),
                                1, 1, kThreads, 1, 1, 0, stream_, arguments, nullptr),
         "launching the kernel that hashes");
    Synchronize();
    std::memcpy(hashes.data() + done, staging_, count * sizeof(uint64_t));
  }
  const int64_t rest = bytes - whole * kGranuleBytes;
  if (rest > 0) Backend::HashGranules(from + whole * kGranuleBytes, rest, hashes.subspan(static_cast<size_t>(whole)));
}

std::vector<double> CudaBackend::Time(int count, const std::function<void(int)>& run) {
  while (clock_.size() <= static_cast<size_t>(count)) {
    CUevent event = nullptr;
    Must(driver_.cuEventCreate(&event, CU_EVENT_DEFAULT), "making an event");
    clock_.push_back(event);
  }
  Must(driver_.cuEventRecord(clock_[0], stream_), "recording an event");
  for (int i = 0; i < count; ++i) {
    run(i);
    Must(driver_.cuEventRecord(clock_[static_cast<size_t>(i) + 1], stream_), "recording an event");
  }
  Synchronize();
  std::vector<double> times;
  for (int i = 0; i < count; ++i) {
    float milliseconds = 0;
    Must(driver_.cuEventElapsedTime(&milliseconds, clock_[0], clock_[static_cast<size_t>(i) + 1]), "reading the time");
    times.push_back(static_cast<double>(milliseconds) * 1e-3);
  }
  return times;
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

absl::Status CudaBackend::EncodeTensorMap(const proto::CudaTensorMapProto& map, CUdeviceptr at, CUtensorMap* to) const {
  const size_t rank = static_cast<size_t>(map.sizes_size());
  std::array<cuuint64_t, 5> sizes = {}, strides = {};
  std::array<cuuint32_t, 5> box = {}, steps = {1, 1, 1, 1, 1};
  for (size_t i = 0; i < rank; ++i) {
    const int d = static_cast<int>(i);
    sizes[i] = static_cast<cuuint64_t>(map.sizes(d));
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(map.strides(d - 1)) * 2;
    box[i] = static_cast<cuuint32_t>(map.box(d));
  }
  const CUtensorMapSwizzle swizzle = map.swizzle_bytes() == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : map.swizzle_bytes() == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : map.swizzle_bytes() == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                 : CU_TENSOR_MAP_SWIZZLE_NONE;
  return Status(driver_.cuTensorMapEncodeTiled(
                    to, map.dtype() == "bf16" ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                    static_cast<cuuint32_t>(rank), reinterpret_cast<void*>(at), sizes.data(), strides.data(),
                    box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
                "making a tensor map");
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
    std::vector<CUtensorMap> maps;
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
  bound->maps.resize(static_cast<size_t>(launch.maps_size()));
  for (size_t i = 0; i < bound->maps.size(); ++i) {
    const proto::CudaTensorMapProto& map = launch.maps(static_cast<int>(i));
    const size_t argument = static_cast<size_t>(map.argument());
    RETURN_IF_ERROR(EncodeTensorMap(map, bound->values[argument], &bound->maps[i]));
    bound->arguments[argument] = &bound->maps[i];
  }
  return Thunk([this, bound = std::move(bound)] {
    const Bound& b = *bound;
    Must(driver_.cuLaunchKernel(b.function, b.grid[0], b.grid[1], b.grid[2], b.block[0], b.block[1], b.block[2],
                                b.shared_bytes, stream_, const_cast<void**>(b.arguments.data()), nullptr),
         "launching a kernel");
  });
}

// Kernels read their operands and write their results and workspaces, which they may read as well.
std::vector<MemoryAccess> CudaBackend::AccessesOf(const KernelCall& call, const proto::CudaStepProto& step) const {
  std::vector<MemoryAccess> accesses;
  // `bytes` -1: up to the end of the operand, the result or the workspace.
  const auto add = [&](const proto::CudaPlaceProto& place, int64_t bytes, bool writes) {
    const uint64_t begin = PlaceOf(call, place);
    const size_t index = static_cast<size_t>(place.index());
    int64_t whole = call.workspace_bytes;
    if (place.base() == proto::CudaPlaceProto::OPERAND) whole = call.operands[index].type.byte_size();
    if (place.base() == proto::CudaPlaceProto::RESULT) whole = call.results[index].type.byte_size();
    accesses.push_back({begin, begin + static_cast<uint64_t>(bytes < 0 ? whole - place.byte_offset() : bytes), writes});
  };
  if (step.has_launch()) {
    for (const proto::CudaPlaceProto& place : step.launch().arguments()) {
      add(place, -1, place.base() != proto::CudaPlaceProto::OPERAND);
    }
  } else if (step.has_matmul()) {
    const proto::CudaMatmulProto& m = step.matmul();
    const auto span = [&](int64_t stride, int64_t elements, const std::string& dtype) {
      return ((m.batch() - 1) * stride + elements) * (dtype == "f32" ? 4 : 2);
    };
    const int64_t result_bytes = span(m.stride_d(), m.m() * m.n(), m.result_dtype());
    add(m.a(), span(m.stride_a(), m.m() * m.k(), m.dtype()), false);
    add(m.b(), span(m.stride_b(), m.k() * m.n(), m.dtype()), false);
    add(m.d(), result_bytes, true);
    if (m.has_bias()) add(m.bias(), span(0, m.n(), m.result_dtype()), false);
    if (m.has_accumulator()) add(m.accumulator(), result_bytes, false);
  } else if (step.has_fill()) {
    add(step.fill().place(), step.fill().bytes(), true);
  }
  return accesses;
}

void CudaBackend::WaitForSteps(const std::vector<int>& steps) {
  std::vector<CUgraphNode> nodes;
  for (const int step : steps) {
    const std::vector<CUgraphNode>& last = recording_->nodes[static_cast<size_t>(step)];
    nodes.insert(nodes.end(), last.begin(), last.end());
  }
  Must(driver_.cuStreamUpdateCaptureDependencies_v2(stream_, nodes.data(), nullptr, nodes.size(),
                                                    CU_STREAM_SET_CAPTURE_DEPENDENCIES),
       "ordering a graph");
}

void CudaBackend::RunStep(const Step& step) {
  if (recording_ == nullptr) return step.run();
  uint64_t bytes = 0;
  for (const MemoryAccess& access : step.accesses) bytes += access.end - access.begin;
  const bool is_large = step.is_matmul || bytes > kLargeBytes;
  const int number = recording_->dependencies.size();
  WaitForSteps(recording_->dependencies.Add(step.accesses, is_large ? recording_->last_large : -1));
  if (is_large) recording_->last_large = number;
  step.run();
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUgraphNode* last = nullptr;
  const void* edges = nullptr;
  size_t count = 0;
  Must(driver_.cuStreamGetCaptureInfo_v3(stream_, &status, nullptr, nullptr, &last, &edges, &count), "capturing");
  recording_->nodes.emplace_back(last, last + count);
}

absl::StatusOr<Thunk> CudaBackend::Bind(const KernelCall& call) {
  if (call.cuda == nullptr || call.cuda->steps().empty()) {
    return absl::FailedPreconditionError("the plan holds no device code for it; compile the plan again with this mtc");
  }
  std::vector<Step> steps;
  for (const proto::CudaStepProto& step : call.cuda->steps()) {
    std::vector<MemoryAccess> accesses = AccessesOf(call, step);
    Thunk run;
    if (step.has_launch()) {
      ASSIGN_OR_RETURN(run, BindLaunch(call, step.launch()));
    } else if (step.has_matmul()) {
      const proto::CudaMatmulProto& m = step.matmul();
      CudaMatmulPointers at;
      at.a = PlaceOf(call, m.a());
      at.b = PlaceOf(call, m.b());
      at.d = PlaceOf(call, m.d());
      if (m.has_bias()) at.bias = PlaceOf(call, m.bias());
      if (m.has_accumulator()) at.accumulator = PlaceOf(call, m.accumulator());
      if (m.workspace_bytes() > 0) at.workspace = PlaceOf(call, m.workspace());
      ASSIGN_OR_RETURN(std::shared_ptr<const CublasLtMatmul> matmul, cublaslt_->Bind(m, at, stream_));
      ASSIGN_OR_RETURN(std::string algorithm, matmul_timer_->Choose(m, at, *matmul));
      if (const int64_t bytes = matmul->WorkspaceBytes(algorithm); bytes > 0 && at.workspace != 0) {
        accesses.push_back({at.workspace, at.workspace + static_cast<uint64_t>(bytes), true});
      }
      run = [matmul = std::move(matmul), algorithm = std::move(algorithm)] {
        const absl::Status status = matmul->Run(algorithm);
        CHECK(status.ok()) << status;
      };
    } else if (step.has_fill()) {
      const CUdeviceptr at = PlaceOf(call, step.fill().place());
      const uint8_t value = static_cast<uint8_t>(step.fill().value());
      const size_t bytes = static_cast<size_t>(step.fill().bytes());
      run = [this, at, value, bytes] {
        Must(driver_.cuMemsetD8Async(at, value, bytes, stream_), "filling device memory");
      };
    } else {
      return absl::FailedPreconditionError("the plan holds a step of a kind that this mtrun does not know");
    }
    steps.push_back({std::move(run), std::move(accesses), step.has_matmul()});
  }
  return Thunk([this, steps = std::move(steps)] {
    for (const Step& step : steps) RunStep(step);
  });
}

absl::StatusOr<Thunk> CudaBackend::Capture(const std::vector<Thunk>& thunks) {
  matmul_timer_->Save();  // All of the program's matmuls are bound.
  RETURN_IF_ERROR(Status(driver_.cuStreamBeginCapture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "capturing"));
  Recording recording;
  if (driver_.cuStreamGetCaptureInfo_v3 != nullptr) recording_ = &recording;
  for (const Thunk& thunk : thunks) thunk();
  if (recording_ != nullptr) WaitForSteps(recording.dependencies.Leaves());
  recording_ = nullptr;
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

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index, CudaOptions options) {
  ASSIGN_OR_RETURN(const CudaDriver* driver, LoadCudaDriver());
  ASSIGN_OR_RETURN(CudaDeviceInfo info, DescribeCudaDevice(index));
  auto backend = std::make_unique<CudaBackend>(*driver, std::move(info), std::move(options));
  RETURN_IF_ERROR(backend->Open());
  return backend;
}

}  // namespace mt
