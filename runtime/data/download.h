// Files over HTTP that are right or absent.
#ifndef MT_RUNTIME_DATA_DOWNLOAD_H_
#define MT_RUNTIME_DATA_DOWNLOAD_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

struct DownloadOptions {
  std::string bearer;          // Sent to the first host alone; never printed.
  int64_t attempts = 5;        // In a row that bring no byte.
  double backoff_seconds = 1;  // Before the second such attempt; doubled each time, at most 60.
  double stall_seconds = 60;   // A connection that brings next to nothing for so long is given up.
  // The server names contents as Hugging Face's does: ContentName is looked at, and a file of another name is wrong.
  bool named_contents = false;
  // Called with bytes done and all bytes (0: not known); may be empty.
  std::function<void(int64_t, int64_t)> progress;
};

// Downloads to PATH.part and renames it when it is whole: of `size_bytes` where that is given, of the length that the
// server names, of the contents that it names (named_contents), and accepted by `check` (may be empty; gets the path).
// An interrupted download goes on where it stopped if the server still has the same version (its ETag, kept in
// PATH.part.etag). A wrong file is removed. Follows up to 10 redirects, http and https only. Errors: NotFound (404),
// FailedPrecondition (refused, wrong size, not what `check` expects), Unavailable (no answer after the attempts; run
// again to go on), DataLoss (a failed write).
absl::Status Download(const std::string& url, const std::string& path, std::optional<int64_t> size_bytes,
                      const std::function<absl::Status(const std::string&)>& check, const DownloadOptions& options);

// What the server calls the contents of a file, from the headers of its first answer: X-Linked-Etag, which is the
// SHA-256 of what it keeps elsewhere (64 digits), or the ETag of what it sends itself, git's name (40 digits; see
// runtime/data/sha.h). "" where it says neither. Errors: as Download.
absl::StatusOr<std::string> ContentName(const std::string& url, const DownloadOptions& options);
// Whether the file has that name; true for "". Errors: NotFound, FailedPrecondition (unreadable).
absl::StatusOr<bool> HasContents(const std::string& path, const std::string& name);

// A small document. Errors: as Download; FailedPrecondition where it is larger than `limit_bytes`.
absl::StatusOr<std::string> FetchText(const std::string& url, int64_t limit_bytes, const DownloadOptions& options);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_DOWNLOAD_H_
