#include "codegen/memory/buffer_assignment.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "codegen/memory/schedule.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/cost.h"
#include "ir/graph_io.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

class Stopwatch {
 public:
  // Seconds since the last call or the start.
  double Lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - start_).count();
    start_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string ValueName(const Value& value) {
  if (value.node->num_results() == 1) return value.node->name();
  return absl::StrCat(value.node->name(), ".", ResultName(value.node->op(), value.index));
}

absl::Status CheckArena(const Module& module, int64_t bytes) {
  if (bytes <= kMaxArenaBytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("model ", module.name(), ": more than ", kMaxArenaBytes, " bytes; reduce its size or --batch"));
}

int64_t Aligned(int64_t bytes) { return (bytes + kPlanAlignment - 1) / kPlanAlignment * kPlanAlignment; }

bool KeepsCaches(const Graph& graph) {
  const auto inputs = graph.inputs();
  return std::any_of(inputs.begin(), inputs.end(), [](const Node* input) { return input->role() == Role::kCache; });
}

// As programs are placed: those that keep caches last.
std::vector<const Graph*> InOrder(const Module& module) {
  std::vector<const Graph*> graphs;
  for (const bool caches : {false, true}) {
    for (const auto& graph : module.graphs()) {
      if (KeepsCaches(*graph) == caches) graphs.push_back(graph.get());
    }
  }
  return graphs;
}

// A graph in an order, its values in buffers that have no place yet.
struct Program {
  std::unique_ptr<Graph> copied;  // Where copies of donated values had to be inserted; else null.
  const Graph* source = nullptr;
  PlanGraph graph;
  std::vector<int> order;
  Sharing sharing;
  // What is packed: shared buffers but states', workspaces by position, staged inputs.
  std::vector<PackInterval> intervals;
};

absl::StatusOr<Program> MakeProgram(const Graph& original, const std::string& target) {
  Program program;
  if (NeedsDonationCopies(original)) {
    program.copied = original.Clone();
    program.copied->set_made_by("planner");
    RETURN_IF_ERROR(InsertDonationCopies(*program.copied));
  }
  program.source = program.copied ? program.copied.get() : &original;
  ASSIGN_OR_RETURN(program.graph, MakePlanGraph(*program.source, target, kPlanAlignment));
  const PlanGraph& graph = program.graph;
  program.order = Schedule(graph);
  program.sharing = ShareBuffers(graph, program.order);

  std::vector<int> interval_of(program.sharing.buffers.size(), -1);
  for (size_t b = 0; b < program.sharing.buffers.size(); ++b) {
    const SharedBuffer& buffer = program.sharing.buffers[b];
    if (buffer.state >= 0) continue;
    interval_of[b] = static_cast<int>(program.intervals.size());
    program.intervals.push_back(
        {buffer.first, buffer.last, graph.values[At(buffer.first_value)].value.type().byte_size()});
  }
  // In-place results may be a few bytes larger than what they replace, within the same aligned size.
  for (size_t v = 0; v < graph.values.size(); ++v) {
    const int i = interval_of[At(program.sharing.buffer_of[v])];
    if (i < 0) continue;
    int64_t& bytes = program.intervals[At(i)].size_bytes;
    bytes = std::max(bytes, graph.values[v].value.type().byte_size());
  }
  for (size_t i = 0; i < program.order.size(); ++i) {
    const PlanNode& node = graph.nodes[At(program.order[i])];
    const int64_t at = static_cast<int64_t>(i);
    if (node.workspace_bytes > 0) program.intervals.push_back({at, at, node.workspace_bytes});
  }
  if (StagesInputs(target)) {
    const int64_t last = std::max<int64_t>(static_cast<int64_t>(program.order.size()), 1) - 1;
    for (int v = 0; v < graph.num_inputs; ++v) {
      const Node& input = *graph.values[At(v)].value.node;
      if (input.role() == Role::kData) program.intervals.push_back({0, last, input.result_types()[0].byte_size()});
    }
  }
  return program;
}

absl::StatusOr<Packing> PackProgram(const Module& module, const Program& program, PackOptions options,
                                    int64_t persistent_bytes) {
  options.alignment = kPlanAlignment;
  ASSIGN_OR_RETURN(Packing packing, PackArena(program.intervals, options));
  RETURN_IF_ERROR(CheckArena(module, packing.height_bytes));
  RETURN_IF_ERROR(CheckArena(module, persistent_bytes + packing.height_bytes));
  return packing;
}

