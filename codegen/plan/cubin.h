// What a cubin says of itself.
#ifndef MT_CODEGEN_PLAN_CUBIN_H_
#define MT_CODEGEN_PLAN_CUBIN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

struct CubinFunction {
  std::string name;
  int64_t registers = 0;     // Of a thread.
  int64_t shared_bytes = 0;  // Static, of a block; what the driver reserves for itself is not in it.
  int64_t stack_bytes = 0;   // Local memory of a thread: spilled registers, arrays that are indexed.
};

// The kernels of a cubin, in the order of its sections. Errors: InvalidArgument (not a cubin, or a section of it is not
// there as a whole).
absl::StatusOr<std::vector<CubinFunction>> CubinFunctions(absl::string_view cubin);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_CUBIN_H_
