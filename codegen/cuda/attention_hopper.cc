// Attention on sm_90 by wgmma and the bulk tensor copy engine: 16-bit operands of 32, 64 or 128 columns.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "codegen/cuda/attention.h"
#include "codegen/cuda/source.h"

namespace mt {
namespace {

constexpr int64_t kHeldHead = 256;         // Keys of a head that one block holds.
constexpr int64_t kMultiprocessors = 132;  // Of an H100 or H200 SXM; with others the kernels are right as well.

// How a kernel cuts its work: warpgroups of 64 rows, rows of the other operands at a time, and in how many slots they
// wait; blocks of a multiprocessor; registers of a thread that computes (0: no warpgroup copies on its own; else they
// and 24 of each thread that copies are no more than what the block is launched with, or it waits for ever). Backward:
// whether products of the next rows are begun before those of these are done, and how many works' rows are held.
struct Cut {
  int64_t warpgroups, block_rows, slots, blocks, registers;
  bool ahead = true;
  int64_t held = 2;

  int64_t Tiles(int64_t length) const { return CeilDiv(length, 64 * warpgroups); }
  // Blocks go from work to work; they are as many as run at one time, so that copies run ahead of all but the first.
  int64_t Grid(int64_t works) const { return std::min(kMultiprocessors * blocks, works); }
};

std::string Int(absl::string_view name, int64_t value) {
  return absl::StrCat("constexpr int ", name, " = ", value, ";\n");
}

int64_t RowBytes(const CudaAttention& a) { return a.width * 2; }

// wgmma m64 n k16, c += a b: a in shared memory, or in registers.
std::string Wgmma(int64_t n, bool from_registers, absl::string_view type) {
  const int64_t sums = n / 2;
  std::vector<std::string> places, operands;
  for (int64_t i = 0; i < sums; ++i) {
    places.push_back(absl::StrCat("%", i));
    operands.push_back(absl::StrCat("\"+f\"(c[", i, "])"));
  }
  const auto place = [&](int64_t i) { return absl::StrCat("%", sums + i); };
  const int64_t add = from_registers ? 5 : 2;  // Operand: whether the sums count.
  return absl::StrCat(
      from_registers ? "template <int kTransposeB>\n" : "template <int kTransposeA, int kTransposeB>\n",
      "__device__ __forceinline__ void Wgmma(float (&c)[", sums, "], ", from_registers ? "const u32 (&a)[4]" : "u64 a",
      ", u64 b, int add) {\n  asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, ", place(add),
      ", 0;\\nwgmma.mma_async.sync.aligned.m64n", n, "k16.f32.", type, ".", type, " {", absl::StrJoin(places, ", "),
      "}, ",
      from_registers ? absl::StrCat("{", place(0), ", ", place(1), ", ", place(2), ", ", place(3), "}, ", place(4))
                     : absl::StrCat(place(0), ", ", place(1)),
      ", p, 1, 1, ", place(add + 1), from_registers ? "" : absl::StrCat(", ", place(add + 2)),
      ";\\n}\\n\"\n      : ", absl::StrJoin(operands, ", "),
      "\n      : ", from_registers ? "\"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3])" : "\"l\"(a)",
      ", \"l\"(b), \"r\"(add), ", from_registers ? "" : "\"n\"(kTransposeA), ", "\"n\"(kTransposeB));\n}\n");
}

// A kernel's text. `columns`: of products of two tiles in shared memory.
std::string Source(const CudaCall& call, const CudaAttention& a, std::string constants, std::vector<int64_t> columns,
                   absl::string_view skeleton) {
  const absl::string_view type = a.dtype == DType::kBF16 ? "bf16" : "f16";
  for (const int64_t n : columns) absl::StrAppend(&constants, Wgmma(n, /*from_registers=*/false, type));
  absl::StrAppend(&constants, Wgmma(a.width, /*from_registers=*/true, type));
  return absl::StrCat(AttentionConstants(call, a), constants, CudaText("hopper.cuh"), CudaText(skeleton));
}

std::string CutConstants(const Cut& cut, absl::string_view block_rows, int64_t heads_at_once) {
  return absl::StrCat(Int("kWarpgroups", cut.warpgroups), Int(block_rows, cut.block_rows), Int("kSlots", cut.slots),
                      Int("kBlocks", cut.blocks), Int("kRegisters", cut.registers), Int("kHeadsAtOnce", heads_at_once));
}

// Key-value heads that are worked on at one time, so that keys and values, or queries and dout, stay in the L2 cache.
int64_t KvHeadsAtOnce(const CudaAttention& a, int64_t heads_of_one) {
  const int64_t bytes = 2 * a.length * RowBytes(a) * heads_of_one;
  return std::max<int64_t>(1, std::min(a.batch * a.kv_heads, (int64_t{32} << 20) / bytes));
}

// [batch, heads, T, D] at `strides`, copied `rows` rows and `columns` columns at a time; 0: all, but at most 64.
class Maps {
 public:
  Maps(const CudaAttention& a, CudaLaunch& launch) : a_(a), launch_(launch) {}
  void Add(CudaPlace place, const HeadStrides& strides, int64_t heads, int64_t rows, int64_t columns = 0) {
    if (columns == 0) columns = std::min<int64_t>(64, a_.width);
    proto::CudaTensorMapProto map;
    map.set_argument(static_cast<int32_t>(launch_.arguments.size()));
    map.set_dtype(std::string(DTypeName(a_.dtype)));
    for (const int64_t size : {a_.width, a_.length, heads, a_.batch}) map.add_sizes(size);
    for (const int64_t stride : {strides.row, strides.head, strides.batch}) map.add_strides(stride);
    for (const int64_t box : {columns, rows, int64_t{1}, int64_t{1}}) map.add_box(static_cast<int32_t>(box));
    map.set_swizzle_bytes(static_cast<int32_t>(2 * columns));
    launch_.maps.push_back(std::move(map));
    launch_.arguments.push_back(place);
  }
  void AddQ(int64_t rows) { Add(a_.q, a_.q_strides, a_.heads, rows); }
  void AddKV(int64_t rows) {
    Add(a_.k, a_.kv_strides, a_.kv_heads, rows);
    Add(a_.v, a_.kv_strides, a_.kv_heads, rows);
  }
  void AddDOut(int64_t rows) { Add(a_.dout, a_.out_strides, a_.heads, rows); }

