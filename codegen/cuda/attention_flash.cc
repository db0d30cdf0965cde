// Attention by mma.sync, from sm_80 on: 16-bit operands, and f32 ones as TF32 where the op allows it. Widths 16 to 128,
// multiples of 16.
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "codegen/cuda/attention.h"
#include "codegen/cuda/resources.h"
#include "codegen/cuda/source.h"

namespace mt {
namespace {

// How a kernel of flash.cuh cuts its work: four warps of `patches` times 16 rows, `others` rows of the other operands
// at a time, which wait in `slots` slots.
struct Cut {
  int64_t patches = 0, others = 0, slots = 0;

  int64_t rows() const { return 64 * patches; }
  int64_t Tiles(int64_t length) const { return CeilDiv(length, rows()); }
  // Rows of `held` operands lie in shared memory, and two of the others in each slot.
  int64_t SharedBytes(const CudaAttention& a, int64_t held) const {
    return (held * rows() + 2 * slots * others) * (a.width * ByteSize(a.dtype) + 16);
  }
};

enum class Kernel { kForward, kQueries, kKeys };  // out; dq; dk and dv.

Cut CutOf(const CudaCall& call, const CudaAttention& a, Kernel kernel) {
  const bool is_f32 = a.dtype == DType::kF32, wide = a.width > 64;
  Cut most{.patches = 1, .others = 64, .slots = 2};
  if (is_f32) {  // Measured on an H200.
    const bool twice = kernel == Kernel::kForward   ? a.width >= 64 && call.attrs->Double("rate") == 0
                       : kernel == Kernel::kQueries ? wide || a.length > 512
                                                    : false;
    most.patches = twice && a.length > 64 ? 2 : 1;
    most.others = kernel == Kernel::kForward && twice && !wide ? 64 : kernel == Kernel::kKeys && wide ? 16 : 32;
  }
  const int64_t limit = CudaSharedBytes(call.target) - 1024;  // The kernels have numbers of rows there, too.
  const int64_t held = kernel == Kernel::kForward ? 1 : 2;
  // Two blocks of a multiprocessor hide what one waits for.
  for (int64_t blocks = is_f32 && wide ? 1 : 2; blocks > 0; --blocks) {
    for (Cut cut = most; cut.patches > 0; --cut.patches) {
      for (cut.others = most.others; cut.others >= 16; cut.others /= 2) {
        if (blocks * cut.SharedBytes(a, held) <= limit) return cut;
      }
    }
  }
  return {.patches = 1, .others = 16, .slots = 1};  // 83 KiB at most: every chip has them.
}

// `which` of the kernels of flash.cuh: MT_FORWARD, MT_QUERIES (dq) or MT_KEYS (dk and dv).
std::string Source(const CudaCall& call, const CudaAttention& a, const Cut& cut, absl::string_view which) {
  return absl::StrCat("#define ", which, "\n", AttentionConstants(call, a), "constexpr int kPatches = ", cut.patches,
                      ", kOthers = ", cut.others, ", kSlots = ", cut.slots, ";\n", CudaText("flash.cuh"));
}

}  // namespace

bool HasFlashAttention(const CudaCall& call, const CudaAttention& a) {
  return call.target.sm >= 80 && a.width % 16 == 0 && a.width <= 128 &&
         (a.dtype != DType::kF32 || call.attrs->Bool("tf32"));
}

void EmitFlashForward(const CudaCall& call, const CudaAttention& a, CudaSteps& steps) {
  const Cut cut = CutOf(call, a, Kernel::kForward);
  steps.Launch({.source = Source(call, a, cut, "MT_FORWARD"),
                .function = "mt_flash",
                .grid = {a.batch * a.heads * cut.Tiles(a.length), 1, 1},
                .block = {128, 1, 1},
                .shared_bytes = cut.SharedBytes(a, 1),
                .arguments = {a.q, a.k, a.v, a.rng, a.out, a.lse}});
}

void EmitFlashBackward(const CudaCall& call, const CudaAttention& a, CudaSteps& steps) {
  const Cut for_dq = CutOf(call, a, Kernel::kQueries), for_dkv = CutOf(call, a, Kernel::kKeys);
  const int64_t threads = a.width % 64 == 0 ? 8 : a.width % 32 == 0 ? 4 : 2;  // Of a sum of dout out.
  const std::string queries = Source(call, a, for_dq, "MT_QUERIES");
  steps.Launch({.source = queries,
                .function = "mt_flash_delta",
                .grid = {CeilDiv(a.queries() * threads, 256), 1, 1},
                .block = {256, 1, 1},
                .arguments = {a.dout, a.out, a.delta}});
  steps.Launch({.source = Source(call, a, for_dkv, "MT_KEYS"),
                .function = "mt_flash_dkv",
                .grid = {a.batch * a.kv_heads * for_dkv.Tiles(a.length), 1, 1},
                .block = {128, 1, 1},
                .shared_bytes = for_dkv.SharedBytes(a, 2),
                .arguments = {a.dout, a.q, a.k, a.v, a.lse, a.delta, a.rng, a.dk, a.dv}});
  steps.Launch({.source = queries,
                .function = "mt_flash_dq",
                .grid = {a.batch * a.heads * for_dq.Tiles(a.length), 1, 1},
                .block = {128, 1, 1},
                .shared_bytes = for_dq.SharedBytes(a, 2),
                .arguments = {a.dout, a.q, a.k, a.v, a.lse, a.delta, a.rng, a.dq}});
}

}  // namespace mt
