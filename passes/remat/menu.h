// What one block may keep for the backward pass, and what each choice costs.
#ifndef MT_PASSES_REMAT_MENU_H_
#define MT_PASSES_REMAT_MENU_H_

#include <cstdint>
#include <vector>

#include "ir/cost.h"
#include "passes/remat/blocks.h"

namespace mt {

// One choice for a block. Bytes and seconds are the model's by which choices are compared; the plan has the last word.
struct RematOption {
  std::vector<bool> kept;   // By node of the block: its results stay until the backward pass. Outputs of blocks that
                            // are units stay always.
  int64_t saved_bytes = 0;  // Held from the block's forward to its backward pass, outputs included.
  int64_t peak_bytes = 0;   // Most bytes live in the block's backward pass: kept, recomputed and gradients.
  double seconds = 0;       // Of what is recomputed.
};

struct RematMenu {
  // None is worse in all of saved_bytes, peak_bytes and seconds; by seconds. The first recomputes nothing.
  std::vector<RematOption> options;
  RematOption free;            // The best without recomputing an op whose policy prefers saving (matmul, attention).
  RematOption full;            // Outputs alone are kept; for a block that is no unit as `free`.
  int64_t growth_bytes = 0;    // Made in the backward pass and still there at its end: gradients of parameters.
  double forward_seconds = 0;  // Of the whole block, once.
};

// Enumerates what may be kept (all subsets of up to kMaxChoices nodes; where a block has more, the smallest stay kept)
// with just-in-time recomputation simulated through the block's backward pass in its order.
inline constexpr int kMaxChoices = 13;
RematMenu MakeRematMenu(const RematChain& chain, int block, const Roofline& roofline);

}  // namespace mt

#endif  // MT_PASSES_REMAT_MENU_H_
