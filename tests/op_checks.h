// What conformance checks of one op row, as functions that fail like tests: the table passes them, mutants must not.
#ifndef MT_TESTS_OP_CHECKS_H_
#define MT_TESTS_OP_CHECKS_H_

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/resources.h"
#include "ir/builder.h"
#include "ir/evaluator.h"
#include "ir/graph.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/text.h"
#include "runtime/backend.h"
#include "tests/test_util.h"

namespace mt {

// A row that stands in for a registered one of the same name while checks run: a mutant.
struct Substitution {
  const OpDef* registered = nullptr;
  const OpDef* mutant = nullptr;
};
inline Substitution& CurrentSubstitution() {
  static Substitution substitution;
  return substitution;
}
inline const OpDef& RowToUse(const OpDef& op) {
  return &op == CurrentSubstitution().registered ? *CurrentSubstitution().mutant : op;
}
inline const OpDef& RegisteredRow(const OpDef& op) {
  return &op == CurrentSubstitution().mutant ? *CurrentSubstitution().registered : op;
}

// A sample with its types inferred and its operands filled.
struct Prepared {
  const OpDef* op;
  Attrs attrs;
  std::vector<TensorType> operand_types, result_types;
  std::vector<HostTensor<double>> operands;
  std::string what;  // For messages: "softmax #2 (f32[2,3]) {causal=true}".

  std::vector<const HostTensor<double>*> OperandPointers() const {
    std::vector<const HostTensor<double>*> pointers;
    for (const HostTensor<double>& operand : operands) pointers.push_back(&operand);
    return pointers;
  }
};

inline std::vector<Prepared> PrepareSamples(const OpDef& op) {
  std::vector<Prepared> all;
  if (op.samples == nullptr) return all;
  for (const OpSample& sample : op.samples()) {
    Prepared p{.op = &op, .attrs = sample.attrs, .operand_types = {}, .result_types = {}, .operands = {}, .what = {}};
    for (const SampleOperand& operand : sample.operands) {
      const uint64_t seed = 1000 * all.size() + p.operands.size() + 1;
      p.operand_types.push_back(operand.type);
      p.operands.push_back(FillSample<double>(operand, p.operands, seed));
    }
    p.what =
        absl::StrCat(op.name, " #", all.size(), " (",
                     absl::StrJoin(p.operand_types, ", ",
                                   [](std::string* out, const TensorType& t) { absl::StrAppend(out, t.ToString()); }),
                     ") ", AttrsToString(op.attrs, sample.attrs));
    absl::StatusOr<std::vector<TensorType>> types = InferTypes(op, p.operand_types, p.attrs);
    EXPECT_OK(types) << p.what;
    if (!types.ok()) continue;
    p.result_types = *types;
    all.push_back(std::move(p));
  }
  return all;
}

inline double LargestMagnitude(const std::vector<double>& values) {
  double largest = 0;
  for (const double v : values) largest = std::max(largest, std::abs(v));
  return largest;
}

// The sample as a graph: inputs x0..., one node, every result an output y0....
inline std::unique_ptr<Graph> OneNodeGraph(const Prepared& p) {
  auto graph = std::make_unique<Graph>("g");
  Builder builder(*graph);
  std::vector<Value> operands;
  for (size_t i = 0; i < p.operand_types.size(); ++i) {
    operands.push_back(builder.Input(absl::StrCat("x", i), p.operand_types[i], Role::kData));
  }
  const std::vector<Value> results = builder.Ops(p.op->name, operands, p.attrs, "node");
  EXPECT_OK(builder.status()) << p.what;
  for (size_t i = 0; i < results.size(); ++i) graph->AddOutput(results[i], absl::StrCat("y", i));
  return graph;
}

inline void CheckRowIsComplete(const OpDef& op) {
  EXPECT_FALSE(op.summary.empty());
  EXPECT_TRUE(op.infer != nullptr);
  EXPECT_FALSE(op.results.empty());
  EXPECT_EQ(FindOp(op.name), &op);
  if (op.effect == Effect::kNone) {
    EXPECT_TRUE(op.is_element_wise() || (op.reference.f32 != nullptr && op.reference.f64 != nullptr));
    EXPECT_TRUE(op.samples != nullptr && !op.samples().empty());
  }
  EXPECT_FALSE(op.is_element_wise() && (op.grad != nullptr || op.reference.f64 != nullptr))
      << "an element-wise row is its expression";
  for (const AttrSpec& attr : op.attrs) {
    EXPECT_FALSE(attr.doc.empty()) << attr.name;
    if (!attr.default_text.empty()) {
      EXPECT_OK(ParseAttrValue(attr.kind, attr.default_text)) << attr.name;
    }
  }
  const bool takes_accumulator = absl::c_linear_search(op.operands, "accumulator?");
  EXPECT_EQ(op.has_accumulator, takes_accumulator);
}

// The reference writes every element of every result, the two instances agree, and storage is what infer says.
inline void CheckReferenceFillsWhatInferSays(const OpDef& op) {
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    if (!absl::EndsWith(op.results.back(), "*")) {
      ASSERT_EQ(p.result_types.size(), op.results.size());
    }
    std::vector<HostTensor<float>> operands32;
    std::vector<const HostTensor<float>*> pointers32;
    for (const HostTensor<double>& operand : p.operands) {
      operands32.push_back({operand.type, {operand.values.begin(), operand.values.end()}, operand.ints});
    }
    for (const HostTensor<float>& operand : operands32) pointers32.push_back(&operand);
    ASSERT_OK_AND_ASSIGN(const auto results,
                         EvaluateOp<double>(op, p.attrs, p.OperandPointers(), p.result_types, /*round=*/false));
    ASSERT_OK_AND_ASSIGN(const auto results32,
                         EvaluateOp<float>(op, p.attrs, pointers32, p.result_types, /*round=*/false));
    ASSERT_EQ(results.size(), p.result_types.size());
    for (size_t r = 0; r < results.size(); ++r) {
      EXPECT_EQ(results[r].type, p.result_types[r]);
      const size_t n = static_cast<size_t>(p.result_types[r].num_elements());
      ASSERT_EQ(results[r].values.size() + results[r].ints.size(), n);
      EXPECT_EQ(results[r].ints, results32[r].ints);
      const double allowed = std::max(op.tolerance, 1e-6) * LargestMagnitude(results[r].values);
      for (size_t i = 0; i < results[r].values.size(); ++i) {
        ASSERT_NEAR(results[r].values[i], results32[r].values[i], allowed) << "result " << r << " element " << i;
      }
    }
    if (op.reference.f64 == nullptr) continue;
    std::vector<HostTensor<double>> poisoned;
    for (const TensorType& type : p.result_types) {
      poisoned.push_back(MakeHostTensor<double>(type));
      absl::c_fill(poisoned.back().values, std::numeric_limits<double>::quiet_NaN());
      absl::c_fill(poisoned.back().ints, -0x5A5A5A5A);
    }
    std::vector<HostTensor<double>*> pointers;
    for (HostTensor<double>& result : poisoned) pointers.push_back(&result);
    op.reference.f64(p.attrs, p.OperandPointers(), absl::MakeSpan(pointers));
    for (size_t r = 0; r < results.size(); ++r) {
      EXPECT_EQ(poisoned[r].values, results[r].values) << "result " << r;
      EXPECT_EQ(poisoned[r].ints, results[r].ints) << "result " << r;
    }
  }
}

