// Draws one training step of gpt2_wide32k, written out and with flash and remat, on one axis: the pictures of the
// README.
//
//   chart_bench [--output DIR] [--batch N]     DIR: bench/results where that is a folder, else this one
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "codegen/compile.h"
#include "codegen/report/report.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "models/model.h"

namespace mt {
namespace {

constexpr char kModel[] = "gpt2_wide32k";

absl::Status Draw(const std::string& folder, int64_t batch) {
  std::vector<proto::PlanProto> plans;
  int64_t axis_bytes = 0;
  for (const char* passes : {"none", "flash,remat"}) {
    ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModel(kModel, {.batch = batch}));
    CompileOptions options;
    options.passes = passes;
    ASSIGN_OR_RETURN(proto::PlanProto plan, Compile(std::move(module), options));
    plan.set_passes(passes);  // As typed: the title has room for no more.
    axis_bytes = std::max(axis_bytes, plan.arena_bytes());
    plans.push_back(std::move(plan));
  }
  for (const proto::PlanProto& plan : plans) {
    const std::string path =
        absl::StrCat(folder, "/", kModel, "_", absl::StrReplaceAll(plan.passes(), {{",", "_"}}), ".svg");
    RETURN_IF_ERROR(WriteFile(path, PlanSvg(plan, axis_bytes)));
    std::cout << path << ": " << FormatBytes(plan.arena_bytes()) << " (" << FormatCount(plan.arena_bytes())
              << " bytes), passes " << plan.passes() << "\n";
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  std::string folder = std::filesystem::is_directory("bench/results") ? "bench/results" : ".";
  int64_t batch = 32;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--output" && i + 1 < argc) {
      folder = argv[++i];
    } else if (argument == "--batch" && i + 1 < argc && absl::SimpleAtoi(argv[i + 1], &batch) && batch > 0) {
      ++i;
    } else {
      std::cerr << "usage: chart_bench [--output DIR] [--batch N]\n";
      return 2;
    }
  }
  return mt::ReportStatus(mt::Draw(folder, batch));
}
