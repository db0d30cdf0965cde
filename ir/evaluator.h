// Runs graphs on host tensors with the rows' references: the judge of passes and backends.
#ifndef MT_IR_EVALUATOR_H_
#define MT_IR_EVALUATOR_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "ir/graph.h"

namespace mt {

// One node: the reference, or the expression for element-wise rows, a copy for views and one-rank collectives. Results
// are rounded to their dtype if `round` (gradient checks in f64 run without).
template <typename T>
absl::StatusOr<std::vector<HostTensor<T>>> EvaluateOp(const OpDef& op, const Attrs& attrs,
                                                      absl::Span<const HostTensor<T>* const> operands,
                                                      absl::Span<const TensorType> result_types, bool round = true);

// Inputs by name; returns outputs by name. Errors: InvalidArgument for a missing or ill-typed input.
template <typename T>
absl::StatusOr<std::map<std::string, HostTensor<T>>> EvaluateGraph(const Graph& graph,
                                                                   const std::map<std::string, HostTensor<T>>& inputs,
                                                                   bool round = true);

extern template absl::StatusOr<std::vector<HostTensor<float>>> EvaluateOp(const OpDef&, const Attrs&,
                                                                          absl::Span<const HostTensor<float>* const>,
                                                                          absl::Span<const TensorType>, bool);
extern template absl::StatusOr<std::vector<HostTensor<double>>> EvaluateOp(const OpDef&, const Attrs&,
                                                                           absl::Span<const HostTensor<double>* const>,
                                                                           absl::Span<const TensorType>, bool);
extern template absl::StatusOr<std::map<std::string, HostTensor<float>>> EvaluateGraph(
    const Graph&, const std::map<std::string, HostTensor<float>>&, bool);
extern template absl::StatusOr<std::map<std::string, HostTensor<double>>> EvaluateGraph(
    const Graph&, const std::map<std::string, HostTensor<double>>&, bool);

// Sized and typed storage, all zero.
template <typename T>
HostTensor<T> MakeHostTensor(const TensorType& type) {
  HostTensor<T> tensor;
  tensor.type = type;
  const size_t n = static_cast<size_t>(type.num_elements());
  if (IsFloat(type.dtype)) {
    tensor.values.assign(n, T{0});
  } else {
    tensor.ints.assign(n, 0);
  }
  return tensor;
}

// A sample operand's contents, from a seed. `earlier`: the operands before it (kOrder sorts one of them).
template <typename T>
HostTensor<T> FillSample(const SampleOperand& operand, absl::Span<const HostTensor<T>> earlier, uint64_t seed);

extern template HostTensor<float> FillSample(const SampleOperand&, absl::Span<const HostTensor<float>>, uint64_t);
extern template HostTensor<double> FillSample(const SampleOperand&, absl::Span<const HostTensor<double>>, uint64_t);

}  // namespace mt

#endif  // MT_IR_EVALUATOR_H_
