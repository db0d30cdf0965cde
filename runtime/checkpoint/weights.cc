#include "runtime/checkpoint/weights.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/base/status_macros.h"
#include "runtime/data/safetensors.h"

namespace mt {

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
          path, ": tensor ", state.name(), " is ", SafetensorsTypeName(tensor->type), DimsToString(tensor->shape),
          "; the plan's model has ", DTypeName(bound->type.dtype), DimsToString(LogicalDims(state))));
    }
    executor.backend().CopyToDevice(bound->data, reader->Bytes(*tensor).data(), tensor->size_bytes);
  }
  return absl::OkStatus();
}

}  // namespace mt
