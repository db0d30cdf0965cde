// Fused regions and element-wise rows as kernels. A region becomes one of three:
//
//   flat     no sums: a thread for each vector of elements.
//   columns  sums over the rows alone: a thread for a vector of columns and every 8th row of a chunk of rows.
//   rows     sums over a row, or results of one number a row: a warp, or a block for wide rows, for each row; with sums
//            over the rows as well, a block for each chunk of rows.
//
// A row is gone through once for each sum that depends on the one before. What a later pass needs again is held in
// registers, or computed again where a row is too wide: the same bits. A warp that goes through many rows copies the
// next ones into shared memory meanwhile (sm_80 and later). Results are stored in the last pass, each element by the
// thread that read its operands, so a result may be written over an operand.
#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "ir/scalar.h"

namespace mt {
namespace {

using Kind = RegionStep::Kind;

constexpr int64_t kBlock = 256;
// Rows of a warp, or parts of them, that are in shared memory at one time.
constexpr int64_t kRowStages = 2, kColumnStages = 4;

std::string PrimText(const RegionStep& step, absl::string_view a, absl::string_view b, absl::string_view c) {
  switch (step.prim) {
    case Prim::kOperand:
    case Prim::kConstant:
    case Prim::kUniform:
      break;
    case Prim::kNeg:
      return absl::StrCat("-", a);
    case Prim::kAbs:
      return absl::StrCat("fabsf(", a, ")");
    case Prim::kExp:
      return absl::StrCat("expf(", a, ")");
    case Prim::kLog:
      return absl::StrCat("logf(", a, ")");
    case Prim::kSqrt:
      return absl::StrCat("sqrtf(", a, ")");
    case Prim::kTanh:
      return absl::StrCat("Tanh(", a, ")");
    case Prim::kErf:
      return absl::StrCat("erff(", a, ")");
    case Prim::kSin:
      return absl::StrCat("sinf(", a, ")");
    case Prim::kCos:
      return absl::StrCat("cosf(", a, ")");
    case Prim::kAdd:
      return absl::StrCat(a, " + ", b);
    case Prim::kSub:
      return absl::StrCat(a, " - ", b);
    case Prim::kMul:
      return absl::StrCat(a, " * ", b);
    case Prim::kDiv:
      return absl::StrCat(a, " / ", b);
    case Prim::kMax:
      return absl::StrCat("MaxOf(", a, ", ", b, ")");
    case Prim::kMin:
      return absl::StrCat("MinOf(", a, ", ", b, ")");
    case Prim::kPow:
      return absl::StrCat("powf(", a, ", ", b, ")");
    case Prim::kLess:
      return absl::StrCat(a, " < ", b, " ? 1.0f : 0.0f");
    case Prim::kSelect:
      return absl::StrCat(a, " != 0.0f ? ", b, " : ", c);
    case Prim::kRound:
      if (step.dtype == DType::kF32) return std::string(a);
      return absl::StrCat("Round<", CudaType(step.dtype), ">(", a, ")");
  }
  return "0.0f";
}

class RegionWriter {
 public:
  // `gathers`: of an operand that is read at other places than a region can say, the index as an expression of the
  // element's number `e`; "" for the others.
  RegionWriter(const CudaCall& call, const Region& region, std::vector<std::string> gathers)
      : call_(call), region_(region), gathers_(std::move(gathers)), extents_(region.Extents(call.operands)) {
    gathers_.resize(call.operands.size());
    elements_ = region.rows * region.width;
    index_ = IndexType(elements_);
    for (const RegionStep& step : region.steps) {
      int stage = 0;
      for (const int arg : {step.a, step.b, step.c}) {
        if (arg >= 0) stage = std::max(stage, stages_[static_cast<size_t>(arg)]);
      }
      stages_.push_back(stage + (step.kind == Kind::kRowSum ? 1 : 0));
      has_row_sums_ = has_row_sums_ || step.kind == Kind::kRowSum;
      last_stage_ = std::max(last_stage_, stages_.back());
    }
    for (size_t r = 0; r < region.results.size(); ++r) {
      has_row_results_ = has_row_results_ || region.results[r].kind == RegionResult::Kind::kRow;
      columns_only_ = columns_only_ && region.results[r].kind == RegionResult::Kind::kColumns;
      if (region.results[r].kind == RegionResult::Kind::kColumns) columns_.push_back(static_cast<int>(r));
    }
    function_ = FunctionName(call.op->name);
  }

  absl::Status Emit(CudaSteps& steps) {
    if (has_row_sums_ || has_row_results_) return EmitRows(steps);
    if (!columns_.empty()) return EmitColumns(steps);
    return EmitFlat(steps);
  }

 private:
  const RegionStep& StepAt(int v) const { return region_.steps[static_cast<size_t>(v)]; }
  Extent ExtentAt(int v) const { return extents_[static_cast<size_t>(v)]; }
  int StageAt(int v) const { return stages_[static_cast<size_t>(v)]; }
  const TensorType& OperandOf(const RegionStep& step) const { return call_.operands[static_cast<size_t>(step.index)]; }
  static std::string V(int v) { return absl::StrCat("v", v); }