class Planner {
 public:
  Planner(const Module& module, const PlanOptions& options, PlanTimes* times)
      : module_(module), options_(options), times_(times) {}

  absl::StatusOr<proto::PlanProto> Run() {
    plan_.set_version(kPlanVersion);
    plan_.set_model(module_.name());
    plan_.set_target(options_.target);
    plan_.set_fingerprint(module_.Fingerprint());
    for (const auto& [name, value] : module_.facts()) (*plan_.mutable_facts())[name] = value;
    (*plan_.mutable_facts())["parameters"] = module_.num_parameters();
    plan_.set_alignment(kPlanAlignment);
    RETURN_IF_ERROR(PlaceStates());
    int64_t arena = plan_.persistent_bytes(), lower_bound = plan_.persistent_bytes();
    for (const Graph* graph : InOrder(module_)) {
      const int buffers = plan_.buffers_size();
      RETURN_IF_ERROR(Annotate(PlaceProgram(*graph), absl::StrCat("graph ", graph->name())));
      const int64_t peak = plan_.programs(plan_.programs_size() - 1).peak_bytes();
      if (KeepsCaches(*graph) && plan_.programs_size() > 1 && peak > arena) {
        plan_.mutable_programs()->RemoveLast();
        plan_.mutable_buffers()->DeleteSubrange(buffers, plan_.buffers_size() - buffers);
      } else {
        arena = std::max(arena, peak);
      }
    }
    for (const proto::ProgramProto& program : plan_.programs()) {
      arena = std::max(arena, program.peak_bytes());
      lower_bound = std::max(lower_bound, program.lower_bound_bytes());
    }
    // A program that cannot be smaller and is as large as the arena proves it.
    PackProof proof = arena == lower_bound ? PackProof::kLowerBoundTight : PackProof::kGap;
    for (const proto::ProgramProto& program : plan_.programs()) {
      if (proof == PackProof::kGap && program.peak_bytes() == arena &&
          program.proof() == PackProofName(PackProof::kSearchExhausted)) {
        proof = PackProof::kSearchExhausted;
      }
    }
    plan_.set_arena_bytes(arena);
    plan_.set_lower_bound_bytes(lower_bound);
    plan_.set_proof(std::string(PackProofName(proof)));
    return std::move(plan_);
  }

 private:
  absl::Status PlaceStates() {
    int64_t offset = 0;
    for (const State& state : module_.states()) {
      proto::BufferProto& buffer = *plan_.add_buffers();
      buffer.set_name(state.name);
      buffer.set_offset(offset);
      buffer.set_size_bytes(state.type.byte_size());
      buffer.set_memory_class(StateClass(state.role));
      buffer.set_program(-1);
      RETURN_IF_ERROR(CheckArena(module_, buffer.size_bytes()));
      offset += AlignedBytes(plan_, buffer.size_bytes());
      RETURN_IF_ERROR(CheckArena(module_, offset));
      proto::StatePlacement& placement = *plan_.add_states();
      placement.set_buffer(plan_.buffers_size() - 1);
      state_buffer_[state.name] = placement.buffer();
      proto::StateProto& proto = *placement.mutable_state();
      proto.set_name(state.name);
      *proto.mutable_type() = ToProto(state.type);
      for (const int64_t dim : state.logical_dims) proto.add_logical_dims(dim);
      proto.set_role(std::string(RoleName(state.role)));
      proto.set_init(state.init.ToString());
    }
    plan_.set_persistent_bytes(offset);
    return absl::OkStatus();
  }

