#include "runtime/checkpoint/checkpoint.h"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "runtime/data/atomic_file.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/mapped_file.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kTemporary[] = ".tmp";
constexpr int64_t kMaxManifestBytes = int64_t{16} << 20;
// Beside the tensors: headers, the manifest, the folder.
constexpr int64_t kSpareBytes = int64_t{1} << 20;

// N of "step-N", written as CheckpointName writes it.
std::optional<int64_t> StepOf(absl::string_view name) {
  int64_t step = 0;
  if (!absl::ConsumePrefix(&name, "step-") || !absl::SimpleAtoi(name, &step) || step < 0) return std::nullopt;
  return absl::StrCat(step) == name ? std::optional<int64_t>(step) : std::nullopt;
}

// Steps of the folder's checkpoints, newest first.
std::vector<int64_t> StepsIn(const std::string& folder) {
  std::vector<int64_t> steps;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    if (const std::optional<int64_t> step = StepOf(entry->path().filename().string())) steps.push_back(*step);
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

// A folder of files, which it may lack. Errors: DataLoss.
absl::Status RemoveTree(FileSystem& files, const std::string& folder) {
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string path = entry->path().string();
    std::error_code ignored;
    if (fs::is_directory(entry->symlink_status(ignored))) {
      RETURN_IF_ERROR(RemoveTree(files, path));
    } else if (files.RemoveFile(path) != 0 && errno != ENOENT) {
      return WriteError(path, "cannot remove");
    }
  }
  if (files.RemoveFolder(folder) != 0 && errno != ENOENT) return WriteError(folder, "cannot remove the folder");
  return absl::OkStatus();
}

// Under another name first, so that half of it is never taken for a checkpoint.
absl::Status RemoveCheckpoint(FileSystem& files, const std::string& path) {
  const std::string temporary = path + kTemporary;
  RETURN_IF_ERROR(RemoveTree(files, temporary));
  if (files.Rename(path, temporary) != 0) return WriteError(path, "cannot remove");
  return RemoveTree(files, temporary);
}

struct FileEntry {
  std::string name;
  int64_t size_bytes = 0;
  uint32_t crc = 0;
};

absl::StatusOr<FileEntry> WriteStates(const std::string& folder, const char* name, const Checkpoint& checkpoint,
                                      bool parameters, FileSystem& files) {
  std::vector<SafetensorsTensor> tensors;
  for (const SavedState& state : checkpoint.states) {
    if (state.parameter == parameters) tensors.push_back(state.tensor);
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                   SafetensorsWriter::Create(absl::StrCat(folder, "/", name), std::move(tensors),
                                             {{"format", "mt"}, {"model", checkpoint.model}}, files));
  absl::flat_hash_map<std::string, const SavedState*> by_name;
  for (const SavedState& state : checkpoint.states) by_name[state.tensor.name] = &state;
  for (const std::string& tensor : writer->names()) {
    RETURN_IF_ERROR(writer->Append(tensor, by_name.at(tensor)->bytes));
  }
  RETURN_IF_ERROR(writer->Finish());
  return FileEntry{name, writer->size_bytes(), writer->crc()};
}

std::string Dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace); }

absl::Status WriteManifest(const std::string& folder, const Checkpoint& checkpoint,
                           const std::vector<FileEntry>& entries, FileSystem& files) {
  Json list = Json::array();
  for (const FileEntry& entry : entries) {
    list.push_back({{"name", entry.name}, {"bytes", entry.size_bytes}, {"crc32c", absl::StrFormat("%08x", entry.crc)}});
  }
  Json json = {{"format", "mt-checkpoint"},
               {"version", 1},
               {"step", checkpoint.step},
               {"model", checkpoint.model},
               {"progress", checkpoint.progress},
               {"identity", checkpoint.identity},
               {"environment", checkpoint.environment},
               {"files", std::move(list)}};
  // Of the text without its last member.
  const std::string text = Dump(json);
  const std::string whole = absl::StrCat(absl::string_view(text).substr(0, text.size() - 2), ",\n  \"crc32c\": \"",
                                         absl::StrFormat("%08x", Crc32c(text)), "\"\n}\n");
  ASSIGN_OR_RETURN(const std::unique_ptr<AtomicFile> file,
                   AtomicFile::Create(absl::StrCat(folder, "/", kCheckpointManifestFile), files));
  RETURN_IF_ERROR(file->Append(whole));
  return file->Commit();
}

