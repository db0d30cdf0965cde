#include "runtime/data/tokenizer.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "ir/base/utf8.h"
#include "proto/sentencepiece.pb.h"
#include "runtime/data/pretokenizer.h"
#include "runtime/data/tokenizer_files.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kText[] =
    "Litwo! Ojczyzno moja! ty jesteś jak zdrowie;\nIle cię trzeba cenić, ten tylko się dowie,\n"
    "Kto cię stracił. Dziś piękność twą w całej ozdobie\nWidzę i opisuję, bo tęsknię po tobie.\n\n"
    "It's the year 1834, isn't it? We'll see... \t\tdon't   you're 😀😀 \r\n";

std::unique_ptr<Tokenizer> Train(absl::string_view spec, absl::string_view text) {
  auto trainer = NewTokenizerTrainer(spec);
  EXPECT_OK(trainer);
  (*trainer)->Add(text);
  auto tokenizer = (*trainer)->Train();
  EXPECT_OK(tokenizer);
  return *std::move(tokenizer);
}

// Random valid UTF-8 with letters, spaces, controls, emoji and whatever else is a code point.
std::string RandomText(std::mt19937* random, int length) {
  std::string text;
  for (int i = 0; i < length; ++i) {
    switch ((*random)() % 8) {
      case 0:
        AppendUtf8(static_cast<int32_t>((*random)() % 0x20), &text);
        break;
      case 1:
        AppendUtf8(0x1F600 + static_cast<int32_t>((*random)() % 64), &text);
        break;
      case 2:
        AppendUtf8(0x100 + static_cast<int32_t>((*random)() % 0x80), &text);
        break;
      case 3: {
        const int32_t c = static_cast<int32_t>((*random)() % 0x110000);
        AppendUtf8(c >= 0xD800 && c < 0xE000 ? 0x2003 : c, &text);
        break;
      }
      case 4:
        text += " ";
        break;
      default:
        text += static_cast<char>('a' + (*random)() % 6);
    }
  }
  return text;
}

TEST(Utf8, DecodesAndFindsTheMaximalInvalidPart) {
  struct Case {
    std::string bytes;
    int32_t code_point;
    int size_bytes;
    bool truncated;
  };
  const Case cases[] = {
      {"a", 'a', 1, false},
      {"ż", 0x17C, 2, false},
      {"€", 0x20AC, 3, false},
      {"😀", 0x1F600, 4, false},
      {"\xF4\x8F\xBF\xBF", 0x10FFFF, 4, false},
      {"\xF4\x90\x80\x80", -1, 1, false},  // Above U+10FFFF.
      {"\xED\xA0\x80", -1, 1, false},      // A surrogate.
      {"\xC0\xAF", -1, 1, false},          // Overlong.
      {"\xE0\x80\x80", -1, 1, false},
      {"\x80", -1, 1, false},
      {"\xFF", -1, 1, false},
      {"\xE2\x82", -1, 2, true},
      {"\xE2\x82z", -1, 2, false},
      {"\xF0\x9F\x98", -1, 3, true},
  };
  for (const Case& test : cases) {
    const Utf8Char c = DecodeUtf8(test.bytes);
    EXPECT_EQ(c.code_point, test.code_point);
    EXPECT_EQ(c.size_bytes, test.size_bytes);
    EXPECT_EQ(c.truncated, test.truncated);
  }
  for (int32_t c = 0; c < 0x110000; c += 7) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string bytes;
    AppendUtf8(c, &bytes);
    ASSERT_EQ(DecodeUtf8(bytes).code_point, c);
    ASSERT_EQ(ValidUtf8Prefix(bytes), static_cast<int64_t>(bytes.size()));
  }
  EXPECT_EQ(ValidUtf8Prefix("twelve bytes\xFFmore"), 12);
}

TEST(Bpe, LearnsTheMergesOfAHandComputedCase) {
  // Words: "ab" x1, " ab" x2, " abc" x1 (bytes 32, 97, 98, 99). Pairs: (a,b) 4, (space,a) 3, (b,c) 1.
  // 256 = ab; then (space,ab) 3 -> 257; then (257,c) and (ab,c) occur once: no more.
  const auto tokenizer = Train("bpe:1000", "ab ab ab abc");
  EXPECT_EQ(tokenizer->vocab_size(), 259);
  EXPECT_EQ(tokenizer->name(), "bpe:259");
  EXPECT_EQ(tokenizer->end_of_document(), 258);
  EXPECT_EQ(tokenizer->TokenBytes(256), "ab");
  EXPECT_EQ(tokenizer->TokenBytes(257), " ab");
  EXPECT_THAT(tokenizer->Encode("ab abc b"), ElementsAre(256, 257, 'c', ' ', 'b'));
  // Equal counts: the pair with the smaller ids first. "xy" and "pq" twice each.
  const auto tie = Train("bpe:258", "xy\npq\nxy\npq");
  EXPECT_EQ(tie->TokenBytes(256), "pq");
  // Runs of one letter: (a,a) in "aaa" counts twice, as in the reference.
  const auto run = Train("bpe:300", "aaa\naaa");
  EXPECT_EQ(run->TokenBytes(256), "aa");
  EXPECT_THAT(run->Encode("aaaa"), ElementsAre(256, 256));
}

