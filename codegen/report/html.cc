// The page: tables made here, one chart a program, and the numbers behind it as JSON for the script in page.cc.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "codegen/plan/plan.h"
#include "codegen/report/chart.h"
#include "codegen/report/inspect.h"
#include "codegen/report/page.h"
#include "codegen/report/peak.h"
#include "codegen/report/report.h"
#include "codegen/report/tally.h"
#include "ir/base/json.h"
#include "ir/base/units.h"
#include "ir/op.h"

namespace mt {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kTopTensors = 20;
constexpr size_t kTopRecomputed = 20;

size_t At(int64_t i) { return static_cast<size_t>(i); }

int64_t Fact(const proto::PlanProto& plan, const std::string& name) {
  const auto fact = plan.facts().find(name);
  return fact == plan.facts().end() ? 0 : fact->second;
}

std::string TypeText(const proto::TensorTypeProto& type) {
  return absl::StrCat(type.dtype(), "[", absl::StrJoin(type.dims(), ","), "]");
}

// Strings, each once.
class Strings {
 public:
  int operator()(const std::string& text) {
    const auto [at, is_new] = index_.try_emplace(text, static_cast<int>(all_.size()));
    if (is_new) all_.push_back(text);
    return at->second;
  }
  const std::vector<std::string>& all() const { return all_; }