  // Whether a result may be written over an operand.
  bool MayBeOverwritten(int64_t operand) const {
    for (size_t r = 0; r < call_.results.size(); ++r) {
      if (region_.results[r].kind != RegionResult::Kind::kColumns &&
          call_.results[r] == call_.operands[static_cast<size_t>(operand)]) {
        return true;
      }
    }
    return false;
  }

  // `blocks`: that a processor shall hold at once, at the price of a few spilled registers.
  std::string Signature(int64_t threads, bool partial, int64_t blocks = 1) const {
    std::vector<std::string> args;
    for (size_t i = 0; i < call_.operands.size(); ++i) {
      args.push_back(absl::StrCat("const ", CudaType(call_.operands[i].dtype), "* p", i));
    }
    for (size_t i = 0; i < call_.results.size(); ++i) {
      args.push_back(absl::StrCat(CudaType(call_.results[i].dtype), "* q", i));
    }
    if (partial) args.push_back("float* partial");
    return absl::StrCat("extern \"C\" __global__ void __launch_bounds__(", threads,
                        blocks > 1 ? absl::StrCat(", ", blocks) : "", ") ", function_, "(", absl::StrJoin(args, ", "),
                        ") {\n");
  }

  // Whether a value is read as 1 + v and v v alone. Only an op's own expression adds the constant 1, so that this does
  // not depend on what is fused.
  bool IsNearOne(int v) const {
    bool added = false, other = false;
    for (const RegionStep& step : region_.steps) {
      if (step.a != v && step.b != v && step.c != v) continue;
      const int with = step.a == v ? step.b : step.a;
      const bool adds_one = step.kind == Kind::kPrim && step.prim == Prim::kAdd && with != v &&
                            StepAt(with).kind == Kind::kConstant && StepAt(with).constant == 1;
      const bool squares = step.kind == Kind::kPrim && step.prim == Prim::kMul && step.a == v && step.b == v;
      added = added || adds_one;
      other = other || !(adds_one || squares);
    }
    for (const RegionResult& result : region_.results) other = other || result.value == v;
    return added && !other;
  }

  std::string ScalarText(int v) const {
    const RegionStep& s = StepAt(v);
    if (s.kind == Kind::kConstant) return FloatLiteral(s.constant);
    if (s.kind == Kind::kRow) {
      return absl::StrCat("ToFloat(p", s.index, "[", ExtentAt(v) == Extent::kOne ? "0" : "row", "])");
    }
    if (s.kind == Kind::kPrim && s.prim == Prim::kTanh && IsNearOne(v))
      return absl::StrCat("TanhNearOne(", V(s.a), ")");
    return PrimText(s, s.a < 0 ? "" : V(s.a), s.b < 0 ? "" : V(s.b), s.c < 0 ? "" : V(s.c));
  }

  // Steps that are one number in all.
  std::string Uniforms() const {
    std::string text;
    for (int v = 0; v < static_cast<int>(region_.steps.size()); ++v) {
      if (ExtentAt(v) == Extent::kOne) absl::StrAppend(&text, "  const float v", v, " = ", ScalarText(v), ";\n");
    }
    return text;
  }

  // Steps that are one number for the row `row` and belong to a stage; row sums are declared elsewhere.
  std::string RowNumbers(int stage) const {
    std::string text;
    for (int v = 0; v < static_cast<int>(region_.steps.size()); ++v) {
      if (ExtentAt(v) != Extent::kRow || StageAt(v) != stage || StepAt(v).kind == Kind::kRowSum) continue;
      if (stage_bytes_ > 0 && StepAt(v).kind == Kind::kRow) {
        absl::StrAppend(&text, "    const float v", v, " = n", v, ";\n    if (row + ", kCudaRowLanes, " < last) n", v,
                        " = ToFloat(p", StepAt(v).index, "[row + ", kCudaRowLanes, "]);\n");
      } else {
        absl::StrAppend(&text, "    const float v", v, " = ", ScalarText(v), ";\n");
      }
    }
    return text;
  }
  bool ReadsRow() const {
    for (const RegionStep& step : region_.steps) {
      if (step.kind == Kind::kRow && OperandOf(step).num_elements() > 1) return true;
    }
    return false;
  }

  // What one pass over the elements computes: steps in order.
  struct Pass {
    std::set<int> computed, held;  // `held`: read from the registers of an earlier pass.
    std::vector<int> row_sums, columns, results;
  };

