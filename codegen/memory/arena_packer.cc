#include "codegen/memory/arena_packer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <queue>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "codegen/memory/arena_search.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr int64_t kLimit = int64_t{1} << 62;

// Occupied stretches [begin, end) of the arena, sorted, disjoint and not touching.
class Runs {
 public:
  struct Run {
    int64_t begin, end;
  };

  void Add(int64_t begin, int64_t end) {
    const auto first =
        std::partition_point(runs_.begin(), runs_.end(), [&](const Run& run) { return run.end < begin; });
    auto last = first;
    for (; last != runs_.end() && last->begin <= end; ++last) {
      begin = std::min(begin, last->begin);
      end = std::max(end, last->end);
    }
    if (first == last) {
      runs_.insert(first, {begin, end});
    } else {
      *first = {begin, end};
      runs_.erase(first + 1, last);
    }
  }
  bool empty() const { return runs_.empty(); }
  const Run* begin() const { return runs_.data(); }
  const Run* end() const { return runs_.data() + runs_.size(); }

 private:
  std::vector<Run> runs_;
};

// What is occupied at which section: a segment tree over sections whose nodes hold runs.
class Occupancy {
 public:
  explicit Occupancy(int32_t num_sections) {
    while (leaves_ < num_sections) leaves_ *= 2;
    cover_.resize(2 * leaves_);
    inside_.resize(2 * leaves_);
  }

  void Add(const SectionBuffer& buffer, int64_t offset) { Add(1, 0, leaves_ - 1, buffer, offset); }

  // The lowest free offset for the buffer, or, with `best_fit`, that of its tightest gap; above all else if none holds
  // it.
  int64_t Find(const SectionBuffer& buffer, bool best_fit) {
    lists_.clear();
    Collect(1, 0, leaves_ - 1, buffer);
    int64_t at = 0, best = -1, best_gap = kLimit;
    while (true) {
      // Rise to where no list covers `at`, then look up to the next occupied byte of any.
      int64_t next = kLimit;
      bool risen = true;
      while (risen) {
        risen = false;
        next = kLimit;
        for (size_t i = 0; i < lists_.size();) {
          auto& [run, end] = lists_[i];
          while (run != end && run->end <= at) ++run;
          if (run == end) {
            lists_[i] = lists_.back();
            lists_.pop_back();
            continue;
          }
          if (run->begin <= at) {
            at = run->end;
            risen = true;
          } else {
            next = std::min(next, run->begin);
          }
          ++i;
        }
      }
      const int64_t gap = next - at;
      if (next == kLimit) return best >= 0 ? best : at;
      if (gap >= buffer.size) {
        if (!best_fit || gap == buffer.size) return at;
        if (gap < best_gap) {
          best = at;
          best_gap = gap;
        }
      }
      at = next;
    }
  }

 private:
  void Add(int32_t node, int32_t lo, int32_t hi, const SectionBuffer& buffer, int64_t offset) {
    inside_[node].Add(offset, offset + buffer.size);
    if (buffer.lo <= lo && hi <= buffer.hi) {
      cover_[node].Add(offset, offset + buffer.size);
      return;
    }
    const int32_t middle = (lo + hi) / 2;
    if (buffer.lo <= middle) Add(2 * node, lo, middle, buffer, offset);
    if (buffer.hi > middle) Add(2 * node + 1, middle + 1, hi, buffer, offset);
  }

  void Collect(int32_t node, int32_t lo, int32_t hi, const SectionBuffer& buffer) {
    if (inside_[node].empty()) return;
    const bool all = buffer.lo <= lo && hi <= buffer.hi;
    const Runs& runs = all ? inside_[node] : cover_[node];
    if (!runs.empty()) lists_.push_back({runs.begin(), runs.end()});
    if (all) return;
    const int32_t middle = (lo + hi) / 2;
    if (buffer.lo <= middle) Collect(2 * node, lo, middle, buffer);
    if (buffer.hi > middle) Collect(2 * node + 1, middle + 1, hi, buffer);
  }

  int32_t leaves_ = 1;
  std::vector<Runs> cover_;  // Of the buffers that are live in all sections of the node but not in all of its parent's.
  std::vector<Runs> inside_;  // Of all buffers that are live in any section of the node.
  std::vector<std::pair<const Runs::Run*, const Runs::Run*>> lists_;
};

