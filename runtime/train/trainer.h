// The training step and its loop, over a loaded plan and a corpus.
#ifndef MT_RUNTIME_TRAIN_TRAINER_H_
#define MT_RUNTIME_TRAIN_TRAINER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/data/corpus.h"
#include "runtime/data/sample_order.h"
#include "runtime/executor.h"
#include "runtime/train/lr_schedule.h"
#include "runtime/train/train_state.h"

namespace mt {

// Scalars that a step reads; a program takes those it has inputs for.
struct StepScalars {
  uint64_t seed = 0;
  int64_t step = 0;          // 0 is the first.
  int64_t first_sample = 0;  // Global index of the batch's first sample.
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0;
};

// Writes batches and scalars into a program's inputs, by way of pinned memory: the host does not wait for the copies.
// Everything is looked up once.
class StepInputs {
 public:
  // Errors: InvalidArgument for an input that nobody feeds (names it), ResourceExhausted (no pinned memory).
  static absl::StatusOr<StepInputs> Bind(Executor& executor, const Program& program, int64_t vocab_size);

  // Hands a batch over for the program's next run; the last batch's runs may be under way. tokens, labels: [batch *
  // sequence]. Tokens must be below the vocabulary size. `beside`: it may be copied to its staging buffers while these
  // runs are under way. REQUIRES, if so: no other program has been run since, or will be before TakeBatch.
  void StageBatch(absl::Span<const int32_t> tokens, absl::Span<const int32_t> labels, bool beside);
  // What was staged becomes the inputs of runs from here on.
  void TakeBatch();
  void SetBatch(absl::Span<const int32_t> tokens, absl::Span<const int32_t> labels) {
    StageBatch(tokens, labels, /*beside=*/false);
    TakeBatch();
  }
  void SetScalars(const StepScalars& scalars);

 private:
  // Blocks of pinned memory used in turn: one may still be read while another is filled.
  struct Ring {
    static constexpr int kBlocks = 2;
    std::byte* blocks[kBlocks] = {};
    int64_t read[kBlocks] = {-1, -1};  // The point after which a block may be filled; -1: it has not been used.
    int current = 0;
  };
  absl::Status Allocate(Ring& ring, int64_t bytes);
  std::byte* Next(Ring& ring);  // Waits until its copies are done.

  struct BatchInput {
    const BoundTensor* tensor;
    int64_t at;  // In a block.
  };
  struct Scalar {
    const BoundTensor* tensor;
    double StepScalars::*field;
    int64_t at;
  };
  Backend* backend_ = nullptr;
  int64_t vocab_size_ = 0;
  const BoundTensor *tokens_ = nullptr, *labels_ = nullptr, *order_ = nullptr, *rng_ = nullptr;
  std::vector<BatchInput> batch_;
  std::vector<Scalar> scalars_;
  Ring batches_, numbers_;
  int64_t taken_ = -1;   // In kThunks: the staging buffers have been read.
  int64_t staged_ = -1;  // In kInputs: the staging buffers are full.
  std::vector<int32_t> scratch_;
};

// Of steps, tokens, epochs and minutes the first limit that is met ends the run.
struct TrainOptions {
  TrainState from;  // Where an earlier run stopped.
  std::optional<int64_t> steps, max_tokens;
  std::optional<double> epochs, max_minutes;
  LrShape schedule = LrShape::kCosine;
  int64_t warmup_steps = 0;
  double min_lr_ratio = 0.1;
  int64_t patience = 3;
  StepScalars scalars;       // lr is the peak.
  int64_t eval_every = 0;    // 0: at the end only.
  int64_t eval_batches = 0;  // Of one evaluation during training; 0: the whole split.
  // A step whose loss is so many nats above the running mean ends Train with OutOfRange; 0: none does.
  double spike = 0;
  int64_t early_stop = 0;    // Evaluations in a row without a better loss that end the run; 0: none do.
  std::string init, resume;  // Where the states came from, for the run's identity.
  std::string curriculum;    // As it was asked for.
  // Train returns after this step, though the run has more: another plan goes on.
  std::optional<int64_t> pause_after;
};

// A part of a run that one plan takes.
struct StageShape {
  int64_t steps = 0;  // Of the last one: 0, it goes on to the end of the run.
  int64_t batch = 0, sequence = 0;
};
// Of a plan whose facts are untrusted, with no steps. Errors: InvalidArgument (a fact is missing).
absl::StatusOr<StageShape> ShapeOf(const proto::PlanProto& plan);
// Steps that `options` asks for over these stages, with so many tokens in an epoch; 0 where only the time is limited.
// REQUIRES: at least one stage.
int64_t PlannedSteps(const TrainOptions& options, absl::Span<const StageShape> stages, int64_t epoch_tokens);
// Tokens of the first steps of a run, as far as they can be counted.
int64_t TokensOfSteps(int64_t steps, absl::Span<const StageShape> stages);

struct StepMetrics {
  int64_t step = 0;      // From 1.
  int64_t sequence = 0;  // Tokens of each of its sequences.
  double loss = 0, lr = 0, grad_norm = 0, step_seconds = 0, tokens_per_second = 0;
  double elapsed_seconds = 0;
  // With dynamic loss scaling: the scale after the step, and whether the gradients were not finite, so that nothing but
  // the scale changed.
  std::optional<double> loss_scale;
  bool skipped = false;
};

struct EvalMetrics {
  std::string split;
  double loss = 0;  // Nats a token.
  int64_t tokens = 0;
  int64_t sequence = 0;  // Tokens of each of its sequences.
};

// What happens while training; each may be empty.
struct TrainHooks {
  std::function<absl::Status(const StepMetrics&)> on_step;
  std::function<absl::Status(int64_t step, const EvalMetrics&)> on_eval;
  std::function<bool()> interrupted;
  // Whether on_save is to be called after this step; asked once for each.
  std::function<bool(int64_t step)> saves_after;
  // The plan's states are those after state.steps steps, and all of these have been told.
  std::function<absl::Status(const TrainState& state)> on_save;
  // Before Train ends with OutOfRange: the state after the step that failed.
  std::function<void(const TrainState& state)> on_failure;
};

struct TrainResult : TrainState {
  bool interrupted = false, stopped_early = false;
  bool paused = false;  // After TrainOptions::pause_after; the run is not over.
};

class Trainer {
 public:
  // `order`: its block_tokens of 0 are one sequence, its seed is that of the scalars. REQUIRES: the corpus has the
  // plan's vocabulary (CheckVocabulary). Errors: InvalidArgument, FailedPrecondition.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(Executor& executor, std::string data_folder,
                                                         SampleOrder::Options order = {});

