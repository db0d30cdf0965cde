// Weights as Hugging Face folders: config.json and safetensors, one file or shards, of GPT-2, Llama and Mistral.
#ifndef MT_RUNTIME_TRAIN_HUGGING_FACE_H_
#define MT_RUNTIME_TRAIN_HUGGING_FACE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "codegen/plan/plan.h"
#include "proto/model.pb.h"
#include "runtime/data/safetensors.h"
#include "runtime/executor.h"

namespace mt {

// The spec that a plan was compiled from. Errors: FailedPrecondition (a raw graph, or an older compiler's plan).
absl::StatusOr<proto::ModelSpec> SpecOfPlan(const proto::PlanProto& plan);

// Writes config.json and the weights of `weights_path` (what SaveWeights wrote for a plan of `spec`) into `folder`:
// model.safetensors, or shards of at most about `shard_bytes` and their index. The weights come last; a folder that
// holds them is whole. `tokenizer`: a tokenizer.json to be copied beside them; empty: none.
// Errors: InvalidArgument (the family lacks something; names it), FailedPrecondition (the weights are others),
// AlreadyExists (the folder holds weights), DataLoss.
absl::Status ExportHuggingFace(const proto::ModelSpec& spec, const std::string& weights_path,
                               const std::string& tokenizer, const std::string& folder,
                               int64_t shard_bytes = int64_t{5} << 30);

// A folder's weights under the names and in the layout of a spec's parameters (models/transformer.cc). Untrusted.
class HuggingFaceFolder {
 public:
  // Reads config.json and opens the weights. Errors: NotFound, FailedPrecondition.
  static absl::StatusOr<std::unique_ptr<HuggingFaceFolder>> Open(const std::string& folder);
  const proto::ModelSpec& spec() const { return spec_; }
  // The parameter `name` of shape `dims`. Errors: FailedPrecondition (no such tensor, or of another shape or dtype).
  absl::StatusOr<std::vector<float>> Parameter(absl::string_view name, absl::Span<const int64_t> dims) const;

 private:
  HuggingFaceFolder() = default;
  absl::StatusOr<std::vector<float>> Read(const std::string& name, absl::Span<const int64_t> dims) const;

  std::string folder_;
  proto::ModelSpec spec_;
  std::string family_;
  std::vector<std::unique_ptr<SafetensorsReader>> files_;
};

// Sets the parameters of the executor from `folder`; F32, BF16 and F16 are read. Untrusted.
// Errors: NotFound, FailedPrecondition (the folder's model is another one than the plan's: names the field or tensor).
absl::Status LoadHuggingFace(Executor& executor, const std::string& folder);

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_HUGGING_FACE_H_
