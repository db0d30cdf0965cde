// What holds for every graph that was accepted.
#ifndef MT_TESTS_FUZZ_GRAPH_CHECKS_H_
#define MT_TESTS_FUZZ_GRAPH_CHECKS_H_

#include "ir/graph.h"

namespace mt {

// Every node has a cost that is not negative.
void ExpectCosts(const Graph& graph);

}  // namespace mt

#endif  // MT_TESTS_FUZZ_GRAPH_CHECKS_H_
