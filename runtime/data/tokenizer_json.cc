#include "runtime/data/tokenizer_json.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"

namespace mt {
namespace {

using nlohmann::json;

constexpr char kUnderscore[] = "\xE2\x96\x81";  // U+2581, SentencePiece's space.
constexpr char kEndMark[] = "mt_end_of_document";
constexpr char kRankMark[] = "mt_rank_by_result";
constexpr char kTiedMark[] = "mt_tied";
constexpr char kOnceMark[] = "mt_prefix_once";
constexpr char kCollapseMark[] = "mt_collapse_spaces";
constexpr const char* kUsualEnds[] = {kEndOfDocument, "<|end_of_text|>", "</s>", "<eos>"};
constexpr int64_t kMaxHoles = 4096;

struct NameTable {
  std::array<int32_t, 256> code_point;
  absl::flat_hash_map<int32_t, uint8_t> byte;

  static const NameTable& Get() {
    static const NameTable& table = *new NameTable;
    return table;
  }

 private:
  NameTable() {
    int32_t next = 256;
    for (int32_t b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      code_point[static_cast<size_t>(b)] = itself ? b : next++;
      byte[code_point[static_cast<size_t>(b)]] = static_cast<uint8_t>(b);
    }
  }
};

const json& Member(const json& object, const char* key) {
  static const json& null = *new json;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

std::string Text(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 60); }

template <typename... Parts>
absl::Status Fault(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat(parts...));
}

absl::Status Unsupported(absl::string_view what) {
  return Fault(what,
               " is not supported; this program reads BPE over bytes as GPT-2 has it, or over characters as "
               "Llama 2 has it");
}

bool IsNullOr(const json& value, const json& other) { return value.is_null() || value == other; }

// The members of `list` (a key such as "normalizers") of an object of type Sequence, or the object alone.
absl::StatusOr<std::vector<json>> Sequence(const json& object, const char* where, const char* list) {
  if (object.is_null()) return std::vector<json>();
  if (Member(object, "type") != "Sequence") return std::vector<json>{object};
  const json& members = Member(object, list);
  if (!members.is_array() || members.size() > 64) return Fault("\"", where, "\" is a Sequence without \"", list, "\"");
  return std::vector<json>(members.begin(), members.end());
}

// "normalizer": nothing, NFC, NFKC, or Llama 2's prepended and replaced spaces.
absl::Status ReadNormalizer(const json& normalizer, BpeModel* model) {
  ASSIGN_OR_RETURN(const std::vector<json> steps, Sequence(normalizer, "normalizer", "normalizers"));
  bool replaces = false;
  for (const json& step : steps) {
    const json& type = Member(step, "type");
    if ((type == "NFC" || type == "NFKC") && !replaces && model->prefix == BpeModel::Prefix::kNone) {
      model->form = std::max(model->form, type == "NFC" ? BpeModel::Form::kNfc : BpeModel::Form::kNfkc);
    } else if (type == "Prepend" && Member(step, "prepend") == kUnderscore) {
      model->prefix = BpeModel::Prefix::kSegment;
      model->unit = BpeModel::Unit::kCharacter;
    } else if (type == "Replace" && Member(step, "content") == kUnderscore &&
               Member(Member(step, "pattern"), "String") == " ") {
      replaces = true;
      model->unit = BpeModel::Unit::kCharacter;
    } else {
      return Unsupported(absl::StrCat("\"normalizer\" of type ", Text(type)));
    }
  }
  if (model->unit == BpeModel::Unit::kCharacter && !replaces) {
    return Unsupported("a \"normalizer\" that prepends U+2581 but does not replace spaces by it");
  }
  return absl::OkStatus();
}

std::string EscapedPattern(absl::string_view text) {
  std::string out;
  for (const char c : text) {
    if (absl::ascii_ispunct(static_cast<unsigned char>(c))) out += '\\';
    out += c;
  }
  return out;
}

absl::Status ReadPreTokenizer(const json& pre_tokenizer, BpeModel* model) {
  ASSIGN_OR_RETURN(const std::vector<json> steps, Sequence(pre_tokenizer, "pre_tokenizer", "pretokenizers"));
  bool byte_level = false;
  for (const json& step : steps) {
    const json& type = Member(step, "type");
    const auto unsupported = [&](absl::string_view what) {
      return Unsupported(absl::StrCat("\"pre_tokenizer\" of type ", Text(type), what));
    };
    if (byte_level) return unsupported(" after ByteLevel");
    if (type == "Metaspace" && steps.size() == 1) {
      if (Member(step, "replacement") != kUnderscore) return unsupported(" with another character than U+2581");
      if (Member(step, "split") != false) return unsupported(" with \"split\" other than false");
      const json& scheme = Member(step, "prepend_scheme");
      if (scheme != "first" && scheme != "never" && scheme != "always") {
        return unsupported(absl::StrCat(" with \"prepend_scheme\" ", Text(scheme)));
      }
      if (model->form != BpeModel::Form::kNone) return unsupported(" after a normalizer");
      if (model->unit == BpeModel::Unit::kCharacter) return unsupported(" after a normalizer that replaces spaces");
      model->unit = BpeModel::Unit::kCharacter;
      model->prefix = scheme == "first"    ? BpeModel::Prefix::kText
                      : scheme == "always" ? BpeModel::Prefix::kSegment
                                           : BpeModel::Prefix::kNone;
      model->prefix_unless_space = model->prefix != BpeModel::Prefix::kNone;
      return absl::OkStatus();
    }
    if (model->unit == BpeModel::Unit::kCharacter) return unsupported(" after a normalizer that replaces spaces");
    if (type == "ByteLevel") {
      byte_level = true;
      const json& prefix = Member(step, "add_prefix_space");
      if (!prefix.is_boolean()) return unsupported(" without \"add_prefix_space\"");
      if (prefix == true && !model->split.empty()) return unsupported(" with \"add_prefix_space\" after a split");
      if (prefix == true) {
        model->prefix = BpeModel::Prefix::kSegment;
        model->prefix_unless_space = true;
      }
      const json& use_regex = Member(step, "use_regex");
      if (!use_regex.is_null() && !use_regex.is_boolean())
        return unsupported(" with a \"use_regex\" that is no boolean");
      if (use_regex != false) model->split.push_back({kGpt2Pattern});
    } else if (type == "Digits") {
      const json& individual = Member(step, "individual_digits");
      model->split.push_back({individual == true ? "\\p{N}" : "\\p{N}+"});
    } else if (type == "Split") {
      const json& pattern = Member(step, "pattern");
      const json& behavior = Member(step, "behavior");
      const bool invert = Member(step, "invert") == true;
      if (behavior != "Isolated" && !(behavior == "Removed" && invert)) {
        return unsupported(absl::StrCat(" with \"behavior\" ", Text(behavior), invert ? " inverted" : ""));
      }
      const json& regex = Member(pattern, "Regex");
      const json& string = Member(pattern, "String");
      if (!regex.is_string() && !string.is_string()) return unsupported(" without a pattern");
      model->split.push_back({regex.is_string() ? regex.get_ref<const std::string&>()
                                                : EscapedPattern(string.get_ref<const std::string&>()),
                              behavior == "Removed"});
    } else {
      return unsupported("");
    }
  }
  if (model->unit == BpeModel::Unit::kByte && !byte_level) {
    return Unsupported("\"pre_tokenizer\" without ByteLevel");
  }
  return absl::OkStatus();
}

// Adds the added tokens that a text can hold, and finds the one that ends documents.
absl::Status ReadAddedTokens(const json& added, absl::string_view wanted, BpeModel* model) {
  if (!added.is_array()) return Fault("\"added_tokens\" is not a list");
  size_t rank = std::size(kUsualEnds);
  for (const json& token : added) {
    const json& content = Member(token, "content");
    const json& id = Member(token, "id");
    if (!content.is_string() || content.get_ref<const std::string&>().empty()) {
      return Fault("an added token has no \"content\"");
    }
    const std::string& text = content.get_ref<const std::string&>();
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(kMaxVocabSize)) {
      return Fault("added token ", Text(content), " has no id, or one out of range");
    }
    const size_t at = id.get<size_t>();
    if (at >= model->tokens.size()) model->tokens.resize(at + 1);
    BpeModel::Token& slot = model->tokens[at];
    if (slot.kind == BpeModel::Kind::kSpecial || slot.kind == BpeModel::Kind::kLiteral ||
        (slot.kind != BpeModel::Kind::kHole && slot.text != text)) {
      return Fault("the id ", at, " of added token ", Text(content),
                   " is not the one that the vocabulary leaves to it");
    }
    const bool special = Member(token, "special") == true;
    if (!special) {
      for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
        if (Member(token, flag) == true)
          return Unsupported(absl::StrCat("added token ", Text(content), " with ", flag));
      }
    }
    slot = {text, special ? BpeModel::Kind::kSpecial : BpeModel::Kind::kLiteral, Member(token, "normalized") == true};
    if (model->unit == BpeModel::Unit::kCharacter && !special) {
      if (slot.normalized) return Unsupported(absl::StrCat("added token ", Text(content), " with normalized"));
    }
    if (!special && wanted != text) continue;
    if (wanted == text || (wanted.empty() && Member(token, kEndMark) == true)) {
      model->end_of_document = static_cast<int32_t>(at);
      slot.kind = BpeModel::Kind::kSpecial;
      model->rank_by_result = Member(token, kRankMark) == true;
      model->tied.clear();
      for (const json& tied : Member(token, kTiedMark)) {
        if (!tied.is_number_unsigned() || tied.get<uint64_t>() >= static_cast<uint64_t>(kMaxVocabSize)) {
          return Fault("\"", kTiedMark, "\" of added token ", Text(content), " has ", Text(tied), ", which is no id");
        }
        model->tied.push_back(tied.get<int32_t>());
      }
      if (Member(token, kOnceMark) == true && model->prefix != BpeModel::Prefix::kNone) {
        model->prefix = BpeModel::Prefix::kText;
      }
      model->collapse_spaces = Member(token, kCollapseMark) == true;
      rank = 0;
    } else if (wanted.empty()) {
      const size_t usual =
          static_cast<size_t>(std::find(std::begin(kUsualEnds), std::end(kUsualEnds), text) - std::begin(kUsualEnds));
      if (usual < rank) {
        rank = usual;
        model->end_of_document = static_cast<int32_t>(at);
      }
    }
  }
  if (model->end_of_document < 0) {
    return Fault("there is no added token ",
                 wanted.empty() ? "<|endoftext|>, <|end_of_text|>, </s> or <eos>" : Text(json(std::string(wanted))),
                 " to end documents; name one that there is as \"eos_token\" in a tokenizer_config.json beside it");
  }
  return absl::OkStatus();
}

