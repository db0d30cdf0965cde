#include "runtime/data/mtcorpus.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "ir/base/flags.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"
#include "ir/base/units.h"
#include "ir/base/utf8.h"
#include "runtime/data/compare.h"
#include "runtime/data/hub.h"
#include "runtime/data/prep.h"

namespace mt {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// A bar on a terminal; elsewhere one line when a phase ends, and one every half minute of a long one.
class Progress {
 public:
  void operator()(absl::string_view phase, int64_t done, int64_t total) {
    const double now = Now();
    if (phase != phase_ || done < done_) {
      EndLine();
      phase_ = std::string(phase);
      start_seconds_ = now;
      last_seconds_ = now;
      ended_ = false;
    }
    done_ = done;
    const bool end = done >= total;
    if (ended_ || (!end && now - last_seconds_ < (terminal_ ? 0.1 : 30.0))) return;
    last_seconds_ = now;
    ended_ = end;
    const double seconds = std::max(now - start_seconds_, 1e-6);
    const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
    const bool tokens = phase_ == "counting";
    const std::string rate = tokens ? absl::StrFormat("%.0f M tokens/s", static_cast<double>(done) / seconds / 1e6)
                                    : absl::StrFormat("%.0f MiB/s", static_cast<double>(done) / seconds / (1 << 20));
    if (!terminal_) {
      if (tokens && seconds < 5) return;
      absl::FPrintF(stderr, "%s: %s, %3.0f %%, %s, %s\n", phase_,
                    tokens ? absl::StrCat(FormatCount(done), " tokens") : FormatBytes(done), 100 * share, rate,
                    FormatDuration(seconds));
      return;
    }
    const int width = 30;
    const int full = static_cast<int>(share * width);
    absl::FPrintF(stderr, "\r%-18s [%s%s] %3.0f %%  %s  ETA %s\033[K", phase_, std::string(full, '#'),
                  std::string(width - full, '.'), 100 * share, rate,
                  FormatDuration(share > 0 ? seconds * (1 - share) / share : 0));
    drawn_ = true;
    if (end && !tokens) EndLine();
  }
  void EndLine() {
    if (drawn_) absl::FPrintF(stderr, phase_ == "counting" ? "\r\033[K" : "\n");
    drawn_ = false;
  }

