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
#include "runtime/executor.h"
#include "runtime/train/lr_schedule.h"

namespace mt {

// Scalars that a step reads; a program takes those it has inputs for.
struct StepScalars {
  uint64_t seed = 0;
  int64_t step = 0;          // 0 is the first.
  int64_t first_sample = 0;  // Global index of the batch's first sample.
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0;
};

// Writes batches and scalars into a program's inputs. Everything is looked up once.
class StepInputs {
 public:
  // Errors: InvalidArgument for an input that nobody feeds (names it).
  static absl::StatusOr<StepInputs> Bind(Executor& executor, const Program& program, int64_t vocab_size);

  // tokens, labels: [batch * sequence]. Tokens must be below the vocabulary size.
  void SetBatch(absl::Span<const int32_t> tokens, absl::Span<const int32_t> labels);
  void SetScalars(const StepScalars& scalars);

 private:
  Backend* backend_ = nullptr;
  int64_t vocab_size_ = 0;
  const BoundTensor *tokens_ = nullptr, *labels_ = nullptr, *order_ = nullptr, *rng_ = nullptr;
  struct Scalar {
    const BoundTensor* tensor;
    double StepScalars::*field;
  };
  std::vector<Scalar> scalars_;
  std::vector<int32_t> order_values_, scratch_;
};

struct TrainOptions {
  std::optional<int64_t> steps;
  std::optional<double> epochs, max_minutes;
  LrShape schedule = LrShape::kCosine;
  int64_t warmup_steps = 0;
  double min_lr_ratio = 0.1;
  int64_t patience = 3;
  StepScalars scalars;       // lr is the peak.
  int64_t eval_every = 0;    // 0: at the end only.
  int64_t eval_batches = 0;  // Of one evaluation during training; 0: the whole split.
};

struct StepMetrics {
  int64_t step = 0;  // From 1.
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
};

// What happens while training; each may be empty.
struct TrainHooks {
  std::function<absl::Status(const StepMetrics&)> on_step;
  std::function<absl::Status(int64_t step, const EvalMetrics&)> on_eval;
  std::function<bool()> interrupted;
};

struct TrainResult {
  int64_t steps = 0, tokens = 0;
  int64_t skipped_steps = 0;  // By loss scaling; among `steps`.
  double seconds = 0, last_loss = 0;
  bool interrupted = false;
};

class Trainer {
 public:
  // REQUIRES: the corpus has the plan's vocabulary (CheckVocabulary). Errors: InvalidArgument, FailedPrecondition.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(Executor& executor, std::string data_folder);

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

  // Errors: OutOfRange where the loss or the gradient norm is not finite (names the step), unless the step was skipped
  // and a smaller loss scale is left to try.
  absl::StatusOr<TrainResult> Train(const TrainOptions& options, const TrainHooks& hooks);
  // Mean loss over a split; max_batches 0: all of it. Errors: NotFound (no such split), FailedPrecondition.
  absl::StatusOr<EvalMetrics> Evaluate(const std::string& split, int64_t max_batches);
  // Null where the split has no tokens or is not there.
  absl::StatusOr<const CorpusReader*> Reader(const std::string& split);

 private:
  Trainer(Executor& executor, std::string data_folder) : executor_(executor), data_folder_(std::move(data_folder)) {}

  Executor& executor_;
  std::string data_folder_;
  int64_t micro_batch() const { return batch_ / microbatches_; }

  int64_t batch_ = 0, microbatches_ = 1, sequence_ = 0, vocab_size_ = 0;
  const Program *train_ = nullptr, *apply_ = nullptr, *eval_ = nullptr;
  std::optional<StepInputs> train_inputs_, apply_inputs_, eval_inputs_;
  std::unique_ptr<CorpusReader> readers_[3];
  std::vector<int32_t> tokens_, labels_;
};

// What a run cannot mean as it is asked for: "warmup (200) >= steps (200): the learning rate never reaches its peak".
std::vector<std::string> TrainWarnings(const TrainOptions& options, int64_t steps, int64_t batch, int64_t sequences);

// The corpus's vocabulary against the plan's. Errors: FailedPrecondition that names both and prints the command that
// fixes it.
absl::Status CheckVocabulary(const proto::PlanProto& plan, const std::string& plan_path, const Manifest& manifest,
                             const std::string& data_folder);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_TRAINER_H_
