// mtc: the compiler's command line. Its table of flags is ir/base/tools_mtc.cc.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "codegen/choose.h"
#include "codegen/compile.h"
#include "codegen/doctor.h"
#include "codegen/fit.h"
#include "codegen/plan/gpu.h"
#include "codegen/plan/plan.h"
#include "codegen/report/inspect.h"
#include "codegen/report/report.h"
#include "ir/base/aliases.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/hash.h"
#include "ir/base/json.h"
#include "ir/base/memory.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"
#include "ir/base/units.h"
#include "ir/describe.h"
#include "ir/op.h"
#include "ir/target.h"
#include "models/model.h"
#include "passes/describe.h"
#include "passes/pipeline.h"
#include "passes/registry.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

// What mtc needs of a corpus; the runtime checks the rest.
struct CorpusFacts {
  int64_t vocab_size = 0;
  std::string tokenizer_hash;
};

absl::StatusOr<CorpusFacts> ReadCorpusFacts(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/manifest.json");
  const absl::StatusOr<std::string> text = ReadFile(path, int64_t{64} << 20);
  if (text.status().code() == absl::StatusCode::kNotFound) {
    return absl::NotFoundError(
        absl::StrCat("--data ", folder,
                     ": no corpus there (no manifest.json); make one: mtcorpus prep --input FILE "
                     "--out ",
                     ShellQuote(folder)));
  }
  RETURN_IF_ERROR(text);
  const nlohmann::json json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  const auto bad = [&](absl::string_view fact) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", fact, "; make the corpus again with mtcorpus prep"));
  };
  if (!json.is_object()) return bad("not a JSON object");
  const auto vocab = json.find("vocab_size"), hash = json.find("tokenizer_hash");
  if (vocab == json.end() || !vocab->is_number_integer() || *vocab < 1 || *vocab > kMaxElements) {
    return bad("vocab_size is missing or not a positive integer");
  }
  if (hash == json.end() || !hash->is_string()) return bad("tokenizer_hash is missing or not a string");
  return CorpusFacts{vocab->get<int64_t>(), hash->get<std::string>()};
}

struct Compiled {
  proto::PlanProto plan;
  CompileReport report;
  std::string answer;  // How --batch max or --memory was answered.
  std::string fuse;    // Where a smaller arena would do without fuse.
};

// One a line, for --print-pipeline.
std::string PipelineSteps(const Pipeline& pipeline) {
  std::string text;
  for (const PipelineStep& step : pipeline.steps) {
    std::vector<std::string> values;
    for (const PassOption& option : step.pass->options) {
      values.push_back(
          absl::StrCat(":", option.name, "=", OptionValueToString(option, *step.options.Find(option.name))));
    }
    absl::StrAppendFormat(&text, "  %-32s %s\n", absl::StrCat(step.pass->name, absl::StrJoin(values, "")),
                          step.pass->always_on ? "(always) " : "");
    text = std::string(absl::StripTrailingAsciiWhitespace(text));
    absl::StrAppend(&text, " ", step.pass->summary, "\n");
  }
  return text;
}

// --target, or the GPU that is here, or cpu.
absl::StatusOr<Target> TargetOf(const ParsedArgs& args) {
  if (args.Has("target")) return ParseTarget(args.String("target"));
  const absl::StatusOr<CudaDeviceInfo> gpu = DescribeCudaDevice(0);
  if (!gpu.ok()) return Target{};
  const absl::StatusOr<Target> target = TargetOfDevice(gpu->sm);
  if (!target.ok()) {
    std::cerr << "note: " << target.status().message() << " (" << gpu->name << "): the target is cpu\n";
    return Target{};
  }
  std::cerr << "note: the target is " << target->ToString() << ", for the " << gpu->name
            << " here; --target cpu compiles for the CPU\n";
  return *target;
}

