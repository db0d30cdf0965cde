#include "runtime/train/hugging_face.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "codegen/plan/plan.h"
#include "google/protobuf/text_format.h"
#include "ir/base/file.h"
#include "ir/base/status_macros.h"
#include "ir/hugging_face.h"
#include "runtime/data/strict_json.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using proto::ModelSpec;

constexpr int64_t kMaxConfigBytes = int64_t{64} << 20;
constexpr char kConfigFile[] = "config.json";
constexpr char kWeightsFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

// A Hugging Face tensor as columns of a parameter of ours, [rows, columns] or [columns].
struct Part {
  std::string name;
  int64_t columns;
  bool transposed;  // Stored [columns, rows], as torch's Linear does; GPT-2's Conv1D is stored as ours.
};

std::vector<Part> Gpt2Parts(absl::string_view name, int64_t columns) {
  static const std::map<std::string, std::string>& names = *new std::map<std::string, std::string>{
      {"embed.tokens.", "wte."},     {"embed.positions.", "wpe."}, {"final_norm.", "ln_f."},
      {"norm1.", "ln_1."},           {"norm2.", "ln_2."},          {"attn.qkv.", "attn.c_attn."},
      {"attn.out.", "attn.c_proj."}, {"mlp.up.", "mlp.c_fc."},     {"mlp.down.", "mlp.c_proj."}};
  if (name == "head.weight") return {{"lm_head.weight", columns, false}};
  std::string prefix = "transformer.";
  absl::string_view rest = name;
  if (absl::ConsumePrefix(&rest, "h")) {
    const size_t dot = rest.find('.');
    int64_t layer = 0;
    if (dot == absl::string_view::npos || !absl::SimpleAtoi(rest.substr(0, dot), &layer)) return {};
    absl::StrAppend(&prefix, "h.", layer, ".");
    rest.remove_prefix(dot + 1);
  }
  for (const auto& [ours, theirs] : names) {
    if (absl::ConsumePrefix(&rest, ours)) return {{absl::StrCat(prefix, theirs, rest), columns, false}};
  }
  return {};
}

std::vector<Part> LlamaParts(const ModelSpec& spec, absl::string_view name, int64_t columns) {
  static const std::map<std::string, std::string>& names = *new std::map<std::string, std::string>{
      {"norm1.", "input_layernorm."},     {"norm2.", "post_attention_layernorm."},
      {"attn.out.", "self_attn.o_proj."}, {"mlp.gate.", "mlp.gate_proj."},
      {"mlp.up.", "mlp.up_proj."},        {"mlp.down.", "mlp.down_proj."}};
  if (name == "head.weight") return {{"lm_head.weight", columns, false}};
  if (name == "embed.tokens.weight") return {{"model.embed_tokens.weight", columns, false}};
  if (name == "final_norm.weight") return {{"model.norm.weight", columns, false}};
  absl::string_view rest = name;
  const size_t dot = rest.find('.');
  int64_t layer = 0;
  if (!absl::ConsumePrefix(&rest, "h") || dot == absl::string_view::npos ||
      !absl::SimpleAtoi(rest.substr(0, dot - 1), &layer)) {
    return {};
  }
  rest.remove_prefix(dot);
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  if (absl::ConsumePrefix(&rest, "attn.qkv.")) {
    const int64_t kv_heads = spec.kv_heads() == 0 ? spec.heads() : spec.kv_heads();
    const int64_t head_width = spec.width() / spec.heads();
    std::vector<Part> parts;
    for (const auto& [which, heads] :
         {std::pair("q", spec.heads()), std::pair("k", kv_heads), std::pair("v", kv_heads)}) {
      parts.push_back(
          {absl::StrCat(prefix, "self_attn.", which, "_proj.", rest), heads * head_width, rest == "weight"});
    }
    return parts;
  }
  for (const auto& [ours, theirs] : names) {
    if (!absl::ConsumePrefix(&rest, ours)) continue;
    const bool linear = !absl::StartsWith(ours, "norm") && rest == "weight";
    return {{absl::StrCat(prefix, theirs, rest), columns, linear}};
  }
  return {};
}

