// The largest batch, or the longest sequence, that a memory holds: found by planning, nothing run.
#ifndef MT_CODEGEN_FIT_H_
#define MT_CODEGEN_FIT_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "codegen/compile.h"
#include "models/model.h"

namespace mt {

// A model and how it is to be compiled.
struct Job {
  std::string spec;  // A file or a name of the zoo.
  ModelOptions model;
  CompileOptions options;  // `memory_bytes` is not looked at.
};

// The job's module, with the microbatches that its pipeline says. Errors: of LoadModel and PipelineOf.
absl::StatusOr<std::unique_ptr<Module>> LoadModule(const Job& job);

enum class FitAxis { kBatch, kSequence };

struct FitResult {
  std::string passes;  // Canonical text.
  // Every size up to `largest` fits; 0: not even the smallest does. `needs_bytes` is what `largest` takes.
  int64_t largest = 0, needs_bytes = 0;
  double step_seconds = 0;  // Estimate at `largest`.
  // The next size, what it would take and by how much that is too much. 0, 0, 0 where it cannot be planned; then
  // `limit` says why.
  int64_t next = 0, next_needs_bytes = 0, short_bytes = 0;
  std::string limit;
  // Sizes that were planned -> bytes, for those that could be.
  std::map<int64_t, int64_t> planned;
  bool monotone = true;  // No planned size takes less than a smaller one.
  double seconds = 0;
};

// The largest size of `axis` such that it and every smaller one take at most `memory_bytes` (arenas and the target's
// context). The boundary is found by secants and confirmed by planning both of its sides; then sizes below it are
// planned as well, at least two, down to where a plan has 5 % of what grows to spare: should one of them not fit, the
// answer lies below it. With kSequence the model's max_sequence grows with the length.
// Errors: those of loading and planning the smallest size; InvalidArgument for a raw graph, whose shapes are fixed.
absl::StatusOr<FitResult> FitLargest(const Job& job, FitAxis axis, int64_t memory_bytes);

}  // namespace mt

#endif  // MT_CODEGEN_FIT_H_
