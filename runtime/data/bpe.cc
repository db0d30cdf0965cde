#include "runtime/data/bpe.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "runtime/data/utf8.h"

namespace mt {
namespace {

// GPT-2's pattern. White space is spelled out as Unicode's White_Space: PCRE2's \s also takes U+180E.
constexpr char kPattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+"
    "| ?[^\\x09-\\x0d\\x{85}\\p{Z}\\p{L}\\p{N}]+"
    "|[\\x09-\\x0d\\x{85}\\p{Z}]+(?![^\\x09-\\x0d\\x{85}\\p{Z}])|[\\x09-\\x0d\\x{85}\\p{Z}]+";

constexpr size_t kMaxTrainingWordBytes = 1024;
constexpr size_t kMaxTrainingWords = 3 << 20;  // Distinct ones; beyond it the rarest are forgotten.
constexpr size_t kMaxCachedWordBytes = 64;
constexpr size_t kMaxCachedWords = 1 << 16;
constexpr size_t kMaxWordBytes = size_t{1} << 28;  // Longer ones are cut, so that positions fit 32 bits.

// The pattern, compiled once for the process.
class Pattern {
 public:
  static const Pattern& Get() {
    static const Pattern& pattern = *new Pattern;
    return pattern;
  }
  const pcre2_code* code() const { return code_; }
  bool jit() const { return jit_; }

 private:
  Pattern() {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kPattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error,
                          &offset, nullptr);
    CHECK(code_ != nullptr) << "the word pattern: PCRE2 error " << error << " at " << offset;
    jit_ = pcre2_jit_compile(code_, PCRE2_JIT_COMPLETE) == 0;  // Where memory may not be executable it is slower.
  }
  pcre2_code* code_;
  bool jit_;
};

// Cuts text into words; together they are the text.
class WordSplitter {
 public:
  WordSplitter() : match_(pcre2_match_data_create_from_pattern(Pattern::Get().code(), nullptr)) {
    CHECK(match_ != nullptr) << "out of memory";
  }
  ~WordSplitter() { pcre2_match_data_free(match_); }
  WordSplitter(const WordSplitter&) = delete;
  WordSplitter& operator=(const WordSplitter&) = delete;

  // Calls word(bytes) for each word and invalid(bytes) for each stretch of invalid UTF-8, in order.
  template <typename Word, typename Invalid>
  void Split(absl::string_view text, const Word& word, const Invalid& invalid) {
    while (!text.empty()) {
      const absl::string_view valid = text.substr(0, static_cast<size_t>(ValidUtf8Prefix(text)));
      SplitValid(valid, word);
      text.remove_prefix(valid.size());
      if (text.empty()) return;
      const size_t bad = static_cast<size_t>(DecodeUtf8(text).size_bytes);
      invalid(text.substr(0, bad));
      text.remove_prefix(bad);
    }
  }

 private:
  template <typename Word>
  void SplitValid(absl::string_view text, const Word& word) {
    const Pattern& pattern = Pattern::Get();
    const PCRE2_SPTR subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    size_t at = 0;
    while (at < text.size()) {
      const int rc = pattern.jit()
                         ? pcre2_jit_match(pattern.code(), subject, text.size(), at, 0, match_, nullptr)
                         : pcre2_match(pattern.code(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, match_, nullptr);
      CHECK_GT(rc, 0) << "the word pattern: PCRE2 error " << rc;  // Every character is in one of its alternatives.
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match_);
      CHECK(range[0] == at && range[1] > at);
      word(text.substr(at, range[1] - at));
      at = range[1];
    }
  }

  pcre2_match_data* match_;
};

// GPT-2's printable names of bytes: a code point for each byte, and back.
struct ByteNames {
  std::array<int32_t, 256> code_point;
  absl::flat_hash_map<int32_t, uint8_t> byte;

  static const ByteNames& Get() {
    static const ByteNames& names = *new ByteNames;
    return names;
  }
  std::string Name(absl::string_view bytes) const {
    std::string name;
    for (const char c : bytes) AppendUtf8(code_point[static_cast<uint8_t>(c)], &name);
    return name;
  }
  // False where `name` has another character.
  bool Bytes(absl::string_view name, std::string* bytes) const {
    bytes->clear();
    while (!name.empty()) {
      const Utf8Char c = DecodeUtf8(name);
      const auto found = byte.find(c.code_point);
      if (found == byte.end()) return false;
      bytes->push_back(static_cast<char>(found->second));
      name.remove_prefix(static_cast<size_t>(c.size_bytes));
    }
    return true;
  }

