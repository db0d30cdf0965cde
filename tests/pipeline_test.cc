// Pipeline text: parse, print, order, errors; and the documentation made from the rows.
#include "passes/pipeline.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "passes/describe.h"
#include "passes/registry.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

absl::StatusOr<bool> Nothing(Module&, const Attrs&, PassContext&) { return false; }

// A registry with passes of every kind of option.
constexpr PassOption kWideOptions[] = {
    {.name = "residual", .kind = AttrKind::kDType, .doc = "dtype of the residual stream", .default_text = "bf16"}};
constexpr PassOption kWindowOptions[] = {
    {.name = "window", .kind = AttrKind::kInt, .doc = "keys before the query", .default_text = "-1", .min = -1},
    {.name = "fast_backward", .kind = AttrKind::kBool, .doc = "with atomics", .default_text = "false"}};
constexpr PassOption kBudgetOptions[] = {
    {.name = "budget", .kind = AttrKind::kInt, .doc = "largest arena", .default_text = "0", .is_bytes = true, .min = 0},
    {.name = "free", .kind = AttrKind::kBool, .doc = "only what costs nothing", .default_text = "false"},
    {.name = "order",
     .kind = AttrKind::kString,
     .doc = "what goes first",
     .default_text = "largest",
     .choices = "largest|oldest"},
    {.name = "slack", .kind = AttrKind::kDouble, .doc = "share of the budget", .default_text = "0.5", .min = 0}};
constexpr PassOption kStepsOptions[] = {{.name = "steps", .kind = AttrKind::kInt, .doc = "microbatches", .min = 1}};
constexpr absl::string_view kRematNames[] = {"gradient_checkpointing", "activation-checkpointing"};

constexpr PassDef kBegin = {
    .name = "begin", .summary = "Begins.", .any_stage = true, .always_on = true, .run = Nothing};
constexpr PassDef kFlash = {.name = "flash", .summary = "Fuses attention.", .options = kWindowOptions, .run = Nothing};
constexpr PassDef kBf16 = {.name = "bf16",
                           .summary = "Computes in bf16.",
                           .options = kWideOptions,
                           .source = "A paper (2018)",
                           .tolerance = 0.01,
                           .run = Nothing};
constexpr PassDef kFp16 = {.name = "fp16", .summary = "Computes in fp16.", .run = Nothing};
constexpr PassDef kAccumulate = {
    .name = "accumulate", .summary = "Microbatches.", .options = kStepsOptions, .run = Nothing};
constexpr PassDef kPadVocab = {.name = "pad_vocab", .summary = "Pads.", .run = Nothing};
constexpr PassDef kRemat = {.name = "remat",
                            .summary = "Computes again.",
                            .options = kBudgetOptions,
                            .requires_stage = Stage::kOptimized,
                            .provides_stage = Stage::kOptimized,
                            .also_known_as = kRematNames,
                            .run = Nothing};
constexpr const PassDef* kOrder[] = {&kBegin, &kFlash, &kBf16, &kFp16, &kPadVocab, &kAccumulate, &kBegin, &kRemat};
constexpr NamedPipeline kNamed[] = {
    {.name = "default", .target = "cuda", .text = "remat,bf16,flash:window=64", .summary = ""},
    {.name = "default", .target = "cpu", .text = "flash", .summary = ""},
    {.name = "none", .target = "", .text = "", .summary = ""}};
constexpr Contradiction kContradictions[] = {{.a = "bf16", .b = "fp16", .reason = "a module has one precision"}};
constexpr PassRegistry kRegistry = {.order = kOrder, .named = kNamed, .contradictions = kContradictions};

absl::StatusOr<Pipeline> Parse(absl::string_view text, absl::string_view target = "cuda") {
  return ParsePipeline(text, target, kRegistry);
}

// The canonical text, or the error.
std::string Canonical(absl::string_view text, absl::string_view target = "cuda") {
  const absl::StatusOr<Pipeline> pipeline = Parse(text, target);
  return pipeline.ok() ? pipeline->ToString() : std::string(pipeline.status().message());
}

