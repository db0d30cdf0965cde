#include "runtime/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/check.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/loss_scale.h"

namespace mt {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr const char* kSplits[] = {"train", "val", "test"};

struct ScalarName {
  absl::string_view name;
  double StepScalars::*field;
};
constexpr ScalarName kScalars[] = {{"lr", &StepScalars::lr},
                                   {"beta1", &StepScalars::beta1},
                                   {"beta2", &StepScalars::beta2},
                                   {"eps", &StepScalars::eps},
                                   {"weight_decay", &StepScalars::weight_decay},
                                   {"grad_clip", &StepScalars::grad_clip}};

double ReadScalar(Backend& backend, const BoundTensor& tensor) {
  float value = 0;
  backend.CopyToHost(&value, tensor.data, sizeof(value));
  return value;
}

}  // namespace

absl::StatusOr<StepInputs> StepInputs::Bind(Executor& executor, const Program& program, int64_t vocab_size) {
  StepInputs inputs;
  inputs.backend_ = &executor.backend();
  inputs.vocab_size_ = vocab_size;
  for (const BoundTensor& input : program.inputs()) {
    if (IsState(input.role)) continue;
    bool known = true;
    if (input.name == "tokens" && input.type.dtype == DType::kI32) {
      inputs.tokens_ = &input;
    } else if (input.name == "labels" && input.type.dtype == DType::kI32) {
      inputs.labels_ = &input;
    } else if (input.name == "order" && input.type.dtype == DType::kI32) {
      inputs.order_ = &input;
    } else if (input.name == "rng" && input.type == TensorType{DType::kI32, {4}}) {
      inputs.rng_ = &input;
    } else {
      known = false;
      for (const ScalarName& scalar : kScalars) {
        const bool fits =
            input.type.rank() == 0 && (input.type.dtype == DType::kF32 || input.type.dtype == DType::kF64);
        if (scalar.name == input.name && fits) {
          inputs.scalars_.push_back({&input, scalar.field});
          known = true;
        }
      }
    }
    if (!known) {
      return absl::InvalidArgumentError(
          absl::StrCat("program ", program.proto().name(), " has an input ", input.name, ": ", input.type.ToString(),
                       " that training does not feed; fed are tokens, labels and order (i32), rng i32[4], and the "
                       "scalars lr, beta1, beta2, eps, weight_decay, grad_clip (f32[] or f64[])"));
    }
  }
  if (inputs.order_ != nullptr) inputs.order_values_.resize(static_cast<size_t>(inputs.order_->type.num_elements()));
  return inputs;
}

void StepInputs::SetBatch(absl::Span<const int32_t> tokens, absl::Span<const int32_t> labels) {
  const auto copy = [&](const BoundTensor* to, absl::Span<const int32_t> values) {
    if (to == nullptr) return;
    CHECK_EQ(to->type.num_elements(), static_cast<int64_t>(values.size())) << to->name;
    backend_->CopyToDevice(to->data, values.data(), to->type.byte_size());
  };
  copy(tokens_, tokens);
  copy(labels_, labels);
  if (order_ != nullptr) {
    SortPositions(tokens, vocab_size_, absl::MakeSpan(order_values_), &scratch_);
    copy(order_, order_values_);
  }
}

void StepInputs::SetScalars(const StepScalars& scalars) {
  if (rng_ != nullptr) {
    const int32_t state[4] = {static_cast<int32_t>(scalars.seed), static_cast<int32_t>(scalars.seed >> 32),
                              static_cast<int32_t>(scalars.step), static_cast<int32_t>(scalars.first_sample)};
    backend_->CopyToDevice(rng_->data, state, sizeof(state));
  }
  for (const Scalar& scalar : scalars_) {
    const double value = scalars.*scalar.field;
    const float narrow = static_cast<float>(value);
    const bool wide = scalar.tensor->type.dtype == DType::kF64;
    backend_->CopyToDevice(scalar.tensor->data, wide ? static_cast<const void*>(&value) : &narrow, wide ? 8 : 4);
  }
}

