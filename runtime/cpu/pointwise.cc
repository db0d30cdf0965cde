#include "runtime/cpu/pointwise.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/plan/resources.h"
#include "ir/base/check.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/kernel.h"
#include "runtime/cpu/reductions.h"

namespace mt {
namespace {

constexpr int64_t kTile = 2048;                // Elements that one loop works on: registers stay in the first caches.
constexpr int64_t kScratchFloats = 64 * 1024;  // Registers of one task, on its stack.
constexpr int64_t kCacheFloats = 8 * 1024;     // What the registers of a tile should take.
constexpr int64_t kLineBytes = 64;
constexpr int kMaxValues = 8192;            // Values of one program: instructions, and scalars spread to vectors.
constexpr double kTaskNanoseconds = 20000;  // A task's work, roughly: far more than it costs to hand out.

// How an operand is spread over the elements of the result: dimensions that it walks as one are merged. The last stride
// is 0 or 1.
struct Spread {
  Dims dims, strides;

  int64_t inner() const { return dims.back(); }
  // Position in the operand of the first element of row `row`; a row has inner() elements.
  int64_t RowOffset(int64_t row) const {
    int64_t offset = 0;
    for (size_t d = dims.size() - 1; d-- > 0;) {
      offset += row % dims[d] * strides[d];
      row /= dims[d];
    }
    return offset;
  }
};

// REQUIRES: `operand` broadcasts to `result`.
Spread SpreadOf(absl::Span<const int64_t> operand, absl::Span<const int64_t> result) {
  Spread spread;  // From the last dimension first.
  int64_t stride = 1;
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t size = result[result.size() - 1 - i];
    const int64_t own = i < operand.size() ? operand[operand.size() - 1 - i] : 1;
    if (size == 1) continue;
    const int64_t step = own == 1 ? 0 : stride;
    stride *= own;
    if (!spread.dims.empty() && step == (spread.strides.back() == 0 ? 0 : spread.strides.back() * spread.dims.back())) {
      spread.dims.back() *= size;
    } else {
      spread.dims.push_back(size);
      spread.strides.push_back(step);
    }
  }
  if (spread.dims.empty()) {
    spread.dims.push_back(1);
    spread.strides.push_back(0);
  }
  std::reverse(spread.dims.begin(), spread.dims.end());
  std::reverse(spread.strides.begin(), spread.strides.end());
  return spread;
}

// What a step reads or makes: one number, a number a row, a number a column (the same in every row) or one an element.
// All but the scalars are values: vectors in registers or in memory.
enum class Shape : uint8_t { kScalar, kRows, kColumns, kElements };
struct Input {
  Shape shape = Shape::kScalar;
  int number = 0;  // Of a scalar or of a value.
};

struct Step {
  enum Kind {
    kUnary,
    kVV,
    kVS,
    kSV,
    kPair,  // dst = second(first(a, b or scalar b), c or scalar c)
    kSelectVV,
    kSelectVS,
    kSelectSV,
    kSelectSS,
    kFill,       // dst = scalar a
    kCopy,       // dst = a
    kUniform,    // dst = random numbers `a`
    kLoad,       // dst = operand `a` at the same place, widened
    kBroadcast,  // dst = operand `a`, spread
    kRowSum,     // dst = sum over each row of a
    kColumnSum,  // column sums `dst` += rows of a
    kStore,      // result `dst` = a
  } kind;
  // Over the elements of the tile in one loop; over its rows' numbers; over each row's elements by itself, where an
  // input is a number a row (then a scalar of the loop) or a column's.
  enum Run { kAll, kRowNumbers, kEachRow } run = kAll;
  int dst = 0;
  Input a = {}, b = {}, c = {};
  Prim prim = Prim::kOperand;  // kVV, kVS, kSV
  VectorMath::First first = VectorMath::kFirsts;
  VectorMath::Second second = VectorMath::kSeconds;
  VectorMath::Pair pair = nullptr;
  VectorMath::Unary unary = nullptr;
  VectorMath::Binary vv = nullptr;
  VectorMath::BinaryVectorScalar vs = nullptr;
  VectorMath::BinaryScalarVector sv = nullptr;
};

// Elements begin..begin+elements-1: whole rows, or a part of one.
struct Tile {
  int64_t begin, elements;
  int64_t row, rows, column, length;  // First row, how many, first column, elements of a row.
};

bool FirstTakesVector(VectorMath::First first) {
  return first == VectorMath::kAddVV || first == VectorMath::kSubVV || first == VectorMath::kMulVV;
}
bool SecondTakesVector(VectorMath::Second second) {
  return second == VectorMath::kAddV || second == VectorMath::kSubV || second == VectorMath::kFromV ||
         second == VectorMath::kMulV;
}

// What happens once a run, before the elements: the part of the program that is the same for all of them.
struct ScalarStep {
  Prim prim;
  int dst = 0, a = 0, b = 0, c = 0;
  DType dtype = DType::kF32;
  int operand = -1;  // Loads it.
};

struct RandomNumbers {
  const int32_t* state = nullptr;
  uint32_t key = 0;
  int64_t sample_elements = 1;
  UniformPlace place;  // Read from `state` once a run; `sample` is the first.
};

struct Place {
  enum Kind { kNowhere, kMemory, kRegister } kind = kNowhere;
  Shape shape = Shape::kElements;
  float* memory = nullptr;  // kMemory: of the first element, row or column.
  int reg = -1;             // kRegister: those of numbers a row are counted by themselves.
};

struct Kernel {
  const VectorMath* math = nullptr;
  std::vector<Tensor> operands, results;
  std::vector<Spread> spreads;  // Of kBroadcast, one a value.
  int64_t rows = 1, width = 1;  // Of the elements; one row where no step asks for rows.
  int64_t tile = kTile, tile_rows = 1;
  bool whole_rows = false;  // A tile is tile_rows rows; else up to `tile` elements of one row.
  int64_t task_elements = kTile, tasks = 1;
  int64_t row_registers_at = 0;  // In the scratch.
  std::vector<ScalarStep> scalar_steps;
  std::vector<Step> steps;
  std::vector<float> scalars;
  std::vector<RandomNumbers> random;
  std::vector<Place> places;       // One a value.
  std::vector<int> memory_values;  // Values whose place is memory.
  std::vector<int> column_results;
  std::vector<std::pair<const std::byte*, int64_t>> streams;  // Read or written element by element; bytes of one.
  float* column_sums = nullptr;                               // [column_results, tasks, width]
  std::function<void(int64_t)> body, columns_body;

