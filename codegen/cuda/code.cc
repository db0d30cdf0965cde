#include "codegen/cuda/code.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "codegen/cuda/kernel.h"
#include "codegen/plan/cubin.h"
#include "codegen/plan/nvrtc.h"
#include "ir/attrs.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "ir/target.h"

namespace mt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

absl::StatusOr<std::vector<TensorType>> TypesOf(const proto::ProgramProto& program,
                                                const google::protobuf::RepeatedField<int32_t>& tensors) {
  std::vector<TensorType> types;
  for (const int32_t t : tensors) {
    ASSIGN_OR_RETURN(TensorType type, TypeFromProto(program.tensors(t).type()));
    types.push_back(std::move(type));
  }
  return types;
}

// Of sources without the prelude: one that is joined with others, and as many as are one module.
constexpr size_t kShortBytes = 4096, kJoinedBytes = 12288;

class CodeWriter {
 public:
  CodeWriter(proto::PlanProto& plan, const Target& target, bool portable)
      : plan_(plan), target_(target), portable_(portable) {}

  absl::Status Emit() {
    plan_.clear_cuda();
    for (const proto::ProgramProto& program : plan_.programs()) {
      proto::CudaProgramProto& code = *plan_.mutable_cuda()->add_programs();
      for (const proto::InstructionProto& instruction : program.instructions()) {
        RETURN_IF_ERROR(Annotate(Emit(program, instruction, *code.add_instructions()),
                                 absl::StrCat("program ", program.name(), ", \"", instruction.name(), "\"")));
      }
    }
    return absl::OkStatus();
  }

  CudaCodeReport report;

 private:
  absl::Status Emit(const proto::ProgramProto& program, const proto::InstructionProto& instruction,
                    proto::CudaInstructionProto& code) {
    const OpDef* op = FindOp(instruction.op());
    CHECK(op != nullptr) << instruction.op();
    ASSIGN_OR_RETURN(const Attrs attrs, AttrsFromProto(instruction.attrs()));
    ASSIGN_OR_RETURN(const std::vector<TensorType> operands, TypesOf(program, instruction.operands()));
    ASSIGN_OR_RETURN(const std::vector<TensorType> results, TypesOf(program, instruction.results()));
    CudaCall call{.target = target_, .op = op, .attrs = &attrs, .operands = operands, .results = results};
    call.portable = portable_;
    if (instruction.workspace() >= 0) call.workspace_bytes = plan_.buffers(instruction.workspace()).size_bytes();
    ASSIGN_OR_RETURN(const CudaSteps steps, EmitCuda(call));
    for (const CudaSteps::Step& step : steps.steps()) {
      proto::CudaStepProto& proto = *code.add_steps();
      proto = step.proto;
      report.matmuls += proto.has_matmul() ? 1 : 0;
      report.fills += proto.has_fill() ? 1 : 0;
      if (!proto.has_launch()) continue;
      ++report.launches;
      SetModule(step.source, *proto.mutable_launch());
    }
    return absl::OkStatus();
  }

  // Equal sources are one module. Short ones of a single function are joined, told apart by a number behind its name:
  // of the time that NVRTC takes for one of these, most is what it takes for an empty one. Those with shared memory are
  // joined apart: beside them others would count as if they had some.
  void SetModule(const std::string& source, proto::CudaLaunchProto& launch) {
    const auto [at, is_new] = places_.emplace(source, Place{});
    Place& place = at->second;
    if (is_new) {
      place.module = plan_.cuda().modules_size();
      std::string text = source;
      if (IsShort(source)) {
        const std::string& function = launch.function();
        if (const int number = ++short_functions_[function]; number > 1) {
          place.suffix = absl::StrCat("_", number);
          absl::StrReplaceAll({{absl::StrCat(" ", function, "("), absl::StrCat(" ", function, place.suffix, "(")}},
                              &text);
        }
        Joined& joined = joined_[absl::StrContains(source, "__shared__") ? 1 : 0];
        if (joined.module < 0 || joined.bytes > kJoinedBytes) joined = {.module = place.module};
        joined.bytes += text.size();
        place.module = joined.module;
      }
      if (place.module == plan_.cuda().modules_size()) {
        plan_.mutable_cuda()->add_modules()->set_source(std::string(CudaPrelude()));
      }
      absl::StrAppend(plan_.mutable_cuda()->mutable_modules(place.module)->mutable_source(), "\n", text);
    }
    launch.set_module(place.module);
    launch.set_function(absl::StrCat(launch.function(), place.suffix));
  }

  static bool IsShort(absl::string_view source) {
    constexpr absl::string_view kFunction = "extern \"C\" __global__ ";
    return source.size() < kShortBytes && absl::ConsumePrefix(&source, kFunction) &&
           !absl::StrContains(source, kFunction);
  }

