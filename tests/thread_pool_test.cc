#include "runtime/cpu/thread_pool.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "runtime/allocations.h"
#include "tests/test_util.h"

namespace mt {
namespace {

TEST(ThreadPoolTest, RunsEveryTaskOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.num_threads(), threads);
    for (const int64_t tasks : {0, 1, 2, 3, 17, 1000}) {
      std::vector<int> count(static_cast<size_t>(tasks) + 1, 0);  // Plain ints: two threads on one task are a race.
      pool.Run(tasks, [&](int64_t i) { ++count[static_cast<size_t>(i)]; });
      for (int64_t i = 0; i < tasks; ++i) EXPECT_EQ(count[static_cast<size_t>(i)], 1) << i << " of " << tasks;
      EXPECT_EQ(count.back(), 0);
    }
  }
}

// Results of a run are visible to the next one, and late workers never mix two runs.
TEST(ThreadPoolTest, ManyShortRuns) {
  for (const int threads : {2, 5}) {
    ThreadPool pool(threads);
    std::vector<int64_t> values(7, 0);
    int64_t expected = 0;
    for (int64_t run = 0; run < 20000; ++run) {
      const int64_t tasks = 2 + run % 6;
      pool.Run(tasks, [&](int64_t i) { values[static_cast<size_t>(i)] += run; });
      expected += tasks * run;
      if (run % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // Workers fall asleep.
    }
    int64_t sum = 0;
    for (const int64_t value : values) sum += value;
    EXPECT_EQ(sum, expected);
  }
}

TEST(ThreadPoolTest, UsesItsThreads) {
  ThreadPool pool(3);
  std::atomic<int> arrived{0};
  // Each task waits for the two others: only three threads at once get through.
  pool.Run(3, [&](int64_t) {
    arrived.fetch_add(1);
    while (arrived.load() < 3) std::this_thread::yield();
  });
  EXPECT_EQ(arrived.load(), 3);
}

TEST(ThreadPoolTest, OneThreadRunsInline) {
  ThreadPool pool(1);
  std::set<std::thread::id> ids;
  std::vector<int64_t> order;
  pool.Run(5, [&](int64_t i) {
    ids.insert(std::this_thread::get_id());
    order.push_back(i);
  });
  EXPECT_THAT(ids, testing::ElementsAre(std::this_thread::get_id()));
  EXPECT_THAT(order, testing::ElementsAre(0, 1, 2, 3, 4));
}

TEST(ThreadPoolTest, RunAllocatesNothing) {
  if (!CanCountAllocations()) GTEST_SKIP() << "this build cannot count allocations";
  ThreadPool pool(3);
  std::atomic<int64_t> sum{0};
  const std::function<void(int64_t)> body = [&](int64_t i) { sum.fetch_add(i); };
  pool.Run(8, body);
  StartCountingAllocations();
  for (int run = 0; run < 1000; ++run) pool.Run(8, body);
  const AllocationCounts counts = StopCountingAllocations();
  EXPECT_EQ(counts.count + counts.small_count, 0);
  EXPECT_EQ(sum.load(), 1001 * 28);
}

TEST(ThreadPoolTest, WaitsPassively) {
  ThreadPool pool(2);
  pool.Run(2, [](int64_t) {});
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double cpu_seconds = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  EXPECT_LT(cpu_seconds, 0.05);
}

TEST(AvailableCpusTest, HonoursAffinity) {
  cpu_set_t all, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  EXPECT_GE(AvailableCpus(), 1);
  EXPECT_LE(AvailableCpus(), CPU_COUNT(&all));
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(AvailableCpus(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof all, &all), 0);
}

class CgroupTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "cgroup_test_" + testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

constexpr int kNoLimit = std::numeric_limits<int>::max();

TEST_F(CgroupTest, NothingThere) { EXPECT_EQ(internal::CgroupCpus(root_), kNoLimit); }

TEST_F(CgroupTest, Version2TakesTheLeastOfItsPath) {
  Write("/proc/self/cgroup", "0::/user.slice/job\n");
  EXPECT_EQ(internal::CgroupCpus(root_), kNoLimit);
  Write("/sys/fs/cgroup/user.slice/job/cpu.max", "max 100000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), kNoLimit);
  Write("/sys/fs/cgroup/user.slice/cpu.max", "250000 100000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), 3);
  Write("/sys/fs/cgroup/user.slice/job/cpu.max", "50000 100000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), 1);
}

TEST_F(CgroupTest, Version2InAContainer) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), 2);
}

TEST_F(CgroupTest, Version1) {
  Write("/proc/self/cgroup", "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), kNoLimit);
  Write("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "400000\n");
  EXPECT_EQ(internal::CgroupCpus(root_), 4);
}

TEST_F(CgroupTest, DamagedFilesAreNoLimit) {
  Write("/proc/self/cgroup", "nonsense\n::\n0:\n4:cpu:relative\n0::/a\n");
  Write("/sys/fs/cgroup/a/cpu.max", "many 100000\n");
  Write("/sys/fs/cgroup/cpu.max", "100000 0\n");
  EXPECT_EQ(internal::CgroupCpus(root_), kNoLimit);
}

}  // namespace
}  // namespace mt
