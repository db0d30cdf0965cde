#include "runtime/data/entropy.h"

#include <algorithm>
#include <cmath>

#include "ir/base/check.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

// Sum of c ln(c / total) over the counts.
double SumLogShares(absl::Span<const uint32_t> counts, int64_t total) {
  double sum = 0;
  for (const uint32_t c : counts) {
    if (c != 0) sum += c * std::log(static_cast<double>(c) / static_cast<double>(total));
  }
  return sum;
}

}  // namespace

absl::StatusOr<TokenStatistics> MeasureTokens(const TokenScan& scan, int64_t vocab_size, int64_t table_bytes) {
  CHECK_GE(vocab_size, 1);
  TokenStatistics result;
  std::vector<int64_t>& counts = result.counts;
  counts.assign(static_cast<size_t>(vocab_size), 0);
  int64_t total = 0;
  int32_t last = -1;
  RETURN_IF_ERROR(scan([&](absl::Span<const int32_t> tokens) {
    for (const int32_t token : tokens) ++counts[static_cast<size_t>(token)];
    total += static_cast<int64_t>(tokens.size());
    if (!tokens.empty()) last = tokens.back();
  }));
  if (total == 0) return result;
  double sum = 0;
  for (const int64_t c : counts) {
    if (c != 0) sum += static_cast<double>(c) * std::log(static_cast<double>(c) / static_cast<double>(total));
  }
  result.unigram_entropy = -sum / static_cast<double>(total);
  if (total < 2) return result;

  // A frequent first token has a row of counts, a rare one the list of its successors: `slot` is where the row starts
  // or the next successor goes.
  std::vector<int64_t> pairs = counts;
  --pairs[static_cast<size_t>(last)];
  std::vector<uint32_t> table;
  std::vector<int64_t> slot(static_cast<size_t>(vocab_size));

  double bigram_sum = 0;
  for (int64_t begin = 0; begin < vocab_size;) {
    int64_t size = 0;
    int64_t end = begin;
    for (; end < vocab_size; ++end) {
      const int64_t need = std::min(pairs[static_cast<size_t>(end)], vocab_size);
      if (end > begin && 4 * (size + need) > table_bytes) break;
      slot[static_cast<size_t>(end)] = size;
      size += need;
    }
    table.assign(static_cast<size_t>(size), 0);
    if (size > 0) {
      int32_t previous = -1;
      RETURN_IF_ERROR(scan([&](absl::Span<const int32_t> tokens) {
        for (const int32_t token : tokens) {
          if (previous >= begin && previous < end) {
            int64_t& at = slot[static_cast<size_t>(previous)];
            if (pairs[static_cast<size_t>(previous)] >= vocab_size) {
              ++table[static_cast<size_t>(at + token)];
            } else {
              table[static_cast<size_t>(at++)] = static_cast<uint32_t>(token);
            }
          }
          previous = token;
        }
      }));
    }
    for (int64_t first = begin; first < end; ++first) {
      const int64_t n = pairs[static_cast<size_t>(first)];
      if (n >= vocab_size) {
        bigram_sum += SumLogShares(absl::MakeSpan(table).subspan(static_cast<size_t>(slot[static_cast<size_t>(first)]),
                                                                 static_cast<size_t>(vocab_size)),
                                   n);
        continue;
      }
      const auto stop = table.begin() + slot[static_cast<size_t>(first)];
      std::sort(stop - n, stop);
      for (auto it = stop - n; it != stop;) {
        const auto next = std::upper_bound(it, stop, *it);
        const uint32_t c = static_cast<uint32_t>(next - it);
        bigram_sum += SumLogShares({&c, 1}, n);
        it = next;
      }
    }
    begin = end;
  }
  result.bigram_entropy = std::max(0.0, -bigram_sum / static_cast<double>(total - 1));
  return result;
}

}  // namespace mt
