// What an op becomes on a CUDA device: kernel launches, matmuls and fills over its operands, results and workspace.
//
// An emitter is a row: op name -> function that writes the steps. Sources are CUDA C++ with every shape, stride, flag
// and constant as a literal; they begin with the text of prelude.cuh, which is included by name. A kernel takes nothing
// but pointers. It may use no more scratch than CudaWorkspaceBytes says, reads nothing that it did not write there
// before, and gives the same bits every time: no atomics on floats, sums as CutCudaSum cuts them.
#ifndef MT_CODEGEN_CUDA_KERNEL_H_
#define MT_CODEGEN_CUDA_KERNEL_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/op.h"
#include "ir/target.h"
#include "ir/tensor_type.h"
#include "proto/cuda.pb.h"

namespace mt {

// The instruction to be written.
struct CudaCall {
  Target target;
  const OpDef* op = nullptr;
  const Attrs* attrs = nullptr;
  absl::Span<const TensorType> operands, results;
  int64_t workspace_bytes = 0;
  bool portable = false;  // The form that every chip runs, also where the target has a faster one: for tests.
};

// A place in an operand, a result or the workspace.
struct CudaPlace {
  proto::CudaPlaceProto::Base base = proto::CudaPlaceProto::OPERAND;
  int index = 0;
  int64_t byte_offset = 0;
};
inline CudaPlace OperandPlace(int index, int64_t byte_offset = 0) {
  return {proto::CudaPlaceProto::OPERAND, index, byte_offset};
}
inline CudaPlace ResultPlace(int index, int64_t byte_offset = 0) {
  return {proto::CudaPlaceProto::RESULT, index, byte_offset};
}
inline CudaPlace WorkspacePlace(int64_t byte_offset = 0) { return {proto::CudaPlaceProto::WORKSPACE, 0, byte_offset}; }

struct CudaLaunch {
  std::string source;    // Of one translation unit, without the prelude's text.
  std::string function;  // extern "C" __global__.
  std::array<int64_t, 3> grid = {1, 1, 1}, block = {1, 1, 1};
  int64_t shared_bytes = 0;                     // Dynamic.
  std::vector<CudaPlace> arguments;             // Pointers lie side by side: a kernel may take them as one struct.
  std::vector<proto::CudaTensorMapProto> maps;  // Arguments that are tensor maps.
};

// The steps of one instruction, in order. Equal sources of a plan become one module.
class CudaSteps {
 public:
  void Launch(CudaLaunch launch);
  void Matmul(const proto::CudaMatmulProto& matmul);
  void Fill(CudaPlace place, int64_t bytes, uint8_t value);

  struct Step {
    proto::CudaStepProto proto;  // A launch's module is not set yet.
    std::string source;          // Of a launch.
  };
  const std::vector<Step>& steps() const { return steps_; }
  // Unimplemented where a launch has more blocks than a grid may have.
  const absl::Status& status() const { return status_; }

 private:
  std::vector<Step> steps_;
  absl::Status status_;
};
void SetPlace(CudaPlace place, proto::CudaPlaceProto& proto);

// Errors: Unimplemented (no kernel for these dtypes or sizes on this target; names the op and what there is).
using CudaEmitFn = absl::Status (*)(const CudaCall& call, CudaSteps& steps);
struct CudaEmitter {
  absl::string_view op;
  CudaEmitFn emit;
};

// Families, each in its own file; listed in emit.cc. Element-wise rows have no emitter of their own: they are regions
// of one expression (region_kernel.cc), as fused nodes are.
absl::Span<const CudaEmitter> CudaMatmulEmitters();     // matmul, chunked_loss and its gradients
absl::Span<const CudaEmitter> CudaRowEmitters();        // norms, softmax, loss
absl::Span<const CudaEmitter> CudaDataEmitters();       // moves of data, reductions, embedding, positions, heads
absl::Span<const CudaEmitter> CudaAttentionEmitters();  // flash_attention and its backward, cached_attention
absl::Span<const CudaEmitter> CudaOptimizerEmitters();  // global_norm, adam_step, 8-bit updates

// The steps of one instruction. Views have none. Errors: Unimplemented.
absl::StatusOr<CudaSteps> EmitCuda(const CudaCall& call);

// The text of one of the *.cuh beside this file. REQUIRES: it is there.
absl::string_view CudaText(absl::string_view file);
// prelude.cuh: dtype conversions (round to nearest even), 16-byte vectors, warp and block sums in a fixed order,
// Philox.
absl::string_view CudaPrelude();

}  // namespace mt

#endif  // MT_CODEGEN_CUDA_KERNEL_H_
