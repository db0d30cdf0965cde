// What is live where a program takes the most memory: for inspect, reports and refusals.
#ifndef MT_CODEGEN_REPORT_PEAK_H_
#define MT_CODEGEN_REPORT_PEAK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "codegen/plan/plan.h"
#include "proto/plan.pb.h"

namespace mt {

// One buffer that is live at an instruction, or several alike: of one type and class, with names that differ in numbers
// alone ("h0.attn.probabilities" ... "h11.attn.probabilities" is "h*.attn.probabilities", 12 of them).
struct LiveTensor {
  std::string name;  // Of what the buffer holds at that instruction.
  std::string type;  // "f32[8,12,256,256]"; "" for a workspace.
  std::string op;    // "softmax": the op that wrote it; "" for inputs, states and workspaces.
  proto::MemoryClass memory_class = proto::MEMORY_CLASS_UNSPECIFIED;
  int64_t bytes = 0;         // Aligned, of all of them.
  std::vector<int> buffers;  // Indices into the plan's buffers, in order.
  int count() const { return static_cast<int>(buffers.size()); }
};

struct Peak {
  const proto::ProgramProto* program = nullptr;
  int instruction = 0;
  std::string name;                 // "57: softmax h3.attn.probabilities"
  ClassBytes by_class = {};         // Aligned bytes, states included.
  int64_t live_bytes = 0;           // Their sum; at the program's peak: its lower bound.
  std::vector<LiveTensor> tensors;  // Largest first, ties by first buffer; their bytes sum to live_bytes.
};

// The program that makes the arena as large as it is; the main one where several do. REQUIRES: a program.
const proto::ProgramProto& LargestProgram(const proto::PlanProto& plan);

// What is live at an instruction of a program of the plan. REQUIRES: a verified plan, an instruction of the program (or
// 0 where it has none).
Peak LiveAt(const proto::PlanProto& plan, const proto::ProgramProto& program, int instruction);

// At the program's peak. REQUIRES: a verified plan.
Peak PeakOf(const proto::PlanProto& plan, const proto::ProgramProto& program);

// The largest `count` of them: "logits f32[8,256,32000] 250.0 MiB, h*.up f32[8,256,512] 4.0 MiB x 4".
std::string LargestText(const Peak& peak, size_t count);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_PEAK_H_
