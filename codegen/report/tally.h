// What a plan recomputes, pads and computes in: for inspect and reports.
#ifndef MT_CODEGEN_REPORT_TALLY_H_
#define MT_CODEGEN_REPORT_TALLY_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "codegen/plan/plan.h"
#include "proto/plan.pb.h"

namespace mt {

// Instructions that repeat earlier ones: of one op, with names that differ in numbers alone.
struct Recomputed {
  std::string op, name;  // "layer_norm", "h*.norm1"
  std::string made_by;   // The pass that made the op, which remat repeats; "": the model.
  int count = 0;
  int64_t flops = 0, bytes = 0;  // Of all of them; bytes read and written.
  double seconds = 0;            // At the target's roofline.
};

// What a program recomputes, the most seconds first.
struct Recomputation {
  std::vector<Recomputed> ops;
  int count = 0;
  int64_t flops = 0, bytes = 0;
  double seconds = 0;          // Of `ops`.
  double program_seconds = 0;  // Of the whole program, with them.
};
// REQUIRES: a verified plan.
Recomputation RecomputationOf(const proto::PlanProto& plan, const proto::ProgramProto& program);

struct Padding {
  int64_t state_bytes = 0;      // Of states, past what a user sees of them: a vocabulary made a multiple of 64.
  int64_t alignment_bytes = 0;  // Behind buffers that are live at the peak of the largest program.
};
// REQUIRES: a verified plan.
Padding PaddingOf(const proto::PlanProto& plan);

// By class: dtype and its bytes, over all buffers of the states and of the program (a buffer counts as what its first
// tensor is), the most bytes first. Workspaces have none.
using ClassDTypes = std::array<std::vector<std::pair<std::string, int64_t>>, kNumMemoryClasses>;
// REQUIRES: a verified plan.
ClassDTypes DTypesOf(const proto::PlanProto& plan, const proto::ProgramProto& program);
// "bf16 87 %, f32 13 %"; "" where there are none.
std::string DTypesText(const std::vector<std::pair<std::string, int64_t>>& dtypes);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_TALLY_H_
