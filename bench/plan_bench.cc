// What planned arenas of named configurations take, beside the figure that each is held against, and what is live at
// the peak. Nothing is run.
//
//   plan_bench [--json] [TABLE ...]      tables: goals, report, stackoverflow, lab8, lab18, chatgot; default: all
#include <algorithm>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/compile.h"
#include "codegen/fit.h"
#include "codegen/peak.h"
#include "codegen/plan/plan.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "nlohmann/json.hpp"

namespace mt {
namespace {

// The pipelines that goals are set for.
constexpr char kFast[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free";
constexpr char kSmall[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat";
constexpr char kSmall8[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat,adamw8bit";

struct Configuration {
  std::string table, name, model;
  int64_t batch, sequence;
  std::string target, passes;
  double other_mib = 0;  // The goal, or what was measured elsewhere; 0: there is none.
};

// At or under these (MiB).
void AddGoals(std::vector<Configuration>& rows) {
  struct Goal {
    std::string name, model;
    int64_t batch, sequence;
    double fast, small, small8;
  };
  const Goal goals[] = {
      {"gpt2_wide32k 125x256", "gpt2_wide32k", 125, 256, 8600, 3200, 2500},
      {"gpt2_124m 64x1024", "gpt2_124m", 64, 1024, 15000, 4600, 4000},
      {"lab4 64x512", "lab4", 64, 512, 2800, 1130, 980},
      {"lab4 128x256", "lab4", 128, 256, 2800, 1130, 980},
      {"so_small 64x256", "so_small", 64, 256, 950, 600, 500},
  };
  for (const Goal& g : goals) {
    rows.push_back({"goals", absl::StrCat(g.name, " fast"), g.model, g.batch, g.sequence, "cuda", kFast, g.fast});
    rows.push_back({"goals", absl::StrCat(g.name, " small"), g.model, g.batch, g.sequence, "cuda", kSmall, g.small});
    rows.push_back({"goals", absl::StrCat(g.name, " small, budget"), g.model, g.batch, g.sequence, "cuda",
                    absl::StrCat(kSmall, ":budget=", g.small, "MiB"), g.small});
    rows.push_back(
        {"goals", absl::StrCat(g.name, " small, 8-bit"), g.model, g.batch, g.sequence, "cuda", kSmall8, g.small8});
  }
}

// Measured with PyTorch on the cards named; GB of those tables are taken as GiB.
void AddMeasured(std::vector<Configuration>& rows) {
  const auto a40 = [&](const std::string& name, int64_t batch, const std::string& passes, double gib) {
    rows.push_back({"report", name, "gpt2_wide32k", batch, 256, "cuda:sm_86", passes, gib * 1024});
  };
  a40("fp32-baseline-batch-125", 125, "none", 32.4);
  a40("fp16-batch-125", 125, "bf16", 22.4);
  a40("fp16-batch-195", 195, "bf16", 34.0);
  a40("flash-attention-batch-125", 125, "bf16,flash", 21.9);
  a40("flash-attention-batch-195", 195, "bf16,flash", 33.2);
  a40("flash-attention-window-(64,0)-batch-125", 125, "bf16,flash:window=64", 21.9);
  a40("flash-attention-window-(64,0)-batch-195", 195, "bf16,flash:window=64", 33.2);
  a40("fp32-gradient-checkpointing-batch-125", 125, "remat", 14.2);
  a40("fp32-gradient-checkpointing-batch-303", 303, "remat", 32.4);

  const auto rtx4090 = [&](const std::string& name, const std::string& passes, double gib) {
    rows.push_back({"stackoverflow", name, "so_small", 64, 256, "cuda:sm_89", passes, gib * 1024});
  };
  rtx4090("Baseline", "tf32", 15.79);
  rtx4090("BF16", "bf16", 16.14);
  rtx4090("Flash+BF16", "bf16,flash", 15.20);
  rtx4090("Window+Flash", "bf16,flash:window=255", 15.20);
  rtx4090("GradCkpt+BF16", "bf16,remat", 14.57);

  const auto rtx5090 = [&](const std::string& name, int64_t batch, const std::string& passes, double gib) {
    rows.push_back({"lab8", name, "lab4", batch, 512, "cuda:sm_120", passes, gib * 1024});
  };
  rtx5090("baseline", 64, "none", 18.2);
  rtx5090("bf16", 128, "bf16", 9.5);
  rtx5090("flash_attn", 128, "bf16,flash", 8.2);
  rtx5090("window_512", 128, "bf16,flash:window=512", 6.8);
  rtx5090("window_256", 128, "bf16,flash:window=256", 0);
  rtx5090("grad_checkpoint", 64, "remat", 11.4);
  rtx5090("bf16_gradcp", 128, "bf16,remat", 0);
  rtx5090("flash_gradcp", 128, "bf16,flash,remat", 0);

  const std::pair<const char*, const char*> lab18[] = {{"baseline", "none"},
                                                       {"bf16", "bf16"},
                                                       {"bf16_flash", "bf16,flash"},
                                                       {"bf16_window64", "bf16,flash:window=64"},
                                                       {"bf16_window128", "bf16,flash:window=128"},
                                                       {"gradcp", "remat"}};
  for (const auto& [name, passes] : lab18) {
    for (const int64_t batch : {32, 64, 128}) {
      rows.push_back({"lab18", absl::StrCat(name, "_bs", batch), "lab4", batch, 256, "cuda:sm_120", passes, 0});
    }
  }
  // A card of 4 GiB, context included.
  for (const char* passes : {"none", "fp16", "remat,adamw8bit", "fp16,flash,remat,adamw8bit"}) {
    rows.push_back(
        {"chatgot", absl::StrCat("85M batch 8, ", passes), "chatgot_85m", 8, 256, "cuda:sm_75", passes, 4096});
  }
}

absl::StatusOr<nlohmann::ordered_json> PlanRow(const Configuration& row) {
  Job job{.spec = row.model};
  job.model.batch = row.batch;
  job.model.sequence = row.sequence;
  job.options.passes = row.passes;
  job.options.target = row.target;
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(job));
  CompileReport report;
  ASSIGN_OR_RETURN(const proto::PlanProto plan, Compile(std::move(module), job.options, &report));
  const Peak peak = PeakOf(plan, LargestProgram(plan));
  nlohmann::ordered_json by_class = nlohmann::ordered_json::object(), live = nlohmann::ordered_json::array();
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    by_class[std::string(MemoryClassName(MemoryClassAt(c)))] = peak.by_class[static_cast<size_t>(c)];
  }
  for (size_t i = 0; i < std::min<size_t>(peak.tensors.size(), 10); ++i) {
    const LiveTensor& tensor = peak.tensors[i];
    live.push_back({{"name", tensor.name}, {"type", tensor.type}, {"count", tensor.count()}, {"bytes", tensor.bytes}});
  }
  return nlohmann::ordered_json{{"passes", plan.passes()},
                                {"arena_bytes", plan.arena_bytes()},
                                {"needs_bytes", NeededBytes(plan)},
                                {"lower_bound_bytes", plan.lower_bound_bytes()},
                                {"proof", plan.proof()},
                                {"persistent_bytes", plan.persistent_bytes()},
                                {"step_seconds_estimate", report.step_seconds},
                                {"compile_seconds", report.total_seconds},
                                {"peak", absl::StrCat(peak.program->name(), " ", peak.name)},
                                {"by_class", by_class},
                                {"live", live}};
}

void PrintRow(const Configuration& row, const nlohmann::ordered_json& json) {
  if (json.contains("error")) {
    std::cout << absl::StrFormat("%-44s %s\n", row.name, json["error"].get<std::string>());
    return;
  }
  const double mib = json["arena_bytes"].get<double>() / 1048576;
  const std::string other = row.other_mib > 0 ? absl::StrFormat("%9.0f %6.3f", row.other_mib, mib / row.other_mib)
                                              : absl::StrFormat("%9s %6s", "-", "-");
  std::cout << absl::StrFormat("%-44s %9.0f %s  %8.2f ms  %s\n", row.name, mib, other,
                               json["step_seconds_estimate"].get<double>() * 1e3, json["peak"].get<std::string>());
  for (size_t i = 0; i < json["live"].size() && i < 5; ++i) {
    const nlohmann::ordered_json& tensor = json["live"][i];
    const int64_t count = tensor["count"];
    std::cout << absl::StrFormat("%20s  %s %s%s\n", FormatBytes(tensor["bytes"].get<int64_t>()),
                                 tensor["name"].get<std::string>(), tensor["type"].get<std::string>(),
                                 count > 1 ? absl::StrCat(" x ", count) : "");
  }
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  bool as_json = false;
  std::vector<std::string> tables;
  std::vector<mt::Configuration> rows;
  mt::AddGoals(rows);
  mt::AddMeasured(rows);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool is_table =
        std::any_of(rows.begin(), rows.end(), [&](const mt::Configuration& row) { return row.table == argument; });
    if (argument == "--json") {
      as_json = true;
    } else if (is_table) {
      tables.push_back(argument);
    } else {
      std::cerr << "usage: plan_bench [--json] [goals|report|stackoverflow|lab8|lab18|chatgot ...]\n";
      return 2;
    }
  }
  std::string table;
  bool failed = false;
  for (const mt::Configuration& row : rows) {
    if (!tables.empty() && std::find(tables.begin(), tables.end(), row.table) == tables.end()) continue;
    const absl::StatusOr<nlohmann::ordered_json> planned = mt::PlanRow(row);
    nlohmann::ordered_json json = {{"table", row.table}, {"row", row.name},     {"model", row.model},
                                   {"batch", row.batch}, {"seq", row.sequence}, {"target", row.target},
                                   {"asked", row.passes}};
    json["other_mib"] = row.other_mib > 0 ? nlohmann::ordered_json(row.other_mib) : nlohmann::ordered_json(nullptr);
    if (planned.ok()) {
      json.update(*planned);
    } else {
      json["error"] = std::string(planned.status().message());
      failed = true;
    }
    if (as_json) {
      std::cout << json.dump() << std::endl;
      continue;
    }
    if (row.table != table) {
      table = row.table;
      std::cout << absl::StrFormat("\n%-44s %9s %9s %6s  %11s  peak\n", table, "MiB", "other", "ratio", "step (est.)");
    }
    mt::PrintRow(row, json);
    std::cout.flush();
  }
  return failed ? 1 : 0;
}
