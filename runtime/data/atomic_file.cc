#include "runtime/data/atomic_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/status_macros.h"
#include "runtime/data/crc32c.h"

namespace mt {

absl::StatusOr<std::unique_ptr<AtomicFile>> AtomicFile::Create(const std::string& path, FileSystem& files) {
  std::unique_ptr<AtomicFile> file(new AtomicFile(files));
  file->path_ = path;
  file->temporary_ = absl::StrCat(path, ".tmp-", ::getpid());
  file->fd_ = files.CreateFile(file->temporary_);
  if (file->fd_ < 0) return WriteError(path, "cannot create the file");
  return file;
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  files_.Close(fd_);
  files_.RemoveFile(temporary_);
}

absl::Status AtomicFile::Append(absl::string_view bytes) {
  RETURN_IF_ERROR(WriteAt(end_, bytes));
  end_ += static_cast<int64_t>(bytes.size());
  return absl::OkStatus();
}

absl::Status AtomicFile::WriteAt(int64_t offset, absl::string_view bytes) {
  CHECK_GE(fd_, 0) << path_ << " is already committed";
  if (offset == crc_bytes_) {
    crc_ = Crc32c(bytes, crc_);
    crc_bytes_ += static_cast<int64_t>(bytes.size());
  } else if (offset < crc_bytes_) {
    crc_bytes_ = -1;  // Overwritten: no checksum any more.
  }
  while (!bytes.empty()) {
    const int64_t n = files_.WriteAt(fd_, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) errno = ENOSPC;
    if (n <= 0) return WriteError(path_, "write failed");
    bytes.remove_prefix(static_cast<size_t>(n));
    offset += n;
    size_bytes_ = std::max(size_bytes_, offset);
  }
  return absl::OkStatus();
}

uint32_t AtomicFile::crc() const {
  CHECK_EQ(crc_bytes_, size_bytes_) << path_ << " was not written from the first byte to the last";
  return crc_;
}

absl::Status AtomicFile::Commit() {
  CHECK_GE(fd_, 0) << path_ << " is already committed";
  absl::Status status;
  if (files_.Sync(fd_) != 0) status = WriteError(path_, "sync failed");
  if (files_.Close(fd_) != 0 && status.ok()) status = WriteError(path_, "close failed");
  fd_ = -1;
  if (status.ok() && files_.Rename(temporary_, path_) != 0) status = WriteError(path_, "rename failed");
  if (!status.ok()) {
    files_.RemoveFile(temporary_);
    return status;
  }
  return SyncFolder(files_, FolderOf(path_));
}

}  // namespace mt
