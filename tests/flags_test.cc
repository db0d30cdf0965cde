#include "ir/base/flags.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "ir/base/tools.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr CommandDef kRunCommands[] = {{.positionals = "PLAN"}};
constexpr FlagDef kRunFlags[] = {
    {.name = "lr", .kind = FlagKind::kDouble, .default_text = "1e-3", .min = 0, .max = 10},
    {.name = "measure", .kind = FlagKind::kBool},
    {.name = "data", .metavar = "DIR"},
};
constinit const ToolDef kRun = {.name = "toyrun", .summary = "runs", .commands = kRunCommands, .flags = kRunFlags};

constexpr CommandDef kToyCommands[] = {
    {.name = "compile", .positionals = "SPEC", .summary = "Compiles."},
    {.name = "list", .positionals = "[NAME]", .summary = "Lists."},
    {.name = "join", .positionals = "FILE...", .summary = "Joins."},
    {.name = "train", .positionals = "SPEC", .summary = "Both.", .forwards_to = &kRun},
};
constexpr FlagDef kToyFlags[] = {
    {.name = "batch",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Sequences",
     .default_text = "8",
     .commands = "compile train",
     .choices = "max",
     .min = 1,
     .max = 1 << 20},
    {.name = "scale", .kind = FlagKind::kDouble, .commands = "compile", .min = -1},
    {.name = "memory", .kind = FlagKind::kBytes, .metavar = "BYTES", .commands = "compile", .min = 1024},
    {.name = "dump-dir", .metavar = "DIR", .help = "Folder for dumps", .commands = "compile"},
    {.name = "check", .kind = FlagKind::kBool, .help = "Checks", .default_text = "true", .commands = "compile"},
    {.name = "quiet", .kind = FlagKind::kBool, .commands = "compile train"},
    {.name = "passes", .kind = FlagKind::kStrings, .metavar = "LIST", .default_text = "default", .commands = "compile"},
    {.name = "set", .kind = FlagKind::kList, .commands = "compile"},
    {.name = "target", .kind = FlagKind::kChoice, .default_text = "cpu", .commands = "compile", .choices = "cpu|null"},
    {.name = "output", .metavar = "PLAN", .help = "The plan", .commands = "compile", .letter = 'o'},
    {.name = "json", .kind = FlagKind::kBool, .commands = "list"},
    {.name = "data", .metavar = "DIR", .commands = "train"},
};
constinit const ToolDef kToy = {
    .name = "toy", .summary = "is a toy", .commands = kToyCommands, .flags = kToyFlags, .examples = "toy compile x"};

absl::StatusOr<ParsedArgs> Parse(absl::string_view line) {
  const std::vector<std::string> arguments = absl::StrSplit(line, ' ', absl::SkipEmpty());
  const ToolDef* const tools[] = {&kToy, &kRun};
  return ParseArgs(kToy, tools, arguments);
}

std::string ErrorOf(absl::string_view line) {
  const absl::StatusOr<ParsedArgs> parsed = Parse(line);
  EXPECT_THAT(parsed, StatusIs(absl::StatusCode::kInvalidArgument, Not(HasSubstr("\n")))) << line;
  return std::string(parsed.status().message());
}

TEST(Flags, ValuesOfEveryKind) {
  ASSERT_OK_AND_ASSIGN(const ParsedArgs args, Parse("compile tiny --batch 32 --scale=-0.5 --memory 2KiB --dump_dir d "
                                                    "--passes a,b --passes=c --set x=1,y=2 --set z=3 "
                                                    "--target null -o p.plan --quiet --no-check"));
  EXPECT_EQ(args.command(), "compile");
  EXPECT_THAT(args.positionals(), ElementsAre("tiny"));
  EXPECT_EQ(args.Int("batch"), 32);
  EXPECT_EQ(args.Double("scale"), -0.5);
  EXPECT_EQ(args.Bytes("memory"), 2048);
  EXPECT_EQ(args.String("dump-dir"), "d");
  EXPECT_THAT(args.Strings("passes"), ElementsAre("a,b", "c"));
  EXPECT_THAT(args.Strings("set"), ElementsAre("x=1", "y=2", "z=3"));
  EXPECT_EQ(args.String("target"), "null");
  EXPECT_EQ(args.String("output"), "p.plan");
  EXPECT_TRUE(args.Bool("quiet"));
  EXPECT_FALSE(args.Bool("check"));
  EXPECT_THAT(args.command_line(), HasSubstr("toy compile tiny --batch 32"));
}

