#include "ir/hugging_face.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "ir/base/json.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

using nlohmann::json;
using proto::ModelSpec;

constexpr int kMaxDepth = 64;

const json& Member(const json& object, const char* key) {
  static const json& null = *new json;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

absl::Status Unsupported(const char* key, const json& value) {
  return absl::FailedPreconditionError(
      absl::StrCat("\"", key, "\": ", value.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 60),
                   " cannot be expressed in a model spec"));
}

// Reads the members of a config; the first thing that is wrong is kept.
class Reader {
 public:
  explicit Reader(const json& config) : config_(config) {}
  const absl::Status& status() const { return status_; }

  // A positive integer; `fallback` 0: it must be there.
  int64_t Int(const char* key, int64_t fallback = 0) {
    const json& value = Member(config_, key);
    if (value.is_null() && fallback != 0) return fallback;
    if (value.is_number_unsigned() && value.get<uint64_t>() >= 1 && value.get<uint64_t>() <= (uint64_t{1} << 40)) {
      return value.get<int64_t>();
    }
    Fail(absl::FailedPreconditionError(absl::StrCat("\"", key, "\" is not a positive integer")));
    return 1;
  }
  double Double(const char* key, double fallback) {
    const json& value = Member(config_, key);
    if (value.is_null()) return fallback;
    if (value.is_number() && std::isfinite(value.get<double>())) return value.get<double>();
    Fail(absl::FailedPreconditionError(absl::StrCat("\"", key, "\" is not a number")));
    return fallback;
  }
  bool Bool(const char* key, bool fallback) {
    const json& value = Member(config_, key);
    if (value.is_boolean()) return value.get<bool>();
    if (!value.is_null()) Fail(absl::FailedPreconditionError(absl::StrCat("\"", key, "\" is not a boolean")));
    return fallback;
  }
  // Absent, null or `value`.
  void Only(const char* key, const json& value) {
    const json& given = Member(config_, key);
    if (!given.is_null() && given != value) Fail(Unsupported(key, given));
  }
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

 private:
  const json& config_;
  absl::Status status_;
};

void ReadGpt2(const json& config, Reader& read, ModelSpec& spec) {
  spec.set_layers(read.Int("n_layer", 12));
  spec.set_width(read.Int("n_embd", 768));
  spec.set_heads(read.Int("n_head", 12));
  spec.set_ffn_width(read.Int("n_inner", 4 * spec.width()));
  spec.set_max_sequence(read.Int("n_positions", 1024));
  spec.set_norm_epsilon(read.Double("layer_norm_epsilon", 1e-5));
  spec.set_dropout(read.Double("resid_pdrop", 0.1));
  for (const char* key : {"embd_pdrop", "attn_pdrop"}) {
    if (read.Double(key, 0.1) != spec.dropout()) read.Fail(Unsupported(key, Member(config, key)));
  }
  const json& activation = Member(config, "activation_function");
  if (activation.is_null() || activation == "gelu_new" || activation == "gelu_pytorch_tanh") {
    spec.set_activation(ModelSpec::GELU);
  } else if (activation == "gelu") {
    spec.set_activation(ModelSpec::GELU_ERF);
  } else if (activation == "relu") {
    spec.set_activation(ModelSpec::RELU);
  } else if (activation == "silu" || activation == "swish") {
    spec.set_activation(ModelSpec::SILU);
  } else {
    read.Fail(Unsupported("activation_function", activation));
  }
  read.Only("scale_attn_weights", true);
  read.Only("scale_attn_by_inverse_layer_idx", false);
  read.Only("add_cross_attention", false);
  spec.set_tied_head(read.Bool("tie_word_embeddings", true));
  spec.set_attention_bias(true);
  spec.set_mlp_bias(true);
  spec.set_norm_bias(true);
}

