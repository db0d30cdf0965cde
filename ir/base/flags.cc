#include "ir/base/flags.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"
#include "ir/base/units.h"

namespace mt {
namespace {

constexpr size_t kHelpColumn = 28;
constexpr size_t kHelpWidth = 110;

std::string Canonical(absl::string_view name) { return absl::StrReplaceAll(name, {{"_", "-"}}); }

std::vector<std::string> Words(absl::string_view text, char separator) {
  return absl::StrSplit(text, separator, absl::SkipEmpty());
}

bool Contains(const std::vector<std::string>& words, absl::string_view word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

bool TakenBy(const FlagDef& flag, absl::string_view command) {
  return flag.commands.empty() || Contains(Words(flag.commands, ' '), command);
}

const FlagDef* FindFlag(const ToolDef& tool, absl::string_view command, absl::string_view name) {
  for (const FlagDef& flag : tool.flags) {
    if (flag.name == name && TakenBy(flag, command)) return &flag;
  }
  return nullptr;
}

const FlagDef* FindLetter(const ToolDef& tool, absl::string_view command, char letter) {
  for (const FlagDef& flag : tool.flags) {
    if (flag.letter == letter && letter != '\0' && TakenBy(flag, command)) return &flag;
  }
  return nullptr;
}

const CommandDef* FindCommand(const ToolDef& tool, absl::string_view name) {
  for (const CommandDef& command : tool.commands) {
    if (command.name == name) return &command;
  }
  return nullptr;
}

bool HasCommands(const ToolDef& tool) { return !(tool.commands.size() == 1 && tool.commands[0].name.empty()); }

// "mtc compile", or "mtrun".
std::string Title(const ToolDef& tool, absl::string_view command) {
  return command.empty() ? std::string(tool.name) : absl::StrCat(tool.name, " ", command);
}

bool IsPath(const FlagDef& flag) {
  return flag.metavar == "FILE" || flag.metavar == "DIR" || flag.metavar == "PLAN" || flag.metavar == "SPEC";
}

absl::StatusOr<bool> ParseBool(absl::string_view text) {
  for (const char* yes : {"true", "1", "yes"}) {
    if (absl::EqualsIgnoreCase(text, yes)) return true;
  }
  for (const char* no : {"false", "0", "no"}) {
    if (absl::EqualsIgnoreCase(text, no)) return false;
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not true or false"));
}

absl::Status CheckRange(const FlagDef& flag, double value, absl::string_view text) {
  const auto limit = [&flag](double bound) {
    if (flag.kind == FlagKind::kBytes) return CanonicalBytes(static_cast<int64_t>(bound));
    if (flag.kind == FlagKind::kInt) return absl::StrCat(static_cast<int64_t>(bound));
    return absl::StrCat(bound);
  };
  if (value < flag.min)
    return absl::InvalidArgumentError(absl::StrCat(text, " is below the minimum, ", limit(flag.min)));
  if (value > flag.max)
    return absl::InvalidArgumentError(absl::StrCat(text, " is above the maximum, ", limit(flag.max)));
  return absl::OkStatus();
}

// Type, range and choice of one value. Errors: InvalidArgument without the flag's name.
absl::Status CheckValue(const FlagDef& flag, const std::string& text) {
  const std::vector<std::string> choices = Words(flag.choices, '|');
  const std::string or_words = choices.empty() ? "" : absl::StrCat(" or ", absl::StrJoin(choices, ", "));
  switch (flag.kind) {
    case FlagKind::kBool:
      return ParseBool(text).status();
    case FlagKind::kInt: {
      if (Contains(choices, text)) return absl::OkStatus();
      int64_t value = 0;
      if (!absl::SimpleAtoi(text, &value)) {
        return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a whole number", or_words));
      }
      return CheckRange(flag, static_cast<double>(value), text);
    }
    case FlagKind::kDouble: {
      if (Contains(choices, text)) return absl::OkStatus();
      double value = 0;
      if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
        return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a finite number", or_words));
      }
      return CheckRange(flag, value, text);
    }
    case FlagKind::kBytes: {
      if (Contains(choices, text)) return absl::OkStatus();
      ASSIGN_OR_RETURN(const int64_t value, ParseBytes(text));
      return CheckRange(flag, static_cast<double>(value), text);
    }
    case FlagKind::kChoice: {
      if (Contains(choices, text)) return absl::OkStatus();
      const std::string guess = DidYouMean(text, choices);
      return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not one of ", absl::StrJoin(choices, ", "),
                                                     guess.empty() ? "" : absl::StrCat("; did you mean ", guess, "?")));
    }
    case FlagKind::kString:
    case FlagKind::kStrings:
    case FlagKind::kList:
      if (text.empty() && IsPath(flag)) return absl::InvalidArgumentError("a path cannot be empty");
      return absl::OkStatus();
  }
  return absl::InternalError("a flag of no kind");
}

// "--batch N|max", "-o, --output FILE", "--[no-]measure".
std::string Spelling(const FlagDef& flag) {
  std::string text;
  if (flag.letter != '\0') text = absl::StrCat("-", std::string(1, flag.letter), ", ");
  const bool bool_default = flag.kind == FlagKind::kBool && flag.default_text == "true";
  absl::StrAppend(&text, bool_default ? "--[no-]" : "--", flag.name);
  if (flag.kind == FlagKind::kBool) return text;
  const std::string metavar(flag.metavar.empty() ? "TEXT" : flag.metavar);
  if (flag.choices.empty()) {
    absl::StrAppend(&text, " ", metavar);
  } else if (flag.kind == FlagKind::kChoice) {
    absl::StrAppend(&text, " ", flag.choices);
  } else {
    absl::StrAppend(&text, " ", metavar, "|", flag.choices);
  }
  return text;
}

// Two columns; the right one wraps.
void AppendRow(std::string* out, absl::string_view left, absl::string_view right) {
  std::string line = absl::StrCat("  ", left);
  if (line.size() + 2 > kHelpColumn) {
    absl::StrAppend(out, line, "\n");
    line.clear();
  }
  line.resize(kHelpColumn, ' ');
  for (const std::string& word : Words(right, ' ')) {
    if (line.size() > kHelpColumn && line.size() + 1 + word.size() > kHelpWidth) {
      absl::StrAppend(out, line, "\n");
      line.assign(kHelpColumn, ' ');
    }
    absl::StrAppend(&line, line.size() > kHelpColumn ? " " : "", word);
  }
  absl::StrAppend(out, absl::StripTrailingAsciiWhitespace(line), "\n");
}

void AppendFlags(std::string* out, const ToolDef& tool, absl::string_view command) {
  for (const FlagDef& flag : tool.flags) {
    if (!TakenBy(flag, command)) continue;
    std::string help(flag.help);
    if (flag.kind == FlagKind::kStrings) absl::StrAppend(&help, " (may be repeated)");
    if (!flag.default_text.empty()) absl::StrAppend(&help, " [", flag.default_text, "]");
    AppendRow(out, Spelling(flag), help);
  }
}

std::vector<std::string> CommandNames(const ToolDef& tool) {
  std::vector<std::string> names;
  for (const CommandDef& command : tool.commands) names.emplace_back(command.name);
  return names;
}

// Zoo names: the *.textproto of ModelsFolder() without their ending.
std::vector<std::string> ZooNames() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(ModelsFolder(), error)) {
    const std::string file = entry.path().filename().string();
    if (absl::EndsWith(file, ".textproto")) names.emplace_back(absl::StripSuffix(file, ".textproto"));
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

// Walks one command line.
class ArgParser {
 public:
  ArgParser(const ToolDef& tool, absl::Span<const ToolDef* const> others, absl::Span<const std::string> arguments)
      : tool_(tool), others_(others), arguments_(arguments) {
    parsed_.tool_ = &tool;
    parsed_.command_line_ = std::string(tool.name);
    for (const std::string& argument : arguments) absl::StrAppend(&parsed_.command_line_, " ", ShellQuote(argument));
  }

  absl::StatusOr<ParsedArgs> Parse() {
    size_t next = 0;
    if (!HasCommands(tool_)) {
      command_ = &tool_.commands[0];
    } else {
      if (arguments_.empty()) return NoCommand();
      absl::string_view first = arguments_[0];
      if (first == "help") {
        if (arguments_.size() > 1 && FindCommand(tool_, arguments_[1]) == nullptr) return UnknownCommand(arguments_[1]);
        return Answer(HelpText(tool_, arguments_.size() > 1 ? arguments_[1] : ""));
      }
      if (!absl::StartsWith(first, "-")) {
        command_ = FindCommand(tool_, first);
        if (command_ == nullptr) return UnknownCommand(arguments_[0]);
        parsed_.command_ = std::string(command_->name);
        next = 1;
      }
    }
    for (; next < arguments_.size(); ++next) {
      const std::string& argument = arguments_[next];
      if (argument == "--help" || argument == "-h") return Answer(HelpText(tool_, parsed_.command_));
      if (argument == "--version") return Answer(absl::StrCat(tool_.name, " ", Version(), "\n"));
      if (absl::StartsWith(argument, "--completion")) {
        const bool inlined = absl::StartsWith(argument, "--completion=");
        if (inlined || argument == "--completion") {
          const std::string shell = inlined                        ? argument.substr(13)
                                    : next + 1 < arguments_.size() ? arguments_[next + 1]
                                                                   : "";
          if (shell != "bash")
            return Error("--completion: \"", shell, "\" is not a shell that this works for; use bash");
          return Answer(BashCompletion(tool_, ZooNames()));
        }
      }
      if (command_ == nullptr) {
        return Error("\"", argument, "\" stands before the command; write ", tool_.name, " COMMAND ", argument);
      }
      if (flags_ended_ || argument == "-" || !absl::StartsWith(argument, "-")) {
        parsed_.positionals_.push_back(argument);
      } else if (argument == "--") {
        flags_ended_ = true;
      } else {
        ASSIGN_OR_RETURN(next, OneFlag(next));
      }
    }
    if (command_ == nullptr) return NoCommand();
    RETURN_IF_ERROR(CheckPositionals());
    return std::move(parsed_);
  }

 private:
  template <typename... T>
  static absl::Status Error(const T&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(parts...));
  }

  ParsedArgs Answer(std::string text) {
    parsed_.answer_ = std::move(text);
    return std::move(parsed_);
  }

  absl::Status NoCommand() const {
    return Error(tool_.name, " needs a command: ", absl::StrJoin(CommandNames(tool_), ", "));
  }

  absl::Status UnknownCommand(const std::string& name) const {
    const std::vector<std::string> names = CommandNames(tool_);
    const std::string guess = DidYouMean(name, names);
    if (!guess.empty()) return Error("unknown command \"", name, "\"; did you mean ", tool_.name, " ", guess, "?");
    for (const ToolDef* other : others_) {
      if (HasCommands(*other) && FindCommand(*other, name) != nullptr) {
        return Error("unknown command \"", name, "\"; ", name, " is a command of ", other->name);
      }
    }
    return Error("unknown command \"", name, "\"; ", tool_.name, " has ", absl::StrJoin(names, ", "));
  }

  // Consumes the flag at `index` and, where it takes one, the argument after it; returns the index of the last
  // consumed.
  absl::StatusOr<size_t> OneFlag(size_t index) {
    const std::string& argument = arguments_[index];
    std::optional<std::string> value;
    std::string name;
    const ToolDef* owner = &tool_;
    const FlagDef* flag = nullptr;
    if (!absl::StartsWith(argument, "--")) {
      flag = FindLetter(tool_, command_->name, argument[1]);
      if (flag == nullptr && command_->forwards_to != nullptr) {
        owner = command_->forwards_to;
        flag = FindLetter(*owner, "", argument[1]);
      }
      if (flag == nullptr) return UnknownFlag(argument.substr(1, 1), "-");
      name = std::string(flag->name);
      if (argument.size() > 2) value = argument.substr(argument[2] == '=' ? 3 : 2);
    } else {
      const size_t equals = argument.find('=');
      name = Canonical(absl::string_view(argument).substr(2, equals == std::string::npos ? equals : equals - 2));
      if (equals != std::string::npos) value = argument.substr(equals + 1);
      flag = FindFlag(tool_, command_->name, name);
      bool negated = false;
      const auto find_negated = [&](const ToolDef& tool, absl::string_view command) -> const FlagDef* {
        if (!absl::StartsWith(name, "no-")) return nullptr;
        const FlagDef* found = FindFlag(tool, command, absl::string_view(name).substr(3));
        negated = found != nullptr && found->kind == FlagKind::kBool;
        return negated ? found : nullptr;
      };
      if (flag == nullptr) flag = find_negated(tool_, command_->name);
      if (flag == nullptr && command_->forwards_to != nullptr) {
        owner = command_->forwards_to;
        flag = FindFlag(*owner, "", name);
        if (flag == nullptr) flag = find_negated(*owner, "");
      }
      if (flag == nullptr) return UnknownFlag(name, "--");
      if (negated) {
        if (value.has_value()) return Error("--", name, " takes no value; write --", flag->name, "=", *value);
        value = "false";
      }
    }
    if (flag->kind == FlagKind::kBool) {
      if (!value.has_value()) value = "true";
    } else if (!value.has_value()) {
      const std::string spelling = Spelling(*flag);
      if (index + 1 >= arguments_.size()) return Error("--", flag->name, " needs a value: ", spelling);
      ++index;
      if (absl::StartsWith(arguments_[index], "--")) {
        return Error("--", flag->name, " needs a value: ", spelling, "; for one that starts with -- write --",
                     flag->name, "=", arguments_[index]);
      }
      value = arguments_[index];
    }
    RETURN_IF_ERROR(Annotate(CheckValue(*flag, *value), absl::StrCat("--", flag->name)));
    if (owner == &tool_) {
      parsed_.values_[std::string(flag->name)].push_back(*std::move(value));
    } else {
      parsed_.forwarded_.push_back(absl::StrCat("--", flag->name, "=", *value));
    }
    return index;
  }

  absl::Status UnknownFlag(const std::string& name, absl::string_view dashes) const {
    const std::string title = Title(tool_, command_->name);
    const auto has = [&name, dashes](const ToolDef& tool, absl::string_view command) {
      return dashes == "-" ? FindLetter(tool, command, name[0]) != nullptr : FindFlag(tool, command, name) != nullptr;
    };
    std::vector<std::string> owners;
    for (const CommandDef& command : tool_.commands) {
      if (has(tool_, command.name)) owners.push_back(Title(tool_, command.name));
    }
    if (!owners.empty()) return Error(dashes, name, " belongs to ", absl::StrJoin(owners, ", "), ", not to ", title);
    for (const ToolDef* other : others_) {
      if (other == &tool_) continue;
      for (const CommandDef& command : other->commands) {
        if (!has(*other, command.name)) continue;
        const std::string owner = Title(*other, command.name);
        return Error(dashes, name, " belongs to ", owner, ": put it on the ", owner, " command line");
      }
    }
    std::vector<std::string> known;
    for (const FlagDef& flag : tool_.flags) {
      if (TakenBy(flag, command_->name)) known.emplace_back(flag.name);
    }
    if (command_->forwards_to != nullptr) {
      for (const FlagDef& flag : command_->forwards_to->flags) known.emplace_back(flag.name);
    }
    const std::string guess = dashes == "--" ? DidYouMean(name, known) : "";
    if (!guess.empty()) return Error("unknown flag --", name, "; did you mean --", guess, "?");
    for (const ToolDef* other : others_) {
      std::vector<std::string> names;
      for (const FlagDef& flag : other->flags) names.emplace_back(flag.name);
      const std::string far_guess = dashes == "--" && other != &tool_ ? DidYouMean(name, names) : "";
      if (!far_guess.empty())
        return Error("unknown flag --", name, "; did you mean --", far_guess, ", of ", other->name, "?");
    }
    return Error("unknown flag ", dashes, name, "; ", title, " --help lists what there is");
  }

  absl::Status CheckPositionals() const {
    const std::string title = Title(tool_, command_->name);
    size_t least = 0, most = 0;
    for (const std::string& word : Words(command_->positionals, ' ')) {
      const bool optional = absl::StartsWith(word, "[");
      if (!optional && least >= parsed_.positionals_.size()) {
        return Error(title, " needs ", absl::StripSuffix(word, "..."), ": ", title, " ", command_->positionals);
      }
      least += optional ? 0 : 1;
      most = absl::StrContains(word, "...") ? std::numeric_limits<size_t>::max() : most + 1;
    }
    if (parsed_.positionals_.size() > most) {
      return Error(title, ": unexpected argument \"", parsed_.positionals_[most], "\"; it takes ",
                   most == 0 ? "no arguments" : command_->positionals);
    }
    return absl::OkStatus();
  }

  const ToolDef& tool_;
  absl::Span<const ToolDef* const> others_;
  absl::Span<const std::string> arguments_;
  const CommandDef* command_ = nullptr;
  bool flags_ended_ = false;
  ParsedArgs parsed_;
};

