// What a plan costs, for people and for programs.
#ifndef MT_CODEGEN_REPORT_INSPECT_H_
#define MT_CODEGEN_REPORT_INSPECT_H_

#include <string>

#include "proto/plan.pb.h"

namespace mt {

// The keys of `mtc inspect --json`. Every number of bytes or of things is an integer.
//   by_class: aligned bytes live at the instruction that makes the arena as large as it is; they sum to that program's
//   lower bound. by_phase: of the main program ("train"); live_bytes is the most at one instruction of the phase,
//   states included; written_bytes are whole granules of the alignment. flops, bytes, instructions, dtypes (bytes of
//   all buffers), recomputed_ops, recomputed (with seconds at the target's roofline): of one run of the main program.
// REQUIRES: a verified plan. The text ends with a line break.
std::string PlanJson(const proto::PlanProto& plan);

// A table by class and phase for each program, with the peak, the largest live tensors, what is recomputed
// and its cost, the gap and its proof.
// REQUIRES: a verified plan.
std::string PlanTable(const proto::PlanProto& plan);

// "1.0000 of the lower bound (proven: no plan over this order is smaller)"
std::string ProofText(int64_t bytes, int64_t lower_bound_bytes, const std::string& proof);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_INSPECT_H_
