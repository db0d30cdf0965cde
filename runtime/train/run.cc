#include "runtime/train/run.h"

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/plan/plan.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/memory.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "runtime/backend.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/checkpoint/states.h"
#include "runtime/checkpoint/weights.h"
#include "runtime/cuda/backend.h"
#include "runtime/data/corpus.h"
#include "runtime/data/sample_order.h"
#include "runtime/drift.h"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/trace.h"
#include "runtime/train/hugging_face.h"
#include "runtime/train/not_finite.h"
#include "runtime/train/report.h"
#include "runtime/train/run_folder.h"
#include "runtime/train/run_log.h"
#include "runtime/train/samples.h"
#include "runtime/train/stages.h"
#include "runtime/train/trainer.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;
volatile std::sig_atomic_t interrupted = 0;
void OnSignal(int) { interrupted = 1; }

TrainOptions OptionsFromArgs(const ParsedArgs& args) {
  TrainOptions options;
  options.steps = args.OptionalInt("steps");
  options.epochs = args.OptionalDouble("epochs");
  options.max_minutes = args.OptionalDouble("max-minutes");
  options.schedule = *ParseLrShape(args.String("lr-schedule"));
  options.warmup_steps = args.Int("warmup");
  options.min_lr_ratio = args.Double("min-lr-ratio");
  options.patience = args.Int("patience");
  options.max_tokens = args.OptionalInt("max-tokens");
  options.early_stop = args.Int("early-stop");
  // Without a place to go back to, a run goes on.
  options.spike = args.Has("out") ? args.Double("spike") : 0;
  options.init = args.String("init");
  options.resume = args.String("resume");
  options.curriculum = args.String("curriculum");
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
          {"lr_schedule", std::string(LrShapeName(options.schedule))},
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
          {"schedule", args.Has("schedule") ? Json(args.String("schedule")) : Json(nullptr)},
          {"curriculum", options.curriculum.empty() ? Json(nullptr) : Json(options.curriculum)},
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
  absl::Status PlanSteps();
  absl::Status OpenOut();
  void WarnOfOtherEnvironment() const;
  absl::Status SetStates();
  absl::Status Restore(const CheckpointReader& checkpoint);
  int64_t FirstStep() const;
  absl::Status LoadStage(size_t index);
  absl::Status NextStage(const TrainState& state, RunLog* log);
  StepContext Context() const;
  absl::StatusOr<TrainResult> TrainStages(const TrainHooks& hooks, RunLog* log);
  absl::Status Measure();
  absl::Status Trace();
  absl::Status Train();
  absl::Status Finish(RunOutcome outcome, RunLog& log);
  Json MemoryJsonOfRun(const MemoryUse& memory) const;
  absl::StatusOr<bool> GoBack(const TrainState& failed, const absl::Status& why);
  absl::Status GiveUp(const TrainState& failed, const absl::Status& why);
  absl::Status EvaluateOnly();

  const ParsedArgs& args_;
  const std::string plan_path_;
  std::string data_, out_;
  Manifest manifest_;
  std::unique_ptr<Tokenizer> tokenizer_;  // The corpus's.
  // A run without --schedule has one stage, whose plan is the executor's alone.
  std::vector<RunStage> stages_;
  struct StageRecord {
    std::optional<Measurement> measurement;
    int64_t process_bytes = 0;  // At its end; 0: it was not run by this process.
  };
  std::vector<StageRecord> records_;  // Of each stage.
  size_t stage_ = 0;                  // What is loaded.
  int64_t steps_ = 0;                 // Of the run; 0: only its time is limited.
  SampleOrder::Options order_;
  std::vector<SavedState> handed_over_;  // From one stage to the next, while that is loaded.
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Samples> samples_;  // --sample-every; else null.
  TrainOptions options_;
  TrainState attempt_;                 // Where the steps that are run now began: a checkpoint, or the start.
  std::unique_ptr<RunFolder> folder_;  // --out; null where nothing is written.
  NewestCheckpoint resume_;            // --resume.
  Json identity_, environment_;
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

// What the limits and the corpus make of the stages: steps, and the order of the samples.
absl::Status Run::PlanSteps() {
  const std::vector<StageShape> shapes = ShapesOf(stages_);
  std::vector<int64_t> lengths;
  for (const StageShape& shape : shapes) lengths.push_back(shape.sequence);
  order_.block_tokens = CommonBlock(lengths);
  const SplitInfo* train = manifest_.Find("train");
  const int64_t tokens = train == nullptr ? 0 : train->tokens;
  const int64_t epoch_tokens = tokens < 1 ? 0 : (tokens - 1) / order_.block_tokens * order_.block_tokens;
  steps_ = PlannedSteps(options_, shapes, epoch_tokens);
  const RunStage& last = stages_.back();
  const bool by_time =
      steps_ == 0 && options_.max_minutes && !options_.steps && !options_.max_tokens && !options_.epochs;
  if (stages_.size() > 1 && !by_time && steps_ <= last.first_step) {
    return absl::InvalidArgumentError(
        absl::StrCat("--schedule takes ", last.first_step, " steps before ", last.path, ", the run has ", steps_,
                     ": nothing is left for that plan; give more --steps, or fewer to the others"));
  }
  ASSIGN_OR_RETURN(order_.tokens_by_length, TokensByLength(options_.curriculum, steps_, shapes, epoch_tokens));
  return absl::OkStatus();
}

// What lies in --out: nothing, this run finished, or where it stopped.
absl::Status Run::OpenOut() {
  out_ = args_.String("out");
  if (args_.Has("resume")) {
    if (args_.Has("init")) {
      return absl::InvalidArgumentError("--init takes the weights alone, --resume all of a checkpoint: leave one out");
    }
    absl::StatusOr<NewestCheckpoint> found = CheckpointAt(args_.String("resume"));
    if (!found.ok()) return Annotate(found.status(), "--resume");
    resume_ = *std::move(found);
    RETURN_IF_ERROR(CheckTrainedTokenizer(absl::StrCat("--resume ", args_.String("resume")),
                                          resume_.checkpoint->identity(), manifest_, data_));
  }
  if (args_.Has("eval") || args_.Has("generate")) return absl::OkStatus();
  if (out_.empty()) {
    for (const char* flag : {"save-every", "keep", "fresh", "tensorboard"}) {
      if (args_.Has(flag)) return absl::InvalidArgumentError(absl::StrCat("--", flag, " is about --out DIR: give it"));
    }
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(folder_, RunFolder::Open({.path = out_,
                                             .identity = identity_,
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

// The step after which SetStates leaves the run.
int64_t Run::FirstStep() const {
  if (folder_ != nullptr && folder_->checkpoint() != nullptr) return folder_->checkpoint()->step();
  return resume_.checkpoint != nullptr ? resume_.checkpoint->step() : 0;
}

absl::Status Run::SetStates() {
  executor_->InitializeStates(options_.scalars.seed);
  if (!handed_over_.empty()) return RestoreStates(*executor_, handed_over_).status();
  if (folder_ != nullptr && folder_->checkpoint() != nullptr) return Restore(*folder_->checkpoint());
  if (resume_.checkpoint != nullptr) return Restore(*resume_.checkpoint);
  if (!args_.Has("init")) return absl::OkStatus();
  const std::string init = args_.String("init");
  if (absl::StartsWith(init, "hf:")) return LoadHuggingFace(*executor_, init.substr(3));
  const std::string weights = WeightsPath(init);
  if (weights != init) {  // A folder of ours, which says what it was trained on.
    RETURN_IF_ERROR(CheckTrainedTokenizer(absl::StrCat("--init ", init), IdentityBeside(weights), manifest_, data_));
  }
  return LoadWeights(*executor_, weights);
}

absl::Status Run::Measure() {
  const Program* program = executor_->FindProgram("train");
  if (program == nullptr) return absl::InvalidArgumentError("--measure: the plan has no program \"train\"");
  const auto restore = [&] { return SetStates(); };
  ASSIGN_OR_RETURN(Measurement m,
                   MeasureProgram(
                       *executor_, *program, [&] { return trainer_->Prepare(options_.scalars); }, restore));
  if (trainer_->apply_program() != nullptr) {
    const auto prepare = [&] {
      trainer_->PrepareApply(options_.scalars);
      return absl::OkStatus();
    };
    ASSIGN_OR_RETURN(const Measurement apply, MeasureProgram(*executor_, *trainer_->apply_program(), prepare, restore));
    m = Together(m, apply);
  }
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
  records_[stage_].measurement = std::move(m);
  ResetPeakResidentBytes();
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
  const size_t stage = StageAfter(stages_, FirstStep());
  if (stage != stage_) RETURN_IF_ERROR(LoadStage(stage));
  options_.from = {};
  RETURN_IF_ERROR(SetStates());
  TrainState& from = options_.from;
  from.samples = failed.samples;
  from.sequence = failed.sequence;
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
  attempt_ = from;
  return true;
}

// The error of a run that went back too often. Takes the attempt once more, up to the step that failed, to name the op.
absl::Status Run::GiveUp(const TrainState& failed, const absl::Status& why) {
  std::string op;
  int64_t done = attempt_.steps;
  TrainHooks replay;
  replay.on_step = [&](const StepMetrics& step) {
    done = step.step;
    return absl::OkStatus();
  };
  replay.interrupted = [&] { return done >= failed.steps - 1; };
  const auto take_again = [&]() -> absl::Status {
    const size_t stage = StageAfter(stages_, attempt_.steps), last = StageAfter(stages_, failed.steps - 1);
    if (stage != stage_) RETURN_IF_ERROR(LoadStage(stage));
    RETURN_IF_ERROR(SetStates());
    options_.from = attempt_;
    ASSIGN_OR_RETURN(const TrainResult before, TrainStages(replay, nullptr));
    return last == stage_ ? absl::OkStatus() : NextStage(before, nullptr);
  };
  if (take_again().ok()) op = FirstNotFinite(*executor_, *trainer_, options_, failed);
  const std::string good = folder_->last_saved_step() < 0
                               ? ""
                               : absl::StrCat("; ", out_, "/", CheckpointName(folder_->last_saved_step()), " is good");
  return absl::OutOfRangeError(absl::StrCat(why.message(), op.empty() ? "" : "; ", op, "; the run went back ",
                                            failed.setbacks, " times and stops", good));
}

// From one plan to the next: the states go by way of the host, and the old arena is gone before the new one comes.
// Without a log nothing is told or measured.
absl::Status Run::NextStage(const TrainState& state, RunLog* log) {
  records_[stage_].process_bytes = MemoryUseOf(*executor_).process_bytes;
  SnapshotStates(*executor_, &handed_over_);
  RETURN_IF_ERROR(LoadStage(stage_ + 1));
  executor_->InitializeStates(options_.scalars.seed);
  ASSIGN_OR_RETURN(const std::vector<std::string> fresh, RestoreStates(*executor_, handed_over_));
  options_.from = state;
  if (log != nullptr) {
    log->Break();
    std::printf("%s\n", StageText(stages_, stage_, steps_).c_str());
    for (const std::string& group : fresh) std::printf("  %s\n", group.c_str());
    if (args_.Bool("measure")) RETURN_IF_ERROR(Measure());
    std::fflush(stdout);
  }
  handed_over_ = {};
  ::malloc_trim(0);  // To the system, before the arena grows into what the process has.
  ResetPeakResidentBytes();
  return absl::OkStatus();
}

StepContext Run::Context() const {
  return {.steps = steps_,
          .max_seconds = options_.max_minutes ? *options_.max_minutes * 60 : -1,
          .arena_bytes = executor_->plan().arena_bytes(),
          .plan = stages_.size() > 1 ? stages_[stage_].path : "",
          .seconds_at_peak = ModelSeconds(executor_->plan())};
}

// To the end of the run, or where it stops. Errors: as Trainer::Train.
absl::StatusOr<TrainResult> Run::TrainStages(const TrainHooks& hooks, RunLog* log) {
  while (true) {
    TrainOptions options = options_;
    if (stages_.size() > 1) {  // These are about all of them.
      options.max_tokens.reset();
      options.epochs.reset();
      if (steps_ > 0) options.steps = steps_;
    }
    if (stage_ + 1 < stages_.size()) options.pause_after = stages_[stage_ + 1].first_step;
    ASSIGN_OR_RETURN(const TrainResult result, trainer_->Train(options, hooks));
    if (!result.paused) return result;
    RETURN_IF_ERROR(NextStage(result, log));
  }
}

absl::Status Run::Train() {
  ASSIGN_OR_RETURN(const CorpusReader* reader, trainer_->Reader("train"));
  const int64_t sequences = reader == nullptr ? 0 : reader->num_sequences(trainer_->sequence());
  for (const std::string& warning : TrainWarnings(options_, steps_, trainer_->batch(), sequences)) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  if (stages_.size() > 1) std::printf("%s", StagesText(stages_, steps_).c_str());
  if (order_.tokens_by_length > 0) {
    std::printf("documents from short to long over the first %s tokens, then in the usual order\n",
                FormatCount(order_.tokens_by_length).c_str());
  }
  std::fflush(stdout);
  RunLog log(args_.Int("log-every"));
  RETURN_IF_ERROR(log.Open(out_, args_.Bool("tensorboard"), options_.from.steps));
  DriftWatch drift;
  RunOutcome outcome;
  outcome.from_step = options_.from.steps;
  outcome.times = {.load_seconds = load_seconds_, .weights_seconds = weights_seconds_};
  const double ready_seconds = Seconds();
  attempt_ = options_.from;
  std::optional<size_t> context_of;  // Which stage.
  StepContext context;
  const auto of_stage = [&]() -> const StepContext& {
    if (context_of != stage_) context = Context();
    context_of = stage_;
    return context;
  };

  TrainHooks hooks;
  hooks.interrupted = [] { return interrupted != 0; };
  hooks.on_step = [&](const StepMetrics& step) {
    if (step.step == outcome.from_step + 1) outcome.times.first_step_seconds = Seconds() - ready_seconds;
    // Of the last plan, where there are several.
    if (step.step == options_.from.steps + DriftWatch::kFirstStep) drift.Start(executor_->backend());
    if (folder_ != nullptr) RETURN_IF_ERROR(folder_->Poll());
    return log.Step(step, of_stage());
  };
  hooks.on_eval = [&](int64_t step, const EvalMetrics& eval) { return log.Eval(step, eval, of_stage()); };
  bool saves = false, samples = false;  // After the step that was asked about.
  hooks.saves_after = [&](int64_t step) {
    saves = folder_ != nullptr && folder_->DueAfter(step);
    samples = samples_ != nullptr && samples_->DueAfter(step);
    return saves || samples;
  };
  hooks.on_save = [&](const TrainState& state) -> absl::Status {
    if (saves) RETURN_IF_ERROR(folder_->Save(*executor_, state));
    if (!samples) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::string text, samples_->Take());
    return log.Sample(state.steps, text);
  };
  std::signal(SIGINT, OnSignal);
  std::signal(SIGTERM, OnSignal);
  std::optional<TrainState> failed;
  hooks.on_failure = [&](const TrainState& state) { failed = state; };
  absl::StatusOr<TrainResult> trained = TrainStages(hooks, &log);
  while (folder_ != nullptr && failed) {
    log.Break();
    ASSIGN_OR_RETURN(const bool again, GoBack(*failed, trained.status()));
    if (!again) return GiveUp(*failed, trained.status());
    failed.reset();
    RETURN_IF_ERROR(log.GoBack(options_.from.steps));
    trained = TrainStages(hooks, &log);
  }
  if (trained.ok() && trained->steps > options_.from.steps + DriftWatch::kFirstStep) {
    outcome.drift = drift.Stop(executor_->backend());
  }
  log.Break();
  RETURN_IF_ERROR(trained);
  outcome.result = *std::move(trained);
  outcome.measurement = records_[stage_].measurement;
  if (!outcome.measurement && !args_.Has("trace")) {
    outcome.times.start_seconds = ready_seconds + outcome.times.first_step_seconds - kStartSeconds;
  }
  if (folder_ != nullptr) {
    if (outcome.result.interrupted || args_.OptionalInt("save-every").value_or(0) > 0) {
      RETURN_IF_ERROR(folder_->Save(*executor_, outcome.result));
    }
    RETURN_IF_ERROR(folder_->Wait());
  }
  return Finish(std::move(outcome), log);
}

// Of several stages also what each planned and, where this process ran it, took.
Json Run::MemoryJsonOfRun(const MemoryUse& memory) const {
  Json json = MemoryJson(*executor_, records_[stage_].measurement, memory);
  if (stages_.size() == 1) return json;
  json["stages"] = StagesJson(stages_);
  for (size_t i = 0; i < stages_.size(); ++i) {
    const StageRecord& record = records_[i];
    Json& stage = json["stages"][i];
    stage["measured_arena_bytes"] = record.measurement ? Json(record.measurement->measured_arena_bytes) : Json(nullptr);
    stage["agree"] = record.measurement ? Json(record.measurement->agrees()) : Json(nullptr);
    stage["process_bytes"] = record.process_bytes > 0 ? Json(record.process_bytes) : Json(nullptr);
  }
  return json;
}

// What is known of the model at the end, on the terminal and in --out.
absl::Status Run::Finish(RunOutcome outcome, RunLog& log) {
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
  records_[stage_].process_bytes = memory.process_bytes;
  ASSIGN_OR_RETURN(BoxRows rows, OutcomeRows(*executor_, outcome, memory));
  for (size_t i = 0; stages_.size() > 1 && i < stages_.size(); ++i) {
    const RunStage& stage = stages_[i];
    rows.push_back({absl::StrCat("stage ", i + 1),
                    absl::StrCat("from step ", stage.first_step + 1, ": ", stage.path, ", ", stage.shape.batch, " x ",
                                 stage.shape.sequence, " tokens, arena ", FormatBytes(stage.plan.arena_bytes()))});
  }
  if (!out_.empty()) {
    if (!result.interrupted) RETURN_IF_ERROR(SaveWeights(*executor_, out_ + "/" + kWeightsFile));
    RETURN_IF_ERROR(WriteFile(out_ + "/" + kMemoryFile, absl::StrCat(MemoryJsonOfRun(memory).dump(2), "\n")));
    rows.push_back({"files", absl::StrCat(out_, "/{", kMetricsFile, ",", kMemoryFile, ",", kSummaryFile, ",",
                                          result.interrupted ? CheckpointName(result.steps) : kWeightsFile, "}")});
    Json summary = OutcomeJson(*executor_, outcome);
    if (stages_.size() > 1) summary["stages"] = StagesJson(stages_);
    summary["config"] = ConfigJson(options_, steps_, args_);
    summary["command"] = args_.command_line();
    summary["identity"] = identity_;
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

// The backend, executor and trainer of a stage in place of those that are there. The states are not set.
absl::Status Run::LoadStage(size_t index) {
  trainer_.reset();
  executor_.reset();  // With its arena.
  stage_ = index;
  RunStage& stage = stages_[index];
  ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, BackendOf(stage.plan, stage.path, args_));
  const std::string hint = FitHint(stage.plan);
  const bool guard = args_.String("debug-arena") == "guard";
  proto::PlanProto plan;
  if (stages_.size() == 1) {
    plan.Swap(&stage.plan);
  } else {
    plan = stage.plan;
  }
  absl::StatusOr<std::unique_ptr<Executor>> executor =
      Executor::Load(std::move(plan), std::move(backend), guard ? Placement::kGuard : Placement::kArena);
  if (executor.status().code() == absl::StatusCode::kResourceExhausted) {
    return absl::ResourceExhaustedError(
        absl::StrCat(stages_.size() > 1 ? absl::StrCat(stage.path, ": ") : "", executor.status().message(), hint));
  }
  if (!executor.ok()) return stages_.size() > 1 ? Annotate(executor.status(), stage.path) : executor.status();
  executor_ = *std::move(executor);
  if (guard) {
    std::printf("guard: %d buffers, each in memory of its own; a write beside one ends the run\n",
                executor_->plan().buffers_size());
  }
  ASSIGN_OR_RETURN(trainer_, Trainer::Create(*executor_, data_, order_));
  if (samples_ != nullptr) RETURN_IF_ERROR(samples_->Use(*executor_));
  if (!args_.Has("eval") && !args_.Has("generate") && executor_->FindProgram("train") == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(stages_.size() > 1 ? stage.path : "the plan",
                                                   " has no program \"train\"",
                                                   stages_.size() > 1 ? "" : "; use --eval SPLIT"));
  }
  return absl::OkStatus();
}

absl::Status Run::Execute(proto::PlanProto plan) {
  data_ = args_.String("data");
  if (data_.empty()) {
    return absl::InvalidArgumentError("--data DIR is needed: a corpus from mtcorpus prep (or --dry-run)");
  }
  if (args_.Has("schedule") && args_.Has("eval")) {
    return absl::InvalidArgumentError("--eval evaluates with one plan, the argument: leave --schedule out");
  }
  if (args_.Has("generate") && !args_.Has("init") && !args_.Has("resume")) {
    return absl::InvalidArgumentError(
        "--generate needs a model: --init DIR, an earlier --out, a checkpoint, or hf:DIR, a Hugging Face folder");
  }
  ASSIGN_OR_RETURN(manifest_, ReadManifest(data_));
  ASSIGN_OR_RETURN(stages_, ReadStages(args_.String("schedule"), plan_path_, std::move(plan)));
  for (const RunStage& stage : stages_) RETURN_IF_ERROR(CheckVocabulary(stage.plan, stage.path, manifest_, data_));
  ASSIGN_OR_RETURN(tokenizer_, LoadCorpusTokenizer(data_, manifest_));
  records_.resize(stages_.size());
  options_ = OptionsFromArgs(args_);
  RETURN_IF_ERROR(PlanSteps());
  identity_ = RunIdentity(stages_, manifest_, options_);
  RETURN_IF_ERROR(OpenOut());
  if (folder_ != nullptr && !folder_->finished().is_null()) return PrintFinished(folder_->finished());
  ASSIGN_OR_RETURN(samples_, Samples::Create(*tokenizer_, args_));
  if (args_.String("debug-arena") == "guard" && args_.Bool("measure")) {
    return absl::InvalidArgumentError(
        "--measure looks at the plan's arena, and --debug-arena guard has none: leave one of them out");
  }
  const double load_start = Seconds();
  // Plans of later stages are loaded once now: what one lacks is said before anything runs.
  for (size_t i = stages_.size(), first = StageAfter(stages_, FirstStep()); i-- > first;) RETURN_IF_ERROR(LoadStage(i));
  environment_ = RunEnvironment(executor_->plan(), executor_->backend());
  WarnOfOtherEnvironment();
  load_seconds_ = Seconds() - load_start;
  RETURN_IF_ERROR(SetStates());
  weights_seconds_ = Seconds() - load_start - load_seconds_;
  if (args_.Has("eval")) return EvaluateOnly();
  if (args_.Has("generate")) {
    std::signal(SIGINT, OnSignal);
    std::signal(SIGTERM, OnSignal);
    return GenerateTexts(*executor_, *tokenizer_, args_, [] { return interrupted != 0; });
  }
  RETURN_IF_ERROR(
      trainer_->Prepare(options_.scalars));  // A corpus that cannot be read fails before anything is written.
  if (folder_ != nullptr) RETURN_IF_ERROR(folder_->Begin(environment_));
  if (args_.Bool("measure")) RETURN_IF_ERROR(Measure());
  if (args_.Has("trace")) RETURN_IF_ERROR(Trace());
  return Train();
}

}  // namespace

absl::Status RunPlan(const ParsedArgs& args, const std::string& path, proto::PlanProto plan) {
  return Run(args, path).Execute(std::move(plan));
}

}  // namespace mt