void ReadLlama(const json& config, bool mistral, Reader& read, ModelSpec& spec) {
  spec.set_layers(read.Int("num_hidden_layers"));
  spec.set_width(read.Int("hidden_size"));
  spec.set_heads(read.Int("num_attention_heads"));
  spec.set_kv_heads(read.Int("num_key_value_heads", spec.heads()));
  spec.set_ffn_width(read.Int("intermediate_size"));
  spec.set_max_sequence(read.Int("max_position_embeddings", mistral ? 131072 : 2048));
  spec.set_norm_epsilon(read.Double("rms_norm_eps", 1e-6));
  spec.set_norm(ModelSpec::RMS_NORM);
  spec.set_positions(ModelSpec::ROTARY);
  const json& activation = Member(config, "hidden_act");
  if (activation.is_null() || activation == "silu" || activation == "swish") {
    spec.set_activation(ModelSpec::SWIGLU);
  } else if (activation == "gelu_pytorch_tanh" || activation == "gelu_new") {
    spec.set_activation(ModelSpec::GEGLU);
  } else {
    read.Fail(Unsupported("hidden_act", activation));
  }
  // transformers 5 keeps the base and the scaling in one object.
  const json& parameters = Member(config, "rope_parameters");
  for (const json* scaling : {&Member(config, "rope_scaling"), &parameters}) {
    if (scaling->is_null()) continue;
    const json& type = Member(*scaling, Member(*scaling, "rope_type").is_null() ? "type" : "rope_type");
    if (!type.is_null() && type != "default") read.Fail(Unsupported("rope_scaling", *scaling));
  }
  Reader rope(parameters);
  spec.set_rope_theta(rope.Double("rope_theta", read.Double("rope_theta", 10000.0)));
  read.Fail(rope.status());
  if (spec.heads() > 0 && !Member(config, "head_dim").is_null() &&
      read.Int("head_dim") * spec.heads() != spec.width()) {
    read.Fail(Unsupported("head_dim", Member(config, "head_dim")));
  }
  read.Only("partial_rotary_factor", 1.0);
  spec.set_dropout(0);
  if (read.Double("attention_dropout", 0) != 0) {
    read.Fail(Unsupported("attention_dropout", Member(config, "attention_dropout")));
  }
  spec.set_tied_head(read.Bool("tie_word_embeddings", false));
  if (mistral) {
    // W keys, the query's own among them, are the query's and W - 1 before it.
    if (!Member(config, "sliding_window").is_null()) spec.set_attention_window(read.Int("sliding_window") - 1);
    if (Member(config, "sliding_window") == 1) {
      read.Fail(Unsupported("sliding_window", Member(config, "sliding_window")));  // 0 is "none" in a spec.
    }
  } else {
    spec.set_attention_bias(read.Bool("attention_bias", false));
    spec.set_mlp_bias(read.Bool("mlp_bias", false));
  }
}

}  // namespace

absl::StatusOr<std::string> HuggingFaceFamily(const ModelSpec& spec) {
  const auto unsupported = [](absl::string_view family, absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("Hugging Face's ", family, " cannot express ", what));
  };
  if (spec.norm_placement() != ModelSpec::PRE) return unsupported("GPT-2 and Llama", "norm_placement: POST");
  if (spec.norm() == ModelSpec::LAYER_NORM) {
    const char* family = "GPT-2 (layer_norm: its family)";
    if (spec.positions() != ModelSpec::LEARNED) {
      return unsupported(family, absl::StrCat("positions: ", ModelSpec::Positions_Name(spec.positions())));
    }
    if (spec.activation() == ModelSpec::SWIGLU || spec.activation() == ModelSpec::GEGLU) {
      return unsupported(family, absl::StrCat("activation: ", ModelSpec::Activation_Name(spec.activation())));
    }
    if (spec.kv_heads() != 0 && spec.kv_heads() != spec.heads()) return unsupported(family, "kv_heads below heads");
    if (spec.attention_window() != 0) return unsupported(family, "attention_window");
    if (!spec.attention_bias()) return unsupported(family, "attention_bias: false");
    if (!spec.mlp_bias()) return unsupported(family, "mlp_bias: false");
    if (!spec.norm_bias()) return unsupported(family, "norm_bias: false");
    return "gpt2";
  }
  const char* family = "Llama and Mistral (rms_norm: their family)";
  if (spec.positions() != ModelSpec::ROTARY) {
    return unsupported(family, absl::StrCat("positions: ", ModelSpec::Positions_Name(spec.positions())));
  }
  if (spec.activation() != ModelSpec::SWIGLU && spec.activation() != ModelSpec::GEGLU) {
    return unsupported(family, absl::StrCat("activation: ", ModelSpec::Activation_Name(spec.activation())));
  }
  if (spec.dropout() != 0) return unsupported(family, "dropout");
  if (spec.attention_window() == 0) return "llama";
  if (spec.attention_bias()) return unsupported(family, "attention_window with attention_bias");
  if (spec.mlp_bias()) return unsupported(family, "attention_window with mlp_bias");
  return "mistral";
}