TEST(PipelineTest, PrintsEveryOption) {
  EXPECT_EQ(Canonical("remat"), "remat:budget=0B:free=false:order=largest:slack=0.5");
  EXPECT_EQ(Canonical("remat:free:budget=8GiB"), "remat:budget=8GiB:free=true:order=largest:slack=0.5");
  EXPECT_EQ(Canonical("remat:slack=1:order=oldest"), "remat:budget=0B:free=false:order=oldest:slack=1.0");
  EXPECT_EQ(Canonical("bf16:residual=f32"), "bf16:residual=f32");
  EXPECT_EQ(Canonical("flash:fast-backward"), "flash:window=-1:fast_backward=true");
  EXPECT_EQ(Canonical(" pad-vocab , accumulate:steps=4 "), "pad_vocab,accumulate:steps=4");
}

TEST(PipelineTest, ParseOfPrintIsTheSame) {
  for (const char* text : {"none", "default", "remat:budget=1536B", "bf16,flash:window=3,remat:slack=0.1:free",
                           "pad_vocab,accumulate:steps=7", "-flash,+fp16,-bf16", "none,+remat"}) {
    SCOPED_TRACE(text);
    ASSERT_OK_AND_ASSIGN(const Pipeline once, Parse(text));
    ASSERT_OK_AND_ASSIGN(const Pipeline twice, Parse(once.ToString()));
    EXPECT_EQ(once, twice);
    EXPECT_EQ(once.ToString(), twice.ToString());
  }
}

TEST(PipelineTest, AnyTypedOrderIsTheSame) {
  std::vector<std::string> passes = {"accumulate:steps=2", "bf16", "flash:window=8", "remat:free"};
  ASSERT_OK_AND_ASSIGN(const Pipeline first, Parse(absl::StrJoin(passes, ",")));
  std::vector<absl::string_view> order;
  for (const PipelineStep& step : first.steps) order.push_back(step.pass->name);
  EXPECT_THAT(order, ::testing::ElementsAre("begin", "flash", "bf16", "accumulate", "begin", "remat"));
  int permutations = 0;
  do {
    ++permutations;
    ASSERT_OK_AND_ASSIGN(const Pipeline pipeline, Parse(absl::StrJoin(passes, ",")));
    EXPECT_EQ(pipeline, first);
  } while (std::next_permutation(passes.begin(), passes.end()));
  EXPECT_EQ(permutations, 24);
}

TEST(PipelineTest, NamedPipelinesAndEdits) {
  EXPECT_EQ(Canonical("none"), "none");
  EXPECT_EQ(Canonical("default", "cpu"), "flash:window=-1:fast_backward=false");
  const std::string remat = "remat:budget=0B:free=false:order=largest:slack=0.5";
  EXPECT_EQ(Canonical("default"), "flash:window=64:fast_backward=false,bf16:residual=bf16," + remat);
  EXPECT_EQ(Canonical("-flash"), "bf16:residual=bf16," + remat);
  EXPECT_EQ(Canonical("default,-flash,+pad_vocab"), "bf16:residual=bf16,pad_vocab," + remat);
  // An edit may give a pass of the default other options.
  EXPECT_EQ(Canonical("+flash:window=2,-remat,-bf16"), "flash:window=2:fast_backward=false");
  EXPECT_EQ(Canonical("none,+pad-vocab"), "pad_vocab");
}

