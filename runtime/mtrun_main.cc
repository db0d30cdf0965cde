// mtrun: runs a plan.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"
#include "ir/target.h"
#include "runtime/backend.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/checkpoint/states.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/cuda/backend.h"
#include "runtime/data/corpus.h"
#include "runtime/drift.h"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/trace.h"
#include "runtime/train/hugging_face.h"
#include "runtime/train/not_finite.h"
#include "runtime/train/report.h"
#include "runtime/train/run_config.h"
#include "runtime/train/run_folder.h"
#include "runtime/train/run_log.h"
#include "runtime/train/trainer.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;
volatile std::sig_atomic_t interrupted = 0;
void OnSignal(int) { interrupted = 1; }

absl::Status DryRun(proto::PlanProto plan) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), MakeNullBackend()));
  const proto::PlanProto& p = executor->plan();
  std::printf("%s for %s, passes %s: loaded, nothing computed\n", p.model().c_str(), p.target().c_str(),
              p.passes().c_str());
  std::printf("arena %s (%s bytes), of which states %s\n", FormatBytes(p.arena_bytes()).c_str(),
              FormatCount(p.arena_bytes()).c_str(), FormatBytes(p.persistent_bytes()).c_str());
  for (const proto::ProgramProto& program : p.programs()) {
    executor->FindProgram(program.name())->Run();
    const ProgramSummary summary = Summarize(p, program);
    std::printf("program %s: %d instructions, %d recomputed, peak %s at %s, %.3g FLOPs, %.3g bytes moved\n",
                program.name().c_str(), summary.instructions, summary.recomputed,
                FormatBytes(summary.peak_bytes).c_str(), summary.peak_name.c_str(), static_cast<double>(summary.flops),
                static_cast<double>(summary.bytes));
  }
  return absl::OkStatus();
}

TrainOptions OptionsFromArgs(const ParsedArgs& args) {
  TrainOptions options;
  options.steps = args.OptionalInt("steps");
  options.epochs = args.OptionalDouble("epochs");
  options.max_minutes = args.OptionalDouble("max-minutes");
  options.schedule = *ParseLrShape(args.String("schedule"));
  options.warmup_steps = args.Int("warmup");
  options.min_lr_ratio = args.Double("min-lr-ratio");
  options.patience = args.Int("patience");
  options.max_tokens = args.OptionalInt("max-tokens");
  options.early_stop = args.Int("early-stop");
  // Without a place to go back to, a run goes on.
  options.spike = args.Has("out") ? args.Double("spike") : 0;
  options.init = args.String("init");
  options.resume = args.String("resume");
  options.eval_every = args.Int("eval-every");
  options.eval_batches = args.Int("eval-batches");
  StepScalars& scalars = options.scalars;
  scalars.seed = static_cast<uint64_t>(args.Int("seed"));
  scalars.lr = args.Double("lr");
  scalars.beta1 = args.Double("beta1");
  scalars.beta2 = args.Double("beta2");
  scalars.eps = args.Double("eps");
  scalars.weight_decay = args.Double("weight-decay");
  scalars.grad_clip = args.Double("grad-clip");
  return options;
}

Json ConfigJson(const TrainOptions& options, int64_t steps, const ParsedArgs& args) {
  const StepScalars& s = options.scalars;
  return {{"steps", steps},
          {"schedule", std::string(LrShapeName(options.schedule))},
          {"lr", s.lr},
          {"warmup", options.warmup_steps},
          {"min_lr_ratio", options.min_lr_ratio},
          {"beta1", s.beta1},
          {"beta2", s.beta2},
          {"eps", s.eps},
          {"weight_decay", s.weight_decay},
          {"grad_clip", s.grad_clip},
          {"seed", s.seed},
          {"data", args.String("data")},
          {"init", args.Has("init") ? Json(args.String("init")) : Json(nullptr)},
          {"resume", args.Has("resume") ? Json(args.String("resume")) : Json(nullptr)},
          {"threads", args.OptionalInt("threads") ? Json(*args.OptionalInt("threads")) : Json(nullptr)}};
}

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
const double kStartSeconds = Seconds();  // Of the process, nearly.