 private:
  absl::flat_hash_map<std::string, int> index_;
  std::vector<std::string> all_;
};

// One program's numbers, by column: of its instructions (op, name, phase, pass, again), of the buffers that it sees
// (offset, bytes, live: aligned bytes, first, last, cls, state, label, stateType) and of its tensors (buffer, made:
// the instruction, -1 for inputs, tensor: its name, type). Names and types are indices into the strings.
Json ProgramColumns(const proto::PlanProto& plan, const proto::ProgramProto& program, int index, Strings& strings) {
  std::vector<int> op, name, phase, pass, again;
  std::vector<int> made(At(program.tensors_size()), -1);
  std::vector<bool> is_view(At(program.tensors_size()), false);
  for (int i = 0; i < program.instructions_size(); ++i) {
    const proto::InstructionProto& instruction = program.instructions(i);
    op.push_back(strings(instruction.op()));
    name.push_back(strings(instruction.name()));
    phase.push_back(static_cast<int>(ParsePhase(instruction.phase()).value_or(Phase::kForward)));
    pass.push_back(strings(instruction.made_by()));
    again.push_back(instruction.recompute() ? 1 : 0);
    const OpDef* row = FindOp(instruction.op());
    for (const int t : instruction.results()) {
      made[At(t)] = i;
      is_view[At(t)] = row != nullptr && row->is_view;
    }
  }
  std::vector<int64_t> offset, bytes, live;
  std::vector<int> first, last, cls, state, label, state_type;
  std::vector<int> column(At(plan.buffers_size()), -1);
  absl::flat_hash_map<int, const proto::StatePlacement*> states;
  for (const proto::StatePlacement& placement : plan.states()) states[placement.buffer()] = &placement;
  for (int b = 0; b < plan.buffers_size(); ++b) {
    const proto::BufferProto& buffer = plan.buffers(b);
    if (buffer.program() != -1 && buffer.program() != index) continue;
    column[At(b)] = static_cast<int>(offset.size());
    offset.push_back(buffer.offset());
    bytes.push_back(buffer.size_bytes());
    live.push_back(AlignedBytes(plan, buffer.size_bytes()));
    first.push_back(buffer.first());
    last.push_back(buffer.last());
    cls.push_back(std::clamp(static_cast<int>(buffer.memory_class()) - 1, 0, kNumMemoryClasses - 1));
    state.push_back(buffer.program() == -1 ? 1 : 0);
    label.push_back(strings(buffer.name()));
    const auto placed = states.find(b);
    state_type.push_back(strings(placed == states.end() ? "" : TypeText(placed->second->state().type())));
  }
  std::vector<int> buffer, when, tensor, type;
  for (int t = 0; t < program.tensors_size(); ++t) {
    const int at = column[At(program.tensors(t).buffer())];
    if (at < 0 || is_view[At(t)]) continue;
    buffer.push_back(at);
    when.push_back(made[At(t)]);
    tensor.push_back(strings(program.tensors(t).name()));
    type.push_back(strings(TypeText(program.tensors(t).type())));
  }
  const int columns = std::min(std::max(program.instructions_size(), 1), 2000);
  return {{"peak", program.peak_instruction()},
          {"columns", columns},
          {"op", op},
          {"name", name},
          {"phase", phase},
          {"pass", pass},
          {"again", again},
          {"offset", offset},
          {"bytes", bytes},
          {"live", live},
          {"first", first},
          {"last", last},
          {"cls", cls},
          {"state", state},
          {"label", label},
          {"stateType", state_type},
          {"buffer", buffer},
          {"made", when},
          {"tensor", tensor},
          {"type", type}};
}

std::string Row(const std::vector<std::string>& cells, absl::string_view row_class = "") {
  std::string text = row_class.empty() ? "<tr>" : absl::StrCat("<tr class=\"", row_class, "\">");
  for (const std::string& cell : cells) absl::StrAppend(&text, cell);
  return absl::StrCat(text, "</tr>\n");
}
std::string Head(absl::string_view text, absl::string_view css = "") {
  return absl::StrCat(css.empty() ? "<th>" : absl::StrCat("<th class=\"", css, "\">"), EscapeXml(text), "</th>");
}
std::string Cell(absl::string_view text, absl::string_view css = "") {
  return absl::StrCat(css.empty() ? "<td>" : absl::StrCat("<td class=\"", css, "\">"), EscapeXml(text), "</td>");
}
std::string ClassCell(int c) {
  const absl::string_view name = MemoryClassName(MemoryClassAt(c));
  return absl::StrCat("<td class=\"t\"><i class=\"key k-", name, "\"></i>", absl::StrReplaceAll(name, {{"_", " "}}),
                      "</td>");
}

std::string ClassTable(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const ProgramSummary summary = Summarize(plan, program);
  const ClassDTypes dtypes = DTypesOf(plan, program);
  std::vector<int> phases;
  for (int p = 0; p < kNumPhases; ++p) {
    if (summary.phases[At(p)].peak_instruction >= 0) phases.push_back(p);
  }
  std::vector<std::string> cells = {Head("live bytes", "t"), Head("at the peak")};
  for (const int p : phases) cells.push_back(Head(absl::StrCat(PhaseName(static_cast<Phase>(p)), "'s peak")));
  cells.push_back(Head("dtypes of all buffers", "t"));
  std::string text = absl::StrCat("<div class=\"scroll\"><table>\n", Row(cells));
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    cells = {ClassCell(c), Cell(FormatBytes(summary.at_peak[At(c)]))};
    for (const int p : phases) cells.push_back(Cell(FormatBytes(summary.phases[At(p)].at_peak[At(c)])));
    cells.push_back(Cell(MemoryClassAt(c) == proto::WORKSPACE ? "" : DTypesText(dtypes[At(c)]), "t"));
    text += Row(cells);
  }
  cells = {Cell("sum", "t"), Cell(FormatBytes(Sum(summary.at_peak)))};
  for (const int p : phases) cells.push_back(Cell(FormatBytes(summary.phases[At(p)].live_bytes)));
  cells.push_back(Cell(""));
  text += Row(cells, "sum");
  cells = {Cell("written", "t"), Cell("")};
  for (const int p : phases) cells.push_back(Cell(FormatBytes(summary.phases[At(p)].written_bytes)));
  cells.push_back(Cell(""));
  text += Row(cells);
  return text + "</table></div>\n";
}

