#include <algorithm>

#include "absl/strings/str_cat.h"
#include "ir/builder.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

absl::Status CheckIds(const TensorType& ids) {
  if (ids.dtype == DType::kI32) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("operand ids is ", ids.ToString(), "; its dtype must be i32"));
}
absl::Status CheckOrder(const TensorType& order, const TensorType& ids) {
  return CheckIs("order", order, {DType::kI32, {ids.num_elements()}}, "one position for each element of ids");
}

absl::StatusOr<std::vector<TensorType>> InferEmbedding(absl::Span<const TensorType> operands, const Attrs& attrs) {
  const TensorType &table = operands[0], &ids = operands[1];
  RETURN_IF_ERROR(CheckFloat("table", table));
  RETURN_IF_ERROR(CheckRank("table", table, 2, 2));
  RETURN_IF_ERROR(CheckRank("ids", ids, 0, kMaxRank - 1));
  RETURN_IF_ERROR(CheckIds(ids));
  if (attrs.Bool("order")) RETURN_IF_ERROR(CheckOrder(operands[2], ids));
  TensorType result = {table.dtype, ids.dims};
  result.dims.push_back(table.dim(1));
  return std::vector<TensorType>{result};
}

absl::Status GradEmbedding(GradContext& c) {
  const absl::Span<const Value> operands = c.node.operands();
  if (!c.node.attrs().Bool("order")) {
    return absl::UnimplementedError("embedding with order=false has no gradient; give it the order of its ids");
  }
  c.operand_grads[0] = c.builder.Op("embedding_backward", {c.result_grads[0], operands[1], operands[2]},
                                    {{"vocab", operands[0].type().dim(0)}}, c.node.name());
  return c.builder.status();
}

template <typename T>
void ReferenceEmbedding(absl::Span<const HostTensor<T>* const> operands, absl::Span<HostTensor<T>* const> results) {
  const int64_t c = operands[0]->type.dim(1);
  const std::vector<int32_t>& ids = operands[1]->ints;
  for (size_t i = 0; i < ids.size(); ++i) {
    std::copy_n(operands[0]->values.begin() + ids[i] * c, c, results[0]->values.begin() + static_cast<int64_t>(i) * c);
  }
}

// The rows that ids name are read, each once; the order is for the gradient alone.
Cost CostEmbedding(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs&) {
  const TensorType &table = operands[0], &ids = operands[1];
  const int64_t rows = std::min(table.dim(0), ids.num_elements());
  return {.bytes_read = rows * table.dim(1) * ByteSize(table.dtype) + ids.byte_size(),
          .bytes_written = results[0].byte_size()};
}

SampleOperand OrderOf(int64_t operand, int64_t n) {
  return Sample(DType::kI32, {n}, SampleOperand::Fill::kOrder, 0, operand);
}

std::vector<OpSample> SamplesEmbedding() {
  return {{.operands = {F32({11, 6}), Ids({2, 5}, 11), OrderOf(1, 10)}},
          {.operands = {F32({3, 33}), Ids({4, 8}, 3), OrderOf(1, 32)}},
          {.operands = {BF16({50, 16}), Ids({2, 4}, 50), OrderOf(1, 8)}},
          {.operands = {F16({50, 16}), Ids({2, 4}, 50), OrderOf(1, 8)}}};
}

absl::StatusOr<std::vector<TensorType>> InferEmbeddingBackward(absl::Span<const TensorType> operands,
                                                               const Attrs& attrs) {
  const TensorType &dy = operands[0], &ids = operands[1];
  RETURN_IF_ERROR(CheckFloat("dy", dy));
  RETURN_IF_ERROR(CheckRank("dy", dy, 1));
  RETURN_IF_ERROR(CheckIds(ids));
  RETURN_IF_ERROR(CheckOrder(operands[2], ids));
  if (AllButLast(dy) != absl::MakeConstSpan(ids.dims)) {
    return absl::InvalidArgumentError(absl::StrCat("operand dy is ", dy.ToString(), ", ids is ", ids.ToString(),
                                                   "; dy must have one row for each id"));
  }
  RETURN_IF_ERROR(CheckAttr("vocab", attrs.Int("vocab"), 1, kMaxElements));
  TensorType result = {dy.dtype, {attrs.Int("vocab"), dy.dim(-1)}};
  if (attrs.Bool("accumulator")) {
    if (operands[3].dtype == DType::kF32) result.dtype = DType::kF32;
    RETURN_IF_ERROR(CheckIs("accumulator", operands[3], result, "the type of the gradient, or f32"));
  }
  return std::vector<TensorType>{result};
}

