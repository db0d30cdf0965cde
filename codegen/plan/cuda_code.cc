#include "codegen/plan/cuda_code.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/target.h"
#include "ir/tensor_type.h"

namespace mt {
namespace {

using Place = proto::CudaPlaceProto;

// What every device of the targets takes.
constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGrid = 0xffff, kMaxThreads = 1024, kMaxBlockZ = 64;
constexpr int64_t kMaxSharedBytes = int64_t{227} << 10, kMaxArguments = 512, kMaxSteps = int64_t{1} << 16;
constexpr int64_t kMaxMatmulSize = 0x7fffffff;

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat(parts...));
}

std::string PlaceText(const Place& place) {
  std::string text = place.base() == Place::OPERAND  ? absl::StrCat("x", place.index())
                     : place.base() == Place::RESULT ? absl::StrCat("y", place.index())
                                                     : "workspace";
  if (place.byte_offset() != 0) absl::StrAppend(&text, "+", place.byte_offset());
  return text;
}

// The steps of one instruction.
class StepVerifier {
 public:
  StepVerifier(const proto::PlanProto& plan, const proto::ProgramProto& program,
               const proto::InstructionProto& instruction)
      : plan_(plan), program_(program), instruction_(instruction) {}

  absl::Status Check(const proto::CudaStepProto& step) const {
    switch (step.step_case()) {
      case proto::CudaStepProto::kLaunch:
        return Annotate(CheckLaunch(step.launch()), absl::StrCat("launch of ", step.launch().function()));
      case proto::CudaStepProto::kMatmul:
        return Annotate(CheckMatmul(step.matmul()), "matmul");
      case proto::CudaStepProto::kFill:
        return Annotate(CheckWrite(step.fill().place(), step.fill().bytes(), "place"), "fill");
      case proto::CudaStepProto::STEP_NOT_SET:
        break;
    }
    return Bad("it is neither launch, matmul nor fill");
  }

 private:
  // Bytes from the place to the end of what it lies in.
  absl::StatusOr<int64_t> BytesFrom(const Place& place, absl::string_view what) const {
    int64_t bytes = 0;
    const bool is_operand = place.base() == Place::OPERAND;
    if (is_operand || place.base() == Place::RESULT) {
      const auto& tensors = is_operand ? instruction_.operands() : instruction_.results();
      if (place.index() < 0 || place.index() >= tensors.size()) {
        return Bad(what, ": ", is_operand ? "operand " : "result ", place.index(), " of ", tensors.size());
      }
      ASSIGN_OR_RETURN(const TensorType type, TypeFromProto(program_.tensors(tensors.Get(place.index())).type()));
      bytes = type.byte_size();
    } else if (place.base() == Place::WORKSPACE) {
      if (instruction_.workspace() < 0) return Bad(what, ": the instruction has no workspace");
      bytes = plan_.buffers(instruction_.workspace()).size_bytes();
    } else {
      return Bad(what, ": it is no operand, result or workspace");
    }
    if (place.byte_offset() < 0 || place.byte_offset() >= bytes) {
      return Bad(what, ": byte ", place.byte_offset(), " of ", bytes);
    }
    return bytes - place.byte_offset();
  }

  absl::Status CheckRead(const Place& place, int64_t bytes, absl::string_view what) const {
    ASSIGN_OR_RETURN(const int64_t there, BytesFrom(place, what));
    if (bytes < 1 || bytes > there) return Bad(what, ": ", bytes, " bytes where ", PlaceText(place), " has ", there);
    return absl::OkStatus();
  }
  absl::Status CheckWrite(const Place& place, int64_t bytes, absl::string_view what) const {
    if (place.base() == Place::OPERAND) return Bad(what, ": operand ", place.index(), " would be written");
    return CheckRead(place, bytes, what);
  }

  absl::Status CheckLaunch(const proto::CudaLaunchProto& launch) const {
    if (launch.module() < 0 || launch.module() >= plan_.cuda().modules_size()) {
      return Bad("module ", launch.module(), " of ", plan_.cuda().modules_size());
    }
    const std::string& name = launch.function();
    if (name.empty() || name.size() > 128 || !std::all_of(name.begin(), name.end(), [](char c) {
          return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_';
        })) {
      return Bad("its name is no identifier");
    }
    if (launch.grid_size() != 3 || launch.block_size() != 3) return Bad("grid and block must have three sizes each");
    for (int i = 0; i < 3; ++i) {
      if (launch.grid(i) < 1 || launch.grid(i) > (i == 0 ? kMaxGridX : kMaxGrid)) {
        return Bad("a grid of ", launch.grid(i), " blocks in dimension ", i);
      }
      if (launch.block(i) < 1 || launch.block(i) > (i == 2 ? kMaxBlockZ : kMaxThreads)) {
        return Bad("a block of ", launch.block(i), " threads in dimension ", i);
      }
    }
    if (int64_t{launch.block(0)} * launch.block(1) * launch.block(2) > kMaxThreads) {
      return Bad("a block of more than ", kMaxThreads, " threads");
    }
    if (launch.shared_bytes() < 0 || launch.shared_bytes() > kMaxSharedBytes) {
      return Bad(launch.shared_bytes(), " bytes of shared memory; at most ", kMaxSharedBytes);
    }
    if (launch.arguments_size() > kMaxArguments) return Bad(launch.arguments_size(), " arguments");
    for (int i = 0; i < launch.arguments_size(); ++i) {
      RETURN_IF_ERROR(BytesFrom(launch.arguments(i), absl::StrCat("argument ", i)).status());
    }
    if (launch.maps_size() > launch.arguments_size()) return Bad(launch.maps_size(), " tensor maps");
    for (int i = 0; i < launch.maps_size(); ++i) {
      const int argument = launch.maps(i).argument();
      if (argument < 0 || argument >= launch.arguments_size() || (i > 0 && argument <= launch.maps(i - 1).argument())) {
        return Bad("a tensor map is argument ", argument, " of ", launch.arguments_size(),
                   ", or they are out of order");
      }
      RETURN_IF_ERROR(
          Annotate(CheckTensorMap(launch.maps(i), launch.arguments(argument)), absl::StrCat("tensor map ", argument)));
    }
    return absl::OkStatus();
  }

