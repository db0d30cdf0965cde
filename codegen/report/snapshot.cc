// A plan as a snapshot of PyTorch's caching allocator. The format is what torch.cuda.memory._snapshot returns and
// MemoryViz.js reads: segments of blocks that lie one behind the other, and the events of each device.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/plan.h"
#include "codegen/report/chart.h"
#include "codegen/report/peak.h"
#include "codegen/report/report.h"
#include "ir/base/json.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

size_t At(int64_t i) { return static_cast<size_t>(i); }

// Where the arena lies in the picture; any address that a double holds exactly will do.
constexpr int64_t kBase = int64_t{1} << 40;

Json Frame(absl::string_view file, int64_t line, absl::string_view name) {
  return {{"filename", PrintableText(file)}, {"line", line}, {"name", PrintableText(name)}};
}

// What the viewer shows of a buffer: the instruction that makes it, then what it is.
Json Frames(const proto::PlanProto& plan, const proto::ProgramProto& program, int buffer,
            const proto::TensorProto* tensor, const proto::InstructionProto* instruction) {
  const proto::BufferProto& proto = plan.buffers(buffer);
  Json frames = Json::array();
  if (instruction != nullptr) {
    frames.push_back(Frame(
        absl::StrCat(program.name(), " ", instruction->phase()), proto.first(),
        absl::StrCat(instruction->op(), " ", instruction->name(), instruction->recompute() ? " (recomputed)" : "")));
  }
  const std::string type = tensor == nullptr ? ""
                                             : absl::StrCat(" ", tensor->type().dtype(), "[",
                                                            absl::StrJoin(tensor->type().dims(), ","), "]");
  frames.push_back(Frame(MemoryClassName(proto.memory_class()), buffer, absl::StrCat(proto.name(), type)));
  if (instruction != nullptr) {
    frames.push_back(
        Frame("made by", proto.first(),
              instruction->made_by().empty() ? "the model" : absl::StrCat("pass ", instruction->made_by())));
  }
  return frames;
}

Json Snapshot(const proto::PlanProto& plan) {
  const proto::ProgramProto& program = LargestProgram(plan);
  int index = 0;
  while (&plan.programs(index) != &program) ++index;
  std::vector<const proto::TensorProto*> tensor_of(At(plan.buffers_size()), nullptr);
  for (const proto::TensorProto& tensor : program.tensors()) {
    if (tensor_of[At(tensor.buffer())] == nullptr) tensor_of[At(tensor.buffer())] = &tensor;
  }
  std::vector<bool> is_input(At(plan.buffers_size()), false);
  for (const proto::ProgramInput& input : program.inputs()) {
    is_input[At(program.tensors(input.tensor()).buffer())] = true;
  }

  const int steps = std::max(program.instructions_size(), 1);
  std::vector<std::vector<int>> begins(At(steps)), ends(At(steps));
  std::vector<std::pair<int64_t, int>> states;  // Offset and buffer.
  for (int b = 0; b < plan.buffers_size(); ++b) {
    const proto::BufferProto& buffer = plan.buffers(b);
    if (buffer.program() == -1) states.push_back({buffer.offset(), b});
    if (buffer.program() != index) continue;
    begins[At(buffer.first())].push_back(b);
    ends[At(buffer.last())].push_back(b);
  }
  std::sort(states.begin(), states.end());

  // Blocks fill the segment: the states, and what is free when the program has ended.
  Json blocks = Json::array();
  int64_t at = 0, active = 0, requested = 0;
  const auto fill = [&](int64_t to) {
    if (to <= at) return;
    blocks.push_back({{"address", kBase + at},
                      {"size", to - at},
                      {"requested_size", to - at},
                      {"state", "inactive"},
                      {"frames", Json::array()}});
    at = to;
  };
  for (const auto& [offset, b] : states) {
    const int64_t bytes = plan.buffers(b).size_bytes(), aligned = AlignedBytes(plan, bytes);
    fill(offset);
    blocks.push_back({{"address", kBase + offset},
                      {"size", aligned},
                      {"requested_size", bytes},
                      {"state", "active_allocated"},
                      {"frames", Frames(plan, program, b, tensor_of[At(b)], nullptr)}});
    at = offset + aligned;
    active += aligned;
    requested += bytes;
  }
  fill(plan.arena_bytes());

  Json events = Json::array();
  const auto event = [&](absl::string_view action, int b, int step, const Json& frames) {
    const proto::BufferProto& buffer = plan.buffers(b);
    events.push_back({{"action", std::string(action)},
                      {"addr", kBase + buffer.offset()},
                      {"size", AlignedBytes(plan, buffer.size_bytes())},
                      {"stream", 0},
                      {"time_us", step},
                      {"frames", frames}});
  };
  absl::flat_hash_map<int, Json> frames_of;
  for (int i = 0; i < steps; ++i) {
    for (const int b : begins[At(i)]) {
      const bool made = !is_input[At(b)] && i < program.instructions_size();
      const auto frames =
          frames_of.emplace(b, Frames(plan, program, b, tensor_of[At(b)], made ? &program.instructions(i) : nullptr));
      event("alloc", b, i, frames.first->second);
    }
    for (const int b : ends[At(i)]) {
      event("free_requested", b, i, frames_of[b]);
      event("free_completed", b, i, frames_of[b]);
    }
  }
  return {{"segments", Json::array({{{"device", 0},
                                     {"address", kBase},
                                     {"total_size", std::max<int64_t>(at, plan.arena_bytes())},
                                     {"allocated_size", active},
                                     {"active_size", active},
                                     {"requested_size", requested},
                                     {"stream", 0},
                                     {"segment_type", "large"},
                                     {"segment_pool_id", Json::array({0, 0})},
                                     {"is_expandable", false},
                                     {"frames", Json::array()},
                                     {"blocks", std::move(blocks)}}})},
          {"device_traces", Json::array({std::move(events)})},
          {"allocator_settings", {{"planned_by", PrintableText(plan.compiler())}}},
          {"external_annotations", Json::array()}};
}