absl::Status CheckVocabulary(const proto::PlanProto& plan, const std::string& plan_path, const Manifest& manifest,
                             const std::string& data_folder) {
  const auto vocab = plan.facts().find("vocab_size");
  if (vocab == plan.facts().end() || vocab->second == manifest.vocab_size) return absl::OkStatus();
  const auto note = [&](const char* name) {
    const auto at = plan.notes().find(name);
    return at == plan.notes().end() ? std::string() : at->second;
  };
  const std::string fact =
      absl::StrCat("corpus ", data_folder, " has a vocabulary of ", manifest.vocab_size, " tokens (",
                   manifest.tokenizer, "), plan ", plan_path, " was compiled for ", vocab->second);
  if (note("shapes") == "fixed") {
    return absl::FailedPreconditionError(absl::StrCat(
        fact, ", as its raw graph says; make a corpus of that vocabulary: mtcorpus prep --input TEXT --out ",
        "DIR --tokenizer bpe:", vocab->second));
  }
  const std::string spec = note("spec").empty() ? plan.model() : note("spec"), sets = note("sets");
  return absl::FailedPreconditionError(absl::StrCat(
      fact, "; compile it for the corpus: mtc compile ", ShellQuote(spec), " --data ", ShellQuote(data_folder),
      sets.empty() ? "" : absl::StrCat(" --set ", ShellQuote(sets)),
      note("optimizer").empty() ? "" : absl::StrCat(" --optimizer ", ShellQuote(note("optimizer"))), " --batch ",
      plan.facts().at("batch"), " --seq ", plan.facts().at("sequence"),
      " --passes=", ShellQuote(plan.passes().empty() ? "none" : plan.passes()), " -o ", ShellQuote(plan_path)));
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(Executor& executor, std::string data_folder) {
  auto trainer = std::unique_ptr<Trainer>(new Trainer(executor, std::move(data_folder)));
  const auto& facts = executor.plan().facts();
  for (const auto& [name, field] : {std::pair<const char*, int64_t*>{"batch", &trainer->batch_},
                                    {"sequence", &trainer->sequence_},
                                    {"vocab_size", &trainer->vocab_size_}}) {
    const auto fact = facts.find(name);
    if (fact == facts.end() || fact->second < 1 || fact->second > (int64_t{1} << 31)) {
      return absl::InvalidArgumentError(absl::StrCat("the plan has no fact \"", name,
                                                     "\"; a model states it (facts in ",
                                                     "its graph file), and training needs it to feed batches"));
    }
    *field = fact->second;
  }
  trainer->train_ = executor.FindProgram("train");
  trainer->apply_ = executor.FindProgram("apply");
  trainer->eval_ = executor.FindProgram("eval");
  if (trainer->apply_ != nullptr) {
    const auto fact = facts.find("microbatches");
    if (fact == facts.end() || fact->second < 1 || trainer->batch_ % fact->second != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("the plan's program apply needs a fact \"microbatches\" that divides ", "the batch of ",
                       trainer->batch_, "; compile it again with mtc compile"));
    }
    trainer->microbatches_ = fact->second;
    ASSIGN_OR_RETURN(trainer->apply_inputs_, StepInputs::Bind(executor, *trainer->apply_, trainer->vocab_size_));
  }
  for (const bool training : {true, false}) {
    const Program* program = training ? trainer->train_ : trainer->eval_;
    if (program == nullptr) continue;
    for (const char* name : {"tokens", "labels"}) {
      const BoundTensor* input = program->FindInput(name);
      if (input != nullptr && input->type.num_elements() != trainer->micro_batch() * trainer->sequence_) {
        return absl::InvalidArgumentError(absl::StrCat("input ", name, " is ", input->type.ToString(),
                                                       ", but the facts say batch ", trainer->micro_batch(),
                                                       " and sequence ", trainer->sequence_));
      }
    }
    const Program* reports = training && trainer->apply_ != nullptr ? trainer->apply_ : program;
    for (const char* name :
         training ? std::vector<const char*>{"loss"} : std::vector<const char*>{"loss_sum", "count"}) {
      const BoundTensor* output = reports->FindOutput(name);
      if (output == nullptr || output->type != TensorType{DType::kF32, {}}) {
        return absl::InvalidArgumentError(
            absl::StrCat("program ", reports->proto().name(), " has no output \"", name, "\" of type f32[]"));
      }
    }
    ASSIGN_OR_RETURN(StepInputs inputs, StepInputs::Bind(executor, *program, trainer->vocab_size_));
    (training ? trainer->train_inputs_ : trainer->eval_inputs_) = std::move(inputs);
  }
  trainer->tokens_.resize(static_cast<size_t>(trainer->micro_batch() * trainer->sequence_));
  trainer->labels_.resize(trainer->tokens_.size());
  return trainer;
}