 private:
  const bool terminal_ = ::isatty(STDERR_FILENO) != 0;
  std::string phase_;
  int64_t done_ = 0;
  double start_seconds_ = 0;
  double last_seconds_ = 0;
  bool ended_ = false;
  bool drawn_ = false;
};

// The flags that prep and stat share.
PrepOptions CommonOptions(const ParsedArgs& args, Progress* progress) {
  PrepOptions options;
  options.input = args.String("input");
  options.tokenizer = args.String("tokenizer");
  options.tokenizer_bytes = args.Bytes("tokenizer-bytes");
  const std::string documents = args.String("documents");
  options.documents = documents == "file"         ? DocumentMode::kFile
                      : documents == "blank-line" ? DocumentMode::kBlankLine
                      : documents == "line"       ? DocumentMode::kLine
                      : documents == "record"     ? DocumentMode::kRecord
                                                  : DocumentMode::kAuto;
  options.text_field = args.String("text-field");
  const std::string invalid = args.String("invalid-utf8");
  options.invalid_utf8 = invalid == "replace" ? InvalidUtf8::kReplace
                         : invalid == "skip"  ? InvalidUtf8::kSkip
                                              : InvalidUtf8::kError;
  options.progress = [progress](absl::string_view phase, int64_t done, int64_t total) {
    (*progress)(phase, done, total);
  };
  options.warning = [progress](const std::string& line) {
    progress->EndLine();
    absl::FPrintF(stderr, "warning: %s\n", line);
  };
  options.note = [progress](const std::string& line) {
    progress->EndLine();
    absl::FPrintF(stderr, "%s\n", line);
  };
  return options;
}

// "2.303 (10.0)": nats and their perplexity.
std::string Nats(double nats) { return absl::StrFormat("%.4f (ppl %.1f)", nats, std::exp(nats)); }

double Ratio(int64_t a, int64_t b) { return b == 0 ? 0 : static_cast<double>(a) / static_cast<double>(b); }

void PrintSplits(const Manifest& manifest) {
  absl::PrintF("tokenizer %s, vocabulary %s, hash %016x\n", manifest.tokenizer, FormatCount(manifest.vocab_size),
               manifest.tokenizer_hash);
  absl::PrintF("%-6s %12s %15s %15s %11s %11s  %-21s %-21s\n", "split", "documents", "tokens", "bytes", "bytes/token",
               "tokens/word", "unigram nats", "bigram nats");
  for (const SplitInfo& split : manifest.splits) {
    if (split.tokens == 0) continue;
    absl::PrintF("%-6s %12s %15s %15s %11.3f %11.3f  %-21s %-21s\n", split.name, FormatCount(split.documents),
                 FormatCount(split.tokens), FormatCount(split.bytes), Ratio(split.bytes, split.tokens),
                 Ratio(split.tokens, split.words), Nats(split.unigram_entropy), Nats(split.bigram_entropy));
  }
}

// A token as one line of printable text.
std::string Printable(absl::string_view bytes) {
  std::string out = "\"";
  while (!bytes.empty()) {
    const Utf8Char c = DecodeUtf8(bytes);
    const absl::string_view piece = bytes.substr(0, static_cast<size_t>(c.size_bytes));
    if (c.code_point == '\n') {
      out += "\\n";
    } else if (c.code_point == '"' || c.code_point == '\\') {
      absl::StrAppend(&out, "\\", piece);
    } else if (c.code_point < 0x20 || (c.code_point >= 0x7F && c.code_point < 0xA0)) {
      for (const char byte : piece) absl::StrAppend(&out, absl::StrFormat("\\x%02x", static_cast<uint8_t>(byte)));
    } else {
      out.append(piece.data(), piece.size());
    }
    bytes.remove_prefix(piece.size());
  }
  return out + "\"";
}

struct CommonToken {
  int32_t id;
  int64_t count;
};

std::vector<CommonToken> MostCommon(const std::vector<int64_t>& counts, int64_t wanted) {
  std::vector<CommonToken> tokens;
  for (size_t id = 0; id < counts.size(); ++id) {
    if (counts[id] > 0) tokens.push_back({static_cast<int32_t>(id), counts[id]});
  }
  const size_t n = std::min(tokens.size(), static_cast<size_t>(wanted));
  std::partial_sort(
      tokens.begin(), tokens.begin() + static_cast<int64_t>(n), tokens.end(),
      [](const CommonToken& a, const CommonToken& b) { return a.count != b.count ? a.count > b.count : a.id < b.id; });
  tokens.resize(n);
  return tokens;
}

absl::Status ShowCorpus(const std::string& folder, const ParsedArgs& args, Progress* progress) {
  ASSIGN_OR_RETURN(Manifest manifest, ReadManifest(folder));
  ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer, LoadCorpusTokenizer(folder, manifest));
  std::vector<std::vector<CommonToken>> common;
  for (SplitInfo& split : manifest.splits) {
    ASSIGN_OR_RETURN(const std::unique_ptr<CorpusReader> reader, CorpusReader::Open(folder, split.name));
    ASSIGN_OR_RETURN(const TokenStatistics statistics, MeasureSplit(*reader, [progress](int64_t done, int64_t total) {
                       (*progress)("counting", done, total);
                     }));
    split.unigram_entropy = statistics.unigram_entropy;
    split.bigram_entropy = statistics.bigram_entropy;
    common.push_back(MostCommon(statistics.counts, args.Int("top")));
  }
  progress->EndLine();
  if (args.Bool("json")) {
    nlohmann::ordered_json json;
    json["vocab_size"] = manifest.vocab_size;
    json["tokenizer"] = manifest.tokenizer;
    json["tokenizer_hash"] = absl::StrFormat("%016x", manifest.tokenizer_hash);
    for (size_t s = 0; s < 3; ++s) {
      const SplitInfo& split = manifest.splits[s];
      nlohmann::ordered_json& out = json["splits"][split.name];
      out = {{"documents", split.documents},
             {"tokens", split.tokens},
             {"bytes", split.bytes},
             {"words", split.words},
             {"bytes_per_token", Ratio(split.bytes, split.tokens)},
             {"tokens_per_word", Ratio(split.tokens, split.words)},
             {"unigram_entropy", split.unigram_entropy},
             {"unigram_perplexity", std::exp(split.unigram_entropy)},
             {"bigram_entropy", split.bigram_entropy},
             {"bigram_perplexity", std::exp(split.bigram_entropy)}};
      out["most_common"] = nlohmann::ordered_json::array();
      for (const CommonToken& token : common[s]) {
        out["most_common"].push_back(
            {{"id", token.id}, {"text", std::string(tokenizer->TokenBytes(token.id))}, {"count", token.count}});
      }
    }
    absl::PrintF("%s\n", json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    return absl::OkStatus();
  }
  PrintSplits(manifest);
  for (size_t s = 0; s < 3; ++s) {
    const SplitInfo& split = manifest.splits[s];
    if (common[s].empty()) continue;
    absl::PrintF("\nmost common tokens of %s\n", split.name);
    for (const CommonToken& token : common[s]) {
      absl::PrintF("%12s %6.2f %%  %7d  %s\n", FormatCount(token.count), 100 * Ratio(token.count, split.tokens),
                   token.id, Printable(tokenizer->TokenBytes(token.id)));
    }
  }
  return absl::OkStatus();
}

absl::Status Prep(const ParsedArgs& args) {
  Progress progress;
  PrepOptions options = CommonOptions(args, &progress);
  options.output = args.String("out");
  if (options.input.empty() || options.output.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("prep needs --", options.input.empty() ? "input" : "out",
                                                   ", as in: mtcorpus prep --input book.txt --out corpus"));
  }
  options.split.clear();
  for (const std::string& share : args.Strings("split")) {
    double value = 0;
    if (!absl::SimpleAtod(share, &value)) {
      return absl::InvalidArgumentError(absl::StrCat("--split: \"", share, "\" is not a number; use 85,10,5"));
    }
    options.split.push_back(value);
  }
  options.seed = static_cast<uint64_t>(args.Int("seed"));
  options.shard_tokens = args.Int("shard-tokens");
  options.overwrite = args.Bool("overwrite");
  absl::StatusOr<Manifest> manifest = PrepareCorpus(options);
  progress.EndLine();
  RETURN_IF_ERROR(manifest);
  PrintSplits(*manifest);
  absl::PrintF("wrote %s\n", options.output);
  return absl::OkStatus();
}

