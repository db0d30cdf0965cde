#include <cmath>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "ir/builder.h"
#include "ir/text.h"
#include "models/model.h"

namespace mt {
namespace {

constexpr int64_t kMaxLayers = 4096, kMaxWidth = 1 << 20, kMaxVocab = 1 << 24, kMaxSequence = 1 << 24;

absl::Status CheckField(absl::string_view name, int64_t value, int64_t limit) {
  if (value >= 1 && value <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " = ", value, "; expected 1 to ", limit));
}

// Fills in what 0 stands for, and refuses what cannot be built.
absl::StatusOr<proto::ModelSpec> Resolve(proto::ModelSpec spec, int64_t batch, int64_t sequence) {
  if (!spec.name().empty() && !IsTextName(spec.name())) {
    return absl::InvalidArgumentError(
        absl::StrCat("name = \"", absl::CEscape(spec.name()), "\"; expected letters, digits, '.', '_', '-' or '/'"));
  }
  RETURN_IF_ERROR(CheckField("layers", spec.layers(), kMaxLayers));
  RETURN_IF_ERROR(CheckField("width", spec.width(), kMaxWidth));
  RETURN_IF_ERROR(CheckField("heads", spec.heads(), kMaxWidth));
  if (spec.kv_heads() == 0) spec.set_kv_heads(spec.heads());
  RETURN_IF_ERROR(CheckField("kv_heads", spec.kv_heads(), spec.heads()));
  if (spec.ffn_width() == 0) spec.set_ffn_width(4 * spec.width());
  RETURN_IF_ERROR(CheckField("ffn_width", spec.ffn_width(), kMaxWidth));
  RETURN_IF_ERROR(CheckField("vocab_size", spec.vocab_size(), kMaxVocab));
  RETURN_IF_ERROR(CheckField("max_sequence", spec.max_sequence(), kMaxSequence));
  RETURN_IF_ERROR(CheckField("batch", batch, 1 << 24));
  RETURN_IF_ERROR(CheckField("sequence", sequence, kMaxSequence));
  if (spec.width() % spec.heads() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("heads = ", spec.heads(), " does not divide width = ", spec.width(),
                                                   "; each head takes width / heads columns"));
  }
  if (spec.heads() % spec.kv_heads() != 0) {
    return absl::InvalidArgumentError(absl::StrCat("kv_heads = ", spec.kv_heads(),
                                                   " does not divide heads = ", spec.heads(),
                                                   "; each key-value head serves heads / kv_heads heads"));
  }
  const int64_t head_width = spec.width() / spec.heads();
  if (spec.positions() == proto::ModelSpec::ROTARY && head_width % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotary positions need an even head width; width / heads = ", head_width));
  }
  if (sequence > spec.max_sequence()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", sequence, " is over the model's max_sequence = ", spec.max_sequence(), "; use --seq ",
                     spec.max_sequence(), " or less, or --set max_sequence=", sequence));
  }
  if (!(spec.dropout() >= 0 && spec.dropout() < 1)) {
    return absl::InvalidArgumentError(absl::StrCat("dropout = ", spec.dropout(), "; expected 0 to below 1"));
  }
  if (spec.rope_theta() == 0) spec.set_rope_theta(10000.0);
  if (spec.norm_epsilon() == 0) spec.set_norm_epsilon(1e-5);
  if (spec.init_stddev() == 0) spec.set_init_stddev(0.02);
  for (const double number : {spec.rope_theta(), spec.norm_epsilon(), spec.init_stddev()}) {
    if (number > 0 && std::isfinite(number)) continue;
    return absl::InvalidArgumentError("rope_theta, norm_epsilon and init_stddev must be positive numbers");
  }
  if (spec.attention_window() < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention_window = ", spec.attention_window(), "; expected 0 (none) or more"));
  }
  return spec;
}

// Builds one forward graph; parameters are inputs named like the module's states.
class TransformerBuilder {
 public:
  TransformerBuilder(const proto::ModelSpec& spec, int64_t batch, int64_t sequence, bool training, Graph& graph,
                     Module& module)
      : spec_(spec), batch_(batch), sequence_(sequence), training_(training), b_(graph), module_(module) {}

  absl::Status Build();
  // One position of one sequence, of which caches hold up to `positions`.
  absl::Status BuildGenerate(int64_t positions);

