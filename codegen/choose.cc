#include "codegen/choose.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "codegen/report/peak.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"
#include "ir/target.h"
#include "passes/pipeline.h"
#include "passes/registry.h"

namespace mt {
namespace {

// What saves memory, in groups of which a pipeline takes at most one. Only passes that this build has count.
struct Fix {
  absl::string_view pass;
  int group;
  bool last_resort = false;  // Changes results by more than rounding: only where nothing else fits.
};
constexpr absl::string_view kBudget = "remat:budget=";
constexpr Fix kFixes[] = {
    {"flash", 0},      {"bf16", 1},  {"fp16", 1},  {"chunked_loss", 2},
    {"remat:free", 3}, {kBudget, 3}, {"remat", 3}, {"adamw8bit", 4, true},
};
// Together: the sets of fixes that are planned.
constexpr int kMaxTogether = 4;
constexpr size_t kLargest = 5;      // Tensors in a refusal.
constexpr size_t kShownBehind = 4;  // Candidates behind the chosen one in a table.
constexpr size_t kSuggestions = 6;  // Pipelines in a refusal.

absl::string_view NameOf(absl::string_view element) {
  absl::ConsumePrefix(&element, "+");
  return element.substr(0, element.find(':'));
}

std::string Normal(absl::string_view name) {
  std::string text(name);
  for (char& c : text) c = c == '-' ? '_' : c;
  return text;
}

bool HasOption(const PassDef& pass, absl::string_view option) {
  return absl::c_any_of(pass.options, [&](const PassOption& o) { return o.name == option; });
}

// The fixes that this build has, as pass text; those in `pipeline` already are left out.
std::vector<Fix> Available(const Pipeline& pipeline, const Target& target, std::vector<std::string>& texts,
                           int64_t budget_bytes) {
  std::vector<Fix> available;
  for (const Fix& fix : kFixes) {
    const std::string name(NameOf(fix.pass));
    const PassDef* pass = Passes().Find(name);
    if (pass == nullptr) continue;
    const std::vector<std::string> parts = absl::StrSplit(fix.pass, absl::ByAnyChar(":="));
    if (parts.size() > 1 && !HasOption(*pass, parts[1])) continue;
    if (fix.pass == kBudget && budget_bytes <= 0) continue;
    // One precision a module: bf16 where the target computes in it, else fp16; neither where one is there, nor on the
    // CPU, which computes in them more slowly.
    if (fix.group == 1 && (!target.is_cuda() || target.Computes(DType::kBF16) != (fix.pass == "bf16") ||
                           pipeline.Has("bf16") || pipeline.Has("fp16"))) {
      continue;
    }
    if (pipeline.Has(name) && name != "remat") continue;
    texts.push_back(fix.pass == kBudget ? absl::StrCat(kBudget, CanonicalBytes(budget_bytes)) : std::string(fix.pass));
    available.push_back(fix);
  }
  return available;
}

absl::StatusOr<Candidate> PlanCandidate(const Job& job, std::string passes, std::vector<std::string> added) {
  Job with = job;
  with.options.passes = passes;
  with.options.dump_dir.clear();
  ASSIGN_OR_RETURN(std::unique_ptr<Module> module, LoadModule(with));
  ASSIGN_OR_RETURN(const Needs needs, PassesAndNeeds(std::move(module), with.options));
  return Candidate{.passes = std::move(passes),
                   .added = std::move(added),
                   .pipeline = needs.passes,
                   .needs_bytes = needs.needs_bytes,
                   .step_seconds = needs.step_seconds};
}

bool IsSubset(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  return absl::c_all_of(a, [&](const std::string& pass) { return absl::c_linear_search(b, pass); });
}

// +22 %, by how much the second is slower.
std::string SlowerText(double before, double after) {
  if (before <= 0) return "";
  return absl::StrFormat("time %+.1f %% (estimate)", (after / before - 1) * 100);
}

}  // namespace

std::string StepText(double seconds) {
  return seconds >= 1 ? absl::StrFormat("%.2f s", seconds) : absl::StrFormat("%.2f ms", seconds * 1e3);
}

std::string WithPass(absl::string_view passes, absl::string_view pass) {
  std::vector<std::string> kept;
  bool edits = false;
  for (const absl::string_view element : absl::StrSplit(passes, ',')) {
    const absl::string_view trimmed = absl::StripAsciiWhitespace(element);
    edits = edits || trimmed == "default" || absl::StartsWith(trimmed, "+") || absl::StartsWith(trimmed, "-");
    if (trimmed == "none" || Normal(NameOf(trimmed)) == Normal(NameOf(pass))) continue;
    if (trimmed != "default") kept.emplace_back(trimmed);
  }
  // "none,+x" is "x": an edit of none is a list.
  const bool of_none = absl::StartsWith(absl::StripAsciiWhitespace(passes), "none");
  if (of_none) {
    for (std::string& element : kept) element = std::string(absl::StripPrefix(element, "+"));
  }
  kept.push_back(absl::StrCat(edits && !of_none ? "+" : "", pass));
  return absl::StrJoin(kept, ",");
}

absl::StatusOr<std::vector<Candidate>> PlanCandidates(const Job& job, int64_t memory_bytes, bool smallest_sets) {
  ASSIGN_OR_RETURN(const Target target, ParseTarget(job.options.target));
  ASSIGN_OR_RETURN(Pipeline pipeline, PipelineOf(job.options));
  ASSIGN_OR_RETURN(const std::unique_ptr<Module> module, LoadModule(job));
  pipeline.KeepWhatApplies(*module);
  std::vector<std::string> texts;
  const std::vector<Fix> fixes = Available(pipeline, target, texts, memory_bytes - ContextBytes(target));
  std::vector<Candidate> planned;
  std::set<std::string> seen = {pipeline.ToString()};
  bool one_fits = false;
  std::vector<uint32_t> sets;  // Few passes before many.
  for (uint32_t set = 1; set < uint32_t{1} << fixes.size(); ++set) sets.push_back(set);
  absl::c_stable_sort(sets, [](uint32_t a, uint32_t b) { return std::popcount(a) < std::popcount(b); });
  for (const bool last_resort : {false, true}) {
    if (last_resort && one_fits) break;
    for (const uint32_t set : sets) {
      std::vector<std::string> added;
      uint32_t groups = 0;
      bool is_allowed = true, has_last = false;
      for (size_t i = 0; i < fixes.size(); ++i) {
        if ((set >> i & 1) == 0) continue;
        added.push_back(texts[i]);
        is_allowed = is_allowed && (groups >> fixes[i].group & 1) == 0;
        groups |= uint32_t{1} << fixes[i].group;
        has_last = has_last || fixes[i].last_resort;
      }
      if (!is_allowed || has_last != last_resort || static_cast<int>(added.size()) > kMaxTogether) continue;
      if (smallest_sets && absl::c_any_of(planned, [&](const Candidate& candidate) {
            return candidate.needs_bytes <= memory_bytes && IsSubset(candidate.added, added);
          })) {
        continue;
      }
      std::string passes = job.options.passes;
      for (const std::string& pass : added) passes = WithPass(passes, pass);
      const absl::StatusOr<Candidate> candidate = PlanCandidate(job, std::move(passes), std::move(added));
      if (!candidate.ok() || !seen.insert(candidate->pipeline).second) continue;
      const bool is_no_other = absl::c_any_of(planned, [&](const Candidate& other) {
        return IsSubset(other.added, candidate->added) && other.needs_bytes == candidate->needs_bytes &&
               other.step_seconds == candidate->step_seconds;
      });
      if (is_no_other) continue;  // A budget that is kept to as it is, say.
      one_fits = one_fits || candidate->needs_bytes <= memory_bytes;
      planned.push_back(*candidate);
    }
  }
  absl::c_stable_sort(planned, [](const Candidate& a, const Candidate& b) {
    return std::make_pair(a.step_seconds, a.needs_bytes) < std::make_pair(b.step_seconds, b.needs_bytes);
  });
  return planned;
}

absl::StatusOr<Choice> ChoosePasses(const Job& job, int64_t memory_bytes) {
  Choice choice;
  ASSIGN_OR_RETURN(const Candidate asked, PlanCandidate(job, job.options.passes, {}));
  // What fits as it is is not traded for what is smaller.
  if (asked.needs_bytes <= memory_bytes) {
    choice.candidates.push_back(asked);
    choice.chosen = 0;
    return choice;
  }
  ASSIGN_OR_RETURN(choice.candidates, PlanCandidates(job, memory_bytes, /*smallest_sets=*/false));
  choice.candidates.insert(choice.candidates.begin(), asked);
  absl::c_stable_sort(choice.candidates, [](const Candidate& a, const Candidate& b) {
    return std::make_pair(a.step_seconds, a.needs_bytes) < std::make_pair(b.step_seconds, b.needs_bytes);
  });
  for (size_t i = 0; i < choice.candidates.size() && choice.chosen < 0; ++i) {
    if (choice.candidates[i].needs_bytes <= memory_bytes) choice.chosen = static_cast<int>(i);
  }
  return choice;
}

std::string FormatChoice(const Choice& choice, absl::string_view target, int64_t memory_bytes) {
  std::string text = absl::StrFormat("memory   %s allowed; %d %s planned for it, the fastest that fits is taken\n",
                                     FormatBytes(memory_bytes), choice.candidates.size(),
                                     choice.candidates.size() == 1 ? "pipeline" : "pipelines");
  absl::StrAppendFormat(&text, "  %12s %12s  passes (a step estimated at the roofline of %s)\n", "needs", "step",
                        target);
  const size_t shown = std::min(choice.candidates.size(), static_cast<size_t>(choice.chosen + 1) + kShownBehind);
  for (size_t i = 0; i < shown; ++i) {
    const Candidate& candidate = choice.candidates[i];
    const bool fits = candidate.needs_bytes <= memory_bytes;
    absl::StrAppendFormat(&text, "%s %12s %12s  %s%s\n", static_cast<int>(i) == choice.chosen ? ">" : " ",
                          FormatBytes(candidate.needs_bytes), StepText(candidate.step_seconds), candidate.pipeline,
                          fits ? "" : absl::StrCat("  ", FormatBytes(candidate.needs_bytes - memory_bytes), " short"));
  }
  if (shown < choice.candidates.size()) {
    absl::StrAppend(&text, "  and ", choice.candidates.size() - shown, " that are slower\n");
  }
  return text;
}

absl::Status DoesNotFit(const Job& job, const proto::PlanProto& plan, double step_seconds, int64_t memory_bytes,
                        absl::string_view source) {
  const auto batch_of = [](const proto::PlanProto& p) {
    const auto fact = p.facts().find("batch");
    return fact == p.facts().end() ? int64_t{0} : fact->second;
  };
  const int64_t needs = NeededBytes(plan), context = needs - plan.arena_bytes(), batch = batch_of(plan);
  const std::string at_batch = batch > 0 ? absl::StrCat(" at batch ", batch) : "";
  std::string text = absl::StrFormat(
      "plan does not fit\n  needs %s%s%s; %s %s: %s short\n", FormatBytes(needs), at_batch,
      context > 0 ? absl::StrCat(" (", FormatBytes(context), " of it the context of ", plan.target(), ")") : "", source,
      FormatBytes(memory_bytes), FormatBytes(needs - memory_bytes));

  const proto::ProgramProto& program = LargestProgram(plan);
  const Peak peak = PeakOf(plan, program);
  std::vector<std::string> classes;
  for (int c = 0; c < kNumMemoryClasses; ++c) {
    const int64_t bytes = peak.by_class[static_cast<size_t>(c)];
    if (bytes > 0) classes.push_back(absl::StrCat(MemoryClassName(MemoryClassAt(c)), " ", FormatBytes(bytes)));
  }
  absl::StrAppend(&text, "  peak at ", program.name(), " ", peak.name, ": ", absl::StrJoin(classes, " | "), "\n");
  absl::StrAppend(&text, "  largest live: ", LargestText(peak, kLargest), "\n");

  std::vector<std::pair<std::string, std::string>> fixes;  // What to type, what comes of it.
  std::string smallest;
  const absl::StatusOr<FitResult> fit = FitLargest(job, FitAxis::kBatch, memory_bytes);
  if (fit.ok() && fit->largest > 0 && fit->largest < batch) {
    fixes.push_back({absl::StrCat("--batch=", fit->largest), FormatBytes(fit->needs_bytes)});
  }
  absl::StatusOr<std::vector<Candidate>> candidates = PlanCandidates(job, memory_bytes, /*smallest_sets=*/true);
  if (candidates.ok()) {
    std::vector<Candidate> fitting;
    int64_t least = needs;
    for (const Candidate& candidate : *candidates) {
      if (candidate.needs_bytes <= memory_bytes) fitting.push_back(candidate);
      if (candidate.needs_bytes < least) {
        least = candidate.needs_bytes;
        smallest = absl::StrCat("--passes=", candidate.passes, " takes ", FormatBytes(least));
      }
    }
    for (const Candidate& candidate : fitting) {
      if (fixes.size() >= kSuggestions) break;
      fixes.push_back({absl::StrCat("--passes=", candidate.passes),
                       absl::StrFormat("%-10s %s", FormatBytes(candidate.needs_bytes),
                                       SlowerText(step_seconds, candidate.step_seconds))});
    }
  }
  if (fixes.empty()) {
    absl::StrAppend(&text, "  nothing that was tried fits",
                    smallest.empty() ? "" : absl::StrCat("; the smallest: ", smallest),
                    "; reduce --batch, --seq or the model");
  } else {
    size_t width = 0;
    for (const auto& [what, comes] : fixes) width = std::max(width, what.size());
    absl::StrAppend(&text, "  what would fit (each one planned just now):");
    for (const auto& [what, comes] : fixes) {
      absl::StrAppendFormat(&text, "\n    %-*s  %s", static_cast<int>(width), what, comes);
    }
  }
  return absl::ResourceExhaustedError(text);
}

absl::StatusOr<std::string> FuseNote(const Job& job, const proto::PlanProto& plan) {
  const std::vector<std::string> elements = absl::StrSplit(plan.passes(), ',');
  std::vector<std::string> others;
  bool budget = false;
  for (const std::string& element : elements) {
    if (NameOf(element) != "fuse") others.push_back(element);
    budget = budget || (absl::StrContains(element, "budget=") && !absl::StrContains(element, "budget=none"));
  }
  // Fusion alone keeps nothing alive for longer.
  if (others.size() == elements.size() || budget || !absl::StrContains(plan.passes(), "remat")) return "";
  const std::string without = others.empty() ? "none" : absl::StrJoin(others, ",");
  const absl::StatusOr<Candidate> apart = PlanCandidate(job, without, {});
  const int64_t more = apart.ok() ? NeededBytes(plan) - apart->needs_bytes : 0;
  if (more <= 0) return "";
  return absl::StrFormat("fuse     the arena is %s (%.2f %%) larger than without: what is fused is recomputed together",
                         FormatBytes(more),
                         100 * static_cast<double>(more) / static_cast<double>(plan.arena_bytes() - more));
}

std::vector<std::string> FitPipelines(const Job& job) {
  std::vector<std::string> pipelines;
  std::set<std::string> seen;
  const auto add = [&](const std::string& passes) {
    Job with = job;
    with.options.passes = passes;
    const absl::StatusOr<Pipeline> pipeline = PipelineOf(with.options);
    if (pipeline.ok() && seen.insert(pipeline->ToString()).second) pipelines.push_back(passes);
  };
  add("none");
  add("default");
  for (const Fix& fix : kFixes) {
    if (fix.pass == kBudget || fix.group == 1) continue;
    add(WithPass("default", fix.pass));
  }
  std::string all = "default";
  for (const absl::string_view pass : {"chunked_loss", "remat", "adamw8bit"}) {
    if (Passes().Find(pass) != nullptr) all = WithPass(all, pass);
  }
  add(all);
  return pipelines;
}

}  // namespace mt
