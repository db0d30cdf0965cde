#include "ir/scalar.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr PrimRow kPrims[] = {
    {Prim::kOperand, "operand", 0}, {Prim::kConstant, "const", 0}, {Prim::kUniform, "uniform", 0},
    {Prim::kNeg, "neg", 1},         {Prim::kAbs, "abs", 1},        {Prim::kExp, "exp", 1},
    {Prim::kLog, "log", 1},         {Prim::kSqrt, "sqrt", 1},      {Prim::kTanh, "tanh", 1},
    {Prim::kErf, "erf", 1},         {Prim::kSin, "sin", 1},        {Prim::kCos, "cos", 1},
    {Prim::kAdd, "add", 2},         {Prim::kSub, "sub", 2},        {Prim::kMul, "mul", 2},
    {Prim::kDiv, "div", 2},         {Prim::kMax, "max", 2},        {Prim::kMin, "min", 2},
    {Prim::kPow, "pow", 2},         {Prim::kLess, "less", 2},      {Prim::kSelect, "select", 3},
    {Prim::kRound, "round", 1},
};

constexpr int64_t kMaxInstructions = 4096;
// Operands of one program: what a hand-written one may name.
constexpr int64_t kMaxOperands = 4096;

bool IsConstant(const Expr& e) { return e->prim == Prim::kConstant; }
bool Is(const Expr& e, double value) { return IsConstant(e) && e->constant == value; }

Expr MakeNode(ExprNode node) { return Expr(std::make_shared<const ExprNode>(std::move(node))); }

}  // namespace

absl::Span<const PrimRow> AllPrims() { return kPrims; }

const PrimRow& Row(Prim prim) {
  const PrimRow& row = kPrims[static_cast<size_t>(prim)];
  CHECK(row.prim == prim) << row.name;
  return row;
}

Expr::Expr(double constant)
    : node_(std::make_shared<const ExprNode>(ExprNode{.prim = Prim::kConstant, .constant = constant})) {}

Expr Operand(int64_t index) { return MakeNode({.prim = Prim::kOperand, .index = index}); }

Expr Uniform(int64_t rng_operand, uint32_t key) {
  return MakeNode({.prim = Prim::kUniform, .index = rng_operand, .key = key});
}

Expr RoundExpr(DType dtype, Expr a) {
  if (IsConstant(a)) return Expr(RoundTo(dtype, a->constant));
  return MakeNode({.prim = Prim::kRound, .dtype = dtype, .args = {std::move(a)}});
}

Expr Make(Prim prim, std::vector<Expr> args) {
  CHECK(prim != Prim::kRound && Row(prim).arity > 0) << Row(prim).name << " has a constructor of its own";
  CHECK_EQ(static_cast<int>(args.size()), Row(prim).arity) << Row(prim).name;
  if (std::all_of(args.begin(), args.end(), IsConstant)) {
    const auto value = [&](size_t i) { return i < args.size() ? args[i]->constant : 0.0; };
    return Expr(EvaluatePrim<double>(prim, value(0), value(1), value(2), DType::kF64));
  }
  switch (prim) {
    case Prim::kNeg:
      if (args[0]->prim == Prim::kNeg) return args[0]->args[0];
      break;
    case Prim::kAdd:
      if (Is(args[0], 0)) return args[1];
      if (Is(args[1], 0)) return args[0];
      break;
    case Prim::kSub:
      if (Is(args[1], 0)) return args[0];
      break;
    case Prim::kMul:
      if (Is(args[0], 0) || Is(args[1], 0)) return Expr(0.0);
      if (Is(args[0], 1)) return args[1];
      if (Is(args[1], 1)) return args[0];
      if (Is(args[0], -1)) return -args[1];
      if (Is(args[1], -1)) return -args[0];
      break;
    case Prim::kDiv:
      if (Is(args[1], 1)) return args[0];
      break;
    case Prim::kSelect:
      if (IsConstant(args[0])) return args[0]->constant != 0 ? args[1] : args[2];
      break;
    default:
      break;
  }
  return MakeNode({.prim = prim, .args = std::move(args)});
}