 private:
  TensorType F32(absl::Span<const int64_t> dims) const { return {DType::kF32, Dims(dims.begin(), dims.end())}; }
  Value Parameter(absl::string_view name, absl::Span<const int64_t> dims, Init init);
  Value Weight(absl::string_view name, absl::Span<const int64_t> dims, bool into_residual = false);
  Value Linear(absl::string_view name, Value x, int64_t columns, bool bias, bool into_residual = false);
  Value Norm(absl::string_view name, Value x);
  Value Dropout(absl::string_view name, Value x);
  Value Embedding(Value tokens, Value order);
  // The hidden states that the head reads, and the head's weight.
  Value Trunk(Value x);
  Value Head();
  Value Attention(Value x);
  Value Mlp(Value x);
  Value Block(Value x);

  const proto::ModelSpec& spec_;
  const int64_t batch_, sequence_;
  const bool training_;
  Builder b_;
  Module& module_;
  Value table_;         // wte, for a tied head.
  Value position_;      // Of the only token, where positions are cached; else invalid.
  int64_t cached_ = 0;  // Positions that the caches hold.
};

Value TransformerBuilder::Parameter(absl::string_view name, absl::Span<const int64_t> dims, Init init) {
  const std::string path = b_.Path(name);
  if (module_.FindState(path) == nullptr) {
    const absl::Status added = module_.AddState({.name = path, .type = F32(dims), .logical_dims = {}, .init = init});
    if (!added.ok()) b_.Fail(added);
  }
  return b_.Input(path, F32(dims), Role::kParameter);
}

Value TransformerBuilder::Weight(absl::string_view name, absl::Span<const int64_t> dims, bool into_residual) {
  double stddev = spec_.init_stddev();
  if (into_residual) stddev /= std::sqrt(2.0 * static_cast<double>(spec_.layers()));
  return Parameter(name, dims, {.kind = Init::Kind::kNormal, .stddev = stddev});
}

// y [B,T,N] = x [B,T,K] W [K,N] (+ b [N]).
Value TransformerBuilder::Linear(absl::string_view name, Value x, int64_t columns, bool bias, bool into_residual) {
  Builder::Scope scope(b_, name);
  if (!x) return x;
  std::vector<Value> operands = {x, Weight("weight", {x.type().dim(-1), columns}, into_residual)};
  if (bias) operands.push_back(Parameter("bias", {columns}, {}));
  return b_.Op("matmul", operands, {{"bias", bias}});
}

Value TransformerBuilder::Norm(absl::string_view name, Value x) {
  Builder::Scope scope(b_, name);
  std::vector<Value> operands = {x, Parameter("weight", {spec_.width()}, {.kind = Init::Kind::kOnes})};
  if (spec_.norm() == proto::ModelSpec::RMS_NORM) return b_.Op("rms_norm", operands, {{"eps", spec_.norm_epsilon()}});
  if (spec_.norm_bias()) operands.push_back(Parameter("bias", {spec_.width()}, {}));
  return b_.Op("layer_norm", operands, {{"eps", spec_.norm_epsilon()}, {"beta", spec_.norm_bias()}});
}

// The key is the place in the model, so that every pass, target and rank drops the same elements.
Value TransformerBuilder::Dropout(absl::string_view name, Value x) {
  if (!training_ || spec_.dropout() == 0) return x;
  const Value rng = b_.Input("rng", {DType::kI32, {4}}, Role::kStep);
  const int64_t key = static_cast<int64_t>(Fnv1a(b_.Path(name)) & 0xffffffffu);
  return b_.Op("dropout", {x, rng}, {{"rate", spec_.dropout()}, {"key", key}}, name);
}

Value TransformerBuilder::Embedding(Value tokens, Value order) {
  Builder::Scope scope(b_, "embed");
  table_ = Weight("tokens.weight", {spec_.vocab_size(), spec_.width()});
  std::vector<Value> operands = {table_, tokens};
  if (order) operands.push_back(order);
  Value x = b_.Op("embedding", operands, {{"order", static_cast<bool>(order)}}, "tokens");
  if (spec_.positions() == proto::ModelSpec::LEARNED) {
    Value rows = Weight("positions.weight", {spec_.max_sequence(), spec_.width()});
    if (position_) {
      rows = b_.Op("embedding", {rows, position_}, {{"order", false}}, "positions");
    } else if (sequence_ < spec_.max_sequence()) {
      rows = b_.Op("slice", {rows}, {{"dim", int64_t{0}}, {"start", int64_t{0}}, {"limit", sequence_}}, "positions");
    }
    x = b_.Op("add", {x, rows}, {}, "sum");
  } else if (spec_.positions() == proto::ModelSpec::SINUSOIDAL) {
    operands.clear();
    if (position_) operands.push_back(position_);
    const Value rows = b_.Op(
        "sinusoid", operands,
        {{"length", sequence_}, {"width", spec_.width()}, {"position", static_cast<bool>(position_)}}, "positions");
    x = b_.Op("add", {x, rows}, {}, "sum");
  }
  return Dropout("dropout", x);
}