  // What cuTensorMapEncodeTiled asks for, and that the tensor lies within its place.
  absl::Status CheckTensorMap(const proto::CudaTensorMapProto& map, const Place& place) const {
    const std::optional<DType> dtype = ParseDType(map.dtype());
    if (!dtype || (*dtype != DType::kBF16 && *dtype != DType::kF16)) return Bad("dtype \"", map.dtype(), "\"");
    const int rank = map.sizes_size();
    if (rank < 2 || rank > 5 || map.strides_size() != rank - 1 || map.box_size() != rank) {
      return Bad(rank, " sizes, ", map.strides_size(), " strides, ", map.box_size(), " sizes of its box");
    }
    int64_t last = 0;  // Element.
    for (int i = 0; i < rank; ++i) {
      const int64_t size = map.sizes(i), stride = i == 0 ? 1 : map.strides(i - 1);
      if (size < 1 || size > kMaxMatmulSize) return Bad("a size of ", size);
      if (map.box(i) < 1 || map.box(i) > 256) return Bad("a box of ", map.box(i), " elements in dimension ", i);
      if (stride < 1 || stride > kMaxElements || (i > 0 && stride % 8 != 0)) return Bad("a stride of ", stride);
      const std::optional<int64_t> span = CheckedMultiply(size - 1, stride);
      if (!span || *span > kMaxElements - last) return Bad("it is too large");
      last += *span;
    }
    const int64_t row_bytes = 2 * int64_t{map.box(0)}, swizzle = map.swizzle_bytes();
    if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128) return Bad("a swizzle of ", swizzle);
    if (row_bytes % 16 != 0 || (swizzle != 0 && row_bytes > swizzle)) {
      return Bad("rows of ", row_bytes, " bytes in a box with a swizzle of ", swizzle);
    }
    if (place.byte_offset() % 16 != 0) return Bad("byte ", place.byte_offset(), " is no multiple of 16");
    return CheckRead(place, 2 * (last + 1), "place");
  }

  // Bytes of `batch` matrices of rows x columns, `stride` elements apart.
  static std::optional<int64_t> MatrixBytes(int64_t batch, int64_t stride, int64_t rows, int64_t columns, DType dtype) {
    if (stride < 0) return std::nullopt;
    const std::optional<int64_t> one = CheckedMultiply(rows, columns), others = CheckedMultiply(batch - 1, stride);
    if (!one || !others || *one > kMaxElements || *others > kMaxElements) return std::nullopt;
    return (*one + *others) * ByteSize(dtype);
  }

  absl::Status CheckMatmul(const proto::CudaMatmulProto& m) const {
    for (const int64_t size : {m.batch(), m.m(), m.n(), m.k()}) {
      if (size < 1 || size > kMaxMatmulSize) return Bad("a size of ", size);
    }
    const std::optional<DType> dtype = ParseDType(m.dtype()), result = ParseDType(m.result_dtype());
    const auto known = [](const std::optional<DType>& d) {
      return d && (*d == DType::kF32 || *d == DType::kBF16 || *d == DType::kF16);
    };
    if (!known(dtype) || !known(result) || (*result != *dtype && *result != DType::kF32)) {
      return Bad("dtypes \"", m.dtype(), "\" and \"", m.result_dtype(), "\"");
    }
    if (m.tf32() && *dtype != DType::kF32) return Bad("tf32 of ", m.dtype());
    const std::optional<int64_t> a = MatrixBytes(m.batch(), m.stride_a(), m.m(), m.k(), *dtype),
                                 b = MatrixBytes(m.batch(), m.stride_b(), m.k(), m.n(), *dtype),
                                 d = MatrixBytes(m.batch(), m.stride_d(), m.m(), m.n(), *result);
    if (!a || !b || !d) return Bad("its matrices are too large");
    // The matrices of the batch that are written may not overlap.
    if (m.batch() > 1 && m.stride_d() < m.m() * m.n()) return Bad("its results overlap");
    RETURN_IF_ERROR(CheckRead(m.a(), *a, "a"));
    RETURN_IF_ERROR(CheckRead(m.b(), *b, "b"));
    RETURN_IF_ERROR(CheckWrite(m.d(), *d, "d"));
    if (m.has_bias()) RETURN_IF_ERROR(CheckRead(m.bias(), m.n() * ByteSize(*result), "bias"));
    if (m.has_accumulator()) RETURN_IF_ERROR(CheckRead(m.accumulator(), *d, "accumulator"));
    if (m.workspace_bytes() == 0) return absl::OkStatus();
    return CheckWrite(m.workspace(), m.workspace_bytes(), "workspace");
  }

  const proto::PlanProto& plan_;
  const proto::ProgramProto& program_;
  const proto::InstructionProto& instruction_;
};

}  // namespace