// Python's pickle, protocol 2, of strings, integers, booleans, lists and dictionaries: Lib/pickletools.py has the
// opcodes. Strings are written once and referred to after that.
class Pickler {
 public:
  std::string Run(const Json& json) {
    out_ = "\x80\x02";
    Value(json);
    out_ += ".";
    return std::move(out_);
  }

 private:
  static constexpr size_t kBatch = 1000;  // Items that a reader takes at once.

  void Little(uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out_.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
  }
  void Value(const Json& json) {
    switch (json.type()) {
      case Json::value_t::object:
        return Object(json);
      case Json::value_t::array:
        return Array(json);
      case Json::value_t::string:
        return String(json.get_ref<const std::string&>());
      case Json::value_t::boolean:
        out_ += json.get<bool>() ? "\x88" : "\x89";
        return;
      default:
        return Int(json.get<int64_t>());
    }
  }
  void Int(int64_t value) {
    if (value >= 0 && value < 256) {
      out_ += "K";
      Little(static_cast<uint64_t>(value), 1);
    } else if (value >= -(int64_t{1} << 31) && value < (int64_t{1} << 31)) {
      out_ += "J";
      Little(static_cast<uint64_t>(value), 4);
    } else {
      out_ += "\x8a\x08";
      Little(static_cast<uint64_t>(value), 8);
    }
  }
  void String(const std::string& text) {
    const auto [known, is_new] = memo_.try_emplace(text, memo_.size());
    if (is_new) {
      out_ += "X";
      Little(text.size(), 4);
      out_ += text;
    }
    out_ += is_new ? "r" : "j";
    Little(known->second, 4);
  }
  void Array(const Json& json) {
    out_ += "]";
    for (size_t i = 0; i < json.size(); i += kBatch) {
      out_ += "(";
      for (size_t k = i; k < std::min(i + kBatch, json.size()); ++k) Value(json[k]);
      out_ += "e";
    }
  }
  void Object(const Json& json) {
    out_ += "}(";
    for (const auto& [key, value] : json.items()) {
      String(key);
      Value(value);
    }
    out_ += "u";
  }

  std::string out_;
  absl::flat_hash_map<std::string, size_t> memo_;
};

}  // namespace

std::string PlanSnapshotPickle(const proto::PlanProto& plan) { return Pickler().Run(Snapshot(plan)); }

std::string PlanSnapshotJson(const proto::PlanProto& plan) { return absl::StrCat(Snapshot(plan).dump(), "\n"); }

}  // namespace mt