// The tensors that make the parameter `name`; empty: the family has none of that name.
std::vector<Part> PartsOf(const ModelSpec& spec, const std::string& family, absl::string_view name,
                          absl::Span<const int64_t> dims) {
  const int64_t columns = dims.empty() ? 1 : dims.back();
  return family == "gpt2" ? Gpt2Parts(name, columns) : LlamaParts(spec, name, columns);
}

std::vector<int64_t> PartDims(const Part& part, absl::Span<const int64_t> dims) {
  if (dims.size() < 2) return {part.columns};
  return part.transposed ? std::vector<int64_t>{part.columns, dims[0]} : std::vector<int64_t>{dims[0], part.columns};
}

std::string DimsText(absl::Span<const int64_t> dims) { return absl::StrCat("[", absl::StrJoin(dims, ","), "]"); }

uint32_t LoadBits(const char* p, int64_t size) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < size; ++i) bits |= uint32_t{static_cast<uint8_t>(p[i])} << (8 * i);
  return bits;
}

float HalfToFloat(uint32_t half) {
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 1023;
  float value = 0;
  if (exponent == 31) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else {
    value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                          : std::ldexp(static_cast<float>(mantissa | 1024), static_cast<int>(exponent) - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

struct OutTensor {
  SafetensorsTensor tensor;
  const SafetensorsTensor* source;
  std::vector<int64_t> source_dims;
  int64_t first_column;
  bool transposed;
  int64_t file = 0;
};

// The part's bytes in its own layout.
std::string Extract(const OutTensor& out, absl::string_view bytes) {
  const int64_t size = SizeOf(out.tensor.type);
  if (out.source_dims.size() < 2) {
    return std::string(
        bytes.substr(static_cast<size_t>(out.first_column * size), static_cast<size_t>(out.tensor.shape[0] * size)));
  }
  const int64_t rows = out.source_dims[0];
  const int64_t all = out.source_dims[1];
  const int64_t columns = out.transposed ? out.tensor.shape[0] : out.tensor.shape[1];
  if (!out.transposed && columns == all) return std::string(bytes);
  std::string text(static_cast<size_t>(rows * columns * size), '\0');
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t to = out.transposed ? column * rows + row : row * columns + column;
      std::memcpy(text.data() + to * size, bytes.data() + (row * all + out.first_column + column) * size,
                  static_cast<size_t>(size));
    }
  }
  return text;
}

}  // namespace

absl::StatusOr<ModelSpec> SpecOfPlan(const proto::PlanProto& plan) {
  const auto note = plan.notes().find("model_spec");
  ModelSpec spec;
  if (note == plan.notes().end() || !google::protobuf::TextFormat::ParseFromString(note->second, &spec)) {
    return absl::FailedPreconditionError(
        "the plan does not hold the spec of its model (it is of a raw graph, or was compiled by an older mtc); Hugging "
        "Face folders need one");
  }
  return spec;
}

