// Table-driven command lines. A tool is data (ToolDef): its commands, their positionals, its flags. Parsing, --help,
// --version, "did you mean", bash completion and "that flag belongs to the other tool" all come from the table.
//
// The tables of all tools are in ir/base/tools_*.cc (see tools.h), so that each tool knows the others' flags by name. A
// main is:
//
//     #include "ir/base/flags.h"
//     #include "ir/base/tools.h"
//
//     namespace mt {
//     namespace {
//     absl::Status Compile(const ParsedArgs& args) {
//       const std::string& spec = args.positional(0);               // arity was checked
//       const int64_t threads = args.Int("threads");                // has a default in the table
//       std::optional<int64_t> memory = args.OptionalBytes("memory");  // has none
//       for (const std::string& set : args.Strings("set")) ...      // repeated, or a comma list
//       if (args.Has("batch") && args.String("batch") == "max") ... // typed by the user; a word beside the numbers
//       return absl::OkStatus();                                    // an error is printed and becomes the exit code
//     }
//     }  // namespace
//     }  // namespace mt
//
//     int main(int argc, char** argv) {
//       return mt::RunTool(mt::kMtc, argc, argv, [](const mt::ParsedArgs& args) {
//         if (args.command() == "compile") return mt::Compile(args);
//         ...
//       });
//     }
#ifndef MT_IR_BASE_FLAGS_H_
#define MT_IR_BASE_FLAGS_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mt {

enum class FlagKind {
  kBool,     // --x, --no-x, --x=true|false|1|0|yes|no
  kInt,      // int64_t within [min, max]
  kDouble,   // finite, within [min, max]
  kBytes,    // int64_t through ParseBytes: 24GiB, 512MiB, 1048576
  kString,   // any text
  kStrings,  // may be given several times; each is kept whole
  kList,     // comma-separated, may be given several times; the pieces, in order
  kChoice,   // one of `choices`
};

// One flag. '-' and '_' are equal in names; write '-' here.
struct FlagDef {
  absl::string_view name = "";
  FlagKind kind = FlagKind::kString;
  // In help: "N", "FILE". FILE, DIR, PLAN and SPEC are paths: never empty, completed as such. Bools have none.
  absl::string_view metavar = "";
  absl::string_view help = "";          // One line.
  absl::string_view default_text = "";  // Parsed like a user's value, shown in help. Empty: unset (bools: false).
  absl::string_view commands = "";      // Names of the commands that take it, separated by spaces. Empty: all.
  // "a|b|c". For kInt, kDouble, kBytes: words allowed beside a number ("max"), read by String().
  absl::string_view choices = "";
  char letter = '\0';  // Short form: 'o' for "-o FILE".
  // kInt, kDouble, kBytes: smallest and largest allowed.
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
};

struct ToolDef;

// One command, or the whole tool where it has no commands (then `name` is empty and it is the only one).
struct CommandDef {
  absl::string_view name = "";
  // "SPEC", "[NAME]", "FILE...": required, optional, one or more (last).
  absl::string_view positionals = "";
  absl::string_view summary = "";  // One line.
  // Flags of that other tool are accepted as well and kept unparsed in forwarded(), for a command that becomes that
  // tool. A name that both have is this tool's.
  const ToolDef* forwards_to = nullptr;
};

struct ToolDef {
  absl::string_view name = "";
  absl::string_view summary = "";
  absl::Span<const CommandDef> commands = {};
  absl::Span<const FlagDef> flags = {};
  absl::string_view examples = "";  // Lines shown at the end of the tool's help; each works pasted into bash.
};

// What the user typed, checked: every value has its type, range and choice, every command its positionals.
// Asking for a flag that the table lacks, or in another kind, is a CHECK failure.
class ParsedArgs {
 public:
  absl::string_view command() const { return command_; }
  absl::Span<const std::string> positionals() const { return positionals_; }
  const std::string& positional(size_t i) const { return positionals_[i]; }

  bool Has(absl::string_view name) const;  // Typed by the user (a default does not count).

