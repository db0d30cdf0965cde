#include "runtime/train/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "runtime/checkpoint/states.h"
#include "runtime/data/strict_json.h"
#include "runtime/train/event_file.h"
#include "runtime/train/report.h"
#include "runtime/train/run_log.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr double kSecondsBetweenSaves = 600;
const std::vector<std::string>& OwnFiles() {
  static const auto& files = *new std::vector<std::string>{kSummaryFile, kMemoryFile, kMetricsFile, kWeightsFile};
  return files;
}

std::string Shown(const nlohmann::json& value) {
  return value.is_null() ? "not given" : value.is_string() ? value.get<std::string>() : value.dump();
}

// Steps of the checkpoints up to `newest` that are not among the `keep` newest of these.
std::vector<int64_t> OldSteps(const std::string& folder, int64_t newest, int64_t keep) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    absl::string_view number = name;
    int64_t step = 0;
    if (!absl::ConsumePrefix(&number, "step-") || !absl::SimpleAtoi(number, &step)) continue;
    if (step <= newest && CheckpointName(step) == name) steps.push_back(step);
  }
  std::sort(steps.rbegin(), steps.rend());
  steps.erase(steps.begin(), steps.begin() + std::min<int64_t>(keep, static_cast<int64_t>(steps.size())));
  return steps;
}

// Leaves the lines of steps up to `step`; a line that was cut off goes.
absl::Status CutMetrics(const std::string& path, int64_t step) {
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return absl::OkStatus();
  RETURN_IF_ERROR(text);
  std::string kept;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    const nlohmann::json json = nlohmann::json::parse(line.begin(), line.end(), nullptr, false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer() || json["step"] > step) {
      continue;
    }
    absl::StrAppend(&kept, line, "\n");
  }
  return kept == *text ? absl::OkStatus() : WriteFile(path, kept);
}

template <typename T>
Json OrNull(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

}  // namespace

std::string TokenizerText(const Manifest& manifest) {
  return absl::StrFormat("%s, hash %016x", manifest.tokenizer, manifest.tokenizer_hash);
}

absl::Status CheckTrainedTokenizer(const std::string& weights, const nlohmann::json& identity, const Manifest& manifest,
                                   const std::string& data_folder) {
  const auto trained = identity.is_object() ? identity.find("tokenizer") : identity.end();
  const std::string here = TokenizerText(manifest);
  if (trained == identity.end() || !trained->is_string() || *trained == here) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(weights, " was trained with tokenizer ", trained->get<std::string>(), ", corpus ", data_folder,
                   " was made with ", here,
                   "; give --data the corpus that it was trained on, or one made with its "
                   "tokenizer: mtcorpus prep --tokenizer CORPUS/",
                   kTokenizerFile));
}

nlohmann::json IdentityBeside(const std::string& weights_path) {
  const fs::path folder = fs::path(weights_path).parent_path();
  for (const char* file : {kSummaryFile, kCheckpointManifestFile}) {  // Of a run, of a checkpoint.
    const absl::StatusOr<std::string> text = ReadFile((folder / file).string(), int64_t{64} << 20);
    if (!text.ok()) continue;
    absl::StatusOr<nlohmann::json> json = ParseStrictJson(*text);
    if (json.ok() && json->is_object() && json->contains("identity")) return (*json)["identity"];
  }
  return nullptr;
}

Json RunIdentity(absl::Span<const RunStage> stages, const Manifest& manifest, const TrainOptions& options) {
  const proto::PlanProto& plan = stages.back().plan;
  const StepScalars& s = options.scalars;
  const auto fact = [&](const char* name) {
    const auto found = plan.facts().find(name);
    return found == plan.facts().end() ? Json(nullptr) : Json(found->second);
  };
  Json identity = {{"model", plan.model()},
                   {"target", plan.target()},
                   {"passes", plan.passes()},
                   {"batch", fact("batch")},
                   {"seq", fact("sequence")},
                   {"plan", absl::StrFormat("%016x", plan.fingerprint())},
                   {"data", absl::StrFormat("%016x", Fnv1a(manifest.Serialize()))},
                   {"tokenizer", TokenizerText(manifest)},
                   {"steps", OrNull(options.steps)},
                   {"epochs", OrNull(options.epochs)},
                   {"max-minutes", OrNull(options.max_minutes)},
                   {"max-tokens", OrNull(options.max_tokens)},
                   {"init", options.init.empty() ? Json(nullptr) : Json(options.init)},
                   {"resume", options.resume.empty() ? Json(nullptr) : Json(options.resume)},
                   {"curriculum", options.curriculum.empty() ? Json(nullptr) : Json(options.curriculum)},
                   {"lr-schedule", std::string(LrShapeName(options.schedule))},
                   {"lr", s.lr},
                   {"warmup", options.warmup_steps},
                   {"min-lr-ratio", options.min_lr_ratio},
                   {"patience", options.patience},
                   {"beta1", s.beta1},
                   {"beta2", s.beta2},
                   {"eps", s.eps},
                   {"weight-decay", s.weight_decay},
                   {"grad-clip", s.grad_clip},
                   {"seed", s.seed},
                   {"eval-every", options.eval_every},
                   {"eval-batches", options.eval_batches},
                   {"early-stop", options.early_stop},
                   {"spike", options.spike}};
  identity.update(StagesIdentity(stages));
  return identity;
}

