#include "runtime/data/corpus.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/entropy.h"
#include "runtime/data/mtcorpus.h"
#include "runtime/data/permutation.h"
#include "runtime/data/prep.h"
#include "runtime/data/sample_order.h"
#include "runtime/data/text_source.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr auto kBad = absl::StatusCode::kFailedPrecondition;

TEST(Crc32c, KnownValues) {
  EXPECT_EQ(Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720, appendix B.4.
  EXPECT_EQ(Crc32c("6789", Crc32c("12345")), 0xE3069283u);
}

TEST(Permutation, IsASeededBijection) {
  for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 100, 257, 4096, 10007}) {
    const Permutation permutation(n, 42, 0);
    std::vector<bool> seen(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = permutation(i);
      ASSERT_TRUE(to >= 0 && to < n && !seen[static_cast<size_t>(to)]) << n;
      seen[static_cast<size_t>(to)] = true;
    }
  }
  const auto list = [](uint64_t seed, uint64_t stream) {
    const Permutation permutation(1000, seed, stream);
    std::vector<int64_t> out;
    for (int64_t i = 0; i < 1000; ++i) out.push_back(permutation(i));
    return out;
  };
  EXPECT_EQ(list(1, 2), list(1, 2));
  EXPECT_NE(list(1, 2), list(2, 2));
  EXPECT_NE(list(1, 2), list(1, 3));
  EXPECT_NE(list(1, 0), list(uint64_t{1} << 32 | 1, 0));
  // Not near the identity: on average a third of the range away.
  double distance = 0;
  const std::vector<int64_t> values = list(9, 9);
  for (int64_t i = 0; i < 1000; ++i) distance += std::abs(static_cast<double>(values[static_cast<size_t>(i)] - i));
  EXPECT_NEAR(distance / 1000, 333, 60);
  EXPECT_LT(Permutation(int64_t{1} << 62, 1, 1)(12345), int64_t{1} << 62);
}

TEST(SortPositions, IsTheStableSort) {
  std::mt19937 random(1);
  std::vector<int32_t> scratch;
  for (const size_t n : {size_t{0}, size_t{1}, size_t{5}, size_t{1000}}) {
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(random() % 37));
    std::vector<int32_t> expected(n);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
      return tokens[static_cast<size_t>(a)] < tokens[static_cast<size_t>(b)];
    });
    std::vector<int32_t> order(n);
    SortPositions(tokens, 37, absl::MakeSpan(order), &scratch);
    EXPECT_EQ(order, expected);
  }
}

TokenScan ScanOf(const std::vector<int32_t>& tokens, size_t part) {
  return [&tokens, part](const std::function<void(absl::Span<const int32_t>)>& sink) {
    for (size_t i = 0; i < tokens.size(); i += part) {
      sink(absl::MakeSpan(tokens).subspan(i, std::min(part, tokens.size() - i)));
    }
    return absl::OkStatus();
  };
}

TEST(Entropy, HandComputedCase) {
  // 0 0 1 0 1: unigrams 3/5 and 2/5. Pairs 00 1, 01 2, 10 1: after 0 (3 pairs) 1/3 and 2/3, after 1 always 0.
  const std::vector<int32_t> tokens = {0, 0, 1, 0, 1};
  ASSERT_OK_AND_ASSIGN(const TokenStatistics statistics, MeasureTokens(ScanOf(tokens, 2), 3));
  EXPECT_THAT(statistics.counts, ElementsAre(3, 2, 0));
  EXPECT_NEAR(statistics.unigram_entropy, -(0.6 * std::log(0.6) + 0.4 * std::log(0.4)), 1e-12);
  EXPECT_NEAR(statistics.bigram_entropy, -(std::log(1.0 / 3) + 2 * std::log(2.0 / 3)) / 4, 1e-12);
  const std::vector<int32_t> none;
  EXPECT_EQ(MeasureTokens(ScanOf(none, 1), 3)->bigram_entropy, 0);
  const std::vector<int32_t> one = {2};
  EXPECT_EQ(MeasureTokens(ScanOf(one, 1), 3)->unigram_entropy, 0);
}

TEST(Entropy, AnyTableSizeGivesTheSame) {
  std::mt19937 random(2);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 5000; ++i)
    tokens.push_back(static_cast<int32_t>(std::min<uint32_t>(random() % 50, random() % 50)));
  std::map<std::pair<int32_t, int32_t>, int> pairs;
  std::map<int32_t, int> firsts;
  for (size_t i = 0; i + 1 < tokens.size(); ++i) {
    ++pairs[{tokens[i], tokens[i + 1]}];
    ++firsts[tokens[i]];
  }
  double expected = 0;
  for (const auto& [pair, count] : pairs) {
    expected -=
        count * std::log(static_cast<double>(count) / firsts[pair.first]) / static_cast<double>(tokens.size() - 1);
  }
  for (const int64_t table_bytes : {1, 100, 1000, 5000, 1 << 20}) {
    ASSERT_OK_AND_ASSIGN(const TokenStatistics statistics, MeasureTokens(ScanOf(tokens, 333), 50, table_bytes));
    EXPECT_NEAR(statistics.bigram_entropy, expected, 1e-9) << table_bytes;
  }
}

class CorpusTest : public ::testing::Test {
 protected:
  CorpusTest() {
    static std::atomic<int> next = 0;
    folder_ = absl::StrCat(::testing::TempDir(), "/corpus_test-", ::getpid(), "-", next++);
    fs::create_directories(folder_);
    input_ = absl::StrCat(folder_, "/input.txt");
    out_ = absl::StrCat(folder_, "/out");
  }
  ~CorpusTest() override { fs::remove_all(folder_); }

  // Blank-line separated documents of some words each; no two are equal.
  static std::string Text(int documents) {
    std::mt19937 random(4);
    const char* words[] = {"zażółć", "gęślą", "jaźń", "Litwo", "ojczyzno", "moja", "zdrowie", "😀", "a", "i"};
    std::string text;
    for (int d = 0; d < documents; ++d) {
      absl::StrAppend(&text, "Nr ", d, ":");
      for (uint32_t i = 0; i < 5 + random() % 20; ++i)
        absl::StrAppend(&text, i % 7 == 6 ? "\n" : " ", words[random() % 10]);
      text += d % 3 == 0 ? "\n\n" : "\n \t\r\n\n";
    }
    return text;
  }

  PrepOptions Options(const std::string& tokenizer = "char") {
    PrepOptions options;
    options.input = input_;
    options.output = out_;
    options.tokenizer = tokenizer;
    return options;
  }

  Manifest Prepare(const PrepOptions& options) {
    absl::StatusOr<Manifest> manifest = PrepareCorpus(options);
    EXPECT_OK(manifest);
    return manifest.ok() ? *manifest : Manifest();
  }
  Manifest PrepareText(int documents, const std::string& tokenizer = "char") {
    EXPECT_OK(WriteFile(input_, Text(documents)));
    return Prepare(Options(tokenizer));
  }