  proto::PlanProto& plan_;
  const Target& target_;
  const bool portable_;
  struct Place {
    int module = 0;
    std::string suffix;  // Of the function's name.
  };
  absl::flat_hash_map<std::string, Place> places_;         // Of each source.
  absl::flat_hash_map<std::string, int> short_functions_;  // Name -> how many short sources have it.
  struct Joined {
    int module = -1;
    size_t bytes = 0;  // Of its sources.
  };
  std::array<Joined, 2> joined_;  // What short sources without and with shared memory are added to.
};

// Cubins of all modules; side by side, since each takes a tenth of a second.
absl::Status CompileModules(proto::CudaCodeProto& code, const Target& target, std::string& warning) {
  const absl::StatusOr<std::string> version = CudaCompilerVersion();
  if (!version.ok()) {
    warning = absl::StrCat("the plan holds kernels as sources, which mtrun compiles when it loads them: ",
                           version.status().message());
    return absl::OkStatus();
  }
  const int count = code.modules_size();
  std::vector<absl::Status> statuses(static_cast<size_t>(count));
  // The longest first, so that no thread ends with one while the others wait.
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return code.modules(a).source().size() > code.modules(b).source().size(); });
  std::atomic<int> next{0};
  const auto work = [&] {
    for (int n = next++; n < count; n = next++) {
      const int i = order[static_cast<size_t>(n)];
      proto::CudaModuleProto& module = *code.mutable_modules(i);
      absl::StatusOr<std::string> cubin = CompileCudaSource(module.source(), target);
      if (!cubin.ok()) {
        statuses[static_cast<size_t>(i)] = cubin.status();
        continue;
      }
      module.set_checksum(Fnv1a(*cubin));
      module.set_cubin(*std::move(cubin));
      module.set_compiler(*version);
    }
  };
  std::vector<std::thread> threads;
  const int cpus = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int i = 1; i < std::min(count, cpus); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) RETURN_IF_ERROR(status);
  warning = CudaCacheProblem();
  return absl::OkStatus();
}

// Each module's source and cubin, and a table of what its functions take.
absl::Status Dump(const proto::CudaCodeProto& code, const std::string& folder) {
  RETURN_IF_ERROR(MakeFolder(folder));
  std::string table = absl::StrFormat("%-6s %-32s %9s %12s %11s %9s\n", "module", "function", "registers",
                                      "shared_bytes", "stack_bytes", "launches");
  absl::flat_hash_map<std::string, int> launches;  // "module function" -> how often.
  for (const proto::CudaProgramProto& program : code.programs()) {
    for (const proto::CudaInstructionProto& instruction : program.instructions()) {
      for (const proto::CudaStepProto& step : instruction.steps()) {
        if (step.has_launch()) ++launches[absl::StrCat(step.launch().module(), " ", step.launch().function())];
      }
    }
  }
  for (int i = 0; i < code.modules_size(); ++i) {
    const proto::CudaModuleProto& module = code.modules(i);
    const std::string name = absl::StrFormat("%s/%03d", folder, i);
    RETURN_IF_ERROR(WriteFile(absl::StrCat(name, ".cu"), module.source()));
    if (module.cubin().empty()) continue;
    RETURN_IF_ERROR(WriteFile(absl::StrCat(name, ".cubin"), module.cubin()));
    ASSIGN_OR_RETURN(const std::vector<CubinFunction> functions, CubinFunctions(module.cubin()));
    for (const CubinFunction& f : functions) {
      absl::StrAppendFormat(&table, "%03d    %-32s %9d %12d %11d %9d\n", i, f.name, f.registers, f.shared_bytes,
                            f.stack_bytes, launches[absl::StrCat(i, " ", f.name)]);
    }
  }
  return WriteFile(absl::StrCat(folder, "/kernels.txt"), table);
}

}  // namespace

absl::Status EmitCudaCode(proto::PlanProto& plan, CudaCodeReport* report, bool portable) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
  CHECK(target.is_cuda()) << plan.target();
  const Clock::time_point start = Clock::now();
  CodeWriter writer(plan, target, portable);
  RETURN_IF_ERROR(writer.Emit());
  writer.report.emit_seconds = SecondsSince(start);
  writer.report.modules = plan.cuda().modules_size();
  if (report != nullptr) *report = std::move(writer.report);
  return absl::OkStatus();
}

absl::Status AddCudaCode(proto::PlanProto& plan, const std::string& dump_dir, CudaCodeReport* report, bool portable) {
  CudaCodeReport unused;
  if (report == nullptr) report = &unused;
  RETURN_IF_ERROR(EmitCudaCode(plan, report, portable));
  ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
  const Clock::time_point start = Clock::now();
  const absl::Status compiled = CompileModules(*plan.mutable_cuda(), target, report->warning);
  report->compile_seconds = SecondsSince(start);
  if (!dump_dir.empty()) RETURN_IF_ERROR(Dump(plan.cuda(), absl::StrCat(dump_dir, "/cuda")));
  return compiled;
}

}  // namespace mt
