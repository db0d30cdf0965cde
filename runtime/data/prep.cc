#include "runtime/data/prep.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <memory>
#include <numeric>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "runtime/data/entropy.h"
#include "runtime/data/hub.h"
#include "runtime/data/permutation.h"
#include "runtime/data/shard.h"
#include "runtime/data/token_file.h"
#include "runtime/data/tokenizer_files.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSplitNames[] = {"train", "val", "test"};
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

bool IsTrained(const std::string& tokenizer) {
  return tokenizer == "char" || absl::string_view(tokenizer).substr(0, 4) == "bpe:";
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
  if (IsTrained(options.tokenizer) || (!IsTokenizerPath(options.tokenizer) && !IsHubName(options.tokenizer))) {
    RETURN_IF_ERROR(NewTokenizerTrainer(options.tokenizer));  // Says what a tokenizer can be.
  }
  return absl::OkStatus();
}

// Names that PrepareCorpus makes, temporary ones included.
bool IsCorpusFile(const std::string& name) {
  absl::string_view stem = name;
  stem = stem.substr(0, std::min(stem.size(), stem.find(".tmp-")));
  if (stem == kManifestFile || stem == kTokenizerFile || stem == "input")
    return stem != "input" || stem.size() != name.size();
  for (const char* split : kSplitNames) {
    absl::string_view rest = stem;
    if (!absl::ConsumePrefix(&rest, split) || !absl::ConsumePrefix(&rest, "-") || !absl::ConsumeSuffix(&rest, ".bin")) {
      continue;
    }
    return rest.size() >= 5 && rest.find_first_not_of("0123456789") == absl::string_view::npos;
  }
  return false;
}

