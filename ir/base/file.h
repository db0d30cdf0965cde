// Whole files, read and written so that a reader never sees half of one.
#ifndef MT_IR_BASE_FILE_H_
#define MT_IR_BASE_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

// A file descriptor to read from. A pipe gets two seconds for somebody to open its other end. Errors: NotFound (no such
// file), FailedPrecondition (a folder, unreadable, a pipe that nobody writes to, a device other than a terminal and
// /dev/null: it has no end).
absl::StatusOr<int> OpenToRead(const std::string& path);

// Errors: as OpenToRead, and ResourceExhausted (larger than `limit_bytes`).
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t limit_bytes = int64_t{1} << 32);

// Writes PATH.tmp-PID, syncs it, renames it over `path` and syncs the folder; on failure nothing is left behind. A
// device or a pipe is written to as it is. Errors: DataLoss for a failed write (disk full, I/O error): exit code 7.
absl::Status WriteFile(const std::string& path, absl::string_view contents);

// Creates the folder and its parents. OK where it exists.
absl::Status MakeFolder(const std::string& path);

}  // namespace mt

#endif  // MT_IR_BASE_FILE_H_
