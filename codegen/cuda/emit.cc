#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "codegen/cuda/kernel.h"
#include "codegen/cuda/source.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/region.h"

namespace mt {

void SetPlace(CudaPlace place, proto::CudaPlaceProto& proto) {
  proto.set_base(place.base);
  proto.set_index(place.index);
  proto.set_byte_offset(place.byte_offset);
}

void CudaSteps::Launch(CudaLaunch launch) {
  Step step;
  proto::CudaLaunchProto& proto = *step.proto.mutable_launch();
  proto.set_function(std::move(launch.function));
  for (const int64_t n : launch.grid) proto.add_grid(static_cast<int32_t>(n));
  for (const int64_t n : launch.block) proto.add_block(static_cast<int32_t>(n));
  for (size_t i = 0; i < launch.grid.size(); ++i) {
    const int64_t most = i == 0 ? 0x7fffffff : 0xffff;
    CHECK_GT(launch.grid[i], 0) << proto.function();
    if (launch.grid[i] <= most) continue;
    status_.Update(absl::UnimplementedError(absl::StrCat(proto.function(), " would need ", launch.grid[i],
                                                         " blocks, and dimension ", i, " of a grid has at most ", most,
                                                         "; use a smaller batch or sequence")));
  }
  CHECK_LE(launch.block[0] * launch.block[1] * launch.block[2], 1024);
  proto.set_shared_bytes(static_cast<int32_t>(launch.shared_bytes));
  for (const CudaPlace& place : launch.arguments) SetPlace(place, *proto.add_arguments());
  for (proto::CudaTensorMapProto& map : launch.maps) *proto.add_maps() = std::move(map);
  step.source = std::move(launch.source);
  steps_.push_back(std::move(step));
}

void CudaSteps::Matmul(const proto::CudaMatmulProto& matmul) {
  Step step;
  *step.proto.mutable_matmul() = matmul;
  steps_.push_back(std::move(step));
}

void CudaSteps::Fill(CudaPlace place, int64_t bytes, uint8_t value) {
  Step step;
  proto::CudaFillProto& fill = *step.proto.mutable_fill();
  SetPlace(place, *fill.mutable_place());
  fill.set_bytes(bytes);
  fill.set_value(value);
  steps_.push_back(std::move(step));
}

absl::string_view CudaPrelude() { return CudaText("prelude.cuh"); }

absl::string_view CudaType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kF64:
      return "double";
    case DType::kI32:
      return "int";
    case DType::kU8:
      return "u8";
  }
  return "";
}

absl::string_view CudaUnit(int64_t bytes) {
  switch (bytes) {
    case 1:
      return "u8";
    case 2:
      return "u16";
    case 4:
      return "u32";
    case 8:
      return "Bytes8";
    default:
      return "Bytes16";
  }
}

std::string FloatLiteral(double value) {
  const float f = static_cast<float>(value);
  if (!std::isfinite(f)) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(bits));
    return absl::StrFormat("__uint_as_float(0x%08xu)", bits);
  }
  std::string text = absl::StrFormat("%.9g", f);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text + "f";
}

std::string DoubleLiteral(double value) {
  std::string text = absl::StrFormat("%.17g", value);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

absl::string_view IndexType(int64_t elements) { return elements < (int64_t{1} << 31) ? "u32" : "u64"; }

std::string FunctionName(absl::string_view op) { return absl::StrCat("mt_", absl::StrReplaceAll(op, {{".", "_"}})); }

std::string Constant(absl::string_view name, int64_t value) {
  return absl::StrCat("constexpr i64 ", name, " = ", value, ";\n");
}

int64_t VectorOf(std::initializer_list<int64_t> sizes) {
  int64_t vector = 8;
  for (const int64_t size : sizes) {
    while (size % vector != 0) vector /= 2;
  }
  return vector;
}

int64_t RowThreads(int64_t width) {
  return width <= 1024 ? 32 : width <= 4096 ? 128 : width <= 8192 ? 256 : width <= 16384 ? 512 : 1024;
}

CudaThreads CutCudaThreads(int64_t count) {
  if (count < 256) return {.block = count, .blocks = 1, .exact = true};
  for (int64_t block = 256; block >= 128; block -= 32) {
    if (count % block == 0) return {.block = block, .blocks = count / block, .exact = true};
  }
  return {.block = 256, .blocks = CeilDiv(count, 256), .exact = false};
}

std::string ThreadText(absl::string_view index) {
  return absl::StrCat("(blockIdx.x * (", index, ")blockDim.x + threadIdx.x)");
}

std::vector<CudaPlace> AllPlaces(const CudaCall& call) {
  std::vector<CudaPlace> places;
  for (size_t i = 0; i < call.operands.size(); ++i) places.push_back(OperandPlace(static_cast<int>(i)));
  for (size_t i = 0; i < call.results.size(); ++i) places.push_back(ResultPlace(static_cast<int>(i)));
  return places;
}

namespace {

absl::Status EmitFused(const CudaCall& call, CudaSteps& steps) {
  ASSIGN_OR_RETURN(
      const std::shared_ptr<const Region> region,
      ParseRegion(call.attrs->Int("rows"), call.attrs->Int("width"), call.attrs->Get<std::string>("region")));
  return EmitRegion(call, *region, steps);
}

constexpr CudaEmitter kRegionEmitters[] = {{"fused", EmitFused}};
absl::Span<const CudaEmitter> RegionEmitters() { return kRegionEmitters; }

}  // namespace

absl::StatusOr<CudaSteps> EmitCuda(const CudaCall& call) {
  CudaSteps steps;
  if (call.op->is_view) return steps;
  CudaEmitFn emit = call.op->is_element_wise() ? EmitElementWise : nullptr;
  using Family = absl::Span<const CudaEmitter> (*)();
  constexpr Family kFamilies[] = {RegionEmitters,   CudaMatmulEmitters,    CudaRowEmitters,
                                  CudaDataEmitters, CudaAttentionEmitters, CudaOptimizerEmitters};
  for (const Family family : kFamilies) {
    for (const CudaEmitter& emitter : family()) {
      if (emitter.op == call.op->name) emit = emitter.emit;
    }
  }
  if (emit == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("there is no kernel for ", call.op->name, " on ", call.target.ToString()));
  }
  RETURN_IF_ERROR(Annotate(emit(call, steps), absl::StrCat(call.op->name)));
  RETURN_IF_ERROR(Annotate(steps.status(), absl::StrCat(call.op->name)));
  return steps;
}

}  // namespace mt
