#include "runtime/data/hub.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "runtime/data/atomic_file.h"
#include "runtime/data/json_lines.h"
#include "runtime/data/mapped_file.h"
#include "runtime/data/safetensors.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;
constexpr int64_t kMaxNames = 100'000;
constexpr char kZstdMagic[] = "\x28\xB5\x2F\xFD";

// A name that is safe as a file's and in a URL.
bool IsPlainName(absl::string_view name) {
  if (name.empty() || name.size() > 200 || name[0] == '.' || name[0] == '-') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '-' ||
           c == '.';
  });
}

std::string WithoutSlash(absl::string_view url) { return std::string(absl::StripSuffix(url, "/")); }

const json& Member(const json& object, const char* key) {
  static const json& null = *new json;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}
std::string Text(const json& value) { return value.is_string() ? value.get<std::string>() : ""; }
int64_t Count(const json& value) {
  if (value.is_number_unsigned() && value.get<uint64_t>() < (uint64_t{1} << 62)) return value.get<int64_t>();
  return 0;
}

absl::Status CheckZstd(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  if (file->bytes().substr(0, 4) == absl::string_view(kZstdMagic, 4)) return absl::OkStatus();
  return absl::FailedPreconditionError("what the server sends is not compressed with zstd; it was removed");
}

absl::Status CheckJson(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, int64_t{1} << 30));
  const absl::StatusOr<json> parsed = ParseStrictJson(text);
  if (parsed.ok()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("what the server sends ", parsed.status().message(), "; it was removed"));
}

absl::Status CheckSafetensors(const std::string& path) { return SafetensorsReader::Open(path).status(); }

// Keeps the lines that pass.
absl::Status Filter(const std::string& source, const SpeakleashFilter& filter, const std::string& path) {
  const int fd = ::open(source.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::FailedPreconditionError(absl::StrCat(source, ": cannot open"));
  absl::Cleanup close = [fd] { ::close(fd); };
  ASSIGN_OR_RETURN(const std::unique_ptr<AtomicFile> out, AtomicFile::Create(path));
  int64_t kept = 0;
  RETURN_IF_ERROR(ReadJsonLines(fd, source, {}, [&](JsonLine& line) -> absl::Status {
    if (filter.limit && kept >= *filter.limit) return absl::CancelledError("");
    if (!filter.quality.empty()) {
      if (line.quality.empty()) {
        return absl::FailedPreconditionError(
            absl::StrCat(source, ": its records do not say \"meta\": {\"quality\"}; leave --quality out"));
      }
      if (line.quality != filter.quality) return absl::OkStatus();
    }
    ++kept;
    return out->Append(absl::StrCat(line.line, "\n"));
  }));
  if (kept == 0) {
    return absl::FailedPreconditionError(absl::StrCat(source, ": no document has the quality ", filter.quality));
  }
  return out->Commit();
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ListSpeakleash(const std::string& base_url, const DownloadOptions& options) {
  const std::string url = absl::StrCat(WithoutSlash(base_url), "/speakleash.json");
  ASSIGN_OR_RETURN(const std::string text, FetchText(url, kMaxIndexBytes, options));
  // A list is not what ParseStrictJson takes.
  const absl::StatusOr<json> parsed = ParseStrictJson(absl::StrCat("{\"list\":", text, "}"));
  const json list = parsed.ok() ? Member(*parsed, "list") : json();
  if (!list.is_array() || static_cast<int64_t>(list.size()) > kMaxNames) {
    return absl::FailedPreconditionError(absl::StrCat(url, ": is not Speakleash's index, a list of names"));
  }
  std::set<std::string> names;
  for (const json& item : list) {
    const std::string name = Text(Member(item, "name"));
    if (!IsPlainName(name)) {
      return absl::FailedPreconditionError(absl::StrCat(url, ": has an entry without a name that can be a file's"));
    }
    names.insert(name);
  }
  return std::vector<std::string>(names.begin(), names.end());
}

absl::StatusOr<SpeakleashCorpus> DescribeSpeakleash(const std::string& base_url, const std::string& name,
                                                    const DownloadOptions& options) {
  if (!IsPlainName(name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", name, "\" is no corpus of Speakleash; mtcorpus list has them"));
  }
  const std::string url = absl::StrCat(WithoutSlash(base_url), "/", name, ".manifest");
  absl::StatusOr<std::string> text = FetchText(url, kMaxIndexBytes, options);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(absl::StrCat(text.status().message(), "; mtcorpus list has the names"));
  }
  RETURN_IF_ERROR(text);
  const absl::StatusOr<json> manifest = ParseStrictJson(*text);
  if (!manifest.ok()) return Annotate(manifest.status(), url);
  SpeakleashCorpus corpus{name, Text(Member(*manifest, "description")), Text(Member(*manifest, "license")),
                          Text(Member(*manifest, "category"))};
  corpus.file_bytes = Count(Member(*manifest, "file_size"));
  const json& statistics = Member(*manifest, "stats");
  corpus.documents = Count(Member(statistics, "documents"));
  corpus.characters = Count(Member(statistics, "characters"));
  const json& quality = Member(statistics, "quality");
  const double high = static_cast<double>(Count(Member(quality, "HIGH")));
  const double all = high + static_cast<double>(Count(Member(quality, "MEDIUM")) + Count(Member(quality, "LOW")));
  corpus.high_quality = all > 0 ? high / all : 0;
  return corpus;
}

