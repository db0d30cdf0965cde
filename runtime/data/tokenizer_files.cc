#include "runtime/data/tokenizer_files.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"
#include "proto/sentencepiece.pb.h"
#include "runtime/data/bpe.h"
#include "runtime/data/strict_json.h"
#include "runtime/data/tokenizer_json.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;
constexpr size_t kMaxTokenBytes = 4096;
constexpr char kUnderscore[] = "\xE2\x96\x81";  // U+2581.

struct Encoding {
  const char* name;
  const char* pattern;
  int32_t end_of_document;
};
// Source: tiktoken's openai_public.py; multilingual is Whisper's.
constexpr Encoding kEncodings[] = {
    {"gpt2", kGpt2Pattern, 50256},           {"r50k_base", kGpt2Pattern, 50256},
    {"p50k_base", kGpt2Pattern, 50256},      {"multilingual", kGpt2Pattern, 50257},
    {"cl100k_base", kCl100kPattern, 100257}, {"o200k_base", kO200kPattern, 199999},
};

std::string Quoted(absl::string_view text) {
  return json(std::string(text.substr(0, 60))).dump(-1, ' ', false, json::error_handler_t::replace);
}

template <typename... Parts>
absl::Status Fault(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat(parts...));
}

// Every way to make a token out of two others, in the order of the results' `ranks` and then of the left part's length.
void AddRulesByResult(const absl::flat_hash_map<std::string, int32_t>& ids, const std::vector<int32_t>& ranked,
                      BpeModel* model) {
  model->rank_by_result = true;
  for (const int32_t id : ranked) {
    const absl::string_view text = model->tokens[static_cast<size_t>(id)].text;
    for (size_t cut = 1; cut < text.size(); ++cut) {
      const auto left = ids.find(text.substr(0, cut));
      if (left == ids.end()) continue;
      const auto right = ids.find(text.substr(cut));
      if (right != ids.end()) model->rules.push_back({left->second, right->second, id});
    }
  }
}

absl::StatusOr<std::string> Read(const std::string& path) {
  absl::StatusOr<std::string> contents = ReadFile(path, kMaxFileBytes);
  if (absl::IsResourceExhausted(contents.status())) return Fault(contents.status().message());
  return contents;
}

