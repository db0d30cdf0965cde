// Names of things alike: "h0.fc1", "h1.fc1", ... are "h*.fc1".
#ifndef MT_CODEGEN_REPORT_NAMES_H_
#define MT_CODEGEN_REPORT_NAMES_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace mt {

// The name with each run of digits replaced by '\0': equal for names that differ in numbers alone.
std::string WithoutNumbers(absl::string_view name);

// One name for several that differ in numbers alone: a number that all share stays, the others are "*".
// REQUIRES: not empty.
std::string CommonName(const std::vector<std::string>& names);

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_NAMES_H_