  absl::Status PlaceProgram(const Graph& original) {
    Stopwatch watch;
    ASSIGN_OR_RETURN(const Program made, MakeProgram(original, options_.target));
    const PlanGraph& graph = made.graph;
    const std::vector<int>& order = made.order;
    const Sharing& sharing = made.sharing;
    if (times_ != nullptr) times_->schedule_seconds += watch.Lap();

    const int index = plan_.programs_size();
    proto::ProgramProto& program = *plan_.add_programs();
    program.set_name(made.source->name());
    const std::vector<proto::MemoryClass> classes = Classes(graph, sharing);

    // Buffers of the plan, one for each interval, in their order.
    const int first_buffer = plan_.buffers_size();
    const auto add_buffer = [&](std::string name, proto::MemoryClass c) {
      const PackInterval& interval = made.intervals[At(plan_.buffers_size() - first_buffer)];
      proto::BufferProto& buffer = *plan_.add_buffers();
      buffer.set_name(std::move(name));
      buffer.set_size_bytes(interval.size_bytes);
      buffer.set_memory_class(c);
      buffer.set_program(index);
      buffer.set_first(static_cast<int32_t>(interval.first));
      buffer.set_last(static_cast<int32_t>(interval.last));
      return plan_.buffers_size() - 1;
    };
    std::vector<int> plan_buffer;  // By buffer of `sharing`.
    for (size_t b = 0; b < sharing.buffers.size(); ++b) {
      const SharedBuffer& buffer = sharing.buffers[b];
      const Value& value = graph.values[At(buffer.first_value)].value;
      plan_buffer.push_back(buffer.state >= 0 ? state_buffer_.at(value.node->name())
                                              : add_buffer(ValueName(value), classes[b]));
    }
    std::vector<int> workspaces(order.size(), -1);
    for (size_t i = 0; i < order.size(); ++i) {
      const PlanNode& node = graph.nodes[At(order[i])];
      if (node.workspace_bytes == 0) continue;
      workspaces[i] = add_buffer(absl::StrCat(node.node->name(), ".workspace"), proto::WORKSPACE);
    }
    Emit(graph, order, sharing, plan_buffer, workspaces, program);
    if (StagesInputs(options_.target)) {
      for (int v = 0; v < graph.num_inputs; ++v) {
        const Node& input = *graph.values[At(v)].value.node;
        if (input.role() != Role::kData) continue;
        program.mutable_inputs(v)->set_staging(add_buffer(absl::StrCat(input.name(), ".next"), proto::IO));
      }
    }
    CHECK_EQ(At(plan_.buffers_size() - first_buffer), made.intervals.size());
    if (times_ != nullptr) times_->assign_seconds += watch.Lap();

    ASSIGN_OR_RETURN(const Packing packing, PackProgram(module_, made, options_.pack, plan_.persistent_bytes()));
    for (size_t i = 0; i < made.intervals.size(); ++i) {
      plan_.mutable_buffers(first_buffer + static_cast<int>(i))
          ->set_offset(plan_.persistent_bytes() + packing.offsets[i]);
    }
    program.set_peak_bytes(plan_.persistent_bytes() + packing.height_bytes);
    program.set_lower_bound_bytes(plan_.persistent_bytes() + packing.lower_bound_bytes);
    program.set_peak_instruction(static_cast<int32_t>(packing.peak_step));
    program.set_proof(std::string(PackProofName(packing.proof)));
    if (times_ != nullptr) times_->pack_seconds += watch.Lap();
    return absl::OkStatus();
  }

  // By buffer of `sharing`; a state's means nothing. A cache is an activation.
  static std::vector<proto::MemoryClass> Classes(const PlanGraph& graph, const Sharing& sharing) {
    std::vector<proto::MemoryClass> classes(sharing.buffers.size(), proto::ACTIVATIONS);
    for (size_t v = 0; v < graph.values.size(); ++v) {
      const PlanValue& value = graph.values[v];
      if (value.state >= 0) continue;
      proto::MemoryClass& c = classes[At(sharing.buffer_of[v])];
      if (value.producer < 0 || value.is_output) {
        c = proto::IO;
        continue;
      }
      if (c != proto::ACTIVATIONS || value.root != static_cast<int>(v) ||
          graph.nodes[At(value.producer)].node->phase() != Phase::kBackward) {
        continue;
      }
      for (const int reader : value.readers) {
        if (graph.nodes[At(reader)].node->phase() == Phase::kOptimizer) c = proto::GRADIENTS;
      }
    }
    return classes;
  }