enum class Key { kDuration, kSize, kArea, kFirst, kLast };

// How to decode: the buffers of the peak section stacked first in one order, the others put into gaps in another.
struct Combo {
  Key clique, rest;
  bool best_fit;
  bool stack_peak = true;  // False: no stack, all buffers in the order of `rest`.
  bool last_peak = false;  // The last section of peak load instead of the first.
};

// The first three reach the lower bound on nearly all training graphs.
constexpr Combo kCombos[] = {
    {Key::kDuration, Key::kSize, false},        {Key::kLast, Key::kArea, true},
    {Key::kSize, Key::kFirst, false},           {Key::kDuration, Key::kArea, false},
    {Key::kDuration, Key::kDuration, false},    {Key::kLast, Key::kSize, false},
    {Key::kDuration, Key::kSize, true},         {Key::kSize, Key::kArea, true},
    {Key::kFirst, Key::kArea, false},           {Key::kDuration, Key::kFirst, true},
    {Key::kLast, Key::kDuration, true},         {Key::kDuration, Key::kSize, false, true, true},
    {Key::kLast, Key::kArea, true, true, true}, {Key::kSize, Key::kSize, false, true, true},
    {Key::kSize, Key::kSize, true, false},      {Key::kSize, Key::kArea, false, false},
    {Key::kSize, Key::kDuration, false, false},
};

// Buffers that no step separates, with what they need to know of the whole.
struct Component {
  std::vector<int32_t> ids;  // Of the caller's intervals, ascending.
  std::vector<SectionBuffer> buffers;
  std::vector<int64_t> firsts;
  int32_t num_sections = 0;
  std::vector<int64_t> load;
  int64_t bound = 0;   // Largest load.
  int64_t proved = 0;  // >= bound.
  int64_t height = 0;
  std::vector<int64_t> offsets;
};

std::vector<int32_t> SortedBy(const Component& component, Key key) {
  std::vector<double> value(component.buffers.size());
  for (size_t i = 0; i < value.size(); ++i) {
    const SectionBuffer& b = component.buffers[i];
    const double duration = static_cast<double>(b.duration), size = static_cast<double>(b.size);
    switch (key) {
      case Key::kDuration:
        value[i] = duration;
        break;
      case Key::kSize:
        value[i] = size;
        break;
      case Key::kArea:
        value[i] = duration * size;
        break;
      case Key::kFirst:
        value[i] = -static_cast<double>(component.firsts[i]);
        break;
      case Key::kLast:
        value[i] = static_cast<double>(component.firsts[i]) + duration;
        break;
    }
  }
  std::vector<int32_t> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return value[a] > value[b]; });
  return order;
}

// Offsets and their height; gives up with an empty vector once the height is above `bound`.
struct Decoded {
  std::vector<int64_t> offsets;
  int64_t height = 0;
};

// Keeps the offsets that `fixed` gives (-1: none) and puts the other buffers, in order, where they fit.
Decoded FillGaps(const Component& component, std::vector<int64_t> fixed, absl::Span<const int32_t> order, bool best_fit,
                 const std::atomic<int64_t>& bound) {
  Decoded decoded{std::move(fixed), 0};
  Occupancy occupancy(component.num_sections);
  const auto put = [&](int32_t i, int64_t offset) {
    decoded.offsets[i] = offset;
    decoded.height = std::max(decoded.height, offset + component.buffers[i].size);
    occupancy.Add(component.buffers[i], offset);
  };
  for (size_t i = 0; i < decoded.offsets.size(); ++i) {
    if (decoded.offsets[i] >= 0) put(static_cast<int32_t>(i), decoded.offsets[i]);
  }
  for (const int32_t i : order) {
    if (decoded.offsets[i] >= 0) continue;
    put(i, occupancy.Find(component.buffers[i], best_fit));
    if (decoded.height > bound.load(std::memory_order_relaxed)) {
      decoded.offsets.clear();
      break;
    }
  }
  return decoded;
}

