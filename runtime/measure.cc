#include "runtime/measure.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/resources.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"

namespace mt {
namespace {

constexpr int64_t kGranule = kGranuleBytes;
// Not a number, and a large one: neither is what a step would write.
constexpr uint8_t kPoisons[] = {0xff, 0x4b};
constexpr size_t kMaxDifferences = 20;

const uint64_t kZeroHash = [] {
  const std::byte zeros[kGranule] = {};
  return HashGranule(zeros, kGranule);
}();

// What the plan says about each granule during one run of instructions of the same phase.
enum Written : uint8_t { kNot = 0, kWorkspace = 1, kOneNumber = 2, kResult = 3 };

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
    after_.resize(before_.size());
    for (int i = 0; i < plan_.programs_size(); ++i) {
      if (plan_.programs(i).name() == program_.name()) index_ = i;
    }
    for (const proto::ProgramInput& input : program_.inputs()) {
      input_buffers_.push_back(program_.tensors(input.tensor()).buffer());
      if (input.has_staging()) input_buffers_.push_back(input.staging());
    }
    for (int i = 0; i < program_.instructions_size(); ++i) {
      const OpDef* op = FindOp(program_.instructions(i).op());
      const size_t phase = static_cast<size_t>(ParsePhase(program_.instructions(i).phase()).value_or(Phase::kForward));
      const bool runs = op == nullptr || !op->is_view;  // Views run no code: they begin no segment.
      if (segments_.empty() || (runs && segments_.back().phase != phase)) segments_.push_back({i, i, phase});
      segments_.back().last = i + 1;
    }
    result_.planned_arena_bytes = program_.peak_bytes();
    result_.phases.resize(kNumPhases);
    for (int p = 0; p < kNumPhases; ++p) {
      result_.phases[static_cast<size_t>(p)].phase = std::string(PhaseName(static_cast<Phase>(p)));
    }
  }

  absl::Status Run(uint8_t poison, const std::function<absl::Status()>& prepare, uint64_t& fingerprint);
  absl::Status RunByInstruction(uint8_t poison, const std::function<absl::Status()>& prepare, uint64_t& fingerprint);
  // What the plan has above the last byte that was written.
  void FindIdleWorkspace() {
    for (const proto::BufferProto& buffer : plan_.buffers()) {
      const bool above = (buffer.program() == -1 || buffer.program() == index_) &&
                         buffer.offset() + buffer.size_bytes() > result_.measured_arena_bytes;
      if (above && buffer.memory_class() != proto::WORKSPACE) return;
    }
    result_.idle_workspace_bytes = std::max<int64_t>(0, result_.planned_arena_bytes - result_.measured_arena_bytes);
  }
  Measurement& result() { return result_; }

 private:
  // Bytes [begin, end) of the arena that a kernel or the host fills, for a buffer of the plan.
  struct Extent {
    int buffer = 0;
    int64_t begin = 0, end = 0;
    bool whole = true;  // All of it is written, each time (a workspace is not).
  };
  Extent TensorExtent(int tensor) const;
  std::vector<Extent> WrittenBy(const proto::InstructionProto& instruction) const;
  bool LiveAt(int b, int instruction) const;
  bool Reads(int instruction, int b) const;
  std::string BufferText(int b) const;
  void AddDifference(std::string line);
  void CheckWrites(const std::string& writer, int instruction, const std::vector<Extent>& writes,
                   const std::function<void()>& write);
  uint64_t Fingerprint() const;