Expr Sigmoid(Expr a) { return 1.0 / (1.0 + Exp(Min(-a, 80.0))); }

namespace {

// Rules over the derivatives of the arguments; each node of the expression is visited once.
class Differentiator {
 public:
  explicit Differentiator(int64_t index) : index_(index) {}

  Expr Of(const Expr& y) {
    const auto found = done_.find(y.get());
    if (found != done_.end()) return found->second;
    Expr derivative = Rule(y);
    done_.emplace(y.get(), derivative);
    return derivative;
  }

 private:
  Expr Rule(const Expr& y) {
    if (y->prim == Prim::kOperand) return Expr(y->index == index_ ? 1.0 : 0.0);
    std::vector<Expr> d;
    bool all_zero = true;
    for (const Expr& arg : y->args) {
      d.push_back(Of(arg));
      all_zero = all_zero && Is(d.back(), 0);
    }
    // A condition has derivative 0, but is no reason for the whole to have one.
    if (all_zero) return Expr(0.0);
    const std::vector<Expr>& x = y->args;
    switch (y->prim) {
      case Prim::kNeg:
        return -d[0];
      case Prim::kAbs:
        return d[0] * (Less(0.0, x[0]) - Less(x[0], 0.0));
      case Prim::kExp:
        return d[0] * y;
      case Prim::kLog:
        return d[0] / x[0];
      case Prim::kSqrt:
        return d[0] * (0.5 / y);
      case Prim::kTanh:
        return d[0] * (1.0 - y * y);
      case Prim::kErf:
        return d[0] * (2.0 * std::numbers::inv_sqrtpi * Exp(-(x[0] * x[0])));
      case Prim::kSin:
        return d[0] * Cos(x[0]);
      case Prim::kCos:
        return -(d[0] * Sin(x[0]));
      case Prim::kAdd:
        return d[0] + d[1];
      case Prim::kSub:
        return Is(d[0], 0) ? -d[1] : d[0] - d[1];
      case Prim::kMul:
        return d[0] * x[1] + x[0] * d[1];
      case Prim::kDiv: {
        const Expr by_divisor = y * d[1];
        if (Is(x[0], 1)) return -(by_divisor * y);  // No second division.
        return (Is(by_divisor, 0) ? d[0] : Is(d[0], 0) ? -by_divisor : d[0] - by_divisor) / x[1];
      }
      case Prim::kMax:
        return Select(Less(x[0], x[1]), d[1], d[0]);
      case Prim::kMin:
        return Select(Less(x[1], x[0]), d[1], d[0]);
      case Prim::kPow: {
        Expr derivative = Expr(0.0);
        if (!Is(d[0], 0)) derivative = d[0] * (x[1] * Pow(x[0], x[1] - 1.0));
        // x^y ln x -> 0 at x = 0, where ln x alone is infinite.
        if (!Is(d[1], 0)) derivative = derivative + d[1] * Select(Less(0.0, Abs(x[0])), y * Log(x[0]), 0.0);
        return derivative;
      }
      case Prim::kSelect:
        return Is(d[1], 0) && Is(d[2], 0) ? Expr(0.0) : Select(x[0], d[1], d[2]);
      case Prim::kRound:
        return d[0];
      case Prim::kOperand:
      case Prim::kConstant:
      case Prim::kUniform:
      case Prim::kLess:
        break;
    }
    return Expr(0.0);
  }

  int64_t index_;
  absl::flat_hash_map<const ExprNode*, Expr> done_;
};

// Calls visit(node) once for each node under `expression`, arguments first.
template <typename F>
void PostOrder(const Expr& expression, absl::flat_hash_map<const ExprNode*, bool>& seen, const F& visit) {
  if (!seen.emplace(expression.get(), true).second) return;
  for (const Expr& arg : expression->args) PostOrder(arg, seen, visit);
  visit(*expression);
}

}  // namespace

Expr Derivative(Expr expression, int64_t index) { return Differentiator(index).Of(expression); }

