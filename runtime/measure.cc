#include "runtime/measure.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/plan/plan.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"

namespace mt {
namespace {

constexpr int64_t kGranule = 256;
// Not a number, and a large one: neither is what a step would write.
constexpr uint8_t kPoisons[] = {0xff, 0x4b};
constexpr size_t kMaxDifferences = 20;

uint64_t HashGranule(const std::byte* granule, int64_t bytes) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  uint64_t words[kGranule / 8] = {};
  std::memcpy(words, granule, static_cast<size_t>(bytes));
  for (size_t i = 0; i < std::size(words); i += 4) {
    for (size_t k = 0; k < 4; ++k) lanes[k] = std::rotl((lanes[k] ^ words[i + k]) * 0x9E3779B97F4A7C15u, 29);
  }
  return ((lanes[0] * 31 + lanes[1]) * 31 + lanes[2]) * 31 + lanes[3];
}

const uint64_t kZeroHash = [] {
  const std::byte zeros[kGranule] = {};
  return HashGranule(zeros, kGranule);
}();

// What the plan says about each granule during one run of instructions of the same phase.
enum Written : uint8_t { kNot = 0, kWorkspace = 1, kResult = 2 };

struct Segment {
  int first = 0, last = 0;  // Instructions [first, last).
  size_t phase = 0;
};

class Measurer {
 public:
  Measurer(Executor& executor, const Program& program)
      : plan_(executor.plan()), program_(program.proto()), run_(program), executor_(executor) {
    const int64_t bytes = plan_.arena_bytes();
    granules_ = (bytes + kGranule - 1) / kGranule;
    before_.resize(static_cast<size_t>(granules_));
    for (int i = 0; i < plan_.programs_size(); ++i) {
      if (plan_.programs(i).name() == program_.name()) index_ = i;
    }
    for (const proto::ProgramInput& input : program_.inputs()) {
      input_buffers_.push_back(program_.tensors(input.tensor()).buffer());
    }
    for (int i = 0; i < program_.instructions_size(); ++i) {
      const size_t phase = static_cast<size_t>(ParsePhase(program_.instructions(i).phase()).value_or(Phase::kForward));
      if (segments_.empty() || segments_.back().phase != phase) segments_.push_back({i, i, phase});
      segments_.back().last = i + 1;
    }
    result_.planned_arena_bytes = program_.peak_bytes();
    result_.phases.resize(kNumPhases);
    for (int p = 0; p < kNumPhases; ++p) {
      result_.phases[static_cast<size_t>(p)].phase = std::string(PhaseName(static_cast<Phase>(p)));
    }
  }

  absl::Status Run(uint8_t poison, const std::function<absl::Status()>& prepare, uint64_t& fingerprint);
  Measurement& result() { return result_; }

 private:
  int64_t GranuleBytes(int64_t g) const { return std::min(kGranule, plan_.arena_bytes() - g * kGranule); }
  uint64_t Hash(int64_t g) const { return HashGranule(executor_.arena() + g * kGranule, GranuleBytes(g)); }
  bool LiveBefore(int b, int instruction) const;
  void Poison(int instruction, uint8_t poison);
  void MarkPlanned(const Segment& segment, std::vector<uint8_t>& planned) const;
  void Compare(const Segment& segment, const std::vector<uint8_t>& planned);
  void Report(const Segment& segment, int64_t g, bool outside, std::map<std::string, int64_t>& by_buffer) const;
  int BufferAt(const Segment& segment, int64_t offset, bool outside) const;

