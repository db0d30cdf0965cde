#include "ir/region.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

using Kind = RegionStep::Kind;

constexpr int64_t kMaxText = int64_t{256} << 10;
constexpr size_t kMaxKept = 4096;  // Regions that are remembered.

struct KindRow {
  Kind kind;
  absl::string_view name;
};
constexpr KindRow kKinds[] = {{Kind::kLoad, "load"},
                              {Kind::kRow, "row"},
                              {Kind::kConstant, "const"},
                              {Kind::kUniform, "uniform"},
                              {Kind::kRowSum, "rowsum"}};
constexpr absl::string_view kResultNames[] = {"full", "row", "columns"};

bool IsRegionPrim(Prim prim) { return Row(prim).arity > 0; }

std::string StepToString(const RegionStep& s) {
  switch (s.kind) {
    case Kind::kLoad:
      return absl::StrCat("load(", s.index, ")");
    case Kind::kRow:
      return absl::StrCat("row(", s.index, ")");
    case Kind::kConstant:
      return absl::StrCat("const(", ConstantToString(s.constant), ")");
    case Kind::kUniform:
      return absl::StrCat("uniform(", s.index, ",", s.key, ",", s.sample_elements, ")");
    case Kind::kRowSum:
      return absl::StrCat("rowsum(v", s.a, ")");
    case Kind::kPrim:
      break;
  }
  if (s.prim == Prim::kRound) return absl::StrCat("round(", DTypeName(s.dtype), ",v", s.a, ")");
  std::vector<std::string> args;
  const int values[] = {s.a, s.b, s.c};
  for (int k = 0; k < Row(s.prim).arity; ++k) args.push_back(absl::StrCat("v", values[k]));
  return absl::StrCat(Row(s.prim).name, "(", absl::StrJoin(args, ","), ")");
}

class Parser {
 public:
  Parser(int64_t rows, int64_t width) { region_ = {.rows = rows, .width = width, .steps = {}, .results = {}}; }

  absl::StatusOr<Region> Parse(absl::string_view text) {
    const std::optional<int64_t> elements = CheckedMultiply(region_.rows, region_.width);
    if (region_.rows < 1 || region_.width < 1 || !elements || *elements > kMaxElements) {
      return absl::InvalidArgumentError(absl::StrCat("attributes rows and width are ", region_.rows, " and ",
                                                     region_.width,
                                                     "; both must be at least 1 and their product at "
                                                     "most ",
                                                     kMaxElements));
    }
    if (static_cast<int64_t>(text.size()) > kMaxText) {
      return absl::InvalidArgumentError(
          absl::StrCat("attribute region has ", text.size(), " characters; the limit is ", kMaxText));
    }
    bool in_results = false;
    for (const absl::string_view part : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
      part_ = part;
      if (part == "->" && !in_results) {
        in_results = true;
      } else if (in_results) {
        RETURN_IF_ERROR(ParseResult(part));
      } else {
        RETURN_IF_ERROR(ParseStep(part));
      }
    }
    if (region_.results.empty()) {
      return absl::InvalidArgumentError("attribute region has no results; expected \"... -> full(v0,f32[2,3])\"");
    }
    return std::move(region_);
  }

