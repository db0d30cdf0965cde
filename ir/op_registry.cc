#include <algorithm>
#include <deque>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/op.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

using Family = absl::Span<const OpDef> (*)();
constexpr Family kFamilies[] = {ElementwiseOps, MatmulOps,          ShapeOps,         ReductionOps,
                                EmbeddingOps,   PositionOps,        HeadOps,          SoftmaxOps,
                                AttentionOps,   CachedAttentionOps, NormalizationOps, LossOps,
                                ChunkedLossOps, OptimizerOps,       CollectiveOps,    FusedOps};

// A row made from another one, "gelu.grad0", with what its columns point to.
struct DerivedRow {
  OpDef row;
  DerivedOp derived;
  std::string name, summary;
  std::vector<std::string> operand_names;
  std::vector<absl::string_view> operand_views;
  absl::string_view result_name;
  std::vector<int> no_grad_operands;
};

bool IsConstant(const Expr& expr, double value) { return expr->prim == Prim::kConstant && expr->constant == value; }

// dy * d base / d operand `index`, over the operands (dy, operands_read...).
std::vector<Expr> DerivedExprs(const OpDef& base, int index, absl::Span<const int> operands_read, const Attrs& attrs) {
  std::vector<Expr> replacements(base.operands.size());
  for (size_t i = 0; i < operands_read.size(); ++i) {
    replacements[static_cast<size_t>(operands_read[i])] = Operand(static_cast<int64_t>(i) + 1);
  }
  return {Operand(0) * Substitute(Derivative(base.expr(attrs)[0], index), replacements)};
}

absl::StatusOr<std::vector<TensorType>> InferDerived(absl::Span<const TensorType> operands, const Attrs&) {
  const TensorType& dy = operands[0];
  for (size_t i = 1; i < operands.size(); ++i) {
    if (!IsFloat(operands[i].dtype)) continue;  // Random state.
    ASSIGN_OR_RETURN(const Dims dims, BroadcastDims(dy.dims, operands[i].dims));
    if (dims != dy.dims) {
      return absl::InvalidArgumentError(absl::StrCat("operand ", i, " is ", operands[i].ToString(),
                                                     ", which does not broadcast to dy, ", dy.ToString()));
    }
  }
  return std::vector<TensorType>{dy};
}

std::vector<OpSample> DerivedSamples(const OpDef& base, absl::Span<const int> operands_read) {
  std::vector<OpSample> samples;
  for (const OpSample& sample : base.samples()) {
    std::vector<TensorType> types;
    for (const SampleOperand& operand : sample.operands) types.push_back(operand.type);
    Attrs attrs = sample.attrs;
    const absl::StatusOr<std::vector<TensorType>> results = InferTypes(base, types, attrs);
    CHECK(results.ok()) << base.name << ": " << results.status();
    OpSample derived{.operands = {{.type = (*results)[0]}}, .attrs = sample.attrs};
    for (const int operand : operands_read) derived.operands.push_back(sample.operands[static_cast<size_t>(operand)]);
    samples.push_back(std::move(derived));
  }
  return samples;
}

class Registry {
 public:
  Registry() {
    std::vector<const OpDef*> base;
    for (const Family family : kFamilies) {
      for (const OpDef& op : family()) base.push_back(&op);
    }
    for (const OpDef* op : base) Add(op);
    for (const OpDef* op : base) {
      if (!op->is_element_wise() || op->results.size() != 1) continue;
      for (size_t i = 0; i < op->operands.size(); ++i) AddDerivative(*op, static_cast<int>(i));
    }
  }

  const OpDef* Find(absl::string_view name) const {
    const auto at = by_name_.find(name);
    return at == by_name_.end() ? nullptr : at->second;
  }
  absl::Span<const OpDef* const> all() const { return all_; }
  const DerivedOp* FindDerivative(const OpDef& op, int index) const {
    const auto at = derivatives_.find(std::make_pair(&op, index));
    return at == derivatives_.end() ? nullptr : &at->second->derived;
  }

 private:
  void Add(const OpDef* op) {
    CHECK(by_name_.emplace(op->name, op).second) << "two rows are named " << op->name;
    all_.push_back(op);
  }

