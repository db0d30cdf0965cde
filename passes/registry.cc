#include "passes/registry.h"

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace mt {
namespace {

// DCE runs after every pass as well. CSE and canonicalize see the module as built and, again, with its gradients.
// clang-format off
constexpr const PassDef* kOrder[] = {
    &kDcePass, &kCanonicalizePass, &kCsePass,      // As built.
    &kFlashPass, &kChunkedLossPass, &kPadVocabPass,
    &kTf32Pass, &kBf16Pass, &kFp16Pass,            // One of them.
    &kAccumulatePass,
    &kAutodiffPass, &kCanonicalizePass, &kCsePass,  // With gradients.
    &kOptimizerPass, &kAdamw8bitPass,
    &kFusePass, &kRematPass,
};
// clang-format on

constexpr NamedPipeline kNamed[] = {
    {.name = "default", .target = "cpu", .text = "flash,chunked_loss,fuse", .summary = "The best known for the CPU."},
    {.name = "default",
     .target = "cuda:sm_75",
     .text = "fp16,flash,chunked_loss,pad_vocab,fuse,remat:free",
     .summary = "The best known for a GPU without bf16."},
    {.name = "default",
     .target = "cuda",
     .text = "bf16,flash,chunked_loss,pad_vocab,fuse,remat:free",
     .summary = "The best known for a GPU."},
    {.name = "none", .target = "", .text = "", .summary = "The written-out graph in f32."},
};

constexpr Contradiction kContradictions[] = {
    {"bf16", "fp16", "a module has one precision"},
    {"tf32", "bf16", "bf16 leaves no matrix product of f32 operands to tf32"},
    {"tf32", "fp16", "fp16 leaves no matrix product of f32 operands to tf32"},
};

constexpr PassRegistry kPasses = {.order = kOrder, .named = kNamed, .contradictions = kContradictions};

}  // namespace

const PassDef* PassRegistry::Find(absl::string_view name) const {
  const auto at = absl::c_find_if(order, [&](const PassDef* pass) { return pass->name == name; });
  return at == order.end() ? nullptr : *at;
}

const NamedPipeline* PassRegistry::FindNamed(absl::string_view name, absl::string_view target) const {
  const auto at = absl::c_find_if(named, [&](const NamedPipeline& pipeline) {
    return pipeline.name == name && (pipeline.target.empty() || pipeline.target == target ||
                                     absl::StartsWith(target, absl::StrCat(pipeline.target, ":")));
  });
  return at == named.end() ? nullptr : &*at;
}

std::vector<const PassDef*> PassRegistry::Unique() const {
  std::vector<const PassDef*> unique;
  for (const PassDef* pass : order) {
    if (!absl::c_linear_search(unique, pass)) unique.push_back(pass);
  }
  return unique;
}

const PassRegistry& Passes() { return kPasses; }

}  // namespace mt