// "eos_token" of tokenizer_config.json or special_tokens_map.json: a string, or an object with "content".
std::string EndOfFolder(const fs::path& folder) {
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const absl::StatusOr<std::string> contents = Read((folder / file).string());
    if (!contents.ok()) continue;
    const absl::StatusOr<json> config = ParseStrictJson(*contents);
    if (!config.ok()) continue;
    const auto end = config->find("eos_token");
    if (end == config->end()) continue;
    if (end->is_string()) return end->get<std::string>();
    if (end->is_object() && end->contains("content") && (*end)["content"].is_string()) return (*end)["content"];
  }
  return "";
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenGpt2Files(const fs::path& encoder, const fs::path& merges) {
  ASSIGN_OR_RETURN(const std::string encoder_json, Read(encoder.string()));
  ASSIGN_OR_RETURN(const std::string vocab_bpe, Read(merges.string()));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = ParseGpt2Files(encoder_json, vocab_bpe);
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), absl::StrCat(encoder.string(), ", ", merges.string()));
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenFolder(const fs::path& folder) {
  std::error_code ignored;
  const fs::path file = folder / "tokenizer.json";
  if (fs::exists(file, ignored)) {
    ASSIGN_OR_RETURN(const std::string contents, Read(file.string()));
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = ParseTokenizer(contents, EndOfFolder(folder));
    if (!tokenizer.ok()) {
      const fs::path model = folder / "tokenizer.model";
      return Annotate(tokenizer.status(),
                      fs::exists(model, ignored)
                          ? absl::StrCat(file.string(), " (its neighbour may do: spm:", model.string(), ")")
                          : file.string());
    }
    return tokenizer;
  }
  for (const auto& [encoder, merges] :
       {std::pair("vocab.json", "merges.txt"), std::pair("encoder.json", "vocab.bpe")}) {
    if (fs::exists(folder / encoder, ignored)) return OpenGpt2Files(folder / encoder, folder / merges);
  }
  if (fs::exists(folder / "tokenizer.model", ignored)) {
    return OpenTokenizer(absl::StrCat("spm:", (folder / "tokenizer.model").string()));
  }
  return absl::NotFoundError(absl::StrCat(folder.string(),
                                          ": has no tokenizer.json, vocab.json with merges.txt, encoder.json with "
                                          "vocab.bpe, or tokenizer.model"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(absl::string_view contents) {
  using proto::sentencepiece::ModelProto;
  using Type = ModelProto::SentencePiece;
  ModelProto file;
  if (!file.ParseFromArray(contents.data(), static_cast<int>(contents.size())) || file.pieces().empty()) {
    return Fault("is not a SentencePiece model");
  }
  const auto& trainer = file.trainer_spec();
  const auto& normalizer = file.normalizer_spec();
  const auto unsupported = [](absl::string_view what) {
    return Fault(what, " is not supported; this program reads BPE models with identity normalization");
  };
  switch (trainer.model_type()) {
    case proto::sentencepiece::TrainerSpec::UNIGRAM:
      return unsupported("a model of type unigram");
    case proto::sentencepiece::TrainerSpec::WORD:
      return unsupported("a model of type word");
    case proto::sentencepiece::TrainerSpec::CHAR:
      return unsupported("a model of type char");
    case proto::sentencepiece::TrainerSpec::BPE:
      break;
  }
  if (!normalizer.precompiled_charsmap().empty()) {
    return unsupported(absl::StrCat("the normalization ", Quoted(normalizer.name())));
  }
  if (!normalizer.escape_whitespaces()) return unsupported("\"escape_whitespaces\" off");
  if (trainer.treat_whitespace_as_suffix()) return unsupported("\"treat_whitespace_as_suffix\"");
  if (file.pieces_size() > kMaxVocabSize) {
    return Fault("has ", file.pieces_size(), " pieces, the limit is ", kMaxVocabSize);
  }

  BpeModel model;
  model.unit = BpeModel::Unit::kCharacter;
  model.prefix = normalizer.add_dummy_prefix() ? BpeModel::Prefix::kText : BpeModel::Prefix::kNone;
  model.collapse_spaces = normalizer.remove_extra_whitespaces();
  absl::flat_hash_map<std::string, int32_t> ids;
  absl::flat_hash_set<std::string> names;
  std::vector<int32_t> ranked;
  int32_t unknown = -1;
  for (const ModelProto::SentencePiece& piece : file.pieces()) {
    const int32_t id = static_cast<int32_t>(model.tokens.size());
    const std::string& name = piece.piece();
    if (name.empty() || name.size() > kMaxTokenBytes || ValidUtf8Prefix(name) != static_cast<int64_t>(name.size())) {
      return Fault("piece ", id, " is empty, longer than ", kMaxTokenBytes, " bytes or not UTF-8");
    }
    if (!names.insert(name).second) return Fault("piece ", id, " (", Quoted(name), ") is given twice");
    switch (piece.type()) {
      case Type::NORMAL: {
        const std::string text = absl::StrReplaceAll(name, {{kUnderscore, " "}});
        if (!std::isfinite(piece.score())) return Fault("piece ", id, " has no finite score");
        model.tokens.push_back({text, BpeModel::Kind::kText});
        if (!ids.insert({text, id}).second) return Fault("piece ", id, " (", Quoted(name), ") is given twice");
        ranked.push_back(id);
        break;
      }
      case Type::UNKNOWN:
        if (unknown >= 0) return Fault("pieces ", unknown, " and ", id, " are both of type unknown");
        unknown = id;
        model.tokens.push_back({name, BpeModel::Kind::kUnknown});
        break;
      case Type::CONTROL:
        model.tokens.push_back({name, BpeModel::Kind::kSpecial});
        break;
      case Type::USER_DEFINED:
        model.tokens.push_back({absl::StrReplaceAll(name, {{kUnderscore, " "}}), BpeModel::Kind::kLiteral});
        break;
      case Type::BYTE: {
        unsigned byte = 256;
        if (name.size() != 6 || !absl::SimpleHexAtoi(absl::string_view(name).substr(3, 2), &byte) ||
            name != absl::StrFormat("<0x%02X>", byte)) {
          return Fault("piece ", id, " (", Quoted(name), ") is of type byte but does not name one");
        }
        model.tokens.push_back({std::string(1, static_cast<char>(byte)), BpeModel::Kind::kByte});
        break;
      }
      case Type::UNUSED:
        return unsupported(absl::StrCat("piece ", id, " (", Quoted(name), ") of type unused"));
    }
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&file](int32_t a, int32_t b) { return file.pieces(a).score() > file.pieces(b).score(); });
  // Characters that only occur in longer pieces would merge in SentencePiece; a vocabulary that it trained has none.
  for (const auto& [text, id] : ids) {
    for (absl::string_view rest = text; !rest.empty();) {
      const absl::string_view c = rest.substr(0, static_cast<size_t>(DecodeUtf8(rest).size_bytes));
      if (!ids.contains(c)) {
        return unsupported(absl::StrCat("piece ", id, " (", Quoted(text), ") with the character ", Quoted(c),
                                        ", which is no piece itself,"));
      }
      rest.remove_prefix(c.size());
    }
  }
  AddRulesByResult(ids, ranked, &model);
  for (size_t i = 1; i < model.rules.size(); ++i) {  // Llama 2's and Mistral's runs of spaces have one score.
    const int32_t before = model.rules[i - 1].id;
    const int32_t id = model.rules[i].id;
    if (before != id && file.pieces(before).score() == file.pieces(id).score()) model.tied.push_back(id);
  }
  const int32_t end = trainer.eos_id();
  if (end < 0 || end >= file.pieces_size() || file.pieces(end).type() != Type::CONTROL) {
    return Fault("has no control piece that ends a sentence (eos_id ", end, ")");
  }
  model.end_of_document = end;
  return MakeBpe(std::move(model));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTiktoken(absl::string_view contents, absl::string_view encoding) {
  const Encoding* known = nullptr;
  for (const Encoding& row : kEncodings) {
    if (encoding == row.name) known = &row;
  }
  if (known == nullptr) {
    return Fault("the encoding ", Quoted(encoding),
                 " is not known; call the file gpt2.tiktoken, r50k_base.tiktoken, p50k_base.tiktoken, "
                 "multilingual.tiktoken, cl100k_base.tiktoken or o200k_base.tiktoken (or NAME.gpt2.tiktoken, ...), by "
                 "the pattern that it was made with");
  }
  BpeModel model;
  absl::flat_hash_map<std::string, int32_t> ids;
  int64_t line_number = 0;
  for (absl::string_view line : absl::StrSplit(contents, '\n')) {
    ++line_number;
    absl::ConsumeSuffix(&line, "\r");
    if (line.empty()) continue;
    const size_t space = line.find(' ');
    std::string token;
    int64_t rank = -1;
    if (space == absl::string_view::npos || !absl::Base64Unescape(line.substr(0, space), &token) || token.empty() ||
        token.size() > kMaxTokenBytes || !absl::SimpleAtoi(line.substr(space + 1), &rank) || rank < 0 ||
        rank >= kMaxVocabSize - 1) {
      return Fault("line ", line_number, " is not a token in base64 and its rank");
    }
    const size_t id = static_cast<size_t>(rank);
    if (id >= model.tokens.size()) model.tokens.resize(id + 1);
    if (model.tokens[id].kind != BpeModel::Kind::kHole) return Fault("line ", line_number, ": the rank is given twice");
    if (!ids.insert({token, static_cast<int32_t>(id)}).second) {
      return Fault("line ", line_number, ": the token is given twice");
    }
    model.tokens[id] = {std::move(token), BpeModel::Kind::kText};
  }
  if (ids.size() + 4096 < model.tokens.size()) return Fault("the ranks have more than 4,096 holes");
  // A smaller vocabulary of one's own ends with its end of document.
  size_t end = static_cast<size_t>(known->end_of_document);
  if (end >= model.tokens.size() + 2) end = model.tokens.size();
  if (end >= model.tokens.size()) model.tokens.resize(end + 1);
  if (model.tokens[end].kind != BpeModel::Kind::kHole) {
    return Fault("rank ", end, " belongs to ", kEndOfDocument, " in ", encoding, ", but the file has a token there");
  }
  model.tokens[end] = {kEndOfDocument, BpeModel::Kind::kSpecial};
  model.end_of_document = static_cast<int32_t>(end);
  std::vector<int32_t> ranked;
  for (size_t id = 0; id < model.tokens.size(); ++id) {
    if (model.tokens[id].kind == BpeModel::Kind::kText) ranked.push_back(static_cast<int32_t>(id));
  }
  AddRulesByResult(ids, ranked, &model);
  model.ignore_merges = true;
  model.split = {{known->pattern}};
  return MakeBpe(std::move(model));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseGpt2Files(absl::string_view encoder_json, absl::string_view vocab_bpe) {
  ASSIGN_OR_RETURN(const json vocab, ParseStrictJson(encoder_json));
  json merges = json::array();
  bool first = true;
  for (absl::string_view line : absl::StrSplit(vocab_bpe, '\n')) {
    absl::ConsumeSuffix(&line, "\r");
    const bool header = first && absl::StartsWith(line, "#version");
    first = false;
    if (!line.empty() && !header) merges.push_back(std::string(line));
  }
  if (!vocab.contains(kEndOfDocument)) return Fault("the vocabulary has no ", kEndOfDocument);
  const json file = {
      {"version", "1.0"},
      {"added_tokens", {{{"id", vocab[kEndOfDocument]}, {"content", kEndOfDocument}, {"special", true}}}},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", std::move(merges)}}}};
  ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, ParseTokenizerJson(file, "", ""));
  // Through the text that it writes, so that what is saved is whole.
  return ParseTokenizer(tokenizer->Serialize());
}

bool IsTokenizerPath(const std::string& spec) {
  if (absl::StartsWith(spec, "hf:") || absl::StartsWith(spec, "spm:")) return true;
  std::error_code ignored;
  return fs::exists(spec, ignored);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const std::string& spec) {
  absl::string_view rest = spec;
  if (absl::ConsumePrefix(&rest, "hf:")) return OpenFolder(std::string(rest));
  const bool sentencepiece = absl::ConsumePrefix(&rest, "spm:") || absl::EndsWith(rest, ".model");
  const fs::path path{std::string(rest)};
  const auto annotate =
      [&](absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer) -> absl::StatusOr<std::unique_ptr<Tokenizer>> {
    if (!tokenizer.ok()) return Annotate(tokenizer.status(), path.string());
    return tokenizer;
  };
  std::error_code ignored;
  if (!sentencepiece && fs::is_directory(path, ignored)) return OpenFolder(path);
  if (sentencepiece) {
    ASSIGN_OR_RETURN(const std::string contents, Read(path.string()));
    return annotate(ParseSentencePiece(contents));
  }
  if (absl::EndsWith(rest, ".tiktoken")) {
    ASSIGN_OR_RETURN(const std::string contents, Read(path.string()));
    const std::string stem = path.stem().string();
    return annotate(ParseTiktoken(contents, stem.substr(stem.rfind('.') + 1)));
  }
  if (path.filename() == "vocab.json") return OpenGpt2Files(path, path.parent_path() / "merges.txt");
  if (path.filename() == "encoder.json") return OpenGpt2Files(path, path.parent_path() / "vocab.bpe");
  return LoadTokenizer(path.string());
}

}  // namespace mt
