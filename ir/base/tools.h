// The command lines of all tools. Each tool's table is one file, tools_NAME.cc, and every tool links all of them: so
// `mtc` can say that --lr goes to `mtrun`. A flag is declared when its behaviour exists, not before.
#ifndef MT_IR_BASE_TOOLS_H_
#define MT_IR_BASE_TOOLS_H_

#include "absl/types/span.h"
#include "ir/base/flags.h"

namespace mt {

extern const ToolDef kMtc;
extern const ToolDef kMtrun;
extern const ToolDef kMtcorpus;
extern const ToolDef kMtlab;

absl::Span<const ToolDef* const> AllTools();

}  // namespace mt

#endif  // MT_IR_BASE_TOOLS_H_
