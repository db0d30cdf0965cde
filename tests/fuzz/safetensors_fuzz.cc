// A .safetensors file; or, where the input starts with "{", a header alone, to which length and data are added.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "ir/base/check.h"
#include "runtime/data/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace mt {
namespace {

void Read(absl::string_view file) {
  const absl::StatusOr<std::unique_ptr<SafetensorsReader>> reader = SafetensorsReader::Open(MemoryFile(file));
  if (!reader.ok()) return;
  int64_t end = 0;
  uint8_t sum = 0;
  for (const SafetensorsTensor& tensor : (*reader)->tensors()) {
    CHECK_EQ(tensor.offset, end) << tensor.name;
    end += tensor.size_bytes;
    CHECK((*reader)->Find(tensor.name) == &tensor) << tensor.name;
    const absl::string_view bytes = (*reader)->Bytes(tensor);
    CHECK_EQ(static_cast<int64_t>(bytes.size()), tensor.size_bytes);
    for (const char c : bytes) sum = static_cast<uint8_t>(sum + static_cast<uint8_t>(c));
  }
  CHECK_LE(end, static_cast<int64_t>(file.size()));
  static volatile uint8_t sink;
  sink = sum;
}

// The largest number in the header that a data section of this test may have: the end of the last tensor, mostly.
size_t DataBytes(absl::string_view header) {
  size_t largest = 0, number = 0;
  for (const char c : header) {
    number = '0' <= c && c <= '9' && number < 100'000 ? number * 10 + static_cast<size_t>(c - '0') : 0;
    if (number <= 1 << 16) largest = std::max(largest, number);
  }
  return largest;
}

}  // namespace
}  // namespace mt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes = mt::Bytes(data, size);
  if (!absl::StartsWith(bytes, "{")) {
    mt::Read(bytes);
    return 0;
  }
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(static_cast<uint64_t>(size) >> (8 * i)));
  absl::StrAppend(&file, bytes, std::string(mt::DataBytes(bytes), '\1'));
  mt::Read(file);
  return 0;
}
