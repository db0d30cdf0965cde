// The row that defines an op, and the signatures of its columns.
//
// Everything the general machinery knows about an op is in its row. Machinery (print, parse, verify, CSE, DCE,
// autodiff, precision, remat, liveness, cost, planner) reads columns and never names an op.
#ifndef MT_IR_OP_H_
#define MT_IR_OP_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/scalar.h"
#include "ir/tensor_type.h"

namespace mt {

class Builder;
class Node;
struct Value;

enum class Effect { kNone, kCollective };  // kCollective: order is kept, never duplicated or removed.

// As PyTorch's CheckpointPolicy. Recomputing a node is legal where effect is kNone and remat is not kMustSave.
enum class RematPolicy { kMustSave, kPreferSave, kPreferRecompute, kMustRecompute };

// As TVM's MixedPrecisionPolicyKind: computes in the low precision, follows its operands, stays in f32.
enum class Autocast { kAlways, kFollow, kNever };

struct Cost {
  int64_t flops = 0, bytes_read = 0, bytes_written = 0;
};

// One tensor on the host for the reference and the evaluator. Floats of any dtype are held in T and already rounded to
// type.dtype (unless evaluated without rounding); i32 and u8 are held in `ints`.
template <typename T>
struct HostTensor {
  TensorType type;
  std::vector<T> values;
  std::vector<int32_t> ints;
};

// Executable semantics in f32 and f64: the judge of every backend. Results come with their types set and storage sized.
template <typename T>
using ReferenceFn = void (*)(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                             absl::Span<HostTensor<T>* const> results);
struct Reference {
  ReferenceFn<float> f32 = nullptr;
  ReferenceFn<double> f64 = nullptr;

  Reference() = default;
  // From a captureless generic lambda: [](const Attrs&, auto operands, auto results) {...}, written once, stored twice.
  template <typename F>
  Reference(F f) : f32(f), f64(f) {}  // NOLINT: rows read `.reference = [](...) {...}`.
};

// Result types from operand types. The operand count is checked before. Errors name the operand and both types.
using InferFn =
    std::function<absl::StatusOr<std::vector<TensorType>>(absl::Span<const TensorType> operands, const Attrs& attrs)>;

// What a gradient rule sees. It sets operand_grads[i] for every i with wants[i]; a rule may leave one invalid: zero.
struct GradContext {
  Builder& builder;                      // Adds the backward nodes; its errors are sticky.
  const Node& node;                      // The forward node being differentiated.
  absl::Span<const Value> result_grads;  // One a result; invalid where no gradient arrives.
  const std::vector<bool>& wants;        // One an operand.
  std::vector<Value>& operand_grads;     // One an operand; same dims as the operand.
};
using GradFn = absl::Status (*)(GradContext& context);

// FLOPs and bytes of one execution, where the default (operands read once, results written once) is not true.
using CostFn = Cost (*)(absl::Span<const TensorType> operands, absl::Span<const TensorType> results,
                        const Attrs& attrs);

// (result, operand) pairs that may share a buffer: the result may be written over the operand.
using InPlaceFn = std::vector<std::pair<int, int>> (*)(absl::Span<const TensorType> operands,
                                                       absl::Span<const TensorType> results, const Attrs& attrs);

// The expressions of an element-wise row, one a result, over operands 0..n-1.
using ExprFn = std::function<std::vector<Expr>(const Attrs& attrs)>;

// A small case for conformance and, scaled up, for the kernel bench.
struct SampleOperand {
  enum class Fill {
    kNormal,       // standard normal
    kPositive,     // uniform in [0.5, 2)
    kProbability,  // uniform in [0, 1)
    kIds,          // i32, uniform in [0, limit); every 7th is -1 where limit is negative (then |limit| is the bound)
    kOrder,        // i32, stable sort order of operand `of` (its flat positions sorted by value)
    kRandomState,  // i32[4]: seed low, seed high, step, first sample
    kStep,         // i32[] >= 1
  };
  TensorType type;
  Fill fill = Fill::kNormal;
  int64_t limit = 0;
  int64_t of = 0;
};
struct OpSample {
  std::vector<SampleOperand> operands;
  Attrs attrs = {};
};
using SamplesFn = std::function<std::vector<OpSample>()>;

struct OpDef {
  absl::string_view name;                        // "layer_norm": the spelling in IR text.
  absl::string_view summary;                     // Math and shapes, one line.
  absl::Span<const absl::string_view> operands;  // Names. A last name ending in "*" is variadic (zero or more), names
                                                 // ending in "?" are present where the bool attribute of that name
                                                 // without "?" is true.
  absl::Span<const absl::string_view> results;   // Names. A last name ending in "*" is variadic (zero or more).
  absl::Span<const AttrSpec> attrs = {};
  InferFn infer = nullptr;       // Required.
  GradFn grad = nullptr;         // Null and no expr: not differentiable.
  ExprFn expr = nullptr;         // Element-wise rows: instead of grad, cost, in_place and reference.
  Reference reference = {};      // Required unless expr or collective.
  SamplesFn samples = nullptr;   // Required unless collective.
  CostFn cost = nullptr;         // Null: the default.
  InPlaceFn in_place = nullptr;  // Null: none (element-wise rows: every operand of the result's type).
  Effect effect = Effect::kNone;
  RematPolicy remat = RematPolicy::kPreferRecompute;
  Autocast autocast = Autocast::kFollow;
  // Result 0 is the bytes of operand 0 under another type; no code runs. (reshape)
  bool is_view = false;
  // The attribute "accumulator" is a bool that adds a last operand "accumulator?", into which result 0 is summed in
  // place. Autodiff uses it to sum gradients.
  bool has_accumulator = false;
  // The operands that never carry a gradient (ids, statistics, random state), by index; integers never do anyway.
  absl::Span<const int> no_grad_operands = {};
  // Allowed relative error of an f32 backend against the f64 reference, of the largest element of the result.
  double tolerance = 1e-5;