template <typename T>
void ReferenceEmbeddingBackward(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                                absl::Span<HostTensor<T>* const> results) {
  const HostTensor<T>& dy = *operands[0];
  const int64_t c = dy.type.dim(-1);
  std::vector<double> sums(results[0]->values.size(), 0.0);
  for (const int32_t position : operands[2]->ints) {
    const int64_t id = operands[1]->ints[static_cast<size_t>(position)];
    for (int64_t j = 0; j < c; ++j) {
      sums[static_cast<size_t>(id * c + j)] += dy.values[static_cast<size_t>(position * c + j)];
    }
  }
  const bool accumulate = attrs.Bool("accumulator");
  for (size_t i = 0; i < sums.size(); ++i) {
    results[0]->values[i] = static_cast<T>(sums[i] + (accumulate ? static_cast<double>(operands[3]->values[i]) : 0.0));
  }
}

// With an accumulator, at most one of its rows for each id is read and written.
Cost CostEmbeddingBackward(absl::Span<const TensorType> operands, absl::Span<const TensorType> results,
                           const Attrs& attrs) {
  Cost cost = TransferCost(operands.subspan(0, 3), results, operands[0].num_elements());
  if (attrs.Bool("accumulator")) {
    const int64_t rows = std::min(results[0].dim(0), operands[1].num_elements());
    cost.bytes_written = rows * results[0].dim(1) * ByteSize(results[0].dtype);
    cost.bytes_read += cost.bytes_written;
  }
  return cost;
}

std::vector<OpSample> SamplesEmbeddingBackward() {
  const Attrs accumulate = {{"vocab", int64_t{11}}, {"accumulator", true}};
  return {{.operands = {F32({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10)}, .attrs = {{"vocab", int64_t{11}}}},
          {.operands = {F32({4, 8, 33}), Ids({4, 8}, 3), OrderOf(1, 32)}, .attrs = {{"vocab", int64_t{5}}}},
          {.operands = {BF16({2, 4, 16}), Ids({2, 4}, 50), OrderOf(1, 8)}, .attrs = {{"vocab", int64_t{50}}}},
          {.operands = {F32({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10), F32({11, 6})}, .attrs = accumulate},
          {.operands = {BF16({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10), F32({11, 6})}, .attrs = accumulate},
          {.operands = {BF16({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10), BF16({11, 6})}, .attrs = accumulate},
          {.operands = {F16({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10)}, .attrs = {{"vocab", int64_t{11}}}},
          {.operands = {F16({2, 5, 6}), Ids({2, 5}, 11), OrderOf(1, 10), F32({11, 6})}, .attrs = accumulate}};
}

constexpr absl::string_view kOperands[] = {"table", "ids", "order?"}, kResults[] = {"y"};
constexpr absl::string_view kBackwardOperands[] = {"dy", "ids", "order", "accumulator?"},
                            kBackwardResults[] = {"dtable"};
constexpr AttrSpec kAttrs[] = {
    {"order", AttrKind::kBool, "a last operand is the order that the gradient needs", "true"},
};
constexpr AttrSpec kBackwardAttrs[] = {
    {"vocab", AttrKind::kInt, "rows of the table"},
    {"accumulator", AttrKind::kBool, "the gradient is added to a last operand, in place", "false"},
};

}  // namespace

absl::Span<const OpDef> EmbeddingOps() {
  static const OpDef ops[] = {
      {.name = "embedding",
       .summary = "y[..., :] = table[ids[...], :]. table [V, C]; order: the positions of ids sorted by id, for the "
                  "gradient. Ids must be in [0, V).",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferEmbedding,
       .grad = GradEmbedding,
       .reference = [](const Attrs&, auto operands, auto results) { ReferenceEmbedding(operands, results); },
       .samples = SamplesEmbedding,
       .cost = CostEmbedding,
       .tolerance = 0},
      {.name = "embedding_backward",
       .summary = "dtable[v, :] = sum of dy[i, :] over the i with ids[i] = v, in the order given, + accumulator; rows "
                  "without ids are 0.",
       .operands = kBackwardOperands,
       .results = kBackwardResults,
       .attrs = kBackwardAttrs,
       .infer = InferEmbeddingBackward,
       .reference = [](const Attrs& attrs, auto operands,
                       auto results) { ReferenceEmbeddingBackward(attrs, operands, results); },
       .samples = SamplesEmbeddingBackward,
       .cost = CostEmbeddingBackward,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs& attrs) {
             return attrs.Bool("accumulator") ? std::vector<std::pair<int, int>>{{0, 3}}
                                              : std::vector<std::pair<int, int>>{};
           },
       .has_accumulator = true},
  };
  return ops;
}

}  // namespace mt
