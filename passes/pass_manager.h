// Runs a pipeline and checks every pass.
#ifndef MT_PASSES_PASS_MANAGER_H_
#define MT_PASSES_PASS_MANAGER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "ir/graph.h"
#include "passes/pass.h"
#include "passes/pipeline.h"

namespace mt {

// The train graph after a pass and the DCE behind it.
struct PassReport {
  std::string pass;
  bool changed = false;
  int64_t nodes = 0;
  int64_t flops = 0;
  int64_t bytes = 0;            // Read and written by all nodes.
  int64_t peak_live_bytes = 0;  // Of values made by nodes, in the canonical order.
  double seconds = 0;           // Of the pass itself.
};

// Runs the steps in order. After each: its stage and its claim of a change are checked, dead nodes removed, the module
// verified, dumped where context.dump_dir says so ("03.cse.changed.mtir", from "00.input.mtir" on) and, where `reports`
// is not null, described. The first error ends the run and names its pass.
// Errors: those of the passes; FailedPrecondition for a stage that does not fit; Internal for a pass that broke a
// promise.
absl::Status RunPipeline(Module& module, const Pipeline& pipeline, PassContext& context,
                         std::vector<PassReport>* reports = nullptr);

// A table for people.
std::string FormatPassReports(const std::vector<PassReport>& reports);

}  // namespace mt

#endif  // MT_PASSES_PASS_MANAGER_H_
