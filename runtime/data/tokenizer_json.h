// Hugging Face's tokenizer.json: byte-level BPE, and BPE over characters as Llama 2 has it.
// Source: https://github.com/huggingface/tokenizers (its serialized form).
#ifndef MT_RUNTIME_DATA_TOKENIZER_JSON_H_
#define MT_RUNTIME_DATA_TOKENIZER_JSON_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json_fwd.hpp"
#include "runtime/data/bpe.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// GPT-2's printable names: one character for each byte (encoder.py, bytes_to_unicode), and back.
std::string ByteName(uint8_t byte);
std::string ByteNames(absl::string_view bytes);
// False where `name` has a character that names no byte.
bool BytesOfNames(absl::string_view name, std::string* bytes);

// `contents`: what `json` was parsed from; it is what Serialize returns. `end_of_document`: the added token that ends a
// document; empty: the one marked so, or the first of the usual names (<|endoftext|>, <|end_of_text|>, </s>, <eos>).
// Special tokens are not recognised in texts; other added tokens are. Errors: FailedPrecondition (names what is wrong
// or what is not supported).
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(const nlohmann::json& json, absl::string_view contents,
                                                              absl::string_view end_of_document);

// What ParseTokenizerJson and Hugging Face read. Marks of our own are members of the token that ends documents, where
// other readers ignore them.
std::string WriteTokenizerJson(const BpeModel& model);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_TOKENIZER_JSON_H_
