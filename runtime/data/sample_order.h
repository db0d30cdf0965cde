// Which text the samples of training are, one after another: an endless run of epochs.
#ifndef MT_RUNTIME_DATA_SAMPLE_ORDER_H_
#define MT_RUNTIME_DATA_SAMPLE_ORDER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "runtime/data/corpus.h"

namespace mt {

// The text is cut into blocks of `block_tokens`; the tail that fills none is left out. An epoch takes the blocks in a
// seeded order of its own, and each block from its start to its end. A sample of T tokens, which divides the block, is
// the next T of them. So a place in the order is a number of tokens, whatever T is: a run that changes T goes on at the
// next multiple of the new one, and in an epoch nothing is read twice and less than one sequence is passed over. With
// T = block_tokens an epoch is a permutation of the windows of T tokens.
//
// By document length: the first epoch is cut from the documents from the shortest to the longest, equal ones in seeded
// order, where a document's length is its number of tokens, with its end. The blocks that the seeded order has first
// are sorted by their place in that text; those after them come as they would. Later epochs are cut from the corpus as
// it lies.
//
// A sample depends on the corpus, the options, T and its index alone: resuming, accumulation and ranks take their part
// of the same order.
class SampleOrder {
 public:
  struct Options {
    int64_t block_tokens = 0;
    uint64_t seed = 0;
    // How much of the first epoch comes by document length, rounded up to blocks; at most all of it. 0: none.
    int64_t tokens_by_length = 0;
  };
  // By length, all of the split is read once; memory: 32 bytes a document, of which 16 stay, and 8 bytes a block.
  // REQUIRES: `reader` outlives the order. Errors: FailedPrecondition (no block fits the split, damaged shard).
  static absl::StatusOr<std::unique_ptr<SampleOrder>> Create(const CorpusReader& reader, const Options& options);

  const Options& options() const { return options_; }
  int64_t epoch_tokens() const { return blocks_ * options_.block_tokens; }

  // Fills tokens[count * seq_len] and labels[count * seq_len] (the next tokens of the text) with the samples
  // first_sample, first_sample + 1, ... REQUIRES: seq_len divides block_tokens.
  // Errors: FailedPrecondition (damaged shard).
  absl::Status Samples(int64_t first_sample, int64_t count, int64_t seq_len, absl::Span<int32_t> tokens,
                       absl::Span<int32_t> labels) const;

 private:
  SampleOrder(const CorpusReader& reader, const Options& options) : reader_(reader), options_(options) {}
  absl::Status SortDocuments();
  // Tokens first, first + 1, ... of the corpus, or of its documents by length.
  absl::Status Read(bool by_length, int64_t first, absl::Span<int32_t> out) const;

  const CorpusReader& reader_;
  const Options options_;
  int64_t blocks_ = 0;  // Of an epoch.
  int64_t blocks_by_length_ = 0;
  std::vector<int64_t> sorted_;  // These, where they are not all.
  // Of the documents by length: where each starts in the corpus, and where it ends in the text that they make.
  std::vector<int64_t> starts_, ends_;
};

// The length of blocks that sequences of all these lengths share: their least common multiple. INT64_MAX where that is
// larger. REQUIRES: each is at least 1.
int64_t CommonBlock(absl::Span<const int64_t> lengths);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_SAMPLE_ORDER_H_
