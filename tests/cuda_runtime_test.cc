// mtrun and mtc where a driver says it has a GPU: the stand-ins of tests/fakes, on any machine. Whatever is wrong is
// one line with its exit code; a step waits for nothing and allocates nothing.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "codegen/cuda/code.h"
#include "codegen/plan/plan.h"
#include "ir/base/hash.h"
#include "tests/process.h"
#include "tests/small_runs.h"
#include "tests/test_util.h"

namespace mt {
namespace {

#ifdef MT_HAS_CUDA

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class CudaRuntimeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ProcessFolder("cuda_runtime_test");
    folder_->Write("text", GeneratedText(60));
    const Outcome prepared = folder_->Run("mtcorpus prep --input text --out corpus --tokenizer char");
    ASSERT_EQ(prepared.code, 0) << prepared.err;
    const int64_t vocab = folder_->ReadJson("corpus/manifest.json")["vocab_size"];
    SavePlanOf("none", vocab, "tiny.plan");
    SavePlanOf("accumulate:2", vocab, "accumulate.plan");
  }
  static void TearDownTestSuite() { delete folder_; }

  // With modules that hold something, which the fake driver takes.
  static void SavePlanOf(const std::string& passes, int64_t vocab, const std::string& name) {
    CompileOptions options;
    options.target = "cuda:sm_90";
    options.passes = passes;
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, PipelineOf(options));
    ASSERT_OK_AND_ASSIGN(std::unique_ptr<Module> module,
                         LoadModel("tiny_char", {.batch = 4,
                                                 .sequence = 32,
                                                 .vocab_size = vocab,
                                                 .sets = {"layers=1", "width=32", "heads=2"},
                                                 .microbatches = MicrobatchesOf(pipeline)}));
    ASSERT_OK_AND_ASSIGN(proto::PlanProto plan, Compile(std::move(module), options));
    ASSERT_OK(EmitCudaCode(plan));
    for (proto::CudaModuleProto& code : *plan.mutable_cuda()->mutable_modules()) {
      code.set_cubin("a cubin");
      code.set_checksum(Fnv1a("a cubin"));
      code.set_compiler("nvrtc 99.0");
    }
    ASSERT_OK(SavePlan(plan, folder_->Path(name)));
  }

  // With the fakes and these settings of theirs before the command.
  static std::string With(const std::string& settings, const std::string& command) {
    return absl::StrCat("export LD_LIBRARY_PATH=", ShellQuote(absl::StrCat(MT_BINARY_DIR, "/fakes")),
                        ":$LD_LIBRARY_PATH ", settings, "; ", command);
  }
  static std::string Train(const std::string& more = "", const std::string& plan = "tiny.plan") {
    return absl::StrCat("mtrun ", plan, " --data corpus --steps 20 --matmul-algos heuristic ", more);
  }
  static void ExpectError(const std::string& settings, const std::string& command, int code,
                          const ::testing::Matcher<const std::string&>& message) {
    folder_->ExpectError(With(settings, command), code, message);
  }
  // What the fake driver was called for in a run, up to its last graph: one entry for each call.
  static std::vector<std::string> CallsOf(const std::string& command) {
    folder_->Write("log", "");
    const Outcome run = folder_->Run(With("FAKE_CUDA_LOG=log", command));
    EXPECT_EQ(run.code, 0) << run.err;
    std::vector<std::string> calls = absl::StrSplit(folder_->Read("log"), '\n', absl::SkipEmpty());
    while (!calls.empty() && calls.back() != "cuGraphLaunch") calls.pop_back();
    return calls;
  }

  static ProcessFolder* folder_;
};

ProcessFolder* CudaRuntimeTest::folder_ = nullptr;

TEST_F(CudaRuntimeTest, NoDriver) {
  if (dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) != nullptr) GTEST_SKIP() << "this machine has a driver";
  folder_->ExpectError(Train(), 4, AllOf(HasSubstr("tiny.plan is a plan for cuda:sm_90"), HasSubstr("no CUDA driver")));
}

TEST_F(CudaRuntimeTest, DevicesThatCannotRunThePlan) {
  ExpectError("FAKE_CUDA_INIT=100", Train(), 4, HasSubstr("no CUDA-capable device is detected"));
  ExpectError("FAKE_CUDA_COUNT=0", Train(), 4, AllOf(HasSubstr("no device"), HasSubstr("CUDA_VISIBLE_DEVICES")));
  ExpectError("", Train("--device 3"), 2, AllOf(HasSubstr("device 3 does not exist"), HasSubstr("1 device: 0")));
  ExpectError("FAKE_CUDA_SM=86", Train(), 4,
              AllOf(HasSubstr("for cuda:sm_90"), HasSubstr("Fake GPU"), HasSubstr("an older sm_86"),
                    HasSubstr("--target cuda:sm_86")));
  ExpectError("FAKE_CUDA_SM=103", Train(), 4, AllOf(HasSubstr("is sm_103"), HasSubstr("--target cuda:sm_100")));
  ExpectError("FAKE_CUDA_SM=61", Train(), 4, AllOf(HasSubstr("an older sm_61"), HasSubstr("--target cpu")));
}