  // Plans the passes. `hold`: whether values may be kept from pass to pass.
  void PlanPasses(bool hold) {
    passes_.assign(static_cast<size_t>(last_stage_) + 1, {});
    kept_.clear();
    std::vector<int> made(region_.steps.size(), -1);
    const auto demand = [&](const auto& self, int v, int stage) -> void {
      if (ExtentAt(v) != Extent::kElement) return;
      Pass& pass = passes_[static_cast<size_t>(stage)];
      if (pass.computed.count(v) != 0 || pass.held.count(v) != 0) return;
      const RegionStep& step = StepAt(v);
      const bool reloads =
          step.kind == Kind::kLoad && (OperandOf(step).num_elements() < elements_ || StagedAt(step.index) >= 0);
      if (hold && made[static_cast<size_t>(v)] >= 0 && !reloads) {
        pass.held.insert(v);
        kept_.insert(v);
        return;
      }
      for (const int arg : {step.a, step.b, step.c}) {
        if (arg >= 0) self(self, arg, stage);
      }
      pass.computed.insert(v);
      made[static_cast<size_t>(v)] = stage;
    };
    for (int stage = 0; stage <= last_stage_; ++stage) {
      Pass& pass = passes_[static_cast<size_t>(stage)];
      for (int v = 0; v < static_cast<int>(region_.steps.size()); ++v) {
        if (StepAt(v).kind != Kind::kRowSum || StageAt(v) != stage + 1) continue;
        pass.row_sums.push_back(v);
        demand(demand, StepAt(v).a, stage);
      }
      for (size_t k = 0; k < columns_.size(); ++k) {
        const int value = region_.results[static_cast<size_t>(columns_[k])].value;
        if (StageAt(value) != stage) continue;
        pass.columns.push_back(static_cast<int>(k));
        demand(demand, value, stage);
      }
      if (stage != last_stage_) continue;
      for (size_t r = 0; r < region_.results.size(); ++r) {
        if (region_.results[r].kind != RegionResult::Kind::kFull) continue;
        pass.results.push_back(static_cast<int>(r));
        demand(demand, region_.results[r].value, stage);
      }
    }
  }

  // The text of one pass over kVector elements from element `e` (an expression); `slot`: of the held arrays.
  std::string Elements(const Pass& pass, int64_t vector, absl::string_view e, absl::string_view slot,
                       absl::string_view indent) const {
    std::string text;
    const auto line = [&](const auto&... parts) { absl::StrAppend(&text, indent, parts..., "\n"); };
    for (const int v : pass.computed) {
      const RegionStep& step = StepAt(v);
      if (step.kind == Kind::kLoad) {
        const std::string& gather = gathers_[static_cast<size_t>(step.index)];
        line("float x", v, "[", vector, "];");
        if (!gather.empty()) {
          line("#pragma unroll");
          line("for (int i = 0; i < ", vector, "; ++i) x", v, "[i] = ToFloat(p", step.index, "[",
               absl::StrReplaceAll(gather, {{"@", absl::StrCat("(", e, " + i)")}}), "]);");
          continue;
        }
        if (const int64_t at = StagedAt(step.index); at >= 0) {
          line("Load<", vector, ", false>((const ", CudaType(OperandOf(step).dtype), "*)(stage + ", at, ") + ",
               staged_column_, ", x", v, ");");
          continue;
        }
        line("Load<", vector, ", ", MayBeOverwritten(step.index) ? "false" : "true", ">(p", step.index, " + ",
             PlaceText(OperandOf(step), e), ", x", v, ");");
      } else if (step.kind == Kind::kUniform) {
        const int64_t n = step.sample_elements;
        line("float x", v, "[", vector, "];");
        const std::string key = absl::StrCat("p", step.index, ", ", step.key, "u, ");
        if (n % vector == 0) {
          line("Uniforms<", vector, ">(", key, "(", e, ") / ", n, ", (", e, ") % ", n, ", x", v, ");");
        } else {
          line("#pragma unroll");
          line("for (int i = 0; i < ", vector, "; ++i) {");
          line("  float one[1];");
          line("  Uniforms<1>(", key, "(", e, " + i) / ", n, ", (", e, " + i) % ", n, ", one);");
          line("  x", v, "[i] = one[0];");
          line("}");
        }
      }
    }
    for (const int r : pass.results) line("float y", r, "[", vector, "];");
    line("#pragma unroll");
    line("for (int i = 0; i < ", vector, "; ++i) {");
    std::set<int> all = pass.computed;
    all.insert(pass.held.begin(), pass.held.end());
    for (const int v : all) {
      const RegionStep& step = StepAt(v);
      if (pass.held.count(v) != 0) {
        line("  const float v", v, " = h", v, "[", slot, "][i];");
        continue;
      }
      if (step.kind == Kind::kLoad || step.kind == Kind::kUniform) {
        line("  const float v", v, " = x", v, "[i];");
      } else {
        line("  const float v", v, " = ", ScalarText(v), ";");
      }
      if (kept_.count(v) != 0) line("  h", v, "[", slot, "][i] = v", v, ";");
    }
    for (const int v : pass.row_sums) line("  s", v, " += v", StepAt(v).a, ";");
    for (const int k : pass.columns) {
      line("  a", k, "[", slot, "][i] += v",
           region_.results[static_cast<size_t>(columns_[static_cast<size_t>(k)])].value, ";");
    }
    for (const int r : pass.results) line("  y", r, "[i] = v", region_.results[static_cast<size_t>(r)].value, ";");
    line("}");
    for (const int r : pass.results) line("Store<", vector, ">(q", r, " + ", e, ", y", r, ");");
    return text;
  }

