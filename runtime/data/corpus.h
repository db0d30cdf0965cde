// A corpus on disk: manifest.json, one tokenizer file and token shards for train, val and test; and its reader.
#ifndef MT_RUNTIME_DATA_CORPUS_H_
#define MT_RUNTIME_DATA_CORPUS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "runtime/data/shard.h"
#include "runtime/data/tokenizer.h"

namespace mt {

inline constexpr char kManifestFile[] = "manifest.json";
inline constexpr char kTokenizerFile[] = "tokenizer.json";
inline constexpr int32_t kIgnoredLabel = -1;

// "train-00000.bin".
std::string ShardFileName(absl::string_view split, int64_t index);

struct ShardInfo {
  std::string file;  // Relative to the corpus folder, no separators.
  int64_t tokens = 0;
  uint32_t crc = 0;  // Of the shard's header; ties manifest and shard together.
};

struct SplitInfo {
  std::string name;  // "train", "val" or "test".
  int64_t documents = 0;
  int64_t tokens = 0;  // Document ends included.
  int64_t bytes = 0;   // Of UTF-8 text, document ends excluded.
  int64_t words = 0;   // Separated by white space.
  // Nats a token, of the split's own text: -sum p ln p, and H(x_t | x_{t-1}) of its maximum-likelihood bigram table,
  // document ends included. exp() is the perplexity. 0 for an empty split.
  double unigram_entropy = 0;
  double bigram_entropy = 0;
  std::vector<ShardInfo> shards;
};

// manifest.json, written last: a folder without it is not a corpus.
struct Manifest {
  std::string tokenizer;  // Tokenizer::name().
  uint64_t tokenizer_hash = 0;
  int64_t vocab_size = 0;
  int32_t end_of_document = 0;
  uint64_t seed = 0;
  std::vector<double> split;         // The wanted shares of train, val and test, as given (85, 10, 5).
  std::string documents;             // "file", "blank-line" or "line".
  std::string invalid_utf8;          // "error", "replace" or "skip".
  std::vector<std::string> sources;  // Names of the inputs; "-" for stdin.
  int64_t source_files = 0;          // `sources` is cut after 1,000 names.
  SplitInfo splits[3];               // train, val, test.

  // nullptr where there is no split of that name.
  const SplitInfo* Find(absl::string_view split_name) const;
  std::string Serialize() const;
};

// Untrusted: checks syntax, ranges, sums, file names and the manifest's own checksum.
// Errors: NotFound (no manifest: not a corpus, or an unfinished one), FailedPrecondition (damaged, edited, other
// version).
absl::StatusOr<Manifest> ReadManifest(const std::string& folder);
// The contents of a manifest.json; untrusted. Errors: FailedPrecondition.
absl::StatusOr<Manifest> ParseManifest(absl::string_view text);

// One split, memory-mapped. Opening checks the manifest and every shard's header, checksum of the header, size,
// vocabulary and tokenizer against it; each block of 1 MiB is checked (CRC-32C, every token below the vocabulary size)
// when it is first touched, so that opening a large corpus is immediate. Thread-safe after Open.
class CorpusReader {
 public:
  // Errors: NotFound (folder, manifest, split or shard missing), FailedPrecondition (damaged or inconsistent: one line
  // that names file and fact).
  static absl::StatusOr<std::unique_ptr<CorpusReader>> Open(const std::string& folder, absl::string_view split);

  // As Open, of a corpus whose manifest is not written yet.
  static absl::StatusOr<std::unique_ptr<CorpusReader>> OpenWith(const std::string& folder, const Manifest& manifest,
                                                                absl::string_view split);

  const Manifest& manifest() const { return manifest_; }
  const SplitInfo& split() const { return *split_; }
  int64_t vocab_size() const { return manifest_.vocab_size; }
  int64_t num_tokens() const { return num_tokens_; }

  // Windows of `seq_len` tokens, each with one label more; the tail that fills none is left out. SampleOrder says in
  // which order training sees them.
  int64_t num_sequences(int64_t seq_len) const;

  // Evaluation: every window once, in order, the last one partial; num_tokens() - 1 labels in all.
  // Number of batches = ceil(ceil((num_tokens - 1) / seq_len) / batch_size).
  int64_t num_eval_batches(int64_t batch_size, int64_t seq_len) const;
  // Returns the number of valid labels; the rest are kIgnoredLabel, their tokens the end of a document.
  absl::StatusOr<int64_t> EvalBatch(int64_t index, int64_t batch_size, int64_t seq_len, absl::Span<int32_t> tokens,
                                    absl::Span<int32_t> labels) const;

  // Lets the system drop the memory of all tokens before `token`; scans of a large split stay small.
  void Release(int64_t token) const;

  // Copies tokens [first, first + out.size()) of the split.
  // REQUIRES: the range lies in the split. Errors: FailedPrecondition (damaged shard).
  absl::Status Read(int64_t first, absl::Span<int32_t> out) const;

 private:
  CorpusReader() = default;
  absl::Status Window(int64_t first, int64_t count, absl::Span<int32_t> tokens, absl::Span<int32_t> labels) const;

  Manifest manifest_;
  const SplitInfo* split_ = nullptr;  // In manifest_.
  int64_t num_tokens_ = 0;
  std::vector<std::unique_ptr<ShardReader>> shards_;
  std::vector<int64_t> first_token_;  // Of each shard, then num_tokens_.
};

// The corpus's tokenizer, checked against the manifest. Errors: as LoadTokenizer, FailedPrecondition for another hash.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadCorpusTokenizer(const std::string& folder, const Manifest& manifest);

// order[i]: the positions of `tokens`, stably sorted by token id (counting sort). `scratch` keeps its memory between
// calls. REQUIRES: 0 <= token < vocab_size; order.size() == tokens.size() < 2^31.
void SortPositions(absl::Span<const int32_t> tokens, int64_t vocab_size, absl::Span<int32_t> order,
                   std::vector<int32_t>* scratch);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_CORPUS_H_