// The manifest goes first: from here until the new one is written the folder is not a corpus.
absl::Status ClearCorpus(const std::string& folder) {
  std::error_code error;
  fs::remove(fs::path(folder) / kManifestFile, error);
  if (error) return absl::DataLossError(absl::StrCat(folder, "/", kManifestFile, ": cannot remove: ", error.message()));
  std::vector<fs::path> stale;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (IsCorpusFile(entry.path().filename().string())) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove(path, error);
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
  SplitWriter(const PrepOptions& options, const Tokenizer& tokenizer, int64_t split)
      : options_(options), tokenizer_(tokenizer), split_(split) {
    info_.name = kSplitNames[split];
  }

  absl::Status Append(absl::Span<const int32_t> tokens) {
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
      if (shard_->num_tokens() == options_.shard_tokens) RETURN_IF_ERROR(FinishShard());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<SplitInfo> Finish() {
    if (shard_ != nullptr) RETURN_IF_ERROR(FinishShard());
    return info_;
  }

  SplitInfo& info() { return info_; }

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
  std::unique_ptr<ShardWriter> shard_;
};

absl::StatusOr<std::unique_ptr<Tokenizer>> NamedTokenizer(const std::string& spec) {
  if (!IsHubName(spec)) return OpenTokenizer(spec);
  ASSIGN_OR_RETURN(const std::string fetched, FetchTokenizer(spec));
  return OpenTokenizer(fetched);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(const PrepOptions& options, const Permutation& order,
                                                         int64_t train_documents, TextSource* source) {
  if (!IsTrained(options.tokenizer)) return NamedTokenizer(options.tokenizer);
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

// Counts words that white space separates, across the parts of a document.
class WordCounter {
 public:
  int64_t Count(absl::string_view text) {
    int64_t words = 0;
    for (const char c : text) {
      const bool space = c == ' ' || (c >= '\t' && c <= '\r');
      words += !space && !in_word_;
      in_word_ = !space;
    }
    return words;
  }

 private:
  bool in_word_ = false;
};

}  // namespace

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

absl::StatusOr<Manifest> PrepareCorpus(const PrepOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  std::error_code ignored;
  const bool made_folder = !fs::exists(options.output, ignored);
  RETURN_IF_ERROR(MakeFolder(options.output));
  Manifest manifest;
  bool cleared = false;
  absl::Cleanup leave_nothing = [&] {
    if (cleared) ClearCorpus(options.output).IgnoreError();
    if (made_folder) fs::remove(options.output, ignored);  // Where it is empty.
  };
  if (!options.overwrite && fs::exists(fs::path(options.output) / kManifestFile, ignored)) {
    return absl::AlreadyExistsError(
        absl::StrCat(options.output, ": already holds a corpus; choose another --out, or replace it with --overwrite"));
  }
  const auto progress = [&](absl::string_view phase) {
    return [&options, phase](int64_t done, int64_t total) {
      if (options.progress) options.progress(phase, done, total);
    };
  };
  // Text to be encoded, or tokens as they are.
  std::unique_ptr<TextSource> source;
  std::unique_ptr<TokenFile> tokens;
  std::unique_ptr<Tokenizer> tokenizer;
  if (options.input != "-" && IsTokenFile(options.input)) {
    if (IsTrained(options.tokenizer)) {
      return absl::InvalidArgumentError(absl::StrCat(
          options.input, ": holds tokens, not text; name the tokenizer that made them, such as --tokenizer gpt2"));
    }
    ASSIGN_OR_RETURN(tokenizer, NamedTokenizer(options.tokenizer));
    ASSIGN_OR_RETURN(tokens, TokenFile::Open(options.input, *tokenizer));
    manifest.documents = "tokens";
    manifest.sources = {fs::path(options.input).filename().string()};
  } else {
    ASSIGN_OR_RETURN(source, TextSource::Open(options.input, options.output, options.documents, options.invalid_utf8,
                                              progress("reading"), options.text_field));
    if (source->invalid_parts() > 0 && options.warning) {
      options.warning(absl::StrCat(FormatCount(source->invalid_parts()), " places were not UTF-8 and were ",
                                   options.invalid_utf8 == InvalidUtf8::kSkip ? "skipped" : "replaced by U+FFFD"));
    }
    manifest.documents = Name(source->mode());
    manifest.sources = source->names();
  }
  const int64_t num_documents = tokens != nullptr ? tokens->num_documents() : source->num_documents();
  const int64_t size_bytes = tokens != nullptr ? tokens->num_tokens() : source->size_bytes();
  ASSIGN_OR_RETURN(const auto counts,
                   DivideDocuments(num_documents, manifest.sources.size() == 1 ? manifest.sources[0] : "the input",
                                   manifest.documents, options.split));
  const Permutation order(num_documents, options.seed, kShuffleStream);
  if (source != nullptr) {
    ASSIGN_OR_RETURN(tokenizer, MakeTokenizer(options, order, counts[0], source.get()));
  }
  cleared = true;  // Only now: the input is known to be good.
  RETURN_IF_ERROR(ClearCorpus(options.output));
  RETURN_IF_ERROR(WriteFile(absl::StrCat(options.output, "/", kTokenizerFile), tokenizer->Serialize()));

  int64_t document = 0;
  int64_t done_bytes = 0;
  int64_t unknown = 0;
  std::vector<int32_t> ids;
  for (size_t s = 0; s < 3; ++s) {
    SplitWriter writer(options, *tokenizer, static_cast<int64_t>(s));
    SplitInfo& info = writer.info();
    for (int64_t i = 0; i < counts[s]; ++i) {
      WordCounter words;
      bool continued = false;
      const auto write = [&](absl::string_view text) {
        if (tokenizer->unknown() >= 0) unknown += std::count(ids.begin(), ids.end(), tokenizer->unknown());
        info.bytes += static_cast<int64_t>(text.size());
        info.words += words.Count(text);
        done_bytes += static_cast<int64_t>(text.size());
        if (options.progress) {
          options.progress("writing", std::min(done_bytes, size_bytes), size_bytes);
        }
        return writer.Append(ids);
      };
      if (tokens != nullptr) {
        tokens->Read(order(document++), &ids);
        ASSIGN_OR_RETURN(const std::string text, tokenizer->Decode(ids));
        RETURN_IF_ERROR(write(text));
      } else {
        RETURN_IF_ERROR(source->ReadDocument(order(document++), [&](absl::string_view text) {
          ids.clear();
          tokenizer->EncodePart(text, continued, &ids);
          continued = true;
          return write(text);
        }));
      }
      RETURN_IF_ERROR(writer.Append({tokenizer->end_of_document()}));
      ++info.documents;
    }
    ASSIGN_OR_RETURN(manifest.splits[s], writer.Finish());
  }
  if (options.progress) options.progress("writing", size_bytes, size_bytes);
  if (unknown > 0 && options.warning) {
    options.warning(absl::StrCat(FormatCount(unknown),
                                 " characters are not in the vocabulary and became <unk> (it was made from the train "
                                 "split or another text)"));
  }

  manifest.tokenizer = tokenizer->name();
  manifest.tokenizer_hash = tokenizer->hash();
  manifest.vocab_size = tokenizer->vocab_size();
  manifest.end_of_document = tokenizer->end_of_document();
  manifest.seed = options.seed;
  manifest.split = options.split;
  manifest.invalid_utf8 = Name(options.invalid_utf8);
  manifest.source_files = static_cast<int64_t>(manifest.sources.size());
  for (SplitInfo& split : manifest.splits) {
    ASSIGN_OR_RETURN(const std::unique_ptr<CorpusReader> reader,
                     CorpusReader::OpenWith(options.output, manifest, split.name));
    ASSIGN_OR_RETURN(const TokenStatistics statistics, MeasureSplit(*reader, progress("counting")));
    split.unigram_entropy = statistics.unigram_entropy;
    split.bigram_entropy = statistics.bigram_entropy;
  }
  RETURN_IF_ERROR(WriteFile(absl::StrCat(options.output, "/", kManifestFile), manifest.Serialize()));
  std::move(leave_nothing).Cancel();
  return manifest;
}

}  // namespace mt