absl::Status VerifyCudaCode(const proto::PlanProto& plan) {
  const proto::CudaCodeProto& code = plan.cuda();
  if (code.programs().empty() && code.modules().empty()) return absl::OkStatus();
  const absl::StatusOr<Target> target = ParseTarget(plan.target());
  if (!target.ok() || !target->is_cuda()) return Bad("it holds device code, and its target is ", plan.target());
  for (int i = 0; i < code.modules_size(); ++i) {
    const proto::CudaModuleProto& module = code.modules(i);
    if (module.source().empty() && module.cubin().empty()) return Bad("module ", i, " holds neither source nor cubin");
    if (!module.cubin().empty() && Fnv1a(module.cubin()) != module.checksum()) {
      return Bad("module ", i, " is damaged: its checksum does not match; compile the plan again with mtc compile");
    }
  }
  if (code.programs_size() != plan.programs_size()) {
    return Bad("device code for ", code.programs_size(), " programs of ", plan.programs_size());
  }
  for (int p = 0; p < code.programs_size(); ++p) {
    const proto::ProgramProto& program = plan.programs(p);
    const proto::CudaProgramProto& of_program = code.programs(p);
    if (of_program.instructions_size() != program.instructions_size()) {
      return Bad("program ", program.name(), ": device code for ", of_program.instructions_size(), " instructions of ",
                 program.instructions_size());
    }
    for (int i = 0; i < program.instructions_size(); ++i) {
      const proto::InstructionProto& instruction = program.instructions(i);
      const auto& steps = of_program.instructions(i).steps();
      const std::string where =
          absl::StrCat("program ", program.name(), ", instruction ", i, " (", instruction.op(), ")");
      const OpDef* op = FindOp(instruction.op());
      if (op == nullptr || op->is_view != steps.empty() || steps.size() > kMaxSteps) {
        return Bad(where, ": ", steps.size(), " steps");
      }
      const StepVerifier verifier(plan, program, instruction);
      for (int s = 0; s < steps.size(); ++s) {
        RETURN_IF_ERROR(Annotate(verifier.Check(steps.Get(s)), absl::StrCat(where, ", step ", s)));
      }
    }
  }
  return absl::OkStatus();
}

std::string CudaStepText(const proto::CudaStepProto& step) {
  const auto add_place = [](std::string* out, const Place& place) { absl::StrAppend(out, PlaceText(place)); };
  if (step.has_launch()) {
    const proto::CudaLaunchProto& launch = step.launch();
    std::string maps;
    for (const proto::CudaTensorMapProto& map : launch.maps()) {
      absl::StrAppend(&maps, maps.empty() ? ", maps " : " ", map.argument(), ":[", absl::StrJoin(map.sizes(), ","),
                      "]/[", absl::StrJoin(map.box(), ","), "]");
    }
    return absl::StrCat(launch.function(), "<<<(", absl::StrJoin(launch.grid(), ","), "), (",
                        absl::StrJoin(launch.block(), ","), "), ", launch.shared_bytes(), ">>>(",
                        absl::StrJoin(launch.arguments(), ", ", add_place), ") module ", launch.module(), maps);
  }
  if (step.has_matmul()) {
    const proto::CudaMatmulProto& m = step.matmul();
    return absl::StrCat("matmul ", m.dtype(), m.tf32() ? " tf32" : "", " ", m.batch(), " x [", m.m(), ",", m.k(), "]",
                        m.transpose_a() ? "'" : "", " [", m.k(), ",", m.n(), "]", m.transpose_b() ? "'" : "", " -> ",
                        m.result_dtype(), ": ", PlaceText(m.d()), " = ", PlaceText(m.a()), " ", PlaceText(m.b()),
                        m.has_bias() ? absl::StrCat(" + ", PlaceText(m.bias())) : "",
                        m.has_accumulator() ? absl::StrCat(" + ", PlaceText(m.accumulator())) : "", ", ",
                        m.workspace_bytes(), " bytes at ", PlaceText(m.workspace()));
  }
  const proto::CudaFillProto& fill = step.fill();
  return absl::StrCat("fill ", PlaceText(fill.place()), " ", fill.bytes(), " bytes with ", fill.value());
}

}  // namespace mt