Decoded Decode(const Component& component, const Combo& combo, const std::atomic<int64_t>& bound) {
  std::vector<int64_t> fixed(component.buffers.size(), -1);
  if (combo.stack_peak) {
    const auto& load = component.load;
    int32_t peak = 0;
    for (int32_t s = 0; s < component.num_sections; ++s) {
      if (load[s] > load[peak] || (combo.last_peak && load[s] == load[peak])) peak = s;
    }
    int64_t top = 0;
    for (const int32_t i : SortedBy(component, combo.clique)) {
      const SectionBuffer& b = component.buffers[i];
      if (b.lo > peak || b.hi < peak) continue;
      fixed[i] = top;
      top += b.size;
    }
  }
  return FillGaps(component, std::move(fixed), SortedBy(component, combo.rest), combo.best_fit, bound);
}

// Runs tasks 0..count-1 on some threads, in order of their numbers but for those in flight. A task returns true to make
// those after it superfluous; those before it still run to their end, so that the best result does not depend on
// timing.
void RunInOrder(int count, int threads, const std::function<bool(int)>& task) {
  std::atomic<int> next = 0, last = count;
  const auto work = [&] {
    for (int i = next++; i < last.load(); i = next++) {
      if (!task(i)) continue;
      for (int seen = last.load(); i < seen && !last.compare_exchange_weak(seen, i);) {
      }
    }
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < std::min(threads, count); ++t) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

// The best of the constructive packings; stops at `target`.
void Construct(Component& component, int64_t target, int threads) {
  const size_t n = component.buffers.size();
  const int64_t total = std::accumulate(component.buffers.begin(), component.buffers.end(), int64_t{0},
                                        [](int64_t sum, const SectionBuffer& b) { return sum + b.size; });
  if (total <= target) {  // One on top of the other is good enough.
    for (const SectionBuffer& b : component.buffers) {
      component.offsets.push_back(component.height);
      component.height += b.size;
    }
    return;
  }
  constexpr int kAll = static_cast<int>(std::size(kCombos));
  const int count = n > 30'000 ? kAll / 2 : kAll;
  std::array<Decoded, kAll> results;
  // A packing may stop when it is above one that is complete: it could only lose. Equal ones are all kept, and the
  // first of them wins.
  std::atomic<int64_t> bound = kLimit;
  const auto run = [&](int i) {
    results[i] = Decode(component, kCombos[i], bound);
    if (results[i].offsets.size() != n) return false;
    for (int64_t seen = bound.load();
         results[i].height < seen && !bound.compare_exchange_weak(seen, results[i].height);) {
    }
    return results[i].height <= target;
  };
  if (!run(0)) RunInOrder(count - 1, n < 1000 ? 1 : threads, [&](int i) { return run(i + 1); });
  int best = -1;
  for (int i = 0; i < count; ++i) {
    if (results[i].offsets.size() == n && (best < 0 || results[i].height < results[best].height)) best = i;
  }
  component.height = results[best].height;
  component.offsets = std::move(results[best].offsets);
}

// The buffers that are live in a section with a load above `threshold`.
std::vector<int32_t> HotBuffers(const Component& component, int64_t threshold) {
  std::vector<int32_t> hot_before(component.num_sections + 1);
  for (int32_t s = 0; s < component.num_sections; ++s) {
    hot_before[s + 1] = hot_before[s] + (component.load[s] > threshold ? 1 : 0);
  }
  std::vector<int32_t> hot;
  for (size_t i = 0; i < component.buffers.size(); ++i) {
    const SectionBuffer& b = component.buffers[i];
    if (hot_before[b.hi + 1] > hot_before[b.lo]) hot.push_back(static_cast<int32_t>(i));
  }
  return hot;
}

constexpr size_t kLargestSearch = 1500;  // Buffers; larger components are searched around their peaks only.

// Tries to pack the component in `capacity`; work is added to. kFound: offsets and height are set.
SearchResult SearchComponent(Component& component, int64_t capacity, int64_t work_limit, int threads, int64_t& work) {
  const size_t n = component.buffers.size();
  if (n <= kLargestSearch) {
    SearchOutcome outcome = SearchCapacity(component.buffers, component.num_sections, capacity, work_limit, threads);
    work += outcome.work;
    if (outcome.result == SearchResult::kFound) component.offsets = std::move(outcome.offsets);
    return outcome.result;
  }
  // Hot windows, from a few sections to as much as can be searched: pack them exactly, fill the rest around them. No
  // packing of a part means no packing of the whole.
  const int64_t gap = std::max<int64_t>(component.height - capacity, 1);
  int64_t spent = 0;
  size_t searched = 0;
  for (int64_t margin = gap; spent < work_limit && margin < component.bound; margin *= 2) {
    const std::vector<int32_t> hot = HotBuffers(component, capacity - margin);
    if (hot.size() == searched) continue;
    if (hot.size() > kLargestSearch) break;
    searched = hot.size();
    std::vector<SectionBuffer> buffers;
    std::vector<int64_t> firsts, lasts;
    for (const int32_t i : hot) {
      buffers.push_back(component.buffers[i]);
      firsts.push_back(component.buffers[i].lo);
      lasts.push_back(component.buffers[i].hi);
    }
    const int32_t num_sections = ComputeSections(firsts, lasts, absl::MakeSpan(buffers));
    SearchOutcome outcome = SearchCapacity(buffers, num_sections, capacity, work_limit - spent, threads);
    spent += outcome.work;
    if (outcome.result == SearchResult::kInfeasible) {
      work += spent;
      return outcome.result;
    }
    if (outcome.result == SearchResult::kLimit) break;
    std::vector<int64_t> fixed(n, -1);
    for (size_t k = 0; k < hot.size(); ++k) fixed[hot[k]] = outcome.offsets[k];
    const std::atomic<int64_t> bound = capacity;
    for (const auto& [key, best_fit] : {std::pair(Key::kSize, false), std::pair(Key::kArea, true),
                                        std::pair(Key::kFirst, false), std::pair(Key::kDuration, false)}) {
      Decoded decoded = FillGaps(component, fixed, SortedBy(component, key), best_fit, bound);
      spent += static_cast<int64_t>(n) * 16;
      if (decoded.offsets.size() != n) continue;
      component.offsets = std::move(decoded.offsets);
      work += spent;
      return SearchResult::kFound;
    }
  }
  work += spent;
  return SearchResult::kLimit;
}

int64_t HeightOf(const Component& component) {
  int64_t height = 0;
  for (size_t i = 0; i < component.buffers.size(); ++i) {
    height = std::max(height, component.offsets[i] + component.buffers[i].size);
  }
  return height;
}

// Lowers the component's height towards `target` (>= its bound) and raises what is proved, until they meet or the work
// is spent. With `stop_at_target` nothing but the target itself is tried.
void Improve(Component& component, int64_t target, bool stop_at_target, int64_t work_limit, int threads,
             int64_t& work) {
  const int64_t work_end = work + work_limit;
  int64_t lowest = std::max(target, component.proved);  // What is below is impossible, not wanted or given up.
  int64_t next = lowest, step = 1;
  while (lowest < component.height && work < work_end) {
    // Half of what is left, so that a capacity out of reach leaves some for the next.
    const int64_t share = std::max<int64_t>((work_end - work) / 2, 1);
    const SearchResult result = SearchComponent(component, next, share, threads, work);
    if (result == SearchResult::kFound) component.height = HeightOf(component);
    if (result == SearchResult::kInfeasible) component.proved = next + 1;
    if (stop_at_target) break;
    if (result != SearchResult::kFound) lowest = next + 1;
    next = lowest + (component.height - lowest) / 2;
    if (result == SearchResult::kInfeasible) {
      next = std::min(next, lowest + step);
      step *= 2;
    }
  }
}

std::string Describe(absl::Span<const PackInterval> intervals, size_t i) {
  return absl::StrCat("buffer ", i, " (steps ", intervals[i].first, "..", intervals[i].last, ", ",
                      intervals[i].size_bytes, " bytes)");
}

absl::Status CheckInterval(absl::Span<const PackInterval> intervals, size_t i) {
  const char* fault = intervals[i].last < intervals[i].first ? "ends before it begins"
                      : intervals[i].size_bytes < 0          ? "negative size"
                                                             : nullptr;
  if (fault == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(Describe(intervals, i), ": ", fault));
}

}  // namespace

