#include "runtime/data/json_lines.h"

#include <unistd.h>
#include <zstd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/utf8.h"

namespace mt {
namespace {

constexpr size_t kMaxLineBytes = size_t{256} << 20;
constexpr size_t kReadBytes = size_t{1} << 20;
constexpr int kMaxDepth = 64;
constexpr char kReplacement[] = "\xEF\xBF\xBD";
constexpr unsigned char kZstdMagic[] = {0x28, 0xB5, 0x2F, 0xFD};

// Takes two strings out of an object and builds no tree of the rest.
class Fields : public nlohmann::json_sax<nlohmann::json> {
 public:
  Fields(const std::string& text_field, JsonLine* line) : text_field_(text_field), line_(line) {}
  bool found() const { return found_; }
  const char* fault() const { return fault_; }

  bool null() override { return Scalar(); }
  bool boolean(bool) override { return Scalar(); }
  bool number_integer(number_integer_t) override { return Scalar(); }
  bool number_unsigned(number_unsigned_t) override { return Scalar(); }
  bool number_float(number_float_t, const string_t&) override { return Scalar(); }
  bool binary(binary_t&) override { return Scalar(); }
  bool string(string_t& value) override {
    if (depth_ == 1 && is_text_) {
      if (found_) return Fail("gives the text twice");
      found_ = true;
      line_->text = std::move(value);
    } else if (depth_ == 2 && in_meta_ && is_quality_) {
      line_->quality = std::move(value);
    }
    return Scalar();
  }
  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return depth_ > 0 ? Open() : Fail("is not a JSON object"); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& value) override {
    if (depth_ == 1) {
      is_text_ = value == text_field_;
      in_meta_ = value == "meta";
    }
    if (depth_ == 2) is_quality_ = value == "quality";
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override {
    if (fault_ == nullptr) fault_ = "is not valid JSON";
    return false;
  }

 private:
  bool Fail(const char* fault) {
    fault_ = fault;
    return false;
  }
  bool Scalar() { return depth_ > 0 || Fail("is not a JSON object"); }
  bool Open() { return ++depth_ <= kMaxDepth || Fail("is nested deeper than 64 levels"); }
  bool Close() {
    --depth_;
    if (depth_ == 1) is_quality_ = false;
    return true;
  }

  const std::string& text_field_;
  JsonLine* line_;
  int depth_ = 0;
  bool is_text_ = false, in_meta_ = false, is_quality_ = false, found_ = false;
  const char* fault_ = nullptr;
};

// Cuts a stream into lines and reads them.
class LineReader {
 public:
  LineReader(absl::string_view name, const JsonLinesOptions& options,
             const std::function<absl::Status(JsonLine&)>& sink)
      : name_(name), options_(options), sink_(sink) {}

  absl::Status Add(absl::string_view bytes) {
    while (!bytes.empty()) {
      const size_t end = bytes.find('\n');
      const absl::string_view part = bytes.substr(0, end);
      if (part.size() > kMaxLineBytes - line_.size()) {
        return Fault(absl::StrCat("is longer than ", kMaxLineBytes >> 20, " MiB"));
      }
      if (end == absl::string_view::npos) {
        absl::StrAppend(&line_, part);
        return absl::OkStatus();
      }
      bytes.remove_prefix(end + 1);
      if (line_.empty()) {
        RETURN_IF_ERROR(Line(part));
      } else {
        absl::StrAppend(&line_, part);
        RETURN_IF_ERROR(Line(line_));
        line_.clear();
      }
    }
    return absl::OkStatus();
  }
  absl::Status Finish() { return line_.empty() ? absl::OkStatus() : Line(line_); }

 private:
  absl::Status Fault(absl::string_view fact) const {
    return absl::FailedPreconditionError(absl::StrCat(name_, ": line ", number_ + 1, " ", fact));
  }