const FlagDef& ParsedArgs::Flag(absl::string_view name) const {
  const FlagDef* flag = FindFlag(*tool_, command_, name);
  CHECK(flag != nullptr) << Title(*tool_, command_) << " has no flag --" << name << " in its table";
  return *flag;
}

std::optional<std::string> ParsedArgs::Last(const FlagDef& flag) const {
  const auto found = values_.find(std::string(flag.name));
  if (found != values_.end()) return found->second.back();
  if (!flag.default_text.empty()) return std::string(flag.default_text);
  return std::nullopt;
}

bool ParsedArgs::Has(absl::string_view name) const { return values_.contains(std::string(Flag(name).name)); }

bool ParsedArgs::Bool(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind == FlagKind::kBool) << "--" << name;
  return *ParseBool(Last(flag).value_or("false"));
}

std::optional<int64_t> ParsedArgs::OptionalInt(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind == FlagKind::kInt) << "--" << name;
  const std::optional<std::string> text = Last(flag);
  int64_t value = 0;
  if (!text.has_value() || !absl::SimpleAtoi(*text, &value)) return std::nullopt;
  return value;
}

std::optional<double> ParsedArgs::OptionalDouble(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind == FlagKind::kDouble) << "--" << name;
  const std::optional<std::string> text = Last(flag);
  double value = 0;
  if (!text.has_value() || !absl::SimpleAtod(*text, &value)) return std::nullopt;
  return value;
}

