#include "codegen/plan/plan_verifier.h"

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "tests/random_graph.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;

proto::PlanProto MustCompile(std::unique_ptr<Module> module, const CompileOptions& options = {}) {
  absl::StatusOr<proto::PlanProto> plan = Compile(std::move(module), options);
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

proto::PlanProto GptPlan() {
  return MustCompile(
      SmallTransformer("tied_head: true attention_bias: true mlp_bias: true norm_bias: true dropout: 0.2"),
      {.passes = "flash"});
}

int InstructionOf(const proto::ProgramProto& program,
                  const std::function<bool(const proto::InstructionProto&)>& wanted) {
  for (int i = 0; i < program.instructions_size(); ++i) {
    if (wanted(program.instructions(i))) return i;
  }
  CHECK(false) << "no such instruction";
  return -1;
}

int ByOp(const proto::ProgramProto& program, const std::string& op) {
  return InstructionOf(program, [&](const proto::InstructionProto& i) { return i.op() == op; });
}

int TransientBuffer(const proto::PlanProto& plan) {
  for (int b = 0; b < plan.buffers_size(); ++b) {
    if (plan.buffers(b).program() == 0) return b;
  }
  return -1;
}

TEST(PlanVerifierTest, AcceptsWhatTheCompilerMakes) {
  for (SmallModule& small : SmallModules()) {
    SCOPED_TRACE(small.name);
    EXPECT_OK(VerifyPlan(MustCompile(std::move(small.module))));
  }
  EXPECT_OK(VerifyPlan(GptPlan()));
}

struct Corruption {
  std::string name;
  std::function<void(proto::PlanProto&)> corrupt;
  std::string message;  // Part of what the verifier says.
};

std::vector<Corruption> Corruptions() {
  using Plan = proto::PlanProto;
  const auto program = [](Plan& plan) { return plan.mutable_programs(0); };
  return {
      {"version", [](Plan& p) { p.set_version(99); }, "version 99, this build reads version 1"},
      {"target", [](Plan& p) { p.clear_target(); }, "names no target"},
      {"alignment", [](Plan& p) { p.set_alignment(48); }, "alignment 48"},
      {"arena_negative", [](Plan& p) { p.set_arena_bytes(-1); }, "arena of -1 bytes"},
      {"arena_small", [](Plan& p) { p.set_arena_bytes(p.persistent_bytes() + 256); }, "do not lie in the arena"},
      {"arena_large", [](Plan& p) { p.set_arena_bytes(p.arena_bytes() + 256); }, "the programs' buffers end at"},
      {"persistent", [](Plan& p) { p.set_persistent_bytes(p.persistent_bytes() - 256); },
       "outside the persistent part"},
      {"lower_bound", [](Plan& p) { p.set_lower_bound_bytes(p.lower_bound_bytes() - 256); },
       "the programs' largest is"},
      {"proof", [](Plan& p) { p.set_proof("sure"); }, "proof \"sure\""},
      {"proof_claim", [](Plan& p) { p.set_proof(p.proof() == "gap" ? "lower_bound" : "gap"); },
       "over a lower bound of"},
      {"no_programs", [](Plan& p) { p.clear_programs(); }, "no programs"},
      {"program_name", [](Plan& p) { p.mutable_programs(1)->set_name(p.programs(0).name()); }, "used twice"},
      {"buffer_offset", [](Plan& p) { p.mutable_buffers(TransientBuffer(p))->set_offset(p.persistent_bytes() + 4); },
       "no multiple of 256"},
      {"buffer_size_zero", [](Plan& p) { p.mutable_buffers(0)->set_size_bytes(0); }, "do not lie in the arena"},
      {"buffer_size_overflow",
       [](Plan& p) { p.mutable_buffers(0)->set_size_bytes(std::numeric_limits<int64_t>::max()); },
       "do not lie in the arena"},
      {"buffer_below", [](Plan& p) { p.mutable_buffers(TransientBuffer(p))->set_offset(0); },
       "inside the persistent part"},
      {"buffer_class", [](Plan& p) { p.mutable_buffers(0)->set_memory_class(proto::MEMORY_CLASS_UNSPECIFIED); },
       "memory class 0"},
      {"buffer_program", [](Plan& p) { p.mutable_buffers(TransientBuffer(p))->set_program(7); }, "program 7 of"},
      {"buffer_range", [](Plan& p) { p.mutable_buffers(TransientBuffer(p))->set_last(1 << 20); }, "its live range"},
      {"states_overlap", [](Plan& p) { p.mutable_buffers(1)->set_offset(p.buffers(0).offset()); },
       "are live at once and share"},
      {"state_twice", [](Plan& p) { *p.add_states() = p.states(0); }, "is there twice"},
      {"state_buffer", [](Plan& p) { p.mutable_states(0)->set_buffer(TransientBuffer(p)); }, "no persistent one"},
      {"state_shared", [](Plan& p) { p.mutable_states(1)->set_buffer(p.states(0).buffer()); }, "is another state's"},
      {"state_type", [](Plan& p) { p.mutable_states(0)->mutable_state()->mutable_type()->add_dims(2); }, "its buffer"},
      {"state_init", [](Plan& p) { p.mutable_states(0)->mutable_state()->set_init("random"); }, "state \""},
      {"state_logical", [](Plan& p) { p.mutable_states(0)->mutable_state()->set_logical_dims(0, 1 << 20); },
       "logical dimensions"},
      {"state_role", [](Plan& p) { p.mutable_states(0)->mutable_state()->set_role("data"); }, "not a state's"},
      {"state_class", [](Plan& p) { p.mutable_buffers(0)->set_memory_class(proto::OPTIMIZER_STATE); },
       "its buffer's class"},
      {"state_missing", [](Plan& p) { p.mutable_states()->RemoveLast(); }, "without a state"},
      {"peak", [=](Plan& p) { program(p)->set_peak_bytes(1); }, "peak_bytes is 1"},
      {"program_lower_bound", [=](Plan& p) { program(p)->set_lower_bound_bytes(1); }, "lower_bound_bytes is 1"},
      {"peak_instruction", [=](Plan& p) { program(p)->set_peak_instruction(p.programs(0).peak_instruction() + 1); },
       "peak_instruction is"},
      {"tensor_buffer", [=](Plan& p) { program(p)->mutable_tensors(0)->set_buffer(-5); }, "buffer -5 of"},
      {"tensor_type", [=](Plan& p) { program(p)->mutable_tensors(0)->mutable_type()->set_dtype("f99"); }, "tensor %0"},
      {"tensor_too_long", [=](Plan& p) { program(p)->mutable_tensors(0)->mutable_type()->add_dims(1000); },
       "of a buffer of"},
      {"tensor_offset", [=](Plan& p) { program(p)->mutable_tensors(0)->set_byte_offset(-4); }, "bytes at -4"},
      {"tensor_far_offset", [=](Plan& p) { program(p)->mutable_tensors(0)->set_byte_offset(INT64_MAX); },
       "bytes at 9223372036854775807"},
      {"input_twice", [=](Plan& p) { *program(p)->add_inputs() = p.programs(0).inputs(0); }, "is there twice"},
      {"input_role", [=](Plan& p) { program(p)->mutable_inputs(0)->set_role("guest"); }, "role \"guest\""},
      {"input_tensor", [=](Plan& p) { program(p)->mutable_inputs(0)->set_tensor(1 << 20); }, "of "},
      {"input_missing", [=](Plan& p) { program(p)->mutable_inputs()->DeleteSubrange(0, 1); },
       "read before it is written"},
      {"op", [=](Plan& p) { program(p)->mutable_instructions(0)->set_op("magic"); }, "this build has no such op"},
      {"phase", [=](Plan& p) { program(p)->mutable_instructions(0)->set_phase("lunch"); }, "phase \"lunch\""},
      {"operand", [=](Plan& p) { program(p)->mutable_instructions(0)->set_operands(0, 1 << 20); }, "operand 0: tensor"},
      {"operand_missing",
       [=](Plan& p) {
         program(p)->mutable_instructions(ByOp(p.programs(0), "matmul"))->mutable_operands()->RemoveLast();
       },
       "matmul"},
      {"order",
       [=](Plan& p) { program(p)->mutable_instructions()->SwapElements(2, p.programs(0).instructions_size() - 1); },
       ""},
      {"removed", [=](Plan& p) { program(p)->mutable_instructions()->DeleteSubrange(3, 1); }, ""},
      {"result_twice",
       [=](Plan& p) {
         const int first = p.programs(0).instructions(0).results(0);
         program(p)->mutable_instructions(1)->set_results(0, first);
       },
       "is defined twice"},
      {"attr",
       [=](Plan& p) {
         program(p)->mutable_instructions(ByOp(p.programs(0), "layer_norm"))->mutable_attrs(0)->set_name("colour");
       },
       "colour"},
      {"attr_missing",
       [=](Plan& p) { program(p)->mutable_instructions(ByOp(p.programs(0), "layer_norm"))->clear_attrs(); },
       "attributes are not complete"},
      {"result_type",
       [=](Plan& p) {
         const int t = p.programs(0).instructions(ByOp(p.programs(0), "matmul")).results(0);
         program(p)->mutable_tensors(t)->mutable_type()->set_dtype("bf16");
       },
       "the op gives"},
      {"live_range",
       [=](Plan& p) {
         const int i = ByOp(p.programs(0), "matmul");
         proto::BufferProto* buffer =
             p.mutable_buffers(p.programs(0).tensors(p.programs(0).instructions(i).results(0)).buffer());
         buffer->set_first(buffer->last());
       },
       ""},
      {"workspace_missing",
       [=](Plan& p) {
         const int i = InstructionOf(p.programs(0), [](const auto& x) { return x.workspace() >= 0; });
         program(p)->mutable_instructions(i)->set_workspace(-1);
       },
       "it has no workspace"},
      {"workspace_small",
       [=](Plan& p) {
         const int i = InstructionOf(p.programs(0), [](const auto& x) { return x.workspace() >= 0; });
         proto::BufferProto* b = p.mutable_buffers(p.programs(0).instructions(i).workspace());
         b->set_size_bytes(b->size_bytes() - 1);
       },
       "the op needs"},
      {"workspace_other",
       [=](Plan& p) {
         const int i = InstructionOf(p.programs(0), [](const auto& x) { return x.workspace() >= 0; });
         program(p)->mutable_instructions(i)->set_workspace(TransientBuffer(p));
       },
       "is not a workspace"},
      {"output_tensor", [=](Plan& p) { program(p)->mutable_outputs(0)->set_tensor(-1); }, "tensor -1 of"},
      {"output_overwritten",
       [=](Plan& p) {
         // The old weights as a metric: the update was written over them.
         for (const proto::ProgramInput& input : p.programs(0).inputs()) {
           if (input.role() == "parameter") program(p)->mutable_outputs(0)->set_tensor(input.tensor());
         }
       },
       "was written over it"},
      {"donation_missing",
       [=](Plan& p) {
         for (proto::ProgramOutput& output : *program(p)->mutable_outputs()) {
           if (output.donates() >= 0) {
             output.set_donates(-1);
             break;
           }
         }
       },
       "no output donates it"},
      {"donation_other",
       [=](Plan& p) {
         std::vector<proto::ProgramOutput*> donors;
         for (proto::ProgramOutput& output : *program(p)->mutable_outputs()) {
           if (output.donates() >= 0) donors.push_back(&output);
         }
         donors[0]->set_donates(donors[1]->donates());
       },
       "does not take over the buffer"},
      {"orphan",
       [](Plan& p) {
         proto::BufferProto buffer = p.buffers(TransientBuffer(p));
         buffer.set_first(p.programs(0).instructions_size() - 1);
         buffer.set_last(buffer.first());
         buffer.set_offset(p.arena_bytes() - 256);
         buffer.set_size_bytes(1);
         buffer.set_name("orphan");
         *p.add_buffers() = buffer;
       },
       "orphan"},
  };
}

void PrintTo(const Corruption& corruption, std::ostream* out) { *out << corruption.name; }

class CorruptionTest : public ::testing::TestWithParam<Corruption> {};

TEST_P(CorruptionTest, IsCaught) {
  proto::PlanProto plan = GptPlan();
  ASSERT_OK(VerifyPlan(plan));
  GetParam().corrupt(plan);
  EXPECT_THAT(VerifyPlan(plan), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(All, CorruptionTest, ::testing::ValuesIn(Corruptions()),
                         [](const ::testing::TestParamInfo<Corruption>& info) { return info.param.name; });

// In place where the row does not allow it: the result of a matmul moved over one of its operands.
TEST(PlanVerifierTest, AMatmulOverItsOperandIsCaught) {
  proto::PlanProto plan = GptPlan();
  proto::ProgramProto& program = *plan.mutable_programs(0);
  bool tried = false;
  for (const proto::InstructionProto& instruction : program.instructions()) {
    if (instruction.op() != "matmul") continue;
    const proto::TensorProto& a = program.tensors(instruction.operands(0));
    proto::TensorProto& y = *program.mutable_tensors(instruction.results(0));
    if (plan.buffers(a.buffer()).size_bytes() < plan.buffers(y.buffer()).size_bytes()) continue;
    if (plan.buffers(a.buffer()).program() == -1) continue;
    y.set_buffer(a.buffer());
    y.set_byte_offset(a.byte_offset());
    tried = true;
    break;
  }
  ASSERT_TRUE(tried);
  EXPECT_THAT(VerifyPlan(plan),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("which the op does not allow")));
}

// The largest end and the proof after offsets were moved about.
void FixStatistics(proto::PlanProto& plan) {
  plan.set_arena_bytes(plan.persistent_bytes());
  for (int p = 0; p < plan.programs_size(); ++p) {
    int64_t top = plan.persistent_bytes();
    for (const proto::BufferProto& b : plan.buffers()) {
      if (b.program() == p) top = std::max(top, b.offset() + AlignedBytes(plan, b.size_bytes()));
    }
    proto::ProgramProto& program = *plan.mutable_programs(p);
    program.set_peak_bytes(top);
    program.set_proof(top == program.lower_bound_bytes() ? "lower_bound" : "gap");
    plan.set_arena_bytes(std::max(plan.arena_bytes(), top));
  }
  plan.set_proof(plan.arena_bytes() == plan.lower_bound_bytes() ? "lower_bound" : "gap");
}

bool OracleOverlaps(const proto::PlanProto& plan) {
  for (int a = 0; a < plan.buffers_size(); ++a) {
    for (int b = 0; b < a; ++b) {
      const proto::BufferProto &x = plan.buffers(a), &y = plan.buffers(b);
      if (x.program() != y.program()) continue;
      if (x.program() >= 0 && (x.last() < y.first() || y.last() < x.first())) continue;
      if (x.offset() < y.offset() + y.size_bytes() && y.offset() < x.offset() + x.size_bytes()) return true;
    }
  }
  return false;
}

TEST(PlanVerifierTest, TheSweepAgreesWithAllPairs) {
  int overlapping = 0, disjoint = 0;
  std::mt19937_64 random(7);
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const proto::PlanProto original = MustCompile(RandomModule(seed, {.nodes = 20}));
    ASSERT_OK(VerifyPlan(original));
    ASSERT_FALSE(OracleOverlaps(original));
    std::vector<int> transient;
    for (int b = 0; b < original.buffers_size(); ++b) {
      if (original.buffers(b).program() >= 0) transient.push_back(b);
    }
    for (int trial = 0; trial < 60; ++trial) {
      proto::PlanProto plan = original;
      for (int moves = 1 + static_cast<int>(random() % 3); moves > 0; --moves) {
        proto::BufferProto& buffer = *plan.mutable_buffers(transient[random() % transient.size()]);
        buffer.set_offset(
            plan.persistent_bytes() +
            static_cast<int64_t>(random() %
                                 static_cast<uint64_t>(2 + (plan.arena_bytes() - plan.persistent_bytes()) / 256)) *
                256);
      }
      FixStatistics(plan);
      const absl::Status status = VerifyPlan(plan);
      const bool overlaps = OracleOverlaps(plan);
      ++(overlaps ? overlapping : disjoint);
      ASSERT_EQ(status.ok(), !overlaps) << "seed " << seed << ": " << status;
      if (!overlaps) continue;
      ASSERT_THAT(status, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("are live at once")));
    }
  }
  EXPECT_GT(overlapping, 100);
  EXPECT_GT(disjoint, 30);
}

// Any single field changed at random: the verifier either refuses the plan or survives it (no crash, no hang).
TEST(PlanVerifierTest, SurvivesRandomEdits) {
  const std::string bytes = MustCompile(RandomModule(3, {.nodes = 16})).SerializeAsString();
  std::mt19937_64 random(11);
  int parsed = 0, refused = 0;
  ::testing::internal::CaptureStderr();  // protobuf complains about bytes that are no UTF-8.
  for (int trial = 0; trial < 3000; ++trial) {
    std::string edited = bytes;
    for (int edits = 1 + static_cast<int>(random() % 2); edits > 0; --edits) {
      edited[random() % edited.size()] = static_cast<char>(random());
    }
    proto::PlanProto plan;
    if (!plan.ParseFromString(edited)) continue;
    ++parsed;
    const absl::Status status = VerifyPlan(plan);
    if (!status.ok()) {
      ++refused;
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    }
  }
  ::testing::internal::GetCapturedStderr();
  EXPECT_GT(parsed, 100);
  EXPECT_GT(refused, parsed / 4);
}

}  // namespace
}  // namespace mt
