#include "runtime/train/samples.h"

#include <cstdio>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"

namespace mt {

namespace {

// What --temperature, --top-k, --top-p, --seed and --max-new-tokens say. Errors: InvalidArgument.
absl::StatusOr<GenerateOptions> GenerateOptionsOf(const ParsedArgs& args) {
  GenerateOptions options;
  options.max_new_tokens = args.Int("max-new-tokens");
  options.sampler.temperature = args.Double("temperature");
  options.sampler.top_k = args.Int("top-k");
  options.sampler.top_p = args.Double("top-p");
  options.sampler.seed = static_cast<uint64_t>(args.Int("seed"));
  if (options.sampler.top_p > 0) return options;
  return absl::InvalidArgumentError(
      "--top-p 0 leaves no token; expected more than 0, or --temperature 0 for the likeliest");
}

// `text` with U+FFFD for each part that is not valid UTF-8: a text may end within a character.
std::string ValidText(absl::string_view text) {
  std::string valid;
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    if (c.code_point < 0) {
      AppendUtf8(0xFFFD, &valid);
    } else {
      valid.append(text.data(), static_cast<size_t>(c.size_bytes));
    }
    text.remove_prefix(static_cast<size_t>(c.size_bytes));
  }
  return valid;
}

}  // namespace

absl::Status GenerateTexts(Executor& executor, const Tokenizer& tokenizer, const ParsedArgs& args,
                           const std::function<bool()>& interrupted) {
  ASSIGN_OR_RETURN(const GenerateOptions options, GenerateOptionsOf(args));
  ASSIGN_OR_RETURN(const std::unique_ptr<Generator> generator, Generator::Create(executor, tokenizer));
  const auto one = [&](const std::string& prompt) -> absl::Status {
    const auto print = [](absl::string_view part) {
      std::fwrite(part.data(), 1, part.size(), stdout);
      std::fflush(stdout);
    };
    bool begun = false;  // Nothing is printed of a prompt that is refused.
    const auto begin = [&] {
      if (!begun) print(prompt);
      begun = true;
    };
    absl::StatusOr<Continuation> text = generator->Generate(prompt, options, [&](absl::string_view part) {
      begin();
      print(part);
      return !interrupted();
    });
    if (text.ok()) begin();
    if (begun) print("\n");
    RETURN_IF_ERROR(text);
    std::fprintf(stderr, "%s\n", DescribeText(*text, generator->positions()).c_str());
    return interrupted() ? absl::CancelledError("interrupted") : absl::OkStatus();
  };
  const std::string prompt = args.String("generate");
  if (prompt != "-") return one(prompt);
  for (std::string line; std::getline(std::cin, line);) RETURN_IF_ERROR(one(line));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Samples>> Samples::Create(const Tokenizer& tokenizer, const ParsedArgs& args) {
  auto samples = std::unique_ptr<Samples>(new Samples(tokenizer));
  samples->every_ = args.Int("sample-every");
  if (samples->every_ == 0) return std::unique_ptr<Samples>();
  samples->prompt_ = args.String("sample-prompt");
  ASSIGN_OR_RETURN(samples->options_, GenerateOptionsOf(args));
  return samples;
}

absl::Status Samples::Use(Executor& executor) {
  ASSIGN_OR_RETURN(generator_, Generator::Create(executor, tokenizer_));
  return absl::OkStatus();
}

absl::StatusOr<std::string> Samples::Take() {
  ASSIGN_OR_RETURN(const Continuation text,
                   generator_->Generate(prompt_, options_, [](absl::string_view) { return true; }));
  return ValidText(absl::StrCat(prompt_, text.text));
}

}  // namespace mt
