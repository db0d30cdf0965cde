// Unigram and bigram statistics of a sequence of tokens, exact, in bounded memory.
#ifndef MT_RUNTIME_DATA_ENTROPY_H_
#define MT_RUNTIME_DATA_ENTROPY_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mt {

struct TokenStatistics {
  std::vector<int64_t> counts;  // By token.
  double unigram_entropy = 0;   // Nats a token: -sum p ln p. 0 for no tokens.
  // Nats a token: H(x_t | x_{t-1}) = -sum c(a,b) / N ln(c(a,b) / c(a)) over the N pairs of neighbours, with c(a) the
  // pairs that begin with a: the cross-entropy of the maximum-likelihood bigram table on the text it was counted on.
  double bigram_entropy = 0;
};

// Hands the whole sequence to `sink`, in parts, in order. Called several times.
using TokenScan = std::function<absl::Status(const std::function<void(absl::Span<const int32_t>)>& sink)>;

// Scans once for the unigrams, then once for each group of first tokens whose pairs fit `table_bytes` (always at least
// one token a group). REQUIRES: 0 <= token < vocab_size. Errors: those of `scan`.
absl::StatusOr<TokenStatistics> MeasureTokens(const TokenScan& scan, int64_t vocab_size,
                                              int64_t table_bytes = int64_t{256} << 20);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_ENTROPY_H_