// Query heads that share a key-value head are stacked along the rows, so that grouped queries are plain batched
// matmuls: q [B,H,T,D] as [B,G,(H/G)T,D] against k, v [B,G,T,D].
Value TransformerBuilder::Attention(Value x) {
  Builder::Scope scope(b_, "attn");
  const int64_t heads = spec_.heads(), kv_heads = spec_.kv_heads(), head_width = spec_.width() / heads;
  const int64_t group = heads / kv_heads;
  const Value qkv = Linear("qkv", x, (heads + 2 * kv_heads) * head_width, spec_.attention_bias());
  std::vector<Value> split = b_.Ops("split_heads", {qkv}, {{"heads", heads}, {"kv_heads", kv_heads}}, "split");
  if (split.empty()) return Value{};
  Value q = split[0], k = split[1];
  const Value v = split[2];
  if (spec_.positions() == proto::ModelSpec::ROTARY) {
    const Attrs attrs = {{"theta", spec_.rope_theta()}, {"position", static_cast<bool>(position_)}};
    const auto rope = [&](Value part, absl::string_view name) {
      return position_ ? b_.Op("rope", {part, position_}, attrs, name) : b_.Op("rope", {part}, attrs, name);
    };
    q = rope(q, "rope_q");
    k = rope(k, "rope_k");
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_width));
  const int64_t window = spec_.attention_window() == 0 ? -1 : spec_.attention_window();
  if (position_) {
    const TensorType cache = F32({batch_, kv_heads, cached_, head_width});
    const Value k_cache = b_.Input(b_.Path("k_cache"), cache, Role::kCache);
    const Value v_cache = b_.Input(b_.Path("v_cache"), cache, Role::kCache);
    const std::vector<Value> results = b_.Ops("cached_attention", {q, k, v, k_cache, v_cache, position_},
                                              {{"scale", scale}, {"window", window}}, "cached");
    if (results.empty()) return Value{};
    b_.graph().AddOutput(results[1], k_cache.node->name(), k_cache.node);
    b_.graph().AddOutput(results[2], v_cache.node->name(), v_cache.node);
    return Linear("out", b_.Reshape(results[0], {batch_, 1, spec_.width()}), spec_.width(), spec_.attention_bias(),
                  /*into_residual=*/true);
  }
  q = b_.Reshape(q, {batch_, kv_heads, group * sequence_, head_width});
  const Value scores = b_.Op("matmul", {q, k}, {{"transpose_b", true}}, "scores");
  Value weights =
      b_.Op("softmax", {scores}, {{"scale", scale}, {"causal", true}, {"window", window}, {"group", group}}, "softmax");
  weights = Dropout("weights_dropout", weights);
  Value out = b_.Op("matmul", {weights, v}, {}, "values");
  out = b_.Reshape(out, {batch_, heads, sequence_, head_width});
  out = b_.Op("merge_heads", {out}, {}, "merge");
  return Dropout("dropout", Linear("out", out, spec_.width(), spec_.attention_bias(), /*into_residual=*/true));
}

Value TransformerBuilder::Mlp(Value x) {
  Builder::Scope scope(b_, "mlp");
  const int64_t columns = spec_.ffn_width();
  Value hidden;
  switch (spec_.activation()) {
    case proto::ModelSpec::SWIGLU:
    case proto::ModelSpec::GEGLU: {
      const Value gate = Linear("gate", x, columns, spec_.mlp_bias());
      const Value up = Linear("up", x, columns, spec_.mlp_bias());
      hidden = b_.Op(spec_.activation() == proto::ModelSpec::SWIGLU ? "swiglu" : "geglu", {gate, up}, {}, "activation");
      break;
    }
    default: {
      const absl::string_view op = spec_.activation() == proto::ModelSpec::GELU_ERF ? "gelu_erf"
                                   : spec_.activation() == proto::ModelSpec::RELU   ? "relu"
                                   : spec_.activation() == proto::ModelSpec::SILU   ? "silu"
                                                                                    : "gelu";
      hidden = b_.Op(op, {Linear("up", x, columns, spec_.mlp_bias())}, {}, "activation");
    }
  }
  return Dropout("dropout", Linear("down", hidden, spec_.width(), spec_.mlp_bias(), /*into_residual=*/true));
}

