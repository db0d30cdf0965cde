// Small modules of every kind, and inputs for their graphs: what passes are tested on.
#ifndef MT_TESTS_SMALL_MODULES_H_
#define MT_TESTS_SMALL_MODULES_H_

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "google/protobuf/text_format.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/evaluator.h"
#include "ir/graph.h"
#include "ir/text.h"
#include "models/model.h"

namespace mt {

// A two-layer perceptron with biases of every kind of broadcast.
inline constexpr absl::string_view kPerceptron = R"(
module @mlp {
  state "fc1.weight": f32[6,8] parameter init=normal(0.3)
  state "fc1.bias": f32[8] parameter
  state "gain": f32[4,1] parameter init=ones
  state "fc2.weight": f32[5,8] parameter init=normal(0.3)
}
graph @train stage=forward {
  input %x: f32[4,6] data
  input %labels: i32[4] data
  input %fc1.weight: f32[6,8] parameter
  input %fc1.bias: f32[8] parameter
  input %gain: f32[4,1] parameter
  input %fc2.weight: f32[5,8] parameter
  %0: f32[4,8] = matmul(%x, %fc1.weight) "fc1"
  %1: f32[4,8] = add(%0, %fc1.bias) "fc1.bias"
  %2: f32[4,8] = gelu(%1) "act"
  %3: f32[4,8] = mul(%2, %gain) "gain"
  %4: f32[4,8] = add(%3, %1) "skip"
  %5: f32[4,5] = matmul(%4, %fc2.weight) {transpose_b=true} "fc2"
  %6: f32[], %7: f32[], %8: f32[4] = softmax_cross_entropy(%5, %labels) "loss"
  %9: f32[] = div(%6, %7) "loss.mean"
  output "loss" %9
}
)";

// The text is the test's own: it must parse.
inline std::unique_ptr<Module> MustParse(absl::string_view text) {
  absl::StatusOr<std::unique_ptr<Module>> module = ParseModule(text);
  CHECK(module.ok()) << module.status();
  return *std::move(module);
}

// A transformer; `fields` is ModelSpec text that comes after the defaults.
inline std::unique_ptr<Module> SmallTransformer(const std::string& fields, int64_t batch = 2, int64_t sequence = 5) {
  proto::ModelSpec spec;
  const std::string defaults =
      "name: \"small\" layers: 2 width: 12 heads: 2 ffn_width: 16 vocab_size: 11 max_sequence: 7 init_stddev: 0.3 ";
  CHECK(google::protobuf::TextFormat::ParseFromString(defaults, &spec));
  CHECK(google::protobuf::TextFormat::MergeFromString(fields, &spec)) << fields;
  absl::StatusOr<std::unique_ptr<Module>> module = BuildTransformer(spec, batch, sequence);
  CHECK(module.ok()) << module.status();
  return *std::move(module);
}

struct SmallModule {
  std::string name;
  std::unique_ptr<Module> module;  // At stage forward.
};

inline std::vector<SmallModule> SmallModules() {
  std::vector<SmallModule> modules;
  modules.push_back({"perceptron", MustParse(kPerceptron)});
  modules.push_back({"gpt", SmallTransformer("tied_head: true attention_bias: true mlp_bias: true norm_bias: true "
                                             "dropout: 0.2")});
  modules.push_back({"post", SmallTransformer("norm_placement: POST positions: SINUSOIDAL activation: RELU "
                                              "norm_bias: true dropout: 0.1 attention_window: 2")});
  modules.push_back({"llama", SmallTransformer("norm: RMS_NORM positions: ROTARY activation: SWIGLU kv_heads: 1")});
  return modules;
}

// Contents for one input, from its name, type and role alone. Floats are normal (scaled down for parameters; positive
// for second moments), tokens and labels are ids below `vocab`, "order" sorts the tokens.
template <typename T>
std::map<std::string, HostTensor<T>> MakeInputs(const Graph& graph, int64_t vocab, uint64_t seed) {
  using Fill = SampleOperand::Fill;
  std::map<std::string, HostTensor<T>> inputs;
  const std::map<std::string, double> scalars = {{"lr", 0.01},  {"beta1", 0.9},        {"beta2", 0.95},
                                                 {"eps", 1e-8}, {"weight_decay", 0.1}, {"grad_clip", 0.5}};
  for (const Node* input : graph.inputs()) {
    const TensorType& type = input->result().type();
    const std::string& name = input->name();
    SampleOperand sample{.type = type};
    HostTensor<T> tensor;
    if (const auto scalar = scalars.find(name); scalar != scalars.end()) {
      tensor = MakeHostTensor<T>(type);
      tensor.values[0] = static_cast<T>(scalar->second);
    } else if (name == "order") {
      std::vector<HostTensor<T>> tokens = {inputs.at("tokens")};
      sample.fill = Fill::kOrder;
      tensor = FillSample<T>(sample, tokens, seed);
    } else {
      if (name == "rng") sample.fill = Fill::kRandomState;
      if (name == "tokens" || name == "labels" || name == "position") sample.fill = Fill::kIds;
      if (input->role() == Role::kOptimizerState) sample.fill = IsFloat(type.dtype) ? Fill::kPositive : Fill::kStep;
      constexpr int64_t kPositions = 4;  // All that a sequence of 5 has but the last.
      sample.limit = name == "labels" ? -vocab : name == "position" ? kPositions : vocab;
      tensor = FillSample<T>(sample, {}, Fnv1a(name, seed + 1));
      if (input->role() == Role::kParameter) {
        for (T& value : tensor.values) value *= T{0.5};
      }
    }
    inputs.emplace(name, std::move(tensor));
  }
  return inputs;
}

}  // namespace mt

#endif  // MT_TESTS_SMALL_MODULES_H_