 private:
  ByteNames() {
    int32_t next = 256;
    for (int32_t b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      code_point[static_cast<size_t>(b)] = itself ? b : next++;
      byte[code_point[static_cast<size_t>(b)]] = static_cast<uint8_t>(b);
    }
  }
};

uint64_t Pair(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}
int32_t Left(uint64_t pair) { return static_cast<int32_t>(pair >> 32); }
int32_t Right(uint64_t pair) { return static_cast<int32_t>(pair & 0xFFFFFFFFu); }

class BpeTokenizer : public Tokenizer {
 public:
  struct Rule {
    uint64_t pair;
    int32_t id;  // Of the merged token.
  };

  // `tokens`: the bytes of each id; `rules` in the order of their ranks.
  BpeTokenizer(std::vector<std::string> tokens, const std::vector<Rule>& rules, int32_t end_of_document)
      : tokens_(std::move(tokens)), rules_(rules), end_of_document_(end_of_document) {
    for (size_t id = 0; id < tokens_.size(); ++id) {
      if (tokens_[id].size() == 1 && static_cast<int32_t>(id) != end_of_document_) {
        byte_ids_[static_cast<uint8_t>(tokens_[id][0])] = static_cast<int32_t>(id);
      }
    }
    by_pair_.reserve(rules_.size());
    for (size_t rank = 0; rank < rules_.size(); ++rank) {
      by_pair_[rules_[rank].pair] = {static_cast<int32_t>(rank), rules_[rank].id};
    }
  }

  std::string name() const override { return absl::StrCat("bpe:", vocab_size()); }
  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }
  int32_t end_of_document() const override { return end_of_document_; }
  uint64_t hash() const override {
    uint64_t hash = Fnv1a(absl::StrCat("bpe ", end_of_document_, " ", kPattern));
    for (const std::string& token : tokens_) hash = Fnv1a(absl::StrCat(token.size(), ":", token), hash);
    for (const Rule& rule : rules_) hash = Fnv1a(absl::StrCat(Left(rule.pair), " ", Right(rule.pair), ";"), hash);
    return hash;
  }

  using Tokenizer::Encode;
  void Encode(absl::string_view text, std::vector<int32_t>* ids) const override {
    splitter_.Split(
        text, [&](absl::string_view word) { EncodeWord(word, ids); },
        [&](absl::string_view invalid) {
          for (const char c : invalid) ids->push_back(byte_ids_[static_cast<uint8_t>(c)]);
        });
  }

  absl::string_view TokenBytes(int32_t id) const override {
    CHECK(id >= 0 && id < vocab_size()) << "token " << id;
    return tokens_[static_cast<size_t>(id)];
  }

