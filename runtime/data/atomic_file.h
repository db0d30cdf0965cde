// A large file written in parts that becomes visible whole or not at all.
#ifndef MT_RUNTIME_DATA_ATOMIC_FILE_H_
#define MT_RUNTIME_DATA_ATOMIC_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

// Writes PATH.tmp-PID; Commit syncs it, renames it over PATH and syncs the folder. Destroyed without a successful
// Commit, it removes the temporary file. All errors are DataLoss (exit code 7) and name the file.
class AtomicFile {
 public:
  static absl::StatusOr<std::unique_ptr<AtomicFile>> Create(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::string& path() const { return path_; }
  // At the end of what was appended so far.
  absl::Status Append(absl::string_view bytes);
  // Anywhere; does not move the end used by Append.
  absl::Status WriteAt(int64_t offset, absl::string_view bytes);
  absl::Status Commit();

 private:
  AtomicFile() = default;

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  int64_t end_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_ATOMIC_FILE_H_
