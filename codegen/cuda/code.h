// The device code of a plan: every instruction's steps, their sources as modules, compiled where a compiler is.
#ifndef MT_CODEGEN_CUDA_CODE_H_
#define MT_CODEGEN_CUDA_CODE_H_

#include <string>

#include "absl/status/status.h"
#include "proto/plan.pb.h"

namespace mt {

struct CudaCodeReport {
  int modules = 0, launches = 0, matmuls = 0, fills = 0;
  double emit_seconds = 0, compile_seconds = 0;
  std::string warning;  // Why there are no cubins, or why they are not kept; "" where all is well.
};

// Fills plan.cuda with steps and sources, without cubins. `portable`: as CudaCall has it. REQUIRES and errors: as
// AddCudaCode.
absl::Status EmitCudaCode(proto::PlanProto& plan, CudaCodeReport* report = nullptr, bool portable = false);

// Fills plan.cuda. Equal sources are one module, and so are short ones; modules are compiled side by side. Without
// NVRTC the plan holds sources alone. With `dump_dir`, each module's source is written to dump_dir/cuda, with a table
// of what its functions take. REQUIRES: a plan for a CUDA target that PlanModule made. Errors: Unimplemented (no kernel
// for an instruction; names it), Internal (a source does not compile).
absl::Status AddCudaCode(proto::PlanProto& plan, const std::string& dump_dir, CudaCodeReport* report = nullptr,
                         bool portable = false);

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_CODE_H_
