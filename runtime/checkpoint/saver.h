// Saves in the background: the caller fills a snapshot in host memory and goes on while a thread writes it.
#ifndef MT_RUNTIME_CHECKPOINT_SAVER_H_
#define MT_RUNTIME_CHECKPOINT_SAVER_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/data/file_system.h"

namespace mt {

// One save at a time; the snapshot's memory is kept between saves. For one thread's use.
class CheckpointSaver {
 public:
  CheckpointSaver(std::string folder, int64_t keep, FileSystem& files = SystemFiles())
      : folder_(std::move(folder)), keep_(keep), files_(files) {}
  ~CheckpointSaver();  // Waits.
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  // Waits for the save that is under way. Errors: of that save, DataLoss; it is told once.
  absl::Status Wait();
  // As Wait, where the save is over; OK at once where it is not.
  absl::Status Poll();
  // The snapshot to fill. REQUIRES: Wait() since Start.
  Checkpoint& snapshot() { return snapshot_; }
  // Begins to write it.
  void Start();

 private:
  const std::string folder_;
  const int64_t keep_;
  FileSystem& files_;
  Checkpoint snapshot_;
  absl::Status status_;  // Of the thread; read after it is joined.
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

}  // namespace mt

#endif  // MT_RUNTIME_CHECKPOINT_SAVER_H_