// What the command line asks for, but for the batch where that is "max".
absl::StatusOr<Job> JobOf(const ParsedArgs& args) {
  Job job{.spec = args.positional(0)};
  ModelOptions& model = job.model;
  CompileOptions& options = job.options;
  ASSIGN_OR_RETURN(const Target target, TargetOf(args));
  options.target = target.ToString();
  options.optimizer = args.String("optimizer");
  model.batch = args.OptionalInt("batch");
  model.sequence = args.OptionalInt("seq");
  model.sets = args.Strings("set");
  // What mtrun prints where the plan must be compiled again.
  options.notes["spec"] = job.spec;
  options.notes["optimizer"] = options.optimizer;
  ASSIGN_OR_RETURN(const bool is_raw_graph, IsRawGraph(job.spec));
  if (is_raw_graph) options.notes["shapes"] = "fixed";
  if (!model.sets.empty()) options.notes["sets"] = absl::StrJoin(model.sets, ",");
  if (args.Has("data")) {
    ASSIGN_OR_RETURN(const CorpusFacts corpus, ReadCorpusFacts(args.String("data")));
    model.vocab_size = corpus.vocab_size;
    options.notes["tokenizer_hash"] = corpus.tokenizer_hash;
  }
  if (!is_raw_graph) {  // What mtrun exports the weights by.
    ASSIGN_OR_RETURN(const proto::ModelSpec spec, LoadSpec(job.spec, model));
    options.notes["model_spec"] = spec.ShortDebugString();
  }
  return job;
}

// Memory that a plan may take.
struct Memory {
  int64_t bytes = 0;
  std::string source;  // Who allows it.
};

// What --memory says, or, for --batch max without it, what this machine has. A part of that is left to the process.
absl::StatusOr<std::optional<Memory>> MemoryOf(const ParsedArgs& args, const Job& job, bool is_needed) {
  if (const std::optional<int64_t> bytes = args.OptionalBytes("memory")) return Memory{*bytes, "--memory allows"};
  if (!is_needed) return std::nullopt;
  ASSIGN_OR_RETURN(const Target target, ParseTarget(job.options.target));
  if (target.is_cuda()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--batch max needs the memory of the ", job.options.target, " device: --memory 24GiB"));
  }
  constexpr int64_t kProcessBytes = int64_t{64} << 20;
  const int64_t available = AvailableMemoryBytes();
  return Memory{std::max<int64_t>(available - available / 20 - kProcessBytes, 0), "this machine has to give"};
}

// "batch    146, the largest that fits 44.0 GiB: 147 would be 312.4 MiB short".
std::string BatchAnswer(const FitResult& fit, const Memory& memory) {
  const std::string next =
      fit.next > 0 ? absl::StrCat(fit.next, " would be ", FormatBytes(fit.short_bytes), " short") : fit.limit;
  return absl::StrCat("batch    ", fit.largest, ", the largest that fits ", FormatBytes(memory.bytes), "; ", next,
                      "\n");
}

absl::StatusOr<Compiled> CompileSpec(const ParsedArgs& args, bool device_code) {
  ASSIGN_OR_RETURN(Job job, JobOf(args));
  job.options.passes = args.String("passes");
  RETURN_IF_ERROR(PipelineOf(job.options).status());
  const bool largest_batch = args.String("batch") == "max";
  ASSIGN_OR_RETURN(const std::optional<Memory> memory, MemoryOf(args, job, largest_batch));
  Compiled compiled;
  if (largest_batch) {
    ASSIGN_OR_RETURN(const FitResult fit, FitLargest(job, FitAxis::kBatch, memory->bytes));
    job.model.batch = fit.largest > 0 ? fit.largest : fit.next;
    compiled.answer = BatchAnswer(fit, *memory);
  } else if (memory && !args.Has("passes")) {
    ASSIGN_OR_RETURN(const Choice choice, ChoosePasses(job, memory->bytes));
    if (choice.chosen >= 0) {
      job.options.passes = choice.candidates[static_cast<size_t>(choice.chosen)].passes;
      compiled.answer = FormatChoice(choice, job.options.target, memory->bytes);
    }
  }
  if (memory) {  // Before anything is dumped or device code is made.
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
    CompileReport report;
    ASSIGN_OR_RETURN(const proto::PlanProto plan, PassesAndPlan(std::move(module), job.options, report));
    if (NeededBytes(plan) > memory->bytes) {
      return DoesNotFit(job, plan, report.step_seconds, memory->bytes, memory->source);
    }
  }
  job.options.dump_dir = args.String("dump-dir");
  job.options.device_code = device_code;
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
  ASSIGN_OR_RETURN(compiled.plan, Compile(std::move(module), job.options, &compiled.report));
  for (const std::string& warning : compiled.report.warnings) std::cerr << "warning: " << warning << "\n";
  ASSIGN_OR_RETURN(compiled.fuse, FuseNote(job, compiled.plan));
  return compiled;
}

