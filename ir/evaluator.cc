#include "ir/evaluator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"
#include "ir/scalar.h"

namespace mt {
namespace {

// As RoundTo(kBF16), for many elements: adds half a unit, ties to even; a carry into the exponent is the right one, up
// to infinity.
float RoundToBF16(float value) {
  if (std::isnan(value)) return value;
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += 0x7FFFu + ((bits >> 16) & 1u);
  bits &= 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <typename T>
void RoundValues(DType dtype, std::vector<T>& values) {
  if (dtype == DType::kF64 || !IsFloat(dtype) || (dtype == DType::kF32 && std::is_same_v<T, float>)) return;
  if (dtype == DType::kBF16) {
    for (T& value : values) value = RoundToBF16(static_cast<float>(value));
  } else {
    for (T& value : values) value = static_cast<T>(RoundTo(dtype, value));
  }
}

// Toward zero, clamped to the type.
int32_t ToInteger(DType dtype, double value) {
  const double low = dtype == DType::kU8 ? 0 : std::numeric_limits<int32_t>::min();
  const double high = dtype == DType::kU8 ? 255 : std::numeric_limits<int32_t>::max();
  if (std::isnan(value)) return 0;
  return static_cast<int32_t>(std::clamp(std::trunc(value), low, high));
}

template <typename T>
absl::Status CheckStorage(const HostTensor<T>& tensor) {
  const size_t n = static_cast<size_t>(tensor.type.num_elements());
  const bool is_float = IsFloat(tensor.type.dtype);
  if (tensor.values.size() == (is_float ? n : 0) && tensor.ints.size() == (is_float ? 0 : n)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(tensor.type.ToString(), " holds ", tensor.values.size(),
                                                 " floats and ", tensor.ints.size(), " integers; expected ", n, " ",
                                                 is_float ? "floats" : "integers", " and nothing else"));
}

// How one operand walks along the result: a stride (0 where it is broadcast) for each dimension of the result.
template <typename T>
struct Walk {
  int64_t operand = 0;
  const T* values = nullptr;  // One of the two.
  const int32_t* ints = nullptr;
  absl::InlinedVector<int64_t, 8> strides;
  int64_t offset = 0;
};

template <typename T>
absl::Status EvaluateElementWise(const OpDef& op, const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                                 absl::Span<HostTensor<T>> results) {
  const ScalarProgram program = Linearize(op.expr(attrs));
  const Dims& dims = results[0].type.dims;
  for (const HostTensor<T>& result : results) {
    if (result.type.dims != dims) {
      return absl::UnimplementedError(absl::StrCat(op.name, ": element-wise results of different shapes, ",
                                                   results[0].type.ToString(), " and ", result.type.ToString()));
    }
  }
  // Random states are read whole, through `uniform`; only the other operands are walked.
  std::vector<bool> read(operands.size(), false);
  for (const ScalarInstruction& instruction : program.instructions) {
    if (instruction.prim == Prim::kOperand) read[static_cast<size_t>(instruction.index)] = true;
  }
  std::vector<Walk<T>> walks;
  const int64_t rank = static_cast<int64_t>(dims.size());
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!read[i]) continue;
    const HostTensor<T>& operand = *operands[i];
    Walk<T> walk;
    walk.operand = static_cast<int64_t>(i);
    if (IsFloat(operand.type.dtype)) {
      walk.values = operand.values.data();
    } else {
      walk.ints = operand.ints.data();
    }
    walk.strides.assign(dims.size(), 0);
    int64_t stride = 1;
    const int64_t missing = rank - operand.type.rank();
    bool fits = missing >= 0;
    for (int64_t d = rank - 1; fits && d >= missing; --d) {
      const int64_t size = operand.type.dim(d - missing);
      fits = size == 1 || size == dims[static_cast<size_t>(d)];
      walk.strides[static_cast<size_t>(d)] = size == 1 ? 0 : stride;
      stride *= size;
    }
    if (!fits) {
      return absl::InvalidArgumentError(absl::StrCat(op.name, ": operand ", i, " is ", operand.type.ToString(),
                                                     ", which does not broadcast to ", results[0].type.ToString()));
    }
    walks.push_back(std::move(walk));
  }
  const int64_t total = results[0].type.num_elements();
  const int64_t row = rank == 0 ? 1 : dims.back();
  const int64_t per_sample = rank == 0 ? 1 : total / dims[0];
  std::vector<T> values(operands.size(), T{0});
  std::vector<T> computed(results.size(), T{0});
  int64_t flat = 0;
  const auto uniform = [&](int64_t index, uint32_t key) {
    return static_cast<T>(
        UniformAt(operands[static_cast<size_t>(index)]->ints, key, flat / per_sample, flat % per_sample));
  };
  Dims position(dims.size(), 0);
  while (flat < total) {
    for (int64_t column = 0; column < row; ++column, ++flat) {
      for (const Walk<T>& walk : walks) {
        const int64_t at = walk.offset + (rank == 0 ? 0 : column * walk.strides.back());
        values[static_cast<size_t>(walk.operand)] =
            walk.values != nullptr ? walk.values[at] : static_cast<T>(walk.ints[at]);
      }
      EvaluateScalar<T>(program, values, uniform, absl::MakeSpan(computed));
      for (size_t r = 0; r < results.size(); ++r) {
        HostTensor<T>& result = results[r];
        if (IsFloat(result.type.dtype)) {
          result.values[static_cast<size_t>(flat)] = computed[r];
        } else {
          result.ints[static_cast<size_t>(flat)] = ToInteger(result.type.dtype, static_cast<double>(computed[r]));
        }
      }
    }
    // The next row: an odometer over all dimensions but the last.
    for (int64_t d = rank - 2; d >= 0; --d) {
      const size_t at = static_cast<size_t>(d);
      const bool carry = ++position[at] == dims[at];
      for (Walk<T>& walk : walks) walk.offset += carry ? -walk.strides[at] * (dims[at] - 1) : walk.strides[at];
      if (!carry) break;
      position[at] = 0;
    }
  }
  return absl::OkStatus();
}

}  // namespace

