#include "codegen/plan/plan.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/cuda_code.h"
#include "codegen/plan/plan_verifier.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "google/protobuf/stubs/logging.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/target.h"

namespace mt {
namespace {

constexpr char kMagic[8] = {'m', 't', 'p', 'l', 'a', 'n', '\r', '\n'};
constexpr size_t kHeaderBytes = 32;
constexpr int kRecursionLimit = 16;  // PlanProto nests six messages deep.

void PutInt(uint64_t value, int bytes, std::string& out) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

uint64_t GetInt(absl::string_view bytes, size_t at, int count) {
  uint64_t value = 0;
  for (int i = 0; i < count; ++i) {
    value |= uint64_t{static_cast<uint8_t>(bytes[at + static_cast<size_t>(i)])} << (8 * i);
  }
  return value;
}

// Row of the op, or null for a name that this build lacks.
bool RunsCode(const proto::InstructionProto& instruction) {
  const OpDef* op = FindOp(instruction.op());
  return op == nullptr || !op->is_view;
}

std::string Quote(absl::string_view text) { return absl::StrCat("\"", absl::CEscape(text), "\""); }

std::string TypeText(const proto::TensorTypeProto& type) {
  return absl::StrCat(type.dtype(), "[", absl::StrJoin(type.dims(), ","), "]");
}

std::string AttrText(const proto::AttrProto& attr) {
  switch (attr.value_case()) {
    case proto::AttrProto::kBoolValue:
      return AttrValueToString(AttrValue(attr.bool_value()));
    case proto::AttrProto::kIntValue:
      return AttrValueToString(AttrValue(int64_t{attr.int_value()}));
    case proto::AttrProto::kDoubleValue:
      return AttrValueToString(AttrValue(attr.double_value()));
    case proto::AttrProto::kStringValue:
      return AttrValueToString(AttrValue(attr.string_value()));
    case proto::AttrProto::kDtypeValue:
      return attr.dtype_value();
    case proto::AttrProto::kIntsValue:
      return AttrValueToString(
          AttrValue(IntList(attr.ints_value().values().begin(), attr.ints_value().values().end())));
    case proto::AttrProto::VALUE_NOT_SET:
      break;
  }
  return "?";
}

int ClassIndex(const proto::BufferProto& buffer) { return static_cast<int>(buffer.memory_class()) - 1; }

bool BelongsTo(const proto::BufferProto& buffer, int program) {
  return buffer.program() == -1 || buffer.program() == program;
}

int ProgramIndex(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  for (int i = 0; i < plan.programs_size(); ++i) {
    if (&plan.programs(i) == &program) return i;
  }
  CHECK(false) << "program " << program.name() << " is not of this plan";
  return -1;
}

std::string InstructionName(const proto::ProgramProto& program, int index) {
  if (index < 0 || index >= program.instructions_size()) return "";
  const proto::InstructionProto& instruction = program.instructions(index);
  return absl::StrCat(index, ": ", instruction.op(), instruction.name().empty() ? "" : " ", instruction.name());
}

// Of one optimizer step.
int64_t Microbatches(const proto::PlanProto& plan) {
  const auto fact = plan.facts().find("microbatches");
  return fact == plan.facts().end() ? 1 : std::clamp<int64_t>(fact->second, 1, 1 << 20);
}

}  // namespace

std::string SerializePlan(const proto::PlanProto& plan) {
  std::string payload;
  {
    google::protobuf::io::StringOutputStream stream(&payload);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);  // Maps sorted: equal plans, equal bytes.
    plan.SerializeToCodedStream(&coded);
  }
  std::string bytes(kMagic, sizeof(kMagic));
  bytes.reserve(kHeaderBytes + payload.size());
  PutInt(kPlanVersion, 4, bytes);
  PutInt(0, 4, bytes);
  PutInt(payload.size(), 8, bytes);
  PutInt(Fnv1a(payload), 8, bytes);
  bytes += payload;
  return bytes;
}

bool LooksLikePlan(absl::string_view bytes) {
  return bytes.size() >= sizeof(kMagic) && std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) == 0;
}

