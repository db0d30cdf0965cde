// The calls that write files, as the operating system makes them. Tests put another one in its place, which fails at a
// chosen call or notes what was called.
#ifndef MT_RUNTIME_DATA_FILE_SYSTEM_H_
#define MT_RUNTIME_DATA_FILE_SYSTEM_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace mt {

// Each call gives -1 and sets errno where it fails.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int CreateFile(const std::string& path);  // For writing, empty; gives a descriptor.
  virtual int OpenFolder(const std::string& path);  // For Sync.
  // The number of bytes written, which may be less than asked for.
  virtual int64_t WriteAt(int descriptor, absl::string_view bytes, int64_t offset);
  virtual int Sync(int descriptor);
  virtual int Close(int descriptor);
  virtual int Rename(const std::string& from, const std::string& to);
  virtual int RemoveFile(const std::string& path);
  virtual int MakeFolder(const std::string& path);
  virtual int RemoveFolder(const std::string& path);  // An empty one.
  virtual int64_t FreeBytes(const std::string& folder);
};

// The operating system's.
FileSystem& SystemFiles();

// Makes the names in a folder durable; file systems that cannot sync a folder are believed. Errors: DataLoss.
absl::Status SyncFolder(FileSystem& files, const std::string& folder);

// DataLoss with the text of errno: "PATH: WHAT: No space left on device".
absl::Status WriteError(absl::string_view path, absl::string_view what);

// "." where the path has no folder.
std::string FolderOf(const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_FILE_SYSTEM_H_
