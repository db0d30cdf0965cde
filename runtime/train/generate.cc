#include "runtime/train/generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/base/philox.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

// Uniform in [0, 1), 53 bits, of (seed, position).
double UniformOf(uint64_t seed, int64_t position) {
  const uint64_t place = Fnv1a("generate");
  const auto words = Philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                            {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                             static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32)});
  return static_cast<double>((static_cast<uint64_t>(words[0]) << 21) | (words[1] >> 11)) * 0x1p-53;
}

absl::Status NoProgram(const Executor& executor) {
  return absl::FailedPreconditionError(
      absl::StrCat("the plan of ", executor.plan().model(),
                   " has no program \"generate\"; a spec's plan has one unless its caches would take more than "
                   "training, a raw graph's if its file has: compile with a smaller --seq"));
}

}  // namespace

void Sampler::Reserve(int64_t tokens) {
  order_.reserve(static_cast<size_t>(tokens));
  weights_.reserve(static_cast<size_t>(tokens));
}

int32_t Sampler::Draw(absl::Span<const float> logits, int64_t position) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options_.temperature == 0) return static_cast<int32_t>(largest - logits.begin());
  const size_t n = logits.size();
  weights_.resize(n);
  for (size_t i = 0; i < n; ++i) {
    weights_[i] = std::exp((static_cast<double>(logits[i]) - static_cast<double>(*largest)) / options_.temperature);
  }
  const double uniform = UniformOf(options_.seed, position);
  const bool few = options_.top_k > 0 && options_.top_k < static_cast<int64_t>(n);
  if (!few && options_.top_p >= 1) {
    double rest = uniform * std::accumulate(weights_.begin(), weights_.end(), 0.0);
    for (size_t i = 0; i < n; ++i) {
      rest -= weights_[i];
      if (rest < 0) return static_cast<int32_t>(i);
    }
    return static_cast<int32_t>(largest - logits.begin());  // Rounding left something.
  }
  // The likeliest first, taken from a heap; of equals, the first.
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0);
  const auto less = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x < y : a > b;
  };
  std::make_heap(order_.begin(), order_.end(), less);
  const size_t most = few ? static_cast<size_t>(options_.top_k) : n;
  size_t kept = 0;
  const auto take = [&] {
    std::pop_heap(order_.begin(), order_.end() - static_cast<ptrdiff_t>(kept), less);
    ++kept;
    return weights_[static_cast<size_t>(order_[n - kept])];
  };
  double sum = 0;
  if (few) {
    while (kept < most) sum += take();
  } else {
    sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  }
  // order_[n - 1], order_[n - 2], ... are the likeliest.
  double wanted = options_.top_p * sum, nucleus = 0;
  size_t count = 0;
  while (count < most && (count == 0 || nucleus < wanted)) {
    nucleus += count < kept ? weights_[static_cast<size_t>(order_[n - 1 - count])] : take();
    ++count;
  }
  double rest = uniform * nucleus;
  for (size_t i = 0; i < count; ++i) {
    rest -= weights_[static_cast<size_t>(order_[n - 1 - i])];
    if (rest < 0) return order_[n - 1 - i];
  }
  return order_[n - 1];
}

absl::StatusOr<std::unique_ptr<Generator>> Generator::Create(Executor& executor, const Tokenizer& tokenizer) {
  auto generator = std::unique_ptr<Generator>(new Generator(executor, tokenizer));
  generator->program_ = executor.FindProgram("generate");
  if (generator->program_ == nullptr) return NoProgram(executor);
  int64_t positions = 0;
  for (const BoundTensor& input : generator->program_->inputs()) {
    if (input.role == Role::kCache && input.type.rank() == 4) positions = input.type.dim(2);
    if (input.name == "tokens" && input.type == TensorType{DType::kI32, {1, 1}}) generator->tokens_ = &input;
    if (input.name == "position" && input.type == TensorType{DType::kI32, {1}}) generator->position_ = &input;
  }
  const BoundTensor* logits = generator->program_->FindOutput("logits");
  const bool known = generator->tokens_ != nullptr && generator->position_ != nullptr && positions > 0 &&
                     logits != nullptr && logits->type.dtype == DType::kF32 && logits->type.rank() == 1;
  if (!known) {
    return absl::FailedPreconditionError(
        absl::StrCat("program generate of ", executor.plan().model(),
                     " cannot be fed; expected inputs tokens i32[1,1] and position i32[1], caches [B,G,T,D], and an "
                     "output logits f32[V]"));
  }
  if (logits->type.dim(0) != tokenizer.vocab_size()) {
    return absl::FailedPreconditionError(absl::StrCat("tokenizer ", tokenizer.name(), " has ", tokenizer.vocab_size(),
                                                      " tokens, the plan's program generate gives logits of ",
                                                      logits->type.dim(0),
                                                      "; use the corpus that it was compiled for"));
  }
  generator->output_ = logits;
  generator->positions_ = positions;
  generator->logits_.resize(static_cast<size_t>(logits->type.dim(0)));
  generator->sampler_.Reserve(logits->type.dim(0));
  generator->ids_.reserve(static_cast<size_t>(positions) + 1);
  return generator;
}

