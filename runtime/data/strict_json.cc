#include "runtime/data/strict_json.h"

#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace mt {
namespace {

constexpr int kMaxDepth = 64;

}  // namespace

absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text) {
  using nlohmann::json;
  std::vector<absl::flat_hash_set<std::string>> keys;  // Of the objects that are open.
  std::string fault;
  const auto callback = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth && fault.empty()) fault = absl::StrCat("is nested deeper than ", kMaxDepth, " levels");
    if (!fault.empty()) return false;
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      fault = absl::StrCat("gives the key \"", parsed.get_ref<const std::string&>(), "\" twice");
    }
    return true;
  };
  json value = json::parse(text.begin(), text.end(), callback, /*allow_exceptions=*/false);
  if (!fault.empty()) return absl::FailedPreconditionError(fault);
  if (value.is_discarded()) return absl::FailedPreconditionError("is not valid JSON");
  if (!value.is_object()) return absl::FailedPreconditionError("is not a JSON object");
  return value;
}

}  // namespace mt
