#include "runtime/step_dependencies.h"

#include <algorithm>
#include <iterator>

namespace mt {

void StepDependencies::Split(uint64_t at) {
  auto next = segments_.lower_bound(at);
  if (next != segments_.end() && next->first == at) return;
  if (next == segments_.begin()) return;
  const auto before = std::prev(next);
  if (before->second.end <= at) return;
  Segment rest = before->second;
  before->second.end = at;
  segments_.emplace_hint(next, at, std::move(rest));
}

bool StepDependencies::IsAncestor(int step, int of) const {
  const std::vector<uint64_t>& bits = ancestors_[static_cast<size_t>(of)];
  const size_t word = static_cast<size_t>(step) / 64;
  return word < bits.size() && (bits[word] >> (step % 64) & 1) != 0;
}

std::vector<int> StepDependencies::Add(absl::Span<const MemoryAccess> accesses, int also) {
  const int step = size();
  std::vector<int> found;
  if (also >= 0) found.push_back(also);
  for (const MemoryAccess& access : accesses) {
    if (access.begin >= access.end) continue;
    Split(access.begin);
    Split(access.end);
    uint64_t at = access.begin;
    for (auto s = segments_.lower_bound(access.begin); at < access.end; ++s) {
      if (s == segments_.end() || s->first > at) {
        const uint64_t end = s == segments_.end() ? access.end : std::min(access.end, s->first);
        s = segments_.emplace_hint(s, at, Segment{.end = end});
      }
      Segment& segment = s->second;
      if (segment.writer >= 0) found.push_back(segment.writer);
      if (access.writes) {
        found.insert(found.end(), segment.readers.begin(), segment.readers.end());
        segment.writer = step;
        segment.readers.clear();
      } else if (segment.readers.empty() || segment.readers.back() != step) {
        segment.readers.push_back(step);
      }
      at = segment.end;
    }
  }
  std::sort(found.rbegin(), found.rend());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  ancestors_.emplace_back(static_cast<size_t>(step) / 64 + 1);
  waited_for_.push_back(false);
  std::vector<uint64_t>& bits = ancestors_.back();
  std::vector<int> direct;
  for (const int other : found) {
    if (other == step || IsAncestor(other, step)) continue;
    direct.push_back(other);
    waited_for_[static_cast<size_t>(other)] = true;
    const std::vector<uint64_t>& of_other = ancestors_[static_cast<size_t>(other)];
    for (size_t w = 0; w < of_other.size(); ++w) bits[w] |= of_other[w];
    bits[static_cast<size_t>(other) / 64] |= uint64_t{1} << (other % 64);
  }
  return direct;
}

std::vector<int> StepDependencies::Leaves() const {
  std::vector<int> leaves;
  for (int i = 0; i < size(); ++i) {
    if (!waited_for_[static_cast<size_t>(i)]) leaves.push_back(i);
  }
  return leaves;
}

}  // namespace mt