std::vector<int64_t> OperandsRead(absl::Span<const Expr> expressions) {
  std::vector<int64_t> read;
  absl::flat_hash_map<const ExprNode*, bool> seen;
  for (const Expr& expression : expressions) {
    PostOrder(expression, seen, [&](const ExprNode& node) {
      if (node.prim == Prim::kOperand || node.prim == Prim::kUniform) read.push_back(node.index);
    });
  }
  std::sort(read.begin(), read.end());
  read.erase(std::unique(read.begin(), read.end()), read.end());
  return read;
}

Expr Substitute(Expr expression, absl::Span<const Expr> replacements) {
  absl::flat_hash_map<const ExprNode*, bool> seen;
  absl::flat_hash_map<const ExprNode*, Expr> done;
  PostOrder(expression, seen, [&](const ExprNode& node) {
    const auto replacement = [&]() -> const Expr& {
      CHECK(node.index >= 0 && node.index < static_cast<int64_t>(replacements.size())) << node.index;
      const Expr& to = replacements[static_cast<size_t>(node.index)];
      CHECK(to.get() != nullptr) << "operand " << node.index << " has no replacement";
      return to;
    };
    Expr made;
    switch (node.prim) {
      case Prim::kOperand:
        made = replacement();
        break;
      case Prim::kUniform:
        CHECK(replacement()->prim == Prim::kOperand) << "a random state can only become another operand";
        made = Uniform(replacement()->index, node.key);
        break;
      case Prim::kConstant:
        made = Expr(node.constant);
        break;
      default: {
        std::vector<Expr> args;
        for (const Expr& arg : node.args) args.push_back(done.at(arg.get()));
        made = node.prim == Prim::kRound ? RoundExpr(node.dtype, args[0]) : Make(node.prim, std::move(args));
      }
    }
    done.emplace(&node, std::move(made));
  });
  return done.at(expression.get());
}

// --- The linear form
// ---------------------------------------------------------------------------------------------------

ScalarProgram Linearize(absl::Span<const Expr> results) {
  // In single assignment first: dst, a, b, c number values. Equal instructions become one.
  std::vector<ScalarInstruction> values;
  using Key = std::tuple<Prim, int, int, int, int64_t, uint64_t, uint32_t, DType>;
  absl::flat_hash_map<Key, int> known;
  absl::flat_hash_map<const ExprNode*, int> value_of;
  absl::flat_hash_map<const ExprNode*, bool> seen;
  for (const Expr& result : results) {
    PostOrder(result, seen, [&](const ExprNode& node) {
      int args[3] = {-1, -1, -1};
      for (size_t i = 0; i < node.args.size(); ++i) args[i] = value_of.at(node.args[i].get());
      uint64_t bits = 0;
      std::memcpy(&bits, &node.constant, sizeof bits);
      const int next = static_cast<int>(values.size());
      const auto [at, is_new] =
          known.emplace(Key(node.prim, args[0], args[1], args[2], node.index, bits, node.key, node.dtype), next);
      if (is_new) {
        CHECK_LT(next, kMaxInstructions) << "an expression of more primitives";
        values.push_back({.prim = node.prim,
                          .dst = static_cast<int16_t>(next),
                          .a = static_cast<int16_t>(std::max(args[0], 0)),
                          .b = static_cast<int16_t>(std::max(args[1], 0)),
                          .c = static_cast<int16_t>(std::max(args[2], 0)),
                          .index = node.index,
                          .constant = node.constant,
                          .key = node.key,
                          .dtype = node.dtype});
      }
      value_of.emplace(&node, at->second);
    });
  }

  const int n = static_cast<int>(values.size());
  std::vector<int> last_read(static_cast<size_t>(n), -1);
  const auto args_of = [](ScalarInstruction& i) {
    const int arity = Row(i.prim).arity;
    std::vector<int16_t*> args;
    if (arity > 0) args.push_back(&i.a);
    if (arity > 1) args.push_back(&i.b);
    if (arity > 2) args.push_back(&i.c);
    return args;
  };
  for (int v = 0; v < n; ++v) {
    for (const int16_t* arg : args_of(values[static_cast<size_t>(v)])) last_read[static_cast<size_t>(*arg)] = v;
  }
  for (const Expr& result : results) last_read[static_cast<size_t>(value_of.at(result.get()))] = n;

  ScalarProgram program;
  std::vector<int16_t> register_of(static_cast<size_t>(n), 0), free;
  for (int v = 0; v < n; ++v) {
    ScalarInstruction instruction = values[static_cast<size_t>(v)];
    for (int16_t* arg : args_of(instruction)) {
      const size_t value = static_cast<size_t>(*arg);
      *arg = register_of[value];
      if (last_read[value] == v) {  // A value read twice here is freed once.
        last_read[value] = -1;
        free.push_back(register_of[value]);
      }
    }
    if (free.empty()) {
      instruction.dst = static_cast<int16_t>(program.num_registers++);
    } else {
      const auto lowest = std::min_element(free.begin(), free.end());
      instruction.dst = *lowest;
      free.erase(lowest);
    }
    register_of[static_cast<size_t>(v)] = instruction.dst;
    program.instructions.push_back(instruction);
  }
  for (const Expr& result : results) {
    program.outputs.push_back(register_of[static_cast<size_t>(value_of.at(result.get()))]);
  }
  return program;
}

