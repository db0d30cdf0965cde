#include "runtime/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <fstream>
#include <limits>
#include <mutex>
#include <sstream>
#include <thread>
#include <vector>

#include "ir/base/check.h"

namespace mt {
namespace {

// CPUs in the affinity mask of this process.
int AffinityCpus() {
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {  // The kernel refuses a mask smaller than its own.
    cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(cpus));
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpus));
    const bool ok = sched_getaffinity(0, bytes, mask) == 0;
    const int count = ok ? CPU_COUNT_S(bytes, mask) : 0;
    CPU_FREE(mask);
    if (ok) return std::max(count, 1);
  }
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

// quota / period, rounded up; the largest int where the files say no limit or cannot be read.
constexpr int kNoLimit = std::numeric_limits<int>::max();
int CpusOfQuota(int64_t quota, int64_t period) {
  if (quota <= 0 || period <= 0) return kNoLimit;
  return static_cast<int>(std::clamp<int64_t>((quota - 1) / period + 1, 1, kNoLimit));
}

// v2: "max 100000" or "150000 100000".
int LimitOfV2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  int64_t quota = 0, period = 0;
  if (!(file >> quota >> period)) return kNoLimit;
  return CpusOfQuota(quota, period);
}

int LimitOfV1(const std::string& folder) {
  int64_t quota = 0, period = 0;
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  if (!(quota_file >> quota) || !(period_file >> period)) return kNoLimit;
  return CpusOfQuota(quota, period);
}

// The least limit of a group and the groups above it. A container may see its own group as the root: then the path of
// /proc names folders that are not there, and only the root counts.
int LimitOfPath(const std::string& mount, std::string path, int (*limit_of)(const std::string&)) {
  int limit = limit_of(mount);
  while (!path.empty() && path != "/") {
    limit = std::min(limit, limit_of(mount + path));
    path.erase(path.rfind('/'));
  }
  return limit;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a few microseconds for `done`; true if it came.
template <typename F>
bool SpinFor(const F& done) {
  constexpr auto kSpin = std::chrono::microseconds(5);
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  return done();
}

}  // namespace

namespace internal {

int CgroupCpus(const std::string& root) {
  int limit = kNoLimit;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1).
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (!path.empty() && path[0] != '/') continue;
    if (controllers.empty()) {
      limit = std::min(limit, LimitOfPath(root + "/sys/fs/cgroup", path, LimitOfV2));
      continue;
    }
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) {
      if (name != "cpu") continue;
      for (const char* const mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
        limit = std::min(limit, LimitOfPath(root + mount, path, LimitOfV1));
      }
    }
  }
  return limit;
}

}  // namespace internal

int AvailableCpus() { return std::min(AffinityCpus(), internal::CgroupCpus("")); }

// One Run at a time. `claim` holds the number of the run (high 32 bits) and how many tasks are unclaimed (low 32 bits):
// a worker that wakes late sees either nothing to claim or a run whose caller is still waiting, never a mixture.
struct ThreadPool::State {
  std::atomic<uint64_t> claim{0};
  std::atomic<const std::function<void(int64_t)>*> body{nullptr};
  std::atomic<int64_t> tasks{0}, first_task{0};
  std::atomic<int64_t> unfinished{0};

  // Sleeping. A sleeper announces itself before its last look at what it waits for; who changes that looks for sleepers
  // afterwards. Both in one order (seq_cst), so that one of the two sees the other.
  std::mutex mutex;
  std::condition_variable work, done;
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};

  std::vector<std::thread> threads;

  bool HasWork() const { return (claim.load() & 0xFFFFFFFFu) != 0; }

  // Claims and runs tasks until none is left.
  void Work() {
    int64_t finished = 0;
    uint64_t seen = claim.load();
    while ((seen & 0xFFFFFFFFu) != 0) {
      // Values of the run in `seen` or of a later one; in that case the exchange fails.
      const std::function<void(int64_t)>* const task_body = body.load();
      const int64_t task = first_task.load() + tasks.load() - static_cast<int64_t>(seen & 0xFFFFFFFFu);
      if (!claim.compare_exchange_weak(seen, seen - 1)) continue;
      (*task_body)(task);
      ++finished;
      seen = claim.load();
    }
    if (finished != 0 && unfinished.fetch_sub(finished) == finished && caller_sleeps.load()) {
      { const std::lock_guard<std::mutex> lock(mutex); }
      done.notify_one();
    }
  }

  void Loop() {
    while (true) {
      Work();
      if (SpinFor([this] { return HasWork() || stop.load(); })) {
        if (stop.load()) return;
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex);
      sleepers.fetch_add(1);
      work.wait(lock, [this] { return HasWork() || stop.load(); });
      sleepers.fetch_sub(1);
      if (stop.load()) return;
    }
  }

  // At most 2^32 - 1 tasks.
  void RunShare(int64_t first, int64_t count, const std::function<void(int64_t)>& run_body) {
    body.store(&run_body);
    tasks.store(count);
    first_task.store(first);
    unfinished.store(count);
    const uint64_t run = (claim.load() >> 32) + 1;
    claim.store(run << 32 | static_cast<uint64_t>(count));
    if (sleepers.load() > 0) {
      { const std::lock_guard<std::mutex> lock(mutex); }
      const int64_t helpers = std::min<int64_t>(count - 1, static_cast<int64_t>(threads.size()));
      for (int64_t i = 0; i < helpers; ++i) work.notify_one();
    }
    Work();
    if (SpinFor([this] { return unfinished.load() == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex);
    caller_sleeps.store(true);
    done.wait(lock, [this] { return unfinished.load() == 0; });
    caller_sleeps.store(false);
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  CHECK_GE(threads, 1) << "threads";
  for (int i = 1; i < threads; ++i) state_->threads.emplace_back([state = state_.get()] { state->Loop(); });
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true);
  { const std::lock_guard<std::mutex> lock(state_->mutex); }
  state_->work.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(state_->threads.size()) + 1; }

void ThreadPool::Run(int64_t tasks, const std::function<void(int64_t)>& body) {
  if (tasks <= 1 || state_->threads.empty()) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  constexpr int64_t kMost = 0xFFFFFFFF;
  for (int64_t first = 0; first < tasks; first += kMost) {
    state_->RunShare(first, std::min(kMost, tasks - first), body);
  }
}

}  // namespace mt