std::optional<int64_t> ParsedArgs::OptionalBytes(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind == FlagKind::kBytes) << "--" << name;
  const std::optional<std::string> text = Last(flag);
  if (!text.has_value()) return std::nullopt;
  const absl::StatusOr<int64_t> value = ParseBytes(*text);
  return value.ok() ? std::optional<int64_t>(*value) : std::nullopt;
}

int64_t ParsedArgs::Int(absl::string_view name) const {
  const std::optional<int64_t> value = OptionalInt(name);
  CHECK(value.has_value()) << "--" << name << " has neither a number nor a default";
  return *value;
}

double ParsedArgs::Double(absl::string_view name) const {
  const std::optional<double> value = OptionalDouble(name);
  CHECK(value.has_value()) << "--" << name << " has neither a number nor a default";
  return *value;
}

int64_t ParsedArgs::Bytes(absl::string_view name) const {
  const std::optional<int64_t> value = OptionalBytes(name);
  CHECK(value.has_value()) << "--" << name << " has neither a number nor a default";
  return *value;
}

std::string ParsedArgs::String(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind != FlagKind::kStrings && flag.kind != FlagKind::kList) << "--" << name;
  return Last(flag).value_or("");
}

std::vector<std::string> ParsedArgs::Strings(absl::string_view name) const {
  const FlagDef& flag = Flag(name);
  CHECK(flag.kind == FlagKind::kStrings || flag.kind == FlagKind::kList) << "--" << name;
  const auto found = values_.find(std::string(flag.name));
  std::vector<std::string> typed;
  if (found != values_.end()) {
    typed = found->second;
  } else if (!flag.default_text.empty()) {
    typed.emplace_back(flag.default_text);
  }
  if (flag.kind == FlagKind::kStrings) return typed;
  std::vector<std::string> pieces;
  for (const std::string& text : typed) {
    for (std::string& piece : Words(text, ',')) pieces.push_back(std::move(piece));
  }
  return pieces;
}