 private:
  const CudaAttention& a_;
  CudaLaunch& launch_;
};

void Append(CudaLaunch& launch, std::initializer_list<CudaPlace> places) {
  launch.arguments.insert(launch.arguments.end(), places);
}

// dq, dk and dv where a block holds a head.
CudaLaunch Head(const CudaCall& call, const CudaAttention& a) {
  constexpr int64_t kSlots = 2;
  const int64_t tiles = CeilDiv(a.length, 64);
  CudaLaunch launch{.source = Source(call, a, Int("kSlots", kSlots), {64, a.width / 2}, "flash_hopper_head.cuh"),
                    .function = "mt_flash_hopper_head",
                    .block = {384, 1, 1}};
  launch.grid[0] = std::min(kMultiprocessors, a.batch * a.kv_heads);
  launch.shared_bytes = 1024 + tiles * (4 * 64 * RowBytes(a) + 64 * 128) + 64 * RowBytes(a) +
                        kSlots * (3 * 64 * RowBytes(a) + 512) + 8 * (6 + 3 * kSlots);
  Maps maps(a, launch);
  maps.AddDOut(64);
  maps.AddQ(64);
  maps.AddKV(64);
  maps.Add(a.out, a.out_strides, a.heads, 64);
  Append(launch, {a.lse, a.rng});
  maps.Add(a.dq, a.q_strides, a.heads, 64, a.width / 2);  // Each warpgroup has half the columns.
  maps.Add(a.dk, a.kv_strides, a.kv_heads, 64);
  maps.Add(a.dv, a.kv_strides, a.kv_heads, 64);
  return launch;
}

// Constants of the two kernels of flash_hopper_backward.cuh.
std::string BackwardSource(const CudaCall& call, const CudaAttention& a, const Cut& cut, int64_t heads_at_once,
                           absl::string_view which) {
  return absl::StrCat("#define ", which, "\n",
                      Source(call, a,
                             absl::StrCat(CutConstants(cut, "kBlockRows", heads_at_once), Int("kAhead", cut.ahead),
                                          Int("kHeld", cut.held)),
                             {cut.block_rows}, "flash_hopper_backward.cuh"));
}
// `numbers`: bytes beside each row that passes by.
int64_t BackwardSharedBytes(const CudaAttention& a, const Cut& cut, int64_t numbers) {
  return 1024 + cut.held * 128 * cut.warpgroups * RowBytes(a) +
         cut.slots * cut.block_rows * (2 * RowBytes(a) + numbers) + 8 * (4 + 2 * cut.slots);
}

// dq, and the sums of dout out that dk and dv need.
CudaLaunch Queries(const CudaCall& call, const CudaAttention& a) {
  // Measured on an H200: two blocks of one warpgroup beside each other hide what short rows wait for.
  const Cut cut = a.width > 64     ? Cut{2, 64, 3, 1, 240, /*ahead=*/true, /*held=*/1}
                  : a.length > 512 ? Cut{2, 128, 3, 1, 240}
                                   : Cut{1, 64, 4, 2, 216};
  CudaLaunch launch{.source = BackwardSource(call, a, cut, KvHeadsAtOnce(a, 1) * a.group(), "MT_QUERIES"),
                    .function = "mt_flash_hopper_dq"};
  launch.grid[0] = cut.Grid(a.batch * a.heads * cut.Tiles(a.length));
  launch.block[0] = 128 * (cut.warpgroups + 1);
  launch.shared_bytes = BackwardSharedBytes(a, cut, 0);
  Maps maps(a, launch);
  maps.AddDOut(64);
  maps.AddQ(64);
  maps.AddKV(cut.block_rows);
  Append(launch, {a.out, a.lse, a.rng});
  maps.Add(a.dq, a.q_strides, a.heads, 64);
  Append(launch, {a.delta});
  return launch;
}

CudaLaunch KeysAndValues(const CudaCall& call, const CudaAttention& a) {
  const Cut cut = a.width <= 32   ? Cut{3, 64, 4, 1, 160}
                  : a.width <= 64 ? Cut{2, 64, 4, 1, 240}
                                  : Cut{2, 64, 3, 1, 240, /*ahead=*/false, /*held=*/1};
  CudaLaunch launch{.source = BackwardSource(call, a, cut, KvHeadsAtOnce(a, a.group()), "MT_KEYS"),
                    .function = "mt_flash_hopper_dkv"};
  launch.grid[0] = cut.Grid(a.batch * a.kv_heads * cut.Tiles(a.length));
  launch.block[0] = 128 * (cut.warpgroups + 1);
  launch.shared_bytes = BackwardSharedBytes(a, cut, 8);
  Maps maps(a, launch);
  maps.AddDOut(cut.block_rows);
  maps.AddQ(cut.block_rows);
  maps.AddKV(64);
  Append(launch, {a.lse, a.delta, a.rng});
  maps.Add(a.dk, a.kv_strides, a.kv_heads, 64);
  maps.Add(a.dv, a.kv_strides, a.kv_heads, 64);
  return launch;
}

}  // namespace

bool HasHopperAttention(const CudaCall& call, const CudaAttention& a) {
  const bool countable = a.queries() <= int64_t{1} << 30;  // Tiles are counted in 32 bits.
  return call.target.sm == 90 && !call.portable && countable && call.attrs->Double("scale") > 0 &&
         a.dtype != DType::kF32 && (a.width == 32 || a.width == 64 || a.width == 128);
}

void EmitHopperForward(const CudaCall& call, const CudaAttention& a, CudaSteps& steps) {
  // Measured on an H200: short heads are one tile, wide tiles pay where there are many keys, and between them two
  // smaller blocks beside each other hide what rows wait for; these also have registers for the numbers of dropout.
  const bool dropout = call.attrs->Double("rate") > 0;
  const Cut cut = a.width > 64            ? Cut{2, 128, 4, 1, 240}
                  : dropout               ? Cut{2, 64, 6, 2, 0}
                  : a.length <= kHeldHead ? Cut{4, 64, 6, 1, 112}
                  : a.length <= 512       ? Cut{2, 64, 6, 2, 0}
                                          : Cut{3, 128, 4, 1, 160};
  CudaLaunch launch{.source = Source(call, a, CutConstants(cut, "kBlockKeys", KvHeadsAtOnce(a, 1) * a.group()),
                                     {cut.block_rows}, "flash_hopper_forward.cuh"),
                    .function = "mt_flash_hopper"};
  launch.grid[0] = cut.Grid(a.batch * a.heads * cut.Tiles(a.length));
  launch.block[0] = 128 * (cut.warpgroups + (cut.registers > 0 ? 1 : 0));
  launch.shared_bytes = 1024 + cut.held * 64 * cut.warpgroups * RowBytes(a) + cut.slots * cut.block_rows * RowBytes(a) +
                        8 * (4 + 2 * cut.slots);
  Maps maps(a, launch);
  maps.AddQ(64);
  maps.AddKV(cut.block_rows);
  Append(launch, {a.rng});
  maps.Add(a.out, a.out_strides, a.heads, 64);
  Append(launch, {a.lse});
  steps.Launch(std::move(launch));
}

void EmitHopperBackward(const CudaCall& call, const CudaAttention& a, CudaSteps& steps) {
  if (a.length <= kHeldHead && a.width <= 64) {
    steps.Launch(Head(call, a));
    return;
  }
  steps.Launch(Queries(call, a));
  steps.Launch(KeysAndValues(call, a));
}

}  // namespace mt