TEST(PipelineTest, ErrorsHaveColumnsNamesAndRemedies) {
  const std::string known = "known: flash, bf16, fp16, pad_vocab, accumulate, remat, default, none";
  EXPECT_EQ(Canonical("bf16,flahs"),
            "--passes, column 6: no pass is named \"flahs\"; did you mean \"flash\"? " + known);
  EXPECT_EQ(Canonical("zero3"), "--passes, column 1: no pass is named \"zero3\"; " + known);
  EXPECT_THAT(Canonical("gradient_checkpointing"), HasSubstr("did you mean \"remat\"?"));
  EXPECT_THAT(Canonical("bf16, activation_checkpointing"), HasSubstr("column 7: "));
  EXPECT_THAT(Canonical("bf16, activation_checkpointing"), HasSubstr("did you mean \"remat\"?"));
  EXPECT_EQ(Canonical("bf16,begin"), "--passes, column 6: \"begin\" always runs and is not chosen here; leave it out");
  EXPECT_EQ(Canonical("-begin"), "--passes, column 2: \"begin\" always runs and is not chosen here; leave it out");
  EXPECT_EQ(Canonical("fp16,bf16"),
            "--passes, column 6: bf16 contradicts fp16: a module has one precision; leave one of them out");
  EXPECT_THAT(Canonical("+fp16"), HasSubstr("bf16 contradicts fp16"));
  EXPECT_EQ(Canonical("flash,flash"), "--passes, column 7: \"flash\" is named twice");
  EXPECT_EQ(Canonical("flash:windw=3"),
            "--passes, column 7: flash has no option \"windw\"; did you mean \"window\"? known: window, fast_backward");
  EXPECT_EQ(Canonical("pad_vocab:to=64"), "--passes, column 11: pad_vocab takes no options");
  EXPECT_EQ(Canonical("flash:window"),
            "--passes, column 7: flash:window needs a value, window=VALUE (keys before the query)");
  EXPECT_EQ(Canonical("flash:window=3:window=4"), "--passes, column 16: \"window\" is given twice");
  EXPECT_EQ(Canonical("flash:window=x"), "--passes, column 7: flash:window=x is wrong; expected a value of kind int");
  EXPECT_EQ(Canonical("flash:window=-2"), "--passes, column 7: flash:window=-2 is wrong; expected at least -1");
  EXPECT_EQ(Canonical("remat:order=newest"),
            "--passes, column 7: remat:order=newest is wrong; expected largest, oldest");
  EXPECT_EQ(Canonical("remat:slack=-0.5"), "--passes, column 7: remat:slack=-0.5 is wrong; expected at least 0");
  EXPECT_THAT(Canonical("remat:budget=8Gb"), AllOf(HasSubstr("column 7: remat:budget=8Gb"), HasSubstr("8GiB")));
  EXPECT_EQ(Canonical("accumulate"),
            "--passes, column 1: accumulate needs an option: accumulate:steps=VALUE (microbatches)");
  EXPECT_EQ(Canonical("bf16,,flash"), "--passes, column 6: expected a pass");
  EXPECT_EQ(Canonical("bf16,"), "--passes, column 6: expected a pass");
  EXPECT_EQ(Canonical("bf16:"), "--passes, column 6: expected an option after \":\"");
  EXPECT_EQ(Canonical("bf16:=3"), "--passes, column 6: expected an option's name before \"=\"");
  EXPECT_EQ(Canonical(""), "--passes is empty; write none for no optional pass, or default");
  EXPECT_THAT(Canonical("bf16,none"), HasSubstr("column 6: \"none\" stands alone or first"));
  EXPECT_THAT(Canonical("default,flash"), HasSubstr("column 1: \"default\" stands alone or first"));
  EXPECT_THAT(Canonical("+flash,fp16"), HasSubstr("column 8: \"fp16\" has no sign, but others have; write +fp16"));
  EXPECT_THAT(Canonical("-pad_vocab"), HasSubstr("column 2: \"pad_vocab\" is not there to be taken out"));
  EXPECT_THAT(Canonical("-flash:window=3"), HasSubstr("column 8: -flash takes no options"));
  EXPECT_THAT(Canonical(std::string(5000, 'a')), HasSubstr("at most 4096"));
}