// A token of the vocabulary as the engine has it. False: it is not written as it should be.
bool ReadToken(const std::string& name, bool fallback, const std::string& unknown, BpeModel* model, size_t id) {
  BpeModel::Token& token = model->tokens[id];
  token.kind = BpeModel::Kind::kText;
  if (model->unit == BpeModel::Unit::kByte) return BytesOfNames(name, &token.text) && !token.text.empty();
  if (!unknown.empty() && name == unknown) {
    token = {name, BpeModel::Kind::kUnknown};
    return true;
  }
  if (fallback && name.size() == 6 && name.substr(0, 3) == "<0x" && name[5] == '>') {
    unsigned byte = 0;
    if (std::sscanf(name.c_str(), "<0x%2X>", &byte) == 1 && name == absl::StrFormat("<0x%02X>", byte)) {
      token = {std::string(1, static_cast<char>(byte)), BpeModel::Kind::kByte};
      return true;
    }
  }
  token.text = absl::StrReplaceAll(name, {{kUnderscore, " "}});
  return !name.empty();
}

absl::Status ReadVocabulary(const json& json_model, const json& added, BpeModel* model,
                            absl::flat_hash_map<std::string, int32_t>* ids) {
  const json& vocab = Member(json_model, "vocab");
  if (!vocab.is_object()) return Fault("\"vocab\" of the model is not an object");
  absl::flat_hash_set<std::string> added_names;
  if (added.is_array()) {
    for (const json& token : added) {
      const json& content = Member(token, "content");
      if (content.is_string()) added_names.insert(content.get<std::string>());
    }
  }
  const bool fallback = Member(json_model, "byte_fallback") == true;
  const json& unknown_json = Member(json_model, "unk_token");
  const std::string unknown = unknown_json.is_string() ? unknown_json.get<std::string>() : "";
  const uint64_t limit = std::min<uint64_t>(vocab.size() + added_names.size() + kMaxHoles, kMaxVocabSize);
  model->tokens.reserve(vocab.size());
  for (const auto& item : vocab.items()) {
    const json& value = item.value();
    if (!value.is_number_unsigned() || value.get<uint64_t>() >= limit) {
      return Fault("token ", Text(json(item.key())), " has the id ", Text(value), "; ids are 0 to ", limit - 1);
    }
    const size_t id = value.get<size_t>();
    if (id >= model->tokens.size()) model->tokens.resize(id + 1);
    if (model->tokens[id].kind != BpeModel::Kind::kHole) {
      return Fault("token ", Text(json(item.key())), " has the id ", id, ", which another token has");
    }
    if (added_names.contains(item.key())) {  // Text as it is; special or literal is told later.
      const bool is_unknown = model->unit == BpeModel::Unit::kCharacter && item.key() == unknown;
      model->tokens[id] = {item.key(), is_unknown ? BpeModel::Kind::kUnknown : BpeModel::Kind::kText};
      (*ids)[item.key()] = static_cast<int32_t>(id);
      continue;
    }
    if (!ReadToken(item.key(), fallback, unknown, model, id)) {
      return Fault("token ", Text(json(item.key())), " is not written in byte-level characters");
    }
    (*ids)[item.key()] = static_cast<int32_t>(id);
  }
  return absl::OkStatus();
}