// The model's name as a file name.
std::string FileStem(const proto::PlanProto& plan) {
  std::string stem;
  for (const char c : plan.model()) stem.push_back(absl::ascii_isalnum(c) || strchr("._-", c) != nullptr ? c : '_');
  return stem.empty() || stem[0] == '.' ? absl::StrCat("model", stem) : stem;
}

void PrintCompiled(const ParsedArgs& args, const Compiled& compiled) {
  if (!compiled.answer.empty()) std::cout << compiled.answer << "\n";
  if (args.Bool("print-pipeline")) std::cout << "pipeline\n" << PipelineSteps(compiled.report.pipeline) << "\n";
  std::cout << PlanTable(compiled.plan);
  if (!compiled.fuse.empty()) std::cout << "\n" << compiled.fuse << "\n";
}

absl::Status CompileCommand(const ParsedArgs& args) {
  ASSIGN_OR_RETURN(const Compiled compiled, CompileSpec(args, /*device_code=*/true));
  const std::string path = args.Has("output") ? args.String("output") : absl::StrCat(FileStem(compiled.plan), ".plan");
  RETURN_IF_ERROR(SavePlan(compiled.plan, path));
  PrintCompiled(args, compiled);
  std::error_code error;
  std::cout << "\nwrote " << path << " (" << FormatBytes(static_cast<int64_t>(fs::file_size(path, error))) << ") in "
            << absl::StrFormat("%.2f", compiled.report.total_seconds) << " s\n";
  return absl::OkStatus();
}

// Whether the argument of inspect is a plan: by its name or by how it begins.
bool IsPlan(const std::string& path) {
  if (absl::EndsWith(path, ".plan")) return true;
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return false;
  FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) return false;
  char head[8];
  const size_t read = std::fread(head, 1, sizeof(head), file);
  std::fclose(file);
  return LooksLikePlan(absl::string_view(head, read));
}

absl::Status Inspect(const ParsedArgs& args) {
  if (args.Bool("json") && args.Bool("text")) {
    return absl::InvalidArgumentError("--json and --text exclude each other; choose one");
  }
  Compiled compiled;
  if (IsPlan(args.positional(0))) {
    for (const char* flag :
         {"data", "set", "batch", "seq", "passes", "optimizer", "target", "memory", "print-pipeline", "dump-dir"}) {
      if (args.Has(flag)) {
        return absl::InvalidArgumentError(
            absl::StrCat("--", flag, " is for a SPEC; ", args.positional(0), " is a plan, compiled already"));
      }
    }
    ASSIGN_OR_RETURN(compiled.plan, LoadPlan(args.positional(0)));
  } else {
    ASSIGN_OR_RETURN(compiled, CompileSpec(args, /*device_code=*/args.Has("dump-dir")));
  }
  const struct {
    const char* flag;
    std::string (*make)(const proto::PlanProto&);
  } reports[] = {
      {"html", PlanHtml},
      {"svg", PlanSvg},
      {"memory-viz", absl::EndsWith(args.String("memory-viz"), ".json") ? PlanSnapshotJson : PlanSnapshotPickle}};
  for (const auto& report : reports) {
    if (args.Has(report.flag)) RETURN_IF_ERROR(WriteFile(args.String(report.flag), report.make(compiled.plan)));
  }
  if (args.Bool("json")) {
    std::cout << PlanJson(compiled.plan);
  } else if (args.Bool("text")) {
    std::cout << PlanText(compiled.plan);
  } else {
    PrintCompiled(args, compiled);
    if (!compiled.report.passes.empty()) std::cout << "\n" << FormatPassReports(compiled.report.passes);
  }
  return absl::OkStatus();
}

// One answer of mtc fit.
struct Answer {
  FitAxis axis;
  int64_t batch;       // Where the sequence is what was asked for.
  std::string passes;  // As asked.
  FitResult fit;
};