TEST(PipelineTest, TheToolsRegistry) {
  ASSERT_OK_AND_ASSIGN(const Pipeline none, ParsePipeline("none"));
  EXPECT_EQ(none.ToString(), "none");
  for (const char* pass : {"autodiff", "optimizer", "canonicalize", "cse", "dce"}) {
    EXPECT_TRUE(none.Has(pass)) << pass;
    EXPECT_THAT(ParsePipeline(pass), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("always runs")));
  }
  EXPECT_FALSE(none.Has("flash_attention"));
  ASSERT_OK_AND_ASSIGN(const Pipeline best, ParsePipeline("default"));
  ASSERT_OK_AND_ASSIGN(const Pipeline again, ParsePipeline(best.ToString()));
  EXPECT_EQ(best, again);
  EXPECT_THAT(ParsePipeline("no_such_pass"), StatusIs(absl::StatusCode::kInvalidArgument,
                                                      AllOf(HasSubstr("column 1: no pass is named \"no_such_pass\""),
                                                            HasSubstr("known: "), HasSubstr("default, none"))));
}

TEST(PipelineTest, DriverSetsOptionsOfPassesThatAlwaysRun) {
  ASSERT_OK_AND_ASSIGN(Pipeline pipeline, ParsePipeline("none"));
  EXPECT_OK(pipeline.SetOption("optimizer", "kind", "adam"));
  EXPECT_THAT(pipeline.SetOption("optimizer", "kind", "sgd"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("kind=sgd is wrong; expected adamw, adam, none")));
  EXPECT_THAT(pipeline.SetOption("optimizer", "kid", "adam"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no option optimizer:kid")));
}

// What the text promises of every row holds for every row.
TEST(PipelineTest, RowsAreWellFormed) {
  for (const PassDef* pass : Passes().Unique()) {
    SCOPED_TRACE(pass->name);
    EXPECT_NE(pass->run, nullptr);
    EXPECT_FALSE(pass->summary.empty());
    EXPECT_EQ(pass->summary.back(), '.');
    EXPECT_EQ(pass->name.find('-'), absl::string_view::npos);
    for (const PassOption& option : pass->options) {
      SCOPED_TRACE(option.name);
      EXPECT_NE(option.kind, AttrKind::kIntList);
      EXPECT_FALSE(option.doc.empty());
      EXPECT_FALSE(pass->always_on && option.default_text.empty());
      if (option.default_text.empty()) continue;
      ASSERT_OK_AND_ASSIGN(const AttrValue value, ParseOptionValue(option, option.default_text));
      EXPECT_EQ(OptionValueToString(option, value), option.default_text);
    }
  }
  for (const Contradiction& pair : Passes().contradictions) {
    EXPECT_NE(Passes().Find(pair.a), nullptr) << pair.a;
    EXPECT_NE(Passes().Find(pair.b), nullptr) << pair.b;
  }
  for (const NamedPipeline& named : Passes().named) EXPECT_OK(ParsePipeline(named.name, named.target)) << named.name;
}

TEST(DescribeTest, APass) {
  const std::string text = DescribePass(kBf16);
  EXPECT_THAT(text, HasSubstr("bf16: Computes in bf16.\n"));
  EXPECT_THAT(text, HasSubstr("forward"));
  EXPECT_THAT(text, HasSubstr("residual=bf16"));
  EXPECT_THAT(text, HasSubstr("dtype of the residual stream"));
  EXPECT_THAT(text, HasSubstr("A paper (2018)"));
  EXPECT_THAT(text, HasSubstr("0.01"));
  EXPECT_THAT(text, Not(HasSubstr("always")));
  EXPECT_THAT(DescribePass(kRemat), HasSubstr("gradient_checkpointing, activation-checkpointing"));
  EXPECT_THAT(DescribePass(kAccumulate), HasSubstr("steps=INT"));
  EXPECT_THAT(DescribePass(kAutodiffPass), AllOf(HasSubstr("forward -> training"), HasSubstr("always")));
}

TEST(DescribeTest, AllPasses) {
  const std::string text = DescribePasses(kRegistry, "cuda");
  for (const PassDef* pass : kRegistry.Unique()) EXPECT_THAT(text, HasSubstr(pass->summary)) << pass->name;
  EXPECT_THAT(text, HasSubstr("default"));
  EXPECT_THAT(text, HasSubstr("remat,bf16,flash:window=64"));
  // One line a pass.
  int lines = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) lines += absl::StartsWith(line, "  ") ? 1 : 0;
  EXPECT_GE(lines, 7);
}

}  // namespace
}  // namespace mt