absl::StatusOr<std::string> GetSpeakleash(const std::string& base_url, const std::string& name,
                                          const std::string& folder, const SpeakleashFilter& filter,
                                          const DownloadOptions& options) {
  ASSIGN_OR_RETURN(const SpeakleashCorpus corpus, DescribeSpeakleash(base_url, name, options));
  if (corpus.file_bytes <= 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(WithoutSlash(base_url), "/", name, ".manifest: has no \"file_size\" to check the download by"));
  }
  RETURN_IF_ERROR(MakeFolder(folder));
  const std::string path = absl::StrCat(folder, "/", name, ".jsonl.zst");
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error || size != static_cast<uintmax_t>(corpus.file_bytes)) {
    RETURN_IF_ERROR(Download(absl::StrCat(WithoutSlash(base_url), "/", name, ".jsonl.zst"), path, corpus.file_bytes,
                             CheckZstd, options));
  }
  if (filter.quality.empty() && !filter.limit) return path;
  const std::string filtered = absl::StrCat(folder, "/", name, filter.quality.empty() ? "" : ".", filter.quality,
                                            filter.limit ? absl::StrCat(".", *filter.limit) : "", ".jsonl");
  RETURN_IF_ERROR(Filter(path, filter, filtered));
  return filtered;
}

absl::StatusOr<std::vector<std::string>> GetHuggingFace(const std::string& base_url, absl::string_view repository,
                                                        const std::string& folder, HubFiles files,
                                                        const DownloadOptions& options) {
  const std::vector<std::string> parts = absl::StrSplit(repository, '/');
  if (parts.size() != 2 || !IsPlainName(parts[0]) || !IsPlainName(parts[1])) {
    return absl::InvalidArgumentError(
        absl::StrCat("hf:", repository, ": give OWNER/NAME, as in hf:openai-community/gpt2"));
  }
  RETURN_IF_ERROR(MakeFolder(folder));
  const std::string base = absl::StrCat(WithoutSlash(base_url), "/", repository, "/resolve/main/");
  std::vector<std::string> paths;
  DownloadOptions named = options;
  named.named_contents = true;
  // OK(false): the repository has no such file.
  const auto get = [&](const std::string& file,
                       const std::function<absl::Status(const std::string&)>& check) -> absl::StatusOr<bool> {
    const std::string path = absl::StrCat(folder, "/", file);
    std::error_code ignored;
    bool there = fs::exists(path, ignored);
    if (there) {  // Is it what the repository has now? A server that does not answer changes nothing.
      const absl::StatusOr<std::string> name = ContentName(base + file, named);
      if (name.ok()) {
        ASSIGN_OR_RETURN(there, HasContents(path, *name));
      }
    }
    if (!there) {
      const absl::Status status = Download(base + file, path, std::nullopt, check, named);
      if (absl::IsNotFound(status)) return false;
      if (absl::IsUnavailable(status)) {
        return absl::UnavailableError(absl::StrCat(status.message(), "; or put the file at ", path));
      }
      RETURN_IF_ERROR(status);
    }
    paths.push_back(path);
    return true;
  };
  const auto missing = [&](absl::string_view what) {
    return absl::NotFoundError(
        absl::StrCat(base, ": has no ", what, "; is it the right name, and public? Else put the files into ", folder));
  };
  ASSIGN_OR_RETURN(const bool config, get("tokenizer_config.json", CheckJson));
  (void)config;
  ASSIGN_OR_RETURN(bool tokenizer, get("tokenizer.json", CheckJson));
  if (!tokenizer) {
    ASSIGN_OR_RETURN(const bool vocabulary, get("vocab.json", CheckJson));
    if (vocabulary) {
      ASSIGN_OR_RETURN(tokenizer, get("merges.txt", nullptr));
    }
  }
  if (!tokenizer || files == HubFiles::kEverything) {
    ASSIGN_OR_RETURN(const bool model, get("tokenizer.model", nullptr));
    tokenizer |= model;
  }
  if (files == HubFiles::kTokenizer) {
    if (!tokenizer) return missing("tokenizer");
    return paths;
  }
  ASSIGN_OR_RETURN(const bool has_config, get("config.json", CheckJson));
  if (!has_config) return missing("config.json");
  ASSIGN_OR_RETURN(const bool sharded, get("model.safetensors.index.json", CheckJson));
  if (!sharded) {
    ASSIGN_OR_RETURN(const bool weights, get("model.safetensors", CheckSafetensors));
    if (!weights) return missing("model.safetensors");
    return paths;
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(paths.back(), kMaxIndexBytes));
  ASSIGN_OR_RETURN(const json index, ParseStrictJson(text));
  std::set<std::string> shards;
  for (const auto& item : Member(index, "weight_map").items()) {
    const std::string shard = Text(item.value());
    if (!IsPlainName(shard) || !absl::EndsWith(shard, ".safetensors")) {
      return absl::FailedPreconditionError(
          absl::StrCat(paths.back(), ": \"weight_map\" names a file that is no plain name of a .safetensors"));
    }
    shards.insert(shard);
  }
  if (shards.empty()) return absl::FailedPreconditionError(absl::StrCat(paths.back(), ": has no \"weight_map\""));
  for (const std::string& shard : shards) {
    ASSIGN_OR_RETURN(const bool there, get(shard, CheckSafetensors));
    if (!there) return missing(shard);
  }
  return paths;
}

