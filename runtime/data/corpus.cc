#include "runtime/data/corpus.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

constexpr int64_t kManifestVersion = 1;
constexpr size_t kMaxSources = 1000;
constexpr const char* kSplitNames[] = {"train", "val", "test"};
constexpr int64_t kMaxCount = int64_t{1} << 60;

std::string Hex(uint64_t value) { return absl::StrFormat("%016x", value); }

// The manifest without its checksum; the checksum is of this text.
nlohmann::ordered_json ToJson(const Manifest& manifest) {
  nlohmann::ordered_json json;
  json["format"] = "mt-corpus";
  json["version"] = kManifestVersion;
  json["vocab_size"] = manifest.vocab_size;
  json["tokenizer"] = manifest.tokenizer;
  json["tokenizer_file"] = kTokenizerFile;
  json["tokenizer_hash"] = Hex(manifest.tokenizer_hash);
  json["end_of_document"] = manifest.end_of_document;
  json["seed"] = manifest.seed;
  json["split"] = manifest.split;
  json["documents"] = manifest.documents;
  json["invalid_utf8"] = manifest.invalid_utf8;
  json["source_files"] = manifest.source_files;
  json["sources"] = nlohmann::ordered_json::array();
  for (size_t i = 0; i < std::min(manifest.sources.size(), kMaxSources); ++i) {
    json["sources"].push_back(manifest.sources[i]);
  }
  for (const SplitInfo& split : manifest.splits) {
    nlohmann::ordered_json& out = json["splits"][split.name];
    out["documents"] = split.documents;
    out["tokens"] = split.tokens;
    out["bytes"] = split.bytes;
    out["words"] = split.words;
    out["unigram_entropy"] = split.unigram_entropy;
    out["bigram_entropy"] = split.bigram_entropy;
    out["shards"] = nlohmann::ordered_json::array();
    for (const ShardInfo& shard : split.shards) {
      out["shards"].push_back(
          {{"file", shard.file}, {"tokens", shard.tokens}, {"crc32c", absl::StrFormat("%08x", shard.crc)}});
    }
  }
  return json;
}

// File names come from bytes of the file system.
std::string Dump(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

// Reads members of an object; the first fault is kept.
class Fields {
 public:
  Fields(const nlohmann::json& object, std::string where) : object_(object), where_(std::move(where)) {}

  const absl::Status& status() const { return status_; }
  void Fail(absl::string_view fact) {
    if (status_.ok()) status_ = absl::FailedPreconditionError(absl::StrCat(where_, fact));
  }
  const nlohmann::json* Get(const char* key) {
    if (!object_.is_object()) {
      Fail("is not an object");
      return nullptr;
    }
    const auto found = object_.find(key);
    if (found == object_.end()) Fail(absl::StrCat("lacks \"", key, "\""));
    return found == object_.end() ? nullptr : &*found;
  }
  int64_t Int(const char* key, int64_t min, int64_t max) {
    const nlohmann::json* value = Get(key);
    if (value == nullptr) return min;
    if (!value->is_number_unsigned() || value->get<uint64_t>() > static_cast<uint64_t>(max) ||
        value->get<int64_t>() < min) {
      Fail(absl::StrCat("\"", key, "\" is ", value->dump().substr(0, 60), ", not a whole number from ", min, " to ",
                        max));
      return min;
    }
    return value->get<int64_t>();
  }
  double Number(const char* key) {
    const nlohmann::json* value = Get(key);
    if (value == nullptr) return 0;
    if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() < 0) {
      Fail(absl::StrCat("\"", key, "\" is ", value->dump().substr(0, 60), ", not a number from 0"));
      return 0;
    }
    return value->get<double>();
  }
  std::string Text(const char* key) {
    const nlohmann::json* value = Get(key);
    if (value == nullptr) return "";
    if (!value->is_string()) {
      Fail(absl::StrCat("\"", key, "\" is not a string"));
      return "";
    }
    return value->get<std::string>();
  }
  uint64_t HexNumber(const char* key, size_t digits) {
    const std::string text = Text(key);
    uint64_t number = 0;
    if (status_.ok() && (text.size() != digits || !absl::SimpleHexAtoi(text, &number))) {
      Fail(absl::StrCat("\"", key, "\" is not ", digits, " hexadecimal digits"));
    }
    return number;
  }
  // nullptr, or a list.
  const nlohmann::json* List(const char* key) {
    const nlohmann::json* value = Get(key);
    if (value != nullptr && !value->is_array()) {
      Fail(absl::StrCat("\"", key, "\" is not a list"));
      return nullptr;
    }
    return value;
  }

 private:
  const nlohmann::json& object_;
  std::string where_;
  absl::Status status_;
};

