#include "codegen/memory/arena_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>

#include "ir/base/check.h"

namespace mt {
namespace {

constexpr int64_t kPlaced =
    int64_t{1} << 62;  // Stands for the floor of a buffer that has its offset; above all real ones.
constexpr int kTableBits = 16;

uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What one buffer with a given floor adds to the hash of a state.
uint64_t StateHash(int32_t buffer, int64_t floor) {
  return Mix(static_cast<uint64_t>(buffer + 1) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(floor));
}

// Rows of different lengths in one array.
struct Rows {
  std::vector<int32_t> begin, items;
  absl::Span<const int32_t> operator[](int32_t i) const {
    return absl::MakeConstSpan(items.data() + begin[i], begin[i + 1] - begin[i]);
  }
};

// What no order and no state changes; shared by all searches of a problem.
struct Problem {
  absl::Span<const SectionBuffer> buffers;
  int32_t num_sections;
  Rows neighbours;            // Buffer -> buffers that meet it in time.
  Rows members;               // Section -> buffers.
  std::vector<int64_t> load;  // Section -> sum of sizes.

  Problem(absl::Span<const SectionBuffer> the_buffers, int32_t sections)
      : buffers(the_buffers), num_sections(sections), load(sections) {
    const int32_t n = static_cast<int32_t>(buffers.size());
    std::vector<std::vector<int32_t>> by_section(num_sections);
    for (int32_t i = 0; i < n; ++i) {
      CHECK(buffers[i].size > 0 && 0 <= buffers[i].lo && buffers[i].lo <= buffers[i].hi && buffers[i].hi < sections);
      for (int32_t s = buffers[i].lo; s <= buffers[i].hi; ++s) {
        by_section[s].push_back(i);
        load[s] += buffers[i].size;
      }
    }
    for (const auto& row : by_section) {
      members.begin.push_back(members.items.size());
      members.items.insert(members.items.end(), row.begin(), row.end());
    }
    members.begin.push_back(members.items.size());
    for (int32_t i = 0; i < n; ++i) {
      neighbours.begin.push_back(neighbours.items.size());
      // Those live where i begins, then those that begin later.
      for (const int32_t j : members[buffers[i].lo]) {
        if (j != i) neighbours.items.push_back(j);
      }
      for (int32_t s = buffers[i].lo + 1; s <= buffers[i].hi; ++s) {
        for (const int32_t j : members[s]) {
          if (buffers[j].lo == s) neighbours.items.push_back(j);
        }
      }
    }
    neighbours.begin.push_back(neighbours.items.size());
  }
};

// Orders of buffers: weighted sums of the logarithms of peak load, duration and size, noise, and the failures of
// sections.
struct Weights {
  double peak, duration, size, noise, failure;
};

// The base-2 logarithm, linear between powers of two: unlike std::log the same on every machine.
double RoughLog2(int64_t x) {
  int exponent;
  const double mantissa = std::frexp(static_cast<double>(x), &exponent);
  return exponent + 2 * mantissa - 2;
}

// One depth-first search at a time; its memory is reused by the next.
class DepthFirst {
 public:
  explicit DepthFirst(const Problem& problem)
      : problem_(problem),
        n_(static_cast<int32_t>(problem.buffers.size())),
        rank_(n_),
        twin_(n_),
        floor_(n_),
        offset_(n_),
        latest_(problem.num_sections),
        unplaced_(problem.num_sections),
        cuts_(problem.num_sections),
        witness_(problem.num_sections),
        failures_(problem.num_sections),
        table_(size_t{1} << kTableBits) {
    FindTwins();
  }

