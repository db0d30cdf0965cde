#include "codegen/memory/buffer_assignment.h"

#include <cstddef>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/builder.h"
#include "ir/graph_io.h"
#include "tests/random_graph.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using Tensors = std::map<std::string, HostTensor<float>>;

// A whole runtime over one arena, with the rows' references for kernels. Nothing is kept but the arena's bytes, and
// workspaces are overwritten with rubbish: a wrong offset, live range or order changes what comes out.
class ReferenceMachine {
 public:
  ReferenceMachine(const proto::PlanProto& plan, uint8_t poison)
      : plan_(plan), arena_(static_cast<size_t>(plan.arena_bytes()), std::byte{poison}) {}

  Tensors Run(const proto::ProgramProto& program, const Tensors& inputs) {
    for (const proto::ProgramInput& input : program.inputs()) {
      Store(program.tensors(input.tensor()), inputs.at(input.name()));
    }
    for (const proto::InstructionProto& instruction : program.instructions()) {
      const OpDef& op = *FindOp(instruction.op());
      if (op.is_view) continue;
      std::vector<HostTensor<float>> operands;
      std::vector<const HostTensor<float>*> pointers;
      for (const int t : instruction.operands()) operands.push_back(Load(program.tensors(t)));
      for (const HostTensor<float>& operand : operands) pointers.push_back(&operand);
      if (instruction.workspace() >= 0) {
        const proto::BufferProto& buffer = plan_.buffers(instruction.workspace());
        std::memset(arena_.data() + buffer.offset(), 0x5A, static_cast<size_t>(buffer.size_bytes()));
      }
      std::vector<TensorType> types;
      for (const int t : instruction.results()) types.push_back(*TypeFromProto(program.tensors(t).type()));
      const auto results = EvaluateOp<float>(op, *AttrsFromProto(instruction.attrs()), pointers, types);
      CHECK(results.ok()) << results.status();
      for (int r = 0; r < instruction.results_size(); ++r) {
        Store(program.tensors(instruction.results(r)), (*results)[static_cast<size_t>(r)]);
      }
    }
    Tensors outputs;
    for (const proto::ProgramOutput& output : program.outputs()) {
      outputs[output.name()] = Load(program.tensors(output.tensor()));
    }
    return outputs;
  }

 private:
  // Floats are held as f32 where they are four bytes or fewer: what is stored is a rounded value, so the upper bytes
  // say it all for bf16.
  void Store(const proto::TensorProto& tensor, const HostTensor<float>& value) {
    std::byte* at = arena_.data() + TensorOffset(plan_, tensor);
    const DType dtype = value.type.dtype;
    const size_t width = static_cast<size_t>(ByteSize(dtype));
    for (size_t i = 0; i < static_cast<size_t>(value.type.num_elements()); ++i) {
      if (!IsFloat(dtype)) {
        CHECK(width == 4);
        std::memcpy(at + i * width, &value.ints[i], width);
      } else if (dtype == DType::kF64) {
        const double wide = value.values[i];
        std::memcpy(at + i * width, &wide, width);
      } else {
        CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
        std::memcpy(at + i * width, reinterpret_cast<const char*>(&value.values[i]) + (4 - width), width);
      }
    }
  }

  HostTensor<float> Load(const proto::TensorProto& tensor) const {
    HostTensor<float> value = MakeHostTensor<float>(*TypeFromProto(tensor.type()));
    const std::byte* at = arena_.data() + TensorOffset(plan_, tensor);
    const DType dtype = value.type.dtype;
    const size_t width = static_cast<size_t>(ByteSize(dtype));
    for (size_t i = 0; i < static_cast<size_t>(value.type.num_elements()); ++i) {
      if (!IsFloat(dtype)) {
        std::memcpy(&value.ints[i], at + i * width, width);
      } else if (dtype == DType::kF64) {
        double wide = 0;
        std::memcpy(&wide, at + i * width, width);
        value.values[i] = static_cast<float>(wide);
      } else {
        value.values[i] = 0;
        std::memcpy(reinterpret_cast<char*>(&value.values[i]) + (4 - width), at + i * width, width);
      }
    }
    return value;
  }

  const proto::PlanProto& plan_;
  std::vector<std::byte> arena_;
};

void ExpectSame(const Tensors& expected, const Tensors& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  for (const auto& [name, tensor] : expected) {
    const HostTensor<float>& other = actual.at(name);
    EXPECT_EQ(tensor.ints, other.ints) << name;
    ASSERT_EQ(tensor.values.size(), other.values.size()) << name;
    if (tensor.values.empty()) continue;
    EXPECT_EQ(std::memcmp(tensor.values.data(), other.values.data(), tensor.values.size() * sizeof(float)), 0) << name;
  }
}

