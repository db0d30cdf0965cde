#include "codegen/report/peak.h"

#include <algorithm>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/report/names.h"
#include "ir/base/units.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

std::string TypeText(const proto::TensorTypeProto& type) {
  return absl::StrCat(type.dtype(), "[", absl::StrJoin(type.dims(), ","), "]");
}

}  // namespace

const proto::ProgramProto& LargestProgram(const proto::PlanProto& plan) {
  const proto::ProgramProto* largest = MainProgram(plan);
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.peak_bytes() > largest->peak_bytes()) largest = &program;
  }
  return *largest;
}

Peak LiveAt(const proto::PlanProto& plan, const proto::ProgramProto& program, int instruction) {
  Peak peak;
  peak.program = &program;
  peak.instruction = instruction;
  if (instruction < program.instructions_size()) {
    const proto::InstructionProto& at = program.instructions(instruction);
    peak.name = absl::StrCat(instruction, ": ", at.op(), at.name().empty() ? "" : " ", at.name());
  }

  // What each buffer holds: the tensor that was written to it last. Views hold what they view.
  struct Content {
    int tensor = -1;
    std::string op;
  };
  absl::flat_hash_map<int, Content> contents;  // By buffer.
  for (const proto::ProgramInput& input : program.inputs()) {
    contents[program.tensors(input.tensor()).buffer()] = {input.tensor(), ""};
  }
  for (int i = 0; i <= instruction && i < program.instructions_size(); ++i) {
    const OpDef* row = FindOp(program.instructions(i).op());
    if (row != nullptr && row->is_view) continue;
    for (const int t : program.instructions(i).results()) {
      contents[program.tensors(t).buffer()] = {t, program.instructions(i).op()};
    }
  }

  // Buffers alike: name without numbers, type, class.
  absl::flat_hash_map<std::tuple<std::string, std::string, int>, size_t> group_of;
  std::vector<std::vector<std::string>> names;
  std::vector<int> live = LiveBuffers(plan, program, instruction);
  std::sort(live.begin(), live.end());
  for (const int b : live) {
    const proto::BufferProto& buffer = plan.buffers(b);
    const int64_t bytes = AlignedBytes(plan, buffer.size_bytes());
    peak.by_class[At(buffer.memory_class() - 1)] += bytes;
    peak.live_bytes += bytes;
    LiveTensor tensor{.name = buffer.name(), .memory_class = buffer.memory_class(), .bytes = bytes, .buffers = {b}};
    const auto content = contents.find(b);
    if (content != contents.end()) {
      const proto::TensorProto& held = program.tensors(content->second.tensor);
      tensor.type = TypeText(held.type());
      if (buffer.program() != -1) {
        tensor.name = held.name();
        tensor.op = content->second.op;
      }
    } else if (buffer.program() == -1) {  // A state that this program does not name.
      for (const proto::StatePlacement& placement : plan.states()) {
        if (placement.buffer() == b) tensor.type = TypeText(placement.state().type());
      }
    }
    const auto [group, is_new] = group_of.try_emplace(
        {WithoutNumbers(tensor.name), tensor.type, static_cast<int>(tensor.memory_class)}, peak.tensors.size());
    if (is_new) {
      names.push_back({tensor.name});
      peak.tensors.push_back(std::move(tensor));
    } else {
      names[group->second].push_back(tensor.name);
      peak.tensors[group->second].bytes += bytes;
      peak.tensors[group->second].buffers.push_back(b);
    }
  }
  for (size_t i = 0; i < peak.tensors.size(); ++i) peak.tensors[i].name = CommonName(names[i]);
  std::stable_sort(peak.tensors.begin(), peak.tensors.end(),
                   [](const LiveTensor& a, const LiveTensor& b) { return a.bytes > b.bytes; });
  return peak;
}

Peak PeakOf(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  return LiveAt(plan, program, program.peak_instruction());
}

std::string LargestText(const Peak& peak, size_t count) {
  std::vector<std::string> texts;
  for (size_t i = 0; i < peak.tensors.size() && i < count; ++i) {
    const LiveTensor& tensor = peak.tensors[i];
    const int64_t each = tensor.bytes / tensor.count();
    texts.push_back(absl::StrCat(tensor.name, tensor.type.empty() ? "" : " ", tensor.type, " ", FormatBytes(each),
                                 tensor.count() > 1 ? absl::StrCat(" x ", tensor.count()) : ""));
  }
  return absl::StrJoin(texts, ", ");
}

}  // namespace mt