  const proto::PlanProto& plan_;
  const proto::ProgramProto& program_;
  const Program& run_;
  Executor& executor_;
  int index_ = 0;
  int64_t granules_ = 0;
  std::vector<int> input_buffers_;
  std::vector<Segment> segments_;
  std::vector<uint64_t> before_;
  std::vector<uint8_t> live_;  // Granules that the last Poison left alone.
  Measurement result_;
  bool count_ = true;  // Bytes are counted in the first run; the second one only looks for differences.
};

// Whether a buffer holds something before `instruction` that is read or kept from there on.
bool Measurer::LiveBefore(int b, int instruction) const {
  const proto::BufferProto& buffer = plan_.buffers(b);
  if (buffer.program() == -1) return true;
  if (buffer.program() != index_ || buffer.last() < instruction) return false;
  if (buffer.first() < instruction) return true;
  return buffer.first() == 0 && std::find(input_buffers_.begin(), input_buffers_.end(), b) != input_buffers_.end();
}

void Measurer::Poison(int instruction, uint8_t poison) {
  std::vector<uint8_t>& live = live_;
  live.assign(static_cast<size_t>(granules_), 0);
  for (int b = 0; b < plan_.buffers_size(); ++b) {
    if (!LiveBefore(b, instruction)) continue;
    const proto::BufferProto& buffer = plan_.buffers(b);
    const int64_t end = (buffer.offset() + buffer.size_bytes() + kGranule - 1) / kGranule;
    for (int64_t g = buffer.offset() / kGranule; g < end; ++g) live[static_cast<size_t>(g)] = 1;
  }
  for (int64_t g = 0; g < granules_; ++g) {
    if (live[static_cast<size_t>(g)] == 0)
      executor_.backend().Fill(executor_.arena() + g * kGranule, poison, GranuleBytes(g));
  }
}

void Measurer::MarkPlanned(const Segment& segment, std::vector<uint8_t>& planned) const {
  std::fill(planned.begin(), planned.end(), kNot);
  const auto mark = [&](int64_t offset, int64_t bytes, Written how) {
    for (int64_t g = offset / kGranule; g * kGranule < offset + bytes; ++g) {
      planned[static_cast<size_t>(g)] = std::max<uint8_t>(planned[static_cast<size_t>(g)], how);
    }
  };
  for (int i = segment.first; i < segment.last; ++i) {
    const proto::InstructionProto& instruction = program_.instructions(i);
    const OpDef* op = FindOp(instruction.op());
    if (op == nullptr || op->is_view) continue;
    for (const int r : instruction.results()) {
      const absl::StatusOr<TensorType> type = TypeFromProto(program_.tensors(r).type());
      if (type.ok()) mark(TensorOffset(plan_, program_.tensors(r)), type->byte_size(), kResult);
    }
    if (instruction.workspace() >= 0) {
      const proto::BufferProto& buffer = plan_.buffers(instruction.workspace());
      mark(buffer.offset(), buffer.size_bytes(), kWorkspace);
    }
  }
}

// The buffer that the plan has at an offset during the segment; for bytes outside the plan, any at that place, else -1.
int Measurer::BufferAt(const Segment& segment, int64_t offset, bool outside) const {
  int found = -1;
  for (int b = 0; b < plan_.buffers_size(); ++b) {
    const proto::BufferProto& buffer = plan_.buffers(b);
    if (buffer.program() != -1 && buffer.program() != index_) continue;
    const int64_t end = (buffer.offset() + buffer.size_bytes() + kGranule - 1) / kGranule * kGranule;
    if (offset < buffer.offset() / kGranule * kGranule || offset >= end) continue;
    const bool in_time = buffer.program() == -1 || (buffer.first() < segment.last && buffer.last() >= segment.first);
    if (in_time) return b;
    if (outside) found = b;
  }
  return found;
}

void Measurer::Report(const Segment& segment, int64_t g, bool outside,
                      std::map<std::string, int64_t>& by_buffer) const {
  const int b = BufferAt(segment, g * kGranule, outside);
  std::string where = "no buffer of the plan";
  if (b >= 0) {
    const proto::BufferProto& buffer = plan_.buffers(b);
    where = absl::StrCat("buffer ", b, " \"", buffer.name(), "\" [", buffer.offset(), ", ",
                         buffer.offset() + buffer.size_bytes(), ")");
  }
  by_buffer[where] += GranuleBytes(g);
}

void Measurer::Compare(const Segment& segment, const std::vector<uint8_t>& planned) {
  PhaseMeasurement& phase = result_.phases[segment.phase];
  std::map<std::string, int64_t> outside, unwritten;
  for (int64_t g = 0; g < granules_; ++g) {
    const uint8_t plan = planned[static_cast<size_t>(g)];
    // In place, zeros are often written over zeros (masked weights and their gradients): no machine can tell that from
    // not writing, and memory that held no live value before would show the poison.
    const bool zero_over_zero = plan == kResult && live_[static_cast<size_t>(g)] != 0 && Hash(g) == kZeroHash;
    const bool changed = Hash(g) != before_[static_cast<size_t>(g)] || zero_over_zero;
    const int64_t bytes = GranuleBytes(g);
    if (count_) {
      if (plan == kResult) phase.planned_bytes += bytes;
      if (changed && plan == kWorkspace) phase.workspace_bytes += bytes;
      if (changed && plan != kWorkspace) phase.measured_bytes += bytes;
    }
    if (changed) {
      // A workspace counts whole once it is touched: how much of it a kernel needs differs from machine to machine.
      int64_t end = g * kGranule + bytes;
      if (plan == kWorkspace) {
        const int b = BufferAt(segment, g * kGranule, false);
        if (b >= 0) end = std::max(end, plan_.buffers(b).offset() + AlignedBytes(plan_, plan_.buffers(b).size_bytes()));
      }
      result_.measured_arena_bytes = std::max(result_.measured_arena_bytes, end);
    }
    if (changed && plan == kNot) Report(segment, g, /*outside=*/true, outside);
    if (!changed && plan == kResult) Report(segment, g, /*outside=*/false, unwritten);
  }
  const auto list = [&](const std::map<std::string, int64_t>& by_buffer, absl::string_view what) {
    for (const auto& [where, bytes] : by_buffer) {
      const std::string line = absl::StrCat(phase.phase, ": ", bytes, " bytes ", what, " in ", where);
      if (result_.differences.size() < kMaxDifferences &&
          std::find(result_.differences.begin(), result_.differences.end(), line) == result_.differences.end()) {
        result_.differences.push_back(line);
      }
    }
  };
  list(outside, "were written outside the plan");
  list(unwritten, "that the plan says are written did not change");
}

absl::Status Measurer::Run(uint8_t poison, const std::function<absl::Status()>& prepare, uint64_t& fingerprint) {
  std::vector<uint8_t> planned(static_cast<size_t>(granules_));
  Poison(0, poison);
  RETURN_IF_ERROR(prepare());
  for (const Segment& segment : segments_) {
    if (segment.first != 0) Poison(segment.first, poison);
    for (int64_t g = 0; g < granules_; ++g) before_[static_cast<size_t>(g)] = Hash(g);
    run_.RunRange(segment.first, segment.last);
    executor_.backend().Synchronize();
    MarkPlanned(segment, planned);
    Compare(segment, planned);
  }
  count_ = false;
  // Inputs are written by the host, in no phase, but they take their place.
  for (const int b : input_buffers_) {
    const proto::BufferProto& buffer = plan_.buffers(b);
    result_.measured_arena_bytes =
        std::max(result_.measured_arena_bytes, buffer.offset() + AlignedBytes(plan_, buffer.size_bytes()));
  }
  fingerprint = 0;
  const auto mix = [&](const BoundTensor& tensor) {
    for (int64_t at = 0; at < tensor.type.byte_size(); at += kGranule) {
      fingerprint = fingerprint * 31 + HashGranule(tensor.data + at, std::min(kGranule, tensor.type.byte_size() - at));
    }
  };
  for (const BoundTensor& state : executor_.states()) mix(state);
  for (const BoundTensor& output : run_.outputs()) mix(output);
  return absl::OkStatus();
}

// Values that every update changes: moments decay, so zero would stay zero.
void FillOptimizerStates(Executor& executor) {
  std::vector<float> values;
  for (const BoundTensor& state : executor.states()) {
    if (state.role != Role::kOptimizerState || state.type.dtype != DType::kF32) continue;
    values.resize(static_cast<size_t>(state.type.num_elements()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = 1e-3f + 1e-6f * static_cast<float>(i % 997);
    executor.backend().CopyToDevice(state.data, values.data(), state.type.byte_size());
  }
}

int64_t StatusField(absl::string_view name) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    int64_t kib = 0;
    if (parts.size() >= 2 && parts[0] == name && absl::SimpleAtoi(parts[1], &kib)) return kib << 10;
  }
  return 0;
}

}  // namespace

