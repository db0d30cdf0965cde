#include "passes/pipeline.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "ir/base/check.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/base/units.h"

namespace mt {
namespace {

constexpr size_t kMaxLength = 4096;

std::string Underscored(absl::string_view name) { return absl::StrReplaceAll(name, {{"-", "_"}}); }

absl::Status ErrorAt(size_t column, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat("--passes, column ", column, ": ", message));
}

struct TypedOption {
  size_t column = 0;
  std::string key;
  std::optional<std::string> value;
};

// One element as typed.
struct Element {
  char sign = '\0';  // '+', '-' or none.
  size_t column = 0;
  std::string name;
  std::vector<TypedOption> options;
};

// `text` without surrounding blanks; `column` moves along with what was cut in front.
absl::string_view Trimmed(absl::string_view text, size_t& column) {
  const absl::string_view trimmed = absl::StripLeadingAsciiWhitespace(text);
  column += text.size() - trimmed.size();
  return absl::StripTrailingAsciiWhitespace(trimmed);
}

absl::StatusOr<std::vector<Element>> ParseElements(absl::string_view text) {
  std::vector<Element> elements;
  size_t column = 1;
  for (const absl::string_view piece : absl::StrSplit(text, ',')) {
    Element element{.column = column};
    absl::string_view rest = Trimmed(piece, element.column);
    if (!rest.empty() && (rest[0] == '+' || rest[0] == '-')) {
      element.sign = rest[0];
      rest = Trimmed(rest.substr(1), ++element.column);
    }
    size_t at = element.column;
    bool is_name = true;
    for (const absl::string_view part : absl::StrSplit(rest, ':')) {
      size_t part_column = at;
      const absl::string_view trimmed = Trimmed(part, part_column);
      if (trimmed.empty()) return ErrorAt(part_column, is_name ? "expected a pass" : "expected an option after \":\"");
      if (is_name) {
        element.name = Underscored(trimmed);
        element.column = part_column;
      } else {
        TypedOption option{.column = part_column};
        const std::vector<absl::string_view> sides = absl::StrSplit(trimmed, absl::MaxSplits('=', 1));
        option.key = Underscored(sides[0]);
        if (sides.size() == 2) option.value = std::string(sides[1]);
        if (option.key.empty()) return ErrorAt(part_column, "expected an option's name before \"=\"");
        element.options.push_back(std::move(option));
      }
      is_name = false;
      at += part.size() + 1;
    }
    elements.push_back(std::move(element));
    column += piece.size() + 1;
  }
  return elements;
}

// " ; did you mean "x"?" or nothing.
std::string Suggestion(absl::string_view likely) {
  return likely.empty() ? "" : absl::StrCat("; did you mean \"", likely, "\"?");
}

// A pass chosen by the user.
struct Choice {
  size_t column = 0;  // 0: by a named pipeline.
  Attrs options;
};
using Choices = std::map<const PassDef*, Choice>;

class PipelineParser {
 public:
  PipelineParser(absl::string_view target, const PassRegistry& registry) : target_(target), registry_(registry) {}

  absl::StatusOr<Choices> Parse(absl::string_view text) const {
    if (text.size() > kMaxLength) {
      return absl::InvalidArgumentError(
          absl::StrCat("--passes is ", text.size(), " characters long; at most ", kMaxLength, " are read"));
    }
    if (absl::StripAsciiWhitespace(text).empty()) {
      return absl::InvalidArgumentError("--passes is empty; write none for no optional pass, or default");
    }
    ASSIGN_OR_RETURN(const std::vector<Element> elements, ParseElements(text));
    const bool edits = absl::c_any_of(elements, [](const Element& element) { return element.sign != '\0'; });
    Choices choices;
    if (edits && elements[0].sign != '\0') {
      ASSIGN_OR_RETURN(choices, Named("default"));
    }
    for (size_t i = 0; i < elements.size(); ++i) {
      const Element& element = elements[i];
      if (IsNamed(element.name)) {
        if (i != 0 || element.sign != '\0' || !element.options.empty() || (elements.size() > 1 && !edits)) {
          return ErrorAt(element.column, absl::StrCat("\"", element.name,
                                                      "\" stands alone or first, with changes after it: ", element.name,
                                                      ",+PASS,-PASS"));
        }
        ASSIGN_OR_RETURN(choices, Named(element.name));
        continue;
      }
      if (edits && element.sign == '\0') {
        return ErrorAt(element.column,
                       absl::StrCat("\"", element.name, "\" has no sign, but others have; write +", element.name,
                                    " or -", element.name, ", or drop all signs to list exactly what runs"));
      }
      ASSIGN_OR_RETURN(const PassDef* pass, FindPass(element));
      if (element.sign == '-') {
        if (!element.options.empty()) {
          return ErrorAt(element.options[0].column, absl::StrCat("-", element.name, " takes no options"));
        }
        if (choices.erase(pass) == 0) {
          return ErrorAt(element.column, absl::StrCat("\"", element.name,
                                                      "\" is not there to be taken out; leave out -", element.name));
        }
        continue;
      }
      ASSIGN_OR_RETURN(Attrs options, ParseOptions(*pass, element));
      Choice& choice = choices[pass];
      if (choice.column != 0) return ErrorAt(element.column, absl::StrCat("\"", element.name, "\" is named twice"));
      choice = {.column = element.column, .options = std::move(options)};
    }
    for (const Contradiction& pair : registry_.contradictions) {
      const auto a = choices.find(registry_.Find(pair.a)), b = choices.find(registry_.Find(pair.b));
      if (a == choices.end() || b == choices.end()) continue;
      return ErrorAt(std::max(a->second.column, b->second.column),
                     absl::StrCat(pair.a, " contradicts ", pair.b, ": ", pair.reason, "; leave one of them out"));
    }
    return choices;
  }

