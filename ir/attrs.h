// Attributes of a node: uniform, so that print, parse, compare, hash, clone and serialize are written once.
#ifndef MT_IR_ATTRS_H_
#define MT_IR_ATTRS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/base/check.h"
#include "ir/tensor_type.h"

namespace mt {

using IntList = std::vector<int64_t>;

// The order of the alternatives is the order of AttrKind.
using AttrValue = std::variant<bool, int64_t, double, std::string, DType, IntList>;
enum class AttrKind { kBool, kInt, kDouble, kString, kDType, kIntList };

inline AttrKind KindOf(const AttrValue& value) { return static_cast<AttrKind>(value.index()); }
absl::string_view AttrKindName(AttrKind kind);

// "true", "3", "0.5" (always with a point or exponent), "\"text\"", "bf16", "[1,2]". ParseAttrValue reads it back
// exactly.
std::string AttrValueToString(const AttrValue& value);
absl::StatusOr<AttrValue> ParseAttrValue(AttrKind kind, absl::string_view text);

// One attribute an op takes. Without a default it must be given.
struct AttrSpec {
  absl::string_view name;
  AttrKind kind;
  absl::string_view doc;
  // Canonical text of the default; empty: required. (A required string cannot default to ""; write "\"\"".)
  absl::string_view default_text = "";
};

// Sorted name -> value.
class Attrs {
 public:
  using Entry = std::pair<std::string, AttrValue>;

  Attrs() = default;
  Attrs(std::initializer_list<Entry> entries) {
    for (const Entry& entry : entries) Set(entry.first, entry.second);
  }

  void Set(absl::string_view name, AttrValue value);
  void Erase(absl::string_view name);
  const AttrValue* Find(absl::string_view name) const;

  // The value of an attribute that the op's specs guarantee. REQUIRES: present, of type T (bool, int64_t, double,
  // std::string, DType or IntList).
  template <typename T>
  const T& Get(absl::string_view name) const {
    const AttrValue* value = Find(name);
    CHECK(value != nullptr) << "attribute " << std::string(name);
    const T* typed = std::get_if<T>(value);
    CHECK(typed != nullptr) << "attribute " << std::string(name);
    return *typed;
  }
  int64_t Int(absl::string_view name) const { return Get<int64_t>(name); }
  double Double(absl::string_view name) const { return Get<double>(name); }
  bool Bool(absl::string_view name) const { return Get<bool>(name); }

  const std::vector<Entry>& entries() const { return entries_; }
  bool empty() const { return entries_.empty(); }

  friend bool operator==(const Attrs& a, const Attrs& b) { return a.entries_ == b.entries_; }
  friend bool operator!=(const Attrs& a, const Attrs& b) { return !(a == b); }

 private:
  std::vector<Entry> entries_;
};

// Checks names and kinds against `specs` and fills in defaults; an int is accepted where a double is wanted.
// Errors: InvalidArgument naming the attribute, what it is and what was expected, with the list of known names.
absl::StatusOr<Attrs> CompleteAttrs(absl::Span<const AttrSpec> specs, const Attrs& given);

// Only what differs from the defaults, as printed: "{axis=1, keep=true}"; empty where nothing does.
std::string AttrsToString(absl::Span<const AttrSpec> specs, const Attrs& attrs);

}  // namespace mt

#endif  // MT_IR_ATTRS_H_
