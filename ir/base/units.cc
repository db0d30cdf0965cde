#include "ir/base/units.h"

#include <cmath>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace mt {
namespace {

struct ByteUnit {
  absl::string_view suffix;
  int64_t bytes;
};
// Longest suffix first: "B" ends all of them.
constexpr ByteUnit kByteUnits[] = {{"TiB", int64_t{1} << 40},
                                   {"GiB", int64_t{1} << 30},
                                   {"MiB", int64_t{1} << 20},
                                   {"KiB", int64_t{1} << 10},
                                   {"B", 1}};

}  // namespace

absl::StatusOr<int64_t> ParseBytes(absl::string_view text) {
  absl::string_view number = absl::StripAsciiWhitespace(text);
  int64_t unit = 1;
  for (const ByteUnit& candidate : kByteUnits) {
    if (absl::EndsWith(number, candidate.suffix)) {
      number = absl::StripTrailingAsciiWhitespace(absl::StripSuffix(number, candidate.suffix));
      unit = candidate.bytes;
      break;
    }
  }
  double value = 0;
  const bool plain = !number.empty() && number.find_first_not_of("0123456789.") == absl::string_view::npos;
  if (!plain || !absl::SimpleAtod(number, &value)) {
    std::string hint;
    const size_t digits = text.find_first_not_of("0123456789. ");
    if (digits != absl::string_view::npos && digits > 0) {
      const char letter = absl::ascii_toupper(static_cast<unsigned char>(text[digits]));
      if (absl::string_view("KMGT").find(letter) != absl::string_view::npos) {
        hint = absl::StrCat("; did you mean ", absl::StripAsciiWhitespace(text.substr(0, digits)),
                            std::string(1, letter), "iB?");
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is not a number of bytes such as 24GiB, 512MiB or 1048576", hint));
  }
  const double bytes = value * static_cast<double>(unit);
  if (bytes > 0x1p62 || bytes != std::floor(bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a whole number of bytes below 2^62"));
  }
  return static_cast<int64_t>(bytes);
}

std::string FormatBytes(int64_t bytes) {
  for (const ByteUnit& unit : kByteUnits) {
    if (unit.bytes > 1 && std::abs(bytes) >= unit.bytes) {
      return absl::StrFormat("%.1f %s", static_cast<double>(bytes) / static_cast<double>(unit.bytes), unit.suffix);
    }
  }
  return absl::StrCat(bytes, " B");
}

std::string CanonicalBytes(int64_t bytes) {
  for (const ByteUnit& unit : kByteUnits) {
    if (bytes != 0 && bytes % unit.bytes == 0) return absl::StrCat(bytes / unit.bytes, unit.suffix);
  }
  return absl::StrCat(bytes, "B");
}

std::string FormatCount(int64_t count) {
  std::string digits = absl::StrCat(count < 0 ? -count : count);
  for (int64_t i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<size_t>(i), ",");
  return count < 0 ? absl::StrCat("-", digits) : digits;
}

std::string FormatDuration(double seconds) {
  const int64_t whole = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

}  // namespace mt