// Compiles the module and compares every program with the evaluator, to the bit, over two poisons.
void ExpectPlanComputesTheModule(std::unique_ptr<Module> module, int64_t vocab) {
  absl::StatusOr<Pipeline> pipeline = ParsePipeline("none");
  ASSERT_OK(pipeline);
  PassContext context;
  ASSERT_OK(RunPipeline(*module, *pipeline, context));
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanModule(*module, {}));
  ASSERT_OK(VerifyPlan(plan));
  for (const uint8_t poison : {0x00, 0xFF}) {
    ReferenceMachine machine(plan, poison);
    for (const auto& graph : module->graphs()) {
      SCOPED_TRACE(graph->name());
      const Tensors inputs = vocab > 0 ? MakeInputs<float>(*graph, vocab, 5) : RandomInputs<float>(*graph, 5);
      ASSERT_OK_AND_ASSIGN(const Tensors expected, EvaluateGraph<float>(*graph, inputs));
      ExpectSame(expected, machine.Run(*FindProgram(plan, graph->name()), inputs));
    }
  }
}

TEST(BufferAssignmentTest, PlansComputeWhatTheirGraphsSay) {
  for (SmallModule& small : SmallModules()) {
    SCOPED_TRACE(small.name);
    const int64_t vocab = std::max<int64_t>(small.module->fact("vocab_size"), 5);
    ExpectPlanComputesTheModule(std::move(small.module), vocab);
  }
}

TEST(BufferAssignmentTest, PlansOfRandomGraphsComputeWhatTheirGraphsSay) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(seed);
    ExpectPlanComputesTheModule(RandomModule(seed, {.nodes = 20}), 0);
  }
}

// Donations that need copies: a swap's half, a value donated twice, an old value kept as a metric.
TEST(BufferAssignmentTest, CopiesKeepDonationsRight) {
  auto module = std::make_unique<Module>("copies");
  const TensorType square{DType::kF32, {8, 8}};
  for (const char* name : {"a", "b", "c"}) {
    ASSERT_OK(module->AddState({.name = name, .type = square, .logical_dims = square.dims, .role = Role::kParameter}));
  }
  Graph& graph = *module->AddGraph("train");
  graph.set_stage(Stage::kOptimized);
  Builder builder(graph);
  graph.set_phase(Phase::kOptimizer);
  const Value x = builder.Input("x", square, Role::kData);
  const Value a = builder.Input("a", square, Role::kParameter);
  const Value b = builder.Input("b", square, Role::kParameter);
  const Value c = builder.Input("c", square, Role::kParameter);
  const Value product = builder.Op("matmul", {a, x}, {}, "product");
  const Value sum = builder.Op("add", {c, x}, {}, "sum");
  ASSERT_OK(builder.status());
  graph.AddOutput(product, "a", a.node);  // Not in place: the matmul reads a.
  graph.AddOutput(a, "b", b.node);        // The old a.
  graph.AddOutput(sum, "c", c.node);      // In place.
  graph.AddOutput(c, "old");              // Read at the end, after c was written.
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, PlanModule(*module, {}));
  ASSERT_OK(VerifyPlan(plan));
  EXPECT_EQ(plan.programs(0).instructions_size(), 2 + 3);
  const Tensors inputs = RandomInputs<float>(graph, 3);
  ASSERT_OK_AND_ASSIGN(const Tensors expected, EvaluateGraph<float>(graph, inputs));
  ReferenceMachine machine(plan, 0xFF);
  ExpectSame(expected, machine.Run(plan.programs(0), inputs));
}

