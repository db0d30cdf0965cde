// JSON lines, plain or compressed with zstd: one object a line, of which one string is the text.
#ifndef MT_RUNTIME_DATA_JSON_LINES_H_
#define MT_RUNTIME_DATA_JSON_LINES_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "runtime/data/text_source.h"

namespace mt {

struct JsonLine {
  absl::string_view line;  // As it is in the file, without the newline.
  std::string text;        // Valid UTF-8.
  std::string quality;     // meta.quality, as Speakleash has it; "" where there is none.
};

struct JsonLinesOptions {
  std::string text_field = "text";  // Of the top-level object.
  InvalidUtf8 invalid_utf8 = InvalidUtf8::kError;
  int64_t* invalid_parts = nullptr;  // Counts what was replaced or skipped; may be null.
  // Called with bytes of the file read; may be empty.
  std::function<void(int64_t)> progress;
};

// True for names that end in .jsonl, .jsonl.zst, .ndjson or .ndjson.zst.
bool IsJsonLines(absl::string_view path);

// Reads `fd` from its current place to its end (decompressed where it starts as zstd does) and hands each line that is
// not blank to `sink`; an error of `sink` ends it, Cancelled ends it well. Untrusted: lines of at most 256 MiB, memory
// bounded by the longest line whatever the compression; `name` is for messages.
// Errors: FailedPrecondition (unreadable, cut off, damaged, not JSON, no such field: names file and line).
absl::Status ReadJsonLines(int fd, absl::string_view name, const JsonLinesOptions& options,
                           const std::function<absl::Status(JsonLine&)>& sink);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_JSON_LINES_H_