class Run {
 public:
  Run(const ParsedArgs& args, std::string plan_path) : args_(args), plan_path_(std::move(plan_path)) {}
  absl::Status Execute(proto::PlanProto plan);

 private:
  absl::Status OpenOut(const proto::PlanProto& plan);
  void WarnOfOtherEnvironment() const;
  absl::Status SetStates();
  absl::Status Restore(const CheckpointReader& checkpoint);
  absl::Status Measure();
  absl::Status Trace();
  absl::Status Train();
  absl::Status Finish(RunOutcome outcome, int64_t steps, RunLog& log);
  absl::StatusOr<bool> GoBack(const TrainState& failed, const absl::Status& why);
  absl::Status GiveUp(const TrainState& failed, const absl::Status& why);
  absl::Status EvaluateOnly();

  const ParsedArgs& args_;
  const std::string plan_path_;
  std::string data_, out_;
  Manifest manifest_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Trainer> trainer_;
  TrainOptions options_;
  std::optional<Measurement> measurement_;
  std::unique_ptr<RunFolder> folder_;  // --out; null where nothing is written.
  NewestCheckpoint resume_;            // --resume.
  Json environment_;
  double load_seconds_ = 0, weights_seconds_ = 0;  // Of the time to the first step.
};

// The box of a run that has finished earlier.
absl::Status PrintFinished(const nlohmann::json& summary) {
  BoxRows rows;
  const auto box = summary.find("box");
  for (size_t i = 0; box != summary.end() && box->is_array() && i < box->size(); ++i) {
    const nlohmann::json& row = (*box)[i];
    if (row.is_array() && row.size() == 2 && row[0].is_string() && row[1].is_string()) {
      rows.push_back({row[0].get<std::string>(), row[1].get<std::string>()});
    }
  }
  rows.push_back({"finished", "earlier; --fresh to repeat"});
  const auto text = [&](const char* key) {
    const auto found = summary.find(key);
    return found == summary.end() ? "?" : found->is_string() ? found->get<std::string>() : found->dump();
  };
  std::printf("%s", Box(absl::StrCat(text("model"), ": ", text("steps"), " steps"), rows).c_str());
  return absl::OkStatus();
}