// Shapes that follow from operands or attributes alone, said a second time: element-wise results are what the operands
// broadcast to, and "dims" of these rows is the result's.
inline void CheckResultDims(const OpDef& op) {
  const bool dims_are_stated = op.name == "fill" || op.name == "reshape" || op.name == "broadcast";
  const std::vector<OpSample> samples = op.samples == nullptr ? std::vector<OpSample>() : op.samples();
  const std::vector<Prepared> all = PrepareSamples(op);
  ASSERT_EQ(all.size(), samples.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Prepared& p = all[i];
    SCOPED_TRACE(p.what);
    if (dims_are_stated) {
      const IntList& dims = p.attrs.Get<IntList>("dims");
      EXPECT_EQ(p.result_types[0].dims, Dims(dims.begin(), dims.end()));
    }
    if (dims_are_stated || !op.is_element_wise()) continue;
    Dims dims;
    for (size_t o = 0; o < p.operand_types.size(); ++o) {
      if (samples[i].operands[o].fill == SampleOperand::Fill::kRandomState) continue;
      ASSERT_OK_AND_ASSIGN(dims, BroadcastDims(dims, p.operand_types[o].dims));
    }
    for (const TensorType& result : p.result_types) EXPECT_EQ(result.dims, dims);
  }
}

// Rows that read or write only a part of an operand or result; all others read and write exactly their operands and
// results.
inline const std::set<absl::string_view> kPartialReaders = {"embedding", "embedding_backward", "slice",
                                                            "softmax",   "softmax_backward",   "cached_attention"};