// A plain trainer that recounts everything after every merge.
std::vector<std::string> SlowMerges(const std::map<std::vector<std::string>, int>& words, int merges) {
  std::map<std::vector<std::string>, int> current = words;
  std::map<std::string, int> ids;
  for (int b = 0; b < 256; ++b) ids[std::string(1, static_cast<char>(b))] = b;
  std::vector<std::string> learned;
  while (static_cast<int>(learned.size()) < merges) {
    std::map<std::pair<int, int>, int> counts;
    std::map<std::pair<int, int>, std::pair<std::string, std::string>> texts;
    for (const auto& [word, count] : current) {
      for (size_t i = 0; i + 1 < word.size(); ++i) {
        const std::pair<int, int> pair = {ids[word[i]], ids[word[i + 1]]};
        counts[pair] += count;
        texts[pair] = {word[i], word[i + 1]};
      }
    }
    int best = 1;
    std::pair<int, int> best_pair;
    for (const auto& [pair, count] : counts) {
      if (count > best) {
        best = count;
        best_pair = pair;
      }
    }
    if (best < 2) break;
    const auto [left, right] = texts[best_pair];
    ids[left + right] = 256 + static_cast<int>(learned.size());
    learned.push_back(left + right);
    std::map<std::vector<std::string>, int> next;
    for (const auto& [word, count] : current) {
      std::vector<std::string> merged;
      for (size_t i = 0; i < word.size(); ++i) {
        if (i + 1 < word.size() && word[i] == left && word[i + 1] == right) {
          merged.push_back(left + right);
          ++i;
        } else {
          merged.push_back(word[i]);
        }
      }
      next[merged] += count;
    }
    current = next;
  }
  return learned;
}

TEST(Bpe, IncrementalCountsEqualRecounting) {
  std::mt19937 random(7);
  for (int round = 0; round < 30; ++round) {
    std::map<std::vector<std::string>, int> words;
    std::string text;
    for (int i = 0; i < 60; ++i) {
      std::vector<std::string> word;
      if (i > 0) text += "\n";
      const int length = 1 + static_cast<int>(random() % 9);
      for (int j = 0; j < length; ++j) {
        const char c = static_cast<char>('a' + random() % 3);
        word.emplace_back(1, c);
        text += c;
      }
      ++words[word];
    }
    const std::vector<std::string> expected = SlowMerges(words, 40);
    const auto tokenizer = Train("bpe:297", text);
    ASSERT_EQ(tokenizer->vocab_size(), 257 + static_cast<int64_t>(expected.size()));
    // Two different merges can make the same bytes, so compare the sequence.
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(tokenizer->TokenBytes(static_cast<int32_t>(256 + i)), expected[i]) << round << " " << i;
    }
  }
}

TEST(Bpe, SplitsWordsAsGpt2) {
  // With no merges but whole words, tokens never cross the pattern's words.
  const auto tokenizer = Train("bpe:2000", absl::StrCat(kText, kText, "isn't\nisn't\nisn't\ndon't\ndon't\ndon't\n"));
  const auto pieces = [&](absl::string_view text) {
    std::vector<std::string> out;
    for (const int32_t id : tokenizer->Encode(text)) out.emplace_back(tokenizer->TokenBytes(id));
    return out;
  };
  EXPECT_THAT(pieces("isn't"), ElementsAre("isn", "'t"));
  EXPECT_THAT(pieces(" We'll"), ElementsAre(" We", "'ll"));
  EXPECT_THAT(pieces("don't   you"), ElementsAre("don", "'t", "  ", " you"));
  EXPECT_THAT(pieces(" tęsknię po"), ElementsAre(" tęsknię", " po"));
}

