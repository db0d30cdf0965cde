#include "codegen/plan/plan_verifier.h"

#include <algorithm>
#include <map>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/cuda_code.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/resources.h"
#include "ir/base/status_macros.h"
#include "ir/graph.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/target.h"

namespace mt {
namespace {

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat(parts...));
}

bool InRange(int64_t index, int64_t size) { return 0 <= index && index < size; }

class PlanVerifier {
 public:
  explicit PlanVerifier(const proto::PlanProto& plan) : plan_(plan) {}

  absl::Status Run() {
    RETURN_IF_ERROR(CheckHeader());
    RETURN_IF_ERROR(CheckBuffers());
    RETURN_IF_ERROR(CheckStates());
    int64_t arena = plan_.persistent_bytes(), lower_bound = plan_.persistent_bytes();
    absl::flat_hash_set<std::string> names;
    for (int p = 0; p < plan_.programs_size(); ++p) {
      const proto::ProgramProto& program = plan_.programs(p);
      const std::string where = absl::StrCat("program ", program.name());
      if (program.name().empty() || !names.insert(program.name()).second) {
        return Bad("program ", p, " \"", program.name(), "\": its name is empty or used twice");
      }
      RETURN_IF_ERROR(Annotate(CheckOverlap(p), where));
      RETURN_IF_ERROR(Annotate(CheckStatistics(p), where));
      RETURN_IF_ERROR(Annotate(ProgramVerifier(*this, p).Run(), where));
      arena = std::max(arena, program.peak_bytes());
      lower_bound = std::max(lower_bound, program.lower_bound_bytes());
    }
    for (int b = 0; b < plan_.buffers_size(); ++b) {
      if (!owned_[static_cast<size_t>(b)]) return Bad(BufferName(b), " belongs to no tensor, workspace or state");
    }
    if (plan_.arena_bytes() != arena) {
      return Bad("arena_bytes is ", plan_.arena_bytes(), "; the programs' buffers end at ", arena);
    }
    if (plan_.lower_bound_bytes() != lower_bound) {
      return Bad("lower_bound_bytes is ", plan_.lower_bound_bytes(), "; the programs' largest is ", lower_bound);
    }
    RETURN_IF_ERROR(CheckProof(plan_.proof(), arena, lower_bound));
    return VerifyCudaCode(plan_);
  }

 private:
  static absl::Status CheckProof(const std::string& proof, int64_t peak, int64_t lower_bound) {
    if (proof != "lower_bound" && proof != "exhausted" && proof != "gap") {
      return Bad("proof \"", proof, "\"; expected lower_bound, exhausted or gap");
    }
    if ((proof == "lower_bound") != (peak == lower_bound)) {
      return Bad("proof ", proof, " with ", peak, " bytes over a lower bound of ", lower_bound);
    }
    return absl::OkStatus();
  }

  std::string BufferName(int b) const {
    const proto::BufferProto& buffer = plan_.buffers(b);
    std::string live =
        buffer.program() == -1 ? "live always" : absl::StrCat("live [", buffer.first(), ",", buffer.last(), "]");
    return absl::StrCat("buffer ", b, " \"", buffer.name(), "\" (", live, ", bytes ", buffer.offset(), "...",
                        buffer.offset() + buffer.size_bytes(), ")");
  }

  int64_t Aligned(int64_t bytes) const { return AlignedBytes(plan_, bytes); }

  absl::Status CheckHeader() {
    if (plan_.version() != kPlanVersion) {
      return Bad("version ", plan_.version(), ", this build reads version ", kPlanVersion,
                 "; compile it again with mtc compile");
    }
    if (plan_.target().empty()) return Bad("it names no target");
    const absl::StatusOr<Target> target = ParseTarget(plan_.target());
    if (!target.ok()) return Bad(target.status().message());
    const int64_t a = plan_.alignment();
    if (a < kPlanAlignment || a > (int64_t{1} << 20) || (a & (a - 1)) != 0) {
      return Bad("alignment ", a, "; expected a power of two from ", kPlanAlignment, " to 2^20");
    }
    if (plan_.arena_bytes() < 0 || plan_.arena_bytes() > kMaxArenaBytes) {
      return Bad("arena of ", plan_.arena_bytes(), " bytes; expected 0 to ", kMaxArenaBytes);
    }
    if (plan_.persistent_bytes() < 0 || plan_.persistent_bytes() > plan_.arena_bytes() ||
        plan_.persistent_bytes() % a != 0) {
      return Bad("persistent part of ", plan_.persistent_bytes(), " bytes; expected a multiple of ", a,
                 " up to the arena's ", plan_.arena_bytes());
    }
    if (plan_.programs().empty()) return Bad("it has no programs");
    return absl::OkStatus();
  }

