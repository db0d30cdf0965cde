// Ops over the ranks of a mesh: every rank runs the same ones in the same order.
#include "absl/strings/str_cat.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"

namespace mt {
namespace {

constexpr int64_t kMaxRanks = int64_t{1} << 16;

absl::StatusOr<std::vector<TensorType>> InferAllReduce(absl::Span<const TensorType> operands, const Attrs&) {
  RETURN_IF_ERROR(CheckFloat("x", operands[0]));
  return std::vector<TensorType>{operands[0]};
}

absl::Status CheckSharding(const TensorType& x, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckFloat("x", x));
  RETURN_IF_ERROR(CheckRank("x", x, 1));
  RETURN_IF_ERROR(CheckAttr("dim", attrs.Int("dim"), 0, x.rank() - 1));
  return CheckAttr("ranks", attrs.Int("ranks"), 1, kMaxRanks);
}

absl::StatusOr<std::vector<TensorType>> InferReduceScatter(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckSharding(operands[0], attrs));
  TensorType result = operands[0];
  int64_t& size = result.dims[static_cast<size_t>(attrs.Int("dim"))];
  if (size % attrs.Int("ranks") != 0) {
    return absl::InvalidArgumentError(absl::StrCat("operand x is ", operands[0].ToString(), "; dimension ",
                                                   attrs.Int("dim"), " must be a multiple of ranks, ",
                                                   attrs.Int("ranks")));
  }
  size /= attrs.Int("ranks");
  return std::vector<TensorType>{result};
}

absl::StatusOr<std::vector<TensorType>> InferAllGather(absl::Span<const TensorType> operands, const Attrs& attrs) {
  RETURN_IF_ERROR(CheckSharding(operands[0], attrs));
  TensorType result = operands[0];
  int64_t& size = result.dims[static_cast<size_t>(attrs.Int("dim"))];
  size *= attrs.Int("ranks");
  return std::vector<TensorType>{result};
}

constexpr absl::string_view kX[] = {"x"}, kY[] = {"y"};
constexpr AttrSpec kSharding[] = {{"dim", AttrKind::kInt, "the dimension that is cut"},
                                  {"ranks", AttrKind::kInt, "ranks that take part"}};

}  // namespace

absl::Span<const OpDef> CollectiveOps() {
  static const OpDef ops[] = {
      {.name = "all_reduce",
       .summary = "y = sum of x over the ranks.",
       .operands = kX,
       .results = kY,
       .infer = InferAllReduce,
       .in_place =
           [](absl::Span<const TensorType>, absl::Span<const TensorType>, const Attrs&) {
             return std::vector<std::pair<int, int>>{{0, 0}};
           },
       .effect = Effect::kCollective,
       .remat = RematPolicy::kMustSave},
      {.name = "reduce_scatter",
       .summary = "y = this rank's slice along dim of the sum of x over the ranks.",
       .operands = kX,
       .results = kY,
       .attrs = kSharding,
       .infer = InferReduceScatter,
       .effect = Effect::kCollective,
       .remat = RematPolicy::kMustSave},
      {.name = "all_gather",
       .summary = "y = the ranks' x, one after another along dim.",
       .operands = kX,
       .results = kY,
       .attrs = kSharding,
       .infer = InferAllGather,
       .effect = Effect::kCollective,
       .remat = RematPolicy::kMustSave},
  };
  return ops;
}

}  // namespace mt
