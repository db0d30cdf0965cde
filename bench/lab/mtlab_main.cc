// mtlab: suites of experiments. Its table of flags is ir/base/tools_mtlab.cc.
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/lab/compare.h"
#include "bench/lab/results.h"
#include "bench/lab/runner.h"
#include "bench/lab/suite.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"

namespace mt {
namespace {

// Reads, prints and writes the comparison of a results folder.
absl::Status CompareFolder(const std::string& folder, const std::vector<std::string>& experiments, bool json) {
  ASSIGN_OR_RETURN(const std::vector<Result> results, ReadResults(folder, experiments));
  const std::string report = ComparisonReport(results);
  const std::string path = absl::StrCat(folder, "/experiment_summary.json");
  // The state of the last suite's runs stays.
  const absl::StatusOr<Json> before = ReadJson(path);
  Json summary = before.ok() ? *before : Json{{"version", kResultsVersion}};
  summary["results"] = ComparisonJson(results);
  RETURN_IF_ERROR(WriteJson(path, summary));
  RETURN_IF_ERROR(WriteFile(absl::StrCat(folder, "/comparison_report.txt"), report));
  if (json) {
    std::cout << summary.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
  } else {
    std::cout << report << "\nwrote " << folder << "/{experiment_summary.json,comparison_report.txt}\n";
  }
  return absl::OkStatus();
}

absl::Status RunCommand(const ParsedArgs& args) {
  ASSIGN_OR_RETURN(const proto::Suite suite, LoadSuite(args.positional(0)));
  ASSIGN_OR_RETURN(const std::vector<proto::RunSpec> runs,
                   ChooseRuns(suite, args.Strings("only"), args.Strings("skip")));
  SuiteOptions options;
  options.data = args.String("data");
  options.dataset = args.String("dataset");
  options.out = args.String("out");
  options.sets = args.Strings("set");
  options.batch = args.OptionalInt("batch");
  options.sequence = args.OptionalInt("seq");
  options.train_flags = args.forwarded();
  options.fresh = args.Bool("fresh");
  options.tools = ExecutableFolder();
  RETURN_IF_ERROR(RunSuite(suite, runs, options));
  std::vector<std::string> names;
  for (const proto::RunSpec& run : runs) names.push_back(run.name());
  std::cout << "\n";
  return CompareFolder(options.out, names, /*json=*/false);
}

absl::Status Suites() {
  for (const std::string& name : KnownSuites()) {
    ASSIGN_OR_RETURN(const proto::Suite suite, LoadSuite(name));
    std::cout << absl::StrFormat("%-12s %3d runs  %s\n", name, suite.runs_size(), suite.description());
  }
  return absl::OkStatus();
}

absl::Status Run(const ParsedArgs& args) {
  if (args.command() == "run") return RunCommand(args);
  if (args.command() == "compare") {
    return CompareFolder(args.String("results-dir"), args.Strings("experiments"), args.Bool("json"));
  }
  if (args.command() == "suites") return Suites();
  return absl::InternalError(absl::StrCat("command ", args.command(), " has no code"));
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) { return mt::RunTool(mt::kMtlab, argc, argv, mt::Run); }
