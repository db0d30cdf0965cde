#include "codegen/memory/arena_packer.h"

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "bench/pack_synthetic.h"
#include "codegen/memory/arena_search.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

PackOptions Bytes() {
  PackOptions options;
  options.alignment = 1;
  return options;
}

// Largest sum of sizes live at one step, by looking at each birth.
int64_t MaxLive(const std::vector<PackInterval>& intervals) {
  int64_t most = 0;
  for (const PackInterval& at : intervals) {
    int64_t sum = 0;
    for (const PackInterval& i : intervals) sum += i.first <= at.first && at.first <= i.last ? i.size_bytes : 0;
    most = std::max(most, sum);
  }
  return most;
}

bool Meet(const PackInterval& a, const PackInterval& b) { return a.first <= b.last && b.first <= a.last; }

// The smallest height of any packing: some order, each buffer as low as the ones before it allow, reaches it.
int64_t BruteForce(const std::vector<PackInterval>& intervals) {
  std::vector<size_t> order(intervals.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  int64_t best = kMax;
  do {
    std::vector<int64_t> offset(intervals.size());
    int64_t height = 0;
    for (size_t k = 0; k < order.size(); ++k) {
      const PackInterval& b = intervals[order[k]];
      int64_t floor = 0;
      for (size_t j = 0; j < k; ++j) {
        const PackInterval& a = intervals[order[j]];
        if (Meet(a, b)) floor = std::max(floor, offset[order[j]] + a.size_bytes);
      }
      offset[order[k]] = floor;
      height = std::max(height, floor + b.size_bytes);
    }
    best = std::min(best, height);
  } while (std::next_permutation(order.begin(), order.end()));
  return intervals.empty() ? 0 : best;
}

// Whether CheckPacking should accept, from all pairs.
bool PairwiseOk(const std::vector<PackInterval>& intervals, const std::vector<int64_t>& offsets, int64_t height) {
  for (size_t i = 0; i < intervals.size(); ++i) {
    if (offsets[i] < 0 || offsets[i] + intervals[i].size_bytes > height) return false;
    for (size_t j = 0; j < i; ++j) {
      if (intervals[i].size_bytes > 0 && intervals[j].size_bytes > 0 && Meet(intervals[i], intervals[j]) &&
          offsets[i] < offsets[j] + intervals[j].size_bytes && offsets[j] < offsets[i] + intervals[i].size_bytes) {
        return false;
      }
    }
  }
  return true;
}

std::vector<PackInterval> RandomIntervals(std::mt19937_64& random, int count, int64_t steps, int64_t size) {
  std::vector<PackInterval> intervals;
  for (int i = 0; i < count; ++i) {
    const int64_t a = static_cast<int64_t>(random() % steps), b = static_cast<int64_t>(random() % steps);
    intervals.push_back({std::min(a, b), std::max(a, b), static_cast<int64_t>(random() % size) + 1});
  }
  return intervals;
}

TEST(PackArena, NothingToPack) {
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena({}));
  EXPECT_EQ(packing.height_bytes, 0);
  EXPECT_EQ(packing.proof, PackProof::kLowerBoundTight);
  ASSERT_OK_AND_ASSIGN(const Packing empty, PackArena(std::vector<PackInterval>{{0, 5, 0}, {3, 3, 0}}));
  EXPECT_THAT(empty.offsets, ElementsAre(0, 0));
  EXPECT_EQ(empty.height_bytes, 0);
}

TEST(PackArena, SharesBytesOverTime) {
  const std::vector<PackInterval> intervals = {{0, 1, 100}, {2, 3, 100}, {1, 2, 50}, {0, 9, 0}};
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals, Bytes()));
  EXPECT_EQ(packing.height_bytes, 150);
  EXPECT_EQ(packing.lower_bound_bytes, 150);
  EXPECT_EQ(packing.proved_bytes, 150);
  EXPECT_EQ(packing.peak_step, 1);
  EXPECT_EQ(packing.proof, PackProof::kLowerBoundTight);
  EXPECT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
}

