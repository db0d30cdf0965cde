#include "runtime/data/tokenizer.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"
#include "runtime/data/bpe.h"
#include "runtime/data/strict_json.h"
#include "runtime/data/tokenizer_json.h"

namespace mt {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;
constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD.
constexpr char kCharFormat[] = "mt-char-tokenizer";

// Sorted code points, then <unk>, then the end of a document.
class CharTokenizer : public Tokenizer {
 public:
  explicit CharTokenizer(std::vector<int32_t> code_points) : code_points_(std::move(code_points)) {
    for (const int32_t c : code_points_) {
      std::string bytes;
      AppendUtf8(c, &bytes);
      if (static_cast<size_t>(c) >= ids_.size()) ids_.resize(static_cast<size_t>(c) + 1, unknown());
      ids_[static_cast<size_t>(c)] = static_cast<int32_t>(bytes_.size());
      bytes_.push_back(std::move(bytes));
    }
    bytes_.push_back(kReplacement);
    bytes_.push_back(kEndOfDocument);
  }

  std::string name() const override { return "char"; }
  int64_t vocab_size() const override { return static_cast<int64_t>(code_points_.size()) + 2; }
  int32_t end_of_document() const override { return static_cast<int32_t>(code_points_.size()) + 1; }
  int32_t unknown() const override { return static_cast<int32_t>(code_points_.size()); }
  uint64_t hash() const override {
    uint64_t hash = Fnv1a(kCharFormat);
    for (const std::string& bytes : bytes_) hash = Fnv1a(absl::StrCat(bytes.size(), ":", bytes), hash);
    return hash;
  }

  using Tokenizer::Encode;
  void EncodePart(absl::string_view text, bool /*continued*/, std::vector<int32_t>* ids) const override {
    while (!text.empty()) {
      const Utf8Char c = DecodeUtf8(text);
      const bool known = c.code_point >= 0 && static_cast<size_t>(c.code_point) < ids_.size();
      ids->push_back(known ? ids_[static_cast<size_t>(c.code_point)] : unknown());
      text.remove_prefix(static_cast<size_t>(c.size_bytes));
    }
  }

  absl::string_view TokenBytes(int32_t id) const override {
    CHECK(id >= 0 && id < vocab_size()) << "token " << id;
    return bytes_[static_cast<size_t>(id)];
  }

  std::string Serialize() const override {
    nlohmann::ordered_json json;
    json["format"] = kCharFormat;
    json["version"] = 1;
    json["vocab_size"] = vocab_size();
    json["unknown"] = unknown();
    json["end_of_document"] = end_of_document();
    json["characters"] = nlohmann::ordered_json::array();  // In the order of their ids, from 0.
    for (size_t i = 0; i < code_points_.size(); ++i) json["characters"].push_back(bytes_[i]);
    return absl::StrCat(json.dump(1), "\n");
  }

 private:
  std::vector<int32_t> code_points_;
  std::vector<int32_t> ids_;  // By code point.
  std::vector<std::string> bytes_;
};

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseChar(const nlohmann::json& json) {
  const auto fault = [](absl::string_view fact) {
    return absl::FailedPreconditionError(absl::StrCat("character tokenizer: ", fact));
  };
  const auto version = json.find("version");
  if (version == json.end() || *version != 1) return fault("\"version\" is not 1");
  const auto characters = json.find("characters");
  if (characters == json.end() || !characters->is_array()) return fault("\"characters\" is not a list");
  std::vector<int32_t> code_points;
  for (const nlohmann::json& item : *characters) {
    if (!item.is_string()) return fault("an item of \"characters\" is not a string");
    const std::string& text = item.get_ref<const std::string&>();
    const Utf8Char c = text.empty() ? Utf8Char{-1, 0, false} : DecodeUtf8(text);
    if (c.code_point < 0 || static_cast<size_t>(c.size_bytes) != text.size()) {
      return fault(absl::StrCat("item ", code_points.size(), " of \"characters\" is not one character"));
    }
    if (!code_points.empty() && c.code_point <= code_points.back()) {
      return fault(absl::StrCat("item ", code_points.size(), " of \"characters\" is out of order or given twice"));
    }
    code_points.push_back(c.code_point);
  }
  if (code_points.empty()) return fault("\"characters\" is empty");
  auto tokenizer = std::make_unique<CharTokenizer>(std::move(code_points));
  const std::pair<const char*, int64_t> expected[] = {{"vocab_size", tokenizer->vocab_size()},
                                                      {"unknown", tokenizer->unknown()},
                                                      {"end_of_document", tokenizer->end_of_document()}};
  for (const auto& [key, value] : expected) {
    const auto found = json.find(key);
    if (found == json.end() || *found != value) {
      return fault(absl::StrCat("\"", key, "\" is not ", value, ", as the characters say"));
    }
  }
  return tokenizer;
}

class CharTrainer : public TokenizerTrainer {
 public:
  void Add(absl::string_view text) override {
    while (!text.empty()) {
      const Utf8Char c = DecodeUtf8(text);
      if (c.code_point >= 0) seen_[static_cast<size_t>(c.code_point)] = true;
      text.remove_prefix(static_cast<size_t>(c.size_bytes));
    }
  }
  absl::StatusOr<std::unique_ptr<Tokenizer>> Train() override {
    std::vector<int32_t> code_points;
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (seen_[i]) code_points.push_back(static_cast<int32_t>(i));
    }
    if (code_points.empty())
      return absl::FailedPreconditionError("the text has no character to make a vocabulary from");
    return std::make_unique<CharTokenizer>(std::move(code_points));
  }

 private:
  std::vector<bool> seen_ = std::vector<bool>(0x110000);
};

}  // namespace

std::vector<int32_t> Tokenizer::Encode(absl::string_view text) const {
  std::vector<int32_t> ids;
  Encode(text, &ids);
  return ids;
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", id, " is outside the vocabulary of ", name(), " (0 to ", vocab_size() - 1, ")"));
    }
    absl::StrAppend(&text, TokenBytes(id));
  }
  if (adds_space() && !text.empty() && text[0] == ' ') text.erase(0, 1);
  return text;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizer(absl::string_view contents,
                                                          absl::string_view end_of_document) {
  ASSIGN_OR_RETURN(const nlohmann::json json, ParseStrictJson(contents));
  const auto format = json.find("format");
  if (format != json.end() && *format == kCharFormat) return ParseChar(json);
  if (json.contains("model")) return ParseTokenizerJson(json, contents, end_of_document);
  return absl::FailedPreconditionError("is neither a tokenizer.json (no \"model\") nor a character tokenizer");
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& path) {
  absl::StatusOr<std::string> contents = ReadFile(path, kMaxFileBytes);
  if (absl::IsResourceExhausted(contents.status())) {
    return absl::FailedPreconditionError(contents.status().message());
  }
  RETURN_IF_ERROR(contents);
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = ParseTokenizer(*contents);
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), path);
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<TokenizerTrainer>> NewTokenizerTrainer(absl::string_view spec) {
  if (spec == "char") return std::make_unique<CharTrainer>();
  absl::string_view number = spec;
  int64_t vocab_size = 0;
  if (absl::ConsumePrefix(&number, "bpe:") && absl::SimpleAtoi(number, &vocab_size) && vocab_size >= 257 &&
      vocab_size <= kMaxVocabSize) {
    return NewBpeTrainer(vocab_size);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer \"", spec, "\" is not known; use char, bpe:N with N from 257 to ", kMaxVocabSize,
                   " (bpe:10000), gpt2, OWNER/NAME, hf:DIR, spm:FILE or the path of a tokenizer file"));
}

}  // namespace mt
