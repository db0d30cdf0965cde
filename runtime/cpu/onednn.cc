#include "runtime/cpu/onednn.h"

#include <omp.h>

#include <dnnl.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "ir/base/check.h"

namespace mt {
namespace {

dnnl::memory::data_type DataType(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return dnnl::memory::data_type::bf16;
    case DType::kF16:
      return dnnl::memory::data_type::f16;
    default:
      return dnnl::memory::data_type::f32;
  }
}

const dnnl::engine& Engine() {
  static const dnnl::engine& engine = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::memory::desc Desc(bool batched, dnnl::memory::dims dims, dnnl::memory::dims strides, DType dtype) {
  if (!batched) {
    dims.erase(dims.begin());
    strides.erase(strides.begin());
  }
  return dnnl::memory::desc(dims, DataType(dtype), strides);
}

dnnl::matmul::primitive_desc Describe(const DnnMatmulShape& s, const dnnl::memory::desc& a, const dnnl::memory::desc& b,
                                      const dnnl::memory::desc& bias, const dnnl::memory::desc& c,
                                      const dnnl::primitive_attr& attr) {
#if DNNL_VERSION_MAJOR >= 3
  if (s.has_bias) return dnnl::matmul::primitive_desc(Engine(), a, b, bias, c, attr, /*allow_empty=*/true);
  return dnnl::matmul::primitive_desc(Engine(), a, b, c, attr, /*allow_empty=*/true);
#else
  const dnnl::matmul::desc desc = s.has_bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
  return dnnl::matmul::primitive_desc(desc, attr, Engine(), /*allow_empty=*/true);
#endif
}

}  // namespace

struct DnnMatmul::State {
  dnnl::matmul primitive;
  dnnl::stream stream{Engine()};
  std::vector<dnnl::memory> memories;
  std::vector<dnnl_exec_arg_t> args;
  int64_t scratch_bytes = 0;
};

DnnMatmul::DnnMatmul(std::unique_ptr<State> state) : state_(std::move(state)) {}
DnnMatmul::~DnnMatmul() = default;
int64_t DnnMatmul::scratch_bytes() const { return state_->scratch_bytes; }

absl::StatusOr<std::unique_ptr<DnnMatmul>> DnnMatmul::Create(const DnnMatmulShape& s, std::byte* a, std::byte* b,
                                                             std::byte* bias, std::byte* c, std::byte* scratch,
                                                             int64_t scratch_bytes) {
  // The pool cuts the work; oneDNN sizes its scratch and its loops by OpenMP's thread count at creation.
  omp_set_num_threads(1);
  const bool batched = s.batch > 1;
  const dnnl::memory::desc da =
      Desc(batched, {s.batch, s.rows, s.depth}, {s.a_batch_stride, s.a_row_stride, s.a_col_stride}, s.a);
  const dnnl::memory::desc db =
      Desc(batched, {s.batch, s.depth, s.cols}, {s.b_batch_stride, s.b_row_stride, s.b_col_stride}, s.b);
  const dnnl::memory::desc dc = Desc(batched, {s.batch, s.rows, s.cols}, {s.c_batch_stride, s.c_row_stride, 1}, s.c);
  const dnnl::memory::desc dbias = Desc(batched, {1, 1, s.cols}, {s.cols, s.cols, 1}, s.bias);

  auto state = std::make_unique<State>();
  dnnl::matmul::primitive_desc description;
  for (const bool ours : {true, false}) {
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(ours ? dnnl::scratchpad_mode::user : dnnl::scratchpad_mode::library);
    if (s.accumulate) {
      dnnl::post_ops ops;
      ops.append_sum(1.0f);
      attr.set_post_ops(ops);
    }
    description = Describe(s, da, db, dbias, dc, attr);
    if (!description.get(/*allow_empty=*/true)) {
      return absl::UnimplementedError(
          absl::StrCat("oneDNN ", DnnVersion(), " has no ", DTypeName(s.a), " matmul for this CPU"));
    }
    if (ours) {
      state->scratch_bytes = static_cast<int64_t>(description.scratchpad_desc().get_size());
      if (state->scratch_bytes <= scratch_bytes) break;
    }
  }
  const auto bind = [&](int index, const dnnl::memory::desc& desc, std::byte* data) {
    state->memories.emplace_back(desc, Engine(), data);
    state->args.push_back({index, state->memories.back().get()});
  };
  bind(DNNL_ARG_SRC, da, a);
  bind(DNNL_ARG_WEIGHTS, db, b);
  bind(DNNL_ARG_DST, dc, c);
  if (s.has_bias) bind(DNNL_ARG_BIAS, dbias, bias);
  bind(DNNL_ARG_SCRATCHPAD, description.scratchpad_desc(), scratch);
  state->primitive = dnnl::matmul(description);
  return std::unique_ptr<DnnMatmul>(new DnnMatmul(std::move(state)));
}

void DnnMatmul::Run() {
  const dnnl_status_t status = dnnl_primitive_execute(state_->primitive.get(), state_->stream.get(),
                                                      static_cast<int>(state_->args.size()), state_->args.data());
  CHECK(status == dnnl_success);
}

std::string DnnVersion() {
  const dnnl_version_t* version = dnnl_version();
  return absl::StrCat(version->major, ".", version->minor, ".", version->patch);
}

}  // namespace mt