absl::Status ExportHuggingFace(const ModelSpec& spec, const std::string& weights_path, const std::string& tokenizer,
                               const std::string& folder, int64_t shard_bytes) {
  ASSIGN_OR_RETURN(const std::string family, HuggingFaceFamily(spec));
  ASSIGN_OR_RETURN(const std::string config, HuggingFaceConfig(spec));
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsReader> reader, SafetensorsReader::Open(weights_path));
  std::vector<OutTensor> tensors;
  int64_t total_bytes = 0;
  int64_t files = 1;
  int64_t file_bytes = 0;
  for (const SafetensorsTensor& tensor : reader->tensors()) {
    const std::vector<Part> parts = PartsOf(spec, family, tensor.name, tensor.shape);
    if (parts.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat(weights_path, ": tensor ", tensor.name, " is none of a ", family, "; are they this plan's?"));
    }
    int64_t first = 0;
    for (const Part& part : parts) {
      OutTensor out{{part.name, tensor.type, PartDims(part, tensor.shape)},
                    &tensor,
                    tensor.shape,
                    first,
                    part.transposed && tensor.shape.size() == 2};
      first += part.columns;
      int64_t bytes = SizeOf(tensor.type);
      for (const int64_t dim : out.tensor.shape) bytes *= dim;
      total_bytes += bytes;
      if (file_bytes > 0 && file_bytes + bytes > shard_bytes) {
        ++files;
        file_bytes = 0;
      }
      file_bytes += bytes;
      out.file = files - 1;
      tensors.push_back(std::move(out));
    }
    if (!tensor.shape.empty() && first != tensor.shape.back()) {
      return absl::FailedPreconditionError(absl::StrCat(weights_path, ": tensor ", tensor.name, " is ",
                                                        DimsText(tensor.shape), ", ", first,
                                                        " columns expected by the plan's spec"));
    }
  }
  std::error_code ignored;
  for (const char* file : {kWeightsFile, kIndexFile}) {
    if (fs::exists(absl::StrCat(folder, "/", file), ignored)) {
      return absl::AlreadyExistsError(absl::StrCat(folder, ": already holds ", file, "; give another folder"));
    }
  }
  RETURN_IF_ERROR(MakeFolder(folder));
  RETURN_IF_ERROR(WriteFile(absl::StrCat(folder, "/", kConfigFile), config));
  if (!tokenizer.empty()) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(tokenizer));
    RETURN_IF_ERROR(WriteFile(absl::StrCat(folder, "/tokenizer.json"), text));
  }
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = total_bytes;
  for (int64_t file = 0; file < files; ++file) {
    const std::string name =
        files == 1 ? kWeightsFile : absl::StrFormat("model-%05d-of-%05d.safetensors", file + 1, files);
    std::vector<SafetensorsTensor> declared;
    for (const OutTensor& out : tensors) {
      if (out.file == file) declared.push_back(out.tensor);
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsWriter> writer,
                     SafetensorsWriter::Create(absl::StrCat(folder, "/", name), declared, {{"format", "pt"}}));
    for (const OutTensor& out : tensors) {
      if (out.file != file) continue;
      RETURN_IF_ERROR(writer->Append(out.tensor.name, Extract(out, reader->Bytes(*out.source))));
      index["weight_map"][out.tensor.name] = name;
    }
    RETURN_IF_ERROR(writer->Finish());
  }
  if (files == 1) return absl::OkStatus();
  return WriteFile(absl::StrCat(folder, "/", kIndexFile), absl::StrCat(index.dump(2), "\n"));
}

absl::StatusOr<std::unique_ptr<HuggingFaceFolder>> HuggingFaceFolder::Open(const std::string& folder) {
  std::unique_ptr<HuggingFaceFolder> result(new HuggingFaceFolder);
  result->folder_ = folder;
  const std::string config_path = absl::StrCat(folder, "/", kConfigFile);
  ASSIGN_OR_RETURN(const std::string config, ReadFile(config_path, kMaxConfigBytes));
  absl::StatusOr<ModelSpec> spec = SpecFromHuggingFace(config);
  if (!spec.ok()) return Annotate(spec.status(), config_path);
  result->spec_ = *std::move(spec);
  ASSIGN_OR_RETURN(result->family_, HuggingFaceFamily(result->spec_));
  std::set<std::string> names = {kWeightsFile};
  const std::string index_path = absl::StrCat(folder, "/", kIndexFile);
  std::error_code ignored;
  if (fs::exists(index_path, ignored)) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(index_path, kMaxConfigBytes));
    absl::StatusOr<nlohmann::json> index = ParseStrictJson(text);
    if (!index.ok()) return Annotate(index.status(), index_path);
    names.clear();
    const auto map = index->find("weight_map");
    if (map == index->end() || !map->is_object()) {
      return absl::FailedPreconditionError(absl::StrCat(index_path, ": has no \"weight_map\""));
    }
    for (const nlohmann::json& file : *map) {
      const std::string name = file.is_string() ? file.get<std::string>() : "";
      if (name.empty() || absl::StrContains(name, "/") || name == "..") {
        return absl::FailedPreconditionError(absl::StrCat(index_path, ": names a file that is not beside it"));
      }
      names.insert(name);
    }
  }
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsReader> reader,
                     SafetensorsReader::Open(absl::StrCat(folder, "/", name)));
    result->files_.push_back(std::move(reader));
  }
  return result;
}

