#include "runtime/data/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

absl::Status WriteError(absl::string_view path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, ": ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<AtomicFile>> AtomicFile::Create(const std::string& path) {
  std::unique_ptr<AtomicFile> file(new AtomicFile);
  file->path_ = path;
  file->temporary_ = absl::StrCat(path, ".tmp-", ::getpid());
  file->fd_ = ::open(file->temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file->fd_ < 0) return WriteError(path, "cannot create the file");
  return file;
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

absl::Status AtomicFile::Append(absl::string_view bytes) {
  RETURN_IF_ERROR(WriteAt(end_, bytes));
  end_ += static_cast<int64_t>(bytes.size());
  return absl::OkStatus();
}

absl::Status AtomicFile::WriteAt(int64_t offset, absl::string_view bytes) {
  CHECK_GE(fd_, 0) << path_ << " is already committed";
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) errno = ENOSPC;
    if (n <= 0) return WriteError(path_, "write failed");
    bytes.remove_prefix(static_cast<size_t>(n));
    offset += n;
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::Commit() {
  CHECK_GE(fd_, 0) << path_ << " is already committed";
  absl::Status status;
  if (::fsync(fd_) != 0) status = WriteError(path_, "sync failed");
  if (::close(fd_) != 0 && status.ok()) status = WriteError(path_, "close failed");
  fd_ = -1;
  if (status.ok() && ::rename(temporary_.c_str(), path_.c_str()) != 0) status = WriteError(path_, "rename failed");
  if (!status.ok()) {
    ::unlink(temporary_.c_str());
    return status;
  }
  const std::string parent = std::filesystem::path(path_).parent_path().string();
  const std::string folder = parent.empty() ? "." : parent;
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    ::fsync(fd);  // The name is durable once the folder is; some file systems refuse to sync a folder.
    ::close(fd);
  }
  return absl::OkStatus();
}

}  // namespace mt
