#include "runtime/cuda/driver.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "runtime/cuda/backend.h"

namespace mt {
namespace {

struct Loaded {
  absl::Status status;
  CudaDriver driver;
};

// Two macros, so that cuda.h's own names for versions are put in first.
#define MT_TEXT(name) #name
#define MT_SYMBOL(name) MT_TEXT(name)

Loaded Load() {
  Loaded loaded;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    loaded.status = absl::FailedPreconditionError(
        "there is no CUDA driver here (libcuda.so.1 cannot be loaded); run on a machine with an NVIDIA GPU, or compile "
        "with --target cpu");
    return loaded;
  }
  // CUDA 12.8 gave cuEventElapsedTime a second version with the same arguments; drivers before it have the first alone.
  const auto find = [&](const char* name, absl::string_view plain) {
    void* found = dlsym(library, name);
    return found == nullptr && plain == "cuEventElapsedTime" ? dlsym(library, "cuEventElapsedTime") : found;
  };
#define MT_LOOK_UP(name)                                                                                     \
  loaded.driver.name = reinterpret_cast<decltype(loaded.driver.name)>(find(MT_SYMBOL(name), #name));         \
  if (loaded.driver.name == nullptr) {                                                                       \
    loaded.status = absl::FailedPreconditionError(                                                           \
        absl::StrCat("the CUDA driver has no ", MT_SYMBOL(name), "; update it to one of CUDA 12 or later")); \
    return loaded;                                                                                           \
  }
  MT_CUDA_DRIVER_FUNCTIONS(MT_LOOK_UP)
#undef MT_LOOK_UP
  const CUresult result = loaded.driver.cuInit(0);
  if (result == CUDA_SUCCESS) return loaded;
  const char* text = nullptr;
  loaded.driver.cuGetErrorString(result, &text);
  loaded.status = absl::FailedPreconditionError(
      absl::StrCat("the CUDA driver does not start: ", text == nullptr ? "unknown error" : text,
                   "; look at nvidia-smi, or compile with --target cpu"));
  return loaded;
}

}  // namespace

absl::StatusOr<const CudaDriver*> LoadCudaDriver() {
  static const Loaded* loaded = new Loaded(Load());
  RETURN_IF_ERROR(loaded->status);
  return &loaded->driver;
}

absl::Status CudaStatus(const CudaDriver& driver, CUresult result, absl::string_view what) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char *name = nullptr, *text = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &text);
  const std::string message =
      absl::StrCat(what, ": ", text == nullptr ? "unknown error" : text, " (", name == nullptr ? "?" : name, ")");
  return result == CUDA_ERROR_OUT_OF_MEMORY ? absl::ResourceExhaustedError(message) : absl::InternalError(message);
}

absl::StatusOr<CudaDeviceInfo> DescribeCudaDevice(int index) {
  ASSIGN_OR_RETURN(const CudaDriver* driver, LoadCudaDriver());
  int count = 0;
  RETURN_IF_ERROR(CudaStatus(*driver, driver->cuDeviceGetCount(&count), "counting the devices"));
  if (count == 0) {
    return absl::FailedPreconditionError(
        "the CUDA driver has no device for this process; look at nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  if (index < 0 || index >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("device ", index, " does not exist; there ",
                     count == 1 ? "is 1 device: 0" : absl::StrCat("are ", count, " devices, from 0")));
  }
  CUdevice device;
  RETURN_IF_ERROR(CudaStatus(*driver, driver->cuDeviceGet(&device, index), absl::StrCat("opening device ", index)));
  CudaDeviceInfo info{.index = index};
  char name[256] = {};
  RETURN_IF_ERROR(CudaStatus(*driver, driver->cuDeviceGetName(name, sizeof(name) - 1, device), "naming the device"));
  info.name = name;
  int major = 0, minor = 0;
  for (const auto& [attribute, value] : {std::pair(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major),
                                         std::pair(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor),
                                         std::pair(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &info.processors)}) {
    RETURN_IF_ERROR(
        CudaStatus(*driver, driver->cuDeviceGetAttribute(value, attribute, device), "asking the device what it is"));
  }
  info.sm = major * 10 + minor;
  return info;
}

}  // namespace mt