TEST(Flags, DefaultsAndAbsence) {
  ASSERT_OK_AND_ASSIGN(const ParsedArgs args, Parse("compile tiny"));
  EXPECT_EQ(args.Int("batch"), 8);
  EXPECT_FALSE(args.Has("batch"));
  EXPECT_EQ(args.OptionalDouble("scale"), std::nullopt);
  EXPECT_EQ(args.OptionalBytes("memory"), std::nullopt);
  EXPECT_EQ(args.String("output"), "");
  EXPECT_TRUE(args.Bool("check"));
  EXPECT_FALSE(args.Bool("quiet"));
  EXPECT_THAT(args.Strings("passes"), ElementsAre("default"));
  EXPECT_THAT(args.Strings("set"), IsEmpty());
}

TEST(Flags, SpellingsAreEqual) {
  for (const char* line :
       {"compile t --dump-dir=x", "compile t --dump_dir x", "compile --dump-dir x t", "compile --dump_dir=x -- t"}) {
    ASSERT_OK_AND_ASSIGN(const ParsedArgs args, Parse(line));
    EXPECT_EQ(args.String("dump-dir"), "x") << line;
    EXPECT_THAT(args.positionals(), ElementsAre("t")) << line;
  }
  for (const char* yes : {"--quiet", "--quiet=true", "--quiet=1", "--quiet=yes"}) {
    EXPECT_TRUE(Parse(absl::StrCat("compile t ", yes))->Bool("quiet")) << yes;
  }
  for (const char* no :
       {"--no-quiet", "--no_quiet", "--quiet=false", "--quiet=0", "--quiet=no", "--quiet --no-quiet"}) {
    EXPECT_FALSE(Parse(absl::StrCat("compile t ", no))->Bool("quiet")) << no;
  }
  for (const char* output : {"-o p", "-op", "-o=p", "--output p", "--output=x -o p"}) {
    EXPECT_EQ(Parse(absl::StrCat("compile t ", output))->String("output"), "p") << output;
  }
}

TEST(Flags, WordsBesideNumbers) {
  ASSERT_OK_AND_ASSIGN(const ParsedArgs args, Parse("compile t --batch max"));
  EXPECT_TRUE(args.Has("batch"));
  EXPECT_EQ(args.String("batch"), "max");
  EXPECT_EQ(args.OptionalInt("batch"), std::nullopt);
}

TEST(Flags, DashAndNegativeNumbersAreValues) {
  ASSERT_OK_AND_ASSIGN(const ParsedArgs joined, Parse("join - b -- --c"));
  EXPECT_THAT(joined.positionals(), ElementsAre("-", "b", "--c"));
  EXPECT_EQ(Parse("compile t --scale -0.25")->Double("scale"), -0.25);
  EXPECT_THAT(Parse("compile t --passes +x,-y")->Strings("passes"), ElementsAre("+x,-y"));
}

TEST(Flags, BadValues) {
  EXPECT_EQ(ErrorOf("compile t --batch abc"), "--batch: \"abc\" is not a whole number or max");
  EXPECT_EQ(ErrorOf("compile t --batch 1.5"), "--batch: \"1.5\" is not a whole number or max");
  EXPECT_EQ(ErrorOf("compile t --batch 99999999999999999999"),
            "--batch: \"99999999999999999999\" is not a whole number or max");
  EXPECT_EQ(ErrorOf("compile t --batch 0"), "--batch: 0 is below the minimum, 1");
  EXPECT_EQ(ErrorOf("compile t --batch 1048577"), "--batch: 1048577 is above the maximum, 1048576");
  EXPECT_EQ(ErrorOf("compile t --scale nan"), "--scale: \"nan\" is not a finite number");
  EXPECT_EQ(ErrorOf("compile t --scale=inf"), "--scale: \"inf\" is not a finite number");
  EXPECT_EQ(ErrorOf("compile t --scale=-2"), "--scale: -2 is below the minimum, -1");
  EXPECT_THAT(ErrorOf("compile t --memory 8Gb"), HasSubstr("--memory: \"8Gb\""));
  EXPECT_THAT(ErrorOf("compile t --memory 8Gb"), HasSubstr("8GiB"));
  EXPECT_EQ(ErrorOf("compile t --memory 1B"), "--memory: 1B is below the minimum, 1KiB");
  EXPECT_EQ(ErrorOf("compile t --target cppu"), "--target: \"cppu\" is not one of cpu, null; did you mean cpu?");
  EXPECT_EQ(ErrorOf("compile t --quiet=maybe"), "--quiet: \"maybe\" is not true or false");
  EXPECT_EQ(ErrorOf("compile t --no-quiet=true"), "--no-quiet takes no value; write --quiet=true");
  EXPECT_EQ(ErrorOf("compile t --output="), "--output: a path cannot be empty");
}

