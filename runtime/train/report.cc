#include "runtime/train/report.h"

#include <google/protobuf/stubs/common.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "ir/base/flags.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "runtime/allocations.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/thread_pool.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

// Columns that a terminal gives the text: code points, since what is printed here is narrow.
size_t Width(absl::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

std::string Repeat(absl::string_view piece, size_t times) {
  std::string text;
  for (size_t i = 0; i < times; ++i) absl::StrAppend(&text, piece);
  return text;
}

}  // namespace

std::string Box(absl::string_view title, const BoxRows& rows) {
  size_t left = 0, right = 0;
  for (const auto& [name, value] : rows) {
    left = std::max(left, Width(name));
    right = std::max(right, Width(value));
  }
  const size_t inner = std::max(left + 2 + right, Width(title) + 2);
  std::string box = absl::StrCat("┌─ ", title, " ", Repeat("─", inner - Width(title) - 1), "┐\n");
  for (const auto& [name, value] : rows) {
    absl::StrAppend(&box, "│ ", name, std::string(left - Width(name) + 2, ' '), value,
                    std::string(inner - left - 2 - Width(value), ' '), " │\n");
  }
  absl::StrAppend(&box, "└", Repeat("─", inner + 2), "┘\n");
  return box;
}

MemoryUse MemoryUseOf(Executor& executor) {
  Backend& backend = executor.backend();
  MemoryUse memory;
  memory.process_bytes = backend.host_addressable() ? PeakResidentBytes() : backend.ProcessDeviceBytes();
  memory.others_too = memory.process_bytes < 0;
  if (memory.others_too) memory.process_bytes = backend.UsedDeviceBytes();
  memory.context_bytes = std::max<int64_t>(0, memory.process_bytes - executor.plan().arena_bytes());
  return memory;
}

absl::StatusOr<BoxRows> OutcomeRows(Executor& executor, const RunOutcome& outcome, const MemoryUse& memory) {
  const TrainResult& result = outcome.result;
  const int64_t arena_bytes = executor.plan().arena_bytes();
  const bool on_device = !executor.backend().host_addressable();
  BoxRows rows = {
      {"tokens", FormatCount(result.tokens)},
      {"time", FormatDuration(result.seconds)},
      {"speed",
       absl::StrFormat("%.0f tok/s", result.seconds > 0 ? static_cast<double>(result.tokens) / result.seconds : 0.0)}};
  if (outcome.from_step > 0) rows.push_back({"resumed", absl::StrCat("after step ", outcome.from_step)});
  if (result.stopped_early) {
    rows.push_back({"stopped early", absl::StrFormat("%d evaluations without a val loss below %.4f",
                                                     result.evals_since_best, result.best_val)});
  }
  if (result.skipped_steps > 0) rows.push_back({"skipped", absl::StrCat(FormatCount(result.skipped_steps), " steps")});
  if (result.steps > 0) rows.push_back({"train loss", absl::StrFormat("%.4f (last step)", result.last_loss)});
  for (const auto& [eval, split] : outcome.evals) {
    rows.push_back({eval.split, absl::StrFormat("loss %.4f  ppl %.2f  (bigram cross-entropy %.4f)", eval.loss,
                                                std::exp(eval.loss), split.bigram_entropy)});
  }
  rows.push_back({"arena planned", absl::StrCat(FormatBytes(arena_bytes), " (", FormatCount(arena_bytes), " bytes)")});
  if (outcome.measurement) {
    const Measurement& m = *outcome.measurement;
    rows.push_back(
        {"arena measured", absl::StrCat(FormatBytes(m.measured_arena_bytes), " (", FormatCount(m.measured_arena_bytes),
                                        " bytes", m.idle_workspace_bytes == 0 ? "" : " and idle workspace", "), ",
                                        m.agrees() ? "planned = measured" : "DIFFERS: see above")});
  }
  std::string beside =
      absl::StrCat(FormatBytes(memory.process_bytes), ", ", FormatBytes(memory.context_bytes), " beside the arena");
  if (on_device) {
    ASSIGN_OR_RETURN(const Target target, ParseTarget(executor.plan().target()));
    absl::StrAppend(&beside, " (", FormatBytes(ContextBytes(target)), " planned)",
                    memory.others_too ? ", other processes included" : "");
  }
  rows.push_back({on_device ? "device" : "process", beside});
  if (on_device) rows.push_back({"process", FormatBytes(PeakResidentBytes())});
  if (outcome.drift) {
    const Drift& drift = *outcome.drift;
    rows.push_back(
        {"drift",
         absl::StrCat(
             CanCountAllocations() ? absl::StrCat(drift.allocations.count, " allocations of 4 KiB or more, ") : "",
             on_device ? absl::StrFormat("device %+d bytes, ", drift.device_bytes) : "",
             absl::StrFormat("process %+d bytes since step %d", drift.process_bytes, DriftWatch::kFirstStep))});
  }
  if (result.steps > outcome.from_step && outcome.times.start_seconds > 0) {
    const RunTimes& t = outcome.times;
    rows.push_back(
        {"first step", absl::StrFormat("after %.2f s: %.2f loading, %.2f weights, %.2f the step", t.start_seconds,
                                       t.load_seconds, t.weights_seconds, t.first_step_seconds)});
  }
  return rows;
}