absl::StatusOr<proto::PlanProto> ParsePlan(absl::string_view bytes, absl::string_view name) {
  const auto error = [&](auto... parts) {
    return absl::FailedPreconditionError(absl::StrCat("plan ", name, ": ", parts...));
  };
  if (static_cast<int64_t>(bytes.size()) > kMaxPlanBytes) {
    return error(bytes.size(), " bytes; a plan has at most ", kMaxPlanBytes);
  }
  if (!LooksLikePlan(bytes)) {
    // A plan cut inside its first bytes is told apart from another kind of file.
    if (bytes.size() < sizeof(kMagic) && std::memcmp(bytes.data(), kMagic, bytes.size()) == 0) {
      return error("truncated: ", bytes.size(), " bytes; compile it again with mtc compile");
    }
    return error("not a plan (it does not begin like one); make one with mtc compile");
  }
  if (bytes.size() < kHeaderBytes) {
    return error("truncated: ", bytes.size(), " bytes of a header of ", kHeaderBytes,
                 "; compile it again with mtc compile");
  }
  const uint64_t version = GetInt(bytes, 8, 4);
  if (version != kPlanVersion) {
    return error("version ", version, ", this build reads version ", kPlanVersion,
                 "; compile it again with mtc compile");
  }
  const uint64_t length = GetInt(bytes, 16, 8);
  const absl::string_view payload = bytes.substr(kHeaderBytes);
  if (payload.size() < length) {
    return error("truncated: ", payload.size(), " of ", length, " bytes are there; compile it again with mtc compile");
  }
  if (payload.size() > length || GetInt(bytes, 12, 4) != 0) {
    return error("edited: ", payload.size(), " bytes after the header, ", length,
                 " were written; compile it again with mtc compile");
  }
  if (Fnv1a(payload) != GetInt(bytes, 24, 8)) {
    return error("edited or damaged: the checksum does not match; compile it again with mtc compile");
  }
  const google::protobuf::LogSilencer quiet;  // Strings that are not UTF-8 would be told on standard error.
  proto::PlanProto plan;
  google::protobuf::io::CodedInputStream stream(reinterpret_cast<const uint8_t*>(payload.data()),
                                                static_cast<int>(payload.size()));
  stream.SetRecursionLimit(kRecursionLimit);
  if (!plan.ParseFromCodedStream(&stream) || !stream.ConsumedEntireMessage()) {
    return error("its contents are no protobuf of a plan; compile it again with mtc compile");
  }
  return plan;
}

absl::Status SavePlan(const proto::PlanProto& plan, const std::string& path) {
  const std::string bytes = SerializePlan(plan);
  if (static_cast<int64_t>(bytes.size()) > kMaxPlanBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("plan ", path, ": ", bytes.size(), " bytes; a plan has at most ", kMaxPlanBytes));
  }
  return WriteFile(path, bytes);
}

absl::StatusOr<proto::PlanProto> LoadPlan(const std::string& path) {
  absl::StatusOr<std::string> bytes = ReadFile(path, kMaxPlanBytes);
  if (bytes.status().code() == absl::StatusCode::kResourceExhausted) {
    return absl::FailedPreconditionError(bytes.status().message());
  }
  RETURN_IF_ERROR(bytes);
  ASSIGN_OR_RETURN(proto::PlanProto plan, ParsePlan(*bytes, path));
  RETURN_IF_ERROR(Annotate(VerifyPlan(plan), absl::StrCat("plan ", path)));
  return plan;
}

absl::string_view MemoryClassName(proto::MemoryClass memory_class) {
  switch (memory_class) {
    case proto::PARAMETERS:
      return "parameters";
    case proto::GRADIENTS:
      return "gradients";
    case proto::OPTIMIZER_STATE:
      return "optimizer_state";
    case proto::ACTIVATIONS:
      return "activations";
    case proto::WORKSPACE:
      return "workspace";
    case proto::IO:
      return "io";
    default:
      return "unspecified";
  }
}

proto::MemoryClass StateClass(Role role) {
  if (role == Role::kParameter) return proto::PARAMETERS;
  return role == Role::kGradient ? proto::GRADIENTS : proto::OPTIMIZER_STATE;
}

const proto::ProgramProto* FindProgram(const proto::PlanProto& plan, absl::string_view name) {
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.name() == name) return &program;
  }
  return nullptr;
}

const proto::ProgramProto* MainProgram(const proto::PlanProto& plan) {
  const proto::ProgramProto* train = FindProgram(plan, "train");
  return train != nullptr || plan.programs().empty() ? train : &plan.programs(0);
}

