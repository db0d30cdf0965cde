#include "ir/target.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "ir/base/flags.h"

namespace mt {
namespace {

struct TargetRow {
  absl::string_view name;
  Target::Device device;
  int sm;
  Roofline roofline;
  absl::string_view provenance;
};

// sm_90 is measured on an H200 (CUDA 13.0, matmuls of 8192^3, a copy of 4 GiB). The other GPUs are the data sheet's
// dense rates of a typical card, times what the H200 reaches of its own: 0.79 of matmuls, 0.89 of the bandwidth.
constexpr TargetRow kRows[] = {
    {"cpu",
     Target::Device::kCpu,
     0,
     {.matmul_flops_per_second = 2e11, .bytes_per_second = 2e10},
     "two cores of a current server CPU"},
    {"cuda:sm_75",
     Target::Device::kCuda,
     75,
     {.matmul_flops_per_second = 6.4e12, .matmul16_flops_per_second = 51e12, .bytes_per_second = 0.28e12},
     "a T4's data sheet, scaled"},
    {"cuda:sm_80",
     Target::Device::kCuda,
     80,
     {.matmul_flops_per_second = 15e12,
      .tf32_flops_per_second = 123e12,
      .matmul16_flops_per_second = 246e12,
      .bytes_per_second = 1.73e12},
     "an A100's data sheet, scaled"},
    {"cuda:sm_86",
     Target::Device::kCuda,
     86,
     {.matmul_flops_per_second = 30e12,
      .tf32_flops_per_second = 59e12,
      .matmul16_flops_per_second = 118e12,
      .bytes_per_second = 0.62e12},
     "an A40's data sheet, scaled"},
    {"cuda:sm_89",
     Target::Device::kCuda,
     89,
     {.matmul_flops_per_second = 65e12,
      .tf32_flops_per_second = 65e12,
      .matmul16_flops_per_second = 130e12,
      .bytes_per_second = 0.90e12},
     "an RTX 4090's data sheet, scaled"},
    {"cuda:sm_90",
     Target::Device::kCuda,
     90,
     {.matmul_flops_per_second = 51e12,
      .tf32_flops_per_second = 404e12,
      .matmul16_flops_per_second = 786e12,
      .bytes_per_second = 4.27e12},
     "an H200's, measured"},
    {"cuda:sm_100",
     Target::Device::kCuda,
     100,
     {.matmul_flops_per_second = 59e12,
      .tf32_flops_per_second = 890e12,
      .matmul16_flops_per_second = 1780e12,
      .bytes_per_second = 7.1e12},
     "a B200's data sheet, scaled"},
    {"cuda:sm_120",
     Target::Device::kCuda,
     120,
     {.matmul_flops_per_second = 83e12,
      .tf32_flops_per_second = 83e12,
      .matmul16_flops_per_second = 165e12,
      .bytes_per_second = 1.59e12},
     "an RTX 5090's data sheet, scaled"},
};
constexpr absl::string_view kCuda = "cuda", kCudaDefault = "cuda:sm_90";

const TargetRow& RowOf(const Target& target) {
  for (const TargetRow& row : kRows) {
    if (row.device == target.device && row.sm == target.sm) return row;
  }
  return kRows[0];
}

}  // namespace

absl::StatusOr<Target> ParseTarget(absl::string_view text) {
  std::vector<std::string> names = {"cpu", std::string(kCuda)};
  for (const TargetRow& row : kRows) {
    if (row.name == (text == kCuda ? kCudaDefault : text)) return Target{row.device, row.sm};
    if (row.device == Target::Device::kCuda) names.emplace_back(row.name);
  }
  const std::string near = DidYouMean(text, names);
  return absl::InvalidArgumentError(absl::StrCat("target \"", text, "\" is not known",
                                                 near.empty() ? "" : absl::StrCat(" (did you mean ", near, "?)"),
                                                 "; targets: ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<Target> TargetOfDevice(int sm) {
  const TargetRow* best = nullptr;
  for (const TargetRow& row : kRows) {
    if (row.device == Target::Device::kCuda && row.sm / 10 == sm / 10 && row.sm <= sm) best = &row;
  }
  if (best == nullptr) return absl::NotFoundError(absl::StrCat("there is no target for a GPU of sm_", sm));
  return Target{best->device, best->sm};
}

std::string Target::ToString() const { return std::string(RowOf(*this).name); }
absl::string_view Target::provenance() const { return RowOf(*this).provenance; }
bool Target::Computes(DType dtype) const { return dtype != DType::kBF16 || !is_cuda() || sm >= 80; }

Roofline TargetRoofline(const Target& target) { return RowOf(target).roofline; }

int64_t ContextBytes(const Target& target) {
  // H200, driver 580, CUDA 13.0: 527 MiB for an empty context, up to 66 for cuBLASLt's kernels, and what the driver
  // takes for graphs whose small steps overlap: 555 in all for lab4, more than 562 for gpt2_124m. Smaller GPUs take
  // less, so that this errs on the safe side there.
  return target.is_cuda() ? int64_t{592} << 20 : 0;
}

}  // namespace mt