  std::string OutFile(const std::string& name) { return absl::StrCat(out_, "/", name); }
  std::vector<std::string> OutFiles() {
    std::vector<std::string> names;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(out_, error)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  // The text of each document of a split, in order.
  std::vector<std::string> Documents(const std::string& split) {
    const auto reader = CorpusReader::Open(out_, split);
    EXPECT_OK(reader);
    const auto tokenizer = LoadCorpusTokenizer(out_, (*reader)->manifest());
    EXPECT_OK(tokenizer);
    std::vector<int32_t> ids(static_cast<size_t>((*reader)->num_tokens()));
    EXPECT_OK((*reader)->Read(0, absl::MakeSpan(ids)));
    std::vector<std::string> documents;
    EXPECT_TRUE(ids.empty() || ids.back() == (*tokenizer)->end_of_document());
    std::vector<int32_t> document;
    for (const int32_t id : ids) {
      if (id == (*tokenizer)->end_of_document()) {
        documents.push_back(*(*tokenizer)->Decode(document));
        document.clear();
      } else {
        document.push_back(id);
      }
    }
    return documents;
  }
  std::vector<std::string> AllDocuments() {
    std::vector<std::string> all;
    for (const char* split : {"train", "val", "test"}) {
      for (std::string& document : Documents(split)) all.push_back(std::move(document));
    }
    return all;
  }

  absl::Status OpenAndReadAll(const std::string& split = "train") {
    ASSIGN_OR_RETURN(const auto reader, CorpusReader::Open(out_, split));
    std::vector<int32_t> ids(static_cast<size_t>(reader->num_tokens()));
    return reader->Read(0, absl::MakeSpan(ids));
  }

  // A corpus, every block of it good, and nothing beside it.
  void ExpectWhole() {
    for (const char* split : {"train", "val", "test"}) EXPECT_OK(OpenAndReadAll(split));
    for (const std::string& name : OutFiles()) {
      EXPECT_TRUE(name == kManifestFile || name == kTokenizerFile || name.find(".bin") == name.size() - 4) << name;
    }
  }

  std::string folder_;
  std::string input_;
  std::string out_;
};

TEST_F(CorpusTest, EveryDocumentIsInOneSplitUnchanged) {
  for (const char* tokenizer : {"bpe:400", "char"}) {
    fs::remove_all(out_);
    const Manifest manifest = PrepareText(1000, tokenizer);
    EXPECT_EQ(manifest.splits[0].documents, 850);
    EXPECT_EQ(manifest.splits[1].documents, 100);
    EXPECT_EQ(manifest.splits[2].documents, 50);
    EXPECT_THAT(OutFiles(),
                ElementsAre("manifest.json", "test-00000.bin", "tokenizer.json", "train-00000.bin", "val-00000.bin"));
    std::vector<std::string> got = AllDocuments();
    EXPECT_FALSE(std::is_sorted(got.begin(), got.end()));
    std::vector<std::string> expected;
    std::string text = Text(1000);
    for (size_t at = 0; (at = text.find("\n \t\r\n\n")) != std::string::npos;) text.replace(at, 6, "\n\n");
    for (absl::string_view document : absl::StrSplit(text, "\n\n", absl::SkipEmpty())) expected.emplace_back(document);
    std::sort(got.begin(), got.end());
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(got, expected);
    int64_t bytes = 0;
    for (const std::string& document : expected) bytes += static_cast<int64_t>(document.size());
    EXPECT_EQ(manifest.splits[0].bytes + manifest.splits[1].bytes + manifest.splits[2].bytes, bytes);
    ASSERT_OK_AND_ASSIGN(const Manifest read, ReadManifest(out_));
    EXPECT_EQ(read.Serialize(), manifest.Serialize());
    EXPECT_GT(manifest.splits[0].unigram_entropy, manifest.splits[0].bigram_entropy);
    EXPECT_GT(manifest.splits[0].bigram_entropy, 0);
    EXPECT_EQ(manifest.splits[0].words, [&] {
      int64_t words = 0;
      for (const std::string& document : Documents("train")) {
        words += static_cast<int64_t>(
            std::vector<std::string>(absl::StrSplit(document, absl::ByAnyChar(" \n"), absl::SkipEmpty())).size());
      }
      return words;
    }());
  }
}

TEST_F(CorpusTest, SameInputAndSeedGiveTheSameBytes) {
  ASSERT_OK(WriteFile(input_, Text(300)));
  PrepOptions options = Options("bpe:400");
  const auto contents = [&] {
    std::map<std::string, std::string> files;
    for (const std::string& name : OutFiles()) files[name] = ReadFile(OutFile(name)).value();
    return files;
  };
  Prepare(options);
  const auto first = contents();
  EXPECT_THAT(PrepareCorpus(options), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("--overwrite")));
  options.overwrite = true;
  Prepare(options);
  EXPECT_EQ(contents(), first);
  options.seed = 1;
  Prepare(options);
  EXPECT_NE(contents().at("val-00000.bin"), first.at("val-00000.bin"));
}

TEST_F(CorpusTest, ShardsAreCutAndReadAsOne) {
  ASSERT_OK(WriteFile(input_, Text(200)));
  PrepOptions options = Options();
  Prepare(options);
  const std::vector<std::string> whole = Documents("train");
  options.shard_tokens = 1000;
  options.overwrite = true;
  const Manifest manifest = Prepare(options);
  ASSERT_GT(manifest.splits[0].shards.size(), 5u);
  EXPECT_EQ(manifest.splits[0].shards[0].tokens, 1000);
  EXPECT_EQ(Documents("train"), whole);
  options.shard_tokens = int64_t{1} << 20;  // The many shards go away.
  Prepare(options);
  EXPECT_EQ(OutFiles().size(), 5u);
}

TEST_F(CorpusTest, DocumentsOfFilesLinesAndFolders) {
  const std::string texts = absl::StrCat(folder_, "/texts");
  ASSERT_OK(MakeFolder(texts + "/b"));
  ASSERT_OK(WriteFile(texts + "/a.txt", "first\n\nstill first\n"));
  ASSERT_OK(WriteFile(texts + "/b/c.txt", "\xEF\xBB\xBFsecond"));
  ASSERT_OK(WriteFile(texts + "/b/empty.txt", " \n\n"));
  ASSERT_OK(WriteFile(texts + "/d.txt", "third"));
  ASSERT_OK(WriteFile(texts + "/.hidden", "not this"));
  PrepOptions options = Options();
  options.input = texts;
  options.output = out_ = texts + "/out";  // Inside the input: not read as text.
  options.overwrite = true;
  for (int round = 0; round < 2; ++round) {
    const Manifest manifest = Prepare(options);
    EXPECT_EQ(manifest.documents, "file");
    EXPECT_THAT(manifest.sources, ElementsAre("a.txt", "b/c.txt", "b/empty.txt", "d.txt"));
    std::vector<std::string> all = AllDocuments();
    std::sort(all.begin(), all.end());
    // One character of val or test may be unknown to train; the lengths are kept.
    EXPECT_EQ(all.size(), 3u);
  }
  options.split = {100, 0, 0};
  Prepare(options);
  EXPECT_THAT(Documents("train"), ::testing::UnorderedElementsAre("first\n\nstill first\n", "second", "third"));
  EXPECT_TRUE(Documents("val").empty());
  options.documents = DocumentMode::kLine;
  Prepare(options);
  EXPECT_THAT(Documents("train"), ::testing::UnorderedElementsAre("first", "still first", "second", "third"));
  options.documents = DocumentMode::kBlankLine;
  Prepare(options);
  EXPECT_THAT(Documents("train"), ::testing::UnorderedElementsAre("first", "still first", "second", "third"));
}