  int64_t batch() const { return batch_; }  // Sequences of one optimizer step.
  int64_t microbatches() const { return microbatches_; }
  int64_t sequence() const { return sequence_; }
  // Steps that `options` asks for; 0 where only the time is limited.
  absl::StatusOr<int64_t> PlannedSteps(const TrainOptions& options);

  // Feeds a microbatch (the whole batch where there is one) and the scalars of the step and runs nothing.
  // scalars.first_sample is that of the batch.
  absl::Status Prepare(const StepScalars& scalars, int64_t microbatch = 0);
  // Feeds the scalars to program "apply" and runs nothing. REQUIRES: apply_program() != null.
  void PrepareApply(const StepScalars& scalars);
  const Program& train_program() const { return *train_; }
  // The program that updates from sums over microbatches; null where "train" does.
  const Program* apply_program() const { return apply_; }
  // One optimizer step: "train" over each microbatch, then "apply" where there is one.
  absl::Status Step(const StepScalars& scalars);

  // Where the backend lets the host go on, a step's numbers are read while the next one runs, and on_step is called one
  // step late; before on_eval and at the end all are read.
  // Errors: OutOfRange where the loss or the gradient norm is not finite (names the step), unless the step was skipped
  // and a smaller loss scale is left to try.
  absl::StatusOr<TrainResult> Train(const TrainOptions& options, const TrainHooks& hooks);
  // Mean loss over a split; max_batches 0: all of it. Errors: NotFound (no such split), FailedPrecondition.
  absl::StatusOr<EvalMetrics> Evaluate(const std::string& split, int64_t max_batches);
  // Null where the split has no tokens.
  absl::StatusOr<const CorpusReader*> Reader(const std::string& split);

 private:
  Trainer(Executor& executor, std::string data_folder) : executor_(executor), data_folder_(std::move(data_folder)) {}

  int64_t micro_batch() const { return batch_ / microbatches_; }
  absl::Status Stage(const StepScalars& scalars, int64_t microbatch, bool beside);
  // Hands one step to the device and waits for nothing; stages the first batch of `next`, if there is one, on the way.
  absl::Status Launch(const StepScalars& scalars, const StepScalars* next);

  Executor& executor_;
  std::string data_folder_;

  int64_t batch_ = 0, microbatches_ = 1, sequence_ = 0, vocab_size_ = 0;
  const Program *train_ = nullptr, *apply_ = nullptr, *eval_ = nullptr;
  std::optional<StepInputs> train_inputs_, apply_inputs_, eval_inputs_;
  std::unique_ptr<CorpusReader> readers_[3];
  SampleOrder::Options order_options_;
  std::unique_ptr<SampleOrder> order_;
  std::vector<int32_t> tokens_, labels_;
  std::optional<int64_t> staged_sample_;  // The first one of the batch that has been staged and not taken.
};

// What a run cannot mean as it is asked for: "warmup (200) >= steps (200): the learning rate never reaches its peak".
std::vector<std::string> TrainWarnings(const TrainOptions& options, int64_t steps, int64_t batch, int64_t sequences);

// The corpus's vocabulary and tokenizer against those that the plan was compiled for; a plan that no corpus was named
// for fits every tokenizer. Errors: FailedPrecondition that names both and prints the command that fixes it.
absl::Status CheckVocabulary(const proto::PlanProto& plan, const std::string& plan_path, const Manifest& manifest,
                             const std::string& data_folder);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_TRAINER_H_
