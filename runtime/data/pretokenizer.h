// Cutting a text into the words inside which byte pairs merge: regular expressions in the dialect of tokenizer.json.
#ifndef MT_RUNTIME_DATA_PRETOKENIZER_H_
#define MT_RUNTIME_DATA_PRETOKENIZER_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

// The published patterns. Sources: GPT-2's encoder.py; tiktoken's openai_public.py.
extern const char kGpt2Pattern[];
extern const char kCl100kPattern[];
extern const char kO200kPattern[];

// One regular expression. Matches and what lies between them are the pieces; the next step cuts each piece further.
struct SplitStep {
  std::string pattern;     // As tokenizer.json has it (Oniguruma's syntax).
  bool drop_gaps = false;  // What lies between matches is left out.
};

class PreTokenizer {
 public:
  // Untrusted patterns: at most 64 KiB each, 16 steps. \s is Unicode's White_Space and \w Letter, Mark, Nd and Pc, as
  // in Oniguruma; classes are those of Unicode 16. Matching is bounded: where a pattern needs more, the rest of the
  // piece is one word. Errors: FailedPrecondition (syntax, or a construct that Oniguruma and PCRE2 read differently;
  // names it).
  static absl::StatusOr<std::unique_ptr<PreTokenizer>> Create(std::vector<SplitStep> steps);
  ~PreTokenizer();
  PreTokenizer(const PreTokenizer&) = delete;
  PreTokenizer& operator=(const PreTokenizer&) = delete;

  const std::vector<SplitStep>& steps() const { return steps_; }
  // The expressions, one after the other: equal fingerprints cut equally.
  std::string Fingerprint() const;

  // Calls word(bytes) for each word of `text`, in order. REQUIRES: valid UTF-8. One thread at a time.
  template <typename Word>
  void Split(absl::string_view text, const Word& word) const {
    if (end_of_word_ == nullptr) return Run(0, text, word);
    for (size_t at = 0; at < text.size();) {
      const size_t end = (this->*end_of_word_)(text, at);
      word(text.substr(at, end - at));
      at = end;
    }
  }

 private:
  struct Compiled;
  class Classes;
  PreTokenizer() = default;

  // The end of the word of kGpt2Pattern, of kCl100kPattern, of kO200kPattern, at `at`.
  size_t Gpt2Word(absl::string_view text, size_t at) const;
  size_t Cl100kWord(absl::string_view text, size_t at) const;
  size_t O200kWord(absl::string_view text, size_t at) const;

  // The next match of step `step` at or after *at; false: none is left. Sets [*first, *last), which is not empty.
  bool Match(size_t step, absl::string_view text, size_t at, size_t* first, size_t* last) const;

  template <typename Word>
  void Run(size_t step, absl::string_view text, const Word& word) const {
    if (step == compiled_.size()) {
      if (!text.empty()) word(text);
      return;
    }
    size_t at = 0;
    size_t first = 0;
    size_t last = 0;
    while (at < text.size() && Match(step, text, at, &first, &last)) {
      if (first > at && !steps_[step].drop_gaps) Run(step + 1, text.substr(at, first - at), word);
      Run(step + 1, text.substr(first, last - first), word);
      at = last;
    }
    if (at < text.size() && !steps_[step].drop_gaps) Run(step + 1, text.substr(at), word);
  }

  std::vector<SplitStep> steps_;
  std::vector<std::unique_ptr<Compiled>> compiled_;
  // Set where the only step is a published pattern (Llama 3's is kCl100kPattern), which is then matched without PCRE2.
  size_t (PreTokenizer::*end_of_word_)(absl::string_view text, size_t at) const = nullptr;
  std::unique_ptr<Classes> classes_;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_PRETOKENIZER_H_
