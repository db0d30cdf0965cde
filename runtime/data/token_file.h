// Token files of llm.c: text that is tokenized already.
// Source: https://github.com/karpathy/llm.c, dev/data/data_common.py.
#ifndef MT_RUNTIME_DATA_TOKEN_FILE_H_
#define MT_RUNTIME_DATA_TOKEN_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/mapped_file.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// True where the file starts as llm.c's do.
bool IsTokenFile(const std::string& path);

class TokenFile {
 public:
  // 256 words of header (magic, version, count), then u16 tokens (magic 20240520, version 1) or u32 (20240801, 7).
  // Documents are what lies between ends of a document (llm.c writes them in front); empty ones are left out.
  // Untrusted. Errors: NotFound, FailedPrecondition (damaged; a token outside the tokenizer's vocabulary: names its
  // index).
  static absl::StatusOr<std::unique_ptr<TokenFile>> Open(const std::string& path, const Tokenizer& tokenizer);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return static_cast<int64_t>(documents_.size()); }
  // Replaces `*ids` by the document's tokens, without the end.
  void Read(int64_t document, std::vector<int32_t>* ids) const;

 private:
  struct Range {
    int64_t first, last;
  };
  TokenFile() = default;
  int64_t Token(int64_t index) const;

  std::unique_ptr<MappedFile> file_;
  int64_t width_ = 2;
  int64_t num_tokens_ = 0;
  std::vector<Range> documents_;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_TOKEN_FILE_H_
