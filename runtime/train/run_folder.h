// The folder of a run, --out DIR: whether what lies there is this run, where it stopped, and its checkpoints.
#ifndef MT_RUNTIME_TRAIN_RUN_FOLDER_H_
#define MT_RUNTIME_TRAIN_RUN_FOLDER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "ir/base/json.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/checkpoint/saver.h"
#include "runtime/data/corpus.h"
#include "runtime/executor.h"
#include "runtime/train/stages.h"
#include "runtime/train/train_state.h"
#include "runtime/train/trainer.h"

namespace mt {

// What must be equal for a run to go on: plans, corpus, and every setting that its numbers depend on. A flat object.
nlohmann::ordered_json RunIdentity(absl::Span<const RunStage> stages, const Manifest& manifest,
                                   const TrainOptions& options);
// "bpe:32000, hash 0123456789abcdef", as an identity has it.
std::string TokenizerText(const Manifest& manifest);
// The tokenizer that `weights` (a flag and its value) were trained with, as their identity says, against the corpus's.
// An identity of null, or of before tokenizers were written there, is not compared. Errors: FailedPrecondition.
absl::Status CheckTrainedTokenizer(const std::string& weights, const nlohmann::json& identity, const Manifest& manifest,
                                   const std::string& data_folder);
// The identity of the run or checkpoint that has this file of weights; null where nothing beside it says so.
nlohmann::json IdentityBeside(const std::string& weights_path);
// What may make a run's bits differ on another machine: versions and devices.
nlohmann::ordered_json RunEnvironment(const proto::PlanProto& plan, const Backend& backend);
// "lr is 0.001 there, 0.002 here" for each member that differs.
std::vector<std::string> Differences(const nlohmann::json& there, const nlohmann::json& here);

// The newest whole checkpoint of a run's folder, or the one that `path` is. Errors: NotFound, FailedPrecondition.
absl::StatusOr<NewestCheckpoint> CheckpointAt(const std::string& path);

// The file of the weights that a path stands for: itself, or that of a run's folder or a checkpoint's; of a run that
// has not finished, its newest checkpoint's.
std::string WeightsPath(std::string path);

class RunFolder {
 public:
  struct Options {
    std::string path;
    nlohmann::ordered_json identity;
    bool fresh = false;                 // What is there is replaced.
    std::optional<int64_t> save_every;  // Steps; 0: only where the run is interrupted; absent: every ten minutes.
    int64_t keep = 2;
  };
  // Looks and writes nothing. Errors: InvalidArgument (another run is there: names what differs), FailedPrecondition
  // (no checkpoint is whole, another process runs here).
  static absl::StatusOr<std::unique_ptr<RunFolder>> Open(Options options);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  // The summary of this very run, where it is finished; else null.
  const nlohmann::json& finished() const { return finished_; }
  // Where it stopped; null where it starts.
  const CheckpointReader* checkpoint() const { return newest_.checkpoint.get(); }
  // What a user should know: damaged checkpoints, an environment that is not the checkpoint's.
  std::vector<std::string> Warnings(const nlohmann::ordered_json& environment) const;

  // Makes the folder this run's: removes what earlier ones have left, and of metrics.jsonl what comes after the
  // checkpoint. Errors: DataLoss.
  absl::Status Begin(nlohmann::ordered_json environment);

  // Takes the newest checkpoint anew, after the save under way, and cuts metrics.jsonl behind it. Errors: DataLoss,
  // FailedPrecondition.
  absl::Status GoBack();

  // Whether a checkpoint is due after this step.
  bool DueAfter(int64_t step);
  // Copies the states and writes them in the background. Errors: of the save before, DataLoss.
  absl::Status Save(Executor& executor, const TrainState& state);
  // Errors: of a save that has ended, DataLoss.
  absl::Status Poll() { return saver_.Poll(); }
  // Waits for the save under way. Errors: DataLoss.
  absl::Status Wait() { return saver_.Wait(); }
  // The step of the last checkpoint begun, read or written; -1: none.
  int64_t last_saved_step() const { return last_saved_step_; }

 private:
  explicit RunFolder(Options options)
      : options_(std::move(options)),
        saver_(options_.path, options_.keep),
        last_save_(std::chrono::steady_clock::now()) {}
  absl::Status Lock();

  const Options options_;
  nlohmann::ordered_json environment_;
  int lock_ = -1;
  nlohmann::json finished_;
  NewestCheckpoint newest_;
  CheckpointSaver saver_;
  std::chrono::steady_clock::time_point last_save_;
  int64_t last_saved_step_ = -1;
};

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_RUN_FOLDER_H_
