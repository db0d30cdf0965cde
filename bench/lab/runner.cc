#include "bench/lab/runner.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/algorithm/container.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "bench/lab/process.h"
#include "bench/lab/results.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

using Clock = std::chrono::steady_clock;

// Flags of mtrun that a suite decides itself, or that train nothing.
constexpr absl::string_view kOwnFlags[] = {"eval", "generate", "dry-run", "trace", "init", "measure"};

absl::Status CheckTrainFlags(const std::vector<std::string>& flags) {
  for (const std::string& argument : flags) {
    absl::string_view name = argument;
    if (!absl::ConsumePrefix(&name, "--")) continue;
    name = name.substr(0, name.find('='));
    absl::ConsumePrefix(&name, "no-");
    if (absl::c_linear_search(kOwnFlags, name)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, " is for one run: mtrun PLAN --", name, "; a suite trains and measures every run"));
    }
  }
  return absl::OkStatus();
}

// The fields that are set, as mtrun's flags.
std::vector<std::string> FlagsOf(const proto::TrainFlags& train) {
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  train.GetReflection()->ListFields(train, &fields);
  std::vector<std::string> flags;
  for (const google::protobuf::FieldDescriptor* field : fields) {
    std::string value;
    switch (field->cpp_type()) {
      case google::protobuf::FieldDescriptor::CPPTYPE_INT64:
        value = absl::StrCat(train.GetReflection()->GetInt64(train, field));
        break;
      case google::protobuf::FieldDescriptor::CPPTYPE_DOUBLE:
        value = Json(train.GetReflection()->GetDouble(train, field)).dump();
        break;
      default:
        value = train.GetReflection()->GetString(train, field);
    }
    flags.push_back(absl::StrCat("--", absl::StrReplaceAll(field->name(), {{"_", "-"}})));
    flags.push_back(value);
  }
  return flags;
}

// The tool's own error line, or the end of what it said.
std::string ErrorOf(const ProcessResult& result) {
  std::string last;
  for (const absl::string_view line : absl::StrSplit(result.err, '\n')) {
    if (absl::StartsWith(line, "error: ")) return std::string(line.substr(7));
    if (!absl::StripAsciiWhitespace(line).empty()) last = std::string(line);
  }
  if (result.code > 128) return absl::StrCat("ended by signal ", result.code - 128, last.empty() ? "" : ": ", last);
  return last.empty() ? absl::StrCat("exit code ", result.code) : last;
}

std::vector<std::string> WarningsOf(const ProcessResult& result) {
  std::vector<std::string> warnings;
  for (absl::string_view line : absl::StrSplit(result.err, '\n')) {
    if (absl::ConsumePrefix(&line, "warning: ")) warnings.emplace_back(line);
  }
  return warnings;
}

// The status that gives the tool's exit code again.
absl::Status StatusOf(int code, const std::string& message) {
  switch (code) {
    case 2:
      return absl::InvalidArgumentError(message);
    case 3:
      return absl::ResourceExhaustedError(message);
    case 4:
      return absl::FailedPreconditionError(message);
    case 5:
      return absl::OutOfRangeError(message);
    case 6:
      return absl::UnavailableError(message);
    case 7:
      return absl::DataLossError(message);
    case 130:
      return absl::CancelledError(message);
    default:
      return absl::InternalError(message);
  }
}

// The command as a user types it, with the tool found by its name.
std::string Shown(std::vector<std::string> command) {
  command[0] = fs::path(command[0]).filename().string();
  return CommandLine(command);
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

// The steps of metrics.jsonl.
struct Steps {
  std::vector<double> seconds;
  std::vector<double> losses;
  std::string losses_hash;  // Equal for equal losses, to the bit.
};

absl::StatusOr<Steps> ReadSteps(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  Steps steps;
  uint64_t hash = Fnv1a("losses");
  int number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    ++number;
    const Json json = Json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) return absl::FailedPreconditionError(absl::StrCat(path, ": line ", number, " is no JSON"));
    if (!json.contains("loss") || !json.contains("step_seconds")) continue;  // An evaluation.
    // A number's shortest text that reads back to it: equal texts are equal bits.
    hash = Fnv1a(absl::StrCat(json["loss"].dump(), ";"), hash);
    if (json["loss"].is_number()) steps.losses.push_back(json["loss"].get<double>());
    if (json["step_seconds"].is_number()) steps.seconds.push_back(json["step_seconds"].get<double>());
  }
  steps.losses_hash = absl::StrFormat("%016x", hash);
  return steps;
}