nlohmann::ordered_json FitJson(const Job& job, const Target& target, int64_t memory_bytes, const proto::ModelSpec& spec,
                               const std::vector<Answer>& answers) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Answer& answer : answers) {
    const FitResult& fit = answer.fit;
    const bool is_batch = answer.axis == FitAxis::kBatch;
    nlohmann::ordered_json row = {{"passes", fit.passes}, {"asked", answer.passes}, {"of", is_batch ? "batch" : "seq"}};
    row["batch"] = is_batch ? fit.largest : answer.batch;
    row["seq"] = is_batch ? job.model.sequence.value_or(spec.max_sequence()) : fit.largest;
    row["needs_bytes"] = fit.needs_bytes;
    row["step_seconds"] = fit.step_seconds;
    if (fit.next > 0) {
      row["next"] = {{"size", fit.next}, {"needs_bytes", fit.next_needs_bytes}, {"short_bytes", fit.short_bytes}};
    } else {
      row["next"] = nullptr;
      row["limit"] = fit.limit;
    }
    nlohmann::ordered_json planned = nlohmann::ordered_json::array();
    for (const auto& [size, bytes] : fit.planned) planned.push_back({{"size", size}, {"needs_bytes", bytes}});
    row["planned"] = planned;
    row["monotone"] = fit.monotone;
    row["seconds"] = fit.seconds;
    rows.push_back(row);
  }
  return {{"model", spec.name()},
          {"target", target.ToString()},
          {"memory_bytes", memory_bytes},
          {"context_bytes", ContextBytes(target)},
          {"max_sequence", spec.max_sequence()},
          {"rows", rows}};
}

std::string FitTable(const std::vector<Answer>& answers, FitAxis axis, absl::string_view title) {
  std::string text = absl::StrFormat("\n%10s %12s  %-34s %12s  passes\n", title, "needs", "the next", "step (est.)");
  for (const Answer& answer : answers) {
    if (answer.axis != axis) continue;
    const FitResult& fit = answer.fit;
    const std::string next = fit.next > 0
                                 ? absl::StrFormat("%d needs %s: %s short", fit.next, FormatBytes(fit.next_needs_bytes),
                                                   FormatBytes(fit.short_bytes))
                                 : "none larger can be built";
    absl::StrAppendFormat(&text, "%10d %12s  %-34s %12s  %s\n", fit.largest,
                          fit.largest > 0 ? FormatBytes(fit.needs_bytes) : "-", next,
                          fit.largest > 0 ? StepText(fit.step_seconds) : "-", fit.passes);
  }
  return text;
}