  int64_t elements() const { return rows * width; }
  float* ColumnSums(int64_t k, int64_t task) const { return column_sums + (k * tasks + task) * width; }
  void RunScalars();
  void RunTask(int64_t task) const;
  void RunTile(const Tile& tile, int64_t task, float* scratch, float** at) const;
  void RunStep(const Step& step, const Tile& tile, float** at) const;
  void FinishColumns(int64_t task) const;
  void LoadOne(int operand, int64_t offset, float* to) const {
    const Tensor& tensor = operands[static_cast<size_t>(operand)];
    math->load[static_cast<size_t>(tensor.type.dtype)](to, tensor.data + offset * ByteSize(tensor.type.dtype), 1);
  }
  float* Register(const Place& place, float* scratch) const {
    if (place.shape == Shape::kRows) return scratch + row_registers_at + std::max(place.reg, 0) * tile_rows;
    return scratch + std::max(place.reg, 0) * tile;
  }
  // Spreads an operand over elements begin..begin+n-1; returns where they are: `to`, or in the operand itself.
  float* Broadcast(int operand, const Spread& spread, int64_t begin, int64_t n, float* to) const;
  void Uniform(const RandomNumbers& numbers, int64_t begin, int64_t n, float* to) const;
};

// Where a value of this shape begins in a tile, in elements from its own start.
int64_t OffsetIn(const Tile& tile, Shape shape) {
  return shape == Shape::kRows ? tile.row : shape == Shape::kColumns ? tile.column : tile.begin;
}
int64_t CountIn(const Tile& tile, Shape shape) {
  return shape == Shape::kRows ? tile.rows : shape == Shape::kColumns ? tile.length : tile.elements;
}

void Kernel::RunScalars() {
  for (RandomNumbers& r : random) {
    r.place = {.seed_low = static_cast<uint32_t>(r.state[0]),
               .seed_high = static_cast<uint32_t>(r.state[1]),
               .step = static_cast<uint32_t>(r.state[2]),
               .sample = static_cast<uint32_t>(r.state[3]),
               .key = r.key};
  }
  for (const ScalarStep& s : scalar_steps) {
    float* const dst = &scalars[static_cast<size_t>(s.dst)];
    const auto value = [&](int i) { return &scalars[static_cast<size_t>(i)]; };
    const size_t prim = static_cast<size_t>(s.prim);
    if (s.operand >= 0) {
      LoadOne(s.operand, 0, dst);
    } else if (s.prim == Prim::kSelect) {
      math->select_vv(dst, value(s.a), value(s.b), value(s.c), 1);
    } else if (s.prim == Prim::kRound) {
      math->round[static_cast<size_t>(s.dtype)](dst, value(s.a), 1);
    } else if (Row(s.prim).arity == 1) {
      math->unary[prim](dst, value(s.a), 1);
    } else {
      math->vv[prim](dst, value(s.a), value(s.b), 1);
    }
  }
}

float* Kernel::Broadcast(int operand, const Spread& spread, int64_t begin, int64_t n, float* to) const {
  const Tensor& tensor = operands[static_cast<size_t>(operand)];
  const auto load = math->load[static_cast<size_t>(tensor.type.dtype)];
  const int64_t element_bytes = ByteSize(tensor.type.dtype), inner = spread.inner();
  const bool repeats = spread.strides.back() == 0;
  int64_t row = begin / inner, column = begin % inner;
  if (!repeats && tensor.type.dtype == DType::kF32 && column + n <= inner) {
    return tensor.as<float>() + spread.RowOffset(row) + column;
  }
  float* next = to;
  while (n > 0) {
    const int64_t count = std::min(n, inner - column);
    const int64_t offset = spread.RowOffset(row);
    if (repeats) {
      float value;
      load(&value, tensor.data + offset * element_bytes, 1);
      math->fill(next, value, count);
    } else {
      load(next, tensor.data + (offset + column) * element_bytes, count);
    }
    next += count;
    n -= count;
    column = 0;
    ++row;
  }
  return to;
}

void Kernel::Uniform(const RandomNumbers& numbers, int64_t begin, int64_t n, float* to) const {
  constexpr int64_t kFew = 16;  // Below this, whole blocks of counters are a waste.
  UniformPlace place = numbers.place;
  while (n > 0) {
    const int64_t sample = begin / numbers.sample_elements, first = begin % numbers.sample_elements;
    const int64_t count = std::min(n, numbers.sample_elements - first);
    place.sample = numbers.place.sample + static_cast<uint32_t>(sample);
    if (count >= kFew) {
      math->uniform(to, place, first, count);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t element = first + i;
        to[i] = UniformFromBits(
            Philox({place.seed_low, place.seed_high}, {static_cast<uint32_t>(element / 4), place.key, place.step,
                                                       place.sample})[static_cast<size_t>(element % 4)]);
      }
    }
    to += count;
    begin += count;
    n -= count;
  }
}

