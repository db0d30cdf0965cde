#include "runtime/cuda/driver.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "codegen/plan/gpu.h"
#include "ir/base/status_macros.h"

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
  const absl::StatusOr<void*> library = OpenCudaLibrary();
  loaded.status = library.status();
  if (!loaded.status.ok()) return loaded;
  // CUDA 12.8 gave cuEventElapsedTime a second version with the same arguments; drivers before it have the first alone.
  const auto find = [&](const char* name, absl::string_view plain) {
    void* found = dlsym(*library, name);
    return found == nullptr && plain == "cuEventElapsedTime" ? dlsym(*library, "cuEventElapsedTime") : found;
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
#define MT_LOOK_UP(name) loaded.driver.name = reinterpret_cast<decltype(loaded.driver.name)>(dlsym(*library, #name));
  MT_LOOK_UP(cuStreamGetCaptureInfo_v3)
  MT_LOOK_UP(cuStreamUpdateCaptureDependencies_v2)
#undef MT_LOOK_UP
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

}  // namespace mt
