// Passes as documentation, made from their rows: what `mtc passes [NAME]` prints.
#ifndef MT_PASSES_DESCRIBE_H_
#define MT_PASSES_DESCRIBE_H_

#include <string>

#include "absl/strings/string_view.h"
#include "passes/registry.h"

namespace mt {

// One pass, whole: stage, options, tolerance, source, other names.
std::string DescribePass(const PassDef& pass);

// One line each in the order they run, then the named pipelines of `target`.
std::string DescribePasses(const PassRegistry& registry = Passes(), absl::string_view target = "cpu");

}  // namespace mt

#endif  // MT_PASSES_DESCRIBE_H_