  // Where element `e` is in an operand. Of a single row, one of one dimension is read as it is where there are more.
  std::string PlaceText(const TensorType& type, absl::string_view e) const {
    const int64_t n = type.num_elements();
    if (n == region_.width && in_row_ && (region_.rows > 1 || type.rank() == 1)) return "c";
    if (n == elements_) return std::string(e);
    return absl::StrCat("(", e, ") % ", n);
  }

  // The vector that all tensors of whole elements allow, and of which no result takes more than 16 bytes: the stores of
  // a warp then fill whole sectors.
  int64_t FlatVector() const {
    int64_t vector = VectorOf({elements_});
    for (const TensorType& result : call_.results) vector = std::min(vector, 16 / ByteSize(result.dtype));
    if (ReadsRow()) vector = std::min(vector, VectorOf({region_.width}));
    for (const RegionStep& step : region_.steps) {
      if (step.kind != Kind::kLoad || !gathers_[static_cast<size_t>(step.index)].empty()) continue;
      vector = std::min(vector, VectorOf({OperandOf(step).num_elements()}));
    }
    return vector;
  }

  absl::Status EmitFlat(CudaSteps& steps) {
    PlanPasses(true);
    const int64_t vector = FlatVector();
    const CudaThreads threads = CutCudaThreads(elements_ / vector);
    const bool reads_row = ReadsRow() || RowNumbers(0) != "";
    std::string text = Signature(kBlock, false);
    absl::StrAppend(&text, "  const ", index_, " e = ", ThreadText(index_), " * ", vector, ";\n");
    if (!threads.exact) absl::StrAppend(&text, "  if (e >= ", elements_, "u) return;\n");
    absl::StrAppend(&text, Uniforms());
    if (reads_row) absl::StrAppend(&text, "  const ", index_, " row = e / ", region_.width, "u;\n", RowNumbers(0));
    absl::StrAppend(&text, Elements(passes_[0], vector, "e", "0", "  "), "}\n");
    steps.Launch({.source = std::move(text),
                  .function = function_,
                  .grid = {threads.blocks, 1, 1},
                  .block = {threads.block, 1, 1},
                  .arguments = AllPlaces(call_)});
    return absl::OkStatus();
  }

  // Sums the chunks' sums of all column results. A width of whole blocks is not in the text.
  void EmitFinish(int64_t count, CudaSteps& steps) const {
    std::vector<std::string> args = {"const float* partial"};
    CudaLaunch launch{.function = "mt_column_sums", .arguments = {WorkspacePlace()}};
    std::string writes;
    for (size_t k = 0; k < columns_.size(); ++k) {
      const absl::string_view type = CudaType(region_.results[static_cast<size_t>(columns_[k])].type.dtype);
      args.push_back(absl::StrCat(type, "* q", k));
      absl::StrAppend(&writes, "    if (blockIdx.y == ", k, ") q", k, "[c] = FromFloat<", type, ">(total);\n");
      launch.arguments.push_back(ResultPlace(columns_[k]));
    }
    const int64_t threads = 32 * kCudaChunkLanes;
    const std::string width =
        region_.width % 32 == 0 ? std::string("gridDim.x * 32") : absl::StrCat(region_.width, "u");
    launch.source = absl::StrCat(
        "extern \"C\" __global__ void __launch_bounds__(", threads, ") mt_column_sums(", absl::StrJoin(args, ", "),
        ") {\n  __shared__ float shared[", kCudaChunkLanes, "][32];\n  const u32 x = threadIdx.x % 32, lane = ",
        "threadIdx.x / 32, c = blockIdx.x * 32 + x, width = ", width, ";\n  float sum = 0;\n  if (c < width) {\n",
        "    const float* from = partial + ((u64)blockIdx.y * ", count, " + lane) * width + c;\n#pragma unroll\n",
        "    for (u32 i = 0; i < ", CeilDiv(count, kCudaChunkLanes), "; ++i) {\n      if (lane + i * ", kCudaChunkLanes,
        " < ", count, ") sum += *from;\n      from += ", kCudaChunkLanes, " * width;\n    }\n  }\n",
        "  shared[lane][x] = sum;\n  __syncthreads();\n  if (lane == 0 && c < width) {\n    float total = 0;\n",
        "    for (int i = 0; i < ", kCudaChunkLanes, "; ++i) total += shared[i][x];\n", writes, "  }\n}\n");
    launch.grid = {CeilDiv(region_.width, 32), static_cast<int64_t>(columns_.size()), 1};
    launch.block = {threads, 1, 1};
    steps.Launch(std::move(launch));
  }

