#include "codegen/inspect.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/peak.h"
#include "codegen/plan/plan.h"
#include "ir/base/units.h"
#include "nlohmann/json.hpp"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kLargest = 8;  // Tensors listed at a peak.

int64_t Fact(const proto::PlanProto& plan, const std::string& name) {
  const auto fact = plan.facts().find(name);
  return fact == plan.facts().end() ? 0 : fact->second;
}

std::string PhaseLabel(int phase) { return std::string(PhaseName(static_cast<Phase>(phase))); }

// The live range of one buffer, or of all of them where they share it.
std::string RangeText(const proto::PlanProto& plan, const LiveTensor& tensor) {
  const proto::BufferProto& first = plan.buffers(tensor.buffers[0]);
  if (first.program() == -1) return "always";
  int begin = first.first(), end = first.last();
  for (const int b : tensor.buffers) {
    begin = std::min(begin, plan.buffers(b).first());
    end = std::max(end, plan.buffers(b).last());
  }
  return absl::StrCat(begin, "-", end);
}

std::string LargestTensors(const proto::PlanProto& plan, const proto::ProgramProto& program, int instruction) {
  std::string text;
  const Peak peak = LiveAt(plan, program, instruction);
  for (size_t i = 0; i < peak.tensors.size() && i < kLargest; ++i) {
    const LiveTensor& tensor = peak.tensors[i];
    absl::StrAppendFormat(&text, "  %10s  %-16s %-12s %s  %s", FormatBytes(tensor.bytes),
                          MemoryClassName(tensor.memory_class), RangeText(plan, tensor), tensor.name, tensor.type);
    if (tensor.count() > 1) absl::StrAppend(&text, " x ", tensor.count());
    text += "\n";
  }
  return text;
}

}  // namespace

std::string ProofText(int64_t bytes, int64_t lower_bound_bytes, const std::string& proof) {
  const double ratio =
      lower_bound_bytes == 0 ? 1.0 : static_cast<double>(bytes) / static_cast<double>(lower_bound_bytes);
  const std::string why = proof == "lower_bound" ? "the most bytes live at once: no plan over this order is smaller"
                                                 : absl::StrCat("lower bound ", FormatBytes(lower_bound_bytes), ", ",
                                                                proof == "exhausted" ? "proven minimal by search"
                                                                                     : "a smaller one is not excluded");
  return absl::StrFormat("%.4f of the lower bound (%s)", ratio, why);
}

std::string PlanJson(const proto::PlanProto& plan) {
  const proto::ProgramProto& largest = LargestProgram(plan);
  const ProgramSummary at_peak = Summarize(plan, largest);
  const ProgramSummary main = Summarize(plan, *MainProgram(plan));
  Json by_class = Json::object();
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    by_class[std::string(MemoryClassName(MemoryClassAt(c)))] = at_peak.at_peak[static_cast<size_t>(c)];
  }
  Json by_phase = Json::object();
  for (int p = 0; p < kNumPhases; ++p) {
    const PhaseSummary& phase = main.phases[static_cast<size_t>(p)];
    by_phase[PhaseLabel(p)] = {{"live_bytes", phase.live_bytes}, {"written_bytes", phase.written_bytes}};
  }
  Json by_program = Json::object();
  for (const proto::ProgramProto& program : plan.programs()) {
    const ProgramSummary summary = Summarize(plan, program);
    by_program[program.name()] = {{"peak_bytes", summary.peak_bytes},
                                  {"lower_bound_bytes", summary.lower_bound_bytes},
                                  {"proof", summary.proof},
                                  {"peak_instruction", summary.peak_name},
                                  {"instructions", summary.instructions}};
  }
  const Json json = {
      {"model", {{"name", plan.model()}, {"parameters", Fact(plan, "parameters")}}},
      {"target", plan.target()},
      {"batch", Fact(plan, "batch")},
      {"seq", Fact(plan, "sequence")},
      {"passes", plan.passes()},
      {"memory",
       {{"peak_bytes", plan.arena_bytes()},
        {"lower_bound_bytes", plan.lower_bound_bytes()},
        {"proof", plan.proof()},
        {"persistent_bytes", plan.persistent_bytes()},
        {"by_class", by_class},
        {"by_phase", by_phase},
        {"by_program", by_program},
        {"peak_instruction", absl::StrCat(largest.name(), " ", at_peak.peak_name)}}},
      {"recomputed_ops", main.recomputed},
      {"flops", main.flops},
      {"bytes", main.bytes},
      {"instructions", main.instructions},
      {"compile_seconds", plan.compile_seconds()},
  };
  // Names come from files: bytes that are no UTF-8 are replaced.
  return absl::StrCat(json.dump(2, ' ', false, Json::error_handler_t::replace), "\n");
}