Json RunEnvironment(const proto::PlanProto& plan, const Backend& backend) {
  const Json versions = VersionsJson(), hardware = HardwareJson(backend);
  Json environment = {{"target", plan.target()}};
  for (const char* key : {"mt", "blas"}) environment[key] = versions.value(key, Json(nullptr));
  for (const char* key : {"cpu", "gpu", "driver", "cublaslt"}) environment[key] = hardware.value(key, Json(nullptr));
  return environment;
}

std::vector<std::string> Differences(const nlohmann::json& there, const nlohmann::json& here) {
  std::vector<std::string> differences;
  const auto get = [](const nlohmann::json& json, const std::string& key) {
    const auto found = json.is_object() ? json.find(key) : json.end();
    return found == json.end() ? nlohmann::json() : *found;
  };
  std::set<std::string> keys;
  for (const nlohmann::json* json : {&there, &here}) {
    if (!json->is_object()) continue;
    for (const auto& item : json->items()) keys.insert(item.key());
  }
  for (const std::string& key : keys) {
    const nlohmann::json a = get(there, key), b = get(here, key);
    if (a != b) differences.push_back(absl::StrCat(key, " is ", Shown(a), " there, ", Shown(b), " here"));
  }
  return differences;
}

absl::StatusOr<NewestCheckpoint> CheckpointAt(const std::string& path) {
  NewestCheckpoint found;
  std::error_code ignored;
  if (fs::exists(path + "/" + kOptimizerFile, ignored)) {
    // "run/step-4/" is "run/step-4".
    const fs::path clean = fs::path(path).has_filename() ? fs::path(path) : fs::path(path).parent_path();
    ASSIGN_OR_RETURN(found.checkpoint, CheckpointReader::Open(clean.string()));
    return found;
  }
  ASSIGN_OR_RETURN(found, FindNewestCheckpoint(path));
  if (found.checkpoint == nullptr) return absl::NotFoundError(absl::StrCat(path, " holds no checkpoint"));
  return found;
}

std::string WeightsPath(std::string path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return path;
  if (!fs::exists(path + "/" + kWeightsFile, ignored)) {
    const absl::StatusOr<NewestCheckpoint> newest = CheckpointAt(path);
    if (newest.ok()) path = newest->checkpoint->path();
  }
  return absl::StrCat(path, "/", kWeightsFile);
}

absl::StatusOr<std::unique_ptr<RunFolder>> RunFolder::Open(Options options) {
  std::unique_ptr<RunFolder> folder(new RunFolder(std::move(options)));
  const std::string& path = folder->options_.path;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return folder;
  RETURN_IF_ERROR(folder->Lock());
  if (folder->options_.fresh) return folder;
  const nlohmann::json here = folder->options_.identity;
  const auto differs = [&](const nlohmann::json& there) -> absl::Status {
    nlohmann::json mine = here;
    if (!there.contains("tokenizer")) mine.erase("tokenizer");  // Of before it was written; "data" tells, too.
    const std::vector<std::string> differences = Differences(there, mine);
    if (differences.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--out ", path,
                                                   " holds another run: ", absl::StrJoin(differences, ", "),
                                                   "; give --fresh to replace it, or another --out"));
  };
  const std::string summary_path = path + "/" + kSummaryFile;
  if (fs::exists(summary_path, ignored)) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(summary_path));
    absl::StatusOr<nlohmann::json> summary = ParseStrictJson(text);
    const bool whole = summary.ok() && summary->contains("identity") && summary->contains("interrupted");
    if (!whole) {
      return absl::InvalidArgumentError(absl::StrCat(summary_path,
                                                     " is not of this version of mtrun, or damaged; give "
                                                     "--fresh to replace the run, or another --out"));
    }
    RETURN_IF_ERROR(differs((*summary)["identity"]));
    if ((*summary)["interrupted"] != true) {
      folder->finished_ = *std::move(summary);
      return folder;
    }
  }
  absl::StatusOr<NewestCheckpoint> newest = FindNewestCheckpoint(path);
  if (!newest.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(newest.status().message(), "; --fresh starts over"));
  }
  if (newest->checkpoint != nullptr) RETURN_IF_ERROR(differs(newest->checkpoint->identity()));
  folder->newest_ = *std::move(newest);
  if (folder->checkpoint() != nullptr) folder->last_saved_step_ = folder->checkpoint()->step();
  return folder;
}