TEST(Bpe, RoundTripsAnyBytes) {
  const auto tokenizer = Train("bpe:600", kText);
  std::mt19937 random(3);
  std::string all;
  for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
  std::vector<std::string> texts = {"", all, kText, "<|endoftext|>", "\xEF\xBB\xBFłódź", std::string(3, '\0')};
  for (int i = 0; i < 300; ++i) {
    texts.push_back(RandomText(&random, 200));
    std::string bytes;
    for (int j = 0; j < 200; ++j) bytes.push_back(static_cast<char>(random()));
    texts.push_back(bytes);
  }
  for (const std::string& text : texts) {
    const std::vector<int32_t> ids = tokenizer->Encode(text);
    for (const int32_t id : ids) ASSERT_TRUE(id >= 0 && id < tokenizer->end_of_document());
    ASSERT_OK_AND_ASSIGN(const std::string back, tokenizer->Decode(ids));
    ASSERT_EQ(back, text);
    ASSERT_EQ(tokenizer->Encode(text), ids);  // Through the cache.
  }
  EXPECT_THAT(tokenizer->Decode({tokenizer->end_of_document()}), IsOk());
  EXPECT_THAT(tokenizer->Decode({-1}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token -1")));
  EXPECT_THAT(tokenizer->Decode({static_cast<int32_t>(tokenizer->vocab_size())}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("outside the vocabulary")));
}

TEST(Bpe, LongWordsTakeNoQuadraticTime) {
  const auto tokenizer = Train("bpe:300", "ababababab\nabab\nabba");
  const std::string word(1 << 20, 'a');
  EXPECT_EQ(tokenizer->Encode(word).size(), word.size());
  std::string alternating;
  for (int i = 0; i < 1 << 19; ++i) alternating += "ab";
  ASSERT_OK_AND_ASSIGN(const std::string back, tokenizer->Decode(tokenizer->Encode(alternating)));
  EXPECT_EQ(back, alternating);
}

TEST(Bpe, TrainingIsDeterministicAndIndependentOfOrder) {
  std::mt19937 random(5);
  std::vector<std::string> texts;
  for (int i = 0; i < 40; ++i) texts.push_back(absl::StrCat(RandomText(&random, 100), "\nżółw chodzi powoli"));
  std::string first;
  for (int round = 0; round < 3; ++round) {
    auto trainer = NewTokenizerTrainer("bpe:400");
    ASSERT_OK(trainer);
    for (const std::string& text : texts) (*trainer)->Add(text);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, (*trainer)->Train());
    if (round == 0) first = tokenizer->Serialize();
    EXPECT_EQ(tokenizer->Serialize(), first);
    std::shuffle(texts.begin(), texts.end(), random);
  }
}

TEST(Tokenizer, SavedAndLoadedIsTheSame) {
  const std::string folder = absl::StrCat(::testing::TempDir(), "/tokenizer_test-", ::getpid());
  ASSERT_OK(MakeFolder(folder));
  const std::string path = absl::StrCat(folder, "/tokenizer.json");
  std::mt19937 random(11);
  for (const char* spec : {"bpe:500", "char"}) {
    const auto tokenizer = Train(spec, kText);
    ASSERT_OK(WriteFile(path, tokenizer->Serialize()));
    ASSERT_OK_AND_ASSIGN(const auto loaded, LoadTokenizer(path));
    EXPECT_EQ(loaded->hash(), tokenizer->hash());
    EXPECT_EQ(loaded->name(), tokenizer->name());
    EXPECT_EQ(loaded->vocab_size(), tokenizer->vocab_size());
    EXPECT_EQ(loaded->end_of_document(), tokenizer->end_of_document());
    EXPECT_EQ(loaded->Serialize(), tokenizer->Serialize());
    for (int i = 0; i < 50; ++i) {
      const std::string text = absl::StrCat(RandomText(&random, 100), kText);
      EXPECT_EQ(loaded->Encode(text), tokenizer->Encode(text));
    }
  }
  EXPECT_NE(Train("bpe:265", kText)->hash(), Train("bpe:264", kText)->hash());
  std::filesystem::remove_all(folder);
}

TEST(Char, SortsCodePointsAndNamesTheUnknown) {
  const auto tokenizer = Train("char", "cab\nżab😀");
  // \n a b c ż 😀 <unk> <end>
  EXPECT_EQ(tokenizer->vocab_size(), 8);
  EXPECT_EQ(tokenizer->unknown(), 6);
  EXPECT_EQ(tokenizer->end_of_document(), 7);
  EXPECT_THAT(tokenizer->Encode("żabaX\xFF😀"), ElementsAre(4, 1, 2, 1, 6, 6, 5));
  EXPECT_EQ(*tokenizer->Decode({4, 1, 2, 6}), "żab\xEF\xBF\xBD");
  EXPECT_EQ(tokenizer->TokenBytes(7), "<|endoftext|>");
}

TEST(Tokenizer, SpecsAndEmptyTexts) {
  for (const char* spec : {"", "bpe", "bpe:", "bpe:x", "bpe:256", "bpe:99999999999", "chars", "gpt2"}) {
    EXPECT_THAT(NewTokenizerTrainer(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bpe:10000")))
        << spec;
  }
  for (const char* spec : {"char", "bpe:300"}) {
    EXPECT_THAT((*NewTokenizerTrainer(spec))->Train(),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no ")));
  }
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Tokenizer, RefusesDamagedAndUnsupportedFilesByName) {
  const std::string bpe = Train("bpe:300", "ab ab ab abc")->Serialize();
  const std::string chars = Train("char", "abc")->Serialize();
  struct Case {
    std::string contents;
    const char* message;
  };
  const Case cases[] = {
      {"", "not valid JSON"},
      {"[]", "not a JSON object"},
      {"{}", "neither"},
      {bpe.substr(0, bpe.size() / 2), "not valid JSON"},
      {std::string(1000, '[') + std::string(1000, ']'), "nested deeper"},
      {Replaced(bpe, "\"model\":", "\"version\": 1, \"model\":"), "\"version\" twice"},
      {Replaced(bpe, "\"BPE\"", "\"Unigram\""), "model of type \"Unigram\""},
      {Replaced(bpe, "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFD\"}"), "type \"NFD\""},
      {Replaced(bpe, "\"ByteLevel\"", "\"Metaspace\""), "\"pre_tokenizer\" of type \"Metaspace\""},
      {Replaced(bpe, "\"ByteLevel\"", "\"Whitespace\""), "\"pre_tokenizer\" of type \"Whitespace\""},
      {Replaced(bpe, "\"add_prefix_space\": false", "\"add_prefix_space\": 1"), "add_prefix_space"},
      {Replaced(bpe, "\"dropout\": null", "\"dropout\": 0.5"), "\"dropout\""},
      {Replaced(bpe, "\"byte_fallback\": false", "\"byte_fallback\": true"), "\"byte_fallback\""},
      {Replaced(bpe, "\"content\": \"<|endoftext|>\"", "\"content\": \"<s>\""), "added token \"<s>\""},
      {Replaced(bpe, "\"a\": 97", "\"a\": 98"), "which another token has"},
      {Replaced(bpe, "\"a\": 97", "\"a\": -1"), "ids are 0 to"},
      {Replaced(bpe, "\"a\": 97", "\"a\": 1e3"), "ids are 0 to"},
      {Replaced(bpe, "\"a\": 97", "\"€\": 97"), "byte-level characters"},
      {Replaced(bpe, "\"z\": 122", "\"zzz\": 122"), "lacks the byte 122"},
      {Replaced(bpe, "\"a b\"", "\"a q\""), "merge 0"},
      {Replaced(bpe, "\"a b\"", "\"a b c\""), "merge 0 is not a pair"},
      {Replaced(bpe, "\"a b\"", "7"), "merge 0 is not a pair"},
      {Replaced(bpe, "\"a b\"", "\"a b\",\"a b\""), "merge 1 is given twice"},
      {Replaced(bpe, "{\"id\": 258", "{\"id\": 12"), "the id 12"},
      {Replaced(bpe, "{\"id\": 258", "{\"id\": \"x\""), "no id"},
      {Replaced(chars, "\"version\": 1", "\"version\": 2"), "\"version\" is not 1"},
      {Replaced(chars, "\"a\"", "\"ab\""), "item 0 of \"characters\" is not one character"},
      {Replaced(chars, "\"b\"", "\"a\""), "item 1 of \"characters\" is out of order or given twice"},
      {Replaced(chars, "\"vocab_size\": 5", "\"vocab_size\": 6"), "\"vocab_size\" is not 5"},
      {Replaced(chars, "\"c\"", "3"), "not a string"},
  };
  for (const Case& test : cases) {
    EXPECT_THAT(ParseTokenizer(test.contents), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(test.message)))
        << test.message;
  }
  // The other form of merges that Hugging Face writes.
  ASSERT_OK_AND_ASSIGN(const auto pairs, ParseTokenizer(Replaced(bpe, "\"a b\"", "[\"a\", \"b\"]")));
  EXPECT_EQ(pairs->hash(), ParseTokenizer(bpe).value()->hash());
  EXPECT_THAT(LoadTokenizer("/nonexistent/tokenizer.json"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("tokenizer.json")));
}

TEST(Tokenizer, SurvivesFlippedBits) {
  std::mt19937 random(13);
  for (const char* spec : {"bpe:300", "char"}) {
    const std::string good = Train(spec, kText)->Serialize();
    for (int i = 0; i < 1500; ++i) {
      std::string bad = good;
      const size_t at = random() % bad.size();
      bad[at] = static_cast<char>(bad[at] ^ 1 << (random() % 8));
      const auto tokenizer = ParseTokenizer(bad);
      if (!tokenizer.ok()) continue;
      for (const int32_t id : (*tokenizer)->Encode(kText)) ASSERT_TRUE(id >= 0 && id < (*tokenizer)->vocab_size());
    }
  }
}

// tests/tokenizers/make.py wrote the files and the ids that tokenizers, tiktoken and sentencepiece give.
nlohmann::json Golden() {
  const std::string folder = absl::StrCat(MT_SOURCE_DIR, "/tests/tokenizers/data");
  nlohmann::json golden = nlohmann::json::parse(ReadFile(absl::StrCat(folder, "/golden.json")).value());
  for (nlohmann::json& item : golden["tokenizers"]) {
    item["spec"] = absl::StrReplaceAll(item["spec"].get<std::string>(), {{"@", folder}});
  }
  return golden;
}

TEST(TokenizerFiles, GiveTheIdsOfOtherLibraries) {
  const nlohmann::json golden = Golden();
  ASSERT_EQ(golden["tokenizers"].size(), 10u);
  for (const nlohmann::json& item : golden["tokenizers"]) {
    SCOPED_TRACE(item["name"]);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, OpenTokenizer(item["spec"]));
    // What is kept beside a corpus gives the same.
    ASSERT_OK_AND_ASSIGN(const auto saved, ParseTokenizer(tokenizer->Serialize()));
    EXPECT_EQ(saved->hash(), tokenizer->hash());
    EXPECT_EQ(saved->name(), tokenizer->name());
    EXPECT_EQ(saved->Serialize(), tokenizer->Serialize());
    EXPECT_EQ(saved->end_of_document(), tokenizer->end_of_document());
    for (size_t i = 0; i < golden["texts"].size(); ++i) {
      const std::string text = golden["texts"][i];
      const std::vector<int32_t> expected = item["ids"][i];
      EXPECT_EQ(tokenizer->Encode(text), expected) << text;
      EXPECT_EQ(saved->Encode(text), expected) << text;
      const bool lossless = item["name"] != "spm_defaults" && item["name"] != "nfc_prefix";
      if (lossless && !absl::StrContains(text, "\xE2\x96\x81")) {
        EXPECT_EQ(tokenizer->Decode(expected).value(), text);
      }
    }
  }
}

// What SentencePiece's BPE says, word for word: of all neighbours whose union is a piece, those of the highest score
// are merged, the leftmost of equals; over the whole text, without cuts.
std::vector<int32_t> SlowSentencePiece(const proto::sentencepiece::ModelProto& model, absl::string_view text) {
  std::map<std::string, int32_t> ids;
  for (int32_t i = 0; i < model.pieces_size(); ++i) ids[model.pieces(i).piece()] = i;
  std::vector<std::string> symbols;
  const std::string escaped = absl::StrCat("\u2581", absl::StrReplaceAll(text, {{" ", "\u2581"}}));
  for (absl::string_view rest = escaped; !rest.empty();) {
    const size_t size = static_cast<size_t>(DecodeUtf8(rest).size_bytes);
    symbols.emplace_back(rest.substr(0, size));
    rest.remove_prefix(size);
  }
  while (true) {
    size_t best = symbols.size();
    float score = -std::numeric_limits<float>::infinity();
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ids.find(symbols[i] + symbols[i + 1]);
      if (found == ids.end() || model.pieces(found->second).score() <= score) continue;
      score = model.pieces(found->second).score();
      best = i;
    }
    if (best == symbols.size()) break;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  std::vector<int32_t> out;
  for (const std::string& symbol : symbols) {
    if (const auto found = ids.find(symbol); found != ids.end()) {
      out.push_back(found->second);
    } else {
      for (const char c : symbol) out.push_back(ids.at(absl::StrFormat("<0x%02X>", static_cast<uint8_t>(c))));
    }
  }
  return out;
}

TEST(TokenizerFiles, SentencePieceCutsNothingThatAMergeJoins) {
  using Piece = proto::sentencepiece::ModelProto::SentencePiece;
  std::mt19937 random(23);
  const auto pick = [&](const auto& from) { return std::string(from[random() % std::size(from)]); };
  // Characters whose last or first bytes collide, and some that stay unknown.
  const std::vector<std::string> known = {"\u2581", "a",      "b",      "c",      ".",
                                          "\n",     "\u0105", "\u0205", "\u2580", "\U0001F600"};
  const std::vector<std::string> all = {" ", " ",  "\u2581", "a",          "b",         "c",
                                        ".", "\n", "\u0105", "\u0205",     "\u2580",    "x",
                                        " ", "a",  "\u2582", "\U0001F600", "\U0001F601"};
  for (int round = 0; round < 30; ++round) {
    proto::sentencepiece::ModelProto model;
    std::map<std::string, bool> given;
    const auto add = [&](const std::string& text, Piece::Type type) {
      if (given[text]) return;
      given[text] = true;
      Piece* piece = model.add_pieces();
      piece->set_piece(text);
      // Some have one score, as the runs of spaces of published models do.
      const int rank = model.pieces_size() / (1 + round % 3 * 4);
      piece->set_score(type == Piece::NORMAL ? -static_cast<float>(rank) : 0);
      piece->set_type(type);
    };
    add("<unk>", Piece::UNKNOWN);
    add("<s>", Piece::CONTROL);
    add("</s>", Piece::CONTROL);
    for (int b = 0; b < 256; ++b) add(absl::StrFormat("<0x%02X>", b), Piece::BYTE);
    for (uint32_t i = 2 + random() % 30; i > 0; --i) {  // In the order of their ranks; the first ones are short.
      std::string piece = pick(known) + pick(known);
      while (random() % 3 == 0) piece += pick(known);
      add(piece, Piece::NORMAL);
    }
    for (const std::string& c : known) add(c, Piece::NORMAL);
    model.mutable_trainer_spec()->set_model_type(proto::sentencepiece::TrainerSpec::BPE);
    model.mutable_trainer_spec()->set_byte_fallback(true);
    model.mutable_normalizer_spec()->set_remove_extra_whitespaces(false);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, ParseSentencePiece(model.SerializeAsString()));
    ASSERT_OK_AND_ASSIGN(const auto saved, ParseTokenizer(tokenizer->Serialize()));
    EXPECT_EQ(saved->hash(), tokenizer->hash());
    model.mutable_normalizer_spec()->set_add_dummy_prefix(false);
    ASSERT_OK_AND_ASSIGN(const auto bare, ParseSentencePiece(model.SerializeAsString()));
    ASSERT_OK_AND_ASSIGN(const auto saved_bare, ParseTokenizer(bare->Serialize()));
    EXPECT_EQ(saved_bare->hash(), bare->hash());
    model.mutable_normalizer_spec()->set_add_dummy_prefix(true);
    for (int i = 0; i < 40; ++i) {
      std::string text;
      for (uint32_t n = 1 + random() % (i % 8 == 0 ? 200 : 30); n > 0; --n) text += pick(all);
      ASSERT_EQ(tokenizer->Encode(text), SlowSentencePiece(model, text)) << text << "\n" << model.ShortDebugString();
      ASSERT_EQ(saved->Encode(text), tokenizer->Encode(text)) << text;
    }
  }
}

TEST(TokenizerFiles, PartsOfATextAreEncodedAsOne) {
  const nlohmann::json golden = Golden();
  for (const nlohmann::json& item : golden["tokenizers"]) {
    SCOPED_TRACE(item["name"]);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, OpenTokenizer(item["spec"]));
    std::vector<int32_t> ids;
    tokenizer->EncodePart("Litwo! Ojczyzno", /*continued=*/false, &ids);
    tokenizer->EncodePart(" moja! ty", /*continued=*/true, &ids);
    tokenizer->EncodePart(" jak zdrowie", /*continued=*/true, &ids);
    EXPECT_EQ(ids, tokenizer->Encode("Litwo! Ojczyzno moja! ty jak zdrowie"));
  }
}