  absl::Status Line(absl::string_view line) {
    absl::string_view content = absl::StripAsciiWhitespace(line);
    if (number_ == 0 && absl::StartsWith(content, "\xEF\xBB\xBF")) content.remove_prefix(3);
    if (content.empty()) {
      ++number_;
      return absl::OkStatus();
    }
    std::string clean;
    if (ValidUtf8Prefix(content) != static_cast<int64_t>(content.size())) {
      if (options_.invalid_utf8 == InvalidUtf8::kError) {
        return Fault("is not UTF-8; convert the file, or use --invalid-utf8=replace or --invalid-utf8=skip");
      }
      for (absl::string_view rest = content; !rest.empty();) {
        const size_t valid = static_cast<size_t>(ValidUtf8Prefix(rest));
        clean.append(rest.data(), valid);
        rest.remove_prefix(valid);
        if (rest.empty()) break;
        rest.remove_prefix(static_cast<size_t>(DecodeUtf8(rest).size_bytes));
        if (options_.invalid_utf8 == InvalidUtf8::kReplace) clean += kReplacement;
        if (options_.invalid_parts != nullptr) ++*options_.invalid_parts;
      }
      content = clean;
    }
    JsonLine out{content, "", ""};
    Fields fields(options_.text_field, &out);
    const bool good = nlohmann::json::sax_parse(content.begin(), content.end(), &fields);
    if (fields.fault() != nullptr || !good)
      return Fault(fields.fault() != nullptr ? fields.fault() : "is not valid JSON");
    if (!fields.found()) {
      return Fault(absl::StrCat("has no string \"", options_.text_field, "\"; name the field with --text-field"));
    }
    ++number_;
    return sink_(out);
  }

  const absl::string_view name_;
  const JsonLinesOptions& options_;
  const std::function<absl::Status(JsonLine&)>& sink_;
  std::string line_;
  int64_t number_ = 0;
};

}  // namespace

bool IsJsonLines(absl::string_view path) {
  for (const char* end : {".jsonl", ".jsonl.zst", ".ndjson", ".ndjson.zst"}) {
    if (absl::EndsWithIgnoreCase(path, end)) return true;
  }
  return false;
}

absl::Status ReadJsonLines(int fd, absl::string_view name, const JsonLinesOptions& options,
                           const std::function<absl::Status(JsonLine&)>& sink) {
  const auto fault = [name](absl::string_view fact) {
    return absl::FailedPreconditionError(absl::StrCat(name, ": ", fact));
  };
  LineReader lines(name, options, sink);
  std::string block(kReadBytes, '\0');
  std::string out(ZSTD_DStreamOutSize(), '\0');
  ZSTD_DCtx* context = nullptr;
  absl::Cleanup free = [&] { ZSTD_freeDCtx(context); };
  bool first = true;
  size_t frame = 0;  // What the decompressor still expects; 0 between frames.
  int64_t total = 0;
  const auto run = [&]() -> absl::Status {
    while (true) {
      // Full blocks, so that the first one holds the magic number.
      size_t size = 0;
      while (size < block.size()) {
        const ssize_t n = ::read(fd, block.data() + size, block.size() - size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fault(absl::StrCat("cannot read: ", std::strerror(errno)));
        if (n == 0) break;
        size += static_cast<size_t>(n);
      }
      if (first && size >= sizeof kZstdMagic && std::memcmp(block.data(), kZstdMagic, sizeof kZstdMagic) == 0) {
        context = ZSTD_createDCtx();
        CHECK(context != nullptr) << "out of memory";
      }
      if (first && context == nullptr && absl::EndsWithIgnoreCase(name, ".zst"))
        return fault("is not compressed with zstd");
      first = false;
      total += static_cast<int64_t>(size);
      if (context == nullptr) {
        RETURN_IF_ERROR(lines.Add(absl::string_view(block).substr(0, size)));
      } else {
        ZSTD_inBuffer in = {block.data(), size, 0};
        bool full = false;
        while (in.pos < in.size || full) {
          ZSTD_outBuffer buffer = {out.data(), out.size(), 0};
          frame = ZSTD_decompressStream(context, &buffer, &in);
          if (ZSTD_isError(frame)) return fault(absl::StrCat("damaged: ", ZSTD_getErrorName(frame)));
          full = buffer.pos == buffer.size && frame != 0;
          RETURN_IF_ERROR(lines.Add(absl::string_view(out).substr(0, buffer.pos)));
        }
      }
      if (options.progress) options.progress(total);
      if (size < block.size()) break;
    }
    if (frame != 0) return fault("is cut off in the middle of its compressed data");
    return lines.Finish();
  };
  const absl::Status status = run();
  return absl::IsCancelled(status) ? absl::OkStatus() : status;
}

}  // namespace mt
