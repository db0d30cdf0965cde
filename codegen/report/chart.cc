#include "codegen/report/chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "codegen/report/peak.h"
#include "codegen/report/report.h"
#include "ir/base/units.h"
#include "ir/base/utf8.h"
#include "ir/op.h"

namespace mt {
namespace {

size_t At(int64_t i) { return static_cast<size_t>(i); }

// Two shades in turn tell neighbours of one class apart without outlines, which cost more to draw than the boxes.
constexpr int kShades = 2;
constexpr int64_t kMaxUnits = int64_t{1} << 22;
constexpr int kTimelineColumns = 2000;
// An outline makes large boxes easier to see; of small ones it would leave nothing: parts of the arena and of the time.
constexpr int64_t kOutlinedShare = 150;

int ProgramIndex(const proto::PlanProto& plan, const proto::ProgramProto& program) {
  for (int i = 0; i < plan.programs_size(); ++i) {
    if (&plan.programs(i) == &program) return i;
  }
  return -1;
}

// The length of the program in time: at least one step.
int Steps(const proto::ProgramProto& program) { return std::max(program.instructions_size(), 1); }

// A step of 1, 2 or 5 times a power of ten, at least 1, that gives at most `ticks` of them.
int64_t DecimalStep(int64_t range, int ticks) {
  int64_t step = 1;
  for (int i = 0; range / step > ticks; ++i) step = i % 3 == 1 ? step / 2 * 5 : step * 2;
  return step;
}

// A power of two.
int64_t BinaryStep(int64_t range, int ticks) {
  int64_t step = 1;
  while (range / step > ticks) step *= 2;
  return step;
}

std::string Number(double value) {
  std::string text = absl::StrFormat("%.2f", value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text;
}

// "1.75 GiB", "8 MiB".
std::string TickLabel(int64_t bytes) {
  static constexpr absl::string_view kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return absl::StrCat(Number(value), " ", kUnits[unit]);
}

void Box(std::string& path, int64_t x, int64_t y, int64_t w, int64_t h) {
  absl::StrAppend(&path, "M", x, " ", y, "h", w, "v", h, "h-", w, "z");
}

// A plot with its own coordinates, stretched over a rectangle of the picture.
std::string PlotBegin(absl::string_view css_class, double x, double y, double width, double height, int64_t columns,
                      int64_t units) {
  return absl::StrCat("<svg class=\"", css_class, "\" x=\"", Number(x), "\" y=\"", Number(y), "\" width=\"",
                      Number(width), "\" height=\"", Number(height), "\" viewBox=\"0 0 ", columns, " ", units,
                      "\" preserveAspectRatio=\"none\">\n");
}

std::string Text(double x, double y, absl::string_view css_class, absl::string_view anchor, absl::string_view text) {
  return absl::StrCat("<text x=\"", Number(x), "\" y=\"", Number(y), "\" class=\"", css_class, "\" text-anchor=\"",
                      anchor, "\">", EscapeXml(text), "</text>\n");
}

// Byte labels and lines from `bottom` up, `top` being the most.
std::string ByteTicks(const ChartLayout& layout, double bottom, double height, int64_t most_bytes, int ticks) {
  std::string text;
  const int64_t step = BinaryStep(most_bytes, ticks);
  for (int64_t bytes = 0; bytes <= most_bytes; bytes += step) {
    const double y = bottom - height * static_cast<double>(bytes) / static_cast<double>(most_bytes);
    absl::StrAppend(&text, "<path class=\"mt-grid\" d=\"M", layout.left - 5, " ", Number(y), "h5\"/>");
    text += Text(layout.left - 9, y + 4, "mt-tick", "end", TickLabel(bytes));
  }
  return text;
}

std::string Arena(const proto::PlanProto& plan, const proto::ProgramProto& program, const ChartLayout& layout) {
  const ChartScale scale = ScaleOf(plan, layout.axis_bytes);
  const int index = ProgramIndex(plan, program);
  const int64_t columns = Steps(program);
  std::array<std::array<std::string, 2 * kShades>, kNumMemoryClasses> paths;  // The second half: with an outline.
  std::array<int, kNumMemoryClasses> count = {};
  for (const proto::BufferProto& buffer : plan.buffers()) {
    const int c = buffer.memory_class() - 1;
    if ((buffer.program() != -1 && buffer.program() != index) || c < 0 || c >= kNumMemoryClasses) continue;
    const int64_t bottom = buffer.offset() / scale.bytes_per_unit;
    const int64_t top =
        (buffer.offset() + AlignedBytes(plan, buffer.size_bytes()) + scale.bytes_per_unit - 1) / scale.bytes_per_unit;
    const int64_t first = buffer.program() == -1 ? 0 : buffer.first();
    const int64_t last = buffer.program() == -1 ? columns - 1 : buffer.last();
    const bool large = top - bottom > scale.units / kOutlinedShare && last - first + 1 > columns / kOutlinedShare;
    const int kind = count[At(c)]++ % kShades + (large ? kShades : 0);
    Box(paths[At(c)][At(kind)], first, scale.units - top, last - first + 1, top - bottom);
  }
  std::string text = PlotBegin("mt-plot", layout.left, layout.plot_top(), layout.plot_width(), layout.plot_height,
                               columns, scale.units);
  absl::StrAppend(&text, "<rect class=\"mt-free\" width=\"", columns, "\" height=\"", scale.units, "\"/>\n");
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    for (int kind = 0; kind < 2 * kShades; ++kind) {
      const std::string& path = paths[At(c)][At(kind)];
      if (path.empty()) continue;
      absl::StrAppend(&text, "<path class=\"mt-box mt-", MemoryClassName(MemoryClassAt(c)),
                      kind % kShades == 0 ? "" : " mt-shade", kind >= kShades ? " mt-line" : "", "\" d=\"", path,
                      "\"/>\n");
    }
  }
  text += "</svg>\n";
  text += "<g class=\"mt-yticks\">\n";
  text += ByteTicks(layout, layout.plot_top() + layout.plot_height, layout.plot_height,
                    scale.bytes_per_unit * scale.units, 8);
  text += "</g>\n";
  return text;
}

// The phases on the time axis, what is recomputed below them, and instruction numbers.
std::string TimeAxis(const proto::ProgramProto& program, const ChartLayout& layout) {
  const int columns = Steps(program);
  std::array<std::string, kNumPhases> paths;
  std::array<std::pair<int, int>, kNumPhases> longest = {};  // Begin and length.
  std::string recomputed;
  // A view runs no code: it is of the phase that it lies in.
  const auto phase_of = [&](int i, Phase before) {
    const proto::InstructionProto& instruction = program.instructions(i);
    const OpDef* op = FindOp(instruction.op());
    return op != nullptr && op->is_view ? before : ParsePhase(instruction.phase()).value_or(before);
  };
  Phase phase = Phase::kForward;
  int begin = 0;
  const auto end_run = [&](int end) {
    const size_t p = static_cast<size_t>(phase);
    if (end > begin) Box(paths[p], begin, 0, end - begin, 10);
    if (end - begin > longest[p].second) longest[p] = {begin, end - begin};
    begin = end;
  };
  for (int i = 0; i < program.instructions_size(); ++i) {
    const Phase next = phase_of(i, phase);
    if (next != phase) end_run(i);
    phase = next;
    if (program.instructions(i).recompute()) Box(recomputed, i, 7, 1, 3);
  }
  end_run(program.instructions_size());
  std::string text =
      PlotBegin("mt-phases", layout.left, layout.phase_top(), layout.plot_width(), layout.phase_height, columns, 10);
  for (int p = 0; p < kNumPhases; ++p) {
    if (paths[At(p)].empty()) continue;
    absl::StrAppend(&text, "<path class=\"mt-", PhaseName(static_cast<Phase>(p)), "\" d=\"", paths[At(p)], "\"/>\n");
  }
  if (!recomputed.empty()) absl::StrAppend(&text, "<path class=\"mt-recomputed\" d=\"", recomputed, "\"/>\n");
  text += "</svg>\n<g class=\"mt-xticks\">\n";
  const auto x_of = [&](double column) { return layout.left + layout.plot_width() * column / columns; };
  const int64_t step = DecimalStep(columns, 12);
  for (int64_t i = 0; i < columns; i += step) {
    text += Text(x_of(static_cast<double>(i) + 0.5), layout.ticks_top() + 13, "mt-tick", "middle", absl::StrCat(i));
  }
  text += "</g>\n<g class=\"mt-names\">\n";
  for (int p = 0; p < kNumPhases; ++p) {
    const auto& [first, length] = longest[At(p)];
    const absl::string_view name = PhaseName(static_cast<Phase>(p));
    if (layout.plot_width() * static_cast<double>(length) / columns < 8.0 * static_cast<double>(name.size())) continue;
    text += Text(x_of(first + length / 2.0), layout.phase_top() + 11, "mt-phase", "middle", name);
  }
  text += "</g>\n";
  return text;
}

std::string PeakMark(const proto::ProgramProto& program, const ChartLayout& layout) {
  const double x = layout.left + layout.plot_width() * (program.peak_instruction() + 0.5) / Steps(program);
  std::string label = absl::StrCat("peak ", FormatBytes(program.peak_bytes()));
  if (program.peak_instruction() < program.instructions_size()) {
    const proto::InstructionProto& at = program.instructions(program.peak_instruction());
    absl::StrAppend(&label, " at ", program.peak_instruction(), ": ", at.op(), " ", at.name().substr(0, 60));
  }
  const bool left = x > layout.width / 2;
  return absl::StrCat(
      "<g class=\"mt-peak\">\n<path d=\"M", Number(x), " ", layout.plot_top() - 4, "V", layout.ticks_top(), "\"/>\n",
      Text(x + (left ? -6 : 6), layout.plot_top() + 14, "mt-peaklabel", left ? "end" : "start", label), "</g>\n");
}

std::string Legend(const proto::PlanProto& plan, const proto::ProgramProto& program, const ChartLayout& layout) {
  const Peak peak = PeakOf(plan, program);
  std::string text = "<g class=\"mt-legend\">\n";
  double x = layout.right;
  const double y = layout.title_height + 15;
  text += Text(x, y, "mt-tick", "start", "at the peak");
  x += 74;
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    const std::string label = absl::StrCat(absl::StrReplaceAll(MemoryClassName(MemoryClassAt(c)), {{"_", " "}}), " ",
                                           FormatBytes(peak.by_class[At(c)]));
    absl::StrAppend(&text, "<rect class=\"mt-", MemoryClassName(MemoryClassAt(c)), "\" x=\"", Number(x), "\" y=\"",
                    Number(y - 10), "\" width=\"11\" height=\"11\"/>");
    text += Text(x + 16, y, "mt-label", "start", label);
    x += 34 + 6.5 * static_cast<double>(label.size());
  }
  int recomputed = 0;
  for (const proto::InstructionProto& instruction : program.instructions()) recomputed += instruction.recompute();
  if (recomputed > 0) {
    const std::string label = absl::StrCat(recomputed, " recomputed");
    x = layout.width - layout.right - 16 - 6.6 * static_cast<double>(label.size());
    absl::StrAppend(&text, "<rect class=\"mt-recomputed\" x=\"", Number(x), "\" y=\"", Number(y - 10),
                    "\" width=\"11\" height=\"11\"/>");
    text += Text(x + 16, y, "mt-label", "start", label);
  }
  text += "</g>\n";
  return text;
}

std::string Timeline(const proto::PlanProto& plan, const proto::ProgramProto& program, const ChartLayout& layout) {
  const int steps = Steps(program);
  const std::vector<ClassBytes> live = LiveOverTime(plan, program, std::min(steps, kTimelineColumns));
  constexpr int64_t kUnits = 10000;
  const double most = static_cast<double>(std::max<int64_t>(plan.arena_bytes(), 1));
  const int64_t columns = static_cast<int64_t>(live.size());
  std::string text = PlotBegin("mt-timeline", layout.left, layout.timeline_top(), layout.plot_width(),
                               layout.timeline_height, columns, kUnits);
  absl::StrAppend(&text, "<rect class=\"mt-free\" width=\"", columns, "\" height=\"", kUnits, "\"/>\n");
  // From the highest of the stack down: each area reaches to the bottom and is covered by those below it.
  for (int c = kNumMemoryClasses - 1; c >= 0; --c) {
    std::string path = absl::StrCat("M0 ", kUnits);
    int64_t before = kUnits;
    for (int64_t i = 0; i < columns; ++i) {
      double sum = 0;
      for (int k = 0; k <= c; ++k) sum += static_cast<double>(live[At(i)][At(k)]);
      const int64_t y = kUnits - static_cast<int64_t>(std::llround(kUnits * std::min(sum / most, 1.0)));
      if (y == before) continue;
      absl::StrAppend(&path, "H", i, "V", y);
      before = y;
    }
    absl::StrAppend(&path, "H", columns, "V", kUnits, "z");
    absl::StrAppend(&text, "<path class=\"mt-box mt-", MemoryClassName(MemoryClassAt(c)), "\" d=\"", path, "\"/>\n");
  }
  text += "</svg>\n";
  text += Text(layout.left, layout.timeline_top() - 5, "mt-tick", "start", "live bytes");
  text +=
      ByteTicks(layout, layout.timeline_top() + layout.timeline_height, layout.timeline_height, plan.arena_bytes(), 3);
  return text;
}

}  // namespace