int64_t AlignedBytes(const proto::PlanProto& plan, int64_t bytes) {
  const int64_t a = plan.alignment();
  return (bytes + a - 1) / a * a;
}

int64_t Sum(const ClassBytes& bytes) {
  int64_t sum = 0;
  for (const int64_t b : bytes) sum += b;
  return sum;
}

std::vector<ByteRange> WrittenRanges(const proto::PlanProto& plan, const proto::ProgramProto& program, Phase phase,
                                     bool workspace) {
  std::vector<ByteRange> ranges;
  const int64_t a = plan.alignment();
  const auto add = [&](int64_t offset, int64_t bytes) {
    ranges.push_back({offset / a * a, AlignedBytes(plan, offset + bytes)});
  };
  for (const proto::InstructionProto& instruction : program.instructions()) {
    if (instruction.phase() != PhaseName(phase) || !RunsCode(instruction)) continue;
    for (const int r : instruction.results()) {
      const proto::TensorProto& tensor = program.tensors(r);
      absl::StatusOr<TensorType> type = TypeFromProto(tensor.type());
      CHECK(type.ok());
      add(TensorOffset(plan, tensor), type->byte_size());
    }
    if (workspace && instruction.workspace() >= 0) {
      const proto::BufferProto& buffer = plan.buffers(instruction.workspace());
      add(buffer.offset(), buffer.size_bytes());
    }
  }
  std::sort(ranges.begin(), ranges.end());
  size_t kept = 0;
  for (const ByteRange& range : ranges) {
    if (kept > 0 && range.first <= ranges[kept - 1].second) {
      ranges[kept - 1].second = std::max(ranges[kept - 1].second, range.second);
    } else {
      ranges[kept++] = range;
    }
  }
  ranges.resize(kept);
  return ranges;
}

ProgramSummary Summarize(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const int index = ProgramIndex(plan, program);
  const int n = program.instructions_size();
  ProgramSummary summary;
  summary.name = program.name();
  summary.peak_bytes = program.peak_bytes();
  summary.lower_bound_bytes = program.lower_bound_bytes();
  summary.proof = program.proof();
  summary.peak_instruction = program.peak_instruction();
  summary.peak_name = InstructionName(program, summary.peak_instruction);

  // Change of the live bytes of each class at each instruction; the states are the start.
  ClassBytes states = {};
  std::vector<ClassBytes> change(static_cast<size_t>(n) + 2, ClassBytes{});
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (!BelongsTo(buffer, index)) continue;
    const size_t c = static_cast<size_t>(ClassIndex(buffer));
    const int64_t bytes = AlignedBytes(plan, buffer.size_bytes());
    if (buffer.program() == -1) {
      states[c] += bytes;
    } else {
      change[static_cast<size_t>(buffer.first())][c] += bytes;
      change[static_cast<size_t>(buffer.last()) + 1][c] -= bytes;
    }
  }
  ClassBytes live = states;
  for (int i = 0; i < std::max(n, 1); ++i) {
    for (size_t c = 0; c < kNumMemoryClasses; ++c) live[c] += change[static_cast<size_t>(i)][c];
    if (i == summary.peak_instruction) summary.at_peak = live;
    if (i >= n) break;
    const proto::InstructionProto& instruction = program.instructions(i);
    PhaseSummary& phase =
        summary.phases[static_cast<size_t>(ParsePhase(instruction.phase()).value_or(Phase::kForward))];
    if (phase.peak_instruction < 0 || Sum(live) > phase.live_bytes) {
      phase.at_peak = live;
      phase.live_bytes = Sum(live);
      phase.peak_instruction = i;
    }
    summary.flops += instruction.flops();
    summary.bytes += instruction.bytes();
    if (!RunsCode(instruction)) continue;
    ++phase.instructions;
    ++summary.instructions;
    if (instruction.recompute()) ++summary.recomputed;
  }
  for (int p = 0; p < kNumPhases; ++p) {
    for (const auto& [begin, end] : WrittenRanges(plan, program, static_cast<Phase>(p), /*workspace=*/true)) {
      summary.phases[static_cast<size_t>(p)].written_bytes += end - begin;
    }
  }
  return summary;
}