TEST_F(CorpusTest, FewDocumentsFillEverySplitOrAreRefused) {
  for (int n : {3, 4, 7}) {
    fs::remove_all(out_);
    const Manifest manifest = PrepareText(n);
    for (const SplitInfo& split : manifest.splits) EXPECT_GE(split.documents, 1) << n;
  }
  fs::remove_all(out_);
  ASSERT_OK(WriteFile(input_, "one document"));
  EXPECT_THAT(PrepareCorpus(Options()),
              StatusIs(kBad, AllOf(HasSubstr("input.txt: has 1 document"), HasSubstr("--split 100,0,0"))));
  EXPECT_FALSE(fs::exists(out_));
  PrepOptions options = Options();
  options.split = {1, 0, 0};
  Prepare(options);
  EXPECT_THAT(Documents("train"), ElementsAre("one document"));
}

TEST_F(CorpusTest, InvalidUtf8IsRefusedWithItsPlaceReplacedOrSkipped) {
  // The bad byte is past the first block that the scan reads, and a good character straddles the blocks.
  std::string text((1 << 20) - 1, 'x');
  text += "żółw";
  const size_t at = text.size();
  text += "\xC3(\n\nb\n\nc\xE2\x82";
  ASSERT_OK(WriteFile(input_, text));
  PrepOptions options = Options();
  options.split = {100, 0, 0};
  EXPECT_THAT(PrepareCorpus(options), StatusIs(kBad, HasSubstr(absl::StrCat(input_, ": byte ", at, " (0xc3)"))));
  EXPECT_FALSE(fs::exists(out_));
  std::vector<std::string> warnings;
  options.warning = [&](const std::string& line) { warnings.push_back(line); };
  options.invalid_utf8 = InvalidUtf8::kReplace;
  Prepare(options);
  const std::string start = text.substr(0, at);
  EXPECT_THAT(Documents("train"), ::testing::UnorderedElementsAre(start + "\xEF\xBF\xBD(", "b", "c\xEF\xBF\xBD"));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], HasSubstr("2 places"));
  options.invalid_utf8 = InvalidUtf8::kSkip;
  options.overwrite = true;
  Prepare(options);
  EXPECT_THAT(Documents("train"), ::testing::UnorderedElementsAre(start + "(", "b", "c"));
}

TEST_F(CorpusTest, LongDocumentsAreReadInPartsThatCutNoWord) {
  std::mt19937 random(8);
  std::string text;
  while (text.size() < 3 << 20) {
    for (uint32_t i = 0; i < 1 + random() % 12; ++i)
      text += random() % 9 == 0 ? "ż" : std::string(1, static_cast<char>('a' + random() % 26));
    text += random() % 5 == 0 ? "  " : random() % 5 == 0 ? "\n" : " ";
  }
  text += "end";
  ASSERT_OK(WriteFile(input_, text));
  PrepOptions options = Options("bpe:500");
  options.split = {100, 0, 0};
  Prepare(options);
  ASSERT_OK_AND_ASSIGN(const auto reader, CorpusReader::Open(out_, "train"));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadCorpusTokenizer(out_, reader->manifest()));
  std::vector<int32_t> expected = tokenizer->Encode(text);
  expected.push_back(tokenizer->end_of_document());
  std::vector<int32_t> ids(static_cast<size_t>(reader->num_tokens()));
  ASSERT_OK(reader->Read(0, absl::MakeSpan(ids)));
  EXPECT_EQ(ids, expected);
}

TEST_F(CorpusTest, AnotherCorpusTokenizerCanBeUsed) {
  PrepareText(50, "bpe:290");
  const std::string tokenizer = absl::StrCat(folder_, "/tokenizer.json");
  fs::rename(OutFile("tokenizer.json"), tokenizer);
  fs::remove_all(out_);
  ASSERT_OK(WriteFile(input_, "other text\n\nwith other words\n\nand a third"));
  const Manifest manifest = Prepare(Options(tokenizer));
  EXPECT_EQ(manifest.tokenizer, "bpe:290");
  EXPECT_EQ(manifest.tokenizer_hash, LoadTokenizer(tokenizer).value()->hash());
}