std::string ConstantToString(double value) {
  for (const int digits : {6, 9, 15, 17}) {
    std::string text = absl::StrFormat("%.*g", digits, value);
    double back = 0;
    if (absl::SimpleAtod(text, &back) && back == value) return text;
  }
  return "nan";
}

std::string ScalarProgram::ToString() const {
  std::vector<std::string> parts;
  for (const ScalarInstruction& i : instructions) {
    std::vector<std::string> args;
    switch (i.prim) {
      case Prim::kOperand:
        args = {absl::StrCat(i.index)};
        break;
      case Prim::kConstant:
        args = {ConstantToString(i.constant)};
        break;
      case Prim::kUniform:
        args = {absl::StrCat(i.index), absl::StrCat(i.key)};
        break;
      case Prim::kRound:
        args = {std::string(DTypeName(i.dtype)), absl::StrCat("r", i.a)};
        break;
      default: {
        const int16_t registers[] = {i.a, i.b, i.c};
        for (int k = 0; k < Row(i.prim).arity; ++k) args.push_back(absl::StrCat("r", registers[k]));
      }
    }
    parts.push_back(absl::StrCat("r", i.dst, "=", Row(i.prim).name, "(", absl::StrJoin(args, ","), ")"));
  }
  parts.push_back("->");
  for (const int16_t output : outputs) parts.push_back(absl::StrCat("r", output));
  return absl::StrJoin(parts, " ");
}

