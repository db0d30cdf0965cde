// Text from a model: one token a run of the program "generate", over the caches that the plan holds.
#ifndef MT_RUNTIME_TRAIN_GENERATE_H_
#define MT_RUNTIME_TRAIN_GENERATE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "runtime/data/tokenizer.h"
#include "runtime/executor.h"

namespace mt {

struct SamplerOptions {
  double temperature = 1;  // Divides the logits; 0: the likeliest token, the first of equals.
  int64_t top_k = 0;       // Only the k likeliest tokens; 0: all.
  double top_p = 1;        // Of those, only the likeliest whose probabilities add up to p: one at least.
  uint64_t seed = 0;
};

// Draws tokens. Equal logits, options and positions give equal tokens, on every machine.
// Source of top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1.
class Sampler {
 public:
  // REQUIRES: temperature >= 0, top_k >= 0, 0 < top_p <= 1.
  explicit Sampler(const SamplerOptions& options) : options_(options) {}
  void set_options(const SamplerOptions& options) { options_ = options; }
  // Draws from up to `tokens` logits will allocate nothing.
  void Reserve(int64_t tokens);

  // The token at `position`. REQUIRES: finite logits, at least one.
  int32_t Draw(absl::Span<const float> logits, int64_t position);

 private:
  SamplerOptions options_;
  std::vector<int32_t> order_;
  std::vector<double> weights_;
};

struct GenerateOptions {
  SamplerOptions sampler;
  int64_t max_new_tokens = 1;  // REQUIRES: at least 1.
};

// Why a text ends where it does.
enum class TextEnd {
  kEndOfDocument,  // The model drew the token that ends documents.
  kTokens,         // max_new_tokens.
  kPositions,      // The plan has no position for another token.
};

// What a prompt goes on with.
struct Continuation {
  std::vector<int32_t> tokens;  // New ones, without the end of the document.
  std::string text;             // Theirs.
  int64_t prompt_tokens = 0;    // With the end of a document before an empty prompt.
  TextEnd end = TextEnd::kTokens;
  double seconds = 0;
};

class Generator {
 public:
  // The plan's program "generate", with `tokenizer`, which must outlive it. Errors: FailedPrecondition (the plan has no
  // such program, or not of this kind; another vocabulary).
  static absl::StatusOr<std::unique_ptr<Generator>> Create(Executor& executor, const Tokenizer& tokenizer);

  int64_t positions() const { return positions_; }

  // Runs the program for one token, which enters the caches; positions count up from 0, and no other program may run in
  // between.
  void Feed(int32_t token, int64_t position);
  // The same; gives the logits of the next token, valid until the next run. Errors: OutOfRange (not finite).
  absl::StatusOr<absl::Span<const float>> Run(int32_t token, int64_t position);

  // `prompt` goes on; an empty one begins a document. on_text gets each new token's text, in order, and says whether to
  // go on. Errors: InvalidArgument (the prompt is longer than the plan's sequence), OutOfRange (logits that are not
  // finite).
  absl::StatusOr<Continuation> Generate(absl::string_view prompt, const GenerateOptions& options,
                                        const std::function<bool(absl::string_view)>& on_text);

 private:
  Generator(Executor& executor, const Tokenizer& tokenizer) : executor_(executor), tokenizer_(tokenizer) {}

  Executor& executor_;
  const Tokenizer& tokenizer_;
  const Program* program_ = nullptr;
  const BoundTensor *tokens_ = nullptr, *position_ = nullptr, *output_ = nullptr;
  int64_t positions_ = 0;
  std::vector<float> logits_;
  Sampler sampler_{SamplerOptions()};
  std::vector<int32_t> ids_;  // Of the prompt and what goes on.
};

// "64 tokens in 0.80 s, 80.1 tok/s; the plan's 128 positions are full: compile with a larger --seq for longer texts"
std::string DescribeText(const Continuation& text, int64_t positions);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_GENERATE_H_