  bool is_element_wise() const { return static_cast<bool>(expr); }
};

// "matmul" -> its row, or null. Derived rows ("gelu.grad0": dy * d gelu/d operand 0) are found, too.
const OpDef* FindOp(absl::string_view name);
// Every row, in family order, derived rows last.
absl::Span<const OpDef* const> AllOps();

// The row of the derivative of element-wise `op` by operand `index`: element-wise, operands (dy, then the operands of
// `op` that the derivative reads, in order), attributes those of `op`; its result has the type of dy. Null where the
// derivative is identically zero or the op has several results.
struct DerivedOp {
  const OpDef* op;
  std::vector<int> operands_read;  // Operands of the base op, after dy.
  bool is_identity;                // The derivative is dy itself: no node is needed.
};
const DerivedOp* FindDerivative(const OpDef& op, int index);

// Operand names of a node of `op` with these attributes and this many operands; an error where the count does not fit.
absl::StatusOr<std::vector<std::string>> OperandNames(const OpDef& op, const Attrs& attrs, int64_t count);

// The name of result `index` of a node of `op`: "dx", or "y3" where it is one of "y*".
std::string ResultName(const OpDef& op, int index);

// Checks operand count, completes `attrs`, infers. The one way result types come about. Errors: InvalidArgument.
absl::StatusOr<std::vector<TensorType>> InferTypes(const OpDef& op, absl::Span<const TensorType> operands,
                                                   Attrs& attrs);

// The row's cost, or the default for it.
Cost CostOf(const OpDef& op, absl::Span<const TensorType> operands, absl::Span<const TensorType> results,
            const Attrs& attrs);

// The row's in-place pairs, or the default for it. Views are not among them.
std::vector<std::pair<int, int>> InPlacePairs(const OpDef& op, absl::Span<const TensorType> operands,
                                              absl::Span<const TensorType> results, const Attrs& attrs);

// NumPy broadcasting: dimensions aligned from the last, 1 or absent stretches. Errors name both.
absl::StatusOr<Dims> BroadcastDims(absl::Span<const int64_t> a, absl::Span<const int64_t> b);

}  // namespace mt

#endif  // MT_IR_OP_H_