TEST(Flags, MissingValues) {
  EXPECT_EQ(ErrorOf("compile t --memory"), "--memory needs a value: --memory BYTES");
  EXPECT_THAT(ErrorOf("compile t --memory --quiet"), HasSubstr("--memory needs a value"));
  EXPECT_THAT(ErrorOf("compile t -o"), HasSubstr("--output needs a value: -o, --output PLAN"));
}

TEST(Flags, UnknownFlagsSayWhatWasMeant) {
  EXPECT_EQ(ErrorOf("compile t --bacth 4"), "unknown flag --bacth; did you mean --batch?");
  EXPECT_EQ(ErrorOf("compile t --memry=4"), "unknown flag --memry; did you mean --memory?");
  EXPECT_EQ(ErrorOf("compile t --mesure"), "unknown flag --mesure; did you mean --measure, of toyrun?");
  EXPECT_EQ(ErrorOf("compile t --frobnicate"), "unknown flag --frobnicate; toy compile --help lists what there is");
  EXPECT_EQ(ErrorOf("compile t -x"), "unknown flag -x; toy compile --help lists what there is");
}

TEST(Flags, FlagsOfOthersSayWhereTheyGo) {
  EXPECT_EQ(ErrorOf("compile t --lr 1"), "--lr belongs to toyrun: put it on the toyrun command line");
  EXPECT_EQ(ErrorOf("list --batch 1"), "--batch belongs to toy compile, toy train, not to toy list");
  const ToolDef* const tools[] = {&kToy, &kRun};
  EXPECT_THAT(ParseArgs(kRun, tools, {"p.plan", "--batch", "4"}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       "--batch belongs to toy compile: put it on the toy compile command line"));
}

TEST(Flags, Commands) {
  EXPECT_EQ(ErrorOf(""), "toy needs a command: compile, list, join, train");
  EXPECT_EQ(ErrorOf("compil t"), "unknown command \"compil\"; did you mean toy compile?");
  EXPECT_EQ(ErrorOf("fly"), "unknown command \"fly\"; toy has compile, list, join, train");
  EXPECT_THAT(ErrorOf("--quiet compile t"), HasSubstr("before the command"));
}

TEST(Flags, PositionalCounts) {
  EXPECT_EQ(ErrorOf("compile"), "toy compile needs SPEC: toy compile SPEC");
  EXPECT_EQ(ErrorOf("compile a b"), "toy compile: unexpected argument \"b\"; it takes SPEC");
  EXPECT_EQ(ErrorOf("join"), "toy join needs FILE: toy join FILE...");
  EXPECT_EQ(ErrorOf("list a b"), "toy list: unexpected argument \"b\"; it takes [NAME]");
  EXPECT_OK(Parse("list"));
  EXPECT_OK(Parse("list a"));
  EXPECT_OK(Parse("join a b c"));
}

TEST(Flags, ForwardsTheOtherToolsFlags) {
  ASSERT_OK_AND_ASSIGN(const ParsedArgs args, Parse("train t --lr 0.5 --batch 4 --measure --data d --no-measure"));
  EXPECT_EQ(args.Int("batch"), 4);
  EXPECT_EQ(args.String("data"), "d");  // Both have it: it stays here.
  EXPECT_THAT(args.forwarded(), ElementsAre("--lr=0.5", "--measure=true", "--measure=false"));
  EXPECT_EQ(ErrorOf("train t --lr fast"), "--lr: \"fast\" is not a finite number");
  ASSERT_OK_AND_ASSIGN(const ParsedArgs again,
                       ParseArgs(kRun, {}, {"p", "--lr=0.5", "--measure=true", "--measure=false"}));
  EXPECT_EQ(again.Double("lr"), 0.5);
  EXPECT_FALSE(again.Bool("measure"));
}

