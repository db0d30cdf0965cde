#include "runtime/train/report.h"

#include <google/protobuf/stubs/common.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "ir/base/flags.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "runtime/cpu/blas.h"
#include "runtime/cpu/thread_pool.h"
#include "runtime/data/safetensors.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

std::string Rate(double per_second) {
  if (per_second >= 1e6) return absl::StrFormat("%.2fM", per_second / 1e6);
  if (per_second >= 1e3) return absl::StrFormat("%.1fk", per_second / 1e3);
  return absl::StrFormat("%.0f", per_second);
}

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

// JSON has no NaN.
Json Number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

std::vector<int64_t> LogicalDims(const proto::StateProto& state) {
  if (state.logical_dims_size() > 0) return {state.logical_dims().begin(), state.logical_dims().end()};
  return {state.type().dims().begin(), state.type().dims().end()};
}

std::string DimsText(const std::vector<int64_t>& dims) { return DimsToString(dims); }

}  // namespace

std::string StepLine(const StepMetrics& m, int64_t steps, double seconds_left, int64_t arena_bytes) {
  std::string line = absl::StrCat("step ", m.step);
  if (steps > 0) {
    absl::StrAppendFormat(&line, "/%d %.1f%%", steps, 100.0 * static_cast<double>(m.step) / static_cast<double>(steps));
  }
  const std::string norm = std::isfinite(m.grad_norm) ? absl::StrFormat("%.2f", m.grad_norm) : "inf";
  absl::StrAppendFormat(&line, " | loss %.4f ppl %.2f | lr %.2e | gnorm %s | %s tok/s | %s", m.loss, std::exp(m.loss),
                        m.lr, norm, Rate(m.tokens_per_second), FormatBytes(arena_bytes));
  if (m.loss_scale) absl::StrAppendFormat(&line, " | scale %g%s", *m.loss_scale, m.skipped ? ", skipped" : "");
  if (seconds_left >= 0) absl::StrAppend(&line, " | ETA ", FormatDuration(seconds_left));
  return line;
}

std::string Box(absl::string_view title, const std::vector<std::pair<std::string, std::string>>& rows) {
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

MetricsFile::~MetricsFile() {
  if (file_ != nullptr) std::fclose(file_);
}

absl::Status MetricsFile::Open(const std::string& path) {
  if (file_ != nullptr) std::fclose(file_);
  path_ = path;
  file_ = std::fopen(path.c_str(), "ae");
  if (file_ == nullptr) return absl::DataLossError(absl::StrCat(path, ": cannot create: ", std::strerror(errno)));
  return absl::OkStatus();
}

absl::Status MetricsFile::Append(const Json& line) {
  if (file_ == nullptr) return absl::OkStatus();
  const std::string text = absl::StrCat(line.dump(), "\n");
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0) {
    return absl::DataLossError(absl::StrCat(path_, ": write failed: ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

Json StepJson(const StepMetrics& m) {
  // The CPU's peak is not known, so there is no share of it to state.
  Json json = {{"step", m.step},
               {"loss", Number(m.loss)},
               {"lr", m.lr},
               {"grad_norm", Number(m.grad_norm)},
               {"step_seconds", m.step_seconds},
               {"tokens_per_second", m.tokens_per_second},
               {"mfu", nullptr}};
  if (m.loss_scale) {
    json["loss_scale"] = *m.loss_scale;
    json["skipped"] = m.skipped;
  }
  return json;
}

Json MemoryJson(const Executor& executor, const std::optional<Measurement>& measurement, int64_t process_bytes,
                int64_t context_bytes) {
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
  json["process_bytes"] = process_bytes;
  json["context_bytes"] = context_bytes;
  return json;
}

Json HardwareJson() {
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    cpu = std::string(absl::StripAsciiWhitespace(absl::string_view(line).substr(line.find(':') + 1)));
    break;
  }
  return {{"cpu", cpu},
          {"usable_cpus", AvailableCpus()},
          {"available_memory_bytes", AvailableMemoryBytes()},
          {"gpu", nullptr},
          {"driver", nullptr}};
}

Json VersionsJson() {
  return {{"mt", std::string(Version())},
          {"compiler", absl::StrCat("gcc ", __VERSION__)},
          {"blas", BlasVersion()},
          {"protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION)}};
}

absl::Status SaveWeights(Executor& executor, const std::string& path) {
  const proto::PlanProto& plan = executor.plan();
  std::vector<SafetensorsTensor> tensors;
  for (const proto::StatePlacement& placement : plan.states()) {
    const proto::StateProto& state = placement.state();
    if (ParseRole(state.role()) != Role::kParameter) continue;
    SafetensorsTensor tensor;
    tensor.name = state.name();
    tensor.type = state.type().dtype() == "bf16" ? SafetensorsType::kBF16 : SafetensorsType::kF32;
    tensor.shape = LogicalDims(state);
    tensors.push_back(std::move(tensor));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsWriter> writer,
                   SafetensorsWriter::Create(path, tensors, {{"format", "mt"}, {"model", plan.model()}}));
  for (const SafetensorsTensor& tensor : tensors) {
    const BoundTensor* state = executor.FindState(tensor.name);
    int64_t elements = 1;
    for (const int64_t d : tensor.shape) elements *= d;
    // Padding is at the end of dimension 0, so the logical elements are a prefix.
    std::string bytes(static_cast<size_t>(elements * SizeOf(tensor.type)), '\0');
    executor.backend().CopyToHost(bytes.data(), state->data, static_cast<int64_t>(bytes.size()));
    RETURN_IF_ERROR(writer->Append(tensor.name, bytes));
  }
  return writer->Finish();
}

absl::Status LoadWeights(Executor& executor, const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsReader> reader, SafetensorsReader::Open(path));
  for (const proto::StatePlacement& placement : executor.plan().states()) {
    const proto::StateProto& state = placement.state();
    if (ParseRole(state.role()) != Role::kParameter) continue;
    const SafetensorsTensor* tensor = reader->Find(state.name());
    if (tensor == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, " has no tensor ", state.name(), ", which the plan's model ", executor.plan().model(), " needs"));
    }
    const BoundTensor* bound = executor.FindState(state.name());
    const bool same_type = SizeOf(tensor->type) == ByteSize(bound->type.dtype) &&
                           absl::AsciiStrToLower(SafetensorsTypeName(tensor->type)) == DTypeName(bound->type.dtype);
    if (!same_type || tensor->shape != LogicalDims(state)) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, ": tensor ", state.name(), " is ", SafetensorsTypeName(tensor->type), DimsText(tensor->shape),
          "; the plan's model has ", DTypeName(bound->type.dtype), DimsText(LogicalDims(state))));
    }
    executor.backend().CopyToDevice(bound->data, reader->Bytes(*tensor).data(), tensor->size_bytes);
  }
  return absl::OkStatus();
}

}  // namespace mt