std::string TensorTable(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const Peak peak = PeakOf(plan, program);
  std::string text = absl::StrCat(
      "<h2>Largest at the peak, ", EscapeXml(peak.name), "</h2>\n<div class=\"scroll\"><table>\n",
      Row({Head("bytes"), Head("share"), Head("class", "t"), Head("tensor", "t"), Head("type", "t"), Head("op", "t")}));
  for (size_t i = 0; i < peak.tensors.size() && i < kTopTensors; ++i) {
    const LiveTensor& tensor = peak.tensors[i];
    const double share =
        100.0 * static_cast<double>(tensor.bytes) / static_cast<double>(std::max<int64_t>(peak.live_bytes, 1));
    text += Row({Cell(FormatBytes(tensor.bytes)), Cell(absl::StrFormat("%.1f %%", share)),
                 ClassCell(tensor.memory_class - 1), Cell(tensor.name, "t n"),
                 Cell(tensor.count() > 1 ? absl::StrCat(tensor.type, " x ", tensor.count()) : tensor.type, "t"),
                 Cell(tensor.op, "t")});
  }
  return text + "</table></div>\n";
}

std::string RecomputedTable(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  const Recomputation again = RecomputationOf(plan, program);
  if (again.count == 0) return "<h2>Recomputed: nothing</h2>\n";
  std::string text =
      absl::StrCat("<h2>Recomputed: ", FormatCount(again.count), " ops, ",
                   absl::StrFormat("%.1f %% of the program's time at the roofline",
                                   again.program_seconds > 0 ? 100 * again.seconds / again.program_seconds : 0.0),
                   "</h2>\n<div class=\"scroll\"><table>\n",
                   Row({Head("times"), Head("share of time"), Head("GFLOP"), Head("read and written"), Head("op", "t"),
                        Head("node", "t"), Head("made by", "t")}));
  for (size_t i = 0; i < again.ops.size() && i < kTopRecomputed; ++i) {
    const Recomputed& op = again.ops[i];
    text += Row(
        {Cell(FormatCount(op.count)),
         Cell(absl::StrFormat("%.2f %%", again.program_seconds > 0 ? 100 * op.seconds / again.program_seconds : 0.0)),
         Cell(absl::StrFormat("%.3f", static_cast<double>(op.flops) * 1e-9)), Cell(FormatBytes(op.bytes)),
         Cell(op.op, "t"), Cell(op.name, "t n"), Cell(op.made_by.empty() ? "the model" : op.made_by, "t")});
  }
  if (again.ops.size() > kTopRecomputed) {
    text += Row({Cell(absl::StrCat("and ", again.ops.size() - kTopRecomputed, " more kinds"), "t")});
  }
  return text + "</table></div>\n";
}

std::string FactBox(absl::string_view label, absl::string_view value) {
  return absl::StrCat("<div><b>", EscapeXml(value), "</b><span>", EscapeXml(label), "</span></div>\n");
}

}  // namespace

