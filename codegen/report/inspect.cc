#include "codegen/report/inspect.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/plan.h"
#include "codegen/report/peak.h"
#include "codegen/report/tally.h"
#include "ir/base/json.h"
#include "ir/base/units.h"

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

// "f32 87 %, bf16 13 %" of each class that has bytes.
std::string DTypesLine(const proto::PlanProto& plan) {
  const ClassDTypes dtypes = DTypesOf(plan, *MainProgram(plan));
  std::vector<std::string> parts;
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    const std::string text = DTypesText(dtypes[static_cast<size_t>(c)]);
    if (!text.empty()) parts.push_back(absl::StrCat(MemoryClassName(MemoryClassAt(c)), " ", text));
  }
  return absl::StrJoin(parts, "; ");
}

// What the program repeats and what that costs, by kind of op; "" where it repeats nothing.
std::string RecomputedOps(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const Recomputation again = RecomputationOf(plan, program);
  if (again.count == 0) return "";
  const auto share = [&](double seconds) {
    return again.program_seconds > 0 ? 100 * seconds / again.program_seconds : 0.0;
  };
  std::string text =
      absl::StrFormat("  recomputed: %s ops, %.3f GFLOP, %s read and written, %.1f %% of the time (estimate)\n",
                      FormatCount(again.count), static_cast<double>(again.flops) * 1e-9, FormatBytes(again.bytes),
                      share(again.seconds));
  for (size_t i = 0; i < again.ops.size() && i < kLargest; ++i) {
    const Recomputed& op = again.ops[i];
    absl::StrAppendFormat(&text, "  %6d x  %5.2f %%  %10.3f GFLOP  %10s  %s %s\n", op.count, share(op.seconds),
                          static_cast<double>(op.flops) * 1e-9, FormatBytes(op.bytes), op.op, op.name);
  }
  if (again.ops.size() > kLargest) absl::StrAppend(&text, "  and ", again.ops.size() - kLargest, " more kinds\n");
  return text;
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
  const ProgramSummary main = SummarizeStep(plan);
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
  const Padding padding = PaddingOf(plan);
  const Recomputation again = RecomputationOf(plan, *MainProgram(plan));
  Json recomputed = Json::array();
  for (const Recomputed& op : again.ops) {
    recomputed.push_back({{"op", op.op},
                          {"node", op.name},
                          {"made_by", op.made_by},
                          {"count", op.count},
                          {"flops", op.flops},
                          {"bytes", op.bytes},
                          {"seconds", op.seconds}});
  }
  const ClassDTypes class_dtypes = DTypesOf(plan, *MainProgram(plan));
  Json dtypes = Json::object();
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    Json of_class = Json::object();
    for (const auto& [dtype, bytes] : class_dtypes[static_cast<size_t>(c)]) of_class[dtype] = bytes;
    dtypes[std::string(MemoryClassName(MemoryClassAt(c)))] = of_class;
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
        {"padding_bytes", padding.state_bytes},
        {"alignment_bytes", padding.alignment_bytes},
        {"by_class", by_class},
        {"by_phase", by_phase},
        {"by_program", by_program},
        {"peak_instruction", absl::StrCat(largest.name(), " ", at_peak.peak_name)}}},
      {"dtypes", dtypes},
      {"recomputed_ops", main.recomputed},
      {"recomputed",
       {{"flops", again.flops},
        {"bytes", again.bytes},
        {"seconds", again.seconds},
        {"program_seconds", again.program_seconds},
        {"ops", recomputed}}},
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
  const int64_t microbatches = Fact(plan, "microbatches");
  absl::StrAppendFormat(&text, "shape    batch %d%s, sequence %d\n", Fact(plan, "batch"),
                        microbatches > 0 ? absl::StrFormat(" in %d microbatches", microbatches) : "",
                        Fact(plan, "sequence"));
  absl::StrAppendFormat(&text, "target   %s\n", plan.target());
  absl::StrAppendFormat(&text, "passes   %s\n", plan.passes());
  absl::StrAppendFormat(&text, "arena    %s (%s bytes), %s\n", FormatBytes(plan.arena_bytes()),
                        FormatCount(plan.arena_bytes()),
                        ProofText(plan.arena_bytes(), plan.lower_bound_bytes(), plan.proof()));
  if (const int64_t padding = PaddingOf(plan).state_bytes; padding > 0) {
    absl::StrAppendFormat(&text, "padding  %s of the states (%s bytes), always zero\n", FormatBytes(padding),
                          FormatCount(padding));
  }
  absl::StrAppend(&text, "dtypes   ", DTypesLine(plan), "\n");
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
    text += RecomputedOps(plan, program);
  }
  return text;
}

}  // namespace mt
