// Token shards: one little-endian file of u16 or u32 tokens, every byte of it under a checksum.
//
//   0   8  magic "mtshard\n"           40   8  first token's index in its split
//   8   4  version (1)                 48   4  split: 0 train, 1 val, 2 test
//  12   4  token width: 2 or 4         52   4  reserved, 0
//  16   8  number of tokens, >= 1      56   4  CRC-32C of the table of block checksums
//  24   8  vocabulary size             60   4  CRC-32C of bytes 0 ... 59
//  32   8  tokenizer hash              64      tokens, zero-padded to 4 bytes, then one CRC-32C for each 1 MiB of
//  tokens
#ifndef MT_RUNTIME_DATA_SHARD_H_
#define MT_RUNTIME_DATA_SHARD_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "runtime/data/atomic_file.h"
#include "runtime/data/mapped_file.h"

namespace mt {

struct ShardHeader {
  int64_t token_width = 2;
  int64_t num_tokens = 0;
  int64_t vocab_size = 0;
  uint64_t tokenizer_hash = 0;
  int64_t first_token = 0;
  int64_t split = 0;
  uint32_t crc = 0;  // The last field of the header on disk.
};

// 2 where every id below `vocab_size` fits u16, else 4.
int64_t TokenWidth(int64_t vocab_size);

// Writes PATH through a temporary name; nothing is visible at PATH before Finish returned OK.
class ShardWriter {
 public:
  // Of `header`: vocab_size, tokenizer_hash, first_token and split are used. Errors: DataLoss.
  static absl::StatusOr<std::unique_ptr<ShardWriter>> Create(const std::string& path, const ShardHeader& header);
  // REQUIRES: 0 <= token < vocab_size. Errors: DataLoss.
  absl::Status Append(absl::Span<const int32_t> tokens);
  int64_t num_tokens() const { return header_.num_tokens; }
  // Syncs and renames; returns the header as written. REQUIRES: at least one token. Errors: DataLoss.
  absl::StatusOr<ShardHeader> Finish();

 private:
  ShardWriter() = default;
  absl::Status FlushBlock();

  ShardHeader header_;
  std::unique_ptr<AtomicFile> file_;
  std::string block_;  // At most one block of bytes not yet written.
  std::vector<uint32_t> block_crcs_;
};

// Memory-mapped. Opening checks header, size and table; blocks are checked when first read. Thread-safe.
class ShardReader {
 public:
  // Errors: NotFound, FailedPrecondition (unreadable, damaged; names file and fact).
  static absl::StatusOr<std::unique_ptr<ShardReader>> Open(const std::string& path);
  const ShardHeader& header() const { return header_; }
  // Copies tokens [first, first + out.size()). REQUIRES: the range lies in the shard.
  // Errors: FailedPrecondition (checksum differs, a token is not below the vocabulary size; names file and byte
  // offset).
  absl::Status Read(int64_t first, absl::Span<int32_t> out) const;
  // Gives the pages of tokens before `token` back to the system; sequential scans stay small.
  void Release(int64_t token) const;

 private:
  ShardReader() = default;
  absl::Status CheckBlock(int64_t block) const;

  std::string path_;
  ShardHeader header_;
  std::unique_ptr<MappedFile> file_;
  const char* tokens_ = nullptr;
  const char* crcs_ = nullptr;
  mutable std::vector<std::atomic<bool>> checked_;  // By block.
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_SHARD_H_