absl::StatusOr<ScalarProgram> ParseScalarProgram(absl::string_view text) {
  ScalarProgram program;
  std::vector<bool> written;
  absl::string_view instruction;  // The one being read, for messages.
  const auto error = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("program: \"", instruction.substr(0, 80), "\": ", what));
  };
  const auto parse_register = [&](absl::string_view name, int16_t& out) {
    int64_t number = 0;
    if (!absl::ConsumePrefix(&name, "r") || name.empty() || !absl::ascii_isdigit(static_cast<unsigned char>(name[0])) ||
        !absl::SimpleAtoi(name, &number) || number >= kMaxInstructions) {
      return false;
    }
    out = static_cast<int16_t>(number);
    return true;
  };
  const auto read = [&](absl::string_view name, int16_t& out) -> absl::Status {
    if (!parse_register(name, out)) return error(absl::StrCat("\"", name, "\" is not a register such as r0"));
    if (static_cast<size_t>(out) >= written.size() || !written[static_cast<size_t>(out)]) {
      return error(absl::StrCat(name, " is read before it is written"));
    }
    return absl::OkStatus();
  };

  bool in_outputs = false;
  for (const absl::string_view part : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    instruction = part;
    if (part == "->" && !in_outputs) {
      in_outputs = true;
      continue;
    }
    if (in_outputs) {
      if (static_cast<int64_t>(program.outputs.size()) >= kMaxInstructions) return error("too many results");
      RETURN_IF_ERROR(read(part, program.outputs.emplace_back()));
      continue;
    }
    if (static_cast<int64_t>(program.instructions.size()) >= kMaxInstructions) {
      return error(absl::StrCat("more than ", kMaxInstructions, " instructions"));
    }
    const size_t equals = part.find('='), open = part.find('(');
    if (equals == absl::string_view::npos || open == absl::string_view::npos || open < equals ||
        !absl::EndsWith(part, ")")) {
      return error("expected rN=primitive(arguments)");
    }
    ScalarInstruction made;
    if (!parse_register(part.substr(0, equals), made.dst)) {
      return error(absl::StrCat("the result must be a register r0 to r", kMaxInstructions - 1));
    }
    const absl::string_view name = part.substr(equals + 1, open - equals - 1);
    const PrimRow* row = nullptr;
    for (const PrimRow& candidate : kPrims) {
      if (candidate.name == name) row = &candidate;
    }
    if (row == nullptr) {
      return error(absl::StrCat("unknown primitive \"", name,
                                "\"; known: ", absl::StrJoin(kPrims, " ", [](std::string* out, const PrimRow& known) {
                                  absl::StrAppend(out, known.name);
                                })));
    }
    made.prim = row->prim;
    const std::vector<absl::string_view> args =
        absl::StrSplit(part.substr(open + 1, part.size() - open - 2), ',', absl::SkipEmpty());
    const size_t expected = made.prim == Prim::kUniform || made.prim == Prim::kRound
                                ? 2
                                : std::max<size_t>(1, static_cast<size_t>(row->arity));
    if (args.size() != expected) {
      return error(absl::StrCat(name, " takes ", expected, " arguments, ", args.size(), " given"));
    }
    switch (made.prim) {
      case Prim::kUniform:
      case Prim::kOperand:
        if (!absl::SimpleAtoi(args[0], &made.index) || made.index < 0 || made.index >= kMaxOperands) {
          return error(absl::StrCat("\"", args[0], "\" is not an operand number below ", kMaxOperands));
        }
        if (made.prim == Prim::kUniform && !absl::SimpleAtoi(args[1], &made.key)) {
          return error(absl::StrCat("the key \"", args[1], "\" is not a 32-bit whole number"));
        }
        break;
      case Prim::kConstant:
        if (!absl::SimpleAtod(args[0], &made.constant)) {
          return error(absl::StrCat("\"", args[0], "\" is not a number"));
        }
        break;
      case Prim::kRound: {
        const std::optional<DType> dtype = ParseDType(args[0]);
        if (!dtype || !IsFloat(*dtype)) return error(absl::StrCat("\"", args[0], "\" is not a floating point dtype"));
        made.dtype = *dtype;
        RETURN_IF_ERROR(read(args[1], made.a));
        break;
      }
      default: {
        int16_t* const registers[] = {&made.a, &made.b, &made.c};
        for (size_t k = 0; k < args.size(); ++k) RETURN_IF_ERROR(read(args[k], *registers[k]));
      }
    }
    const size_t dst = static_cast<size_t>(made.dst);
    if (written.size() <= dst) written.resize(dst + 1, false);
    written[dst] = true;
    program.instructions.push_back(made);
  }
  if (program.outputs.empty()) return absl::InvalidArgumentError("program: no results; expected \"... -> r0\"");
  program.num_registers = static_cast<int>(written.size());
  return program;
}

float UniformAt(absl::Span<const int32_t> rng, uint32_t key, int64_t sample, int64_t element) {
  CHECK_EQ(rng.size(), 4u) << "a random state is {seed low, seed high, step, first sample}";
  const auto words = Philox({static_cast<uint32_t>(rng[0]), static_cast<uint32_t>(rng[1])},
                            {static_cast<uint32_t>(element / 4), key, static_cast<uint32_t>(rng[2]),
                             static_cast<uint32_t>(rng[3]) + static_cast<uint32_t>(sample)});
  return UniformFromBits(words[static_cast<size_t>(element % 4)]);
}

}  // namespace mt