  // Searches with ties at equal offsets broken in favour of large keys, for at most `work_limit` units. A buffer's key
  // is keys[i] + peak_weight * log2(largest sum of unplaced sizes over its sections), which counts when a part is split
  // off. `stop` makes it give up early (kLimit).
  SearchResult Run(std::vector<double> keys, double peak_weight, int64_t capacity, int64_t work_limit,
                   const std::function<bool()>& stop) {
    ++generation_;
    work_ = 0;
    work_limit_ = work_limit;
    keys_ = std::move(keys);
    peak_weight_ = peak_weight;
    capacity_ = capacity;
    next_stop_check_ = 4096;
    stop_ = &stop;
    stack_.clear();
    saved_ranks_.clear();
    undo_.clear();
    candidates_.clear();
    std::fill(failures_.begin(), failures_.end(), 0);
    std::fill(floor_.begin(), floor_.end(), 0);
    std::fill(unplaced_.begin(), unplaced_.end(), 0);
    std::fill(cuts_.begin(), cuts_.end(), 0);
    std::fill(witness_.begin(), witness_.end(), 0);
    for (int32_t s = 0; s < problem_.num_sections; ++s) {
      latest_[s] = capacity - problem_.load[s];
      if (latest_[s] < 0) return SearchResult::kInfeasible;
    }
    for (int32_t i = 0; i < n_; ++i) {
      for (int32_t s = problem_.buffers[i].lo; s <= problem_.buffers[i].hi; ++s) ++unplaced_[s];
      for (int32_t s = problem_.buffers[i].lo; s < problem_.buffers[i].hi; ++s) ++cuts_[s];
    }
    std::iota(rank_.begin(), rank_.end(), 0);
    stack_.assign(rank_.begin(), rank_.end());
    return Split(0, problem_.num_sections - 1, 0, n_);
  }

  const std::vector<int64_t>& offsets() const { return offset_; }
  const std::vector<int64_t>& failures() const { return failures_; }  // Section -> times that it refused a placement.
  int64_t work() const { return work_; }

 private:
  struct Ranked {
    double key;
    int32_t buffer;
  };
  struct Undo {
    int32_t buffer;
    int64_t floor;
  };
  struct Candidate {
    int64_t floor;
    int32_t rank, buffer;
    bool operator<(const Candidate& other) const {
      return floor != other.floor ? floor < other.floor : rank < other.rank;
    }
  };
  // A state (buffers left and their floors) from which nothing at (offset, rank) or later was found.
  struct Failed {
    uint64_t hash = 0;
    int64_t offset = 0;
    int32_t rank = 0, generation = 0;
  };

  // Of buffers that are alike in all, only the first that is left may be placed.
  void FindTwins() {
    std::vector<int32_t> sorted(n_);
    std::iota(sorted.begin(), sorted.end(), 0);
    const auto key = [this](int32_t i) {
      const SectionBuffer& b = problem_.buffers[i];
      return std::array<int64_t, 3>{b.lo, b.hi, b.size};
    };
    std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
    for (int32_t i = 0; i < n_; ++i) {
      twin_[sorted[i]] = i > 0 && key(sorted[i - 1]) == key(sorted[i]) ? sorted[i - 1] : -1;
    }
  }

  // Solves the sections first..last, whose buffers are among `count` entries of the stack, in the parts that no
  // unplaced buffer connects.
  SearchResult Split(int32_t first, int32_t last, size_t begin, int32_t count) {
    for (int32_t a = first; a <= last;) {
      int32_t b = a;
      while (b < last && cuts_[b] > 0) ++b;
      const size_t base = stack_.size(), ranks = saved_ranks_.size();
      ranked_.clear();
      for (int32_t i = 0; i < count; ++i) {
        const int32_t x = stack_[begin + i];
        const SectionBuffer& buffer = problem_.buffers[x];
        if (floor_[x] == kPlaced || buffer.lo < a || buffer.hi > b) continue;
        const int64_t tightest = *std::min_element(latest_.begin() + buffer.lo, latest_.begin() + buffer.hi + 1);
        ranked_.push_back({keys_[x] + peak_weight_ * RoughLog2(capacity_ - tightest), x});
      }
      const int32_t live = static_cast<int32_t>(ranked_.size());
      if (live > 0) {
        std::sort(ranked_.begin(), ranked_.end(), [](const Ranked& x, const Ranked& y) {
          return x.key != y.key ? x.key > y.key : x.buffer < y.buffer;
        });
        // The order is part of the state, as what has failed depends on it.
        uint64_t order = 0, hash = 0;
        for (int32_t i = 0; i < live; ++i) {
          const int32_t x = ranked_[i].buffer;
          stack_.push_back(x);
          saved_ranks_.push_back(rank_[x]);
          rank_[x] = i;
          order = Mix(order + static_cast<uint64_t>(x) + 1);
          hash += StateHash(x, floor_[x]);
        }
        work_ += live / 4;
        const SearchResult result = Place(a, b, base, live, live, -1, -1, hash + order);
        for (int32_t i = 0; i < live; ++i) rank_[stack_[base + i]] = saved_ranks_[ranks + i];
        saved_ranks_.resize(ranks);
        stack_.resize(base);
        if (result != SearchResult::kFound) return result;
      }
      a = b + 1;
    }
    return SearchResult::kFound;
  }