  std::string Serialize() const override;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  struct Symbol {
    int32_t id;  // -1: merged into the one before it.
    int32_t previous;
    int32_t next;
  };
  struct Candidate {
    int32_t rank;
    int32_t position;
    int32_t id;
    bool operator<(const Candidate& other) const {  // The top of a priority queue is the largest.
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  struct Cached {
    uint32_t first;
    uint32_t count;
  };

  void EncodeWord(absl::string_view word, std::vector<int32_t>* ids) const;
  void MergeWord(absl::string_view word, std::vector<int32_t>* ids) const;

  std::vector<std::string> tokens_;
  std::vector<Rule> rules_;
  int32_t end_of_document_;
  std::array<int32_t, 256> byte_ids_;
  absl::flat_hash_map<uint64_t, Merge> by_pair_;

  mutable WordSplitter splitter_;
  mutable absl::flat_hash_map<std::string, Cached> cache_;
  mutable std::vector<int32_t> cached_ids_;
  mutable std::vector<Symbol> symbols_;  // Of MergeWord.
  mutable std::vector<Candidate> heap_;
};

void BpeTokenizer::EncodeWord(absl::string_view word, std::vector<int32_t>* ids) const {
  if (word.size() == 1) {
    ids->push_back(byte_ids_[static_cast<uint8_t>(word[0])]);
    return;
  }
  if (word.size() > kMaxCachedWordBytes) {
    for (; word.size() > kMaxWordBytes; word.remove_prefix(kMaxWordBytes))
      MergeWord(word.substr(0, kMaxWordBytes), ids);
    MergeWord(word, ids);
    return;
  }
  const auto found = cache_.find(word);
  if (found != cache_.end()) {
    const auto first = cached_ids_.begin() + found->second.first;
    ids->insert(ids->end(), first, first + found->second.count);
    return;
  }
  const size_t start = ids->size();
  MergeWord(word, ids);
  if (cache_.size() == kMaxCachedWords) {
    cache_.clear();
    cached_ids_.clear();
  }
  cache_[std::string(word)] = {static_cast<uint32_t>(cached_ids_.size()), static_cast<uint32_t>(ids->size() - start)};
  cached_ids_.insert(cached_ids_.end(), ids->begin() + static_cast<int64_t>(start), ids->end());
}

// The rule of the lowest rank first, the leftmost of equals: O(n log n) for a word of n bytes.
void BpeTokenizer::MergeWord(absl::string_view word, std::vector<int32_t>* ids) const {
  const int32_t n = static_cast<int32_t>(word.size());
  symbols_.clear();
  for (int32_t i = 0; i < n; ++i) {
    symbols_.push_back({byte_ids_[static_cast<uint8_t>(word[static_cast<size_t>(i)])], i - 1, i + 1 < n ? i + 1 : -1});
  }
  const auto at = [this](int32_t i) -> Symbol& { return symbols_[static_cast<size_t>(i)]; };
  std::vector<Candidate>& heap = heap_;
  heap.clear();
  const auto consider = [&](int32_t i) {
    if (i < 0 || at(i).next < 0) return;
    const auto found = by_pair_.find(Pair(at(i).id, at(at(i).next).id));
    if (found == by_pair_.end()) return;
    heap.push_back({found->second.rank, i, found->second.id});
    std::push_heap(heap.begin(), heap.end());
  };
  for (int32_t i = 0; i < n; ++i) consider(i);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = at(top.position);
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = at(left.next);
    if (rules_[static_cast<size_t>(top.rank)].pair != Pair(left.id, right.id)) continue;  // Merged away meanwhile.
    left.id = top.id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) at(left.next).previous = top.position;
    consider(left.previous);
    consider(top.position);
  }
  for (const Symbol& symbol : symbols_) {
    if (symbol.id >= 0) ids->push_back(symbol.id);
  }
}

std::string BpeTokenizer::Serialize() const {
  const auto quote = [](const std::string& text) { return nlohmann::json(text).dump(); };
  const std::string end = quote(tokens_[static_cast<size_t>(end_of_document_)]);
  const ByteNames& names = ByteNames::Get();
  std::string out = absl::StrCat(
      "{\n\"version\": \"1.0\",\n\"truncation\": null,\n\"padding\": null,\n\"added_tokens\": [\n{\"id\": ",
      end_of_document_, ", \"content\": ", end,
      ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}\n],\n"
      "\"normalizer\": null,\n"
      "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
      "\"use_regex\": true},\n"
      "\"post_processor\": null,\n"
      "\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": "
      "true},\n"
      "\"model\": {\n\"type\": \"BPE\",\n\"dropout\": null,\n\"unk_token\": null,\n\"continuing_subword_prefix\": "
      "null,\n\"end_of_word_suffix\": null,\n\"fuse_unk\": false,\n\"byte_fallback\": false,\n\"vocab\": {");
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const bool special = static_cast<int32_t>(id) == end_of_document_;
    absl::StrAppend(&out, id == 0 ? "\n" : ",\n", special ? end : quote(names.Name(tokens_[id])), ": ", id);
  }
  absl::StrAppend(&out, "\n},\n\"merges\": [");
  for (size_t i = 0; i < rules_.size(); ++i) {
    const auto name = [&](int32_t id) { return names.Name(tokens_[static_cast<size_t>(id)]); };
    absl::StrAppend(&out, i == 0 ? "\n" : ",\n",
                    quote(absl::StrCat(name(Left(rules_[i].pair)), " ", name(Right(rules_[i].pair)))));
  }
  absl::StrAppend(&out, "\n]\n}\n}\n");
  return out;
}