  absl::Status EmitColumns(CudaSteps& steps) {
    in_row_ = true;
    const CudaChunks chunks = CutCudaSum(region_.rows);
    const int64_t vector = RowVector(region_.width), tile = 32 * vector;
    // Where elements are stored, too, a load would wait for the stores before it, which might be to the same place.
    staged_column_ = "x";
    if (!columns_only_) PlanStages(tile, vector, kColumnStages, int64_t{64} << 10);
    PlanPasses(true);
    const bool direct = chunks.count == 1;
    std::string text = Signature(kBlock, !direct);
    absl::StrAppend(&text, "  __shared__ float shared[", kCudaRowLanes, "][", tile,
                    "];\n  const u32 x = threadIdx.x % 32 * ", vector, ", lane = threadIdx.x / 32, c = blockIdx.x * ",
                    tile, " + x;\n", Uniforms());
    for (size_t k = 0; k < columns_.size(); ++k) absl::StrAppend(&text, "  float a", k, "[1][", vector, "] = {};\n");
    absl::StrAppend(&text, "  const ", index_, " first = blockIdx.y * (", index_, ")", chunks.length,
                    ", last = first + ", chunks.length, " < ", region_.rows, " ? first + ", chunks.length, " : ",
                    region_.rows, ";\n  if (c < ", region_.width, ") {\n");
    const std::string row = absl::StrCat("    const ", index_, " e = row * ", region_.width, " + c;\n", RowNumbers(0),
                                         Elements(passes_[0], vector, "e", "0", "    "));
    if (stage_bytes_ > 0) {
      absl::StrAppend(&text, FetchText(tile, absl::StrCat("blockIdx.x * ", tile)), StagedRows(row));
    } else {
      absl::StrAppend(&text, "#pragma unroll 4\n  for (", index_,
                      " row = first + lane; row < last; row += ", kCudaRowLanes, ") {\n", row, "  }\n");
    }
    absl::StrAppend(&text, "  }\n");
    for (size_t k = 0; k < columns_.size(); ++k) {
      absl::StrAppend(&text, "#pragma unroll\n  for (int i = 0; i < ", vector, "; ++i) shared[lane][x + i] = a", k,
                      "[0][i];\n  __syncthreads();\n  for (u32 i = threadIdx.x; i < ", tile, "; i += ", kBlock,
                      ") {\n    const u32 column = blockIdx.x * ", tile,
                      " + i;\n    float total = 0;\n#pragma unroll\n", "    for (int l = 0; l < ", kCudaRowLanes,
                      "; ++l) total += shared[l][i];\n    if (column < ", region_.width, ") ");
      if (direct) {
        const int r = columns_[k];
        absl::StrAppend(&text, "q", r, "[column] = FromFloat<",
                        CudaType(region_.results[static_cast<size_t>(r)].type.dtype), ">(total);\n");
      } else {
        absl::StrAppend(&text, "partial[(", k, "ull * ", chunks.count, " + blockIdx.y) * ", region_.width,
                        " + column] = total;\n");
      }
      absl::StrAppend(&text, "  }\n  __syncthreads();\n");
    }
    absl::StrAppend(&text, "}\n");
    CudaLaunch launch{.source = std::move(text),
                      .function = function_,
                      .grid = {CeilDiv(region_.width, tile), chunks.count, 1},
                      .block = {kBlock, 1, 1},
                      .shared_bytes = StagesBytes(),
                      .arguments = AllPlaces(call_)};
    if (!direct) launch.arguments.push_back(WorkspacePlace());
    steps.Launch(std::move(launch));
    if (!direct) EmitFinish(chunks.count, steps);
    return absl::OkStatus();
  }

  int64_t StagedAt(int64_t operand) const { return staged_.empty() ? -1 : staged_[static_cast<size_t>(operand)]; }

  // Chooses the operands of which a warp copies `stretch` columns of its next rows into shared memory, if any; a row
  // that it works on and stages - 1 others are there at one time, in `most_bytes` of a block.
  void PlanStages(int64_t stretch, int64_t vector, int64_t stages, int64_t most_bytes) {
    if (call_.target.sm < 80 || vector != 8 || index_ != "u32") return;
    staged_.assign(call_.operands.size(), -1);
    stages_of_warp_ = stages;
    for (const RegionStep& step : region_.steps) {
      if (step.kind != Kind::kLoad || OperandOf(step).num_elements() != elements_ || StagedAt(step.index) >= 0) {
        continue;
      }
      staged_[static_cast<size_t>(step.index)] = stage_bytes_;
      stage_bytes_ += stretch * ByteSize(OperandOf(step).dtype);
    }
    if (StagesBytes() > most_bytes) {
      staged_.clear();
      stage_bytes_ = 0;
    }
  }
  // Of a block; all chips with asynchronous copies have 99 KiB.
  int64_t StagesBytes() const { return kCudaRowLanes * stages_of_warp_ * stage_bytes_; }