  // Whether x may still be placed at its floor: canonical order passes over what lies before (offset, rank).
  bool Open(int32_t x, int64_t offset, int32_t rank) const {
    return floor_[x] > offset || (floor_[x] == offset && rank_[x] > rank);
  }

  // Whether the sections of b and those beside it could still hold what is left once b is at its floor.
  bool CanPlace(int32_t b) {
    const SectionBuffer& buffer = problem_.buffers[b];
    const int64_t floor = floor_[b], top = floor + buffer.size;
    for (int32_t s = buffer.lo; s <= buffer.hi; ++s) {
      if (floor > latest_[s]) return ++failures_[s], false;
    }
    for (int32_t s = buffer.lo - 1; s >= 0 && cuts_[s] > 0; --s) {
      const int verdict = Beside(s, top, [&](const SectionBuffer& x) { return x.hi >= buffer.lo; });
      if (verdict < 0) return ++failures_[s], false;
      if (verdict == 0) break;
    }
    for (int32_t s = buffer.hi + 1; s < problem_.num_sections && cuts_[s - 1] > 0; ++s) {
      const int verdict = Beside(s, top, [&](const SectionBuffer& x) { return x.lo <= buffer.hi; });
      if (verdict < 0) return ++failures_[s], false;
      if (verdict == 0) break;
    }
    return true;
  }

  // A section beside a buffer with this top: 1 where a buffer that it does not lift keeps the section possible, 0 where
  // it lifts none (nor in sections farther away), -1 where the section becomes impossible.
  template <typename Lifts>
  int Beside(int32_t s, int64_t top, const Lifts& lifts) {
    if (top <= latest_[s]) return 1;
    bool any = false;
    for (const int32_t x : problem_.members[s]) {
      if (floor_[x] == kPlaced) continue;
      if (lifts(problem_.buffers[x])) {
        any = true;
      } else if (floor_[x] <= latest_[s]) {
        return 1;
      }
    }
    return any ? -1 : 0;
  }

  // Every section needs a buffer to come next that leaves room for all the others: one that is open with a floor of at
  // most `latest`, or one passed over if it can rest on the lowest top to come. Returns the smallest `latest`, or -1.
  int64_t CheckSections(int32_t first, int32_t last, int64_t offset, int32_t rank, int64_t lowest_top) {
    int64_t limit = kPlaced;
    for (int32_t s = first; s <= last; ++s) {
      if (unplaced_[s] == 0) continue;
      const int64_t latest = latest_[s];
      limit = std::min(limit, latest);
      if (lowest_top <= latest) continue;
      const int32_t hint = witness_[s];
      if (floor_[hint] <= latest && Open(hint, offset, rank) && problem_.buffers[hint].lo <= s &&
          s <= problem_.buffers[hint].hi) {
        continue;
      }
      bool found = false;
      for (const int32_t x : problem_.members[s]) {
        if (floor_[x] <= latest && Open(x, offset, rank)) {
          witness_[s] = x;
          found = true;
          break;
        }
      }
      if (!found) return ++failures_[s], -1;
    }
    return limit;
  }