  absl::Status CheckBuffers() {
    std::vector<int> persistent;
    for (int b = 0; b < plan_.buffers_size(); ++b) {
      const proto::BufferProto& buffer = plan_.buffers(b);
      if (buffer.offset() < 0 || buffer.size_bytes() < 1 || buffer.offset() > plan_.arena_bytes() ||
          buffer.size_bytes() > plan_.arena_bytes() ||
          Aligned(buffer.size_bytes()) > plan_.arena_bytes() - buffer.offset()) {
        return Bad("buffer ", b, " \"", buffer.name(), "\": offset ", buffer.offset(), " and size ",
                   buffer.size_bytes(), " do not lie in the arena of ", plan_.arena_bytes(), " bytes");
      }
      if (buffer.offset() % plan_.alignment() != 0) {
        return Bad(BufferName(b), ": its offset is no multiple of ", plan_.alignment());
      }
      if (buffer.memory_class() < proto::PARAMETERS || buffer.memory_class() > proto::IO) {
        return Bad(BufferName(b), ": memory class ", static_cast<int>(buffer.memory_class()), " is not known");
      }
      if (buffer.program() == -1) {
        if (buffer.offset() + Aligned(buffer.size_bytes()) > plan_.persistent_bytes()) {
          return Bad(BufferName(b), ": a state outside the persistent part of ", plan_.persistent_bytes(), " bytes");
        }
        persistent.push_back(b);
        continue;
      }
      if (!InRange(buffer.program(), plan_.programs_size())) {
        return Bad("buffer ", b, " \"", buffer.name(), "\": program ", buffer.program(), " of ", plan_.programs_size());
      }
      const int n = std::max(plan_.programs(buffer.program()).instructions_size(), 1);
      if (!InRange(buffer.first(), n) || !InRange(buffer.last(), n) || buffer.last() < buffer.first()) {
        return Bad(BufferName(b), ": its live range is not inside the program's ", n, " instructions");
      }
      if (buffer.offset() < plan_.persistent_bytes()) {
        return Bad(BufferName(b), ": inside the persistent part of ", plan_.persistent_bytes(), " bytes");
      }
    }
    owned_.assign(static_cast<size_t>(plan_.buffers_size()), false);
    std::sort(persistent.begin(), persistent.end(),
              [&](int a, int b) { return plan_.buffers(a).offset() < plan_.buffers(b).offset(); });
    for (size_t i = 1; i < persistent.size(); ++i) RETURN_IF_ERROR(CheckDisjoint(persistent[i - 1], persistent[i]));
    return absl::OkStatus();
  }

  // Of buffers that are live at once, `a` not above `b`.
  absl::Status CheckDisjoint(int a, int b) const {
    const int64_t shared = plan_.buffers(a).offset() + plan_.buffers(a).size_bytes() - plan_.buffers(b).offset();
    if (shared <= 0) return absl::OkStatus();
    return Bad(BufferName(a), " and ", BufferName(b), " are live at once and share ",
               std::min(shared, plan_.buffers(b).size_bytes()), " bytes");
  }