TEST(TokenizerFiles, NormalizesAsTheFileSays) {
  const std::string path = absl::StrCat(MT_SOURCE_DIR, "/tests/tokenizers/data/nfc_prefix/tokenizer.json");
  const std::string contents = ReadFile(path).value();
  ASSERT_OK_AND_ASSIGN(const auto nfc, ParseTokenizer(contents));
  ASSERT_OK_AND_ASSIGN(const auto nfkc, ParseTokenizer(absl::StrReplaceAll(contents, {{"\"NFC\"", "\"NFKC\""}})));
  EXPECT_EQ(nfc->Encode("e\u0301 \ufb01 \u00b2 \u2460"), nfc->Encode("\u00e9 \ufb01 \u00b2 \u2460"));
  EXPECT_EQ(nfkc->Encode("e\u0301 \ufb01 \u00b2 \u2460"), nfc->Encode("\u00e9 fi 2 1"));
  EXPECT_NE(nfkc->hash(), nfc->hash());
  // U+07FD is younger than the Unicode of the library that made the vocabularies: a mark that composes with nothing.
  EXPECT_EQ(nfc->Encode("a\u0323\u0301"), nfc->Encode("\u1ea1\u0301"));
  EXPECT_NE(nfc->Encode("a\u07fd\u0301"), nfc->Encode("\u00e1\u07fd"));
  EXPECT_EQ(nfc->Decode(nfc->Encode("a\u07fd\u0301")).value(), "a\u07fd\u0301");
}

