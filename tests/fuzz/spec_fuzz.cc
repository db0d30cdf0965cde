// A model spec as text (after each zero byte a --set of the command line), or Hugging Face's config.json.
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "google/protobuf/text_format.h"
#include "ir/base/check.h"
#include "ir/hugging_face.h"
#include "ir/op.h"
#include "ir/verifier.h"
#include "models/model.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/graph_checks.h"

namespace mt {
namespace {

constexpr int64_t kMostLayers = 8;  // Of what is built: more are more of the same.

void Build(const proto::ModelSpec& spec) {
  if (spec.layers() > kMostLayers && spec.layers() <= 4096) return;
  const absl::StatusOr<std::unique_ptr<Module>> module =
      BuildTransformer(spec, spec.batch() == 0 ? 8 : spec.batch(), spec.max_sequence());
  if (!module.ok()) return;
  const absl::Status verified = VerifyModule(**module);
  CHECK(verified.ok()) << verified;
  for (const auto& graph : (*module)->graphs()) ExpectCosts(*graph);
}

}  // namespace
}  // namespace mt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes = mt::Bytes(data, size);
  if (absl::StartsWith(bytes, "{")) {
    absl::StatusOr<mt::proto::ModelSpec> spec = mt::SpecFromHuggingFace(bytes);
    if (!spec.ok()) return 0;
    spec->set_name("imported");
    mt::Build(*spec);
    return 0;
  }
  std::vector<std::string> parts = absl::StrSplit(bytes, '\0');
  mt::ModelOptions options;
  options.sets.assign(parts.begin() + 1, parts.end());
  const absl::StatusOr<mt::proto::ModelSpec> spec = mt::LoadSpec(mt::MemoryFile(parts[0]), options);
  if (spec.ok()) mt::Build(*spec);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  mt::proto::ModelSpec spec;
  return mt::MutateText(data, size, max_size, seed, spec);
}