ProgramSummary SummarizeStep(const proto::PlanProto& plan) {
  ProgramSummary step = Summarize(plan, *MainProgram(plan));
  const proto::ProgramProto* program = FindProgram(plan, "apply");
  if (program == nullptr || program == MainProgram(plan)) return step;
  const int64_t microbatches = Microbatches(plan);
  const ProgramSummary apply = Summarize(plan, *program);
  for (int p = 0; p < kNumPhases; ++p) {
    const PhaseSummary& phase = apply.phases[static_cast<size_t>(p)];
    if (phase.instructions > 0 && step.phases[static_cast<size_t>(p)].instructions == 0) {
      step.phases[static_cast<size_t>(p)] = phase;
    }
  }
  // Of numbers from a file: beyond int64 they say nothing.
  step.flops = CheckedMultiply(step.flops, microbatches).value_or(step.flops) + apply.flops;
  step.bytes = CheckedMultiply(step.bytes, microbatches).value_or(step.bytes) + apply.bytes;
  step.instructions += apply.instructions;
  return step;
}

std::vector<int64_t> LogicalDims(const proto::StateProto& state) {
  if (state.logical_dims_size() > 0) return {state.logical_dims().begin(), state.logical_dims().end()};
  return {state.type().dims().begin(), state.type().dims().end()};
}

double InstructionSeconds(const proto::ProgramProto& program, const proto::InstructionProto& instruction,
                          const Roofline& roofline) {
  const OpDef* op = FindOp(instruction.op());
  if (op == nullptr || op->is_view) return 0;
  std::vector<TensorType> operands;
  for (const int t : instruction.operands()) {
    const absl::StatusOr<TensorType> type = TypeFromProto(program.tensors(t).type());
    CHECK(type.ok()) << type.status();
    operands.push_back(*type);
  }
  const absl::StatusOr<Attrs> attrs = AttrsFromProto(instruction.attrs());
  CHECK(attrs.ok()) << attrs.status();
  const Cost cost{.flops = instruction.flops(), .bytes_read = instruction.bytes()};
  return OpSeconds(*op, operands, *attrs, cost, roofline);
}

double ModelSeconds(const proto::PlanProto& plan) {
  const absl::StatusOr<Target> target = ParseTarget(plan.target());
  if (!target.ok() || !target->is_cuda()) return 0;
  Roofline rates = TargetRoofline(*target);
  rates.bytes_per_second = 0;
  const auto seconds_of = [&](const proto::ProgramProto& program) {
    double seconds = 0;
    for (const proto::InstructionProto& instruction : program.instructions()) {
      if (!instruction.recompute()) seconds += InstructionSeconds(program, instruction, rates);
    }
    return seconds;
  };
  const proto::ProgramProto* main = MainProgram(plan);
  const proto::ProgramProto* apply = FindProgram(plan, "apply");
  if (main == nullptr) return 0;
  if (apply == nullptr || apply == main) return seconds_of(*main);
  return static_cast<double>(Microbatches(plan)) * seconds_of(*main) + seconds_of(*apply);
}

std::vector<int> LiveBuffers(const proto::PlanProto& plan, const proto::ProgramProto& program, int instruction) {
  const int index = ProgramIndex(plan, program);
  std::vector<int> live;
  for (int i = 0; i < plan.buffers_size(); ++i) {
    const proto::BufferProto& buffer = plan.buffers(i);
    if (buffer.program() == -1 ||
        (buffer.program() == index && buffer.first() <= instruction && instruction <= buffer.last())) {
      live.push_back(i);
    }
  }
  std::stable_sort(live.begin(), live.end(),
                   [&](int a, int b) { return plan.buffers(a).size_bytes() > plan.buffers(b).size_bytes(); });
  return live;
}

