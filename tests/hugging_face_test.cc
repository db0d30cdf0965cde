// Hugging Face folders: specs and config.json, weights both ways, and the logits of models that transformers saved
// (tests/interchange/make.py wrote tests/interchange/data).
#include "ir/hugging_face.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "google/protobuf/text_format.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/json.h"
#include "ir/evaluator.h"
#include "ir/initial_value.h"
#include "models/model.h"
#include "runtime/data/safetensors.h"
#include "runtime/train/hugging_face.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using proto::ModelSpec;
using ::testing::HasSubstr;

const char* const kFolders[] = {"gpt2", "llama", "llama_sharded", "mistral"};

std::string Data(const std::string& name) { return absl::StrCat(MT_SOURCE_DIR, "/tests/interchange/data/", name); }

ModelSpec Spec(const std::string& fields) {
  ModelSpec spec;
  const std::string shape =
      "layers: 2 width: 16 heads: 4 ffn_width: 20 vocab_size: 31 max_sequence: 16 norm_epsilon: 1e-6 init_stddev: 0.1 ";
  CHECK(google::protobuf::TextFormat::ParseFromString(shape + fields, &spec)) << fields;
  return spec;
}
constexpr char kGpt2Fields[] = "attention_bias: true mlp_bias: true norm_bias: true ";
constexpr char kLlamaFields[] = "norm: RMS_NORM positions: ROTARY activation: SWIGLU kv_heads: 2 rope_theta: 5000 ";

