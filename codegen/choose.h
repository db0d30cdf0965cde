// Which passes fit a memory, and what to say where none does. Every answer is planned, none is run.
#ifndef MT_CODEGEN_CHOOSE_H_
#define MT_CODEGEN_CHOOSE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "codegen/compile.h"
#include "codegen/fit.h"
#include "proto/plan.pb.h"

namespace mt {

// --passes with one more pass: "bf16,flash" and "remat" give "bf16,flash,remat"; "default" gives "+remat", "+x" gives
// "+x,+remat". A pass of that name that is there already is replaced.
std::string WithPass(absl::string_view passes, absl::string_view pass);

// A pipeline and what it takes.
struct Candidate {
  std::string passes;              // As typed after --passes=.
  std::vector<std::string> added;  // To what was asked for.
  std::string pipeline;            // Canonical text.
  int64_t needs_bytes = 0;         // Arena and context.
  double step_seconds = 0;         // Estimate.
};

// What may be added to `passes` to save memory, alone and together, each planned; without those that cannot be planned
// (the model has nothing for them, they contradict) and those that change nothing. Fastest by estimate first, ties by
// bytes. Those that change more than rounding (8-bit moments) are there only where no other fits. With `smallest_sets`
// nothing is added to what fits already.
absl::StatusOr<std::vector<Candidate>> PlanCandidates(const Job& job, int64_t memory_bytes, bool smallest_sets);

// "51.20 ms", "1.25 s": seconds of a step, for people.
std::string StepText(double seconds);

struct Choice {
  std::vector<Candidate> candidates;  // The one asked for and what may be added to it; fastest first.
  int chosen = -1;                    // The first that fits; -1: none does.
};
// The passes for a memory: the first of the candidates that fits.
absl::StatusOr<Choice> ChoosePasses(const Job& job, int64_t memory_bytes);
// A table of them, for people.
std::string FormatChoice(const Choice& choice, absl::string_view target, int64_t memory_bytes);

// The refusal of a plan: what it needs and what there is, the peak by class, the largest live tensors, and what would
// fit: the largest batch, and passes that may be added, each planned now. ResourceExhausted.
//   source: who allows the memory: "--memory allows", "this machine has".
absl::Status DoesNotFit(const Job& job, const proto::PlanProto& plan, double step_seconds, int64_t memory_bytes,
                        absl::string_view source);

// One line where a plan that was fused would be smaller without: by how much. What is fused is
// recomputed together. "" where the plan is no smaller without, or keeps to a budget.
absl::StatusOr<std::string> FuseNote(const Job& job, const proto::PlanProto& plan);

// The pipelines that `mtc fit` answers for where none is named: from none to the smallest, each once. A model may have
// nothing for some of them.
std::vector<std::string> FitPipelines(const Job& job);

}  // namespace mt

#endif  // MT_CODEGEN_CHOOSE_H_