  std::string Read(int64_t begin, int64_t end) const {
    std::string bytes(static_cast<size_t>(end - begin), '\0');
    executor_.backend().CopyToHost(bytes.data(), executor_.arena() + begin, end - begin);
    return bytes;
  }
  int64_t GranuleBytes(int64_t g) const { return std::min(kGranule, plan_.arena_bytes() - g * kGranule); }
  void Hash(std::vector<uint64_t>& hashes) const {
    executor_.backend().HashGranules(executor_.arena(), plan_.arena_bytes(), absl::MakeSpan(hashes));
  }
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
  std::vector<int> input_buffers_;  // Where the next batch waits, too.
  std::vector<Segment> segments_;
  std::vector<uint64_t> before_, after_;
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
  for (int64_t g = 0; g < granules_;) {
    const int64_t first = g;
    while (g < granules_ && live[static_cast<size_t>(g)] == 0) ++g;
    const int64_t end = std::min(g * kGranule, plan_.arena_bytes());
    if (g > first) executor_.backend().Fill(executor_.arena() + first * kGranule, poison, end - first * kGranule);
    if (g == first) ++g;
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
      if (!type.ok()) continue;
      mark(TensorOffset(plan_, program_.tensors(r)), type->byte_size(),
           type->num_elements() == 1 ? kOneNumber : kResult);
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
  if (b >= 0) where = BufferText(b);
  by_buffer[where] += GranuleBytes(g);
}

void Measurer::Compare(const Segment& segment, const std::vector<uint8_t>& planned) {
  PhaseMeasurement& phase = result_.phases[segment.phase];
  std::map<std::string, int64_t> outside, unwritten;
  for (int64_t g = 0; g < granules_; ++g) {
    const uint8_t plan = planned[static_cast<size_t>(g)];
    // In place, zeros are often written over zeros (masked weights and their gradients), and one number may come out as
    // it was (what scales gradients that need no clipping, over the limit): no machine can tell that from not writing,
    // and memory that held no live value before would show the poison.
    const uint64_t hash = after_[static_cast<size_t>(g)];
    const bool may_stay = plan == kOneNumber || (plan == kResult && hash == kZeroHash);
    const bool changed = hash != before_[static_cast<size_t>(g)] || (may_stay && live_[static_cast<size_t>(g)] != 0);
    const int64_t bytes = GranuleBytes(g);
    if (count_) {
      if (plan >= kOneNumber) phase.planned_bytes += bytes;
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
    if (!changed && plan >= kOneNumber) Report(segment, g, /*outside=*/false, unwritten);
  }
  const auto list = [&](const std::map<std::string, int64_t>& by_buffer, absl::string_view what) {
    for (const auto& [where, bytes] : by_buffer) {
      AddDifference(absl::StrCat(phase.phase, ": ", bytes, " bytes ", what, " in ", where));
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
    Hash(before_);
    run_.RunRange(segment.first, segment.last);
    executor_.backend().Synchronize();
    Hash(after_);
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
  fingerprint = Fingerprint();
  return absl::OkStatus();
}

// Of all states and outputs.
uint64_t Measurer::Fingerprint() const {
  uint64_t fingerprint = 0;
  std::vector<uint64_t> hashes;
  const auto mix = [&](const BoundTensor& tensor) {
    hashes.resize(static_cast<size_t>((tensor.type.byte_size() + kGranule - 1) / kGranule));
    executor_.backend().HashGranules(tensor.data, tensor.type.byte_size(), absl::MakeSpan(hashes));
    for (const uint64_t hash : hashes) fingerprint = fingerprint * 31 + hash;
  };
  for (const BoundTensor& state : executor_.states()) mix(state);
  for (const BoundTensor& output : run_.outputs()) mix(output);
  return fingerprint;
}

std::string Measurer::BufferText(int b) const {
  const proto::BufferProto& buffer = plan_.buffers(b);
  return absl::StrCat("buffer ", b, " \"", buffer.name(), "\" [", buffer.offset(), ", ",
                      buffer.offset() + buffer.size_bytes(), ")");
}

void Measurer::AddDifference(std::string line) {
  if (result_.differences.size() < kMaxDifferences &&
      std::find(result_.differences.begin(), result_.differences.end(), line) == result_.differences.end()) {
    result_.differences.push_back(std::move(line));
  }
}

Measurer::Extent Measurer::TensorExtent(int tensor) const {
  const proto::TensorProto& proto = program_.tensors(tensor);
  const absl::StatusOr<TensorType> type = TypeFromProto(proto.type());
  const int64_t begin = TensorOffset(plan_, proto);
  return {proto.buffer(), begin, begin + (type.ok() ? type->byte_size() : 0)};
}

std::vector<Measurer::Extent> Measurer::WrittenBy(const proto::InstructionProto& instruction) const {
  std::vector<Extent> extents;
  const OpDef* op = FindOp(instruction.op());
  if (op == nullptr || op->is_view) return extents;
  for (const int r : instruction.results()) extents.push_back(TensorExtent(r));
  if (instruction.workspace() >= 0) {
    const auto types = [&](const auto& tensors) {
      std::vector<TensorType> list;
      for (const int t : tensors) list.push_back(TypeFromProto(program_.tensors(t).type()).value_or(TensorType{}));
      return list;
    };
    const int64_t bytes =
        WorkspaceBytes(plan_.target(), *op, types(instruction.operands()), types(instruction.results()),
                       AttrsFromProto(instruction.attrs()).value_or(Attrs{}));
    const int64_t begin = plan_.buffers(instruction.workspace()).offset();
    extents.push_back({instruction.workspace(), begin, begin + bytes, /*whole=*/false});
  }
  return extents;
}

// Instruction -1: before the first one, when the host has written the inputs.
bool Measurer::LiveAt(int b, int instruction) const {
  const proto::BufferProto& buffer = plan_.buffers(b);
  if (instruction < 0) return LiveBefore(b, 0);
  return buffer.program() == -1 ||
         (buffer.program() == index_ && buffer.first() <= instruction && instruction <= buffer.last());
}

bool Measurer::Reads(int instruction, int b) const {
  const auto& operands = program_.instructions(instruction).operands();
  return std::any_of(operands.begin(), operands.end(), [&](int t) { return program_.tensors(t).buffer() == b; });
}

// Runs `write` and compares what it did to the bytes around its results with what the plan says of them: other live
// buffers and what lies behind a buffer's end stay as they were, a buffer is filled to its last granule.
void Measurer::CheckWrites(const std::string& writer, int instruction, const std::vector<Extent>& writes,
                           const std::function<void()>& write) {
  struct Watch {
    int64_t begin = 0, end = 0;
    bool must_change = false;
    std::string before, what;
  };
  std::vector<Watch> watches;
  const auto watch = [&](int64_t begin, int64_t end, bool must_change, std::string what) {
    begin = std::max<int64_t>(begin, 0);
    end = std::min(end, plan_.arena_bytes());
    if (begin >= end) return;
    watches.push_back({begin, end, must_change, Read(begin, end), std::move(what)});
  };
  for (const Extent& extent : writes) {
    const proto::BufferProto& own = plan_.buffers(extent.buffer);
    const int64_t own_end = own.offset() + own.size_bytes();
    if (!LiveAt(extent.buffer, instruction)) {
      watch(extent.begin, extent.end, false, absl::StrCat("of what is not live, ", BufferText(extent.buffer)));
    } else if (instruction > own.first() && own.program() != -1 && !Reads(instruction, extent.buffer)) {
      watch(extent.begin, extent.end, false, absl::StrCat("of a value still live, ", BufferText(extent.buffer)));
    }
    watch(std::max(extent.begin, own_end), extent.end, false,
          absl::StrCat("behind the end of ", BufferText(extent.buffer)));
    if (extent.whole) {
      watch((extent.end + kGranule - 1) / kGranule * kGranule, own_end, true, BufferText(extent.buffer));
    }
    for (const Extent& twin : writes) {  // No content can show which of the two was there last.
      if (twin.buffer == extent.buffer) continue;
      const proto::BufferProto& other = plan_.buffers(twin.buffer);
      const int64_t shared = std::min(extent.end, std::max(twin.end, other.offset() + other.size_bytes())) -
                             std::max(extent.begin, twin.begin);
      if (shared > 0) {
        AddDifference(absl::StrCat(writer, " writes ", shared, " bytes of ", BufferText(extent.buffer),
                                   " that are also ", BufferText(twin.buffer)));
      }
    }
    for (int b = 0; b < plan_.buffers_size(); ++b) {
      const bool named = std::any_of(writes.begin(), writes.end(), [&](const Extent& e) { return e.buffer == b; });
      if (named || !LiveAt(b, instruction)) continue;
      const proto::BufferProto& other = plan_.buffers(b);
      watch(std::max(extent.begin, other.offset()), std::min(extent.end, other.offset() + other.size_bytes()), false,
            absl::StrCat("in live ", BufferText(b), " besides those of ", BufferText(extent.buffer)));
    }
  }
  write();
  for (const Watch& w : watches) {
    int64_t changed = 0;
    const std::string after = Read(w.begin, w.end);
    for (size_t i = 0; i < after.size(); ++i) changed += w.before[i] != after[i] ? 1 : 0;
    if (w.must_change && changed == 0) {
      AddDifference(absl::StrCat(writer, " left ", w.end - w.begin, " bytes at the end as they were of ", w.what));
    } else if (!w.must_change && changed > 0) {
      AddDifference(absl::StrCat(writer, " changed ", changed, " bytes ", w.what));
    }
  }
}

// One execution in which memory is poisoned where a buffer's life begins and where it has ended, and the surroundings
// of each write are compared: what two phase boundaries do not show.
absl::Status Measurer::RunByInstruction(uint8_t poison, const std::function<absl::Status()>& prepare,
                                        uint64_t& fingerprint) {
  // From byte `from` of buffer b to the end of its last granule, but never over what lives at `instruction`.
  const auto poison_buffer = [&](int b, int instruction, int64_t from = 0) {
    const proto::BufferProto& buffer = plan_.buffers(b);
    const int64_t begin = buffer.offset() + from;
    const int64_t end = std::min(plan_.arena_bytes(), buffer.offset() + AlignedBytes(plan_, buffer.size_bytes()));
    for (int other = 0; other < plan_.buffers_size(); ++other) {
      const proto::BufferProto& o = plan_.buffers(other);
      if (other != b && o.offset() < end && begin < o.offset() + o.size_bytes() && LiveAt(other, instruction)) return;
    }
    if (begin < end) executor_.backend().Fill(executor_.arena() + begin, poison, end - begin);
  };
  const size_t count = static_cast<size_t>(program_.instructions_size());
  std::vector<std::vector<int>> born(count), dead(count + 1);
  for (int b = 0; b < plan_.buffers_size(); ++b) {
    const proto::BufferProto& buffer = plan_.buffers(b);
    if (buffer.program() != index_) continue;
    const bool input = std::find(input_buffers_.begin(), input_buffers_.end(), b) != input_buffers_.end();
    if (!input) born[static_cast<size_t>(buffer.first())].push_back(b);
    dead[static_cast<size_t>(buffer.last()) + 1].push_back(b);
  }
  Poison(0, poison);
  for (const proto::StatePlacement& state : plan_.states()) {
    poison_buffer(state.buffer(), -1, plan_.buffers(state.buffer()).size_bytes());
  }
  std::vector<Extent> inputs;
  for (const proto::ProgramInput& input : program_.inputs()) {
    if (plan_.buffers(program_.tensors(input.tensor()).buffer()).program() == -1) continue;
    inputs.push_back(TensorExtent(input.tensor()));
    poison_buffer(inputs.back().buffer, -1);
    if (!input.has_staging()) continue;
    const Extent& taken = inputs.back();
    const int64_t begin = plan_.buffers(input.staging()).offset();
    inputs.push_back({input.staging(), begin, begin + taken.end - taken.begin});
    poison_buffer(input.staging(), -1);
  }
  absl::Status status;
  CheckWrites("the host's inputs", -1, inputs, [&] { status = prepare(); });
  RETURN_IF_ERROR(status);
  if (!result_.differences.empty()) return absl::OkStatus();
  std::vector<bool> filled(static_cast<size_t>(program_.tensors_size()), false);
  for (const proto::ProgramInput& input : program_.inputs()) filled[static_cast<size_t>(input.tensor())] = true;
  for (int i = 0; i < program_.instructions_size(); ++i) {
    const proto::InstructionProto& instruction = program_.instructions(i);
    for (const int t : instruction.operands()) {
      if (filled[static_cast<size_t>(t)]) continue;
      AddDifference(absl::StrCat("instruction ", i, ", ", instruction.op(), " \"", instruction.name(), "\", reads %", t,
                                 " \"", program_.tensors(t).name(), "\", which nothing has written, in ",
                                 BufferText(program_.tensors(t).buffer())));
    }
    for (const int t : instruction.results()) filled[static_cast<size_t>(t)] = true;
    for (const int b : dead[static_cast<size_t>(i)]) poison_buffer(b, i);
    for (const int b : born[static_cast<size_t>(i)]) poison_buffer(b, i);
    CheckWrites(absl::StrCat("instruction ", i, ", ", instruction.op(), " \"", instruction.name(), "\","), i,
                WrittenBy(instruction), [&] {
                  run_.RunRange(i, i + 1);
                  executor_.backend().Synchronize();
                });
    if (!result_.differences.empty()) return absl::OkStatus();  // What follows would run on damaged values.
  }
  fingerprint = Fingerprint();
  return absl::OkStatus();
}

// Values that every update changes: moments decay, so zero would stay zero; the largest of a block of codes becomes the
// largest code; so many good steps raise the loss scale.
void FillStates(Executor& executor, const Program& program) {
  bool reads_batches = false;
  for (const BoundTensor& input : program.inputs()) reads_batches = reads_batches || input.role == Role::kData;
  std::vector<float> values;
  for (const BoundTensor& state : executor.states()) {
    if (state.role != Role::kOptimizerState && (state.role != Role::kGradient || reads_batches)) continue;
    const size_t n = static_cast<size_t>(state.type.num_elements());
    if (state.type.dtype == DType::kU8) {
      executor.backend().Fill(state.data, 0x40, state.type.byte_size());
    } else if (state.type.dtype == DType::kI32) {
      const std::vector<int32_t> steps(n, 1 << 30);
      executor.backend().CopyToDevice(state.data, steps.data(), state.type.byte_size());
    } else if (state.type.dtype == DType::kF32) {
      values.resize(n);
      for (size_t i = 0; i < n; ++i) values[i] = 1e-3f + 1e-6f * static_cast<float>(i % 997);
      executor.backend().CopyToDevice(state.data, values.data(), state.type.byte_size());
    }
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
  if (executor.backend().name() == "null" || executor.arena() == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("a step can be measured where one is computed, in an arena: not on ",
                                                   executor.backend().name(),
                                                   executor.arena() == nullptr ? " with guarded buffers" : ""));
  }
  Measurer measurer(executor, program);
  uint64_t fingerprints[3] = {};
  FillStates(executor, program);
  RETURN_IF_ERROR(measurer.RunByInstruction(kPoisons[1], prepare, fingerprints[2]));
  RETURN_IF_ERROR(restore());
  if (!measurer.result().differences.empty()) return std::move(measurer.result());
  for (int i = 0; i < 2; ++i) {
    FillStates(executor, program);
    RETURN_IF_ERROR(measurer.Run(kPoisons[i], prepare, fingerprints[i]));
    RETURN_IF_ERROR(restore());
  }
  measurer.FindIdleWorkspace();
  Measurement& result = measurer.result();
  result.same_over_poisons = fingerprints[0] == fingerprints[1] && fingerprints[0] == fingerprints[2];
  if (!result.same_over_poisons) {
    result.differences.push_back(
        "the results differ between two poisons of the unused memory: something is read before it is written");
  }
  if (!executor.backend()
           .host_addressable()) {  // A device takes what it keeps for a program when that first runs whole.
    RETURN_IF_ERROR(prepare());
    program.Run();
    executor.backend().Synchronize();
    RETURN_IF_ERROR(restore());
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

Measurement Together(const Measurement& a, const Measurement& b) {
  Measurement both = a;
  both.planned_arena_bytes = std::max(a.planned_arena_bytes, b.planned_arena_bytes);
  const Measurement& top = a.measured_arena_bytes >= b.measured_arena_bytes ? a : b;
  both.measured_arena_bytes = top.measured_arena_bytes;
  both.idle_workspace_bytes = std::min(top.idle_workspace_bytes, both.planned_arena_bytes - both.measured_arena_bytes);
  for (size_t p = 0; p < both.phases.size() && p < b.phases.size(); ++p) {
    both.phases[p].planned_bytes += b.phases[p].planned_bytes;
    both.phases[p].measured_bytes += b.phases[p].measured_bytes;
    both.phases[p].workspace_bytes += b.phases[p].workspace_bytes;
  }
  both.differences.insert(both.differences.end(), b.differences.begin(), b.differences.end());
  both.same_over_poisons = a.same_over_poisons && b.same_over_poisons;
  both.counted_allocations = a.counted_allocations && b.counted_allocations;
  both.allocations.count += b.allocations.count;
  both.allocations.bytes += b.allocations.bytes;
  both.allocations.small_count += b.allocations.small_count;
  return both;
}

int64_t ResidentBytes() { return StatusField("VmRSS:"); }
int64_t AnonymousBytes() { return StatusField("RssAnon:"); }
int64_t PeakResidentBytes() { return StatusField("VmHWM:"); }
void ResetPeakResidentBytes() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace mt