 private:
  absl::Status Error(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("attribute region: \"", part_.substr(0, 80), "\": ", what));
  }

  // "name(a,b)" -> name and what is between the parentheses.
  static bool Split(absl::string_view text, absl::string_view* name, absl::string_view* args) {
    const size_t open = text.find('(');
    if (open == absl::string_view::npos || !absl::EndsWith(text, ")")) return false;
    *name = text.substr(0, open);
    *args = text.substr(open + 1, text.size() - open - 2);
    return true;
  }

  static bool Number(absl::string_view text, int64_t least, int64_t most, int64_t* number) {
    return !text.empty() && absl::ascii_isdigit(static_cast<unsigned char>(text[0])) &&
           absl::SimpleAtoi(text, number) && *number >= least && *number <= most;
  }

  absl::Status ParseValue(absl::string_view text, int* value) const {
    int64_t number = 0;
    if (!absl::ConsumePrefix(&text, "v") || !Number(text, 0, kMaxRegionSteps, &number)) {
      return Error("expected a value such as v0");
    }
    if (number >= static_cast<int64_t>(region_.steps.size())) {
      return Error(absl::StrCat("v", number, " is read before it is made"));
    }
    *value = static_cast<int>(number);
    return absl::OkStatus();
  }

  absl::Status ParseStep(absl::string_view part) {
    const int64_t n = static_cast<int64_t>(region_.steps.size());
    if (n >= kMaxRegionSteps) return Error(absl::StrCat("more than ", kMaxRegionSteps, " steps"));
    absl::string_view name, inside;
    if (!absl::ConsumePrefix(&part, absl::StrCat("v", n, "=")) || !Split(part, &name, &inside)) {
      return Error(absl::StrCat("expected v", n, "=step(arguments)"));
    }
    RegionStep step{.kind = Kind::kPrim};
    bool known = false;
    for (const KindRow& row : kKinds) {
      if (row.name != name) continue;
      step.kind = row.kind;
      known = true;
    }
    if (!known) {
      for (const PrimRow& row : AllPrims()) {
        if (row.name != name || !IsRegionPrim(row.prim)) continue;
        step.prim = row.prim;
        known = true;
      }
    }
    if (!known) return Error(absl::StrCat("no step is named \"", name, "\""));
    const std::vector<absl::string_view> args = absl::StrSplit(inside, ',', absl::SkipEmpty());
    const size_t expected = step.kind == Kind::kUniform ? 3
                            : step.kind != Kind::kPrim  ? 1
                            : step.prim == Prim::kRound ? 2
                                                        : static_cast<size_t>(Row(step.prim).arity);
    if (args.size() != expected) {
      return Error(absl::StrCat(name, " takes ", expected, " arguments, ", args.size(), " given"));
    }
    switch (step.kind) {
      case Kind::kUniform: {
        int64_t key = 0;
        if (!Number(args[1], 0, 0xFFFFFFFF, &key)) return Error("the key must be a 32-bit whole number");
        step.key = static_cast<uint32_t>(key);
        const int64_t elements = region_.rows * region_.width;
        if (!Number(args[2], 1, elements, &step.sample_elements) || elements % step.sample_elements != 0) {
          return Error(absl::StrCat("the elements of a sample must divide ", elements));
        }
        [[fallthrough]];
      }
      case Kind::kLoad:
      case Kind::kRow:
        if (!Number(args[0], 0, kMaxRegionOperands - 1, &step.index)) {
          return Error(absl::StrCat("expected an operand number below ", kMaxRegionOperands));
        }
        break;
      case Kind::kConstant:
        if (!absl::SimpleAtod(args[0], &step.constant) || !std::isfinite(step.constant)) {
          return Error("expected a finite number");
        }
        break;
      case Kind::kRowSum:
        RETURN_IF_ERROR(ParseValue(args[0], &step.a));
        break;
      case Kind::kPrim:
        if (step.prim == Prim::kRound) {
          const std::optional<DType> dtype = ParseDType(args[0]);
          if (!dtype || !IsFloat(*dtype)) return Error("expected a floating point dtype");
          step.dtype = *dtype;
          RETURN_IF_ERROR(ParseValue(args[1], &step.a));
          break;
        }
        int* const values[] = {&step.a, &step.b, &step.c};
        for (size_t k = 0; k < args.size(); ++k) RETURN_IF_ERROR(ParseValue(args[k], values[k]));
        break;
    }
    // A row(i) may be one number for all: at most a number a row, in either case.
    Extent extent = step.kind == Kind::kLoad || step.kind == Kind::kUniform ? Extent::kElement
                    : step.kind == Kind::kRow || step.kind == Kind::kRowSum ? Extent::kRow
                                                                            : Extent::kOne;
    if (step.kind == Kind::kPrim) {
      for (const int arg : {step.a, step.b, step.c}) {
        if (arg >= 0) extent = std::max(extent, extents_[static_cast<size_t>(arg)]);
      }
    }
    extents_.push_back(extent);
    region_.steps.push_back(step);
    return absl::OkStatus();
  }

  absl::Status ParseResult(absl::string_view part) {
    if (static_cast<int64_t>(region_.results.size()) >= kMaxRegionResults) {
      return Error(absl::StrCat("more than ", kMaxRegionResults, " results"));
    }
    absl::string_view name, inside;
    const auto* const at = Split(part, &name, &inside)
                               ? std::find(std::begin(kResultNames), std::end(kResultNames), name)
                               : std::end(kResultNames);
    const size_t comma = inside.find(',');
    if (at == std::end(kResultNames) || comma == absl::string_view::npos) {
      return Error("expected full(v0,type), row(v0,type) or columns(v0,type)");
    }
    RegionResult result{.kind = static_cast<RegionResult::Kind>(at - std::begin(kResultNames)), .value = 0, .type = {}};
    RETURN_IF_ERROR(ParseValue(inside.substr(0, comma), &result.value));
    absl::StatusOr<TensorType> type = ParseTensorType(inside.substr(comma + 1));
    if (!type.ok()) return Error(type.status().message());
    result.type = *std::move(type);
    const int64_t elements = result.kind == RegionResult::Kind::kFull  ? region_.rows * region_.width
                             : result.kind == RegionResult::Kind::kRow ? region_.rows
                                                                       : region_.width;
    if (!IsFloat(result.type.dtype) || result.type.num_elements() != elements) {
      return Error(absl::StrCat("the type must be floating point, of ", elements, " elements"));
    }
    if (result.kind == RegionResult::Kind::kRow && extents_[static_cast<size_t>(result.value)] == Extent::kElement) {
      return Error(absl::StrCat("v", result.value, " is a number for each element, not for each row"));
    }
    region_.results.push_back(std::move(result));
    return absl::OkStatus();
  }

  Region region_;
  std::vector<Extent> extents_;
  absl::string_view part_;  // The one being read, for messages.
};

}  // namespace

