#include "codegen/report/names.h"

#include <algorithm>

#include "absl/strings/ascii.h"

namespace mt {

std::string WithoutNumbers(absl::string_view name) {
  std::string text;
  for (const char c : name) {
    if (!absl::ascii_isdigit(static_cast<unsigned char>(c))) {
      text.push_back(c);
    } else if (text.empty() || text.back() != '\0') {
      text.push_back('\0');
    }
  }
  return text;
}

std::string CommonName(const std::vector<std::string>& names) {
  std::vector<std::vector<std::string>> parts;  // By name: its pieces, digits and others in turn.
  for (const std::string& name : names) {
    std::vector<std::string> pieces;
    for (const char c : name) {
      const bool digit = absl::ascii_isdigit(static_cast<unsigned char>(c));
      const bool goes_on =
          !pieces.empty() && digit == absl::ascii_isdigit(static_cast<unsigned char>(pieces.back().back()));
      if (goes_on) {
        pieces.back().push_back(c);
      } else {
        pieces.emplace_back(1, c);
      }
    }
    if (!parts.empty() && pieces.size() != parts[0].size()) return names[0];  // Names with a '\0' of their own.
    parts.push_back(std::move(pieces));
  }
  std::string text;
  for (size_t p = 0; p < parts[0].size(); ++p) {
    const bool same = std::all_of(parts.begin(), parts.end(), [&](const auto& name) { return name[p] == parts[0][p]; });
    text += same ? parts[0][p] : "*";
  }
  return text;
}

}  // namespace mt