void Kernel::RunStep(const Step& step, const Tile& tile, float** at) const {
  const bool each = step.run == Step::kEachRow;
  const int64_t n = each ? tile.length : step.run == Step::kRowNumbers ? tile.rows : tile.elements;
  for (int64_t r = 0; r < (each ? tile.rows : 1); ++r) {
    const auto vector = [&](const Input& x) -> float* {
      return at[x.number] + (each && x.shape == Shape::kElements ? r * tile.length : 0);
    };
    const auto scalar = [&](const Input& x) {
      return x.shape == Shape::kScalar ? scalars[static_cast<size_t>(x.number)] : at[x.number][r];
    };
    float* const dst = at[step.dst] + r * tile.length;
    switch (step.kind) {
      case Step::kUnary:
        step.unary(dst, vector(step.a), n);
        break;
      case Step::kVV:
        step.vv(dst, vector(step.a), vector(step.b), n);
        break;
      case Step::kVS:
        step.vs(dst, vector(step.a), scalar(step.b), n);
        break;
      case Step::kSV:
        step.sv(dst, scalar(step.a), vector(step.b), n);
        break;
      case Step::kPair: {
        const bool b_is_vector = FirstTakesVector(step.first), c_is_vector = SecondTakesVector(step.second);
        step.pair(dst, vector(step.a), b_is_vector ? vector(step.b) : nullptr, b_is_vector ? 0 : scalar(step.b),
                  c_is_vector ? vector(step.c) : nullptr, c_is_vector ? 0 : scalar(step.c), n);
        break;
      }
      case Step::kSelectVV:
        math->select_vv(dst, vector(step.a), vector(step.b), vector(step.c), n);
        break;
      case Step::kSelectVS:
        math->select_vs(dst, vector(step.a), vector(step.b), scalar(step.c), n);
        break;
      case Step::kSelectSV:
        math->select_sv(dst, vector(step.a), scalar(step.b), vector(step.c), n);
        break;
      case Step::kSelectSS:
        math->select_ss(dst, vector(step.a), scalar(step.b), scalar(step.c), n);
        break;
      case Step::kFill:
        math->fill(dst, scalar(step.a), n);
        break;
      case Step::kCopy:
        std::memcpy(dst, vector(step.a), static_cast<size_t>(n) * sizeof(float));
        break;
      default:
        break;  // Done by RunTile.
    }
  }
}

void Kernel::RunTile(const Tile& tile, int64_t task, float* scratch, float** at) const {
  for (const int v : memory_values) {
    const Place& place = places[static_cast<size_t>(v)];
    at[v] = place.memory + OffsetIn(tile, place.shape);
  }
  // A tile touches each tensor in a burst, which hardware does not foresee: the next tile's is asked for now.
  const int64_t next = tile.begin + tile.elements;
  for (const auto& [data, bytes] : streams) {
    const std::byte* const end = data + std::min(next + tile.elements, elements()) * bytes;
    for (const std::byte* line = data + next * bytes; line < end; line += kLineBytes) __builtin_prefetch(line, 0, 2);
  }
  for (const Step& step : steps) {
    switch (step.kind) {
      case Step::kUniform:
        Uniform(random[static_cast<size_t>(step.a.number)], tile.begin, tile.elements, at[step.dst]);
        break;
      case Step::kLoad: {
        const Tensor& tensor = operands[static_cast<size_t>(step.a.number)];
        const Shape shape = places[static_cast<size_t>(step.dst)].shape;
        math->load[static_cast<size_t>(tensor.type.dtype)](
            at[step.dst], tensor.data + OffsetIn(tile, shape) * ByteSize(tensor.type.dtype), CountIn(tile, shape));
        break;
      }
      case Step::kBroadcast:
        at[step.dst] = Broadcast(step.a.number, spreads[static_cast<size_t>(step.dst)], tile.begin, tile.elements,
                                 Register(places[static_cast<size_t>(step.dst)], scratch));
        break;
      case Step::kRowSum:
        RowSums(at[step.a.number], tile.rows, tile.length, at[step.dst]);
        break;
      case Step::kColumnSum: {
        float* const sums = ColumnSums(step.dst, task) + tile.column;
        const auto add = math->vv[static_cast<size_t>(Prim::kAdd)];
        for (int64_t r = 0; r < tile.rows; ++r) add(sums, sums, at[step.a.number] + r * tile.length, tile.length);
        break;
      }
      case Step::kStore: {
        const Tensor& tensor = results[static_cast<size_t>(step.dst)];
        std::byte* const to = tensor.data + OffsetIn(tile, step.a.shape) * ByteSize(tensor.type.dtype);
        if (to != reinterpret_cast<const std::byte*>(at[step.a.number])) {
          math->store[static_cast<size_t>(tensor.type.dtype)](to, at[step.a.number], CountIn(tile, step.a.shape));
        }
        break;
      }
      default:
        RunStep(step, tile, at);
    }
  }
}

void Kernel::RunTask(int64_t task) const {
  alignas(64) float scratch[kScratchFloats];
  float* at[kMaxValues];
  for (size_t v = 0; v < places.size(); ++v) at[v] = Register(places[v], scratch);
  for (size_t k = 0; k < column_results.size(); ++k) {
    std::memset(ColumnSums(static_cast<int64_t>(k), task), 0, static_cast<size_t>(width) * sizeof(float));
  }
  const int64_t begin = task * task_elements, end = std::min(elements(), begin + task_elements);
  for (int64_t i = begin; i < end;) {
    Tile t = {
        .begin = i, .elements = std::min(tile, end - i), .row = i / width, .rows = 1, .column = i % width, .length = 0};
    if (whole_rows) {
      t.rows = t.elements / width;
      t.length = width;
    } else {
      t.elements = t.length = std::min(t.elements, width - t.column);
    }
    RunTile(t, task, scratch, at);
    i += t.elements;
  }
}

// Adds up some columns of one of the column sums.
void Kernel::FinishColumns(int64_t task) const {
  const int64_t tasks_each = (width + kColumnsPerTask - 1) / kColumnsPerTask, k = task / tasks_each;
  const int64_t begin = task % tasks_each * kColumnsPerTask, end = std::min(width, begin + kColumnsPerTask);
  float* const sums = ColumnSums(k, 0);
  AddChunks(sums, tasks, width, begin, end);
  const Tensor& result = results[static_cast<size_t>(column_results[static_cast<size_t>(k)])];
  math->store[static_cast<size_t>(result.type.dtype)](result.data + begin * ByteSize(result.type.dtype), sums + begin,
                                                      end - begin);
}

// --- Binding
// -----------------------------------------------------------------------------------------------------------

