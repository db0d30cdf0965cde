// SHA-1 and SHA-256, by which git and Hugging Face name contents. Source: FIPS 180-4.
#ifndef MT_RUNTIME_DATA_SHA_H_
#define MT_RUNTIME_DATA_SHA_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

class Sha1 {
 public:
  void Update(absl::string_view bytes);
  std::string Hex();  // Of all bytes; 40 digits. The last call.

 private:
  void Block(const uint8_t* block);

  std::array<uint32_t, 5> state_ = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0};
  std::string rest_;  // Less than a block.
  uint64_t size_bytes_ = 0;
};

class Sha256 {
 public:
  void Update(absl::string_view bytes);
  std::string Hex();  // Of all bytes; 64 digits. The last call.

 private:
  void Block(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                    0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
  std::string rest_;
  uint64_t size_bytes_ = 0;
};

// Errors: NotFound, FailedPrecondition (unreadable).
absl::StatusOr<std::string> FileSha256(const std::string& path);
// The name that git gives to the contents: SHA-1 of "blob SIZE\0" and the bytes.
absl::StatusOr<std::string> FileGitBlob(const std::string& path);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_SHA_H_