absl::StatusOr<SplitInfo> ParseSplit(const nlohmann::json& json, const std::string& name) {
  Fields fields(json, absl::StrCat("split ", name, ": "));
  SplitInfo split;
  split.name = name;
  split.documents = fields.Int("documents", 0, kMaxCount);
  split.tokens = fields.Int("tokens", 0, kMaxCount);
  split.bytes = fields.Int("bytes", 0, kMaxCount);
  split.words = fields.Int("words", 0, kMaxCount);
  split.unigram_entropy = fields.Number("unigram_entropy");
  split.bigram_entropy = fields.Number("bigram_entropy");
  int64_t tokens = 0;
  if (const nlohmann::json* shards = fields.List("shards"); shards != nullptr) {
    for (const nlohmann::json& item : *shards) {
      Fields shard_fields(item, absl::StrCat("split ", name, ": shard ", split.shards.size(), ": "));
      ShardInfo shard;
      shard.file = shard_fields.Text("file");
      shard.tokens = shard_fields.Int("tokens", 1, kMaxCount - tokens);
      shard.crc = static_cast<uint32_t>(shard_fields.HexNumber("crc32c", 8));
      RETURN_IF_ERROR(shard_fields.status());
      const std::string expected = ShardFileName(name, static_cast<int64_t>(split.shards.size()));
      if (shard.file != expected) {
        return absl::FailedPreconditionError(
            absl::StrCat("split ", name, ": names the shard \"", shard.file, "\" where \"", expected, "\" belongs"));
      }
      tokens += shard.tokens;
      split.shards.push_back(std::move(shard));
    }
  }
  if (tokens != split.tokens) {
    fields.Fail(absl::StrCat("says ", split.tokens, " tokens, its shards have ", tokens));
  }
  RETURN_IF_ERROR(fields.status());
  return split;
}

}  // namespace

absl::StatusOr<Manifest> ParseManifest(absl::string_view text) {
  ASSIGN_OR_RETURN(const nlohmann::json json, ParseStrictJson(text));
  Fields fields(json, "");
  if (fields.Text("format") != "mt-corpus")
    fields.Fail("is not the manifest of a corpus (\"format\" is not mt-corpus)");
  const int64_t version = fields.Int("version", 0, kMaxCount);
  if (version != kManifestVersion) {
    fields.Fail(absl::StrCat("has version ", version, ", this program reads version ", kManifestVersion));
  }
  RETURN_IF_ERROR(fields.status());
  Manifest manifest;
  manifest.vocab_size = fields.Int("vocab_size", 1, kMaxVocabSize);
  manifest.tokenizer = fields.Text("tokenizer");
  if (fields.Text("tokenizer_file") != kTokenizerFile) {
    fields.Fail(absl::StrCat("\"tokenizer_file\" is not ", kTokenizerFile));
  }
  manifest.tokenizer_hash = fields.HexNumber("tokenizer_hash", 16);
  manifest.end_of_document = static_cast<int32_t>(fields.Int("end_of_document", 0, manifest.vocab_size - 1));
  if (const nlohmann::json* seed = fields.Get("seed"); seed != nullptr) {
    if (!seed->is_number_unsigned())
      fields.Fail("\"seed\" is not a whole number");
    else
      manifest.seed = seed->get<uint64_t>();
  }
  manifest.documents = fields.Text("documents");
  manifest.invalid_utf8 = fields.Text("invalid_utf8");
  manifest.source_files = fields.Int("source_files", 1, kMaxCount);
  if (const nlohmann::json* sources = fields.List("sources"); sources != nullptr) {
    for (const nlohmann::json& source : *sources) {
      if (source.is_string())
        manifest.sources.push_back(source.get<std::string>());
      else
        fields.Fail("\"sources\" has an item that is not a string");
    }
  }
  if (const nlohmann::json* shares = fields.List("split"); shares != nullptr) {
    for (const nlohmann::json& share : *shares) {
      if (share.is_number())
        manifest.split.push_back(share.get<double>());
      else
        fields.Fail("\"split\" has an item that is not a number");
    }
    if (manifest.split.size() != 3) fields.Fail("\"split\" has not three numbers");
  }
  if (const nlohmann::json* splits = fields.Get("splits"); splits != nullptr) {
    Fields split_fields(*splits, "\"splits\": ");
    for (int s = 0; s < 3; ++s) {
      const nlohmann::json* split = split_fields.Get(kSplitNames[s]);
      RETURN_IF_ERROR(split_fields.status());
      ASSIGN_OR_RETURN(manifest.splits[s], ParseSplit(*split, kSplitNames[s]));
    }
  }
  RETURN_IF_ERROR(fields.status());
  // Whoever edits a number that no other check sees still changes this one.
  const uint64_t crc = fields.HexNumber("crc32c", 8);
  RETURN_IF_ERROR(fields.status());
  if (crc != Crc32c(Dump(ToJson(manifest)))) {
    return absl::FailedPreconditionError("was edited or damaged (its checksum \"crc32c\" differs)");
  }
  return manifest;
}