// What lies in --out: nothing, this run finished, or where it stopped.
absl::Status Run::OpenOut(const proto::PlanProto& plan) {
  out_ = args_.String("out");
  if (args_.Has("resume")) {
    if (args_.Has("init")) {
      return absl::InvalidArgumentError("--init takes the weights alone, --resume all of a checkpoint: leave one out");
    }
    absl::StatusOr<NewestCheckpoint> found = CheckpointAt(args_.String("resume"));
    if (!found.ok()) return Annotate(found.status(), "--resume");
    resume_ = *std::move(found);
  }
  if (args_.Has("eval")) return absl::OkStatus();
  if (out_.empty()) {
    for (const char* flag : {"save-every", "keep", "fresh", "tensorboard"}) {
      if (args_.Has(flag)) return absl::InvalidArgumentError(absl::StrCat("--", flag, " is about --out DIR: give it"));
    }
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(folder_, RunFolder::Open({.path = out_,
                                             .identity = RunIdentity(plan, manifest_, options_),
                                             .fresh = args_.Bool("fresh"),
                                             .save_every = args_.OptionalInt("save-every"),
                                             .keep = args_.Int("keep")}));
  return absl::OkStatus();
}

// The environment of what it goes on from against the one that is here.
void Run::WarnOfOtherEnvironment() const {
  std::vector<std::string> warnings;
  if (folder_ != nullptr) warnings = folder_->Warnings(environment_);
  if (resume_.checkpoint != nullptr && (folder_ == nullptr || folder_->checkpoint() == nullptr)) {
    const std::vector<std::string> differences = Differences(resume_.checkpoint->environment(), environment_);
    if (!differences.empty()) {
      warnings.push_back(absl::StrCat("--resume ", args_.String("resume"),
                                      " goes on within rounding, not to the bit: ", absl::StrJoin(differences, ", ")));
    }
  }
  for (const std::string& warning : warnings) std::fprintf(stderr, "warning: %s\n", warning.c_str());
}

absl::Status Run::Restore(const CheckpointReader& checkpoint) {
  ASSIGN_OR_RETURN(const std::vector<std::string> fresh, RestoreStates(*executor_, checkpoint));
  const absl::StatusOr<TrainState> state = TrainStateFromJson(checkpoint.progress());
  if (!state.ok()) return Annotate(state.status(), checkpoint.path());
  if (options_.from.steps != state->steps) {
    std::printf("goes on from %s, step %lld\n", checkpoint.path().c_str(), static_cast<long long>(state->steps));
    for (const std::string& group : fresh) std::printf("  %s\n", group.c_str());
    std::fflush(stdout);
  }
  options_.from = *state;
  return absl::OkStatus();
}

// --init: a file, or the folder of a run or of a checkpoint.
std::string WeightsPath(std::string path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return path;
  // Of a run that has not finished: the newest checkpoint's.
  if (!std::filesystem::exists(path + "/" + kWeightsFile, ignored)) {
    const absl::StatusOr<NewestCheckpoint> newest = CheckpointAt(path);
    if (newest.ok()) path = newest->checkpoint->path();
  }
  return absl::StrCat(path, "/", kWeightsFile);
}

// --export-hf: the weights of --init as a Hugging Face folder, with the tokenizer of --data.
absl::Status ExportWeights(const proto::PlanProto& plan, const ParsedArgs& args) {
  const std::string folder = args.String("export-hf");
  const std::string init = args.String("init");
  if (init.empty() || absl::StartsWith(init, "hf:")) {
    return absl::InvalidArgumentError("--export-hf writes the weights of --init DIR, an earlier --out: give it");
  }
  absl::StatusOr<proto::ModelSpec> spec = SpecOfPlan(plan);
  if (!spec.ok()) return Annotate(spec.status(), args.positional(0));
  std::string tokenizer;
  if (args.Has("data")) {
    ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(args.String("data")));
    RETURN_IF_ERROR(CheckVocabulary(plan, args.positional(0), manifest, args.String("data")));
    RETURN_IF_ERROR(LoadCorpusTokenizer(args.String("data"), manifest));
    if (manifest.tokenizer != "char") tokenizer = absl::StrCat(args.String("data"), "/", kTokenizerFile);
  }
  RETURN_IF_ERROR(ExportHuggingFace(*spec, WeightsPath(init), tokenizer, folder));
  std::printf("wrote %s: transformers loads it%s\n", folder.c_str(),
              tokenizer.empty() ? "; a tokenizer comes along with --data CORPUS" : "");
  return absl::OkStatus();
}

absl::Status Run::SetStates() {
  executor_->InitializeStates(options_.scalars.seed);
  if (folder_ != nullptr && folder_->checkpoint() != nullptr) return Restore(*folder_->checkpoint());
  if (resume_.checkpoint != nullptr) return Restore(*resume_.checkpoint);
  if (!args_.Has("init")) return absl::OkStatus();
  const std::string init = args_.String("init");
  if (absl::StartsWith(init, "hf:")) return LoadHuggingFace(*executor_, init.substr(3));
  return LoadWeights(*executor_, WeightsPath(init));
}