absl::StatusOr<Measurement> MeasureProgram(Executor& executor, const Program& program,
                                           const std::function<absl::Status()>& prepare,
                                           const std::function<absl::Status()>& restore) {
  if (executor.backend().name() != "cpu") {
    return absl::InvalidArgumentError(
        absl::StrCat("a step can be measured on the cpu backend, not on ", executor.backend().name()));
  }
  Measurer measurer(executor, program);
  uint64_t fingerprints[2] = {};
  for (int i = 0; i < 2; ++i) {
    FillOptimizerStates(executor);
    RETURN_IF_ERROR(measurer.Run(kPoisons[i], prepare, fingerprints[i]));
    RETURN_IF_ERROR(restore());
  }
  Measurement& result = measurer.result();
  result.same_over_poisons = fingerprints[0] == fingerprints[1];
  if (!result.same_over_poisons) {
    result.differences.push_back(
        "the results differ between two poisons of the unused memory: something is read before it is written");
  }
  RETURN_IF_ERROR(prepare());
  result.counted_allocations = CanCountAllocations();
  StartCountingAllocations();
  program.Run();
  executor.backend().Synchronize();
  result.allocations = StopCountingAllocations();
  if (result.allocations.count > 0) {
    result.differences.push_back(absl::StrCat("a step made ", result.allocations.count,
                                              " allocations outside the plan, ", FormatBytes(result.allocations.bytes),
                                              " in all"));
  }
  RETURN_IF_ERROR(restore());
  return std::move(result);
}

int64_t ResidentBytes() { return StatusField("VmRSS:"); }
int64_t PeakResidentBytes() { return StatusField("VmHWM:"); }
void ResetPeakResidentBytes() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace mt
