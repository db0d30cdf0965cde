// A plan as pictures: a page, a chart, and a file for PyTorch's memory viewer.
//
// Names in a plan are untrusted: everything here escapes them. REQUIRES, of all: a verified plan with a program.
#ifndef MT_CODEGEN_REPORT_REPORT_H_
#define MT_CODEGEN_REPORT_REPORT_H_

#include <string>

#include "proto/plan.pb.h"

namespace mt {

// One self-contained HTML page: for each program the arena over time (see PlanSvg) with what is under the pointer, the
// live bytes over time, bytes by class and phase, the largest tensors at the peak, what is recomputed and its cost.
std::string PlanHtml(const proto::PlanProto& plan);

// The arena of the largest program as one SVG picture: a rectangle a buffer, from its first to its last instruction and
// from its offset up, coloured by class; states at the bottom, phases on the time axis, the peak instruction marked.
// Light or dark as the reader's system is.
std::string PlanSvg(const proto::PlanProto& plan);
// With an axis that reaches to `axis_bytes` at least, so that pictures of several plans compare.
std::string PlanSvg(const proto::PlanProto& plan, int64_t axis_bytes);

// What pytorch.org/memory_viz opens: a memory snapshot of the largest program, the arena as one segment, each buffer
// allocated at its first instruction and freed after its last, with op, name, type and class in its stack frames.
// The viewer reads Python pickles alone: the file is one, protocol 2.
std::string PlanSnapshotPickle(const proto::PlanProto& plan);
// The same as JSON, for other tools.
std::string PlanSnapshotJson(const proto::PlanProto& plan);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_REPORT_H_