bool Overlap(const Tensor& a, const Tensor& b) {
  return a.data < b.data + b.type.byte_size() && b.data < a.data + a.type.byte_size();
}

// Nanoseconds an element, roughly, with the widest vectors.
double CostOf(Prim prim) {
  switch (prim) {
    case Prim::kExp:
    case Prim::kLog:
    case Prim::kTanh:
    case Prim::kErf:
    case Prim::kUniform:
      return 1;
    case Prim::kSin:
    case Prim::kCos:
      return 2;
    case Prim::kPow:
      return 10;
    case Prim::kDiv:
    case Prim::kSqrt:
      return 0.3;
    default:
      return 0.1;
  }
}

class Binder {
 public:
  // `spreads_as_numpy`: operands broadcast to the results, which have one shape; the region is one row of all elements.
  Binder(const Region& region, bool spreads_as_numpy, absl::Span<const Tensor> operands,
         absl::Span<const Tensor> results, const VectorMath& math)
      : region_(region), as_numpy_(spreads_as_numpy), kernel_(std::make_shared<Kernel>()) {
    kernel_->math = &math;
    kernel_->operands.assign(operands.begin(), operands.end());
    kernel_->results.assign(results.begin(), results.end());
    kernel_->rows = region.rows;
    kernel_->width = region.width;
  }

  absl::StatusOr<std::shared_ptr<Kernel>> Bind() {
    RETURN_IF_ERROR(as_numpy_ ? CheckNumpyTensors() : CheckRegionTensors());
    RETURN_IF_ERROR(CheckOverlaps());
    RETURN_IF_ERROR(Translate());
    FusePairs();
    PlaceResults();
    RETURN_IF_ERROR(AssignRegisters());
    CutIntoTasks();
    return kernel_;
  }

 private:
  static bool Reads(const RegionStep& step) {
    return step.kind == RegionStep::Kind::kLoad || step.kind == RegionStep::Kind::kRow;
  }
  const Tensor& OperandOf(const RegionStep& step) const { return kernel_->operands[static_cast<size_t>(step.index)]; }

