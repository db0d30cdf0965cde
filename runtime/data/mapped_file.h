// A read-only memory map of a regular file.
#ifndef MT_RUNTIME_DATA_MAPPED_FILE_H_
#define MT_RUNTIME_DATA_MAPPED_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

class MappedFile {
 public:
  // An empty file gives empty bytes. Errors: NotFound, FailedPrecondition (not a regular file, unreadable).
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  absl::string_view bytes() const { return absl::string_view(data_, static_cast<size_t>(size_)); }
  // Lets the system drop the pages wholly inside [first, last) from memory; they are read again on the next touch.
  void Release(int64_t first, int64_t last) const;

 private:
  MappedFile() = default;

  const char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_MAPPED_FILE_H_