class SuiteRunner {
 public:
  SuiteRunner(const proto::Suite& suite, const std::vector<proto::RunSpec>& runs, const SuiteOptions& options)
      : suite_(suite), runs_(runs), options_(options) {}

  absl::Status Run();

 private:
  struct Commands {
    std::vector<std::string> compile, inspect, train;
  };
  Commands CommandsOf(const proto::RunSpec& run) const;
  // What decides a run's results: the commands without places, and the corpus.
  std::string SettingsOf(const proto::RunSpec& run) const;
  absl::Status CheckFinished();
  absl::Status RunOne(const proto::RunSpec& run);
  absl::Status WriteSummary() const;
  absl::Status Lock();
  void Say(const proto::RunSpec& run, absl::string_view text) const;
  int64_t IndexOf(const proto::RunSpec& run) const;

  const proto::Suite& suite_;
  const std::vector<proto::RunSpec>& runs_;
  const SuiteOptions& options_;
  std::string dataset_, corpus_hash_;
  std::vector<std::string> finished_, failed_, errors_;  // Techniques; the errors of `failed_`.
  int lock_ = -1;
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
};

int64_t SuiteRunner::IndexOf(const proto::RunSpec& run) const {
  for (int i = 0; i < suite_.runs_size(); ++i) {
    if (suite_.runs(i).name() == run.name()) return i;
  }
  return -1;
}

SuiteRunner::Commands SuiteRunner::CommandsOf(const proto::RunSpec& run) const {
  const std::string folder = RunFolder(options_.out, dataset_, run.name());
  const std::string plan = absl::StrCat(folder, "/", run.name(), ".plan");
  Commands commands;
  commands.compile = {options_.tools + "/mtc",
                      "compile",
                      suite_.model(),
                      "--data",
                      options_.data,
                      "--passes",
                      run.passes().empty() ? "none" : run.passes()};
  const auto add = [&](const char* flag, const std::string& value) {
    commands.compile.push_back(flag);
    commands.compile.push_back(value);
  };
  const int64_t batch = options_.batch.value_or(run.batch() > 0 ? run.batch() : suite_.batch());
  const int64_t sequence = options_.sequence.value_or(suite_.seq());
  if (batch > 0) add("--batch", absl::StrCat(batch));
  if (sequence > 0) add("--seq", absl::StrCat(sequence));
  for (const std::string& set : suite_.set()) add("--set", set);
  for (const std::string& set : options_.sets) add("--set", set);
  add("-o", plan);
  commands.inspect = {options_.tools + "/mtc", "inspect", plan, "--json"};
  commands.train = {options_.tools + "/mtrun", plan,      "--data",   options_.data, "--out",
                    folder + "/train",         "--fresh", "--measure"};
  for (const std::string& flag : FlagsOf(suite_.train())) commands.train.push_back(flag);
  // One length of training: --steps on the command line replaces the suite's --epochs.
  const bool own_length = absl::c_any_of(options_.train_flags, [](const std::string& flag) {
    return absl::StartsWith(flag, "--steps") || absl::StartsWith(flag, "--epochs") ||
           absl::StartsWith(flag, "--max-minutes");
  });
  if (own_length) {
    for (const char* flag : {"--steps", "--epochs"}) {
      const auto at = absl::c_find(commands.train, flag);
      if (at != commands.train.end()) commands.train.erase(at, at + 2);
    }
  }
  for (const std::string& flag : options_.train_flags) commands.train.push_back(flag);
  return commands;
}

std::string SuiteRunner::SettingsOf(const proto::RunSpec& run) const {
  const Commands commands = CommandsOf(run);
  std::vector<std::string> kept;
  for (const std::vector<std::string>* command : {&commands.compile, &commands.train}) {
    for (size_t i = 1; i < command->size(); ++i) {
      const std::string& argument = (*command)[i];
      if (argument == "--data" || argument == "--out" || argument == "-o") {
        ++i;
      } else if (argument != "--fresh" && !absl::EndsWith(argument, ".plan")) {
        kept.push_back(argument);
      }
    }
  }
  return absl::StrCat(CommandLine(kept), " corpus ", corpus_hash_);
}

void SuiteRunner::Say(const proto::RunSpec& run, absl::string_view text) const {
  const auto at = std::find_if(runs_.begin(), runs_.end(), [&](const auto& r) { return r.name() == run.name(); });
  std::printf("%s[%d/%d] %-16s %s%s\n", terminal_ ? "\r" : "", static_cast<int>(at - runs_.begin()) + 1,
              static_cast<int>(runs_.size()), run.name().c_str(), std::string(text).c_str(), terminal_ ? "\x1b[K" : "");
  std::fflush(stdout);
}

