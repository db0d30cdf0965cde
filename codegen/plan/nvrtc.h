// CUDA C++ to cubins by NVRTC, which is opened where it is installed: nothing links to it. With the cache on disk.
#ifndef MT_CODEGEN_PLAN_NVRTC_H_
#define MT_CODEGEN_PLAN_NVRTC_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/target.h"

namespace mt {

// "nvrtc 13.0". Errors: Unimplemented (built without CUDA), NotFound (no library; names those that were tried).
absl::StatusOr<std::string> CudaCompilerVersion();

// Compiles one translation unit for the target (cuda:sm_90 to sm_90a), without contraction. Looks in the cache first
// and puts the cubin there: $XDG_CACHE_HOME/mt/cubins or ~/.cache/mt/cubins, keyed by source, architecture and compiler
// version. Errors: as above, Internal (the source does not compile: our bug; with the first error). Any thread.
absl::StatusOr<std::string> CompileCudaSource(absl::string_view source, const Target& target);

// Why cubins could not be kept, if they could not: one line. For a warning.
std::string CudaCacheProblem();

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_NVRTC_H_
