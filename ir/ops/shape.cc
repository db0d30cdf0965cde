// Ops that move elements and compute nothing. Any dtype.
#include <algorithm>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::Status CheckDim(const TensorType& x, int64_t dim) {
  if (x.rank() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("operand x is ", x.ToString(), ", a scalar, which has no dimensions"));
  }
  return CheckAttr("dim", dim, 0, x.rank() - 1);
}

// reshape

absl::StatusOr<std::vector<TensorType>> InferReshape(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const IntList& dims = attrs.Get<IntList>("dims");
  const TensorType result = {operands[0].dtype, Dims(dims.begin(), dims.end())};
  RETURN_IF_ERROR(CheckTensorType(result));
  if (result.num_elements() != operands[0].num_elements()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "operand x is ", operands[0].ToString(), ", ", operands[0].num_elements(), " elements; attribute dims ",
        DimsToString(dims), " has ", result.num_elements(), "; they must be equal"));
  }
  return std::vector<TensorType>{result};
}

absl::Status GradReshape(GradContext& c) {
  c.operand_grads[0] = c.builder.Reshape(c.result_grads[0], c.node.operands()[0].type().dims);
  return c.builder.status();
}

std::vector<OpSample> SamplesReshape() {
  return {{.operands = {F32({2, 6})}, .attrs = {{"dims", IntList{3, 4}}}},
          {.operands = {BF16({2, 3, 4})}, .attrs = {{"dims", IntList{24}}}},
          {.operands = {Ids({4}, 9)}, .attrs = {{"dims", IntList{2, 2}}}},
          {.operands = {F32({1})}, .attrs = {{"dims", IntList{}}}}};
}

// transpose

absl::StatusOr<std::vector<TensorType>> InferTranspose(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  const IntList& perm = attrs.Get<IntList>("perm");
  IntList sorted = perm;
  absl::c_sort(sorted);
  bool good = static_cast<int64_t>(perm.size()) == x.rank();
  for (size_t i = 0; i < sorted.size(); ++i) good = good && sorted[i] == static_cast<int64_t>(i);
  if (!good) {
    return absl::InvalidArgumentError(absl::StrCat("attribute perm is ", DimsToString(perm),
                                                   "; it must be an order of the ", x.rank(), " dimensions of ",
                                                   x.ToString()));
  }
  TensorType result = {x.dtype, {}};
  for (const int64_t p : perm) result.dims.push_back(x.dim(p));
  return std::vector<TensorType>{result};
}