std::string ShardFileName(absl::string_view split, int64_t index) {
  return absl::StrFormat("%s-%05d.bin", split, index);
}

const SplitInfo* Manifest::Find(absl::string_view split_name) const {
  for (const SplitInfo& split : splits) {
    if (split.name == split_name) return &split;
  }
  return nullptr;
}

std::string Manifest::Serialize() const {
  nlohmann::ordered_json json = ToJson(*this);
  json["crc32c"] = absl::StrFormat("%08x", Crc32c(Dump(json)));
  return absl::StrCat(Dump(json), "\n");
}

absl::StatusOr<Manifest> ReadManifest(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/", kManifestFile);
  absl::StatusOr<std::string> text = ReadFile(path, int64_t{64} << 20);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(absl::StrCat(folder, ": is not a corpus (no ", kManifestFile,
                                            "), or its preparation did not finish (the same command goes on); make one "
                                            "with mtcorpus prep --input FILE --out ",
                                            folder));
  }
  if (!text.ok()) return absl::FailedPreconditionError(text.status().message());
  absl::StatusOr<Manifest> manifest = ParseManifest(*text);
  if (!manifest.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", manifest.status().message(),
                                                      "; make the corpus again with mtcorpus prep --overwrite"));
  }
  return manifest;
}

absl::StatusOr<std::unique_ptr<CorpusReader>> CorpusReader::Open(const std::string& folder, absl::string_view split) {
  ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(folder));
  return OpenWith(folder, manifest, split);
}

absl::StatusOr<std::unique_ptr<CorpusReader>> CorpusReader::OpenWith(const std::string& folder, const Manifest& from,
                                                                     absl::string_view split) {
  std::unique_ptr<CorpusReader> reader(new CorpusReader);
  reader->manifest_ = from;
  const Manifest& manifest = reader->manifest_;
  reader->split_ = manifest.Find(split);
  if (reader->split_ == nullptr) {
    return absl::NotFoundError(absl::StrCat(folder, ": has no split \"", split, "\"; use train, val or test"));
  }
  const int64_t split_index = reader->split_ - manifest.splits;
  for (const ShardInfo& info : reader->split_->shards) {
    const std::string path = absl::StrCat(folder, "/", info.file);
    ASSIGN_OR_RETURN(std::unique_ptr<ShardReader> shard, ShardReader::Open(path));
    const ShardHeader& header = shard->header();
    std::string fact;
    if (header.vocab_size != manifest.vocab_size) {
      fact = absl::StrCat("has a vocabulary of ", header.vocab_size, ", the manifest ", manifest.vocab_size);
    } else if (header.tokenizer_hash != manifest.tokenizer_hash) {
      fact = absl::StrCat("was made with tokenizer ", Hex(header.tokenizer_hash), ", the manifest names ",
                          Hex(manifest.tokenizer_hash));
    } else if (header.num_tokens != info.tokens) {
      fact = absl::StrCat("has ", header.num_tokens, " tokens, the manifest says ", info.tokens);
    } else if (header.split != split_index || header.first_token != reader->num_tokens_ || header.crc != info.crc) {
      fact = absl::StrCat("holds tokens from ", header.first_token, " of split ", kSplitNames[header.split],
                          ", which is not the shard that the manifest describes");
    }
    if (!fact.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, ": ", fact, "; make the corpus again with mtcorpus prep --overwrite"));
    }
    reader->first_token_.push_back(reader->num_tokens_);
    reader->num_tokens_ += header.num_tokens;
    reader->shards_.push_back(std::move(shard));
  }
  reader->first_token_.push_back(reader->num_tokens_);
  return reader;
}