  // fetch(row, slot): copies a row's `stretch` columns from column `first_column` on into one of the warp's slots.
  std::string FetchText(int64_t stretch, absl::string_view first_column) const {
    const int64_t slots = CeilDiv(stretch, 32 * 8);
    std::string text =
        absl::StrCat("  extern __shared__ Bytes16 dynamic[];\n  u8* const mine = (u8*)dynamic + threadIdx.x / 32 * ",
                     stages_of_warp_ * stage_bytes_,
                     ";\n  const auto fetch = [&](u32 row, u32 slot) {\n    u8* const to = mine + slot * ",
                     stage_bytes_, ";\n#pragma unroll\n    for (int j = 0; j < ", slots,
                     "; ++j) {\n      const u32 x = (j * 32 + threadIdx.x % 32) * 8;\n");
    if (slots * 32 * 8 != stretch) absl::StrAppend(&text, "      if (x >= ", stretch, ") continue;\n");
    for (size_t i = 0; i < staged_.size(); ++i) {
      if (staged_[i] < 0) continue;
      const int64_t size = ByteSize(call_.operands[i].dtype);
      for (int64_t at = 0; at < 8 * size; at += 16) {
        absl::StrAppend(&text, "      CopyAsync(to + ", staged_[i] + at, " + x * ", size, ", (const u8*)(p", i,
                        " + row * ", region_.width, " + ", first_column, " + x) + ", at, ");\n");
      }
    }
    return absl::StrCat(text, "    }\n  };\n");
  }

  // A warp's way through its rows of a chunk. A lane reads what it copied itself, so that none waits for another.
  std::string StagedRows(const std::string& passes) const {
    const int64_t step = kCudaRowLanes, ahead = stages_of_warp_ - 1;
    std::string text = "  const u32 begin = first + threadIdx.x / 32;\n";
    for (int v = 0; v < static_cast<int>(region_.steps.size()); ++v) {
      if (StepAt(v).kind != Kind::kRow || ExtentAt(v) != Extent::kRow) continue;
      absl::StrAppend(&text, "  float n", v, " = begin < last ? ToFloat(p", StepAt(v).index, "[begin]) : 0.0f;\n");
    }
    absl::StrAppend(&text, "#pragma unroll\n  for (u32 s = 0; s < ", ahead, "; ++s) {\n    if (begin + s * ", step,
                    " < last) fetch(begin + s * ", step, ", s);\n    CommitAsync();\n  }\n  u32 slot = 0;\n",
                    "#pragma unroll 1\n  for (u32 row = begin; row < last; row += ", step, ") {\n    if (row + ",
                    ahead * step, " < last) fetch(row + ", ahead * step, ", slot == 0 ? ", ahead,
                    " : slot - 1);\n    CommitAsync();\n    WaitAsync<", ahead,
                    ">();\n    const u8* const stage = mine + slot * ", stage_bytes_, ";\n    slot = slot == ", ahead,
                    " ? 0 : slot + 1;\n", passes, "  }\n");
    return text;
  }

  // The passes over one row, `row`.
  std::string RowPasses(int64_t threads, int64_t vector, int64_t slots, bool unroll) const {
    std::string text;
    for (const int v : kept_) absl::StrAppend(&text, "    float h", v, "[", slots, "][", vector, "];\n");
    for (int stage = 0; stage <= last_stage_; ++stage) {
      const Pass& pass = passes_[static_cast<size_t>(stage)];
      absl::StrAppend(&text, RowNumbers(stage));
      const bool is_empty = pass.row_sums.empty() && pass.columns.empty() && pass.results.empty();
      if (is_empty) continue;
      for (const int v : pass.row_sums) absl::StrAppend(&text, "    float s", v, " = 0;\n");
      absl::StrAppend(&text, unroll ? "#pragma unroll\n" : "#pragma unroll 1\n", "    for (int j = 0; j < ", slots,
                      "; ++j) {\n      const u32 c = (j * ", threads, " + lane) * ", vector, ";\n");
      const bool guard = slots * threads * vector != region_.width;
      if (guard) absl::StrAppend(&text, "      if (c < ", region_.width, ") {\n");
      absl::StrAppend(&text, "      const ", index_, " e = row * ", region_.width, " + c;\n",
                      Elements(pass, vector, "e", "j", "      "));
      if (guard) absl::StrAppend(&text, "      }\n");
      absl::StrAppend(&text, "    }\n");
      for (const int v : pass.row_sums) {
        absl::StrAppend(&text, "    const float v", v, " = Fold<Sum, ", threads, ">(s", v, ", fold);\n");
      }
    }
    if (has_row_results_) {
      // A result may be written over an operand that other threads have read.
      if (!has_row_sums_) absl::StrAppend(&text, threads == 32 ? "    __syncwarp();\n" : "    __syncthreads();\n");
      absl::StrAppend(&text, "    if (lane == 0) {\n");
      for (size_t r = 0; r < region_.results.size(); ++r) {
        if (region_.results[r].kind != RegionResult::Kind::kRow) continue;
        absl::StrAppend(&text, "      q", r, "[row] = FromFloat<", CudaType(region_.results[r].type.dtype), ">(v",
                        region_.results[r].value, ");\n");
      }
      absl::StrAppend(&text, "    }\n");
    }
    return text;
  }

