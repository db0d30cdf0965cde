// Text to corpus: documents are found, split, shuffled, tokenized and written as shards, in bounded memory.
#ifndef MT_RUNTIME_DATA_PREP_H_
#define MT_RUNTIME_DATA_PREP_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/corpus.h"
#include "runtime/data/entropy.h"
#include "runtime/data/text_source.h"
#include "runtime/data/tokenizer.h"

namespace mt {

struct PrepOptions {
  std::string input;  // File, folder (all files below it, in the order of their names), "-", or a TokenFile.
  std::string output;
  std::string tokenizer = "bpe:10000";      // "bpe:N", "char", what OpenTokenizer or IsHubName takes.
  std::vector<double> split = {85, 10, 5};  // Shares of train, val and test; any positive sum.
  uint64_t seed = 0;
  DocumentMode documents = DocumentMode::kAuto;
  InvalidUtf8 invalid_utf8 = InvalidUtf8::kError;
  std::string text_field = "text";               // Of JSON lines.
  int64_t tokenizer_bytes = int64_t{256} << 20;  // At most this much of the training documents trains the tokenizer.
  int64_t shard_tokens = int64_t{16} << 20;      // What is lost by an interruption, too.
  bool overwrite = false;  // Replace a corpus that is already in `output`, or another one that is unfinished there.
  // Called with a phase ("reading", "training tokenizer", "writing", "counting") and done of total bytes; may be empty.
  std::function<void(absl::string_view phase, int64_t done_bytes, int64_t total_bytes)> progress;
  // Called with one line for what the user should know but what is no error; may be empty.
  std::function<void(const std::string& line)> warning;
  // Called with one line where it goes on with what an interrupted call has left; may be empty.
  std::function<void(const std::string& line)> note;
};

// Writes tokenizer.json, the shards and last manifest.json. The split and the order of documents come from a seeded
// permutation of the documents; the tokenizer learns from the train split alone. The same input, options and seed give
// the same bytes. Memory: 8 bytes a document, some batches of a few MiB (of a TokenFile the longest document a few
// times), the tokenizer's training (bounded by tokenizer_bytes), 256 MiB to count bigrams. One thread of its own
// encodes. A process that ends before the manifest is written, however it ends, leaves files (unfinished.*, whole
// shards) with which the same call goes on: with the text read, the tokenizer learned, every shard written and every
// split counted. Errors leave nothing, but a failed write (DataLoss), after which the same call goes on, too. Errors:
// InvalidArgument (an option's value; unfinished work with other options or of another input: names what differs),
// NotFound and FailedPrecondition (the input; another process is writing the folder), AlreadyExists (a corpus is in
// `output`), DataLoss (a failed write).
absl::StatusOr<Manifest> PrepareCorpus(const PrepOptions& options);

// "bpe:N" and "char" are learned from the text.
bool IsTrainedTokenizer(const std::string& spec);
// Any other tokenizer of PrepOptions, fetched where it is on Hugging Face.
// Errors: InvalidArgument (no such kind), and those of FetchTokenizer and OpenTokenizer.
absl::StatusOr<std::unique_ptr<Tokenizer>> NamedTokenizer(const std::string& spec);

// Reads a whole split (and so checks every block of it). `progress`, which may be empty, gets tokens done and all.
// Errors: FailedPrecondition (damaged shard).
absl::StatusOr<TokenStatistics> MeasureSplit(const CorpusReader& reader,
                                             const std::function<void(int64_t, int64_t)>& progress);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_PREP_H_
