#include "bench/lab/results.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <system_error>
#include <tuple>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

constexpr char kMetrics[] = "_metrics.json";
constexpr int64_t kMaxJsonBytes = int64_t{64} << 20;

// Keys of one file, checked: the first that is missing or of another type is remembered.
class Reader {
 public:
  Reader(const Json& json, const std::string& path) : json_(json), path_(path) {}

  int64_t Int(const char* pointer) {
    const Json* value = Find(pointer);
    if (value == nullptr || !value->is_number_integer()) return Bad<int64_t>(pointer, "a whole number");
    return value->get<int64_t>();
  }
  double Number(const char* pointer) {
    const Json* value = Find(pointer);
    if (value != nullptr && value->is_null()) return std::numeric_limits<double>::quiet_NaN();
    if (value == nullptr || !value->is_number()) return Bad<double>(pointer, "a number or null");
    return value->get<double>();
  }
  bool Bool(const char* pointer) {
    const Json* value = Find(pointer);
    if (value == nullptr || !value->is_boolean()) return Bad<bool>(pointer, "true or false");
    return value->get<bool>();
  }
  std::string String(const char* pointer) {
    const Json* value = Find(pointer);
    if (value == nullptr || !value->is_string()) return Bad<std::string>(pointer, "a string");
    return value->get<std::string>();
  }
  std::vector<std::string> Strings(const char* pointer) {
    const Json* value = Find(pointer);
    std::vector<std::string> strings;
    if (value == nullptr || !value->is_array()) return Bad<std::vector<std::string>>(pointer, "a list of strings");
    for (const Json& item : *value) {
      if (!item.is_string()) return Bad<std::vector<std::string>>(pointer, "a list of strings");
      strings.push_back(item.get<std::string>());
    }
    return strings;
  }
  const absl::Status& status() const { return status_; }

 private:
  const Json* Find(const char* pointer) const {
    const Json::json_pointer at(pointer);
    return json_.contains(at) ? &json_.at(at) : nullptr;
  }
  template <typename T>
  T Bad(const char* pointer, const char* expected) {
    if (status_.ok()) {
      status_ = absl::FailedPreconditionError(absl::StrCat(path_, ": ", pointer + 1, " is missing or not ", expected,
                                                           "; run it again: mtlab run SUITE --fresh"));
    }
    return T();
  }

  const Json& json_;
  const std::string& path_;
  absl::Status status_;
};

}  // namespace

std::string MetricsPath(const std::string& folder, const std::string& dataset, const std::string& technique) {
  return absl::StrCat(folder, "/", dataset, "_", technique, kMetrics);
}
std::string MemoryPath(const std::string& folder, const std::string& dataset, const std::string& technique) {
  return absl::StrCat(folder, "/", dataset, "_", technique, "_memory.json");
}
std::string RunFolder(const std::string& folder, const std::string& dataset, const std::string& technique) {
  return absl::StrCat(folder, "/runs/", dataset, "_", technique);
}

absl::StatusOr<Json> ReadJson(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxJsonBytes));
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::FailedPreconditionError(absl::StrCat(path, ": not a JSON object"));
  return json;
}

absl::Status WriteJson(const std::string& path, const Json& json) {
  return WriteFile(path, absl::StrCat(json.dump(2, ' ', false, Json::error_handler_t::replace), "\n"));
}

absl::StatusOr<std::vector<Result>> ReadResults(const std::string& folder,
                                                const std::vector<std::string>& experiments) {
  std::error_code error;
  std::vector<std::string> paths;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (absl::EndsWith(entry.path().filename().string(), kMetrics)) paths.push_back(entry.path().string());
  }
  if (error || paths.empty()) {
    return absl::NotFoundError(
        absl::StrCat(folder, error ? ": no such folder" : " holds no *_metrics.json: no run has finished",
                     "; run a suite first: mtlab run lab8 --data DIR --out ", ShellQuote(folder)));
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Result> results;
  std::vector<std::string> techniques;
  for (const std::string& path : paths) {
    Result r;
    r.path = path;
    ASSIGN_OR_RETURN(r.metrics, ReadJson(path));
    Reader in(r.metrics, path);
    if (in.Int("/version") != kResultsVersion && in.status().ok()) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, ": written by another version of mtlab; run it again: mtlab run SUITE --fresh"));
    }
    r.technique = in.String("/technique");
    r.dataset = in.String("/dataset");
    r.index = in.Int("/index");
    r.batch = in.Int("/batch_size");
    r.sequence = in.Int("/sequence_length");
    r.parameters = in.Int("/parameters");
    r.steps = in.Int("/steps");
    r.val_loss = in.Number("/val_loss");
    r.val_perplexity = in.Number("/val_perplexity");
    r.train_seconds = in.Number("/train_time_seconds");
    r.step_seconds = in.Number("/step_seconds/median");
    r.passes = in.String("/passes");
    r.losses_hash = in.String("/losses_hash");
    r.activations = in.String("/dtypes/activations");
    r.recomputed_ops = in.Int("/recomputed_ops");
    r.warnings = in.Strings("/warnings");
    RETURN_IF_ERROR(in.status());
    techniques.push_back(r.technique);
    if (!experiments.empty() && !absl::c_linear_search(experiments, r.technique)) continue;
    const std::string memory = absl::StrCat(path.substr(0, path.size() - sizeof(kMetrics) + 1), "_memory.json");
    ASSIGN_OR_RETURN(r.memory, ReadJson(memory));
    Reader bytes(r.memory, memory);
    r.planned_bytes = bytes.Int("/planned/arena_bytes");
    r.measured_bytes = bytes.Int("/measured/arena_bytes");
    r.planned_is_measured = bytes.Bool("/agree");
    r.forward_bytes = bytes.Int("/by_phase/forward/live_bytes");
    r.backward_bytes = bytes.Int("/by_phase/backward/live_bytes");
    r.optimizer_bytes = bytes.Int("/by_phase/optimizer/live_bytes");
    RETURN_IF_ERROR(bytes.status());
    results.push_back(std::move(r));
  }
  for (const std::string& name : experiments) {
    if (absl::c_linear_search(techniques, name)) continue;
    const std::string near = DidYouMean(name, techniques);
    return absl::NotFoundError(absl::StrCat("--experiments ", name, ": ", folder, " holds no result of that name",
                                            near.empty() ? "" : absl::StrCat("; did you mean ", near, "?"),
                                            " (results: ", absl::StrJoin(techniques, ", "), ")"));
  }
  std::stable_sort(results.begin(), results.end(), [](const Result& a, const Result& b) {
    return std::tie(a.dataset, a.index, a.technique) < std::tie(b.dataset, b.index, b.technique);
  });
  return results;
}

}  // namespace mt
