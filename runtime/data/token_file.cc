#include "runtime/data/token_file.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr size_t kHeaderBytes = 1024;

uint32_t Word(absl::string_view bytes, size_t index) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value |= uint32_t{static_cast<uint8_t>(bytes[4 * index + i])} << (8 * i);
  return value;
}

// Bytes of a token; 0: another file.
int64_t WidthOf(absl::string_view bytes) {
  if (bytes.size() < kHeaderBytes) return 0;
  if (Word(bytes, 0) == 20240520 && Word(bytes, 1) == 1) return 2;
  if (Word(bytes, 0) == 20240801 && Word(bytes, 1) == 7) return 4;
  return 0;
}

}  // namespace

bool IsTokenFile(const std::string& path) {
  const absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(path);
  return file.ok() && WidthOf((*file)->bytes()) != 0;
}

int64_t TokenFile::Token(int64_t index) const {
  const char* p = file_->bytes().data() + kHeaderBytes + index * width_;
  uint32_t value = 0;
  for (int64_t i = 0; i < width_; ++i) value |= uint32_t{static_cast<uint8_t>(p[i])} << (8 * i);
  return value;
}

absl::StatusOr<std::unique_ptr<TokenFile>> TokenFile::Open(const std::string& path, const Tokenizer& tokenizer) {
  const auto fault = [&path](const auto&... parts) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", parts...));
  };
  std::unique_ptr<TokenFile> result(new TokenFile);
  ASSIGN_OR_RETURN(result->file_, MappedFile::Open(path));
  const absl::string_view bytes = result->file_->bytes();
  result->width_ = WidthOf(bytes);
  if (result->width_ == 0) return fault("is no token file of llm.c");
  result->num_tokens_ = Word(bytes, 2);
  const int64_t data_bytes = static_cast<int64_t>(bytes.size() - kHeaderBytes);
  if (data_bytes != result->num_tokens_ * result->width_) {
    return fault("has ", data_bytes, " bytes of tokens, its header says ", result->num_tokens_, " of ", result->width_,
                 " bytes; it is cut off or was written to");
  }
  int64_t first = 0;
  for (int64_t i = 0; i <= result->num_tokens_; ++i) {
    const int64_t token = i < result->num_tokens_ ? result->Token(i) : tokenizer.end_of_document();
    if (token >= tokenizer.vocab_size()) {
      return fault("token ", i, " is ", token, ", outside the vocabulary of ", tokenizer.name(), " (0 to ",
                   tokenizer.vocab_size() - 1, "); name the tokenizer that the file was made with");
    }
    if (token != tokenizer.end_of_document()) continue;
    if (i > first) result->documents_.push_back({first, i});
    first = i + 1;
  }
  if (result->documents_.empty()) return fault("has no tokens");
  return result;
}

void TokenFile::Read(int64_t document, std::vector<int32_t>* ids) const {
  const Range range = documents_[static_cast<size_t>(document)];
  ids->clear();
  for (int64_t i = range.first; i < range.last; ++i) ids->push_back(static_cast<int32_t>(Token(i)));
}

}  // namespace mt
