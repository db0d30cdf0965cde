// Byte-level byte pair encoding: training, encoding, Hugging Face's tokenizer.json.
// Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), algorithm 1; Radford
// et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2 and its encoder.py (pattern, byte
// names).
#ifndef MT_RUNTIME_DATA_BPE_H_
#define MT_RUNTIME_DATA_BPE_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"
#include "runtime/data/tokenizer.h"

namespace mt {

// Ids: 256 bytes by value, merges in the order they were learned, the end of a document. Of pairs that occur equally
// often the one with the smaller ids is merged first.
std::unique_ptr<TokenizerTrainer> NewBpeTrainer(int64_t vocab_size);

// A tokenizer.json with a BPE model over ByteLevel (GPT-2's pattern, no prefix space) and <|endoftext|>.
// Errors: FailedPrecondition (names what is wrong, or what is not supported).
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseBpe(const nlohmann::json& json);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_BPE_H_
