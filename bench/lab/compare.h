// Tables over finished runs.
#ifndef MT_BENCH_LAB_COMPARE_H_
#define MT_BENCH_LAB_COMPARE_H_

#include <string>
#include <vector>

#include "bench/lab/results.h"

namespace mt {

// The comparison table, memory by phase, the techniques, and what follows from them; ratios are to the run called
// "baseline", or to the first one. REQUIRES: not empty.
std::string ComparisonReport(const std::vector<Result>& results);

// The results as one JSON value, for experiment_summary.json.
Json ComparisonJson(const std::vector<Result>& results);

}  // namespace mt

#endif  // MT_BENCH_LAB_COMPARE_H_
