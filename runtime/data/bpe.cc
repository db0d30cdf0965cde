#include "runtime/data/bpe.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"
#include "runtime/data/tokenizer_json.h"

namespace mt {
namespace {

constexpr size_t kMaxTrainingWordBytes = 1024;
constexpr size_t kMaxTrainingWords = 3 << 20;      // Distinct ones; beyond it the rarest are forgotten.
constexpr size_t kMaxShortWordBytes = 64;          // Longer ones are merged with a heap.
constexpr size_t kMaxWordBytes = size_t{1} << 28;  // Longer ones are cut, so that positions fit 32 bits.
constexpr int32_t kUnderscore = 0x2581;            // SentencePiece's space.
constexpr char kReplacement[] = "\xEF\xBF\xBD";    // U+FFFD.
constexpr int32_t kNoToken = std::numeric_limits<int32_t>::max();

uint64_t Pair(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}
int32_t Left(uint64_t pair) { return static_cast<int32_t>(pair >> 32); }
int32_t Right(uint64_t pair) { return static_cast<int32_t>(pair & 0xFFFFFFFFu); }

// The character at *at, which moves behind it. REQUIRES: valid UTF-8.
int32_t NextCharacter(absl::string_view text, size_t* at) {
  const auto byte = [&] { return static_cast<int32_t>(static_cast<uint8_t>(text[(*at)++])); };
  const int32_t first = byte();
  if (first < 0x80) return first;
  int32_t c = first < 0xE0 ? first & 0x1F : first < 0xF0 ? first & 0x0F : first & 0x07;
  c = c << 6 | (byte() & 0x3F);
  if (first >= 0xE0) c = c << 6 | (byte() & 0x3F);
  if (first >= 0xF0) c = c << 6 | (byte() & 0x3F);
  return c;
}

// Calls valid(bytes) for each stretch of valid UTF-8 and invalid(bytes) for what lies between, in order.
template <typename Valid, typename Invalid>
void SplitValid(absl::string_view text, const Valid& valid, const Invalid& invalid) {
  while (!text.empty()) {
    const absl::string_view good = text.substr(0, static_cast<size_t>(ValidUtf8Prefix(text)));
    if (!good.empty()) valid(good);
    text.remove_prefix(good.size());
    if (text.empty()) break;
    const size_t bad = static_cast<size_t>(DecodeUtf8(text).size_bytes);
    invalid(text.substr(0, bad));
    text.remove_prefix(bad);
  }
}

// Finds the leftmost of several strings, the longest of those that start there.
class Literals {
 public:
  void Add(const std::string& text, int32_t id) {
    ids_[text] = id;
    std::vector<size_t>& lengths = lengths_[static_cast<uint8_t>(text[0])];
    if (std::find(lengths.begin(), lengths.end(), text.size()) == lengths.end()) lengths.push_back(text.size());
    std::sort(lengths.rbegin(), lengths.rend());
  }
  // Calls gap(bytes) and literal(id) in the order of the text.
  template <typename Gap, typename Literal>
  void Split(absl::string_view text, const Gap& gap, const Literal& literal) const {
    if (ids_.empty()) return gap(text);
    size_t start = 0;
    for (size_t i = 0; i < text.size();) {
      size_t found = 0;
      for (const size_t length : lengths_[static_cast<uint8_t>(text[i])]) {
        const auto entry = ids_.find(text.substr(i, length));
        if (entry == ids_.end() || entry->first.size() != length) continue;
        if (i > start) gap(text.substr(start, i - start));
        literal(entry->second);
        found = length;
        break;
      }
      i += std::max(found, size_t{1});
      if (found > 0) start = i;
    }
    if (start < text.size()) gap(text.substr(start));
  }