  bool Bool(absl::string_view name) const;
  // The typed value or the default. CHECK fails where there is neither, or where the value is one of the allowed words.
  int64_t Int(absl::string_view name) const;
  double Double(absl::string_view name) const;
  int64_t Bytes(absl::string_view name) const;
  // The typed value or the default; nullopt where there is neither, or where the value is one of the allowed words.
  std::optional<int64_t> OptionalInt(absl::string_view name) const;
  std::optional<double> OptionalDouble(absl::string_view name) const;
  std::optional<int64_t> OptionalBytes(absl::string_view name) const;
  // The text of any flag of one value: typed, or the default, or "".
  std::string String(absl::string_view name) const;
  // kStrings, kList: all values, or the default's; empty where there is neither.
  std::vector<std::string> Strings(absl::string_view name) const;

  // Flags that CommandDef::forwards_to owns, as an argument vector ("--lr", "1e-3").
  const std::vector<std::string>& forwarded() const { return forwarded_; }
  // The whole command line as typed, quoted where bash needs it: for summary.json and messages.
  const std::string& command_line() const { return command_line_; }
  // Text that --help, --version or --completion asked for; the tool prints it and does nothing else.
  const std::optional<std::string>& answer() const { return answer_; }

 private:
  friend class ArgParser;
  const FlagDef& Flag(absl::string_view name) const;
  std::optional<std::string> Last(const FlagDef& flag) const;

  const ToolDef* tool_ = nullptr;
  std::string command_;
  std::vector<std::string> positionals_;
  std::map<std::string, std::vector<std::string>> values_;  // Flag name as in the table -> values as typed.
  std::vector<std::string> forwarded_;
  std::string command_line_;
  std::optional<std::string> answer_;
};

// Parses `arguments` (without the program's name). A flag given twice: the last counts, except kStrings and kList.
// "--" ends the flags. `others`: tools whose flags are known by name, for the error that says where they go.
// Errors: InvalidArgument, one line.
absl::StatusOr<ParsedArgs> ParseArgs(const ToolDef& tool, absl::Span<const ToolDef* const> others,
                                     absl::Span<const std::string> arguments);

// A whole main: parses against the table, answers --help, --version and --completion, runs `body`, prints one line
// "error: ..." for what went wrong and returns the exit code. A failed write to standard output is exit code 7.
int RunTool(const ToolDef& tool, int argc, char** argv, const std::function<absl::Status(const ParsedArgs&)>& body);

// Prints "error: MESSAGE" to standard error where `status` is not OK; returns ExitCode(status).
int ReportStatus(const absl::Status& status);

// The exit codes of all tools:
//   0  OK
//   1  our bug                               Internal, Unknown, Aborted, DeadlineExceeded, Unauthenticated
//   2  usage, a bad value, contradiction     InvalidArgument, Unimplemented (this build or target cannot)
//   3  does not fit                          ResourceExhausted
//   4  bad or missing input                  NotFound, FailedPrecondition, PermissionDenied, AlreadyExists
//   5  numeric failure                       OutOfRange
//   6  peer or NCCL                          Unavailable
//   7  failed write                          DataLoss
// 130  interrupted                           Cancelled
int ExitCode(const absl::Status& status);

// Help of the tool (`command` empty) or of one command.
std::string HelpText(const ToolDef& tool, absl::string_view command);

// A bash completion script for `tool`: commands, flags, choices, and the zoo's names where a SPEC goes.
std::string BashCompletion(const ToolDef& tool, absl::Span<const std::string> models);

// The project's version, "0.1.0".
absl::string_view Version();

// The name of `candidates` nearest to `text`, at most two edits away ('-' and '_' equal, case ignored); "" if there is
// none.
std::string DidYouMean(absl::string_view text, absl::Span<const std::string> candidates);

// Quotes `text` for bash where it has a character that needs it.
std::string ShellQuote(absl::string_view text);

}  // namespace mt

#endif  // MT_IR_BASE_FLAGS_H_
