#include "ir/base/aliases.h"

#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"

namespace mt {
namespace {

constexpr FlagAlias kAliases[] = {
    {"bf16", FlagAlias::kPass, "bf16"},
    {"use-bf16", FlagAlias::kPass, "bf16"},
    {"fp16", FlagAlias::kPass, "fp16"},
    {"use-fp16", FlagAlias::kPass, "fp16"},
    {"tf32", FlagAlias::kPass, "tf32"},
    {"flash-attn", FlagAlias::kPass, "flash"},
    {"use-flash-attention", FlagAlias::kPass, "flash"},
    {"window-size", FlagAlias::kPassWith, "flash:window="},
    {"gradient-checkpointing", FlagAlias::kPass, "remat"},
    {"use-gradient-checkpointing", FlagAlias::kPass, "remat"},
    {"use-activation-checkpointing", FlagAlias::kPass, "remat"},
    {"use-8bit", FlagAlias::kPass, "adamw8bit"},
    {"gradient-accumulation-steps", FlagAlias::kPassWith, "accumulate:"},
    {"batch-size", FlagAlias::kRename, "batch"},
    {"adjust-batch-size", FlagAlias::kSwitch, "--batch=max"},
    {"max-seq-length", FlagAlias::kRename, "seq"},
    {"seq-len", FlagAlias::kRename, "seq"},
    {"embedding-dim", FlagAlias::kSet, "width"},
    {"num-layers", FlagAlias::kSet, "layers"},
    {"num-heads", FlagAlias::kSet, "heads"},
    {"ff-dim", FlagAlias::kSet, "ffn_width"},
    {"dropout", FlagAlias::kSet, "dropout"},
    {"learning-rate", FlagAlias::kRename, "lr"},
    {"lr-scheduler-type", FlagAlias::kRename, "lr-schedule"},
    {"warmup-steps", FlagAlias::kRename, "warmup"},
    {"max-grad-norm", FlagAlias::kRename, "grad-clip"},
    {"max-steps", FlagAlias::kRename, "steps"},
    {"num-epochs", FlagAlias::kRename, "epochs"},
    {"max-training-minutes", FlagAlias::kRename, "max-minutes"},
    {"dataset", FlagAlias::kRename, "data"},
    {"data-path", FlagAlias::kRename, "data"},
    {"processed-data-path", FlagAlias::kRename, "data"},
    {"technique", FlagAlias::kRename, "out"},
    {"output-dir", FlagAlias::kRename, "out"},
};

std::optional<bool> Truth(absl::string_view text) {
  for (const char* yes : {"true", "1", "yes"}) {
    if (absl::EqualsIgnoreCase(text, yes)) return true;
  }
  for (const char* no : {"false", "0", "no"}) {
    if (absl::EqualsIgnoreCase(text, no)) return false;
  }
  return std::nullopt;
}

const FlagAlias* Find(absl::string_view name) {
  for (const FlagAlias& alias : kAliases) {
    if (alias.name == name) return &alias;
  }
  return nullptr;
}

}  // namespace

absl::Span<const FlagAlias> TrainAliases() { return kAliases; }

absl::StatusOr<std::vector<std::string>> ExpandAliases(absl::Span<const std::string> arguments) {
  std::vector<std::string> expanded(arguments.begin(), arguments.end());
  if (arguments.empty() || arguments[0] != "train") return expanded;
  expanded.resize(1);
  std::vector<std::string> passes;
  std::string of_passes;  // The alias that named the first of them.
  bool has_passes = false;
  for (size_t i = 1; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--") {
      expanded.insert(expanded.end(), arguments.begin() + static_cast<int64_t>(i), arguments.end());
      break;
    }
    const size_t equals = argument.find('=');
    const std::string name = absl::StartsWith(argument, "--")
                                 ? absl::StrReplaceAll(absl::string_view(argument).substr(
                                                           2, equals == std::string::npos ? equals : equals - 2),
                                                       {{"_", "-"}})
                                 : "";
    has_passes = has_passes || name == "passes";
    const FlagAlias* alias = Find(name);
    if (alias == nullptr) {
      expanded.push_back(argument);
      continue;
    }
    std::optional<std::string> value;
    if (equals != std::string::npos) value = argument.substr(equals + 1);
    const bool truth = alias->kind == FlagAlias::kPass || alias->kind == FlagAlias::kSwitch;
    if (truth) {
      // A word that says yes or no belongs to the flag; anything else stands for itself.
      if (!value && i + 1 < arguments.size() && Truth(arguments[i + 1])) value = arguments[++i];
      const std::optional<bool> on = Truth(value.value_or("true"));
      if (!on) return absl::InvalidArgumentError(absl::StrCat("--", name, ": \"", *value, "\" is not true or false"));
      if (alias->kind == FlagAlias::kPass) {
        if (of_passes.empty()) of_passes = name;
        if (*on) passes.emplace_back(alias->to);
      } else if (*on) {
        expanded.emplace_back(alias->to);
      }
      continue;
    }
    if (!value) {
      if (i + 1 >= arguments.size() || absl::StartsWith(arguments[i + 1], "--")) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
      }
      value = arguments[++i];
    }
    if (alias->kind == FlagAlias::kPassWith) {
      if (of_passes.empty()) of_passes = name;
      passes.push_back(absl::StrCat(alias->to, *value));
    } else if (alias->kind == FlagAlias::kSet) {
      expanded.push_back(absl::StrCat("--set=", alias->to, "=", *value));
    } else {
      expanded.push_back(absl::StrCat("--", alias->to, "=", *value));
    }
  }
  if (of_passes.empty()) return expanded;
  if (has_passes) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", of_passes, " names a pass, and --passes is there, too: put all of them into --passes"));
  }
  // A window is attention as one op already.
  for (size_t i = 0; i < passes.size(); ++i) {
    for (size_t k = passes.size(); k-- > 0;) {
      if (k != i && passes[k] == "flash" && absl::StartsWith(passes[i], "flash:")) {
        passes.erase(passes.begin() + static_cast<int64_t>(k));
        if (k < i) --i;
      }
    }
  }
  expanded.push_back(absl::StrCat("--passes=", passes.empty() ? "none" : absl::StrJoin(passes, ",")));
  return expanded;
}

}  // namespace mt
