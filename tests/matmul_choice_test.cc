#include "runtime/matmul_choice.h"

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/base/file.h"
#include "tests/process.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Candidates with known bits and times; what is asked of them is counted.
class FakeDevice : public MatmulTrials {
 public:
  struct Candidate {
    uint64_t digest = 0;
    double seconds = 0;
    bool runs = true, has_clock = true;
    double first_seconds = 0;  // Of the first time it is asked; 0: as the others.
  };
  explicit FakeDevice(std::vector<Candidate> candidates) : candidates_(std::move(candidates)) {}

  absl::StatusOr<uint64_t> Digest(size_t i) override {
    if (!candidates_[i].runs) return absl::InternalError("not supported");
    return candidates_[i].digest;
  }
  absl::StatusOr<double> Seconds(size_t i, int runs) override {
    runs_[i] += runs;
    if (!candidates_[i].has_clock) return absl::InternalError("no clock");
    const double first = std::exchange(candidates_[i].first_seconds, 0);
    return first > 0 ? first : candidates_[i].seconds;
  }
  int runs(size_t i) const {
    const auto at = runs_.find(i);
    return at == runs_.end() ? 0 : at->second;
  }
  size_t Choose(std::vector<MatmulTrial>* trials = nullptr) { return ChooseMatmul(candidates_.size(), *this, trials); }

 private:
  std::vector<Candidate> candidates_;
  std::map<size_t, int> runs_;
};

TEST(ChooseMatmul, TakesTheFastestOfTheFirstsBits) {
  FakeDevice device({{7, 1.0}, {8, 0.1}, {7, 0.9}, {7, 0.8}, {7, 0.85}});
  EXPECT_EQ(device.Choose(), 3u);
  EXPECT_EQ(device.runs(1), 0) << "other bits are not worth a run";
  std::vector<MatmulTrial> trials;
  EXPECT_EQ(device.Choose(&trials), 3u);
  EXPECT_EQ(trials[1].seconds, 0.1) << "but for who asks";
  ASSERT_EQ(trials.size(), 5u);
  EXPECT_TRUE(trials[0].same_bits);
  EXPECT_FALSE(trials[1].same_bits);
  EXPECT_EQ(trials[3].seconds, 0.8);
}

TEST(ChooseMatmul, StaysWithTheFirstForLessThanAPercent) {
  EXPECT_EQ(FakeDevice({{7, 1.0}, {7, 0.995}}).Choose(), 0u);
  EXPECT_EQ(FakeDevice({{7, 1.0}, {7, 0.98}}).Choose(), 1u);
}

TEST(ChooseMatmul, ASlowFirstRunDecidesNothing) {
  // The first candidate warms the device up; it is timed again in the rounds.
  EXPECT_EQ(FakeDevice({{7, 1.0, true, true, 50.0}, {7, 1.1}, {7, 1.05}}).Choose(), 0u);
}

TEST(ChooseMatmul, TimesNoSlowOneTwice) {
  FakeDevice device({{7, 1.0}, {7, 3.0}, {7, 1.1}});
  EXPECT_EQ(device.Choose(), 0u);
  EXPECT_EQ(device.runs(1), 1);
  EXPECT_GT(device.runs(2), 1);
}

TEST(ChooseMatmul, SixOfManyTakeTurns) {
  std::vector<FakeDevice::Candidate> candidates;
  for (int i = 0; i < 16; ++i) candidates.push_back({7, 1.0 + 0.001 * i});
  FakeDevice device(candidates);
  EXPECT_EQ(device.Choose(), 0u);
  int again = 0;
  for (size_t i = 0; i < 16; ++i) again += device.runs(i) > 1 ? 1 : 0;
  EXPECT_EQ(again, 6);
}

TEST(ChooseMatmul, WhatDoesNotRunIsLeftOut) {
  EXPECT_EQ(FakeDevice({{7, 1.0}, {7, 0.1, false}, {7, 0.5}}).Choose(), 2u);
  EXPECT_EQ(FakeDevice({{7, 1.0, false}, {7, 0.1}}).Choose(), 0u) << "nothing to compare bits with";
  EXPECT_EQ(FakeDevice({{7, 1.0, true, false}, {7, 0.1}}).Choose(), 0u);
  EXPECT_EQ(FakeDevice({{7, 1.0}}).Choose(), 0u);
}

class MatmulCacheTest : public ::testing::Test {
 protected:
  std::string Path() const { return absl::StrCat(dir_.path(), "/caches/matmuls.json"); }
  void Write(absl::string_view text) {
    ASSERT_OK(MakeFolder(absl::StrCat(dir_.path(), "/caches")));
    ASSERT_OK(WriteFile(Path(), text));
  }
  ProcessFolder dir_{"matmul_choice_test"};
};

