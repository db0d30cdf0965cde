#include "runtime/data/prep.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <numeric>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "runtime/data/crc32c.h"
#include "runtime/data/entropy.h"
#include "runtime/data/hub.h"
#include "runtime/data/input_file.h"
#include "runtime/data/permutation.h"
#include "runtime/data/prep_progress.h"
#include "runtime/data/shard.h"
#include "runtime/data/token_file.h"
#include "runtime/data/tokenizer_files.h"
#include "runtime/data/words.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSplitNames[] = {"train", "val", "test"};
constexpr size_t kBatchBytes = size_t{4} << 20;  // Of text that is encoded at once.
constexpr size_t kBatchParts = size_t{1} << 16;
constexpr uint64_t kShuffleStream = uint64_t{1} << 63;  // Epochs of the reader count from 0.

const char* Name(DocumentMode mode) {
  switch (mode) {
    case DocumentMode::kAuto:
      return "auto";
    case DocumentMode::kFile:
      return "file";
    case DocumentMode::kBlankLine:
      return "blank-line";
    case DocumentMode::kLine:
      return "line";
    case DocumentMode::kRecord:
      return "record";
  }
  return "";
}

const char* Name(InvalidUtf8 mode) {
  switch (mode) {
    case InvalidUtf8::kError:
      return "error";
    case InvalidUtf8::kReplace:
      return "replace";
    case InvalidUtf8::kSkip:
      return "skip";
  }
  return "";
}

absl::Status CheckOptions(const PrepOptions& options) {
  double sum = 0;
  for (const double share : options.split) {
    if (!std::isfinite(share) || share < 0) sum = std::nan("");
    sum += share;
  }
  if (options.split.size() != 3 || !(sum > 0) || !(options.split[0] > 0)) {
    return absl::InvalidArgumentError(absl::StrCat("split ", absl::StrJoin(options.split, ","),
                                                   ": give three shares from 0 for train, val and test, of which train "
                                                   "is more than 0, such as 85,10,5"));
  }
  if (options.tokenizer_bytes < 1) return absl::InvalidArgumentError("tokenizer bytes: must be at least 1");
  if (options.shard_tokens < 1) return absl::InvalidArgumentError("shard tokens: must be at least 1");
  if (IsTrainedTokenizer(options.tokenizer) || (!IsTokenizerPath(options.tokenizer) && !IsHubName(options.tokenizer))) {
    RETURN_IF_ERROR(NewTokenizerTrainer(options.tokenizer));  // Says what a tokenizer can be.
  }
  return absl::OkStatus();
}

constexpr const char* kUnfinishedFiles[] = {kProgressFile, kIndexFile, kSpoolFile};

// Names that PrepareCorpus makes. Temporary ones are a process's own that was killed.
bool IsCorpusFile(const std::string& name) {
  const size_t temporary = name.find(".tmp-");
  const absl::string_view stem = absl::string_view(name).substr(0, temporary);
  if (stem == kManifestFile || stem == kTokenizerFile) return true;
  if (temporary != std::string::npos && (stem == "input" || stem == kProgressFile || stem == kIndexFile)) return true;
  for (const char* split : kSplitNames) {
    absl::string_view rest = stem;
    if (!absl::ConsumePrefix(&rest, split) || !absl::ConsumePrefix(&rest, "-") || !absl::ConsumeSuffix(&rest, ".bin")) {
      continue;
    }
    return rest.size() >= 5 && rest.find_first_not_of("0123456789") == absl::string_view::npos;
  }
  return false;
}

absl::Status Remove(const fs::path& path) {
  std::error_code error;
  fs::remove(path, error);
  if (!error) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(path.string(), ": cannot remove: ", error.message()));
}

// The manifest goes first: from here until the new one is written the folder is not a corpus.
absl::Status ClearCorpus(const fs::path& folder) {
  RETURN_IF_ERROR(Remove(folder / kManifestFile));
  std::error_code error;
  std::vector<fs::path> stale;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (IsCorpusFile(entry.path().filename().string())) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove(path, error);
  return absl::OkStatus();
}