  void Emit(const PlanGraph& graph, const std::vector<int>& order, const Sharing& sharing,
            const std::vector<int>& plan_buffer, const std::vector<int>& workspaces, proto::ProgramProto& program) {
    std::vector<int> tensor_of(graph.values.size(), -1);
    program.mutable_tensors()->Reserve(static_cast<int>(graph.values.size()));
    program.mutable_instructions()->Reserve(static_cast<int>(order.size()));
    const auto add_tensor = [&](int v) {
      const Value& value = graph.values[At(v)].value;
      proto::TensorProto& tensor = *program.add_tensors();
      *tensor.mutable_type() = ToProto(value.type());
      tensor.set_buffer(plan_buffer[At(sharing.buffer_of[At(v)])]);
      tensor.set_name(ValueName(value));
      tensor_of[At(v)] = program.tensors_size() - 1;
    };
    absl::flat_hash_map<const Node*, int> input_index;
    for (int v = 0; v < graph.num_inputs; ++v) {
      const Node* node = graph.values[At(v)].value.node;
      add_tensor(v);
      input_index[node] = program.inputs_size();
      proto::ProgramInput& input = *program.add_inputs();
      input.set_name(node->name());
      input.set_role(std::string(RoleName(node->role())));
      input.set_tensor(tensor_of[At(v)]);
    }
    absl::flat_hash_map<Value, int> value_index;
    for (size_t v = 0; v < graph.values.size(); ++v) value_index[graph.values[v].value] = static_cast<int>(v);
    for (size_t i = 0; i < order.size(); ++i) {
      const PlanNode& entry = graph.nodes[At(order[i])];
      const Node& node = *entry.node;
      proto::InstructionProto& instruction = *program.add_instructions();
      instruction.set_op(std::string(node.op().name));
      for (const auto& [name, value] : node.attrs().entries()) *instruction.add_attrs() = ToProto(name, value);
      for (const int v : entry.operands) instruction.add_operands(tensor_of[At(v)]);
      for (const int v : entry.results) {
        add_tensor(v);
        instruction.add_results(tensor_of[At(v)]);
      }
      instruction.set_workspace(workspaces[i]);
      instruction.set_name(node.name());
      instruction.set_phase(std::string(PhaseName(node.phase())));
      instruction.set_recompute(node.recompute_of() != nullptr);
      instruction.set_made_by(node.made_by());
      if (!entry.is_view) {
        const Cost cost = NodeCost(node);
        instruction.set_flops(cost.flops);
        instruction.set_bytes(cost.bytes_read + cost.bytes_written);
      }
    }
    for (const Output& output : graph.graph->outputs()) {
      proto::ProgramOutput& proto = *program.add_outputs();
      proto.set_name(output.name);
      proto.set_tensor(tensor_of[At(value_index.at(output.value))]);
      proto.set_donates(output.donates == nullptr ? -1 : input_index.at(output.donates));
    }
  }

  const Module& module_;
  const PlanOptions& options_;
  PlanTimes* times_;
  proto::PlanProto plan_;
  absl::flat_hash_map<std::string, int> state_buffer_;
};

}  // namespace

absl::StatusOr<proto::PlanProto> PlanModule(const Module& module, const PlanOptions& options, PlanTimes* times) {
  return Planner(module, options, times).Run();
}

absl::StatusOr<ArenaSize> SizeArena(const Module& module, const PlanOptions& options) {
  ArenaSize size;
  for (const State& state : module.states()) {
    RETURN_IF_ERROR(CheckArena(module, state.type.byte_size()));
    size.persistent_bytes += Aligned(state.type.byte_size());
    RETURN_IF_ERROR(CheckArena(module, size.persistent_bytes));
  }
  size.arena_bytes = size.lower_bound_bytes = size.persistent_bytes;
  const std::vector<const Graph*> graphs = InOrder(module);
  for (const Graph* graph : graphs) {
    const auto place = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(const Program program, MakeProgram(*graph, options.target));
      ASSIGN_OR_RETURN(const Packing packing, PackProgram(module, program, options.pack, size.persistent_bytes));
      const int64_t peak = size.persistent_bytes + packing.height_bytes;
      if (KeepsCaches(*graph) && graph != graphs[0] && peak > size.arena_bytes) return absl::OkStatus();
      size.arena_bytes = std::max(size.arena_bytes, peak);
      size.lower_bound_bytes = std::max(size.lower_bound_bytes, size.persistent_bytes + packing.lower_bound_bytes);
      size.instructions += static_cast<int64_t>(program.order.size());
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(Annotate(place(), absl::StrCat("graph ", graph->name())));
  }
  return size;
}

}  // namespace mt
