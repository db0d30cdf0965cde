#include "runtime/data/sample_order.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/data/permutation.h"

namespace mt {
namespace {

// Beside the epochs, which count from 0.
constexpr uint64_t kTiesStream = (uint64_t{1} << 63) + 1;

}  // namespace

int64_t CommonBlock(absl::Span<const int64_t> lengths) {
  int64_t block = 1;
  for (const int64_t length : lengths) {
    CHECK_GE(length, 1);
    const int64_t factor = length / std::gcd(block, length);
    if (factor > std::numeric_limits<int64_t>::max() / block) return std::numeric_limits<int64_t>::max();
    block *= factor;
  }
  return block;
}

absl::StatusOr<std::unique_ptr<SampleOrder>> SampleOrder::Create(const CorpusReader& reader, const Options& options) {
  CHECK_GE(options.block_tokens, 1);
  auto order = std::unique_ptr<SampleOrder>(new SampleOrder(reader, options));
  order->blocks_ = reader.num_sequences(options.block_tokens);
  if (order->blocks_ == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "split ", reader.split().name, " has ", reader.num_tokens(), " tokens, one sequence of ", options.block_tokens,
        " takes ", options.block_tokens, " + 1; use a shorter --seq or a larger corpus"));
  }
  if (options.tokens_by_length > 0) RETURN_IF_ERROR(order->SortDocuments());
  return order;
}

absl::Status SampleOrder::SortDocuments() {
  const int64_t block = options_.block_tokens;
  blocks_by_length_ = std::min((options_.tokens_by_length - 1) / block + 1, blocks_);
  const int32_t end = reader_.manifest().end_of_document;
  std::vector<int64_t> ends;  // In the corpus.
  constexpr int64_t kPart = int64_t{1} << 18;
  std::vector<int32_t> tokens;
  for (int64_t first = 0; first < reader_.num_tokens(); first += kPart) {
    tokens.resize(static_cast<size_t>(std::min(kPart, reader_.num_tokens() - first)));
    RETURN_IF_ERROR(reader_.Read(first, absl::MakeSpan(tokens)));
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] == end) ends.push_back(first + static_cast<int64_t>(i) + 1);
    }
    if (first % (64 * kPart) == 0) reader_.Release(first);
  }
  reader_.Release(reader_.num_tokens());
  if (ends.empty() || ends.back() < reader_.num_tokens()) ends.push_back(reader_.num_tokens());
  const auto start_of = [&](int64_t document) { return document == 0 ? 0 : ends[static_cast<size_t>(document - 1)]; };
  const auto length_of = [&](int64_t document) { return ends[static_cast<size_t>(document)] - start_of(document); };
  const int64_t documents = static_cast<int64_t>(ends.size());
  const Permutation ties(documents, options_.seed, kTiesStream);
  starts_.reserve(ends.size());
  for (int64_t i = 0; i < documents; ++i) starts_.push_back(ties(i));
  std::stable_sort(starts_.begin(), starts_.end(), [&](int64_t a, int64_t b) { return length_of(a) < length_of(b); });
  ends_.reserve(ends.size());
  int64_t at = 0;
  for (int64_t& document : starts_) {
    ends_.push_back(at += length_of(document));
    document = start_of(document);
  }
  if (blocks_by_length_ == blocks_) return absl::OkStatus();
  const Permutation first_epoch(blocks_, options_.seed, 0);
  sorted_.reserve(static_cast<size_t>(blocks_by_length_));
  for (int64_t i = 0; i < blocks_by_length_; ++i) sorted_.push_back(first_epoch(i));
  std::sort(sorted_.begin(), sorted_.end());
  return absl::OkStatus();
}

absl::Status SampleOrder::Read(bool by_length, int64_t first, absl::Span<int32_t> out) const {
  if (!by_length) return reader_.Read(first, out);
  size_t document = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), first) - ends_.begin());
  while (!out.empty()) {
    const int64_t start = document == 0 ? 0 : ends_[document - 1];
    const int64_t count = std::min(static_cast<int64_t>(out.size()), ends_[document] - first);
    RETURN_IF_ERROR(reader_.Read(starts_[document] + first - start, out.subspan(0, static_cast<size_t>(count))));
    out.remove_prefix(static_cast<size_t>(count));
    first += count;
    ++document;
  }
  return absl::OkStatus();
}

absl::Status SampleOrder::Samples(int64_t first_sample, int64_t count, int64_t seq_len, absl::Span<int32_t> tokens,
                                  absl::Span<int32_t> labels) const {
  CHECK(first_sample >= 0 && count >= 0 && seq_len >= 1 && options_.block_tokens % seq_len == 0 &&
        static_cast<int64_t>(tokens.size()) == count * seq_len && tokens.size() == labels.size());
  const int64_t of_block = options_.block_tokens / seq_len;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sample = first_sample + i;
    const int64_t place = sample / of_block, epoch = place / blocks_, in_epoch = place % blocks_;
    const bool by_length = epoch == 0 && blocks_by_length_ > 0;
    int64_t block = in_epoch;
    if (!by_length || in_epoch >= blocks_by_length_) {
      block = Permutation(blocks_, options_.seed, static_cast<uint64_t>(epoch))(in_epoch);
    } else if (!sorted_.empty()) {
      block = sorted_[static_cast<size_t>(in_epoch)];
    }
    const int64_t first = block * options_.block_tokens + sample % of_block * seq_len;
    const absl::Span<int32_t> x = tokens.subspan(static_cast<size_t>(i * seq_len), static_cast<size_t>(seq_len));
    const absl::Span<int32_t> y = labels.subspan(static_cast<size_t>(i * seq_len), static_cast<size_t>(seq_len));
    RETURN_IF_ERROR(Read(by_length, first, x));
    std::copy(x.begin() + 1, x.end(), y.begin());
    RETURN_IF_ERROR(Read(by_length, first + seq_len, y.subspan(static_cast<size_t>(seq_len) - 1)));
  }
  return absl::OkStatus();
}

}  // namespace mt