 private:
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::array<std::vector<size_t>, 256> lengths_;  // By first byte, descending.
};

// Code points that Unicode has got since version 9, by which Hugging Face's tokenizers normalize, and that decompose,
// compose or have a combining class: they stay as they are, and nothing composes across them.
struct CodePoints {
  int32_t first, last;
};
constexpr CodePoints kLaterThanUnicode9[] = {
    {0x07FD, 0x07FD},   {0x0898, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},   {0x0C3C, 0x0C3C},
    {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},   {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785},
    {0x10787, 0x107B0}, {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
    {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0},
    {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E030, 0x1E06D}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1F16C, 0x1F16C},
    {0x1FBF0, 0x1FBF9}};

bool IsLaterThanUnicode9(int32_t c) {
  if (c < kLaterThanUnicode9[0].first) return false;
  const auto* after = std::upper_bound(std::begin(kLaterThanUnicode9), std::end(kLaterThanUnicode9), c,
                                       [](int32_t value, const CodePoints& range) { return value < range.first; });
  return c <= after[-1].last;
}

// The text in the form, or itself where every code point is below U+0300 (form C) or ASCII.
absl::string_view Normalized(absl::string_view text, BpeModel::Form form, std::string* storage) {
  if (form == BpeModel::Form::kNone) return text;
  const bool compatible = form == BpeModel::Form::kNfkc;
  const uint8_t end_of_plain = compatible ? 0x80 : 0xCC;
  if (std::all_of(text.begin(), text.end(), [&](char c) { return static_cast<uint8_t>(c) < end_of_plain; })) {
    return text;
  }
  storage->clear();
  const auto append = [&](absl::string_view part) {
    if (part.empty()) return;
    utf8proc_uint8_t* out = nullptr;
    const utf8proc_ssize_t size = utf8proc_map(
        reinterpret_cast<const utf8proc_uint8_t*>(part.data()), static_cast<utf8proc_ssize_t>(part.size()), &out,
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE | (compatible ? UTF8PROC_COMPAT : 0)));
    CHECK_GE(size, 0) << "normalization: " << utf8proc_errmsg(size);
    storage->append(reinterpret_cast<const char*>(out), static_cast<size_t>(size));
    std::free(out);
  };
  size_t start = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    if (!IsLaterThanUnicode9(NextCharacter(text, &at))) continue;
    append(text.substr(start, begin - start));
    storage->append(text.data() + begin, at - begin);
    start = at;
  }
  append(text.substr(start));
  return *storage;
}

// What a pair of neighbours becomes.
struct Merge {
  int32_t rank = kNoToken;  // kNoToken: nothing.
  int32_t id = 0;
};

// The rules by their pairs: open addressing, at most half full.
class PairTable {
 public:
  void Reserve(size_t rules) {
    size_t size = 16;
    shift_ = 60;
    for (; size < 2 * rules; size *= 2) --shift_;
    slots_.assign(size, {kEmpty, {}});
  }
  // Of two rules for one pair the first one stays.
  void Add(int32_t left, int32_t right, Merge merge) {
    Slot& slot = slots_[Find(Pair(left, right))];
    if (slot.pair == kEmpty) slot = {Pair(left, right), merge};
  }
  Merge At(int32_t left, int32_t right) const { return slots_[Find(Pair(left, right))].merge; }

 private:
  struct Slot {
    uint64_t pair;
    Merge merge;
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  size_t Find(uint64_t pair) const {
    size_t i = (pair * 0x9E3779B97F4A7C15u) >> shift_;
    while (slots_[i].pair != pair && slots_[i].pair != kEmpty) i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  int shift_ = 60;
  std::vector<Slot> slots_ = std::vector<Slot>(16, Slot{kEmpty, {}});
};

// The ids of words met before, one word a cache line: what hashes to the same line replaces it.
class WordCache {
 public:
  static constexpr size_t kMaxWordBytes = 24;
  static constexpr size_t kMaxIds = 9;

  struct alignas(64) Line {
    std::array<uint64_t, 3> word = {};  // Zeros after its end.
    uint8_t size = 0;                   // 0: no word.
    uint8_t count = 0;
    std::array<int32_t, kMaxIds> ids;
  };
  static_assert(sizeof(Line) == 64);