absl::Status CorpusReader::Read(int64_t first, absl::Span<int32_t> out) const {
  CHECK(first >= 0 && static_cast<int64_t>(out.size()) <= num_tokens_ - first) << first << " + " << out.size();
  size_t shard =
      static_cast<size_t>(std::upper_bound(first_token_.begin(), first_token_.end(), first) - first_token_.begin() - 1);
  while (!out.empty()) {
    const int64_t count = std::min(static_cast<int64_t>(out.size()), first_token_[shard + 1] - first);
    RETURN_IF_ERROR(shards_[shard]->Read(first - first_token_[shard], out.subspan(0, static_cast<size_t>(count))));
    out.remove_prefix(static_cast<size_t>(count));
    first += count;
    ++shard;
  }
  return absl::OkStatus();
}

void CorpusReader::Release(int64_t token) const {
  for (size_t i = 0; i < shards_.size() && first_token_[i] < token; ++i) {
    shards_[i]->Release(std::min(token, first_token_[i + 1]) - first_token_[i]);
  }
}

int64_t CorpusReader::num_sequences(int64_t seq_len) const {
  CHECK_GE(seq_len, 1);
  return num_tokens_ < 1 ? 0 : (num_tokens_ - 1) / seq_len;
}

// tokens[i] and labels[i] = token first + i and first + i + 1, for `count` labels.
absl::Status CorpusReader::Window(int64_t first, int64_t count, absl::Span<int32_t> tokens,
                                  absl::Span<int32_t> labels) const {
  const size_t n = static_cast<size_t>(count);
  RETURN_IF_ERROR(Read(first, tokens.subspan(0, n)));
  std::copy(tokens.begin() + 1, tokens.begin() + count, labels.begin());
  return Read(first + count, labels.subspan(n - 1, 1));
}

int64_t CorpusReader::num_eval_batches(int64_t batch_size, int64_t seq_len) const {
  CHECK(batch_size >= 1 && seq_len >= 1);
  if (num_tokens_ < 2) return 0;
  const int64_t windows = (num_tokens_ - 2) / seq_len + 1;
  return (windows - 1) / batch_size + 1;
}

absl::StatusOr<int64_t> CorpusReader::EvalBatch(int64_t index, int64_t batch_size, int64_t seq_len,
                                                absl::Span<int32_t> tokens, absl::Span<int32_t> labels) const {
  CHECK(index >= 0 && batch_size >= 1 && seq_len >= 1 && static_cast<int64_t>(tokens.size()) == batch_size * seq_len &&
        tokens.size() == labels.size());
  std::fill(tokens.begin(), tokens.end(), manifest_.end_of_document);
  std::fill(labels.begin(), labels.end(), kIgnoredLabel);
  int64_t valid = 0;
  for (int64_t i = 0; i < batch_size; ++i) {
    const int64_t first = (index * batch_size + i) * seq_len;
    const int64_t count = std::min(seq_len, num_tokens_ - 1 - first);
    if (count <= 0) break;
    RETURN_IF_ERROR(Window(first, count, tokens.subspan(static_cast<size_t>(i * seq_len), static_cast<size_t>(seq_len)),
                           labels.subspan(static_cast<size_t>(i * seq_len), static_cast<size_t>(seq_len))));
    valid += count;
  }
  return valid;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadCorpusTokenizer(const std::string& folder, const Manifest& manifest) {
  const std::string path = absl::StrCat(folder, "/", kTokenizerFile);
  ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, LoadTokenizer(path));
  if (tokenizer->hash() != manifest.tokenizer_hash || tokenizer->vocab_size() != manifest.vocab_size ||
      tokenizer->end_of_document() != manifest.end_of_document) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": is ", tokenizer->name(), " (hash ",
                                                      Hex(tokenizer->hash()), "), the manifest names ",
                                                      manifest.tokenizer, " (hash ", Hex(manifest.tokenizer_hash),
                                                      "); make the corpus again with mtcorpus prep --overwrite"));
  }
  return tokenizer;
}

void SortPositions(absl::Span<const int32_t> tokens, int64_t vocab_size, absl::Span<int32_t> order,
                   std::vector<int32_t>* scratch) {
  CHECK(order.size() == tokens.size() && tokens.size() < size_t{1} << 31 && vocab_size >= 1);
  scratch->assign(static_cast<size_t>(vocab_size) + 1, 0);
  int32_t* next = scratch->data();
  for (const int32_t token : tokens) {
    CHECK(token >= 0 && token < vocab_size) << "token " << token << " of " << vocab_size;
    ++next[token + 1];
  }
  for (int64_t i = 1; i <= vocab_size; ++i) next[i] += next[i - 1];
  for (size_t i = 0; i < tokens.size(); ++i) order[static_cast<size_t>(next[tokens[i]]++)] = static_cast<int32_t>(i);
}

}  // namespace mt
