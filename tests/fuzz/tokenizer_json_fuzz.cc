// Hugging Face's tokenizer.json and our own character tokenizer; where the input does not start with "{", a .tiktoken
// file, and GPT-2's pair: vocab.bpe, a zero byte, encoder.json.
#include "absl/strings/match.h"
#include "runtime/data/tokenizer.h"
#include "runtime/data/tokenizer_files.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/tokenizer_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes = mt::Bytes(data, size);
  const size_t zero = bytes.find('\0');
  if (absl::StartsWith(bytes, "{")) {
    mt::ExpectWhole(mt::ParseTokenizer(bytes));
  } else if (zero != absl::string_view::npos) {
    mt::ExpectWhole(mt::ParseGpt2Files(bytes.substr(zero + 1), bytes.substr(0, zero)));
  } else {
    mt::ExpectWhole(mt::ParseTiktoken(bytes, "gpt2"));
  }
  return 0;
}