TEST(PackArena, LifetimesThatTouchInOneStepOverlap) {
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(std::vector<PackInterval>{{0, 4, 8}, {4, 4, 8}}, Bytes()));
  EXPECT_EQ(packing.height_bytes, 16);
  EXPECT_EQ(packing.peak_step, 4);
  ASSERT_OK_AND_ASSIGN(const Packing apart, PackArena(std::vector<PackInterval>{{0, 4, 8}, {5, 5, 8}}, Bytes()));
  EXPECT_EQ(apart.height_bytes, 8);
}

TEST(PackArena, RoundsSizesUpToTheAlignment) {
  const std::vector<PackInterval> intervals = {{0, 2, 1}, {1, 3, 257}, {2, 2, 256}};
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals));
  EXPECT_EQ(packing.height_bytes, 256 + 512 + 256);
  for (const int64_t offset : packing.offsets) EXPECT_EQ(offset % 256, 0);
}

TEST(PackArena, StepsOfAnySignAndSize) {
  const int64_t low = std::numeric_limits<int64_t>::min();
  const std::vector<PackInterval> intervals = {{low, kMax, 3}, {low, -1, 5}, {0, kMax, 5}, {kMax, kMax, 1}};
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals, Bytes()));
  EXPECT_EQ(packing.height_bytes, 9);
  EXPECT_EQ(packing.peak_step, kMax);
  EXPECT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
}

TEST(PackArena, RefusesBadInput) {
  const auto pack = [](std::vector<PackInterval> intervals) { return PackArena(intervals, Bytes()).status(); };
  const auto invalid = [](auto message) { return StatusIs(absl::StatusCode::kInvalidArgument, message); };
  EXPECT_THAT(pack({{0, 1, 8}, {5, 4, 8}}), invalid(AllOf(HasSubstr("buffer 1"), HasSubstr("ends before it begins"))));
  EXPECT_THAT(pack({{0, 1, -8}}), invalid(AllOf(HasSubstr("buffer 0"), HasSubstr("negative size"))));
  EXPECT_THAT(pack({{0, 1, kMax}}), invalid(HasSubstr("62 bits")));
  EXPECT_THAT(pack({{0, 1, kMax / 3}, {0, 1, kMax / 3}}), invalid(HasSubstr("buffer 1")));
  EXPECT_THAT(PackArena(std::vector<PackInterval>{{0, 1, (int64_t{1} << 62) - 1}}).status(), IsOk());
  EXPECT_THAT(PackArena(std::vector<PackInterval>{{0, 1, int64_t{1} << 62}, {0, 0, 1}}).status(),
              invalid(HasSubstr("62 bits")));
  for (const int64_t alignment : {int64_t{0}, int64_t{-1}, kMax}) {
    PackOptions options;
    options.alignment = alignment;
    EXPECT_THAT(PackArena({}, options).status(), invalid(HasSubstr("alignment")));
  }
  PackOptions options;
  options.threads = 0;
  EXPECT_THAT(PackArena({}, options).status(), invalid(HasSubstr("threads")));
  options = PackOptions();
  options.search_limit = -1;
  EXPECT_THAT(PackArena({}, options).status(), invalid(HasSubstr("search limit")));
}

// Instances whose optimum is above the lower bound; they are rare among small ones.
const std::vector<PackInterval> kGapped[] = {
    {{1, 2, 2}, {2, 5, 1}, {5, 6, 2}, {2, 4, 1}, {6, 6, 2}, {4, 5, 1}, {1, 1, 2}},
    {{3, 5, 3}, {0, 1, 3}, {4, 5, 3}, {1, 2, 2}, {1, 3, 1}, {0, 0, 3}, {2, 3, 1}},
    {{3, 7, 3}, {1, 6, 1}, {0, 1, 2}, {1, 2, 2}, {0, 0, 3}, {2, 4, 1}, {7, 7, 2}}};

TEST(PackArena, ProvesAnOptimumAboveTheLowerBound) {
  for (const std::vector<PackInterval>& intervals : kGapped) {
    ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals, Bytes()));
    EXPECT_EQ(packing.lower_bound_bytes, MaxLive(intervals));
    EXPECT_GT(packing.height_bytes, packing.lower_bound_bytes);
    EXPECT_EQ(packing.height_bytes, BruteForce(intervals));
    EXPECT_EQ(packing.proved_bytes, packing.height_bytes);
    EXPECT_EQ(packing.proof, PackProof::kSearchExhausted);
    EXPECT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
    PackOptions options = Bytes();
    options.search_limit = 0;
    ASSERT_OK_AND_ASSIGN(const Packing unproved, PackArena(intervals, options));
    EXPECT_EQ(unproved.proof, PackProof::kGap);
    EXPECT_EQ(unproved.proved_bytes, packing.lower_bound_bytes);
  }
}