absl::StatusOr<ParsedArgs> ParseArgs(const ToolDef& tool, absl::Span<const ToolDef* const> others,
                                     absl::Span<const std::string> arguments) {
  return ArgParser(tool, others, arguments).Parse();
}

int RunTool(const ToolDef& tool, int argc, char** argv, const std::function<absl::Status(const ParsedArgs&)>& body) {
  const std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const absl::StatusOr<ParsedArgs> parsed = ParseArgs(tool, AllTools(), arguments);
  absl::Status status = parsed.status();
  if (parsed.ok() && parsed->answer().has_value()) {
    std::cout << *parsed->answer();
  } else if (parsed.ok()) {
    status = body(*parsed);
  }
  std::cout.flush();
  errno = 0;
  const bool failed = std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout.good();
  if (failed && status.ok()) {
    status = absl::DataLossError(absl::StrCat("standard output could not be written",
                                              errno == 0 ? "" : absl::StrCat(": ", std::strerror(errno))));
  }
  return ReportStatus(status);
}

int ReportStatus(const absl::Status& status) {
  if (!status.ok()) {
    const std::string message(status.message().empty() ? absl::StatusCodeToString(status.code())
                                                       : std::string(status.message()));
    std::cerr << "error: " << message << std::endl;
  }
  return ExitCode(status);
}

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kUnimplemented:
      return 2;
    case absl::StatusCode::kResourceExhausted:
      return 3;
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kAlreadyExists:
      return 4;
    case absl::StatusCode::kOutOfRange:
      return 5;
    case absl::StatusCode::kUnavailable:
      return 6;
    case absl::StatusCode::kDataLoss:
      return 7;
    case absl::StatusCode::kCancelled:
      return 130;
    default:
      return 1;
  }
}

