// Checkpoints on disk: FOLDER/step-N with model.safetensors, optimizer.safetensors and manifest.json. A folder of that
// name is whole: it is written as step-N.tmp, every file and the folder are synced, and then it is renamed.
#ifndef MT_RUNTIME_CHECKPOINT_CHECKPOINT_H_
#define MT_RUNTIME_CHECKPOINT_CHECKPOINT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/base/json.h"
#include "runtime/data/file_system.h"
#include "runtime/data/safetensors.h"

namespace mt {

inline constexpr char kWeightsFile[] = "model.safetensors";
inline constexpr char kOptimizerFile[] = "optimizer.safetensors";
inline constexpr char kCheckpointManifestFile[] = "manifest.json";

// A state with its logical shape: padding is left out.
struct SavedState {
  SafetensorsTensor tensor;
  bool parameter = false;
  std::string bytes;
};

struct Checkpoint {
  int64_t step = 0;  // Optimizer steps that are done.
  std::string model;
  nlohmann::ordered_json progress;     // Of the training loop, whatever it wants to find again.
  nlohmann::ordered_json identity;     // What must be equal for a run to go on from here.
  nlohmann::ordered_json environment;  // What may make the bits differ elsewhere: versions, devices.
  std::vector<SavedState> states;
};

// "step-120".
std::string CheckpointName(int64_t step);

// Writes FOLDER/step-N in place of one that is there, then removes all but the `keep` newest up to N, and those after
// N, which a run that went back has left. Errors: DataLoss (no space, failed write): what was there is there still.
absl::Status WriteCheckpoint(const std::string& folder, const Checkpoint& checkpoint, int64_t keep,
                             FileSystem& files = SystemFiles());

// A checkpoint that was found whole: sizes and checksums of all files, and the syntax of each.
class CheckpointReader {
 public:
  // Untrusted. Errors: NotFound, FailedPrecondition (names file and fact).
  static absl::StatusOr<std::unique_ptr<CheckpointReader>> Open(const std::string& path);

  const std::string& path() const { return path_; }
  int64_t step() const { return step_; }
  const nlohmann::json& progress() const { return progress_; }
  const nlohmann::json& identity() const { return identity_; }
  const nlohmann::json& environment() const { return environment_; }
  const SafetensorsReader& weights() const { return *weights_; }
  const SafetensorsReader& optimizer() const { return *optimizer_; }

 private:
  CheckpointReader() = default;

  std::string path_;
  int64_t step_ = 0;
  nlohmann::json progress_, identity_, environment_;
  std::unique_ptr<SafetensorsReader> weights_, optimizer_;
};

struct NewestCheckpoint {
  std::unique_ptr<CheckpointReader> checkpoint;  // Null where there is none.
  std::vector<std::string> damaged;              // What was passed over, newest first: what is wrong with each.
};
// The newest that is whole. Errors: FailedPrecondition where there are checkpoints and none is whole.
absl::StatusOr<NewestCheckpoint> FindNewestCheckpoint(const std::string& folder);

// What saves that were cut off have left: step-N.tmp with what is in it, and NAME.tmp-PID of each of `names`.
void RemoveLeftovers(const std::string& folder, const std::vector<std::string>& names,
                     FileSystem& files = SystemFiles());
// All checkpoints of a folder. Errors: DataLoss.
absl::Status RemoveCheckpoints(const std::string& folder, FileSystem& files = SystemFiles());

}  // namespace mt

#endif  // MT_RUNTIME_CHECKPOINT_CHECKPOINT_H_