  absl::Status EmitRows(CudaSteps& steps) {
    in_row_ = true;
    const int64_t width = region_.width, threads = RowThreads(width), vector = RowVector(width);
    const int64_t slots = CeilDiv(width, threads * vector), held = slots * vector;
    const int64_t count = static_cast<int64_t>(columns_.size());
    const bool one_warp = threads == 32;
    if (one_warp && count > 0) PlanStages(width, vector, kRowStages, int64_t{96} << 10);
    const bool staged = stage_bytes_ > 0;
    // Registers of a thread that arrays may take, beside the vectors in flight.
    const int64_t allowed = staged ? 100 : threads <= 256 ? 160 : threads == 512 ? 72 : 24;
    PlanPasses(true);
    const bool hold = (static_cast<int64_t>(kept_.size()) + count) * held <= allowed;
    if (!hold) PlanPasses(false);
    const bool unroll = hold || count > 0;
    if (count * held > 128) {
      return absl::UnimplementedError(absl::StrCat("sums over rows of width ", width,
                                                   " beside sums over each row; the ", "largest such width is ",
                                                   threads * (128 / count)));
    }
    const int64_t block = one_warp ? kBlock : threads, rows = region_.rows;
    // Rows that wait in shared memory keep the memory busy without a second block, and its registers are better used.
    std::string text = Signature(block, count > 0, one_warp && count > 0 && (hold || !staged) ? 2 : 1);
    const std::string index(index_);
    absl::StrAppend(
        &text, "  ",
        one_warp ? "float* const fold = nullptr;" : absl::StrCat("__shared__ float fold[", threads / 32, "];"),
        "\n  const u32 lane = threadIdx.x % ", threads, ";\n", Uniforms());
    const std::string passes = RowPasses(threads, vector, slots, unroll);
    CudaLaunch launch{.function = function_, .block = {block, 1, 1}, .arguments = AllPlaces(call_)};
    if (count == 0) {
      // As many rows a block as divide them, so that the text does not depend on how many there are.
      const int64_t together = !one_warp ? 1 : rows < kBlock / 32 ? rows : kBlock / 32;
      absl::StrAppend(
          &text, "  const ", index, " row = ",
          one_warp ? absl::StrCat("blockIdx.x * (", index, ")(blockDim.x / 32) + threadIdx.x / 32") : "blockIdx.x",
          ";\n");
      if (rows % together != 0) absl::StrAppend(&text, "  if (row >= ", rows, ") return;\n");
      absl::StrAppend(&text, "  {\n", passes, "  }\n}\n");
      launch.source = std::move(text);
      launch.grid[0] = CeilDiv(rows, together);
      if (one_warp) launch.block[0] = 32 * together;
      steps.Launch(std::move(launch));
      return absl::OkStatus();
    }
    const CudaChunks chunks = CutCudaSum(rows);
    absl::StrAppend(&text, "  const ", index, " first = blockIdx.x * (", index, ")", chunks.length, ", last = first + ",
                    chunks.length, " < ", rows, " ? first + ", chunks.length, " : ", rows, ";\n");
    std::string clear, add;
    for (int64_t k = 0; k < count; ++k) absl::StrAppend(&clear, "  float a", k, "[", slots, "][", vector, "] = {};\n");
    if (one_warp) {
      if (staged) {
        launch.shared_bytes = std::max(StagesBytes(), kCudaRowLanes * width * 4);
        absl::StrAppend(&text, FetchText(width, "0"), clear, StagedRows(passes),
                        "  __syncthreads();\n  float(&shared)[", kCudaRowLanes, "][", width, "] = *(float(*)[",
                        kCudaRowLanes, "][", width, "])dynamic;\n");
      } else {
        absl::StrAppend(&text, "  __shared__ float shared[", kCudaRowLanes, "][", width, "];\n", clear, "  for (",
                        index, " row = first + threadIdx.x / 32; row < last; row += ", kCudaRowLanes, ") {\n", passes,
                        "  }\n");
      }
      for (int64_t k = 0; k < count; ++k) {
        absl::StrAppend(&text, "#pragma unroll\n  for (int j = 0; j < ", slots,
                        "; ++j) {\n    const u32 c = (j * 32 + lane) * ", vector,
                        ";\n#pragma unroll\n    for (int i = 0; i < ", vector, "; ++i) if (c < ", width,
                        ") shared[threadIdx.x / 32][c + i] = a", k,
                        "[j][i];\n  }\n  __syncthreads();\n#pragma unroll 1\n  for (u32 c = threadIdx.x; c < ", width,
                        "; c += ", kBlock, ") {\n    float total = 0;\n#pragma unroll\n    for (int l = 0; ", "l < ",
                        kCudaRowLanes, "; ++l) total += shared[l][c];\n    partial[(", k, "ull * ", chunks.count,
                        " + blockIdx.x) * ", width, " + c] = total;\n  }\n  __syncthreads();\n");
      }
    } else {
      absl::StrAppend(&text, "  for (u32 l = 0; l < ", kCudaRowLanes, "; ++l) {\n", clear, "  for (", index,
                      " row = first + l; row < last; row += ", kCudaRowLanes, ") {\n", passes, "  }\n");
      for (int64_t k = 0; k < count; ++k) {
        absl::StrAppend(&text, "#pragma unroll\n  for (int j = 0; j < ", slots, "; ++j) {\n    const u32 c = (j * ",
                        threads, " + lane) * ", vector, ";\n    float* const to = partial + (", k, "ull * ",
                        chunks.count, " + blockIdx.x) * ", width, " + c;\n#pragma unroll\n    for (int i = 0; i < ",
                        vector, "; ++i) if (c < ", width, ") to[i] = l == 0 ? a", k, "[j][i] : to[i] + a", k,
                        "[j][i];\n  }\n");
      }
      absl::StrAppend(&text, "  }\n");
    }
    absl::StrAppend(&text, "}\n");
    launch.source = std::move(text);
    launch.grid[0] = chunks.count;
    launch.arguments.push_back(WorkspacePlace());
    steps.Launch(std::move(launch));
    EmitFinish(chunks.count, steps);
    return absl::OkStatus();
  }