absl::Status Fit(const ParsedArgs& args) {
  ASSIGN_OR_RETURN(Job job, JobOf(args));
  const std::optional<int64_t> memory = args.OptionalBytes("memory");
  if (!memory) return absl::InvalidArgumentError("--memory is needed: what the model has to fit in, such as 24GiB");
  if (job.model.batch && job.model.sequence) {
    return absl::InvalidArgumentError(
        "--batch and --seq are both given: nothing is left to fit; leave one out, or ask mtc compile with --memory");
  }
  ASSIGN_OR_RETURN(const Target target, ParseTarget(job.options.target));
  ASSIGN_OR_RETURN(const proto::ModelSpec spec, LoadSpec(job.spec, job.model));
  std::vector<std::string> pipelines = args.Strings("passes");
  const bool named = !pipelines.empty();
  if (!named) pipelines = FitPipelines(job);
  // With neither given: the largest batch of the longest sequence that the model is made for, and the longest of one.
  std::vector<FitAxis> axes;
  if (!job.model.batch) axes.push_back(FitAxis::kBatch);
  if (!job.model.sequence) axes.push_back(FitAxis::kSequence);
  std::vector<Answer> answers;
  for (const std::string& passes : pipelines) {
    job.options.passes = passes;
    for (const FitAxis axis : axes) {
      Job asked = job;
      if (axis == FitAxis::kSequence && !asked.model.batch) {
        ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(asked.options));
        asked.model.batch = MicrobatchesOf(pipeline);
      }
      absl::StatusOr<FitResult> fit = FitLargest(asked, axis, *memory);
      if (!named && fit.status().code() == absl::StatusCode::kInvalidArgument && passes != "none") continue;
      if (!fit.ok()) return Annotate(fit.status(), absl::StrCat("--passes=", passes));
      answers.push_back({axis, asked.model.batch.value_or(0), passes, *std::move(fit)});
    }
  }
  if (args.Bool("json")) {
    std::cout << FitJson(job, target, *memory, spec, answers)
                     .dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace)
              << "\n";
    return absl::OkStatus();
  }
  const int64_t context = ContextBytes(target);
  std::cout << "model    " << spec.name() << "\n"
            << "shape    "
            << (job.model.batch ? absl::StrCat("batch ", *job.model.batch)
                                : absl::StrCat("sequence ", job.model.sequence.value_or(spec.max_sequence())))
            << "\n"
            << "target   " << target.ToString() << "\n"
            << "memory   " << FormatBytes(*memory)
            << (context > 0 ? absl::StrCat(", of which ", FormatBytes(context), " are the context") : "") << "\n";
  if (!job.model.batch) std::cout << FitTable(answers, FitAxis::kBatch, "batch");
  if (!job.model.sequence) {
    std::cout << FitTable(answers, FitAxis::kSequence, "longest");
    std::cout << (job.model.batch ? "" : "\nlongest: of one sequence at a time, batch 1");
    if (absl::c_any_of(answers, [&](const Answer& a) {
          return a.axis == FitAxis::kSequence && a.fit.largest > spec.max_sequence();
        })) {
      std::cout << "\nlonger than " << spec.max_sequence() << " needs --set max_sequence=T as well";
    }
    std::cout << "\n";
  }
  return absl::OkStatus();
}

// The value of a flag in a forwarded argument vector; "" where it is not there.
std::string Forwarded(const ParsedArgs& args, absl::string_view flag) {
  const std::vector<std::string>& forwarded = args.forwarded();
  std::string value;
  for (size_t i = 0; i < forwarded.size(); ++i) {
    absl::string_view argument = forwarded[i];
    if (argument == flag && i + 1 < forwarded.size()) value = forwarded[i + 1];
    if (absl::ConsumePrefix(&argument, flag) && absl::ConsumePrefix(&argument, "=")) value = std::string(argument);
  }
  return value;
}

// A folder of this user alone for plans that nobody named. A plan's name there is its content's hash.
absl::StatusOr<std::string> TemporaryFolder() {
  const char* base = std::getenv("TMPDIR");
  const std::string folder = absl::StrCat(base == nullptr || base[0] == '\0' ? "/tmp" : base, "/mt-plans-", geteuid());
  struct stat info;
  if ((mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) || lstat(folder.c_str(), &info) != 0 ||
      !S_ISDIR(info.st_mode) || info.st_uid != geteuid()) {
    return absl::DataLossError(
        absl::StrCat(folder, ": cannot be made or is another user's; name the plan with -o PLAN"));
  }
  return folder;
}

absl::Status Train(const ParsedArgs& args) {
  const std::string mtrun = absl::StrCat(ExecutableFolder(), "/mtrun");
  if (access(mtrun.c_str(), X_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("mtrun is not at ", mtrun, "; build it with ./mt build"));
  }
  ASSIGN_OR_RETURN(const Compiled compiled, CompileSpec(args, /*device_code=*/true));
  std::string path = args.String("output");
  const std::string out = Forwarded(args, "--out");
  if (path.empty() && !out.empty()) {
    RETURN_IF_ERROR(MakeFolder(out));
    path = absl::StrCat(out, "/", FileStem(compiled.plan), ".plan");
  } else if (path.empty()) {
    ASSIGN_OR_RETURN(const std::string folder, TemporaryFolder());
    path = absl::StrFormat("%s/%s-%016x.plan", folder, FileStem(compiled.plan), Fnv1a(PlanText(compiled.plan)));
  }
  RETURN_IF_ERROR(SavePlan(compiled.plan, path));
  PrintCompiled(args, compiled);
  std::cout << "\n";
  std::cout.flush();
  std::vector<std::string> arguments = {mtrun, path};
  if (args.Has("data")) {
    arguments.push_back("--data");
    arguments.push_back(args.String("data"));
  }
  arguments.insert(arguments.end(), args.forwarded().begin(), args.forwarded().end());
  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  execv(mtrun.c_str(), pointers.data());
  return absl::InternalError(absl::StrCat(mtrun, ": ", std::strerror(errno)));
}