TEST_F(CorpusTest, RefusesBadInputAndOptions) {
  EXPECT_THAT(PrepareCorpus(Options()), StatusIs(absl::StatusCode::kNotFound, HasSubstr("input.txt")));
  ASSERT_OK(WriteFile(input_, ""));
  EXPECT_THAT(PrepareCorpus(Options()), StatusIs(kBad, HasSubstr("has no text (0 bytes)")));
  ASSERT_OK(WriteFile(input_, " \n\n\t\n"));
  EXPECT_THAT(PrepareCorpus(Options()), StatusIs(kBad, HasSubstr("has no text")));
  ASSERT_OK(WriteFile(input_, Text(10)));
  PrepOptions options = Options("bpe:12");
  EXPECT_THAT(PrepareCorpus(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bpe:12")));
  options = Options("no/such/file.json");
  EXPECT_THAT(PrepareCorpus(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no/such/file.json")));
  for (const std::vector<double>& split :
       {std::vector<double>{85, 10}, {0, 50, 50}, {-1, 1, 1}, {std::nan(""), 1, 1}, {1, 1, 1, 1}, {}}) {
    options = Options();
    options.split = split;
    EXPECT_THAT(PrepareCorpus(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("85,10,5")));
  }
  EXPECT_FALSE(fs::exists(out_));
  options = Options();
  options.input = folder_ + "/none";
  ASSERT_OK(MakeFolder(options.input));
  EXPECT_THAT(PrepareCorpus(options), StatusIs(kBad, HasSubstr("the folder has no files")));
}

TEST_F(CorpusTest, EpochsArePermutationsOfWindowsAndResumeAnywhere) {
  PrepareText(200);
  ASSERT_OK_AND_ASSIGN(const auto reader, CorpusReader::Open(out_, "train"));
  std::vector<int32_t> all(static_cast<size_t>(reader->num_tokens()));
  ASSERT_OK(reader->Read(0, absl::MakeSpan(all)));
  const int64_t seq = 32;
  const int64_t windows = reader->num_sequences(seq);
  EXPECT_EQ(windows, (reader->num_tokens() - 1) / seq);
  std::vector<int32_t> tokens(static_cast<size_t>(2 * windows * seq));
  std::vector<int32_t> labels(tokens.size());
  ASSERT_OK_AND_ASSIGN(const auto order, SampleOrder::Create(*reader, {.block_tokens = seq, .seed = 7}));
  EXPECT_EQ(order->epoch_tokens(), windows * seq);
  ASSERT_OK(order->Samples(0, 2 * windows, seq, absl::MakeSpan(tokens), absl::MakeSpan(labels)));
  const auto window = [&](int64_t i) {
    return std::vector<int32_t>(tokens.begin() + i * seq, tokens.begin() + (i + 1) * seq);
  };
  const auto next = [&](int64_t i) {
    return std::vector<int32_t>(labels.begin() + i * seq, labels.begin() + (i + 1) * seq);
  };
  std::multiset<std::vector<int32_t>> expected;
  std::multiset<std::vector<int32_t>> expected_labels;
  for (int64_t i = 0; i < windows; ++i) {
    expected.insert(std::vector<int32_t>(all.begin() + i * seq, all.begin() + (i + 1) * seq));
    expected_labels.insert(std::vector<int32_t>(all.begin() + i * seq + 1, all.begin() + (i + 1) * seq + 1));
  }
  for (int epoch = 0; epoch < 2; ++epoch) {
    std::multiset<std::vector<int32_t>> got;
    std::multiset<std::vector<int32_t>> got_labels;
    for (int64_t i = 0; i < windows; ++i) {
      got.insert(window(epoch * windows + i));
      got_labels.insert(next(epoch * windows + i));
      for (int64_t t = 0; t + 1 < seq; ++t)
        ASSERT_EQ(next(i)[static_cast<size_t>(t)], window(i)[static_cast<size_t>(t + 1)]);
    }
    EXPECT_EQ(got, expected);
    EXPECT_EQ(got_labels, expected_labels);
  }
  EXPECT_NE(window(0), window(windows));  // The second epoch has another order.

  // Any start, any batch: the same samples.
  for (const int64_t batch : {1, 3, 8}) {
    for (const int64_t step : {int64_t{0}, int64_t{2}, windows / batch}) {
      std::vector<int32_t> x(static_cast<size_t>(batch * seq));
      std::vector<int32_t> y(x.size());
      ASSERT_OK(order->Samples(step * batch, batch, seq, absl::MakeSpan(x), absl::MakeSpan(y)));
      EXPECT_EQ(x,
                std::vector<int32_t>(tokens.begin() + step * batch * seq, tokens.begin() + (step + 1) * batch * seq));
      EXPECT_EQ(y,
                std::vector<int32_t>(labels.begin() + step * batch * seq, labels.begin() + (step + 1) * batch * seq));
    }
  }
  std::vector<int32_t> other(static_cast<size_t>(seq * 8));
  std::vector<int32_t> other_labels(other.size());
  ASSERT_OK_AND_ASSIGN(const auto other_order, SampleOrder::Create(*reader, {.block_tokens = seq, .seed = 8}));
  ASSERT_OK(other_order->Samples(0, 8, seq, absl::MakeSpan(other), absl::MakeSpan(other_labels)));
  EXPECT_NE(other, std::vector<int32_t>(tokens.begin(), tokens.begin() + seq * 8));
}

TEST_F(CorpusTest, EvaluationSeesEveryLabelOnce) {
  PrepareText(60);
  for (const char* split : {"train", "val"}) {
    ASSERT_OK_AND_ASSIGN(const auto reader, CorpusReader::Open(out_, split));
    std::vector<int32_t> all(static_cast<size_t>(reader->num_tokens()));
    ASSERT_OK(reader->Read(0, absl::MakeSpan(all)));
    const int64_t n = reader->num_tokens();
    for (const int64_t seq : {int64_t{1}, int64_t{7}, n - 2, n - 1, n, n + 5}) {
      for (const int64_t batch : {1, 4}) {
        std::vector<int32_t> seen;
        std::vector<int32_t> contexts;
        std::vector<int32_t> tokens(static_cast<size_t>(batch * seq));
        std::vector<int32_t> labels(tokens.size());
        for (int64_t i = 0; i < reader->num_eval_batches(batch, seq); ++i) {
          ASSERT_OK_AND_ASSIGN(const int64_t valid,
                               reader->EvalBatch(i, batch, seq, absl::MakeSpan(tokens), absl::MakeSpan(labels)));
          EXPECT_GT(valid, 0);
          int64_t counted = 0;
          for (size_t k = 0; k < labels.size(); ++k) {
            EXPECT_TRUE(tokens[k] >= 0 && tokens[k] < reader->vocab_size());
            if (labels[k] == kIgnoredLabel) continue;
            ++counted;
            seen.push_back(labels[k]);
            contexts.push_back(tokens[k]);
          }
          EXPECT_EQ(counted, valid);
        }
        EXPECT_EQ(seen, std::vector<int32_t>(all.begin() + 1, all.end()));
        EXPECT_EQ(contexts, std::vector<int32_t>(all.begin(), all.end() - 1));
      }
    }
  }
}

TEST_F(CorpusTest, ASplitTooShortForOneSequenceIsSaid) {
  PrepareText(10);
  ASSERT_OK_AND_ASSIGN(const auto reader, CorpusReader::Open(out_, "test"));
  const int64_t seq = reader->num_tokens();
  EXPECT_THAT(SampleOrder::Create(*reader, {.block_tokens = seq}),
              StatusIs(kBad, AllOf(HasSubstr("split test has"), HasSubstr("--seq"))));
}

TEST_F(CorpusTest, WideVocabulariesTakeFourBytes) {
  // 70,000 different code points: u32 tokens.
  std::string text;
  for (int32_t c = 0x10000; c < 0x10000 + 70000; ++c) {
    text += std::string("\xF0") + static_cast<char>(0x80 | (c >> 12 & 0x3F)) +
            static_cast<char>(0x80 | (c >> 6 & 0x3F)) + static_cast<char>(0x80 | (c & 0x3F));
  }
  ASSERT_OK(WriteFile(input_, text));
  PrepOptions options = Options();
  options.split = {100, 0, 0};
  const Manifest manifest = Prepare(options);
  EXPECT_EQ(manifest.vocab_size, 70002);
  EXPECT_THAT(Documents("train"), ElementsAre(text));
  EXPECT_OK(OpenAndReadAll());
}

// One clear error for each kind of damage.
TEST_F(CorpusTest, DamagedShardsAreNamed) {
  PrepareText(50);
  const std::string path = OutFile("train-00000.bin");
  ASSERT_OK_AND_ASSIGN(const std::string good, ReadFile(path));
  const auto with = [&](size_t at, const std::string& bytes) {
    std::string bad = good;
    return bad.replace(at, bytes.size(), bytes);
  };
  // With the checksum of the header made right again.
  const auto sealed = [&](std::string bytes) {
    const uint32_t crc = Crc32c(absl::string_view(bytes).substr(0, 60));
    for (size_t i = 0; i < 4; ++i) bytes[60 + i] = static_cast<char>(crc >> (8 * i));
    return bytes;
  };
  struct Case {
    std::string contents;
    const char* message;
  };
  const Case cases[] = {
      {"", "has 0 bytes"},
      {good.substr(0, 63), "has 63 bytes"},
      {good.substr(0, good.size() - 1), "tokens take"},
      {good + "x", "tokens take"},
      {with(0, "MTSHARD"), "is not a token shard"},
      {sealed(with(8, "\x02")), "format version 2"},
      {with(16, "\x01"), "damaged header"},
      {sealed(with(12, "\x04")), "stores 4 bytes a token"},
      {sealed(with(16, std::string(8, '\xff'))), "tokens"},
      {sealed(with(16, std::string(8, '\0'))), "says 0 tokens"},
      {sealed(with(24, std::string(8, '\xff'))), "has a vocabulary of"},
      {sealed(with(24, "\x05")), "vocabulary of 5"},
      {sealed(with(32, "\x01\x02\x03")), "was made with tokenizer"},
      {sealed(with(40, "\x01")), "not the shard that the manifest describes"},
      {sealed(with(48, "\x01")), "not the shard that the manifest describes"},
      {sealed(with(48, "\x09")), "of split 9"},
      {with(64 + 10, "\xff\xff"), "is damaged between bytes 64 and"},
      {with(good.size() - 2, "\xff"), "damaged table"},
  };
  for (const Case& test : cases) {
    ASSERT_OK(WriteFile(path, test.contents));
    EXPECT_THAT(OpenAndReadAll(),
                StatusIs(kBad, AllOf(HasSubstr(path), HasSubstr(test.message), HasSubstr("mtcorpus prep"))))
        << test.message;
  }
  fs::remove(path);
  EXPECT_THAT(OpenAndReadAll(), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path)));
  fs::copy(OutFile("val-00000.bin"), path);
  EXPECT_THAT(OpenAndReadAll(), StatusIs(kBad, HasSubstr("the manifest says")));
  ASSERT_OK(WriteFile(path, good));
  EXPECT_OK(OpenAndReadAll());
}

TEST_F(CorpusTest, ATokenOutsideTheVocabularyIsNamed) {
  // A shard whose checksums are all right, as another program would write it.
  const std::string path = absl::StrCat(folder_, "/shard.bin");
  ASSERT_OK_AND_ASSIGN(auto writer, ShardWriter::Create(path, {.vocab_size = 300}));
  ASSERT_OK(writer->Append({1, 2, 299, 4}));
  ASSERT_OK(writer->Finish());
  ASSERT_OK_AND_ASSIGN(std::string bytes, ReadFile(path));
  const auto put = [&](size_t at, uint32_t value) {
    for (size_t i = 0; i < 4; ++i) bytes[at + i] = static_cast<char>(value >> (8 * i));
  };
  bytes[64 + 4] = 44;  // 299 -> 300.
  put(72, Crc32c(absl::string_view(bytes).substr(64, 8)));
  put(56, Crc32c(absl::string_view(bytes).substr(72)));
  put(60, Crc32c(absl::string_view(bytes).substr(0, 60)));
  ASSERT_OK(WriteFile(path, bytes));
  ASSERT_OK_AND_ASSIGN(const auto reader, ShardReader::Open(path));
  std::vector<int32_t> out(1);
  EXPECT_THAT(reader->Read(0, absl::MakeSpan(out)),
              StatusIs(kBad, HasSubstr("holds token 300 at byte 68, not below the vocabulary size 300")));
}

TEST_F(CorpusTest, EditedManifestsAreNamed) {
  PrepareText(50);
  const std::string path = OutFile("manifest.json");
  ASSERT_OK_AND_ASSIGN(const std::string good, ReadFile(path));
  using Json = nlohmann::ordered_json;
  const auto edited = [&](const std::function<void(Json&)>& edit) {
    Json json = Json::parse(good);
    edit(json);
    return json.dump(2);
  };
  struct Case {
    std::string contents;
    const char* message;
  };
  const Case cases[] = {
      {"", "not valid JSON"},
      {good.substr(0, good.size() / 2), "not valid JSON"},
      {"{}", "lacks \"format\""},
      {edited([](Json& j) { j["format"] = "other"; }), "not the manifest of a corpus"},
      {edited([](Json& j) { j["version"] = 2; }), "version 2"},
      {edited([](Json& j) { j["vocab_size"] = -3; }), "\"vocab_size\" is -3"},
      {edited([](Json& j) { j["vocab_size"] = 1.5; }), "\"vocab_size\" is 1.5"},
      {edited([](Json& j) { j["vocab_size"] = j["vocab_size"].get<int>() + 1; }), "was edited or damaged"},
      {edited([](Json& j) { j["end_of_document"] = 100000; }), "\"end_of_document\" is 100000"},
      {edited([](Json& j) { j["tokenizer_hash"] = "xyz"; }), "16 hexadecimal digits"},
      {edited([](Json& j) { j["splits"].erase("val"); }), "lacks \"val\""},
      {edited([](Json& j) { j["splits"]["train"] = 7; }), "split train: is not an object"},
      {edited([](Json& j) { j["splits"]["train"]["tokens"] = 5; }), "says 5 tokens, its shards have"},
      {edited([](Json& j) { j["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"; }), "names the shard"},
      {edited([](Json& j) { j["splits"]["train"]["shards"][0]["tokens"] = uint64_t{1} << 63; }), "\"tokens\" is"},
      {edited([](Json& j) { j["splits"]["train"]["bigram_entropy"] = 0.001; }), "was edited or damaged"},
      {edited([](Json& j) { j["seed"] = "x"; }), "\"seed\""},
      {edited([](Json& j) {
         j["split"] = {1, 2};
       }),
       "three numbers"},
      {edited([](Json& j) { j.erase("crc32c"); }), "lacks \"crc32c\""},
  };
  for (const Case& test : cases) {
    ASSERT_OK(WriteFile(path, test.contents));
    EXPECT_THAT(OpenAndReadAll(), StatusIs(kBad, AllOf(HasSubstr(path), HasSubstr(test.message)))) << test.message;
  }
  ASSERT_OK(WriteFile(path, Json::parse(good).dump()));  // Layout is nobody's business.
  EXPECT_OK(OpenAndReadAll());
  EXPECT_THAT(CorpusReader::Open(out_, "dev"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("train, val or test")));

  // Another corpus's tokenizer.
  ASSERT_OK_AND_ASSIGN(const Manifest manifest, ReadManifest(out_));
  ASSERT_OK(WriteFile(
      OutFile("tokenizer.json"),
      R"({"format":"mt-char-tokenizer","version":1,"vocab_size":3,"unknown":1,"end_of_document":2,"characters":["a"]})"));
  EXPECT_THAT(LoadCorpusTokenizer(out_, manifest), StatusIs(kBad, HasSubstr("the manifest names char")));
}

TEST_F(CorpusTest, SurvivesFlippedBits) {
  PrepareText(20);
  std::mt19937 random(17);
  for (const char* name : {"manifest.json", "train-00000.bin"}) {
    ASSERT_OK_AND_ASSIGN(const std::string good, ReadFile(OutFile(name)));
    for (int i = 0; i < 400; ++i) {
      std::string bad = good;
      const size_t at = random() % bad.size();
      bad[at] = static_cast<char>(bad[at] ^ 1 << (random() % 8));
      FILE* file = std::fopen(OutFile(name).c_str(), "wb");
      std::fwrite(bad.data(), 1, bad.size(), file);
      std::fclose(file);
      const absl::Status status = OpenAndReadAll();
      // White space of the manifest may differ; every bit of a shard counts.
      EXPECT_FALSE(status.ok() && std::string(name) != "manifest.json") << name << " byte " << at;
    }
    ASSERT_OK(WriteFile(OutFile(name), good));
  }
}

// --- The command as a process.

struct Outcome {
  int code = -1;
  std::string output;
};

// Runs the command in a child; `file_limit_bytes` > 0 limits the size of any file it writes, as a full disk would;
// kill_after_micros >= 0: kill -9 after that time.
Outcome RunMtcorpus(const std::vector<std::string>& arguments, const std::string& log, int64_t file_limit_bytes = 0,
                    const std::string& input = "/dev/null", int64_t kill_after_micros = -1) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (std::freopen(log.c_str(), "wb", stdout) == nullptr || ::dup2(::fileno(stdout), 2) < 0 ||
        std::freopen(input.c_str(), "rb", stdin) == nullptr) {
      ::_exit(99);
    }
    std::vector<std::string> all = {"mtcorpus"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    for (std::string& argument : all) argv.push_back(argument.data());
    if (file_limit_bytes > 0) {
      const rlimit limit = {static_cast<rlim_t>(file_limit_bytes), static_cast<rlim_t>(file_limit_bytes)};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    const int code = MtcorpusMain(static_cast<int>(argv.size()), argv.data());
    std::fflush(stdout);
    ::_exit(code);
  }
  if (kill_after_micros >= 0) {
    ::usleep(static_cast<useconds_t>(kill_after_micros));
    ::kill(child, SIGKILL);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), ReadFile(log).value_or("")};
}

TEST_F(CorpusTest, CommandPrepares) {
  ASSERT_OK(WriteFile(input_, Text(100)));
  const std::string log = absl::StrCat(folder_, "/log");
  Outcome run = RunMtcorpus({"prep", "--input", input_, "--out", out_, "--tokenizer", "bpe:300", "--seed", "3"}, log);
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_THAT(run.output,
              AllOf(HasSubstr("tokenizer bpe:300"), HasSubstr("train"), HasSubstr("bigram"), Not(HasSubstr("\r"))));
  EXPECT_EQ(ReadManifest(out_)->seed, 3u);
  run = RunMtcorpus({"stat", out_, "--json"}, log);
  EXPECT_EQ(run.code, 0) << run.output;
  const auto json = nlohmann::json::parse(run.output, nullptr, false);
  ASSERT_FALSE(json.is_discarded()) << run.output;
  EXPECT_EQ(json["vocab_size"], 300);
  EXPECT_EQ(json["splits"]["train"]["documents"], 85);
  EXPECT_EQ(json["splits"]["val"]["bigram_entropy"], ReadManifest(out_)->splits[1].bigram_entropy);
  run = RunMtcorpus({"stat", "--input", input_, "--tokenizer", "char"}, log);
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_THAT(run.output, HasSubstr("most common tokens of train"));

  // Standard input gives the same corpus as the file.
  const std::string piped = absl::StrCat(folder_, "/piped");
  run = RunMtcorpus({"prep", "--input", "-", "--out", piped, "--tokenizer", "bpe:300", "--seed", "3"}, log, 0, input_);
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_EQ(ReadFile(piped + "/train-00000.bin").value(), ReadFile(OutFile("train-00000.bin")).value());
}

TEST_F(CorpusTest, TokenizersAreCompared) {
  ASSERT_OK(WriteFile(input_, Text(400)));
  const std::string log = absl::StrCat(folder_, "/log");
  ASSERT_EQ(RunMtcorpus({"prep", "--input", input_, "--out", out_, "--tokenizer", "bpe:400"}, log).code, 0);
  const std::string own = OutFile("tokenizer.json");
  Outcome run = RunMtcorpus({"stat", out_, "--tokenizer", absl::StrCat("bpe:400,char,", own), "--json"}, log);
  ASSERT_EQ(run.code, 0) << run.output;
  const auto json = nlohmann::json::parse(run.output, nullptr, false);
  ASSERT_FALSE(json.is_discarded()) << run.output;
  const SplitInfo val = ReadManifest(out_)->splits[1];
  EXPECT_EQ(json["documents"], val.documents);
  EXPECT_EQ(json["bytes"], val.bytes);
  EXPECT_EQ(json["words"], val.words);
  ASSERT_EQ(json["tokenizers"].size(), 4u);
  for (const int i : {0, 1, 3}) {  // Learned from the same text again, and read from a file: the same one.
    EXPECT_EQ(json["tokenizers"][i]["tokens"], val.tokens - val.documents) << i;
    EXPECT_EQ(json["tokenizers"][i]["hash"], json["tokenizers"][0]["hash"]);
    EXPECT_EQ(json["tokenizers"][i]["unknown"], 0);
  }
  EXPECT_EQ(json["tokenizers"][2]["tokenizer"], "char");
  EXPECT_GT(json["tokenizers"][2]["tokens_per_word"], json["tokenizers"][1]["tokens_per_word"]);

  // A text with what a tokenizer lacks.
  ASSERT_OK(WriteFile(absl::StrCat(folder_, "/ascii.txt"), "abc abd"));
  const std::string lacking = absl::StrCat(folder_, "/ascii");
  ASSERT_EQ(RunMtcorpus({"prep", "--input", folder_ + "/ascii.txt", "--out", lacking, "--tokenizer", "char", "--split",
                         "100,0,0"},
                        log)
                .code,
            0);
  ASSERT_OK(WriteFile(input_, "abc żab"));
  run = RunMtcorpus({"stat", input_, "--tokenizer", absl::StrCat("char,", lacking, "/tokenizer.json"), "--json"}, log);
  ASSERT_EQ(run.code, 0) << run.output;
  const auto text = nlohmann::json::parse(run.output.substr(run.output.find('{')), nullptr, false);  // After progress.
  ASSERT_FALSE(text.is_discarded()) << run.output;
  EXPECT_EQ(text["words"], 2);
  EXPECT_EQ(text["tokenizers"][0]["unknown"], 0);
  EXPECT_EQ(text["tokenizers"][1]["unknown"], 1);
  EXPECT_EQ(text["tokenizers"][1]["tokens"], 7);
  EXPECT_EQ(text["tokenizers"][1]["tokens_per_word"], 3.5);
  run = RunMtcorpus({"stat", input_, "--tokenizer", "char,bpe:300"}, log);
  EXPECT_THAT(run.output,
              AllOf(HasSubstr("2 words"), HasSubstr("tokens/word"), HasSubstr("bpe:300"), HasSubstr("MB/s")));
  run = RunMtcorpus({"stat", input_, "--tokenizer", "char,words"}, log);
  EXPECT_EQ(run.code, 2) << run.output;
  EXPECT_THAT(run.output, HasSubstr("\"words\" is not known"));
}

TEST_F(CorpusTest, CommandExitCodes) {
  const std::string log = absl::StrCat(folder_, "/log");
  ASSERT_OK(WriteFile(input_, Text(2000)));
  struct Case {
    std::vector<std::string> arguments;
    int code;
    const char* message;
  };
  const Case cases[] = {
      {{"prep", "--out", out_}, 2, "--input"},
      {{"prep", "--input", input_}, 2, "--out"},
      {{"prep", "--input", input_, "--out", out_, "--split", "a,b,c"}, 2, "\"a\" is not a number"},
      {{"prep", "--input", input_, "--out", out_, "--split", "0,1,1"}, 2, "85,10,5"},
      {{"prep", "--input", input_, "--out", out_, "--tokenizer", "word"}, 2, "tokenizer \"word\" is not known"},
      {{"prep", "--input", input_, "--out", out_, "--invalid-utf8", "ignore"}, 2, "invalid-utf8"},
      {{"prep", "--input", input_, "--out", out_, "--tokeniser", "char"}, 2, "--tokenizer"},
      {{"stat"}, 2, "--input FILE"},
      {{"prep", "--input", "/no/such/file", "--out", out_}, 4, "/no/such/file"},
      {{"prep", "--input", "/dev/null", "--out", out_}, 4, "has no text"},
      {{"prep", "--input", "-", "--out", out_}, 4, "standard input: has no text"},
      {{"stat", folder_}, 4, "is not a corpus"},
      {{"prep", "--input", input_, "--out", "/proc/corpus"}, 7, "/proc/corpus"},
  };
  for (const Case& test : cases) {
    const Outcome run = RunMtcorpus(test.arguments, log);
    EXPECT_EQ(run.code, test.code) << run.output;
    EXPECT_THAT(run.output, HasSubstr(test.message));
    EXPECT_FALSE(fs::exists(out_)) << run.output;
  }
  ASSERT_OK(WriteFile(input_, "good\n\nbad \xFF byte\n\nmore"));
  const Outcome run = RunMtcorpus({"prep", "--input", input_, "--out", out_}, log);
  EXPECT_EQ(run.code, 4);
  EXPECT_THAT(run.output, HasSubstr(absl::StrCat(input_, ": byte 10 (0xff)")));
}

TEST_F(CorpusTest, AFailedWriteLeavesNoCorpusButWhatIsFinished) {
  ASSERT_OK(WriteFile(input_, Text(3000)));
  const std::string log = absl::StrCat(folder_, "/log");
  // Not even the tokenizer's file fits; then the spool of a pipe does not.
  Outcome run = RunMtcorpus({"prep", "--input", input_, "--out", out_, "--tokenizer", "char"}, log, 400);
  EXPECT_EQ(run.code, 7) << run.output;
  EXPECT_FALSE(fs::exists(out_));
  run = RunMtcorpus({"prep", "--input", "-", "--out", out_, "--tokenizer", "char"}, log, 100'000, input_);
  EXPECT_EQ(run.code, 7) << run.output;
  EXPECT_FALSE(fs::exists(out_));
  // The tokenizer's file fits, the train shard does not.
  run = RunMtcorpus({"prep", "--input", input_, "--out", out_, "--tokenizer", "char"}, log, 100'000);
  EXPECT_EQ(run.code, 7) << run.output;
  EXPECT_THAT(run.output, AllOf(HasSubstr("write failed: File too large"), HasSubstr("the same command goes on")));
  EXPECT_FALSE(fs::exists(OutFile(kManifestFile)));
  run = RunMtcorpus({"prep", "--input", input_, "--out", out_, "--tokenizer", "char"}, log);
  EXPECT_EQ(run.code, 0) << run.output;
  EXPECT_THAT(run.output, HasSubstr("going on"));
  ExpectWhole();
}

// --- Interrupted work.

// The files of the corpus, by name; nothing else is there.
std::map<std::string, std::string> CorpusFiles(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    files[entry.path().filename().string()] = ReadFile(entry.path().string()).value_or("?");
  }
  return files;
}

// Runs PrepareCorpus in a process that kills itself where `phase` has done more than `share`.
void KillAt(PrepOptions options, const std::string& phase, double share) {
  const pid_t child = ::fork();
  if (child == 0) {
    options.progress = [&](absl::string_view now, int64_t done, int64_t total) {
      if (now == phase && static_cast<double>(done) > share * static_cast<double>(total)) ::kill(::getpid(), SIGKILL);
    };
    PrepareCorpus(options).IgnoreError();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status)) << phase << " " << share;
}

// As a user does it: the same command again until it is done, killed at any moment, MT_TEST_KILLS times.
TEST_F(CorpusTest, KilledAtAnyMomentTheSameCommandGoesOnBitForBit) {
  const std::string text = Text(1500);
  ASSERT_OK(WriteFile(input_, text));
  std::string lines;
  for (int i = 0; i < 1500; ++i) {
    absl::StrAppend(&lines, "{\"text\": \"Litwo, ojczyzno moja ", i * 77777, " ty jesteś jak zdrowie\"}\n");
  }
  const std::string records = absl::StrCat(folder_, "/x.jsonl");
  ASSERT_OK(WriteFile(records, lines));
  const char* wanted = std::getenv("MT_TEST_KILLS");
  int wanted_kills = 24;
  ASSERT_TRUE(wanted == nullptr || absl::SimpleAtoi(wanted, &wanted_kills));
  std::mt19937 random(9);
  int kills = 0;
  int went_on = 0;
  const std::string log = absl::StrCat(folder_, "/log");
  for (int round = 0; kills < wanted_kills; ++round) {
    const bool pipe = round % 4 == 3;
    const std::string file = round % 4 == 2 ? records : input_;
    const std::vector<std::string> arguments = {"prep",
                                                "--input",
                                                pipe ? "-" : file,
                                                "--out",
                                                out_,
                                                "--tokenizer",
                                                round % 2 == 0 ? "bpe:300" : "char",
                                                "--shard-tokens",
                                                round % 3 == 0 ? "1501" : "5000",
                                                "--overwrite"};
    const absl::Time start = absl::Now();
    Outcome whole = RunMtcorpus(arguments, log, 0, pipe ? file : "/dev/null");
    ASSERT_EQ(whole.code, 0) << whole.output;
    const int64_t micros = absl::ToInt64Microseconds(absl::Now() - start);
    const std::map<std::string, std::string> expected = CorpusFiles(out_);
    fs::remove_all(out_);
    for (int attempt = 0;; ++attempt) {
      ASSERT_LT(attempt, 1000);
      const int64_t delay = static_cast<int64_t>(random()) % (micros + micros / 8);
      const Outcome run = RunMtcorpus(arguments, log, 0, pipe ? file : "/dev/null", delay);
      went_on += absl::StrContains(run.output, "going on");
      if (run.code == 0) break;
      ASSERT_EQ(run.code, 128 + SIGKILL) << run.output;
      ++kills;
      if (!fs::exists(OutFile(kManifestFile))) continue;
      ASSERT_OK(OpenAndReadAll());  // It was killed when all was done.
      break;
    }
    std::map<std::string, std::string> files = CorpusFiles(out_);
    for (const char* stray : {"unfinished.json", "unfinished.index", "unfinished.text"}) {
      if (files.count(kManifestFile) > 0) files.erase(stray);  // Killed between the last two calls.
    }
    ASSERT_EQ(files.size(), expected.size()) << round;
    for (const auto& [name, contents] : expected) ASSERT_TRUE(files[name] == contents) << round << " " << name;
  }
  EXPECT_GT(went_on, kills / 4);
}

TEST_F(CorpusTest, WhatIsFinishedIsNotDoneAgain) {
  ASSERT_OK(WriteFile(input_, Text(2000)));
  PrepOptions options = Options("bpe:300");
  options.shard_tokens = 5000;
  Prepare(options);
  const auto expected = CorpusFiles(out_);
  fs::remove_all(out_);
  const auto phases = [&](const PrepOptions& before) {
    PrepOptions again = before;
    std::map<std::string, int64_t> first;  // Bytes that were done when a phase was first heard of.
    again.progress = [&](absl::string_view phase, int64_t done, int64_t) { first.insert({std::string(phase), done}); };
    Prepare(again);
    return first;
  };
  KillAt(options, "training tokenizer", 0.5);
  EXPECT_THAT(OpenAndReadAll(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("the same command goes on")));
  auto seen = phases(options);
  EXPECT_EQ(seen.count("reading"), 0u);
  EXPECT_EQ(seen.count("training tokenizer"), 1u);
  EXPECT_TRUE(CorpusFiles(out_) == expected);

  fs::remove_all(out_);
  KillAt(options, "writing", 0.6);
  seen = phases(options);
  EXPECT_EQ(seen.count("reading") + seen.count("training tokenizer"), 0u);
  EXPECT_GT(seen["writing"], 60'000);  // Of 130,000.
  EXPECT_TRUE(CorpusFiles(out_) == expected);

  fs::remove_all(out_);
  KillAt(options, "counting", 0.5);
  options.overwrite = true;  // Replaces a corpus, or what is another's.
  seen = phases(options);
  EXPECT_EQ(seen["writing"], static_cast<int64_t>(Text(2000).size()));
  EXPECT_TRUE(CorpusFiles(out_) == expected);

  // A file of one document that is longer than the parts it is read in.
  std::string one = "ala";
  for (int i = 0; i < 300'000; ++i) absl::StrAppend(&one, " ma ", i % 1000);
  ASSERT_OK(WriteFile(input_, one + "\n\nval\n\ntest"));
  options.shard_tokens = 100'000;
  Prepare(options);
  const auto long_document = CorpusFiles(out_);
  KillAt(options, "writing", 0.9);
  seen = phases(options);
  EXPECT_GT(seen["writing"], 1'000'000);
  EXPECT_TRUE(CorpusFiles(out_) == long_document);
}

TEST_F(CorpusTest, UnfinishedWorkOfAnotherCommandOrInputIsNamed) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const std::string text = Text(2000);
  ASSERT_OK(WriteFile(input_, text));
  PrepOptions options = Options();
  options.shard_tokens = 15'000;
  const auto kill = [&] {
    fs::remove_all(out_);
    KillAt(options, "writing", 0.5);
  };
  kill();
  const auto left = CorpusFiles(out_);
  PrepOptions other = options;
  other.seed = 5;
  other.tokenizer = "bpe:300";
  EXPECT_THAT(PrepareCorpus(other),
              StatusIs(kInvalid, AllOf(HasSubstr("--seed was 0 and is 5"),
                                       HasSubstr("--tokenizer was char and is bpe:300"), HasSubstr("--overwrite"))));
  ASSERT_OK(WriteFile(input_, text + "x"));
  EXPECT_THAT(PrepareCorpus(options), StatusIs(kInvalid, AllOf(HasSubstr(input_), HasSubstr("has changed since"))));
  std::string same_size = text;
  same_size[same_size.size() / 2] = 'q';
  ASSERT_OK(WriteFile(input_, same_size));
  EXPECT_THAT(PrepareCorpus(options), StatusIs(kInvalid, HasSubstr("has changed since")));
  EXPECT_TRUE(CorpusFiles(out_) == left);
  ASSERT_OK(WriteFile(input_, text));  // Another file of the same bytes.
  EXPECT_THAT(PrepareCorpus(options), IsOk());
  ExpectWhole();
  const auto expected = CorpusFiles(out_);

  kill();
  ASSERT_OK(WriteFile(input_, Text(100)));
  PrepOptions replace = options;
  replace.overwrite = true;
  EXPECT_THAT(PrepareCorpus(replace), IsOk());
  EXPECT_EQ(ReadManifest(out_)->splits[0].documents, 85);
  ExpectWhole();

  // Another process at work.
  ASSERT_OK(WriteFile(input_, text));
  kill();
  const int folder = ::open(out_.c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_EQ(::flock(folder, LOCK_EX), 0);
  EXPECT_THAT(PrepareCorpus(options),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another mtcorpus prep")));
  ::close(folder);
  // Whatever is damaged is not gone on with.
  std::mt19937 random(6);
  for (int i = 0; i < 25; ++i) {
    kill();
    std::vector<std::string> names = OutFiles();
    const std::string name = OutFile(names[random() % names.size()]);
    std::string bytes = ReadFile(name).value();
    if (bytes.empty()) continue;
    const size_t at = random() % bytes.size();
    if (i % 3 == 0) {
      bytes.resize(at);
    } else {
      bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
    }
    ASSERT_OK(WriteFile(name, bytes));
    absl::StatusOr<Manifest> manifest = PrepareCorpus(options);
    if (!manifest.ok()) {  // A block is only seen to be damaged when it is counted: named, and nothing is left.
      ASSERT_THAT(manifest, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(".bin"))) << name;
      ASSERT_FALSE(fs::exists(OutFile(kManifestFile)));
      manifest = PrepareCorpus(options);
    }
    ASSERT_OK(manifest);
    ASSERT_TRUE(CorpusFiles(out_) == expected) << name << " at " << at;
  }
}

TEST_F(CorpusTest, FoldersAndPipesGoOnIfTheyAreTheSame) {
  const std::string texts = absl::StrCat(folder_, "/texts");
  fs::create_directories(texts);
  for (int i = 0; i < 300; ++i) ASSERT_OK(WriteFile(absl::StrCat(texts, "/", 100 + i), Text(1 + i % 9)));
  PrepOptions options = Options();
  options.input = texts;
  options.shard_tokens = 5000;
  KillAt(options, "writing", 0.5);
  ASSERT_OK(WriteFile(texts + "/150a", "new"));
  EXPECT_THAT(PrepareCorpus(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("150a: is new since")));
  fs::remove(texts + "/150a");
  fs::rename(texts + "/150", texts + "/.150");
  EXPECT_THAT(PrepareCorpus(options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("150: is no longer there")));
  fs::rename(texts + "/.150", texts + "/150");
  int64_t read = 0;
  options.progress = [&](absl::string_view phase, int64_t, int64_t) { read += phase == "reading"; };
  ASSERT_THAT(PrepareCorpus(options), IsOk());
  EXPECT_EQ(read, 0);
  ExpectWhole();

  fs::remove_all(out_);
  const std::string log = absl::StrCat(folder_, "/log");
  ASSERT_OK(WriteFile(input_, Text(3000)));
  const std::vector<std::string> piped = {"prep", "--input",        "-",    "--out", out_, "--tokenizer",
                                          "char", "--shard-tokens", "10000"};
  Outcome run = RunMtcorpus(piped, log, 0, input_);
  ASSERT_EQ(run.code, 0) << run.output;
  const auto expected = CorpusFiles(out_);
  fs::remove_all(out_);
  run = {};
  for (int64_t delay = 1000; run.code != 0 && !fs::exists(OutFile("train-00001.bin")); delay += delay / 4) {
    run = RunMtcorpus(piped, log, 0, input_, delay);
  }
  if (run.code != 0) {
    ASSERT_OK(WriteFile(folder_ + "/other", Text(2999)));
    run = RunMtcorpus(piped, log, 0, folder_ + "/other");
    EXPECT_EQ(run.code, 2) << run.output;
    EXPECT_THAT(run.output, HasSubstr("standard input: has changed since"));
    run = RunMtcorpus(piped, log, 0, input_);
    EXPECT_EQ(run.code, 0) << run.output;
    EXPECT_THAT(run.output, HasSubstr("going on"));
  }
  EXPECT_TRUE(CorpusFiles(out_) == expected);
}

TEST_F(CorpusTest, AKilledPreparationIsNoCorpus) {
  ASSERT_OK(WriteFile(input_, Text(3000)));
  PrepOptions options = Options();
  options.shard_tokens = 1000;
  KillAt(options, "writing", 0.5);
  const std::vector<std::string> left = OutFiles();
  EXPECT_GT(left.size(), 3u);
  EXPECT_THAT(absl::StrJoin(left, " "), HasSubstr(".tmp-"));
  EXPECT_THAT(OpenAndReadAll(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("did not finish")));
  EXPECT_EQ(RunMtcorpus({"stat", out_}, absl::StrCat(folder_, "/log")).code, 4);
  ASSERT_OK(WriteFile(OutFile("notes.txt"), "not ours"));
  options = Options();
  options.overwrite = true;
  Prepare(options);
  EXPECT_THAT(OutFiles(), ElementsAre("manifest.json", "notes.txt", "test-00000.bin", "tokenizer.json",
                                      "train-00000.bin", "val-00000.bin"));
}

// The installed program, where it was built beside this test.
TEST_F(CorpusTest, TheProgramItself) {
  const std::string program = absl::StrCat(MT_BINARY_DIR, "/bin/mtcorpus");
  if (!fs::exists(program)) GTEST_SKIP() << program << " is not built";
  const auto code = [&](const std::string& arguments) {
    const int status = std::system(absl::StrCat(program, " ", arguments, " > ", folder_, "/log 2>&1").c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  ASSERT_OK(WriteFile(input_, Text(20)));
  EXPECT_EQ(code(absl::StrCat("prep --input ", input_, " --out ", out_, " --tokenizer char")), 0);
  EXPECT_EQ(code(absl::StrCat("stat ", out_)), 0);
  EXPECT_EQ(code(absl::StrCat("stat ", folder_)), 4);
  EXPECT_EQ(code("prep"), 2);
  EXPECT_EQ(code("--version"), 0);
}

}  // namespace
}  // namespace mt