absl::StatusOr<const CorpusReader*> Trainer::Reader(const std::string& split) {
  for (size_t i = 0; i < 3; ++i) {
    if (split != kSplits[i]) continue;
    if (readers_[i] == nullptr) {
      ASSIGN_OR_RETURN(readers_[i], CorpusReader::Open(data_folder_, split));
    }
    return readers_[i]->num_tokens() < 2 ? nullptr : readers_[i].get();
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", split, "\" is not a split; known: train, val, test"));
}

absl::StatusOr<int64_t> Trainer::PlannedSteps(const TrainOptions& options) {
  if (options.steps) return *options.steps;
  if (options.max_minutes && !options.epochs) return 0;
  ASSIGN_OR_RETURN(const CorpusReader* reader, Reader("train"));
  const int64_t sequences = reader == nullptr ? 0 : reader->num_sequences(sequence_);
  return static_cast<int64_t>(
      std::ceil(options.epochs.value_or(1.0) * static_cast<double>(sequences) / static_cast<double>(batch_)));
}

absl::Status Trainer::Prepare(const StepScalars& scalars, int64_t microbatch) {
  ASSIGN_OR_RETURN(const CorpusReader* reader, Reader("train"));
  if (reader == nullptr || reader->num_sequences(sequence_) == 0) {
    return absl::FailedPreconditionError(absl::StrCat("the train split of ", data_folder_, " has no sequence of ",
                                                      sequence_,
                                                      " tokens; prepare more text or compile with a smaller --seq"));
  }
  StepScalars own = scalars;
  own.first_sample += microbatch * micro_batch();
  RETURN_IF_ERROR(reader->Samples(own.first_sample, micro_batch(), sequence_, scalars.seed, absl::MakeSpan(tokens_),
                                  absl::MakeSpan(labels_)));
  train_inputs_->SetBatch(tokens_, labels_);
  train_inputs_->SetScalars(own);
  return absl::OkStatus();
}

void Trainer::PrepareApply(const StepScalars& scalars) { apply_inputs_->SetScalars(scalars); }

absl::Status Trainer::Step(const StepScalars& scalars) {
  for (int64_t i = 0; i < microbatches_; ++i) {
    RETURN_IF_ERROR(Prepare(scalars, i));
    train_->Run();
    executor_.backend().Synchronize();
  }
  if (apply_ == nullptr) return absl::OkStatus();
  PrepareApply(scalars);  // After the last microbatch, whose buffers may lie over these.
  apply_->Run();
  executor_.backend().Synchronize();
  return absl::OkStatus();
}

absl::StatusOr<TrainResult> Trainer::Train(const TrainOptions& options, const TrainHooks& hooks) {
  if (train_ == nullptr) return absl::InvalidArgumentError("the plan has no program \"train\"");
  ASSIGN_OR_RETURN(const int64_t steps, PlannedSteps(options));
  const Program& reports = apply_ != nullptr ? *apply_ : *train_;
  const BoundTensor* loss_output = reports.FindOutput("loss");
  const BoundTensor* norm_output = reports.FindOutput("grad_norm");
  const BoundTensor* scale_output = reports.FindOutput("loss_scale");
  const BoundTensor* applied_output = reports.FindOutput("applied");
  LrSchedule schedule(options.schedule, options.scalars.lr, options.min_lr_ratio, options.warmup_steps,
                      options.patience);
  TrainResult result;
  const Clock::time_point start = Clock::now();
  while (true) {
    const double elapsed = SecondsSince(start);
    if (steps > 0 || options.steps || options.epochs || !options.max_minutes) {
      if (result.steps >= steps) break;
    }
    if (options.max_minutes && elapsed >= *options.max_minutes * 60) break;
    if (hooks.interrupted && hooks.interrupted()) {
      result.interrupted = true;
      break;
    }
    const Clock::time_point step_start = Clock::now();
    StepScalars scalars = options.scalars;
    scalars.step += result.steps;
    scalars.first_sample += result.steps * batch_;
    // The part after the warmup; by time where only that is limited.
    const int64_t after = result.steps - options.warmup_steps;
    const double progress =
        steps > 0 ? static_cast<double>(after) / std::max<double>(1, static_cast<double>(steps - options.warmup_steps))
                  : elapsed / (options.max_minutes.value_or(1) * 60);
    scalars.lr = schedule.At(result.steps, progress);
    RETURN_IF_ERROR(Step(scalars));
    StepMetrics metrics;
    metrics.step = ++result.steps;
    metrics.loss = ReadScalar(executor_.backend(), *loss_output);
    metrics.grad_norm = norm_output == nullptr ? 0 : ReadScalar(executor_.backend(), *norm_output);
    if (scale_output != nullptr) metrics.loss_scale = ReadScalar(executor_.backend(), *scale_output);
    metrics.skipped = applied_output != nullptr && ReadScalar(executor_.backend(), *applied_output) == 0;
    result.skipped_steps += metrics.skipped ? 1 : 0;
    metrics.lr = scalars.lr;
    metrics.step_seconds = SecondsSince(step_start);
    metrics.tokens_per_second = static_cast<double>(batch_ * sequence_) / metrics.step_seconds;
    metrics.elapsed_seconds = SecondsSince(start);
    result.tokens += batch_ * sequence_;
    result.last_loss = metrics.loss;
    if (metrics.skipped && metrics.loss_scale.value_or(0) <= kSmallestLossScale) {
      return absl::OutOfRangeError(
          absl::StrFormat("step %d: the gradients are not finite at a loss scale of %g, the smallest; try --passes "
                          "with bf16 in place of "
                          "fp16, or a smaller --lr",
                          metrics.step, *metrics.loss_scale));
    }
    if (!std::isfinite(metrics.loss) || (!std::isfinite(metrics.grad_norm) && !metrics.skipped)) {
      return absl::OutOfRangeError(absl::StrFormat(
          "step %d: loss %g, gradient norm %g: not finite; try a smaller --lr, a longer --warmup or a --grad-clip",
          metrics.step, metrics.loss, metrics.grad_norm));
    }
    if (hooks.on_step) RETURN_IF_ERROR(hooks.on_step(metrics));
    if (options.eval_every > 0 && result.steps % options.eval_every == 0 && result.steps < steps && eval_ != nullptr) {
      ASSIGN_OR_RETURN(const EvalMetrics eval, Evaluate("val", options.eval_batches));
      if (eval.tokens > 0) {
        schedule.Observe(eval.loss);
        if (hooks.on_eval) RETURN_IF_ERROR(hooks.on_eval(result.steps, eval));
      }
    }
  }
  result.seconds = SecondsSince(start);
  return result;
}

