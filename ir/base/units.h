// Byte counts and other quantities as people write them.
#ifndef MT_IR_BASE_UNITS_H_
#define MT_IR_BASE_UNITS_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace mt {

// "8GiB", "512 MiB", "64KiB", "1000B", "123" -> bytes. Fractions such as "1.5GiB" are allowed where they are whole
// bytes. Errors: InvalidArgument for anything else; "8Gb" and "8G" are told to write "8GiB".
absl::StatusOr<int64_t> ParseBytes(absl::string_view text);

// 8589934592 -> "8.0 GiB"; 1536 -> "1.5 KiB"; 100 -> "100 B". For people, rounded to one decimal.
std::string FormatBytes(int64_t bytes);

// 8589934592 -> "8GiB"; 1000 -> "1000B". Exact; ParseBytes reads it back.
std::string CanonicalBytes(int64_t bytes);

// 12345678 -> "12,345,678".
std::string FormatCount(int64_t count);

// 83.2 s -> "0:01:23".
std::string FormatDuration(double seconds);

}  // namespace mt

#endif  // MT_IR_BASE_UNITS_H_
