#include "runtime/executor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/graph_io.h"
#include "ir/initial_value.h"
#include "runtime/cpu/thread_pool.h"

namespace mt {
namespace {

const BoundTensor* Find(absl::Span<const BoundTensor> tensors, absl::string_view name) {
  for (const BoundTensor& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

}  // namespace

const BoundTensor* Program::FindInput(absl::string_view name) const { return Find(inputs_, name); }
const BoundTensor* Program::FindOutput(absl::string_view name) const { return Find(outputs_, name); }
const BoundTensor* Executor::FindState(absl::string_view name) const { return Find(states_, name); }

void Program::RunRange(int first, int last) const {
  for (int i = first_thunk_[static_cast<size_t>(first)]; i < first_thunk_[static_cast<size_t>(last)]; ++i) {
    thunks_[static_cast<size_t>(i)]();
  }
}

const Program* Executor::FindProgram(absl::string_view name) const {
  for (const auto& program : programs_) {
    if (program->proto().name() == name) return program.get();
  }
  return nullptr;
}

absl::StatusOr<BoundTensor> Executor::BindTensor(const proto::TensorProto& proto, absl::string_view name) const {
  BoundTensor tensor;
  tensor.name = std::string(name);
  ASSIGN_OR_RETURN(tensor.type, TypeFromProto(proto.type()));
  tensor.data = Address(proto);
  return tensor;
}

absl::StatusOr<KernelCall> Executor::MakeCall(const proto::ProgramProto& program,
                                              const proto::InstructionProto& instruction,
                                              const proto::CudaInstructionProto* cuda) const {
  KernelCall call;
  call.cuda = cuda;
  call.op = FindOp(instruction.op());
  CHECK(call.op != nullptr) << instruction.op();
  ASSIGN_OR_RETURN(call.attrs, AttrsFromProto(instruction.attrs()));
  const auto bind = [&](int index) -> absl::StatusOr<Tensor> {
    ASSIGN_OR_RETURN(const BoundTensor bound, BindTensor(program.tensors(index), ""));
    return Tensor{bound.data, bound.type};
  };
  for (const int operand : instruction.operands()) {
    ASSIGN_OR_RETURN(Tensor tensor, bind(operand));
    call.operands.push_back(std::move(tensor));
  }
  for (const int result : instruction.results()) {
    ASSIGN_OR_RETURN(Tensor tensor, bind(result));
    call.results.push_back(std::move(tensor));
  }
  if (instruction.workspace() >= 0) {
    call.workspace = buffers_[static_cast<size_t>(instruction.workspace())];
    call.workspace_bytes = plan_.buffers(instruction.workspace()).size_bytes();
  }
  call.name = instruction.name();
  return call;
}

absl::Status Executor::Place(Placement placement) {
  if (placement == Placement::kArena) {
    ASSIGN_OR_RETURN(arena_, backend_->AllocateArena(plan_.arena_bytes()));
    for (const proto::BufferProto& buffer : plan_.buffers()) buffers_.push_back(arena_ + buffer.offset());
    return absl::OkStatus();
  }
  for (const proto::BufferProto& buffer : plan_.buffers()) {
    ASSIGN_OR_RETURN(std::byte * data, backend_->AllocateGuarded(buffer.size_bytes()));
    buffers_.push_back(data);
  }
  return absl::OkStatus();
}

void Executor::RunGuarded(const Program& program) {
  for (int i = 0; i < program.proto().instructions_size(); ++i) {
    program.RunRange(i, i + 1);
    backend_->Synchronize();
    const int64_t damaged = backend_->DamagedGuard();
    if (damaged < 0) continue;
    const proto::InstructionProto& instruction = program.proto().instructions(i);
    CHECK_LT(damaged, 0) << "program " << program.proto().name() << ", instruction " << i << ", " << instruction.op()
                         << " \"" << instruction.name() << "\", wrote beside buffer " << damaged << " \""
                         << plan_.buffers(static_cast<int>(damaged)).name() << "\" of "
                         << plan_.buffers(static_cast<int>(damaged)).size_bytes() << " bytes";
  }
}

absl::StatusOr<std::unique_ptr<Executor>> Executor::Load(proto::PlanProto plan, std::unique_ptr<Backend> backend,
                                                         Placement placement) {
  if (backend->name() != "null" && !absl::StartsWith(plan.target(), backend->name())) {
    return absl::InvalidArgumentError(
        absl::StrCat("the plan is for target ", plan.target(), ", not for ", backend->name()));
  }
  auto executor = std::unique_ptr<Executor>(new Executor);
  executor->plan_ = std::move(plan);
  executor->backend_ = std::move(backend);
  const proto::PlanProto& p = executor->plan_;
  RETURN_IF_ERROR(executor->backend_->LoadCode(p));
  RETURN_IF_ERROR(executor->Place(placement));

  for (const proto::StatePlacement& of_state : p.states()) {
    BoundTensor state;
    state.name = of_state.state().name();
    ASSIGN_OR_RETURN(state.type, TypeFromProto(of_state.state().type()));
    state.role = ParseRole(of_state.state().role()).value_or(Role::kParameter);
    state.data = executor->buffers_[static_cast<size_t>(of_state.buffer())];
    executor->states_.push_back(std::move(state));
  }
  for (int index = 0; index < p.programs_size(); ++index) {
    const proto::ProgramProto& proto = p.programs(index);
    const proto::CudaProgramProto* code = index < p.cuda().programs_size() ? &p.cuda().programs(index) : nullptr;
    auto program = std::make_unique<Program>();
    program->proto_ = &proto;
    for (const proto::ProgramInput& input : proto.inputs()) {
      ASSIGN_OR_RETURN(BoundTensor tensor, executor->BindTensor(proto.tensors(input.tensor()), input.name()));
      tensor.role = ParseRole(input.role()).value_or(Role::kData);
      if (input.has_staging()) tensor.staging = executor->buffers_[static_cast<size_t>(input.staging())];
      program->inputs_.push_back(std::move(tensor));
    }
    for (const proto::ProgramOutput& output : proto.outputs()) {
      ASSIGN_OR_RETURN(BoundTensor tensor, executor->BindTensor(proto.tensors(output.tensor()), output.name()));
      program->outputs_.push_back(std::move(tensor));
    }
    for (int i = 0; i < proto.instructions_size(); ++i) {
      const proto::InstructionProto& instruction = proto.instructions(i);
      program->first_thunk_.push_back(static_cast<int>(program->thunks_.size()));
      const proto::CudaInstructionProto* cuda = nullptr;
      if (code != nullptr && i < code->instructions_size()) cuda = &code->instructions(i);
      ASSIGN_OR_RETURN(const KernelCall call, executor->MakeCall(proto, instruction, cuda));
      if (call.op->is_view) continue;
      absl::StatusOr<Thunk> thunk = executor->backend_->Bind(call);
      if (!thunk.ok()) {
        return Annotate(thunk.status(), absl::StrCat("program ", proto.name(), ", instruction ", i, ", ",
                                                     instruction.op(), " \"", instruction.name(), "\""));
      }
      program->thunks_.push_back(*std::move(thunk));
    }
    program->first_thunk_.push_back(static_cast<int>(program->thunks_.size()));
    if (placement == Placement::kGuard) {
      program->whole_ = [loaded = executor.get(), guarded = program.get()] { loaded->RunGuarded(*guarded); };
    } else {
      ASSIGN_OR_RETURN(program->whole_, executor->backend_->Capture(program->thunks_));
    }
    executor->programs_.push_back(std::move(program));
  }
  return executor;
}

void Executor::InitializeStates(uint64_t seed) {
  constexpr int64_t kPart = int64_t{1} << 16, kParts = 16;  // Of a block: parts side by side.
  ThreadPool pool(static_cast<int>(std::min<int64_t>(AvailableCpus(), kParts)));
  std::vector<float> block;
  for (int i = 0; i < plan_.states_size(); ++i) {
    const proto::StateProto& proto = plan_.states(i).state();
    const BoundTensor& state = states_[static_cast<size_t>(i)];
    const absl::StatusOr<Init> init = ParseInit(proto.init().empty() ? "zeros" : proto.init());
    CHECK(init.ok()) << init.status();
    backend_->Fill(state.data, 0, state.type.byte_size());
    if (init->kind == Init::Kind::kZeros) continue;
    CHECK(state.type.dtype == DType::kF32) << state.name;
    // Padding, if any, is at the end of dimension 0: logical elements are a prefix.
    int64_t elements = 1;
    for (const int64_t d : proto.logical_dims()) elements *= d;
    if (proto.logical_dims_size() == 0) elements = state.type.num_elements();
    for (int64_t first = 0; first < elements; first += kPart * kParts) {
      const int64_t count = std::min(kPart * kParts, elements - first);
      block.resize(static_cast<size_t>(count));
      pool.Run((count + kPart - 1) / kPart, [&](int64_t part) {
        InitialValues(*init, seed, state.name, first + part * kPart,
                      absl::MakeSpan(block).subspan(static_cast<size_t>(part * kPart), static_cast<size_t>(kPart)));
      });
      backend_->CopyToDevice(state.data + first * 4, block.data(), count * 4);
    }
  }
}

}  // namespace mt
