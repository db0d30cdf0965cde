// The template part of ir/scalar.h.
#ifndef MT_IR_SCALAR_INL_H_
#define MT_IR_SCALAR_INL_H_

#include <cmath>
#include <cstddef>
#include <limits>

#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"
#include "ir/base/check.h"
#include "ir/scalar.h"
#include "ir/tensor_type.h"

namespace mt {

// One primitive on values: everything but kOperand, kConstant and kUniform. The one definition of the arithmetic;
// unused arguments are ignored.
template <typename T>
T EvaluatePrim(Prim prim, T a, T b, T c, DType dtype) {
  switch (prim) {
    case Prim::kOperand:
    case Prim::kConstant:
    case Prim::kUniform:
      break;
    case Prim::kNeg:
      return -a;
    case Prim::kAbs:
      return std::abs(a);
    case Prim::kExp:
      return std::exp(a);
    case Prim::kLog:
      return std::log(a);
    case Prim::kSqrt:
      return std::sqrt(a);
    case Prim::kTanh:
      return std::tanh(a);
    case Prim::kErf:
      return std::erf(a);
    case Prim::kSin:
      return std::sin(a);
    case Prim::kCos:
      return std::cos(a);
    case Prim::kAdd:
      return a + b;
    case Prim::kSub:
      return a - b;
    case Prim::kMul:
      return a * b;
    case Prim::kDiv:
      return a / b;
    case Prim::kMax:
      return a >= b || a != a ? a : b;
    case Prim::kMin:
      return a <= b || a != a ? a : b;
    case Prim::kPow:
      return std::pow(a, b);
    case Prim::kLess:
      return a < b ? T{1} : T{0};
    case Prim::kSelect:
      return a != 0 ? b : c;
    case Prim::kRound:
      return static_cast<T>(RoundTo(dtype, a));
  }
  return std::numeric_limits<T>::quiet_NaN();
}

template <typename T, typename UniformFn>
void EvaluateScalar(const ScalarProgram& program, absl::Span<const T> operands, const UniformFn& uniform,
                    absl::Span<T> results) {
  absl::InlinedVector<T, 32> registers(static_cast<size_t>(program.num_registers));
  const auto at = [&](int16_t i) -> T& { return registers[static_cast<size_t>(i)]; };
  for (const ScalarInstruction& i : program.instructions) {
    switch (i.prim) {
      case Prim::kOperand:
        at(i.dst) = operands[static_cast<size_t>(i.index)];
        break;
      case Prim::kConstant:
        at(i.dst) = static_cast<T>(i.constant);
        break;
      case Prim::kUniform:
        at(i.dst) = static_cast<T>(uniform(i.index, i.key));
        break;
      default:
        at(i.dst) = EvaluatePrim<T>(i.prim, at(i.a), at(i.b), at(i.c), i.dtype);
    }
  }
  CHECK_EQ(results.size(), program.outputs.size());
  for (size_t k = 0; k < results.size(); ++k) results[k] = at(program.outputs[k]);
}

}  // namespace mt

#endif  // MT_IR_SCALAR_INL_H_
