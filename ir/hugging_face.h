// Model specs as Hugging Face's config.json, for what both can express: GPT-2, Llama, Mistral.
#ifndef MT_IR_HUGGING_FACE_H_
#define MT_IR_HUGGING_FACE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/model.pb.h"

namespace mt {

// "gpt2", "llama" or "mistral": the family in which `spec` is exactly expressed.
//   gpt2: layer_norm, pre, learned positions, GELU (gelu_new), GELU_ERF, RELU or SILU, every bias, kv_heads = heads.
//   llama: rms_norm, pre, rotary, SWIGLU or GEGLU (gelu_pytorch_tanh), attention_bias and mlp_bias as they are.
//   mistral: the same without biases and with attention_window N, which is sliding_window N + 1.
// Errors: InvalidArgument (names the field that no family has).
absl::StatusOr<std::string> HuggingFaceFamily(const proto::ModelSpec& spec);

// config.json of the spec, as transformers reads it. Errors: as HuggingFaceFamily.
absl::StatusOr<std::string> HuggingFaceConfig(const proto::ModelSpec& spec);

// The spec of a config.json; untrusted. Older and newer spellings are read (rope_theta and rope_parameters).
// Errors: FailedPrecondition (names what is wrong, or the key whose value a spec cannot express).
absl::StatusOr<proto::ModelSpec> SpecFromHuggingFace(absl::string_view config_json);

}  // namespace mt

#endif  // MT_IR_HUGGING_FACE_H_