  // Places the `live` unplaced buffers among stack_[base .. base + length), all of whose sections are first..last, at
  // (offset, rank) or later in canonical order.
  SearchResult Place(int32_t first, int32_t last, size_t base, int32_t length, int32_t live, int64_t offset,
                     int32_t rank, uint64_t hash) {
    work_ += 4 + (length + last - first) / 16;
    if (work_ > work_limit_) return SearchResult::kLimit;
    if (work_ >= next_stop_check_) {
      if ((*stop_)()) return SearchResult::kLimit;
      next_stop_check_ = work_ + 4096;
    }
    Failed& failed = table_[(hash * 0x9e3779b97f4a7c15u) >> (64 - kTableBits)];
    if (failed.generation == generation_ && failed.hash == hash &&
        (failed.offset < offset || (failed.offset == offset && failed.rank <= rank))) {
      return SearchResult::kInfeasible;
    }
    const size_t stack_size = stack_.size(), candidates_begin = candidates_.size();
    if (live * 2 < length) {
      for (int32_t i = 0; i < length; ++i) {
        const int32_t x = stack_[base + i];
        if (floor_[x] != kPlaced) stack_.push_back(x);
      }
      base = stack_size;
      length = live;
    }
    // No buffer goes to or above the lowest top that an unplaced one could have: that one would fit underneath.
    int64_t lowest_top = kPlaced;
    for (int32_t i = 0; i < length; ++i) {
      const int32_t x = stack_[base + i];
      if (floor_[x] >= lowest_top) continue;
      lowest_top = std::min(lowest_top, floor_[x] + problem_.buffers[x].size);
      if (Open(x, offset, rank)) candidates_.push_back({floor_[x], rank_[x], x});
    }
    const int64_t limit = CheckSections(first, last, offset, rank, lowest_top);
    size_t end = candidates_begin;
    for (size_t i = candidates_begin; i < candidates_.size(); ++i) {
      if (candidates_[i].floor < lowest_top && candidates_[i].floor <= limit) candidates_[end++] = candidates_[i];
    }
    candidates_.resize(end);
    std::sort(candidates_.begin() + candidates_begin, candidates_.end());

    SearchResult result = SearchResult::kInfeasible;
    for (size_t i = candidates_begin; i < end && result == SearchResult::kInfeasible; ++i) {
      const int32_t b = candidates_[i].buffer;
      if (twin_[b] >= 0 && floor_[twin_[b]] != kPlaced) continue;
      ++work_;
      if (!CanPlace(b)) continue;
      bool covered = false;
      result = PlaceOne(b, candidates_[i].rank, first, last, base, length, live, hash, covered);
      if (!covered) break;  // Nothing comes above b: no other choice can do better here.
    }
    candidates_.resize(candidates_begin);
    stack_.resize(stack_size);
    if (result == SearchResult::kInfeasible) failed = {hash, offset, rank, generation_};
    return result;
  }

  // Puts b at its floor, places the rest, and takes b back. covered: whether an unplaced buffer meets b in time.
  SearchResult PlaceOne(int32_t b, int32_t rank, int32_t first, int32_t last, size_t base, int32_t length, int32_t live,
                        uint64_t hash, bool& covered) {
    const SectionBuffer& buffer = problem_.buffers[b];
    const int64_t offset = floor_[b], top = offset + buffer.size;
    const size_t undo_size = undo_.size();
    hash -= StateHash(b, offset);
    for (const int32_t x : problem_.neighbours[b]) {
      if (floor_[x] == kPlaced) continue;
      covered = true;
      if (floor_[x] >= top) continue;
      undo_.push_back({x, floor_[x]});
      hash += StateHash(x, top) - StateHash(x, floor_[x]);
      floor_[x] = top;
    }
    floor_[b] = kPlaced;
    offset_[b] = offset;
    for (int32_t s = buffer.lo; s <= buffer.hi; ++s) {
      latest_[s] += buffer.size;
      --unplaced_[s];
    }
    bool split = false;
    for (int32_t s = buffer.lo; s < buffer.hi; ++s) split |= --cuts_[s] == 0;

    SearchResult result = SearchResult::kFound;
    if (live > 1) {
      result =
          split ? Split(first, last, base, length) : Place(first, last, base, length, live - 1, offset, rank, hash);
    }

    for (int32_t s = buffer.lo; s < buffer.hi; ++s) ++cuts_[s];
    for (int32_t s = buffer.lo; s <= buffer.hi; ++s) {
      latest_[s] -= buffer.size;
      ++unplaced_[s];
    }
    floor_[b] = offset;
    for (; undo_.size() > undo_size; undo_.pop_back()) floor_[undo_.back().buffer] = undo_.back().floor;
    return result;
  }

