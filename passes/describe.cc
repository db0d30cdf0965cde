#include "passes/describe.h"

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "ir/attrs.h"

namespace mt {
namespace {

std::string StageText(const PassDef& pass) {
  if (pass.any_stage) return "any";
  if (pass.requires_stage == pass.provides_stage) return std::string(StageName(pass.requires_stage));
  return absl::StrCat(StageName(pass.requires_stage), " -> ", StageName(pass.provides_stage));
}

// "window=-1", "steps=INT", "kind=adamw".
std::string OptionText(const PassOption& option) {
  if (!option.default_text.empty()) return absl::StrCat(option.name, "=", option.default_text);
  return absl::StrCat(option.name, "=", option.is_bytes ? "BYTES" : absl::AsciiStrToUpper(AttrKindName(option.kind)));
}

}  // namespace

std::string DescribePass(const PassDef& pass) {
  std::string text = absl::StrCat(pass.name, ": ", pass.summary, "\n");
  const auto line = [&](absl::string_view label, absl::string_view value) {
    absl::StrAppendFormat(&text, "  %-14s %s\n", label, value);
  };
  line("stage", StageText(pass));
  line("runs", pass.always_on ? "always; it is not named in --passes" : absl::StrCat("with --passes ", pass.name));
  line("results", pass.tolerance == 0 ? "the same bits" : absl::StrCat("within ", pass.tolerance, " relative"));
  for (const PassOption& option : pass.options) {
    std::string doc(option.doc);
    if (!option.choices.empty()) absl::StrAppend(&doc, " [", absl::StrReplaceAll(option.choices, {{"|", ", "}}), "]");
    if (option.default_text.empty()) absl::StrAppend(&doc, " (required)");
    line("option", absl::StrFormat("%-18s %s", OptionText(option), doc));
  }
  if (!pass.source.empty()) line("source", pass.source);
  if (!pass.also_known_as.empty()) line("also known as", absl::StrJoin(pass.also_known_as, ", "));
  return text;
}

std::string DescribePasses(const PassRegistry& registry, absl::string_view target) {
  const std::vector<const PassDef*> passes = registry.Unique();
  size_t width = 8;
  for (const PassDef* pass : passes) width = std::max(width, pass->name.size());
  std::string chosen, always;
  for (const PassDef* pass : passes) {
    absl::StrAppend(pass->always_on ? &always : &chosen,
                    absl::StrFormat("  %-*s  %s\n", static_cast<int>(width), pass->name, pass->summary));
  }
  std::string text;
  if (!chosen.empty()) absl::StrAppend(&text, "Chosen with --passes, in the order they run:\n", chosen, "\n");
  absl::StrAppend(&text, "Always on:\n", always, "\nPipelines:\n");
  for (const NamedPipeline& named : registry.named) {
    if (registry.FindNamed(named.name, target) != &named) continue;
    const absl::string_view passes_of = named.text.empty() ? "no optional pass" : named.text;
    absl::StrAppend(&text,
                    absl::StrFormat("  %-*s  %s: %s\n", static_cast<int>(width), named.name, named.summary, passes_of));
  }
  return text;
}

}  // namespace mt
