// Where the heads of attention's operands and results lie.
#ifndef MT_IR_ATTENTION_LAYOUT_H_
#define MT_IR_ATTENTION_LAYOUT_H_

#include <cstdint>

#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/tensor_type.h"

namespace mt {

// Element d of row t of head h in sample b lies `batch` b + `head` h + `row` t + d elements behind the first of head 0.
struct HeadStrides {
  int64_t batch, head, row;

  int64_t At(int64_t b, int64_t h, int64_t t) const { return batch * b + head * h + row * t; }
};

// flash_attention: a tensor [B, heads, T, D] for each of q, k, v and out. flash_attention_packed: q, k and v are
// columns of one [B, T, (heads + 2 kv_heads) D], out is [B, T, heads D]. Gradients lie as what they are gradients of.
struct AttentionLayout {
  DType dtype;
  bool packed;
  int64_t batch, heads, kv_heads, length, width;
  HeadStrides q_strides, kv_strides, out_strides;  // kv: of k and of v.
  int64_t k_offset, v_offset;  // Elements, from q's first to theirs, where they lie in one tensor; else 0.

  int64_t group() const { return heads / kv_heads; }
  // In lse [B, heads, T].
  int64_t Query(int64_t b, int64_t h, int64_t t) const { return (b * heads + h) * length + t; }
  int64_t queries() const { return batch * heads * length; }
  int64_t keys() const { return batch * kv_heads * length; }

  // Indices of operands; backward, operand 0 is dout. Without packing k and v follow q.
  int first_operand;  // q, or all three.
  int statistics;     // The first after v: rng; backward out, lse, rng.
};

// Of a node that infer has seen.
AttentionLayout LayoutOfAttention(absl::Span<const TensorType> operands, const Attrs& attrs, bool backward);

}  // namespace mt

#endif  // MT_IR_ATTENTION_LAYOUT_H_
