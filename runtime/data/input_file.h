// Whether a file is still what it was, after hours and another process.
#ifndef MT_RUNTIME_DATA_INPUT_FILE_H_
#define MT_RUNTIME_DATA_INPUT_FILE_H_

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace mt {

// What stat(2) says of a regular file, and a checksum of its contents.
struct InputFile {
  int64_t size_bytes = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;  // Of the inode: moves with every write.
  int64_t device = 0;
  int64_t inode = 0;
  uint32_t crc = 0;  // CRC-32C.
};

// All but the checksum.
InputFile DescribeInput(const struct stat& info);

// CRC-32C of the whole file. Errors: NotFound, FailedPrecondition (unreadable).
absl::StatusOr<uint32_t> FileCrc(const std::string& path);

// Whether `path` has the contents that `before` describes: it is read only where stat(2) says something else.
// Errors: NotFound, FailedPrecondition (unreadable).
absl::StatusOr<bool> IsUnchanged(const std::string& path, const InputFile& before);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_INPUT_FILE_H_
