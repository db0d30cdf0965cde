#include "runtime/data/file_system.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>

#include "absl/strings/str_cat.h"

namespace mt {

int FileSystem::CreateFile(const std::string& path) {
  return ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
}
int FileSystem::OpenFolder(const std::string& path) { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }
int64_t FileSystem::WriteAt(int descriptor, absl::string_view bytes, int64_t offset) {
  return ::pwrite(descriptor, bytes.data(), bytes.size(), offset);
}
int FileSystem::Sync(int descriptor) { return ::fsync(descriptor); }
int FileSystem::Close(int descriptor) { return ::close(descriptor); }
int FileSystem::Rename(const std::string& from, const std::string& to) { return ::rename(from.c_str(), to.c_str()); }
int FileSystem::RemoveFile(const std::string& path) { return ::unlink(path.c_str()); }
int FileSystem::MakeFolder(const std::string& path) { return ::mkdir(path.c_str(), 0755); }
int FileSystem::RemoveFolder(const std::string& path) { return ::rmdir(path.c_str()); }
int64_t FileSystem::FreeBytes(const std::string& folder) {
  struct statvfs info;
  if (::statvfs(folder.c_str(), &info) != 0) return -1;
  int64_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<uint64_t>(info.f_bavail), static_cast<uint64_t>(info.f_frsize), &bytes)) {
    return std::numeric_limits<int64_t>::max();
  }
  return bytes;
}

FileSystem& SystemFiles() {
  static FileSystem& files = *new FileSystem;
  return files;
}

absl::Status SyncFolder(FileSystem& files, const std::string& folder) {
  const int descriptor = files.OpenFolder(folder);
  if (descriptor < 0) return WriteError(folder, "cannot open the folder");
  absl::Status status;
  if (files.Sync(descriptor) != 0 && errno != EINVAL && errno != ENOTSUP) {
    status = WriteError(folder, "sync of the folder failed");
  }
  files.Close(descriptor);
  return status;
}

absl::Status WriteError(absl::string_view path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what, ": ", std::strerror(errno)));
}

std::string FolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

}  // namespace mt