absl::Status SuiteRunner::Lock() {
  const std::string path = absl::StrCat(options_.out, "/.mtlab.lock");
  lock_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (lock_ < 0) return absl::DataLossError(absl::StrCat(path, ": ", std::strerror(errno)));
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("another mtlab works in ", options_.out, "; wait for it, or give another --out"));
  }
  return absl::OkStatus();
}

// Before anything is run: finished runs must be what these settings would give.
absl::Status SuiteRunner::CheckFinished() {
  for (const proto::RunSpec& run : runs_) {
    const std::string path = MetricsPath(options_.out, dataset_, run.name());
    std::error_code ignored;
    if (!fs::exists(path, ignored)) continue;
    if (options_.fresh) continue;
    ASSIGN_OR_RETURN(const Json metrics, ReadJson(path));
    const auto settings = metrics.find("settings");
    const std::string made = settings != metrics.end() && settings->is_string() ? settings->get<std::string>() : "";
    const std::string wanted = SettingsOf(run);
    if (made != wanted) {
      return absl::InvalidArgumentError(absl::StrCat(path, " was made with other settings (", made, ") than these (",
                                                     wanted, "); give --fresh to replace it, or another --out"));
    }
    finished_.push_back(run.name());
  }
  return absl::OkStatus();
}

absl::Status SuiteRunner::RunOne(const proto::RunSpec& run) {
  const std::string folder = RunFolder(options_.out, dataset_, run.name());
  RETURN_IF_ERROR(MakeFolder(folder));
  const Commands commands = CommandsOf(run);
  std::vector<std::string> warnings;
  const auto step = [&](const std::vector<std::string>& command, const char* name) -> absl::Status {
    const std::string log = absl::StrCat(folder, "/", name, ".log");
    ASSIGN_OR_RETURN(const ProcessResult result, RunProcess(command, log, [&](absl::string_view line) {
                       if (!terminal_) return;
                       std::printf("\r%-16s %s\x1b[K", run.name().c_str(), std::string(line.substr(0, 110)).c_str());
                       std::fflush(stdout);
                     }));
    RETURN_IF_ERROR(WriteFile(absl::StrCat(folder, "/", name, ".err"), result.err));
    for (std::string& warning : WarningsOf(result)) warnings.push_back(std::move(warning));
    if (Interrupted()) {
      return absl::CancelledError(absl::StrCat("interrupted in run ", run.name(), "; the same command continues"));
    }
    if (result.code == 0) return absl::OkStatus();
    return StatusOf(result.code,
                    absl::StrCat("run ", run.name(), ": ", ErrorOf(result), " (", Shown(command), "; see ", log, ")"));
  };
  Say(run, absl::StrCat("compiles: passes ", run.passes().empty() ? "none" : run.passes()));
  RETURN_IF_ERROR(step(commands.compile, "compile"));
  RETURN_IF_ERROR(step(commands.inspect, "inspect"));
  ASSIGN_OR_RETURN(const Json inspected, ReadJson(absl::StrCat(folder, "/inspect.log")));
  RETURN_IF_ERROR(step(commands.train, "train"));
  ASSIGN_OR_RETURN(const Json summary, ReadJson(absl::StrCat(folder, "/train/summary.json")));
  ASSIGN_OR_RETURN(Json measured, ReadJson(absl::StrCat(folder, "/train/memory.json")));
  ASSIGN_OR_RETURN(const Steps steps, ReadSteps(absl::StrCat(folder, "/train/metrics.jsonl")));

  // The tools' own files: their keys are theirs to keep.
  const auto number = [](const Json& json, const char* pointer) -> Json {
    const Json::json_pointer at(pointer);
    return json.contains(at) ? json.at(at) : Json(nullptr);
  };
  Json dtypes = Json::object();
  if (inspected.contains("dtypes")) {
    for (const auto& [name, bytes] : inspected.at("dtypes").items()) {
      std::vector<std::string> names;
      for (const auto& [dtype, count] : bytes.items()) names.push_back(dtype);
      dtypes[name] = absl::StrJoin(names, "+");
    }
  }
  const double seconds = summary.value("seconds", 0.0);
  const double tokens = static_cast<double>(summary.value("tokens", int64_t{0}));
  const double train_loss = summary.value("last_loss", 0.0);
  double mean_seconds = 0;
  for (const double s : steps.seconds)
    mean_seconds += s / static_cast<double>(std::max<size_t>(steps.seconds.size(), 1));
  const std::string passes = inspected.value("passes", "");
  const bool flash = absl::StrContains(passes, "flash");
  const Json metrics = {
      {"version", kResultsVersion},
      {"suite", suite_.name()},
      {"dataset", dataset_},
      {"technique", run.name()},
      {"description", run.description()},
      {"index", IndexOf(run)},
      {"model", number(inspected, "/model/name")},
      {"parameters", number(inspected, "/model/parameters")},
      {"batch_size", number(inspected, "/batch")},
      {"sequence_length", number(inspected, "/seq")},
      {"target", number(inspected, "/target")},
      {"passes", passes},
      {"flags",
       {{"bf16", absl::StrContains(passes, "bf16")},
        {"flash_attn", flash},
        {"gradient_checkpointing", absl::StrContains(passes, "remat")}}},
      {"steps", number(summary, "/steps")},
      {"tokens", number(summary, "/tokens")},
      {"train_loss", train_loss},
      {"train_perplexity", std::exp(train_loss)},
      {"val_loss", number(summary, "/eval/val/loss")},
      {"val_perplexity", number(summary, "/eval/val/perplexity")},
      {"test_loss", number(summary, "/eval/test/loss")},
      {"test_perplexity", number(summary, "/eval/test/perplexity")},
      {"train_time_seconds", seconds},
      {"step_seconds", {{"mean", mean_seconds}, {"median", Median(steps.seconds)}}},
      {"tokens_per_second", seconds > 0 ? tokens / seconds : 0.0},
      {"peak_memory_mb", static_cast<double>(inspected.at("memory").value("peak_bytes", int64_t{0})) / (1 << 20)},
      {"flops", number(inspected, "/flops")},
      {"recomputed_ops", number(inspected, "/recomputed_ops")},
      {"recomputed_seconds", number(inspected, "/recomputed/seconds")},
      {"program_seconds", number(inspected, "/recomputed/program_seconds")},
      {"dtypes", dtypes},
      {"losses_hash", steps.losses_hash},
      {"losses", steps.losses},
      {"warnings", warnings},
      {"compile_seconds", number(inspected, "/compile_seconds")},
      {"config", number(summary, "/config")},
      {"versions", number(summary, "/versions")},
      {"hardware", number(summary, "/hardware")},
      {"commands", {{"compile", Shown(commands.compile)}, {"train", Shown(commands.train)}}},
      {"settings", SettingsOf(run)},
  };
  measured["version"] = kResultsVersion;
  measured["technique"] = run.name();
  measured["by_class"] = number(inspected, "/memory/by_class");
  measured["by_phase"] = number(inspected, "/memory/by_phase");
  measured["peak_instruction"] = number(inspected, "/memory/peak_instruction");
  // A step is like any other: the plan is static, so that mean and maximum are one number.
  for (const char* phase : {"forward", "backward", "optimizer"}) {
    const Json bytes = number(inspected, absl::StrCat("/memory/by_phase/", phase, "/live_bytes").c_str());
    if (!bytes.is_number()) continue;
    const double mb = bytes.get<double>() / (1 << 20);
    measured[absl::StrCat(phase, "_memory_mb")] = {{"mean", mb}, {"max", mb}};
  }
  const double peak_mb = metrics.at("peak_memory_mb").get<double>();
  measured["peak_memory_mb"] = {{"mean", peak_mb}, {"max", peak_mb}};
  RETURN_IF_ERROR(WriteJson(MemoryPath(options_.out, dataset_, run.name()), measured));
  RETURN_IF_ERROR(WriteJson(MetricsPath(options_.out, dataset_, run.name()), metrics));

  const Json perplexity = metrics.at("val_perplexity");
  Say(run,
      absl::StrFormat("%s, val ppl %s, %s, %s", FormatBytes(inspected.at("memory").value("peak_bytes", int64_t{0})),
                      perplexity.is_number() ? absl::StrFormat("%.2f", perplexity.get<double>()) : "-",
                      FormatDuration(seconds),
                      measured.value("agree", false) ? "planned = measured" : "the measurement DIFFERS"));
  for (const std::string& warning : warnings) std::printf("  warning: %s\n", warning.c_str());
  return absl::OkStatus();
}

