// Random valid graphs and inputs for property tests: the same seed gives the same graph on every machine.
#ifndef MT_TESTS_RANDOM_GRAPH_H_
#define MT_TESTS_RANDOM_GRAPH_H_

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/builder.h"
#include "ir/evaluator.h"
#include "ir/graph.h"

namespace mt {

struct RandomGraphOptions {
  int64_t nodes = 16;         // About; the sum of the loss comes on top.
  bool low_precision = true;  // Casts to bf16 and back in between.
  bool dropout = true;
};

namespace internal {

class RandomGraphMaker {
 public:
  RandomGraphMaker(uint64_t seed, const RandomGraphOptions& options, Graph& graph)
      : random_(seed), options_(options), builder_(graph) {}

  void Make() {
    values_.push_back(builder_.Input("x", {DType::kF32, {Size(), Size()}}, Role::kData));
    values_.push_back(builder_.Input("x2", values_[0].type(), Role::kData));
    if (options_.dropout) rng_ = builder_.Input("rng", {DType::kI32, {4}}, Role::kStep);
    for (int64_t i = 0; i < options_.nodes; ++i) {
      Builder::Scope scope(builder_, absl::StrCat("block", i / 4));
      const Value value = Step(i);
      if (value) values_.push_back(value);
    }
    // The mean of everything that nobody reads, so that every node matters.
    Value loss;
    for (const Value& value : values_) {
      if (!value.node->uses().empty()) continue;
      IntList all;
      for (int64_t d = 0; d < value.type().rank(); ++d) all.push_back(d);
      Value part = builder_.Cast(value, DType::kF32);
      if (!all.empty()) part = builder_.Op("reduce_mean", {part}, {{"dims", all}});
      loss = loss ? builder_.Add(loss, part) : part;
    }
    CHECK(builder_.status().ok()) << builder_.status();
    builder_.graph().AddOutput(loss, "loss");
  }

 private:
  int64_t Below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  int64_t Size() { return 2 + Below(5); }
  Value Any() { return values_[static_cast<size_t>(Below(static_cast<int64_t>(values_.size())))]; }
  Value Parameter(DType dtype, Dims dims) {
    const Value weight =
        builder_.Input(absl::StrCat("w", parameters_++, ".weight"), {DType::kF32, std::move(dims)}, Role::kParameter);
    return builder_.Cast(weight, dtype);
  }
  // Another value of the same type, or a parameter that broadcasts to it.
  Value Partner(const Value& x) {
    std::vector<Value> same;
    for (const Value& value : values_) {
      if (value != x && value.type() == x.type()) same.push_back(value);
    }
    if (!same.empty() && Below(3) > 0) return same[static_cast<size_t>(Below(static_cast<int64_t>(same.size())))];
    Dims dims = x.type().dims;
    if (!dims.empty() && Below(2) == 0) dims.erase(dims.begin());
    if (!dims.empty() && Below(3) == 0) dims[0] = 1;
    return Parameter(x.type().dtype, dims);
  }

