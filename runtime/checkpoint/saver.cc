#include "runtime/checkpoint/saver.h"

#include <utility>

#include "ir/base/check.h"

namespace mt {

CheckpointSaver::~CheckpointSaver() {
  if (thread_.joinable()) thread_.join();
}

absl::Status CheckpointSaver::Wait() {
  if (thread_.joinable()) thread_.join();
  return std::exchange(status_, absl::OkStatus());
}

absl::Status CheckpointSaver::Poll() { return thread_.joinable() && done_ ? Wait() : absl::OkStatus(); }

void CheckpointSaver::Start() {
  CHECK(!thread_.joinable()) << "a save is under way";
  done_ = false;
  thread_ = std::thread([this] {
    status_ = WriteCheckpoint(folder_, snapshot_, keep_, files_);
    done_ = true;
  });
}

}  // namespace mt
