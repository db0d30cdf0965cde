// The chart of one program, as SVG; the page and the picture share it.
#ifndef MT_CODEGEN_REPORT_CHART_H_
#define MT_CODEGEN_REPORT_CHART_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "codegen/plan/plan.h"
#include "proto/plan.pb.h"

namespace mt {

// `text` with bytes that are no UTF-8 and control characters replaced by U+FFFD.
std::string PrintableText(absl::string_view text);
// For XML and HTML: PrintableText with markup escaped.
std::string EscapeXml(absl::string_view text);

// Where things lie, in units of the viewBox; the page's script uses the same numbers.
struct ChartLayout {
  int width = 1200, left = 84, right = 16;
  int title_height = 0;  // Of the title line; the legend is below it.
  int legend_height = 28;
  int plot_height = 420;
  int phase_height = 14;
  int64_t axis_bytes = 0;   // The plot reaches at least so high; the arena's own height where that is more.
  int timeline_height = 0;  // 0: no timeline of live bytes.
  int plot_top() const { return title_height + legend_height; }
  int plot_width() const { return width - left - right; }
  int phase_top() const { return plot_top() + plot_height + 4; }
  int ticks_top() const { return phase_top() + phase_height; }
  int timeline_top() const { return ticks_top() + 34; }
  int height() const { return ticks_top() + 26 + (timeline_height > 0 ? timeline_height + 18 : 0); }
};

// The axis's height in the plot's own vertical units, each of `bytes_per_unit`, a power of two times the alignment.
struct ChartScale {
  int64_t bytes_per_unit = 1, units = 1;
};
ChartScale ScaleOf(const proto::PlanProto& plan, int64_t axis_bytes = 0);

// Most live bytes of each class in each of at most `columns` equal steps of time: at the step's instruction with the
// most live bytes in all.
std::vector<ClassBytes> LiveOverTime(const proto::PlanProto& plan, const proto::ProgramProto& program, int columns);

// The colours, as a style sheet's rules for the classes that the chart uses; light, and dark by the reader's system.
absl::string_view ChartStyle();

// `title`: of the picture; shown where layout.title_height > 0. `standalone`: a picture of its own with its style.
std::string ProgramChart(const proto::PlanProto& plan, const proto::ProgramProto& program, const ChartLayout& layout,
                         absl::string_view title, bool standalone);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_CHART_H_