absl::Status Run::Measure() {
  const Program* program = executor_->FindProgram("train");
  if (program == nullptr) return absl::InvalidArgumentError("--measure: the plan has no program \"train\"");
  const auto restore = [&] { return SetStates(); };
  ASSIGN_OR_RETURN(measurement_,
                   MeasureProgram(
                       *executor_, *program, [&] { return trainer_->Prepare(options_.scalars); }, restore));
  if (trainer_->apply_program() != nullptr) {
    const auto prepare = [&] {
      trainer_->PrepareApply(options_.scalars);
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(const Measurement apply, MeasureProgram(*executor_, *trainer_->apply_program(), prepare, restore));
    measurement_ = Together(*measurement_, apply);
  }
  const Measurement& m = *measurement_;
  std::printf("measured one %s: arena %s bytes planned, %s measured\n",
              trainer_->apply_program() == nullptr ? "step" : "microbatch and the update",
              FormatCount(m.planned_arena_bytes).c_str(), FormatCount(m.measured_arena_bytes).c_str());
  if (m.idle_workspace_bytes > 0) {
    std::printf("  the last %s bytes are workspace that no kernel touched\n",
                FormatCount(m.idle_workspace_bytes).c_str());
  }
  for (const PhaseMeasurement& phase : m.phases) {
    std::printf("  %-9s %15s bytes written as planned, %15s measured (workspaces: %s)\n", phase.phase.c_str(),
                FormatCount(phase.planned_bytes).c_str(), FormatCount(phase.measured_bytes).c_str(),
                FormatCount(phase.workspace_bytes).c_str());
  }
  for (const std::string& difference : m.differences) std::printf("  DIFFERS: %s\n", difference.c_str());
  std::printf("  %s\n", m.agrees() ? "planned = measured; same bits over two poisons; no allocation in the step"
                                   : "the measurement does not agree with the plan");
  return absl::OkStatus();
}

absl::Status Run::Trace() {
  const Program* program = executor_->FindProgram("train");
  if (program == nullptr) return absl::InvalidArgumentError("--trace: the plan has no program \"train\"");
  // Once before, so that the timeline is not that of a cold start.
  RETURN_IF_ERROR(trainer_->Step(options_.scalars));
  std::vector<TracedRun> runs;
  for (int64_t i = 0; i < trainer_->microbatches(); ++i) {
    runs.push_back({program, [this, i] { return trainer_->Prepare(options_.scalars, i); }});
  }
  if (trainer_->apply_program() != nullptr) {
    runs.push_back({trainer_->apply_program(), [this] {
                      trainer_->PrepareApply(options_.scalars);
                      return absl::OkStatus();
                    }});
  }
  RETURN_IF_ERROR(WriteTrace(*executor_, runs, args_.String("trace")));
  std::printf("wrote %s: open it in ui.perfetto.dev\n", args_.String("trace").c_str());
  return SetStates();
}

absl::Status Run::EvaluateOnly() {
  ASSIGN_OR_RETURN(const EvalMetrics eval, trainer_->Evaluate(args_.String("eval"), 0));
  if (eval.tokens == 0) {
    return absl::FailedPreconditionError(absl::StrCat("the ", eval.split, " split of ", data_, " is empty"));
  }
  std::printf("%s: %s over %s tokens\n", eval.split.c_str(), LossText(eval).c_str(), FormatCount(eval.tokens).c_str());
  return absl::OkStatus();
}

// After a step that failed: to the newest checkpoint or the start, past the sequences up to that step, with half of the
// learning rate for a while. False where that was done too often in a row.
absl::StatusOr<bool> Run::GoBack(const TrainState& failed, const absl::Status& why) {
  constexpr int64_t kMostSetbacks = 20, kStepsOfBackingOff = 100;
  const bool in_a_row = failed.steps <= failed.backs_off_until;
  if (in_a_row && failed.setbacks >= kMostSetbacks) return false;
  RETURN_IF_ERROR(folder_->GoBack());
  options_.from = {};
  RETURN_IF_ERROR(SetStates());
  TrainState& from = options_.from;
  from.samples = failed.samples;
  from.seconds = failed.seconds;
  from.setbacks = in_a_row ? failed.setbacks + 1 : 1;
  from.lr_factor = (in_a_row ? failed.lr_factor : 1) * 0.5;
  from.backs_off_until = failed.steps + kStepsOfBackingOff;
  std::fprintf(stderr,
               "warning: %s; back to step %lld, past these sequences, with %g of the learning rate until step "
               "%lld (%lld of %lld times)\n",
               std::string(why.message()).c_str(), static_cast<long long>(from.steps), from.lr_factor,
               static_cast<long long>(from.backs_off_until), static_cast<long long>(from.setbacks),
               static_cast<long long>(kMostSetbacks));
  return true;
}

// The error of a run that went back too often. Takes the attempt once more, up to the step that failed, to name the op.
absl::Status Run::GiveUp(const TrainState& failed, const absl::Status& why) {
  std::string op;
  const TrainState from = std::exchange(options_.from, TrainState());
  int64_t done = from.steps;
  TrainHooks replay;
  replay.on_step = [&](const StepMetrics& step) {
    done = step.step;
    return absl::OkStatus();
  };
  replay.interrupted = [&] { return done >= failed.steps - 1; };
  if (SetStates().ok()) {
    options_.from = from;
    if (trainer_->Train(options_, replay).ok()) op = FirstNotFinite(*executor_, *trainer_, options_, failed);
  }
  const std::string good = folder_->last_saved_step() < 0
                               ? ""
                               : absl::StrCat("; ", out_, "/", CheckpointName(folder_->last_saved_step()), " is good");
  return absl::OutOfRangeError(absl::StrCat(why.message(), op.empty() ? "" : "; ", op, "; the run went back ",
                                            failed.setbacks, " times and stops", good));
}

absl::Status Run::Train() {
  ASSIGN_OR_RETURN(const int64_t steps, trainer_->PlannedSteps(options_));
  ASSIGN_OR_RETURN(const CorpusReader* reader, trainer_->Reader("train"));
  const int64_t sequences = reader == nullptr ? 0 : reader->num_sequences(trainer_->sequence());
  for (const std::string& warning : TrainWarnings(options_, steps, trainer_->batch(), sequences)) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  RunLog log(args_.Int("log-every"));
  RETURN_IF_ERROR(log.Open(out_, args_.Bool("tensorboard"), options_.from.steps));
  const StepContext context = {.steps = steps,
                               .max_seconds = options_.max_minutes ? *options_.max_minutes * 60 : -1,
                               .arena_bytes = executor_->plan().arena_bytes(),
                               .seconds_at_peak = ModelSeconds(executor_->plan())};
  Backend& backend = executor_->backend();
  DriftWatch drift;
  RunOutcome outcome;
  outcome.times = {.load_seconds = load_seconds_, .weights_seconds = weights_seconds_};
  const double ready_seconds = Seconds();

  TrainHooks hooks;
  hooks.interrupted = [] { return interrupted != 0; };
  hooks.on_step = [&](const StepMetrics& step) {
    if (step.step == options_.from.steps + 1) outcome.times.first_step_seconds = Seconds() - ready_seconds;
    if (step.step == options_.from.steps + DriftWatch::kFirstStep) drift.Start(backend);
    if (folder_ != nullptr) RETURN_IF_ERROR(folder_->Poll());
    return log.Step(step, context);
  };
  hooks.on_eval = [&](int64_t step, const EvalMetrics& eval) { return log.Eval(step, eval); };
  if (folder_ != nullptr) {
    hooks.saves_after = [&](int64_t step) { return folder_->DueAfter(step); };
    hooks.on_save = [&](const TrainState& state) { return folder_->Save(*executor_, state); };
  }
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);
  std::optional<TrainState> failed;
  hooks.on_failure = [&](const TrainState& state) { failed = state; };
  absl::StatusOr<TrainResult> trained = trainer_->Train(options_, hooks);
  while (folder_ != nullptr && failed) {
    log.Break();
    ASSIGN_OR_RETURN(const bool again, GoBack(*failed, trained.status()));
    if (!again) return GiveUp(*failed, trained.status());
    failed.reset();
    RETURN_IF_ERROR(log.GoBack(options_.from.steps));
    trained = trainer_->Train(options_, hooks);
  }
  if (trained.ok() && trained->steps > options_.from.steps + DriftWatch::kFirstStep) {
    outcome.drift = drift.Stop(backend);
  }
  log.Break();
  RETURN_IF_ERROR(trained);
  outcome.result = *std::move(trained);
  outcome.from_step = options_.from.steps;
  outcome.measurement = measurement_;
  if (!measurement_ && !args_.Has("trace")) {
    outcome.times.start_seconds = ready_seconds + outcome.times.first_step_seconds - kStartSeconds;
  }
  if (folder_ != nullptr) {
    if (outcome.result.interrupted || args_.OptionalInt("save-every").value_or(0) > 0) {
      RETURN_IF_ERROR(folder_->Save(*executor_, outcome.result));
    }
    RETURN_IF_ERROR(folder_->Wait());
  }
  return Finish(std::move(outcome), steps, log);
}