class BpeTrainer : public TokenizerTrainer {
 public:
  explicit BpeTrainer(int64_t vocab_size) : vocab_size_(vocab_size) {}

  void Add(absl::string_view text) override {
    splitter_.Split(
        text,
        [&](absl::string_view word) {
          if (word.size() > kMaxTrainingWordBytes) return;
          const auto found = words_.find(word);
          if (found != words_.end()) {
            ++found->second;
            return;
          }
          if (words_.size() >= kMaxTrainingWords) Forget();
          words_[std::string(word)] = 1;
        },
        [](absl::string_view) {});
  }

  absl::StatusOr<std::unique_ptr<Tokenizer>> Train() override;

 private:
  struct PairInfo {
    int64_t count = 0;
    std::vector<int32_t> words;  // That have, or had, the pair; some twice.
  };
  struct Candidate {
    int64_t count;
    uint64_t pair;
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };
  struct Word {
    int64_t first;  // In symbols_.
    int32_t size;
    int64_t count;
  };

  // Drops the rarest words until half the room is free.
  void Forget() {
    for (int64_t least = 1; words_.size() > kMaxTrainingWords / 2; ++least) {
      absl::erase_if(words_, [least](const auto& entry) { return entry.second <= least; });
    }
  }
  void MergeInWord(uint64_t pair, int32_t id, int32_t word_index, absl::flat_hash_set<uint64_t>* grown);

  int64_t vocab_size_;
  WordSplitter splitter_;
  absl::flat_hash_map<std::string, int64_t> words_;
  std::vector<int32_t> symbols_;
  std::vector<Word> word_list_;
  absl::flat_hash_map<uint64_t, PairInfo> pairs_;
};