TEST(Flags, HelpAndVersionAnswer) {
  EXPECT_THAT(*Parse("--help")->answer(), HasSubstr("compile SPEC"));
  EXPECT_THAT(*Parse("-h")->answer(), HasSubstr("toy compile x"));
  EXPECT_EQ(*Parse("help compile")->answer(), *Parse("compile --help")->answer());
  EXPECT_EQ(*Parse("compile -h")->answer(), HelpText(kToy, "compile"));
  EXPECT_EQ(*Parse("--version")->answer(), absl::StrCat("toy ", Version(), "\n"));
  EXPECT_THAT(HelpText(kToy, "train"), HasSubstr("flags of toyrun"));
  EXPECT_EQ(Parse("compile t")->answer(), std::nullopt);
  EXPECT_THAT(ErrorOf("--completion fish"), HasSubstr("use bash"));
}

TEST(Flags, NearestName) {
  EXPECT_EQ(DidYouMean("bacth", {"patch", "batch"}), "batch");
  EXPECT_EQ(DidYouMean("DUMP_DIR", {"dump-dir"}), "dump-dir");
  EXPECT_EQ(DidYouMean("xyz", {"lr", "seq"}), "");
  EXPECT_EQ(DidYouMean("sq", {"seq"}), "seq");
  EXPECT_EQ(DidYouMean(std::string(1 << 20, 'a'), {"batch"}), "");
}

TEST(Flags, QuotesForTheShell) {
  EXPECT_EQ(ShellQuote("remat:budget=8GiB,+x"), "remat:budget=8GiB,+x");
  EXPECT_EQ(ShellQuote("it's"), "'it'\\''s'");
  EXPECT_EQ(ShellQuote(""), "''");
  EXPECT_EQ(ShellQuote("a b$c"), "'a b$c'");
}

TEST(Flags, ExitCodes) {
  EXPECT_EQ(ExitCode(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCode(absl::InternalError("x")), 1);
  EXPECT_EQ(ExitCode(absl::InvalidArgumentError("x")), 2);
  EXPECT_EQ(ExitCode(absl::ResourceExhaustedError("x")), 3);
  EXPECT_EQ(ExitCode(absl::NotFoundError("x")), 4);
  EXPECT_EQ(ExitCode(absl::FailedPreconditionError("x")), 4);
  EXPECT_EQ(ExitCode(absl::OutOfRangeError("x")), 5);
  EXPECT_EQ(ExitCode(absl::UnavailableError("x")), 6);
  EXPECT_EQ(ExitCode(absl::DataLossError("x")), 7);
  EXPECT_EQ(ExitCode(absl::CancelledError("x")), 130);
}

TEST(Flags, RunToolReportsAndReturnsTheExitCode) {
  const auto run = [](std::vector<std::string> arguments, absl::Status result) {
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    return RunTool(kMtcorpus, static_cast<int>(argv.size()), argv.data(),
                   [&result](const ParsedArgs&) { return result; });
  };
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(run({"mtcorpus", "stat", "d"}, absl::DataLossError("disk full")), 7);
  EXPECT_EQ(run({"mtcorpus", "stta", "d"}, absl::OkStatus()), 2);
  EXPECT_EQ(run({"mtcorpus", "stat", "d"}, absl::OkStatus()), 0);
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "error: disk full\nerror: unknown command \"stta\"; did you mean mtcorpus stat?\n");
}

