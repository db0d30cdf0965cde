// The plans that one run goes through, one after another over the same states: mtrun --schedule.
#ifndef MT_RUNTIME_TRAIN_STAGES_H_
#define MT_RUNTIME_TRAIN_STAGES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/base/json.h"
#include "proto/plan.pb.h"
#include "runtime/train/trainer.h"

namespace mt {

struct RunStage {
  std::string path;
  proto::PlanProto plan;
  StageShape shape;
  int64_t first_step = 0;  // Steps of the run before it.
};

// "short.plan:500,mid.plan:2000" and the plan that goes on to the end; an empty schedule: that one alone. Untrusted.
// Errors: as LoadPlan, InvalidArgument (the text; plans for other targets or with other states: one line that names the
// first that differs).
absl::StatusOr<std::vector<RunStage>> ReadStages(absl::string_view schedule, std::string last_path,
                                                 proto::PlanProto last);

// Whether two plans have the same parameters and the same optimizer's states: names, types and logical shapes. Padding
// may differ, and scalars that belong to one of the plans alone (the scale of the loss). Errors: InvalidArgument.
absl::Status CheckSameStates(const RunStage& a, const RunStage& b);

// The index of the stage that takes the step after `steps`.
size_t StageAfter(absl::Span<const RunStage> stages, int64_t steps);
std::vector<StageShape> ShapesOf(absl::Span<const RunStage> stages);
// The largest arena: one is there at a time.
int64_t PeakArenaBytes(absl::Span<const RunStage> stages);

// What --curriculum asks for: so many tokens of the first epoch by document length; 0: none. "length": all of it, or of
// the run where that has less; "length:0.3": as many as the first 0.3 of the run's steps take, at most an epoch.
// `steps` of the run, 0: nobody knows. Errors: InvalidArgument.
absl::StatusOr<int64_t> TokensByLength(absl::string_view curriculum, int64_t steps, absl::Span<const StageShape> stages,
                                       int64_t epoch_tokens);

// A line a stage and one for the peak; `steps` of the run, 0: nobody knows.
std::string StagesText(absl::Span<const RunStage> stages, int64_t steps);
// "stage 2/3: steps 501-2500, mid.plan, batch 16 x 128 tokens, arena 1.2 GiB".
std::string StageText(absl::Span<const RunStage> stages, size_t index, int64_t steps);
// For summary.json and memory.json: a list.
nlohmann::ordered_json StagesJson(absl::Span<const RunStage> stages);
// What a run's identity says of all stages but the last, whose plan it names itself: a flat object.
nlohmann::ordered_json StagesIdentity(absl::Span<const RunStage> stages);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_STAGES_H_