// Everything but the rename that makes it a checkpoint.
absl::Status WriteTemporary(const std::string& temporary, const Checkpoint& checkpoint, FileSystem& files) {
  RETURN_IF_ERROR(RemoveTree(files, temporary));
  if (files.MakeFolder(temporary) != 0) return WriteError(temporary, "cannot create the folder");
  std::vector<FileEntry> entries;
  for (const bool parameters : {true, false}) {
    ASSIGN_OR_RETURN(FileEntry entry,
                     WriteStates(temporary, parameters ? kWeightsFile : kOptimizerFile, checkpoint, parameters, files));
    entries.push_back(std::move(entry));
  }
  return WriteManifest(temporary, checkpoint, entries, files);  // Syncs the folder, as each file did.
}

}  // namespace

std::string CheckpointName(int64_t step) { return absl::StrCat("step-", step); }

absl::Status WriteCheckpoint(const std::string& folder, const Checkpoint& checkpoint, int64_t keep, FileSystem& files) {
  const std::string path = absl::StrCat(folder, "/", CheckpointName(checkpoint.step)), temporary = path + kTemporary;
  int64_t needed = kSpareBytes;
  for (const SavedState& state : checkpoint.states) needed += static_cast<int64_t>(state.bytes.size());
  const int64_t available = files.FreeBytes(folder);
  if (available < 0) return WriteError(folder, "cannot tell the free space");
  if (available < needed) {
    return absl::DataLossError(absl::StrCat(path, ": a checkpoint needs ", FormatBytes(needed), ", ", folder, " has ",
                                            FormatBytes(available), " free; make room, or give a smaller --keep"));
  }
  absl::Status status = WriteTemporary(temporary, checkpoint, files);
  // A rename needs the name free, or an empty folder.
  std::error_code ignored;
  if (status.ok() && fs::exists(path, ignored)) {
    const std::string old = absl::StrCat(path, ".old", kTemporary);
    status = RemoveTree(files, old);
    if (status.ok() && files.Rename(path, old) != 0) status = WriteError(path, "cannot replace");
    if (status.ok() && files.Rename(temporary, path) != 0) {
      status = WriteError(path, "rename failed");
      files.Rename(old, path);
    }
    if (status.ok()) status = SyncFolder(files, folder);
    if (status.ok()) status = RemoveTree(files, old);
  } else if (status.ok()) {
    if (files.Rename(temporary, path) != 0) status = WriteError(path, "rename failed");
    if (status.ok()) status = SyncFolder(files, folder);
  }
  if (!status.ok()) {
    RemoveTree(files, temporary).IgnoreError();
    return status;
  }
  int64_t kept = 0;
  for (const int64_t step : StepsIn(folder)) {
    if (step <= checkpoint.step && ++kept <= keep) continue;
    RETURN_IF_ERROR(RemoveCheckpoint(files, absl::StrCat(folder, "/", CheckpointName(step))));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> CheckpointReader::Open(const std::string& path) {
  const std::string manifest_path = absl::StrCat(path, "/", kCheckpointManifestFile);
  const auto fault = [](const auto&... parts) { return absl::FailedPreconditionError(absl::StrCat(parts...)); };
  absl::StatusOr<std::string> text = ReadFile(manifest_path, kMaxManifestBytes);
  if (!text.ok()) return fault(text.status().message());
  absl::StatusOr<nlohmann::json> parsed = ParseStrictJson(*text);
  if (!parsed.ok()) return fault(manifest_path, " ", parsed.status().message());
  const nlohmann::json& json = *parsed;
  // The checksum is over the text before it.
  const std::string mark = ",\n  \"crc32c\": \"";
  const size_t at = text->rfind(mark);
  const auto crc = json.find("crc32c");
  if (at == std::string::npos || crc == json.end() || !crc->is_string() ||
      *text != absl::StrCat(text->substr(0, at), mark,
                            absl::StrFormat("%08x", Crc32c(absl::StrCat(text->substr(0, at), "\n}"))), "\"\n}\n")) {
    return fault(manifest_path, " was edited or damaged: its checksum differs");
  }
  const auto member = [&](const char* key) -> nlohmann::json {
    const auto found = json.find(key);
    return found == json.end() ? nlohmann::json() : *found;
  };
  if (member("format") != "mt-checkpoint") return fault(manifest_path, " is not the manifest of a checkpoint");
  if (member("version") != 1) {
    return fault(manifest_path, " has version ", member("version").dump().substr(0, 20), ", this mtrun reads 1");
  }
  std::unique_ptr<CheckpointReader> reader(new CheckpointReader);
  reader->path_ = path;
  const nlohmann::json step = member("step");
  if (!step.is_number_integer() || step < 0) return fault(manifest_path, " has no \"step\"");
  reader->step_ = step.get<int64_t>();
  if (fs::path(path).filename().string() != CheckpointName(reader->step_)) {
    return fault(manifest_path, " says step ", reader->step_, ", its folder says otherwise");
  }
  for (const auto& [key, value] : {std::pair<const char*, nlohmann::json*>{"progress", &reader->progress_},
                                   {"identity", &reader->identity_},
                                   {"environment", &reader->environment_}}) {
    *value = member(key);
    if (!value->is_object()) return fault(manifest_path, " has no object \"", key, "\"");
  }
  const nlohmann::json list = member("files");
  if (!list.is_array() || list.size() != 2) return fault(manifest_path, " does not list two files");
  for (size_t i = 0; i < 2; ++i) {
    const char* name = i == 0 ? kWeightsFile : kOptimizerFile;
    const std::string file_path = absl::StrCat(path, "/", name);
    const nlohmann::json& entry = list[i];
    if (!entry.is_object() || !entry.contains("name") || entry["name"] != name || !entry.contains("bytes") ||
        !entry["bytes"].is_number_integer() || !entry.contains("crc32c") || !entry["crc32c"].is_string()) {
      return fault(manifest_path, " does not describe ", name);
    }
    absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Open(file_path);
    if (!file.ok()) return fault(file.status().message());
    const absl::string_view bytes = (*file)->bytes();
    if (entry["bytes"] != bytes.size()) {
      return fault(file_path, " has ", bytes.size(), " bytes, its manifest says ", entry["bytes"].dump());
    }
    if (entry["crc32c"] != absl::StrFormat("%08x", Crc32c(bytes))) {
      return fault(file_path, " is damaged: its checksum differs from the manifest's");
    }
    ASSIGN_OR_RETURN((i == 0 ? reader->weights_ : reader->optimizer_), SafetensorsReader::Open(file_path));
  }
  return reader;
}

absl::StatusOr<NewestCheckpoint> FindNewestCheckpoint(const std::string& folder) {
  NewestCheckpoint newest;
  for (const int64_t step : StepsIn(folder)) {
    absl::StatusOr<std::unique_ptr<CheckpointReader>> reader =
        CheckpointReader::Open(absl::StrCat(folder, "/", CheckpointName(step)));
    if (reader.ok()) {
      newest.checkpoint = *std::move(reader);
      return newest;
    }
    newest.damaged.emplace_back(reader.status().message());
  }
  if (!newest.damaged.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("none of the checkpoints in ", folder, " is whole: ", absl::StrJoin(newest.damaged, "; ")));
  }
  return newest;
}

void RemoveLeftovers(const std::string& folder, const std::vector<std::string>& names, FileSystem& files) {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    found.push_back(entry->path().filename().string());
  }
  for (const std::string& name : found) {
    const std::string path = absl::StrCat(folder, "/", name);
    absl::string_view stem = name;
    if (absl::ConsumeSuffix(&stem, kTemporary)) {
      absl::ConsumeSuffix(&stem, ".old");
      if (StepOf(stem)) RemoveTree(files, path).IgnoreError();
      continue;
    }
    for (const std::string& of : names) {
      absl::string_view rest = name;
      const bool temporary = absl::ConsumePrefix(&rest, of) && absl::ConsumePrefix(&rest, ".tmp-") && !rest.empty() &&
                             std::all_of(rest.begin(), rest.end(), absl::ascii_isdigit);
      if (temporary) files.RemoveFile(path);
    }
  }
}

absl::Status RemoveCheckpoints(const std::string& folder, FileSystem& files) {
  for (const int64_t step : StepsIn(folder)) {
    RETURN_IF_ERROR(RemoveCheckpoint(files, absl::StrCat(folder, "/", CheckpointName(step))));
  }
  return absl::OkStatus();
}

}  // namespace mt