absl::Status Models() {
  std::cout << absl::StrFormat("%-20s %14s  %s\n", "name", "parameters", "");
  for (const std::string& name : ZooModels()) {
    const absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(name, {});
    if (!module.ok()) return Annotate(module.status(), name);
    const absl::StatusOr<proto::ModelSpec> spec = LoadSpec(name, {});
    std::cout << absl::StrFormat("%-20s %14s  %s\n", name, FormatCount((*module)->num_parameters()),
                                 spec.ok() ? spec->description() : "a raw graph, its shapes written out");
  }
  return absl::OkStatus();
}

std::string Normal(std::string name) {
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}

absl::Status PassesCommand(const ParsedArgs& args) {
  const std::vector<const PassDef*> passes = Passes().Unique();
  if (args.positionals().empty()) {
    std::cout << DescribePasses();
    return absl::OkStatus();
  }
  const std::string name = Normal(args.positional(0));
  const PassDef* pass = Passes().Find(name);
  if (pass == nullptr) {
    std::vector<std::string> names, also;
    for (const PassDef* known : passes) {
      names.emplace_back(known->name);
      for (const absl::string_view other : known->also_known_as) {
        if (other == name) also.emplace_back(known->name);
      }
    }
    const std::string near = also.empty() ? DidYouMean(name, names) : also[0];
    return absl::InvalidArgumentError(absl::StrCat("pass ", args.positional(0), " is not known",
                                                   near.empty() ? "" : absl::StrCat(" (did you mean ", near, "?)"),
                                                   "; passes: ", absl::StrJoin(names, ", ")));
  }
  std::cout << DescribePass(*pass);
  return absl::OkStatus();
}

absl::Status OpsCommand(const ParsedArgs& args) {
  if (args.positionals().empty()) {
    std::cout << DescribeOps();
    return absl::OkStatus();
  }
  const std::string name = args.positional(0);
  const OpDef* op = FindOp(name);
  if (op == nullptr) {
    std::vector<std::string> names;
    for (const OpDef* known : AllOps()) names.emplace_back(known->name);
    const std::string near = DidYouMean(name, names);
    return absl::InvalidArgumentError(absl::StrCat("op ", name, " is not known",
                                                   near.empty() ? "" : absl::StrCat(" (did you mean ", near, "?)"),
                                                   "; list them with mtc ops"));
  }
  std::cout << DescribeOp(*op);
  return absl::OkStatus();
}

absl::Status Doctor() {
  const std::vector<Diagnosis> diagnoses = Examine();
  std::cout << FormatDiagnoses(diagnoses);
  for (const Diagnosis& d : diagnoses) {
    if (d.verdict == Diagnosis::Verdict::kFix) {
      return absl::FailedPreconditionError(absl::StrCat(d.subject, " needs fixing: ", d.finding));
    }
  }
  return absl::OkStatus();
}

absl::Status Run(const ParsedArgs& args) {
  if (args.command() == "compile") return CompileCommand(args);
  if (args.command() == "inspect") return Inspect(args);
  if (args.command() == "train") return Train(args);
  if (args.command() == "fit") return Fit(args);
  if (args.command() == "models") return Models();
  if (args.command() == "passes") return PassesCommand(args);
  if (args.command() == "ops") return OpsCommand(args);
  if (args.command() == "doctor") return Doctor();
  return absl::InternalError(absl::StrCat("command ", args.command(), " has no code"));
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  absl::StatusOr<std::vector<std::string>> expanded = mt::ExpandAliases(arguments);
  if (!expanded.ok()) return mt::ReportStatus(expanded.status());
  expanded->insert(expanded->begin(), argc > 0 ? argv[0] : "mtc");
  std::vector<char*> pointers;
  for (std::string& argument : *expanded) pointers.push_back(argument.data());
  return mt::RunTool(mt::kMtc, static_cast<int>(pointers.size()), pointers.data(), mt::Run);
}
