// Every row × its samples on a CUDA device, by the road that a model takes: a graph, a plan, device code, the executor.
// All samples of a row are one program. Without a device the tests skip and say so.
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/cuda/code.h"
#include "codegen/cuda/kernel.h"
#include "codegen/memory/buffer_assignment.h"
#include "codegen/plan/plan.h"
#include "codegen/plan/plan_verifier.h"
#include "ir/evaluator.h"
#include "runtime/cuda/backend.h"
#include "runtime/executor.h"
#include "tests/op_checks.h"
#include "tests/test_util.h"

namespace mt {
namespace {

// Where tests run: the device's own target, or why there is none.
absl::StatusOr<Target> DeviceTarget() {
  ASSIGN_OR_RETURN(const CudaDeviceInfo info, DescribeCudaDevice(0));
  return ParseTarget(absl::StrCat("cuda:sm_", info.sm));
}

bool HandsOn(const OpDef& op) {
  return absl::StartsWith(op.name, "flash_attention") || absl::StartsWith(op.name, "chunked_loss");
}

std::string InputName(size_t sample, size_t operand) { return absl::StrCat("s", sample, ".", operand); }

// MT_DEBUG_ARENA=guard: each buffer is an allocation, which nothing fills before its kernel does; for
// compute-sanitizer.
bool InGuards() {
  const char* const mode = std::getenv("MT_DEBUG_ARENA");
  return mode != nullptr && absl::string_view(mode) == "guard";
}

class OpOnCuda : public ::testing::TestWithParam<const OpDef*> {
 protected:
  // One program of all samples. Outputs are "sI:R". With `pair`, a result of each sample that may be written over an
  // operand is: the pair-th that its row names; `in_place` is how many there were.
  absl::Status Load(const Target& target, int pair = -1, int* in_place = nullptr) {
    const OpDef& op = *GetParam();
    samples_ = PrepareSamples(op);
    Module module("samples");
    Graph& graph = *module.AddGraph("train");
    for (size_t i = 0; i < samples_.size(); ++i) {
      const Prepared& p = samples_[i];
      bool computes = true;
      for (const TensorType& type : p.operand_types) computes = computes && target.Computes(type.dtype);
      if (!computes) continue;
      std::vector<Value> operands;
      for (size_t k = 0; k < p.operand_types.size(); ++k) {
        ASSIGN_OR_RETURN(const Value input, graph.AddInput(InputName(i, k), p.operand_types[k], Role::kData));
        operands.push_back(input);
      }
      ASSIGN_OR_RETURN(Node * node, graph.AddNode(op, operands, p.attrs, absl::StrCat("s", i)));
      for (int r = 0; r < node->num_results(); ++r) graph.AddOutput(node->result(r), absl::StrCat("s", i, ":", r));
    }
    PlanOptions options;
    options.target = target.ToString();
    ASSIGN_OR_RETURN(proto::PlanProto plan, PlanModule(module, options));
    RETURN_IF_ERROR(AddCudaCode(plan, "", nullptr, portable_));
    RETURN_IF_ERROR(VerifyPlan(plan));
    if (pair >= 0) {
      ASSIGN_OR_RETURN(*in_place, PutInPlace(plan, pair));
      if (*in_place == 0) return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeCudaBackend(0));
    const Placement placement = InGuards() ? Placement::kGuard : Placement::kArena;
    ASSIGN_OR_RETURN(executor_, Executor::Load(std::move(plan), std::move(backend), placement));
    return absl::OkStatus();
  }

  // Each operand is an input of its own, which nobody reads again.
  static absl::StatusOr<int> PutInPlace(proto::PlanProto& plan, int pair) {
    proto::ProgramProto& program = *plan.mutable_programs(0);
    int count = 0;
    for (const proto::InstructionProto& instruction : program.instructions()) {
      const auto types = [&](const auto& tensors) {
        std::vector<TensorType> list;
        for (const int t : tensors) list.push_back(TypeFromProto(program.tensors(t).type()).value());
        return list;
      };
      ASSIGN_OR_RETURN(const Attrs attrs, AttrsFromProto(instruction.attrs()));
      const auto pairs =
          InPlacePairs(*FindOp(instruction.op()), types(instruction.operands()), types(instruction.results()), attrs);
      if (pair >= static_cast<int>(pairs.size())) continue;
      const auto& [result, operand] = pairs[static_cast<size_t>(pair)];
      program.mutable_tensors(instruction.results(result))
          ->set_buffer(program.tensors(instruction.operands(operand)).buffer());
      ++count;
    }
    // A result lives on where its operand's life had ended: nothing may share bytes.
    int64_t end = 0;
    for (proto::BufferProto& buffer : *plan.mutable_buffers()) {
      buffer.set_offset(end);
      end += AlignedBytes(plan, buffer.size_bytes());
    }
    plan.set_arena_bytes(end);
    return count;
  }

