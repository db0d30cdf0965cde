#include "ir/attrs.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

// The shortest text that reads back to the same double, marked as a double.
std::string DoubleToString(double value) {
  std::string text;
  for (const int digits : {6, 9, 15, 17}) {
    text = absl::StrFormat("%.*g", digits, value);
    double back = 0;
    if (absl::SimpleAtod(text, &back) && back == value) break;
  }
  if (std::isfinite(value) && text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

}  // namespace

absl::string_view AttrKindName(AttrKind kind) {
  constexpr absl::string_view kNames[] = {"bool", "int", "double", "string", "dtype", "int list"};
  return kNames[static_cast<size_t>(kind)];
}

std::string AttrValueToString(const AttrValue& value) {
  switch (KindOf(value)) {
    case AttrKind::kBool:
      return std::get<bool>(value) ? "true" : "false";
    case AttrKind::kInt:
      return absl::StrCat(std::get<int64_t>(value));
    case AttrKind::kDouble:
      return DoubleToString(std::get<double>(value));
    case AttrKind::kString:
      return absl::StrCat("\"", absl::CEscape(std::get<std::string>(value)), "\"");
    case AttrKind::kDType:
      return std::string(DTypeName(std::get<DType>(value)));
    case AttrKind::kIntList:
      return absl::StrCat("[", absl::StrJoin(std::get<IntList>(value), ","), "]");
  }
  return "";
}

absl::StatusOr<AttrValue> ParseAttrValue(AttrKind kind, absl::string_view text) {
  const auto error = [&] {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a ", AttrKindName(kind)));
  };
  switch (kind) {
    case AttrKind::kBool:
      if (text == "true") return AttrValue(true);
      if (text == "false") return AttrValue(false);
      return error();
    case AttrKind::kInt: {
      int64_t value = 0;
      if (!absl::SimpleAtoi(text, &value)) return error();
      return AttrValue(value);
    }
    case AttrKind::kDouble: {
      double value = 0;
      if (!absl::SimpleAtod(text, &value) || std::isnan(value)) return error();
      return AttrValue(value);
    }
    case AttrKind::kString: {
      std::string value;
      if (text.size() < 2 || text.front() != '"' || text.back() != '"' ||
          !absl::CUnescape(text.substr(1, text.size() - 2), &value)) {
        return error();
      }
      return AttrValue(std::move(value));
    }
    case AttrKind::kDType: {
      const std::optional<DType> value = ParseDType(text);
      if (!value) return error();
      return AttrValue(*value);
    }
    case AttrKind::kIntList: {
      if (text.size() < 2 || text.front() != '[' || text.back() != ']') return error();
      IntList value;
      const absl::string_view inside = text.substr(1, text.size() - 2);
      if (!inside.empty()) {
        for (const absl::string_view part : absl::StrSplit(inside, ',')) {
          int64_t item = 0;
          if (!absl::SimpleAtoi(part, &item)) return error();
          value.push_back(item);
        }
      }
      return AttrValue(std::move(value));
    }
  }
  return error();
}

void Attrs::Set(absl::string_view name, AttrValue value) {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), name, [](const Entry& entry, absl::string_view n) {
    return absl::string_view(entry.first) < n;
  });
  if (at != entries_.end() && at->first == name) {
    at->second = std::move(value);
  } else {
    entries_.insert(at, Entry(std::string(name), std::move(value)));
  }
}

void Attrs::Erase(absl::string_view name) {
  entries_.erase(
      std::remove_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.first == name; }),
      entries_.end());
}

const AttrValue* Attrs::Find(absl::string_view name) const {
  for (const Entry& entry : entries_) {
    if (entry.first == name) return &entry.second;
  }
  return nullptr;
}

absl::StatusOr<Attrs> CompleteAttrs(absl::Span<const AttrSpec> specs, const Attrs& given) {
  Attrs complete;
  for (const AttrSpec& spec : specs) {
    const AttrValue* value = given.Find(spec.name);
    if (value == nullptr) {
      if (spec.default_text.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("attribute ", spec.name, " (", AttrKindName(spec.kind), ") is missing: ", spec.doc));
      }
      ASSIGN_OR_RETURN(AttrValue fallback, ParseAttrValue(spec.kind, spec.default_text));
      complete.Set(spec.name, std::move(fallback));
    } else if (KindOf(*value) == spec.kind) {
      complete.Set(spec.name, *value);
    } else if (spec.kind == AttrKind::kDouble && KindOf(*value) == AttrKind::kInt) {
      complete.Set(spec.name, static_cast<double>(std::get<int64_t>(*value)));
    } else {
      return absl::InvalidArgumentError(absl::StrCat("attribute ", spec.name, "=", AttrValueToString(*value), " is a ",
                                                     AttrKindName(KindOf(*value)), "; expected a ",
                                                     AttrKindName(spec.kind)));
    }
  }
  for (const Attrs::Entry& entry : given.entries()) {
    if (complete.Find(entry.first) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "unknown attribute ", entry.first,
          "; known: ", specs.empty() ? "none" : absl::StrJoin(specs, ", ", [](std::string* out, const AttrSpec& spec) {
            absl::StrAppend(out, spec.name);
          })));
    }
  }
  return complete;
}

std::string AttrsToString(absl::Span<const AttrSpec> specs, const Attrs& attrs) {
  std::vector<std::string> parts;
  for (const Attrs::Entry& entry : attrs.entries()) {
    const std::string text = AttrValueToString(entry.second);
    bool is_default = false;
    for (const AttrSpec& spec : specs) {
      if (spec.name != entry.first || spec.default_text.empty()) continue;
      const absl::StatusOr<AttrValue> fallback = ParseAttrValue(spec.kind, spec.default_text);
      is_default = fallback.ok() && *fallback == entry.second;
    }
    if (!is_default) parts.push_back(absl::StrCat(entry.first, "=", text));
  }
  return parts.empty() ? "" : absl::StrCat("{", absl::StrJoin(parts, ", "), "}");
}

}  // namespace mt
