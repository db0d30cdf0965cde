// All passes, in the one right order.
#ifndef MT_PASSES_REGISTRY_H_
#define MT_PASSES_REGISTRY_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "passes/pass.h"

namespace mt {

// Each is defined in the file of its name.
extern const PassDef kDcePass;
extern const PassDef kCanonicalizePass;
extern const PassDef kCsePass;
extern const PassDef kFlashPass;
extern const PassDef kChunkedLossPass;
extern const PassDef kPadVocabPass;
extern const PassDef kTf32Pass;
extern const PassDef kBf16Pass;
extern const PassDef kFp16Pass;
extern const PassDef kAccumulatePass;
extern const PassDef kAutodiffPass;
extern const PassDef kOptimizerPass;
extern const PassDef kRematPass;
extern const PassDef kFusePass;
extern const PassDef kAdamw8bitPass;

// A pipeline that has a name: "default", "none".
struct NamedPipeline {
  absl::string_view name;
  absl::string_view target;  // The target it holds for: "cpu", "cuda" (all of them), "cuda:sm_75"; empty: all.
  absl::string_view text;    // A list without signs; empty: no optional pass.
  absl::string_view summary;
};

// Two passes that cannot be in one pipeline.
struct Contradiction {
  absl::string_view a, b;
  absl::string_view reason;  // "a module has one precision"
};

struct PassRegistry {
  // The order in which passes run, whatever order was typed. A pass that is always on may be listed more than once.
  absl::Span<const PassDef* const> order;
  absl::Span<const NamedPipeline> named;
  absl::Span<const Contradiction> contradictions = {};

  // Null where there is none. `name` with "_".
  const PassDef* Find(absl::string_view name) const;
  // Null where there is none for this target.
  const NamedPipeline* FindNamed(absl::string_view name, absl::string_view target) const;
  // Each pass once, in order.
  std::vector<const PassDef*> Unique() const;
};

// The registry of the tools.
const PassRegistry& Passes();

}  // namespace mt

#endif  // MT_PASSES_REGISTRY_H_