// Runs the completion function in a real bash on the words of `line`; the last word is the one being typed.
std::vector<std::string> Complete(const ToolDef& tool, const std::string& words) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/completion.", tool.name, ".bash");
  std::FILE* file = std::fopen(path.c_str(), "w");
  std::fputs(BashCompletion(tool, {"tiny_one", "tiny_two"}).c_str(), file);
  std::fclose(file);
  // compopt works only inside a completion; complete -p after sourcing proves that the function is registered.
  const std::string script = absl::StrCat(
      "compopt() { :; }; source ", path, " && complete -p ", tool.name, " >/dev/null && COMP_WORDS=(", words,
      ") && COMP_CWORD=$((${#COMP_WORDS[@]}-1)) && _", tool.name, "; printf '%s\\n' \"${COMPREPLY[@]}\"");
  std::FILE* pipe = ::popen(absl::StrCat("cd / && bash -c ", ShellQuote(script)).c_str(), "r");
  std::string output;
  char buffer[4096];
  for (size_t n = 0; (n = std::fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.append(buffer, n);
  EXPECT_EQ(::pclose(pipe), 0);
  return absl::StrSplit(output, '\n', absl::SkipEmpty());
}

TEST(Flags, BashCompletionWorksInBash) {
  EXPECT_THAT(Complete(kToy, "toy co"), ElementsAre("compile"));
  EXPECT_THAT(Complete(kToy, "toy compile --me"), ElementsAre("--memory"));
  EXPECT_THAT(Complete(kToy, "toy compile --target n"), ElementsAre("null"));
  EXPECT_THAT(Complete(kToy, "toy compile --target = n"), ElementsAre("null"));
  EXPECT_THAT(Complete(kToy, "toy compile tin"), ElementsAre("tiny_one", "tiny_two"));
  EXPECT_THAT(Complete(kToy, "toy compile --dump-dir et"), ElementsAre("etc"));
  EXPECT_THAT(Complete(kToy, "toy train --mea"), ElementsAre("--measure"));
  EXPECT_THAT(Complete(kRun, "toyrun --me"), ElementsAre("--measure"));
}

// The tables of the real tools.

TEST(ToolTables, AreConsistent) {
  for (const ToolDef* tool : AllTools()) {
    std::set<std::string> commands;
    for (const CommandDef& command : tool->commands) {
      EXPECT_TRUE(commands.insert(std::string(command.name)).second)
          << tool->name << " has two commands " << command.name;
      EXPECT_FALSE(command.summary.empty()) << tool->name << " " << command.name;
      std::set<std::string> names;
      std::set<char> letters;
      for (const FlagDef& flag : tool->flags) {
        const std::vector<std::string> takers = absl::StrSplit(flag.commands, ' ', absl::SkipEmpty());
        for (const std::string& taker : takers) {
          const bool known = std::any_of(tool->commands.begin(), tool->commands.end(),
                                         [&taker](const CommandDef& each) { return each.name == taker; });
          EXPECT_TRUE(known) << tool->name << " --" << flag.name << ": no command " << taker;
        }
        if (!takers.empty() && std::find(takers.begin(), takers.end(), command.name) == takers.end()) continue;
        EXPECT_TRUE(names.insert(std::string(flag.name)).second)
            << tool->name << " " << command.name << " --" << flag.name;
        EXPECT_TRUE(flag.letter == '\0' || letters.insert(flag.letter).second) << tool->name << " -" << flag.letter;
        EXPECT_FALSE(absl::StrContains(flag.name, "_")) << flag.name;
        EXPECT_FALSE(flag.help.empty()) << tool->name << " --" << flag.name;
        EXPECT_TRUE(flag.kind != FlagKind::kChoice || !flag.choices.empty()) << flag.name;
        const std::string help = HelpText(*tool, command.name);
        EXPECT_THAT(help, HasSubstr(absl::StrCat("--", flag.name))) << tool->name << " " << command.name;
      }
    }
  }
}

// Every default passes its own flag's checks: it is parsed like a user's value.
TEST(ToolTables, DefaultsAreValid) {
  for (const ToolDef* tool : AllTools()) {
    for (const FlagDef& flag : tool->flags) {
      if (flag.default_text.empty()) continue;
      const FlagDef flags[] = {{.name = flag.name,
                                .kind = flag.kind,
                                .metavar = flag.metavar,
                                .choices = flag.choices,
                                .min = flag.min,
                                .max = flag.max}};
      const CommandDef commands[] = {{.positionals = ""}};
      const ToolDef single = {.name = tool->name, .commands = commands, .flags = flags};
      EXPECT_OK(ParseArgs(single, {}, {absl::StrCat("--", flag.name, "=", flag.default_text)})) << tool->name;
    }
  }
}

TEST(ToolTables, KnowEachOther) {
  for (const auto& [tool, line, owner] : std::vector<std::tuple<const ToolDef*, std::vector<std::string>, std::string>>{
           {&kMtc, {"compile", "s", "--lr", "1e-3"}, "mtrun"},
           {&kMtc, {"inspect", "s", "--tokenizer", "char"}, "mtcorpus prep"},
           {&kMtrun, {"p", "--passes", "none"}, "mtc compile"},
           {&kMtcorpus, {"prep", "--batch", "4"}, "mtc compile"}}) {
    EXPECT_THAT(
        ParseArgs(*tool, AllTools(), line),
        StatusIs(absl::StatusCode::kInvalidArgument, EndsWith(absl::StrCat("put it on the ", owner, " command line"))));
  }
}

}  // namespace
}  // namespace mt