  void AddDerivative(const OpDef& base, int index) {
    if (absl::c_linear_search(base.no_grad_operands, index)) return;
    // What the derivative reads may depend on attributes (a factor of 1 folds away): the samples together decide.
    bool all_zero = true, all_one = true;
    std::vector<Expr> derivatives;
    for (const OpSample& sample : base.samples()) {
      const absl::StatusOr<Attrs> attrs = CompleteAttrs(base.attrs, sample.attrs);
      CHECK(attrs.ok()) << base.name << ": " << attrs.status();
      derivatives.push_back(Derivative(base.expr(*attrs)[0], index));
      all_zero = all_zero && IsConstant(derivatives.back(), 0);
      all_one = all_one && IsConstant(derivatives.back(), 1);
    }
    if (all_zero) return;

    DerivedRow& made = rows_.emplace_back();
    made.derived.is_identity = all_one;
    for (const int64_t operand : OperandsRead(derivatives))
      made.derived.operands_read.push_back(static_cast<int>(operand));
    made.name = absl::StrCat(base.name, ".grad", index);
    made.summary = absl::StrCat("dy * d ", base.name, " / d ", base.operands[static_cast<size_t>(index)], ".");
    made.operand_names.push_back("dy");
    for (const int operand : made.derived.operands_read) {
      made.operand_names.emplace_back(base.operands[static_cast<size_t>(operand)]);
      if (absl::c_linear_search(base.no_grad_operands, operand)) {
        made.no_grad_operands.push_back(static_cast<int>(made.operand_names.size()) - 1);
      }
    }
    made.operand_views.assign(made.operand_names.begin(), made.operand_names.end());
    made.result_name = "dx";
    made.row = {.name = made.name,
                .summary = made.summary,
                .operands = made.operand_views,
                .results = absl::MakeConstSpan(&made.result_name, 1),
                .attrs = base.attrs,
                .infer = InferDerived,
                .expr = [&base, index, read = made.derived.operands_read](
                            const Attrs& attrs) { return DerivedExprs(base, index, read, attrs); },
                .samples = [&base, read = made.derived.operands_read] { return DerivedSamples(base, read); },
                .remat = RematPolicy::kPreferSave,
                .autocast = base.autocast,
                .no_grad_operands = made.no_grad_operands,
                .tolerance = base.tolerance * 4};
    made.derived.op = &made.row;
    derivatives_[std::make_pair(&base, index)] = &made;
    Add(&made.row);
  }

  std::vector<const OpDef*> all_;
  absl::flat_hash_map<absl::string_view, const OpDef*> by_name_;
  std::deque<DerivedRow> rows_;
  absl::flat_hash_map<std::pair<const OpDef*, int>, const DerivedRow*> derivatives_;
};

const Registry& TheRegistry() {
  static const Registry& registry = *new Registry;
  return registry;
}

}  // namespace

const OpDef* FindOp(absl::string_view name) { return TheRegistry().Find(name); }
absl::Span<const OpDef* const> AllOps() { return TheRegistry().all(); }
const DerivedOp* FindDerivative(const OpDef& op, int index) { return TheRegistry().FindDerivative(op, index); }

absl::StatusOr<std::vector<std::string>> OperandNames(const OpDef& op, const Attrs& attrs, int64_t count) {
  std::vector<std::string> names;
  for (size_t i = 0; i < op.operands.size(); ++i) {
    absl::string_view name = op.operands[i];
    if (absl::ConsumeSuffix(&name, "?")) {
      if (attrs.Bool(name)) names.emplace_back(name);
    } else if (absl::ConsumeSuffix(&name, "*")) {
      for (int64_t k = 0; static_cast<int64_t>(names.size()) < count; ++k) names.push_back(absl::StrCat(name, k));
    } else {
      names.emplace_back(name);
    }
  }
  if (static_cast<int64_t>(names.size()) != count) {
    return absl::InvalidArgumentError(
        absl::StrCat(count, " operands given; expected ", names.size(), ": ", absl::StrJoin(names, ", ")));
  }
  return names;
}