// What is known of the model at the end, on the terminal and in --out.
absl::Status Run::Finish(RunOutcome outcome, int64_t steps, RunLog& log) {
  const TrainResult& result = outcome.result;
  if (!result.interrupted && executor_->FindProgram("eval") != nullptr) {
    for (const char* split : {"val", "test"}) {
      const SplitInfo* info = manifest_.Find(split);
      if (info == nullptr || info->tokens < 2) continue;
      ASSIGN_OR_RETURN(const EvalMetrics eval, trainer_->Evaluate(split, 0));
      RETURN_IF_ERROR(log.FinalEval(result.steps, eval));
      outcome.evals.push_back({eval, *info});
    }
  }
  const MemoryUse memory = MemoryUseOf(*executor_);
  ASSIGN_OR_RETURN(BoxRows rows, OutcomeRows(*executor_, outcome, memory));
  if (!out_.empty()) {
    if (!result.interrupted) RETURN_IF_ERROR(SaveWeights(*executor_, out_ + "/" + kWeightsFile));
    RETURN_IF_ERROR(
        WriteFile(out_ + "/" + kMemoryFile, absl::StrCat(MemoryJson(*executor_, measurement_, memory).dump(2), "\n")));
    rows.push_back({"files", absl::StrCat(out_, "/{", kMetricsFile, ",", kMemoryFile, ",", kSummaryFile, ",",
                                          result.interrupted ? CheckpointName(result.steps) : kWeightsFile, "}")});
    Json summary = OutcomeJson(*executor_, outcome);
    summary["config"] = ConfigJson(options_, steps, args_);
    summary["command"] = args_.command_line();
    summary["identity"] = RunIdentity(executor_->plan(), manifest_, options_);
    summary["box"] = rows;
    RETURN_IF_ERROR(WriteFile(out_ + "/" + kSummaryFile, absl::StrCat(summary.dump(2), "\n")));
  }
  std::printf("%s", Box(absl::StrCat(executor_->plan().model(), ": ", result.steps, " steps"), rows).c_str());
  if (!result.interrupted) return absl::OkStatus();
  return absl::CancelledError(absl::StrCat("interrupted after step ", result.steps,
                                           out_.empty()
                                               ? ""
                                               : absl::StrCat("; saved in ", out_, "/", CheckpointName(result.steps),
                                                              "; the same command goes on from there")));
}

