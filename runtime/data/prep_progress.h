// What an interrupted preparation has finished, in the folder of the corpus that it is making.
#ifndef MT_RUNTIME_DATA_PREP_PROGRESS_H_
#define MT_RUNTIME_DATA_PREP_PROGRESS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/data/corpus.h"

namespace mt {

inline constexpr char kProgressFile[] = "unfinished.json";
inline constexpr char kIndexFile[] = "unfinished.index";  // What TextSource::Save gave.

// unfinished.json. Every file that it speaks of was synced before it.
struct PrepProgress {
  std::map<std::string, std::string> request;  // The flags that the result depends on, by name, and the tokenizer.
  int64_t index_bytes = 0;                     // Of kIndexFile.
  uint32_t index_crc = 0;
  // Nothing: the input is read, no more. Else tokenizer.json is written, and the shards that are named here; the
  // counts of the split being written end where `part` begins, those of the splits before it are whole.
  std::optional<Manifest> written;
  int64_t tokenizer_crc = 0;  // CRC-32C of tokenizer.json.
  int64_t split = 0;          // Being written; 3: all are.
  int64_t document = 0;       // In the split's order,
  int64_t part = 0;           // of that document; the end of the document is the part after the last,
  int64_t token = 0;          // of that part: the first one that no shard has.
  int64_t unknown = 0;        // Tokens so far that stand for what the vocabulary lacks.
  int64_t counted = 0;        // Splits whose entropies are known.
};

// Atomically. Errors: DataLoss.
absl::Status WriteProgress(const std::string& folder, const PrepProgress& progress);
// Untrusted. Errors: NotFound (there is none), FailedPrecondition (damaged, or of another version).
absl::StatusOr<PrepProgress> ReadProgress(const std::string& folder);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_PREP_PROGRESS_H_
