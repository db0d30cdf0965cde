// Text to token ids and back: byte-level BPE and characters, trained, saved and loaded.
#ifndef MT_RUNTIME_DATA_TOKENIZER_H_
#define MT_RUNTIME_DATA_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mt {

inline constexpr char kEndOfDocument[] = "<|endoftext|>";
inline constexpr int64_t kMaxVocabSize = int64_t{1} << 20;

// Ids are 0 ... vocab_size() - 1. Special tokens are never recognised inside a text: a document that spells out
// "<|endoftext|>" is encoded as those thirteen characters. Added tokens that are not special are.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // "bpe:10000" (the number is vocab_size()) or "char".
  virtual std::string name() const = 0;
  virtual int64_t vocab_size() const = 0;
  // The id that ends every document.
  virtual int32_t end_of_document() const = 0;
  // The id of what the vocabulary lacks; -1: every text can be encoded.
  virtual int32_t unknown() const { return -1; }
  // Of tokens, merges and pattern, not of the file's layout: equal hashes give equal ids for every text.
  virtual uint64_t hash() const = 0;

  // Appends the ids of `text`. Any bytes: BPE over bytes is lossless but for what its file asks for (NFC, NFKC); over
  // characters each invalid byte becomes U+FFFD; for "char", code points that were not in the training text and invalid
  // UTF-8 become the <unk> id. One thread at a time (BPE keeps a cache of words).
  void Encode(absl::string_view text, std::vector<int32_t>* ids) const { EncodePart(text, /*continued=*/false, ids); }
  // continued: `text` goes on a text whose start was encoded before, so that nothing is put before it.
  virtual void EncodePart(absl::string_view text, bool continued, std::vector<int32_t>* ids) const = 0;
  std::vector<int32_t> Encode(absl::string_view text) const;

  // The bytes of one token; special tokens give their names, <unk> gives U+FFFD. CHECKs the range.
  virtual absl::string_view TokenBytes(int32_t id) const = 0;
  // Whether Encode puts a space before a text (SentencePiece); Decode takes it away again.
  virtual bool adds_space() const { return false; }
  // Errors: InvalidArgument for an id outside the vocabulary.
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids) const;

  // The contents of the one file that LoadTokenizer reads: Hugging Face's tokenizer.json for BPE, own JSON for
  // characters.
  virtual std::string Serialize() const = 0;
};

// The contents of a tokenizer.json or of a character tokenizer; untrusted. `end_of_document`: as ParseTokenizerJson.
// Errors: FailedPrecondition (names what is wrong or unsupported).
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizer(absl::string_view contents,
                                                          absl::string_view end_of_document = "");
// What ParseTokenizer reads, from a file. Errors: NotFound, FailedPrecondition (unreadable; or as ParseTokenizer).
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& path);

// Collects the statistics of a training text, then makes the tokenizer. The result depends on the multiset of words (or
// code points) alone, not on the order of the texts.
class TokenizerTrainer {
 public:
  virtual ~TokenizerTrainer() = default;
  // Valid UTF-8; a text of any length. Words longer than 1 KiB and invalid bytes teach nothing.
  virtual void Add(absl::string_view text) = 0;
  // Errors: FailedPrecondition for a text without a word or character.
  virtual absl::StatusOr<std::unique_ptr<Tokenizer>> Train() = 0;
};

// `spec`: "char" or "bpe:N" with 257 <= N <= kMaxVocabSize. BPE is 256 bytes, up to N - 257 merges (fewer where no pair
// occurs twice) and the end of a document, which has the last id.
// Errors: InvalidArgument for another spec.
absl::StatusOr<std::unique_ptr<TokenizerTrainer>> NewTokenizerTrainer(absl::string_view spec);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_TOKENIZER_H_
