#include "codegen/plan/gpu.h"

#include <dlfcn.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"

namespace mt {

#ifndef MT_HAS_CUDA

absl::StatusOr<void*> OpenCudaLibrary() {
  return absl::UnimplementedError(
      "this program was built without CUDA (MT_CUDA); build it where the toolkit's headers are, or compile the plan "
      "with --target cpu");
}
absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int) { return OpenCudaLibrary().status(); }

#else

namespace {

// Of the driver's stable interface.
constexpr int kMultiprocessorCount = 16, kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;

absl::StatusOr<void*> Open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(
        "there is no CUDA driver here (libcuda.so.1 cannot be loaded); run on a machine with an NVIDIA GPU, or compile "
        "with --target cpu");
  }
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(library, "cuInit"));
  const int result = init == nullptr ? -1 : init(0);
  if (result == 0) return library;
  const char* text = nullptr;
  const auto explain = reinterpret_cast<int (*)(int, const char**)>(dlsym(library, "cuGetErrorString"));
  if (explain != nullptr) explain(result, &text);
  return absl::FailedPreconditionError(
      absl::StrCat("the CUDA driver does not start: ", text == nullptr ? "unknown error" : text,
                   "; look at nvidia-smi, or compile with --target cpu"));
}

}  // namespace

absl::StatusOr<void*> OpenCudaLibrary() {
  static const absl::StatusOr<void*>& library = *new absl::StatusOr<void*>(Open());
  return library;
}

absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int index) {
  ASSIGN_OR_RETURN(void* library, OpenCudaLibrary());
  const auto get_count = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDeviceGetCount"));
  const auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(library, "cuDeviceGet"));
  const auto get_name = reinterpret_cast<int (*)(char*, int, int)>(dlsym(library, "cuDeviceGetName"));
  const auto get_attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(library, "cuDeviceGetAttribute"));
  int count = 0;
  if (get_count == nullptr || get == nullptr || get_name == nullptr || get_attribute == nullptr ||
      get_count(&count) != 0 || count == 0) {
    return absl::FailedPreconditionError(
        "the CUDA driver has no device for this process; look at nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  if (index < 0 || index >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("device ", index, " does not exist; there ",
                     count == 1 ? "is 1 device: 0" : absl::StrCat("are ", count, " devices, from 0")));
  }
  int device = 0, major = 0, minor = 0, processors = 0;
  char name[256] = {};
  if (get(&device, index) != 0 || get_name(name, sizeof(name) - 1, device) != 0 ||
      get_attribute(&major, kComputeCapabilityMajor, device) != 0 ||
      get_attribute(&minor, kComputeCapabilityMinor, device) != 0 ||
      get_attribute(&processors, kMultiprocessorCount, device) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the CUDA driver does not describe device ", index, "; look at nvidia-smi"));
  }
  return CudaDeviceInfo{.index = index, .name = name, .sm = major * 10 + minor, .processors = processors};
}

#endif  // MT_HAS_CUDA

}  // namespace mt
