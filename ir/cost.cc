#include "ir/cost.h"

#include <algorithm>
#include <limits>

namespace mt {
namespace {

// A file may describe more work than 63 bits count.
int64_t SaturatingAdd(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() : sum;
}

}  // namespace

Cost NodeCost(const Node& node) {
  if (node.is_input() || node.op().is_view) return Cost{};
  return CostOf(node.op(), node.operand_types(), node.result_types(), node.attrs());
}

Cost GraphCost(const Graph& graph) {
  Cost total;
  for (const Node* node : graph.Nodes()) {
    const Cost cost = NodeCost(*node);
    total.flops = SaturatingAdd(total.flops, cost.flops);
    total.bytes_read = SaturatingAdd(total.bytes_read, cost.bytes_read);
    total.bytes_written = SaturatingAdd(total.bytes_written, cost.bytes_written);
  }
  return total;
}

double RooflineSeconds(const Cost& cost, const Roofline& roofline) {
  const auto seconds = [](double amount, double per_second) { return per_second > 0 ? amount / per_second : 0.0; };
  return std::max(seconds(static_cast<double>(cost.flops), roofline.matmul_flops_per_second),
                  seconds(static_cast<double>(cost.bytes_read) + static_cast<double>(cost.bytes_written),
                          roofline.bytes_per_second));
}

double OpSeconds(const OpDef& op, absl::Span<const TensorType> operands, const Attrs& attrs, const Cost& cost,
                 const Roofline& roofline) {
  Roofline rates = roofline;
  if (op.autocast == Autocast::kAlways && !operands.empty()) {
    const bool is_16_bit = operands[0].dtype == DType::kBF16 || operands[0].dtype == DType::kF16;
    const AttrValue* attribute = attrs.Find("tf32");
    const bool* tf32 = attribute == nullptr ? nullptr : std::get_if<bool>(attribute);
    double rate = 0;
    if (is_16_bit) {
      rate = roofline.matmul16_flops_per_second;
    } else if (tf32 != nullptr && *tf32) {
      rate = roofline.tf32_flops_per_second;
    }
    if (rate > 0) rates.matmul_flops_per_second = rate;
  }
  return RooflineSeconds(cost, rates);
}

double NodeSeconds(const Node& node, const Roofline& roofline) {
  if (node.is_input() || node.op().is_view) return 0;
  return OpSeconds(node.op(), node.operand_types(), node.attrs(), NodeCost(node), roofline);
}

double GraphSeconds(const Graph& graph, const Roofline& roofline) {
  double seconds = 0;
  for (const Node* node : graph.Nodes()) seconds += NodeSeconds(*node, roofline);
  return seconds;
}

}  // namespace mt