 private:
  bool IsNamed(absl::string_view name) const {
    return absl::c_any_of(registry_.named, [&](const NamedPipeline& pipeline) { return pipeline.name == name; });
  }

  // What a named pipeline chooses. Columns are 0: edits may replace it.
  absl::StatusOr<Choices> Named(absl::string_view name) const {
    const NamedPipeline* pipeline = registry_.FindNamed(name, target_);
    if (pipeline == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("--passes: there is no pipeline ", name, " for target ", target_));
    }
    if (pipeline->text.empty()) return Choices{};
    ASSIGN_OR_RETURN(Choices choices, Parse(pipeline->text));
    for (auto& [pass, choice] : choices) choice.column = 0;
    return choices;
  }

  absl::StatusOr<const PassDef*> FindPass(const Element& element) const {
    const PassDef* found = registry_.Find(element.name);
    if (found != nullptr && !found->always_on) return found;
    if (found != nullptr) {
      return ErrorAt(element.column,
                     absl::StrCat("\"", element.name, "\" always runs and is not chosen here; leave it out"));
    }
    std::vector<std::string> names, known;
    std::map<std::string, absl::string_view> called;  // Other names -> ours.
    for (const PassDef* pass : registry_.Unique()) {
      if (pass->always_on) continue;
      names.emplace_back(pass->name);
      known.emplace_back(pass->name);
      for (const absl::string_view other : pass->also_known_as) {
        names.push_back(Underscored(other));
        called[names.back()] = pass->name;
      }
    }
    for (const NamedPipeline& pipeline : registry_.named) {
      if (absl::c_linear_search(known, pipeline.name)) continue;
      names.emplace_back(pipeline.name);
      known.emplace_back(pipeline.name);
    }
    std::string likely = DidYouMean(element.name, names);
    if (const auto ours = called.find(likely); ours != called.end()) likely = std::string(ours->second);
    return ErrorAt(element.column, absl::StrCat("no pass is named \"", element.name, "\"", Suggestion(likely),
                                                likely.empty() ? ";" : "", " known: ", absl::StrJoin(known, ", ")));
  }

  absl::StatusOr<Attrs> ParseOptions(const PassDef& pass, const Element& element) const {
    Attrs options;
    for (TypedOption typed : element.options) {
      if (!typed.value && absl::ascii_isdigit(static_cast<unsigned char>(typed.key[0]))) {  // accumulate:8
        const auto required =
            absl::c_find_if(pass.options, [](const PassOption& candidate) { return candidate.default_text.empty(); });
        if (required != pass.options.end()) {
          typed.value = std::exchange(typed.key, std::string(required->name));
        }
      }
      const auto option =
          absl::c_find_if(pass.options, [&](const PassOption& candidate) { return candidate.name == typed.key; });
      if (option == pass.options.end()) {
        std::vector<std::string> known;
        for (const PassOption& candidate : pass.options) known.emplace_back(candidate.name);
        if (known.empty()) return ErrorAt(typed.column, absl::StrCat(pass.name, " takes no options"));
        const std::string likely = DidYouMean(typed.key, known);
        return ErrorAt(typed.column, absl::StrCat(pass.name, " has no option \"", typed.key, "\"", Suggestion(likely),
                                                  likely.empty() ? ";" : "", " known: ", absl::StrJoin(known, ", ")));
      }
      if (options.Find(typed.key) != nullptr) {
        return ErrorAt(typed.column, absl::StrCat("\"", typed.key, "\" is given twice"));
      }
      if (!typed.value && option->kind != AttrKind::kBool) {
        return ErrorAt(typed.column, absl::StrCat(pass.name, ":", typed.key, " needs a value, ", typed.key, "=",
                                                  option->is_bytes ? "8GiB" : "VALUE", " (", option->doc, ")"));
      }
      absl::StatusOr<AttrValue> value = ParseOptionValue(*option, typed.value.value_or("true"));
      if (!value.ok()) return ErrorAt(typed.column, absl::StrCat(pass.name, ":", value.status().message()));
      options.Set(typed.key, *std::move(value));
    }
    for (const PassOption& option : pass.options) {
      if (options.Find(option.name) != nullptr) continue;
      if (option.default_text.empty()) {
        return ErrorAt(element.column, absl::StrCat(pass.name, " needs an option: ", pass.name, ":", option.name, "=",
                                                    option.is_bytes ? "8GiB" : "VALUE", " (", option.doc, ")"));
      }
      const absl::StatusOr<AttrValue> value = ParseOptionValue(option, option.default_text);
      CHECK(value.ok()) << pass.name << ": " << value.status();
      options.Set(option.name, *value);
    }
    return options;
  }