std::string HelpText(const ToolDef& tool, absl::string_view command_name) {
  std::string out;
  const CommandDef* command = FindCommand(tool, command_name);
  if (command == nullptr) {
    absl::StrAppend(&out, tool.name, ": ", tool.summary, "\n\nusage: ", tool.name, " COMMAND [flags]\n\n");
    for (const CommandDef& each : tool.commands) {
      AppendRow(&out, absl::StrCat(each.name, each.positionals.empty() ? "" : " ", each.positionals), each.summary);
    }
    absl::StrAppend(&out, "\n", tool.name, " COMMAND --help lists a command's flags.\n");
  } else {
    const std::string title = Title(tool, command_name);
    absl::StrAppend(&out, title, ": ", command_name.empty() ? tool.summary : command->summary, "\n\nusage: ", title,
                    command->positionals.empty() ? "" : " ", command->positionals, " [flags]\n\n");
    AppendFlags(&out, tool, command_name);
    if (command->forwards_to != nullptr) {
      absl::StrAppend(&out, "\nflags of ", command->forwards_to->name, ", handed on:\n");
      AppendFlags(&out, *command->forwards_to, "");
    }
  }
  if (command == nullptr || command_name.empty()) {
    AppendRow(&out, "-h, --help", "This text.");
    AppendRow(&out, "--version", "The version.");
    AppendRow(&out, "--completion bash",
              absl::StrCat("A completion script: source <(", tool.name, " --completion bash)"));
    if (!tool.examples.empty()) absl::StrAppend(&out, "\n", tool.examples, "\n");
  }
  return out;
}