  // The line that the word belongs into; *found: it is there. Else line->word and line->size are set, and the caller
  // sets count and ids (or size = 0). REQUIRES: 1 <= word.size() <= kMaxWordBytes.
  Line* Find(absl::string_view word, bool* found) {
    if (lines_.empty()) lines_.resize(size_t{1} << kBits);
    std::array<uint64_t, 3> key = {};
    std::memcpy(key.data(), word.data(), word.size());
    uint64_t hash = (key[0] ^ word.size()) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ hash >> 32 ^ key[1]) * 0xBF58476D1CE4E5B9u;
    hash = (hash ^ hash >> 32 ^ key[2]) * 0x94D049BB133111EBu;
    Line& line = lines_[hash >> (64 - kBits)];
    *found =
        ((line.word[0] ^ key[0]) | (line.word[1] ^ key[1]) | (line.word[2] ^ key[2])) == 0 && line.size == word.size();
    if (!*found) {
      line.word = key;
      line.size = static_cast<uint8_t>(word.size());
    }
    return &line;
  }

 private:
  static constexpr int kBits = 16;
  std::vector<Line> lines_;
};

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(BpeModel model, std::unique_ptr<PreTokenizer> pre_tokenizer)
      : model_(std::move(model)),
        pre_tokenizer_(std::move(pre_tokenizer)),
        characters_(model_.unit != BpeModel::Unit::kByte) {
    byte_ids_.fill(-1);
    single_ids_.fill(-1);
    const auto add_character = [this](const std::string& text, int32_t id) {
      const Utf8Char c = DecodeUtf8(text);
      if (c.code_point >= 0 && static_cast<size_t>(c.size_bytes) == text.size()) character_ids_[c.code_point] = id;
    };
    for (size_t i = 0; i < model_.tokens.size(); ++i) {
      const BpeModel::Token& token = model_.tokens[i];
      const int32_t id = static_cast<int32_t>(i);
      switch (token.kind) {
        case BpeModel::Kind::kText:
          if (characters_) add_character(token.text, id);
          if (!characters_ && token.text.size() == 1) byte_ids_[static_cast<uint8_t>(token.text[0])] = id;
          if (model_.ignore_merges) whole_words_[token.text] = id;
          break;
        case BpeModel::Kind::kByte:
          byte_ids_[static_cast<uint8_t>(token.text[0])] = id;
          break;
        case BpeModel::Kind::kUnknown:
          unknown_ = id;
          break;
        case BpeModel::Kind::kLiteral:
          (token.normalized ? normalized_literals_ : literals_).Add(token.text, id);
          break;
        case BpeModel::Kind::kSpecial:
        case BpeModel::Kind::kHole:
          break;
      }
    }
    if (std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end()) unknown_ = -1;
    if (const auto space = character_ids_.find(' '); space != character_ids_.end()) {
      character_ids_[kUnderscore] = space->second;
    }
    for (int32_t c = 0; c < static_cast<int32_t>(low_ids_.size()); ++c) {
      const auto found = character_ids_.find(c);
      low_ids_[static_cast<size_t>(c)] = found == character_ids_.end() ? kNoToken : found->second;
    }
    const absl::flat_hash_set<int32_t> tied(model_.tied.begin(), model_.tied.end());
    int32_t rank = 0;
    by_pair_.Reserve(model_.rules.size());
    for (size_t i = 0; i < model_.rules.size(); ++i) {
      const BpeModel::Rule& rule = model_.rules[i];
      const bool equal =
          model_.rank_by_result && i > 0 && (rule.id == model_.rules[i - 1].id || tied.contains(rule.id));
      if (!equal) rank = static_cast<int32_t>(i);
      by_pair_.Add(rule.left, rule.right, {rank, rule.id});
    }
    if (characters_) {
      FindJoins();
      for (size_t b = 0; b < 0x80; ++b) {
        single_ids_[b] = low_ids_[b];
        if (low_ids_[b] == kNoToken) single_ids_[b] = unknown_ < 0 && b != ' ' ? byte_ids_[b] : -1;
      }
      return;
    }
    single_ids_ = byte_ids_;
    by_bytes_.resize(1 << 16);
    for (size_t pair = 0; pair < by_bytes_.size(); ++pair) {
      by_bytes_[pair] = by_pair_.At(byte_ids_[pair >> 8], byte_ids_[pair & 0xFF]);
    }
  }

