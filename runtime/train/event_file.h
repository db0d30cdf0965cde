// Scalars and texts for TensorBoard: events.out.tfevents.SECONDS.HOST, records of protobuf messages with masked
// checksums. Source: https://github.com/tensorflow/tensorflow, tensorflow/core/lib/io/record_writer.h
#ifndef MT_RUNTIME_TRAIN_EVENT_FILE_H_
#define MT_RUNTIME_TRAIN_EVENT_FILE_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace mt {

// Length, its checksum, the bytes, their checksum; little endian, each checksum rotated and offset.
std::string EventRecord(absl::string_view bytes);

class EventFile {
 public:
  EventFile() = default;
  ~EventFile();
  EventFile(const EventFile&) = delete;
  EventFile& operator=(const EventFile&) = delete;

  // Creates a file in the folder. Of other files there, what comes after `step` no longer holds. Errors: DataLoss.
  absl::Status Open(const std::string& folder, int64_t step);
  // What was written of later steps no longer holds. Errors: DataLoss.
  absl::Status GoBack(int64_t step);
  // Written through. Nothing happens where no file is open. Errors: DataLoss.
  absl::Status Append(int64_t step, const std::vector<std::pair<std::string, double>>& scalars);
  // As Append: a text, shown as Markdown.
  absl::Status AppendText(int64_t step, const std::string& tag, const std::string& text);

 private:
  absl::Status Write(absl::string_view record);

  std::string path_;
  std::FILE* file_ = nullptr;
};

// Removes the event files of a folder.
void RemoveEventFiles(const std::string& folder);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_EVENT_FILE_H_
