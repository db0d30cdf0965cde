#include "models/model.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "ir/base/file.h"
#include "ir/base/flags.h"
#include "ir/base/paths.h"
#include "ir/base/status_macros.h"
#include "ir/graph_io.h"
#include "ir/hugging_face.h"
#include "ir/text.h"
#include "ir/verifier.h"

namespace mt {
namespace {

namespace pb = ::google::protobuf;

constexpr absl::string_view kSpecSuffix = ".textproto";
constexpr absl::string_view kGraphSuffix = ".graph.textproto";
constexpr int64_t kMaxSpecBytes = int64_t{64} << 20;

// Keeps the first error of a text parse as "line 3: ...".
class FirstError : public pb::io::ErrorCollector {
 public:
  void AddError(int line, pb::io::ColumnNumber column, const std::string& message) override {
    if (text_.empty()) text_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

std::vector<std::string> FieldNames(const pb::Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); ++i) names.push_back(message.field(i)->name());
  return names;
}

absl::Status ParseText(const std::string& path, const std::string& text, pb::Message& message) {
  FirstError error;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.SetRecursionLimit(32);
  if (parser.ParseFromString(text, &message)) return absl::OkStatus();
  std::string hint;
  // protobuf says: Message type "..." has no field named "latyers".
  const std::vector<std::string> quoted = absl::StrSplit(error.text(), '"');
  if (absl::StrContains(error.text(), "has no field named") && quoted.size() > 3) {
    const std::vector<std::string> fields = FieldNames(*message.GetDescriptor());
    const std::string near = DidYouMean(quoted[3], fields);
    hint = near.empty() ? absl::StrCat("; fields: ", absl::StrJoin(fields, ", "))
                        : absl::StrCat("; did you mean ", near, "?");
  }
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.text(), hint));
}

// "layers=4" -> the field, through the text format so that enums and booleans read as in a file.
absl::Status ApplySet(const std::string& set, proto::ModelSpec& spec) {
  const std::vector<std::string> parts = absl::StrSplit(set, absl::MaxSplits('=', 1));
  const std::vector<std::string> fields = FieldNames(*spec.GetDescriptor());
  if (parts.size() != 2) {
    return absl::InvalidArgumentError(absl::StrCat("--set ", set, ": expected FIELD=VALUE, such as layers=4"));
  }
  const pb::FieldDescriptor* field = spec.GetDescriptor()->FindFieldByName(parts[0]);
  if (field == nullptr) {
    const std::string near = DidYouMean(parts[0], fields);
    return absl::InvalidArgumentError(absl::StrCat("--set ", set, ": the model has no field ", parts[0],
                                                   near.empty()
                                                       ? absl::StrCat("; fields: ", absl::StrJoin(fields, ", "))
                                                       : absl::StrCat("; did you mean ", near, "?")));
  }
  spec.GetReflection()->ClearField(&spec, field);
  FirstError error;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  const bool quote = field->cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING;
  proto::ModelSpec parsed;
  std::string value = parts[1];
  if (field->cpp_type() == pb::FieldDescriptor::CPPTYPE_ENUM) absl::AsciiStrToUpper(&value);
  const std::string text = absl::StrCat(parts[0], ": ", quote ? absl::StrCat("\"", value, "\"") : value);
  if (!parser.ParseFromString(text, &parsed)) {
    std::string known;
    if (field->cpp_type() == pb::FieldDescriptor::CPPTYPE_ENUM) {
      std::vector<std::string> names;
      for (int i = 0; i < field->enum_type()->value_count(); ++i) names.push_back(field->enum_type()->value(i)->name());
      known = absl::StrCat("; known: ", absl::StrJoin(names, ", "));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("--set ", set, ": \"", parts[1], "\" is not a value for ", parts[0], known));
  }
  spec.MergeFrom(parsed);
  return absl::OkStatus();
}

// What a file's or folder's name gives a model as its name: what a module cannot be called becomes '_'.
std::string NameOf(absl::string_view file) {
  std::string name(file.substr(0, 256));
  for (char& c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') c = '_';
  }
  return IsTextName(name) ? name : absl::StrCat("model_", name);
}

struct SpecFile {
  std::string path, text;
  bool is_graph = false;
};

absl::StatusOr<SpecFile> FindSpec(const std::string& spec) {
  std::error_code ignored;
  SpecFile file;
  absl::string_view folder = spec;
  if (absl::ConsumePrefix(&folder, "hf:")) {
    file.path = absl::StrCat(folder, "/config.json");
    ASSIGN_OR_RETURN(const std::string config, ReadFile(file.path, kMaxSpecBytes));
    absl::StatusOr<proto::ModelSpec> parsed = SpecFromHuggingFace(config);
    if (!parsed.ok()) return Annotate(parsed.status(), file.path);
    parsed->set_name(NameOf(std::filesystem::path(std::string(absl::StripSuffix(folder, "/"))).filename().string()));
    google::protobuf::TextFormat::PrintToString(*parsed, &file.text);
    return file;
  }
  if (std::filesystem::is_regular_file(spec, ignored)) {
    file.path = spec;
  } else {
    for (const absl::string_view suffix : {kSpecSuffix, kGraphSuffix}) {
      const std::string path = absl::StrCat(ModelsFolder(), "/", spec, suffix);
      if (!absl::StrContains(spec, "/") && std::filesystem::is_regular_file(path, ignored)) file.path = path;
    }
  }
  if (file.path.empty()) {
    const std::vector<std::string> zoo = ZooModels();
    const std::string near = DidYouMean(spec, zoo);
    return absl::NotFoundError(absl::StrCat("\"", spec, "\" is neither a file nor a model of the zoo",
                                            near.empty() ? "" : absl::StrCat(" (did you mean ", near, "?)"),
                                            "; the zoo: ", absl::StrJoin(zoo, ", ")));
  }
  file.is_graph = absl::EndsWith(file.path, kGraphSuffix);
  ASSIGN_OR_RETURN(file.text, ReadFile(file.path, kMaxSpecBytes));
  return file;
}

