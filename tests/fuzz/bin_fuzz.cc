// Token files: llm.c's .bin, and token shards of a corpus as they are and with checksums made right.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "ir/base/check.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/shard.h"
#include "runtime/data/token_file.h"
#include "runtime/data/tokenizer.h"
#include "tests/fuzz/fuzz.h"

namespace mt {
namespace {

// A vocabulary without texts.
class Vocabulary : public Tokenizer {
 public:
  std::string name() const override { return "vocabulary"; }
  int64_t vocab_size() const override { return 300; }
  int32_t end_of_document() const override { return 299; }
  uint64_t hash() const override { return 1; }
  void EncodePart(absl::string_view, bool, std::vector<int32_t>*) const override {}
  absl::string_view TokenBytes(int32_t) const override { return ""; }
  std::string Serialize() const override { return ""; }
};

void ReadTokens(absl::string_view bytes) {
  const Vocabulary vocabulary;
  const std::string path = MemoryFile(bytes);
  IsTokenFile(path);
  const absl::StatusOr<std::unique_ptr<TokenFile>> file = TokenFile::Open(path, vocabulary);
  if (!file.ok()) return;
  std::vector<int32_t> ids;
  int64_t tokens = 0;
  for (int64_t i = 0; i < (*file)->num_documents(); ++i) {
    (*file)->Read(i, &ids);
    tokens += static_cast<int64_t>(ids.size());
    for (const int32_t id : ids) CHECK(0 <= id && id < 299) << id;
  }
  CHECK_LE(tokens, (*file)->num_tokens());
}

void ReadShard(absl::string_view bytes) {
  const absl::StatusOr<std::unique_ptr<ShardReader>> shard = ShardReader::Open(MemoryFile(bytes));
  if (!shard.ok()) return;
  const ShardHeader& header = (*shard)->header();
  std::vector<int32_t> tokens(static_cast<size_t>(header.num_tokens));
  if (!(*shard)->Read(0, absl::MakeSpan(tokens)).ok()) return;
  for (const int32_t token : tokens) CHECK(0 <= token && token < header.vocab_size) << token;
  int32_t last = -1;
  CHECK((*shard)->Read(header.num_tokens - 1, absl::MakeSpan(&last, 1)).ok());
  CHECK_EQ(last, tokens.back());
  (*shard)->Release(header.num_tokens);
}

void Put(uint32_t value, std::string& file, size_t at) {
  for (size_t i = 0; i < 4; ++i) file[at + i] = static_cast<char>(value >> (8 * i));
}

// Right checksums of one block of tokens, of the table and of the header, wherever the header says that they are.
void RepairShard(std::string& file) {
  constexpr size_t kHeader = 64;
  if (file.size() < kHeader + 8) return;
  const size_t table = file.size() - 4;
  uint64_t tokens = 0;
  for (size_t i = 0; i < 8; ++i) tokens |= uint64_t{static_cast<uint8_t>(file[16 + i])} << (8 * i);
  const uint64_t width = static_cast<uint8_t>(file[12]);
  const size_t data = static_cast<size_t>(std::min<uint64_t>(table - kHeader, tokens * width));
  Put(Crc32c(absl::string_view(file).substr(kHeader, data)), file, table);
  Put(Crc32c(absl::string_view(file).substr(table)), file, 56);
  Put(Crc32c(absl::string_view(file).substr(0, 60)), file, 60);
}

}  // namespace
}  // namespace mt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes = mt::Bytes(data, size);
  if (!absl::StartsWith(bytes, "mtshard")) {
    mt::ReadTokens(bytes);
    return 0;
  }
  mt::ReadShard(bytes);
  std::string repaired(bytes);
  mt::RepairShard(repaired);
  mt::ReadShard(repaired);
  return 0;
}