absl::string_view PackProofName(PackProof proof) {
  switch (proof) {
    case PackProof::kLowerBoundTight:
      return "lower_bound";
    case PackProof::kSearchExhausted:
      return "exhausted";
    case PackProof::kGap:
      return "gap";
  }
  return "unknown";
}

absl::StatusOr<Packing> PackArena(absl::Span<const PackInterval> intervals, const PackOptions& options) {
  if (options.alignment < 1 || options.alignment > kLimit) {
    return absl::InvalidArgumentError(absl::StrCat("alignment ", options.alignment, ": must be at least 1"));
  }
  if (options.threads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("threads ", options.threads, ": must be at least 1"));
  }
  if (options.search_limit < 0) {
    return absl::InvalidArgumentError(absl::StrCat("search limit ", options.search_limit, ": must not be negative"));
  }
  if (intervals.size() > (size_t{1} << 30)) {
    return absl::InvalidArgumentError(absl::StrCat(intervals.size(), " buffers: at most 2^30 can be packed"));
  }
  // Sizes in units of the alignment; buffers of no bytes need no place.
  std::vector<int32_t> live;
  int64_t total_bytes = 0;
  for (size_t i = 0; i < intervals.size(); ++i) {
    const PackInterval& interval = intervals[i];
    RETURN_IF_ERROR(CheckInterval(intervals, i));
    if (interval.size_bytes == 0) continue;
    const int64_t units = (interval.size_bytes - 1) / options.alignment + 1;
    if (units > (kLimit - total_bytes) / options.alignment) {
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(intervals, i), ": the sum of all sizes up to this one does not fit in 62 bits"));
    }
    total_bytes += units * options.alignment;
    live.push_back(static_cast<int32_t>(i));
  }
  Packing packing;
  packing.offsets.assign(intervals.size(), 0);
  if (live.empty()) return packing;

  // Divide all sizes by what they have in common.
  int64_t unit = 0;
  for (const int32_t i : live) {
    const int64_t units = (intervals[i].size_bytes - 1) / options.alignment + 1;
    unit = std::gcd(unit, units * options.alignment);
  }
  // Components: groups in order of birth that no step separates.
  std::stable_sort(live.begin(), live.end(),
                   [&](int32_t a, int32_t b) { return intervals[a].first < intervals[b].first; });
  std::vector<Component> components;
  int64_t reach = 0;
  for (const int32_t i : live) {
    if (components.empty() || intervals[i].first > reach) components.emplace_back();
    components.back().ids.push_back(i);
    reach = components.back().ids.size() == 1 ? intervals[i].last : std::max(reach, intervals[i].last);
  }
  for (Component& component : components) {
    std::sort(component.ids.begin(), component.ids.end());
    std::vector<int64_t> lasts;
    for (const int32_t i : component.ids) {
      const PackInterval& interval = intervals[i];
      const int64_t rounded = ((interval.size_bytes - 1) / options.alignment + 1) * options.alignment;
      // Saturates: 2^63 steps and more differ in no order that matters.
      const uint64_t steps = static_cast<uint64_t>(interval.last) - static_cast<uint64_t>(interval.first);
      component.buffers.push_back({0, 0, rounded / unit, static_cast<int64_t>(std::min<uint64_t>(steps, kLimit)) + 1});
      component.firsts.push_back(interval.first);
      lasts.push_back(interval.last);
    }
    component.num_sections = ComputeSections(component.firsts, lasts, absl::MakeSpan(component.buffers));
    component.load.assign(component.num_sections + 1, 0);
    for (const SectionBuffer& b : component.buffers) {
      component.load[b.lo] += b.size;
      component.load[b.hi + 1] -= b.size;
    }
    for (int32_t s = 0; s < component.num_sections; ++s) component.load[s + 1] += component.load[s];
    component.load.resize(component.num_sections);
    component.bound = component.proved = *std::max_element(component.load.begin(), component.load.end());
  }

  // The height is that of the highest component: what none can beat is good enough for all.
  int64_t bound = 0, proved = 0, height = 0;
  for (const Component& component : components) bound = std::max(bound, component.bound);
  const int64_t capacity = options.capacity.has_value() ? std::max<int64_t>(*options.capacity, 0) / unit : bound;
  const int64_t target = std::max(bound, capacity);
  for (Component& component : components) {
    if (component.buffers.size() < kLargestSearch) Construct(component, target, options.threads);
  }
  for (Component& component : components) {
    if (component.buffers.size() >= kLargestSearch) Construct(component, target, options.threads);
  }
  // The highest first: the others need only come down to where it stays.
  std::vector<Component*> by_height;
  for (Component& component : components) by_height.push_back(&component);
  std::stable_sort(by_height.begin(), by_height.end(),
                   [](const Component* a, const Component* b) { return a->height > b->height; });
  proved = bound;
  int64_t goal = target;
  for (Component* component : by_height) {
    if (component->height > goal && packing.search_work < options.search_limit) {
      Improve(*component, goal, options.capacity.has_value(), options.search_limit - packing.search_work,
              options.threads, packing.search_work);
    }
    proved = std::max(proved, component->proved);
    height = std::max(height, component->height);
    goal = std::max(goal, height);
  }

  for (const Component& component : components) {
    for (size_t k = 0; k < component.ids.size(); ++k) packing.offsets[component.ids[k]] = component.offsets[k] * unit;
    // The first step of the first component whose load is the lower bound.
    if (component.bound != bound || packing.lower_bound_bytes > 0) continue;
    packing.lower_bound_bytes = bound * unit;
    const int32_t peak =
        static_cast<int32_t>(std::max_element(component.load.begin(), component.load.end()) - component.load.begin());
    packing.peak_step = std::numeric_limits<int64_t>::min();
    for (size_t k = 0; k < component.ids.size(); ++k) {
      if (component.buffers[k].lo <= peak && peak <= component.buffers[k].hi) {
        packing.peak_step = std::max(packing.peak_step, component.firsts[k]);
      }
    }
  }
  packing.height_bytes = height * unit;
  packing.proved_bytes = std::min(proved, height) * unit;
  if (height == bound) {
    packing.proof = PackProof::kLowerBoundTight;
  } else {
    packing.proof = proved >= height ? PackProof::kSearchExhausted : PackProof::kGap;
  }
  return packing;
}

