// Offsets for buffers with known lifetimes in one arena: dynamic storage allocation, solved as well as can be proved.
// Plans are reproducible: the same input gives the same offsets on every machine, whatever the clock and thread count.
#ifndef MT_CODEGEN_MEMORY_ARENA_PACKER_H_
#define MT_CODEGEN_MEMORY_ARENA_PACKER_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace mt {

// A buffer that is live over the steps first..last, both included.
struct PackInterval {
  int64_t first = 0;
  int64_t last = 0;
  int64_t size_bytes = 0;  // 0 is allowed: such a buffer gets offset 0 and overlaps nothing.
};

struct PackOptions {
  // Sizes are rounded up to a multiple of this inside, so every offset is one too. 1 packs the sizes as they are.
  int64_t alignment = 256;
  // Changes the speed, never the result.
  int threads = 2;
  // Work the searches may spend after the constructive packings, in units of one placement (about 0.1 us each);
  // 0 stops after the constructive packings. Counted, not timed, so that the result is the same everywhere.
  int64_t search_limit = 20'000'000;
  // Stop as soon as the height is at most this, even above the lower bound. A height above it is no error here.
  std::optional<int64_t> capacity;
};

enum class PackProof {
  kLowerBoundTight,  // The height is the lower bound: optimal.
  kSearchExhausted,  // The height is above the lower bound, and a complete search found nothing lower: optimal.
  kGap,              // Something lower may exist, down to the lower bound.
};

// "lower_bound", "exhausted", "gap": the words of plans and reports.
absl::string_view PackProofName(PackProof proof);

struct Packing {
  std::vector<int64_t> offsets;   // One for each interval, in the order given.
  int64_t height_bytes = 0;       // Largest offset + rounded size.
  int64_t lower_bound_bytes = 0;  // Largest sum of rounded sizes live at one step.
  int64_t proved_bytes = 0;       // No packing is lower: at least lower_bound_bytes, more where a search proved more.
  int64_t peak_step = 0;          // The first step with that sum; 0 without buffers.
  PackProof proof = PackProof::kLowerBoundTight;
  int64_t search_work = 0;  // Of PackOptions::search_limit; the same on every run.
};

// Errors: InvalidArgument for last < first, a negative size, an alignment or thread count below 1, a negative limit,
// and sizes whose sum does not fit in 62 bits; the message names the interval.
absl::StatusOr<Packing> PackArena(absl::Span<const PackInterval> intervals, const PackOptions& options = {});

// Independent of the packer: a sweep over time, O(n log n), that no two buffers share a byte at a step and that all lie
// in [0, height_bytes). Sizes count as given (not rounded). Errors: InvalidArgument naming both buffers, their
// intervals and offsets, and the bytes and steps that they share.
absl::Status CheckPacking(absl::Span<const PackInterval> intervals, absl::Span<const int64_t> offsets,
                          int64_t height_bytes);

}  // namespace mt

#endif  // MT_CODEGEN_MEMORY_ARENA_PACKER_H_
