#include "runtime/train/not_finite.h"

#include <cmath>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "codegen/plan/plan.h"
#include "ir/graph_io.h"

namespace mt {

std::string FirstNotFinite(Executor& executor, Trainer& trainer, const TrainOptions& options,
                           const TrainState& failed) {
  if (!executor.backend().host_addressable() || executor.arena() == nullptr) return "";
  const Program& program = trainer.train_program();
  StepScalars scalars = options.scalars;
  scalars.step += failed.steps - 1;  // Of it, the first microbatch.
  scalars.first_sample += failed.samples - trainer.batch();
  if (!trainer.Prepare(scalars).ok()) return "";
  const proto::PlanProto& plan = executor.plan();
  const proto::ProgramProto& proto = program.proto();
  for (int i = 0; i < proto.instructions_size(); ++i) {
    program.RunRange(i, i + 1);
    executor.backend().Synchronize();
    for (const int result : proto.instructions(i).results()) {
      const proto::TensorProto& tensor = proto.tensors(result);
      const absl::StatusOr<TensorType> type = TypeFromProto(tensor.type());
      if (!type.ok() || type->dtype != DType::kF32) continue;
      const float* values = reinterpret_cast<const float*>(executor.arena() + TensorOffset(plan, tensor));
      for (int64_t k = 0; k < type->num_elements(); ++k) {
        if (!std::isnan(values[k])) continue;
        return absl::StrCat("the first result that is no number is of ", proto.instructions(i).op(), " \"",
                            proto.instructions(i).name(), "\"");
      }
    }
  }
  return "";
}

}  // namespace mt