  // The outputs' bytes, by name, after a run over memory full of `poison`.
  std::map<std::string, std::string> Run(uint8_t poison) {
    Backend& backend = executor_->backend();
    const Program& program = *executor_->FindProgram("train");
    if (!InGuards()) backend.Fill(executor_->arena(), poison, executor_->plan().arena_bytes());
    for (size_t i = 0; i < samples_.size(); ++i) {
      for (size_t k = 0; k < samples_[i].operands.size(); ++k) {
        const BoundTensor* input = program.FindInput(InputName(i, k));
        if (input == nullptr) continue;
        std::string bytes(static_cast<size_t>(input->type.byte_size()), '\0');
        WriteTensor(samples_[i].operands[k], reinterpret_cast<std::byte*>(bytes.data()));
        backend.CopyToDevice(input->data, bytes.data(), input->type.byte_size());
      }
    }
    program.Run();
    std::map<std::string, std::string> results;
    for (const BoundTensor& output : program.outputs()) {
      std::string& bytes = results[output.name];
      bytes.resize(static_cast<size_t>(output.type.byte_size()));
      backend.CopyToHost(bytes.data(), output.data, output.type.byte_size());
    }
    return results;
  }

  void ExpectAgreement();

  bool portable_ = false;
  std::vector<Prepared> samples_;
  std::unique_ptr<Executor> executor_;
};

void OpOnCuda::ExpectAgreement() {
  ASSERT_OK_AND_ASSIGN(const Target target, DeviceTarget());
  ASSERT_OK(Load(target));
  const std::map<std::string, std::string> results = Run(0xFF);
  EXPECT_TRUE(Run(0x4B) == results) << "results depend on what memory held before";
  for (int pair = 0, in_place = 1; in_place > 0; ++pair) {
    ASSERT_OK(Load(target, pair, &in_place));
    EXPECT_TRUE(in_place == 0 || Run(0x4B) == results) << "in place, pair " << pair;
  }
  for (size_t i = 0; i < samples_.size(); ++i) {
    const Prepared& p = samples_[i];
    SCOPED_TRACE(p.what);
    std::vector<std::string> bytes;
    for (size_t r = 0; r < p.result_types.size(); ++r) {
      const auto at = results.find(absl::StrCat("s", i, ":", r));
      if (at != results.end()) bytes.push_back(at->second);
    }
    // Tensor cores take what a kernel hands on inside itself (weights of attention, chunks of logits up to 100) in the
    // type of the operands: the reference holds it in f64.
    double relative = HandsOn(*GetParam()) ? 8 * HalfUnits(p.operand_types[0].dtype) : 0;
    if (const AttrValue* tf32 = p.attrs.Find("tf32"); tf32 != nullptr && std::get<bool>(*tf32)) relative = 2e-3;
    CheckResults(p, bytes, relative);
  }
}

TEST_P(OpOnCuda, AgreesWithReference) { ExpectAgreement(); }

// Where the device has kernels of its own, those of the other chips.
TEST_P(OpOnCuda, PortableFormAgreesWithReference) {
  if (!absl::StartsWith(GetParam()->name, "flash_attention")) GTEST_SKIP() << "it has one form";
  portable_ = true;
  ExpectAgreement();
}

TEST(CudaDevice, IsThere) {
  const absl::StatusOr<Target> target = DeviceTarget();
  if (!target.ok()) GTEST_SKIP() << target.status().message();
}

// None without a device: one skip says why.
std::vector<const OpDef*> RowsWithKernels() {
  std::vector<const OpDef*> rows;
  if (!DeviceTarget().ok()) return rows;
  for (const OpDef* op : AllOps()) {
    if (op->samples != nullptr && !op->is_view && op->effect == Effect::kNone) rows.push_back(op);
  }
  return rows;
}
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(OpOnCuda);
INSTANTIATE_TEST_SUITE_P(Rows, OpOnCuda, ::testing::ValuesIn(RowsWithKernels()),
                         [](const ::testing::TestParamInfo<const OpDef*>& info) {
                           std::string name(info.param->name);
                           absl::c_replace(name, '.', '_');
                           return name;
                         });

}  // namespace
}  // namespace mt
