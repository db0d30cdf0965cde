#include "passes/pass_manager.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/cost.h"
#include "ir/liveness.h"
#include "ir/text.h"
#include "ir/verifier.h"

namespace mt {
namespace {

absl::Status Dump(const Module& module, const std::string& folder, size_t number, absl::string_view label) {
  return WriteFile(absl::StrFormat("%s/%02d.%s.mtir", folder, number, label), Print(module));
}

absl::StatusOr<Graph*> TrainGraph(const Module& module) {
  Graph* train = module.FindGraph("train");
  if (train == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("module @", module.name(), " has no graph @train"));
  }
  return train;
}

void Measure(const Graph& train, PassReport& report) {
  const std::vector<Node*> order = train.TopologicalOrder();
  const Cost cost = GraphCost(train);
  report.nodes = train.num_nodes();
  report.flops = cost.flops;
  report.bytes = cost.bytes_read + cost.bytes_written;
  report.peak_live_bytes = PeakLiveBytes(train, order);
}

absl::Status CheckStage(const PassDef& pass, Stage expected, Stage actual, absl::string_view verb) {
  if (actual == expected) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("pass ", pass.name, " ", verb, " stage ", StageName(expected),
                                                    ", but graph @train is at stage ", StageName(actual)));
}

}  // namespace

absl::Status RunPipeline(Module& module, const Pipeline& pipeline, PassContext& context,
                         std::vector<PassReport>* reports) {
  const bool dumps = !context.dump_dir.empty();
  RETURN_IF_ERROR(TrainGraph(module));
  RETURN_IF_ERROR(Annotate(VerifyModule(module), "before the first pass"));
  if (dumps) {
    RETURN_IF_ERROR(MakeFolder(context.dump_dir));
    RETURN_IF_ERROR(Dump(module, context.dump_dir, 0, "input"));
  }
  uint64_t fingerprint = module.Fingerprint();
  for (size_t i = 0; i < pipeline.steps.size(); ++i) {
    const PassDef& pass = *pipeline.steps[i].pass;
    const std::string label = absl::StrCat("pass ", pass.name);
    ASSIGN_OR_RETURN(Graph * train, TrainGraph(module));
    const Stage before = train->stage();
    if (!pass.any_stage) RETURN_IF_ERROR(CheckStage(pass, pass.requires_stage, before, "needs"));

    module.set_made_by(pass.name);
    const auto start = std::chrono::steady_clock::now();
    absl::StatusOr<bool> claim = pass.run(module, pipeline.steps[i].options, context);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    module.set_made_by("");
    if (!claim.ok()) return Annotate(claim.status(), label);

    const uint64_t after = module.Fingerprint();
    bool changed = after != fingerprint;
    fingerprint = after;
    if (changed != *claim) {
      return absl::InternalError(absl::StrCat(label, " says that it ", *claim ? "changed" : "did not change",
                                              " the module, but the module is ", changed ? "another" : "the same"));
    }
    if (changed && &pass != &kDcePass) {
      absl::StatusOr<bool> removed = kDcePass.run(module, Attrs(), context);
      if (!removed.ok()) return Annotate(removed.status(), absl::StrCat(label, " broke the module"));
      if (*removed) fingerprint = module.Fingerprint();
    }
    if (dumps) {
      const std::string name = absl::StrCat(pass.name, changed ? ".changed" : ".unchanged");
      RETURN_IF_ERROR(Dump(module, context.dump_dir, i + 1, name));
    }
    if (changed) {
      const absl::Status broken = VerifyModule(module);
      if (!broken.ok()) {
        return absl::InternalError(absl::StrCat(label, " broke the module: ", broken.message(),
                                                dumps ? absl::StrCat("; see ", context.dump_dir) : ""));
      }
      ASSIGN_OR_RETURN(train, TrainGraph(module));
    }
    // A pass that had nothing to do leaves the stage alone.
    const Stage promised = pass.any_stage || !changed ? before : pass.provides_stage;
    RETURN_IF_ERROR(CheckStage(pass, promised, train->stage(), "promises"));
    if (reports != nullptr) {
      PassReport report{.pass = std::string(pass.name), .changed = changed, .seconds = seconds.count()};
      if (changed || reports->empty()) {
        Measure(*train, report);
      } else {
        const PassReport& last = reports->back();
        report.nodes = last.nodes;
        report.flops = last.flops;
        report.bytes = last.bytes;
        report.peak_live_bytes = last.peak_live_bytes;
      }
      reports->push_back(std::move(report));
    }
  }
  return absl::OkStatus();
}

std::string FormatPassReports(const std::vector<PassReport>& reports) {
  std::string text = absl::StrFormat("%-16s %-9s %8s %10s %12s %12s %9s\n", "pass", "", "nodes", "GFLOP", "traffic",
                                     "peak live", "seconds");
  for (const PassReport& report : reports) {
    absl::StrAppendFormat(&text, "%-16s %-9s %8d %10.3f %12s %12s %9.4f\n", report.pass,
                          report.changed ? "changed" : "unchanged", report.nodes,
                          static_cast<double>(report.flops) * 1e-9, FormatBytes(report.bytes),
                          FormatBytes(report.peak_live_bytes), report.seconds);
  }
  return text;
}

}  // namespace mt
