// Tokenizers in the files of other programs, and the one place that knows every way to name a tokenizer.
#ifndef MT_RUNTIME_DATA_TOKENIZER_FILES_H_
#define MT_RUNTIME_DATA_TOKENIZER_FILES_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// A SentencePiece .model: BPE, with byte fallback or an unknown piece, identity normalization. Untrusted.
// Errors: FailedPrecondition (names what is wrong, or what is not supported, such as unigram).
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(absl::string_view contents);

// Lines "BASE64 RANK" as tiktoken has them. `encoding` names pattern and end of document: gpt2, r50k_base, p50k_base,
// multilingual, cl100k_base or o200k_base. Untrusted. Errors: FailedPrecondition.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktoken(absl::string_view contents, absl::string_view encoding);

// GPT-2's pair of files: encoder.json (or vocab.json) and vocab.bpe (or merges.txt). Untrusted.
// Errors: FailedPrecondition.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseGpt2Files(absl::string_view encoder_json, absl::string_view vocab_bpe);

// True for "hf:DIR", "spm:FILE" and paths that exist: what OpenTokenizer reads.
bool IsTokenizerPath(const std::string& spec);

// "hf:DIR": tokenizer.json (the end of a document: the eos_token of tokenizer_config.json), else vocab.json and
// merges.txt, else encoder.json and vocab.bpe. "spm:FILE": a .model. A path: by its ending, .model, .tiktoken
// (STEM.tiktoken or NAME.STEM.tiktoken with a STEM that ParseTiktoken knows), encoder.json or vocab.json with its
// neighbour, else as LoadTokenizer; a folder as hf:. Errors: NotFound, FailedPrecondition; they name the file.
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& spec);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_TOKENIZER_FILES_H_