absl::Status ReadMerges(const json& merges, const absl::flat_hash_map<std::string, int32_t>& ids, BpeModel* model) {
  if (!merges.is_array()) return Fault("\"merges\" of the model is not a list");
  absl::flat_hash_set<std::pair<int32_t, int32_t>> seen;
  model->rules.reserve(merges.size());
  for (const json& merge : merges) {
    std::vector<std::string> parts;
    if (merge.is_string()) parts = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
    if (merge.is_array()) {
      for (const json& part : merge) {
        if (part.is_string()) parts.push_back(part.get_ref<const std::string&>());
      }
    }
    const size_t rank = model->rules.size();
    if (parts.size() != 2) return Fault("merge ", rank, " is not a pair of tokens");
    const auto left = ids.find(parts[0]);
    const auto right = ids.find(parts[1]);
    const auto whole = ids.find(parts[0] + parts[1]);
    if (left == ids.end() || right == ids.end() || whole == ids.end()) {
      return Fault("merge ", rank, " (", Text(json(parts[0])), " and ", Text(json(parts[1])),
                   ") has a token that the vocabulary lacks");
    }
    if (!seen.insert({left->second, right->second}).second) return Fault("merge ", rank, " is given twice");
    model->rules.push_back({left->second, right->second, whole->second});
  }
  return absl::OkStatus();
}

}  // namespace

