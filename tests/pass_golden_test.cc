// Golden files of passes: tests/passes/PASS.mtir. A file holds cases divided by "// -----":
//
//     // RUN: pass canonicalize,cse     by name in this order, always-on ones too; options as in --passes
//     module @m { ... }
//     // EXPECT
//     module @m { ... }                 or: // ERROR: what the run says, in part
//
// `pass_golden_test --update` rewrites what is expected.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/text.h"
#include "passes/pass_manager.h"
#include "passes/registry.h"
#include "tests/test_util.h"

namespace mt {
namespace {

bool update = false;

constexpr absl::string_view kDivider = "// -----\n";
constexpr absl::string_view kRun = "// RUN: pass ", kExpect = "// EXPECT\n", kError = "// ERROR: ";

// "autodiff,optimizer:kind=adam" -> steps, in this order.
absl::StatusOr<Pipeline> StepsOf(absl::string_view text) {
  Pipeline pipeline;
  for (const absl::string_view element : absl::StrSplit(text, ',')) {
    const std::vector<absl::string_view> parts = absl::StrSplit(element, ':');
    const PassDef* pass = Passes().Find(parts[0]);
    if (pass == nullptr) return absl::NotFoundError(absl::StrCat("RUN: no pass is named ", parts[0]));
    Pipeline one;
    one.steps.push_back({.pass = pass, .options = {}});
    for (const PassOption& option : pass->options) {
      if (!option.default_text.empty()) RETURN_IF_ERROR(one.SetOption(pass->name, option.name, option.default_text));
    }
    for (size_t i = 1; i < parts.size(); ++i) {
      const std::vector<absl::string_view> sides = absl::StrSplit(parts[i], absl::MaxSplits('=', 1));
      RETURN_IF_ERROR(one.SetOption(pass->name, sides[0], sides.size() == 2 ? sides[1] : "true"));
    }
    pipeline.steps.push_back(one.steps[0]);
  }
  return pipeline;
}

// Runs one case; returns it with what came out as what is expected.
absl::StatusOr<std::string> Rewritten(absl::string_view given) {
  const size_t run = given.find(kRun);
  if (run == absl::string_view::npos) return absl::InvalidArgumentError("a case has no // RUN:");
  absl::string_view text = given.substr(run + kRun.size());
  const absl::string_view passes = text.substr(0, text.find('\n'));
  const absl::string_view input = given.substr(0, std::min(given.find(kExpect), given.find(kError)));
  ASSIGN_OR_RETURN(const Pipeline pipeline, StepsOf(passes));
  ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, ParseModule(input));
  PassContext context;
  const absl::Status status = RunPipeline(*module, pipeline, context);
  if (!status.ok()) return absl::StrCat(input, kError, status.message(), "\n");
  return absl::StrCat(input, kExpect, Print(*module));
}

// Every pass is shown by a file of its name.
TEST(PassGoldenTest, EveryPass) {
  for (const PassDef* pass : Passes().Unique()) {
    const std::string file = absl::StrCat(MT_SOURCE_DIR "/tests/passes/", pass->name, ".mtir");
    SCOPED_TRACE(file);
    ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(file));
    std::vector<std::string> cases;
    for (const absl::string_view given : absl::StrSplit(text, kDivider)) {
      ASSERT_OK_AND_ASSIGN(std::string rewritten, Rewritten(given));
      if (!update) {
        EXPECT_EQ(std::string(given), rewritten);
      }
      cases.push_back(std::move(rewritten));
    }
    if (update) {
      ASSERT_OK(WriteFile(file, absl::StrJoin(cases, kDivider)));
    }
  }
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  for (int i = 1; i < argc; ++i) mt::update = mt::update || absl::string_view(argv[i]) == "--update";
  return RUN_ALL_TESTS();
}
