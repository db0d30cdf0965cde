// Sums of the rows' costs, and seconds on a roofline.
#ifndef MT_IR_COST_H_
#define MT_IR_COST_H_

#include "ir/graph.h"

namespace mt {

// What a device can do at best; 0: not known, and not counted.
struct Roofline {
  double matmul_flops_per_second = 0;    // Of f32 matmuls, and of what is no matmul.
  double tf32_flops_per_second = 0;      // Of f32 matmuls that round their operands to TF32; 0: as f32.
  double matmul16_flops_per_second = 0;  // Of matmuls of bf16 or f16; 0: as f32.
  double bytes_per_second = 0;
};

// Inputs and views cost nothing.
Cost NodeCost(const Node& node);
// Sum over all nodes; 2^63 - 1 where it is more.
Cost GraphCost(const Graph& graph);
// max(flops / peak, bytes / bandwidth), the peak that of f32 matmuls.
double RooflineSeconds(const Cost& cost, const Roofline& roofline);
// The same with the rate of what the op multiplies: an op that autocast runs in low precision is made of matmuls.
double OpSeconds(const OpDef& op, absl::Span<const TensorType> operands, const Attrs& attrs, const Cost& cost,
                 const Roofline& roofline);
double NodeSeconds(const Node& node, const Roofline& roofline);
// Sum over all nodes: an estimate of a run, one op after the other.
double GraphSeconds(const Graph& graph, const Roofline& roofline);

}  // namespace mt

#endif  // MT_IR_COST_H_