inline void CheckCostCountsOperandsAndResults(const OpDef& op) {
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    int64_t operand_bytes = 0, result_bytes = 0;
    for (const TensorType& type : p.operand_types) operand_bytes += type.byte_size();
    for (const TensorType& type : p.result_types) result_bytes += type.byte_size();
    const Cost cost = CostOf(op, p.operand_types, p.result_types, p.attrs);
    EXPECT_GE(cost.flops, 0);
    if (op.is_view) {
      EXPECT_EQ(cost.bytes_read + cost.bytes_written + cost.flops, 0);
    } else if (kPartialReaders.contains(op.name)) {
      EXPECT_LE(cost.bytes_read, operand_bytes);
      EXPECT_LE(cost.bytes_written, result_bytes);
      EXPECT_GT(cost.bytes_read, 0);
      EXPECT_GT(cost.bytes_written, 0);
    } else {
      EXPECT_EQ(cost.bytes_read, operand_bytes);
      EXPECT_EQ(cost.bytes_written, result_bytes);
    }
  }
}

inline void CheckInPlacePairsFit(const OpDef& op) {
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    for (const auto& [result, operand] : InPlacePairs(op, p.operand_types, p.result_types, p.attrs)) {
      ASSERT_TRUE(result >= 0 && result < static_cast<int>(p.result_types.size()));
      ASSERT_TRUE(operand >= 0 && operand < static_cast<int>(p.operand_types.size()));
      EXPECT_EQ(p.result_types[static_cast<size_t>(result)], p.operand_types[static_cast<size_t>(operand)]);
    }
  }
}

inline void CheckTextAndProtoRoundTrip(const OpDef& op) {
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    std::unique_ptr<Graph> graph = OneNodeGraph(p);
    const std::string text = Print(*graph);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Graph> parsed, ParseGraph(text));
    EXPECT_EQ(Print(*parsed), text);
    EXPECT_EQ(parsed->Fingerprint(), graph->Fingerprint());
    Module module("m");
    module.AddGraph(std::move(graph));
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Module> read, ModuleFromProto(ToProto(module)));
    EXPECT_EQ(Print(*read), Print(module));
    EXPECT_EQ(Print(*read->FindGraph("g")), text);
  }
}

// Gradients.

// Adds the backward of `node` for gradients dys; one value an operand, invalid: zero. Unimplemented: not
// differentiable.
inline absl::StatusOr<std::vector<Value>> AddBackward(Graph& graph, Builder& builder, const Node& node,
                                                      absl::Span<const Value> dys) {
  const OpDef& op = node.op();
  std::vector<bool> wants;
  for (size_t i = 0; i < node.operands().size(); ++i) {
    wants.push_back(IsFloat(node.operands()[i].type().dtype) &&
                    !absl::c_linear_search(op.no_grad_operands, static_cast<int>(i)));
  }
  std::vector<Value> grads(wants.size());
  if (op.grad != nullptr) {
    GradContext context{.builder = builder, .node = node, .result_grads = dys, .wants = wants, .operand_grads = grads};
    RETURN_IF_ERROR(op.grad(context));
    RETURN_IF_ERROR(builder.status());
    return grads;
  }
  for (size_t i = 0; i < wants.size(); ++i) {
    const DerivedOp* derived = wants[i] ? FindDerivative(RegisteredRow(op), static_cast<int>(i)) : nullptr;
    if (derived == nullptr) continue;
    Value g = dys[0];
    if (!derived->is_identity) {
      std::vector<Value> operands = {g};
      for (const int operand : derived->operands_read)
        operands.push_back(node.operands()[static_cast<size_t>(operand)]);
      ASSIGN_OR_RETURN(Node * made, graph.AddNode(RowToUse(*derived->op), operands, node.attrs(), ""));
      g = made->result();
    }
    grads[i] = builder.SumTo(g, node.operands()[i].type().dims);
  }
  RETURN_IF_ERROR(builder.status());
  return grads;
}

inline bool IsDifferentiable(const OpDef& op) {
  if (op.grad != nullptr) return true;
  for (size_t i = 0; i < op.operands.size(); ++i) {
    if (op.is_element_wise() && FindDerivative(op, static_cast<int>(i)) != nullptr) return true;
  }
  return false;
}

inline std::vector<const OpDef*> DifferentiableOps() {
  std::vector<const OpDef*> ops;
  for (const OpDef* op : AllOps()) {
    if (IsDifferentiable(*op)) ops.push_back(op);
  }
  return ops;
}