TEST_F(MatmulCacheTest, RemembersBytes) {
  const std::string algorithm("\0\x01\xff z", 5);
  {
    MatmulCache cache(Path());
    EXPECT_THAT(cache.TakeWarnings(), IsEmpty()) << "no file is no fault";
    EXPECT_EQ(cache.Find("p"), nullptr);
    cache.Put("p", algorithm);
    cache.Save();
    EXPECT_THAT(cache.TakeWarnings(), IsEmpty());
  }
  const MatmulCache again(Path());
  ASSERT_NE(again.Find("p"), nullptr);
  EXPECT_EQ(*again.Find("p"), algorithm);
}

TEST_F(MatmulCacheTest, KeepsWhatOthersAdd) {
  MatmulCache ours(Path()), theirs(Path());
  ours.Put("a", "1");
  ours.Put("both", "ours");
  theirs.Put("b", "2");
  theirs.Put("both", "theirs");
  theirs.Save();
  ours.Save();
  const MatmulCache all(Path());
  for (const auto& [problem, algorithm] :
       std::map<std::string, std::string>{{"a", "1"}, {"b", "2"}, {"both", "ours"}}) {
    ASSERT_NE(all.Find(problem), nullptr) << problem;
    EXPECT_EQ(*all.Find(problem), algorithm);
  }
}

TEST_F(MatmulCacheTest, WritesOnlyWhatIsNew) {
  MatmulCache cache(Path());
  cache.Save();
  EXPECT_FALSE(std::filesystem::exists(Path()));
  cache.Put("p", "1");
  cache.Save();
  std::filesystem::remove(Path());
  cache.Save();
  EXPECT_FALSE(std::filesystem::exists(Path()));
}

TEST_F(MatmulCacheTest, ADamagedFileIsEmptyAndIsReplaced) {
  for (const std::string& text : {
           std::string("not JSON"),
           std::string("[]"),
           std::string("{}"),
           std::string("{\"format\": 1}"),
           std::string("{\"format\": 2, \"algorithms\": {\"p\": \"00\"}}"),
           std::string("{\"format\": 1, \"algorithms\": []}"),
           std::string("{\"format\": 1, \"algorithms\": {\"p\": \"0\"}}"),
           std::string("{\"format\": 1, \"algorithms\": {\"p\": \"\"}}"),
           std::string("{\"format\": 1, \"algorithms\": {\"p\": \"xy\"}}"),
           std::string("{\"format\": 1, \"algorithms\": {\"p\": 5}}"),
           std::string("{\"format\": 1, \"algorithms\": {\"p\": \"00\", \"p\": \"01\"}}"),
           absl::StrCat("{\"format\": 1, \"algorithms\": {\"p\": \"", std::string(1000, '0'), "\"}}"),
           absl::StrCat("{\"format\": 1, \"algorithms\": {\"", std::string(2000, 'p'), "\": \"00\"}}"),
       }) {
    SCOPED_TRACE(text);
    Write(text);
    MatmulCache cache(Path());
    EXPECT_THAT(cache.TakeWarnings(), ElementsAre(HasSubstr(Path())));
    EXPECT_THAT(cache.TakeWarnings(), IsEmpty()) << "said once";
    EXPECT_EQ(cache.Find("p"), nullptr);
    cache.Put("q", "1");
    cache.Save();
    EXPECT_THAT(cache.TakeWarnings(), IsEmpty());
    MatmulCache again(Path());
    EXPECT_THAT(again.TakeWarnings(), IsEmpty());
    EXPECT_NE(again.Find("q"), nullptr);
  }
}

TEST_F(MatmulCacheTest, TooManyBeginAnew) {
  std::string text = "{\"format\": 1, \"algorithms\": {";
  for (int i = 0; i < 4096; ++i) absl::StrAppend(&text, i == 0 ? "" : ",", "\"p", i, "\": \"00\"");
  Write(absl::StrCat(text, "}}"));
  MatmulCache cache(Path());
  ASSERT_NE(cache.Find("p4095"), nullptr);
  cache.Put("one more", "1");
  cache.Save();
  const MatmulCache again(Path());
  EXPECT_NE(again.Find("one more"), nullptr);
  EXPECT_EQ(again.Find("p4095"), nullptr);
}

TEST_F(MatmulCacheTest, AnUnwritableFolderIsOneWarning) {
  ASSERT_OK(WriteFile(absl::StrCat(dir_.path(), "/caches"), "a file where the folder should be"));
  MatmulCache cache(Path());
  cache.Put("p", "1");
  cache.Save();
  EXPECT_THAT(cache.TakeWarnings(), ElementsAre(HasSubstr("cannot open")));
  cache.Save();
  EXPECT_THAT(cache.TakeWarnings(), IsEmpty());
  EXPECT_NE(cache.Find("p"), nullptr);
}

TEST_F(MatmulCacheTest, WithoutAPathNothingIsWritten) {
  MatmulCache cache("");
  cache.Put("p", "1");
  cache.Save();
  EXPECT_THAT(cache.TakeWarnings(), IsEmpty());
  EXPECT_NE(cache.Find("p"), nullptr);
}

}  // namespace
}  // namespace mt