// What processes that were killed were writing.
void SweepTemporary(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> stale;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (IsCorpusFile(name) && name.find(".tmp-") != std::string::npos) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove(path, error);
}

// What speaks of the other files goes first.
absl::Status ClearUnfinished(const fs::path& folder) {
  for (const char* file : kUnfinishedFiles) RETURN_IF_ERROR(Remove(folder / file));
  return absl::OkStatus();
}

// The first documents of the shuffled order are train, the next val, the rest test; no split with a share is empty.
// `documents`: how they were told apart. Errors: FailedPrecondition.
absl::StatusOr<std::array<int64_t, 3>> DivideDocuments(int64_t n, absl::string_view name, absl::string_view documents,
                                                       const std::vector<double>& shares) {
  const int64_t wanted = std::count_if(shares.begin(), shares.end(), [](double share) { return share > 0; });
  if (n < wanted) {
    return absl::FailedPreconditionError(absl::StrCat(
        name, ": has ", n, n == 1 ? " document" : " documents", " (--documents ", documents, "), too few for ", wanted,
        " splits; use --documents ", documents == "file" ? "blank-line" : "line", " or --split 100,0,0"));
  }
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  std::array<int64_t, 3> counts = {0, 0, 0};
  for (size_t s = 1; s < 3; ++s) {
    counts[s] = std::llround(shares[s] / sum * static_cast<double>(n));
    if (shares[s] > 0) counts[s] = std::max(counts[s], int64_t{1});
  }
  for (size_t s : {size_t{1}, size_t{2}}) {
    const int64_t others = counts[3 - s];
    if (counts[s] + others > n - 1) counts[s] = std::max(n - 1 - others, int64_t{shares[s] > 0});
  }
  counts[0] = n - counts[1] - counts[2];
  CHECK_GE(counts[0], 1);
  return counts;
}

// Writes one split's shards.
class SplitWriter {
 public:
  // `info`: of the shards that are there already. `on_shard`: called when another one is, with what was written.
  SplitWriter(const PrepOptions& options, const Tokenizer& tokenizer, int64_t split, SplitInfo info,
              std::function<absl::Status()> on_shard)
      : options_(options),
        tokenizer_(tokenizer),
        split_(split),
        info_(std::move(info)),
        on_shard_(std::move(on_shard)) {}