inline void CheckIsCentralDifference(const OpDef& op) {
  int64_t checked = 0;
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    const bool all_f32 = absl::c_all_of(
        p.operand_types, [](const TensorType& t) { return !IsFloat(t.dtype) || t.dtype == DType::kF32; });
    if (!all_f32) continue;
    for (size_t r = 0; r < p.result_types.size(); ++r) {
      if (!IsFloat(p.result_types[r].dtype)) continue;
      SCOPED_TRACE(absl::StrCat("gradient of result ", r));
      Graph graph("g");
      Builder builder(graph);
      std::vector<Value> operands;
      std::map<std::string, HostTensor<double>> inputs;
      for (size_t i = 0; i < p.operands.size(); ++i) {
        const std::string name = absl::StrCat("x", i);
        operands.push_back(builder.Input(name, p.operand_types[i], Role::kData));
        inputs[name] = p.operands[i];
      }
      ASSERT_OK(builder.status());
      ASSERT_OK_AND_ASSIGN(Node * node, graph.AddNode(op, operands, p.attrs, "node"));
      std::vector<Value> dys(p.result_types.size());
      dys[r] = builder.Input("dy", p.result_types[r], Role::kData);
      const HostTensor<double> dy = FillSample<double>({.type = p.result_types[r]}, {}, 77 + r);
      inputs["dy"] = dy;
      const absl::StatusOr<std::vector<Value>> grads = AddBackward(graph, builder, *node, dys);
      if (r > 0 && absl::IsUnimplemented(grads.status())) continue;  // A statistic; result 0 must have a gradient.
      ASSERT_OK(grads);
      for (size_t i = 0; i < grads->size(); ++i) {
        if (!(*grads)[i]) continue;
        EXPECT_EQ((*grads)[i].type().dims, p.operand_types[i].dims) << "operand " << i;
        graph.AddOutput((*grads)[i], absl::StrCat("g", i));
      }
      ASSERT_OK_AND_ASSIGN(const auto outputs, EvaluateGraph<double>(graph, inputs, /*round=*/false));

      // sum(dy * result r) with operand `i` moved by `step` along `direction`.
      std::vector<HostTensor<double>> moved = p.operands;
      const auto loss = [&](size_t i, const std::vector<double>& direction, double step) {
        for (size_t k = 0; k < direction.size(); ++k) {
          moved[i].values[k] = p.operands[i].values[k] + step * direction[k];
        }
        std::vector<const HostTensor<double>*> pointers;
        for (const HostTensor<double>& operand : moved) pointers.push_back(&operand);
        const auto y = EvaluateOp<double>(op, p.attrs, pointers, p.result_types, /*round=*/false);
        CHECK(y.ok()) << y.status();
        moved[i].values = p.operands[i].values;
        double sum = 0;
        for (size_t k = 0; k < dy.values.size(); ++k) sum += dy.values[k] * (*y)[r].values[k];
        return sum;
      };
      for (size_t i = 0; i < grads->size(); ++i) {
        if (!IsFloat(p.operand_types[i].dtype)) continue;
        if (absl::c_linear_search(op.no_grad_operands, static_cast<int>(i))) continue;
        const size_t n = p.operands[i].values.size();
        const auto at = outputs.find(absl::StrCat("g", i));
        const std::vector<double> grad = at == outputs.end() ? std::vector<double>(n, 0.0) : at->second.values;
        ASSERT_EQ(grad.size(), n);
        // Two random directions see every element, single elements see each other's place.
        for (size_t trial = 0; trial < 2 + std::min<size_t>(n, 12); ++trial) {
          std::vector<double> direction(n, 0.0);
          if (trial < 2) {
            direction = FillSample<double>({.type = p.operand_types[i]}, {}, 500 + trial).values;
          } else {
            direction[(trial - 2) * n / std::min<size_t>(n, 12)] = 1.0;
          }
          double analytic = 0;
          for (size_t k = 0; k < n; ++k) analytic += grad[k] * direction[k];
          constexpr double kStep = 1e-5;
          const double numeric = (loss(i, direction, kStep) - loss(i, direction, -kStep)) / (2 * kStep);
          const double allowed = 2e-6 * std::max(1.0, std::abs(numeric));
          EXPECT_NEAR(analytic, numeric, allowed) << "operand " << i << " trial " << trial;
          ++checked;
        }
      }
    }
  }
  EXPECT_GT(checked, 0) << "no f32 sample";
}