  absl::string_view target_;
  const PassRegistry& registry_;
};

Attrs DefaultOptions(const PassDef& pass) {
  Attrs options;
  for (const PassOption& option : pass.options) {
    const absl::StatusOr<AttrValue> value = ParseOptionValue(option, option.default_text);
    CHECK(value.ok()) << pass.name << ": " << value.status();
    options.Set(option.name, *value);
  }
  return options;
}

}  // namespace

absl::StatusOr<AttrValue> ParseOptionValue(const PassOption& option, absl::string_view text) {
  CHECK(option.kind != AttrKind::kIntList) << option.name;
  const auto error = [&](absl::string_view expected) {
    return absl::InvalidArgumentError(absl::StrCat(option.name, "=", text, " is wrong; expected ", expected));
  };
  AttrValue value;
  if (option.is_bytes) {
    absl::StatusOr<int64_t> bytes = ParseBytes(text);
    if (!bytes.ok()) return Annotate(bytes.status(), absl::StrCat(option.name, "=", text));
    value = *bytes;
  } else if (option.kind == AttrKind::kString) {
    const bool is_word = !text.empty() && absl::c_all_of(text, [](char c) {
      return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("_-.+/", absl::string_view(&c, 1));
    });
    if (!is_word) return error("letters, digits, _-.+/");
    if (!option.choices.empty()) {
      const std::vector<absl::string_view> choices = absl::StrSplit(option.choices, '|');
      if (!absl::c_linear_search(choices, text)) return error(absl::StrJoin(choices, ", "));
    }
    value = std::string(text);
  } else {
    absl::StatusOr<AttrValue> parsed = ParseAttrValue(option.kind, text);
    if (!parsed.ok()) return error(absl::StrCat("a value of kind ", AttrKindName(option.kind)));
    value = *std::move(parsed);
  }
  const int64_t* integer = std::get_if<int64_t>(&value);
  const double* real = std::get_if<double>(&value);
  if ((integer != nullptr && static_cast<double>(*integer) < option.min) || (real != nullptr && *real < option.min)) {
    return error(absl::StrCat("at least ", option.min));
  }
  return value;
}

std::string OptionValueToString(const PassOption& option, const AttrValue& value) {
  if (option.is_bytes) return CanonicalBytes(std::get<int64_t>(value));
  if (option.kind == AttrKind::kString) return std::get<std::string>(value);
  return AttrValueToString(value);
}

std::string Pipeline::ToString() const {
  std::vector<std::string> elements;
  for (const PipelineStep& step : steps) {
    if (step.pass->always_on) continue;
    std::string& element = elements.emplace_back(step.pass->name);
    for (const PassOption& option : step.pass->options) {
      absl::StrAppend(&element, ":", option.name, "=", OptionValueToString(option, *step.options.Find(option.name)));
    }
  }
  return elements.empty() ? "none" : absl::StrJoin(elements, ",");
}

bool Pipeline::Has(absl::string_view pass) const {
  return absl::c_any_of(steps, [&](const PipelineStep& step) { return step.pass->name == pass; });
}

absl::Status Pipeline::SetOption(absl::string_view pass, absl::string_view option, absl::string_view value) {
  bool found = false;
  for (PipelineStep& step : steps) {
    if (step.pass->name != pass) continue;
    for (const PassOption& candidate : step.pass->options) {
      if (candidate.name != option) continue;
      ASSIGN_OR_RETURN(AttrValue parsed, ParseOptionValue(candidate, value));
      step.options.Set(option, std::move(parsed));
      found = true;
    }
  }
  if (found) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the pipeline has no option ", pass, ":", option));
}

void Pipeline::KeepWhatApplies(const Module& module) {
  steps.erase(std::remove_if(steps.begin(), steps.end(),
                             [&](const PipelineStep& step) {
                               return step.where_it_applies && step.pass->applies != nullptr &&
                                      !step.pass->applies(module);
                             }),
              steps.end());
}

absl::StatusOr<Pipeline> ParsePipeline(absl::string_view text, absl::string_view target, const PassRegistry& registry) {
  ASSIGN_OR_RETURN(const Choices choices, PipelineParser(target, registry).Parse(text));
  Pipeline pipeline;
  for (const PassDef* pass : registry.order) {
    if (pass->always_on) {
      pipeline.steps.push_back({.pass = pass, .options = DefaultOptions(*pass)});
    } else if (const auto choice = choices.find(pass); choice != choices.end()) {
      pipeline.steps.push_back(
          {.pass = pass, .options = choice->second.options, .where_it_applies = choice->second.column == 0});
    }
  }
  return pipeline;
}

}  // namespace mt
