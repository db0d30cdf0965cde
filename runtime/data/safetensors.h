// The safetensors file format: named tensors, a JSON header, bytes. Written in parts, read through a memory map.
// Source: https://github.com/huggingface/safetensors#format
#ifndef MT_RUNTIME_DATA_SAFETENSORS_H_
#define MT_RUNTIME_DATA_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/atomic_file.h"
#include "runtime/data/mapped_file.h"

namespace mt {

// In the reference implementation's order, by which its writer sorts.
enum class SafetensorsType { kU8, kF16, kBF16, kI32, kF32, kF64, kI64 };

// Of one element: 1, 2, 4 or 8.
int64_t SizeOf(SafetensorsType type);
// "F32".
absl::string_view SafetensorsTypeName(SafetensorsType type);

struct SafetensorsTensor {
  std::string name;
  SafetensorsType type = SafetensorsType::kF32;
  std::vector<int64_t> shape = {};  // Empty: a scalar.
  // Set by reader and writer: the bytes' place in the data section.
  int64_t offset = 0;
  int64_t size_bytes = 0;
};

// Orders tensors as the reference writer does (descending type, which is descending alignment, then name) and pads the
// header to 8 bytes: the same tensors and one item of metadata give the same bytes.
class SafetensorsWriter {
 public:
  // Every tensor is declared here; its bytes follow by Append. Nothing is visible at `path` before Finish returned OK.
  // Errors: InvalidArgument (two tensors of one name, the name __metadata__, names or metadata that are not UTF-8,
  // negative or overflowing shapes), DataLoss.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::string& path,
                                                                   std::vector<SafetensorsTensor> tensors,
                                                                   const std::map<std::string, std::string>& metadata,
                                                                   FileSystem& files = SystemFiles());
  // Appends to the bytes of `name` (little endian, row major). Tensors may come in any order and in parts.
  // Errors: NotFound (no such tensor), InvalidArgument (more bytes than declared), DataLoss.
  absl::Status Append(absl::string_view name, absl::string_view bytes);
  // Errors: FailedPrecondition (a tensor lacks bytes; names it), DataLoss.
  absl::Status Finish();

  // In the order of their bytes.
  const std::vector<std::string>& names() const { return names_; }
  int64_t size_bytes() const { return file_->size_bytes(); }
  // CRC-32C of the file. REQUIRES: the tensors were appended in the order of names().
  uint32_t crc() const { return file_->crc(); }

 private:
  struct Entry {
    SafetensorsTensor tensor;
    int64_t written_bytes = 0;
  };
  SafetensorsWriter() = default;

  std::unique_ptr<AtomicFile> file_;
  int64_t data_start_ = 0;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, Entry> entries_;
};

// Strict and untrusted: header at most 100,000,000 bytes of UTF-8 JSON without duplicate keys, known dtypes, sizes that
// agree with the shapes, ranges that tile the data section without holes or overlap up to the end of the file.
class SafetensorsReader {
 public:
  // Errors: NotFound, FailedPrecondition (unreadable, or names file, tensor and fact).
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> Open(const std::string& path);

  // In the order of their bytes.
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }
  // nullptr where there is none.
  const SafetensorsTensor* Find(absl::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Valid as long as the reader; aligned to the element where the file is (the reference writer's files are).
  absl::string_view Bytes(const SafetensorsTensor& tensor) const;

 private:
  SafetensorsReader() = default;

  std::unique_ptr<MappedFile> file_;
  int64_t data_start_ = 0;
  std::vector<SafetensorsTensor> tensors_;
  absl::flat_hash_map<std::string, int64_t> by_name_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_SAFETENSORS_H_
