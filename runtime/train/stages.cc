#include "runtime/train/stages.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"
#include "runtime/checkpoint/states.h"
#include "runtime/train/lr_schedule.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMostSteps = int64_t{1} << 40;
constexpr size_t kMostStages = 1000;

struct StateFacts {
  bool parameter = false;
  std::string dtype;
  std::vector<int64_t> dims;  // Logical.
  bool padded = false;

  std::string Text() const { return absl::StrCat(dtype, DimsToString(dims)); }
};

std::map<std::string, StateFacts> StatesOf(const proto::PlanProto& plan) {
  std::map<std::string, StateFacts> states;
  for (const proto::StatePlacement& placement : plan.states()) {
    const proto::StateProto& proto = placement.state();
    const std::optional<Role> role = ParseRole(proto.role());
    if (role != Role::kParameter && role != Role::kOptimizerState) continue;
    StateFacts& state = states[proto.name()];
    state.parameter = role == Role::kParameter;
    state.dtype = proto.type().dtype();
    state.padded = proto.logical_dims_size() > 0;
    state.dims = LogicalDims(proto);
  }
  return states;
}

// Groups of optimizer states that are scalars all: what belongs to the precision of one plan may start afresh.
std::set<std::string> ScalarGroups(const std::map<std::string, StateFacts>& states) {
  std::set<std::string> groups, others;
  for (const auto& [name, state] : states) {
    (state.parameter || !state.dims.empty() ? others : groups).insert(StateGroup(name));
  }
  for (const std::string& other : others) groups.erase(other);
  return groups;
}

}  // namespace

absl::Status CheckSameStates(const RunStage& a, const RunStage& b) {
  const auto differ = [&](absl::string_view fact) {
    return absl::InvalidArgumentError(absl::StrCat("--schedule: ", a.path, " and ", b.path,
                                                   " do not train the same states: ", fact,
                                                   "; compile both from one model, with the same vocabulary, --set and "
                                                   "--optimizer and with adamw8bit in all or none"));
  };
  const std::map<std::string, StateFacts> of_a = StatesOf(a.plan), of_b = StatesOf(b.plan);
  const auto missing = [&](const std::map<std::string, StateFacts>& here, const RunStage& here_stage,
                           const std::map<std::string, StateFacts>& there,
                           const RunStage& there_stage) -> absl::Status {
    const std::set<std::string> scalars = ScalarGroups(here);
    for (const auto& [name, state] : here) {
      if (there.contains(name) || (!state.parameter && scalars.contains(StateGroup(name)))) continue;
      return differ(
          absl::StrCat(here_stage.path, " has ", name, ", ", state.Text(), ", and ", there_stage.path, " has none"));
    }
    return absl::OkStatus();
  };
  // Parameters first: where they differ, the optimizer's states do, too.
  for (const bool parameters : {true, false}) {
    for (const auto& [name, state] : of_a) {
      const auto found = of_b.find(name);
      if (found == of_b.end() || state.parameter != parameters) continue;
      const StateFacts& other = found->second;
      // A list without padding of its own (scales of blocks) follows the padding of others.
      const bool list =
          !state.parameter && !state.padded && !other.padded && state.dims.size() == 1 && other.dims.size() == 1;
      if (state.parameter == other.parameter && state.dtype == other.dtype && (state.dims == other.dims || list))
        continue;
      return differ(absl::StrCat(name, " is ", state.Text(), " in ", a.path, ", ", other.Text(), " in ", b.path));
    }
  }
  RETURN_IF_ERROR(missing(of_a, a, of_b, b));
  RETURN_IF_ERROR(missing(of_b, b, of_a, a));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RunStage>> ReadStages(absl::string_view schedule, std::string last_path,
                                                 proto::PlanProto last) {
  std::vector<RunStage> stages;
  int64_t steps_before = 0;
  if (!schedule.empty()) {
    if (ParseLrShape(schedule).ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--schedule names plans and how many steps each takes, PLAN:STEPS,...; "
                       "the learning rate's shape is --lr-schedule ",
                       schedule));
    }
    for (const absl::string_view part : absl::StrSplit(schedule, ',')) {
      const size_t colon = part.rfind(':');
      int64_t steps = 0;
      if (colon == absl::string_view::npos || colon == 0 || !absl::SimpleAtoi(part.substr(colon + 1), &steps) ||
          steps < 1 || steps > kMostSteps) {
        return absl::InvalidArgumentError(absl::StrCat(
            "--schedule: \"", part, "\" is not PLAN:STEPS, such as short.plan:500; PLAN, the argument, comes last"));
      }
      if (stages.size() == kMostStages) {
        return absl::InvalidArgumentError(absl::StrCat("--schedule has more than ", kMostStages, " stages"));
      }
      RunStage& stage = stages.emplace_back();
      stage.path = std::string(part.substr(0, colon));
      ASSIGN_OR_RETURN(stage.plan, LoadPlan(stage.path));
      stage.shape.steps = steps;
      stage.first_step = steps_before;
      steps_before += steps;
    }
  }
  stages.push_back({.path = std::move(last_path), .plan = std::move(last), .first_step = steps_before});
  for (RunStage& stage : stages) {
    absl::StatusOr<StageShape> shape = ShapeOf(stage.plan);
    if (!shape.ok()) return Annotate(shape.status(), stage.path);
    shape->steps = stage.shape.steps;
    stage.shape = *shape;
    const RunStage& goal = stages.back();
    if (stage.plan.target() != goal.plan.target()) {
      return absl::InvalidArgumentError(absl::StrCat("--schedule: ", stage.path, " is a plan for ", stage.plan.target(),
                                                     ", ", goal.path, " for ", goal.plan.target(),
                                                     "; compile all of them with one --target"));
    }
  }
  for (size_t i = 0; i + 1 < stages.size(); ++i) RETURN_IF_ERROR(CheckSameStates(stages[i], stages.back()));
  return stages;
}

