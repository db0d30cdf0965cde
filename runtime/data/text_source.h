// The text that a corpus is made from: files, where their documents start, and their clean bytes, in bounded memory.
#ifndef MT_RUNTIME_DATA_TEXT_SOURCE_H_
#define MT_RUNTIME_DATA_TEXT_SOURCE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/input_file.h"

namespace mt {

inline constexpr char kSpoolFile[] = "unfinished.text";

enum class DocumentMode {
  kAuto,       // A folder: kFile; a file or stdin: kBlankLine; JSON lines by their names: kRecord.
  kFile,       // Each file is one document.
  kBlankLine,  // Separated by lines that hold nothing but white space.
  kLine,       // Each line that holds more than white space.
  kRecord,     // Each line is a JSON object (see json_lines.h), whose text field is a document.
};

enum class InvalidUtf8 { kError, kReplace, kSkip };

class TextSource {
 public:
  // Called with bytes done and all bytes.
  using Progress = std::function<void(int64_t, int64_t)>;

  // `input`: a file, a folder (all files below it by name; hidden ones and those in `output` left out) or "-" (standard
  // input; it and whatever is not a regular file are spooled to an unlinked file in `output`, the texts of JSON lines
  // to kSpoolFile there). Reads everything once. `text_field`: of JSON lines. Errors: NotFound, FailedPrecondition
  // (unreadable, no text, invalid UTF-8: names file and byte offset), DataLoss (the spool).
  static absl::StatusOr<std::unique_ptr<TextSource>> Open(const std::string& input, const std::string& output,
                                                          DocumentMode mode, InvalidUtf8 invalid_utf8,
                                                          const Progress& progress,
                                                          const std::string& text_field = "text");
  // What Restore takes: files, their checksums, where documents start. Syncs the spool. Errors: DataLoss.
  absl::StatusOr<std::string> Save() const;
  // The source that Save was called on, without reading the text again. Not for what is no regular file: where Save of
  // the newly opened source gives the same bytes, it is the same text.
  // Errors: InvalidArgument (another input: names the file), FailedPrecondition (`saved` or the spool is damaged).
  static absl::StatusOr<std::unique_ptr<TextSource>> Restore(absl::string_view saved, const std::string& input,
                                                             const std::string& output, InvalidUtf8 invalid_utf8);
  // Whether `input` can be opened twice: a regular file or a folder.
  static bool IsRepeatable(const std::string& input);

  ~TextSource();
  TextSource(const TextSource&) = delete;
  TextSource& operator=(const TextSource&) = delete;

  DocumentMode mode() const { return mode_; }  // Never kAuto.
  const std::vector<std::string>& names() const { return names_; }
  int64_t num_documents() const { return static_cast<int64_t>(starts_.size()); }
  int64_t size_bytes() const { return size_bytes_; }
  int64_t invalid_parts() const { return invalid_parts_; }  // Replaced or skipped.

  // Hands one document to `sink` in parts of valid UTF-8 of about 1 MiB at most, cut before white space where there is
  // some, so that a word is never cut. Blank-line and line documents have no white space at their end.
  // Errors: FailedPrecondition (the file was changed meanwhile), and those of `sink`.
  absl::Status ReadDocument(int64_t document, const std::function<absl::Status(absl::string_view)>& sink);

 private:
  struct File {
    std::string path;
    int64_t start;  // Of its first byte in the run of all files.
    int64_t size_bytes;
    bool spooled = false;  // Its bytes are in spool_ from spool_start.
    int64_t spool_start = 0;
    bool records = false;
    InputFile input;  // Of what is no regular file: size and checksum.
  };
  TextSource() = default;
  absl::Status AddFile(const std::string& path, const std::string& name, const std::string& output);
  absl::Status AddRecords(const std::string& path, const std::string& name, const std::string& output,
                          const std::string& text_field, const Progress& progress);
  absl::Status Scan(size_t file, int64_t* done_bytes, const Progress& progress);
  absl::Status MakeSpool(const std::string& folder, bool keep);
  absl::Status ReadAt(size_t file, int64_t offset, int64_t count, std::string* out);
  absl::StatusOr<int> Descriptor(size_t file);

  DocumentMode mode_ = DocumentMode::kAuto;
  InvalidUtf8 invalid_utf8_ = InvalidUtf8::kError;
  std::vector<std::string> names_;
  std::vector<File> files_;
  std::vector<int64_t> starts_;  // Of the documents, in the run of all files.
  int64_t size_bytes_ = 0;
  int64_t invalid_parts_ = 0;
  int spool_ = -1;  // Standard input, or the texts of all JSON lines.
  int64_t spool_bytes_ = 0;
  uint32_t spool_crc_ = 0;   // Of the texts of JSON lines.
  bool keep_spool_ = false;  // It is kSpoolFile.
  int open_ = -1;            // The file read last.
  size_t open_file_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_TEXT_SOURCE_H_