// Backends.

// Rows without a kernel on the cpu backend: views run no code, collectives need ranks.
inline bool NeedsKernel(const OpDef& op) { return !op.is_view && op.effect == Effect::kNone; }

inline std::vector<const OpDef*> OpsWithKernels() {
  std::vector<const OpDef*> ops;
  for (const OpDef* op : AllOps()) {
    if (NeedsKernel(*op)) ops.push_back(op);
  }
  return ops;
}

// Buffers of one call, each alone in memory between red zones.
class Buffers {
 public:
  static constexpr int64_t kZone = 256;
  static constexpr uint8_t kRed = 0xA5;

  std::byte* Add(int64_t bytes, uint8_t fill) {
    Block block;
    block.bytes = bytes;
    const size_t size = static_cast<size_t>(2 * kZone + bytes);
    block.memory.reset(static_cast<std::byte*>(std::aligned_alloc(256, (size + 255) / 256 * 256)));
    std::memset(block.memory.get(), kRed, size);
    std::memset(block.memory.get() + kZone, fill, static_cast<size_t>(bytes));
    blocks_.push_back(std::move(block));
    return blocks_.back().memory.get() + kZone;
  }
  bool RedZonesIntact() const {
    for (const Block& block : blocks_) {
      for (int64_t i = 0; i < kZone; ++i) {
        if (block.memory.get()[i] != std::byte{kRed}) return false;
        if (block.memory.get()[kZone + block.bytes + i] != std::byte{kRed}) return false;
      }
    }
    return true;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> memory;
    int64_t bytes = 0;
  };
  std::vector<Block> blocks_;
};

inline void WriteTensor(const HostTensor<double>& from, std::byte* to) {
  for (size_t i = 0; i < from.values.size(); ++i) {
    const double v = from.values[i];
    const float f = static_cast<float>(v);
    switch (from.type.dtype) {
      case DType::kF32:
        std::memcpy(to + 4 * i, &f, 4);
        break;
      case DType::kF64:
        std::memcpy(to + 8 * i, &v, 8);
        break;
      case DType::kBF16:  // The value is a bf16 already.
        std::memcpy(to + 2 * i, reinterpret_cast<const std::byte*>(&f) + 2, 2);
        break;
      case DType::kF16: {
        const _Float16 h = static_cast<_Float16>(f);
        std::memcpy(to + 2 * i, &h, 2);
        break;
      }
      default:
        FAIL() << "no dtype " << DTypeName(from.type.dtype);
    }
  }
  if (from.type.dtype == DType::kU8) {
    for (size_t i = 0; i < from.ints.size(); ++i) to[i] = static_cast<std::byte>(from.ints[i]);
  } else if (!from.ints.empty()) {
    std::memcpy(to, from.ints.data(), 4 * from.ints.size());
  }
}

inline HostTensor<double> ReadTensor(const std::byte* from, const TensorType& type) {
  HostTensor<double> tensor = MakeHostTensor<double>(type);
  for (size_t i = 0; i < tensor.values.size(); ++i) {
    float f = 0;
    if (type.dtype == DType::kF32) std::memcpy(&f, from + 4 * i, 4);
    if (type.dtype == DType::kBF16) std::memcpy(reinterpret_cast<std::byte*>(&f) + 2, from + 2 * i, 2);
    if (type.dtype == DType::kF16) {
      _Float16 h = 0;
      std::memcpy(&h, from + 2 * i, 2);
      f = static_cast<float>(h);
    }
    tensor.values[i] = f;
    if (type.dtype == DType::kF64) std::memcpy(&tensor.values[i], from + 8 * i, 8);
  }
  if (type.dtype == DType::kU8) {
    for (size_t i = 0; i < tensor.ints.size(); ++i) tensor.ints[i] = std::to_integer<int32_t>(from[i]);
  } else if (!tensor.ints.empty()) {
    std::memcpy(tensor.ints.data(), from, 4 * tensor.ints.size());
  }
  return tensor;
}