std::string PrintableText(absl::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    const bool printable = c.code_point >= 0x20 && c.code_point != 0x7F;
    if (printable) {
      out.append(text.data(), static_cast<size_t>(c.size_bytes));
    } else {
      AppendUtf8(0xFFFD, &out);
    }
    text.remove_prefix(printable ? static_cast<size_t>(c.size_bytes) : 1);
  }
  return out;
}

std::string EscapeXml(absl::string_view text) {
  return absl::StrReplaceAll(PrintableText(text),
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

ChartScale ScaleOf(const proto::PlanProto& plan, int64_t axis_bytes) {
  const int64_t bytes = std::max(plan.arena_bytes(), axis_bytes);
  ChartScale scale;
  scale.bytes_per_unit = std::max<int64_t>(plan.alignment(), 1);
  while (bytes / scale.bytes_per_unit > kMaxUnits) scale.bytes_per_unit *= 2;
  scale.units = std::max<int64_t>((bytes + scale.bytes_per_unit - 1) / scale.bytes_per_unit, 1);
  return scale;
}

std::vector<ClassBytes> LiveOverTime(const proto::PlanProto& plan, const proto::ProgramProto& program, int columns) {
  const int index = ProgramIndex(plan, program);
  const int steps = Steps(program);
  ClassBytes live = {};
  std::vector<ClassBytes> change(At(steps) + 1, ClassBytes{});
  for (const proto::BufferProto& buffer : plan.buffers()) {
    const int c = buffer.memory_class() - 1;
    if (c < 0 || c >= kNumMemoryClasses) continue;
    const int64_t bytes = AlignedBytes(plan, buffer.size_bytes());
    if (buffer.program() == -1) {
      live[At(c)] += bytes;
    } else if (buffer.program() == index) {
      change[At(buffer.first())][At(c)] += bytes;
      change[At(buffer.last()) + 1][At(c)] -= bytes;
    }
  }
  std::vector<ClassBytes> most(At(columns), ClassBytes{});
  for (int i = 0; i < steps; ++i) {
    for (size_t c = 0; c < kNumMemoryClasses; ++c) live[c] += change[At(i)][c];
    ClassBytes& column = most[At(static_cast<int64_t>(i) * columns / steps)];
    if (Sum(live) > Sum(column)) column = live;
  }
  return most;
}

absl::string_view ChartStyle() {
  return R"css(
:root{--paper:#ffffff;--ink:#1f2328;--muted:#5d6570;--line:#d5dae0;--free:#f0f2f5;--peak:#d1242f}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e6e9ed;--muted:#9aa4b0;--line:#39424d;--free:#1b2128;--peak:#ff7b72}}
.mt-chart text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;fill:var(--ink)}
.mt-chart .mt-title{font-size:15px;font-weight:600}
.mt-chart .mt-tick{fill:var(--muted);font-size:11px}
.mt-chart .mt-phase{fill:#fff;font-size:11px;font-weight:600}
.mt-paper{fill:var(--paper)}
.mt-free{fill:var(--free)}
.mt-grid{stroke:var(--muted);fill:none}
.mt-box{shape-rendering:crispEdges}
.mt-line{stroke:var(--paper);stroke-width:.6px;vector-effect:non-scaling-stroke;shape-rendering:auto}
.mt-parameters{fill:#4269d0}
.mt-gradients{fill:#e8603c}
.mt-optimizer_state{fill:#9467d8}
.mt-activations{fill:#2fa39a}
.mt-workspace{fill:#a4714a}
.mt-io{fill:#d9a400}
.mt-shade{fill-opacity:.72}
.mt-forward{fill:#5b6b7d}
.mt-backward{fill:#3d4754}
.mt-optimizer{fill:#7d6b5b}
.mt-recomputed{fill:#ffd33d}
.mt-peak path{stroke:var(--peak);stroke-width:1.2px;stroke-dasharray:4 3;fill:none}
.mt-chart .mt-peaklabel{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
)css";
}

std::string ProgramChart(const proto::PlanProto& plan, const proto::ProgramProto& program, const ChartLayout& layout,
                         absl::string_view title, bool standalone) {
  std::string text = absl::StrCat("<svg ", standalone ? "xmlns=\"http://www.w3.org/2000/svg\" " : "",
                                  "class=\"mt-chart\" viewBox=\"0 0 ", layout.width, " ", layout.height(), "\" ");
  if (standalone) absl::StrAppend(&text, "width=\"", layout.width, "\" height=\"", layout.height(), "\" ");
  absl::StrAppend(&text, "role=\"img\" aria-label=\"", EscapeXml(title), "\">\n");
  if (standalone) absl::StrAppend(&text, "<style>", ChartStyle(), "</style>\n");
  absl::StrAppend(&text, "<rect class=\"mt-paper\" width=\"", layout.width, "\" height=\"", layout.height(), "\"/>\n");
  if (layout.title_height > 0) text += Text(layout.left, layout.title_height - 8, "mt-title", "start", title);
  text += Legend(plan, program, layout);
  text += Arena(plan, program, layout);
  text += TimeAxis(program, layout);
  if (layout.timeline_height > 0) text += Timeline(plan, program, layout);
  text += PeakMark(program, layout);
  text += "</svg>\n";
  return text;
}

std::string PlanSvg(const proto::PlanProto& plan) { return PlanSvg(plan, 0); }

std::string PlanSvg(const proto::PlanProto& plan, int64_t axis_bytes) {
  const proto::ProgramProto& program = LargestProgram(plan);
  ChartLayout layout;
  layout.title_height = 30;
  layout.axis_bytes = axis_bytes;
  const auto fact = [&](const std::string& name) {
    const auto at = plan.facts().find(name);
    return at == plan.facts().end() ? 0 : at->second;
  };
  std::string title =
      absl::StrCat(plan.model(), ": ", FormatBytes(program.peak_bytes()), " for ", program.name(), ", batch ",
                   fact("batch"), ", sequence ", fact("sequence"), ", ", plan.target(), ", passes ", plan.passes());
  constexpr size_t kLongest = 150;
  if (title.size() > kLongest) title = absl::StrCat(title.substr(0, kLongest), " ...");
  return ProgramChart(plan, program, layout, title, /*standalone=*/true);
}

}  // namespace mt
