// File systems for tests: one that fails at a chosen call, and one that notes the calls, so that what a power cut
// leaves after any number of them can be built.
#ifndef MT_TESTS_FILE_FAULTS_H_
#define MT_TESTS_FILE_FAULTS_H_

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "runtime/data/file_system.h"

namespace mt {

// Syncs nothing, for what a test only builds up.
class QuickFiles : public FileSystem {
 public:
  int Sync(int) override { return 0; }
};

enum class Fault {
  kNoSpace,  // One call fails with ENOSPC.
  kIo,       // One call fails with EIO.
  kShort,    // One write takes half of its bytes.
  kFull,     // From one write on half of it is written, and the next ones fail with ENOSPC.
  kDead,     // From one call on all fail with EIO.
};

// Passes calls on but for what goes wrong at call `at`, from 0.
class FaultyFiles : public FileSystem {
 public:
  FaultyFiles(Fault fault, int64_t at) : fault_(fault), at_(at) {}
  int64_t calls() const { return calls_; }
  bool failed() const { return failed_; }

  int CreateFile(const std::string& path) override { return Fails() ? -1 : FileSystem::CreateFile(path); }
  int OpenFolder(const std::string& path) override { return Fails() ? -1 : FileSystem::OpenFolder(path); }
  int64_t WriteAt(int descriptor, absl::string_view bytes, int64_t offset) override {
    const bool now = calls_ == at_, later = calls_ > at_;
    if (fault_ == Fault::kShort || fault_ == Fault::kFull) {
      ++calls_;
      if (now && bytes.size() > 1) {
        failed_ = true;
        return FileSystem::WriteAt(descriptor, bytes.substr(0, bytes.size() / 2), offset);
      }
      if (fault_ == Fault::kFull && (now || later)) {
        failed_ = true;
        errno = ENOSPC;
        return -1;
      }
      return FileSystem::WriteAt(descriptor, bytes, offset);
    }
    return Fails() ? -1 : FileSystem::WriteAt(descriptor, bytes, offset);
  }
  int Sync(int) override { return Fails() ? -1 : 0; }
  int Close(int descriptor) override {  // Closes in any case, as Linux does.
    const int result = FileSystem::Close(descriptor);
    return Fails() ? -1 : result;
  }
  int Rename(const std::string& from, const std::string& to) override {
    return Fails() ? -1 : FileSystem::Rename(from, to);
  }
  int RemoveFile(const std::string& path) override { return Fails() ? -1 : FileSystem::RemoveFile(path); }
  int MakeFolder(const std::string& path) override { return Fails() ? -1 : FileSystem::MakeFolder(path); }
  int RemoveFolder(const std::string& path) override { return Fails() ? -1 : FileSystem::RemoveFolder(path); }
  int64_t FreeBytes(const std::string& folder) override { return Fails() ? -1 : FileSystem::FreeBytes(folder); }

 private:
  bool Fails() {
    const int64_t call = calls_++;
    if (fault_ == Fault::kShort || fault_ == Fault::kFull) return false;
    if (call != at_ && !(fault_ == Fault::kDead && call > at_)) return false;
    failed_ = true;
    errno = fault_ == Fault::kNoSpace ? ENOSPC : EIO;
    return true;
  }

  const Fault fault_;
  const int64_t at_;
  int64_t calls_ = 0;
  bool failed_ = false;
};

// Passes calls on and notes what they change below `root`.
class RecordingFiles : public FileSystem {
 public:
  // A change of names (durable once the folder is synced) or of a file's bytes (durable once the file is synced).
  struct Change {
    enum Kind { kCreate, kWrite, kSync, kRename, kRemove, kMakeFolder, kRemoveFolder, kSyncFolder } kind;
    std::string path, to;  // Of the names at that time, relative to the root.
    int64_t file = -1, offset = 0;
    std::string bytes;
  };

  explicit RecordingFiles(std::string root) : root_(std::move(root)) {}
  const std::vector<Change>& changes() const { return changes_; }

  int CreateFile(const std::string& path) override {
    const int descriptor = FileSystem::CreateFile(path);
    CHECK_GE(descriptor, 0) << path;
    open_[descriptor] = {Relative(path), next_file_};
    changes_.push_back({.kind = Change::kCreate, .path = Relative(path), .file = next_file_++});
    return descriptor;
  }
  int OpenFolder(const std::string& path) override {
    const int descriptor = FileSystem::OpenFolder(path);
    CHECK_GE(descriptor, 0) << path;
    open_[descriptor] = {Relative(path), -1};
    return descriptor;
  }
  int64_t WriteAt(int descriptor, absl::string_view bytes, int64_t offset) override {
    changes_.push_back(
        {.kind = Change::kWrite, .file = open_.at(descriptor).second, .offset = offset, .bytes = std::string(bytes)});
    return FileSystem::WriteAt(descriptor, bytes, offset);
  }
  int Sync(int descriptor) override {
    const auto& [path, file] = open_.at(descriptor);
    changes_.push_back({.kind = file < 0 ? Change::kSyncFolder : Change::kSync, .path = path, .file = file});
    return FileSystem::Sync(descriptor);
  }
  int Rename(const std::string& from, const std::string& to) override {
    const int result = FileSystem::Rename(from, to);
    if (result == 0) changes_.push_back({.kind = Change::kRename, .path = Relative(from), .to = Relative(to)});
    return result;
  }
  int RemoveFile(const std::string& path) override { return Note(Change::kRemove, path, FileSystem::RemoveFile(path)); }
  int MakeFolder(const std::string& path) override {
    return Note(Change::kMakeFolder, path, FileSystem::MakeFolder(path));
  }
  int RemoveFolder(const std::string& path) override {
    return Note(Change::kRemoveFolder, path, FileSystem::RemoveFolder(path));
  }

