// What planned arenas of named configurations take, beside the figure that each is held against, and what is live at
// the peak. Nothing is run. Where it differs from another's by more than 10 %, what accounts for it, by name: "has":
// what is live at our peak, down to nine tenths of the arena; "has not": what the forward pass and the loss make that
// is not live there (dead by then, overwritten in place, recomputed), largest first until it makes up the difference;
// and how many times the logits in f32 the difference is.
//
//   plan_bench [--json] [TABLE ...]      tables: goals, report, stackoverflow, lab8, lab18, chatgot; default: all
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/compile.h"
#include "codegen/fit.h"
#include "codegen/plan/plan.h"
#include "codegen/report/names.h"
#include "codegen/report/peak.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/graph_io.h"
#include "ir/op.h"
#include "nlohmann/json.hpp"

namespace mt {
namespace {

// The pipelines that goals are set for.
constexpr char kFast[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free";
constexpr char kSmall[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat";
constexpr char kSmall8[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat,adamw8bit";

constexpr double kMiB = 1 << 20;

struct Configuration {
  std::string table, name, model;
  int64_t batch, sequence;
  std::string target, passes;
  double other_mib = 0;   // What was measured elsewhere, or a limit; 0: there is none.
  bool is_limit = false;  // Not to be passed, whatever makes up the difference.
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
    rows.push_back({"goals", absl::StrCat(g.name, " fast"), g.model, g.batch, g.sequence, "cuda", kFast, g.fast, true});
    rows.push_back(
        {"goals", absl::StrCat(g.name, " small"), g.model, g.batch, g.sequence, "cuda", kSmall, g.small, true});
    rows.push_back({"goals", absl::StrCat(g.name, " small, budget"), g.model, g.batch, g.sequence, "cuda",
                    absl::StrCat(kSmall, ":budget=", g.small, "MiB"), g.small, true});
    rows.push_back({"goals", absl::StrCat(g.name, " small, 8-bit"), g.model, g.batch, g.sequence, "cuda", kSmall8,
                    g.small8, true});
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
        {"chatgot", absl::StrCat("85M batch 8, ", passes), "chatgot_85m", 8, 256, "cuda:sm_75", passes, 4096, true});
  }
}

// Values of the program's forward pass that are not live at its peak, alike ones together, largest first.
std::vector<LiveTensor> NotAtPeak(const proto::PlanProto& plan, const Peak& peak) {
  const proto::ProgramProto& program = *peak.program;
  const std::vector<int> live_buffers = LiveBuffers(plan, program, peak.instruction);
  const std::set<int> live(live_buffers.begin(), live_buffers.end());
  std::map<int, int> holds;  // Buffer -> the tensor written to it last.
  for (int i = 0; i <= peak.instruction && i < program.instructions_size(); ++i) {
    const OpDef* op = FindOp(program.instructions(i).op());
    if (op != nullptr && op->is_view) continue;
    for (const int t : program.instructions(i).results()) holds[program.tensors(t).buffer()] = t;
  }
  std::map<std::pair<std::string, std::string>, std::vector<std::string>> names;  // By name without numbers, type.
  std::map<std::pair<std::string, std::string>, LiveTensor> groups;
  for (const proto::InstructionProto& instruction : program.instructions()) {
    const OpDef* op = FindOp(instruction.op());
    if (instruction.phase() != PhaseName(Phase::kForward) || (op != nullptr && op->is_view)) continue;
    for (const int t : instruction.results()) {
      const proto::TensorProto& tensor = program.tensors(t);
      if (live.count(tensor.buffer()) > 0 && holds[tensor.buffer()] == t) continue;
      const absl::StatusOr<TensorType> type = TypeFromProto(tensor.type());
      if (!type.ok()) continue;
      const auto key = std::make_pair(WithoutNumbers(tensor.name()), type->ToString());
      LiveTensor& group = groups[key];
      group.type = type->ToString();
      group.bytes += type->byte_size();
      group.buffers.push_back(tensor.buffer());
      names[key].push_back(tensor.name());
    }
  }
  std::vector<LiveTensor> tensors;
  for (auto& [key, group] : groups) {
    group.name = CommonName(names[key]);
    tensors.push_back(std::move(group));
  }
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const LiveTensor& a, const LiveTensor& b) { return a.bytes > b.bytes; });
  return tensors;
}

// The value of the forward pass with the most elements: logits, mostly. REQUIRES: a program with a value.
const proto::TensorProto* LargestValue(const proto::ProgramProto& program) {
  const proto::TensorProto* largest = &program.tensors(0);
  int64_t most = 0;
  for (const proto::InstructionProto& instruction : program.instructions()) {
    if (instruction.phase() != PhaseName(Phase::kForward)) continue;
    for (const int t : instruction.results()) {
      const absl::StatusOr<TensorType> type = TypeFromProto(program.tensors(t).type());
      if (!type.ok() || type->num_elements() <= most) continue;
      most = type->num_elements();
      largest = &program.tensors(t);
    }
  }
  return largest;
}

nlohmann::ordered_json TensorJson(const LiveTensor& tensor) {
  return {{"name", tensor.name}, {"type", tensor.type}, {"count", tensor.count()}, {"bytes", tensor.bytes}};
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
  for (size_t i = 0; i < std::min<size_t>(peak.tensors.size(), 10); ++i) live.push_back(TensorJson(peak.tensors[i]));
  nlohmann::ordered_json json = {{"passes", plan.passes()},
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
  const double difference = row.other_mib * kMiB - static_cast<double>(plan.arena_bytes());
  if (row.is_limit || row.other_mib <= 0 || std::abs(difference) <= 0.1 * row.other_mib * kMiB) return json;
  nlohmann::ordered_json has = nlohmann::ordered_json::array(), has_not = nlohmann::ordered_json::array();
  int64_t sum = 0;
  for (size_t i = 0; i < peak.tensors.size() && sum < plan.arena_bytes() / 10 * 9; ++i) {
    has.push_back(TensorJson(peak.tensors[i]));
    sum += peak.tensors[i].bytes;
  }
  double missing = 0;
  for (const LiveTensor& tensor : NotAtPeak(plan, peak)) {
    if (missing >= difference || tensor.bytes < plan.arena_bytes() / 100) break;
    has_not.push_back(TensorJson(tensor));
    missing += static_cast<double>(tensor.bytes);
  }
  json["difference_bytes"] = static_cast<int64_t>(difference);
  json["has"] = has;
  json["has_not"] = has_not;
  // Others keep several of the loss's arrays in f32 beside one another; here the gradient overwrites the logits.
  const proto::TensorProto* logits = LargestValue(*peak.program);
  if (const absl::StatusOr<TensorType> type = TypeFromProto(logits->type()); type.ok()) {
    json["largest_value"] = absl::StrCat(logits->name(), " ", type->ToString());
    json["difference_in_it"] = difference / (4 * static_cast<double>(type->num_elements()));
  }
  return json;
}

void PrintRow(const Configuration& row, const nlohmann::ordered_json& json) {
  if (json.contains("error")) {
    std::cout << absl::StrFormat("%-44s %s\n", row.name, json["error"].get<std::string>());
    return;
  }
  const double mib = json["arena_bytes"].get<double>() / kMiB;
  const std::string other = row.other_mib > 0 ? absl::StrFormat("%9.0f %6.3f", row.other_mib, mib / row.other_mib)
                                              : absl::StrFormat("%9s %6s", "-", "-");
  std::cout << absl::StrFormat("%-44s %9.0f %s  %8.2f ms  %s\n", row.name, mib, other,
                               json["step_seconds_estimate"].get<double>() * 1e3, json["peak"].get<std::string>());
  const auto print = [](const nlohmann::ordered_json& tensor, const char* what) {
    const int64_t count = tensor["count"];
    std::cout << absl::StrFormat("%8s %11s  %s %s%s\n", what, FormatBytes(tensor["bytes"].get<int64_t>()),
                                 tensor["name"].get<std::string>(), tensor["type"].get<std::string>(),
                                 count > 1 ? absl::StrCat(" x ", count) : "");
  };
  const bool differs = json.contains("has");
  const nlohmann::ordered_json& live = differs ? json["has"] : json["live"];
  for (size_t i = 0; i < live.size() && (differs || i < 5); ++i) print(live[i], differs ? "has" : "");
  if (!differs) return;
  std::cout << absl::StrFormat("%8s %11s  than the other\n",
                               json["difference_bytes"].get<int64_t>() > 0 ? "less" : "more",
                               FormatBytes(std::abs(json["difference_bytes"].get<int64_t>())));
  for (const nlohmann::ordered_json& tensor : json["has_not"]) print(tensor, "has not");
  if (!json.contains("largest_value")) return;
  std::cout << absl::StrFormat("%20s  the difference is %.2f times the largest value in f32, %s\n", "",
                               json["difference_in_it"].get<double>(), json["largest_value"].get<std::string>());
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
