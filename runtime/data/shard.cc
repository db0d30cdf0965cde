#include "runtime/data/shard.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/data/crc32c.h"

namespace mt {
namespace {

constexpr char kMagic[] = "mtshard\n";
constexpr uint32_t kVersion = 1;
constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kBlockBytes = int64_t{1} << 20;

void Put(uint64_t value, int bytes, std::string* out) {
  for (int i = 0; i < bytes; ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

uint64_t Get(const char* p, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= uint64_t{static_cast<uint8_t>(p[i])} << (8 * i);
  return value;
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string SerializeHeader(const ShardHeader& header, uint32_t table_crc) {
  std::string bytes = kMagic;
  Put(kVersion, 4, &bytes);
  Put(static_cast<uint64_t>(header.token_width), 4, &bytes);
  Put(static_cast<uint64_t>(header.num_tokens), 8, &bytes);
  Put(static_cast<uint64_t>(header.vocab_size), 8, &bytes);
  Put(header.tokenizer_hash, 8, &bytes);
  Put(static_cast<uint64_t>(header.first_token), 8, &bytes);
  Put(static_cast<uint64_t>(header.split), 4, &bytes);
  Put(0, 4, &bytes);
  Put(table_crc, 4, &bytes);
  Put(Crc32c(bytes), 4, &bytes);
  return bytes;
}

absl::Status Bad(absl::string_view path, absl::string_view fact) {
  return absl::FailedPreconditionError(
      absl::StrCat(path, ": ", fact, "; make the corpus again with mtcorpus prep --overwrite"));
}

}  // namespace

int64_t TokenWidth(int64_t vocab_size) { return vocab_size <= 65536 ? 2 : 4; }

absl::StatusOr<std::unique_ptr<ShardWriter>> ShardWriter::Create(const std::string& path, const ShardHeader& header) {
  std::unique_ptr<ShardWriter> writer(new ShardWriter);
  writer->header_ = header;
  writer->header_.token_width = TokenWidth(header.vocab_size);
  writer->header_.num_tokens = 0;
  ASSIGN_OR_RETURN(writer->file_, AtomicFile::Create(path));
  RETURN_IF_ERROR(writer->file_->Append(std::string(kHeaderBytes, '\0')));  // Filled in by Finish.
  return writer;
}

absl::Status ShardWriter::FlushBlock() {
  block_crcs_.push_back(Crc32c(block_));
  RETURN_IF_ERROR(file_->Append(block_));
  block_.clear();
  return absl::OkStatus();
}

absl::Status ShardWriter::Append(absl::Span<const int32_t> tokens) {
  for (const int32_t token : tokens) {
    CHECK(token >= 0 && token < header_.vocab_size) << "token " << token << " of " << header_.vocab_size;
    Put(static_cast<uint64_t>(token), static_cast<int>(header_.token_width), &block_);
    if (static_cast<int64_t>(block_.size()) == kBlockBytes) RETURN_IF_ERROR(FlushBlock());
  }
  header_.num_tokens += static_cast<int64_t>(tokens.size());
  return absl::OkStatus();
}

absl::StatusOr<ShardHeader> ShardWriter::Finish() {
  CHECK_GE(header_.num_tokens, 1);
  if (!block_.empty()) RETURN_IF_ERROR(FlushBlock());
  std::string tail;
  Put(0, static_cast<int>((4 - header_.num_tokens * header_.token_width % 4) % 4), &tail);
  std::string table;
  for (const uint32_t crc : block_crcs_) Put(crc, 4, &table);
  RETURN_IF_ERROR(file_->Append(tail + table));
  const std::string header = SerializeHeader(header_, Crc32c(table));
  CHECK_EQ(static_cast<int64_t>(header.size()), kHeaderBytes);
  RETURN_IF_ERROR(file_->WriteAt(0, header));
  RETURN_IF_ERROR(file_->Commit());
  header_.crc = static_cast<uint32_t>(Get(header.data() + 60, 4));
  return header_;
}

absl::StatusOr<std::unique_ptr<ShardReader>> ShardReader::Open(const std::string& path) {
  std::unique_ptr<ShardReader> reader(new ShardReader);
  reader->path_ = path;
  ASSIGN_OR_RETURN(reader->file_, MappedFile::Open(path));
  const absl::string_view bytes = reader->file_->bytes();
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size < kHeaderBytes) return Bad(path, absl::StrCat("has ", size, " bytes, less than a header of 64"));
  const char* p = bytes.data();
  if (bytes.substr(0, 8) != kMagic) return Bad(path, "is not a token shard (its first 8 bytes are not \"mtshard\\n\")");
  if (Get(p + 8, 4) != kVersion) {
    return Bad(path, absl::StrCat("has format version ", Get(p + 8, 4), ", this program reads version ", kVersion));
  }
  if (Crc32c(bytes.substr(0, 60)) != Get(p + 60, 4)) return Bad(path, "has a damaged header (its checksum differs)");
  ShardHeader& header = reader->header_;
  header.crc = static_cast<uint32_t>(Get(p + 60, 4));
  header.tokenizer_hash = Get(p + 32, 8);
  const uint64_t width = Get(p + 12, 4);
  const uint64_t num_tokens = Get(p + 16, 8);
  const uint64_t vocab_size = Get(p + 24, 8);
  const uint64_t first_token = Get(p + 40, 8);
  const uint64_t split = Get(p + 48, 4);
  if (vocab_size < 1 || vocab_size > uint64_t{1} << 31) {
    return Bad(path, absl::StrCat("has a vocabulary of ", vocab_size, " tokens"));
  }
  header.vocab_size = static_cast<int64_t>(vocab_size);
  if (width != static_cast<uint64_t>(TokenWidth(header.vocab_size))) {
    return Bad(path, absl::StrCat("stores ", width, " bytes a token, a vocabulary of ", vocab_size, " takes ",
                                  TokenWidth(header.vocab_size)));
  }
  header.token_width = static_cast<int64_t>(width);
  // Bounded by the file, so that no product below overflows.
  if (num_tokens < 1 || num_tokens > static_cast<uint64_t>(size) || first_token > uint64_t{1} << 62 || split > 2) {
    return Bad(path, absl::StrCat("says ", num_tokens, " tokens from ", first_token, " of split ", split, ", but has ",
                                  size, " bytes"));
  }
  header.num_tokens = static_cast<int64_t>(num_tokens);
  header.first_token = static_cast<int64_t>(first_token);
  header.split = static_cast<int64_t>(split);
  const int64_t data_bytes = header.num_tokens * header.token_width;
  const int64_t blocks = CeilDiv(data_bytes, kBlockBytes);
  const int64_t table_start = kHeaderBytes + CeilDiv(data_bytes, 4) * 4;
  if (table_start + 4 * blocks != size) {
    return Bad(path, absl::StrCat("has ", size, " bytes, ", num_tokens, " tokens take ", table_start + 4 * blocks));
  }
  if (Crc32c(bytes.substr(static_cast<size_t>(table_start))) != Get(p + 56, 4)) {
    return Bad(path, "has a damaged table of checksums");
  }
  reader->tokens_ = p + kHeaderBytes;
  reader->crcs_ = p + table_start;
  reader->checked_ = std::vector<std::atomic<bool>>(static_cast<size_t>(blocks));
  return reader;
}

absl::Status ShardReader::CheckBlock(int64_t block) const {
  const int64_t first = block * kBlockBytes;
  const int64_t size = std::min(kBlockBytes, header_.num_tokens * header_.token_width - first);
  const char* data = tokens_ + first;
  if (Crc32c(absl::string_view(data, static_cast<size_t>(size))) != Get(crcs_ + 4 * block, 4)) {
    return Bad(path_, absl::StrCat("is damaged between bytes ", kHeaderBytes + first, " and ",
                                   kHeaderBytes + first + size, " (the checksum differs)"));
  }
  for (int64_t i = 0; i < size; i += header_.token_width) {
    const uint64_t token = header_.token_width == 2 ? Get(data + i, 2) : Get(data + i, 4);
    if (token >= static_cast<uint64_t>(header_.vocab_size)) {
      return Bad(path_, absl::StrCat("holds token ", token, " at byte ", kHeaderBytes + first + i,
                                     ", not below the vocabulary size ", header_.vocab_size));
    }
  }
  checked_[static_cast<size_t>(block)].store(true, std::memory_order_release);
  return absl::OkStatus();
}

absl::Status ShardReader::Read(int64_t first, absl::Span<int32_t> out) const {
  const int64_t count = static_cast<int64_t>(out.size());
  CHECK(first >= 0 && count <= header_.num_tokens - first) << path_ << ": tokens " << first << " + " << count;
  if (count == 0) return absl::OkStatus();
  const int64_t width = header_.token_width;
  for (int64_t block = first * width / kBlockBytes; block <= (first + count - 1) * width / kBlockBytes; ++block) {
    if (!checked_[static_cast<size_t>(block)].load(std::memory_order_acquire)) RETURN_IF_ERROR(CheckBlock(block));
  }
  const char* p = tokens_ + first * width;
  if (width == 2) {
    for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = static_cast<int32_t>(Get(p + 2 * i, 2));
  } else {
    for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = static_cast<int32_t>(Get(p + 4 * i, 4));
  }
  return absl::OkStatus();
}

void ShardReader::Release(int64_t token) const { file_->Release(0, kHeaderBytes + token * header_.token_width); }

}  // namespace mt
