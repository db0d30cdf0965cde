// A large file written in parts that becomes visible whole or not at all.
#ifndef MT_RUNTIME_DATA_ATOMIC_FILE_H_
#define MT_RUNTIME_DATA_ATOMIC_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/file_system.h"

namespace mt {

// Writes PATH.tmp-PID; Commit syncs it, renames it over PATH and syncs the folder. Destroyed without a successful
// Commit, it removes the temporary file. All errors are DataLoss (exit code 7) and name the file.
class AtomicFile {
 public:
  static absl::StatusOr<std::unique_ptr<AtomicFile>> Create(const std::string& path, FileSystem& files = SystemFiles());
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::string& path() const { return path_; }
  // At the end of what was appended so far.
  absl::Status Append(absl::string_view bytes);
  // Anywhere; does not move the end used by Append.
  absl::Status WriteAt(int64_t offset, absl::string_view bytes);
  absl::Status Commit();

  int64_t size_bytes() const { return size_bytes_; }
  // CRC-32C of the contents. REQUIRES: they were written from the first byte to the last.
  uint32_t crc() const;

 private:
  explicit AtomicFile(FileSystem& files) : files_(files) {}

  FileSystem& files_;
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  int64_t end_ = 0;
  int64_t size_bytes_ = 0;
  int64_t crc_bytes_ = 0;  // The first of them are in crc_.
  uint32_t crc_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_ATOMIC_FILE_H_
