#include "bench/lab/suite.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

namespace fs = std::filesystem;

constexpr char kSuffix[] = ".textproto";
constexpr int64_t kMaxSuiteBytes = int64_t{1} << 20;
constexpr int kMaxRuns = 1000;
constexpr size_t kMaxName = 100;

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text_.empty()) text_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

bool IsRunName(const std::string& name) {
  return !name.empty() && name.size() <= kMaxName && name[0] != '.' && absl::c_all_of(name, [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '.';
  });
}

absl::Status Check(const std::string& path, const proto::Suite& suite) {
  const auto bad = [&](absl::string_view fact) { return absl::InvalidArgumentError(absl::StrCat(path, ": ", fact)); };
  if (suite.name().empty()) return bad("name is missing");
  if (suite.model().empty()) return bad("model is missing: a zoo model (mtc models) or a file");
  if (suite.runs().empty()) return bad("it has no runs");
  if (suite.runs_size() > kMaxRuns) return bad(absl::StrCat("it has ", suite.runs_size(), " runs; at most ", kMaxRuns));
  if (suite.batch() < 0 || suite.seq() < 0) return bad("batch and seq must not be negative");
  std::set<std::string> names;
  for (const proto::RunSpec& run : suite.runs()) {
    if (!IsRunName(run.name())) {
      return bad(absl::StrCat("\"", run.name(), "\" cannot name a run; expected letters, digits, '_', '-' or '.', ",
                              "at most ", kMaxName, " of them"));
    }
    if (!names.insert(run.name()).second) return bad(absl::StrCat("two runs are called ", run.name()));
    if (run.batch() < 0) return bad(absl::StrCat("run ", run.name(), ": batch must not be negative"));
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<std::string> KnownSuites() {
  std::vector<std::string> names;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(SuitesFolder(), error)) {
    const std::string file = entry.path().filename().string();
    if (absl::EndsWith(file, kSuffix)) names.push_back(file.substr(0, file.size() - sizeof(kSuffix) + 1));
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<proto::Suite> LoadSuite(const std::string& suite) {
  std::error_code ignored;
  std::string path = suite;
  if (!fs::is_regular_file(path, ignored)) {
    path = absl::StrCat(SuitesFolder(), "/", suite, kSuffix);
    if (absl::StrContains(suite, "/") || !fs::is_regular_file(path, ignored)) {
      const std::vector<std::string> known = KnownSuites();
      const std::string near = DidYouMean(suite, known);
      return absl::NotFoundError(absl::StrCat("\"", suite, "\" is neither a file nor a suite that comes with mt",
                                              near.empty() ? "" : absl::StrCat("; did you mean ", near, "?"),
                                              " (suites: ", absl::StrJoin(known, ", "), ")"));
    }
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxSuiteBytes));
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.SetRecursionLimit(16);
  proto::Suite parsed;
  if (!parser.ParseFromString(text, &parsed)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.text()));
  }
  RETURN_IF_ERROR(Check(path, parsed));
  return parsed;
}

absl::StatusOr<std::vector<proto::RunSpec>> ChooseRuns(const proto::Suite& suite, const std::vector<std::string>& only,
                                                       const std::vector<std::string>& skip) {
  std::vector<std::string> names;
  for (const proto::RunSpec& run : suite.runs()) names.push_back(run.name());
  const auto check = [&](absl::string_view flag, const std::vector<std::string>& wanted) -> absl::Status {
    for (const std::string& name : wanted) {
      if (absl::c_linear_search(names, name)) continue;
      const std::string near = DidYouMean(name, names);
      return absl::InvalidArgumentError(absl::StrCat(
          "--", flag, " ", name, ": suite ", suite.name(), " has no such run",
          near.empty() ? "" : absl::StrCat("; did you mean ", near, "?"), " (runs: ", absl::StrJoin(names, ", "), ")"));
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(check("only", only));
  RETURN_IF_ERROR(check("skip", skip));
  std::vector<proto::RunSpec> chosen;
  for (const proto::RunSpec& run : suite.runs()) {
    const bool wanted = only.empty() || absl::c_linear_search(only, run.name());
    if (wanted && !absl::c_linear_search(skip, run.name())) chosen.push_back(run);
  }
  if (chosen.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--only and --skip leave no run of suite ", suite.name()));
  }
  return chosen;
}

}  // namespace mt