std::string ByteName(uint8_t byte) {
  std::string name;
  AppendUtf8(NameTable::Get().code_point[byte], &name);
  return name;
}

std::string ByteNames(absl::string_view bytes) {
  std::string name;
  for (const char c : bytes) AppendUtf8(NameTable::Get().code_point[static_cast<uint8_t>(c)], &name);
  return name;
}

bool BytesOfNames(absl::string_view name, std::string* bytes) {
  const NameTable& table = NameTable::Get();
  bytes->clear();
  while (!name.empty()) {
    const Utf8Char c = DecodeUtf8(name);
    const auto found = table.byte.find(c.code_point);
    if (found == table.byte.end()) return false;
    bytes->push_back(static_cast<char>(found->second));
    name.remove_prefix(static_cast<size_t>(c.size_bytes));
  }
  return true;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(const json& json_file, absl::string_view contents,
                                                              absl::string_view end_of_document) {
  for (const char* key : {"truncation", "padding"}) {
    if (!Member(json_file, key).is_null()) return Unsupported(absl::StrCat("\"", key, "\""));
  }
  const json& json_model = Member(json_file, "model");
  if (!json_model.is_object()) return Fault("\"model\" is not an object");
  const json& type = Member(json_model, "type");
  if (!IsNullOr(type, "BPE")) return Unsupported(absl::StrCat("a model of type ", Text(type)));
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!IsNullOr(Member(json_model, key), "")) return Unsupported(absl::StrCat("\"", key, "\" of the model"));
  }
  BpeModel model;
  RETURN_IF_ERROR(ReadNormalizer(Member(json_file, "normalizer"), &model));
  RETURN_IF_ERROR(ReadPreTokenizer(Member(json_file, "pre_tokenizer"), &model));
  const bool characters = model.unit == BpeModel::Unit::kCharacter;
  model.ignore_merges = Member(json_model, "ignore_merges") == true;
  const bool fallback = Member(json_model, "byte_fallback") == true;
  if (fallback && !characters) return Unsupported("\"byte_fallback\" of a byte-level model");
  if (characters && model.ignore_merges) return Unsupported("\"ignore_merges\" of a model over characters");
  if (characters && !fallback && Member(json_model, "fuse_unk") != true) {
    return Unsupported("\"fuse_unk\" other than true without \"byte_fallback\"");
  }
  const json& added = Member(json_file, "added_tokens");
  absl::flat_hash_map<std::string, int32_t> ids;
  RETURN_IF_ERROR(ReadVocabulary(json_model, added, &model, &ids));
  RETURN_IF_ERROR(ReadMerges(Member(json_model, "merges"), ids, &model));
  RETURN_IF_ERROR(ReadAddedTokens(added, end_of_document, &model));
  // The unknown token is listed among the added ones, too.
  const json& unknown = Member(json_model, "unk_token");
  for (BpeModel::Token& token : model.tokens) {
    if (characters && token.kind == BpeModel::Kind::kSpecial && unknown == token.text) {
      token.kind = BpeModel::Kind::kUnknown;
    }
  }
  const int64_t holes = std::count_if(model.tokens.begin(), model.tokens.end(),
                                      [](const BpeModel::Token& token) { return token.kind == BpeModel::Kind::kHole; });
  if (holes > kMaxHoles) return Fault("the ids have ", holes, " holes, the limit is ", kMaxHoles);
  for (const BpeModel::Rule& rule : model.rules) {
    for (const int32_t id : {rule.left, rule.right, rule.id}) {
      if (model.tokens[static_cast<size_t>(id)].kind == BpeModel::Kind::kSpecial) {
        return Fault("a merge has the special token ", Text(json(model.tokens[static_cast<size_t>(id)].text)));
      }
    }
  }
  if (!end_of_document.empty()) {
    json marked = json_file;
    for (json& token : marked["added_tokens"]) {
      if (Member(token, "content") == std::string(end_of_document)) token[kEndMark] = true;
    }
    model.source = absl::StrCat(marked.dump(), "\n");
  } else {
    model.source = std::string(contents);
  }
  return MakeBpe(std::move(model));
}

