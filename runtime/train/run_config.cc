#include "runtime/train/run_config.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

constexpr int64_t kMaxConfigBytes = 1 << 20;

// Keeps the first error.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text_.empty()) text_ = absl::StrCat(line + 1, ":", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

}  // namespace

std::vector<std::pair<std::string, std::string>> FlagsOf(const proto::RunConfig& config) {
  using google::protobuf::FieldDescriptor;
  std::vector<const FieldDescriptor*> fields;
  const google::protobuf::Reflection& reflection = *config.GetReflection();
  reflection.ListFields(config, &fields);
  std::vector<std::pair<std::string, std::string>> flags;
  for (const FieldDescriptor* field : fields) {
    std::string value;
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        value = reflection.GetString(config, field);
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        value = absl::StrCat(reflection.GetInt64(config, field));
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        value = nlohmann::json(reflection.GetDouble(config, field)).dump();  // As short as it may be.
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        value = reflection.GetBool(config, field) ? "true" : "false";
        break;
      default:
        CHECK(false) << field->name() << " is of a type that no flag has";
    }
    flags.push_back({absl::StrReplaceAll(field->name(), {{"_", "-"}}), std::move(value)});
  }
  return flags;
}

absl::StatusOr<ConfiguredArguments> ReadConfigs(absl::Span<const std::string> arguments) {
  ConfiguredArguments configured;
  std::vector<std::string> typed;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const bool inlined = absl::StartsWith(argument, "--config=");
    if (argument == "--") {
      typed.insert(typed.end(), arguments.begin() + static_cast<int64_t>(i), arguments.end());
      break;
    }
    if (!inlined && argument != "--config") {
      typed.push_back(argument);
      continue;
    }
    if (!inlined && i + 1 == arguments.size())
      return absl::InvalidArgumentError("--config needs a value: --config FILE");
    const std::string path = inlined ? argument.substr(9) : arguments[++i];
    absl::StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
    if (!text.ok()) return Annotate(text.status(), "--config");
    proto::RunConfig config;
    google::protobuf::TextFormat::Parser parser;
    FirstError error;
    parser.RecordErrorsTo(&error);
    if (!parser.ParseFromString(*text, &config)) {
      return absl::InvalidArgumentError(absl::StrCat("--config: ", path, ":", error.text()));
    }
    for (auto& [name, value] : FlagsOf(config)) {
      configured.arguments.push_back(absl::StrCat("--", name, "=", value));
      configured.from_files.push_back(name);
    }
    absl::StrAppend(&configured.files, configured.files.empty() ? "" : ", ", path);
  }
  configured.arguments.insert(configured.arguments.end(), typed.begin(), typed.end());
  return configured;
}

std::string ConfigTable(const ToolDef& tool, const ParsedArgs& args, const ParsedArgs& typed,
                        const ConfiguredArguments& configured) {
  std::string table;
  for (const FlagDef& flag : tool.flags) {
    if (flag.name == "show-config") continue;
    const std::vector<std::string>& names = configured.from_files;
    const bool from_file = std::find(names.begin(), names.end(), flag.name) != names.end();
    const std::string origin = typed.Has(flag.name) ? "command line" : from_file ? configured.files : "default";
    const std::string value =
        flag.kind == FlagKind::kBool ? (args.Bool(flag.name) ? "true" : "false") : args.String(flag.name);
    absl::StrAppendFormat(&table, "%-16s %-24s %s\n", flag.name, value.empty() ? "-" : value, origin);
  }
  return table;
}

}  // namespace mt
