// The plan library: a plan in memory is the proto itself; here are its file, its text form and its sums.
//
// The file is 32 bytes of header (magic "mtplan\r\n", u32 version, u32 zero, u64 payload length, u64 FNV-1a of the
// payload; all little-endian), then the PlanProto. Equal plans give equal bytes.
//
// How a program is read: `tensors` are typed views of buffers. Instructions run in order; one of a view op
// (OpDef::is_view) runs no code: its result is another tensor of its operand's buffer. Results that share the buffer of
// an operand are computed in place. Time is the index of the instruction.
#ifndef MT_CODEGEN_PLAN_PLAN_H_
#define MT_CODEGEN_PLAN_PLAN_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/cost.h"
#include "ir/graph.h"
#include "proto/plan.pb.h"

namespace mt {

inline constexpr int32_t kPlanVersion = 1;
inline constexpr int64_t kPlanAlignment = 256;
// Limits on what a file may hold; a larger plan is refused by SavePlan as well.
inline constexpr int64_t kMaxPlanBytes = int64_t{256} << 20;
inline constexpr int64_t kMaxArenaBytes = int64_t{1} << 50;

std::string SerializePlan(const proto::PlanProto& plan);

// Checks magic, version, length and checksum, not the contents: see VerifyPlan. `name` is for messages.
// Errors: FailedPrecondition (not a plan, other version, truncated, edited, too large), each by name.
absl::StatusOr<proto::PlanProto> ParsePlan(absl::string_view bytes, absl::string_view name);

// Whether `bytes` begin like a plan file; the first 8 bytes are enough.
bool LooksLikePlan(absl::string_view bytes);

// Errors: DataLoss (failed write; nothing is left behind), ResourceExhausted (larger than kMaxPlanBytes).
absl::Status SavePlan(const proto::PlanProto& plan, const std::string& path);

// ReadFile, ParsePlan, VerifyPlan. Errors: NotFound, and FailedPrecondition for everything that is wrong with the file.
absl::StatusOr<proto::PlanProto> LoadPlan(const std::string& path);

// The text form, for people and golden files: arena, buffers with offsets and live ranges, one instruction a line.
// Leaves out what differs from run to run (compile_seconds, compiler).
std::string PlanText(const proto::PlanProto& plan);

// "parameters", "gradients", "optimizer_state", "activations", "workspace", "io"; in the order of the enum.
inline constexpr int kNumMemoryClasses = 6;
absl::string_view MemoryClassName(proto::MemoryClass memory_class);
// The class with index 0 ... kNumMemoryClasses - 1.
inline proto::MemoryClass MemoryClassAt(int index) { return static_cast<proto::MemoryClass>(index + 1); }

// The class of a state's buffer. REQUIRES: IsState(role).
proto::MemoryClass StateClass(Role role);

inline constexpr int kNumPhases = 3;  // In the order of Phase.

// Null where there is none.
const proto::ProgramProto* FindProgram(const proto::PlanProto& plan, absl::string_view name);
// "train" where there is one, else the first. Null for a plan without programs.
const proto::ProgramProto* MainProgram(const proto::PlanProto& plan);

// Offset of the tensor's first byte in the arena.
inline int64_t TensorOffset(const proto::PlanProto& plan, const proto::TensorProto& tensor) {
  return plan.buffers(tensor.buffer()).offset() + tensor.byte_offset();
}

// `bytes` rounded up to the plan's alignment: what a buffer takes in the arena.
int64_t AlignedBytes(const proto::PlanProto& plan, int64_t bytes);

// Bytes [first, second) of the arena, multiples of the alignment.
using ByteRange = std::pair<int64_t, int64_t>;

// The union of what the instructions of one phase write (results, and workspaces if `workspace`), widened to whole
// granules of the alignment, sorted and merged. What the host writes (batches, step inputs) is not in it.
// REQUIRES: a verified plan.
std::vector<ByteRange> WrittenRanges(const proto::PlanProto& plan, const proto::ProgramProto& program, Phase phase,
                                     bool workspace);

// Aligned bytes, by class.
using ClassBytes = std::array<int64_t, kNumMemoryClasses>;
int64_t Sum(const ClassBytes& bytes);

struct PhaseSummary {
  int instructions = 0;       // Those that run code.
  ClassBytes at_peak = {};    // Live at the phase's own peak instruction, states included.
  int peak_instruction = -1;  // -1: the phase has no instructions.
  int64_t live_bytes = 0;     // Sum of at_peak.
  int64_t written_bytes = 0;  // Of WrittenRanges with workspaces.
};

struct ProgramSummary {
  std::string name;
  int64_t peak_bytes = 0, lower_bound_bytes = 0;
  std::string proof;
  ClassBytes at_peak = {};  // Live at peak_instruction, states included; sums to lower_bound_bytes.
  int peak_instruction = 0;
  std::string peak_name;  // "57: softmax h3.attn.probabilities"
  std::array<PhaseSummary, kNumPhases> phases;
  int instructions = 0;  // Those that run code.
  int recomputed = 0;
  int64_t flops = 0, bytes = 0;
};

// REQUIRES: a verified plan.
ProgramSummary Summarize(const proto::PlanProto& plan, const proto::ProgramProto& program);

// Of one optimizer step: the main program, where it accumulates once for each microbatch in FLOPs and bytes, and then
// "apply", which has the optimizer's phase. REQUIRES: a verified plan with programs.
ProgramSummary SummarizeStep(const proto::PlanProto& plan);

// A state's shape as a user sees it, without padding.
std::vector<int64_t> LogicalDims(const proto::StateProto& state);

// At the roofline, by the dtypes that the op multiplies. 0 for a view. REQUIRES: a verified plan.
double InstructionSeconds(const proto::ProgramProto& program, const proto::InstructionProto& instruction,
                          const Roofline& roofline);

// Seconds that the FLOPs of one optimizer step take at the target's rates, those of recomputed instructions left out:
// model FLOPs utilization is these over the seconds that a step takes (PaLM, arXiv:2204.02311, appendix B). 0 for the
// CPU, whose rate is not known. REQUIRES: a verified plan.
double ModelSeconds(const proto::PlanProto& plan);

// The buffers live at an instruction, largest first (ties: by index).
std::vector<int> LiveBuffers(const proto::PlanProto& plan, const proto::ProgramProto& program, int instruction);

}  // namespace mt

#endif  // MT_CODEGEN_PLAN_PLAN_H_