// Runs the sample with results and workspace filled with `poison`; result `in_place.first` over operand
// `in_place.second` where given. Returns the results' bytes.
inline absl::StatusOr<std::vector<std::string>> RunOnBackend(Backend& backend, const Prepared& p, uint8_t poison,
                                                             std::pair<int, int> in_place = {-1, -1}) {
  Buffers buffers;
  KernelCall call = {.op = p.op, .attrs = p.attrs, .operands = {}, .results = {}, .name = p.what};
  for (const HostTensor<double>& operand : p.operands) {
    std::byte* data = buffers.Add(operand.type.byte_size(), 0);
    WriteTensor(operand, data);
    call.operands.push_back({data, operand.type});
  }
  for (size_t r = 0; r < p.result_types.size(); ++r) {
    std::byte* data = static_cast<int>(r) == in_place.first ? call.operands[static_cast<size_t>(in_place.second)].data
                                                            : buffers.Add(p.result_types[r].byte_size(), poison);
    call.results.push_back({data, p.result_types[r]});
  }
  call.workspace_bytes = WorkspaceBytes(backend.name(), *p.op, p.operand_types, p.result_types, p.attrs);
  if (call.workspace_bytes > 0) call.workspace = buffers.Add(call.workspace_bytes, poison);
  ASSIGN_OR_RETURN(const Thunk thunk, backend.Bind(call));
  thunk();
  backend.Synchronize();
  if (!buffers.RedZonesIntact()) return absl::InternalError("wrote outside its buffers");
  for (size_t i = 0; i < p.operands.size(); ++i) {
    if (static_cast<int>(i) == in_place.second) continue;
    std::string before(static_cast<size_t>(p.operand_types[i].byte_size()), '\0');
    WriteTensor(p.operands[i], reinterpret_cast<std::byte*>(before.data()));
    if (std::memcmp(before.data(), call.operands[i].data, before.size()) != 0) {
      return absl::InternalError(absl::StrCat("wrote into operand ", i));
    }
  }
  std::vector<std::string> results;
  for (const Tensor& result : call.results) {
    results.emplace_back(reinterpret_cast<const char*>(result.data), static_cast<size_t>(result.type.byte_size()));
  }
  return results;
}

// Half a unit in the last place either way where two round differently, relative.
inline double HalfUnits(DType dtype) {
  return dtype == DType::kBF16 ? 0x1.01p-8 : dtype == DType::kF16 ? 0x1.01p-11 : 0;
}

// The results' bytes, as a backend left them, against the f64 reference. `relative`: allowed at least, of the largest
// element of a result.
inline void CheckResults(const Prepared& p, const std::vector<std::string>& results, double relative = 0) {
  const OpDef& op = *p.op;
  ASSERT_OK_AND_ASSIGN(const auto expected, EvaluateOp<double>(op, p.attrs, p.OperandPointers(), p.result_types));
  for (size_t r = 0; r < results.size(); ++r) {
    const TensorType& type = p.result_types[r];
    const HostTensor<double> got = ReadTensor(reinterpret_cast<const std::byte*>(results[r].data()), type);
    EXPECT_EQ(got.ints, expected[r].ints) << "result " << r;
    const double own = op.tolerance > 0 ? std::max(op.tolerance, HalfUnits(type.dtype)) : 0;
    const double allowed = std::max(own, relative) * LargestMagnitude(expected[r].values);
    for (size_t i = 0; i < got.values.size(); ++i) {
      ASSERT_NEAR(got.values[i], expected[r].values[i], allowed) << "result " << r << " element " << i;
    }
  }
}

inline void CheckAgreesWithReference(const OpDef& op) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Backend> backend, MakeCpuBackend(2));
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> results, RunOnBackend(*backend, p, 0xFF));
    CheckResults(p, results);
  }
}

// The same bits whatever the buffers held before, however many threads run, and in place.
inline void CheckSameBitsAlways(const OpDef& op) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Backend> one, MakeCpuBackend(1));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Backend> three, MakeCpuBackend(3));
  for (const Prepared& p : PrepareSamples(op)) {
    SCOPED_TRACE(p.what);
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> expected, RunOnBackend(*one, p, 0xFF));
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> other_poison, RunOnBackend(*one, p, 0x11));
    EXPECT_EQ(other_poison, expected) << "reads what it has not written";
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> threads, RunOnBackend(*three, p, 0x11));
    EXPECT_EQ(threads, expected) << "depends on the number of threads";
    for (const std::pair<int, int>& pair : InPlacePairs(op, p.operand_types, p.result_types, p.attrs)) {
      ASSERT_OK_AND_ASSIGN(const std::vector<std::string> in_place, RunOnBackend(*three, p, 0x11, pair));
      EXPECT_EQ(in_place, expected) << "result " << pair.first << " in place of operand " << pair.second;
    }
  }
}

}  // namespace mt

#endif  // MT_TESTS_OP_CHECKS_H_