TEST(TokenizerFiles, TheEndOfADocumentIsTheOneThatTheFolderNames) {
  const std::string folder = absl::StrCat(::testing::TempDir(), "/tokenizer_files-", ::getpid());
  ASSERT_OK(MakeFolder(folder));
  std::string text = Train("bpe:300", kText)->Serialize();
  const size_t at = text.find("\"added_tokens\": [\n");
  text.insert(at + 18, "{\"id\": 400, \"content\": \"<|im_end|>\", \"special\": true},\n");
  ASSERT_OK(WriteFile(folder + "/tokenizer.json", text));
  EXPECT_EQ(OpenTokenizer("hf:" + folder).value()->TokenBytes(OpenTokenizer(folder).value()->end_of_document()),
            "<|endoftext|>");
  ASSERT_OK(WriteFile(folder + "/tokenizer_config.json", "{\"eos_token\": {\"content\": \"<|im_end|>\"}}"));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, OpenTokenizer("hf:" + folder));
  EXPECT_EQ(tokenizer->end_of_document(), 400);
  EXPECT_EQ(tokenizer->vocab_size(), 401);  // With holes that no text reaches.
  EXPECT_EQ(ParseTokenizer(tokenizer->Serialize()).value()->end_of_document(), 400);
  ASSERT_OK(WriteFile(folder + "/tokenizer_config.json", "{\"eos_token\": \"<nowhere>\"}"));
  EXPECT_THAT(OpenTokenizer("hf:" + folder), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("<nowhere>")));
  std::filesystem::remove_all(folder);
  EXPECT_THAT(OpenTokenizer("hf:" + folder), StatusIs(absl::StatusCode::kNotFound, HasSubstr("has no tokenizer.json")));
}