std::string PlanHtml(const proto::PlanProto& plan) {
  ChartLayout layout;
  layout.plot_height = 460;
  layout.timeline_height = 90;
  const ChartScale scale = ScaleOf(plan);
  const proto::ProgramProto& largest = LargestProgram(plan);
  Strings strings;
  Json programs = Json::array();
  std::string sections, tabs;
  int shown = 0;
  for (int i = 0; i < plan.programs_size(); ++i) {
    const proto::ProgramProto& program = plan.programs(i);
    if (&program == &largest) shown = i;
    programs.push_back(ProgramColumns(plan, program, i, strings));
    const ProgramSummary summary = Summarize(plan, program);
    absl::StrAppend(&tabs, "<button type=\"button\" data-program=\"", i, "\">", EscapeXml(program.name()), " ",
                    FormatBytes(program.peak_bytes()), "</button>\n");
    absl::StrAppend(
        &sections, "<section data-program=\"", i, "\"", &program == &largest ? "" : " hidden",
        ">\n<div class=\"chart\">",
        ProgramChart(plan, program, layout, absl::StrCat("The arena of ", program.name(), " over its instructions"),
                     /*standalone=*/false),
        "</div>\n<p class=\"sub\">", FormatCount(summary.instructions), " instructions, ",
        absl::StrFormat("%.3f", static_cast<double>(summary.flops) * 1e-9), " GFLOP, ", FormatBytes(summary.bytes),
        " read and written; ", FormatBytes(summary.peak_bytes), ", ",
        EscapeXml(ProofText(summary.peak_bytes, summary.lower_bound_bytes, summary.proof)), "</p>\n",
        ClassTable(plan, program), TensorTable(plan, program), RecomputedTable(plan, program), "</section>\n");
  }
  Json classes = Json::array(), phases = Json::array();
  for (int c = 0; c < kNumMemoryClasses; ++c) classes.push_back(std::string(MemoryClassName(MemoryClassAt(c))));
  for (int p = 0; p < kNumPhases; ++p) phases.push_back(std::string(PhaseName(static_cast<Phase>(p))));
  const Json data = {{"unit", scale.bytes_per_unit},
                     {"units", scale.units},
                     {"shown", shown},
                     {"layout",
                      {{"width", layout.width},
                       {"height", layout.height()},
                       {"left", layout.left},
                       {"top", layout.plot_top()},
                       {"plotWidth", layout.plot_width()},
                       {"plotHeight", layout.plot_height},
                       {"ticks", layout.ticks_top()},
                       {"timelineBottom", layout.timeline_top() + layout.timeline_height}}},
                     {"classes", classes},
                     {"phases", phases},
                     {"strings", strings.all()},
                     {"programs", programs}};
  // No "<" in it: nothing in a name can end the element that holds it.
  const std::string json =
      absl::StrReplaceAll(data.dump(-1, ' ', false, Json::error_handler_t::replace), {{"<", "\\u003c"}});

  const Padding padding = PaddingOf(plan);
  const std::string title = absl::StrCat(plan.model(), ": ", FormatBytes(plan.arena_bytes()));
  std::string facts;
  facts += FactBox("arena", FormatBytes(plan.arena_bytes()));
  facts += FactBox("lower bound", FormatBytes(plan.lower_bound_bytes()));
  facts += FactBox("gap", FormatBytes(plan.arena_bytes() - plan.lower_bound_bytes()));
  facts += FactBox("states", FormatBytes(plan.persistent_bytes()));
  facts += FactBox("parameters", FormatCount(Fact(plan, "parameters")));
  facts += FactBox("batch", FormatCount(Fact(plan, "batch")));
  facts += FactBox("sequence", FormatCount(Fact(plan, "sequence")));
  facts += FactBox("target", plan.target());
  facts += FactBox("padding of states", FormatBytes(padding.state_bytes));
  facts += FactBox("alignment at the peak", FormatBytes(padding.alignment_bytes));
  return absl::StrCat(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n<title>",
      EscapeXml(title), "</title>\n<style>", ChartStyle(), PageStyle(), "</style>\n</head>\n<body>\n<main>\n<h1>",
      EscapeXml(plan.model()), "</h1>\n<p class=\"sub\">passes ", EscapeXml(plan.passes()), "; ",
      EscapeXml(ProofText(plan.arena_bytes(), plan.lower_bound_bytes(), plan.proof())), "</p>\n<div class=\"facts\">\n",
      facts, "</div>\n<div class=\"tabs\">\n", tabs,
      "<button type=\"button\" id=\"all\">all of it</button>\n"
      "<input id=\"find\" type=\"search\" placeholder=\"find a tensor\" aria-label=\"find a tensor\">\n"
      "<span class=\"hint\" id=\"count\"></span>\n</div>\n",
      sections, "<footer>", EscapeXml(plan.compiler()), ", compiled in ",
      absl::StrFormat("%.2f", plan.compile_seconds()), " s</footer>\n</main>\n<div id=\"tip\" hidden></div>\n",
      "<script type=\"application/json\" id=\"plan\">", json, "</script>\n<script>", PageScript(),
      "</script>\n</body>\n</html>\n");
}

}  // namespace mt
