// Scalar expressions: what an element-wise op computes for one element.
//
// A row's expression is the only definition of an element-wise op. Its derivative (symbolic), its reference, the CPU's
// tile loop and the CUDA source all come from it. A ScalarProgram is the linear form: a register program that a fused
// region is, too.
#ifndef MT_IR_SCALAR_H_
#define MT_IR_SCALAR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/tensor_type.h"

namespace mt {

// The primitives. Arithmetic is in f32 (in f64 for the f64 reference); every primitive rounds once; no contraction.
enum class Prim : uint8_t {
  kOperand,   // value of operand `index` at this element (broadcast like NumPy), widened to f32
  kConstant,  // `constant`
  kUniform,   // uniform in [0,1): Philox at this element's logical coordinate; see UniformAt below
  kNeg,
  kAbs,
  kExp,
  kLog,
  kSqrt,
  kTanh,
  kErf,
  kSin,
  kCos,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMax,  // a >= b ? a : b, NaN if either is
  kMin,  // a <= b ? a : b, NaN if either is
  kPow,
  kLess,    // a < b ? 1 : 0
  kSelect,  // a != 0 ? b : c
  kRound,   // rounds to `dtype`
};

struct PrimRow {
  Prim prim;
  absl::string_view name;  // "operand", "add", ...: the spelling in program text
  int arity;
};
absl::Span<const PrimRow> AllPrims();
const PrimRow& Row(Prim prim);

struct ExprNode;

// An immutable expression; cheap to copy. Default-constructed: absent.
class Expr {
 public:
  Expr() = default;
  Expr(double constant);  // NOLINT: 0.5 * x reads as it is meant.
  explicit Expr(std::shared_ptr<const ExprNode> node) : node_(std::move(node)) {}
  const ExprNode& operator*() const { return *node_; }
  const ExprNode* operator->() const { return node_.get(); }
  const ExprNode* get() const { return node_.get(); }
  explicit operator bool() const { return node_ != nullptr; }

 private:
  std::shared_ptr<const ExprNode> node_;
};

struct ExprNode {
  Prim prim;
  int64_t index = 0;    // kOperand: operand number; kUniform: number of the operand that holds the i32[4] random state
  double constant = 0;  // kConstant
  uint32_t key = 0;     // kUniform: the place in the model
  DType dtype = DType::kF32;  // kRound
  std::vector<Expr> args;
};

// Constructors fold constants (in f64) and drop x+0, x*1, x*0, x-0, x/1, --x, a select by a constant; x*-1 becomes -x.
// Nothing that changes a rounding of a finite value.
Expr Operand(int64_t index);
Expr Uniform(int64_t rng_operand, uint32_t key);
Expr RoundExpr(DType dtype, Expr a);
Expr Make(Prim prim, std::vector<Expr> args);
inline Expr operator+(Expr a, Expr b) { return Make(Prim::kAdd, {a, b}); }
inline Expr operator-(Expr a, Expr b) { return Make(Prim::kSub, {a, b}); }
inline Expr operator*(Expr a, Expr b) { return Make(Prim::kMul, {a, b}); }
inline Expr operator/(Expr a, Expr b) { return Make(Prim::kDiv, {a, b}); }
inline Expr operator-(Expr a) { return Make(Prim::kNeg, {a}); }
inline Expr Abs(Expr a) { return Make(Prim::kAbs, {a}); }
inline Expr Exp(Expr a) { return Make(Prim::kExp, {a}); }
inline Expr Log(Expr a) { return Make(Prim::kLog, {a}); }
inline Expr Sqrt(Expr a) { return Make(Prim::kSqrt, {a}); }
inline Expr Tanh(Expr a) { return Make(Prim::kTanh, {a}); }
inline Expr Erf(Expr a) { return Make(Prim::kErf, {a}); }
inline Expr Sin(Expr a) { return Make(Prim::kSin, {a}); }
inline Expr Cos(Expr a) { return Make(Prim::kCos, {a}); }
inline Expr Max(Expr a, Expr b) { return Make(Prim::kMax, {a, b}); }
inline Expr Min(Expr a, Expr b) { return Make(Prim::kMin, {a, b}); }
inline Expr Pow(Expr a, Expr b) { return Make(Prim::kPow, {a, b}); }
inline Expr Less(Expr a, Expr b) { return Make(Prim::kLess, {a, b}); }
inline Expr Select(Expr c, Expr a, Expr b) { return Make(Prim::kSelect, {c, a, b}); }
// 1 / (1 + exp(-a)); -a is limited to 80, which keeps inf / inf out of the derivative.
Expr Sigmoid(Expr a);

// d expression / d operand(index), simplified. kUniform, kLess and kRound: derivative 0, 0 and that of the argument.
// Where max or min tie, the first argument has the whole derivative; abs has derivative 0 at 0.
Expr Derivative(Expr expression, int64_t index);

// Which operands the expression reads (kUniform reads its random state), as a sorted list without repeats.
std::vector<int64_t> OperandsRead(absl::Span<const Expr> expressions);

// The expression with operand(i) replaced by replacements[i]; random-state operands must be replaced by operands.
Expr Substitute(Expr expression, absl::Span<const Expr> replacements);

// One instruction: r[dst] = prim(r[a], r[b], r[c]).
struct ScalarInstruction {
  Prim prim;
  int16_t dst = 0, a = 0, b = 0, c = 0;
  int64_t index = 0;
  double constant = 0;
  uint32_t key = 0;
  DType dtype = DType::kF32;
};

// The linear form: common subexpressions computed once, registers reused after their last read.
struct ScalarProgram {
  int num_registers = 0;
  std::vector<ScalarInstruction> instructions;
  std::vector<int16_t> outputs;  // Register of each result after the last instruction.

  // "r0=operand(0) r1=const(0.5) r0=mul(r0,r1) -> r0": one line, exact; ParseScalarProgram reads it back.
  std::string ToString() const;
};

// The shortest of several precisions that reads back as `value`.
std::string ConstantToString(double value);
ScalarProgram Linearize(absl::Span<const Expr> results);
// Untrusted: checks registers, arities, that every register is written before it is read; at most 4,096 instructions.
absl::StatusOr<ScalarProgram> ParseScalarProgram(absl::string_view text);

// The random number of kUniform at one element.
//   rng: {seed low, seed high, step, first sample}; sample: index along dimension 0 of the logical tensor;
//   element: row-major index within the sample. Philox key = (seed low, seed high); counter = (element / 4, key, step,
//   first sample + sample); word element % 4.
float UniformAt(absl::Span<const int32_t> rng, uint32_t key, int64_t sample, int64_t element);

// Evaluates one element in f32 or f64. `operands[i]` is the value of operand i; `uniform(index, key)` supplies
// kUniform.
template <typename T, typename UniformFn>
void EvaluateScalar(const ScalarProgram& program, absl::Span<const T> operands, const UniformFn& uniform,
                    absl::Span<T> results);

}  // namespace mt

#include "ir/scalar_inl.h"

#endif  // MT_IR_SCALAR_H_
