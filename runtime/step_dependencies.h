// Which steps of a program must wait for which others, by what they read and write: the edges of its graph.
#ifndef MT_RUNTIME_STEP_DEPENDENCIES_H_
#define MT_RUNTIME_STEP_DEPENDENCIES_H_

#include <cstdint>
#include <map>
#include <vector>

#include "absl/types/span.h"

namespace mt {

// Bytes [begin, end) that a step reads or writes.
struct MemoryAccess {
  uint64_t begin = 0, end = 0;
  bool writes = false;
};

// Steps in the order in which they were planned; a step depends on an earlier one where one of them writes what the
// other reads or writes.
class StepDependencies {
 public:
  // Adds a step: those that it has to wait for and that none of them waits for already, latest first. It waits for
  // `also` in any case; -1: none.
  std::vector<int> Add(absl::Span<const MemoryAccess> accesses, int also = -1);
  int size() const { return static_cast<int>(ancestors_.size()); }
  // Steps that no other waits for.
  std::vector<int> Leaves() const;

 private:
  struct Segment {
    uint64_t end = 0;
    int writer = -1;
    std::vector<int> readers;  // Since it was written.
  };
  void Split(uint64_t at);
  bool IsAncestor(int step, int of) const;

  std::map<uint64_t, Segment> segments_;  // By where they begin; without gaps between what was accessed.
  std::vector<std::vector<uint64_t>> ancestors_;
  std::vector<bool> waited_for_;
};

}  // namespace mt

#endif  // MT_RUNTIME_STEP_DEPENDENCIES_H_