std::string BashCompletion(const ToolDef& tool, absl::Span<const std::string> models) {
  const std::string name(tool.name);
  // What follows a flag, once for each name: the first row with the name speaks for all.
  std::string values;
  std::set<std::string> seen;
  std::vector<const FlagDef*> flags;
  for (const FlagDef& flag : tool.flags) flags.push_back(&flag);
  for (const CommandDef& command : tool.commands) {
    if (command.forwards_to == nullptr) continue;
    for (const FlagDef& flag : command.forwards_to->flags) flags.push_back(&flag);
  }
  for (const FlagDef* flag : flags) {
    if (flag->kind == FlagKind::kBool || !seen.insert(std::string(flag->name)).second) continue;
    absl::StrAppend(&values, "    --", flag->name);
    if (flag->letter != '\0') absl::StrAppend(&values, "|-", std::string(1, flag->letter));
    absl::StrAppend(&values, ")");
    if (flag->metavar == "DIR") {
      absl::StrAppend(&values, " compopt -o filenames; COMPREPLY=($(compgen -d -- \"$cur\"));");
    } else if (IsPath(*flag)) {
      absl::StrAppend(&values, " compopt -o filenames; COMPREPLY=($(compgen -f -- \"$cur\"));");
    } else if (!flag->choices.empty()) {
      absl::StrAppend(&values, " COMPREPLY=($(compgen -W \"", absl::StrJoin(Words(flag->choices, '|'), " "),
                      "\" -- \"$cur\"));");
    }
    absl::StrAppend(&values, " return ;;\n");
  }
  // Flags and plain words of each command.
  std::string commands;
  for (const CommandDef& command : tool.commands) {
    std::vector<std::string> words;
    for (const FlagDef& flag : tool.flags) {
      if (TakenBy(flag, command.name)) words.push_back(absl::StrCat("--", flag.name));
    }
    if (command.forwards_to != nullptr) {
      for (const FlagDef& flag : command.forwards_to->flags) words.push_back(absl::StrCat("--", flag.name));
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    words.emplace_back("--help");
    const bool spec = absl::StrContains(command.positionals, "SPEC");
    absl::StrAppend(&commands, "    ", command.name.empty() ? "\"\"" : command.name, ") flags=\"",
                    absl::StrJoin(words, " "), "\"", spec ? " names=\"$models\"" : "", " ;;\n");
  }
  const bool has_commands = HasCommands(tool);
  return absl::StrCat(
      "# bash completion for ", name, "; made by ", name, " --completion bash\n_", name,
      "() {\n"
      "  local cur=\"${COMP_WORDS[COMP_CWORD]}\" prev=\"${COMP_WORDS[COMP_CWORD-1]}\" flags=\"\" names=\"\"\n"
      "  local models=\"",
      absl::StrJoin(models, " "), "\" commands=\"", has_commands ? absl::StrJoin(CommandNames(tool), " ") : "",
      "\"\n"
      "  COMPREPLY=()\n"
      "  if [[ $cur == '=' ]]; then\n    cur=\"\"\n"
      "  elif [[ $prev == '=' ]]; then\n    prev=\"${COMP_WORDS[COMP_CWORD-2]}\"\n  fi\n",
      has_commands
          ? "  if ((COMP_CWORD == 1)); then\n"
            "    COMPREPLY=($(compgen -W \"$commands --help --version --completion\" -- \"$cur\"))\n    return\n  fi\n"
          : "",
      "  case \"$prev\" in\n    --completion) COMPREPLY=($(compgen -W bash -- \"$cur\")); return ;;\n", values,
      "  esac\n  case \"", has_commands ? "${COMP_WORDS[1]}" : "", "\" in\n", commands,
      "  esac\n"
      "  if [[ $cur == -* ]]; then\n"
      "    COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\"))\n"
      "  else\n"
      "    compopt -o filenames\n"
      "    COMPREPLY=($(compgen -W \"$names\" -- \"$cur\") $(compgen -f -- \"$cur\"))\n"
      "  fi\n"
      "}\n"
      "complete -F _",
      name, " ", name, "\n");
}

absl::string_view Version() { return MT_VERSION; }

std::string DidYouMean(absl::string_view text, absl::Span<const std::string> candidates) {
  const std::string from = absl::AsciiStrToLower(Canonical(text));
  // One edit for up to three letters: two edits turn any such name into any other.
  int64_t best = from.size() <= 3 ? 2 : 3;
  std::string guess;
  for (const std::string& candidate : candidates) {
    const std::string to = absl::AsciiStrToLower(Canonical(candidate));
    if (std::max(from.size(), to.size()) - std::min(from.size(), to.size()) > 2) continue;
    // Edit distance with transpositions of neighbours (Damerau 1964, optimal string alignment).
    std::vector<std::vector<int64_t>> d(from.size() + 1, std::vector<int64_t>(to.size() + 1));
    for (size_t i = 0; i <= from.size(); ++i) {
      for (size_t j = 0; j <= to.size(); ++j) {
        if (i == 0 || j == 0) {
          d[i][j] = static_cast<int64_t>(i + j);
          continue;
        }
        d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (from[i - 1] == to[j - 1] ? 0 : 1)});
        if (i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1]) {
          d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
        }
      }
    }
    if (d[from.size()][to.size()] < best) {
      best = d[from.size()][to.size()];
      guess = candidate;
    }
  }
  return guess;
}

std::string ShellQuote(absl::string_view text) {
  const auto plain = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("-_=+,.:/@%", c);
  };
  if (!text.empty() && std::all_of(text.begin(), text.end(), plain)) return std::string(text);
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

}  // namespace mt
