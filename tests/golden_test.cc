// Golden files: tests/FOLDER/*.mtir, each a list of cases divided by "// -----".
//
//     // RUN: DIRECTIVE ARGUMENTS          the directives are in a table below
//     // Comments stay where they are.
//     graph @g stage=forward { ... }       or a module; a lone graph stands for one with the states that it names
//     // EXPECT
//     what the directive prints            or, where it fails: // ERROR: message
//     // REPORT key: value
//
// `golden_test --update` writes what follows each input anew.
#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "codegen/compile.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/cost.h"
#include "ir/liveness.h"
#include "ir/text.h"
#include "passes/pass_manager.h"
#include "passes/pipeline.h"
#include "passes/registry.h"
#include "tests/test_util.h"

namespace mt {
namespace {

bool update = false;

// --- What a directive gets and gives

struct Input {
  std::unique_ptr<Module> module;
  bool lone_graph = false;

  std::string Printed() const { return lone_graph ? Print(*module->graphs()[0]) : Print(*module); }
};

struct Outcome {
  std::string text;                       // After EXPECT; empty: no such section.
  std::vector<std::string> reports = {};  // "key: value"
};

absl::StatusOr<Input> ParseInput(const std::string& text) {
  Input input;
  for (const absl::string_view raw : absl::StrSplit(text, '\n')) {
    const absl::string_view line = absl::StripAsciiWhitespace(raw);
    if (line.empty() || absl::StartsWith(line, "//")) continue;
    input.lone_graph = absl::StartsWith(line, "graph");
    break;
  }
  if (!input.lone_graph) {
    ASSIGN_OR_RETURN(input.module, ParseModule(text));
    return input;
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Graph> graph, ParseGraph(text));
  input.module = std::make_unique<Module>("golden");
  for (const Node* node : graph->inputs()) {
    if (!IsState(node->role())) continue;
    State state;
    state.name = node->name();
    state.type = node->result().type();
    state.role = node->role();
    RETURN_IF_ERROR(input.module->AddState(std::move(state)));
  }
  input.module->AddGraph(std::move(graph));
  return input;
}

// --- Directives

absl::StatusOr<Outcome> RunParse(absl::string_view, const Input& input) { return Outcome{input.Printed()}; }

// Parsing verifies; the point of these cases is the error.
absl::StatusOr<Outcome> RunVerify(absl::string_view, const Input& input) {
  Outcome outcome;
  for (const auto& graph : input.module->graphs()) {
    outcome.reports.push_back(absl::StrCat("nodes of @", graph->name(), ": ", graph->num_nodes()));
  }
  return outcome;
}

absl::StatusOr<Outcome> RunCost(absl::string_view, const Input& input) {
  Outcome outcome;
  const auto report = [&](const std::string& what, const Cost& cost) {
    outcome.reports.push_back(absl::StrCat(what, ": ", cost.flops, " flops, ", cost.bytes_read, " bytes read, ",
                                           cost.bytes_written, " bytes written"));
  };
  for (const auto& graph : input.module->graphs()) {
    const std::vector<Node*> order = graph->TopologicalOrder();
    for (const Node* node : order) {
      if (!node->is_input()) report(absl::StrCat(node->op().name, " \"", node->name(), "\""), NodeCost(*node));
    }
    report(absl::StrCat("@", graph->name()), GraphCost(*graph));
    outcome.reports.push_back(absl::StrCat("peak live bytes: ", PeakLiveBytes(*graph, order)));
  }
  return outcome;
}

absl::StatusOr<Outcome> RunSteps(const Pipeline& pipeline, const Input& input) {
  PassContext context;
  RETURN_IF_ERROR(RunPipeline(*input.module, pipeline, context));
  return Outcome{input.Printed()};
}

absl::StatusOr<Outcome> RunWholePipeline(absl::string_view arguments, const Input& input) {
  ASSIGN_OR_RETURN(const Pipeline pipeline, ParsePipeline(arguments));
  return RunSteps(pipeline, input);
}

// "autodiff,optimizer:kind=adam": by name in this order.
absl::StatusOr<Outcome> RunPasses(absl::string_view arguments, const Input& input) {
  Pipeline pipeline;
  for (const absl::string_view element : absl::StrSplit(arguments, ',')) {
    const std::vector<absl::string_view> parts = absl::StrSplit(element, ':');
    const PassDef* pass = Passes().Find(parts[0]);
    if (pass == nullptr) return absl::NotFoundError(absl::StrCat("no pass is named ", parts[0]));
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
  return RunSteps(pipeline, input);
}

absl::StatusOr<Outcome> RunPlan(absl::string_view arguments, const Input& input) {
  CompileOptions options;
  options.passes = arguments.empty() ? "none" : std::string(arguments);
  ASSIGN_OR_RETURN(const proto::PlanProto plan, Compile(input.module->Clone(), options));
  return Outcome{PlanText(plan)};
}

struct Directive {
  absl::string_view name, summary;
  absl::StatusOr<Outcome> (*run)(absl::string_view arguments, const Input& input);
};
constexpr Directive kDirectives[] = {
    {"parse", "the text as it is printed", RunParse},
    {"verify", "the number of nodes, or what the verifier says", RunVerify},
    {"cost", "FLOPs and bytes of each node and graph, peak of the canonical order", RunCost},
    {"pass", "NAME[:OPTION=VALUE...][,NAME...]: these passes alone, those that are always on by name, too", RunPasses},
    {"pipeline", "TEXT: all that --passes=TEXT runs", RunWholePipeline},
    {"plan", "[TEXT]: the plan after all that --passes=TEXT (none where it is left out) runs", RunPlan}};

constexpr absl::string_view kFolders[] = {"ir", "passes", "codegen"};

// --- Files

struct Case {
  std::string given;     // Everything before the expectations, comments and the RUN line included.
  std::string expected;  // The rest.
};

constexpr absl::string_view kDivider = "// -----\n";

std::vector<Case> SplitCases(absl::string_view text) {
  std::vector<Case> cases;
  for (const absl::string_view part : absl::StrSplit(text, kDivider)) {
    Case one;
    bool expectations = false;
    for (const absl::string_view line : absl::StrSplit(absl::StripSuffix(part, "\n"), '\n')) {
      expectations = expectations || line == "// EXPECT" || absl::StartsWith(line, "// ERROR: ") ||
                     absl::StartsWith(line, "// REPORT ");
      absl::StrAppend(expectations ? &one.expected : &one.given, line, "\n");
    }
    cases.push_back(std::move(one));
  }
  return cases;
}

// What the expectations of a case should say.
std::string RunCase(const Case& one) {
  const auto outcome = [&]() -> absl::StatusOr<Outcome> {
    for (absl::string_view line : absl::StrSplit(one.given, '\n')) {
      if (!absl::ConsumePrefix(&line, "// RUN: ")) continue;
      const std::vector<absl::string_view> words = absl::StrSplit(line, absl::MaxSplits(' ', 1));
      for (const Directive& directive : kDirectives) {
        if (directive.name != words[0]) continue;
        ASSIGN_OR_RETURN(const Input input, ParseInput(one.given));
        return directive.run(words.size() > 1 ? words[1] : "", input);
      }
      const auto list = [](std::string* out, const Directive& d) {
        absl::StrAppend(out, d.name, " (", d.summary, ")");
      };
      return absl::NotFoundError(
          absl::StrCat("no directive is named ", words[0], "; known: ", absl::StrJoin(kDirectives, ", ", list)));
    }
    return absl::NotFoundError("the case has no line // RUN: DIRECTIVE");
  }();
  if (!outcome.ok()) {
    return absl::StrCat("// ERROR: ", absl::StrReplaceAll(outcome.status().message(), {{"\n", " "}}), "\n");
  }
  std::string expected;
  if (!outcome->text.empty()) absl::StrAppend(&expected, "// EXPECT\n", outcome->text);
  for (const std::string& report : outcome->reports) absl::StrAppend(&expected, "// REPORT ", report, "\n");
  return expected;
}

std::vector<std::string> GoldenFiles() {
  std::vector<std::string> files;
  for (const absl::string_view folder : kFolders) {
    const std::filesystem::path path(absl::StrCat(MT_SOURCE_DIR, "/tests/", folder));
    if (!std::filesystem::is_directory(path)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      if (entry.path().extension() == ".mtir") {
        files.push_back(absl::StrCat(folder, "/", entry.path().filename().string()));
      }
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

class GoldenTest : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenTest, SaysWhatTheFileExpects) {
  const std::string path = absl::StrCat(MT_SOURCE_DIR, "/tests/", GetParam());
  ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(path));
  std::vector<std::string> updated;
  for (const Case& one : SplitCases(text)) {
    const std::string expected = RunCase(one);
    updated.push_back(absl::StrCat(one.given, expected));
    if (update) continue;
    EXPECT_FALSE(one.expected.empty()) << one.given << "expects nothing; run golden_test --update";
    EXPECT_EQ(one.expected, expected) << one.given << "of " << path
                                      << " gives the second text; where that is right, run golden_test --update";
  }
  const std::string joined = absl::StrJoin(updated, kDivider);
  if (update && joined != text) {
    ASSERT_OK(WriteFile(path, joined));
  }
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenTest, ::testing::ValuesIn(GoldenFiles()), [](const auto& info) {
  std::string name = info.param;
  for (char& c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return name;
});

TEST(GoldenFilesTest, EveryPassAndDirectiveHasACase) {
  std::string all;
  for (const std::string& file : GoldenFiles()) {
    ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(absl::StrCat(MT_SOURCE_DIR, "/tests/", file)));
    absl::StrAppend(&all, text);
  }
  for (const Directive& directive : kDirectives) {
    EXPECT_TRUE(absl::StrContains(all, absl::StrCat("// RUN: ", directive.name))) << directive.name;
  }
  const std::vector<std::string> files = GoldenFiles();
  for (const PassDef* pass : Passes().Unique()) {
    EXPECT_THAT(files, ::testing::Contains(absl::StrCat("passes/", pass->name, ".mtir")));
  }
}

// The runner itself: what differs is seen, what is wrong is said.
TEST(GoldenFilesTest, ADifferenceIsSeen) {
  const std::vector<Case> cases = SplitCases(
      "// RUN: parse\ngraph @g {\n}\n// EXPECT\ngraph @h stage=forward {\n}\n"
      "// -----\n// RUN: parse\ngraph @g {\n"
      "// -----\n// RUN: pars\n"
      "// -----\ngraph @g {\n}\n");
  ASSERT_EQ(cases.size(), 4u);
  EXPECT_EQ(cases[0].expected, "// EXPECT\ngraph @h stage=forward {\n}\n");
  EXPECT_EQ(RunCase(cases[0]), "// EXPECT\ngraph @g stage=forward {\n}\n");
  EXPECT_EQ(RunCase(cases[1]), "// ERROR: line 2: the text ends here; expected } at the end of graph @g\n");
  EXPECT_THAT(RunCase(cases[2]), ::testing::HasSubstr("no directive is named pars; known: parse ("));
  EXPECT_EQ(RunCase(cases[3]), "// ERROR: the case has no line // RUN: DIRECTIVE\n");
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  for (int i = 1; i < argc; ++i) mt::update = mt::update || absl::string_view(argv[i]) == "--update";
  return RUN_ALL_TESTS();
}
