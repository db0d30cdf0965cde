// Scalars of the optimizer and the update over 8-bit moments; other updates are element-wise rows.
#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"
#include "ir/dynamic_map.h"
#include "ir/loss_scale.h"

namespace mt {
namespace {

// Operands of one launch of the norm: pointers take 8 bytes of the 4,096 that all architectures have for arguments.
constexpr int64_t kNormOperands = 256;

// The sum of squares of each chunk of each operand, in f64, then the root of their sum. A block has a chunk and finds
// its operand in tables. Pointers that are one struct can be read by number; a branch for each and the sum's code for
// each operand take NVRTC seconds.
absl::Status EmitGlobalNorm(const CudaCall& call, CudaSteps& steps) {
  constexpr int64_t kThreads = 512;
  const std::string common =
      absl::StrCat(Constant("kChunk", kCudaNormChunk), Constant("kThreads", kThreads), CudaText("global_norm.cuh"));
  const auto signature = [](absl::string_view function) {
    return absl::StrCat("extern \"C\" __global__ void __launch_bounds__(", kThreads, ") ", function);
  };
  int64_t chunks = 0;
  const int64_t operands = static_cast<int64_t>(call.operands.size());
  std::string source;
  for (int64_t begin = 0; begin < operands; begin += kNormOperands) {
    const int64_t end = std::min(operands, begin + kNormOperands);
    CudaLaunch launch{.function = "mt_global_norm", .block = {kThreads, 1, 1}};
    std::vector<int64_t> firsts, sizes, kinds;
    std::vector<DType> dtypes;
    std::string sums;
    int64_t blocks = 0;
    for (int64_t i = begin; i < end; ++i) {
      const TensorType& g = call.operands[static_cast<size_t>(i)];
      const auto kind = std::find(dtypes.begin(), dtypes.end(), g.dtype) - dtypes.begin();
      if (kind == static_cast<int64_t>(dtypes.size())) {
        dtypes.push_back(g.dtype);
        absl::StrAppend(&sums, "  if (kKinds[i] == ", kind, ") sum = SumSquares((const ", CudaType(g.dtype),
                        "*)all.x[i], kSizes[i], block - kFirsts[i]);\n");
      }
      firsts.push_back(blocks);
      sizes.push_back(g.num_elements());
      kinds.push_back(kind);
      blocks += CeilDiv(g.num_elements(), kCudaNormChunk);
      launch.arguments.push_back(OperandPlace(static_cast<int>(i)));
    }
    launch.arguments.push_back(WorkspacePlace(chunks * 8));
    launch.grid[0] = blocks;
    const auto table = [](absl::string_view type, absl::string_view name, const std::vector<int64_t>& values) {
      return absl::StrCat("__constant__ const ", type, " ", name, "[] = {", absl::StrJoin(values, ", "), "};\n");
    };
    source = absl::StrCat(
        common, "struct Operands {\n  const void* x[", end - begin, "];\n  double* partial;\n};\n",
        table("u32", "kFirsts", firsts), table("u64", "kSizes", sizes), table("u8", "kKinds", kinds),
        signature("mt_global_norm"), "(const __grid_constant__ Operands all) {\n  const u32 block = blockIdx.x;\n",
        "  u32 i = 0, end = ", end - begin, ";\n  while (end - i > 1) {\n    const u32 middle = (i + end) / 2;\n",
        "    if (kFirsts[middle] <= block) {\n      i = middle;\n    } else {\n      end = middle;\n    }\n  }\n",
        "  double sum = 0;\n", sums, "  sum = BlockSum(sum);\n  if (threadIdx.x == 0) all.partial[block] = sum;\n}\n");
    chunks += blocks;
    // The last text has the root, too.
    if (end == operands) {
      absl::StrAppend(&source, signature("mt_global_norm_root"),
                      "(const double* partial, float* norm) {\n  double sum = 0;\n  for (u32 i = threadIdx.x; i < ",
                      chunks, "; i += ", kThreads, ") sum += partial[i];\n  sum = BlockSum(sum);\n",
                      "  if (threadIdx.x == 0) *norm = (float)sqrt(sum);\n}\n");
    }
    launch.source = source;
    steps.Launch(std::move(launch));
  }
  steps.Launch({.source = std::move(source),
                .function = "mt_global_norm_root",
                .block = {kThreads, 1, 1},
                .arguments = {WorkspacePlace(), ResultPlace(0)}});
  return absl::OkStatus();
}

absl::Status EmitAdamStep(const CudaCall& call, CudaSteps& steps) {
  const bool apply = call.attrs->Bool("apply");
  // A thread for each correction: the text of a power is long.
  CudaLaunch launch{.function = "mt_adam_step", .block = {2, 1, 1}, .arguments = AllPlaces(call)};
  launch.source =
      absl::StrCat("extern \"C\" __global__ void mt_adam_step(const int* t, const double* beta1, const double* beta2, ",
                   apply ? "const float* apply, " : "", "int* t_next, float* correction1, float* correction2) {\n",
                   "  const bool first = threadIdx.x == 0;\n  const int next = *t + 1;\n",
                   "  const float correction = (float)(1.0 - pow(first ? *beta1 : *beta2, (double)next));\n",
                   "  *(first ? correction1 : correction2) = correction;\n  __syncwarp(3);\n  if (first) *t_next = ",
                   apply ? "*apply == 0 ? next - 1 : next" : "next", ";\n}\n");
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

// NextLossScale of ir/loss_scale.h.
absl::Status EmitLossScaleStep(const CudaCall& call, CudaSteps& steps) {
  CudaLaunch launch{.function = "mt_loss_scale_step", .arguments = AllPlaces(call)};
  launch.source = absl::StrCat(
      "extern \"C\" __global__ void mt_loss_scale_step(const float* scale_, const int* good_steps_, const float* "
      "norm,\n",
      "                                              float* scale_next, int* good_steps_next, float* apply) {\n",
      "  const float scale = *scale_;\n  const int good_steps = *good_steps_;\n  const bool finite = "
      "isfinite(*norm);\n",
      "  if (!finite) {\n    *scale_next = fmaxf(scale * 0.5f, ", FloatLiteral(kSmallestLossScale),
      ");\n    *good_steps_next = 0;\n  } else if (good_steps + 1 < ", call.attrs->Int("interval"),
      ") {\n    *scale_next = scale;\n    *good_steps_next = good_steps + 1;\n  } else {\n",
      "    *scale_next = fminf(scale * 2.0f, fmaxf(scale, ", FloatLiteral(kLargestLossScale),
      "));\n    *good_steps_next = 0;\n  }\n  *apply = finite ? 1.0f : 0.0f;\n}\n");
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

std::string Table(absl::string_view name, const std::array<float, 256>& values) {
  std::vector<std::string> texts;
  for (const float value : values) texts.push_back(FloatLiteral(value));
  return absl::StrCat("__constant__ float ", name, "[256] = {", absl::StrJoin(texts, ", "), "};\n");
}

// Between a value and the next, as DynamicMap rounds them: a code's limit is the largest float that has the code.
std::array<float, 256> Middles(const DynamicMap& map) {
  std::array<float, 256> middles;
  for (size_t i = 0; i < 255; ++i) middles[i] = map.Middle(static_cast<uint8_t>(i));
  middles[255] = 2;  // Never read.
  return middles;
}

absl::Status EmitAdam8(const CudaCall& call, CudaSteps& steps) {
  const int64_t n = call.operands[0].num_elements();
  const bool apply = call.attrs->Bool("apply");
  CudaLaunch launch{.function = "mt_adamw8bit", .block = {256, 1, 1}};
  for (size_t i = 0; i < 14; ++i) launch.arguments.push_back(OperandPlace(static_cast<int>(i)));
  launch.arguments.push_back(OperandPlace(apply ? 14 : 13));  // Not read where it does not apply.
  for (int i = 0; i < 5; ++i) launch.arguments.push_back(ResultPlace(i));
  const auto flag = [](absl::string_view name, bool value) {
    return absl::StrCat("constexpr bool ", name, " = ", value ? "true" : "false", ";\n");
  };
  launch.source =
      absl::StrCat("typedef ", CudaType(call.operands[0].dtype), " P;\ntypedef ", CudaType(call.operands[5].dtype),
                   " G;\n", Constant("kElements", n), flag("kDecay", call.attrs->Bool("decay")), flag("kApply", apply),
                   Table("kSigned", DynamicMap::Signed().values()), Table("kUnsigned", DynamicMap::Unsigned().values()),
                   Table("kSignedMiddles", Middles(DynamicMap::Signed())),
                   Table("kUnsignedMiddles", Middles(DynamicMap::Unsigned())), CudaText("adam8.cuh"));
  launch.grid[0] = CeilDiv(n, 8 * kQuantizedBlock);
  steps.Launch(std::move(launch));
  return absl::OkStatus();
}

constexpr CudaEmitter kEmitters[] = {
    {"global_norm", EmitGlobalNorm},
    {"adam_step", EmitAdamStep},
    {"loss_scale_step", EmitLossScaleStep},
    {"adamw8bit", EmitAdam8},
};

}  // namespace

absl::Span<const CudaEmitter> CudaOptimizerEmitters() { return kEmitters; }

}  // namespace mt