bool IsHubName(const std::string& spec) {
  std::error_code ignored;
  if (fs::exists(spec, ignored)) return false;
  if (spec == "gpt2") return true;
  const std::vector<std::string> parts = absl::StrSplit(spec, '/');
  return parts.size() == 2 && IsPlainName(parts[0]) && IsPlainName(parts[1]) && !absl::EndsWith(spec, ".json") &&
         !absl::EndsWith(spec, ".model") && !absl::EndsWith(spec, ".tiktoken");
}

std::string HubCacheFolder(const std::string& spec) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  std::string cache = variable("MT_CACHE");
  if (cache.empty() && !variable("XDG_CACHE_HOME").empty()) cache = variable("XDG_CACHE_HOME") + "/mt";
  if (cache.empty()) cache = variable("HOME") + "/.cache/mt";
  return absl::StrCat(cache, "/", spec == "gpt2" ? "openai-community/gpt2" : spec);
}

absl::StatusOr<std::string> FetchTokenizer(const std::string& spec) {
  const std::string folder = HubCacheFolder(spec);
  std::error_code ignored;
  for (const char* file : {"tokenizer.json", "merges.txt", "vocab.bpe", "tokenizer.model"}) {
    if (fs::exists(absl::StrCat(folder, "/", file), ignored)) return absl::StrCat("hf:", folder);
  }
  const char* endpoint = std::getenv("HF_ENDPOINT");
  const char* token = std::getenv("HF_TOKEN");
  DownloadOptions options;
  options.attempts = 2;
  options.bearer = token == nullptr ? "" : token;
  const std::string repository = spec == "gpt2" ? "openai-community/gpt2" : spec;
  const std::string base = endpoint == nullptr || *endpoint == '\0' ? kHuggingFaceUrl : endpoint;
  const absl::Status status = GetHuggingFace(base, repository, folder, HubFiles::kTokenizer, options).status();
  if (!status.ok()) {
    return absl::Status(status.code() == absl::StatusCode::kUnavailable ? absl::StatusCode::kNotFound : status.code(),
                        absl::StrCat("tokenizer ", spec, ": cannot be fetched from ", base, "/", repository,
                                     "/resolve/main/tokenizer.json; put that file at ", folder, "/tokenizer.json (",
                                     status.message(), ")"));
  }
  return absl::StrCat("hf:", folder);
}

}  // namespace mt
