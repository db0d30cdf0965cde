#include "codegen/report/tally.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "codegen/report/names.h"
#include "codegen/report/peak.h"
#include "ir/base/check.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/target.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

TensorType TypeOf(const proto::TensorTypeProto& proto) {
  const absl::StatusOr<TensorType> type = TypeFromProto(proto);
  CHECK(type.ok()) << type.status();
  return *type;
}

}  // namespace

Recomputation RecomputationOf(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const absl::StatusOr<Target> target = ParseTarget(plan.target());
  const Roofline roofline = TargetRoofline(target.value_or(Target{}));
  Recomputation all;
  std::map<std::tuple<std::string, std::string, std::string>, size_t> group_of;
  std::vector<std::vector<std::string>> names;
  for (const proto::InstructionProto& instruction : program.instructions()) {
    const double seconds = InstructionSeconds(program, instruction, roofline);
    all.program_seconds += seconds;
    const OpDef* op = FindOp(instruction.op());
    if (!instruction.recompute() || (op != nullptr && op->is_view)) continue;
    const auto [group, is_new] = group_of.try_emplace(
        {instruction.op(), WithoutNumbers(instruction.name()), instruction.made_by()}, all.ops.size());
    if (is_new) {
      all.ops.push_back({.op = instruction.op(), .made_by = instruction.made_by()});
      names.emplace_back();
    }
    Recomputed& ops = all.ops[group->second];
    names[group->second].push_back(instruction.name());
    ++ops.count;
    ops.flops += instruction.flops();
    ops.bytes += instruction.bytes();
    ops.seconds += seconds;
    ++all.count;
    all.flops += instruction.flops();
    all.bytes += instruction.bytes();
    all.seconds += seconds;
  }
  for (size_t i = 0; i < all.ops.size(); ++i) all.ops[i].name = CommonName(names[i]);
  std::stable_sort(all.ops.begin(), all.ops.end(),
                   [](const Recomputed& a, const Recomputed& b) { return a.seconds > b.seconds; });
  return all;
}

Padding PaddingOf(const proto::PlanProto& plan) {
  Padding padding;
  for (const proto::StatePlacement& placement : plan.states()) {
    const TensorType type = TypeOf(placement.state().type());
    TensorType logical = type;
    if (placement.state().logical_dims_size() > 0) {
      logical.dims.assign(placement.state().logical_dims().begin(), placement.state().logical_dims().end());
    }
    padding.state_bytes += type.byte_size() - logical.byte_size();
  }
  if (plan.programs().empty()) return padding;
  const proto::ProgramProto& largest = LargestProgram(plan);
  for (const int b : LiveBuffers(plan, largest, largest.peak_instruction())) {
    const int64_t bytes = plan.buffers(b).size_bytes();
    padding.alignment_bytes += AlignedBytes(plan, bytes) - bytes;
  }
  return padding;
}

ClassDTypes DTypesOf(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  std::array<std::map<std::string, int64_t>, kNumMemoryClasses> bytes;
  const auto add = [&](int buffer, const std::string& dtype) {
    const int c = plan.buffers(buffer).memory_class() - 1;
    if (c >= 0 && c < kNumMemoryClasses) bytes[At(c)][dtype] += plan.buffers(buffer).size_bytes();
  };
  for (const proto::StatePlacement& placement : plan.states()) {
    add(placement.buffer(), placement.state().type().dtype());
  }
  std::vector<bool> seen(At(plan.buffers_size()), false);
  for (const proto::TensorProto& tensor : program.tensors()) {
    if (plan.buffers(tensor.buffer()).program() == -1 || seen[At(tensor.buffer())]) continue;
    seen[At(tensor.buffer())] = true;
    add(tensor.buffer(), tensor.type().dtype());
  }
  ClassDTypes dtypes;
  for (size_t c = 0; c < kNumMemoryClasses; ++c) {
    dtypes[c].assign(bytes[c].begin(), bytes[c].end());
    std::stable_sort(dtypes[c].begin(), dtypes[c].end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
  }
  return dtypes;
}

std::string DTypesText(const std::vector<std::pair<std::string, int64_t>>& dtypes) {
  double all = 0;
  for (const auto& [dtype, bytes] : dtypes) all += static_cast<double>(bytes);
  return absl::StrJoin(dtypes, ", ", [&](std::string* text, const std::pair<std::string, int64_t>& part) {
    absl::StrAppend(text, part.first);
    if (dtypes.size() == 1) return;
    const double percent = all == 0 ? 0 : 100.0 * static_cast<double>(part.second) / all;
    absl::StrAppend(text, " ", percent < 1 ? "< 1" : absl::StrFormat("%.0f", percent), " %");
  });
}

}  // namespace mt