absl::StatusOr<proto::ModelSpec> ParseSpec(const SpecFile& file, const ModelOptions& options) {
  proto::ModelSpec spec;
  RETURN_IF_ERROR(ParseText(file.path, file.text, spec));
  for (const std::string& set : options.sets) RETURN_IF_ERROR(ApplySet(set, spec));
  if (options.vocab_size) spec.set_vocab_size(*options.vocab_size);
  if (spec.name().empty()) {
    const std::string name = std::filesystem::path(file.path).filename().string();
    spec.set_name(NameOf(absl::StripSuffix(name, kSpecSuffix)));
  }
  return spec;
}

// A raw graph has its shapes written out: what the command line says must agree with it.
absl::StatusOr<std::unique_ptr<Module>> ParseGraphFile(const SpecFile& file, const ModelOptions& options) {
  if (!options.sets.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--set ", options.sets[0], ": ", file.path,
                                                   " is a raw graph, which has no such fields; edit the file"));
  }
  proto::ModuleProto proto;
  RETURN_IF_ERROR(ParseText(file.path, file.text, proto));
  absl::StatusOr<std::unique_ptr<Module>> module = ModuleFromProto(proto);
  if (!module.ok()) return Annotate(module.status(), file.path);
  RETURN_IF_ERROR(Annotate(VerifyModule(**module), file.path));
  if ((*module)->FindGraph("train") == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(file.path, ": a model needs a graph named \"train\""));
  }
  std::optional<int64_t> batch = options.batch;
  if (batch && options.microbatches != 1) {
    const int64_t own = (*module)->fact("batch"), micro = options.microbatches;
    if (*batch % micro != 0 || *batch / micro != own) {
      return absl::InvalidArgumentError(absl::StrCat(file.path, ": the graph is written for batch ", own,
                                                     ", which is that of a microbatch; ", micro, " of them are ",
                                                     CheckedMultiply(own, micro).value_or(0), ", not ", *batch,
                                                     "; leave out --batch or edit the file"));
    }
    batch = own;
  }
  const std::pair<absl::string_view, std::optional<int64_t>> wanted[] = {
      {"batch", batch}, {"sequence", options.sequence}, {"vocab_size", options.vocab_size}};
  for (const auto& [name, value] : wanted) {
    const int64_t written = (*module)->fact(name, value.value_or(0));
    if (!value || written == *value) continue;
    const std::string corpus = absl::StrCat(
        ", or make a corpus of its vocabulary: mtcorpus prep --input TEXT --out DIR --tokenizer bpe:", written);
    return absl::InvalidArgumentError(absl::StrCat(file.path, ": the graph is written for ", name, " ", written,
                                                   ", not ", *value, "; a raw graph's shapes are fixed: edit the file",
                                                   name == "vocab_size" ? corpus : ""));
  }
  return module;
}

}  // namespace

std::vector<std::string> ZooModels() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(ModelsFolder(), error)) {
    const std::string file = entry.path().filename().string();
    absl::string_view name = file;
    if (absl::ConsumeSuffix(&name, kGraphSuffix) || absl::ConsumeSuffix(&name, kSpecSuffix)) names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<bool> IsRawGraph(const std::string& spec) {
  ASSIGN_OR_RETURN(const SpecFile file, FindSpec(spec));
  return file.is_graph;
}

absl::StatusOr<proto::ModelSpec> LoadSpec(const std::string& spec, const ModelOptions& options) {
  ASSIGN_OR_RETURN(const SpecFile file, FindSpec(spec));
  if (file.is_graph) return absl::InvalidArgumentError(absl::StrCat(file.path, " is a raw graph, not a model spec"));
  return ParseSpec(file, options);
}

absl::StatusOr<std::unique_ptr<Module>> LoadModel(const std::string& spec, const ModelOptions& options) {
  ASSIGN_OR_RETURN(const SpecFile file, FindSpec(spec));
  if (file.is_graph) return ParseGraphFile(file, options);
  ASSIGN_OR_RETURN(const proto::ModelSpec model, ParseSpec(file, options));
  const int64_t batch = options.batch.value_or(model.batch() == 0 ? 8 : model.batch());
  const int64_t sequence = options.sequence.value_or(model.max_sequence());
  if (batch % options.microbatches != 0) {
    std::vector<int64_t> divisors;
    for (int64_t d = 2; d <= std::min<int64_t>(batch, 1 << 16) && divisors.size() < 8; ++d) {
      if (batch % d == 0) divisors.push_back(d);
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "accumulate:", options.microbatches, " does not divide the batch of ", batch,
        " into microbatches of one size; ", divisors.empty() ? "" : "use accumulate:", absl::StrJoin(divisors, " or :"),
        divisors.empty() ? "" : ", or ", "change --batch"));
  }
  absl::StatusOr<std::unique_ptr<Module>> module = BuildTransformer(model, batch / options.microbatches, sequence);
  if (!module.ok()) return Annotate(module.status(), file.path);
  return module;
}

}  // namespace mt
