#include "tests/fuzz/tokenizer_checks.h"

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "ir/base/check.h"

namespace mt {

void ExpectWhole(const absl::StatusOr<std::unique_ptr<Tokenizer>>& tokenizer) {
  if (!tokenizer.ok()) return;
  const Tokenizer& t = **tokenizer;
  CHECK(t.vocab_size() >= 1 && t.vocab_size() <= kMaxVocabSize) << t.vocab_size();
  CHECK(0 <= t.end_of_document() && t.end_of_document() < t.vocab_size()) << t.end_of_document();
  CHECK(-1 <= t.unknown() && t.unknown() < t.vocab_size()) << t.unknown();
  const absl::string_view texts[] = {"", " ", "The quick brown fox's 1234 jumps,\n\n over\t the lazy dog.  ",
                                     "Zażółć gęślą jaźń — ﬁ e\u0301 \u2581x \U0001F600\U0001F3FD",
                                     absl::string_view("\xff\xfe\x00\xc3\xed\xa0\x80<|endoftext|></s><unk>", 30)};
  for (const absl::string_view text : texts) {
    const std::vector<int32_t> ids = t.Encode(text);
    for (const int32_t id : ids) CHECK(0 <= id && id < t.vocab_size()) << id << " of " << t.vocab_size();
    CHECK(t.Decode(ids).ok());
  }
  for (int64_t id = 0; id < t.vocab_size() && id < 2000; ++id) t.TokenBytes(static_cast<int32_t>(id));
  const absl::StatusOr<std::unique_ptr<Tokenizer>> again = ParseTokenizer(t.Serialize());
  CHECK(again.ok()) << again.status();
  CHECK_EQ((*again)->hash(), t.hash());
}

}  // namespace mt
