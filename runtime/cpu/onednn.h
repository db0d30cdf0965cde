// The one place that knows oneDNN: versions 2 and 3 differ in how a matmul is described.
#ifndef MT_RUNTIME_CPU_ONEDNN_H_
#define MT_RUNTIME_CPU_ONEDNN_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "ir/tensor_type.h"

namespace mt {

// c = a b (+ bias) (+ c), batch times, on the calling thread. Strides are in elements.
struct DnnMatmulShape {
  int64_t batch = 1, rows = 0, cols = 0, depth = 0;
  int64_t a_batch_stride = 0, a_row_stride = 0, a_col_stride = 0;
  int64_t b_batch_stride = 0, b_row_stride = 0, b_col_stride = 0;
  int64_t c_batch_stride = 0, c_row_stride = 0;
  DType a = DType::kF32, b = DType::kF32, c = DType::kF32, bias = DType::kF32;
  bool has_bias = false, accumulate = false;
};

class DnnMatmul {
 public:
  ~DnnMatmul();
  // `scratch_bytes`: what the caller can give; where this machine's implementation wants more, oneDNN keeps its own.
  // Errors: Unimplemented (no implementation for these types on this machine).
  static absl::StatusOr<std::unique_ptr<DnnMatmul>> Create(const DnnMatmulShape& shape, std::byte* a, std::byte* b,
                                                           std::byte* bias, std::byte* c, std::byte* scratch,
                                                           int64_t scratch_bytes);
  void Run();
  int64_t scratch_bytes() const;  // What the implementation wants.

 private:
  struct State;
  explicit DnnMatmul(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

std::string DnnVersion();  // "2.6.0"

}  // namespace mt

#endif  // MT_RUNTIME_CPU_ONEDNN_H_
