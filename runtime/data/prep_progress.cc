#include "runtime/data/prep_progress.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

constexpr int64_t kVersion = 1;

struct Field {
  const char* name;
  int64_t PrepProgress::*member;
};
constexpr Field kFields[] = {
    {"index_bytes", &PrepProgress::index_bytes},
    {"split", &PrepProgress::split},
    {"document", &PrepProgress::document},
    {"part", &PrepProgress::part},
    {"token", &PrepProgress::token},
    {"unknown", &PrepProgress::unknown},
    {"counted", &PrepProgress::counted},
    {"tokenizer_crc32c", &PrepProgress::tokenizer_crc},
};

std::string Dump(const nlohmann::json& json) {
  return json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::StatusOr<PrepProgress> Parse(absl::string_view text) {
  ASSIGN_OR_RETURN(nlohmann::json json, ParseStrictJson(text));
  const absl::Status bad = absl::FailedPreconditionError("was damaged, or made by another version of mtcorpus");
  const auto crc = json.find("crc32c");
  if (crc == json.end() || !crc->is_number_unsigned()) return bad;
  const uint64_t expected = crc->get<uint64_t>();
  json.erase("crc32c");
  if (expected != Crc32c(Dump(json)) || json.value("version", nlohmann::json()) != kVersion) return bad;
  PrepProgress progress;
  for (const Field& field : kFields) {
    const auto value = json.find(field.name);
    if (value == json.end() || !value->is_number_unsigned() || value->get<uint64_t>() > uint64_t{1} << 60) return bad;
    progress.*field.member = value->get<int64_t>();
  }
  const auto index_crc = json.find("index_crc32c"), request = json.find("request"), written = json.find("written");
  if (index_crc == json.end() || !index_crc->is_number_unsigned() || request == json.end() || !request->is_object() ||
      written == json.end() || !written->is_string() || progress.split > 3 || progress.counted > 3) {
    return bad;
  }
  progress.index_crc = static_cast<uint32_t>(index_crc->get<uint64_t>());
  for (const auto& item : request->items()) {
    if (!item.value().is_string()) return bad;
    progress.request[item.key()] = item.value().get<std::string>();
  }
  const std::string manifest = written->get<std::string>();
  if (!manifest.empty()) {
    ASSIGN_OR_RETURN(progress.written, ParseManifest(manifest));
  }
  return progress;
}

}  // namespace

absl::Status WriteProgress(const std::string& folder, const PrepProgress& progress) {
  nlohmann::json json = {{"version", kVersion},
                         {"request", progress.request},
                         {"index_crc32c", progress.index_crc},
                         {"written", progress.written ? progress.written->Serialize() : ""}};
  for (const Field& field : kFields) json[field.name] = static_cast<uint64_t>(progress.*field.member);
  // Through a parser, so that what is hashed is what will be read.
  json = nlohmann::json::parse(Dump(json));
  json["crc32c"] = Crc32c(Dump(json));
  return WriteFile(absl::StrCat(folder, "/", kProgressFile), absl::StrCat(Dump(json), "\n"));
}

absl::StatusOr<PrepProgress> ReadProgress(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/", kProgressFile);
  const absl::StatusOr<std::string> text = ReadFile(path, int64_t{256} << 20);
  if (absl::IsNotFound(text.status())) return text.status();
  if (!text.ok()) return absl::FailedPreconditionError(text.status().message());
  absl::StatusOr<PrepProgress> progress = Parse(*text);
  if (!progress.ok()) return Annotate(progress.status(), path);
  return progress;
}

}  // namespace mt
