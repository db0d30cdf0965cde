// Pipelines as text that needs no shell quoting: "bf16,flash:window=64,remat:budget=8GiB".
//
//     pipeline := list | edits            list: exactly these passes, in any order, on top of "none"
//     list     := NAMED | pass (',' pass)*
//     edits    := [NAMED ','] edit (',' edit)*      of NAMED ("default" where it is left out)
//     edit     := '+' pass | '-' name
//     pass     := name (':' option)*
//     option   := key '=' value | flag    flag: a bool set to true
//               | number                  of the option that the pass requires: accumulate:8
//
// NAMED is "default" or "none". "-" and "_" are equal in names and keys.
#ifndef MT_PASSES_PIPELINE_H_
#define MT_PASSES_PIPELINE_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "passes/pass.h"
#include "passes/registry.h"

namespace mt {

struct PipelineStep {
  const PassDef* pass = nullptr;
  Attrs options;                  // Complete.
  bool where_it_applies = false;  // Chosen by a named pipeline: left out where the pass has nothing to do.
  friend bool operator==(const PipelineStep& a, const PipelineStep& b) {
    return a.pass == b.pass && a.options == b.options;
  }
};

// What runs: the chosen passes and those that are always on, in the registry's order.
struct Pipeline {
  std::vector<PipelineStep> steps;

  // The chosen passes with all options; "none" where there are none. ParsePipeline reads it back to an equal pipeline
  // (options of always-on passes, which text cannot set, left out).
  std::string ToString() const;
  bool Has(absl::string_view pass) const;
  // Sets an option of a pass that is in the pipeline; `value` as typed in pipeline text. For the options of always-on
  // passes, which belong to the driver. Errors: InvalidArgument.
  absl::Status SetOption(absl::string_view pass, absl::string_view option, absl::string_view value);
  // Leaves out what a named pipeline chose and `module`, as built, has nothing for.
  void KeepWhatApplies(const Module& module);

  friend bool operator==(const Pipeline& a, const Pipeline& b) { return a.steps == b.steps; }
  friend bool operator!=(const Pipeline& a, const Pipeline& b) { return !(a == b); }
};

// The text is untrusted. Errors: InvalidArgument with the column, the known names and the likely one.
absl::StatusOr<Pipeline> ParsePipeline(absl::string_view text, absl::string_view target = "cpu",
                                       const PassRegistry& registry = Passes());

// One option's value from text and back. Errors: InvalidArgument, naming option, value and what was expected.
absl::StatusOr<AttrValue> ParseOptionValue(const PassOption& option, absl::string_view text);
std::string OptionValueToString(const PassOption& option, const AttrValue& value);

}  // namespace mt

#endif  // MT_PASSES_PIPELINE_H_