TEST(TokenizerFiles, RefuseByNameWhatTheyCannotBe) {
  const std::string folder = absl::StrCat(MT_SOURCE_DIR, "/tests/tokenizers/data");
  const std::string model = ReadFile(folder + "/llama.model").value();
  const auto edited = [&](const std::function<void(proto::sentencepiece::ModelProto*)>& edit) {
    proto::sentencepiece::ModelProto file;
    CHECK(file.ParseFromString(model));
    edit(&file);
    return ParseSentencePiece(file.SerializeAsString());
  };
  using Model = proto::sentencepiece::ModelProto;
  constexpr auto kBad = absl::StatusCode::kFailedPrecondition;
  EXPECT_THAT(
      edited([](Model* m) { m->mutable_trainer_spec()->set_model_type(proto::sentencepiece::TrainerSpec::UNIGRAM); }),
      StatusIs(kBad, HasSubstr("unigram")));
  EXPECT_THAT(edited([](Model* m) {
                m->mutable_normalizer_spec()->set_name("nmt_nfkc");
                m->mutable_normalizer_spec()->set_precompiled_charsmap("x");
              }),
              StatusIs(kBad, HasSubstr("nmt_nfkc")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_pieces(300)->set_piece(m->pieces(301).piece()); }),
              StatusIs(kBad, HasSubstr("twice")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_pieces(10)->set_piece("<0xZZ>"); }), StatusIs(kBad, HasSubstr("byte")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_pieces(10)->set_type(Model::SentencePiece::CONTROL); }),
              StatusIs(kBad, HasSubstr("lacks the byte 7")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_pieces(270)->set_type(Model::SentencePiece::UNUSED); }),
              StatusIs(kBad, HasSubstr("unused")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_pieces(270)->set_piece("\xFF"); }),
              StatusIs(kBad, HasSubstr("not UTF-8")));
  EXPECT_THAT(edited([](Model* m) { m->mutable_trainer_spec()->set_eos_id(-1); }), StatusIs(kBad, HasSubstr("eos_id")));
  EXPECT_THAT(ParseSentencePiece("nothing"), StatusIs(kBad, HasSubstr("not a SentencePiece model")));
  EXPECT_THAT(ParseTiktoken("IQ== 0\nIQ== 1\n", "gpt2"), StatusIs(kBad, HasSubstr("line 2")));
  EXPECT_THAT(ParseTiktoken("IQ== 0\n", "mine"), StatusIs(kBad, HasSubstr("\"mine\"")));
  EXPECT_THAT(ParseTiktoken("IQ== 0\n", "gpt2"), StatusIs(kBad, HasSubstr("lacks the byte")));
  EXPECT_THAT(ParseTiktoken("!! 0\n", "gpt2"), StatusIs(kBad, HasSubstr("line 1")));
  EXPECT_THAT(ParseGpt2Files("{}", ""), StatusIs(kBad, HasSubstr("no <|endoftext|>")));
}

