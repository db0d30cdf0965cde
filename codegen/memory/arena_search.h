// The exact part of the arena packer: does a set of buffers fit in a capacity?
// Depth first over canonical packings (offsets in non-decreasing order, every buffer on the floor or on another one).
// Source: Moffitt, "MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning" (2024) for
// the canonical order, section bounds, dominance, decomposition at cuts and new orders for the parts. Added here:
// witnesses that take skipped buffers into account, a table of failed states, identical buffers, restarts that learn
// which sections fail.
#ifndef MT_CODEGEN_MEMORY_ARENA_SEARCH_H_
#define MT_CODEGEN_MEMORY_ARENA_SEARCH_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace mt {

// Live over the sections lo..hi, both included. A section is a maximal set of buffers that are live together.
struct SectionBuffer {
  int32_t lo = 0;
  int32_t hi = 0;
  int64_t size = 0;      // > 0, in any unit.
  int64_t duration = 1;  // In steps; orders only.
};

enum class SearchResult {
  kFound,       // `offsets` holds a packing of at most the capacity.
  kInfeasible,  // Complete: there is none.
  kLimit,       // The limit was reached first.
};

struct SearchOutcome {
  SearchResult result = SearchResult::kLimit;
  std::vector<int64_t> offsets;  // One for each buffer where found, else empty.
  int64_t work = 0;              // Units spent, the same on every run and for any number of threads.
};

// Searches from many orders: short restarts that favour what failed before, between complete searches with growing
// limits.
//   work_limit: in units of about 0.1 us; checked between restarts, so that a little more may be spent.
// REQUIRES: 0 <= lo <= hi < num_sections, sizes > 0 whose sum fits in 62 bits.
SearchOutcome SearchCapacity(absl::Span<const SectionBuffer> buffers, int32_t num_sections, int64_t capacity,
                             int64_t work_limit, int threads);

// Renumbers lifetimes [first, last] to sections; returns their number. Lifetimes meet in steps iff they meet in
// sections.
int32_t ComputeSections(absl::Span<const int64_t> firsts, absl::Span<const int64_t> lasts,
                        absl::Span<SectionBuffer> buffers);

}  // namespace mt

#endif  // MT_CODEGEN_MEMORY_ARENA_SEARCH_H_