absl::StatusOr<std::vector<float>> HuggingFaceFolder::Read(const std::string& name,
                                                           absl::Span<const int64_t> dims) const {
  const absl::string_view bare = absl::StripPrefix(absl::StripPrefix(name, "transformer."), "model.");
  for (const std::unique_ptr<SafetensorsReader>& file : files_) {
    const SafetensorsTensor* tensor = file->Find(name);
    if (tensor == nullptr) tensor = file->Find(bare);  // Folders of the bare model, as GPT-2's own.
    if (tensor == nullptr) continue;
    if (tensor->shape != std::vector<int64_t>(dims.begin(), dims.end())) {
      return absl::FailedPreconditionError(
          absl::StrCat(folder_, ": tensor ", name, " is ", DimsText(tensor->shape), ", ", DimsText(dims), " expected"));
    }
    const absl::string_view bytes = file->Bytes(*tensor);
    const int64_t size = SizeOf(tensor->type);
    std::vector<float> values(bytes.size() / static_cast<size_t>(size));
    for (size_t i = 0; i < values.size(); ++i) {
      const char* p = bytes.data() + i * static_cast<size_t>(size);
      uint32_t bits = LoadBits(p, std::min<int64_t>(size, 4));
      if (tensor->type == SafetensorsType::kF16) {
        values[i] = HalfToFloat(bits);
        continue;
      }
      if (tensor->type == SafetensorsType::kBF16) bits <<= 16;
      if (tensor->type != SafetensorsType::kBF16 && tensor->type != SafetensorsType::kF32) {
        return absl::FailedPreconditionError(absl::StrCat(
            folder_, ": tensor ", name, " is ", SafetensorsTypeName(tensor->type), "; F32, BF16 and F16 are read"));
      }
      std::memcpy(&values[i], &bits, 4);
    }
    return values;
  }
  return absl::FailedPreconditionError(absl::StrCat(folder_, ": the weights have no tensor ", name));
}

absl::StatusOr<std::vector<float>> HuggingFaceFolder::Parameter(absl::string_view name,
                                                                absl::Span<const int64_t> dims) const {
  const std::vector<Part> parts = PartsOf(spec_, family_, name, dims);
  if (parts.empty() || dims.empty() || dims.size() > 2) {
    return absl::FailedPreconditionError(absl::StrCat(folder_, ": a ", family_, " has no parameter ", name));
  }
  const int64_t rows = dims.size() == 2 ? dims[0] : 1;
  const int64_t all = dims.back();
  std::vector<float> values(static_cast<size_t>(rows * all));
  int64_t first = 0;
  for (const Part& part : parts) {
    if (part.columns > all - first) break;
    ASSIGN_OR_RETURN(const std::vector<float> read, Read(part.name, PartDims(part, dims)));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < part.columns; ++column) {
        values[static_cast<size_t>(row * all + first + column)] = read[static_cast<size_t>(
            part.transposed && dims.size() == 2 ? column * rows + row : row * part.columns + column)];
      }
    }
    first += part.columns;
  }
  if (first != all) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder_, ": ", name, " does not have ", all, " columns by its config.json"));
  }
  return values;
}

absl::Status LoadHuggingFace(Executor& executor, const std::string& folder) {
  ASSIGN_OR_RETURN(const std::unique_ptr<HuggingFaceFolder> source, HuggingFaceFolder::Open(folder));
  for (const proto::StatePlacement& placement : executor.plan().states()) {
    const proto::StateProto& state = placement.state();
    if (ParseRole(state.role()) != Role::kParameter) continue;
    const BoundTensor* bound = executor.FindState(state.name());
    if (bound->type.dtype != DType::kF32) {
      return absl::FailedPreconditionError(absl::StrCat("the plan's parameter ", state.name(), " is ",
                                                        DTypeName(bound->type.dtype), "; hf: sets f32 parameters"));
    }
    ASSIGN_OR_RETURN(const std::vector<float> values, source->Parameter(state.name(), LogicalDims(state)));
    executor.backend().CopyToDevice(bound->data, reinterpret_cast<const std::byte*>(values.data()),
                                    static_cast<int64_t>(values.size() * 4));
  }
  return absl::OkStatus();
}

}  // namespace mt
