#include "ir/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

std::string ErrnoText() { return std::strerror(errno); }

absl::Status WriteError(absl::string_view path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, ": ", ErrnoText()));
}

absl::Status WriteAndSync(const std::string& path, absl::string_view contents) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return WriteError(path, "cannot create the file");
  bool open = true;
  absl::Cleanup close = [&] {
    if (open) ::close(fd);
  };
  size_t done = 0;
  while (done < contents.size()) {
    const ssize_t n = ::write(fd, contents.data() + done, contents.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return WriteError(path, "write failed");
    done += static_cast<size_t>(n);
  }
  // EINVAL: a pipe or a device, which has nothing to sync.
  if (::fsync(fd) != 0 && errno != EINVAL && errno != EROFS) return WriteError(path, "sync failed");
  open = false;
  if (::close(fd) != 0) return WriteError(path, "close failed");
  return absl::OkStatus();
}

// Whether somebody has the other end of a pipe open within two seconds; nothing is taken out of it.
bool HasWriter(int pipe) {
  int copy[2];
  if (::pipe2(copy, O_CLOEXEC) != 0) return true;  // Nobody can say; reading will.
  bool found = false;
  for (int i = 0; !found && i < 100; ++i) {
    if (i > 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    found = ::tee(pipe, copy[1], 1, SPLICE_F_NONBLOCK) != 0;  // 0: there is none; EAGAIN: it has written nothing yet.
  }
  ::close(copy[0]);
  ::close(copy[1]);
  return found;
}

}  // namespace

absl::StatusOr<int> OpenToRead(const std::string& path) {
  // Else it would wait at once for a pipe's other end.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const std::string message = absl::StrCat(path, ": cannot open: ", ErrnoText());
    if (errno == ENOENT) return absl::NotFoundError(message);
    return absl::FailedPreconditionError(message);
  }
  absl::Cleanup close = [fd] { ::close(fd); };
  struct stat info;
  if (::fstat(fd, &info) != 0) return absl::FailedPreconditionError(absl::StrCat(path, ": cannot read: ", ErrnoText()));
  if (S_ISDIR(info.st_mode)) return absl::FailedPreconditionError(absl::StrCat(path, ": is a folder, not a file"));
  const bool null = S_ISCHR(info.st_mode) && info.st_rdev == ::makedev(1, 3);
  if ((S_ISCHR(info.st_mode) || S_ISBLK(info.st_mode)) && !null && ::isatty(fd) == 0) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": is a device, not a file"));
  }
  if (S_ISFIFO(info.st_mode) && !HasWriter(fd)) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": is a pipe that nobody writes to"));
  }
  if (::fcntl(fd, F_SETFL, 0) != 0) {  // Reading may wait.
    return absl::FailedPreconditionError(absl::StrCat(path, ": cannot read: ", ErrnoText()));
  }
  std::move(close).Cancel();
  return fd;
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t limit_bytes) {
  ASSIGN_OR_RETURN(const int fd, OpenToRead(path));
  absl::Cleanup close = [fd] { ::close(fd); };
  const absl::Status too_large =
      absl::ResourceExhaustedError(absl::StrCat(path, ": larger than the limit of ", limit_bytes, " bytes"));
  struct stat info;
  if (::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > limit_bytes) return too_large;
  std::string contents;
  char block[1 << 16];
  while (true) {
    const ssize_t n = ::read(fd, block, sizeof(block));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::FailedPreconditionError(absl::StrCat(path, ": cannot read: ", ErrnoText()));
    if (n == 0) return contents;
    contents.append(block, static_cast<size_t>(n));
    if (static_cast<int64_t>(contents.size()) > limit_bytes) return too_large;
  }
}

absl::Status WriteFile(const std::string& path, absl::string_view contents) {
  struct stat info;
  if (::stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    if (S_ISDIR(info.st_mode)) return absl::DataLossError(absl::StrCat(path, ": is a folder; a file is written there"));
    return WriteAndSync(path, contents);  // A device or a pipe: a rename would take its place.
  }
  const std::string temporary = absl::StrCat(path, ".tmp-", ::getpid());
  absl::Status written = WriteAndSync(temporary, contents);
  if (written.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) written = WriteError(path, "rename failed");
  if (!written.ok()) {
    ::unlink(temporary.c_str());
    return written;
  }
  std::string folder = std::filesystem::path(path).parent_path().string();
  if (folder.empty()) folder = ".";
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    ::fsync(fd);  // The name is durable once the folder is; some file systems refuse to sync a folder.
    ::close(fd);
  }
  return absl::OkStatus();
}

absl::Status MakeFolder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error || !std::filesystem::is_directory(path)) {
    return absl::DataLossError(
        absl::StrCat(path, ": cannot create the folder: ", error ? error.message() : "a file is there"));
  }
  return absl::OkStatus();
}

}  // namespace mt
