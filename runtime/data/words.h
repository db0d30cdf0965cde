// Words as corpora count them: what white space separates.
#ifndef MT_RUNTIME_DATA_WORDS_H_
#define MT_RUNTIME_DATA_WORDS_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace mt {

// Of one text, across its parts.
class WordCounter {
 public:
  int64_t Count(absl::string_view text) {
    int64_t words = 0;
    for (const char c : text) {
      const bool space = c == ' ' || (c >= '\t' && c <= '\r');
      words += !space && !in_word_;
      in_word_ = !space;
    }
    return words;
  }

 private:
  bool in_word_ = false;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_WORDS_H_