template <typename T>
absl::StatusOr<std::vector<HostTensor<T>>> EvaluateOp(const OpDef& op, const Attrs& attrs,
                                                      absl::Span<const HostTensor<T>* const> operands,
                                                      absl::Span<const TensorType> result_types, bool round) {
  std::vector<HostTensor<T>> results;
  results.reserve(result_types.size());
  for (const TensorType& type : result_types) results.push_back(MakeHostTensor<T>(type));
  if (op.is_view || op.effect == Effect::kCollective) {
    // On one rank a collective is a copy.
    const HostTensor<T>& from = *operands[0];
    if (from.values.size() != results[0].values.size() || from.ints.size() != results[0].ints.size()) {
      return absl::UnimplementedError(absl::StrCat(op.name, " of ", from.type.ToString(), " to ",
                                                   results[0].type.ToString(), " needs more than one rank"));
    }
    results[0].values = from.values;
    results[0].ints = from.ints;
  } else if (op.is_element_wise()) {
    RETURN_IF_ERROR(EvaluateElementWise<T>(op, attrs, operands, absl::MakeSpan(results)));
  } else {
    ReferenceFn<T> reference = nullptr;
    if constexpr (std::is_same_v<T, float>) {
      reference = op.reference.f32;
    } else {
      reference = op.reference.f64;
    }
    if (reference == nullptr) return absl::UnimplementedError(absl::StrCat(op.name, " has no reference"));
    std::vector<HostTensor<T>*> pointers;
    for (HostTensor<T>& result : results) pointers.push_back(&result);
    reference(attrs, operands, absl::MakeSpan(pointers));
  }
  if (round) {
    for (HostTensor<T>& result : results) RoundValues(result.type.dtype, result.values);
  }
  return results;
}

template <typename T>
absl::StatusOr<std::map<std::string, HostTensor<T>>> EvaluateGraph(const Graph& graph,
                                                                   const std::map<std::string, HostTensor<T>>& inputs,
                                                                   bool round) {
  const std::vector<Node*> order = graph.TopologicalOrder();
  CHECK_EQ(static_cast<int64_t>(order.size()), graph.num_nodes());
  // Results of a node are freed after its last reader; outputs are kept.
  absl::flat_hash_map<const Node*, std::vector<HostTensor<T>>> computed;
  absl::flat_hash_map<const Node*, const HostTensor<T>*> given;
  absl::flat_hash_map<const Node*, size_t> reads_left;
  for (const Node* node : order) reads_left[node] = node->uses().size();
  for (const Output& output : graph.outputs()) ++reads_left[output.value.node];
  const auto find = [&](const Value& value) -> const HostTensor<T>* {
    if (value.node->is_input()) return given.at(value.node);
    return &computed.at(value.node)[static_cast<size_t>(value.index)];
  };
  for (const Node* node : order) {
    if (node->is_input()) {
      const auto at = inputs.find(node->name());
      const std::string what = absl::StrCat("graph @", graph.name(), ": input %", node->name());
      if (at == inputs.end()) {
        return absl::InvalidArgumentError(absl::StrCat(what, " (", node->result().type().ToString(), ") is not given"));
      }
      if (at->second.type != node->result().type()) {
        return absl::InvalidArgumentError(
            absl::StrCat(what, " is ", node->result().type().ToString(), "; given is ", at->second.type.ToString()));
      }
      RETURN_IF_ERROR(Annotate(CheckStorage(at->second), what));
      given[node] = &at->second;
      continue;
    }
    std::vector<const HostTensor<T>*> operands;
    for (const Value& operand : node->operands()) operands.push_back(find(operand));
    absl::StatusOr<std::vector<HostTensor<T>>> results =
        EvaluateOp<T>(node->op(), node->attrs(), operands, node->result_types(), round);
    if (!results.ok()) return Annotate(results.status(), absl::StrCat("graph @", graph.name(), ": ", node->name()));
    computed[node] = *std::move(results);
    for (const Value& operand : node->operands()) {
      if (--reads_left[operand.node] == 0) computed.erase(operand.node);
    }
    if (reads_left[node] == 0) computed.erase(node);
  }
  std::map<std::string, HostTensor<T>> outputs;
  for (const Output& output : graph.outputs()) outputs[output.name] = *find(output.value);
  return outputs;
}