int RegionStep::num_args() const {
  if (kind == Kind::kRowSum) return 1;
  return kind == Kind::kPrim ? Row(prim).arity : 0;
}

bool operator==(const RegionStep& a, const RegionStep& b) {
  const auto all = [](const RegionStep& s) {
    return std::make_tuple(s.kind, s.prim, s.a, s.b, s.c, s.index, s.constant, s.key, s.sample_elements, s.dtype);
  };
  return all(a) == all(b) && std::signbit(a.constant) == std::signbit(b.constant);
}

std::string Region::ToString() const {
  std::vector<std::string> parts;
  for (size_t i = 0; i < steps.size(); ++i) parts.push_back(absl::StrCat("v", i, "=", StepToString(steps[i])));
  parts.push_back("->");
  for (const RegionResult& result : results) {
    parts.push_back(absl::StrCat(kResultNames[static_cast<size_t>(result.kind)], "(v", result.value, ",",
                                 result.type.ToString(), ")"));
  }
  return absl::StrJoin(parts, " ");
}

std::vector<Extent> Region::Extents(absl::Span<const TensorType> operands) const {
  std::vector<Extent> extents;
  for (const RegionStep& step : steps) {
    Extent extent = Extent::kOne;
    switch (step.kind) {
      case Kind::kLoad:
      case Kind::kUniform:
        extent = Extent::kElement;
        break;
      case Kind::kRow:
        extent = operands[static_cast<size_t>(step.index)].num_elements() == 1 ? Extent::kOne : Extent::kRow;
        break;
      case Kind::kRowSum:
        extent = Extent::kRow;
        break;
      case Kind::kConstant:
      case Kind::kPrim:
        for (const int arg : {step.a, step.b, step.c}) {
          if (arg >= 0) extent = std::max(extent, extents[static_cast<size_t>(arg)]);
        }
    }
    extents.push_back(extent);
  }
  return extents;
}

bool Region::StoresExactly(const RegionResult& result) const {
  if (result.kind == RegionResult::Kind::kColumns) return false;
  if (result.type.dtype == DType::kF32) return true;
  const RegionStep& step = steps[static_cast<size_t>(result.value)];
  return step.kind == Kind::kPrim && step.prim == Prim::kRound && step.dtype == result.type.dtype;
}

bool Region::IsWorthOneKernel(size_t operands) const {
  return operands <= 16 && results.size() <= 8 && steps.size() <= 256;
}

absl::StatusOr<std::shared_ptr<const Region>> ParseRegion(int64_t rows, int64_t width, absl::string_view text) {
  using Key = std::tuple<int64_t, int64_t, std::string>;
  static std::mutex& mutex = *new std::mutex;
  static auto& kept = *new absl::flat_hash_map<Key, std::shared_ptr<const Region>>;
  Key key(rows, width, text);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at = kept.find(key);
    if (at != kept.end()) return at->second;
  }
  ASSIGN_OR_RETURN(Region region, Parser(rows, width).Parse(text));
  auto shared = std::make_shared<const Region>(std::move(region));
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.size() >= kMaxKept) kept.clear();
  kept.emplace(std::move(key), shared);
  return shared;
}