  absl::Status CheckNumpyTensors() {
    Kernel& k = *kernel_;
    const Dims& dims = k.results[0].type.dims;
    for (const Tensor& result : k.results) {
      if (!IsFloat(result.type.dtype) || result.type.dims != dims) {
        return absl::InvalidArgumentError(absl::StrCat("result ", result.type.ToString(),
                                                       " must be floating point with the dimensions of result 0, ",
                                                       k.results[0].type.ToString()));
      }
    }
    for (const RegionStep& step : region_.steps) {
      const bool is_uniform = step.kind == RegionStep::Kind::kUniform;
      if (!Reads(step) && !is_uniform) continue;
      if (step.index < 0 || step.index >= static_cast<int64_t>(k.operands.size())) {
        return absl::InvalidArgumentError(
            absl::StrCat("the program reads operand ", step.index, "; there are ", k.operands.size()));
      }
      const TensorType& type = OperandOf(step).type;
      if (is_uniform) {
        if (type != TensorType{DType::kI32, {4}}) {
          return absl::InvalidArgumentError(
              absl::StrCat("operand ", step.index, " is ", type.ToString(), "; a random state is i32[4]"));
        }
        continue;
      }
      const absl::StatusOr<Dims> together = BroadcastDims(type.dims, dims);
      if (!IsFloat(type.dtype) || !together.ok() || *together != dims) {
        return absl::InvalidArgumentError(absl::StrCat("operand ", step.index, " is ", type.ToString(),
                                                       "; it must be floating point and broadcast to the result, ",
                                                       k.results[0].type.ToString()));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckRegionTensors() {
    std::vector<TensorType> types;
    for (const Tensor& operand : kernel_->operands) types.push_back(operand.type);
    RETURN_IF_ERROR(CheckRegionOperands(region_, types));
    for (size_t r = 0; r < kernel_->results.size(); ++r) {
      if (kernel_->results[r].type == region_.results[r].type) continue;
      return absl::InvalidArgumentError(absl::StrCat("result ", r, " is ", kernel_->results[r].type.ToString(),
                                                     "; the region makes ", region_.results[r].type.ToString()));
    }
    return absl::OkStatus();
  }

  // A result may lie over an operand of its type that is read at the same place alone.
  absl::Status CheckOverlaps() {
    Kernel& k = *kernel_;
    for (const RegionStep& step : region_.steps) {
      if (!Reads(step)) continue;
      const Tensor& operand = OperandOf(step);
      if (operand.type.num_elements() == 1) continue;  // Read before anything is written.
      for (size_t r = 0; r < k.results.size(); ++r) {
        const Tensor& result = k.results[r];
        if (!Overlap(operand, result)) continue;
        const RegionResult::Kind same =
            step.kind == RegionStep::Kind::kRow ? RegionResult::Kind::kRow : RegionResult::Kind::kFull;
        if (operand.data != result.data || operand.type.dtype != result.type.dtype ||
            operand.type.num_elements() != result.type.num_elements() || region_.results[r].kind != same) {
          return absl::InvalidArgumentError(absl::StrCat("operand ", step.index, ", ", operand.type.ToString(),
                                                         ", overlaps a result, ", result.type.ToString(),
                                                         "; only the same bytes under the same type may be shared"));
        }
      }
    }
    for (size_t i = 0; i < k.results.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        if (Overlap(k.results[i], k.results[j])) {
          return absl::InvalidArgumentError(absl::StrCat("results ", j, " and ", i, " overlap"));
        }
      }
    }
    return absl::OkStatus();
  }

  int NewScalar(float value = 0) {
    kernel_->scalars.push_back(value);
    return static_cast<int>(kernel_->scalars.size()) - 1;
  }
  int NewValue(Shape shape = Shape::kElements) {
    kernel_->places.emplace_back().shape = shape;
    kernel_->spreads.emplace_back();
    operand_of_.push_back(-1);
    return static_cast<int>(kernel_->places.size()) - 1;
  }
  // `input` as a value of `shape`: numbers of rows, or of elements.
  Input Vector(Input input, Shape shape) {
    if (input.shape == shape) return input;
    const int v = NewValue(shape);
    kernel_->steps.push_back({.kind = input.shape == Shape::kColumns ? Step::kCopy : Step::kFill,
                              .run = shape == Shape::kRows           ? Step::kRowNumbers
                                     : input.shape == Shape::kScalar ? Step::kAll
                                                                     : Step::kEachRow,
                              .dst = v,
                              .a = input});
    return {shape, v};
  }

  Input LoadOperand(const RegionStep& step) {
    Kernel& k = *kernel_;
    const int operand = static_cast<int>(step.index);
    const Tensor& tensor = OperandOf(step);
    const int64_t n = tensor.type.num_elements();
    const bool is_row = step.kind == RegionStep::Kind::kRow;
    if (n == 1 && (is_row || as_numpy_ || k.elements() == 1)) {
      const int s = NewScalar();
      k.scalar_steps.push_back({.prim = Prim::kOperand, .dst = s, .operand = operand});
      return {Shape::kScalar, s};
    }
    const bool in_place = as_numpy_ ? n == k.elements() : is_row || n == k.elements() || n == k.width;
    const Shape shape = is_row ? Shape::kRows : in_place && n != k.elements() ? Shape::kColumns : Shape::kElements;
    const int v = NewValue(shape);
    operand_of_[static_cast<size_t>(v)] = operand;
    if (!in_place) {
      k.spreads[static_cast<size_t>(v)] = as_numpy_ ? SpreadOf(tensor.type.dims, k.results[0].type.dims)
                                                    : Spread{.dims = {k.elements() / n, n}, .strides = {0, 1}};
      k.steps.push_back({.kind = Step::kBroadcast, .dst = v, .a = {Shape::kScalar, operand}});
    } else if (tensor.type.dtype != DType::kF32) {
      k.steps.push_back({.kind = Step::kLoad, .dst = v, .a = {Shape::kScalar, operand}});
    } else {
      k.places[static_cast<size_t>(v)] = {.kind = Place::kMemory, .shape = shape, .memory = tensor.as<float>()};
    }
    return {shape, v};
  }

  // A step over inputs that are not all scalars.
  Input TranslatePrim(const RegionStep& i, Input a, Input b, Input c) {
    Kernel& k = *kernel_;
    const int arity = Row(i.prim).arity;
    const size_t prim = static_cast<size_t>(i.prim);
    bool any_vector = false, any_rows_or_columns = false;
    for (const Input& x : {a, b, c}) {
      any_vector = any_vector || x.shape >= Shape::kColumns;
      any_rows_or_columns = any_rows_or_columns || x.shape == Shape::kRows || x.shape == Shape::kColumns;
    }
    const Shape shape = any_vector ? Shape::kElements : Shape::kRows;
    const auto is_vector = [&](const Input& x) { return any_vector ? x.shape >= Shape::kColumns : x.shape == shape; };
    if (arity == 3 && !is_vector(a)) a = Vector(a, shape);
    Step step{.kind = Step::kUnary,
              .run = !any_vector           ? Step::kRowNumbers
                     : any_rows_or_columns ? Step::kEachRow
                                           : Step::kAll,
              .dst = NewValue(shape),
              .a = a,
              .b = b,
              .c = c,
              .prim = i.prim};
    if (arity == 1) {
      step.unary = i.prim == Prim::kRound ? k.math->round[static_cast<size_t>(i.dtype)] : k.math->unary[prim];
    } else if (arity == 2) {
      step.kind = !is_vector(b) ? Step::kVS : !is_vector(a) ? Step::kSV : Step::kVV;
      step.vv = k.math->vv[prim];
      step.vs = k.math->vs[prim];
      step.sv = k.math->sv[prim];
    } else {
      step.kind = is_vector(b) ? (is_vector(c) ? Step::kSelectVV : Step::kSelectVS)
                               : (is_vector(c) ? Step::kSelectSV : Step::kSelectSS);
    }
    k.steps.push_back(step);
    return {shape, step.dst};
  }

  absl::Status Translate() {
    Kernel& k = *kernel_;
    std::vector<Input> values;
    const auto value = [&](int v) { return v < 0 ? Input{} : values[static_cast<size_t>(v)]; };
    for (const RegionStep& i : region_.steps) {
      const Input a = value(i.a), b = value(i.b), c = value(i.c);
      Input made;
      switch (i.kind) {
        case RegionStep::Kind::kLoad:
        case RegionStep::Kind::kRow:
          made = LoadOperand(i);
          break;
        case RegionStep::Kind::kConstant:
          made = {Shape::kScalar, NewScalar(static_cast<float>(i.constant))};
          break;
        case RegionStep::Kind::kUniform:
          made = {Shape::kElements, NewValue()};
          k.steps.push_back(
              {.kind = Step::kUniform, .dst = made.number, .a = {Shape::kScalar, static_cast<int>(k.random.size())}});
          k.random.push_back(
              {.state = OperandOf(i).as<int32_t>(), .key = i.key, .sample_elements = i.sample_elements, .place = {}});
          cost_ += CostOf(Prim::kUniform);
          break;
        case RegionStep::Kind::kRowSum: {
          const Input row = Vector(a, Shape::kElements);
          made = {Shape::kRows, NewValue(Shape::kRows)};
          k.steps.push_back({.kind = Step::kRowSum, .dst = made.number, .a = row});
          k.whole_rows = true;
          cost_ += CostOf(Prim::kAdd);
          break;
        }
        case RegionStep::Kind::kPrim:
          if (i.prim == Prim::kRound && k.math->round[static_cast<size_t>(i.dtype)] == nullptr) {
            made = a;  // Already a value of that dtype.
          } else if (a.shape == Shape::kScalar && b.shape == Shape::kScalar && c.shape == Shape::kScalar) {
            made = {Shape::kScalar, NewScalar()};
            k.scalar_steps.push_back(
                {.prim = i.prim, .dst = made.number, .a = a.number, .b = b.number, .c = c.number, .dtype = i.dtype});
          } else {
            made = TranslatePrim(i, a, b, c);
          }
          cost_ += made.shape == Shape::kElements ? CostOf(i.prim) : 0;
          break;
      }
      values.push_back(made);
    }
    for (size_t r = 0; r < region_.results.size(); ++r) {
      const RegionResult& result = region_.results[r];
      const bool is_row = result.kind == RegionResult::Kind::kRow;
      const Input output = Vector(value(result.value), is_row ? Shape::kRows : Shape::kElements);
      outputs_.push_back(output.number);
      if (is_row) k.whole_rows = true;  // Written once.
      if (result.kind != RegionResult::Kind::kColumns) continue;
      k.steps.push_back({.kind = Step::kColumnSum, .dst = static_cast<int>(k.column_results.size()), .a = output});
      k.column_results.push_back(static_cast<int>(r));
      cost_ += CostOf(Prim::kAdd);
    }
    // Of several results one may lie over an operand that another result is a copy of: that one is read first.
    for (size_t r = 0; r < outputs_.size(); ++r) {
      const size_t output = static_cast<size_t>(outputs_[r]);
      if (k.results.size() == 1 || k.places[output].kind != Place::kMemory) continue;
      if (region_.results[r].kind == RegionResult::Kind::kColumns) continue;
      outputs_[r] = NewValue(k.places[output].shape);
      k.steps.insert(k.steps.begin(),
                     {.kind = Step::kLoad, .dst = outputs_[r], .a = {Shape::kScalar, operand_of_[output]}});
    }
    if (k.places.size() > kMaxValues) {
      return absl::UnimplementedError(absl::StrCat("a program of more than ", kMaxValues, " values"));
    }
    // Where nothing asks for rows, the elements are one row.
    bool asks = k.whole_rows || !k.column_results.empty();
    for (const Step& step : k.steps) asks = asks || step.run != Step::kAll;
    for (const Place& place : k.places) asks = asks || place.shape != Shape::kElements;
    if (!asks) {
      k.width = k.elements();
      k.rows = 1;
    }
    return absl::OkStatus();
  }

  // Values that a step reads.
  static std::vector<int> Reads(const Step& step) {
    std::vector<int> reads;
    for (const Input& x : {step.a, step.b, step.c}) {
      if (x.shape != Shape::kScalar) reads.push_back(x.number);
    }
    return reads;
  }
  // Results and column sums are no values.
  static bool MakesValue(const Step& step) { return step.kind != Step::kStore && step.kind != Step::kColumnSum; }

  static bool IsArithmetic(const Step& step) {
    return (step.kind == Step::kVV || step.kind == Step::kVS || step.kind == Step::kSV) &&
           (step.prim == Prim::kAdd || step.prim == Prim::kSub || step.prim == Prim::kMul);
  }

  // An addition, subtraction or multiplication whose value only another one reads is done in the same loop.
  void FusePairs() {
    Kernel& k = *kernel_;
    std::vector<int> reads(k.places.size(), 0), made_by(k.places.size(), -1);
    for (const Step& step : k.steps) {
      for (const int v : Reads(step)) ++reads[static_cast<size_t>(v)];
    }
    for (const int output : outputs_) ++reads[static_cast<size_t>(output)];
    std::vector<char> is_gone(k.steps.size(), 0);
    for (size_t s = 0; s < k.steps.size(); ++s) {
      Step& step = k.steps[s];
      if (!MakesValue(step)) continue;
      made_by[static_cast<size_t>(step.dst)] = static_cast<int>(s);
      if (!IsArithmetic(step)) continue;
      const auto fusable = [&](const Input& x) {
        const int by = made_by[static_cast<size_t>(x.number)];
        if (reads[static_cast<size_t>(x.number)] != 1 || by < 0) return false;
        const Step& maker = k.steps[static_cast<size_t>(by)];
        return IsArithmetic(maker) && (maker.run == Step::kRowNumbers) == (step.run == Step::kRowNumbers);
      };
      const bool on_left = step.kind != Step::kSV && fusable(step.a);
      if (!on_left && !(step.kind != Step::kVS && fusable(step.b))) continue;
      const size_t by = static_cast<size_t>(made_by[static_cast<size_t>(on_left ? step.a.number : step.b.number)]);
      step = Pair(k.steps[by], step, on_left);
      is_gone[by] = 1;
    }
    size_t kept = 0;
    for (size_t s = 0; s < k.steps.size(); ++s) {
      if (!is_gone[s]) k.steps[kept++] = k.steps[s];
    }
    k.steps.resize(kept);
  }

  // `first` is the left operand of `second`, or the right one.
  Step Pair(const Step& first, const Step& second, bool on_left) const {
    Step pair{.kind = Step::kPair, .run = std::max(first.run, second.run), .dst = second.dst};
    pair.a = first.kind == Step::kSV ? first.b : first.a;
    pair.b = first.kind == Step::kSV ? first.a : first.b;
    const bool is_vv = first.kind == Step::kVV;
    switch (first.prim) {
      case Prim::kAdd:
        pair.first = is_vv ? VectorMath::kAddVV : VectorMath::kAddVS;
        break;
      case Prim::kSub:
        pair.first = is_vv ? VectorMath::kSubVV : first.kind == Step::kVS ? VectorMath::kSubVS : VectorMath::kSubSV;
        break;
      default:
        pair.first = is_vv ? VectorMath::kMulVV : VectorMath::kMulVS;
    }
    pair.c = on_left ? second.b : second.a;
    const bool is_vector = second.kind == Step::kVV;
    switch (second.prim) {
      case Prim::kAdd:
        pair.second = is_vector ? VectorMath::kAddV : VectorMath::kAddS;
        break;
      case Prim::kSub:
        if (on_left) {
          pair.second = is_vector ? VectorMath::kSubV : VectorMath::kSubS;
        } else {
          pair.second = is_vector ? VectorMath::kFromV : VectorMath::kFromS;
        }
        break;
      default:
        pair.second = is_vector ? VectorMath::kMulV : VectorMath::kMulS;
    }
    pair.pair = kernel_->math->pair[pair.first][pair.second];
    return pair;
  }

  // A result of f32 is computed where it belongs if nothing is read there afterwards; the others are stored at the end.
  void PlaceResults() {
    Kernel& k = *kernel_;
    const size_t computed = k.steps.size();
    for (size_t r = 0; r < k.results.size(); ++r) {
      if (region_.results[r].kind == RegionResult::Kind::kColumns) continue;
      const int v = outputs_[r];
      Place& place = k.places[static_cast<size_t>(v)];
      if (k.results[r].type.dtype == DType::kF32 && place.kind == Place::kNowhere &&
          operand_of_[static_cast<size_t>(v)] < 0 && !IsReadAfter(v, k.results[r], computed)) {
        place = {.kind = Place::kMemory, .shape = place.shape, .memory = k.results[r].as<float>()};
      } else {
        k.steps.push_back({.kind = Step::kStore, .dst = static_cast<int>(r), .a = {place.shape, v}});
      }
    }
    for (size_t v = 0; v < k.places.size(); ++v) {
      if (k.places[v].kind == Place::kMemory) k.memory_values.push_back(static_cast<int>(v));
    }
  }

  // Whether an operand that lies where `result` does is read after the step that makes value v.
  bool IsReadAfter(int v, const Tensor& result, size_t computed) const {
    const Kernel& k = *kernel_;
    const auto lies_there = [&](int operand) {
      return operand >= 0 && Overlap(k.operands[static_cast<size_t>(operand)], result);
    };
    bool is_after = false;
    for (size_t s = 0; s < computed; ++s) {
      const Step& step = k.steps[s];
      if (is_after) {
        if ((step.kind == Step::kLoad || step.kind == Step::kBroadcast) && lies_there(step.a.number)) return true;
        for (const int read : Reads(step)) {
          const size_t value = static_cast<size_t>(read);
          if (k.places[value].kind == Place::kMemory && lies_there(operand_of_[value])) return true;
        }
      }
      if (MakesValue(step) && step.dst == v) is_after = true;
    }
    return false;
  }

  absl::Status AssignRegisters() {
    Kernel& k = *kernel_;
    std::vector<int> last_read(k.places.size(), -1);
    for (size_t s = 0; s < k.steps.size(); ++s) {
      for (const int v : Reads(k.steps[s])) last_read[static_cast<size_t>(v)] = static_cast<int>(s);
    }
    struct File {
      std::vector<int> free;
      int count = 0;
    };
    File elements, rows;
    const auto file_of = [&](const Place& place) -> File& { return place.shape == Shape::kRows ? rows : elements; };
    for (size_t s = 0; s < k.steps.size(); ++s) {
      const Step& step = k.steps[s];
      // A broadcast operand may be read where it lies, so its register must not be one that another value still has.
      for (const int v : Reads(step)) {
        Place& place = k.places[static_cast<size_t>(v)];
        // The register of a column, which is read again for each row, is not written while the step runs.
        if (last_read[static_cast<size_t>(v)] == static_cast<int>(s) && place.kind == Place::kRegister &&
            place.shape != Shape::kColumns) {
          file_of(place).free.push_back(place.reg);
          last_read[static_cast<size_t>(v)] = -1;
        }
      }
      if (!MakesValue(step)) continue;
      Place& place = k.places[static_cast<size_t>(step.dst)];
      if (place.kind == Place::kMemory) continue;
      place.kind = Place::kRegister;
      File& file = file_of(place);
      if (file.free.empty()) {
        place.reg = file.count++;
      } else {
        place.reg = file.free.back();
        file.free.pop_back();
      }
      if (last_read[static_cast<size_t>(step.dst)] < 0) file.free.push_back(place.reg);  // Never read.
    }
    registers_ = elements.count;
    row_registers_ = rows.count;
    const int64_t least = registers_ * (k.whole_rows ? k.width : 16) + row_registers_;
    if (least > kScratchFloats) {
      return absl::UnimplementedError(absl::StrCat("the program needs ", registers_, " registers of ",
                                                   k.whole_rows ? k.width : 16, " elements; there is room for ",
                                                   kScratchFloats, " elements"));
    }
    return absl::OkStatus();
  }

  void CutIntoTasks() {
    Kernel& k = *kernel_;
    const double cost = std::max(cost_, 0.25);
    const int64_t wanted = static_cast<int64_t>(kTaskNanoseconds / cost);
    const int64_t room =
        registers_ > 0 ? (kScratchFloats - row_registers_) / registers_ / 16 * 16 : kScratchFloats - row_registers_;
    if (k.rows > 1 && k.width <= std::min(kTile, room)) k.whole_rows = true;
    // Tiles as large as leave the registers in the first cache.
    const int64_t preferred = std::clamp<int64_t>(kCacheFloats / std::max<int64_t>(registers_, 1), 512, kTile);
    if (k.whole_rows) {
      const int64_t each = registers_ * k.width + row_registers_;  // Scratch of one row.
      k.tile_rows = std::max<int64_t>(1, preferred / k.width);
      if (each > 0) k.tile_rows = std::min(k.tile_rows, kScratchFloats / each);
      k.tile_rows = std::min(k.tile_rows, k.rows);
      k.tile = k.tile_rows * k.width;
      k.row_registers_at = registers_ * k.tile;
      k.task_elements = std::max<int64_t>(1, wanted / k.tile) * k.tile;
    } else {
      k.tile = std::min(preferred / 16 * 16, room);
      // A row at a time lets an operand that repeats with each row be read where it lies.
      for (const Step& step : k.steps) {
        if (step.kind != Step::kBroadcast) continue;
        const Spread& spread = k.spreads[static_cast<size_t>(step.dst)];
        if (spread.strides.back() == 1 && spread.inner() >= 512 && spread.inner() <= k.tile) k.tile = spread.inner();
      }
      k.row_registers_at = registers_ * k.tile;
      k.task_elements = std::max<int64_t>(1, wanted / k.tile) * k.tile;
    }
    std::vector<const std::byte*> seen;
    const auto add_stream = [&](const Tensor& tensor) {
      if (tensor.type.num_elements() != k.elements() ||
          std::find(seen.begin(), seen.end(), tensor.data) != seen.end()) {
        return;
      }
      seen.push_back(tensor.data);
      k.streams.emplace_back(tensor.data, ByteSize(tensor.type.dtype));
    };
    for (const RegionStep& step : region_.steps) {
      if (step.kind == RegionStep::Kind::kLoad) add_stream(OperandOf(step));
    }
    for (const Tensor& result : k.results) add_stream(result);
    if (!k.column_results.empty()) k.task_elements = CpuRowChunks(k.rows).rows * k.width;
    k.tasks = (k.elements() + k.task_elements - 1) / k.task_elements;
  }

  const Region& region_;
  const bool as_numpy_;
  std::shared_ptr<Kernel> kernel_;
  std::vector<int> operand_of_;  // One a value: the operand that it is, or -1.
  std::vector<int> outputs_;     // Value of each result.
  int64_t registers_ = 0, row_registers_ = 0;
  double cost_ = 0;
};

absl::StatusOr<Thunk> MakeThunk(const Region& region, bool as_numpy, absl::Span<const Tensor> operands,
                                absl::Span<const Tensor> results, std::byte* workspace, ThreadPool& pool,
                                const VectorMath& math) {
  if (results.empty() || results.size() != region.results.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(results.size(), " results given; the program has ", region.results.size()));
  }
  ASSIGN_OR_RETURN(std::shared_ptr<Kernel> kernel, Binder(region, as_numpy, operands, results, math).Bind());
  kernel->column_sums = reinterpret_cast<float*>(workspace);
  kernel->body = [k = kernel.get()](int64_t task) { k->RunTask(task); };
  kernel->columns_body = [k = kernel.get()](int64_t task) { k->FinishColumns(task); };
  return Thunk([kernel = std::move(kernel), &pool] {
    kernel->RunScalars();
    pool.Run(kernel->tasks, kernel->body);
    if (kernel->column_results.empty()) return;
    const int64_t tasks = (kernel->width + kColumnsPerTask - 1) / kColumnsPerTask;
    pool.Run(static_cast<int64_t>(kernel->column_results.size()) * tasks, kernel->columns_body);
  });
}

// The program as a region of one row; its values are numbered as they are made.
Region RegionOf(const ScalarProgram& program, absl::Span<const Tensor> results) {
  Region region;
  const int64_t elements = results.empty() ? 1 : results[0].type.num_elements();
  const int64_t samples = results.empty() || results[0].type.dims.empty() ? 1 : results[0].type.dims[0];
  region.width = elements;
  std::vector<int> value_of(static_cast<size_t>(program.num_registers), -1);
  for (const ScalarInstruction& i : program.instructions) {
    RegionStep step = {.kind = RegionStep::Kind::kPrim,
                       .prim = i.prim,
                       .index = i.index,
                       .constant = i.constant,
                       .key = i.key,
                       .sample_elements = elements / samples,
                       .dtype = i.dtype};
    if (i.prim == Prim::kOperand) step.kind = RegionStep::Kind::kLoad;
    if (i.prim == Prim::kConstant) step.kind = RegionStep::Kind::kConstant;
    if (i.prim == Prim::kUniform) step.kind = RegionStep::Kind::kUniform;
    int* const args[] = {&step.a, &step.b, &step.c};
    const int16_t registers[] = {i.a, i.b, i.c};
    for (int k = 0; k < Row(i.prim).arity; ++k) *args[k] = value_of[static_cast<size_t>(registers[k])];
    value_of[static_cast<size_t>(i.dst)] = static_cast<int>(region.steps.size());
    region.steps.push_back(step);
  }
  for (size_t r = 0; r < program.outputs.size(); ++r) {
    region.results.push_back({.kind = RegionResult::Kind::kFull,
                              .value = value_of[static_cast<size_t>(program.outputs[r])],
                              .type = r < results.size() ? results[r].type : TensorType{}});
  }
  return region;
}

}  // namespace