TEST_F(CudaRuntimeTest, TooLittleMemorySaysWhoHoldsIt) {
  ExpectError("FAKE_CUDA_FREE=100000", Train(), 3,
              AllOf(HasSubstr("needs an arena of"), HasSubstr("97.7 KiB free of 2.0 GiB"), HasSubstr("short; held by"),
                    HasSubstr("process 1"), HasSubstr("700.0 MiB"), HasSubstr("--memory 592MiB"),
                    HasSubstr("the peak is at"), Not(HasSubstr("mtc fit"))));
  ExpectError("FAKE_CUDA_FREE=100000", Train("--debug-arena guard"), 3, HasSubstr("share nothing"));
}

TEST_F(CudaRuntimeTest, DamagedKernels) {
  ExpectError("FAKE_CUDA_LOAD=200", Train(), 4,
              AllOf(HasSubstr("does not take module 0"), HasSubstr("nvrtc 99.0"), HasSubstr("mtc compile")));
  ASSERT_OK_AND_ASSIGN(proto::PlanProto plan, LoadPlan(folder_->Path("tiny.plan")));
  plan.mutable_cuda()->mutable_modules(1)->set_cubin("b cubin");
  ASSERT_OK(SavePlan(plan, folder_->Path("damaged.plan")));
  ExpectError("", Train("", "damaged.plan"), 4, AllOf(HasSubstr("module 1 is damaged"), HasSubstr("mtc compile")));
}

// The fake has done the work when a call returns, so that only the calls can tell of a wait. Where it trains, all
// numbers are zero.
TEST_F(CudaRuntimeTest, AStepWaitsForNothingAndAllocatesNothing) {
  for (const char* plan : {"tiny.plan", "accumulate.plan"}) {
    SCOPED_TRACE(plan);
    const std::vector<std::string> calls = CallsOf(Train("--log-every 10", plan));
    const auto first = std::find(calls.begin(), calls.end(), "cuGraphLaunch");
    ASSERT_NE(first, calls.end());
    const int programs = std::string(plan) == "tiny.plan" ? 20 : 60;  // Before the evaluations at the end.
    ASSERT_GE(std::count(first, calls.end(), "cuGraphLaunch"), programs);
    int seen = 0;
    std::vector<std::string> other;
    for (auto call = first; call != calls.end() && seen < programs; ++call) {
      if (*call == "cuGraphLaunch") {
        ++seen;
      } else {
        other.push_back(*call);
      }
    }
    EXPECT_THAT(other, ::testing::IsEmpty());
  }
}

TEST_F(CudaRuntimeTest, TheSummaryTellsOfTheDevice) {
  const Outcome run = folder_->Run(With("", Train("--out run")));
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("device "), HasSubstr("592.0 MiB planned"), HasSubstr("since step 10")));
  const nlohmann::json summary = folder_->ReadJson("run/summary.json");
  EXPECT_EQ(summary["drift"]["device_bytes"], 0);
  const nlohmann::json& allocations = summary["drift"]["allocations"];
  EXPECT_TRUE(allocations.is_null() || allocations == 0) << allocations;  // Null under sanitizers.
  const Outcome guarded = folder_->Run(With("FAKE_CUDA_FREE=20000000000", Train("--debug-arena guard")));
  EXPECT_EQ(guarded.code, 0) << guarded.err;
  EXPECT_THAT(guarded.out, HasSubstr("each in memory of its own"));
}

TEST_F(CudaRuntimeTest, WithoutTargetThePlanIsForTheGpuThatIsHere) {
  const std::string inspect = "mtc inspect tiny_char --set layers=1 --passes none";
  const Outcome hopper = folder_->Run(With("", inspect));
  EXPECT_THAT(hopper.out, HasSubstr("target   cuda:sm_90\n"));
  EXPECT_EQ(hopper.err, "note: the target is cuda:sm_90, for the Fake GPU here; --target cpu compiles for the CPU\n");
  EXPECT_THAT(folder_->Run(With("FAKE_CUDA_SM=87", inspect)).out, HasSubstr("target   cuda:sm_86\n"));
  const Outcome old = folder_->Run(With("FAKE_CUDA_SM=61", inspect));
  EXPECT_THAT(old.out, HasSubstr("target   cpu\n"));
  EXPECT_THAT(old.err, HasSubstr("no target for a GPU of sm_61"));
  const Outcome asked = folder_->Run(With("", absl::StrCat(inspect, " --target cpu")));
  EXPECT_THAT(asked.out, HasSubstr("target   cpu\n"));
  EXPECT_EQ(asked.err, "");
  EXPECT_THAT(folder_->Run(With("FAKE_CUDA_INIT=100", inspect)).out, HasSubstr("target   cpu\n"));
}

TEST_F(CudaRuntimeTest, DoctorSeesTheDevice) {
  EXPECT_THAT(folder_->Run(With("", "mtc doctor")).out,
              AllOf(HasSubstr("Fake GPU, sm_90: target cuda:sm_90\n"), HasSubstr("cuBLASLt is there\n")));
  EXPECT_THAT(folder_->Run(With("FAKE_CUDA_INIT=100", "mtc doctor")).out, HasSubstr("the CUDA driver does not start"));
}

#else

TEST(CudaRuntimeTest, NeedsCuda) { GTEST_SKIP() << "built without CUDA (MT_CUDA)"; }

#endif  // MT_HAS_CUDA

}  // namespace
}  // namespace mt