std::string ResultName(const OpDef& op, int index) {
  const size_t last = op.results.size() - 1, i = static_cast<size_t>(index);
  absl::string_view name = op.results[std::min(i, last)];
  if (absl::ConsumeSuffix(&name, "*")) return absl::StrCat(name, i - last);
  return std::string(name);
}

absl::StatusOr<std::vector<TensorType>> InferTypes(const OpDef& op, absl::Span<const TensorType> operands,
                                                   Attrs& attrs) {
  ASSIGN_OR_RETURN(attrs, CompleteAttrs(op.attrs, attrs));
  RETURN_IF_ERROR(OperandNames(op, attrs, static_cast<int64_t>(operands.size())));
  ASSIGN_OR_RETURN(std::vector<TensorType> results, op.infer(operands, attrs));
  for (const TensorType& type : results) RETURN_IF_ERROR(CheckTensorType(type));
  return results;
}

namespace {

int64_t CountArithmetic(const OpDef& op, const Attrs& attrs) {
  int64_t arithmetic = 0;
  for (const ScalarInstruction& instruction : Linearize(op.expr(attrs)).instructions) {
    if (Row(instruction.prim).arity > 0) ++arithmetic;
  }
  return arithmetic;
}

// Primitives that one element of an element-wise op takes. The last few attributes of each op are remembered: graphs
// have hundreds of nodes alike and are asked often.
int64_t NumArithmetic(const OpDef& op, const Attrs& attrs) {
  constexpr size_t kRemembered = 8;
  struct Counts {
    std::vector<std::pair<Attrs, int64_t>> list;
    size_t next = 0;  // To be forgotten.
  };
  static thread_local absl::flat_hash_map<const OpDef*, Counts> remembered;
  Counts& counts = remembered[&op];
  for (const auto& [known, count] : counts.list) {
    if (known == attrs) return count;
  }
  const int64_t count = CountArithmetic(op, attrs);
  if (counts.list.size() < kRemembered) {
    counts.list.emplace_back(attrs, count);
  } else {
    counts.list[counts.next] = {attrs, count};
    counts.next = (counts.next + 1) % kRemembered;
  }
  return count;
}

}  // namespace

Cost CostOf(const OpDef& op, absl::Span<const TensorType> operands, absl::Span<const TensorType> results,
            const Attrs& attrs) {
  if (op.is_view) return Cost{};
  if (op.cost != nullptr) return op.cost(operands, results, attrs);
  Cost cost;
  for (const TensorType& type : operands) cost.bytes_read += type.byte_size();
  for (const TensorType& type : results) cost.bytes_written += type.byte_size();
  if (op.is_element_wise()) cost.flops = NumArithmetic(op, attrs) * results[0].num_elements();
  return cost;
}

std::vector<std::pair<int, int>> InPlacePairs(const OpDef& op, absl::Span<const TensorType> operands,
                                              absl::Span<const TensorType> results, const Attrs& attrs) {
  if (op.in_place != nullptr) return op.in_place(operands, results, attrs);
  std::vector<std::pair<int, int>> pairs;
  if (!op.is_element_wise()) return pairs;
  for (size_t r = 0; r < results.size(); ++r) {
    for (size_t o = 0; o < operands.size(); ++o) {
      if (operands[o] == results[r]) pairs.emplace_back(static_cast<int>(r), static_cast<int>(o));
    }
  }
  return pairs;
}

absl::StatusOr<Dims> BroadcastDims(absl::Span<const int64_t> a, absl::Span<const int64_t> b) {
  Dims dims(std::max(a.size(), b.size()));
  for (size_t i = 0; i < dims.size(); ++i) {  // From the last dimension.
    const int64_t da = i < a.size() ? a[a.size() - 1 - i] : 1;
    const int64_t db = i < b.size() ? b[b.size() - 1 - i] : 1;
    if (da != db && da != 1 && db != 1) {
      return absl::InvalidArgumentError(absl::StrCat("shapes ", DimsToString(a), " and ", DimsToString(b),
                                                     " do not broadcast: dimensions ", da, " and ", db,
                                                     " must be equal or 1"));
    }
    dims[dims.size() - 1 - i] = std::max(da, db);
  }
  return dims;
}

}  // namespace mt
