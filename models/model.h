// Model specs and raw graphs -> modules with the forward graphs "train" and "eval"; specs: also "generate".
#ifndef MT_MODELS_MODEL_H_
#define MT_MODELS_MODEL_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/graph.h"
#include "proto/model.pb.h"

namespace mt {

// What the command line says about a model.
struct ModelOptions {
  std::optional<int64_t> batch, sequence;
  std::optional<int64_t> vocab_size;  // Of the corpus.
  std::vector<std::string> sets;      // "layers=4", "activation=SWIGLU": fields of ModelSpec.
  // The graphs are of batch / microbatches, for the pass accumulate, which multiplies the fact "batch" again. A raw
  // graph's batch is written out: it is that of a microbatch.
  int64_t microbatches = 1;
};

// The zoo's names, sorted: models/NAME.textproto and models/NAME.graph.textproto.
std::vector<std::string> ZooModels();

// SPEC is a file, or a name of the zoo: a ModelSpec, or a ModuleProto where its name ends in ".graph.textproto"; or
// "hf:DIR", a folder with Hugging Face's config.json (ir/hugging_face.h).
// Errors: NotFound (lists the zoo), InvalidArgument (bad spec; names the field, the fact and what is expected).
absl::StatusOr<std::unique_ptr<Module>> LoadModel(const std::string& spec, const ModelOptions& options);

// Whether SPEC is a raw graph, whose shapes are fixed. Errors: NotFound.
absl::StatusOr<bool> IsRawGraph(const std::string& spec);

// The spec in a file or of the zoo, with `options.sets` applied. Errors: as LoadModel; InvalidArgument for a raw graph.
absl::StatusOr<proto::ModelSpec> LoadSpec(const std::string& spec, const ModelOptions& options);

// The decoder-only transformer of `spec` (models/transformer.cc).
//   train: inputs tokens, labels i32[B,T], order i32[B*T] (stable sort order of the tokens), rng i32[4] (with dropout);
//          output "loss" f32[], the mean over labels >= 0.
//   eval:  no dropout; outputs "loss_sum" f32[] and "count" f32[].
//   generate: one position of one sequence a run, no dropout; inputs tokens i32[1,1] and position i32[1], which counts
//   up
//          from 0 to T - 1; keys and values of the positions so far are caches; output "logits" f32[vocab_size].
// Facts: batch, sequence, vocab_size, layers, width, heads, kv_heads, ffn_width, max_sequence.
absl::StatusOr<std::unique_ptr<Module>> BuildTransformer(const proto::ModelSpec& spec, int64_t batch, int64_t sequence);

}  // namespace mt

#endif  // MT_MODELS_MODEL_H_
