#include "runtime/trace.h"

#include <array>
#include <chrono>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr int kPhaseTrack = 1, kInstructionTrack = 2;

Json Slice(absl::string_view name, int track, double start_us, double end_us, Json args) {
  return {{"name", std::string(name)}, {"ph", "X"}, {"ts", start_us},
          {"dur", end_us - start_us},  {"pid", 1},  {"tid", track},
          {"args", std::move(args)}};
}

// In units of 1e9; 0 where the clock is too coarse to tell.
double PerSecond(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds / 1e9 : 0; }

// Runs one program and appends its slices, which begin at `start_us`, microseconds since the start of the trace. The
// times of instructions are the backend's: on a device that of its own clock, the host does not wait between them.
void TraceProgram(Executor& executor, const Program& program, double start_us, Json& events) {
  const proto::PlanProto& plan = executor.plan();
  const proto::ProgramProto& proto = program.proto();
  const int count = proto.instructions_size();
  std::vector<double> times = {start_us};
  for (const double seconds : executor.backend().Time(count, [&](int i) { program.RunRange(i, i + 1); })) {
    times.push_back(start_us + seconds * 1e6);
  }
  // A view runs no code and ends no phase.
  std::vector<std::string> phases(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const OpDef* op = FindOp(proto.instructions(i).op());
    const bool view = i > 0 && op != nullptr && op->is_view;
    phases[static_cast<size_t>(i)] = view ? phases[static_cast<size_t>(i) - 1] : proto.instructions(i).phase();
  }
  int phase_start = 0;
  for (int i = 0; i < count; ++i) {
    const proto::InstructionProto& instruction = proto.instructions(i);
    const double begin = times[static_cast<size_t>(i)], end = times[static_cast<size_t>(i) + 1];
    const std::string& phase = phases[static_cast<size_t>(i)];
    if (i + 1 == count || phases[static_cast<size_t>(i) + 1] != phase) {
      events.push_back(Slice(phase, kPhaseTrack, times[static_cast<size_t>(phase_start)], end,
                             {{"instructions", i + 1 - phase_start}}));
      phase_start = i + 1;
    }
    const OpDef* op = FindOp(instruction.op());
    if (op == nullptr || !op->is_view) {
      const double seconds = (end - begin) * 1e-6;
      events.push_back(Slice(instruction.op(), kInstructionTrack, begin, end,
                             {{"path", instruction.name()},
                              {"instruction", i},
                              {"flops", instruction.flops()},
                              {"bytes", instruction.bytes()},
                              {"gflops_per_second", PerSecond(instruction.flops(), seconds)},
                              {"gbytes_per_second", PerSecond(instruction.bytes(), seconds)},
                              {"recompute", instruction.recompute()}}));
    }
    std::array<int64_t, kNumMemoryClasses> live = {};
    for (const int b : LiveBuffers(plan, proto, i)) {
      live[static_cast<size_t>(plan.buffers(b).memory_class()) - 1] += AlignedBytes(plan, plan.buffers(b).size_bytes());
    }
    Json args;
    for (int c = 0; c < kNumMemoryClasses; ++c) {
      args[std::string(MemoryClassName(MemoryClassAt(c)))] = live[static_cast<size_t>(c)];
    }
    events.push_back({{"name", "live bytes"}, {"ph", "C"}, {"ts", begin}, {"pid", 1}, {"args", std::move(args)}});
  }
}

}  // namespace

absl::Status WriteTrace(Executor& executor, absl::Span<const TracedRun> runs, const std::string& path) {
  const proto::PlanProto& plan = executor.plan();
  std::string names;
  for (const TracedRun& run : runs) {
    const std::string& name = run.program->proto().name();
    if (!absl::EndsWith(names, name)) absl::StrAppend(&names, names.empty() ? "" : ", ", name);
  }
  Json events = Json::array();
  for (const auto& [track, name] : {std::pair{kPhaseTrack, "phases"}, {kInstructionTrack, "instructions"}}) {
    events.push_back({{"name", "thread_name"}, {"ph", "M"}, {"pid", 1}, {"tid", track}, {"args", {{"name", name}}}});
  }
  events.push_back({{"name", "process_name"},
                    {"ph", "M"},
                    {"pid", 1},
                    {"args", {{"name", absl::StrCat(plan.model(), " ", names, " (", plan.target(), ")")}}}});
  const Clock::time_point start = Clock::now();
  const auto now = [&] { return std::chrono::duration<double, std::micro>(Clock::now() - start).count(); };
  for (const TracedRun& run : runs) {
    RETURN_IF_ERROR(run.prepare());
    executor.backend().Synchronize();
    TraceProgram(executor, *run.program, now(), events);
  }
  const Json trace = {{"traceEvents", std::move(events)}, {"displayTimeUnit", "ms"}};
  return WriteFile(path, trace.dump());
}

}  // namespace mt
