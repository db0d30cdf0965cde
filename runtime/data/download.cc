#include "runtime/data/download.h"

#include <curl/curl.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "runtime/data/sha.h"

namespace mt {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{1} << 50;

struct Headers {  // Of the last response.
  long status = 0;
  std::string etag, encoding;
  int64_t range_first = -1, range_total = -1, length = -1;
};

// One request. Bodies of 200 and 206 go to `body`, which returns false to stop.
struct Request {
  const DownloadOptions& options;
  Headers headers;
  std::function<bool(absl::string_view)> body;
  bool stopped = false;
  int responses = 0;         // Redirects, then the last one.
  std::string content_name;  // As ContentName.
};

// The lower-case digits of `"..."` or `W/"..."`, where there are 40 or 64 of them.
std::string HashOfTag(absl::string_view tag) {
  absl::ConsumePrefix(&tag, "W/");
  if (!absl::ConsumePrefix(&tag, "\"") || !absl::ConsumeSuffix(&tag, "\"")) return "";
  const bool digits = std::all_of(tag.begin(), tag.end(), [](unsigned char c) { return absl::ascii_isxdigit(c); });
  return digits && (tag.size() == 40 || tag.size() == 64) ? absl::AsciiStrToLower(tag) : "";
}

size_t OnHeader(char* data, size_t size, size_t count, void* user) {
  Request& request = *static_cast<Request*>(user);
  Headers& headers = request.headers;
  absl::string_view line = absl::StripAsciiWhitespace(absl::string_view(data, size * count));
  if (absl::StartsWith(line, "HTTP/")) {  // Of each response on the way.
    headers = {};
    ++request.responses;
    const size_t space = line.find(' ');
    int status = 0;
    if (space != absl::string_view::npos && absl::SimpleAtoi(line.substr(space + 1, 3), &status))
      headers.status = status;
    return size * count;
  }
  const size_t colon = line.find(':');
  if (colon == absl::string_view::npos) return size * count;
  const std::string key = absl::AsciiStrToLower(line.substr(0, colon));
  absl::string_view value = absl::StripAsciiWhitespace(line.substr(colon + 1));
  if (key == "etag") {
    headers.etag = std::string(value);
    if (request.responses == 1 && request.content_name.empty()) request.content_name = HashOfTag(value);
  }
  if (key == "x-linked-etag" && request.responses == 1) request.content_name = HashOfTag(value);
  if (key == "content-encoding") headers.encoding = absl::AsciiStrToLower(value);
  if (key == "content-length" && !absl::SimpleAtoi(value, &headers.length)) headers.length = -1;
  if (key == "content-range" && absl::ConsumePrefix(&value, "bytes ")) {
    const size_t dash = value.find('-');
    const size_t slash = value.find('/');
    if (dash == absl::string_view::npos || slash == absl::string_view::npos ||
        !absl::SimpleAtoi(value.substr(0, std::min(dash, slash)), &headers.range_first)) {
      headers.range_first = -1;
    }
    if (slash != absl::string_view::npos && !absl::SimpleAtoi(value.substr(slash + 1), &headers.range_total)) {
      headers.range_total = -1;
    }
  }
  return size * count;
}

size_t OnBody(char* data, size_t size, size_t count, void* user) {
  Request& request = *static_cast<Request*>(user);
  const long status = request.headers.status;
  if (status != 200 && status != 206) return size * count;  // What an error page says is of no use.
  if (request.body(absl::string_view(data, size * count))) return size * count;
  request.stopped = true;
  return 0;
}

// Returns curl's code; the status is in request->headers.
CURLcode Perform(const std::string& url, int64_t from, const std::string& etag, Request* request) {
  static const CURLcode initialized = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (initialized != CURLE_OK) return initialized;
  CURL* curl = curl_easy_init();
  CHECK(curl != nullptr) << "out of memory";
  curl_slist* lines = nullptr;
  absl::Cleanup cleanup = [&] {
    curl_slist_free_all(lines);
    curl_easy_cleanup(curl);
  };
  if (!request->options.bearer.empty()) {
    lines = curl_slist_append(lines, absl::StrCat("Authorization: Bearer ", request->options.bearer).c_str());
  }
  if (from > 0) {
    lines = curl_slist_append(lines, absl::StrCat("Range: bytes=", from, "-").c_str());
    lines = curl_slist_append(lines, absl::StrCat("If-Range: ", etag).c_str());
  }
  curl_easy_setopt(curl, CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl, CURLOPT_HTTPHEADER, lines);
  curl_easy_setopt(curl, CURLOPT_USERAGENT, "mtcorpus");
  curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 1L);
  curl_easy_setopt(curl, CURLOPT_MAXREDIRS, 10L);
#if LIBCURL_VERSION_NUM >= 0x075500
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl, CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
#else
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
  curl_easy_setopt(curl, CURLOPT_REDIR_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
  curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, 30L);
  curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, 16L);
  curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME, std::max(1L, static_cast<long>(request->options.stall_seconds)));
  curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, OnHeader);
  curl_easy_setopt(curl, CURLOPT_HEADERDATA, request);
  curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, OnBody);
  curl_easy_setopt(curl, CURLOPT_WRITEDATA, request);
  return curl_easy_perform(curl);
}