class HuggingFaceTest : public ::testing::Test {
 protected:
  HuggingFaceTest() : folder_(absl::StrCat(::testing::TempDir(), "/hugging_face_test-", ::getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~HuggingFaceTest() override { fs::remove_all(folder_); }
  std::string Path(const std::string& name) const { return absl::StrCat(folder_, "/", name); }

  const std::string folder_;
};

TEST_F(HuggingFaceTest, SpecsAndConfigsAreEachOthersInverse) {
  const std::pair<std::string, const char*> cases[] = {
      {absl::StrCat(kGpt2Fields, "dropout: 0.1 tied_head: true"), "gpt2"},
      {absl::StrCat(kGpt2Fields, "activation: GELU_ERF"), "gpt2"},
      {absl::StrCat(kGpt2Fields, "activation: RELU"), "gpt2"},
      {absl::StrCat(kGpt2Fields, "activation: SILU"), "gpt2"},
      {kLlamaFields, "llama"},
      {absl::StrCat(kLlamaFields, "attention_bias: true"), "llama"},
      {"norm: RMS_NORM positions: ROTARY kv_heads: 2 rope_theta: 5000 mlp_bias: true tied_head: true activation: GEGLU",
       "llama"},
      {absl::StrCat(kLlamaFields, "attention_window: 5"), "mistral"},
  };
  for (const auto& [fields, family] : cases) {
    SCOPED_TRACE(fields);
    const ModelSpec spec = Spec(fields);
    ASSERT_OK_AND_ASSIGN(const std::string config, HuggingFaceConfig(spec));
    EXPECT_EQ(json::parse(config)["model_type"], family);
    ASSERT_OK_AND_ASSIGN(const ModelSpec back, SpecFromHuggingFace(config));
    EXPECT_EQ(back.ShortDebugString(), spec.ShortDebugString());
  }
  // N keys before the query are a window of N + 1.
  ASSERT_OK_AND_ASSIGN(const std::string config,
                       HuggingFaceConfig(Spec(absl::StrCat(kLlamaFields, "attention_window: 5"))));
  EXPECT_EQ(json::parse(config)["sliding_window"], 6);
  for (const char* name : {"gpt2_124m", "llama_160m"}) {
    EXPECT_THAT(HuggingFaceConfig(LoadSpec(name, {}).value()), IsOk()) << name;
  }
}

TEST_F(HuggingFaceTest, WhatCannotBeExpressedIsNamed) {
  const std::pair<std::string, const char*> specs[] = {
      {absl::StrCat(kGpt2Fields, "norm_placement: POST"), "POST"},
      {absl::StrCat(kGpt2Fields, "positions: SINUSOIDAL"), "SINUSOIDAL"},
      {absl::StrCat(kGpt2Fields, "activation: SWIGLU"), "SWIGLU"},
      {absl::StrCat(kGpt2Fields, "kv_heads: 2"), "kv_heads"},
      {absl::StrCat(kGpt2Fields, "attention_window: 4"), "attention_window"},
      {"attention_bias: true mlp_bias: true", "norm_bias"},
      {"attention_bias: true norm_bias: true", "mlp_bias"},
      {"norm: RMS_NORM", "LEARNED"},
      {"norm: RMS_NORM positions: ROTARY", "GELU"},
      {absl::StrCat(kLlamaFields, "dropout: 0.1"), "dropout"},
      {absl::StrCat(kLlamaFields, "attention_window: 4 attention_bias: true"), "attention_bias"},
  };
  for (const auto& [fields, message] : specs) {
    EXPECT_THAT(HuggingFaceConfig(Spec(fields)), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  }
  const json gpt2 = json::parse(HuggingFaceConfig(Spec(kGpt2Fields)).value());
  const json llama = json::parse(HuggingFaceConfig(Spec(kLlamaFields)).value());
  const json mistral = json::parse(HuggingFaceConfig(Spec(absl::StrCat(kLlamaFields, "attention_window: 5"))).value());
  struct Case {
    json config;
    const char* key;
    json value;
    const char* message;
  };
  const Case configs[] = {
      {gpt2, "model_type", "bloom", "\"bloom\" is not supported"},
      {gpt2, "vocab_size", -3, "vocab_size"},
      {gpt2, "n_layer", "12", "n_layer"},
      {gpt2, "n_embd", 1.5, "n_embd"},
      {gpt2, "activation_function", "tanh", "activation_function"},
      {gpt2, "attn_pdrop", 0.3, "attn_pdrop"},
      {gpt2, "scale_attn_by_inverse_layer_idx", true, "scale_attn_by_inverse_layer_idx"},
      {llama, "rope_scaling", {{"type", "linear"}, {"factor", 2.0}}, "rope_scaling"},
      {llama, "rope_parameters", {{"rope_type", "yarn"}}, "rope_scaling"},
      {llama, "head_dim", 7, "head_dim"},
      {llama, "hidden_act", "relu", "hidden_act"},
      {llama, "attention_dropout", 0.1, "attention_dropout"},
      {llama, "tie_word_embeddings", 1, "tie_word_embeddings"},
      {mistral, "sliding_window", 1, "sliding_window"},
  };
  for (const Case& test : configs) {
    json config = test.config;
    config[test.key] = test.value;
    EXPECT_THAT(SpecFromHuggingFace(config.dump()),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(test.message)));
  }
  const std::string deep = absl::StrCat("{\"model_type\":\"gpt2\",\"activation_function\":", std::string(200'000, '['),
                                        std::string(200'000, ']'), "}");
  EXPECT_THAT(SpecFromHuggingFace(deep), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("nested deeper")));
  EXPECT_THAT(SpecFromHuggingFace("[]"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not a JSON")));
  // transformers 5 keeps the base elsewhere.
  json newer = llama;
  newer.erase("rope_theta");
  newer["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 777.0}};
  EXPECT_EQ(SpecFromHuggingFace(newer.dump())->rope_theta(), 777.0);
}

// Writes random weights of the spec as a run does. Returns them by name.
std::map<std::string, std::vector<float>> WriteWeights(const ModelSpec& spec, const std::string& path) {
  const std::unique_ptr<Module> module = BuildTransformer(spec, 1, 4).value();
  std::vector<SafetensorsTensor> tensors;
  std::map<std::string, std::vector<float>> values;
  for (const State& state : module->states()) {
    tensors.push_back({state.name, SafetensorsType::kF32, {state.type.dims.begin(), state.type.dims.end()}});
    values[state.name].resize(static_cast<size_t>(state.type.num_elements()));
    InitialValues({.kind = Init::Kind::kNormal, .stddev = 1.0}, 5, state.name, 0, absl::MakeSpan(values[state.name]));
  }
  auto writer = SafetensorsWriter::Create(path, tensors, {{"format", "mt"}}).value();
  for (const auto& [name, data] : values) {
    CHECK(writer->Append(name, absl::string_view(reinterpret_cast<const char*>(data.data()), data.size() * 4)).ok());
  }
  CHECK(writer->Finish().ok());
  return values;
}

TEST_F(HuggingFaceTest, WeightsComeBackBitForBit) {
  const std::string specs[] = {absl::StrCat(kGpt2Fields, "tied_head: true"), kGpt2Fields,
                               absl::StrCat(kLlamaFields, "attention_bias: true mlp_bias: true"),
                               absl::StrCat(kLlamaFields, "tied_head: true attention_window: 3")};
  for (size_t i = 0; i < std::size(specs); ++i) {
    SCOPED_TRACE(specs[i]);
    const ModelSpec spec = Spec(specs[i]);
    const std::string weights = Path(absl::StrCat("w", i));
    const auto expected = WriteWeights(spec, weights);
    for (const int64_t shard_bytes : {int64_t{1} << 30, int64_t{3000}}) {
      const std::string out = Path(absl::StrCat("hf", i, "-", shard_bytes));
      ASSERT_OK(ExportHuggingFace(spec, weights, "", out, shard_bytes));
      EXPECT_EQ(fs::exists(out + "/model.safetensors"), shard_bytes > 3000);
      EXPECT_EQ(fs::exists(out + "/model.safetensors.index.json"), shard_bytes == 3000);
      ASSERT_OK_AND_ASSIGN(const auto folder, HuggingFaceFolder::Open(out));
      EXPECT_EQ(folder->spec().ShortDebugString(), spec.ShortDebugString());
      const std::unique_ptr<Module> module = BuildTransformer(spec, 1, 4).value();
      for (const State& state : module->states()) {
        ASSERT_OK_AND_ASSIGN(const std::vector<float> values, folder->Parameter(state.name, state.type.dims));
        EXPECT_EQ(values, expected.at(state.name)) << state.name;
      }
      EXPECT_THAT(ExportHuggingFace(spec, weights, "", out),
                  StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(out)));
    }
  }
  ModelSpec other = Spec(kLlamaFields);
  EXPECT_THAT(ExportHuggingFace(other, Path("w0"), "", Path("x")),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("none of a llama")));
  EXPECT_FALSE(fs::exists(Path("x")));
}

// Logits [B,T,V] of the folder's model, by the ops' references in f32.
std::vector<float> Logits(const HuggingFaceFolder& folder, const std::vector<std::vector<int>>& tokens) {
  const int64_t batch = static_cast<int64_t>(tokens.size());
  const int64_t sequence = static_cast<int64_t>(tokens[0].size());
  const std::unique_ptr<Module> module = BuildTransformer(folder.spec(), batch, sequence).value();
  Graph& graph = *module->FindGraph("eval");
  for (Node* node : graph.TopologicalOrder()) {
    if (node->name() == "head") graph.AddOutput(node->result(), "logits");
  }
  auto inputs = MakeInputs<float>(graph, folder.spec().vocab_size(), 1);
  for (size_t b = 0; b < tokens.size(); ++b) {
    for (size_t t = 0; t < tokens[b].size(); ++t) inputs.at("tokens").ints[b * tokens[b].size() + t] = tokens[b][t];
  }
  for (const State& state : module->states()) {
    inputs.at(state.name).values = folder.Parameter(state.name, state.type.dims).value();
  }
  return EvaluateGraph<float>(graph, inputs).value().at("logits").values;
}

TEST_F(HuggingFaceTest, LogitsAreThoseOfTransformers) {
  for (const char* name : kFolders) {
    SCOPED_TRACE(name);
    ASSERT_OK_AND_ASSIGN(const auto folder, HuggingFaceFolder::Open(Data(name)));
    const json golden = json::parse(ReadFile(Data(absl::StrCat(name, "/logits.json"))).value());
    const std::vector<std::vector<int>> tokens = golden["tokens"];
    const std::vector<float> logits = Logits(*folder, tokens);
    double worst = 0;
    double largest = 0;
    size_t i = 0;
    for (const json& sample : golden["logits"]) {
      for (const json& row : sample) {
        for (const double expected : row) {
          worst = std::max(worst, std::abs(expected - static_cast<double>(logits[i++])));
          largest = std::max(largest, std::abs(expected));
        }
      }
    }
    EXPECT_EQ(i, logits.size());
    EXPECT_GT(largest, 1.0);
    EXPECT_LE(worst, 1e-4);

    // Written by us again: every tensor as transformers had it.
    const std::unique_ptr<Module> module = BuildTransformer(folder->spec(), 1, 4).value();
    std::vector<SafetensorsTensor> tensors;
    for (const State& state : module->states()) {
      tensors.push_back({state.name, SafetensorsType::kF32, {state.type.dims.begin(), state.type.dims.end()}});
    }
    const std::string weights = Path(absl::StrCat(name, ".safetensors"));
    ASSERT_OK_AND_ASSIGN(const auto writer, SafetensorsWriter::Create(weights, tensors, {}));
    for (const SafetensorsTensor& tensor : tensors) {
      const std::vector<float> values = folder->Parameter(tensor.name, tensor.shape).value();
      ASSERT_OK(writer->Append(tensor.name,
                               absl::string_view(reinterpret_cast<const char*>(values.data()), values.size() * 4)));
    }
    ASSERT_OK(writer->Finish());
    ASSERT_OK(ExportHuggingFace(folder->spec(), weights, "", Path(name)));
    if (!fs::exists(Data(absl::StrCat(name, "/model.safetensors")))) continue;
    EXPECT_TRUE(ReadFile(Path(absl::StrCat(name, "/model.safetensors"))).value() ==
                ReadFile(Data(absl::StrCat(name, "/model.safetensors"))).value())
        << "the file is not the Python library's, byte for byte";
  }
}

TEST_F(HuggingFaceTest, DamagedFoldersAreNamedOrHarmless) {
  std::mt19937 random(9);
  const std::string source = Data("mistral");
  fs::copy(source, Path("m"));
  const std::string config = ReadFile(source + "/config.json").value();
  const std::string weights = ReadFile(source + "/model.safetensors").value();
  const auto try_all = [&] {
    const auto folder = HuggingFaceFolder::Open(Path("m"));
    if (!folder.ok()) return;
    const ModelSpec& spec = (*folder)->spec();
    if (spec.layers() > 100 || spec.width() > 4096 || spec.vocab_size() > 4096 || spec.ffn_width() > 4096) return;
    const auto module = BuildTransformer(spec, 1, 4);
    if (!module.ok()) return;
    for (const State& state : (*module)->states())
      (*folder)->Parameter(state.name, state.type.dims).status().IgnoreError();
  };
  for (int i = 0; i < 600; ++i) {
    std::string bad = i % 2 == 0 ? config : weights;
    for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
      const size_t at = random() % (i % 2 == 0 ? bad.size() : 2500);  // Of the weights: the header.
      bad[at] = static_cast<char>(bad[at] ^ 1 << (random() % 8));
    }
    if (i % 20 < 2) bad.resize(random() % bad.size());
    const std::string path = Path(i % 2 == 0 ? "m/config.json" : "m/model.safetensors");
    fs::remove(path);
    std::FILE* file = std::fopen(path.c_str(), "wb");
    ASSERT_NE(file, nullptr);
    std::fwrite(bad.data(), 1, bad.size(), file);
    std::fclose(file);
    try_all();
    fs::remove(path);
    fs::copy(i % 2 == 0 ? source + "/config.json" : source + "/model.safetensors", path);
  }
  fs::remove(Path("m/model.safetensors"));
  EXPECT_THAT(HuggingFaceFolder::Open(Path("m")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("model.safetensors")));
  fs::copy(Data("llama_sharded"), Path("s"));
  json index = json::parse(ReadFile(Path("s/model.safetensors.index.json")).value());
  index["weight_map"].begin().value() = "../model.safetensors";
  ASSERT_OK(WriteFile(Path("s/model.safetensors.index.json"), index.dump()));
  EXPECT_THAT(HuggingFaceFolder::Open(Path("s")),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not beside it")));
}

}  // namespace
}  // namespace mt