  absl::Status Append(absl::Span<const int32_t> tokens) {
    taken_ = 0;
    while (!tokens.empty()) {
      if (shard_ == nullptr) {
        const ShardHeader header = {.vocab_size = tokenizer_.vocab_size(),
                                    .tokenizer_hash = tokenizer_.hash(),
                                    .first_token = info_.tokens,
                                    .split = split_};
        ASSIGN_OR_RETURN(shard_, ShardWriter::Create(absl::StrCat(options_.output, "/", NextFile()), header));
      }
      const size_t count = std::min(tokens.size(), static_cast<size_t>(options_.shard_tokens - shard_->num_tokens()));
      RETURN_IF_ERROR(shard_->Append(tokens.subspan(0, count)));
      tokens.remove_prefix(count);
      info_.tokens += static_cast<int64_t>(count);
      taken_ += static_cast<int64_t>(count);
      if (shard_->num_tokens() < options_.shard_tokens) continue;
      RETURN_IF_ERROR(FinishShard());
      RETURN_IF_ERROR(on_shard_());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SplitInfo> Finish() {
    if (shard_ != nullptr) RETURN_IF_ERROR(FinishShard());
    return info_;
  }

  SplitInfo& info() { return info_; }
  int64_t taken() const { return taken_; }  // Tokens that this call of Append has written.

 private:
  std::string NextFile() const { return ShardFileName(info_.name, static_cast<int64_t>(info_.shards.size())); }
  absl::Status FinishShard() {
    ASSIGN_OR_RETURN(const ShardHeader header, shard_->Finish());
    info_.shards.push_back({NextFile(), header.num_tokens, header.crc});
    shard_.reset();
    return absl::OkStatus();
  }

  const PrepOptions& options_;
  const Tokenizer& tokenizer_;
  int64_t split_;
  SplitInfo info_;
  std::function<absl::Status()> on_shard_;
  int64_t taken_ = 0;
  std::unique_ptr<ShardWriter> shard_;
};

absl::StatusOr<std::unique_ptr<Tokenizer>> TrainTokenizer(const PrepOptions& options, const Permutation& order,
                                                          int64_t train_documents, TextSource* source) {
  ASSIGN_OR_RETURN(std::unique_ptr<TokenizerTrainer> trainer, NewTokenizerTrainer(options.tokenizer));
  // Characters are all collected, or a rare one would be lost.
  const int64_t limit = options.tokenizer == "char" ? source->size_bytes() : options.tokenizer_bytes;
  const double train_share = static_cast<double>(train_documents) / static_cast<double>(source->num_documents());
  const int64_t expected =
      std::min(limit, static_cast<int64_t>(train_share * static_cast<double>(source->size_bytes())));
  int64_t bytes = 0;
  for (int64_t i = 0; i < train_documents && bytes < limit; ++i) {
    RETURN_IF_ERROR(source->ReadDocument(order(i), [&](absl::string_view text) {
      if (bytes >= limit) return absl::OkStatus();
      trainer->Add(text);
      bytes += static_cast<int64_t>(text.size());
      if (options.progress) options.progress("training tokenizer", bytes, std::max(bytes + 1, expected));
      return absl::OkStatus();
    }));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, trainer->Train());
  if (options.progress) options.progress("training tokenizer", bytes, bytes);
  if (options.tokenizer != "char" && options.tokenizer != tokenizer->name() && options.warning) {
    options.warning(absl::StrCat("the text has pairs for ", tokenizer->vocab_size(), " tokens only, not for ",
                                 options.tokenizer, "; the vocabulary is that small"));
  }
  return tokenizer;
}

}  // namespace

bool IsTrainedTokenizer(const std::string& spec) {
  return spec == "char" || absl::string_view(spec).substr(0, 4) == "bpe:";
}

absl::StatusOr<std::unique_ptr<Tokenizer>> NamedTokenizer(const std::string& spec) {
  if (IsHubName(spec)) {
    ASSIGN_OR_RETURN(const std::string fetched, FetchTokenizer(spec));
    return OpenTokenizer(fetched);
  }
  if (!IsTokenizerPath(spec)) RETURN_IF_ERROR(NewTokenizerTrainer(spec));  // Says what a tokenizer can be.
  return OpenTokenizer(spec);
}

absl::StatusOr<TokenStatistics> MeasureSplit(const CorpusReader& reader,
                                             const std::function<void(int64_t, int64_t)>& progress) {
  std::vector<int32_t> tokens;
  const TokenScan scan = [&](const std::function<void(absl::Span<const int32_t>)>& sink) -> absl::Status {
    constexpr int64_t kPart = int64_t{1} << 18;
    for (int64_t first = 0; first < reader.num_tokens(); first += kPart) {
      tokens.resize(static_cast<size_t>(std::min(kPart, reader.num_tokens() - first)));
      RETURN_IF_ERROR(reader.Read(first, absl::MakeSpan(tokens)));
      sink(tokens);
      if (first % (64 * kPart) == 0) reader.Release(first);
      if (progress) progress(first + static_cast<int64_t>(tokens.size()), reader.num_tokens());
    }
    reader.Release(reader.num_tokens());
    return absl::OkStatus();
  };
  return MeasureTokens(scan, reader.vocab_size());
}

namespace {

// Parts of documents, in their order.
struct Batch {
  enum class Kind : uint8_t { kStart, kMore, kEnd };  // Of a document.
  struct Part {
    Kind kind;
    size_t text_end, ids_end;  // It begins where the one before it ends.
  };
  void Clear() {
    text.clear();
    ids.clear();
    parts.clear();
  }
  bool IsFull() const {
    return text.size() >= kBatchBytes || ids.size() >= kBatchBytes / 4 || parts.size() >= kBatchParts;
  }
  std::string text;
  std::vector<int32_t> ids;
  std::vector<Part> parts;
};

// One call of PrepareCorpus.
class Preparation {
 public:
  explicit Preparation(const PrepOptions& options) : options_(options), folder_(options.output) {}
  ~Preparation() {
    if (lock_ >= 0) ::close(lock_);
  }
  Preparation(const Preparation&) = delete;
  Preparation& operator=(const Preparation&) = delete;