TEST(PackArena, AgreesWithBruteForce) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 400; ++round) {
    const std::vector<PackInterval> intervals =
        RandomIntervals(random, 1 + static_cast<int>(random() % 7), 2 + static_cast<int64_t>(random() % 8), 9);
    ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals, Bytes()));
    ASSERT_EQ(packing.height_bytes, BruteForce(intervals)) << "round " << round;
    ASSERT_EQ(packing.lower_bound_bytes, MaxLive(intervals));
    ASSERT_EQ(packing.proved_bytes, packing.height_bytes);
    ASSERT_EQ(packing.proof, packing.height_bytes == packing.lower_bound_bytes ? PackProof::kLowerBoundTight
                                                                               : PackProof::kSearchExhausted);
    ASSERT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
  }
}

// The search alone, without constructive packings to help it: feasible exactly from the optimum on.
TEST(SearchCapacity, DecidesLikeBruteForce) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 300; ++round) {
    const std::vector<PackInterval> intervals =
        RandomIntervals(random, 1 + static_cast<int>(random() % 7), 2 + static_cast<int64_t>(random() % 8), 6);
    std::vector<SectionBuffer> buffers;
    std::vector<int64_t> firsts, lasts;
    for (const PackInterval& i : intervals) {
      buffers.push_back({0, 0, i.size_bytes, i.last - i.first + 1});
      firsts.push_back(i.first);
      lasts.push_back(i.last);
    }
    const int32_t sections = ComputeSections(firsts, lasts, absl::MakeSpan(buffers));
    for (size_t i = 0; i < buffers.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        ASSERT_EQ(Meet(intervals[i], intervals[j]), buffers[i].lo <= buffers[j].hi && buffers[j].lo <= buffers[i].hi);
      }
    }
    const int64_t best = BruteForce(intervals);
    const SearchOutcome below = SearchCapacity(buffers, sections, best - 1, 10'000'000, 1);
    ASSERT_EQ(below.result, SearchResult::kInfeasible) << "round " << round;
    const SearchOutcome at = SearchCapacity(buffers, sections, best, 10'000'000, 1);
    ASSERT_EQ(at.result, SearchResult::kFound) << "round " << round;
    ASSERT_OK(CheckPacking(intervals, at.offsets, best));
  }
}

TEST(PackArena, RandomInstancesAreValidAndBounded) {
  std::mt19937_64 random(3);
  for (const int count : {10, 100, 600, 2000}) {
    for (const int64_t steps : {5, 50, 5000}) {
      const std::vector<PackInterval> intervals = RandomIntervals(random, count, steps, 1 << 20);
      PackOptions options;
      options.search_limit = 50'000;
      ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals, options));
      ASSERT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
      ASSERT_TRUE(PairwiseOk(intervals, packing.offsets, packing.height_bytes));
      ASSERT_LE(packing.lower_bound_bytes, packing.proved_bytes);
      ASSERT_LE(packing.proved_bytes, packing.height_bytes);
    }
  }
}

TEST(PackArena, IdenticalBuffersStackExactly) {
  std::vector<PackInterval> intervals;
  for (int i = 0; i < 60; ++i) intervals.push_back({i / 6, i / 6 + 2, 4096});
  ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals));
  EXPECT_EQ(packing.height_bytes, 18 * 4096);
  EXPECT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
}

TEST(PackArena, ResultDependsOnNeitherThreadsNorTheRun) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 6; ++round) {
    const int count = round % 3 == 2 ? 1600 : 60;
    const std::vector<PackInterval> intervals = RandomIntervals(random, count, count == 60 ? 40 : 400, 64);
    PackOptions options = Bytes();
    options.search_limit = 50'000;
    options.threads = 1;
    ASSERT_OK_AND_ASSIGN(const Packing one, PackArena(intervals, options));
    for (const int threads : {2, 5}) {
      options.threads = threads;
      ASSERT_OK_AND_ASSIGN(const Packing other, PackArena(intervals, options));
      ASSERT_EQ(one.offsets, other.offsets) << "round " << round << ", " << threads << " threads";
      ASSERT_EQ(one.search_work, other.search_work);
      ASSERT_EQ(one.proof, other.proof);
    }
  }
}

