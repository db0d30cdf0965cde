// Gradients summed over microbatches.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "passes/registry.h"
#include "passes/states.h"

namespace mt {
namespace {

// The loss as a quotient whose denominator has no gradient: a sum over tokens, and how many they are.
struct MeanLoss {
  Value mean, sum, count;
};

bool DependsOnParameter(const Node* node) {
  absl::flat_hash_set<const Node*> seen = {node};
  std::vector<const Node*> todo = {node};
  while (!todo.empty()) {
    const Node* at = todo.back();
    todo.pop_back();
    if (at->is_input() && at->role() == Role::kParameter) return true;
    for (const Value& operand : at->operands()) {
      if (seen.insert(operand.node).second) todo.push_back(operand.node);
    }
  }
  return false;
}

absl::StatusOr<MeanLoss> FindMeanLoss(const Graph& train) {
  const Output* loss = train.FindOutput("loss");
  if (loss == nullptr) return absl::InvalidArgumentError("graph @train has no output \"loss\"");
  const Node& node = *loss->value.node;
  const std::string found =
      node.is_input() ? absl::StrCat("input %", node.name()) : absl::StrCat(node.op().name, " \"", node.name(), "\"");
  if (node.is_input() || node.op().name != "div") {
    return absl::InvalidArgumentError(
        absl::StrCat("output \"loss\" is ", found,
                     "; microbatches are summed before they are divided by the number of tokens, so it must be "
                     "div(loss_sum, count)"));
  }
  const MeanLoss mean = {.mean = loss->value, .sum = node.operands()[0], .count = node.operands()[1]};
  const TensorType scalar = {DType::kF32, {}};
  for (const Value& value : {mean.sum, mean.count}) {
    if (value.type() == scalar) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("output \"loss\" is ", found, " with an operand ", value.type().ToString(), "; it must be f32[]"));
  }
  const Node& counter = *mean.count.node;
  const bool counts = !counter.is_input() && counter.op().results[static_cast<size_t>(mean.count.index)] == "count";
  if (!counts && DependsOnParameter(&counter)) {
    return absl::InvalidArgumentError(absl::StrCat("output \"loss\" is ", found,
                                                   " over a denominator that depends on a parameter; it must be a "
                                                   "number of tokens"));
  }
  return mean;
}

bool Applies(const Module& module) {
  const Graph* train = module.FindGraph("train");
  return train != nullptr && FindMeanLoss(*train).ok();
}

// Autodiff is to differentiate the sum, not the mean: of what it would differentiate, every read of the mean.
absl::Status SeedWithSum(Graph& train, const MeanLoss& loss) {
  const Output* scaled = train.FindOutput(kScaledLossOutput);
  if (scaled == nullptr) {
    train.AddOutput(loss.sum, kScaledLossOutput);
    return absl::OkStatus();
  }
  if (scaled->value == loss.mean) {
    std::vector<Output> outputs = train.outputs();
    for (Output& output : outputs) {
      if (output.name == kScaledLossOutput) output.value = loss.sum;
    }
    train.SetOutputs(std::move(outputs));
    return absl::OkStatus();
  }
  absl::flat_hash_set<const Node*> behind = {scaled->value.node};
  std::vector<const Node*> todo = {scaled->value.node};
  while (!todo.empty()) {
    const Node* at = todo.back();
    todo.pop_back();
    for (const Value& operand : at->operands()) {
      if (operand != loss.mean && behind.insert(operand.node).second) todo.push_back(operand.node);
    }
  }
  const std::vector<Use> uses(loss.mean.node->uses().begin(), loss.mean.node->uses().end());
  for (const Use& use : uses) {
    if (behind.contains(use.node)) train.SetOperand(use.node, use.operand, loss.sum);
  }
  return absl::OkStatus();
}

// The largest power of two up to x, from 1 to 2^24.
double PowerOfTwo(double x) {
  double power = 1;
  while (power * 2 <= std::min(x, 0x1p24)) power *= 2;
  return power;
}

absl::StatusOr<Value> AddSum(Module& module, Graph& train, absl::string_view name, const Dims& dims,
                             const Dims& logical_dims) {
  return AddState(
      module, train,
      {.name = std::string(name), .type = {DType::kF32, dims}, .logical_dims = logical_dims, .role = Role::kGradient});
}

absl::StatusOr<bool> Accumulate(Module& module, const Attrs& options, PassContext&) {
  const int64_t microbatches = options.Int("microbatches");
  Graph& train = *module.FindGraph("train");
  ASSIGN_OR_RETURN(MeanLoss loss, FindMeanLoss(train));
  Builder builder(train);
  if (train.FindOutput(kScaledLossOutput) != nullptr) {
    // Gradients of a narrow dtype keep the range that they have in one large batch: sum and count are divided by the
    // power of two below its number of tokens, which is exact and cancels.
    const double unit = PowerOfTwo(static_cast<double>(module.fact("batch")) *
                                   static_cast<double>(module.fact("sequence", 1)) * static_cast<double>(microbatches));
    loss.sum = builder.Op("scale", {loss.sum}, {{"factor", 1 / unit}}, "loss.sum");
    loss.count = builder.Op("scale", {loss.count}, {{"factor", 1 / unit}}, "loss.count");
    RETURN_IF_ERROR(builder.status());
  }
  RETURN_IF_ERROR(SeedWithSum(train, loss));
  for (const auto& [name, value] : {std::pair(kAccumulatedLoss, loss.sum), std::pair(kAccumulatedTokens, loss.count)}) {
    ASSIGN_OR_RETURN(const Value sum, AddSum(module, train, name, {}, {}));
    const Value next = builder.Op("add", {sum, value}, {}, name);
    RETURN_IF_ERROR(builder.status());
    train.AddOutput(next, name, sum.node);
  }
  const std::vector<State> states = module.states();  // Adding states moves the table.
  for (const State& state : states) {
    if (state.role != Role::kParameter || train.FindInput(state.name) == nullptr) continue;
    RETURN_IF_ERROR(
        AddSum(module, train, absl::StrCat(kGradientPrefix, state.name), state.type.dims, state.logical_dims).status());
  }
  const int64_t batch = module.fact("batch");
  const std::optional<int64_t> whole = CheckedMultiply(batch, microbatches);
  if (!whole) {
    return absl::InvalidArgumentError(
        absl::StrCat(microbatches, " microbatches of ", batch, " are too many; give a smaller number"));
  }
  if (batch != 0) module.facts()["batch"] = *whole;
  module.facts()[std::string(kMicrobatchesFact)] = microbatches;
  return true;
}

constexpr PassOption kOptions[] = {
    {.name = "microbatches", .kind = AttrKind::kInt, .doc = "how many make up a batch; must divide it", .min = 1},
};
constexpr absl::string_view kAlsoKnownAs[] = {"gradient_accumulation", "gradient_accumulation_steps", "grad_accum",
                                              "accumulation", "microbatches"};

}  // namespace

const PassDef kAccumulatePass = {
    .name = "accumulate",
    .summary =
        "Graph @train takes one of N microbatches and adds its gradients to states in f32; graph @apply divides "
        "them once by the step's tokens, clips and updates. Sums in another order than one large batch.",
    .options = kOptions,
    .source = "Huang et al., \"GPipe\" (2019), section 2.2: micro-batches",
    .also_known_as = kAlsoKnownAs,
    .applies = Applies,
    .run = Accumulate,
};

}  // namespace mt