Value TransformerBuilder::Block(Value x) {
  if (spec_.norm_placement() == proto::ModelSpec::POST) {
    x = Norm("norm1", b_.Op("add", {x, Attention(x)}, {}, "residual1"));
    return Norm("norm2", b_.Op("add", {x, Mlp(x)}, {}, "residual2"));
  }
  x = b_.Op("add", {x, Attention(Norm("norm1", x))}, {}, "residual1");
  return b_.Op("add", {x, Mlp(Norm("norm2", x))}, {}, "residual2");
}

Value TransformerBuilder::Trunk(Value x) {
  for (int64_t layer = 0; layer < spec_.layers() && b_.status().ok(); ++layer) {
    Builder::Scope scope(b_, absl::StrCat("h", layer));
    x = Block(x);
  }
  return spec_.norm_placement() == proto::ModelSpec::PRE ? Norm("final_norm", x) : x;
}

Value TransformerBuilder::Head() {
  return spec_.tied_head() ? table_ : Weight("head.weight", {spec_.vocab_size(), spec_.width()});
}

absl::Status TransformerBuilder::BuildGenerate(int64_t positions) {
  cached_ = positions;
  const Value token = b_.Input("tokens", {DType::kI32, {batch_, sequence_}}, Role::kStep);
  position_ = b_.Input("position", {DType::kI32, {1}}, Role::kStep);
  const Value x = Trunk(Embedding(token, /*order=*/Value{}));
  const Value head = Head();
  Value logits = b_.Op("matmul", {x, head}, {{"transpose_b", true}, {"f32_result", true}}, "head");
  logits = b_.Reshape(logits, {spec_.vocab_size()});
  RETURN_IF_ERROR(b_.status());
  b_.graph().AddOutput(logits, "logits");
  return b_.status();
}

absl::Status TransformerBuilder::Build() {
  const Value tokens = b_.Input("tokens", {DType::kI32, {batch_, sequence_}}, Role::kData);
  const Value labels = b_.Input("labels", {DType::kI32, {batch_, sequence_}}, Role::kData);
  const Value order = b_.Input("order", {DType::kI32, {batch_ * sequence_}}, Role::kData);
  const Value x = Trunk(Embedding(tokens, order));
  const Value logits = b_.Op("matmul", {x, Head()}, {{"transpose_b", true}}, "head");
  const std::vector<Value> loss = b_.Ops("softmax_cross_entropy", {logits, labels}, {}, "loss");
  RETURN_IF_ERROR(b_.status());
  if (training_) {
    const Value mean = b_.Op("div", {loss[0], loss[1]}, {}, "loss.mean");
    RETURN_IF_ERROR(b_.status());
    b_.graph().AddOutput(mean, "loss");
  } else {
    b_.graph().AddOutput(loss[0], "loss_sum");
    b_.graph().AddOutput(loss[1], "count");
  }
  return b_.status();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Module>> BuildTransformer(const proto::ModelSpec& given, int64_t batch,
                                                         int64_t sequence) {
  ASSIGN_OR_RETURN(const proto::ModelSpec spec, Resolve(given, batch, sequence));
  auto module = std::make_unique<Module>(spec.name());
  module->facts() = {{"batch", batch},
                     {"sequence", sequence},
                     {"vocab_size", spec.vocab_size()},
                     {"layers", spec.layers()},
                     {"width", spec.width()},
                     {"heads", spec.heads()},
                     {"kv_heads", spec.kv_heads()},
                     {"ffn_width", spec.ffn_width()},
                     {"max_sequence", spec.max_sequence()}};
  for (const bool training : {true, false}) {
    Graph* graph = module->AddGraph(training ? "train" : "eval");
    RETURN_IF_ERROR(TransformerBuilder(spec, batch, sequence, training, *graph, *module).Build());
  }
  Graph& generate = *module->AddGraph("generate");
  RETURN_IF_ERROR(TransformerBuilder(spec, /*batch=*/1, /*sequence=*/1, /*training=*/false, generate, *module)
                      .BuildGenerate(sequence));
  return module;
}

}  // namespace mt