absl::StatusOr<int64_t> TokensByLength(absl::string_view curriculum, int64_t steps, absl::Span<const StageShape> stages,
                                       int64_t epoch_tokens) {
  if (curriculum.empty()) return 0;
  if (curriculum == "length") return steps > 0 ? std::min(epoch_tokens, TokensOfSteps(steps, stages)) : epoch_tokens;
  double part = 0;
  absl::string_view text = curriculum;
  if (!absl::ConsumePrefix(&text, "length:") || !absl::SimpleAtod(text, &part) || !(part > 0 && part <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("--curriculum \"", curriculum,
                                                   "\" is not length, or length:PART with a part of the run above 0 "
                                                   "and up to 1, such as length:0.3"));
  }
  if (steps == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--curriculum ", curriculum,
                     " is a part of the run's steps, of which nobody knows how many there "
                     "are; give --steps, --epochs or --max-tokens"));
  }
  const int64_t of_part = static_cast<int64_t>(std::ceil(part * static_cast<double>(steps)));
  return std::min(epoch_tokens, TokensOfSteps(of_part, stages));
}

size_t StageAfter(absl::Span<const RunStage> stages, int64_t steps) {
  size_t index = 0;
  while (index + 1 < stages.size() && steps >= stages[index + 1].first_step) ++index;
  return index;
}

std::vector<StageShape> ShapesOf(absl::Span<const RunStage> stages) {
  std::vector<StageShape> shapes;
  for (const RunStage& stage : stages) shapes.push_back(stage.shape);
  return shapes;
}

int64_t PeakArenaBytes(absl::Span<const RunStage> stages) {
  int64_t bytes = 0;
  for (const RunStage& stage : stages) bytes = std::max(bytes, stage.plan.arena_bytes());
  return bytes;
}

std::string StageText(absl::Span<const RunStage> stages, size_t index, int64_t steps) {
  const RunStage& stage = stages[index];
  const bool last = index + 1 == stages.size();
  const std::string end = !last       ? absl::StrCat("-", stage.first_step + stage.shape.steps)
                          : steps > 0 ? absl::StrCat("-", steps)
                                      : " on";
  return absl::StrCat("stage ", index + 1, "/", stages.size(), ": ", "steps ", stage.first_step + 1, end, ", ",
                      stage.path, ", batch ", stage.shape.batch, " x ", stage.shape.sequence, " tokens, arena ",
                      FormatBytes(stage.plan.arena_bytes()));
}

std::string StagesText(absl::Span<const RunStage> stages, int64_t steps) {
  std::string text;
  for (size_t i = 0; i < stages.size(); ++i) absl::StrAppend(&text, StageText(stages, i, steps), "\n");
  const int64_t peak = PeakArenaBytes(stages);
  return absl::StrCat(text, "one arena at a time: ", FormatBytes(peak), " (", FormatCount(peak),
                      " bytes) at most; between stages the states, ",
                      FormatBytes(stages.back().plan.persistent_bytes()), ", wait in the host's memory\n");
}

Json StagesJson(absl::Span<const RunStage> stages) {
  Json list = Json::array();
  for (size_t i = 0; i < stages.size(); ++i) {
    const RunStage& stage = stages[i];
    list.push_back({{"plan", stage.path},
                    {"plan_fingerprint", absl::StrFormat("%016x", stage.plan.fingerprint())},
                    {"passes", stage.plan.passes()},
                    {"batch", stage.shape.batch},
                    {"seq", stage.shape.sequence},
                    {"first_step", stage.first_step + 1},
                    {"steps", i + 1 < stages.size() ? Json(stage.shape.steps) : Json(nullptr)},
                    {"arena_bytes", stage.plan.arena_bytes()}});
  }
  return list;
}

Json StagesIdentity(absl::Span<const RunStage> stages) {
  Json identity = Json::object();
  for (size_t i = 0; i + 1 < stages.size(); ++i) {
    const RunStage& stage = stages[i];
    const std::string name = absl::StrCat("stage ", i + 1, " ");
    identity[name + "steps"] = stage.shape.steps;
    identity[name + "batch"] = stage.shape.batch;
    identity[name + "seq"] = stage.shape.sequence;
    identity[name + "passes"] = stage.plan.passes();
    identity[name + "plan"] = absl::StrFormat("%016x", stage.plan.fingerprint());
  }
  return identity;
}

}  // namespace mt
