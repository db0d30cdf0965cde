// The CPU backend's threads.
#ifndef MT_RUNTIME_CPU_THREAD_POOL_H_
#define MT_RUNTIME_CPU_THREAD_POOL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace mt {

// The number of CPUs this process may use: affinity mask and cgroup quota (v1 and v2), at least 1.
int AvailableCpus();

namespace internal {
// The cgroup's part of AvailableCpus, rounded up to whole CPUs: the least quota of this process's group and those above
// it, the largest int where there is none. `root` is put before /proc and /sys.
int CgroupCpus(const std::string& root);
}  // namespace internal

// A fixed set of threads that wait passively (no spinning past a few microseconds) and are pinned to nothing.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // >= 1, the calling thread included.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Runs body(i) for every i in [0, tasks), in any order on any thread; returns when all are done. Which task computes
  // what must not depend on the number of threads: results are the same bits for any pool. Allocates nothing. Not
  // reentrant.
  void Run(int64_t tasks, const std::function<void(int64_t)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mt

#endif  // MT_RUNTIME_CPU_THREAD_POOL_H_