Json OutcomeJson(Executor& executor, const RunOutcome& outcome) {
  const proto::PlanProto& plan = executor.plan();
  const TrainResult& result = outcome.result;
  Json evals = Json::object(), drift = nullptr;
  for (const auto& [eval, split] : outcome.evals) {
    evals[eval.split] = {{"loss", eval.loss},
                         {"perplexity", std::exp(eval.loss)},
                         {"tokens", eval.tokens},
                         {"bigram_entropy", split.bigram_entropy},
                         {"unigram_entropy", split.unigram_entropy}};
  }
  if (outcome.drift) {
    const AllocationCounts& counts = outcome.drift->allocations;
    drift = {{"first_step", DriftWatch::kFirstStep},
             {"allocations", CanCountAllocations() ? Json(counts.count) : Json(nullptr)},
             {"small_allocations", CanCountAllocations() ? Json(counts.small_count) : Json(nullptr)},
             {"device_bytes", outcome.drift->device_bytes},
             {"process_bytes", outcome.drift->process_bytes}};
  }
  return {{"model", plan.model()},
          {"target", plan.target()},
          {"passes", plan.passes()},
          {"plan_fingerprint", absl::StrFormat("%016x", plan.fingerprint())},
          {"steps", result.steps},
          {"skipped_steps", result.skipped_steps},
          {"tokens", result.tokens},
          {"seconds", result.seconds},
          {"last_loss", result.last_loss},
          {"interrupted", result.interrupted},
          {"drift", drift},
          {"load_seconds", outcome.times.load_seconds},
          {"weights_seconds", outcome.times.weights_seconds},
          {"first_step_seconds", outcome.times.first_step_seconds},
          {"eval", evals},
          {"versions", VersionsJson()},
          {"hardware", HardwareJson(executor.backend())}};
}

Json MemoryJson(const Executor& executor, const std::optional<Measurement>& measurement, const MemoryUse& memory) {
  const proto::PlanProto& plan = executor.plan();
  const proto::ProgramProto* main = MainProgram(plan);
  Json planned = {{"arena_bytes", measurement ? measurement->planned_arena_bytes : plan.arena_bytes()}}, json;
  if (main != nullptr && !measurement) {
    const ProgramSummary summary = SummarizeStep(plan);
    for (int p = 0; p < kNumPhases; ++p) {
      planned["by_phase"][std::string(PhaseName(static_cast<Phase>(p)))]["written_bytes"] =
          summary.phases[static_cast<size_t>(p)].written_bytes;
    }
  }
  if (measurement) {
    Json measured = {{"arena_bytes", measurement->measured_arena_bytes}};
    for (const PhaseMeasurement& phase : measurement->phases) {
      planned["by_phase"][phase.phase]["written_bytes"] = phase.planned_bytes;
      measured["by_phase"][phase.phase]["written_bytes"] = phase.measured_bytes;
    }
    json["planned"] = std::move(planned);
    json["measured"] = std::move(measured);
    json["agree"] = measurement->agrees();
    json["idle_workspace_bytes"] = measurement->idle_workspace_bytes;
    json["differences"] = measurement->differences;
    json["same_over_poisons"] = measurement->same_over_poisons;
    if (measurement->counted_allocations) {
      json["allocations_after_load"] = measurement->allocations.count;
      json["small_allocations_after_load"] = measurement->allocations.small_count;
    } else {
      json["allocations_after_load"] = nullptr;
    }
  } else {
    json["planned"] = std::move(planned);
    json["measured"] = nullptr;
    json["allocations_after_load"] = nullptr;
  }
  json["process_bytes"] = memory.process_bytes;
  json["context_bytes"] = memory.context_bytes;
  return json;
}

Json HardwareJson(const Backend& backend) {
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    cpu = std::string(absl::StripAsciiWhitespace(absl::string_view(line).substr(line.find(':') + 1)));
    break;
  }
  Json hardware = {{"cpu", cpu},
                   {"usable_cpus", AvailableCpus()},
                   {"available_memory_bytes", AvailableMemoryBytes()},
                   {"gpu", nullptr},
                   {"driver", nullptr}};
  for (const auto& [key, value] : backend.Description()) hardware[key] = value;
  return hardware;
}

Json VersionsJson() {
  return {{"mt", std::string(Version())},
          {"compiler", absl::StrCat("gcc ", __VERSION__)},
          {"blas", BlasVersion()},
          {"protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION)}};
}

}  // namespace mt
