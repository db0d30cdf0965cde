#include "runtime/cpu/pointwise.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"
#include "runtime/cpu/kernel.h"

namespace mt {
namespace {

constexpr int64_t kTile = 2048;                // Elements that one loop works on: registers stay in the first caches.
constexpr int64_t kScratchFloats = 64 * 1024;  // Registers of one task, on its stack.
constexpr int kMaxValues = 8192;               // Values of one program: instructions, and scalars spread to vectors.
constexpr double kTaskNanoseconds = 20000;     // A task's work, roughly: far more than it costs to hand out.

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

// Numbers are of values (vectors) or of scalars, as the kind says.
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
    kUniform,    // dst = random numbers `a`
    kLoad,       // dst = operand `a`, which has the shape of the result, widened
    kBroadcast,  // dst = operand `a`, spread
    kStore,      // result `dst` = a
  } kind;
  int dst = 0, a = 0, b = 0, c = 0;
  Prim prim = Prim::kOperand;  // kVV, kVS, kSV
  VectorMath::First first = VectorMath::kFirsts;
  VectorMath::Second second = VectorMath::kSeconds;
  VectorMath::Pair pair = nullptr;
  VectorMath::Unary unary = nullptr;
  VectorMath::Binary vv = nullptr;
  VectorMath::BinaryVectorScalar vs = nullptr;
  VectorMath::BinaryScalarVector sv = nullptr;
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
  UniformPlace place;  // Read from `state` once a run; `sample` is the first.
};

struct Place {
  enum Kind { kNowhere, kMemory, kRegister } kind = kNowhere;
  float* memory = nullptr;  // kMemory: element 0.
  int reg = -1;             // kRegister
};

struct Kernel {
  const VectorMath* math = nullptr;
  std::vector<Tensor> operands, results;
  std::vector<Spread> spreads;  // One an operand.
  int64_t elements = 0, sample_elements = 1, tile = kTile, task_elements = kTile, tasks = 1;
  std::vector<ScalarStep> scalar_steps;
  std::vector<Step> steps;
  std::vector<float> scalars;
  std::vector<RandomNumbers> random;
  std::vector<Place> places;       // One a value.
  std::vector<int> memory_values;  // Values whose place is memory.
  std::function<void(int64_t)> body;

  void RunScalars();
  void RunTask(int64_t task) const;
  void RunTile(int64_t begin, int64_t n, float* scratch, float** at) const;
  void LoadOne(int operand, int64_t offset, float* to) const {
    const Tensor& tensor = operands[static_cast<size_t>(operand)];
    math->load[static_cast<size_t>(tensor.type.dtype)](to, tensor.data + offset * ByteSize(tensor.type.dtype), 1);
  }
  // Spreads an operand over elements begin..begin+n-1; returns where they are: `to`, or in the operand itself.
  float* Broadcast(int operand, int64_t begin, int64_t n, float* to) const;
  void Uniform(const RandomNumbers& numbers, int64_t begin, int64_t n, float* to) const;
};

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