absl::Status GradTranspose(GradContext& c) {
  const IntList& perm = c.node.attrs().Get<IntList>("perm");
  IntList inverse(perm.size());
  for (size_t i = 0; i < perm.size(); ++i) inverse[static_cast<size_t>(perm[i])] = static_cast<int64_t>(i);
  c.operand_grads[0] = c.builder.Op("transpose", {c.result_grads[0]}, {{"perm", inverse}}, c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferenceTranspose(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                        absl::Span<HostTensor<T>* const> results) {
  const IntList& perm = attrs.Get<IntList>("perm");
  const Dims strides = StridesOf(operands[0]->type.dims);
  ForEachIndex(results[0]->type.dims, [&](int64_t flat, const Dims& index) {
    int64_t from = 0;
    for (size_t d = 0; d < perm.size(); ++d) from += index[d] * strides[static_cast<size_t>(perm[d])];
    CopyElement(*operands[0], from, *results[0], flat);
  });
}

std::vector<OpSample> SamplesTranspose() {
  return {{.operands = {F32({3, 5})}, .attrs = {{"perm", IntList{1, 0}}}},
          {.operands = {F32({2, 3, 4, 5})}, .attrs = {{"perm", IntList{0, 2, 1, 3}}}},
          {.operands = {BF16({2, 33, 17})}, .attrs = {{"perm", IntList{0, 2, 1}}}},
          {.operands = {F32({2, 3, 4})}, .attrs = {{"perm", IntList{2, 0, 1}}}},
          {.operands = {F32({40, 70})}, .attrs = {{"perm", IntList{1, 0}}}},
          {.operands = {Ids({2, 3}, 100)}, .attrs = {{"perm", IntList{1, 0}}}}};
}

// slice and pad

absl::StatusOr<std::vector<TensorType>> InferSlice(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType& x = operands[0];
  const int64_t dim = attrs.Int("dim"), start = attrs.Int("start"), limit = attrs.Int("limit");
  RETURN_IF_ERROR(CheckDim(x, dim));
  if (start < 0 || limit <= start || limit > x.dim(dim)) {
    return absl::InvalidArgumentError(absl::StrCat("start ", start, " and limit ", limit, " must satisfy 0 <= start < ",
                                                   "limit <= ", x.dim(dim), ", dimension ", dim, " of ", x.ToString()));
  }
  TensorType result = x;
  result.dims[static_cast<size_t>(dim)] = limit - start;
  return std::vector<TensorType>{result};
}

absl::Status GradSlice(GradContext& c) {
  const Attrs& attrs = c.node.attrs();
  const int64_t dim = attrs.Int("dim");
  c.operand_grads[0] = c.builder.Op("pad", {c.result_grads[0]},
                                    {{"dim", dim},
                                     {"before", attrs.Int("start")},
                                     {"after", c.node.operands()[0].type().dim(dim) - attrs.Int("limit")}},
                                    c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferenceSlice(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                    absl::Span<HostTensor<T>* const> results) {
  const Dims strides = StridesOf(operands[0]->type.dims);
  const size_t dim = static_cast<size_t>(attrs.Int("dim"));
  const int64_t start = attrs.Int("start");
  ForEachIndex(results[0]->type.dims, [&](int64_t flat, const Dims& index) {
    int64_t from = start * strides[dim];
    for (size_t d = 0; d < index.size(); ++d) from += index[d] * strides[d];
    CopyElement(*operands[0], from, *results[0], flat);
  });
}

Cost CostOfResult(absl::Span<const TensorType>, absl::Span<const TensorType> results, const Attrs&) {
  return TransferCost(results, results, 0);
}

std::vector<OpSample> SamplesSlice() {
  return {{.operands = {F32({5, 4})}, .attrs = {{"dim", int64_t{0}}, {"start", int64_t{1}}, {"limit", int64_t{4}}}},
          {.operands = {F32({3, 9, 2})}, .attrs = {{"dim", int64_t{1}}, {"start", int64_t{0}}, {"limit", int64_t{9}}}},
          {.operands = {BF16({3, 4, 7})}, .attrs = {{"dim", int64_t{2}}, {"start", int64_t{2}}, {"limit", int64_t{7}}}},
          {.operands = {Ids({6}, 5)}, .attrs = {{"dim", int64_t{0}}, {"start", int64_t{5}}, {"limit", int64_t{6}}}}};
}

absl::StatusOr<std::vector<TensorType>> InferPad(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const int64_t dim = attrs.Int("dim");
  RETURN_IF_ERROR(CheckDim(operands[0], dim));
  RETURN_IF_ERROR(CheckAttr("before", attrs.Int("before"), 0, kMaxElements));
  RETURN_IF_ERROR(CheckAttr("after", attrs.Int("after"), 0, kMaxElements));
  TensorType result = operands[0];
  result.dims[static_cast<size_t>(dim)] += attrs.Int("before") + attrs.Int("after");
  return std::vector<TensorType>{result};
}

absl::Status GradPad(GradContext& c) {
  const Attrs& attrs = c.node.attrs();
  const int64_t dim = attrs.Int("dim"), before = attrs.Int("before");
  c.operand_grads[0] = c.builder.Op(
      "slice", {c.result_grads[0]},
      {{"dim", dim}, {"start", before}, {"limit", before + c.node.operands()[0].type().dim(dim)}}, c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferencePad(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                  absl::Span<HostTensor<T>* const> results) {
  const HostTensor<T>& x = *operands[0];
  std::fill(results[0]->values.begin(), results[0]->values.end(), T{0});
  std::fill(results[0]->ints.begin(), results[0]->ints.end(), 0);
  const Dims strides = StridesOf(results[0]->type.dims);
  const size_t dim = static_cast<size_t>(attrs.Int("dim"));
  const int64_t before = attrs.Int("before");
  ForEachIndex(x.type.dims, [&](int64_t flat, const Dims& index) {
    int64_t to = before * strides[dim];
    for (size_t d = 0; d < index.size(); ++d) to += index[d] * strides[d];
    CopyElement(x, flat, *results[0], to);
  });
}

std::vector<OpSample> SamplesPad() {
  return {{.operands = {F32({3, 4})}, .attrs = {{"dim", int64_t{0}}, {"before", int64_t{1}}, {"after", int64_t{2}}}},
          {.operands = {F32({2, 3, 5})}, .attrs = {{"dim", int64_t{1}}, {"before", int64_t{0}}, {"after", int64_t{3}}}},
          {.operands = {BF16({2, 3})}, .attrs = {{"dim", int64_t{1}}, {"before", int64_t{4}}, {"after", int64_t{0}}}},
          {.operands = {Ids({3}, 7)}, .attrs = {{"dim", int64_t{0}}, {"before", int64_t{0}}, {"after", int64_t{1}}}}};
}

// concat

absl::StatusOr<std::vector<TensorType>> InferConcat(absl::Span<const TensorType> operands, const Attrs& attrs) {
  if (operands.empty()) return absl::InvalidArgumentError("no operands; it must have at least one");
  const int64_t dim = attrs.Int("dim");
  RETURN_IF_ERROR(CheckDim(operands[0], dim));
  TensorType result = operands[0];
  int64_t& total = result.dims[static_cast<size_t>(dim)];
  for (size_t i = 1; i < operands.size(); ++i) {
    TensorType expected = operands[0];
    if (operands[i].rank() == expected.rank()) expected.dims[static_cast<size_t>(dim)] = operands[i].dim(dim);
    RETURN_IF_ERROR(
        CheckIs(absl::StrCat("x", i), operands[i], expected, absl::StrCat("as x0, but for dimension ", dim)));
    if (total > kMaxElements - operands[i].dim(dim)) {
      return absl::InvalidArgumentError(absl::StrCat("dimension ", dim, " of the result has more than ", kMaxElements,
                                                     " elements, the limit for one tensor"));
    }
    total += operands[i].dim(dim);
  }
  return std::vector<TensorType>{result};
}

absl::Status GradConcat(GradContext& c) {
  const int64_t dim = c.node.attrs().Int("dim");
  int64_t start = 0;
  for (size_t i = 0; i < c.wants.size(); ++i) {
    const int64_t limit = start + c.node.operands()[i].type().dim(dim);
    if (c.wants[i]) {
      c.operand_grads[i] =
          c.builder.Op("slice", {c.result_grads[0]}, {{"dim", dim}, {"start", start}, {"limit", limit}}, c.node.name());
    }
    start = limit;
  }
  return c.builder.status();
}

template <typename T>
void ReferenceConcat(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                     absl::Span<HostTensor<T>* const> results) {
  const Dims strides = StridesOf(results[0]->type.dims);
  const size_t dim = static_cast<size_t>(attrs.Int("dim"));
  int64_t before = 0;
  for (const HostTensor<T>* x : operands) {
    ForEachIndex(x->type.dims, [&](int64_t flat, const Dims& index) {
      int64_t to = before * strides[dim];
      for (size_t d = 0; d < index.size(); ++d) to += index[d] * strides[d];
      CopyElement(*x, flat, *results[0], to);
    });
    before += x->type.dims[dim];
  }
}

std::vector<OpSample> SamplesConcat() {
  return {{.operands = {F32({2, 3}), F32({4, 3})}, .attrs = {{"dim", int64_t{0}}}},
          {.operands = {F32({2, 3, 2}), F32({2, 1, 2}), F32({2, 5, 2})}, .attrs = {{"dim", int64_t{1}}}},
          {.operands = {BF16({3, 2}), BF16({3, 7})}, .attrs = {{"dim", int64_t{1}}}},
          {.operands = {Ids({3}, 7)}, .attrs = {{"dim", int64_t{0}}}}};
}

// broadcast

absl::StatusOr<std::vector<TensorType>> InferBroadcast(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const IntList& dims = attrs.Get<IntList>("dims");
  const TensorType result = {operands[0].dtype, Dims(dims.begin(), dims.end())};
  const absl::StatusOr<Dims> both = BroadcastDims(operands[0].dims, dims);
  if (!both.ok() || *both != result.dims) {
    return absl::InvalidArgumentError(absl::StrCat("operand x is ", operands[0].ToString(),
                                                   ", which does not broadcast to attribute dims ", DimsToString(dims),
                                                   ": from the last, each dimension must be equal or 1"));
  }
  return std::vector<TensorType>{result};
}

absl::Status GradBroadcast(GradContext& c) {
  c.operand_grads[0] = c.builder.SumTo(c.result_grads[0], c.node.operands()[0].type().dims);
  return c.builder.status();
}

template <typename T>
void ReferenceBroadcast(const Attrs&, absl::Span<const HostTensor<T>* const> operands,
                        absl::Span<HostTensor<T>* const> results) {
  const HostTensor<T>& x = *operands[0];
  const Dims strides = StridesOf(x.type.dims);
  const size_t missing = results[0]->type.dims.size() - strides.size();
  ForEachIndex(results[0]->type.dims, [&](int64_t flat, const Dims& index) {
    int64_t from = 0;
    for (size_t d = 0; d < strides.size(); ++d) {
      if (x.type.dims[d] != 1) from += index[missing + d] * strides[d];
    }
    CopyElement(x, from, *results[0], flat);
  });
}

std::vector<OpSample> SamplesBroadcast() {
  return {{.operands = {F32({3})}, .attrs = {{"dims", IntList{4, 3}}}},
          {.operands = {F32({2, 1, 3})}, .attrs = {{"dims", IntList{5, 2, 4, 3}}}},
          {.operands = {BF16({3, 1})}, .attrs = {{"dims", IntList{3, 7}}}},
          {.operands = {F32({})}, .attrs = {{"dims", IntList{2, 2}}}}};
}

constexpr absl::string_view kX[] = {"x"}, kXs[] = {"x*"}, kY[] = {"y"};
constexpr AttrSpec kDims[] = {{"dims", AttrKind::kIntList, "dimensions of the result"}};
constexpr AttrSpec kPerm[] = {{"perm", AttrKind::kIntList, "dimension d of y is dimension perm[d] of x"}};
constexpr AttrSpec kDim[] = {{"dim", AttrKind::kInt, "the dimension along which operands are joined"}};
constexpr AttrSpec kSlice[] = {{"dim", AttrKind::kInt, "the dimension that is cut"},
                               {"start", AttrKind::kInt, "first index kept"},
                               {"limit", AttrKind::kInt, "one past the last index kept"}};
constexpr AttrSpec kPad[] = {{"dim", AttrKind::kInt, "the dimension that grows"},
                             {"before", AttrKind::kInt, "zeros before index 0"},
                             {"after", AttrKind::kInt, "zeros after the last index"}};

}  // namespace

absl::Span<const OpDef> ShapeOps() {
  static const OpDef ops[] = {
      {.name = "reshape",
       .summary = "y = the elements of x, in order, under other dimensions; a view.",
       .operands = kX,
       .results = kY,
       .attrs = kDims,
       .infer = InferReshape,
       .grad = GradReshape,
       .reference =
           [](const Attrs&, auto operands, auto results) {
             results[0]->values = operands[0]->values;
             results[0]->ints = operands[0]->ints;
           },
       .samples = SamplesReshape,
       .remat = RematPolicy::kMustRecompute,
       .is_view = true,
       .tolerance = 0},
      {.name = "transpose",
       .summary = "y[i...] = x[j...] with i[d] = j[perm[d]].",
       .operands = kX,
       .results = kY,
       .attrs = kPerm,
       .infer = InferTranspose,
       .grad = GradTranspose,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceTranspose(attrs, operands, results); },
       .samples = SamplesTranspose,
       .tolerance = 0},
      {.name = "slice",
       .summary = "y = x[..., start:limit, ...] along dim.",
       .operands = kX,
       .results = kY,
       .attrs = kSlice,
       .infer = InferSlice,
       .grad = GradSlice,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceSlice(attrs, operands, results); },
       .samples = SamplesSlice,
       .cost = CostOfResult,
       .tolerance = 0},
      {.name = "pad",
       .summary = "y = x with zeros before and after along dim.",
       .operands = kX,
       .results = kY,
       .attrs = kPad,
       .infer = InferPad,
       .grad = GradPad,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferencePad(attrs, operands, results); },
       .samples = SamplesPad,
       .tolerance = 0},
      {.name = "concat",
       .summary = "y = the operands one after another along dim.",
       .operands = kXs,
       .results = kY,
       .attrs = kDim,
       .infer = InferConcat,
       .grad = GradConcat,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceConcat(attrs, operands, results); },
       .samples = SamplesConcat,
       .tolerance = 0},
      {.name = "broadcast",
       .summary = "y = x stretched to dims, NumPy's rule.",
       .operands = kX,
       .results = kY,
       .attrs = kDims,
       .infer = InferBroadcast,
       .grad = GradBroadcast,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceBroadcast(attrs, operands, results); },
       .samples = SamplesBroadcast,
       .remat = RematPolicy::kMustRecompute,
       .tolerance = 0},
  };
  return ops;
}

}  // namespace mt