  Value Step(int64_t i) {
    const Value x = Any();
    const TensorType& type = x.type();
    const int64_t rank = type.rank();
    const std::string name = absl::StrCat("n", i);
    switch (Below(10)) {
      case 0:
      case 1: {
        static constexpr absl::string_view kUnary[] = {"neg", "tanh", "gelu", "silu", "abs", "relu"};
        return builder_.Op(kUnary[Below(6)], {x}, {}, name);
      }
      case 2:
      case 3: {
        static constexpr absl::string_view kBinary[] = {"add", "sub", "mul", "maximum"};
        return builder_.Op(kBinary[Below(4)], {x, Partner(x)}, {}, name);
      }
      case 4:
        if (rank < 2) return builder_.Op("scale", {x}, {{"factor", 0.75}}, name);
        return builder_.Op("matmul", {x, Parameter(type.dtype, {type.dim(-1), Size()})}, {}, name);
      case 5: {
        if (rank < 2) return builder_.Reshape(x, {1, type.num_elements()});
        if (Below(2) == 0) return builder_.Reshape(x, {type.num_elements()});
        IntList perm(static_cast<size_t>(rank));
        for (int64_t d = 0; d < rank; ++d) perm[static_cast<size_t>(d)] = rank - 1 - d;
        return builder_.Op("transpose", {x}, {{"perm", perm}}, name);
      }
      case 6: {
        if (rank < 2) return {};
        const bool keep = Below(2) == 0;
        return builder_.Op(Below(2) == 0 ? "reduce_sum" : "reduce_mean", {x},
                           {{"dims", IntList{Below(rank)}}, {"keep_dims", keep}}, name);
      }
      case 7:
        if (!options_.low_precision) return builder_.Op("tanh", {x}, {}, name);
        return builder_.Op("cast", {x}, {{"to", type.dtype == DType::kF32 ? DType::kBF16 : DType::kF32}}, name);
      case 8: {
        if (rank < 2) return {};
        const Value gamma = Parameter(DType::kF32, {type.dim(-1)});
        return builder_.Op("rms_norm", {x, gamma}, {}, name);
      }
      default:
        if (!options_.dropout || rank == 0) return {};
        return builder_.Op("dropout", {x, rng_}, {{"rate", 0.25}, {"key", int64_t{100} + i}}, name);
    }
  }

  std::mt19937_64 random_;
  const RandomGraphOptions options_;
  Builder builder_;
  Value rng_;
  std::vector<Value> values_;
  int64_t parameters_ = 0;
};

}  // namespace internal

// A valid graph at stage forward with an output "loss" f32[]: element-wise ops with broadcasting, matmuls, reshapes,
// reductions, norms, dropout. Inputs: "x", "x2" (data), "rng" (step) and parameters "wN.weight".
inline std::unique_ptr<Graph> RandomGraph(uint64_t seed, const RandomGraphOptions& options = {},
                                          absl::string_view name = "train") {
  auto graph = std::make_unique<Graph>(std::string(name));
  internal::RandomGraphMaker(seed, options, *graph).Make();
  return graph;
}

// RandomGraph as the program "train" of a module with its table of states.
inline std::unique_ptr<Module> RandomModule(uint64_t seed, const RandomGraphOptions& options = {}) {
  auto module = std::make_unique<Module>(absl::StrCat("random", seed));
  std::unique_ptr<Graph> graph = RandomGraph(seed, options);
  for (const Node* input : graph->inputs()) {
    if (!IsState(input->role())) continue;
    CHECK(module
              ->AddState({.name = input->name(),
                          .type = input->result().type(),
                          .role = input->role(),
                          .init = {.kind = Init::Kind::kNormal, .stddev = 0.5}})
              .ok());
  }
  module->facts()["seed"] = static_cast<int64_t>(seed);
  module->AddGraph(std::move(graph));
  return module;
}

// Contents for every input of a graph: floats standard normal, "rng" a random state, integers 0..2. By input name, so
// that graphs made from one another get the same values.
template <typename T>
std::map<std::string, HostTensor<T>> RandomInputs(const Graph& graph, uint64_t seed) {
  std::map<std::string, HostTensor<T>> inputs;
  for (const Node* input : graph.inputs()) {
    SampleOperand sample{.type = input->result().type()};
    if (input->name() == "rng") {
      sample.fill = SampleOperand::Fill::kRandomState;
    } else if (!IsFloat(sample.type.dtype)) {
      sample.fill = SampleOperand::Fill::kIds;
      sample.limit = 3;
    }
    inputs[input->name()] = FillSample<T>(sample, {}, seed ^ Fnv1a(input->name()));
  }
  return inputs;
}

}  // namespace mt

#endif  // MT_TESTS_RANDOM_GRAPH_H_
