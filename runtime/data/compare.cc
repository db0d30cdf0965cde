#include "runtime/data/compare.h"

#include <time.h>

#include <algorithm>
#include <utility>

#include "absl/types/span.h"
#include "ir/base/status_macros.h"
#include "runtime/data/prep.h"
#include "runtime/data/words.h"

namespace mt {
namespace {

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace

TextScan ScanOf(TextSource* source) {
  return [source](const auto& sink) -> absl::Status {
    for (int64_t i = 0; i < source->num_documents(); ++i) {
      bool continued = false;
      RETURN_IF_ERROR(
          source->ReadDocument(i, [&](absl::string_view part) { return sink(part, std::exchange(continued, true)); }));
    }
    return absl::OkStatus();
  };
}

TextScan ScanOf(const CorpusReader* reader, const Tokenizer* tokenizer) {
  return [reader, tokenizer](const auto& sink) -> absl::Status {
    constexpr int64_t kPart = int64_t{1} << 18;
    std::vector<int32_t> tokens;
    std::vector<int32_t> document;
    for (int64_t first = 0; first < reader->num_tokens(); first += kPart) {
      tokens.resize(static_cast<size_t>(std::min(kPart, reader->num_tokens() - first)));
      RETURN_IF_ERROR(reader->Read(first, absl::MakeSpan(tokens)));
      for (const int32_t token : tokens) {
        if (token != tokenizer->end_of_document()) {
          document.push_back(token);
          continue;
        }
        ASSIGN_OR_RETURN(const std::string text, tokenizer->Decode(document));
        RETURN_IF_ERROR(sink(text, /*continued=*/false));
        document.clear();
      }
    }
    return absl::OkStatus();
  };
}

absl::StatusOr<TokenizerReport> ReportTokenizer(const Tokenizer& tokenizer, const TextScan& scan) {
  TokenizerReport report{.name = tokenizer.name(), .hash = tokenizer.hash(), .vocab_size = tokenizer.vocab_size()};
  std::vector<int32_t> ids;
  WordCounter words;
  RETURN_IF_ERROR(scan([&](absl::string_view text, bool continued) {
    ids.clear();
    const double start = ThreadSeconds();
    tokenizer.EncodePart(text, continued, &ids);
    report.encode_seconds += ThreadSeconds() - start;
    if (!continued) words = {};
    report.documents += !continued;
    report.bytes += static_cast<int64_t>(text.size());
    report.words += words.Count(text);
    report.tokens += static_cast<int64_t>(ids.size());
    if (tokenizer.unknown() >= 0) report.unknown += std::count(ids.begin(), ids.end(), tokenizer.unknown());
    return absl::OkStatus();
  }));
  return report;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerFor(const std::string& spec, const TextScan& training,
                                                        int64_t training_bytes) {
  if (!IsTrainedTokenizer(spec)) return NamedTokenizer(spec);
  ASSIGN_OR_RETURN(const std::unique_ptr<TokenizerTrainer> trainer, NewTokenizerTrainer(spec));
  int64_t bytes = 0;
  const absl::Status status = training([&](absl::string_view text, bool /*continued*/) {
    if (bytes >= training_bytes && spec != "char") return absl::CancelledError("");
    trainer->Add(text);
    bytes += static_cast<int64_t>(text.size());
    return absl::OkStatus();
  });
  if (!absl::IsCancelled(status)) RETURN_IF_ERROR(status);
  return trainer->Train();
}

}  // namespace mt
