// Tokenizers side by side on one text.
#ifndef MT_RUNTIME_DATA_COMPARE_H_
#define MT_RUNTIME_DATA_COMPARE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/corpus.h"
#include "runtime/data/text_source.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// Hands on every document in parts, in order; continued: the part goes on a document.
using TextScan = std::function<absl::Status(const std::function<absl::Status(absl::string_view, bool continued)>&)>;

TextScan ScanOf(TextSource* source);
// The documents of a split as `tokenizer`, the corpus's own, decodes them.
TextScan ScanOf(const CorpusReader* reader, const Tokenizer* tokenizer);

struct TokenizerReport {
  std::string spec;  // As it was asked for.
  std::string name;
  uint64_t hash = 0;
  int64_t vocab_size = 0;
  int64_t documents = 0, bytes = 0, words = 0, tokens = 0;  // Without ends of documents.
  int64_t unknown = 0;                                      // Tokens that stand for what the vocabulary lacks.
  double encode_seconds = 0;                                // Of this thread's processor time.
};

// Encodes the whole text. Errors: those of `scan`.
absl::StatusOr<TokenizerReport> ReportTokenizer(const Tokenizer& tokenizer, const TextScan& scan);

// The tokenizer that `spec` names: as in PrepOptions; "bpe:N" and "char" learn from `training`, from at most
// `training_bytes`. Errors: as PrepareCorpus, and those of `training`.
absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerFor(const std::string& spec, const TextScan& training,
                                                        int64_t training_bytes);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_COMPARE_H_