  std::string name() const override { return absl::StrCat(characters_ ? "spm:" : "bpe:", vocab_size()); }
  int64_t vocab_size() const override { return static_cast<int64_t>(model_.tokens.size()); }
  int32_t end_of_document() const override { return model_.end_of_document; }
  int32_t unknown() const override { return unknown_; }
  uint64_t hash() const override;

  using Tokenizer::Encode;
  void EncodePart(absl::string_view text, bool continued, std::vector<int32_t>* ids) const override;

  absl::string_view TokenBytes(int32_t id) const override {
    CHECK(id >= 0 && id < vocab_size()) << "token " << id;
    const BpeModel::Token& token = model_.tokens[static_cast<size_t>(id)];
    return token.kind == BpeModel::Kind::kUnknown ? kReplacement : absl::string_view(token.text);
  }
  bool adds_space() const override { return model_.prefix != BpeModel::Prefix::kNone; }

  std::string Serialize() const override { return model_.source.empty() ? WriteTokenizerJson(model_) : model_.source; }

 private:
  struct Symbol {
    int32_t id;  // -1: merged into the one before it.
    int32_t previous;
    int32_t next;
    int32_t begin;  // Of its bytes in the word.
  };
  struct Candidate {
    int32_t rank;
    int32_t position;
    int32_t left;
    int32_t right;
    bool operator<(const Candidate& other) const {  // The top of a priority queue is the largest.
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  void FindJoins();
  void EncodeSegment(absl::string_view text, bool prefix, std::vector<int32_t>* ids) const;
  void EncodeCharacters(absl::string_view text, bool prefix, std::vector<int32_t>* ids) const;
  void EncodeWord(absl::string_view word, std::vector<int32_t>* ids) const;
  void MergeWord(absl::string_view word, std::vector<int32_t>* ids) const;
  void MergeShortWord(absl::string_view word, std::vector<int32_t>* ids) const;
  void AppendUnknown(absl::string_view character, bool first, std::vector<int32_t>* ids) const;
  int32_t CharacterId(int32_t code_point) const {
    if (static_cast<size_t>(code_point) < low_ids_.size()) return low_ids_[static_cast<size_t>(code_point)];
    const auto found = character_ids_.find(code_point);
    return found == character_ids_.end() ? kNoToken : found->second;
  }

  const BpeModel model_;
  const std::unique_ptr<PreTokenizer> pre_tokenizer_;
  const bool characters_;
  std::bitset<1 << 16> joins_;  // Characters: by 256 * byte + next byte, whether a token may hold both. See FindJoins.
  int32_t unknown_ = -1;
  std::array<int32_t, 256> byte_ids_;
  std::array<int32_t, 256> single_ids_;  // Of a word of this byte alone; -1: see EncodeWord.
  std::array<int32_t, 0x800> low_ids_;   // character_ids_ of two bytes or fewer.
  absl::flat_hash_map<int32_t, int32_t> character_ids_;
  absl::flat_hash_map<std::string, int32_t> whole_words_;
  PairTable by_pair_;
  std::vector<Merge> by_bytes_;  // Bytes: of two of them, by 256 * first + second.
  Literals literals_, normalized_literals_;

  mutable WordCache cache_;
  mutable std::vector<int32_t> word_ids_;  // Of EncodeWord.
  mutable std::vector<Symbol> symbols_;    // Of MergeWord.
  mutable std::vector<Candidate> heap_;
};

uint64_t BpeTokenizer::hash() const {
  std::string head = absl::StrCat("bpe ", end_of_document(), " ", pre_tokenizer_->Fingerprint());
  if (characters_) head += "\ncharacters";
  if (model_.rank_by_result) head += "\nrank by result";
  for (const int32_t id : model_.tied) absl::StrAppend(&head, "\ntied ", id);
  if (model_.ignore_merges) head += "\nignore merges";
  if (model_.form != BpeModel::Form::kNone) head += model_.form == BpeModel::Form::kNfc ? "\nnfc 9" : "\nnfkc 9";
  if (model_.collapse_spaces) head += "\ncollapse spaces";
  if (model_.prefix != BpeModel::Prefix::kNone) absl::StrAppend(&head, "\nprefix ", static_cast<int>(model_.prefix));
  if (model_.prefix_unless_space) head += "\nunless space";
  uint64_t hash = Fnv1a(head);
  for (const BpeModel::Token& token : model_.tokens) {
    hash = Fnv1a(absl::StrCat(token.text.size(), ":", token.text), hash);
    // Kinds that end_of_document, unit and text do not tell already.
    if (token.kind == BpeModel::Kind::kLiteral) hash = Fnv1a(token.normalized ? "normalized" : "literal", hash);
    if (token.kind == BpeModel::Kind::kByte || token.kind == BpeModel::Kind::kUnknown) hash = Fnv1a("\\", hash);
  }
  for (const BpeModel::Rule& rule : model_.rules) hash = Fnv1a(absl::StrCat(rule.left, " ", rule.right, ";"), hash);
  return hash;
}

void BpeTokenizer::EncodePart(absl::string_view text, bool continued, std::vector<int32_t>* ids) const {
  std::string collapsed;
  if (model_.collapse_spaces) {
    for (const char c : text) {
      if (c != ' ' || (!collapsed.empty() ? collapsed.back() != ' ' : continued)) collapsed.push_back(c);
    }
    while (!collapsed.empty() && collapsed.back() == ' ') collapsed.pop_back();
    text = collapsed;
  }
  bool first = !continued;  // Where a space may come before what follows.
  const auto literal = [&](int32_t id) {
    ids->push_back(id);
    first = model_.prefix == BpeModel::Prefix::kSegment;
  };
  const auto gap = [&](absl::string_view segment) {
    std::string storage;
    segment = Normalized(segment, model_.form, &storage);
    normalized_literals_.Split(
        segment,
        [&](absl::string_view part) {
          EncodeSegment(part, first && model_.prefix != BpeModel::Prefix::kNone, ids);
          first = false;
        },
        literal);
  };
  SplitValid(
      text, [&](absl::string_view valid) { literals_.Split(valid, gap, literal); },
      [&](absl::string_view invalid) {
        if (!characters_) {
          for (const char c : invalid) ids->push_back(byte_ids_[static_cast<uint8_t>(c)]);
        } else {
          for (size_t i = 0; i < invalid.size(); ++i) gap(kReplacement);
        }
        first = false;
      });
}

void BpeTokenizer::EncodeSegment(absl::string_view text, bool prefix, std::vector<int32_t>* ids) const {
  if (prefix && model_.prefix_unless_space) {
    prefix = text[0] != ' ' && !(characters_ && text.substr(0, 3) == "\xE2\x96\x81");
  }
  if (characters_) return EncodeCharacters(text, prefix, ids);
  std::string storage;
  if (prefix) {
    storage = absl::StrCat(" ", text);
    text = storage;
  }
  pre_tokenizer_->Split(text, [&](absl::string_view word) { EncodeWord(word, ids); });
}

// What no merge joins can be encoded apart: two characters that are neighbours in no rule's result stay in different
// tokens. Told by the last byte of the one and the first of the other, which says "may be joined" too often, never too
// seldom.
void BpeTokenizer::FindJoins() {
  const auto join = [this](uint8_t left, uint8_t right) { joins_[static_cast<size_t>(left) << 8 | right] = true; };
  for (int left = 0; left < 256; ++left) {
    for (int right = 0x80; right < 0xC0; ++right) join(static_cast<uint8_t>(left), static_cast<uint8_t>(right));
  }
  for (const BpeModel::Rule& rule : model_.rules) {
    const std::string& text = model_.tokens[static_cast<size_t>(rule.id)].text;
    for (size_t i = 1; i < text.size(); ++i) join(static_cast<uint8_t>(text[i - 1]), static_cast<uint8_t>(text[i]));
  }
  // U+2581 (E2 96 81) stands for a space.
  for (size_t byte = 0; byte < 256; ++byte) {
    if (joins_[byte << 8 | ' ']) joins_[byte << 8 | 0xE2] = true;
    if (joins_[size_t{' '} << 8 | byte]) joins_[size_t{0x81} << 8 | byte] = true;
  }
  if (joins_[size_t{' '} << 8 | ' ']) join(0x81, 0xE2);
}

void BpeTokenizer::EncodeCharacters(absl::string_view text, bool prefix, std::vector<int32_t>* ids) const {
  const auto end_of_word = [&](size_t at) {  // Of the word that the byte before `at` belongs to.
    for (; at < text.size(); ++at) {
      if (!joins_[static_cast<size_t>(static_cast<uint8_t>(text[at - 1])) << 8 | static_cast<uint8_t>(text[at])]) break;
    }
    return at;
  };
  size_t at = 0;
  if (prefix) {
    if (joins_[size_t{' '} << 8 | static_cast<uint8_t>(text[0])]) at = end_of_word(1);
    EncodeWord(absl::StrCat(" ", text.substr(0, at)), ids);
  }
  while (at < text.size()) {
    const size_t end = end_of_word(at + 1);
    EncodeWord(text.substr(at, end - at), ids);
    at = end;
  }
}

void BpeTokenizer::EncodeWord(absl::string_view word, std::vector<int32_t>* ids) const {
  if (const int32_t id = single_ids_[static_cast<uint8_t>(word[0])]; word.size() == 1 && id >= 0) {
    ids->push_back(id);
    return;
  }
  const auto append = [&](const int32_t* first, size_t count) {
    if (unknown_ >= 0 && *first == unknown_ && !ids->empty() && ids->back() == unknown_) {  // A run is one.
      ++first;
      --count;
    }
    ids->insert(ids->end(), first, first + count);
  };
  WordCache::Line* line = nullptr;
  if (word.size() <= WordCache::kMaxWordBytes) {
    bool found = false;
    line = cache_.Find(word, &found);
    if (found) return append(line->ids.data(), line->count);
  }
  word_ids_.clear();
  if (const auto whole = whole_words_.find(word); whole != whole_words_.end()) {
    word_ids_.push_back(whole->second);
  } else if (word.size() <= kMaxShortWordBytes) {
    MergeShortWord(word, &word_ids_);
  } else {
    while (word.size() > kMaxWordBytes) {
      size_t cut = kMaxWordBytes;
      while ((static_cast<uint8_t>(word[cut]) & 0xC0) == 0x80) --cut;
      MergeWord(word.substr(0, cut), &word_ids_);
      word.remove_prefix(cut);
    }
    MergeWord(word, &word_ids_);
  }
  if (line != nullptr) {
    if (word_ids_.size() <= WordCache::kMaxIds) {
      line->count = static_cast<uint8_t>(word_ids_.size());
      std::copy(word_ids_.begin(), word_ids_.end(), line->ids.begin());
    } else {
      line->size = 0;
    }
  }
  append(word_ids_.data(), word_ids_.size());
}

// A character that is no token. `first`: nothing of the word is in `ids` yet.
void BpeTokenizer::AppendUnknown(absl::string_view character, bool first, std::vector<int32_t>* ids) const {
  if (unknown_ >= 0) {
    if (first || ids->back() != unknown_) ids->push_back(unknown_);
    return;
  }
  if (character == " ") character = "\xE2\x96\x81";
  for (const char c : character) ids->push_back(byte_ids_[static_cast<uint8_t>(c)]);
}

// As MergeWord, in O(n^2) without a heap.
void BpeTokenizer::MergeShortWord(absl::string_view word, std::vector<int32_t>* ids) const {
  std::array<int32_t, kMaxShortWordBytes> symbols;
  std::array<uint8_t, kMaxShortWordBytes + 1> begin;  // Characters: of the symbol, in the word.
  std::array<Merge, kMaxShortWordBytes> merges;       // Of a symbol and its successor.
  size_t n = 0;
  if (!characters_) {
    n = word.size();
    uint8_t left = static_cast<uint8_t>(word[0]);
    symbols[0] = byte_ids_[left];
    for (size_t i = 1; i < n; ++i) {
      const uint8_t right = static_cast<uint8_t>(word[i]);
      symbols[i] = byte_ids_[right];
      merges[i - 1] = by_bytes_[static_cast<size_t>(left) << 8 | right];
      left = right;
    }
  } else {
    for (size_t i = 0; i < word.size(); ++n) {
      begin[n] = static_cast<uint8_t>(i);
      symbols[n] = CharacterId(NextCharacter(word, &i));
    }
    begin[n] = static_cast<uint8_t>(word.size());
    for (size_t i = 0; i + 1 < n; ++i) merges[i] = by_pair_.At(symbols[i], symbols[i + 1]);
  }
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (merges[best].rank == kNoToken) break;
    symbols[best] = merges[best].id;
    --n;
    std::copy(symbols.begin() + best + 2, symbols.begin() + n + 1, symbols.begin() + best + 1);
    if (best + 1 < n) std::copy(merges.begin() + best + 2, merges.begin() + n, merges.begin() + best + 1);
    if (characters_) std::copy(begin.begin() + best + 2, begin.begin() + n + 2, begin.begin() + best + 1);
    if (best > 0) merges[best - 1] = by_pair_.At(symbols[best - 1], symbols[best]);
    if (best + 1 < n) merges[best] = by_pair_.At(symbols[best], symbols[best + 1]);
  }
  const size_t start = ids->size();
  for (size_t i = 0; i < n; ++i) {
    if (symbols[i] != kNoToken) {
      ids->push_back(symbols[i]);
    } else {
      AppendUnknown(word.substr(begin[i], static_cast<size_t>(begin[i + 1]) - begin[i]), ids->size() == start, ids);
    }
  }
}

// The rule of the lowest rank first, the leftmost of equals: O(n log n) for a word of n symbols.
void BpeTokenizer::MergeWord(absl::string_view word, std::vector<int32_t>* ids) const {
  symbols_.clear();
  for (size_t i = 0; i < word.size();) {
    const int32_t n = static_cast<int32_t>(symbols_.size());
    const int32_t begin = static_cast<int32_t>(i);
    const int32_t id = characters_ ? CharacterId(NextCharacter(word, &i)) : byte_ids_[static_cast<uint8_t>(word[i++])];
    symbols_.push_back({id, n - 1, n + 1, begin});
  }
  symbols_.back().next = -1;
  const auto at = [this](int32_t i) -> Symbol& { return symbols_[static_cast<size_t>(i)]; };
  std::vector<Candidate>& heap = heap_;
  heap.clear();
  const auto consider = [&](int32_t i) {
    if (i < 0 || at(i).next < 0) return;
    const int32_t left = at(i).id;
    const int32_t right = at(at(i).next).id;
    const Merge merge = by_pair_.At(left, right);
    if (merge.rank == kNoToken) return;
    heap.push_back({merge.rank, i, left, right});
    std::push_heap(heap.begin(), heap.end());
  };
  for (int32_t i = 0; i < static_cast<int32_t>(symbols_.size()); ++i) consider(i);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = at(top.position);
    if (left.id != top.left || left.next < 0) continue;  // Merged away meanwhile.
    Symbol& right = at(left.next);
    if (right.id != top.right) continue;
    left.id = by_pair_.At(top.left, top.right).id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) at(left.next).previous = top.position;
    consider(left.previous);
    consider(top.position);
  }
  const size_t start = ids->size();
  for (int32_t i = 0; i >= 0; i = at(i).next) {
    const Symbol& symbol = at(i);
    if (symbol.id != kNoToken) {
      ids->push_back(symbol.id);
      continue;
    }
    const size_t begin = static_cast<size_t>(symbol.begin);
    const size_t end = symbol.next < 0 ? word.size() : static_cast<size_t>(at(symbol.next).begin);
    AppendUnknown(word.substr(begin, end - begin), ids->size() == start, ids);
  }
}