TEST(TokenizerFiles, SurviveFlippedBits) {
  const std::string folder = absl::StrCat(MT_SOURCE_DIR, "/tests/tokenizers/data");
  const std::string text = absl::StrCat(kText, "<tool>x</tool>    \xFF");
  std::mt19937 random(17);
  const auto flip = [&](const std::string& good, const auto& parse) {
    for (int i = 0; i < 400; ++i) {
      std::string bad = good;
      for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
        const size_t at = random() % bad.size();
        bad[at] = static_cast<char>(bad[at] ^ 1 << (random() % 8));
      }
      if (i % 10 == 0) bad.resize(random() % bad.size());
      const auto tokenizer = parse(bad);
      if (!tokenizer.ok()) continue;
      for (const int32_t id : (*tokenizer)->Encode(text)) ASSERT_TRUE(id >= 0 && id < (*tokenizer)->vocab_size());
      ASSERT_THAT(ParseTokenizer((*tokenizer)->Serialize()), IsOk());
    }
  };
  for (const char* file : {"split_added", "llama", "nfc_prefix"}) {
    flip(ReadFile(absl::StrCat(folder, "/", file, "/tokenizer.json")).value(),
         [](const std::string& bad) { return ParseTokenizer(bad); });
  }
  for (const char* file : {"llama.model", "defaults.model"}) {
    flip(ReadFile(absl::StrCat(folder, "/", file)).value(), ParseSentencePiece);
  }
  flip(ReadFile(absl::StrCat(folder, "/own.gpt2.tiktoken")).value(),
       [](const std::string& bad) { return ParseTiktoken(bad, "cl100k_base"); });
  const std::string merges = ReadFile(absl::StrCat(folder, "/files/vocab.bpe")).value();
  flip(ReadFile(absl::StrCat(folder, "/files/encoder.json")).value(),
       [&](const std::string& bad) { return ParseGpt2Files(bad, merges); });
}

