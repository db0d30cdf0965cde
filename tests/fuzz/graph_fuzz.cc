// Raw graphs: a ModuleProto as text, as mtc reads it, or the text form of modules and graphs.
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "ir/base/check.h"
#include "ir/graph_io.h"
#include "ir/text.h"
#include "models/model.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/graph_checks.h"

namespace mt {
namespace {

// What was accepted comes back from both of its forms.
void ExpectRoundTrips(const Module& module) {
  const std::string text = Print(module);
  const absl::StatusOr<std::unique_ptr<Module>> parsed = ParseModule(text);
  CHECK(parsed.ok()) << parsed.status() << "\n" << text;
  CHECK(Print(**parsed) == text) << text << "\n" << Print(**parsed);
  const absl::StatusOr<std::unique_ptr<Module>> built = ModuleFromProto(ToProto(module));
  CHECK(built.ok()) << built.status() << "\n" << text;
  CHECK(Print(**built) == text) << text << "\n" << Print(**built);
  for (const auto& graph : module.graphs()) ExpectCosts(*graph);
}

}  // namespace
}  // namespace mt

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes = mt::Bytes(data, size);
  if (absl::StartsWith(bytes, "graph @")) {
    const absl::StatusOr<std::unique_ptr<mt::Graph>> graph = mt::ParseGraph(bytes);
    if (graph.ok()) mt::ExpectCosts(**graph);
  } else if (absl::StartsWith(bytes, "module @") || absl::StartsWith(bytes, "//")) {
    const absl::StatusOr<std::unique_ptr<mt::Module>> module = mt::ParseModule(bytes);
    if (module.ok()) mt::ExpectRoundTrips(**module);
  } else {
    const auto module = mt::LoadModel(mt::MemoryFile(bytes, ".graph.textproto"), {});
    if (module.ok()) mt::ExpectRoundTrips(**module);
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  mt::proto::ModuleProto module;
  return mt::MutateText(data, size, max_size, seed, module);
}