absl::StatusOr<EvalMetrics> Trainer::Evaluate(const std::string& split, int64_t max_batches) {
  if (eval_ == nullptr) return absl::InvalidArgumentError("the plan has no program \"eval\"");
  ASSIGN_OR_RETURN(const CorpusReader* reader, Reader(split));
  EvalMetrics metrics;
  metrics.split = split;
  if (reader == nullptr) return metrics;
  int64_t batches = reader->num_eval_batches(micro_batch(), sequence_);
  if (max_batches > 0) batches = std::min(batches, max_batches);
  const BoundTensor *sum = eval_->FindOutput("loss_sum"), *count = eval_->FindOutput("count");
  double total = 0;
  for (int64_t i = 0; i < batches; ++i) {
    RETURN_IF_ERROR(reader->EvalBatch(i, micro_batch(), sequence_, absl::MakeSpan(tokens_), absl::MakeSpan(labels_)));
    eval_inputs_->SetBatch(tokens_, labels_);
    eval_inputs_->SetScalars(StepScalars{});
    eval_->Run();
    executor_.backend().Synchronize();
    total += ReadScalar(executor_.backend(), *sum);
    metrics.tokens += std::llround(ReadScalar(executor_.backend(), *count));
  }
  metrics.loss = metrics.tokens > 0 ? total / static_cast<double>(metrics.tokens) : 0;
  return metrics;
}

std::vector<std::string> TrainWarnings(const TrainOptions& options, int64_t steps, int64_t batch, int64_t sequences) {
  std::vector<std::string> warnings;
  if (steps > 0 && options.warmup_steps >= steps) {
    warnings.push_back(absl::StrCat("warmup (", options.warmup_steps, ") >= steps (", steps, "): the learning rate ",
                                    options.warmup_steps > steps ? "never reaches" : "reaches only at the last step",
                                    " its peak"));
  }
  if (sequences > 0 && batch > sequences) {
    warnings.push_back(absl::StrCat("batch (", batch, ") > the corpus's ", sequences,
                                    " sequences: a step sees some of them more than once"));
  }
  if (options.schedule == LrShape::kPlateau && options.eval_every == 0) {
    warnings.push_back("schedule plateau without --eval-every: the learning rate never falls");
  }
  if (steps > 0 && options.eval_every >= steps) {
    warnings.push_back(absl::StrCat("eval-every (", options.eval_every, ") >= steps (", steps,
                                    "): the model is evaluated only at the end"));
  }
  return warnings;
}

}  // namespace mt
