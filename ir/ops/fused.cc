// The op that a fused region becomes.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/ops/common.h"
#include "ir/ops/families.h"
#include "ir/region.h"

namespace mt {
namespace {

using Kind = RegionStep::Kind;

absl::StatusOr<std::shared_ptr<const Region>> RegionOf(const Attrs& attrs) {
  return ParseRegion(attrs.Int("rows"), attrs.Int("width"), attrs.Get<std::string>("region"));
}

// Of attributes that `infer` has seen.
std::shared_ptr<const Region> CheckedRegion(const Attrs& attrs) {
  absl::StatusOr<std::shared_ptr<const Region>> region = RegionOf(attrs);
  CHECK(region.ok()) << region.status();
  return *std::move(region);
}

absl::StatusOr<std::vector<TensorType>> InferFused(absl::Span<const TensorType> operands, const Attrs& attrs) {
  ASSIGN_OR_RETURN(const std::shared_ptr<const Region> region, RegionOf(attrs));
  RETURN_IF_ERROR(CheckRegionOperands(*region, operands));
  std::vector<TensorType> types;
  for (const RegionResult& result : region->results) types.push_back(result.type);
  return types;
}

// A row at a time; sums in f64, as in the references of the rows that a region stands for.
template <typename T>
void ReferenceFused(const Attrs& attrs, absl::Span<const HostTensor<T>* const> operands,
                    absl::Span<HostTensor<T>* const> results) {
  const std::shared_ptr<const Region> region = CheckedRegion(attrs);
  const size_t width = static_cast<size_t>(region->width);
  std::vector<std::vector<T>> values(region->steps.size(), std::vector<T>(width));
  std::vector<std::vector<double>> sums(region->results.size());
  for (size_t k = 0; k < sums.size(); ++k) {
    if (region->results[k].kind == RegionResult::Kind::kColumns) sums[k].assign(width, 0.0);
  }
  for (int64_t r = 0; r < region->rows; ++r) {
    for (size_t i = 0; i < region->steps.size(); ++i) {
      const RegionStep& step = region->steps[i];
      const auto arg = [&](int v) -> const std::vector<T>& { return values[static_cast<size_t>(std::max(v, 0))]; };
      std::vector<T>& to = values[i];
      switch (step.kind) {
        case Kind::kLoad: {
          const std::vector<T>& from = operands[static_cast<size_t>(step.index)]->values;
          const auto row = from.begin() + r * region->width % static_cast<int64_t>(from.size());
          std::copy(row, row + region->width, to.begin());
          break;
        }
        case Kind::kRow: {
          const std::vector<T>& from = operands[static_cast<size_t>(step.index)]->values;
          std::fill(to.begin(), to.end(), from.size() == 1 ? from[0] : from[static_cast<size_t>(r)]);
          break;
        }
        case Kind::kConstant:
          std::fill(to.begin(), to.end(), static_cast<T>(step.constant));
          break;
        case Kind::kUniform:
          for (size_t j = 0; j < width; ++j) {
            const int64_t element = r * region->width + static_cast<int64_t>(j);
            to[j] = static_cast<T>(UniformAt(operands[static_cast<size_t>(step.index)]->ints, step.key,
                                             element / step.sample_elements, element % step.sample_elements));
          }
          break;
        case Kind::kRowSum: {
          double sum = 0;
          for (const T& x : arg(step.a)) sum += static_cast<double>(x);
          std::fill(to.begin(), to.end(), static_cast<T>(sum));
          break;
        }
        case Kind::kPrim:
          for (size_t j = 0; j < width; ++j) {
            to[j] = EvaluatePrim<T>(step.prim, arg(step.a)[j], arg(step.b)[j], arg(step.c)[j], step.dtype);
          }
          break;
      }
    }
    for (size_t k = 0; k < results.size(); ++k) {
      const RegionResult& result = region->results[k];
      const std::vector<T>& from = values[static_cast<size_t>(result.value)];
      if (result.kind == RegionResult::Kind::kFull) {
        std::copy(from.begin(), from.end(), results[k]->values.begin() + r * region->width);
      } else if (result.kind == RegionResult::Kind::kRow) {
        results[k]->values[static_cast<size_t>(r)] = from[0];
      } else {
        for (size_t j = 0; j < width; ++j) sums[k][j] += static_cast<double>(from[j]);
      }
    }
  }
  for (size_t k = 0; k < results.size(); ++k) {
    for (size_t j = 0; j < sums[k].size(); ++j) results[k]->values[j] = static_cast<T>(sums[k][j]);
  }
}

Cost CostFused(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  const std::shared_ptr<const Region> region = CheckedRegion(attrs);
  const std::vector<Extent> extents = region->Extents(operands);
  const int64_t elements = region->rows * region->width;
  int64_t flops = 0;
  for (size_t i = 0; i < region->steps.size(); ++i) {
    const RegionStep& step = region->steps[i];
    if (step.kind == Kind::kRowSum) flops += elements;
    if (step.kind != Kind::kPrim || step.prim == Prim::kRound) continue;
    flops += extents[i] == Extent::kElement ? elements : extents[i] == Extent::kRow ? region->rows : 1;
  }
  for (const RegionResult& result : region->results) {
    if (result.kind == RegionResult::Kind::kColumns) flops += elements;
  }
  return TransferCost(operands, results, flops);
}

// A result over an operand of its type that is read at the same place alone: a tile is read before it is written.
std::vector<std::pair<int, int>> InPlaceFused(absl::Span<const TensorType> operands,
                                              absl::Span<const TensorType> results, const Attrs& attrs) {
  const std::shared_ptr<const Region> region = CheckedRegion(attrs);
  std::vector<std::pair<int, int>> pairs;
  for (size_t r = 0; r < results.size(); ++r) {
    const RegionResult::Kind kind = region->results[r].kind;
    if (kind == RegionResult::Kind::kColumns) continue;
    const Kind reads = kind == RegionResult::Kind::kFull ? Kind::kLoad : Kind::kRow;
    for (size_t o = 0; o < operands.size(); ++o) {
      if (operands[o] != results[r]) continue;
      bool is_read = false, fits = true;
      for (const RegionStep& step : region->steps) {
        if (step.kind != Kind::kLoad && step.kind != Kind::kRow && step.kind != Kind::kUniform) continue;
        if (step.index != static_cast<int64_t>(o)) continue;
        is_read = true;
        fits = fits && step.kind == reads;
      }
      if (is_read && fits) pairs.emplace_back(static_cast<int>(r), static_cast<int>(o));
    }
  }
  return pairs;
}

std::vector<OpSample> SamplesFused() {
  const SampleOperand rng = Sample(DType::kI32, {4}, SampleOperand::Fill::kRandomState);
  constexpr SampleOperand::Fill kPositive = SampleOperand::Fill::kPositive;
  const auto region = [](int64_t rows, int64_t width, absl::string_view text) {
    return Attrs{{"rows", rows}, {"width", width}, {"region", std::string(text)}};
  };
  // Dropout, residual, layer norm.
  constexpr absl::string_view kNorm =
      "v0=load(0) v1=uniform(1,7,40) v2=const(0.3) v3=less(v1,v2) v4=const(0) v5=const(1.25) v6=mul(v0,v5) "
      "v7=select(v3,v4,v6) v8=load(2) v9=add(v8,v7) v10=rowsum(v9) v11=const(0.05) v12=mul(v10,v11) v13=sub(v9,v12) "
      "v14=mul(v13,v13) v15=rowsum(v14) v16=mul(v15,v11) v17=const(1e-05) v18=add(v16,v17) v19=sqrt(v18) v20=const(1) "
      "v21=div(v20,v19) v22=mul(v13,v21) v23=load(3) v24=mul(v22,v23) v25=load(4) v26=add(v24,v25) -> "
      "full(v9,f32[3,2,20]) full(v26,f32[3,2,20]) row(v12,f32[3,2]) row(v21,f32[3,2])";
  // Norm backward, residual, column sums; more rows than one chunk, a row that is no whole number of vectors.
  constexpr absl::string_view kBackward =
      "v0=load(0) v1=load(1) v2=row(2) v3=mul(v1,v2) v4=load(3) v5=mul(v0,v4) v6=mul(v5,v3) v7=rowsum(v6) "
      "v8=const(0.030303030303030304) v9=mul(v7,v8) v10=mul(v3,v9) v11=sub(v5,v10) v12=mul(v2,v11) v13=round(DT,v12) "
      "v14=load(4) v15=add(v14,v13) v16=round(DT,v15) v17=mul(v0,v3) -> full(v16,DT[7,10,33]) columns(v17,f32[33]) "
      "columns(v16,DT[33])";
  const auto backward = [&](DType dtype) {
    std::string text(kBackward);
    for (size_t at = text.find("DT"); at != std::string::npos; at = text.find("DT")) {
      text.replace(at, 2, std::string(DTypeName(dtype)));
    }
    const SampleOperand x = Sample(dtype, {7, 10, 33});
    return OpSample{{x, x, F32({7, 10}, kPositive), F32({33}), x}, region(70, 33, text)};
  };
  return {
      // Element-wise: an operand whose rows repeat, one number for all, a wide row.
      {{F32({2, 3, 5}), F32({3, 5}), F32({})},
       region(6, 5, "v0=load(0) v1=load(1) v2=add(v0,v1) v3=row(2) v4=mul(v2,v3) v5=tanh(v4) -> full(v5,f32[2,3,5])")},
      {{BF16({2, 5000}), F32({5000}), F32({2})},
       region(2, 5000,
              "v0=load(0) v1=load(1) v2=mul(v0,v1) v3=round(bf16,v2) v4=row(2) v5=add(v3,v4) -> "
              "full(v5,bf16[2,5000]) full(v3,f32[2,5000]) columns(v5,f32[5000])")},
      // Two results over two operands, each of which the other reads, too.
      {{F32({4, 33}), F32({4, 33})},
       region(4, 33,
              "v0=load(0) v1=load(1) v2=sub(v0,v1) v3=mul(v2,v0) v4=add(v0,v1) -> full(v3,f32[4,33]) "
              "full(v4,f32[4,33]) full(v0,f32[4,33])")},
      {{F32({3, 2, 20}), rng, F32({3, 2, 20}), F32({20}), F32({20})}, region(6, 20, kNorm)},
      backward(DType::kF32),
      backward(DType::kBF16),
      backward(DType::kF16),
      // Numbers of rows alone, and what spreads them.
      {{F32({9}, kPositive), BF16({9, 4})},
       region(9, 4,
              "v0=row(0) v1=sqrt(v0) v2=load(1) v3=rowsum(v2) v4=select(v1,v3,v0) v5=const(2) v6=mul(v4,v5) -> "
              "row(v4,f32[9]) full(v6,f32[9,4]) columns(v3,f16[4]) row(v1,bf16[9])")},
  };
}

constexpr absl::string_view kOperands[] = {"x*"}, kResults[] = {"y*"};
constexpr AttrSpec kAttrs[] = {
    {"rows", AttrKind::kInt, "rows of the matrix that the region works on"},
    {"width", AttrKind::kInt, "elements of a row"},
    {"region", AttrKind::kString, "the steps of the region and its results"},
};

}  // namespace

absl::Span<const OpDef> FusedOps() {
  static const OpDef ops[] = {
      {.name = "fused",
       .summary =
           "y... = the results of a region: element-wise steps, row statistics and column sums over rows x width "
           "elements, in one pass over the operands x...",
       .operands = kOperands,
       .results = kResults,
       .attrs = kAttrs,
       .infer = InferFused,
       .reference = [](const Attrs& attrs, auto operands, auto results) { ReferenceFused(attrs, operands, results); },
       .samples = SamplesFused,
       .cost = CostFused,
       .in_place = InPlaceFused,
       .remat = RematPolicy::kPreferRecompute,
       .autocast = Autocast::kNever},
  };
  return ops;
}

}  // namespace mt
