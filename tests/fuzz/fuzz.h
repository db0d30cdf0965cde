// What the fuzz targets share.
#ifndef MT_TESTS_FUZZ_FUZZ_H_
#define MT_TESTS_FUZZ_FUZZ_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace mt {

inline absl::string_view Bytes(const uint8_t* data, size_t size) {
  return absl::string_view(reinterpret_cast<const char*>(data), size);
}

// Path of a file in memory with these contents, until the next call. With a suffix, a link of a name that ends so.
std::string MemoryFile(absl::string_view contents, absl::string_view suffix = "");

// One change of a random field of the message or of a message in it: numbers near and at the limits, strings that are
// elsewhere in the message, elements added, removed, repeated and swapped.
void MutateMessage(google::protobuf::Message& message, std::mt19937& random);

// Custom mutators: `data` is `message` in the text form or serialized. Fields are changed; what cannot be parsed, and
// one input in four, is changed as bytes. They return the new size.
size_t MutateText(uint8_t* data, size_t size, size_t max_size, unsigned int seed, google::protobuf::Message& message);
size_t MutateBinary(uint8_t* data, size_t size, size_t max_size, unsigned int seed, google::protobuf::Message& message);

}  // namespace mt

#endif  // MT_TESTS_FUZZ_FUZZ_H_