  const Problem& problem_;
  const int32_t n_;
  std::vector<int32_t> rank_;  // Buffer -> position in the order of its part.
  std::vector<int32_t> twin_;  // Buffer -> the identical one before it, or -1.
  std::vector<double> keys_;
  std::vector<int64_t> floor_;     // Buffer -> highest top of the placed buffers that meet it, or kPlaced.
  std::vector<int64_t> offset_;    // Buffer -> its offset while placed.
  std::vector<int64_t> latest_;    // Section -> capacity less the sizes of its unplaced buffers.
  std::vector<int32_t> unplaced_;  // Section -> number of unplaced buffers.
  std::vector<int32_t> cuts_;      // Section s -> unplaced buffers live both in s and s + 1.
  std::vector<int32_t> witness_;   // Section -> the buffer that last satisfied CheckSections: a hint, never undone.
  std::vector<int64_t> failures_;
  std::vector<Failed> table_;
  std::vector<int32_t> stack_, saved_ranks_;
  std::vector<Ranked> ranked_;
  std::vector<Undo> undo_;
  std::vector<Candidate> candidates_;
  int32_t generation_ = 0;
  int64_t work_ = 0, work_limit_ = 0, next_stop_check_ = 0, capacity_ = 0;
  double peak_weight_ = 0;
  const std::function<bool()>* stop_ = nullptr;
};

// The first complete orders: duration, area and peak first in turn, and balanced ones.
constexpr Weights kComplete[] = {
    {1e-3, 1, 1e-6, 0, 0}, {1e3, 1, 1, 0, 0}, {1e3, 1, 1e-3, 0, 0}, {1e-6, 1, 1, 0, 0}, {4, 1, 0.5, 0, 0}};

// Buffer -> its key without the peak load; the largest comes first.
std::vector<double> MakeKeys(const Problem& problem, const Weights& weights, const std::vector<double>& failures,
                             uint64_t seed) {
  const size_t n = problem.buffers.size();
  double worst = 1;
  for (const double f : failures) worst = std::max(worst, f);
  std::vector<double> keys(n);
  for (size_t i = 0; i < n; ++i) {
    const SectionBuffer& b = problem.buffers[i];
    double failure = 0;
    if (weights.failure > 0) failure = *std::max_element(failures.begin() + b.lo, failures.begin() + b.hi + 1) / worst;
    const double noise = static_cast<double>(Mix(seed * 0x9e3779b97f4a7c15u + i) >> 11) * 0x1p-53;
    keys[i] = weights.duration * RoughLog2(b.duration) + weights.size * RoughLog2(b.size) + weights.noise * noise +
              weights.failure * failure;
  }
  return keys;
}

// The k-th restart's weights.
Weights RestartWeights(uint64_t k) {
  const uint64_t bits = Mix(k + 1);
  return {std::ldexp(1.0, static_cast<int>(bits % 7) * 2 - 2), static_cast<double>((bits >> 8) % 5) * 0.5,
          static_cast<double>((bits >> 16) % 5) * 0.25, 0.3, static_cast<double>((bits >> 24) % 4) * 10 / 3};
}

}  // namespace

int32_t ComputeSections(absl::Span<const int64_t> firsts, absl::Span<const int64_t> lasts,
                        absl::Span<SectionBuffer> buffers) {
  const int32_t n = static_cast<int32_t>(firsts.size());
  std::vector<int32_t> births(n), deaths(n);
  std::iota(births.begin(), births.end(), 0);
  deaths = births;
  std::sort(births.begin(), births.end(), [&](int32_t a, int32_t b) { return firsts[a] < firsts[b]; });
  std::sort(deaths.begin(), deaths.end(), [&](int32_t a, int32_t b) { return lasts[a] < lasts[b]; });
  int32_t section = 0, next_death = 0;
  bool death = false;
  for (const int32_t b : births) {
    for (; lasts[deaths[next_death]] < firsts[b]; ++next_death) {
      buffers[deaths[next_death]].hi = section;
      death = true;
    }
    if (death) ++section;
    death = false;
    buffers[b].lo = section;
  }
  for (; next_death < n; ++next_death) buffers[deaths[next_death]].hi = section;
  return n == 0 ? 0 : section + 1;
}

SearchOutcome SearchCapacity(absl::Span<const SectionBuffer> buffers, int32_t num_sections, int64_t capacity,
                             int64_t work_limit, int threads) {
  SearchOutcome outcome;
  if (buffers.empty()) {
    outcome.result = SearchResult::kFound;
    return outcome;
  }
  const Problem problem(buffers, num_sections);
  // A batch is a complete search and several restarts, all from the failures of the batches before, so that the outcome
  // depends on neither the number of threads nor their speed: it is that of the first run in the batch to decide.
  constexpr int kBatch = 8;
  struct Slot {
    SearchResult result = SearchResult::kLimit;
    std::vector<int64_t> offsets, failures;
    int64_t work = 0;
  };
  std::vector<std::unique_ptr<DepthFirst>> workers(std::clamp(threads, 1, kBatch));
  std::vector<double> failures(num_sections);
  const int64_t restart_limit = 4096 + int64_t{64} * static_cast<int64_t>(buffers.size());
  uint64_t restarts = 0;
  for (int64_t batch = 0; outcome.work < work_limit; ++batch) {
    std::array<Slot, kBatch> slots;
    std::atomic<int> next = 0, decided = kBatch;
    const auto work = [&](int worker) {
      if (workers[worker] == nullptr) workers[worker] = std::make_unique<DepthFirst>(problem);
      DepthFirst& search = *workers[worker];
      for (int i = next++; i < kBatch && i < decided.load(); i = next++) {
        Slot& slot = slots[i];
        const bool complete = i == 0;
        const Weights weights = complete ? kComplete[batch % std::size(kComplete)] : RestartWeights(restarts + i);
        const int64_t limit = complete ? std::max(restart_limit, outcome.work / 8) : restart_limit;
        slot.result = search.Run(MakeKeys(problem, weights, failures, restarts + i), weights.peak, capacity, limit,
                                 [&] { return decided.load() < i; });
        slot.work = search.work();
        slot.failures = search.failures();
        if (slot.result == SearchResult::kLimit) continue;
        if (slot.result == SearchResult::kFound) slot.offsets = search.offsets();
        for (int seen = decided.load(); i < seen && !decided.compare_exchange_weak(seen, i);) {
        }
      }
    };
    std::vector<std::thread> helpers;
    for (size_t w = 1; w < workers.size(); ++w) helpers.emplace_back(work, static_cast<int>(w));
    work(0);
    for (std::thread& helper : helpers) helper.join();
    restarts += kBatch;
    for (double& f : failures) f *= 0.5;
    for (int i = 0; i < std::min(kBatch, decided.load() + 1); ++i) {
      outcome.work += slots[i].work;
      for (int32_t s = 0; s < num_sections; ++s) failures[s] += static_cast<double>(slots[i].failures[s]);
    }
    if (decided.load() < kBatch) {
      outcome.result = slots[decided.load()].result;
      outcome.offsets = std::move(slots[decided.load()].offsets);
      break;
    }
  }
  return outcome;
}

}  // namespace mt
