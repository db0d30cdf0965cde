#include "runtime/cuda/nvml.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "ir/base/file.h"
#include "ir/base/units.h"

namespace mt {
namespace {

// Of nvml.h, which comes with drivers and not with every toolkit: the stable part of its interface.
struct MemoryInfo {
  unsigned long long total, free, used;
};
struct ProcessInfo {
  unsigned pid;
  unsigned long long used_bytes;  // All ones: not known.
  unsigned gpu_instance, compute_instance;
};
struct Functions {
  int (*init)();
  int (*device_by_bus_id)(const char*, void**);
  int (*memory_info)(void*, MemoryInfo*);
  int (*processes)(void*, unsigned*, ProcessInfo*);
  int (*driver_version)(char*, unsigned);
};
constexpr size_t kMostNamed = 4;

// Null where there is no library.
const Functions* Load() {
  static const Functions* loaded = []() -> const Functions* {
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    auto* f = new Functions;
    f->init = reinterpret_cast<decltype(f->init)>(dlsym(library, "nvmlInit_v2"));
    f->device_by_bus_id =
        reinterpret_cast<decltype(f->device_by_bus_id)>(dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
    f->memory_info = reinterpret_cast<decltype(f->memory_info)>(dlsym(library, "nvmlDeviceGetMemoryInfo"));
    f->processes = reinterpret_cast<decltype(f->processes)>(dlsym(library, "nvmlDeviceGetComputeRunningProcesses_v3"));
    f->driver_version = reinterpret_cast<decltype(f->driver_version)>(dlsym(library, "nvmlSystemGetDriverVersion"));
    const bool complete = f->init != nullptr && f->device_by_bus_id != nullptr && f->memory_info != nullptr;
    return complete && f->init() == 0 ? f : nullptr;
  }();
  return loaded;
}

}  // namespace

absl::StatusOr<NvmlMemory> AskNvml(const std::string& pci_bus_id) {
  const Functions* nvml = Load();
  void* device = nullptr;
  MemoryInfo info = {};
  if (nvml == nullptr || nvml->device_by_bus_id(pci_bus_id.c_str(), &device) != 0 ||
      nvml->memory_info(device, &info) != 0) {
    return absl::UnavailableError("NVML does not answer");
  }
  NvmlMemory memory = {.free_bytes = static_cast<int64_t>(info.free), .total_bytes = static_cast<int64_t>(info.total)};
  ProcessInfo processes[64] = {};
  unsigned count = std::size(processes);
  if (nvml->processes == nullptr || nvml->processes(device, &count, processes) != 0) count = 0;
  for (unsigned i = 0; i < count; ++i) {
    NvmlProcess process = {.pid = processes[i].pid};
    if (processes[i].used_bytes != ~0ull) process.bytes = static_cast<int64_t>(processes[i].used_bytes);
    const std::string name = absl::StrCat("/proc/", process.pid, "/comm");
    process.name = std::string(absl::StripAsciiWhitespace(ReadFile(name, 256).value_or("")));
    memory.processes.push_back(std::move(process));
  }
  std::stable_sort(memory.processes.begin(), memory.processes.end(),
                   [](const NvmlProcess& a, const NvmlProcess& b) { return a.bytes > b.bytes; });
  return memory;
}

std::string DriverVersion() {
  const Functions* nvml = Load();
  char version[80] = {};
  if (nvml == nullptr || nvml->driver_version == nullptr) return "";
  return nvml->driver_version(version, sizeof(version) - 1) == 0 ? version : "";
}

std::string HoldersText(const NvmlMemory& memory) {
  std::string text;
  size_t named = 0;
  for (const NvmlProcess& process : memory.processes) {
    if (process.pid == getpid()) continue;
    if (named++ == kMostNamed) {
      absl::StrAppend(&text, ", ...");
      break;
    }
    absl::StrAppend(&text, named == 1 ? "held by " : ", ",
                    process.name.empty() ? absl::StrCat("process ", process.pid)
                                         : absl::StrCat(process.name, " (process ", process.pid, ")"),
                    process.bytes < 0 ? "" : absl::StrCat(": ", FormatBytes(process.bytes)));
  }
  return text;
}

}  // namespace mt