TEST(PreTokenizer, PublishedPatternsAreTheSameWithAndWithoutPcre) {
  const auto words = [](const PreTokenizer& splitter, absl::string_view text) {
    std::vector<std::string> out;
    splitter.Split(text, [&](absl::string_view word) { out.emplace_back(word); });
    return out;
  };
  const char* parts[] = {" ",       "  ",         "\n",     "\t",     "'",       "'s",     "'ll",    "'L",
                         "'\u017f", "'Re",        "a",      "Zz",     "ż",       "9",      "123456", "½",
                         "!",       "...",        "😀",      "\u00a0", "\u2028",  "\u3000", "\u1c89", "\r",
                         "\r\n",    "\U0001e5f1", "한",     "_",      "e\u0301", "\u180e", "\x1c",   "\u0085",
                         "B",       "\u0301",     "\u01c5", "\u02b0", "\u05d0",  "/",      "\u0903", "q"};
  for (const char* pattern : {kGpt2Pattern, kCl100kPattern, kO200kPattern}) {
    ASSERT_OK_AND_ASSIGN(const auto own, PreTokenizer::Create({{pattern}}));
    ASSERT_OK_AND_ASSIGN(const auto pcre, PreTokenizer::Create({{absl::StrCat("(?:", pattern, ")")}}));
    std::mt19937 random(8);
    for (int i = 0; i < 3000; ++i) {
      std::string text;
      for (uint32_t n = random() % 30; n > 0; --n) text += parts[random() % std::size(parts)];
      if (i % 3 == 0) {
        const uint32_t c = random() % 0x30000;
        if (c >= 0x80 && (c < 0xD800 || c > 0xDFFF)) AppendUtf8(static_cast<int32_t>(c), &text);
        text += "x";
      }
      ASSERT_EQ(words(*own, text), words(*pcre, text)) << text;
    }
  }
}

TEST(PreTokenizer, ClassesAreThoseOfUnicode16) {
  // Garay (16.0): a capital letter, a digit, a mark; an ideograph of 15.1.
  const std::string text = "a\U00010d50\U00010d40\U00010d69\U0002ebf0b";
  const auto words = [&](const char* pattern) {
    const auto splitter = PreTokenizer::Create({{pattern}});
    EXPECT_OK(splitter);
    std::vector<std::string> out;
    (*splitter)->Split(text, [&](absl::string_view word) { out.emplace_back(word); });
    return out;
  };
  EXPECT_THAT(words(kGpt2Pattern), ElementsAre("a\U00010d50", "\U00010d40", "\U00010d69", "\U0002ebf0b"));
  EXPECT_THAT(words("[^\\s\\p{L}\\p{N}]"), ElementsAre("a\U00010d50\U00010d40", "\U00010d69", "\U0002ebf0b"));
  EXPECT_THAT(words("\\p{Lu}"), ElementsAre("a", "\U00010d50", "\U00010d40\U00010d69\U0002ebf0b"));
  EXPECT_THAT(words("\\P{L}+"), ElementsAre("a\U00010d50", "\U00010d40\U00010d69", "\U0002ebf0b"));
  EXPECT_THAT(words("\\d|\\W"), ElementsAre("a\U00010d50", "\U00010d40", "\U00010d69\U0002ebf0b"));
  EXPECT_THAT(words("\\w+"), ElementsAre(text));
}

TEST(PreTokenizer, RefusesWhatOnigurumaReadsDifferently) {
  for (const char* pattern : {"[a&&b]", "[a[b]]", "\\h", "(?m:.)", "(?R)", "\\1", "a{2}+", "[\\S]", "\\", "[a", "(",
                              "\\pL", "(*FAIL)", "\\K", "\\u12", "[]"}) {
    EXPECT_THAT(PreTokenizer::Create({{pattern}}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(pattern)))
        << pattern;
  }
  // Terminates on a pattern that backtracks for ever, and cuts nothing out.
  ASSERT_OK_AND_ASSIGN(const auto slow, PreTokenizer::Create({{"(a+)+$b"}}));
  const std::string text(60, 'a');
  std::string back;
  slow->Split(text, [&](absl::string_view word) { absl::StrAppend(&back, word); });
  EXPECT_EQ(back, text);
  ASSERT_OK_AND_ASSIGN(const auto empty, PreTokenizer::Create({{"x*"}}));
  std::vector<std::string> words;
  empty->Split("żxxab", [&](absl::string_view word) { words.emplace_back(word); });
  EXPECT_THAT(words, ElementsAre("ż", "xx", "ab"));
}

}  // namespace
}  // namespace mt