TEST(PackArena, TrainingStepsReachTheLowerBound) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    for (const bool remat : {false, true}) {
      for (const int64_t chunks : {1, 8}) {
        SyntheticOptions options;
        options.seed = seed;
        options.remat = remat;
        options.loss_chunks = chunks;
        options.fused_update = seed % 2 == 0;
        options.buffers = seed == 5 ? 6000 : 800;
        const std::vector<PackInterval> intervals = SyntheticTraining(options);
        ASSERT_OK_AND_ASSIGN(const Packing packing, PackArena(intervals));
        ASSERT_OK(CheckPacking(intervals, packing.offsets, packing.height_bytes));
        EXPECT_LE(static_cast<double>(packing.height_bytes), 1.001 * static_cast<double>(packing.lower_bound_bytes))
            << "seed " << seed << ", remat " << remat << ", chunks " << chunks;
      }
    }
  }
}

TEST(PackArena, CapacityEndsTheSearchOrIsRefuted) {
  for (const std::vector<PackInterval>& intervals : kGapped) {
    const int64_t best = BruteForce(intervals);
    PackOptions options = Bytes();
    options.capacity = best + 2;
    ASSERT_OK_AND_ASSIGN(const Packing loose, PackArena(intervals, options));
    EXPECT_LE(loose.height_bytes, best + 2);
    EXPECT_EQ(loose.search_work, 0);
    options.capacity = best - 1;
    ASSERT_OK_AND_ASSIGN(const Packing refused, PackArena(intervals, options));
    EXPECT_GE(refused.height_bytes, best);
    EXPECT_EQ(refused.proved_bytes, best);
  }
}

TEST(CheckPacking, NamesBothBuffersOfAPlantedOverlap) {
  const std::vector<PackInterval> intervals = {{0, 9, 100}, {2, 5, 64}, {5, 7, 32}, {8, 9, 64}};
  EXPECT_OK(CheckPacking(intervals, {0, 100, 164, 100}, 196));
  EXPECT_THAT(
      CheckPacking(intervals, {0, 100, 160, 100}, 196),
      StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("buffer 1 (steps 2..5, 64 bytes) at offset 100"),
                                                         HasSubstr("buffer 2 (steps 5..7, 32 bytes) at offset 160"),
                                                         HasSubstr("bytes 160..163 (4 bytes) in steps 5..5"))));
}

TEST(CheckPacking, RefusesWhatIsOutsideOfTheArena) {
  const std::vector<PackInterval> intervals = {{0, 1, 8}};
  const auto invalid = [](auto message) { return StatusIs(absl::StatusCode::kInvalidArgument, message); };
  EXPECT_THAT(CheckPacking(intervals, {1}, 8), invalid(HasSubstr("outside")));
  EXPECT_THAT(CheckPacking(intervals, {-1}, 8), invalid(HasSubstr("outside")));
  EXPECT_THAT(CheckPacking(intervals, {kMax}, kMax), invalid(HasSubstr("outside")));
  EXPECT_THAT(CheckPacking(intervals, {}, 8), invalid(HasSubstr("0 offsets for 1 buffers")));
}

TEST(CheckPacking, AgreesWithAllPairs) {
  std::mt19937_64 random(6);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<PackInterval> intervals = RandomIntervals(random, 2 + static_cast<int>(random() % 8), 12, 6);
    if (round % 5 == 0) intervals[0].size_bytes = 0;
    PackOptions options = Bytes();
    options.search_limit = 0;
    ASSERT_OK_AND_ASSIGN(Packing packing, PackArena(intervals, options));
    packing.offsets[random() % packing.offsets.size()] += static_cast<int64_t>(random() % 7) - 3;
    const bool ok = PairwiseOk(intervals, packing.offsets, packing.height_bytes);
    ASSERT_EQ(CheckPacking(intervals, packing.offsets, packing.height_bytes).ok(), ok) << "round " << round;
    (ok ? accepted : refused) += 1;
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace mt
