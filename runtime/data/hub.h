// Where corpora, tokenizers and weights are published: Speakleash's index, and Hugging Face's repositories.
#ifndef MT_RUNTIME_DATA_HUB_H_
#define MT_RUNTIME_DATA_HUB_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/data/download.h"

namespace mt {

inline constexpr char kSpeakleashUrl[] = "https://d6t0.c15.e2-2.dev/speakleash-ds-pub/datasets_text";
inline constexpr char kHuggingFaceUrl[] = "https://huggingface.co";

// One corpus of Speakleash, from its NAME.manifest. Counts are 0 and texts empty where the manifest says nothing.
struct SpeakleashCorpus {
  std::string name, description, license, category;
  int64_t file_bytes = 0;  // Of NAME.jsonl.zst.
  int64_t documents = 0, characters = 0;
  double high_quality = 0;  // Share of documents, 0 to 1.
};

// The names in BASE/speakleash.json, sorted. Untrusted. Errors: as FetchText, FailedPrecondition (not the index).
absl::StatusOr<std::vector<std::string>> ListSpeakleash(const std::string& base_url, const DownloadOptions& options);
absl::StatusOr<SpeakleashCorpus> DescribeSpeakleash(const std::string& base_url, const std::string& name,
                                                    const DownloadOptions& options);

struct SpeakleashFilter {
  std::string quality;           // "HIGH", "MEDIUM", "LOW"; empty: all.
  std::optional<int64_t> limit;  // The first documents that pass.
};

// FOLDER/NAME.jsonl.zst of the size that the manifest names, unless it is there already; with a filter also
// FOLDER/NAME[.QUALITY][.LIMIT].jsonl, the lines that pass. Returns the path that is to be prepared.
// Errors: as Download; FailedPrecondition (records without the field).
absl::StatusOr<std::string> GetSpeakleash(const std::string& base_url, const std::string& name,
                                          const std::string& folder, const SpeakleashFilter& filter,
                                          const DownloadOptions& options);

enum class HubFiles { kTokenizer, kEverything };

// config.json, tokenizer and weights (safetensors, sharded too) of OWNER/NAME into `folder`. A file that is there is
// kept where its hash is the one that the server names (or where no server answers), else fetched anew; one that comes
// with another hash than that is removed. At least a tokenizer (kTokenizer), or config.json, must be there. Returns the
// paths. Errors: as Download; NotFound names the URL and where the file can be put instead.
absl::StatusOr<std::vector<std::string>> GetHuggingFace(const std::string& base_url, absl::string_view repository,
                                                        const std::string& folder, HubFiles files,
                                                        const DownloadOptions& options);

// True for "gpt2" and for OWNER/NAME where no such path exists.
bool IsHubName(const std::string& spec);
// "gpt2" is openai-community/gpt2. $MT_CACHE, else $XDG_CACHE_HOME/mt, else ~/.cache/mt; then /OWNER/NAME.
std::string HubCacheFolder(const std::string& spec);
// Fetches the tokenizer of IsHubName(spec) where its cache folder has none. HF_ENDPOINT and HF_TOKEN are honoured.
// Returns "hf:FOLDER". Errors: one line with the URL and where to put the file.
absl::StatusOr<std::string> FetchTokenizer(const std::string& spec);

}  // namespace mt

#endif  // MT_RUNTIME_DATA_HUB_H_