std::string WriteTokenizerJson(const BpeModel& model) {
  const auto quote = [](absl::string_view text) { return json(std::string(text)).dump(); };
  const bool characters = model.unit == BpeModel::Unit::kCharacter;
  const auto name = [&](int32_t id) {
    const BpeModel::Token& token = model.tokens[static_cast<size_t>(id)];
    const auto is = [&](BpeModel::Kind kind) { return token.kind == kind; };
    if (is(BpeModel::Kind::kByte)) return absl::StrFormat("<0x%02X>", static_cast<uint8_t>(token.text[0]));
    if (!is(BpeModel::Kind::kText)) return token.text;
    return characters ? absl::StrReplaceAll(token.text, {{" ", kUnderscore}}) : ByteNames(token.text);
  };
  std::string marks;
  const auto mark = [&](const char* key) { absl::StrAppend(&marks, ", \"", key, "\": true"); };
  const bool once = characters && model.prefix == BpeModel::Prefix::kText && !model.prefix_unless_space;
  if (model.rank_by_result) mark(kRankMark);
  if (!model.tied.empty()) {
    absl::StrAppend(&marks, ", \"", kTiedMark, "\": [", absl::StrJoin(model.tied, ", "), "]");
  }
  if (once) mark(kOnceMark);
  if (model.collapse_spaces) mark(kCollapseMark);
  const std::string& end = model.tokens[static_cast<size_t>(model.end_of_document)].text;
  if (!marks.empty() || end != kEndOfDocument) mark(kEndMark);
  std::string added;
  std::string unknown = "null";
  bool fallback = false;
  for (size_t id = 0; id < model.tokens.size(); ++id) {
    const BpeModel::Token& token = model.tokens[id];
    fallback |= token.kind == BpeModel::Kind::kByte;
    if (token.kind == BpeModel::Kind::kUnknown) unknown = quote(token.text);
    if (token.kind != BpeModel::Kind::kSpecial && token.kind != BpeModel::Kind::kLiteral &&
        token.kind != BpeModel::Kind::kUnknown) {
      continue;
    }
    const auto boolean = [](bool value) { return value ? "true" : "false"; };
    absl::StrAppend(&added, added.empty() ? "\n" : ",\n", "{\"id\": ", id, ", \"content\": ", quote(token.text),
                    ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": ",
                    boolean(token.normalized), ", \"special\": ", boolean(token.kind != BpeModel::Kind::kLiteral));
    if (static_cast<int32_t>(id) == model.end_of_document) added += marks;
    added += "}";
  }
  std::string normalizer = "null";
  std::string pre_tokenizer = "null";
  std::string decoder;
  if (characters) {
    if (model.prefix != BpeModel::Prefix::kNone && !model.prefix_unless_space) {
      normalizer =
          "{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"\u2581\"}, {\"type\": "
          "\"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\u2581\"}]}";
    } else {
      pre_tokenizer = absl::StrCat("{\"type\": \"Metaspace\", \"replacement\": \"\u2581\", \"prepend_scheme\": \"",
                                   model.prefix == BpeModel::Prefix::kText      ? "first"
                                   : model.prefix == BpeModel::Prefix::kSegment ? "always"
                                                                                : "never",
                                   "\", \"split\": false}");
    }
    decoder = absl::StrCat(
        "{\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": \"\u2581\"}, "
        "\"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}",
        model.prefix == BpeModel::Prefix::kNone
            ? ""
            : ", {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}",
        "]}");
  } else {
    if (model.form == BpeModel::Form::kNfc) normalizer = "{\"type\": \"NFC\"}";
    if (model.form == BpeModel::Form::kNfkc) normalizer = "{\"type\": \"NFKC\"}";
    const bool gpt2 = model.split.size() == 1 && model.split[0].pattern == kGpt2Pattern && !model.split[0].drop_gaps;
    const auto byte_level = [&](bool use_regex) {
      return absl::StrCat("{\"type\": \"ByteLevel\", \"add_prefix_space\": ",
                          model.prefix == BpeModel::Prefix::kSegment ? "true" : "false",
                          ", \"trim_offsets\": true, \"use_regex\": ", use_regex ? "true" : "false", "}");
    };
    if (gpt2) {
      pre_tokenizer = byte_level(true);
    } else {
      pre_tokenizer = "{\"type\": \"Sequence\", \"pretokenizers\": [";
      for (const SplitStep& step : model.split) {
        absl::StrAppend(&pre_tokenizer, "{\"type\": \"Split\", \"pattern\": {\"Regex\": ", quote(step.pattern),
                        "}, \"behavior\": \"", step.drop_gaps ? "Removed" : "Isolated",
                        "\", \"invert\": ", step.drop_gaps ? "true" : "false", "}, ");
      }
      absl::StrAppend(&pre_tokenizer, byte_level(false), "]}");
    }
    decoder = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": true}";
  }
  std::string out =
      absl::StrCat("{\n\"version\": \"1.0\",\n\"truncation\": null,\n\"padding\": null,\n\"added_tokens\": [", added,
                   "\n],\n\"normalizer\": ", normalizer, ",\n\"pre_tokenizer\": ", pre_tokenizer,
                   ",\n\"post_processor\": null,\n\"decoder\": ", decoder,
                   ",\n\"model\": {\n\"type\": \"BPE\",\n\"dropout\": null,\n\"unk_token\": ", unknown,
                   ",\n\"continuing_subword_prefix\": null,\n\"end_of_word_suffix\": null,\n\"fuse_unk\": ",
                   characters ? "true" : "false", ",\n\"byte_fallback\": ", fallback ? "true" : "false");
  if (model.ignore_merges) absl::StrAppend(&out, ",\n\"ignore_merges\": true");
  absl::StrAppend(&out, ",\n\"vocab\": {");
  const char* separator = "\n";
  for (size_t id = 0; id < model.tokens.size(); ++id) {
    if (model.tokens[id].kind == BpeModel::Kind::kHole) continue;
    absl::StrAppend(&out, separator, quote(name(static_cast<int32_t>(id))), ": ", id);
    separator = ",\n";
  }
  absl::StrAppend(&out, "\n},\n\"merges\": [");
  separator = "\n";
  for (const BpeModel::Rule& rule : model.rules) {
    absl::StrAppend(&out, separator, quote(absl::StrCat(name(rule.left), " ", name(rule.right))));
    separator = ",\n";
  }
  absl::StrAppend(&out, "\n]\n}\n}\n");
  return out;
}

}  // namespace mt