// Whether to try again. Sets `status` to what is to be said where not, or where the attempts are used up.
bool Transient(const std::string& url, CURLcode code, const Headers& headers, absl::Status* status) {
  const long http = headers.status;
  if (code == CURLE_OK || code == CURLE_WRITE_ERROR) {
    if (http == 404) {
      *status = absl::NotFoundError(absl::StrCat(url, ": the server has no such file (404)"));
      return false;
    }
    if (http == 401 || http == 403) {
      *status = absl::FailedPreconditionError(
          absl::StrCat(url, ": the server refuses (", http, "); a gated file needs HF_TOKEN in the environment"));
      return false;
    }
    *status = absl::UnavailableError(absl::StrCat(url, ": the server answers ", http));
    if (http >= 500 || http == 408 || http == 429) return true;
    *status = absl::FailedPreconditionError(status->message());
    return false;
  }
  *status = absl::UnavailableError(absl::StrCat(url, ": ", curl_easy_strerror(code)));
  switch (code) {
    case CURLE_TOO_MANY_REDIRECTS:
    case CURLE_URL_MALFORMAT:
    case CURLE_UNSUPPORTED_PROTOCOL:
      *status = absl::FailedPreconditionError(status->message());
      return false;
    default:
      return true;
  }
}

// Before attempt number `attempt`, from 1.
void Wait(const DownloadOptions& options, int64_t attempt) {
  const double factor = static_cast<double>(int64_t{1} << std::min<int64_t>(attempt - 1, 8));
  std::this_thread::sleep_for(std::chrono::duration<double>(std::min(60.0, options.backoff_seconds * factor)));
}

}  // namespace

absl::StatusOr<std::string> ContentName(const std::string& url, const DownloadOptions& options) {
  absl::Status status;
  for (int64_t attempt = 0; attempt < options.attempts; ++attempt) {
    if (attempt > 0) Wait(options, attempt);
    Request request{options, {}, [](absl::string_view) { return false; }};  // The headers are enough.
    const CURLcode code = Perform(url, 0, "", &request);
    const bool answered = code == CURLE_OK || request.stopped;
    if (answered && (request.headers.status == 200 || request.headers.status == 206)) return request.content_name;
    if (!Transient(url, code, request.headers, &status)) return status;
  }
  return status;
}

absl::StatusOr<bool> HasContents(const std::string& path, const std::string& name) {
  if (name.empty()) return true;
  ASSIGN_OR_RETURN(const std::string actual, name.size() == 64 ? FileSha256(path) : FileGitBlob(path));
  return actual == name;
}

absl::StatusOr<std::string> FetchText(const std::string& url, int64_t limit_bytes, const DownloadOptions& options) {
  absl::Status status;
  for (int64_t attempt = 0; attempt < options.attempts; ++attempt) {
    if (attempt > 0) Wait(options, attempt);
    std::string text;
    Request request{options, {}, [&](absl::string_view bytes) {
                      absl::StrAppend(&text, bytes);
                      return static_cast<int64_t>(text.size()) <= limit_bytes;
                    }};
    const CURLcode code = Perform(url, 0, "", &request);
    if (request.stopped) {
      return absl::FailedPreconditionError(absl::StrCat(url, ": is larger than ", limit_bytes, " bytes"));
    }
    if (code == CURLE_OK && request.headers.status == 200) return text;
    if (!Transient(url, code, request.headers, &status)) return status;
  }
  return status;
}

