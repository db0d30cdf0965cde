// What planned arenas of named configurations take, beside the figure that each is held against, and what is live at
// the peak. Nothing is run. Where it differs from another's by more than 10 %, what accounts for it, by name: "has":
// what is live at our peak, down to nine tenths of the arena; "theirs": arrays that the other's run holds at its peak,
// from shapes; "ours": what our peak has in their place, or has and theirs has not; "left": what that does not explain.
//
//   plan_bench [--json] [TABLE ...]  tables: goals, torch, report, stackoverflow, lab8, lab18, chatgot; default: all
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "codegen/compile.h"
#include "codegen/fit.h"
#include "codegen/plan/plan.h"
#include "codegen/report/peak.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"

namespace mt {
namespace {

// The pipelines that goals are set for.
constexpr char kFast[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free";
constexpr char kSmall[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat";
constexpr char kSmall8[] = "bf16,flash,chunked_loss,pad_vocab,fuse,remat,adamw8bit";

constexpr double kMiB = 1 << 20;

// An array that a run of PyTorch holds where it takes the most, and our plan does not.
struct Theirs {
  std::string name;
  double mib = 0;
};

struct Configuration {
  std::string table, name, model;
  int64_t batch, sequence;
  std::string target, passes;
  double other_mib = 0;   // What was measured elsewhere, or a limit; 0: there is none.
  bool is_limit = false;  // Not to be passed, whatever makes up the difference.
  std::vector<Theirs> theirs = {};
  std::vector<std::string> ours = {};  // Parts of names: what our peak has in their place, or has and theirs has not.
  std::string note = "";
};

// PyTorch's cross entropy computes in f32 whatever the logits are. Where its backward pass takes the most there are the
// log-probabilities, their gradient and the logits' gradient; with `copies` 4 the logits in f32 as well.
Theirs LossArrays(int64_t batch, int64_t sequence, int64_t vocabulary, int copies) {
  return {absl::StrFormat("f32[%d,%d,%d] x %d: log-probabilities, their gradient, the logits' gradient%s", batch,
                          sequence, vocabulary, copies, copies > 3 ? ", the logits" : ""),
          static_cast<double>(copies * 4 * batch * sequence * vocabulary) / kMiB};
}

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

// Measured with PyTorch 2.11 in eager mode on an H200, attention as scores, softmax, values or in its flash kernel.
// Autocast leaves the residual stream in f32: two arrays a layer that are 16 bit here.
void AddTorch(std::vector<Configuration>& rows) {
  struct Model {
    std::string name;
    int64_t layers, width, batch, sequence, vocabulary;
    double tf32, bf16, remat;
    std::string remat_passes;
  };
  const Model models[] = {
      {"gpt2_wide32k", 12, 768, 125, 256, 32000, 36076, 23861, 14641, "tf32,remat"},
      {"gpt2_124m", 12, 768, 64, 1024, 50257, 113360, 60534, 41890, "bf16,flash,remat"},
      {"lab4", 6, 512, 64, 512, 10000, 13504, 7765, 4667, "tf32,remat"},
      {"so_small", 4, 256, 64, 256, 50257, 12071, 10495, 9943, "bf16,flash,remat"},
  };
  for (const Model& m : models) {
    const auto add = [&](const std::string& passes, double mib) {
      const bool bf16 = passes.rfind("bf16", 0) == 0,
                 remat = passes.size() > 5 && passes.substr(passes.size() - 5) == "remat";
      Configuration row{"torch", absl::StrCat(m.name, " ", passes), m.name, m.batch, m.sequence, "cuda:sm_90", passes,
                        mib};
      row.theirs.push_back(LossArrays(m.batch, m.sequence, m.vocabulary, 3));
      row.ours.push_back("loss.grad");
      if (bf16) {
        const int64_t arrays = remat ? m.layers : 2 * m.layers;
        row.theirs.push_back({absl::StrFormat("f32 instead of bf16[%d,%d,%d] x %d: the residual stream", m.batch,
                                              m.sequence, m.width, arrays),
                              static_cast<double>(2 * arrays * m.batch * m.sequence * m.width) / kMiB});
      }
      // Where the last block's backward pass is our peak, its arrays are not there together with the loss's.
      if (remat) row.ours.push_back(absl::StrCat("h", m.layers - 1, "."));
      rows.push_back(std::move(row));
    };
    add("tf32", m.tf32);
    add("bf16,flash", m.bf16);
    add(m.remat_passes, m.remat);
  }
}

// What documents say that PyTorch took on the cards named. None has its code with it; what their runs hold is told from
// their figures.
void AddMeasured(std::vector<Configuration>& rows) {
  // GB are GiB: in each row the backward pass takes 7.4-7.7, 11.6-11.7 (batch 195) or 18.3 (303) GB more than the
  // forward pass, and two arrays f32[batch,256,32000] are 7.63, 11.90 and 18.50 GiB. FlashAttention saves half a GB in
  // bf16: without it there are no T x T arrays either.
  const auto a40 = [&](const std::string& name, int64_t batch, const std::string& passes, double gib) {
    rows.push_back({"report",
                    name,
                    "gpt2_wide32k",
                    batch,
                    256,
                    "cuda:sm_86",
                    passes,
                    gib * 1024,
                    false,
                    {LossArrays(batch, 256, 32000, 3)},
                    {"loss.grad", "attn.softmax"}});
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

  // GB are 10^9 bytes: the card is said to have 25.26. BF16 takes more than f32: the logits are there twice.
  const auto rtx4090 = [&](const std::string& name, const std::string& passes, double gb) {
    Configuration row{"stackoverflow", name, "so_small", 64, 256, "cuda:sm_89", passes, gb * 1e9 / kMiB};
    row.theirs.push_back(LossArrays(64, 256, 50257, 4));
    if (passes.rfind("bf16", 0) == 0) {
      row.theirs.push_back({"bf16: the logits as the head made them", 2.0 * 64 * 256 * 50257 / kMiB});
    }
    row.ours.push_back("loss.grad");
    rows.push_back(std::move(row));
  };
  rtx4090("Baseline", "tf32", 15.79);
  rtx4090("BF16", "bf16", 16.14);
  rtx4090("Flash+BF16", "bf16,flash", 15.20);
  rtx4090("Window+Flash", "bf16,flash:window=255", 15.20);
  rtx4090("GradCkpt+BF16", "bf16,remat", 14.57);

  // "Expected Results (Example)", not a run: a window of 512 is full attention there and still takes 1.4 GB less, and
  // with batch 128 the arrays of the loss alone would be 7.3 of the 9.5 GB. Table torch has the shapes of batch 64.
  const auto rtx5090 = [&](const std::string& name, int64_t batch, const std::string& passes, double gib) {
    Configuration row{"lab8", name, "lab4", batch, 512, "cuda:sm_120", passes, gib * 1024};
    row.theirs.push_back(LossArrays(batch, 512, 10000, 3));
    row.ours = {"loss.grad", "h5."};
    row.note = "no run: the document calls it an expected result, as an example";
    rows.push_back(std::move(row));
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
  nlohmann::ordered_json has = nlohmann::ordered_json::array(), theirs = nlohmann::ordered_json::array(),
                         ours = nlohmann::ordered_json::array();
  int64_t sum = 0;
  for (size_t i = 0; i < peak.tensors.size() && sum < plan.arena_bytes() / 10 * 9; ++i) {
    has.push_back(TensorJson(peak.tensors[i]));
    sum += peak.tensors[i].bytes;
  }
  double left = difference;
  for (const Theirs& part : row.theirs) {
    theirs.push_back({{"name", part.name}, {"bytes", static_cast<int64_t>(part.mib * kMiB)}});
    left -= part.mib * kMiB;
  }
  for (const LiveTensor& tensor : peak.tensors) {
    const bool replaced = tensor.memory_class != proto::WORKSPACE &&
                          std::any_of(row.ours.begin(), row.ours.end(),
                                      [&](const std::string& part) { return absl::StrContains(tensor.name, part); });
    if (!replaced) continue;
    ours.push_back(TensorJson(tensor));
    left += static_cast<double>(tensor.bytes);
  }
  json["difference_bytes"] = static_cast<int64_t>(difference);
  json["has"] = has;
  json["theirs"] = theirs;
  json["ours"] = ours;
  json["left_bytes"] = static_cast<int64_t>(left);
  json["left_of_difference"] = left / difference;
  if (!row.note.empty()) json["note"] = row.note;
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
  for (const nlohmann::ordered_json& part : json["theirs"]) {
    std::cout << absl::StrFormat("%8s %11s  %s\n", "theirs", FormatBytes(part["bytes"].get<int64_t>()),
                                 part["name"].get<std::string>());
  }
  for (const nlohmann::ordered_json& tensor : json["ours"]) print(tensor, "ours");
  const double left = json["left_bytes"];
  std::cout << absl::StrFormat(
      "%8s %11s  %s, %.0f %% of the difference, %.1f %% of the other\n", "left",
      FormatBytes(static_cast<int64_t>(std::abs(left))), left > 0 ? "not explained" : "explained too much",
      100 * std::abs(json["left_of_difference"].get<double>()), 100 * std::abs(left) / (row.other_mib * kMiB));
  if (!row.note.empty()) std::cout << absl::StrFormat("%20s  %s\n", "", row.note);
}

}  // namespace
}  // namespace mt

int main(int argc, char** argv) {
  bool as_json = false;
  std::vector<std::string> tables;
  std::vector<mt::Configuration> rows;
  mt::AddGoals(rows);
  mt::AddTorch(rows);
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
      std::cerr << "usage: plan_bench [--json] [goals|torch|report|stackoverflow|lab8|lab18|chatgot ...]\n";
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