void BpeTrainer::MergeInWord(uint64_t pair, int32_t id, int32_t word_index, absl::flat_hash_set<uint64_t>* grown) {
  Word& word = word_list_[static_cast<size_t>(word_index)];
  int32_t* s = symbols_.data() + word.first;
  const auto remove = [&](int32_t a, int32_t b) {
    const auto found = pairs_.find(Pair(a, b));
    if (found != pairs_.end()) found->second.count -= word.count;
  };
  const auto add = [&](int32_t a, int32_t b) {
    PairInfo& info = pairs_[Pair(a, b)];
    info.count += word.count;
    if (info.words.empty() || info.words.back() != word_index) info.words.push_back(word_index);
    grown->insert(Pair(a, b));
  };
  const int32_t left = Left(pair);
  const int32_t right = Right(pair);
  int32_t size = 0;
  for (int32_t i = 0; i < word.size;) {
    if (s[i] != left || i + 1 == word.size || s[i + 1] != right) {
      s[size++] = s[i++];
      continue;
    }
    if (size > 0) {
      remove(s[size - 1], left);
      add(s[size - 1], id);
    }
    if (i + 2 < word.size) {
      remove(right, s[i + 2]);
      add(id, s[i + 2]);
    }
    s[size++] = id;
    i += 2;
  }
  word.size = size;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> BpeTrainer::Train() {
  if (words_.empty()) return absl::FailedPreconditionError("the text has no word to learn a vocabulary from");
  std::vector<std::string> tokens;
  for (int b = 0; b < 256; ++b) tokens.emplace_back(1, static_cast<char>(b));
  for (const auto& [text, count] : words_) {
    if (text.size() < 2) continue;
    word_list_.push_back({static_cast<int64_t>(symbols_.size()), static_cast<int32_t>(text.size()), count});
    for (const char c : text) symbols_.push_back(static_cast<uint8_t>(c));
  }
  words_ = {};
  for (size_t w = 0; w < word_list_.size(); ++w) {
    const Word& word = word_list_[w];
    for (int32_t i = 0; i + 1 < word.size; ++i) {
      const int32_t* s = symbols_.data() + word.first + i;
      PairInfo& info = pairs_[Pair(s[0], s[1])];
      info.count += word.count;
      if (info.words.empty() || info.words.back() != static_cast<int32_t>(w)) {
        info.words.push_back(static_cast<int32_t>(w));
      }
    }
  }
  std::priority_queue<Candidate> queue;
  for (const auto& [pair, info] : pairs_) queue.push({info.count, pair});

  // The queue may hold old counts: they are corrected when they come to the top. A count only grows in the merge that
  // makes the pair, which pushes it.
  std::vector<BpeTokenizer::Rule> rules;
  absl::flat_hash_set<uint64_t> grown;
  while (static_cast<int64_t>(tokens.size()) < vocab_size_ - 1 && !queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const auto found = pairs_.find(top.pair);
    if (found == pairs_.end() || found->second.count < 2) continue;
    if (found->second.count != top.count) {
      if (found->second.count < top.count) queue.push({found->second.count, top.pair});
      continue;
    }
    const int32_t id = static_cast<int32_t>(tokens.size());
    rules.push_back({top.pair, id});
    tokens.push_back(tokens[static_cast<size_t>(Left(top.pair))] + tokens[static_cast<size_t>(Right(top.pair))]);
    const std::vector<int32_t> words = std::move(found->second.words);
    grown.clear();
    for (const int32_t word : words) MergeInWord(top.pair, id, word, &grown);
    pairs_.erase(top.pair);
    for (const uint64_t pair : grown) {
      const auto info = pairs_.find(pair);
      if (info != pairs_.end() && info->second.count >= 2) queue.push({info->second.count, pair});
    }
  }
  const int32_t end_of_document = static_cast<int32_t>(tokens.size());
  tokens.push_back(kEndOfDocument);
  pairs_ = {};
  word_list_ = {};
  symbols_ = {};
  return std::make_unique<BpeTokenizer>(std::move(tokens), rules, end_of_document);
}

// Object members of tokenizer.json, with the errors they deserve.
absl::Status Unsupported(absl::string_view what) {
  return absl::FailedPreconditionError(
      absl::StrCat(what, " is not supported; this program reads byte-level BPE as GPT-2 has it"));
}

const nlohmann::json& Member(const nlohmann::json& object, const char* key) {
  static const nlohmann::json& null = *new nlohmann::json;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

absl::Status CheckByteLevel(const nlohmann::json& json, const char* where, bool required) {
  if (json.is_null() && !required) return absl::OkStatus();
  if (Member(json, "type") != "ByteLevel") {
    const nlohmann::json& type = Member(json, "type");
    return Unsupported(absl::StrCat("\"", where, "\" of type ", type.dump().substr(0, 60)));
  }
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<TokenizerTrainer> NewBpeTrainer(int64_t vocab_size) { return std::make_unique<BpeTrainer>(vocab_size); }

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseBpe(const nlohmann::json& json) {
  const auto fault = [](const auto&... parts) { return absl::FailedPreconditionError(absl::StrCat(parts...)); };
  for (const char* key : {"normalizer", "truncation", "padding"}) {
    if (!Member(json, key).is_null()) return Unsupported(absl::StrCat("\"", key, "\""));
  }
  RETURN_IF_ERROR(CheckByteLevel(Member(json, "pre_tokenizer"), "pre_tokenizer", /*required=*/true));
  RETURN_IF_ERROR(CheckByteLevel(Member(json, "decoder"), "decoder", /*required=*/false));
  RETURN_IF_ERROR(CheckByteLevel(Member(json, "post_processor"), "post_processor", /*required=*/false));
  const nlohmann::json& pre_tokenizer = Member(json, "pre_tokenizer");
  if (Member(pre_tokenizer, "add_prefix_space") != false) return Unsupported("\"add_prefix_space\" other than false");
  const nlohmann::json& use_regex = Member(pre_tokenizer, "use_regex");
  if (!use_regex.is_null() && use_regex != true) return Unsupported("\"use_regex\" other than true");

  const nlohmann::json& model = Member(json, "model");
  if (!model.is_object()) return fault("\"model\" is not an object");
  const nlohmann::json& type = Member(model, "type");
  if (!type.is_null() && type != "BPE") return Unsupported(absl::StrCat("a model of type ", type.dump().substr(0, 60)));
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const nlohmann::json& value = Member(model, key);
    if (!value.is_null() && value != "") return Unsupported(absl::StrCat("\"", key, "\" of the model"));
  }
  for (const char* key : {"byte_fallback", "ignore_merges"}) {
    const nlohmann::json& value = Member(model, key);
    if (!value.is_null() && value != false) return Unsupported(absl::StrCat("\"", key, "\" of the model"));
  }

  const nlohmann::json& vocab = Member(model, "vocab");
  if (!vocab.is_object()) return fault("\"vocab\" of the model is not an object");
  const nlohmann::json& added = Member(json, "added_tokens");
  if (!added.is_array()) return fault("\"added_tokens\" is not a list");
  int64_t end_of_document = -1;
  for (const nlohmann::json& token : added) {
    const nlohmann::json& content = Member(token, "content");
    if (content != kEndOfDocument) return Unsupported(absl::StrCat("added token ", content.dump().substr(0, 60)));
    const nlohmann::json& id = Member(token, "id");
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(kMaxVocabSize) ||
        end_of_document >= 0) {
      return fault("added token \"", kEndOfDocument, "\" has no id, one out of range, or two");
    }
    end_of_document = id.get<int64_t>();
  }
  if (end_of_document < 0) return fault("there is no added token \"", kEndOfDocument, "\" to end documents");
  const bool listed = vocab.contains(kEndOfDocument);
  const int64_t size = static_cast<int64_t>(vocab.size()) + (listed ? 0 : 1);
  if (size > kMaxVocabSize) return fault("the vocabulary has ", size, " tokens, the limit is ", kMaxVocabSize);

  std::vector<std::string> tokens(static_cast<size_t>(size));
  std::vector<bool> given(static_cast<size_t>(size));
  absl::flat_hash_map<std::string, int32_t> ids;
  const ByteNames& names = ByteNames::Get();
  for (const auto& item : vocab.items()) {
    const nlohmann::json& value = item.value();
    if (!value.is_number_unsigned() || value.get<uint64_t>() >= static_cast<uint64_t>(size)) {
      return fault("token \"", item.key(), "\" has the id ", value.dump().substr(0, 60), "; ids are 0 to ", size - 1);
    }
    const size_t id = value.get<size_t>();
    if (given[id]) return fault("token \"", item.key(), "\" has the id ", id, ", which another token has");
    given[id] = true;
    if (item.key() == kEndOfDocument) continue;
    if (!names.Bytes(item.key(), &tokens[id]) || tokens[id].empty()) {
      return fault("token \"", item.key(), "\" is not written in byte-level characters");
    }
    ids[item.key()] = static_cast<int32_t>(id);
  }
  const size_t end = static_cast<size_t>(end_of_document);
  if (end >= given.size() || given[end] != listed || (listed && vocab[kEndOfDocument] != end_of_document)) {
    return fault("the id ", end_of_document, " of \"", kEndOfDocument,
                 "\" is not the one that the vocabulary leaves to it");
  }
  tokens[end] = kEndOfDocument;
  for (int b = 0; b < 256; ++b) {
    const std::string name = names.Name(std::string(1, static_cast<char>(b)));
    if (!ids.contains(name)) return fault("the vocabulary lacks the byte ", b, " (\"", name, "\")");
  }

  const nlohmann::json& merges = Member(model, "merges");
  if (!merges.is_array()) return fault("\"merges\" of the model is not a list");
  std::vector<BpeTokenizer::Rule> rules;
  absl::flat_hash_set<uint64_t> seen;
  for (const nlohmann::json& merge : merges) {
    std::vector<std::string> parts;
    if (merge.is_string()) parts = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
    if (merge.is_array()) {
      for (const nlohmann::json& part : merge) {
        if (part.is_string()) parts.push_back(part.get_ref<const std::string&>());
      }
    }
    if (parts.size() != 2) return fault("merge ", rules.size(), " is not a pair of tokens");
    const auto left = ids.find(parts[0]);
    const auto right = ids.find(parts[1]);
    const auto whole = ids.find(parts[0] + parts[1]);
    if (left == ids.end() || right == ids.end() || whole == ids.end()) {
      return fault("merge ", rules.size(), " (\"", parts[0], "\" and \"", parts[1],
                   "\") has a token that the vocabulary lacks");
    }
    const uint64_t pair = Pair(left->second, right->second);
    if (!seen.insert(pair).second) return fault("merge ", rules.size(), " is given twice");
    rules.push_back({pair, whole->second});
  }
  return std::make_unique<BpeTokenizer>(std::move(tokens), rules, static_cast<int32_t>(end_of_document));
}

}  // namespace mt
