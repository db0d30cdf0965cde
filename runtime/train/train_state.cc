#include "runtime/train/train_state.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"

namespace mt {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 62;

// Calls visit(name, member) for every member.
template <typename State, typename Visit>
void ForEach(State& state, const Visit& visit) {
  visit("steps", state.steps);
  visit("samples", state.samples);
  visit("sequence", state.sequence);
  visit("tokens", state.tokens);
  visit("skipped_steps", state.skipped_steps);
  visit("seconds", state.seconds);
  visit("last_loss", state.last_loss);
  visit("plateau_best", state.plateau.best);
  visit("plateau_bad_evals", state.plateau.bad_evals);
  visit("plateau_factor", state.plateau.factor);
  visit("best_val", state.best_val);
  visit("evals_since_best", state.evals_since_best);
  visit("mean_loss", state.mean_loss);
  visit("mean_steps", state.mean_steps);
  visit("setbacks", state.setbacks);
  visit("lr_factor", state.lr_factor);
  visit("backs_off_until", state.backs_off_until);
}

struct Writer {
  nlohmann::ordered_json& json;
  void operator()(const char* name, int64_t value) const { json[name] = value; }
  void operator()(const char* name, double value) const {
    json[name] = std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
  }
};

struct Reader {
  const nlohmann::json& json;
  absl::Status& status;

  const nlohmann::json* Get(const char* name) const {
    const auto found = json.is_object() ? json.find(name) : json.end();
    if (found == json.end()) Fail(name, "is missing");
    return found == json.end() ? nullptr : &*found;
  }
  void Fail(const char* name, const char* fact) const {
    if (status.ok()) status = absl::FailedPreconditionError(absl::StrCat("\"", name, "\" ", fact));
  }
  void operator()(const char* name, int64_t& value) const {
    const nlohmann::json* found = Get(name);
    if (found == nullptr) return;
    if (!found->is_number_unsigned() || found->get<uint64_t>() > static_cast<uint64_t>(kMaxCount)) {
      return Fail(name, "is no count");
    }
    value = found->get<int64_t>();
  }
  void operator()(const char* name, double& value) const {
    const nlohmann::json* found = Get(name);
    if (found == nullptr) return;
    if (!found->is_number() && !found->is_null()) return Fail(name, "is no number");
    value = found->is_null() ? std::numeric_limits<double>::quiet_NaN() : found->get<double>();
  }
};

}  // namespace

void CountInSequences(int64_t sequence, TrainState* state) {
  CHECK_GE(sequence, 1);
  const int64_t before = std::exchange(state->sequence, sequence);
  if (before == 0 || before == sequence) return;
  // Both lengths over what they share, so that nothing that a run can reach overflows.
  const int64_t shared = std::gcd(before, sequence), from = before / shared, to = sequence / shared;
  const int64_t whole = state->samples / to, rest = state->samples % to;
  state->samples = whole > kMaxCount / from - from ? kMaxCount : whole * from + (rest * from + to - 1) / to;
  state->mean_loss = 0;
  state->mean_steps = 0;
}

nlohmann::ordered_json ToJson(const TrainState& state) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  ForEach(state, Writer{json});
  return json;
}

absl::StatusOr<TrainState> TrainStateFromJson(const nlohmann::json& json) {
  TrainState state;
  absl::Status status;
  ForEach(state, Reader{json, status});
  if (!status.ok()) return status;
  if (state.sequence > int64_t{1} << 31) {
    return absl::FailedPreconditionError(absl::StrCat("\"sequence\" is ", state.sequence, ", no length of a sequence"));
  }
  return state;
}

}  // namespace mt