// The backend of the plan's target.
absl::StatusOr<std::unique_ptr<Backend>> BackendOf(const proto::PlanProto& plan, const std::string& path,
                                                   const ParsedArgs& args) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(plan.target()));
  if (!target.is_cuda()) {
    if (args.Has("device")) {
      return absl::InvalidArgumentError(
          absl::StrCat("--device numbers a GPU; ", path, " is a plan for ", plan.target(), ": leave it out"));
    }
    if (args.Has("matmul-algos")) {
      return absl::InvalidArgumentError(
          absl::StrCat("--matmul-algos is about cuBLASLt; ", path, " is a plan for ", plan.target(), ": leave it out"));
    }
    return MakeCpuBackend(static_cast<int>(args.OptionalInt("threads").value_or(0)));
  }
  CudaOptions options;
  options.time_matmuls = args.String("matmul-algos") == "timed";
  options.warn = [](const std::string& warning) { std::fprintf(stderr, "warning: %s\n", warning.c_str()); };
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      MakeCudaBackend(static_cast<int>(args.OptionalInt("device").value_or(0)), std::move(options));
  if (!backend.ok()) {
    return Annotate(backend.status(), absl::StrCat(path, " is a plan for ", plan.target()));
  }
  return backend;
}

// Where a plan does not fit: its peak, and who knows what would.
std::string FitHint(const proto::PlanProto& plan) {
  const proto::ProgramProto* largest = MainProgram(plan);
  if (largest == nullptr) return "";
  for (const proto::ProgramProto& program : plan.programs()) {
    if (program.peak_bytes() > largest->peak_bytes()) largest = &program;
  }
  const ProgramSummary summary = Summarize(plan, *largest);
  const auto spec = plan.notes().find("spec");
  const bool here = absl::StartsWith(plan.target(), "cpu");  // A GPU says itself what it has.
  return absl::StrCat("; the peak is at ", summary.name, " ", summary.peak_name,
                      spec == plan.notes().end() || !here
                          ? ""
                          : absl::StrCat("; what would fit: mtc fit ", ShellQuote(spec->second), " --memory ",
                                         CanonicalBytes(AvailableMemoryBytes() >> 20 << 20)));
}