RunFolder::~RunFolder() {
  saver_.Wait().IgnoreError();
  if (lock_ >= 0) ::close(lock_);
}

// On the folder itself, so that no file is left behind.
absl::Status RunFolder::Lock() {
  if (lock_ >= 0) return absl::OkStatus();
  lock_ = ::open(options_.path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ < 0) return absl::FailedPreconditionError(absl::StrCat(options_.path, ": ", std::strerror(errno)));
  if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    return absl::FailedPreconditionError(
        absl::StrCat("another mtrun works in ", options_.path, "; wait for it, or give another --out"));
  }
  return absl::OkStatus();
}

std::vector<std::string> RunFolder::Warnings(const Json& environment) const {
  std::vector<std::string> warnings;
  for (const std::string& damage : newest_.damaged) {
    warnings.push_back(absl::StrCat("checkpoint passed over: ", damage));
  }
  if (checkpoint() == nullptr) return warnings;
  const std::vector<std::string> differences = Differences(checkpoint()->environment(), environment);
  if (!differences.empty()) {
    warnings.push_back(absl::StrCat("the run began elsewhere, so that it goes on within rounding, not to the bit: ",
                                    absl::StrJoin(differences, ", ")));
  }
  return warnings;
}

absl::Status RunFolder::Begin(Json environment) {
  environment_ = std::move(environment);
  const std::string& path = options_.path;
  RETURN_IF_ERROR(MakeFolder(path));
  RETURN_IF_ERROR(Lock());
  // A run that was killed may have saved one and not removed what it takes the place of.
  std::error_code ignored;
  for (const int64_t step : OldSteps(path, last_saved_step_, options_.keep)) {
    const std::string old = absl::StrCat(path, "/", CheckpointName(step));
    fs::rename(old, old + ".tmp", ignored);
  }
  RemoveLeftovers(path, OwnFiles());
  for (const char* file : {kSummaryFile, kMemoryFile, kWeightsFile}) fs::remove(path + "/" + file, ignored);
  last_save_ = std::chrono::steady_clock::now();
  if (checkpoint() != nullptr) return CutMetrics(path + "/" + kMetricsFile, checkpoint()->step());
  fs::remove(path + "/" + kMetricsFile, ignored);
  RemoveEventFiles(path);
  return RemoveCheckpoints(path);
}

absl::Status RunFolder::GoBack() {
  RETURN_IF_ERROR(saver_.Wait());
  ASSIGN_OR_RETURN(newest_, FindNewestCheckpoint(options_.path));
  last_saved_step_ = checkpoint() == nullptr ? -1 : checkpoint()->step();
  return CutMetrics(options_.path + "/" + kMetricsFile, std::max<int64_t>(0, last_saved_step_));
}

bool RunFolder::DueAfter(int64_t step) {
  if (options_.save_every) return *options_.save_every > 0 && step % *options_.save_every == 0;
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - last_save_).count() >= kSecondsBetweenSaves;
}

absl::Status RunFolder::Save(Executor& executor, const TrainState& state) {
  RETURN_IF_ERROR(saver_.Wait());
  if (state.steps == last_saved_step_) return absl::OkStatus();
  Checkpoint& snapshot = saver_.snapshot();
  snapshot.step = state.steps;
  snapshot.model = executor.plan().model();
  snapshot.progress = ToJson(state);
  snapshot.identity = options_.identity;
  snapshot.environment = environment_;
  SnapshotStates(executor, &snapshot.states);
  saver_.Start();
  last_saved_step_ = state.steps;
  last_save_ = std::chrono::steady_clock::now();
  return absl::OkStatus();
}

}  // namespace mt
