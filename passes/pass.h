// A pass: a free function behind one row.
#ifndef MT_PASSES_PASS_H_
#define MT_PASSES_PASS_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/cost.h"
#include "ir/graph.h"

namespace mt {

// What planning a module would give: order and offsets, no kernels.
struct MemoryPlan {
  int64_t arena_bytes = 0, lower_bound_bytes = 0, persistent_bytes = 0;
};

// Where a module takes the most memory; for messages.
struct PeakText {
  std::string node;  // Its name.
  std::string live;  // What is live there, largest first: "logits f32[8,256,32000] 250.0 MiB, ...".
};

// What a pass needs from above; filled in by the driver (codegen).
struct PassContext {
  std::function<absl::StatusOr<MemoryPlan>(const Module&)> plan_memory;
  // The same without the packer's searches: quicker, an arena that plan_memory's is not above, the same lower bound.
  std::function<absl::StatusOr<MemoryPlan>(const Module&)> estimate_memory;
  std::function<absl::StatusOr<PeakText>(const Module&)> describe_peak;  // Plans as well, and takes longer.
  Roofline roofline;
  std::string target = "cpu";
  std::string dump_dir;  // Empty: no dumps.
  // What the user should know, though nothing is wrong; one line each. Passes append.
  std::vector<std::string> warnings;
};

// One option of a pass, "remat:budget=8GiB". Every kind of attribute but int lists, whose commas the pipeline text
// uses.
struct PassOption {
  absl::string_view name;
  AttrKind kind;
  absl::string_view doc;
  absl::string_view default_text = "";                    // As typed in --passes. Empty: required.
  bool is_bytes = false;                                  // kInt: "8GiB".
  absl::string_view choices = "";                         // kString: "a|b|c".
  double min = -std::numeric_limits<double>::infinity();  // kInt, kDouble: smallest allowed.
};

// True if the module changed; the manager checks the claim by fingerprint.
using PassFn = absl::StatusOr<bool> (*)(Module& module, const Attrs& options, PassContext& context);

struct PassDef {
  absl::string_view name;     // As written in --passes; "-" and "_" are equal there.
  absl::string_view summary;  // One line.
  absl::Span<const PassOption> options = {};
  Stage requires_stage = Stage::kForward;  // Of the train graph, before and after.
  Stage provides_stage = Stage::kForward;
  bool any_stage = false;         // Runs at every stage and keeps it; the two above say nothing.
  absl::string_view source = "";  // Paper or origin.
  double tolerance = 0;           // How far results may move, relative; 0: bitwise equal.
  absl::Span<const absl::string_view> also_known_as = {};  // For did-you-mean: "gradient_checkpointing".
  bool always_on = false;                                  // Runs in every pipeline and cannot be named in --passes.
  // Whether the pass has anything to do on a module at its stage. Null: always. A named pipeline goes without the
  // passes that have not; naming such a pass is an error or a warning of its own.
  bool (*applies)(const Module& module) = nullptr;
  PassFn run = nullptr;
};

}  // namespace mt

#endif  // MT_PASSES_PASS_H_