  absl::Status CheckStates() {
    absl::flat_hash_set<std::string> names;
    for (const proto::StatePlacement& placement : plan_.states()) {
      const std::string& name = placement.state().name();
      if (!names.insert(name).second) return Bad("state \"", name, "\" is there twice");
      if (!InRange(placement.buffer(), plan_.buffers_size()) || plan_.buffers(placement.buffer()).program() != -1) {
        return Bad("state \"", name, "\": buffer ", placement.buffer(), " is no persistent one");
      }
      if (owned_[static_cast<size_t>(placement.buffer())]) {
        return Bad("state \"", name, "\": buffer ", placement.buffer(), " is another state's");
      }
      owned_[static_cast<size_t>(placement.buffer())] = true;
      ASSIGN_OR_RETURN(const TensorType type, Type(placement.state().type(), absl::StrCat("state \"", name, "\"")));
      if (type.byte_size() != plan_.buffers(placement.buffer()).size_bytes()) {
        return Bad("state \"", name, "\": ", type.ToString(), " has ", type.byte_size(), " bytes, its buffer ",
                   plan_.buffers(placement.buffer()).size_bytes());
      }
      const std::optional<Role> role = ParseRole(placement.state().role());
      if (!role || !IsState(*role)) {
        return Bad("state \"", name, "\": role \"", placement.state().role(), "\" is not a state's");
      }
      const proto::MemoryClass expected = StateClass(*role);
      if (plan_.buffers(placement.buffer()).memory_class() != expected) {
        return Bad("state \"", name, "\" is a ", placement.state().role(), ", its buffer's class ",
                   MemoryClassName(plan_.buffers(placement.buffer()).memory_class()));
      }
      const absl::StatusOr<Init> init = ParseInit(placement.state().init());
      if (!init.ok()) return Bad("state \"", name, "\": ", init.status().message());
      if (init->kind != Init::Kind::kZeros && type.dtype != DType::kF32) {
        return Bad("state \"", name, "\": ", type.ToString(), " begins as ", placement.state().init(),
                   "; other than f32 begin as zeros");
      }
      const auto& logical = placement.state().logical_dims();
      if (!logical.empty()) {
        bool fits = logical.size() == type.rank();
        for (int i = 0; fits && i < logical.size(); ++i) fits = 1 <= logical.Get(i) && logical.Get(i) <= type.dim(i);
        if (!fits) return Bad("state \"", name, "\": its logical dimensions do not fit ", type.ToString());
      }
      states_[name] = &placement;
    }
    for (int b = 0; b < plan_.buffers_size(); ++b) {
      if (plan_.buffers(b).program() == -1 && !owned_[static_cast<size_t>(b)]) {
        return Bad(BufferName(b), ": a persistent buffer without a state");
      }
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<TensorType> Type(const proto::TensorTypeProto& proto, absl::string_view what) {
    absl::StatusOr<TensorType> type = TypeFromProto(proto);
    if (!type.ok()) return Bad(what, ": ", type.status().message());
    return type;
  }

  // Sweep over time with the live buffers ordered by offset: as long as they are disjoint, a new one can meet only its
  // neighbours.
  absl::Status CheckOverlap(int program) {
    std::vector<int> by_first;
    for (int b = 0; b < plan_.buffers_size(); ++b) {
      if (plan_.buffers(b).program() == program) by_first.push_back(b);
    }
    std::stable_sort(by_first.begin(), by_first.end(),
                     [&](int a, int b) { return plan_.buffers(a).first() < plan_.buffers(b).first(); });
    std::map<int64_t, int> live;  // Offset -> buffer.
    using Death = std::pair<int, int>;
    std::priority_queue<Death, std::vector<Death>, std::greater<Death>> deaths;  // (last, buffer)
    for (const int b : by_first) {
      const proto::BufferProto& buffer = plan_.buffers(b);
      while (!deaths.empty() && deaths.top().first < buffer.first()) {
        live.erase(plan_.buffers(deaths.top().second).offset());
        deaths.pop();
      }
      const auto above = live.lower_bound(buffer.offset());
      if (above != live.end()) RETURN_IF_ERROR(CheckDisjoint(b, above->second));
      if (above != live.begin()) RETURN_IF_ERROR(CheckDisjoint(std::prev(above)->second, b));
      live[buffer.offset()] = b;
      deaths.push({buffer.last(), b});
    }
    return absl::OkStatus();
  }

  absl::Status CheckStatistics(int index) {
    const proto::ProgramProto& program = plan_.programs(index);
    const int n = std::max(program.instructions_size(), 1);
    std::vector<int64_t> change(static_cast<size_t>(n) + 1, 0);
    int64_t top = plan_.persistent_bytes();
    for (const proto::BufferProto& buffer : plan_.buffers()) {
      if (buffer.program() != index) continue;
      const int64_t bytes = Aligned(buffer.size_bytes());
      top = std::max(top, buffer.offset() + bytes);
      change[static_cast<size_t>(buffer.first())] += bytes;
      change[static_cast<size_t>(buffer.last()) + 1] -= bytes;
    }
    int64_t live = plan_.persistent_bytes(), most = live;
    int at = 0;
    for (int i = 0; i < n; ++i) {
      live += change[static_cast<size_t>(i)];
      if (live > most) most = live, at = i;
    }
    if (program.peak_bytes() != top) return Bad("peak_bytes is ", program.peak_bytes(), "; its buffers end at ", top);
    if (program.lower_bound_bytes() != most) {
      return Bad("lower_bound_bytes is ", program.lower_bound_bytes(), "; most bytes live at once are ", most);
    }
    if (program.peak_instruction() != at) {
      return Bad("peak_instruction is ", program.peak_instruction(), "; most bytes are live at ", at);
    }
    return CheckProof(program.proof(), top, most);
  }

  // One program: an abstract run that tracks which tensors hold their value.
  class ProgramVerifier {
   public:
    ProgramVerifier(PlanVerifier& parent, int index)
        : parent_(parent), plan_(parent.plan_), index_(index), program_(plan_.programs(index)) {}

    absl::Status Run() {
      RETURN_IF_ERROR(CheckTensors());
      RETURN_IF_ERROR(CheckInputs());
      for (int i = 0; i < program_.instructions_size(); ++i) {
        const proto::InstructionProto& instruction = program_.instructions(i);
        RETURN_IF_ERROR(
            Annotate(CheckInstruction(i, instruction),
                     absl::StrCat("instruction ", i, " ", instruction.op(), " \"", instruction.name(), "\"")));
      }
      return CheckOutputs();
    }

   private:
    const proto::TensorProto& tensor(int t) const { return program_.tensors(t); }
    const TensorType& type(int t) const { return types_[static_cast<size_t>(t)]; }
    std::string Name(int t) const {
      return absl::StrCat("%", t, tensor(t).name().empty() ? "" : absl::StrCat(" \"", tensor(t).name(), "\""), " (",
                          type(t).ToString(), " in buffer ", tensor(t).buffer(), ")");
    }
    bool Overlap(int a, int b) const {
      if (tensor(a).buffer() != tensor(b).buffer()) return false;
      return tensor(a).byte_offset() < tensor(b).byte_offset() + type(b).byte_size() &&
             tensor(b).byte_offset() < tensor(a).byte_offset() + type(a).byte_size();
    }
    bool SameBytes(int a, int b) const {
      return tensor(a).buffer() == tensor(b).buffer() && tensor(a).byte_offset() == tensor(b).byte_offset();
    }

    absl::Status CheckTensors() {
      const int n = program_.tensors_size();
      valid_in_.resize(static_cast<size_t>(plan_.buffers_size()));
      for (int t = 0; t < n; ++t) {
        const proto::TensorProto& tensor = program_.tensors(t);
        ASSIGN_OR_RETURN(TensorType type, Type(tensor.type(), absl::StrCat("tensor %", t, " \"", tensor.name(), "\"")));
        types_.push_back(std::move(type));
        if (!InRange(tensor.buffer(), plan_.buffers_size())) {
          return Bad("tensor %", t, " \"", tensor.name(), "\": buffer ", tensor.buffer(), " of ", plan_.buffers_size());
        }
        const proto::BufferProto& buffer = plan_.buffers(tensor.buffer());
        if (buffer.program() != -1 && buffer.program() != index_) {
          return Bad("tensor ", Name(t), ": ", parent_.BufferName(tensor.buffer()), " is another program's");
        }
        if (buffer.memory_class() == proto::WORKSPACE) {
          return Bad("tensor ", Name(t), ": ", parent_.BufferName(tensor.buffer()), " is a workspace");
        }
        if (tensor.byte_offset() < 0 || tensor.byte_offset() > buffer.size_bytes() ||
            types_.back().byte_size() > buffer.size_bytes() - tensor.byte_offset()) {
          return Bad("tensor ", Name(t), ": ", types_.back().byte_size(), " bytes at ", tensor.byte_offset(),
                     " of a buffer of ", buffer.size_bytes());
        }
        if (tensor.byte_offset() % ByteSize(types_.back().dtype) != 0) {
          return Bad("tensor ", Name(t), ": byte offset ", tensor.byte_offset(), " is no multiple of the element size");
        }
        parent_.owned_[static_cast<size_t>(tensor.buffer())] = true;
      }
      defined_.assign(static_cast<size_t>(n), false);
      clobbered_by_.assign(static_cast<size_t>(n), -1);
      written_.assign(static_cast<size_t>(plan_.buffers_size()), false);
      return absl::OkStatus();
    }

    absl::Status CheckInputs() {
      absl::flat_hash_set<std::string> names;
      for (const proto::ProgramInput& input : program_.inputs()) {
        const std::string what = absl::StrCat("input \"", input.name(), "\"");
        if (!names.insert(input.name()).second) return Bad(what, " is there twice");
        if (!InRange(input.tensor(), program_.tensors_size())) {
          return Bad(what, ": tensor ", input.tensor(), " of ", program_.tensors_size());
        }
        const std::optional<Role> role = ParseRole(input.role());
        if (!role) return Bad(what, ": role \"", input.role(), "\" is not known");
        const proto::BufferProto& buffer = plan_.buffers(tensor(input.tensor()).buffer());
        if (IsState(*role)) {
          const auto state = parent_.states_.find(input.name());
          if (state == parent_.states_.end()) return Bad(what, ": no state of that name");
          if (state->second->buffer() != tensor(input.tensor()).buffer()) {
            return Bad(what, ": tensor ", Name(input.tensor()), " is not in the state's buffer ",
                       state->second->buffer());
          }
          if (state->second->state().role() != input.role()) {
            return Bad(what, " has role ", input.role(), ", the state ", state->second->state().role());
          }
          ASSIGN_OR_RETURN(const TensorType type, Type(state->second->state().type(), what));
          if (type != this->type(input.tensor())) {
            return Bad(what, ": tensor ", Name(input.tensor()), ", the state is ", type.ToString());
          }
        } else if (*role == Role::kCache) {
          const int last = std::max(program_.instructions_size(), 1) - 1;
          if (buffer.program() != index_ || buffer.first() != 0 || buffer.last() != last) {
            return Bad(what, ": ", parent_.BufferName(tensor(input.tensor()).buffer()),
                       "; a cache's buffer is the program's own and live from 0 to ", last);
          }
          caches_.push_back(tensor(input.tensor()).buffer());
        } else if (buffer.program() != index_ || buffer.first() != 0) {
          return Bad(what, ": ", parent_.BufferName(tensor(input.tensor()).buffer()),
                     "; an input's buffer is the program's own and live from 0");
        }
        for (const int other : valid_in_[static_cast<size_t>(tensor(input.tensor()).buffer())]) {
          return Bad(what, ": its buffer is that of input ", Name(other));
        }
        Define(input.tensor());
        const bool staged = *role == Role::kData && StagesInputs(plan_.target());
        if (input.has_staging() != staged) {
          return Bad(what, staged ? " lacks" : " has", " a staging buffer; target ", plan_.target(), " has ",
                     staged ? "one for each data input" : "none for it");
        }
        if (staged) RETURN_IF_ERROR(CheckStaging(input, what));
      }
      return absl::OkStatus();
    }

    // A buffer of its own for the next batch, there throughout.
    absl::Status CheckStaging(const proto::ProgramInput& input, const std::string& what) {
      const int b = input.staging();
      if (!InRange(b, plan_.buffers_size())) return Bad(what, ": staging buffer ", b, " of ", plan_.buffers_size());
      const proto::BufferProto& buffer = plan_.buffers(b);
      const int last = std::max(program_.instructions_size(), 1) - 1;
      if (buffer.program() != index_ || buffer.memory_class() != proto::IO || parent_.owned_[static_cast<size_t>(b)]) {
        return Bad(what, ": ", parent_.BufferName(b), " is not a staging buffer of this program alone");
      }
      if (buffer.first() != 0 || buffer.last() != last || buffer.size_bytes() < type(input.tensor()).byte_size()) {
        return Bad(what, ": ", parent_.BufferName(b), " stages ", type(input.tensor()).byte_size(),
                   " bytes; it must hold them from 0 to ", last);
      }
      parent_.owned_[static_cast<size_t>(b)] = true;
      return absl::OkStatus();
    }

    void Define(int t) {
      defined_[static_cast<size_t>(t)] = true;
      valid_in_[static_cast<size_t>(tensor(t).buffer())].push_back(t);
    }

    absl::Status CheckReadable(int t, absl::string_view what) const {
      if (!InRange(t, program_.tensors_size())) return Bad(what, ": tensor ", t, " of ", program_.tensors_size());
      if (!defined_[static_cast<size_t>(t)]) return Bad(what, " ", Name(t), " is read before it is written");
      if (clobbered_by_[static_cast<size_t>(t)] >= 0) {
        return Bad(what, " ", Name(t), " is read after ", Name(clobbered_by_[static_cast<size_t>(t)]),
                   " was written over it");
      }
      return absl::OkStatus();
    }

    absl::Status CheckLive(int b, int i) const {
      const proto::BufferProto& buffer = plan_.buffers(b);
      if (buffer.program() == -1 || (buffer.first() <= i && i <= buffer.last())) return absl::OkStatus();
      return Bad("uses ", parent_.BufferName(b), " outside its live range");
    }

    absl::Status CheckInstruction(int i, const proto::InstructionProto& instruction) {
      const OpDef* op = FindOp(instruction.op());
      if (op == nullptr) return Bad("this build has no such op");
      if (!ParsePhase(instruction.phase())) return Bad("phase \"", instruction.phase(), "\" is not known");
      if (instruction.flops() < 0 || instruction.bytes() < 0) return Bad("negative cost");
      std::vector<TensorType> operand_types, result_types;
      for (int k = 0; k < instruction.operands_size(); ++k) {
        const int t = instruction.operands(k);
        RETURN_IF_ERROR(CheckReadable(t, absl::StrCat("operand ", k)));
        RETURN_IF_ERROR(CheckLive(tensor(t).buffer(), i));
        operand_types.push_back(type(t));
      }
      absl::flat_hash_set<int> results;
      for (int r = 0; r < instruction.results_size(); ++r) {
        const int t = instruction.results(r);
        if (!InRange(t, program_.tensors_size()))
          return Bad("result ", r, ": tensor ", t, " of ", program_.tensors_size());
        if (defined_[static_cast<size_t>(t)] || !results.insert(t).second) {
          return Bad("result ", r, ": ", Name(t), " is defined twice");
        }
        RETURN_IF_ERROR(CheckLive(tensor(t).buffer(), i));
        result_types.push_back(type(t));
      }

      // Types and attributes.
      absl::StatusOr<Attrs> given = AttrsFromProto(instruction.attrs());
      if (!given.ok()) return Bad(given.status().message());
      Attrs attrs = *given;
      const absl::StatusOr<std::vector<TensorType>> inferred = InferTypes(*op, operand_types, attrs);
      if (!inferred.ok()) return Bad(inferred.status().message());
      if (attrs != *given) return Bad("its attributes are not complete");
      if (inferred->size() != result_types.size()) {
        return Bad("it has ", result_types.size(), " results; the op gives ", inferred->size());
      }
      for (int r = 0; r < instruction.results_size(); ++r) {
        if ((*inferred)[static_cast<size_t>(r)] != result_types[static_cast<size_t>(r)]) {
          return Bad("result ", r, ": ", Name(instruction.results(r)), "; the op gives ",
                     (*inferred)[static_cast<size_t>(r)].ToString());
        }
      }

      // Workspace.
      const int64_t wanted = WorkspaceBytes(plan_.target(), *op, operand_types, result_types, attrs);
      if (instruction.workspace() != -1) {
        const int w = instruction.workspace();
        if (!InRange(w, plan_.buffers_size())) return Bad("workspace: buffer ", w, " of ", plan_.buffers_size());
        const proto::BufferProto& buffer = plan_.buffers(w);
        if (buffer.memory_class() != proto::WORKSPACE || buffer.program() != index_) {
          return Bad("workspace: ", parent_.BufferName(w), " is not a workspace of this program");
        }
        RETURN_IF_ERROR(CheckLive(w, i));
        if (buffer.size_bytes() < wanted) {
          return Bad("workspace: ", parent_.BufferName(w), " has ", buffer.size_bytes(), " bytes; the op needs ",
                     wanted);
        }
        parent_.owned_[static_cast<size_t>(w)] = true;
      } else if (wanted > 0) {
        return Bad("it has no workspace; the op needs ", wanted, " bytes");
      }

      // A view's result is its operand's bytes; nothing is written.
      if (op->is_view) {
        const int from = instruction.operands(0), to = instruction.results(0);
        if (!SameBytes(from, to) || type(from).byte_size() != type(to).byte_size()) {
          return Bad("view ", Name(to), " is not the bytes of ", Name(from));
        }
        Define(to);
        return absl::OkStatus();
      }

      // Sharing: a result may lie over an operand only as the row allows, and over no other result.
      const std::vector<std::pair<int, int>> pairs = InPlacePairs(*op, operand_types, result_types, attrs);
      for (int r = 0; r < instruction.results_size(); ++r) {
        const int to = instruction.results(r);
        for (int k = 0; k < instruction.operands_size(); ++k) {
          const int from = instruction.operands(k);
          if (!Overlap(from, to)) continue;
          if (!SameBytes(from, to) || std::find(pairs.begin(), pairs.end(), std::make_pair(r, k)) == pairs.end()) {
            return Bad("result ", r, " ", Name(to), " is written over operand ", k, " ", Name(from),
                       ", which the op does not allow");
          }
        }
        for (int q = 0; q < r; ++q) {
          if (Overlap(instruction.results(q), to)) {
            return Bad("results ", Name(instruction.results(q)), " and ", Name(to), " share bytes");
          }
        }
      }
      for (const int to : instruction.results()) {
        std::vector<int>& valid = valid_in_[static_cast<size_t>(tensor(to).buffer())];
        valid.erase(std::remove_if(valid.begin(), valid.end(),
                                   [&](int other) {
                                     if (!Overlap(other, to)) return false;
                                     clobbered_by_[static_cast<size_t>(other)] = to;
                                     return true;
                                   }),
                    valid.end());
        written_[static_cast<size_t>(tensor(to).buffer())] = true;
      }
      for (const int to : instruction.results()) Define(to);
      return absl::OkStatus();
    }

    absl::Status CheckOutputs() {
      const int last = std::max(program_.instructions_size(), 1) - 1;
      absl::flat_hash_set<int> donated_buffers;
      absl::flat_hash_set<std::string> names;
      for (const proto::ProgramOutput& output : program_.outputs()) {
        const std::string what = absl::StrCat("output \"", output.name(), "\"");
        if (!names.insert(output.name()).second) return Bad(what, " is there twice");
        RETURN_IF_ERROR(CheckReadable(output.tensor(), what));
        const int buffer = tensor(output.tensor()).buffer();
        if (plan_.buffers(buffer).program() != -1 && plan_.buffers(buffer).last() != last) {
          return Bad(what, ": ", parent_.BufferName(buffer), " is not live to the last instruction, ", last);
        }
        if (output.donates() == -1) continue;
        if (!InRange(output.donates(), program_.inputs_size())) {
          return Bad(what, ": donates input ", output.donates(), " of ", program_.inputs_size());
        }
        const proto::ProgramInput& input = program_.inputs(output.donates());
        if (!IsDonated(*ParseRole(input.role()))) {
          return Bad(what, ": input \"", input.name(), "\" is no state and no cache");
        }
        if (!SameBytes(input.tensor(), output.tensor()) || type(input.tensor()) != type(output.tensor())) {
          return Bad(what, ": ", Name(output.tensor()), " does not take over the buffer of its input ",
                     Name(input.tensor()));
        }
        if (!donated_buffers.insert(buffer).second) return Bad(what, ": input \"", input.name(), "\" is donated twice");
      }
      for (int b = 0; b < plan_.buffers_size(); ++b) {
        if (plan_.buffers(b).program() == -1 && written_[static_cast<size_t>(b)] && donated_buffers.count(b) == 0) {
          return Bad(parent_.BufferName(b), ": the state is written, but no output donates it");
        }
      }
      for (const int b : caches_) {
        if (donated_buffers.count(b) == 0) return Bad(parent_.BufferName(b), ": the cache is not donated by an output");
      }
      return absl::OkStatus();
    }

    PlanVerifier& parent_;
    const proto::PlanProto& plan_;
    const int index_;
    const proto::ProgramProto& program_;
    std::vector<TensorType> types_;
    std::vector<bool> defined_;               // By tensor: was written.
    std::vector<std::vector<int>> valid_in_;  // By buffer: the tensors that still hold their value.
    std::vector<int> clobbered_by_;           // By tensor: what was written over it, or -1.
    std::vector<bool> written_;               // By buffer.
    std::vector<int> caches_;                 // Buffers.
  };

  const proto::PlanProto& plan_;
  std::vector<bool> owned_;  // By buffer: something uses it.
  absl::flat_hash_map<std::string, const proto::StatePlacement*> states_;
};

}  // namespace

absl::Status VerifyPlan(const proto::PlanProto& plan) { return PlanVerifier(plan).Run(); }

}  // namespace mt
