#include "runtime/data/input_file.h"

#include <algorithm>
#include <memory>

#include "ir/base/status_macros.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/mapped_file.h"

namespace mt {
namespace {

// 0 for times before 1970.
int64_t Nanoseconds(const timespec& time) {
  return std::max(int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec, int64_t{0});
}

}  // namespace

InputFile DescribeInput(const struct stat& info) {
  return {.size_bytes = info.st_size,
          .modified_ns = Nanoseconds(info.st_mtim),
          .changed_ns = Nanoseconds(info.st_ctim),
          .device = static_cast<int64_t>(info.st_dev),
          .inode = static_cast<int64_t>(info.st_ino)};
}

absl::StatusOr<uint32_t> FileCrc(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  constexpr size_t kPart = size_t{1} << 22;
  uint32_t crc = 0;
  for (size_t at = 0; at < file->bytes().size(); at += kPart) {
    crc = Crc32c(file->bytes().substr(at, kPart), crc);
    file->Release(0, static_cast<int64_t>(at));
  }
  return crc;
}

absl::StatusOr<bool> IsUnchanged(const std::string& path, const InputFile& before) {
  struct stat info;
  if (::stat(path.c_str(), &info) == 0) {
    const InputFile now = DescribeInput(info);
    if (now.size_bytes != before.size_bytes) return false;
    if (now.modified_ns == before.modified_ns && now.changed_ns == before.changed_ns && now.device == before.device &&
        now.inode == before.inode) {
      return true;
    }
  }
  ASSIGN_OR_RETURN(const uint32_t crc, FileCrc(path));
  return crc == before.crc;
}

}  // namespace mt