 private:
  std::string Relative(const std::string& path) const {
    CHECK(absl::StartsWith(path, root_)) << path;
    return path.size() == root_.size() ? "" : path.substr(root_.size() + 1);
  }
  int Note(Change::Kind kind, const std::string& path, int result) {
    if (result == 0) changes_.push_back({.kind = kind, .path = Relative(path)});
    return result;
  }

  const std::string root_;
  std::vector<Change> changes_;
  std::map<int, std::pair<std::string, int64_t>> open_;  // Descriptor -> path, file.
  int64_t next_file_ = 0;
};

// What happens to changes that were not synced when the power went.
enum class Loss {
  kNothing,      // All of them were written: a killed process.
  kBytes,        // Names are there, bytes are not.
  kHalfOfBytes,  // The first half of each write is.
  kZeros,        // The files have their lengths, and zeros.
  kNames,        // Bytes are there, names are not.
  kEverything,
  kSomeOfAll,  // Of each a part, by chance.
};

// Builds in `to`, which is empty, what is there after the first `count` changes and a power cut. `before`: the files
// that were there and durable, path -> contents.
inline void BuildAfterPowerCut(const std::map<std::string, std::string>& before,
                               const std::vector<RecordingFiles::Change>& changes, size_t count, Loss loss,
                               uint64_t seed, const std::string& to) {
  using Change = RecordingFiles::Change;
  std::mt19937_64 random(seed);
  const auto folder_of = [](const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? std::string() : path.substr(0, slash);
  };
  // A change is durable where a sync of its file or folder follows.
  const auto durable = [&](size_t i) {
    for (size_t k = i + 1; k < count; ++k) {
      if (changes[i].kind == Change::kWrite
              ? changes[k].kind == Change::kSync && changes[k].file == changes[i].file
              : changes[k].kind == Change::kSyncFolder && changes[k].path == folder_of(changes[i].path)) {
        return true;
      }
    }
    return false;
  };
  std::map<std::string, int64_t> names;  // Path -> file; -1: a folder.
  std::map<int64_t, std::string> contents;
  int64_t old_file = -2;
  for (const auto& [path, bytes] : before) {
    for (std::string folder = folder_of(path); !folder.empty(); folder = folder_of(folder)) names[folder] = -1;
    names[path] = old_file;
    contents[old_file--] = bytes;
  }
  for (size_t i = 0; i < count; ++i) {
    const Change& change = changes[i];
    if (change.kind == Change::kSync || change.kind == Change::kSyncFolder) continue;
    const bool kept = durable(i);
    if (change.kind == Change::kWrite) {
      std::string bytes = change.bytes;
      if (!kept) {
        const bool chance = loss == Loss::kSomeOfAll;
        if (loss == Loss::kBytes || loss == Loss::kEverything || (chance && random() % 2 == 0)) continue;
        if (loss == Loss::kHalfOfBytes || chance)
          bytes.resize(chance ? random() % (bytes.size() + 1) : bytes.size() / 2);
        if (loss == Loss::kZeros) bytes.assign(bytes.size(), '\0');
      }
      std::string& file = contents[change.file];
      file.resize(std::max(file.size(), static_cast<size_t>(change.offset) + bytes.size()));
      file.replace(static_cast<size_t>(change.offset), bytes.size(), bytes);
      continue;
    }
    const bool lost =
        loss == Loss::kNames || loss == Loss::kEverything || (loss == Loss::kSomeOfAll && random() % 2 == 0);
    if (!kept && lost) continue;
    const std::string parent = folder_of(change.kind == Change::kRename ? change.to : change.path);
    if (!parent.empty() && !names.contains(parent)) continue;
    if (change.kind == Change::kCreate) {
      names[change.path] = change.file;
      contents[change.file];
    } else if (change.kind == Change::kMakeFolder) {
      names[change.path] = -1;
    } else if (change.kind == Change::kRename) {
      std::map<std::string, int64_t> moved;
      for (const auto& [path, file] : names) {
        const bool inside = absl::StartsWith(path, change.path + "/");
        moved[path == change.path || inside ? change.to + path.substr(change.path.size()) : path] = file;
      }
      names = std::move(moved);
    } else {  // A folder goes with what is in it still.
      std::erase_if(names, [&](const auto& entry) {
        return entry.first == change.path || absl::StartsWith(entry.first, change.path + "/");
      });
    }
  }
  for (const auto& [path, file] : names) {
    const std::string at = absl::StrCat(to, "/", path);
    if (file == -1) {
      std::filesystem::create_directories(at);
      continue;
    }
    std::filesystem::create_directories(std::filesystem::path(at).parent_path());
    const int descriptor = SystemFiles().CreateFile(at);
    CHECK_GE(descriptor, 0) << at;
    CHECK_EQ(SystemFiles().WriteAt(descriptor, contents[file], 0), static_cast<int64_t>(contents[file].size()));
    SystemFiles().Close(descriptor);
  }
}

// Path -> contents of all files below a folder.
inline std::map<std::string, std::string> ReadTree(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    files[std::filesystem::relative(entry.path(), folder).string()] = ReadFile(entry.path().string()).value();
  }
  return files;
}

}  // namespace mt

#endif  // MT_TESTS_FILE_FAULTS_H_
