// UTF-8: validation and decoding. Valid means Unicode 15, table 3-7: no surrogates, no overlong forms, at most
// U+10FFFF.
#ifndef MT_IR_BASE_UTF8_H_
#define MT_IR_BASE_UTF8_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace mt {

// The code point at the start of `text` and its length in bytes. Where the bytes are not valid, code_point is -1 and
// size_bytes the length of the maximal invalid part (at least 1), the part that one U+FFFD replaces.
struct Utf8Char {
  int32_t code_point;
  int size_bytes;
  bool truncated;  // Invalid only because `text` ends here.
};

// REQUIRES: !text.empty().
Utf8Char DecodeUtf8(absl::string_view text);

// Length in bytes of the longest valid prefix.
int64_t ValidUtf8Prefix(absl::string_view text);

// REQUIRES: a Unicode scalar value.
void AppendUtf8(int32_t code_point, std::string* out);

}  // namespace mt

#endif  // MT_IR_BASE_UTF8_H_
