// Which steps of a captured program wait for which, against all pairs.
#include "runtime/step_dependencies.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace mt {
namespace {

using ::testing::ElementsAre;

bool Conflict(const std::vector<MemoryAccess>& a, const std::vector<MemoryAccess>& b) {
  for (const MemoryAccess& x : a) {
    for (const MemoryAccess& y : b) {
      if ((x.writes || y.writes) && x.begin < y.end && y.begin < x.end) return true;
    }
  }
  return false;
}

TEST(StepDependenciesTest, ReadersWaitForWritersAndWritersForReaders) {
  StepDependencies steps;
  EXPECT_THAT(steps.Add({{0, 100, true}}), ElementsAre());                     // 0
  EXPECT_THAT(steps.Add({{0, 50, false}, {200, 300, true}}), ElementsAre(0));  // 1
  EXPECT_THAT(steps.Add({{50, 100, false}}), ElementsAre(0));                  // 2
  EXPECT_THAT(steps.Add({{400, 500, true}}), ElementsAre());                   // 3
  EXPECT_THAT(steps.Add({{60, 70, true}}), ElementsAre(2));                    // 4: 0 is before 2 already.
  EXPECT_THAT(steps.Add({{0, 300, false}}), ElementsAre(4, 1));                // 5
  EXPECT_THAT(steps.Leaves(), ElementsAre(3, 5));
}

TEST(StepDependenciesTest, AgreesWithAllPairs) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    StepDependencies steps;
    std::vector<std::vector<MemoryAccess>> accesses;
    std::vector<std::vector<bool>> before;  // By step: which steps it comes after.
    for (int step = 0; step < 60; ++step) {
      std::vector<MemoryAccess> own;
      for (uint32_t i = random() % 4; i < 4; ++i) {
        const uint64_t begin = random() % 64, end = begin + 1 + random() % 12;
        own.push_back({begin, end, random() % 3 == 0});
      }
      const std::vector<int> direct = steps.Add(own);
      EXPECT_TRUE(std::is_sorted(direct.rbegin(), direct.rend()));
      std::vector<bool> after(static_cast<size_t>(step), false), must(after);
      for (const int d : direct) {
        // Not by way of another one.
        EXPECT_FALSE(after[static_cast<size_t>(d)]);
        after[static_cast<size_t>(d)] = true;
        for (int i = 0; i < d; ++i)
          after[static_cast<size_t>(i)] =
              after[static_cast<size_t>(i)] || before[static_cast<size_t>(d)][static_cast<size_t>(i)];
      }
      for (int i = 0; i < step; ++i) {
        if (!Conflict(accesses[static_cast<size_t>(i)], own)) continue;
        must[static_cast<size_t>(i)] = true;
        for (int j = 0; j < i; ++j)
          must[static_cast<size_t>(j)] =
              must[static_cast<size_t>(j)] || before[static_cast<size_t>(i)][static_cast<size_t>(j)];
      }
      EXPECT_EQ(after, must) << "step " << step;
      accesses.push_back(own);
      before.push_back(after);
    }
  }
}

}  // namespace
}  // namespace mt
