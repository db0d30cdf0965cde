// Copies of op rows with one planted bug each. Every mutant must be killed by a named check of conformance.
//
// A sample of the mutants by default; with --mutate all of them, each printed as "killed by CHECK: MUTANT".
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest-spi.h"
#include "tests/op_checks.h"
#include "tests/test_util.h"

namespace mt {
namespace {

bool all_mutants = false;

struct Check {
  absl::string_view name;
  void (*run)(const OpDef&);
};
constexpr Check kReference = {"ReferenceFillsWhatInferSays", CheckReferenceFillsWhatInferSays};
constexpr Check kDims = {"ResultDims", CheckResultDims};
constexpr Check kCost = {"CostCountsOperandsAndResults", CheckCostCountsOperandsAndResults};
constexpr Check kFits = {"InPlacePairsFit", CheckInPlacePairsFit};
constexpr Check kGradient = {"IsCentralDifference", CheckIsCentralDifference};
constexpr Check kBackend = {"AgreesWithReference", CheckAgreesWithReference};
constexpr Check kBits = {"SameBitsAlways", CheckSameBitsAlways};

// Columns are plain functions: what the current mutant needs beside its row.
struct Planted {
  const OpDef* original = nullptr;
  size_t operand = 0;
  std::pair<int, int> from, to;  // (result, operand); from = to: `to` is declared besides.
  int64_t read = 0, written = 0;
};
Planted planted;

struct Mutant {
  std::string name;
  const OpDef* original = nullptr;
  OpDef row;
  const OpDef* checked = nullptr;  // The row that the checks run on; null: the mutant.
  std::vector<Check> checks;
  Planted planted = {};
  bool isolate = false;  // It may read or write where it must not: in a process of its own.
};

bool Fails(const Check& check, const OpDef& op) {
  ::testing::TestPartResultArray results;
  {
    ::testing::ScopedFakeTestPartResultReporter reporter(
        ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &results);
    check.run(op);
  }
  for (int i = 0; i < results.size(); ++i) {
    if (results.GetTestPartResult(i).failed()) return true;
  }
  return false;
}

// The name of the check that fails; "" where the mutant survives.
std::string KillerHere(const Mutant& mutant, const std::function<void(absl::string_view)>& announce) {
  planted = mutant.planted;
  planted.original = mutant.original;
  CurrentSubstitution() = {.registered = mutant.original, .mutant = &mutant.row};
  std::string killer;
  for (const Check& check : mutant.checks) {
    announce(check.name);
    if (!Fails(check, mutant.checked == nullptr ? mutant.row : *mutant.checked)) continue;
    killer = std::string(check.name);
    break;
  }
  CurrentSubstitution() = {};
  return killer;
}

std::string Killer(const Mutant& mutant) {
  if (!mutant.isolate) return KillerHere(mutant, [](absl::string_view) {});
  int ends[2];
  CHECK_EQ(::pipe(ends), 0);
  std::fflush(nullptr);
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    ::close(ends[0]);
    (void)!::freopen("/dev/null", "w", stderr);
    const std::string killer = KillerHere(mutant, [&](absl::string_view name) {
      const std::string line = absl::StrCat(name, "\n");
      CHECK_EQ(::write(ends[1], line.data(), line.size()), static_cast<ssize_t>(line.size()));
    });
    ::_exit(killer.empty() ? 0 : 1);
  }
  ::close(ends[1]);
  std::string said;
  char buffer[256];
  for (ssize_t n = 0; (n = ::read(ends[0], buffer, sizeof(buffer))) > 0;) said.append(buffer, static_cast<size_t>(n));
  ::close(ends[0]);
  int status = 0;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "";
  while (!said.empty() && said.back() == '\n') said.pop_back();
  const size_t last = said.rfind('\n');
  return absl::StrCat(last == std::string::npos ? said : said.substr(last + 1), WIFEXITED(status) ? "" : " (a crash)");
}

// Planted bugs.

absl::Status NegatedGrad(GradContext& context) {
  RETURN_IF_ERROR(planted.original->grad(context));
  if (planted.operand >= context.operand_grads.size()) return absl::OkStatus();  // A sample without this operand.
  Value& grad = context.operand_grads[planted.operand];
  if (grad) grad = context.builder.Op("neg", {grad});
  return context.builder.status();
}

absl::Status DroppedGrad(GradContext& context) {
  RETURN_IF_ERROR(planted.original->grad(context));
  if (planted.operand < context.operand_grads.size()) context.operand_grads[planted.operand] = Value{};
  return context.builder.status();
}

std::vector<std::pair<int, int>> ShiftedInPlace(absl::Span<const TensorType> operands,
                                                absl::Span<const TensorType> results, const Attrs& attrs) {
  std::vector<std::pair<int, int>> pairs = InPlacePairs(*planted.original, operands, results, attrs);
  const bool there =
      planted.to.second < static_cast<int>(operands.size()) && planted.to.first < static_cast<int>(results.size());
  if (planted.from == planted.to) {
    const bool same_type =
        there && operands[static_cast<size_t>(planted.to.second)] == results[static_cast<size_t>(planted.to.first)];
    if (same_type && !absl::c_linear_search(pairs, planted.to)) pairs.push_back(planted.to);
  } else if (there) {
    absl::c_replace(pairs, planted.from, planted.to);
  }
  return pairs;
}

Cost WrongCost(absl::Span<const TensorType> operands, absl::Span<const TensorType> results, const Attrs& attrs) {
  Cost cost = CostOf(*planted.original, operands, results, attrs);
  cost.bytes_read += planted.read;
  cost.bytes_written += planted.written;
  return cost;
}

template <typename T>
using Operands = absl::Span<const HostTensor<T>* const>;
template <typename T>
using Results = absl::Span<HostTensor<T>* const>;

template <typename T>
ReferenceFn<T> Original() {
  if constexpr (std::is_same_v<T, float>) {
    return planted.original->reference.f32;
  } else {
    return planted.original->reference.f64;
  }
}

template <typename T>
void WithoutCausalMask(const Attrs& attrs, Operands<T> operands, Results<T> results) {
  Attrs changed = attrs;
  changed.Set("causal", false);
  changed.Set("window", int64_t{-1});
  Original<T>()(changed, operands, results);
}

template <typename T>
void WithoutWindow(const Attrs& attrs, Operands<T> operands, Results<T> results) {
  Attrs changed = attrs;
  changed.Set("window", int64_t{-1});
  Original<T>()(changed, operands, results);
}

template <typename T>
void WithoutScale(const Attrs& attrs, Operands<T> operands, Results<T> results) {
  Attrs changed = attrs;
  changed.Set("scale", 1.0);
  Original<T>()(changed, operands, results);
}

// Ignored labels count as token 0.
template <typename T>
void WithoutIgnoredLabels(const Attrs& attrs, Operands<T> operands, Results<T> results) {
  std::vector<HostTensor<T>> copies;
  for (const HostTensor<T>* operand : operands) {
    copies.push_back(*operand);
    for (int32_t& value : copies.back().ints) value = std::max(value, 0);
  }
  std::vector<const HostTensor<T>*> pointers;
  for (const HostTensor<T>& copy : copies) pointers.push_back(&copy);
  Original<T>()(attrs, pointers, results);
}

template <typename F32, typename F64>
Reference MakeReference(F32 f32, F64 f64) {
  Reference reference;
  reference.f32 = f32;
  reference.f64 = f64;
  return reference;
}

// The most operands that a sample has.
size_t MostOperands(const OpDef& op) {
  size_t most = 0;
  for (const Prepared& p : PrepareSamples(op)) most = std::max(most, p.operands.size());
  return most;
}

bool HasKernel(const OpDef& op) { return absl::c_linear_search(OpsWithKernels(), &op); }

// Whether some sample changes if `mutant` replaces the in-place pairs.
bool ChangesPairs(const Mutant& mutant) {
  planted = mutant.planted;
  planted.original = mutant.original;
  for (const Prepared& p : PrepareSamples(mutant.row)) {
    const auto allowed = InPlacePairs(*mutant.original, p.operand_types, p.result_types, p.attrs);
    for (const auto& pair : ShiftedInPlace(p.operand_types, p.result_types, p.attrs)) {
      if (!absl::c_linear_search(allowed, pair)) return true;
    }
  }
  return false;
}

void AddGradients(std::deque<Mutant>& mutants) {
  for (const OpDef* op : AllOps()) {
    if (op->grad == nullptr) continue;
    // The operands that get a gradient in some sample.
    std::set<size_t> differentiable;
    for (const Prepared& p : PrepareSamples(*op)) {
      Graph graph("g");
      Builder builder(graph);
      std::vector<Value> operands;
      for (size_t i = 0; i < p.operand_types.size(); ++i) {
        operands.push_back(builder.Input(absl::StrCat("x", i), p.operand_types[i], Role::kData));
      }
      const absl::StatusOr<Node*> node = graph.AddNode(*op, operands, p.attrs, "node");
      ASSERT_OK(node);
      std::vector<Value> dys(p.result_types.size());
      dys[0] = builder.Input("dy", p.result_types[0], Role::kData);
      const absl::StatusOr<std::vector<Value>> grads = AddBackward(graph, builder, **node, dys);
      ASSERT_OK(grads);
      for (size_t i = 0; i < grads->size(); ++i) {
        if ((*grads)[i]) differentiable.insert(i);
      }
    }
    EXPECT_FALSE(differentiable.empty()) << op->name;
    for (const size_t operand : differentiable) {
      for (const bool negated : {true, false}) {
        Mutant& mutant = mutants.emplace_back();
        mutant = {.name = absl::StrCat(op->name, ": gradient of operand ", operand, negated ? " negated" : " dropped"),
                  .original = op,
                  .row = *op,
                  .checks = {kGradient}};
        mutant.row.grad = negated ? NegatedGrad : DroppedGrad;
        mutant.planted.operand = operand;
      }
    }
  }
}

void AddDerivatives(std::deque<Mutant>& mutants) {
  for (const OpDef* op : AllOps()) {
    if (!op->is_element_wise()) continue;
    for (size_t i = 0; i < op->operands.size(); ++i) {
      const DerivedOp* derived = FindDerivative(*op, static_cast<int>(i));
      if (derived == nullptr || derived->is_identity) continue;  // No node is made of it.
      if (absl::StrContains(op->name, ".grad")) continue;
      Mutant& mutant = mutants.emplace_back();
      mutant = {.name = absl::StrCat(derived->op->name, ": derivative negated"),
                .original = derived->op,
                .row = *derived->op,
                .checked = op,
                .checks = {kGradient}};
      mutant.row.expr = [expr = derived->op->expr](const Attrs& attrs) {
        std::vector<Expr> exprs = expr(attrs);
        exprs[0] = -exprs[0];
        return exprs;
      };
    }
  }
}

// Pairs that a row does not declare and that change nothing where the types allow them.
bool IsHarmless(absl::string_view op, std::pair<int, int> pair) {
  // All of the one operand is taken: a copy.
  if (op == "slice" || op == "concat") return pair == std::pair(0, 0);
  // The sums are written after gamma (beside which nothing has their type) was read for the last time.
  if (op == "layer_norm_backward" || op == "rms_norm_backward") return pair.first > 0 && pair.second == 2;
  // A block of q (forward) is read for the last time before the result's same block is written; backward, a head's out
  // before its first result, and a block of k and v, which is packed, before its dk and dv.
  if (op == "flash_attention") return pair == std::pair(0, 0);
  if (op == "flash_attention_backward") return pair.second == 4 || (pair.first > 0 && pair.second >= 2);
  // Their types are equal where a cache has one position: a head reads all of it before it writes.
  if (op == "cached_attention") return pair.first == 0 || pair.second < 3;
  // One number, written at the end.
  if (op == "chunked_loss_grad" || op == "chunked_loss_bias_grad") return pair == std::pair(2, 3);
  // Numbers are read before any is written.
  if (op == "adam_step") return pair.first > 0 && pair.second == 3;
  if (op == "loss_scale_step") return pair.second == 2 || pair == std::pair(2, 0);
  // A block is read before it is written; in a skipped step the later result is copied last.
  if (op == "adamw8bit") return pair == std::pair(0, 5) || pair == std::pair(2, 1) || pair == std::pair(4, 3);
  return op == "global_norm";
}

// Samples whose results have the type of an operand where the row's own samples have none.
std::vector<OpSample> MoreSamples(const OpDef& op) {
  const SampleOperand square = {.type = {DType::kF32, {72, 72}}};
  // More than is packed at one time.
  const SampleOperand large = {.type = {DType::kF32, {520, 520}}};
  const SampleOperand long_head = {.type = {DType::kF32, {1, 1, 1200, 8}}},
                      of_rows = {.type = {DType::kF32, {1, 1, 1200}}};
  const Attrs attention = {{"scale", 0.5},      {"causal", false}, {"window", int64_t{-1}}, {"rate", 0.0},
                           {"key", int64_t{1}}, {"rng", false},    {"tf32", false}};
  if (op.name == "matmul") return {{.operands = {square, square}}, {.operands = {large, large}}};
  if (op.name == "flash_attention") return {{.operands = {long_head, long_head, long_head}, .attrs = attention}};
  if (op.name == "flash_attention_backward") {
    return {{.operands = {long_head, long_head, long_head, long_head, long_head, of_rows}, .attrs = attention}};
  }
  if (op.name == "transpose") return {{.operands = {square}, .attrs = {{"perm", IntList{1, 0}}}}};
  return {};
}

void AddInPlace(std::deque<Mutant>& mutants) {
  for (const OpDef* op : AllOps()) {
    if (!HasKernel(*op)) continue;
    OpDef wider = *op;
    wider.samples = [op] {
      std::vector<OpSample> samples = op->samples();
      for (OpSample& more : MoreSamples(*op)) samples.push_back(std::move(more));
      return samples;
    };
    std::set<std::pair<int, int>> pairs, same_type;
    for (const Prepared& p : PrepareSamples(wider)) {
      for (const auto& pair : InPlacePairs(*op, p.operand_types, p.result_types, p.attrs)) pairs.insert(pair);
      for (size_t r = 0; r < p.result_types.size(); ++r) {
        for (size_t o = 0; o < p.operand_types.size(); ++o) {
          if (p.result_types[r] == p.operand_types[o]) same_type.emplace(static_cast<int>(r), static_cast<int>(o));
        }
      }
    }
    const auto add = [&](std::string name, std::pair<int, int> from, std::pair<int, int> to) {
      Mutant mutant = {.name = absl::StrCat(op->name, ": ", name),
                       .original = op,
                       .row = wider,
                       .checks = {kFits, kBits},
                       .planted = {.from = from, .to = to}};
      mutant.row.in_place = ShiftedInPlace;
      if (ChangesPairs(mutant)) mutants.push_back(std::move(mutant));
    };
    const int operands = static_cast<int>(MostOperands(*op));
    for (const auto& [result, operand] : pairs) {
      for (int other = 0; other < operands; ++other) {
        if (other == operand || IsHarmless(op->name, {result, other})) continue;
        add(absl::StrCat("result ", result, " in place of operand ", other, " instead of ", operand), {result, operand},
            {result, other});
      }
    }
    for (const auto& pair : same_type) {
      if (IsHarmless(op->name, pair)) continue;
      add(absl::StrCat("result ", pair.first, " in place of operand ", pair.second, " declared besides"), pair, pair);
    }
  }
}

void AddReferences(std::deque<Mutant>& mutants) {
  const auto add = [&](absl::string_view op_name, absl::string_view bug, Reference reference) {
    const OpDef* op = FindOp(op_name);
    ASSERT_NE(op, nullptr) << op_name;
    Mutant& mutant = mutants.emplace_back();
    mutant = {.name = absl::StrCat(op_name, ": ", bug),
              .original = op,
              .row = *op,
              .checks = {kReference, kGradient, kBackend}};
    if (!IsDifferentiable(*op)) mutant.checks = {kReference, kBackend};
    mutant.row.reference = reference;
  };
  for (const char* op : {"softmax", "softmax_backward"}) {
    add(op, "causal mask dropped", MakeReference(WithoutCausalMask<float>, WithoutCausalMask<double>));
    add(op, "window dropped", MakeReference(WithoutWindow<float>, WithoutWindow<double>));
    add(op, "scale dropped", MakeReference(WithoutScale<float>, WithoutScale<double>));
  }
  for (const char* op : {"softmax_cross_entropy", "softmax_cross_entropy_backward", "chunked_loss", "chunked_loss_grad",
                         "chunked_loss_bias_grad", "count_labels"}) {
    add(op, "ignored labels are not ignored", MakeReference(WithoutIgnoredLabels<float>, WithoutIgnoredLabels<double>));
  }
  const OpDef* dropout = FindOp("dropout");
  ASSERT_NE(dropout, nullptr);
  Mutant& mutant = mutants.emplace_back();
  mutant = {.name = "dropout: 1 / (1 - rate) dropped", .original = dropout, .row = *dropout, .checks = {kGradient}};
  mutant.row.expr = [expr = dropout->expr](const Attrs& attrs) {
    std::vector<Expr> exprs = expr(attrs);
    exprs[0] = exprs[0] * (1 - attrs.Double("rate"));
    return exprs;
  };
}

void AddCosts(std::deque<Mutant>& mutants) {
  for (const OpDef* op : AllOps()) {
    if (op->is_view || op->effect != Effect::kNone) continue;
    const auto add = [&](absl::string_view bug, int64_t read, int64_t written) {
      Mutant& mutant = mutants.emplace_back();
      mutant = {.name = absl::StrCat(op->name, ": ", bug),
                .original = op,
                .row = *op,
                .checks = {kCost},
                .planted = {.read = read, .written = written}};
      mutant.row.cost = WrongCost;
    };
    add("one byte more written", 0, 1);
    // What is read in part has bounds only, and nothing to be exact about.
    if (!kPartialReaders.contains(op->name)) add("one byte more read", 1, 0);
  }
}

void AddInfers(std::deque<Mutant>& mutants) {
  for (const OpDef* op : AllOps()) {
    if (!HasKernel(*op)) continue;
    Mutant& mutant = mutants.emplace_back();
    mutant = {.name = absl::StrCat(op->name, ": last dimension of result 0 one more"),
              .original = op,
              .row = *op,
              .checks = {kDims, kReference, kFits},
              .isolate = true};
    if (IsDifferentiable(*op)) mutant.checks.push_back(kGradient);
    mutant.checks.push_back(kBackend);
    mutant.row.infer = [infer = op->infer](absl::Span<const TensorType> operands,
                                           const Attrs& attrs) -> absl::StatusOr<std::vector<TensorType>> {
      ASSIGN_OR_RETURN(std::vector<TensorType> results, infer(operands, attrs));
      if (results[0].dims.empty()) {
        results[0].dims.push_back(2);
      } else {
        ++results[0].dims.back();
      }
      return results;
    };
  }
}

void RunAll(void (*add)(std::deque<Mutant>&), int least) {
  std::deque<Mutant> mutants;
  add(mutants);
  ASSERT_GE(static_cast<int>(mutants.size()), least);
  std::map<std::string, int> by_check;
  int run = 0;
  for (size_t i = 0; i < mutants.size(); ++i) {
    if (!all_mutants && i % 8 != 0) continue;
    ++run;
    const std::string killer = Killer(mutants[i]);
    if (killer.empty()) {
      ADD_FAILURE() << "survived: " << mutants[i].name;
      continue;
    }
    ++by_check[killer];
    if (all_mutants) std::printf("killed by %s: %s\n", killer.c_str(), mutants[i].name.c_str());
  }
  std::printf("%d of %zu mutants run", run, mutants.size());
  for (const auto& [check, count] : by_check) std::printf("; %d killed by %s", count, check.c_str());
  std::printf("\n");
}

// What kills mutants must leave the rows themselves alone.
TEST(Mutants, TheRowsThemselvesSurvive) {
  for (const char* name : {"matmul", "gelu", "softmax", "layer_norm"}) {
    const OpDef* op = FindOp(name);
    const Mutant copy = {.name = name,
                         .original = op,
                         .row = *op,
                         .checks = {kDims, kReference, kCost, kFits, kGradient, kBackend, kBits}};
    EXPECT_EQ(Killer(copy), "") << name;
    Mutant isolated = copy;
    isolated.isolate = true;
    EXPECT_EQ(Killer(isolated), "") << name;
  }
}

TEST(Mutants, NegatedAndDroppedGradients) { RunAll(AddGradients, 40); }
TEST(Mutants, NegatedDerivatives) { RunAll(AddDerivatives, 15); }
TEST(Mutants, ShiftedInPlacePairs) { RunAll(AddInPlace, 20); }
TEST(Mutants, DroppedMasksAndScales) { RunAll(AddReferences, 9); }
TEST(Mutants, WrongCosts) { RunAll(AddCosts, 40); }
TEST(Mutants, WrongShapes) { RunAll(AddInfers, 20); }

}  // namespace

void RunAllMutants() { all_mutants = true; }

}  // namespace mt

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--mutate") != 0) {
      std::fprintf(stderr, "unknown argument %s; known: --mutate\n", argv[i]);
      return 2;
    }
    mt::RunAllMutants();
  }
  return RUN_ALL_TESTS();
}
