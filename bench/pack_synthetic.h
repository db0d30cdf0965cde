// Lifetimes like those of a GPT training step, from a seed: inputs of any size for the arena packer.
#ifndef MT_BENCH_PACK_SYNTHETIC_H_
#define MT_BENCH_PACK_SYNTHETIC_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "codegen/memory/arena_packer.h"

namespace mt {

struct SyntheticOptions {
  int64_t buffers = 1500;  // About as many come out; at least one block.
  uint64_t seed = 1;
  bool remat = false;       // Blocks keep their input only and compute the rest again in the backward pass.
  int64_t loss_chunks = 1;  // Row chunks of the logits.
  bool fused_update =
      false;  // Weight gradients are freed as the backward pass produces them, else they live to the end.
};

// Forward activations freed in reverse by the backward pass, short temporaries in both, weight gradients, one update
// with temporaries for each weight. Sizes are those of a block of width C over `tokens` rows, varied a little by the
// seed.
inline std::vector<PackInterval> SyntheticTraining(const SyntheticOptions& options) {
  uint64_t state = options.seed * 0x9e3779b97f4a7c15u;
  const auto random = [&](int64_t n) {
    state += 0x9e3779b97f4a7c15u;
    uint64_t x = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return static_cast<int64_t>((x ^ (x >> 31)) % static_cast<uint64_t>(n));
  };
  const int64_t width = 256 * (2 + random(7)), tokens = 512 * (1 + random(8)), heads = width / 64;
  const int64_t vocabulary = 1024 * (24 + random(104));
  std::vector<PackInterval> out;
  int64_t step = 0;
  const auto add = [&](int64_t first, int64_t last, int64_t bytes) { out.push_back({first, last, bytes}); };

  struct Op {  // Of a block: the elements for each token of its result, and how many ops later the last forward reader
               // is.
    int64_t row_elements, last_reader;
    bool saved;
    int64_t scratch;  // Elements for each token of scratch, 0 for none.
  };
  const std::vector<Op> block = {{width, 1, true, 2},          {3 * width, 1, true, 0}, {width, 1, true, heads},
                                 {heads, 1, true, 0},          {width, 1, false, 0},    {width, 4, true, 0},
                                 {width, 1, true, 2},          {4 * width, 1, true, 0}, {4 * width, 1, true, 0},
                                 {width, 1, false, width / 2}, {width, 1, true, 0}};
  const std::vector<int64_t> weights = {3 * width * width, width * width, 4 * width * width, 4 * width * width,
                                        3 * width,         width,         4 * width,         width};
  const int64_t per_block = 3 * static_cast<int64_t>(block.size()) + 3 * static_cast<int64_t>(weights.size()) + 6 +
                            (options.remat ? static_cast<int64_t>(block.size()) : 0);
  const int64_t blocks = std::max<int64_t>(1, options.buffers / per_block);

  struct Saved {
    int64_t first, bytes;
    size_t op;
  };
  std::vector<std::vector<Saved>> saved(blocks);
  std::vector<int64_t> weight_gradients;  // Indices into `out` whose end is the update.
  for (int64_t b = 0; b < blocks; ++b) {
    for (size_t i = 0; i < block.size(); ++i, ++step) {
      const int64_t bytes = 2 * tokens * block[i].row_elements;
      const bool kept = options.remat ? i + 1 == block.size() : block[i].saved;
      if (kept) {
        saved[b].push_back({step, bytes, i});
      } else {
        add(step, step + block[i].last_reader, bytes);
      }
      if (block[i].scratch > 0) add(step, step, 4 * tokens * block[i].scratch);
    }
  }
  for (int64_t c = 0; c < options.loss_chunks; ++c) {  // Logits, their gradient, statistics.
    const int64_t rows = tokens / options.loss_chunks;
    add(step, step + 2, 2 * rows * vocabulary);
    add(step + 1, step + 3, 2 * rows * vocabulary);
    add(step + 1, step + 2, 8 * rows);
    step += 4;
  }
  int64_t gradient_first = step - 1;  // Of the residual stream.
  const int64_t stream_bytes = 2 * tokens * width;
  for (int64_t b = blocks - 1; b >= 0; --b) {
    if (options.remat) {  // The block's activations again, from the input that was kept.
      for (size_t i = 0; i + 1 < block.size(); ++i, ++step) {
        const int64_t bytes = 2 * tokens * block[i].row_elements;
        if (block[i].saved) {
          saved[b].push_back({step, bytes, i});
        } else {
          add(step, step + block[i].last_reader, bytes);
        }
      }
    }
    std::sort(saved[b].begin(), saved[b].end(), [](const Saved& x, const Saved& y) { return x.op > y.op; });
    size_t weight = 0;
    for (const Saved& s : saved[b]) {
      add(s.first, step + random(2), s.bytes);
      add(step, step + 1 + random(2), s.bytes);  // Its gradient.
      if (block[s.op].scratch > 0) add(step, step, 4 * tokens * block[s.op].scratch);
      if (weight < weights.size()) {
        const int64_t bytes = 2 * weights[weight++];
        if (options.fused_update) {
          add(step, step + 2, bytes);
          add(step + 1, step + 1, 2 * bytes);
        } else {
          weight_gradients.push_back(static_cast<int64_t>(out.size()));
          add(step, step, bytes);
        }
      }
      ++step;
    }
    add(gradient_first, step, stream_bytes);
    gradient_first = step - 1;
  }
  for (const int64_t i : weight_gradients) {  // The update reads them one by one.
    out[i].last = step + 1;
    add(step, step + 1, 2 * out[i].size_bytes);
    if (out[i].size_bytes > (1 << 16)) add(step + 1, step + 1, out[i].size_bytes);
    step += 2;
  }
  return out;
}

}  // namespace mt

#endif  // MT_BENCH_PACK_SYNTHETIC_H_
