// mtrun: runs a plan.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/base/tools.h"
#include "ir/base/units.h"
#include "runtime/backend.h"
#include "runtime/data/corpus.h"
#include "runtime/executor.h"
#include "runtime/train/hugging_face.h"
#include "runtime/train/run.h"
#include "runtime/train/run_config.h"
#include "runtime/train/run_folder.h"
#include "runtime/train/stages.h"
#include "runtime/train/trainer.h"

namespace mt {
namespace {

absl::Status DryRun(proto::PlanProto plan) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Executor> executor, Executor::Load(std::move(plan), MakeNullBackend()));
  const proto::PlanProto& p = executor->plan();
  std::printf("%s for %s, passes %s: loaded, nothing computed\n", p.model().c_str(), p.target().c_str(),
              p.passes().c_str());
  std::printf("arena %s (%s bytes), of which states %s\n", FormatBytes(p.arena_bytes()).c_str(),
              FormatCount(p.arena_bytes()).c_str(), FormatBytes(p.persistent_bytes()).c_str());
  for (const proto::ProgramProto& program : p.programs()) {
    executor->FindProgram(program.name())->Run();
    const ProgramSummary summary = Summarize(p, program);
    std::printf("program %s: %d instructions, %d recomputed, peak %s at %s, %.3g FLOPs, %.3g bytes moved\n",
                program.name().c_str(), summary.instructions, summary.recomputed,
                FormatBytes(summary.peak_bytes).c_str(), summary.peak_name.c_str(), static_cast<double>(summary.flops),
                static_cast<double>(summary.bytes));
  }
  return absl::OkStatus();
}

// --export-hf: the weights of --init as a Hugging Face folder, with the tokenizer of --data.
absl::Status ExportWeights(const proto::PlanProto& plan, const ParsedArgs& args) {
  const std::string folder = args.String("export-hf");
  const std::string init = args.String("init");
  if (init.empty() || absl::StartsWith(init, "hf:")) {
    return absl::InvalidArgumentError("--export-hf writes the weights of --init DIR, an earlier --out: give it");
  }
  absl::StatusOr<proto::ModelSpec> spec = SpecOfPlan(plan);
  if (!spec.ok()) return Annotate(spec.status(), args.positional(0));
  std::string tokenizer;
  if (args.Has("data")) {
    ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(args.String("data")));
    RETURN_IF_ERROR(CheckVocabulary(plan, args.positional(0), manifest, args.String("data")));
    RETURN_IF_ERROR(CheckTrainedTokenizer(absl::StrCat("--init ", init), IdentityBeside(WeightsPath(init)), manifest,
                                          args.String("data")));
    RETURN_IF_ERROR(LoadCorpusTokenizer(args.String("data"), manifest));
    if (manifest.tokenizer != "char") tokenizer = absl::StrCat(args.String("data"), "/", kTokenizerFile);
  }
  RETURN_IF_ERROR(ExportHuggingFace(*spec, WeightsPath(init), tokenizer, folder));
  std::printf("wrote %s: transformers loads it%s\n", folder.c_str(),
              tokenizer.empty() ? "; a tokenizer comes along with --data CORPUS" : "");
  return absl::OkStatus();
}

absl::Status ShowConfig(const ParsedArgs& args, const ConfiguredArguments& configured) {
  const std::vector<std::string> typed_arguments(
      configured.arguments.begin() + static_cast<int64_t>(configured.from_files.size()), configured.arguments.end());
  ASSIGN_OR_RETURN(const ParsedArgs typed, ParseArgs(kMtrun, AllTools(), typed_arguments));
  std::printf("%s", ConfigTable(kMtrun, args, typed, configured).c_str());
  return absl::OkStatus();
}

absl::Status Main(const ParsedArgs& args) {
  const std::string& path = args.positional(0);
  ASSIGN_OR_RETURN(proto::PlanProto plan, LoadPlan(path));
  if (args.Bool("dry-run") && !args.Has("schedule")) return DryRun(std::move(plan));
  if (args.Bool("dry-run")) {
    ASSIGN_OR_RETURN(std::vector<RunStage> stages, ReadStages(args.String("schedule"), path, std::move(plan)));
    std::printf("%s", StagesText(stages, 0).c_str());
    for (RunStage& stage : stages) RETURN_IF_ERROR(DryRun(std::move(stage.plan)));
    return absl::OkStatus();
  }
  if (args.Has("export-hf")) return ExportWeights(plan, args);
  return RunPlan(args, path, std::move(plan));
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const absl::StatusOr<mt::ConfiguredArguments> configured = mt::ReadConfigs(arguments);
  if (!configured.ok()) return mt::ReportStatus(configured.status());
  std::vector<std::string> all = configured->arguments;
  all.insert(all.begin(), argc > 0 ? argv[0] : "mtrun");
  std::vector<char*> pointers;
  for (std::string& argument : all) pointers.push_back(argument.data());
  return mt::RunTool(mt::kMtrun, static_cast<int>(pointers.size()), pointers.data(), [&](const mt::ParsedArgs& args) {
    return args.Bool("show-config") ? mt::ShowConfig(args, *configured) : mt::Main(args);
  });
}