  absl::StatusOr<Manifest> Run() {
    RETURN_IF_ERROR(CheckOptions(options_));
    std::error_code ignored;
    const bool made_folder = !fs::exists(folder_, ignored);
    RETURN_IF_ERROR(MakeFolder(options_.output));
    absl::Status status = Prepare();
    if (!status.ok()) {
      if (absl::IsDataLoss(status) && saved_) {
        return absl::DataLossError(
            absl::StrCat(status.message(), "; ", options_.output, " keeps what is finished: the same command goes on"));
      }
      if (owned_) ClearUnfinished(folder_).IgnoreError();
      if (cleared_) ClearCorpus(folder_).IgnoreError();
      if (made_folder) fs::remove(folder_, ignored);  // Where it is empty.
      return status;
    }
    return *progress_.written;
  }

 private:
  absl::Status Prepare();
  absl::Status Lock();
  absl::StatusOr<bool> FindUnfinished();
  absl::Status OpenInput(bool unfinished);
  absl::Status MayReplace(const absl::Status& changed);
  absl::Status StartOver(absl::string_view why);
  absl::StatusOr<std::map<std::string, std::string>> Request();
  bool IsWritten();
  absl::Status BeginWriting();
  absl::Status WriteSplit(int64_t split, int64_t documents, int64_t first_document);
  absl::Status ReadParts(int64_t document, const std::function<absl::Status()>& turn, Batch* batch);
  void Encode(Batch* batch) const;
  absl::Status WritePart(Batch::Kind kind, absl::string_view text, absl::Span<const int32_t> ids, SplitWriter* writer);
  absl::Status WriteBatch(const Batch& batch, SplitWriter* writer);
  void BeginDocument() {
    words_ = WordCounter();
    part_ = first_part_ = progress_.part = 0;
  }
  absl::Status Count();
  absl::Status Save() {
    RETURN_IF_ERROR(WriteProgress(options_.output, progress_));
    saved_ = true;
    return absl::OkStatus();
  }
  std::function<void(int64_t, int64_t)> Phase(absl::string_view phase) {
    return [this, phase](int64_t done, int64_t total) {
      if (options_.progress) options_.progress(phase, done, total);
    };
  }
  void Note(const std::string& line) {
    if (options_.note) options_.note(line);
  }