float* Kernel::Broadcast(int operand, int64_t begin, int64_t n, float* to) const {
  const Tensor& tensor = operands[static_cast<size_t>(operand)];
  const Spread& spread = spreads[static_cast<size_t>(operand)];
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
    const int64_t sample = begin / sample_elements, first = begin % sample_elements;
    const int64_t count = std::min(n, sample_elements - first);
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

void Kernel::RunTile(int64_t begin, int64_t n, float* scratch, float** at) const {
  for (const int v : memory_values) at[v] = places[static_cast<size_t>(v)].memory + begin;
  const float* const s = scalars.data();
  for (const Step& step : steps) {
    switch (step.kind) {
      case Step::kUnary:
        step.unary(at[step.dst], at[step.a], n);
        break;
      case Step::kVV:
        step.vv(at[step.dst], at[step.a], at[step.b], n);
        break;
      case Step::kVS:
        step.vs(at[step.dst], at[step.a], s[step.b], n);
        break;
      case Step::kSV:
        step.sv(at[step.dst], s[step.a], at[step.b], n);
        break;
      case Step::kPair: {
        const bool b_is_vector = FirstTakesVector(step.first), c_is_vector = SecondTakesVector(step.second);
        step.pair(at[step.dst], at[step.a], b_is_vector ? at[step.b] : nullptr, b_is_vector ? 0 : s[step.b],
                  c_is_vector ? at[step.c] : nullptr, c_is_vector ? 0 : s[step.c], n);
        break;
      }
      case Step::kSelectVV:
        math->select_vv(at[step.dst], at[step.a], at[step.b], at[step.c], n);
        break;
      case Step::kSelectVS:
        math->select_vs(at[step.dst], at[step.a], at[step.b], s[step.c], n);
        break;
      case Step::kSelectSV:
        math->select_sv(at[step.dst], at[step.a], s[step.b], at[step.c], n);
        break;
      case Step::kSelectSS:
        math->select_ss(at[step.dst], at[step.a], s[step.b], s[step.c], n);
        break;
      case Step::kFill:
        math->fill(at[step.dst], s[step.a], n);
        break;
      case Step::kUniform:
        Uniform(random[static_cast<size_t>(step.a)], begin, n, at[step.dst]);
        break;
      case Step::kLoad: {
        const Tensor& tensor = operands[static_cast<size_t>(step.a)];
        math->load[static_cast<size_t>(tensor.type.dtype)](at[step.dst],
                                                           tensor.data + begin * ByteSize(tensor.type.dtype), n);
        break;
      }
      case Step::kBroadcast:
        at[step.dst] = Broadcast(step.a, begin, n, scratch + places[static_cast<size_t>(step.dst)].reg * tile);
        break;
      case Step::kStore: {
        const Tensor& tensor = results[static_cast<size_t>(step.dst)];
        std::byte* const to = tensor.data + begin * ByteSize(tensor.type.dtype);
        if (to != reinterpret_cast<const std::byte*>(at[step.a])) {
          math->store[static_cast<size_t>(tensor.type.dtype)](to, at[step.a], n);
        }
        break;
      }
    }
  }
}

void Kernel::RunTask(int64_t task) const {
  alignas(64) float scratch[kScratchFloats];
  float* at[kMaxValues];
  for (size_t v = 0; v < places.size(); ++v) at[v] = scratch + std::max(places[v].reg, 0) * tile;
  const int64_t begin = task * task_elements, end = std::min(elements, begin + task_elements);
  for (int64_t i = begin; i < end; i += tile) RunTile(i, std::min(tile, end - i), scratch, at);
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
  Binder(const ScalarProgram& program, absl::Span<const Tensor> operands, absl::Span<const Tensor> results,
         const VectorMath& math)
      : program_(program), kernel_(std::make_shared<Kernel>()) {
    kernel_->math = &math;
    kernel_->operands.assign(operands.begin(), operands.end());
    kernel_->results.assign(results.begin(), results.end());
  }

  absl::StatusOr<std::shared_ptr<Kernel>> Bind() {
    RETURN_IF_ERROR(CheckTensors());
    RETURN_IF_ERROR(Translate());
    FusePairs();
    PlaceResults();
    RETURN_IF_ERROR(AssignRegisters());
    CutIntoTasks();
    return kernel_;
  }

 private:
  // Where the value of a register is now: a scalar (the same for all elements) or a vector.
  struct Where {
    bool is_scalar = true;
    int number = 0;
  };

  absl::Status CheckTensors() {
    Kernel& k = *kernel_;
    if (k.results.empty() || k.results.size() != program_.outputs.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(k.results.size(), " results given; the program has ", program_.outputs.size()));
    }
    const Dims& dims = k.results[0].type.dims;
    for (const Tensor& result : k.results) {
      if (!IsFloat(result.type.dtype) || result.type.dims != dims) {
        return absl::InvalidArgumentError(absl::StrCat("result ", result.type.ToString(),
                                                       " must be floating point with the dimensions of result 0, ",
                                                       k.results[0].type.ToString()));
      }
    }
    k.elements = k.results[0].type.num_elements();
    k.sample_elements = dims.empty() ? 1 : k.elements / dims[0];

    std::vector<char> is_value(k.operands.size(), 0);
    for (const ScalarInstruction& i : program_.instructions) {
      if (i.prim != Prim::kOperand && i.prim != Prim::kUniform) continue;
      if (i.index < 0 || i.index >= static_cast<int64_t>(k.operands.size())) {
        return absl::InvalidArgumentError(
            absl::StrCat("the program reads operand ", i.index, "; there are ", k.operands.size()));
      }
      const TensorType& type = k.operands[static_cast<size_t>(i.index)].type;
      if (i.prim == Prim::kUniform) {
        if (type != TensorType{DType::kI32, {4}}) {
          return absl::InvalidArgumentError(
              absl::StrCat("operand ", i.index, " is ", type.ToString(), "; a random state is i32[4]"));
        }
        continue;
      }
      is_value[static_cast<size_t>(i.index)] = 1;
      const absl::StatusOr<Dims> together = BroadcastDims(type.dims, dims);
      if (!IsFloat(type.dtype) || !together.ok() || *together != dims) {
        return absl::InvalidArgumentError(absl::StrCat("operand ", i.index, " is ", type.ToString(),
                                                       "; it must be floating point and broadcast to the result, ",
                                                       k.results[0].type.ToString()));
      }
    }
    k.spreads.resize(k.operands.size());
    for (size_t o = 0; o < k.operands.size(); ++o) {
      if (!is_value[o]) continue;
      const Tensor& operand = k.operands[o];
      k.spreads[o] = SpreadOf(operand.type.dims, dims);
      if (operand.type.num_elements() == 1) continue;  // Read before anything is written.
      for (const Tensor& result : k.results) {
        if (!Overlap(operand, result)) continue;
        if (operand.data != result.data || operand.type.dtype != result.type.dtype ||
            operand.type.num_elements() != k.elements) {
          return absl::InvalidArgumentError(absl::StrCat("operand ", o, ", ", operand.type.ToString(),
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
  int NewValue() {
    kernel_->places.emplace_back();
    operand_of_.push_back(-1);
    return static_cast<int>(kernel_->places.size()) - 1;
  }
  // The vector of `where`, filled where it is a scalar.
  int Vector(Where where) {
    if (!where.is_scalar) return where.number;
    const int v = NewValue();
    kernel_->steps.push_back({.kind = Step::kFill, .dst = v, .a = where.number});
    return v;
  }

  Where LoadOperand(int64_t index) {
    Kernel& k = *kernel_;
    const int operand = static_cast<int>(index);
    const Tensor& tensor = k.operands[static_cast<size_t>(index)];
    if (tensor.type.num_elements() == 1) {
      const int s = NewScalar();
      k.scalar_steps.push_back({.prim = Prim::kOperand, .dst = s, .operand = operand});
      return {true, s};
    }
    const int v = NewValue();
    operand_of_[static_cast<size_t>(v)] = operand;
    const bool same_shape = tensor.type.num_elements() == k.elements;
    if (!same_shape) {
      k.steps.push_back({.kind = Step::kBroadcast, .dst = v, .a = operand});
    } else if (tensor.type.dtype != DType::kF32) {
      k.steps.push_back({.kind = Step::kLoad, .dst = v, .a = operand});
    } else {
      k.places[static_cast<size_t>(v)] = {.kind = Place::kMemory, .memory = tensor.as<float>()};
    }
    return {false, v};
  }

  absl::Status Translate() {
    Kernel& k = *kernel_;
    std::vector<Where> registers(static_cast<size_t>(program_.num_registers));
    const auto reg = [&](int16_t r) -> Where& { return registers[static_cast<size_t>(r)]; };
    for (const ScalarInstruction& i : program_.instructions) {
      const int arity = Row(i.prim).arity;
      const size_t prim = static_cast<size_t>(i.prim);
      const Where a = arity > 0 ? reg(i.a) : Where(), b = arity > 1 ? reg(i.b) : Where(),
                  c = arity > 2 ? reg(i.c) : Where();
      Where& dst = reg(i.dst);
      if (i.prim == Prim::kOperand) {
        dst = LoadOperand(i.index);
      } else if (i.prim == Prim::kConstant) {
        dst = {true, NewScalar(static_cast<float>(i.constant))};
      } else if (i.prim == Prim::kUniform) {
        dst = {false, NewValue()};
        k.steps.push_back({.kind = Step::kUniform, .dst = dst.number, .a = static_cast<int>(k.random.size())});
        k.random.push_back(
            {.state = k.operands[static_cast<size_t>(i.index)].as<int32_t>(), .key = i.key, .place = {}});
      } else if (i.prim == Prim::kRound && k.math->round[static_cast<size_t>(i.dtype)] == nullptr) {
        dst = a;  // Already a value of that dtype.
      } else if (a.is_scalar && b.is_scalar && c.is_scalar) {
        const int s = NewScalar();
        k.scalar_steps.push_back(
            {.prim = i.prim, .dst = s, .a = a.number, .b = b.number, .c = c.number, .dtype = i.dtype});
        dst = {true, s};
      } else if (arity == 1) {
        const VectorMath::Unary unary =
            i.prim == Prim::kRound ? k.math->round[static_cast<size_t>(i.dtype)] : k.math->unary[prim];
        dst = {false, NewValue()};
        k.steps.push_back({.kind = Step::kUnary, .dst = dst.number, .a = a.number, .unary = unary});
      } else if (arity == 2) {
        dst = {false, NewValue()};
        k.steps.push_back({.kind = b.is_scalar   ? Step::kVS
                                   : a.is_scalar ? Step::kSV
                                                 : Step::kVV,
                           .dst = dst.number,
                           .a = a.number,
                           .b = b.number,
                           .prim = i.prim,
                           .vv = k.math->vv[prim],
                           .vs = k.math->vs[prim],
                           .sv = k.math->sv[prim]});
      } else {
        const int condition = Vector(a);
        dst = {false, NewValue()};
        k.steps.push_back({.kind = b.is_scalar ? (c.is_scalar ? Step::kSelectSS : Step::kSelectSV)
                                               : (c.is_scalar ? Step::kSelectVS : Step::kSelectVV),
                           .dst = dst.number,
                           .a = condition,
                           .b = b.number,
                           .c = c.number});
      }
      cost_ += CostOf(i.prim);
    }
    for (const int16_t output : program_.outputs) outputs_.push_back(Vector(reg(output)));
    // Of several results one may lie over an operand that another result is a copy of: that one is read first.
    for (int& output : outputs_) {
      const int operand = operand_of_[static_cast<size_t>(output)];
      if (k.results.size() == 1 || k.places[static_cast<size_t>(output)].kind != Place::kMemory) continue;
      output = NewValue();
      k.steps.insert(k.steps.begin(), {.kind = Step::kLoad, .dst = output, .a = operand});
    }
    if (k.places.size() > kMaxValues) {
      return absl::UnimplementedError(absl::StrCat("a program of more than ", kMaxValues, " values"));
    }
    return absl::OkStatus();
  }

  // Vectors that a step reads.
  static std::vector<int> Reads(const Step& step) {
    switch (step.kind) {
      case Step::kUnary:
      case Step::kVS:
      case Step::kSelectSS:
      case Step::kStore:
        return {step.a};
      case Step::kVV:
      case Step::kSelectVS:
        return {step.a, step.b};
      case Step::kSV:
        return {step.b};
      case Step::kPair: {
        std::vector<int> reads = {step.a};
        if (FirstTakesVector(step.first)) reads.push_back(step.b);
        if (SecondTakesVector(step.second)) reads.push_back(step.c);
        return reads;
      }
      case Step::kSelectVV:
        return {step.a, step.b, step.c};
      case Step::kSelectSV:
        return {step.a, step.c};
      case Step::kFill:
      case Step::kUniform:
      case Step::kLoad:
      case Step::kBroadcast:
        return {};
    }
    return {};
  }

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
      made_by[static_cast<size_t>(step.dst)] = static_cast<int>(s);
      if (!IsArithmetic(step)) continue;
      const auto fusable = [&](int v) {
        const int by = made_by[static_cast<size_t>(v)];
        return reads[static_cast<size_t>(v)] == 1 && by >= 0 && IsArithmetic(k.steps[static_cast<size_t>(by)]);
      };
      const bool on_left = step.kind != Step::kSV && fusable(step.a);
      if (!on_left && !(step.kind != Step::kVS && fusable(step.b))) continue;
      const size_t by = static_cast<size_t>(made_by[static_cast<size_t>(on_left ? step.a : step.b)]);
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
    Step pair{.kind = Step::kPair, .dst = second.dst};
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
      const int v = outputs_[r];
      Place& place = k.places[static_cast<size_t>(v)];
      if (k.results[r].type.dtype == DType::kF32 && place.kind == Place::kNowhere &&
          operand_of_[static_cast<size_t>(v)] < 0 && !IsReadAfter(v, k.results[r], computed)) {
        place = {.kind = Place::kMemory, .memory = k.results[r].as<float>()};
      } else {
        k.steps.push_back({.kind = Step::kStore, .dst = static_cast<int>(r), .a = v});
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
        if ((step.kind == Step::kLoad || step.kind == Step::kBroadcast) && lies_there(step.a)) return true;
        for (const int read : Reads(step)) {
          const size_t value = static_cast<size_t>(read);
          if (k.places[value].kind == Place::kMemory && lies_there(operand_of_[value])) return true;
        }
      }
      if (step.kind != Step::kStore && step.dst == v) is_after = true;
    }
    return false;
  }

  absl::Status AssignRegisters() {
    Kernel& k = *kernel_;
    std::vector<int> last_read(k.places.size(), -1);
    for (size_t s = 0; s < k.steps.size(); ++s) {
      for (const int v : Reads(k.steps[s])) last_read[static_cast<size_t>(v)] = static_cast<int>(s);
    }
    std::vector<int> free;
    int count = 0;
    for (size_t s = 0; s < k.steps.size(); ++s) {
      const Step& step = k.steps[s];
      // A broadcast operand may be read where it lies, so its register must not be one that another value still has.
      for (const int v : Reads(step)) {
        Place& place = k.places[static_cast<size_t>(v)];
        if (last_read[static_cast<size_t>(v)] == static_cast<int>(s) && place.kind == Place::kRegister) {
          free.push_back(place.reg);
          last_read[static_cast<size_t>(v)] = -1;
        }
      }
      if (step.kind == Step::kStore) continue;
      Place& place = k.places[static_cast<size_t>(step.dst)];
      if (place.kind == Place::kMemory) continue;
      place.kind = Place::kRegister;
      if (free.empty()) {
        place.reg = count++;
      } else {
        place.reg = free.back();
        free.pop_back();
      }
      if (last_read[static_cast<size_t>(step.dst)] < 0) free.push_back(place.reg);  // Never read.
    }
    if (count * int64_t{16} > kScratchFloats) {
      return absl::UnimplementedError(
          absl::StrCat("the program needs ", count, " registers; at most ", kScratchFloats / 16, " are there"));
    }
    registers_ = count;
    return absl::OkStatus();
  }

  void CutIntoTasks() {
    Kernel& k = *kernel_;
    k.tile = kTile;
    if (registers_ > 0) k.tile = std::min(k.tile, kScratchFloats / registers_ / 16 * 16);
    // A row at a time lets an operand that repeats with each row be read where it lies.
    for (const Step& step : k.steps) {
      if (step.kind != Step::kBroadcast) continue;
      const Spread& spread = k.spreads[static_cast<size_t>(step.a)];
      if (spread.strides.back() == 1 && spread.inner() >= 512 && spread.inner() <= k.tile) k.tile = spread.inner();
    }
    const double cost = std::max(cost_, 0.25);
    k.task_elements = std::max<int64_t>(1, static_cast<int64_t>(kTaskNanoseconds / cost) / k.tile) * k.tile;
    k.tasks = (k.elements + k.task_elements - 1) / k.task_elements;
  }

  const ScalarProgram& program_;
  std::shared_ptr<Kernel> kernel_;
  std::vector<int> operand_of_;  // One a value: the operand that it is, or -1.
  std::vector<int> outputs_;     // Value of each result.
  int registers_ = 0;
  double cost_ = 0;
};

}  // namespace

absl::StatusOr<Thunk> BindScalarProgram(const ScalarProgram& program, absl::Span<const Tensor> operands,
                                        absl::Span<const Tensor> results, ThreadPool& pool, const VectorMath& math) {
  ASSIGN_OR_RETURN(std::shared_ptr<Kernel> kernel, Binder(program, operands, results, math).Bind());
  kernel->body = [k = kernel.get()](int64_t task) { k->RunTask(task); };
  return Thunk([kernel = std::move(kernel), &pool] {
    kernel->RunScalars();
    pool.Run(kernel->tasks, kernel->body);
  });
}

absl::StatusOr<Thunk> BindPointwise(const KernelCall& call, ThreadPool& pool) {
  if (!call.op->is_element_wise()) {
    return absl::UnimplementedError(absl::StrCat(call.op->name, " is not element-wise"));
  }
  ASSIGN_OR_RETURN(const Attrs attrs, CompleteAttrs(call.op->attrs, call.attrs));
  return BindScalarProgram(Linearize(call.op->expr(attrs)), call.operands, call.results, pool);
}

}  // namespace mt
