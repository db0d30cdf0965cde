#include "runtime/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
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

// Over which the running mean of the loss is taken.
constexpr int64_t kStepsOfMean = 20;

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

absl::StatusOr<int64_t> SizeFact(const proto::PlanProto& plan, const char* name) {
  const auto fact = plan.facts().find(name);
  if (fact == plan.facts().end() || fact->second < 1 || fact->second > (int64_t{1} << 31)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the plan has no fact \"", name,
                     "\"; a model states it (facts in its graph file), and training needs "
                     "it to feed batches"));
  }
  return fact->second;
}

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
  const auto aligned = [](const BoundTensor& input) { return (input.type.byte_size() + 15) / 16 * 16; };
  int64_t batch_bytes = 0, scalar_bytes = 4 * sizeof(int32_t);  // rng first.
  for (const BoundTensor& input : program.inputs()) {
    if (IsState(input.role)) continue;
    bool known = true;
    const BoundTensor** data = nullptr;
    if (input.type.dtype == DType::kI32) {
      if (input.name == "tokens") data = &inputs.tokens_;
      if (input.name == "labels") data = &inputs.labels_;
      if (input.name == "order") data = &inputs.order_;
    }
    if (data != nullptr) {
      *data = &input;
      inputs.batch_.push_back({&input, batch_bytes});
      batch_bytes += aligned(input);
    } else if (input.name == "rng" && input.type == TensorType{DType::kI32, {4}}) {
      inputs.rng_ = &input;
    } else {
      known = false;
      for (const ScalarName& scalar : kScalars) {
        const bool fits =
            input.type.rank() == 0 && (input.type.dtype == DType::kF32 || input.type.dtype == DType::kF64);
        if (scalar.name == input.name && fits) {
          inputs.scalars_.push_back({&input, scalar.field, scalar_bytes});
          scalar_bytes += aligned(input);
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
  RETURN_IF_ERROR(inputs.Allocate(inputs.batches_, batch_bytes));
  RETURN_IF_ERROR(inputs.Allocate(inputs.numbers_, scalar_bytes));
  return inputs;
}

absl::Status StepInputs::Allocate(Ring& ring, int64_t bytes) {
  for (std::byte*& block : ring.blocks) {
    ASSIGN_OR_RETURN(block, backend_->AllocatePinned(std::max<int64_t>(bytes, 1)));
  }
  return absl::OkStatus();
}

std::byte* StepInputs::Next(Ring& ring) {
  ring.current = (ring.current + 1) % Ring::kBlocks;
  if (ring.read[ring.current] >= 0) backend_->WaitOnHost(ring.read[ring.current]);
  return ring.blocks[ring.current];
}

void StepInputs::StageBatch(absl::Span<const int32_t> tokens, absl::Span<const int32_t> labels, bool beside) {
  std::byte* block = Next(batches_);
  for (const BatchInput& input : batch_) {
    const size_t elements = static_cast<size_t>(input.tensor->type.num_elements());
    const absl::Span<int32_t> to(reinterpret_cast<int32_t*>(block + input.at), elements);
    if (input.tensor == order_) {
      SortPositions(tokens, vocab_size_, to, &scratch_);
      continue;
    }
    const absl::Span<const int32_t> values = input.tensor == tokens_ ? tokens : labels;
    CHECK_EQ(elements, values.size()) << input.tensor->name;
    std::copy(values.begin(), values.end(), to.begin());
  }
  // The staging buffers are free once the last batch was taken; or, where another program has run since, after it.
  backend_->WaitIn(Lane::kInputs, beside && taken_ >= 0 ? taken_ : backend_->Record(Lane::kThunks));
  for (const BatchInput& input : batch_) {
    if (input.tensor->staging == nullptr) continue;
    backend_->Copy(Lane::kInputs, input.tensor->staging, block + input.at, input.tensor->type.byte_size());
  }
  staged_ = backend_->Record(Lane::kInputs);
  batches_.read[batches_.current] = staged_;  // Should it never be taken.
}

void StepInputs::TakeBatch() {
  backend_->WaitIn(Lane::kThunks, staged_);
  const std::byte* block = batches_.blocks[batches_.current];
  for (const BatchInput& input : batch_) {
    const std::byte* from = input.tensor->staging != nullptr ? input.tensor->staging : block + input.at;
    backend_->Copy(Lane::kThunks, input.tensor->data, from, input.tensor->type.byte_size());
  }
  taken_ = backend_->Record(Lane::kThunks);
  batches_.read[batches_.current] = taken_;
}

void StepInputs::SetScalars(const StepScalars& scalars) {
  std::byte* block = Next(numbers_);
  if (rng_ != nullptr) {
    const int32_t state[4] = {static_cast<int32_t>(scalars.seed), static_cast<int32_t>(scalars.seed >> 32),
                              static_cast<int32_t>(scalars.step), static_cast<int32_t>(scalars.first_sample)};
    std::memcpy(block, state, sizeof(state));
    backend_->Copy(Lane::kThunks, rng_->data, block, sizeof(state));
  }
  for (const Scalar& scalar : scalars_) {
    const double value = scalars.*scalar.field;
    const float narrow = static_cast<float>(value);
    const bool wide = scalar.tensor->type.dtype == DType::kF64;
    std::memcpy(block + scalar.at, wide ? static_cast<const void*>(&value) : &narrow, wide ? 8 : 4);
    backend_->Copy(Lane::kThunks, scalar.tensor->data, block + scalar.at, wide ? 8 : 4);
  }
  numbers_.read[numbers_.current] = backend_->Record(Lane::kThunks);
}

absl::Status CheckVocabulary(const proto::PlanProto& plan, const std::string& plan_path, const Manifest& manifest,
                             const std::string& data_folder) {
  const auto fact_of = [&](const char* name) {
    const auto at = plan.facts().find(name);
    return at == plan.facts().end() ? 0 : at->second;
  };
  const auto note = [&](const char* name) {
    const auto at = plan.notes().find(name);
    return at == plan.notes().end() ? std::string() : at->second;
  };
  const int64_t vocab = fact_of("vocab_size");
  const bool same_size = vocab == 0 || vocab == manifest.vocab_size;
  const std::string hash = absl::StrFormat("%016x", manifest.tokenizer_hash), planned = note("tokenizer_hash");
  if (same_size && (planned.empty() || planned == hash)) return absl::OkStatus();
  const bool fixed = note("shapes") == "fixed";
  std::string fact;
  if (!same_size) {
    fact = absl::StrCat("corpus ", data_folder, " has a vocabulary of ", manifest.vocab_size, " tokens (",
                        manifest.tokenizer, "), plan ", plan_path, " was compiled for ", vocab);
    if (fixed) {
      return absl::FailedPreconditionError(absl::StrCat(
          fact, ", as its raw graph says; make a corpus of that vocabulary: mtcorpus prep --input TEXT --out ",
          "DIR --tokenizer bpe:", vocab));
    }
  } else {
    fact = absl::StrCat("corpus ", data_folder, " was made with tokenizer ", manifest.tokenizer, " (hash ", hash,
                        "), plan ", plan_path, " was compiled for a corpus of another one (hash ", planned, ")");
  }
  const std::string spec = note("spec").empty() ? plan.model() : note("spec"), sets = note("sets");
  return absl::FailedPreconditionError(absl::StrCat(
      fact, "; compile it for the corpus: mtc compile ", ShellQuote(spec), " --data ", ShellQuote(data_folder),
      sets.empty() ? "" : absl::StrCat(" --set ", ShellQuote(sets)),
      note("optimizer").empty() ? "" : absl::StrCat(" --optimizer ", ShellQuote(note("optimizer"))),
      fixed ? "" : absl::StrCat(" --batch ", fact_of("batch"), " --seq ", fact_of("sequence")),
      " --passes=", ShellQuote(plan.passes().empty() ? "none" : plan.passes()), " -o ", ShellQuote(plan_path)));
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(Executor& executor, std::string data_folder,
                                                         SampleOrder::Options order) {
  auto trainer = std::unique_ptr<Trainer>(new Trainer(executor, std::move(data_folder)));
  const auto& facts = executor.plan().facts();
  ASSIGN_OR_RETURN(const StageShape shape, ShapeOf(executor.plan()));
  trainer->batch_ = shape.batch;
  trainer->sequence_ = shape.sequence;
  ASSIGN_OR_RETURN(trainer->vocab_size_, SizeFact(executor.plan(), "vocab_size"));
  trainer->order_options_ = order;
  if (order.block_tokens == 0) trainer->order_options_.block_tokens = trainer->sequence_;
  if (trainer->order_options_.block_tokens % trainer->sequence_ != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences of ", trainer->sequence_, " tokens do not divide blocks of ", order.block_tokens));
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
  constexpr int64_t kMostTokens = int64_t{1} << 28;  // Of a microbatch.
  if (trainer->micro_batch() > kMostTokens / trainer->sequence_) {
    return absl::InvalidArgumentError(absl::StrCat("the plan's facts say batch ", trainer->micro_batch(),
                                                   " and sequence ", trainer->sequence_, "; at most ", kMostTokens,
                                                   " tokens are fed at once"));
  }
  for (const bool training : {true, false}) {
    const Program* program = training ? trainer->train_ : trainer->eval_;
    if (program == nullptr) continue;
    for (const char* name : {"tokens", "labels", "order"}) {
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

absl::StatusOr<StageShape> ShapeOf(const proto::PlanProto& plan) {
  StageShape shape;
  ASSIGN_OR_RETURN(shape.batch, SizeFact(plan, "batch"));
  ASSIGN_OR_RETURN(shape.sequence, SizeFact(plan, "sequence"));
  return shape;
}

int64_t TokensOfSteps(int64_t steps, absl::Span<const StageShape> stages) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t tokens = 0;
  for (size_t i = 0; i < stages.size() && steps > 0; ++i) {
    const int64_t here = i + 1 < stages.size() ? std::min(steps, stages[i].steps) : steps;
    const int64_t of_step = stages[i].batch * stages[i].sequence;
    if (here > (kMost - tokens) / of_step) return kMost;
    tokens += here * of_step;
    steps -= here;
  }
  return tokens;
}

int64_t PlannedSteps(const TrainOptions& options, absl::Span<const StageShape> stages, int64_t epoch_tokens) {
  std::optional<int64_t> steps = options.steps;
  // of_stage(stage, tokens): the steps that this stage has after so many tokens, were it the last one.
  const auto limit = [&](const auto& of_stage) {
    int64_t before = 0;
    for (size_t i = 0; i < stages.size(); ++i) {
      const int64_t wanted = std::max<int64_t>(0, of_stage(stages[i], TokensOfSteps(before, stages)));
      if (i + 1 < stages.size() && wanted > stages[i].steps) {
        before += stages[i].steps;
        continue;
      }
      steps = steps ? std::min(*steps, before + wanted) : before + wanted;
      return;
    }
  };
  if (options.max_tokens) {
    limit([&](const StageShape& stage, int64_t tokens) {
      const int64_t of_step = stage.batch * stage.sequence, rest = *options.max_tokens - tokens;
      return rest <= 0 ? 0 : (rest - 1) / of_step + 1;
    });
  }
  if (options.epochs || (!steps && !options.max_minutes)) {
    limit([&](const StageShape& stage, int64_t tokens) {
      const double sequences = options.epochs.value_or(1.0) * static_cast<double>(epoch_tokens / stage.sequence) -
                               static_cast<double>(tokens / stage.sequence);
      return static_cast<int64_t>(std::ceil(sequences / static_cast<double>(stage.batch)));
    });
  }
  return steps.value_or(0);
}

absl::StatusOr<int64_t> Trainer::PlannedSteps(const TrainOptions& options) {
  ASSIGN_OR_RETURN(const CorpusReader* reader, Reader("train"));
  const int64_t epoch_tokens = reader == nullptr ? 0 : reader->num_sequences(sequence_) * sequence_;
  return mt::PlannedSteps(options, {{.batch = batch_, .sequence = sequence_}}, epoch_tokens);
}

absl::Status Trainer::Stage(const StepScalars& scalars, int64_t microbatch, bool beside) {
  if (order_ == nullptr || order_->options().seed != scalars.seed) {
    ASSIGN_OR_RETURN(const CorpusReader* reader, Reader("train"));
    const int64_t block = order_options_.block_tokens;
    if (reader == nullptr || reader->num_sequences(block) == 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("the train split of ", data_folder_, " has no ", block == sequence_ ? "sequence" : "block",
                       " of ", block, " tokens", block == sequence_ ? "" : ", which the sequences of all plans share",
                       "; prepare more text or compile with a smaller --seq",
                       block == sequence_ ? "" : ", of lengths that divide each other"));
    }
    SampleOrder::Options options = order_options_;
    options.seed = scalars.seed;
    ASSIGN_OR_RETURN(order_, SampleOrder::Create(*reader, options));
  }
  const int64_t first = scalars.first_sample + microbatch * micro_batch();
  RETURN_IF_ERROR(order_->Samples(first, micro_batch(), sequence_, absl::MakeSpan(tokens_), absl::MakeSpan(labels_)));
  train_inputs_->StageBatch(tokens_, labels_, beside);
  staged_sample_ = first;
  return absl::OkStatus();
}

absl::Status Trainer::Prepare(const StepScalars& scalars, int64_t microbatch) {
  StepScalars own = scalars;
  own.first_sample += microbatch * micro_batch();
  if (staged_sample_ != own.first_sample) RETURN_IF_ERROR(Stage(scalars, microbatch, /*beside=*/false));
  train_inputs_->TakeBatch();
  staged_sample_.reset();
  train_inputs_->SetScalars(own);
  return absl::OkStatus();
}

void Trainer::PrepareApply(const StepScalars& scalars) { apply_inputs_->SetScalars(scalars); }

absl::Status Trainer::Launch(const StepScalars& scalars, const StepScalars* next) {
  for (int64_t i = 0; i < microbatches_; ++i) {
    RETURN_IF_ERROR(Prepare(scalars, i));
    train_->Run();
    if (i + 1 < microbatches_) {
      RETURN_IF_ERROR(Stage(scalars, i + 1, /*beside=*/true));
    } else if (apply_ == nullptr && next != nullptr) {
      RETURN_IF_ERROR(Stage(*next, 0, /*beside=*/true));
    }
  }
  if (apply_ == nullptr) return absl::OkStatus();
  PrepareApply(scalars);  // After the last microbatch, whose buffers may lie over these.
  apply_->Run();
  return absl::OkStatus();
}

absl::Status Trainer::Step(const StepScalars& scalars) {
  RETURN_IF_ERROR(Launch(scalars, nullptr));
  executor_.backend().Synchronize();
  return absl::OkStatus();
}

absl::StatusOr<TrainResult> Trainer::Train(const TrainOptions& options, const TrainHooks& hooks) {
  if (train_ == nullptr) return absl::InvalidArgumentError("the plan has no program \"train\"");
  ASSIGN_OR_RETURN(const int64_t steps, PlannedSteps(options));
  Backend& backend = executor_.backend();
  const Program& reports = apply_ != nullptr ? *apply_ : *train_;
  // What a step reports, in this order, and where it is read: a row of numbers for each step under way.
  const BoundTensor* const outputs[] = {reports.FindOutput("loss"), reports.FindOutput("grad_norm"),
                                        reports.FindOutput("loss_scale"), reports.FindOutput("applied")};
  constexpr int64_t kRow = std::size(outputs);
  const int64_t depth = backend.programs_in_flight();
  ASSIGN_OR_RETURN(std::byte * pinned, backend.AllocatePinned(depth * kRow * int64_t{sizeof(float)}));
  float* const numbers = reinterpret_cast<float*>(pinned);

  TrainState from = options.from;
  CountInSequences(sequence_, &from);
  LrSchedule schedule(options.schedule, options.scalars.lr, options.min_lr_ratio, options.warmup_steps,
                      options.patience);
  schedule.set_plateau(from.plateau);
  const bool by_steps = steps > 0 || options.steps || options.max_tokens || options.epochs || !options.max_minutes;
  const auto evaluates_after = [&](int64_t step) {
    const bool last = by_steps && step >= steps;
    return options.eval_every > 0 && step % options.eval_every == 0 && !last && eval_ != nullptr;
  };
  const auto scalars_of = [&](int64_t step) {  // All but the learning rate.
    StepScalars scalars = options.scalars;
    scalars.step += step;
    scalars.first_sample += from.samples + (step - from.steps) * batch_;
    return scalars;
  };

  struct UnderWay {
    double lr = 0;
    int64_t point = 0;
    Clock::time_point start;
  };
  std::vector<UnderWay> under_way(static_cast<size_t>(depth));
  TrainResult result;  // Of the steps that have been read.
  static_cast<TrainState&>(result) = from;
  int64_t launched = result.steps;
  const Clock::time_point start = Clock::now();
  Clock::time_point last_read = start;
  const auto read_one = [&]() -> absl::Status {
    const int64_t slot = result.steps % depth;
    const UnderWay& step = under_way[static_cast<size_t>(slot)];
    backend.WaitOnHost(step.point);
    const float* values = numbers + slot * kRow;
    StepMetrics metrics;
    metrics.step = ++result.steps;
    metrics.sequence = sequence_;
    metrics.loss = values[0];
    metrics.grad_norm = outputs[1] == nullptr ? 0 : values[1];
    if (outputs[2] != nullptr) metrics.loss_scale = values[2];
    metrics.skipped = outputs[3] != nullptr && values[3] == 0;
    result.skipped_steps += metrics.skipped ? 1 : 0;
    metrics.lr = step.lr;
    metrics.step_seconds = SecondsSince(std::max(step.start, last_read));
    last_read = Clock::now();
    metrics.tokens_per_second = static_cast<double>(batch_ * sequence_) / metrics.step_seconds;
    metrics.elapsed_seconds = from.seconds + SecondsSince(start);
    result.tokens += batch_ * sequence_;
    result.samples += batch_;
    result.last_loss = metrics.loss;
    const auto fail = [&](std::string message) {
      backend.Synchronize();
      staged_sample_.reset();
      if (hooks.on_failure) hooks.on_failure(result);
      return absl::OutOfRangeError(message);
    };
    if (metrics.skipped && metrics.loss_scale.value_or(0) <= kSmallestLossScale) {
      return fail(
          absl::StrFormat("step %d: the gradients are not finite at a loss scale of %g, the smallest; try --passes "
                          "with bf16 in place of "
                          "fp16, or a smaller --lr",
                          metrics.step, *metrics.loss_scale));
    }
    if (!std::isfinite(metrics.loss) || (!std::isfinite(metrics.grad_norm) && !metrics.skipped)) {
      return fail(absl::StrFormat(
          "step %d: loss %g, gradient norm %g: not finite; try a smaller --lr, a longer --warmup or a --grad-clip",
          metrics.step, metrics.loss, metrics.grad_norm));
    }
    if (options.spike > 0 && result.mean_steps >= kStepsOfMean && metrics.loss > result.mean_loss + options.spike) {
      return fail(
          absl::StrFormat("step %d: the loss rose to %g from a mean of %g; try a smaller --lr, a longer --warmup "
                          "or a --grad-clip",
                          metrics.step, metrics.loss, result.mean_loss));
    }
    result.mean_loss +=
        (metrics.loss - result.mean_loss) / static_cast<double>(std::min(++result.mean_steps, kStepsOfMean));
    return hooks.on_step ? hooks.on_step(metrics) : absl::OkStatus();
  };
  // After it, all that was launched has been read, and the states are those after that step.
  const auto read_all = [&]() -> absl::Status {
    while (result.steps < launched) RETURN_IF_ERROR(read_one());
    return absl::OkStatus();
  };

  while (true) {
    const double elapsed = from.seconds + SecondsSince(start);
    if (by_steps && launched >= steps) break;
    if (options.early_stop > 0 && result.evals_since_best >= options.early_stop) {
      result.stopped_early = true;
      break;
    }
    if (options.max_minutes && elapsed >= *options.max_minutes * 60) break;
    if (hooks.interrupted && hooks.interrupted()) {
      result.interrupted = true;
      break;
    }
    if (options.pause_after && launched >= *options.pause_after) {
      result.paused = true;
      break;
    }
    StepScalars scalars = scalars_of(launched);
    // The part after the warmup; by time where only that is limited.
    const int64_t after = launched - options.warmup_steps;
    const double progress =
        steps > 0 ? static_cast<double>(after) / std::max<double>(1, static_cast<double>(steps - options.warmup_steps))
                  : elapsed / (options.max_minutes.value_or(1) * 60);
    scalars.lr = schedule.At(launched, progress) * (launched < from.backs_off_until ? from.lr_factor : 1);
    const int64_t slot = launched % depth;
    UnderWay& step = under_way[static_cast<size_t>(slot)];
    step = {.lr = scalars.lr, .start = Clock::now()};
    ++launched;
    // Nothing is staged where another program comes between, whose buffers may lie over the staged batch.
    const StepScalars next = scalars_of(launched);
    const bool saves = hooks.saves_after && hooks.saves_after(launched);
    const bool ends = (by_steps && launched >= steps) || (options.pause_after && launched >= *options.pause_after);
    const bool follows = depth > 1 && !ends && !evaluates_after(launched) && !saves;
    RETURN_IF_ERROR(Launch(scalars, follows ? &next : nullptr));
    for (int64_t i = 0; i < kRow; ++i) {
      if (outputs[i] == nullptr) continue;
      backend.Copy(Lane::kThunks, numbers + slot * kRow + i, outputs[i]->data, sizeof(float));
    }
    step.point = backend.Record(Lane::kThunks);
    if (launched - result.steps >= depth) RETURN_IF_ERROR(read_one());
    if (evaluates_after(launched)) {
      RETURN_IF_ERROR(read_all());
      ASSIGN_OR_RETURN(const EvalMetrics eval, Evaluate("val", options.eval_batches));
      if (eval.tokens > 0) {
        schedule.Observe(eval.loss);
        result.plateau = schedule.plateau();
        const bool better = eval.loss < result.best_val;
        result.best_val = better ? eval.loss : result.best_val;
        result.evals_since_best = better ? 0 : result.evals_since_best + 1;
        if (hooks.on_eval) RETURN_IF_ERROR(hooks.on_eval(result.steps, eval));
      }
    }
    if (saves) {
      RETURN_IF_ERROR(read_all());
      result.seconds = from.seconds + SecondsSince(start);
      RETURN_IF_ERROR(hooks.on_save(result));
    }
  }
  RETURN_IF_ERROR(read_all());
  staged_sample_.reset();  // Evaluations may lie over it.
  result.seconds = from.seconds + SecondsSince(start);
  return result;
}

absl::StatusOr<EvalMetrics> Trainer::Evaluate(const std::string& split, int64_t max_batches) {
  if (eval_ == nullptr) return absl::InvalidArgumentError("the plan has no program \"eval\"");
  ASSIGN_OR_RETURN(const CorpusReader* reader, Reader(split));
  EvalMetrics metrics;
  metrics.split = split;
  metrics.sequence = sequence_;
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
    warnings.push_back("lr-schedule plateau without --eval-every: the learning rate never falls");
  }
  if (options.early_stop > 0 && options.eval_every == 0) {
    warnings.push_back("early-stop without --eval-every: nothing is evaluated that could stop the run");
  }
  if (steps > 0 && options.eval_every >= steps) {
    warnings.push_back(absl::StrCat("eval-every (", options.eval_every, ") >= steps (", steps,
                                    "): the model is evaluated only at the end"));
  }
  return warnings;
}

}  // namespace mt
