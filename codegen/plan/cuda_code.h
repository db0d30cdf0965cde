// The device code of a plan as data: checked, and as text.
#ifndef MT_CODEGEN_PLAN_CUDA_CODE_H_
#define MT_CODEGEN_PLAN_CUDA_CODE_H_

#include <string>

#include "absl/status/status.h"
#include "proto/plan.pb.h"

namespace mt {

// Untrusted: one entry for each program and instruction; places inside the instruction's tensors and workspace, matmuls
// and fills wholly; steps of modules that exist; grids and blocks within what every device takes; checksums. A plan
// without device code is fine. What kernels do with their pointers cannot be checked: a plan with cubins is executable
// code. Errors: FailedPrecondition. REQUIRES: everything else of the plan was verified.
absl::Status VerifyCudaCode(const proto::PlanProto& plan);

// "mt_softmax<<<(16,1,1), (256,1,1), 0>>>(x0, y0) module 3", "matmul f32 1 x [5,7] [7,3] -> y0", "fill y0 64 bytes with
// 0".
std::string CudaStepText(const proto::CudaStepProto& step);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_CUDA_CODE_H_