std::string PlanText(const proto::PlanProto& plan) {
  std::string out = absl::StrCat("plan ", Quote(plan.model()), " target=", plan.target(),
                                 " passes=", Quote(plan.passes()), " version=", plan.version(), "\n");
  std::vector<std::string> facts;
  for (const auto& [name, value] : plan.facts()) facts.push_back(absl::StrCat("fact ", name, " = ", value, "\n"));
  std::sort(facts.begin(), facts.end());
  absl::StrAppend(&out, absl::StrJoin(facts, ""));
  std::vector<std::string> notes;
  for (const auto& [name, value] : plan.notes())
    notes.push_back(absl::StrCat("note ", name, " = ", Quote(value), "\n"));
  std::sort(notes.begin(), notes.end());
  absl::StrAppend(&out, absl::StrJoin(notes, ""));
  absl::StrAppend(&out, "arena ", plan.arena_bytes(), " align ", plan.alignment(), " persistent ",
                  plan.persistent_bytes(), " lower_bound ", plan.lower_bound_bytes(), " proof ", plan.proof(), "\n");
  for (int i = 0; i < plan.buffers_size(); ++i) {
    const proto::BufferProto& buffer = plan.buffers(i);
    absl::StrAppend(&out, "buffer ", i, " ", Quote(buffer.name()), " ", MemoryClassName(buffer.memory_class()),
                    " offset ", buffer.offset(), " size ", buffer.size_bytes());
    if (buffer.program() == -1) {
      absl::StrAppend(&out, " persistent\n");
    } else {
      const bool known = buffer.program() >= 0 && buffer.program() < plan.programs_size();
      absl::StrAppend(&out, " ", known ? plan.programs(buffer.program()).name() : "?", " live [", buffer.first(), ",",
                      buffer.last(), "]\n");
    }
  }
  for (const proto::StatePlacement& placement : plan.states()) {
    absl::StrAppend(&out, "state ", Quote(placement.state().name()), ": ", TypeText(placement.state().type()), " ",
                    placement.state().role(), " init=", placement.state().init(), " buffer ", placement.buffer(), "\n");
  }
  for (const proto::ProgramProto& program : plan.programs()) {
    absl::StrAppend(&out, "program @", program.name(), " peak ", program.peak_bytes(), " lower_bound ",
                    program.lower_bound_bytes(), " at ", program.peak_instruction(), " proof ", program.proof(),
                    " {\n");
    // "%3: f32[2,4] @7" is tensor 3 in buffer 7; "+256": 256 bytes into it.
    const auto tensor_text = [&](int index) {
      if (index < 0 || index >= program.tensors_size()) return absl::StrCat("%", index, ": ?");
      const proto::TensorProto& tensor = program.tensors(index);
      return absl::StrCat("%", index, ": ", TypeText(tensor.type()), " @", tensor.buffer(),
                          tensor.byte_offset() == 0 ? "" : absl::StrCat("+", tensor.byte_offset()));
    };
    for (const proto::ProgramInput& input : program.inputs()) {
      absl::StrAppend(&out, "  input ", Quote(input.name()), " ", input.role(), " ", tensor_text(input.tensor()), "\n");
    }
    for (int i = 0; i < program.instructions_size(); ++i) {
      const proto::InstructionProto& instruction = program.instructions(i);
      absl::StrAppend(
          &out, "  ", i, ": ",
          absl::StrJoin(instruction.results(), ", ",
                        [&](std::string* s, int r) { absl::StrAppend(s, tensor_text(r)); }),
          " = ", instruction.op(), "(",
          absl::StrJoin(instruction.operands(), ", ", [](std::string* s, int o) { absl::StrAppend(s, "%", o); }), ")");
      std::vector<std::string> attrs;
      for (const proto::AttrProto& attr : instruction.attrs()) {
        attrs.push_back(absl::StrCat(attr.name(), "=", AttrText(attr)));
      }
      if (!attrs.empty()) absl::StrAppend(&out, " {", absl::StrJoin(attrs, ", "), "}");
      if (!instruction.name().empty()) absl::StrAppend(&out, " ", Quote(instruction.name()));
      absl::StrAppend(&out, " ", instruction.phase());
      if (instruction.recompute()) absl::StrAppend(&out, " recompute");
      if (instruction.workspace() >= 0) absl::StrAppend(&out, " workspace @", instruction.workspace());
      absl::StrAppend(&out, "\n");
      const int at = ProgramIndex(plan, program);
      if (at < plan.cuda().programs_size() && i < plan.cuda().programs(at).instructions_size()) {
        for (const proto::CudaStepProto& step : plan.cuda().programs(at).instructions(i).steps()) {
          absl::StrAppend(&out, "    ", CudaStepText(step), "\n");
        }
      }
    }
    for (const proto::ProgramOutput& output : program.outputs()) {
      absl::StrAppend(&out, "  output ", Quote(output.name()), " %", output.tensor());
      if (output.donates() >= 0 && output.donates() < program.inputs_size()) {
        absl::StrAppend(&out, " donates %", program.inputs(output.donates()).tensor());
      }
      absl::StrAppend(&out, "\n");
    }
    absl::StrAppend(&out, "}\n");
  }
  return out;
}

}  // namespace mt