absl::Status CheckPacking(absl::Span<const PackInterval> intervals, absl::Span<const int64_t> offsets,
                          int64_t height_bytes) {
  if (offsets.size() != intervals.size()) {
    return absl::InvalidArgumentError(absl::StrCat(offsets.size(), " offsets for ", intervals.size(), " buffers"));
  }
  std::vector<size_t> order;
  for (size_t i = 0; i < intervals.size(); ++i) {
    const PackInterval& interval = intervals[i];
    RETURN_IF_ERROR(CheckInterval(intervals, i));
    if (offsets[i] < 0 || interval.size_bytes > height_bytes || offsets[i] > height_bytes - interval.size_bytes) {
      return absl::InvalidArgumentError(absl::StrCat(Describe(intervals, i), " at offset ", offsets[i],
                                                     ": outside of the arena of ", height_bytes, " bytes"));
    }
    if (interval.size_bytes > 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return std::pair(intervals[a].first, a) < std::pair(intervals[b].first, b); });
  const auto ends_later = [&](size_t a, size_t b) { return intervals[a].last > intervals[b].last; };
  std::priority_queue<size_t, std::vector<size_t>, decltype(ends_later)> by_end(ends_later);
  std::map<int64_t, size_t> by_offset;  // The buffers live at this step; they do not overlap.
  for (const size_t i : order) {
    for (; !by_end.empty() && intervals[by_end.top()].last < intervals[i].first; by_end.pop()) {
      by_offset.erase(offsets[by_end.top()]);
    }
    const auto after = by_offset.lower_bound(offsets[i]);
    const auto overlap = [&](size_t j) -> absl::Status {
      const int64_t begin = std::max(offsets[i], offsets[j]);
      const int64_t end = std::min(offsets[i] + intervals[i].size_bytes, offsets[j] + intervals[j].size_bytes);
      if (begin >= end) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat(Describe(intervals, j), " at offset ", offsets[j], " and ", Describe(intervals, i),
                       " at offset ", offsets[i], " share bytes ", begin, "..", end - 1, " (", end - begin,
                       " bytes) in steps ", intervals[i].first, "..", std::min(intervals[i].last, intervals[j].last)));
    };
    if (after != by_offset.end()) RETURN_IF_ERROR(overlap(after->second));
    if (after != by_offset.begin()) RETURN_IF_ERROR(overlap(std::prev(after)->second));
    by_offset[offsets[i]] = i;
    by_end.push(i);
  }
  return absl::OkStatus();
}

}  // namespace mt