  const CudaCall& call_;
  const Region& region_;
  std::vector<std::string> gathers_;
  const std::vector<Extent> extents_;
  std::vector<int> stages_;
  int last_stage_ = 0;
  bool has_row_sums_ = false, has_row_results_ = false;
  std::vector<int> columns_;  // Results that are sums over the rows.
  bool columns_only_ = true;  // There are no others.
  int64_t elements_ = 0;
  absl::string_view index_;
  std::string function_;
  bool in_row_ = false;  // `c` is the column of an element.
  std::vector<Pass> passes_;
  std::set<int> kept_;
  std::vector<int64_t> staged_;  // Of each operand, where its row is in a slot; -1: read where it lies. May be empty.
  int64_t stage_bytes_ = 0;      // Of one slot.
  int64_t stages_of_warp_ = 0;   // Slots.
  absl::string_view staged_column_ = "c";  // A column in a slot.
};

// The place in an operand that broadcasts to `to`, of element @.
std::string GatherText(const TensorType& operand, const Dims& to) {
  std::vector<std::string> terms;
  int64_t inner = 1, stride = 1;
  for (int64_t d = static_cast<int64_t>(to.size()) - 1, from = operand.rank() - 1; from >= 0; --d, --from) {
    const int64_t n = to[static_cast<size_t>(d)];
    if (operand.dim(from) != 1) {
      terms.push_back(absl::StrCat("@ / ", inner, "u % ", n, "u * ", stride, "u"));
      stride *= n;
    }
    inner *= n;
  }
  return terms.empty() ? "0" : absl::StrJoin(terms, " + ");
}

}  // namespace

absl::Status EmitRegion(const CudaCall& call, const Region& region, CudaSteps& steps) {
  return RegionWriter(call, region, {}).Emit(steps);
}

absl::Status EmitElementWise(const CudaCall& call, CudaSteps& steps) {
  const TensorType& result = call.results[0];
  const int64_t elements = result.num_elements(), width = result.dims.empty() ? 1 : result.dim(-1);
  RegionBuilder builder(elements / width, width);
  std::vector<int> values(call.operands.size(), -1);
  std::vector<int64_t> numbers(call.operands.size(), -1);
  std::vector<std::string> gathers(call.operands.size());
  for (size_t i = 0; i < call.operands.size(); ++i) {
    const TensorType& operand = call.operands[i];
    const int64_t n = operand.num_elements(), number = static_cast<int64_t>(i);
    if (operand.dtype == DType::kI32) {
      numbers[i] = number;
    } else if (n == 1 && elements > 1) {
      values[i] = builder.Row(number);
    } else {
      values[i] = builder.Load(number);
      // Rows that repeat need no gather.
      bool is_suffix = true;
      int64_t first = 0;
      while (first < operand.rank() && operand.dim(first) == 1) ++first;
      for (int64_t d = first; d < operand.rank(); ++d) {
        is_suffix = is_suffix && operand.dim(d) == result.dim(result.rank() - operand.rank() + d);
      }
      if (!is_suffix) gathers[i] = GatherText(operand, result.dims);
    }
  }
  const int64_t samples = result.dims.empty() ? 1 : result.dims[0];
  const std::vector<Expr> expressions = call.op->expr(*call.attrs);
  for (size_t r = 0; r < expressions.size(); ++r) {
    builder.AddResult(RegionResult::Kind::kFull, builder.Compute(expressions[r], values, numbers, elements / samples),
                      call.results[r]);
  }
  const Region region = builder.Build();
  return RegionWriter(call, region, std::move(gathers)).Emit(steps);
}

}  // namespace mt