template <typename T>
HostTensor<T> FillSample(const SampleOperand& operand, absl::Span<const HostTensor<T>> earlier, uint64_t seed) {
  using Fill = SampleOperand::Fill;
  HostTensor<T> tensor = MakeHostTensor<T>(operand.type);
  const int64_t n = operand.type.num_elements();
  const bool is_float = IsFloat(operand.type.dtype);
  const auto words = [&](int64_t i) {
    return Philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                  {static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0, 0});
  };
  const auto set = [&](int64_t i, double value) {
    const size_t at = static_cast<size_t>(i);
    if (is_float) {
      tensor.values[at] = static_cast<T>(RoundTo(operand.type.dtype, value));
    } else {
      tensor.ints[at] = ToInteger(operand.type.dtype, value);
    }
  };
  switch (operand.fill) {
    case Fill::kNormal:
      for (int64_t i = 0; i < n; ++i) {
        const auto w = words(i);
        const double radius = std::sqrt(-2.0 * std::log((static_cast<double>(w[0]) + 1.0) * 0x1p-32));
        const double normal = radius * std::cos(2.0 * M_PI * static_cast<double>(w[1]) * 0x1p-32);
        set(i, is_float ? normal : std::round(4.0 * normal));  // Integers: small ones of both signs.
      }
      break;
    case Fill::kPositive:
      for (int64_t i = 0; i < n; ++i) set(i, 0.5 + 1.5 * UniformFromBits(words(i)[0]));
      break;
    case Fill::kProbability:
      // Rounding to a narrow dtype must not give 1.
      for (int64_t i = 0; i < n; ++i) set(i, std::min(static_cast<double>(UniformFromBits(words(i)[0])), 0.99));
      break;
    case Fill::kIds: {
      const int64_t bound = std::abs(operand.limit);
      CHECK_GT(bound, 0);
      for (int64_t i = 0; i < n; ++i) {
        const bool ignored = operand.limit < 0 && i % 7 == 6;
        set(i, ignored ? -1.0 : static_cast<double>(words(i)[0] % static_cast<uint64_t>(bound)));
      }
      break;
    }
    case Fill::kOrder: {
      CHECK_LT(static_cast<size_t>(operand.of), earlier.size());
      const std::vector<int32_t>& keys = earlier[static_cast<size_t>(operand.of)].ints;
      CHECK_EQ(static_cast<int64_t>(keys.size()), n);
      std::iota(tensor.ints.begin(), tensor.ints.end(), 0);
      std::stable_sort(tensor.ints.begin(), tensor.ints.end(), [&](int32_t a, int32_t b) {
        return keys[static_cast<size_t>(a)] < keys[static_cast<size_t>(b)];
      });
      break;
    }
    case Fill::kRandomState:
      CHECK(operand.type == (TensorType{DType::kI32, {4}}));
      tensor.ints = {static_cast<int32_t>(words(0)[0]), static_cast<int32_t>(words(0)[1]),
                     static_cast<int32_t>(words(0)[2] % 1000), static_cast<int32_t>(words(0)[3] % 1000)};
      break;
    case Fill::kStep:
      for (int64_t i = 0; i < n; ++i) set(i, 1.0 + words(i)[0] % 20);
      break;
  }
  return tensor;
}

template absl::StatusOr<std::vector<HostTensor<float>>> EvaluateOp(const OpDef&, const Attrs&,
                                                                   absl::Span<const HostTensor<float>* const>,
                                                                   absl::Span<const TensorType>, bool);
template absl::StatusOr<std::vector<HostTensor<double>>> EvaluateOp(const OpDef&, const Attrs&,
                                                                    absl::Span<const HostTensor<double>* const>,
                                                                    absl::Span<const TensorType>, bool);
template absl::StatusOr<std::map<std::string, HostTensor<float>>> EvaluateGraph(
    const Graph&, const std::map<std::string, HostTensor<float>>&, bool);
template absl::StatusOr<std::map<std::string, HostTensor<double>>> EvaluateGraph(
    const Graph&, const std::map<std::string, HostTensor<double>>&, bool);
template HostTensor<float> FillSample(const SampleOperand&, absl::Span<const HostTensor<float>>, uint64_t);
template HostTensor<double> FillSample(const SampleOperand&, absl::Span<const HostTensor<double>>, uint64_t);

}  // namespace mt