absl::StatusOr<Thunk> BindScalarProgram(const ScalarProgram& program, absl::Span<const Tensor> operands,
                                        absl::Span<const Tensor> results, ThreadPool& pool, const VectorMath& math) {
  return MakeThunk(RegionOf(program, results), /*as_numpy=*/true, operands, results, nullptr, pool, math);
}

absl::StatusOr<Thunk> BindRegion(const Region& region, absl::Span<const Tensor> operands,
                                 absl::Span<const Tensor> results, std::byte* workspace, ThreadPool& pool,
                                 const VectorMath& math) {
  return MakeThunk(region, /*as_numpy=*/false, operands, results, workspace, pool, math);
}

absl::StatusOr<Thunk> BindPointwise(const KernelCall& call, ThreadPool& pool) {
  if (!call.op->is_element_wise()) {
    return absl::UnimplementedError(absl::StrCat(call.op->name, " is not element-wise"));
  }
  ASSIGN_OR_RETURN(const Attrs attrs, CompleteAttrs(call.op->attrs, call.attrs));
  return BindScalarProgram(Linearize(call.op->expr(attrs)), call.operands, call.results, pool);
}

namespace {

absl::StatusOr<Thunk> BindFused(const KernelCall& call, ThreadPool& pool) {
  ASSIGN_OR_RETURN(const std::shared_ptr<const Region> region,
                   ParseRegion(call.attrs.Int("rows"), call.attrs.Int("width"), call.attrs.Get<std::string>("region")));
  CHECK_GE(call.workspace_bytes, CpuRegionWorkspace(*region)) << call.name;
  return BindRegion(*region, call.operands, call.results, call.workspace, pool);
}

constexpr CpuKernel kKernels[] = {{"fused", BindFused}};

}  // namespace

absl::Span<const CpuKernel> CpuFusedKernels() { return kKernels; }

}  // namespace mt
