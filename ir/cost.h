// Sums of the rows' costs, and seconds on a roofline.
#ifndef MT_IR_COST_H_
#define MT_IR_COST_H_

#include "ir/graph.h"

namespace mt {

// What a device can do at best; 0: not known, and not counted.
struct Roofline {
  double matmul_flops_per_second = 0;
  double bytes_per_second = 0;
};

// Inputs and views cost nothing.
Cost NodeCost(const Node& node);
// Sum over all nodes; 2^63 - 1 where it is more.
Cost GraphCost(const Graph& graph);
// max(flops / peak, bytes / bandwidth).
double RooflineSeconds(const Cost& cost, const Roofline& roofline);

}  // namespace mt

#endif  // MT_IR_COST_H_
