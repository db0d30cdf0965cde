#include "ir/attention_layout.h"

namespace mt {
namespace {

HeadStrides OfHeads(int64_t heads, int64_t length, int64_t width) {
  return {.batch = heads * length * width, .head = length * width, .row = width};
}
HeadStrides OfColumns(int64_t row, int64_t length, int64_t width) {
  return {.batch = length * row, .head = width, .row = row};
}

}  // namespace

AttentionLayout LayoutOfAttention(absl::Span<const TensorType> operands, const Attrs& attrs, bool backward) {
  AttentionLayout l;
  l.first_operand = backward ? 1 : 0;
  const TensorType& first = operands[static_cast<size_t>(l.first_operand)];
  l.dtype = first.dtype;
  l.packed = first.rank() == 3;
  l.batch = first.dim(0);
  if (l.packed) {
    l.heads = attrs.Int("heads");
    l.kv_heads = attrs.Int("kv_heads");
    l.length = first.dim(1);
    l.width = first.dim(2) / (l.heads + 2 * l.kv_heads);
    l.q_strides = l.kv_strides = OfColumns(first.dim(2), l.length, l.width);
    l.out_strides = OfColumns(l.heads * l.width, l.length, l.width);
    l.k_offset = l.heads * l.width;
    l.v_offset = l.k_offset + l.kv_heads * l.width;
    l.statistics = l.first_operand + 1;
  } else {
    l.heads = first.dim(1);
    l.kv_heads = operands[static_cast<size_t>(l.first_operand) + 1].dim(1);
    l.length = first.dim(2);
    l.width = first.dim(3);
    l.q_strides = l.out_strides = OfHeads(l.heads, l.length, l.width);
    l.kv_strides = OfHeads(l.kv_heads, l.length, l.width);
    l.k_offset = l.v_offset = 0;
    l.statistics = l.first_operand + 3;
  }
  return l;
}

}  // namespace mt