absl::Status Run::Execute(proto::PlanProto plan) {
  data_ = args_.String("data");
  if (data_.empty()) {
    return absl::InvalidArgumentError("--data DIR is needed: a corpus from mtcorpus prep (or --dry-run)");
  }
  ASSIGN_OR_RETURN(manifest_, ReadManifest(data_));
  RETURN_IF_ERROR(CheckVocabulary(plan, plan_path_, manifest_, data_));
  options_ = OptionsFromArgs(args_);
  RETURN_IF_ERROR(OpenOut(plan));
  if (folder_ != nullptr && !folder_->finished().is_null()) return PrintFinished(folder_->finished());
  const double load_start = Seconds();
  ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, BackendOf(plan, plan_path_, args_));
  const std::string hint = FitHint(plan);
  const bool guard = args_.String("debug-arena") == "guard";
  if (guard && args_.Bool("measure")) {
    return absl::InvalidArgumentError(
        "--measure looks at the plan's arena, and --debug-arena guard has none: leave one of them out");
  }
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Load(std::move(plan), std::move(backend), guard ? Placement::kGuard : Placement::kArena);
  if (executor.status().code() == absl::StatusCode::kResourceExhausted) {
    return absl::ResourceExhaustedError(absl::StrCat(executor.status().message(), hint));
  }
  RETURN_IF_ERROR(executor);
  executor_ = *std::move(executor);
  if (guard) {
    std::printf("guard: %d buffers, each in memory of its own; a write beside one ends the run\n",
                executor_->plan().buffers_size());
  }
  environment_ = RunEnvironment(executor_->plan(), executor_->backend());
  WarnOfOtherEnvironment();
  ASSIGN_OR_RETURN(trainer_, Trainer::Create(*executor_, data_));
  load_seconds_ = Seconds() - load_start;
  RETURN_IF_ERROR(SetStates());
  weights_seconds_ = Seconds() - load_start - load_seconds_;
  if (args_.Has("eval")) return EvaluateOnly();
  if (executor_->FindProgram("train") == nullptr) {
    return absl::InvalidArgumentError("the plan has no program \"train\"; use --eval SPLIT");
  }
  RETURN_IF_ERROR(
      trainer_->Prepare(options_.scalars));  // A corpus that cannot be read fails before anything is written.
  if (folder_ != nullptr) RETURN_IF_ERROR(folder_->Begin(environment_));
  if (args_.Bool("measure")) {
    RETURN_IF_ERROR(Measure());
    ResetPeakResidentBytes();
  }
  if (args_.Has("trace")) RETURN_IF_ERROR(Trace());
  return Train();
}

absl::Status ShowConfig(const ParsedArgs& args, const ConfiguredArguments& configured) {
  const std::vector<std::string> typed_arguments(
      configured.arguments.begin() + static_cast<int64_t>(configured.from_files.size()), configured.arguments.end());
  ASSIGN_OR_RETURN(const ParsedArgs typed, ParseArgs(kMtrun, AllTools(), typed_arguments));
  std::printf("%s", ConfigTable(kMtrun, args, typed, configured).c_str());
  return absl::OkStatus();
}

absl::Status Main(const ParsedArgs& args) {
  const std::string& path = args.positional(0);
  ASSIGN_OR_RETURN(proto::PlanProto plan, LoadPlan(path));
  if (args.Bool("dry-run")) return DryRun(std::move(plan));
  if (args.Has("export-hf")) return ExportWeights(plan, args);
  return Run(args, path).Execute(std::move(plan));
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const absl::StatusOr<mt::ConfiguredArguments> configured = mt::ReadConfigs(arguments);
  if (!configured.ok()) return mt::ReportStatus(configured.status());
  std::vector<std::string> all = configured->arguments;
  all.insert(all.begin(), argc > 0 ? argv[0] : "mtrun");
  std::vector<char*> pointers;
  for (std::string& argument : all) pointers.push_back(argument.data());
  return mt::RunTool(mt::kMtrun, static_cast<int>(pointers.size()), pointers.data(), [&](const mt::ParsedArgs& args) {
    return args.Bool("show-config") ? mt::ShowConfig(args, *configured) : mt::Main(args);
  });
}