std::string PlanTable(const proto::PlanProto& plan) {
  std::string text;
  absl::StrAppendFormat(&text, "model    %s, %s parameters\n", plan.model(), FormatCount(Fact(plan, "parameters")));
  absl::StrAppendFormat(&text, "shape    batch %d, sequence %d\n", Fact(plan, "batch"), Fact(plan, "sequence"));
  absl::StrAppendFormat(&text, "target   %s\n", plan.target());
  absl::StrAppendFormat(&text, "passes   %s\n", plan.passes());
  absl::StrAppendFormat(&text, "arena    %s (%s bytes), %s\n", FormatBytes(plan.arena_bytes()),
                        FormatCount(plan.arena_bytes()),
                        ProofText(plan.arena_bytes(), plan.lower_bound_bytes(), plan.proof()));
  for (const proto::ProgramProto& program : plan.programs()) {
    const ProgramSummary summary = Summarize(plan, program);
    absl::StrAppendFormat(&text, "\n%s: %s at %s\n", program.name(), FormatBytes(summary.peak_bytes),
                          summary.peak_name);
    absl::StrAppendFormat(&text, "  %s instructions", FormatCount(summary.instructions));
    if (summary.recomputed > 0) absl::StrAppendFormat(&text, ", %s recomputed", FormatCount(summary.recomputed));
    absl::StrAppendFormat(&text, ", %.3f GFLOP, %s read and written; %s\n", static_cast<double>(summary.flops) * 1e-9,
                          FormatBytes(summary.bytes),
                          ProofText(summary.peak_bytes, summary.lower_bound_bytes, summary.proof));
    std::vector<int> phases;
    for (int p = 0; p < kNumPhases; ++p) {
      if (summary.phases[static_cast<size_t>(p)].peak_instruction >= 0) phases.push_back(p);
    }
    // A phase's column is at the phase's own peak, so that every column adds up.
    absl::StrAppendFormat(&text, "  %-16s %12s", "live bytes", "at peak");
    for (const int p : phases) absl::StrAppendFormat(&text, " %12s", PhaseLabel(p));
    text += "\n";
    const auto row = [&](absl::string_view label, int64_t at_peak, auto of_phase) {
      absl::StrAppendFormat(&text, "  %-16s %12s", label, at_peak < 0 ? "" : FormatBytes(at_peak));
      for (const int p : phases) {
        absl::StrAppendFormat(&text, " %12s", FormatBytes(of_phase(summary.phases[static_cast<size_t>(p)])));
      }
      text += "\n";
    };
    for (size_t c = 0; c < kNumMemoryClasses; ++c) {
      row(MemoryClassName(MemoryClassAt(static_cast<int>(c))), summary.at_peak[c],
          [&](const PhaseSummary& phase) { return phase.at_peak[c]; });
    }
    row("sum", Sum(summary.at_peak), [](const PhaseSummary& phase) { return phase.live_bytes; });
    row("written", -1, [](const PhaseSummary& phase) { return phase.written_bytes; });
    absl::StrAppend(&text, "  largest live at the peak\n", LargestTensors(plan, program, summary.peak_instruction));
  }
  return text;
}

}  // namespace mt