void Generator::Feed(int32_t token, int64_t position) {
  CHECK(0 <= position && position < positions_) << position;
  CHECK(0 <= token && token < static_cast<int64_t>(logits_.size())) << token;
  Backend& backend = executor_.backend();
  const int32_t at = static_cast<int32_t>(position);
  backend.CopyToDevice(tokens_->data, &token, sizeof(token));
  backend.CopyToDevice(position_->data, &at, sizeof(at));
  program_->Run();
  backend.Synchronize();
}

absl::StatusOr<absl::Span<const float>> Generator::Run(int32_t token, int64_t position) {
  Feed(token, position);
  executor_.backend().CopyToHost(logits_.data(), output_->data, output_->type.byte_size());
  for (const float logit : logits_) {
    if (!std::isfinite(logit)) {
      return absl::OutOfRangeError(
          absl::StrCat("the logits at position ", position, " are not finite; the weights are no model's"));
    }
  }
  return absl::MakeConstSpan(logits_);
}

absl::StatusOr<Continuation> Generator::Generate(absl::string_view prompt, const GenerateOptions& options,
                                                 const std::function<bool(absl::string_view)>& on_text) {
  const auto start = std::chrono::steady_clock::now();
  ids_.clear();
  tokenizer_.Encode(prompt, &ids_);
  CHECK_GE(options.max_new_tokens, 1);
  const bool begins = ids_.empty();
  if (begins) ids_.push_back(tokenizer_.end_of_document());
  const int64_t given = static_cast<int64_t>(ids_.size());
  if (given > positions_) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", given, " tokens, the plan has ", positions_,
                                                   " positions; shorten it, or compile with a larger --seq"));
  }
  Continuation result;
  result.prompt_tokens = given;
  sampler_.set_options(options.sampler);
  bool wanted = true;
  for (int64_t position = 0; wanted; ++position) {
    if (position >= given && static_cast<int64_t>(result.tokens.size()) >= options.max_new_tokens) break;
    if (position == positions_) {
      result.end = TextEnd::kPositions;
      break;
    }
    const int32_t token = ids_[static_cast<size_t>(position)];
    if (position + 1 < given) {
      Feed(token, position);
      continue;
    }
    ASSIGN_OR_RETURN(const absl::Span<const float> logits, Run(token, position));
    const int32_t next = sampler_.Draw(logits, position + 1);
    if (next == tokenizer_.end_of_document()) {
      result.end = TextEnd::kEndOfDocument;
      break;
    }
    absl::string_view text = tokenizer_.TokenBytes(next);
    if (begins && result.tokens.empty() && tokenizer_.adds_space() && !text.empty() && text[0] == ' ') {
      text.remove_prefix(1);
    }
    ids_.push_back(next);
    result.tokens.push_back(next);
    absl::StrAppend(&result.text, text);
    wanted = on_text(text);
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

std::string DescribeText(const Continuation& text, int64_t positions) {
  const int64_t runs = text.prompt_tokens + static_cast<int64_t>(text.tokens.size());
  std::string line = absl::StrFormat("%d tokens after a prompt of %d in %.2f s, %.1f tok/s", text.tokens.size(),
                                     text.prompt_tokens, text.seconds, static_cast<double>(runs) / text.seconds);
  switch (text.end) {
    case TextEnd::kEndOfDocument:
      return line + "; the model ended the document";
    case TextEnd::kPositions:
      return absl::StrCat(line, "; the plan's ", positions,
                          " positions are full: compile with a larger --seq for longer texts");
    case TextEnd::kTokens:
      return line;
  }
  return line;
}

}  // namespace mt