TEST(BufferAssignmentTest, ClassesAndPlaces) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan,
                       Compile(SmallTransformer("attention_bias: true mlp_bias: true norm_bias: true"), {}));
  // States first, in order, without holes; everything else above.
  int64_t end = 0;
  std::map<std::string, const proto::BufferProto*> by_name;
  std::set<proto::MemoryClass> classes;
  for (const proto::BufferProto& buffer : plan.buffers()) {
    classes.insert(buffer.memory_class());
    if (buffer.program() == -1) {
      EXPECT_EQ(buffer.offset(), end);
      end = buffer.offset() + AlignedBytes(plan, buffer.size_bytes());
    } else {
      EXPECT_GE(buffer.offset(), plan.persistent_bytes());
      if (buffer.program() == 0) by_name[buffer.name()] = &buffer;
    }
  }
  EXPECT_EQ(end, plan.persistent_bytes());
  EXPECT_EQ(classes, (std::set<proto::MemoryClass>{proto::PARAMETERS, proto::GRADIENTS, proto::OPTIMIZER_STATE,
                                                   proto::ACTIVATIONS, proto::WORKSPACE, proto::IO}));
  EXPECT_EQ(by_name.at("tokens")->memory_class(), proto::IO);
  EXPECT_EQ(by_name.at("tokens")->first(), 0);
  EXPECT_EQ(by_name.at("lr")->memory_class(), proto::IO);
  // Gradients: one for each parameter, of its size.
  const proto::ProgramProto& train = *FindProgram(plan, "train");
  int64_t gradients = 0, parameters = 0;
  for (const proto::BufferProto& buffer : plan.buffers()) {
    if (buffer.program() == 0 && buffer.memory_class() == proto::GRADIENTS) gradients += buffer.size_bytes();
  }
  for (const proto::StatePlacement& state : plan.states()) {
    if (state.state().role() == "parameter") parameters += plan.buffers(state.buffer()).size_bytes();
  }
  EXPECT_EQ(gradients, parameters);
  // Every donated output lies where its input does; no instruction copies.
  for (const proto::ProgramOutput& output : train.outputs()) {
    if (output.donates() < 0) continue;
    EXPECT_EQ(train.tensors(output.tensor()).buffer(), train.tensors(train.inputs(output.donates()).tensor()).buffer());
  }
  // Transients of different programs share bytes: the arena is the largest program, not the sum.
  int64_t largest = 0;
  for (const proto::ProgramProto& program : plan.programs()) largest = std::max(largest, program.peak_bytes());
  EXPECT_EQ(plan.arena_bytes(), largest);
}

TEST(BufferAssignmentTest, WrittenRangesCoverResultsOfThePhaseAlone) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, Compile(SmallTransformer(""), {}));
  const proto::ProgramProto& train = *FindProgram(plan, "train");
  for (const Phase phase : {Phase::kForward, Phase::kBackward, Phase::kOptimizer}) {
    std::set<int64_t> expected, actual;
    for (const proto::InstructionProto& instruction : train.instructions()) {
      if (instruction.phase() != PhaseName(phase) || FindOp(instruction.op())->is_view) continue;
      for (const int r : instruction.results()) {
        const int64_t begin = TensorOffset(plan, train.tensors(r));
        const int64_t end = begin + TypeFromProto(train.tensors(r).type())->byte_size();
        for (int64_t byte = begin; byte < end; ++byte) expected.insert(byte / kPlanAlignment);
      }
    }
    for (const auto& [begin, end] : WrittenRanges(plan, train, phase, /*workspace=*/false)) {
      for (int64_t byte = begin; byte < end; byte += kPlanAlignment) actual.insert(byte / kPlanAlignment);
    }
    EXPECT_EQ(actual, expected) << PhaseName(phase);
  }
  // The optimizer writes every state, and nothing of the forward phase does.
  const auto optimizer = WrittenRanges(plan, train, Phase::kOptimizer, true);
  ASSERT_FALSE(optimizer.empty());
  EXPECT_EQ(optimizer[0].first, 0);
  EXPECT_GE(optimizer[0].second, plan.persistent_bytes());
  EXPECT_GE(WrittenRanges(plan, train, Phase::kForward, true)[0].first, plan.persistent_bytes());
}

TEST(BufferAssignmentTest, SummariesAddUp) {
  ASSERT_OK_AND_ASSIGN(const proto::PlanProto plan, Compile(SmallTransformer(""), {}));
  for (const proto::ProgramProto& program : plan.programs()) {
    const ProgramSummary summary = Summarize(plan, program);
    EXPECT_EQ(Sum(summary.at_peak), program.lower_bound_bytes());
    int64_t most = 0;
    int instructions = 0;
    for (const PhaseSummary& phase : summary.phases) {
      EXPECT_EQ(Sum(phase.at_peak), phase.live_bytes);
      most = std::max(most, phase.live_bytes);
      instructions += phase.instructions;
    }
    EXPECT_EQ(most, program.lower_bound_bytes());
    EXPECT_EQ(instructions, summary.instructions);
    int64_t live = 0;
    for (const int b : LiveBuffers(plan, program, program.peak_instruction())) {
      live += AlignedBytes(plan, plan.buffers(b).size_bytes());
    }
    EXPECT_EQ(live, program.lower_bound_bytes());
  }
}

}  // namespace
}  // namespace mt
