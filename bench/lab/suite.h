// Suites: files, checked.
#ifndef MT_BENCH_LAB_SUITE_H_
#define MT_BENCH_LAB_SUITE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/suite.pb.h"

namespace mt {

// Names of the suites that come with mt, sorted.
std::vector<std::string> KnownSuites();

// A file or the name of a known suite. The text is untrusted. Errors: NotFound (did you mean), InvalidArgument (syntax
// with line and column, a missing or unfit field, two runs of one name).
absl::StatusOr<proto::Suite> LoadSuite(const std::string& suite);

// The runs that are in `only` (all, where it is empty) and not in `skip`, in the suite's order. Errors: InvalidArgument
// for a name that the suite does not have, or where no run is left.
absl::StatusOr<std::vector<proto::RunSpec>> ChooseRuns(const proto::Suite& suite, const std::vector<std::string>& only,
                                                       const std::vector<std::string>& skip);

}  // namespace mt

#endif  // MT_BENCH_LAB_SUITE_H_