absl::Status CheckRegionOperands(const Region& region, absl::Span<const TensorType> operands) {
  const int64_t elements = region.rows * region.width;
  for (size_t i = 0; i < region.steps.size(); ++i) {
    const RegionStep& step = region.steps[i];
    if (step.kind != Kind::kLoad && step.kind != Kind::kRow && step.kind != Kind::kUniform) continue;
    const auto error = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("attribute region: \"v", i, "=", StepToString(step), "\": ", what));
    };
    if (step.index >= static_cast<int64_t>(operands.size())) {
      return error(absl::StrCat("there are ", operands.size(), " operands"));
    }
    const TensorType& type = operands[static_cast<size_t>(step.index)];
    const std::string is = absl::StrCat("operand x", step.index, " is ", type.ToString(), "; ");
    if (step.kind == Kind::kUniform) {
      if (type == TensorType{DType::kI32, {4}}) continue;
      return error(absl::StrCat(is, "a random state is i32[4]"));
    }
    if (!IsFloat(type.dtype)) return error(absl::StrCat(is, "it must be floating point"));
    const int64_t n = type.num_elements();
    if (step.kind == Kind::kRow && n != 1 && n != region.rows) {
      return error(absl::StrCat(is, "it must have ", region.rows, " elements, one a row, or one"));
    }
    if (step.kind == Kind::kLoad && (n % region.width != 0 || elements % n != 0)) {
      return error(absl::StrCat(is, "it must have ", elements, " elements, or fewer whole rows of ", region.width,
                                " that repeat"));
    }
  }
  return absl::OkStatus();
}

int RegionBuilder::Add(RegionStep step) {
  const auto [at, is_new] = numbers_.emplace(step, static_cast<int>(region_.steps.size()));
  if (is_new) region_.steps.push_back(step);
  return at->second;
}

int RegionBuilder::Load(int64_t operand) { return Add({.kind = Kind::kLoad, .index = operand}); }
int RegionBuilder::Row(int64_t operand) { return Add({.kind = Kind::kRow, .index = operand}); }
int RegionBuilder::Constant(double value) { return Add({.kind = Kind::kConstant, .constant = value}); }
int RegionBuilder::RowSum(int value) { return Add({.kind = Kind::kRowSum, .a = value}); }
int RegionBuilder::Make(Prim prim, int a, int b, int c) {
  return Add({.kind = Kind::kPrim, .prim = prim, .a = a, .b = b, .c = c});
}
int RegionBuilder::Round(DType dtype, int value) {
  if (dtype == DType::kF32) return value;
  return Add({.kind = Kind::kPrim, .prim = Prim::kRound, .a = value, .dtype = dtype});
}

int RegionBuilder::Compute(const Expr& expression, absl::Span<const int> values, absl::Span<const int64_t> operand_of,
                           int64_t sample_elements) {
  absl::flat_hash_map<const ExprNode*, int> done;
  const std::function<int(const Expr&)> visit = [&](const Expr& expr) -> int {
    const auto at = done.find(expr.get());
    if (at != done.end()) return at->second;
    int value = -1;
    switch (expr->prim) {
      case Prim::kOperand:
        value = values[static_cast<size_t>(expr->index)];
        break;
      case Prim::kConstant:
        value = Constant(expr->constant);
        break;
      case Prim::kUniform:
        value = Add({.kind = Kind::kUniform,
                     .index = operand_of[static_cast<size_t>(expr->index)],
                     .key = expr->key,
                     .sample_elements = sample_elements});
        break;
      default: {
        int args[] = {-1, -1, -1};
        for (size_t k = 0; k < expr->args.size(); ++k) args[k] = visit(expr->args[k]);
        value = Add({.kind = Kind::kPrim,
                     .prim = expr->prim,
                     .a = args[0],
                     .b = args[1],
                     .c = args[2],
                     .dtype = expr->prim == Prim::kRound ? expr->dtype : DType::kF32});
      }
    }
    done.emplace(expr.get(), value);
    return value;
  };
  return visit(expression);
}

Region RegionBuilder::Build() const {
  std::vector<bool> needed(region_.steps.size(), false);
  for (const RegionResult& result : region_.results) needed[static_cast<size_t>(result.value)] = true;
  for (size_t i = region_.steps.size(); i-- > 0;) {
    if (!needed[i]) continue;
    for (const int arg : {region_.steps[i].a, region_.steps[i].b, region_.steps[i].c}) {
      if (arg >= 0) needed[static_cast<size_t>(arg)] = true;
    }
  }
  Region built = {.rows = region_.rows, .width = region_.width, .steps = {}, .results = region_.results};
  std::vector<int> number(region_.steps.size(), -1);
  for (size_t i = 0; i < region_.steps.size(); ++i) {
    if (!needed[i]) continue;
    RegionStep step = region_.steps[i];
    for (int* arg : {&step.a, &step.b, &step.c}) {
      if (*arg >= 0) *arg = number[static_cast<size_t>(*arg)];
    }
    number[i] = static_cast<int>(built.steps.size());
    built.steps.push_back(step);
  }
  for (RegionResult& result : built.results) result.value = number[static_cast<size_t>(result.value)];
  return built;
}

}  // namespace mt