absl::Status SuiteRunner::WriteSummary() const {
  Json runs = Json::array();
  for (const proto::RunSpec& run : runs_) {
    Json entry = {{"technique", run.name()}, {"passes", run.passes()}};
    const auto failed = absl::c_find(failed_, run.name());
    const bool finished = absl::c_linear_search(finished_, run.name());
    entry["status"] = finished ? "finished" : failed != failed_.end() ? "failed" : "pending";
    if (failed != failed_.end()) entry["error"] = errors_[static_cast<size_t>(failed - failed_.begin())];
    if (finished) entry["metrics"] = fs::path(MetricsPath(options_.out, dataset_, run.name())).filename().string();
    runs.push_back(std::move(entry));
  }
  return WriteJson(absl::StrCat(options_.out, "/experiment_summary.json"),
                   {{"version", kResultsVersion}, {"suite", suite_.name()}, {"dataset", dataset_}, {"runs", runs}});
}

absl::Status SuiteRunner::Run() {
  RETURN_IF_ERROR(CheckTrainFlags(options_.train_flags));
  if (options_.data.empty()) {
    return absl::InvalidArgumentError("--data DIR is needed: a corpus from mtcorpus prep");
  }
  const absl::StatusOr<std::string> manifest = ReadFile(absl::StrCat(options_.data, "/manifest.json"));
  if (!manifest.ok()) {
    return absl::NotFoundError(absl::StrCat("--data ", options_.data,
                                            ": no corpus there (no manifest.json); make one: mtcorpus prep --input "
                                            "FILE --out ",
                                            ShellQuote(options_.data)));
  }
  corpus_hash_ = absl::StrFormat("%016x", Fnv1a(*manifest));
  dataset_ = options_.dataset;
  if (dataset_.empty()) {
    std::error_code ignored;
    dataset_ = fs::weakly_canonical(options_.data, ignored).filename().string();
  }
  if (dataset_.empty() || absl::StrContains(dataset_, "/") || dataset_[0] == '.') {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", dataset_, "\" cannot name a data set in file names; give --dataset NAME"));
  }
  for (const char* tool : {"mtc", "mtrun"}) {
    const std::string path = absl::StrCat(options_.tools, "/", tool);
    if (access(path.c_str(), X_OK) != 0) {
      return absl::NotFoundError(absl::StrCat(tool, " is not at ", path, "; build it with ./mt build"));
    }
  }
  RETURN_IF_ERROR(MakeFolder(options_.out));
  RETURN_IF_ERROR(Lock());
  const absl::Cleanup unlock = [this] { close(lock_); };
  RETURN_IF_ERROR(CheckFinished());
  std::printf("suite %s: %d runs of %s on %s, results in %s\n", suite_.name().c_str(), static_cast<int>(runs_.size()),
              suite_.model().c_str(), dataset_.c_str(), options_.out.c_str());
  CatchInterrupts();

  const Clock::time_point start = Clock::now();
  int ran = 0;
  absl::Status first_failure;
  const int to_run = static_cast<int>(runs_.size() - finished_.size());
  for (const proto::RunSpec& run : runs_) {
    if (absl::c_linear_search(finished_, run.name())) {
      Say(run, "finished before, kept");
      continue;
    }
    std::error_code ignored;
    fs::remove(MetricsPath(options_.out, dataset_, run.name()), ignored);
    const absl::Status status =
        Interrupted() ? absl::CancelledError("interrupted; the same command continues") : RunOne(run);
    if (status.ok()) {
      finished_.push_back(run.name());
    } else {
      failed_.push_back(run.name());
      errors_.push_back(std::string(status.message()));
    }
    RETURN_IF_ERROR(WriteSummary());
    if (status.code() == absl::StatusCode::kCancelled || status.code() == absl::StatusCode::kDataLoss) return status;
    if (!status.ok()) {
      Say(run, absl::StrCat("FAILED: ", status.message()));
      if (first_failure.ok()) first_failure = status;
    }
    ++ran;
    if (ran < to_run) {
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      std::printf("  %d of %d runs left, about %s\n", to_run - ran, static_cast<int>(runs_.size()),
                  FormatDuration(seconds / ran * (to_run - ran)).c_str());
    }
  }
  RETURN_IF_ERROR(WriteSummary());
  return first_failure;
}

}  // namespace

absl::Status RunSuite(const proto::Suite& suite, const std::vector<proto::RunSpec>& runs, const SuiteOptions& options) {
  return SuiteRunner(suite, runs, options).Run();
}

}  // namespace mt
