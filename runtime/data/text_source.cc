#include "runtime/data/text_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/json_lines.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr char kByteOrderMark[] = "\xEF\xBB\xBF";
constexpr char kReplacement[] = "\xEF\xBF\xBD";

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Unicode's White_Space.
bool IsUnicodeSpace(int32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// The last place before white space that follows text, where no word goes on; the whole size where there is none.
size_t LastWordEnd(absl::string_view text) {
  for (size_t i = text.size(); i-- > 1;) {
    if (!IsSpace(text[i]) || IsSpace(text[i - 1])) continue;
    size_t last = i - 1;
    while (last > 0 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) --last;
    if (!IsUnicodeSpace(DecodeUtf8(text.substr(last)).code_point)) return i;
  }
  return text.size();
}

absl::Status ReadError(absl::string_view path, absl::string_view what) {
  const std::string message = absl::StrCat(path, ": ", what, ": ", std::strerror(errno));
  return errno == ENOENT ? absl::NotFoundError(message) : absl::FailedPreconditionError(message);
}

// Up to `count` bytes; fewer at the end of the file.
absl::Status ReadFully(int fd, absl::string_view path, int64_t offset, int64_t count, std::string* out) {
  out->resize(static_cast<size_t>(count));
  int64_t done = 0;
  while (done < count) {
    const ssize_t n = ::pread(fd, out->data() + done, static_cast<size_t>(count - done), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ReadError(path, "cannot read");
    if (n == 0) break;
    done += n;
  }
  out->resize(static_cast<size_t>(done));
  return absl::OkStatus();
}

absl::Status WriteFully(int fd, absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return absl::DataLossError(absl::StrCat("the copy of the input: write failed: ", std::strerror(errno)));
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

// Copies everything that `in` still gives to `out`.
absl::Status Spool(int in, absl::string_view name, int out) {
  std::string block(static_cast<size_t>(kBlockBytes), '\0');
  while (true) {
    const ssize_t n = ::read(in, block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ReadError(name, "cannot read");
    if (n == 0) return absl::OkStatus();
    RETURN_IF_ERROR(WriteFully(out, absl::string_view(block).substr(0, static_cast<size_t>(n))));
  }
}

struct Input {
  std::string path, name;
};

// What `input` names, by name.
absl::StatusOr<std::vector<Input>> ListInputs(const std::string& input, const std::string& output) {
  std::error_code error;
  if (input == "-" || !fs::is_directory(input, error)) {
    return std::vector<Input>{{input, input == "-" ? "-" : fs::path(input).filename().string()}};
  }
  std::vector<Input> inputs;
  for (fs::recursive_directory_iterator it(input, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    const bool hidden = absl::string_view(it->path().filename().native()).substr(0, 1) == ".";
    if (it->is_directory(ignored)) {
      if (hidden || fs::equivalent(it->path(), output, ignored)) it.disable_recursion_pending();
    } else if (!hidden && it->is_regular_file(ignored)) {
      const std::string name = it->path().lexically_relative(input).string();
      inputs.push_back({(fs::path(input) / name).string(), name});
    }
  }
  if (error) return absl::FailedPreconditionError(absl::StrCat(input, ": cannot list the folder: ", error.message()));
  if (inputs.empty()) return absl::FailedPreconditionError(absl::StrCat(input, ": the folder has no files"));
  std::sort(inputs.begin(), inputs.end(), [](const Input& a, const Input& b) { return a.name < b.name; });
  return inputs;
}

// The saved form: numbers in seven bits a byte, the lowest first, the last without the eighth bit; strings after their
// lengths.
void Put(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

class SavedReader {
 public:
  explicit SavedReader(absl::string_view bytes) : bytes_(bytes) {}
  bool good() const { return good_; }
  bool done() const { return good_ && bytes_.empty(); }
  // From 0 to 2^62; 0 once something was wrong.
  int64_t Number() {
    uint64_t value = 0;
    for (int shift = 0; good_; shift += 7) {
      good_ = !bytes_.empty() && shift < 63;
      if (!good_) break;
      const uint8_t byte = static_cast<uint8_t>(bytes_[0]);
      bytes_.remove_prefix(1);
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) break;
    }
    good_ = good_ && value <= uint64_t{1} << 62;
    return good_ ? static_cast<int64_t>(value) : 0;
  }
  std::string Text() {
    const size_t size = static_cast<size_t>(Number());
    good_ = good_ && size <= bytes_.size();
    if (!good_) return "";
    const std::string text(bytes_.substr(0, size));
    bytes_.remove_prefix(size);
    return text;
  }

 private:
  absl::string_view bytes_;
  bool good_ = true;
};

constexpr int64_t kSavedVersion = 1;

}  // namespace

// A file without a name unless it is kept for Restore.
absl::Status TextSource::MakeSpool(const std::string& folder, bool keep) {
  const std::string path =
      keep ? absl::StrCat(folder, "/", kSpoolFile) : absl::StrCat(folder, "/input.tmp-", ::getpid());
  spool_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (spool_ < 0) return absl::DataLossError(absl::StrCat(path, ": cannot create the file: ", std::strerror(errno)));
  keep_spool_ = keep;
  if (!keep) ::unlink(path.c_str());
  return absl::OkStatus();
}

TextSource::~TextSource() {
  if (open_ >= 0) ::close(open_);
  if (spool_ >= 0) ::close(spool_);
}

absl::Status TextSource::AddFile(const std::string& path, const std::string& name, const std::string& output) {
  const bool standard_input = path == "-";  // Not a file of that name in a folder.
  struct stat info;
  const bool regular = !standard_input && IsRepeatable(path);
  if (standard_input || (::stat(path.c_str(), &info) == 0 && !regular)) {
    int in = STDIN_FILENO;
    if (!standard_input) {
      ASSIGN_OR_RETURN(in, OpenToRead(path));
    }
    absl::Cleanup close = [&] {
      if (!standard_input) ::close(in);
    };
    RETURN_IF_ERROR(MakeSpool(output, /*keep=*/false));
    RETURN_IF_ERROR(Spool(in, standard_input ? "standard input" : path, spool_));
    if (::fstat(spool_, &info) != 0) return ReadError(path, "cannot read");
  } else if (::stat(path.c_str(), &info) != 0) {
    return ReadError(path, "cannot open");
  }
  const bool spooled = standard_input || !regular;
  files_.push_back({standard_input ? "standard input" : path, size_bytes_, info.st_size, spooled});
  files_.back().input = spooled ? InputFile{.size_bytes = info.st_size} : DescribeInput(info);
  names_.push_back(name);
  size_bytes_ += info.st_size;
  return absl::OkStatus();
}

absl::Status TextSource::AddRecords(const std::string& path, const std::string& name, const std::string& output,
                                    const std::string& text_field, const Progress& progress) {
  const bool standard_input = path == "-";
  const std::string shown = standard_input ? "standard input" : path;
  int in = STDIN_FILENO;
  if (!standard_input) {
    ASSIGN_OR_RETURN(in, OpenToRead(path));
  }
  absl::Cleanup close = [&] {
    if (!standard_input) ::close(in);
  };
  const bool regular = !standard_input && IsRepeatable(path);
  if (spool_ < 0) RETURN_IF_ERROR(MakeSpool(output, /*keep=*/regular));
  struct stat info = {};
  const int64_t file_bytes = ::fstat(in, &info) == 0 ? info.st_size : 0;
  JsonLinesOptions options{text_field, invalid_utf8_, &invalid_parts_, nullptr};
  if (progress) options.progress = [&](int64_t done) { progress(done, std::max(done, file_bytes)); };
  const int64_t first = spool_bytes_;
  std::string pending;
  RETURN_IF_ERROR(ReadJsonLines(in, shown, options, [&](JsonLine& line) -> absl::Status {
    if (std::all_of(line.text.begin(), line.text.end(), IsSpace)) return absl::OkStatus();
    starts_.push_back(size_bytes_ + spool_bytes_ - first);
    pending += line.text;
    spool_bytes_ += static_cast<int64_t>(line.text.size());
    if (static_cast<int64_t>(pending.size()) < kBlockBytes) return absl::OkStatus();
    spool_crc_ = Crc32c(pending, spool_crc_);
    RETURN_IF_ERROR(WriteFully(spool_, pending));
    pending.clear();
    return absl::OkStatus();
  }));
  spool_crc_ = Crc32c(pending, spool_crc_);
  RETURN_IF_ERROR(WriteFully(spool_, pending));
  files_.push_back({shown, size_bytes_, spool_bytes_ - first, /*spooled=*/true, first, /*records=*/true});
  if (regular) {
    files_.back().input = DescribeInput(info);
    ASSIGN_OR_RETURN(files_.back().input.crc, FileCrc(path));
  }
  names_.push_back(name);
  size_bytes_ += spool_bytes_ - first;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TextSource>> TextSource::Open(const std::string& input, const std::string& output,
                                                             DocumentMode mode, InvalidUtf8 invalid_utf8,
                                                             const Progress& progress, const std::string& text_field) {
  std::unique_ptr<TextSource> source(new TextSource);
  source->invalid_utf8_ = invalid_utf8;
  std::error_code error;
  int64_t done_bytes = 0;
  int64_t record_files = 0;
  const auto add = [&](const std::string& path, const std::string& name) -> absl::Status {
    if (mode == DocumentMode::kRecord || (mode == DocumentMode::kAuto && IsJsonLines(path))) {
      ++record_files;
      return source->AddRecords(path, name, output, text_field, progress);
    }
    RETURN_IF_ERROR(source->AddFile(path, name, output));
    return source->Scan(source->files_.size() - 1, &done_bytes, progress);
  };
  const bool folder = input != "-" && fs::is_directory(input, error);
  source->mode_ = mode != DocumentMode::kAuto ? mode : folder ? DocumentMode::kFile : DocumentMode::kBlankLine;
  ASSIGN_OR_RETURN(const std::vector<Input> inputs, ListInputs(input, output));
  for (const Input& file : inputs) RETURN_IF_ERROR(add(file.path, file.name));
  if (record_files == static_cast<int64_t>(source->files_.size())) source->mode_ = DocumentMode::kRecord;
  if (source->starts_.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat(input == "-" ? "standard input" : input, ": has no text (", source->size_bytes_, " bytes)"));
  }
  return source;
}

bool TextSource::IsRepeatable(const std::string& input) {
  struct stat info;
  return input != "-" && ::stat(input.c_str(), &info) == 0 && (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode));
}

absl::StatusOr<std::string> TextSource::Save() const {
  if (keep_spool_ && ::fsync(spool_) != 0) {
    return absl::DataLossError(absl::StrCat("the copy of the input: sync failed: ", std::strerror(errno)));
  }
  std::string out;
  const auto put = [&out](int64_t value) { Put(static_cast<uint64_t>(value), &out); };
  for (const int64_t value : {kSavedVersion, static_cast<int64_t>(mode_), invalid_parts_, spool_bytes_,
                              int64_t{spool_crc_}, static_cast<int64_t>(files_.size())}) {
    put(value);
  }
  for (size_t i = 0; i < files_.size(); ++i) {
    const File& file = files_[i];
    put(static_cast<int64_t>(names_[i].size()));
    out += names_[i];
    for (const int64_t value : {file.size_bytes, int64_t{file.spooled}, file.spool_start, int64_t{file.records},
                                file.input.size_bytes, file.input.modified_ns, file.input.changed_ns, file.input.device,
                                file.input.inode, int64_t{file.input.crc}}) {
      put(value);
    }
  }
  put(num_documents());
  int64_t previous = 0;
  for (const int64_t start : starts_) put(start - std::exchange(previous, start));
  return out;
}

absl::StatusOr<std::unique_ptr<TextSource>> TextSource::Restore(absl::string_view saved, const std::string& input,
                                                                const std::string& output, InvalidUtf8 invalid_utf8) {
  const absl::Status damaged = absl::FailedPreconditionError("what was kept of the input is damaged");
  std::unique_ptr<TextSource> source(new TextSource);
  SavedReader reader(saved);
  if (reader.Number() != kSavedVersion) return damaged;
  source->mode_ = static_cast<DocumentMode>(reader.Number());
  source->invalid_utf8_ = invalid_utf8;
  source->invalid_parts_ = reader.Number();
  source->spool_bytes_ = reader.Number();
  source->spool_crc_ = static_cast<uint32_t>(reader.Number());
  const int64_t files = reader.Number();
  for (int64_t i = 0; i < files && reader.good(); ++i) {
    source->names_.push_back(reader.Text());
    File file;
    file.start = source->size_bytes_;
    file.size_bytes = reader.Number();
    file.spooled = reader.Number() != 0;
    file.spool_start = reader.Number();
    file.records = reader.Number() != 0;
    file.input.size_bytes = reader.Number();
    file.input.modified_ns = reader.Number();
    file.input.changed_ns = reader.Number();
    file.input.device = reader.Number();
    file.input.inode = reader.Number();
    file.input.crc = static_cast<uint32_t>(reader.Number());
    if (file.size_bytes > (int64_t{1} << 61) - source->size_bytes_) return damaged;
    source->size_bytes_ += file.size_bytes;
    source->keep_spool_ |= file.spooled;
    source->files_.push_back(std::move(file));
  }
  const int64_t documents = reader.Number();
  int64_t start = 0;
  for (int64_t i = 0; i < documents && reader.good(); ++i) {
    start += reader.Number();
    if (start >= source->size_bytes_) return damaged;
    source->starts_.push_back(start);
  }
  if (!reader.done() || source->starts_.empty() || source->files_.empty()) return damaged;

  ASSIGN_OR_RETURN(const std::vector<Input> inputs, ListInputs(input, output));
  const auto changed = [](const std::string& path, absl::string_view how) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", how));
  };
  for (size_t i = 0; i < std::max(inputs.size(), source->files_.size()); ++i) {
    if (i == inputs.size() || (i < source->files_.size() && inputs[i].name > source->names_[i])) {
      return changed(source->names_[i], "is no longer there");
    }
    if (i == source->files_.size() || inputs[i].name != source->names_[i]) return changed(inputs[i].path, "is new");
    source->files_[i].path = inputs[i].path;
    ASSIGN_OR_RETURN(const bool same, IsUnchanged(inputs[i].path, source->files_[i].input));
    if (!same) return changed(inputs[i].path, "has changed");
  }
  if (source->keep_spool_) {
    const std::string path = absl::StrCat(output, "/", kSpoolFile);
    const absl::StatusOr<uint32_t> crc = FileCrc(path);
    struct stat info;
    source->spool_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (!crc.ok() || *crc != source->spool_crc_ || source->spool_ < 0 || ::fstat(source->spool_, &info) != 0 ||
        info.st_size != source->spool_bytes_) {
      return damaged;
    }
  }
  return source;
}

absl::StatusOr<int> TextSource::Descriptor(size_t file) {
  if (files_[file].spooled) return spool_;
  if (open_ >= 0 && open_file_ == file) return open_;
  if (open_ >= 0) ::close(open_);
  open_ = ::open(files_[file].path.c_str(), O_RDONLY | O_CLOEXEC);
  open_file_ = file;
  if (open_ < 0) return ReadError(files_[file].path, "cannot open");
  return open_;
}

// Exactly `count` bytes.
absl::Status TextSource::ReadAt(size_t file, int64_t offset, int64_t count, std::string* out) {
  ASSIGN_OR_RETURN(const int fd, Descriptor(file));
  RETURN_IF_ERROR(ReadFully(fd, files_[file].path, files_[file].spool_start + offset, count, out));
  if (static_cast<int64_t>(out->size()) == count) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(files_[file].path, ": became shorter while it was read; do not write to it during mtcorpus prep"));
}

absl::Status TextSource::Scan(size_t file, int64_t* done_bytes, const Progress& progress) {
  File& info = files_[file];
  enum class State {
    kBetween,
    kBlankSoFar,
    kInText
  };  // Before a document; in a line without text yet; in a line with.
  State state = State::kBetween;
  bool in_document = false;
  int64_t line_start = 0;
  std::string block;
  std::string rest;  // Of the last block: the start of a character that it cut.
  for (int64_t offset = 0; offset < info.size_bytes;) {
    const int64_t count = std::min(kBlockBytes, info.size_bytes - offset);
    RETURN_IF_ERROR(ReadAt(file, offset, count, &block));
    info.input.crc = Crc32c(block, info.input.crc);
    int64_t first = 0;
    if (offset == 0 && absl::string_view(block).substr(0, 3) == kByteOrderMark) first = 3;
    if (offset == 0) line_start = first;

    rest += block;
    absl::string_view text = rest;
    const int64_t text_offset = offset + count - static_cast<int64_t>(rest.size());
    while (!text.empty()) {
      text.remove_prefix(static_cast<size_t>(ValidUtf8Prefix(text)));
      if (text.empty()) break;
      const Utf8Char bad = DecodeUtf8(text);
      if (bad.truncated && offset + count < info.size_bytes) break;
      if (invalid_utf8_ == InvalidUtf8::kError) {
        const int64_t at = text_offset + (text.data() - rest.data());
        return absl::FailedPreconditionError(absl::StrFormat(
            "%s: byte %d (0x%02x) is not UTF-8; convert the file, or use --invalid-utf8=replace or --invalid-utf8=skip",
            info.path, at, static_cast<uint8_t>(text[0])));
      }
      ++invalid_parts_;
      text.remove_prefix(static_cast<size_t>(bad.size_bytes));
    }
    rest = std::string(text);

    for (int64_t i = first; i < count; ++i) {
      const char c = block[static_cast<size_t>(i)];
      if (c == '\n') {
        const bool ends =
            mode_ == DocumentMode::kLine || (mode_ == DocumentMode::kBlankLine && state != State::kInText);
        if (ends) in_document = false;
        state = State::kBlankSoFar;
        line_start = offset + i + 1;
      } else if (state != State::kInText && !IsSpace(c)) {
        state = State::kInText;
        if (!in_document) {
          starts_.push_back(info.start + (mode_ == DocumentMode::kFile ? 0 : line_start));
          in_document = true;
        }
      }
    }
    offset += count;
    *done_bytes += count;
    if (progress) progress(*done_bytes, size_bytes_);
  }
  return absl::OkStatus();
}

absl::Status TextSource::ReadDocument(int64_t document, const std::function<absl::Status(absl::string_view)>& sink) {
  const int64_t start = starts_[static_cast<size_t>(document)];
  const auto after = std::upper_bound(files_.begin(), files_.end(), start,
                                      [](int64_t at, const File& file) { return at < file.start; });
  const size_t file = static_cast<size_t>(after - files_.begin() - 1);
  const int64_t file_start = files_[file].start;
  int64_t end = files_[file].size_bytes;
  if (document + 1 < num_documents()) end = std::min(end, starts_[static_cast<size_t>(document) + 1] - file_start);
  int64_t at = start - file_start;
  std::string block;
  if (mode_ != DocumentMode::kFile && !files_[file].records) {
    while (end > at) {  // White space at the end: blank lines, the newline.
      const int64_t count = std::min(end - at, int64_t{4096});
      RETURN_IF_ERROR(ReadAt(file, end - count, count, &block));
      int64_t keep = count;
      while (keep > 0 && IsSpace(block[static_cast<size_t>(keep - 1)])) --keep;
      end -= count - keep;
      if (keep > 0) break;
    }
  }
  std::string text;     // Not yet handed on.
  std::string pending;  // Read, but the start of a character that the block cut.
  while (at < end) {
    const int64_t count = std::min(kBlockBytes, end - at);
    RETURN_IF_ERROR(ReadAt(file, at, count, &block));
    if (at == 0 && !files_[file].records && absl::string_view(block).substr(0, 3) == kByteOrderMark) block.erase(0, 3);
    at += count;
    pending += block;
    absl::string_view left = pending;
    while (!left.empty()) {
      const size_t valid = static_cast<size_t>(ValidUtf8Prefix(left));
      text.append(left.data(), valid);
      left.remove_prefix(valid);
      if (left.empty()) break;
      const Utf8Char bad = DecodeUtf8(left);
      if (bad.truncated && at < end) break;
      if (invalid_utf8_ == InvalidUtf8::kError) {
        return absl::FailedPreconditionError(
            absl::StrCat(files_[file].path, ": changed while it was read; do not write to it during mtcorpus prep"));
      }
      if (invalid_utf8_ == InvalidUtf8::kReplace) text += kReplacement;
      left.remove_prefix(static_cast<size_t>(bad.size_bytes));
    }
    pending = std::string(left);
    if (at == end) break;
    const size_t cut = LastWordEnd(text);
    RETURN_IF_ERROR(sink(absl::string_view(text).substr(0, cut)));
    text.erase(0, cut);
  }
  return text.empty() ? absl::OkStatus() : sink(text);
}

}  // namespace mt
