// What the driver's management library says of a device's memory; loaded when it is asked for, and not needed.
#ifndef MT_RUNTIME_CUDA_NVML_H_
#define MT_RUNTIME_CUDA_NVML_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace mt {

struct NvmlProcess {
  int64_t pid = 0;
  int64_t bytes = -1;  // -1: not told.
  std::string name;    // "" where it cannot be seen.
};

struct NvmlMemory {
  int64_t free_bytes = 0, total_bytes = 0;
  std::vector<NvmlProcess> processes;  // Those that compute, largest first.
};

// Of the device at this PCI address, "0000:18:00.0". Needs no context. Errors: Unavailable (no library, or it refuses).
absl::StatusOr<NvmlMemory> AskNvml(const std::string& pci_bus_id);

// Of the driver, "580.65.06"; "" where nobody says.
std::string DriverVersion();

// "held by python (process 4711): 120.5 GiB, process 5: 1.0 GiB"; "" where there is nobody to name.
std::string HoldersText(const NvmlMemory& memory);

}  // namespace mt

#endif  // MT_RUNTIME_CUDA_NVML_H_
