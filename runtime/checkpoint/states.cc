#include "runtime/checkpoint/states.h"

#include <algorithm>
#include <functional>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/plan.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/dynamic_map.h"
#include "runtime/checkpoint/weights.h"

namespace mt {
namespace {

SafetensorsType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return SafetensorsType::kF32;
    case DType::kBF16:
      return SafetensorsType::kBF16;
    case DType::kF16:
      return SafetensorsType::kF16;
    case DType::kF64:
      return SafetensorsType::kF64;
    case DType::kI32:
      return SafetensorsType::kI32;
    case DType::kU8:
      return SafetensorsType::kU8;
  }
  CHECK(false) << "a dtype without a name in safetensors";
  return SafetensorsType::kF32;
}

// The 8-bit code of zero: first moments have signs.
uint8_t ZeroCode(const std::string& name) {
  const DynamicMap& map =
      absl::StartsWith(name, absl::StrCat(StateGroup(name), ".m.")) ? DynamicMap::Signed() : DynamicMap::Unsigned();
  return map.zero();
}

SafetensorsTensor Described(const proto::StateProto& state, const BoundTensor& bound) {
  SafetensorsTensor tensor;
  tensor.name = bound.name;
  tensor.type = TypeOf(bound.type.dtype);
  tensor.shape = LogicalDims(state);
  tensor.size_bytes = SizeOf(tensor.type);
  for (const int64_t d : tensor.shape) tensor.size_bytes *= d;
  return tensor;
}

std::string TypeText(const SafetensorsTensor& tensor) {
  return absl::StrCat(SafetensorsTypeName(tensor.type), "[", absl::StrJoin(tensor.shape, ","), "]");
}

// A tensor that a state may come from; null where there is none.
struct Found {
  const SafetensorsTensor* tensor = nullptr;
  absl::string_view bytes;
};
using Source = std::function<Found(const std::string& name)>;

// Returns what starts fresh, and why. `there`: what the source is, in words.
std::vector<std::string> RestoreOptimizer(Executor& executor, absl::string_view there, const Source& source) {
  std::map<std::string, std::string> why;  // Group -> the first thing that does not fit.
  for (int i = 0; i < executor.plan().states_size(); ++i) {
    const BoundTensor& bound = executor.states()[static_cast<size_t>(i)];
    if (bound.role != Role::kOptimizerState) continue;
    const SafetensorsTensor wanted = Described(executor.plan().states(i).state(), bound);
    const SafetensorsTensor* found = source(bound.name).tensor;
    // Lists without padding of their own (scales of blocks) follow the padding of others: the common prefix is theirs.
    const bool list = found != nullptr && found->shape.size() == 1 && wanted.shape.size() == 1 &&
                      wanted.shape[0] == bound.type.dims[0];
    const bool fits = found != nullptr && found->type == wanted.type && (found->shape == wanted.shape || list);
    if (fits) continue;
    why.insert({StateGroup(bound.name), found == nullptr ? absl::StrCat(there, " has no ", bound.name)
                                                         : absl::StrCat(bound.name, " is ", TypeText(*found),
                                                                        " there, ", TypeText(wanted), " in the plan")});
  }
  for (const BoundTensor& bound : executor.states()) {
    const Found found = source(bound.name);
    if (bound.role != Role::kOptimizerState || found.tensor == nullptr || why.contains(StateGroup(bound.name)))
      continue;
    const int64_t bytes = std::min(found.tensor->size_bytes, bound.type.byte_size());
    executor.backend().CopyToDevice(bound.data, found.bytes.data(), bytes);
    // Padding may share a block's scale with what is not padding.
    if (found.tensor->type == SafetensorsType::kU8) {
      executor.backend().Fill(bound.data + bytes, ZeroCode(bound.name), bound.type.byte_size() - bytes);
    }
  }
  std::vector<std::string> fresh;
  for (const auto& [group, reason] : why)
    fresh.push_back(absl::StrCat("the state of ", group, " starts fresh: ", reason));
  return fresh;
}

}  // namespace

std::string StateGroup(const std::string& name) { return name.substr(0, name.find('.')); }

void SnapshotStates(Executor& executor, std::vector<SavedState>* states) {
  size_t count = 0;
  for (int i = 0; i < executor.plan().states_size(); ++i) {
    const BoundTensor& bound = executor.states()[static_cast<size_t>(i)];
    if (bound.role != Role::kParameter && bound.role != Role::kOptimizerState) continue;
    if (count == states->size()) states->emplace_back();
    SavedState& state = (*states)[count++];
    state.tensor = Described(executor.plan().states(i).state(), bound);
    state.parameter = bound.role == Role::kParameter;
    state.bytes.resize(static_cast<size_t>(state.tensor.size_bytes));
    // Padding is at the end of dimension 0, so the logical elements are a prefix.
    executor.backend().CopyToHost(state.bytes.data(), bound.data, state.tensor.size_bytes);
  }
  states->resize(count);
}

absl::StatusOr<std::vector<std::string>> RestoreStates(Executor& executor, const CheckpointReader& checkpoint) {
  RETURN_IF_ERROR(LoadWeights(executor, absl::StrCat(checkpoint.path(), "/", kWeightsFile)));
  const SafetensorsReader& saved = checkpoint.optimizer();
  return RestoreOptimizer(executor, "the checkpoint", [&](const std::string& name) {
    const SafetensorsTensor* tensor = saved.Find(name);
    return tensor == nullptr ? Found() : Found{tensor, saved.Bytes(*tensor)};
  });
}

absl::StatusOr<std::vector<std::string>> RestoreStates(Executor& executor, absl::Span<const SavedState> states) {
  std::map<absl::string_view, const SavedState*> by_name;
  for (const SavedState& state : states) by_name[state.tensor.name] = &state;
  const Source source = [&](const std::string& name) {
    const auto found = by_name.find(name);
    return found == by_name.end() ? Found() : Found{&found->second->tensor, found->second->bytes};
  };
  for (int i = 0; i < executor.plan().states_size(); ++i) {
    const BoundTensor& bound = executor.states()[static_cast<size_t>(i)];
    if (bound.role != Role::kParameter) continue;
    const SafetensorsTensor wanted = Described(executor.plan().states(i).state(), bound);
    const Found found = source(bound.name);
    if (found.tensor == nullptr || found.tensor->type != wanted.type || found.tensor->shape != wanted.shape) {
      return absl::FailedPreconditionError(
          absl::StrCat(bound.name, " is ", TypeText(wanted), " in the plan, ",
                       found.tensor == nullptr ? "and not there" : TypeText(*found.tensor), " in the plan before it"));
    }
    executor.backend().CopyToDevice(bound.data, found.bytes.data(), wanted.size_bytes);
  }
  return RestoreOptimizer(executor, "the plan before it", source);
}

}  // namespace mt