absl::StatusOr<std::string> HuggingFaceConfig(const ModelSpec& spec) {
  ASSIGN_OR_RETURN(const std::string family, HuggingFaceFamily(spec));
  const auto value_or = [](double value, double fallback) { return value == 0 ? fallback : value; };
  const int64_t ffn_width = spec.ffn_width() == 0 ? 4 * spec.width() : spec.ffn_width();
  const double stddev = value_or(spec.init_stddev(), 0.02);
  const double epsilon = value_or(spec.norm_epsilon(), 1e-5);
  nlohmann::ordered_json config;
  config["model_type"] = family;
  if (family == "gpt2") {
    config["architectures"] = {"GPT2LMHeadModel"};
    config["n_layer"] = spec.layers();
    config["n_head"] = spec.heads();
    config["n_embd"] = spec.width();
    config["n_inner"] = ffn_width;
    config["n_positions"] = spec.max_sequence();
    config["n_ctx"] = spec.max_sequence();
    config["layer_norm_epsilon"] = epsilon;
    config["activation_function"] = spec.activation() == ModelSpec::GELU       ? "gelu_new"
                                    : spec.activation() == ModelSpec::GELU_ERF ? "gelu"
                                    : spec.activation() == ModelSpec::RELU     ? "relu"
                                                                               : "silu";
    for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"}) config[key] = spec.dropout();
  } else {
    config["architectures"] = {family == "llama" ? "LlamaForCausalLM" : "MistralForCausalLM"};
    config["num_hidden_layers"] = spec.layers();
    config["num_attention_heads"] = spec.heads();
    config["num_key_value_heads"] = spec.kv_heads() == 0 ? spec.heads() : spec.kv_heads();
    config["hidden_size"] = spec.width();
    config["intermediate_size"] = ffn_width;
    config["max_position_embeddings"] = spec.max_sequence();
    config["rms_norm_eps"] = epsilon;
    config["hidden_act"] = spec.activation() == ModelSpec::SWIGLU ? "silu" : "gelu_pytorch_tanh";
    config["rope_theta"] = value_or(spec.rope_theta(), 10000.0);
    if (family == "llama") {
      config["attention_bias"] = spec.attention_bias();
      config["mlp_bias"] = spec.mlp_bias();
    } else {
      config["sliding_window"] = spec.attention_window() + 1;
    }
  }
  config["vocab_size"] = spec.vocab_size();
  config["tie_word_embeddings"] = spec.tied_head();
  config["initializer_range"] = stddev;
  config["torch_dtype"] = "float32";
  return absl::StrCat(config.dump(2), "\n");
}

absl::StatusOr<ModelSpec> SpecFromHuggingFace(absl::string_view config_json) {
  bool too_deep = false;  // Printing a value takes stack for each level.
  const auto shallow = [&](int depth, json::parse_event_t, const json&) {
    too_deep = too_deep || depth > kMaxDepth;
    return !too_deep;
  };
  const json config = json::parse(config_json.begin(), config_json.end(), shallow, /*allow_exceptions=*/false);
  if (too_deep) return absl::FailedPreconditionError(absl::StrCat("is nested deeper than ", kMaxDepth, " levels"));
  if (!config.is_object()) return absl::FailedPreconditionError("is not a JSON object");
  const json& type = Member(config, "model_type");
  ModelSpec spec;
  Reader read(config);
  spec.set_vocab_size(read.Int("vocab_size"));
  spec.set_init_stddev(read.Double("initializer_range", 0.02));
  if (type == "gpt2") {
    ReadGpt2(config, read, spec);
  } else if (type == "llama" || type == "mistral") {
    ReadLlama(config, type == "mistral", read, spec);
  } else {
    return absl::FailedPreconditionError(
        absl::StrCat("\"model_type\": ", type.dump(-1, ' ', true, json::error_handler_t::replace).substr(0, 60),
                     " is not supported; gpt2, llama and mistral are"));
  }
  RETURN_IF_ERROR(read.status());
  return spec;
}

}  // namespace mt