  const PrepOptions& options_;
  const fs::path folder_;
  int lock_ = -1;
  bool owned_ = false;    // The unfinished files are this call's.
  bool saved_ = false;    // There is something to go on with.
  bool cleared_ = false;  // What corpus there was is gone.
  PrepProgress progress_;
  // Text to be encoded, or tokens as they are.
  std::unique_ptr<TextSource> source_;
  std::unique_ptr<TokenFile> tokens_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<std::string> names_;  // Of the input.
  int64_t size_ = 0;                // Bytes of text, or tokens.
  int64_t done_ = 0;
  std::unique_ptr<Permutation> order_;
  std::vector<int32_t> ids_;  // Of ReadParts.
  // Of the document that is being written.
  WordCounter words_;
  int64_t part_ = 0;
  int64_t first_part_ = 0;  // Of those that are not in shards yet.
};

absl::Status Preparation::Lock() {
  lock_ = ::open(options_.output.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ < 0 || ::flock(lock_, LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(options_.output, ": another mtcorpus prep is writing it"));
}

// What must be the same for unfinished work to go on, by the flags' names. Opens a tokenizer that is not trained.
absl::StatusOr<std::map<std::string, std::string>> Preparation::Request() {
  std::map<std::string, std::string> request = {
      {"--split", absl::StrJoin(options_.split, ",")}, {"--seed", absl::StrCat(options_.seed)},
      {"--documents", Name(options_.documents)},       {"--text-field", options_.text_field},
      {"--invalid-utf8", Name(options_.invalid_utf8)}, {"--shard-tokens", absl::StrCat(options_.shard_tokens)},
  };
  if (IsTrainedTokenizer(options_.tokenizer)) {
    request["--tokenizer"] = options_.tokenizer;
    request["--tokenizer-bytes"] = absl::StrCat(options_.tokenizer_bytes);
  } else {
    ASSIGN_OR_RETURN(tokenizer_, NamedTokenizer(options_.tokenizer));
    request["--tokenizer"] = absl::StrFormat("%s, hash %016x", tokenizer_->name(), tokenizer_->hash());
  }
  return request;
}

// Whether there is work that this call goes on with; reads it. Errors: InvalidArgument (there is another's).
absl::StatusOr<bool> Preparation::FindUnfinished() {
  ASSIGN_OR_RETURN(const auto request, Request());
  absl::StatusOr<PrepProgress> found = ReadProgress(options_.output);
  const bool was_found = found.ok();
  if (was_found) progress_ = *std::move(found);
  std::error_code ignored;
  const bool finished = fs::exists(folder_ / kManifestFile, ignored);
  if (finished && (!was_found || progress_.written)) {
    RETURN_IF_ERROR(ClearUnfinished(folder_));  // It was killed while it did so.
    progress_ = {};
  }
  if (finished && !options_.overwrite) {
    return absl::AlreadyExistsError(absl::StrCat(
        options_.output, ": already holds a corpus; choose another --out, or replace it with --overwrite"));
  }
  std::vector<std::string> different;
  if (!progress_.request.empty() && progress_.request != request) {
    for (const auto& [flag, value] : request) {
      const auto before = progress_.request.find(flag);
      if (before == progress_.request.end() || before->second == value) continue;
      different.push_back(absl::StrCat(flag, " was ", before->second, " and is ", value));
    }
    if (different.empty()) different.push_back("--tokenizer");
    if (!options_.overwrite) {
      return absl::InvalidArgumentError(
          absl::StrCat(options_.output, ": holds unfinished work of another command: ", absl::StrJoin(different, ", "),
                       "; give the same to go on, --overwrite to start over, or another --out"));
    }
    progress_ = {};
  }
  const bool unfinished = !progress_.request.empty();
  progress_.request = request;
  return unfinished;
}

absl::Status Preparation::StartOver(absl::string_view why) {
  if (!why.empty()) Note(absl::StrCat(options_.output, ": ", why, "; starting over"));
  RETURN_IF_ERROR(ClearUnfinished(folder_));
  progress_ = {.request = progress_.request};
  saved_ = false;
  owned_ = true;
  return absl::OkStatus();
}

// OK: unfinished work of another input is to be replaced.
absl::Status Preparation::MayReplace(const absl::Status& changed) {
  if (options_.overwrite) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(changed.message(), " since ", options_.output,
                                                 " was begun; --overwrite starts over, another --out leaves it"));
}

absl::Status Preparation::OpenInput(bool unfinished) {
  std::string kept;
  if (unfinished) {
    absl::StatusOr<std::string> index = ReadFile(absl::StrCat(options_.output, "/", kIndexFile), int64_t{1} << 40);
    if (index.ok() && static_cast<int64_t>(index->size()) == progress_.index_bytes &&
        Crc32c(*index) == progress_.index_crc) {
      kept = *std::move(index);
      saved_ = true;
    } else {
      RETURN_IF_ERROR(StartOver("what was kept is damaged"));
    }
  }
  std::string index;
  const bool token_file = options_.input != "-" && IsTokenFile(options_.input);
  if (token_file) {
    if (IsTrainedTokenizer(options_.tokenizer)) {
      return absl::InvalidArgumentError(absl::StrCat(
          options_.input, ": holds tokens, not text; name the tokenizer that made them, such as --tokenizer gpt2"));
    }
    ASSIGN_OR_RETURN(tokens_, TokenFile::Open(options_.input, *tokenizer_));
    ASSIGN_OR_RETURN(const uint32_t crc, FileCrc(options_.input));
    names_ = {fs::path(options_.input).filename().string()};
    index = absl::StrCat("tokens ", crc, " ", tokens_->num_tokens(), " ", names_[0]);
  } else if (!kept.empty() && TextSource::IsRepeatable(options_.input)) {
    absl::StatusOr<std::unique_ptr<TextSource>> restored =
        TextSource::Restore(kept, options_.input, options_.output, options_.invalid_utf8);
    if (restored.ok()) {
      source_ = *std::move(restored);
      index = kept;
    } else if (absl::IsFailedPrecondition(restored.status())) {
      RETURN_IF_ERROR(StartOver(restored.status().message()));
    } else {
      RETURN_IF_ERROR(MayReplace(restored.status()));
      RETURN_IF_ERROR(StartOver(restored.status().message()));
    }
    if (source_ == nullptr) kept.clear();
  }
  if (!token_file && source_ == nullptr) {
    if (kept.empty()) RETURN_IF_ERROR(StartOver(""));  // Files that nobody speaks of.
    ASSIGN_OR_RETURN(source_, TextSource::Open(options_.input, options_.output, options_.documents,
                                               options_.invalid_utf8, Phase("reading"), options_.text_field));
    ASSIGN_OR_RETURN(index, source_->Save());
  }
  if (!kept.empty() && index != kept) {
    const absl::Status what = absl::InvalidArgumentError(
        absl::StrCat(options_.input == "-" ? "standard input" : options_.input, ": has changed"));
    RETURN_IF_ERROR(MayReplace(what));
    RETURN_IF_ERROR(StartOver(what.message()));
    kept.clear();
  }
  if (source_ != nullptr) names_ = source_->names();
  if (source_ != nullptr && source_->invalid_parts() > 0 && options_.warning) {
    options_.warning(absl::StrCat(FormatCount(source_->invalid_parts()), " places were not UTF-8 and were ",
                                  options_.invalid_utf8 == InvalidUtf8::kSkip ? "skipped" : "replaced by U+FFFD"));
  }
  owned_ = true;
  if (!kept.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(WriteFile(absl::StrCat(options_.output, "/", kIndexFile), index));
  progress_.index_bytes = static_cast<int64_t>(index.size());
  progress_.index_crc = Crc32c(index);
  return absl::OkStatus();
}

// Whether the tokenizer and the shards that the progress speaks of are all there.
bool Preparation::IsWritten() {
  if (!progress_.written) return false;
  const absl::StatusOr<uint32_t> crc = FileCrc((folder_ / kTokenizerFile).string());
  if (!crc.ok() || int64_t{*crc} != progress_.tokenizer_crc) return false;
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = LoadCorpusTokenizer(options_.output, *progress_.written);
  if (!tokenizer.ok()) return false;
  for (const char* split : kSplitNames) {
    if (!CorpusReader::OpenWith(options_.output, *progress_.written, split).ok()) return false;
  }
  if (tokenizer_ == nullptr) tokenizer_ = *std::move(tokenizer);
  return true;
}

// Only now is the corpus that was there cleared away: the input is known to be good.
absl::Status Preparation::BeginWriting() {
  cleared_ = true;
  RETURN_IF_ERROR(ClearCorpus(folder_));
  const std::string tokenizer = tokenizer_->Serialize();
  RETURN_IF_ERROR(WriteFile((folder_ / kTokenizerFile).string(), tokenizer));
  Manifest manifest;
  manifest.documents = tokens_ != nullptr ? "tokens" : Name(source_->mode());
  manifest.sources = names_;
  manifest.source_files = static_cast<int64_t>(names_.size());
  manifest.tokenizer = tokenizer_->name();
  manifest.tokenizer_hash = tokenizer_->hash();
  manifest.vocab_size = tokenizer_->vocab_size();
  manifest.end_of_document = tokenizer_->end_of_document();
  manifest.seed = options_.seed;
  manifest.split = options_.split;
  manifest.invalid_utf8 = Name(options_.invalid_utf8);
  for (size_t s = 0; s < 3; ++s) manifest.splits[s].name = kSplitNames[s];
  progress_ = {.request = progress_.request,
               .index_bytes = progress_.index_bytes,
               .index_crc = progress_.index_crc,
               .written = std::move(manifest),
               .tokenizer_crc = Crc32c(tokenizer)};
  return Save();
}

// Adds one document. Where a document is long, or the batch full, calls `turn`, which takes the batch away.
absl::Status Preparation::ReadParts(int64_t document, const std::function<absl::Status()>& turn, Batch* batch) {
  const auto add = [&](Batch::Kind kind) -> absl::Status {
    batch->parts.push_back({kind, batch->text.size(), batch->ids.size()});
    return batch->IsFull() ? turn() : absl::OkStatus();
  };
  if (tokens_ != nullptr) {
    tokens_->Read(document, &ids_);
    ASSIGN_OR_RETURN(const std::string text, tokenizer_->Decode(ids_));
    batch->text += text;
    batch->ids.insert(batch->ids.end(), ids_.begin(), ids_.end());
    RETURN_IF_ERROR(add(Batch::Kind::kStart));
    batch->ids.push_back(tokenizer_->end_of_document());
    return add(Batch::Kind::kEnd);
  }
  Batch::Kind kind = Batch::Kind::kStart;
  RETURN_IF_ERROR(source_->ReadDocument(document, [&](absl::string_view text) {
    batch->text.append(text.data(), text.size());
    return add(std::exchange(kind, Batch::Kind::kMore));
  }));
  return add(Batch::Kind::kEnd);
}

void Preparation::Encode(Batch* batch) const {
  if (tokens_ != nullptr) return;
  size_t begin = 0;
  for (Batch::Part& part : batch->parts) {
    const absl::string_view text = absl::string_view(batch->text).substr(begin, part.text_end - begin);
    if (part.kind == Batch::Kind::kEnd) {
      batch->ids.push_back(tokenizer_->end_of_document());
    } else {
      tokenizer_->EncodePart(text, part.kind == Batch::Kind::kMore, &batch->ids);
    }
    part.ids_end = batch->ids.size();
    begin = part.text_end;
  }
}

// Parts that shards hold already are passed over; of the first other one, as many tokens as they have.
absl::Status Preparation::WritePart(Batch::Kind kind, absl::string_view text, absl::Span<const int32_t> ids,
                                    SplitWriter* writer) {
  SplitInfo& info = writer->info();
  const int64_t words = words_.Count(text);
  if (part_ < first_part_ && kind != Batch::Kind::kEnd) {
    ++part_;
    return absl::OkStatus();
  }
  const int64_t first_token = part_ == first_part_ ? std::exchange(progress_.token, 0) : 0;
  if (part_ < first_part_ || first_token > static_cast<int64_t>(ids.size())) {
    return absl::FailedPreconditionError("the input was changed while it was read");
  }
  progress_.part = part_;
  progress_.token = first_token;
  RETURN_IF_ERROR(writer->Append(ids.subspan(static_cast<size_t>(first_token))));
  progress_.token = 0;
  ++part_;
  info.bytes += static_cast<int64_t>(text.size());
  info.words += words;
  if (tokenizer_->unknown() >= 0) progress_.unknown += std::count(ids.begin(), ids.end(), tokenizer_->unknown());
  done_ += static_cast<int64_t>(text.size());
  if (options_.progress) options_.progress("writing", std::min(done_, size_), size_);
  if (kind != Batch::Kind::kEnd) return absl::OkStatus();
  ++info.documents;
  ++progress_.document;
  BeginDocument();
  return absl::OkStatus();
}

absl::Status Preparation::WriteBatch(const Batch& batch, SplitWriter* writer) {
  size_t text = 0, ids = 0;
  for (const Batch::Part& part : batch.parts) {
    RETURN_IF_ERROR(WritePart(part.kind, absl::string_view(batch.text).substr(text, part.text_end - text),
                              absl::MakeConstSpan(batch.ids).subspan(ids, part.ids_end - ids), writer));
    text = part.text_end;
    ids = part.ids_end;
  }
  return absl::OkStatus();
}

// While one batch is encoded by a thread of its own, the one before it is written and the next one read.
absl::Status Preparation::WriteSplit(int64_t split, int64_t documents, int64_t first_document) {
  SplitWriter* at = nullptr;
  int64_t first_token = 0;
  SplitInfo& written = progress_.written->splits[split];
  SplitWriter writer(options_, *tokenizer_, split, written, [&]() -> absl::Status {
    written = at->info();
    first_token = progress_.token;
    progress_.token += at->taken();
    RETURN_IF_ERROR(Save());
    progress_.token = first_token;
    return absl::OkStatus();
  });
  at = &writer;
  Batch read, encoded;
  std::future<void> encoder;  // Of `encoded`; ends before that does.
  const auto turn = [&]() -> absl::Status {
    if (encoder.valid()) encoder.get();
    std::swap(read, encoded);
    encoder = std::async(std::launch::async | std::launch::deferred, [&] { Encode(&encoded); });
    RETURN_IF_ERROR(WriteBatch(read, &writer));
    read.Clear();
    return absl::OkStatus();
  };
  first_part_ = progress_.part;
  for (int64_t document = progress_.document; document < documents; ++document) {
    RETURN_IF_ERROR(ReadParts((*order_)(first_document + document), turn, &read));
  }
  RETURN_IF_ERROR(turn());
  RETURN_IF_ERROR(turn());
  ASSIGN_OR_RETURN(written, writer.Finish());
  progress_.split = split + 1;
  progress_.document = 0;
  return Save();
}

absl::Status Preparation::Count() {
  while (progress_.counted < 3) {
    SplitInfo& split = progress_.written->splits[progress_.counted];
    ASSIGN_OR_RETURN(const std::unique_ptr<CorpusReader> reader,
                     CorpusReader::OpenWith(options_.output, *progress_.written, split.name));
    ASSIGN_OR_RETURN(const TokenStatistics statistics, MeasureSplit(*reader, Phase("counting")));
    split.unigram_entropy = statistics.unigram_entropy;
    split.bigram_entropy = statistics.bigram_entropy;
    ++progress_.counted;
    RETURN_IF_ERROR(Save());
  }
  return absl::OkStatus();
}

absl::Status Preparation::Prepare() {
  RETURN_IF_ERROR(Lock());
  ASSIGN_OR_RETURN(const bool unfinished, FindUnfinished());
  RETURN_IF_ERROR(OpenInput(unfinished));
  const int64_t num_documents = tokens_ != nullptr ? tokens_->num_documents() : source_->num_documents();
  size_ = tokens_ != nullptr ? tokens_->num_tokens() : source_->size_bytes();
  ASSIGN_OR_RETURN(const auto counts,
                   DivideDocuments(num_documents, names_.size() == 1 ? names_[0] : "the input",
                                   tokens_ != nullptr ? "tokens" : Name(source_->mode()), options_.split));
  SweepTemporary(folder_);
  if (!saved_) RETURN_IF_ERROR(Save());  // The input is good.
  order_ = std::make_unique<Permutation>(num_documents, options_.seed, kShuffleStream);
  if (IsWritten()) {
    cleared_ = true;
    for (const SplitInfo& split : progress_.written->splits) done_ += split.bytes;
    Note(absl::StrCat(options_.output, ": going on, ", FormatCount(done_), " of about ", FormatCount(size_),
                      " bytes are written"));
  } else {
    if (unfinished) Note(absl::StrCat(options_.output, ": going on, the text is read"));
    if (tokenizer_ == nullptr) {
      ASSIGN_OR_RETURN(tokenizer_, TrainTokenizer(options_, *order_, counts[0], source_.get()));
    }
    RETURN_IF_ERROR(BeginWriting());
  }
  int64_t first_document = 0;
  for (int64_t s = 0; s < 3; ++s) {
    const int64_t documents = counts[static_cast<size_t>(s)];
    if (s >= progress_.split) RETURN_IF_ERROR(WriteSplit(s, documents, first_document));
    first_document += documents;
  }
  if (options_.progress) options_.progress("writing", size_, size_);
  if (progress_.unknown > 0 && options_.warning) {
    options_.warning(absl::StrCat(FormatCount(progress_.unknown),
                                  " characters are not in the vocabulary and became <unk> (it was made from the train "
                                  "split or another text)"));
  }
  RETURN_IF_ERROR(Count());
  RETURN_IF_ERROR(WriteFile((folder_ / kManifestFile).string(), progress_.written->Serialize()));
  ClearUnfinished(folder_).IgnoreError();  // The corpus is whole without that.
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Manifest> PrepareCorpus(const PrepOptions& options) { return Preparation(options).Run(); }

}  // namespace mt
