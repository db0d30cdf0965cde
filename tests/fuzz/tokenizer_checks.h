// What holds for every tokenizer that a file gives.
#ifndef MT_TESTS_FUZZ_TOKENIZER_CHECKS_H_
#define MT_TESTS_FUZZ_TOKENIZER_CHECKS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "runtime/data/tokenizer.h"

namespace mt {

// Ids of some texts are in the vocabulary and decode; what the tokenizer writes is the same tokenizer.
void ExpectWhole(const absl::StatusOr<std::unique_ptr<Tokenizer>>& tokenizer);

}  // namespace mt

#endif  // MT_TESTS_FUZZ_TOKENIZER_CHECKS_H_
