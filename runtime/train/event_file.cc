#include "runtime/train/event_file.h"

#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "proto/event.pb.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/file_system.h"

namespace mt {
namespace {

constexpr char kPrefix[] = "events.out.tfevents.";

double Now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

void AppendBytes(std::string* to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) to->push_back(static_cast<char>(value >> (8 * i)));
}

uint32_t MaskedCrc(absl::string_view bytes) {
  const uint32_t crc = Crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

}  // namespace

std::string EventRecord(absl::string_view bytes) {
  std::string record;
  AppendBytes(&record, bytes.size(), 8);
  AppendBytes(&record, MaskedCrc(record), 4);
  record.append(bytes.data(), bytes.size());
  AppendBytes(&record, MaskedCrc(bytes), 4);
  return record;
}

EventFile::~EventFile() {
  if (file_ != nullptr) std::fclose(file_);
}

absl::Status EventFile::Open(const std::string& folder, int64_t step) {
  char host[256] = "localhost";
  if (::gethostname(host, sizeof(host) - 1) != 0 || host[0] == '\0') std::snprintf(host, sizeof(host), "localhost");
  // Two runs of one second are told apart by the process.
  path_ = absl::StrCat(folder, "/", kPrefix, static_cast<int64_t>(Now()), ".", host, ".", ::getpid());
  file_ = std::fopen(path_.c_str(), "we");
  if (file_ == nullptr) return WriteError(path_, "cannot create the file");
  proto::EventProto version;
  version.set_wall_time(Now());
  version.set_file_version("brain.Event:2");
  RETURN_IF_ERROR(Write(EventRecord(version.SerializeAsString())));
  return GoBack(step);
}

absl::Status EventFile::GoBack(int64_t step) {
  if (file_ == nullptr) return absl::OkStatus();
  proto::EventProto start;
  start.set_wall_time(Now());
  start.set_step(step + 1);
  start.mutable_session_log()->set_status(proto::SessionLogProto::START);
  return Write(EventRecord(start.SerializeAsString()));
}

absl::Status EventFile::Append(int64_t step, const std::vector<std::pair<std::string, double>>& scalars) {
  if (file_ == nullptr) return absl::OkStatus();
  proto::EventProto event;
  event.set_wall_time(Now());
  event.set_step(step);
  for (const auto& [tag, value] : scalars) {
    proto::SummaryProto::Value* added = event.mutable_summary()->add_value();
    added->set_tag(tag);
    added->set_simple_value(static_cast<float>(value));
  }
  return Write(EventRecord(event.SerializeAsString()));
}

absl::Status EventFile::AppendText(int64_t step, const std::string& tag, const std::string& text) {
  constexpr int32_t kString = 7;
  if (file_ == nullptr) return absl::OkStatus();
  proto::EventProto event;
  event.set_wall_time(Now());
  event.set_step(step);
  proto::SummaryProto::Value* added = event.mutable_summary()->add_value();
  added->set_tag(tag);
  added->mutable_tensor()->set_dtype(kString);
  added->mutable_tensor()->add_string_val(text);
  added->mutable_metadata()->mutable_plugin_data()->set_plugin_name("text");
  return Write(EventRecord(event.SerializeAsString()));
}

absl::Status EventFile::Write(absl::string_view record) {
  if (std::fwrite(record.data(), 1, record.size(), file_) != record.size() || std::fflush(file_) != 0) {
    return WriteError(path_, "write failed");
  }
  return absl::OkStatus();
}

void RemoveEventFiles(const std::string& folder) {
  std::vector<std::string> found;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    if (absl::StartsWith(entry->path().filename().string(), kPrefix)) found.push_back(entry->path().string());
  }
  for (const std::string& path : found) SystemFiles().RemoveFile(path);
}

}  // namespace mt