// A folder that goes away again.
class TemporaryFolder {
 public:
  static absl::StatusOr<std::unique_ptr<TemporaryFolder>> Create() {
    std::error_code error;
    std::string path = (std::filesystem::temp_directory_path(error) / "mtcorpus-XXXXXX").string();
    if (error || ::mkdtemp(path.data()) == nullptr) {
      return absl::DataLossError(absl::StrCat(path, ": cannot create a temporary folder; set TMPDIR"));
    }
    return absl::WrapUnique(new TemporaryFolder(path));
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// `on`: what was encoded.
void PrintReports(const std::vector<TokenizerReport>& reports, const std::string& on, bool json) {
  const auto speed = [](const TokenizerReport& report) {
    return report.encode_seconds > 0 ? static_cast<double>(report.bytes) / report.encode_seconds / 1e6 : 0;
  };
  if (json) {
    nlohmann::ordered_json out = {{"text", on},
                                  {"documents", reports[0].documents},
                                  {"bytes", reports[0].bytes},
                                  {"words", reports[0].words},
                                  {"tokenizers", nlohmann::ordered_json::array()}};
    for (const TokenizerReport& report : reports) {
      out["tokenizers"].push_back({{"tokenizer", report.spec},
                                   {"name", report.name},
                                   {"hash", absl::StrFormat("%016x", report.hash)},
                                   {"vocab_size", report.vocab_size},
                                   {"tokens", report.tokens},
                                   {"tokens_per_word", Ratio(report.tokens, report.words)},
                                   {"bytes_per_token", Ratio(report.bytes, report.tokens)},
                                   {"unknown", report.unknown},
                                   {"encode_megabytes_per_second", speed(report)}});
    }
    absl::PrintF("%s\n", out.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    return;
  }
  absl::PrintF("%s: %s documents, %s bytes, %s words\n", on, FormatCount(reports[0].documents),
               FormatCount(reports[0].bytes), FormatCount(reports[0].words));
  size_t width = 9;
  for (const TokenizerReport& report : reports) width = std::max(width, report.spec.size());
  absl::PrintF("%-*s %10s %15s %11s %11s %11s %11s\n", width, "tokenizer", "vocabulary", "tokens", "tokens/word",
               "bytes/token", "unknown", "encode MB/s");
  for (const TokenizerReport& report : reports) {
    absl::PrintF("%-*s %10s %15s %11.3f %11.3f %11s %11.1f\n", width, report.spec, FormatCount(report.vocab_size),
                 FormatCount(report.tokens), Ratio(report.tokens, report.words), Ratio(report.bytes, report.tokens),
                 FormatCount(report.unknown), speed(report));
  }
}

// stat --tokenizer A,B: each on the text, or on the val split of a corpus (the train split where val is empty), after
// the corpus's own. Learned ones learn from the text, or from the train split.
absl::Status CompareTokenizers(const std::string& path, bool is_corpus, const ParsedArgs& args, Progress* progress) {
  const PrepOptions options = CommonOptions(args, progress);
  std::vector<TokenizerReport> reports;
  std::unique_ptr<TemporaryFolder> temporary;
  std::unique_ptr<TextSource> source;
  std::unique_ptr<Tokenizer> own;
  std::unique_ptr<CorpusReader> train, val;
  TextScan training, measured;
  std::string on = path;
  if (is_corpus) {
    ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(path));
    ASSIGN_OR_RETURN(own, LoadCorpusTokenizer(path, manifest));
    ASSIGN_OR_RETURN(train, CorpusReader::Open(path, "train"));
    ASSIGN_OR_RETURN(val, CorpusReader::Open(path, "val"));
    training = ScanOf(train.get(), own.get());
    measured = val->num_tokens() > 0 ? ScanOf(val.get(), own.get()) : training;
    absl::StrAppend(&on, val->num_tokens() > 0 ? ", val" : ", train");
    ASSIGN_OR_RETURN(reports.emplace_back(), ReportTokenizer(*own, measured));
    reports.back().spec = "its own";
  } else {
    ASSIGN_OR_RETURN(temporary, TemporaryFolder::Create());
    ASSIGN_OR_RETURN(
        source, TextSource::Open(
                    path, temporary->path(), options.documents, options.invalid_utf8,
                    [&](int64_t done, int64_t total) { (*progress)("reading", done, total); }, options.text_field));
    training = measured = ScanOf(source.get());
    if (path == "-") on = "standard input";
  }
  for (const absl::string_view spec : absl::StrSplit(args.String("tokenizer"), ',')) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
        TokenizerFor(std::string(spec), training, options.tokenizer_bytes);
    RETURN_IF_ERROR(tokenizer);
    ASSIGN_OR_RETURN(reports.emplace_back(), ReportTokenizer(**tokenizer, measured));
    reports.back().spec = std::string(spec);
  }
  progress->EndLine();
  PrintReports(reports, on, args.Bool("json"));
  return absl::OkStatus();
}

absl::Status Stat(const ParsedArgs& args) {
  const bool named = !args.positionals().empty();
  if (named == args.Has("input")) {
    return absl::InvalidArgumentError("stat needs either the folder of a corpus or --input FILE");
  }
  Progress progress;
  std::error_code error;
  const std::string path = named ? args.positional(0) : args.String("input");
  const bool is_corpus = named && !std::filesystem::is_regular_file(path, error);
  // One tokenizer of a text is shown as the corpus that it makes.
  const bool several = absl::StrContains(args.String("tokenizer"), ',');
  if (args.Has("tokenizer") && (is_corpus || several)) return CompareTokenizers(path, is_corpus, args, &progress);
  if (is_corpus) return ShowCorpus(path, args, &progress);
  ASSIGN_OR_RETURN(const std::unique_ptr<TemporaryFolder> temporary, TemporaryFolder::Create());
  PrepOptions options = CommonOptions(args, &progress);
  options.input = path;
  options.output = temporary->path();
  options.split = {100, 0, 0};
  absl::StatusOr<Manifest> manifest = PrepareCorpus(options);
  progress.EndLine();
  RETURN_IF_ERROR(manifest);
  return ShowCorpus(temporary->path(), args, &progress);
}

DownloadOptions FromEnvironment(Progress* progress) {
  DownloadOptions options;
  const char* token = std::getenv("HF_TOKEN");
  options.bearer = token == nullptr ? "" : token;
  options.progress = [progress](int64_t done, int64_t total) {
    (*progress)("downloading", done, std::max(total, done + (total == 0)));
  };
  return options;
}

absl::Status List(const ParsedArgs& args) {
  DownloadOptions options;
  const std::string base = args.Has("base-url") ? args.String("base-url") : kSpeakleashUrl;
  if (args.positionals().empty()) {
    ASSIGN_OR_RETURN(const std::vector<std::string> names, ListSpeakleash(base, options));
    for (const std::string& name : names) absl::PrintF("%s\n", name);
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const SpeakleashCorpus corpus, DescribeSpeakleash(base, args.positional(0), options));
  const auto plain = [](const std::string& text) {
    std::string out;
    for (const char c : text) out += c >= 0 && c < ' ' ? ' ' : c;  // Nothing that drives a terminal.
    return out;
  };
  absl::PrintF("name        %s\nsize        %s\ndocuments   %s\ncharacters  %s\nHIGH        %.1f %%\n", corpus.name,
               FormatBytes(corpus.file_bytes), FormatCount(corpus.documents), FormatCount(corpus.characters),
               100 * corpus.high_quality);
  absl::PrintF("category    %s\nlicense     %s\n%s\n", plain(corpus.category), plain(corpus.license),
               plain(corpus.description));
  return absl::OkStatus();
}

absl::Status Get(const ParsedArgs& args) {
  Progress progress;
  DownloadOptions options = FromEnvironment(&progress);
  absl::string_view name = args.positional(0);
  if (absl::ConsumePrefix(&name, "hf:")) {
    if (args.Has("quality") || args.Has("limit")) {
      return absl::InvalidArgumentError("--quality and --limit choose documents of a Speakleash corpus, not of hf:");
    }
    const std::string folder = args.String("out").empty() ? HubCacheFolder(std::string(name)) : args.String("out");
    absl::StatusOr<std::vector<std::string>> paths = GetHuggingFace(
        args.Has("base-url") ? args.String("base-url") : kHuggingFaceUrl, name, folder, HubFiles::kEverything, options);
    progress.EndLine();
    RETURN_IF_ERROR(paths);
    for (const std::string& path : *paths) absl::PrintF("%s\n", path);
    return absl::OkStatus();
  }
  options.bearer.clear();  // It is for Hugging Face.
  SpeakleashFilter filter{args.String("quality"), args.OptionalInt("limit")};
  const std::string folder = args.String("out").empty() ? "data/raw" : args.String("out");
  absl::StatusOr<std::string> path = GetSpeakleash(args.Has("base-url") ? args.String("base-url") : kSpeakleashUrl,
                                                   std::string(name), folder, filter, options);
  progress.EndLine();
  RETURN_IF_ERROR(path);
  absl::PrintF("%s\nprepare it: mtcorpus prep --input %s --out corpus\n", *path, ShellQuote(*path));
  return absl::OkStatus();
}

}  // namespace

int MtcorpusMain(int argc, char** argv) {
  std::signal(SIGXFSZ, SIG_IGN);  // A file size limit is a failed write like a full disk.
  return RunTool(kMtcorpus, argc, argv, [](const ParsedArgs& args) {
    if (args.command() == "list") return List(args);
    if (args.command() == "get") return Get(args);
    return args.command() == "prep" ? Prep(args) : Stat(args);
  });
}

}  // namespace mt
