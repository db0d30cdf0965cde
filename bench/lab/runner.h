// Runs a suite: each run compiles and trains as processes of its own.
#ifndef MT_BENCH_LAB_RUNNER_H_
#define MT_BENCH_LAB_RUNNER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/suite.pb.h"

namespace mt {

struct SuiteOptions {
  std::string data;     // A corpus.
  std::string dataset;  // In file names; empty: the corpus folder's name.
  std::string out = "results";
  std::vector<std::string> sets;           // After the suite's.
  std::optional<int64_t> batch, sequence;  // Of every run.
  std::vector<std::string> train_flags;    // For mtrun, after the suite's.
  bool fresh = false;                      // Finished runs are replaced.
  std::string tools;                       // The folder of mtc and mtrun.
};

// Runs what is not finished in options.out, in order; a run that fails does not keep the others from running. Prints a
// line a run; results.h says what it writes. A run is finished when its metrics are there, made with the same settings.
// Errors: InvalidArgument (a finished run was made with other settings; names them), FailedPrecondition (no corpus,
// another mtlab works in the folder), Cancelled (interrupted), DataLoss; else that of the first run that failed.
absl::Status RunSuite(const proto::Suite& suite, const std::vector<proto::RunSpec>& runs, const SuiteOptions& options);

}  // namespace mt

#endif  // MT_BENCH_LAB_RUNNER_H_