class BpeTrainer : public TokenizerTrainer {
 public:
  explicit BpeTrainer(int64_t vocab_size)
      : vocab_size_(vocab_size), splitter_(PreTokenizer::Create({{kGpt2Pattern}}).value()) {}

  void Add(absl::string_view text) override {
    const auto add = [&](absl::string_view word) {
      if (word.size() > kMaxTrainingWordBytes) return;
      const auto found = words_.find(word);
      if (found != words_.end()) {
        ++found->second;
        return;
      }
      if (words_.size() >= kMaxTrainingWords) Forget();
      words_[std::string(word)] = 1;
    };
    SplitValid(
        text, [&](absl::string_view valid) { splitter_->Split(valid, add); }, [](absl::string_view) {});
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
  std::unique_ptr<PreTokenizer> splitter_;
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
  std::vector<BpeModel::Rule> rules;
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
    rules.push_back({Left(top.pair), Right(top.pair), id});
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
  BpeModel model;
  for (std::string& token : tokens) model.tokens.push_back({std::move(token), BpeModel::Kind::kText});
  model.rules = std::move(rules);
  model.split = {{kGpt2Pattern}};
  model.end_of_document = static_cast<int32_t>(model.tokens.size());
  model.tokens.push_back({kEndOfDocument, BpeModel::Kind::kSpecial});
  pairs_ = {};
  word_list_ = {};
  symbols_ = {};
  return MakeBpe(std::move(model));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpe(BpeModel model) {
  std::array<bool, 256> bytes = {};
  bool unknown = false;
  bool fallback = false;
  const BpeModel::Kind kind = model.unit == BpeModel::Unit::kByte ? BpeModel::Kind::kText : BpeModel::Kind::kByte;
  for (const BpeModel::Token& token : model.tokens) {
    if (token.kind == kind && token.text.size() == 1) bytes[static_cast<uint8_t>(token.text[0])] = true;
    fallback |= token.kind == BpeModel::Kind::kByte;
    unknown |= token.kind == BpeModel::Kind::kUnknown;
  }
  const auto missing = std::find(bytes.begin(), bytes.end(), false);
  const bool complete = missing == bytes.end();
  if (!complete && (model.unit == BpeModel::Unit::kByte || fallback || !unknown)) {
    const int64_t byte = missing - bytes.begin();
    return absl::FailedPreconditionError(
        absl::StrCat("the vocabulary lacks the byte ", byte, " (\"", ByteName(static_cast<uint8_t>(byte)), "\")"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<PreTokenizer> pre_tokenizer, PreTokenizer::Create(model.split));
  return std::make_unique<BpeTokenizer>(std::move(model), std::move(pre_tokenizer));
}

std::unique_ptr<TokenizerTrainer> NewBpeTrainer(int64_t vocab_size) { return std::make_unique<BpeTrainer>(vocab_size); }

}  // namespace mt