absl::Status Download(const std::string& url, const std::string& path, std::optional<int64_t> size_bytes,
                      const std::function<absl::Status(const std::string&)>& check, const DownloadOptions& options) {
  const std::string part = absl::StrCat(path, ".part");
  const std::string etag_path = absl::StrCat(part, ".etag");
  const auto write_error = [&](absl::string_view what) {
    return absl::DataLossError(absl::StrCat(part, ": ", what, ": ", std::strerror(errno)));
  };
  const int fd = ::open(part.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return write_error("cannot create the file");
  absl::Cleanup close = [fd] { ::close(fd); };
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(part, ": another process is downloading this file"));
  }
  const auto remove = [&] {
    ::unlink(etag_path.c_str());
    ::unlink(part.c_str());
  };
  const int64_t limit = size_bytes.value_or(kMaxFileBytes);
  // A part without the version that it belongs to, or one that is too long, is worth nothing.
  std::string etag = ReadFile(etag_path, 4096).value_or("");
  struct stat info;
  if (::fstat(fd, &info) != 0) return write_error("cannot read");
  int64_t done = info.st_size;
  if (etag.empty() || done > limit) done = 0;

  absl::Status status;
  absl::Status failed_write;
  int64_t total = -1;  // As the server says.
  std::string content_name;
  bool whole = false;
  for (int64_t idle = 0; idle < options.attempts && !whole;) {
    if (idle > 0) Wait(options, idle);
    const int64_t from = done;
    bool begun = false;
    bool foreign = false;  // The answer is not the range that was asked for.
    int64_t received = 0;
    Request request{options, {}, nullptr};
    request.body = [&](absl::string_view bytes) {
      const Headers& headers = request.headers;
      if (!begun) {
        begun = true;
        if (!headers.encoding.empty() && headers.encoding != "identity") {
          failed_write = absl::FailedPreconditionError(
              absl::StrCat(url, ": the server sends the file encoded as ", headers.encoding));
          return false;
        }
        foreign = headers.status == 206 && (headers.range_first != from || from == 0 || headers.etag != etag);
        if (foreign) return false;
        if (headers.status == 200) done = 0;
        total = headers.status == 206 ? headers.range_total : headers.length;
        if (headers.status == 200) {
          etag = absl::StartsWith(headers.etag, "\"") ? headers.etag : "";  // Weak ones do not speak of bytes.
          if (::ftruncate(fd, 0) != 0) {
            failed_write = write_error("cannot shorten");
            return false;
          }
          if (etag.empty()) {
            ::unlink(etag_path.c_str());
          } else {
            failed_write = WriteFile(etag_path, etag);
            if (!failed_write.ok()) return false;
          }
        }
      }
      if (static_cast<int64_t>(bytes.size()) > limit - done) {
        failed_write = absl::FailedPreconditionError(
            absl::StrCat(url, ": is larger than the ", limit, " bytes that it should have"));
        return false;
      }
      while (!bytes.empty()) {
        const ssize_t n = ::pwrite(fd, bytes.data(), bytes.size(), done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
          if (n == 0) errno = ENOSPC;
          failed_write = write_error("write failed");
          return false;
        }
        bytes.remove_prefix(static_cast<size_t>(n));
        done += n;
        received += n;
      }
      if (options.progress) options.progress(done, total > 0 ? total : size_bytes.value_or(0));
      return true;
    };
    const CURLcode code = Perform(url, from, etag, &request);
    if (!request.content_name.empty()) content_name = request.content_name;
    if (!failed_write.ok()) {
      if (!absl::IsDataLoss(failed_write)) remove();
      return failed_write;
    }
    idle = received > 0 && done > from ? 0 : idle + 1;
    const long http = request.headers.status;
    if (foreign || http == 416) {  // From the start, once more.
      status = absl::UnavailableError(absl::StrCat(url, ": the server does not continue the file (", http, ")"));
      done = 0;
      etag.clear();
      ++idle;
      continue;
    }
    if (code == CURLE_OK && (http == 200 || http == 206)) {
      if (!begun) {  // An empty body.
        done = http == 200 ? 0 : from;
        total = http == 206 ? request.headers.range_total : request.headers.length;
      }
      const int64_t expected = total >= 0 ? total : size_bytes.value_or(-1);
      if (expected < 0 || done >= expected) {
        whole = true;
        break;
      }
      status = absl::UnavailableError(absl::StrCat(url, ": ", done, " of ", expected, " bytes came"));
      if (etag.empty()) done = 0;
      continue;
    }
    if (!Transient(url, code, request.headers, &status)) {
      if (done == 0) remove();
      return status;
    }
    if (etag.empty()) done = 0;
  }
  if (!whole) {
    if (done == 0) remove();
    return absl::UnavailableError(absl::StrCat(status.message(), "; run the command again to go on"));
  }
  if (size_bytes && done != *size_bytes) {
    remove();
    return absl::FailedPreconditionError(
        absl::StrCat(url, ": has ", done, " bytes, ", *size_bytes, " expected; it was removed"));
  }
  if (::ftruncate(fd, done) != 0 || ::fsync(fd) != 0) return write_error("sync failed");
  if (options.named_contents) {
    ASSIGN_OR_RETURN(const bool right, HasContents(part, content_name));
    if (!right) {
      remove();
      return absl::FailedPreconditionError(absl::StrCat(url, ": what came has not the hash that the server names, ",
                                                        content_name, "; it was removed, run the command again"));
    }
  }
  if (check) {
    const absl::Status checked = check(part);
    if (!checked.ok()) {
      remove();
      return Annotate(checked, url);
    }
  }
  if (::rename(part.c_str(), path.c_str()) != 0) return write_error("rename failed");
  ::unlink(etag_path.c_str());
  const std::string parent = std::filesystem::path(path).parent_path().string();
  const int folder = ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    ::fsync(folder);
    ::close(folder);
  }
  return absl::OkStatus();
}

}  // namespace mt
