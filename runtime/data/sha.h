// SHA-1 and SHA-256, by which git and Hugging Face name contents.
#ifndef MT_RUNTIME_DATA_SHA_H_
#define MT_RUNTIME_DATA_SHA_H_

#include <string>

#include "absl/status/statusor.h"

namespace mt {

// 64 digits. Errors: NotFound, FailedPrecondition (unreadable).
absl::StatusOr<std::string> FileSha256(const std::string& path);
// The name that git gives to the contents, 40 digits: SHA-1 of "blob SIZE\0" and the bytes.
absl::StatusOr<std::string> FileGitBlob(const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_SHA_H_
