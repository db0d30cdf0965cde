// Generation: the program over caches against a forward pass over the whole sequence, drawing of tokens, texts.
#include "runtime/train/generate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/compile.h"
#include "codegen/plan/plan_verifier.h"
#include "tests/process.h"
#include "tests/small_modules.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr int64_t kLength = 24, kVocab = 40;

// What a forward pass over `tokens` says after each of them: the program eval, with its logits as an output.
// Compiled for another length than the tokens', it would be another program; the sequence is theirs.
struct Loaded {
  std::unique_ptr<Executor> executor;
  const Program* program = nullptr;
};

std::unique_ptr<Module> Model(const std::string& fields) {
  return SmallTransformer(
      absl::StrCat("width: 32 heads: 4 ffn_width: 48 vocab_size: ", kVocab, " max_sequence: 30 ", fields),
      /*batch=*/1, kLength);
}

absl::StatusOr<Loaded> Load(std::unique_ptr<Module> module, const std::string& passes, const std::string& program) {
  ASSIGN_OR_RETURN(proto::PlanProto plan, Compile(std::move(module), {.passes = passes}));
  ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeCpuBackend(2));
  Loaded loaded;
  ASSIGN_OR_RETURN(loaded.executor, Executor::Load(std::move(plan), std::move(backend)));
  loaded.executor->InitializeStates(/*seed=*/3);
  loaded.program = loaded.executor->FindProgram(program);
  return loaded;
}

std::vector<int32_t> SomeTokens() {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < kLength; ++i) tokens.push_back(static_cast<int32_t>((i * i * 7 + 3 * i + 5) % kVocab));
  return tokens;
}

// [T, V]
std::vector<float> WholeLogits(const std::string& fields, const std::string& passes) {
  std::unique_ptr<Module> module = Model(fields);
  Graph* eval = module->FindGraph("eval");
  for (Node* node : eval->Nodes()) {
    if (node->name() == "head") eval->AddOutput(node->result(), "logits");
  }
  absl::StatusOr<Loaded> loaded = Load(std::move(module), passes, "eval");
  EXPECT_OK(loaded);
  const std::vector<int32_t> tokens = SomeTokens();
  for (const BoundTensor& input : loaded->program->inputs()) {
    if (IsState(input.role)) continue;
    std::memcpy(input.data, tokens.data(), static_cast<size_t>(input.type.byte_size()));
    if (input.name == "order") std::fill_n(input.data_as<int32_t>(), kLength, 0);
  }
  loaded->program->Run();
  const BoundTensor* logits = loaded->program->FindOutput("logits");
  return std::vector<float>(logits->data_as<float>(), logits->data_as<float>() + kLength * kVocab);
}

std::vector<float> CachedLogits(const std::string& fields, const std::string& passes) {
  absl::StatusOr<Loaded> loaded = Load(Model(fields), passes, "generate");
  EXPECT_OK(loaded);
  const std::vector<int32_t> tokens = SomeTokens();
  std::vector<float> all;
  // What the caches hold before the first position does not matter.
  for (const BoundTensor& input : loaded->program->inputs()) {
    if (input.role == Role::kCache) std::memset(input.data, 0xff, static_cast<size_t>(input.type.byte_size()));
  }
  for (int32_t position = 0; position < kLength; ++position) {
    *loaded->program->FindInput("tokens")->data_as<int32_t>() = tokens[static_cast<size_t>(position)];
    *loaded->program->FindInput("position")->data_as<int32_t>() = position;
    loaded->program->Run();
    const BoundTensor* logits = loaded->program->FindOutput("logits");
    EXPECT_EQ(logits->type, (TensorType{DType::kF32, {kVocab}}));
    all.insert(all.end(), logits->data_as<float>(), logits->data_as<float>() + kVocab);
  }
  return all;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  double largest = 0;
  for (const float x : expected) largest = std::max(largest, std::abs(static_cast<double>(x)));
  ASSERT_GT(largest, 0.1);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], tolerance * largest) << "position " << i / kVocab << ", class " << i % kVocab;
  }
}

struct ModelCase {
  const char* name;
  std::string fields;
};
const ModelCase kModels[] = {
    {"gpt2", "tied_head: true attention_bias: true mlp_bias: true norm_bias: true dropout: 0.1"},
    {"llama", "norm: RMS_NORM positions: ROTARY activation: SWIGLU kv_heads: 2"},
    {"post", "norm_placement: POST positions: SINUSOIDAL norm_bias: true attention_window: 5"},
};

class CachedAttentionTest : public ::testing::TestWithParam<ModelCase> {};
INSTANTIATE_TEST_SUITE_P(Models, CachedAttentionTest, ::testing::ValuesIn(kModels),
                         [](const auto& info) { return info.param.name; });

TEST_P(CachedAttentionTest, GivesTheLogitsOfAWholeForwardPass) {
  for (const char* passes : {"none", "flash", "flash:window=7,fuse", "flash:window=T/8", "default"}) {
    SCOPED_TRACE(passes);
    // The default's head has no logits: the same attention without it.
    const std::string whole = std::string(passes) == "default" ? "flash,fuse" : passes;
    ExpectNear(CachedLogits(GetParam().fields, passes), WholeLogits(GetParam().fields, whole), 1e-5);
  }
}

TEST_P(CachedAttentionTest, SeesWhatTheWindowLets) {
  const std::vector<float> all = CachedLogits(GetParam().fields, "flash");
  const std::vector<float> few = CachedLogits(GetParam().fields, "flash:window=3");
  // Query t sees keys t-3 ... t: the same up to position 3 alone.
  EXPECT_TRUE(std::equal(all.begin(), all.begin() + 4 * kVocab, few.begin()));
  EXPECT_FALSE(std::equal(all.begin() + 10 * kVocab, all.begin() + 11 * kVocab, few.begin() + 10 * kVocab));
}

TEST_P(CachedAttentionTest, KeepsItsMeaningInOtherPasses) {
  const std::vector<float> f32 = CachedLogits(GetParam().fields, "flash");
  ExpectNear(CachedLogits(GetParam().fields, "flash,bf16"), f32, 4e-2);
  ExpectNear(CachedLogits(GetParam().fields, "flash,bf16:residual=f32,fuse"), f32, 4e-2);
  ExpectNear(CachedLogits(GetParam().fields, "flash,fp16"), f32, 1e-2);
  ExpectNear(CachedLogits(GetParam().fields, "flash,tf32,remat,adamw8bit"), f32, 1e-6);
  // 40 classes in 64 rows; the logits that are returned are those of the 40.
  ExpectNear(CachedLogits(GetParam().fields, "flash,chunked_loss,pad_vocab"), f32, 1e-6);
  ExpectNear(CachedLogits(GetParam().fields, "flash,pad_vocab,bf16,fuse"), f32, 4e-2);
}

TEST(GenerateProgram, KeepsItsCachesInTheDtypeOfTheModel) {
  for (const auto& [passes, dtype] :
       std::map<std::string, DType>{{"none", DType::kF32}, {"bf16", DType::kBF16}, {"flash,fp16", DType::kF16}}) {
    SCOPED_TRACE(passes);
    ASSERT_OK_AND_ASSIGN(const Loaded loaded, Load(Model(kModels[1].fields), passes, "generate"));
    int caches = 0;
    for (const BoundTensor& input : loaded.program->inputs()) {
      if (input.role != Role::kCache) continue;
      EXPECT_EQ(input.type, (TensorType{dtype, {1, 2, kLength, 8}})) << input.name;
      const BoundTensor* output = loaded.program->FindOutput(input.name);
      ASSERT_NE(output, nullptr);
      EXPECT_EQ(output->data, input.data);
      ++caches;
    }
    EXPECT_EQ(caches, 4);
  }
}

// A tokenizer of letters: token i is 'a' + i; the last ends documents.
class Letters : public Tokenizer {
 public:
  explicit Letters(int64_t size) : size_(size) {
    for (int64_t i = 0; i < size; ++i) names_.push_back(std::string(1, static_cast<char>('A' + i)));
  }
  std::string name() const override { return "letters"; }
  int64_t vocab_size() const override { return size_; }
  int32_t end_of_document() const override { return static_cast<int32_t>(size_ - 1); }
  uint64_t hash() const override { return 1; }
  void EncodePart(absl::string_view text, bool, std::vector<int32_t>* ids) const override {
    for (const char c : text) ids->push_back(c - 'A');
  }
  absl::string_view TokenBytes(int32_t id) const override { return names_[static_cast<size_t>(id)]; }
  std::string Serialize() const override { return ""; }

 private:
  const int64_t size_;
  std::vector<std::string> names_;
};

class GeneratorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<Loaded> loaded = Load(Model(kModels[0].fields), "default", "generate");
    ASSERT_OK(loaded);
    loaded_ = *std::move(loaded);
    absl::StatusOr<std::unique_ptr<Generator>> generator = Generator::Create(*loaded_.executor, tokenizer_);
    ASSERT_OK(generator);
    generator_ = *std::move(generator);
  }
  Continuation MustGenerate(const std::string& prompt, const GenerateOptions& options) {
    std::string streamed;
    absl::StatusOr<Continuation> text = generator_->Generate(prompt, options, [&](absl::string_view part) {
      streamed.append(part.data(), part.size());
      return true;
    });
    EXPECT_OK(text);
    EXPECT_EQ(streamed, text->text);
    return *std::move(text);
  }

  const Letters tokenizer_{kVocab};
  Loaded loaded_;
  std::unique_ptr<Generator> generator_;
};

TEST_F(GeneratorTest, TakesTheLikeliestTokenOfEachPosition) {
  const std::string prompt = "BACH";
  const Continuation text = MustGenerate(prompt, {.sampler = {.temperature = 0}, .max_new_tokens = 3});
  ASSERT_EQ(text.tokens.size(), 3u);
  EXPECT_EQ(text.end, TextEnd::kTokens);
  EXPECT_EQ(text.prompt_tokens, 4);
  // Token by token, by hand.
  std::vector<int32_t> ids = tokenizer_.Encode(prompt);
  for (size_t position = 0; position + 1 < 7; ++position) {
    ASSERT_OK_AND_ASSIGN(const absl::Span<const float> logits,
                         generator_->Run(ids[position], static_cast<int64_t>(position)));
    if (position + 1 < ids.size()) continue;
    ids.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  EXPECT_EQ(std::vector<int32_t>(ids.begin() + 4, ids.end()), text.tokens);
}

TEST_F(GeneratorTest, EqualSeedsGiveEqualTexts) {
  const GenerateOptions options = {.sampler = {.temperature = 2, .top_k = 20, .top_p = 0.95, .seed = 5},
                                   .max_new_tokens = 16};
  const Continuation first = MustGenerate("AB", options);
  EXPECT_EQ(MustGenerate("AB", options).tokens, first.tokens);
  GenerateOptions other = options;
  other.sampler.seed = 6;
  EXPECT_NE(MustGenerate("AB", other).tokens, first.tokens);
}

TEST_F(GeneratorTest, EndsWhereThePlanHasNoPosition) {
  Continuation text = MustGenerate(std::string(20, 'A'), {.sampler = {.temperature = 0}, .max_new_tokens = 100});
  if (text.end == TextEnd::kPositions) {
    EXPECT_EQ(text.tokens.size(), 5u);  // The last one is drawn at the last position.
  }
  text.end = TextEnd::kPositions;
  EXPECT_THAT(DescribeText(text, 24), HasSubstr("the plan's 24 positions are full: compile with a larger --seq"));
  const absl::StatusOr<Continuation> too_long =
      generator_->Generate(std::string(25, 'A'), {}, [](absl::string_view) { return true; });
  EXPECT_EQ(too_long.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(too_long.status().message(), HasSubstr("the prompt has 25 tokens, the plan has 24 positions"));
}

TEST_F(GeneratorTest, AnEmptyPromptBeginsADocument) {
  EXPECT_EQ(MustGenerate("", {.max_new_tokens = 1}).prompt_tokens, 1);
}

TEST_F(GeneratorTest, WeightsThatAreNotFiniteAreAnError) {
  for (const BoundTensor& state : loaded_.executor->states()) {
    if (state.name == "final_norm.bias") *state.data_as<float>() = std::numeric_limits<float>::quiet_NaN();
  }
  const auto text = generator_->Generate("A", {}, [](absl::string_view) { return true; });
  EXPECT_EQ(text.status().code(), absl::StatusCode::kOutOfRange);
}

TEST_F(GeneratorTest, AnotherVocabularyIsRefused) {
  const Letters other(kVocab + 1);
  EXPECT_THAT(Generator::Create(*loaded_.executor, other).status().message(), HasSubstr("has 41 tokens"));
}

// --- Drawing.

// How often each token is drawn over many positions.
std::vector<double> Frequencies(const std::vector<float>& logits, const SamplerOptions& options) {
  constexpr int64_t kDraws = 40000;
  Sampler sampler(options);
  std::vector<double> counts(logits.size());
  for (int64_t i = 0; i < kDraws; ++i) counts[static_cast<size_t>(sampler.Draw(logits, i))] += 1.0 / kDraws;
  return counts;
}

const std::vector<float> kLogits = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};

void ExpectFrequencies(const SamplerOptions& options, const std::vector<double>& expected) {
  const std::vector<double> got = Frequencies(kLogits, options);
  for (size_t i = 0; i < expected.size(); ++i) {
    // Five standard deviations of a count.
    const double slack = 1e-9 + 5 * std::sqrt(expected[i] * (1 - expected[i]) / 40000);
    EXPECT_NEAR(got[i], expected[i], slack) << i;
  }
}

TEST(SamplerTest, DrawsByProbability) {
  ExpectFrequencies({}, {0.1, 0.4, 0.2, 0.3});
  ExpectFrequencies({.seed = 99}, {0.1, 0.4, 0.2, 0.3});
}

TEST(SamplerTest, TemperatureSharpensAndFlattens) {
  ExpectFrequencies({.temperature = 0.5}, {0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3});
  const double sum = std::sqrt(0.1) + std::sqrt(0.4) + std::sqrt(0.2) + std::sqrt(0.3);
  ExpectFrequencies({.temperature = 2},
                    {std::sqrt(0.1) / sum, std::sqrt(0.4) / sum, std::sqrt(0.2) / sum, std::sqrt(0.3) / sum});
  ExpectFrequencies({.temperature = 0}, {0, 1, 0, 0});
}

TEST(SamplerTest, TopKAndTopPKeepTheLikeliest) {
  ExpectFrequencies({.top_k = 2}, {0, 4.0 / 7, 0, 3.0 / 7});
  ExpectFrequencies({.top_k = 1}, {0, 1, 0, 0});
  ExpectFrequencies({.top_k = 100}, {0.1, 0.4, 0.2, 0.3});
  ExpectFrequencies({.top_p = 0.6}, {0, 4.0 / 7, 0, 3.0 / 7});
  ExpectFrequencies({.top_p = 0.75}, {0, 4.0 / 9, 2.0 / 9, 3.0 / 9});
  ExpectFrequencies({.top_p = 1e-9}, {0, 1, 0, 0});
  // p of what top_k leaves: 4/7 is less than 0.6, so both.
  ExpectFrequencies({.top_k = 2, .top_p = 0.6}, {0, 4.0 / 7, 0, 3.0 / 7});
  ExpectFrequencies({.top_k = 2, .top_p = 0.5}, {0, 1, 0, 0});
}

TEST(SamplerTest, OfEqualTokensTheFirstIsLikeliest) {
  Sampler greedy({.temperature = 0}), one({.top_k = 1});
  const std::vector<float> logits = {1, 5, 5, 2};
  EXPECT_EQ(greedy.Draw(logits, 0), 1);
  for (int64_t i = 0; i < 50; ++i) EXPECT_EQ(one.Draw(logits, i), 1);
}

// --- As a process.

TEST(GenerateCommand, TextsAndSamples) {
  const ProcessFolder folder("generate_test");
  std::string text;
  for (int i = 0; i < 400; ++i) text += absl::StrCat("a river of light, a garden of stone.", i % 5 == 4 ? "\n\n" : " ");
  folder.Write("text", text);
  Outcome done = folder.Run("mtcorpus prep --input text --out corpus --tokenizer char");
  ASSERT_EQ(done.code, 0) << done.err;
  done =
      folder.Run("mtc compile tiny_char --data corpus --set layers=1,width=32,heads=2 --batch 8 --seq 64 -o tiny.plan");
  ASSERT_EQ(done.code, 0) << done.err;
  const std::string train = "mtrun tiny.plan --data corpus --steps 120 --lr 1e-2 --log-every 60 --out ";
  done = folder.Run(train + "plain");
  ASSERT_EQ(done.code, 0) << done.err;

  // Samples change nothing of the run.
  done = folder.Run(train +
                    "sampled --sample-every 60 --sample-prompt 'a gar' --max-new-tokens 9 --temperature 0 "
                    "--tensorboard");
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_THAT(done.out, HasSubstr("step 120 | sample: a garden of st"));
  EXPECT_THAT(done.out, HasSubstr("step 60 | sample: a gar"));
  EXPECT_EQ(folder.Read("sampled/model.safetensors"), folder.Read("plain/model.safetensors"));
  EXPECT_THAT(folder.Read("sampled/metrics.jsonl"), HasSubstr("\"sample\":\"a garden of st\""));
  EXPECT_THAT(folder.Run("cat sampled/events.out.tfevents.*").out, HasSubstr("a garden of st"));

  const std::string generate = "mtrun tiny.plan --data corpus --init plain ";
  done = folder.Run(generate + "--generate 'a river' --temperature 0 --max-new-tokens 9");
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(done.out, "a river of light\n");
  EXPECT_THAT(done.err, HasSubstr("9 tokens after a prompt of 7"));
  folder.Write("lines", "a river\nof st\n");
  done = folder.Run(generate + "--generate - --top-k 1 --max-new-tokens 3 < lines");
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_EQ(done.out, "a river of\nof stone\n");
  done = folder.Run(generate + "--generate 'a' --temperature 3 --max-new-tokens 500 --seed 3");
  ASSERT_EQ(done.code, 0) << done.err;
  EXPECT_THAT(done.err,
              AnyOf(HasSubstr("the plan's 64 positions are full"), HasSubstr("the model ended the document")));
  EXPECT_EQ(folder.Run(generate + "--generate 'a' --temperature 3 --max-new-tokens 500 --seed 3").out, done.out);
  EXPECT_NE(folder.Run(generate + "--generate 'a' --temperature 3 --max-new-tokens 500 --seed 4").out, done.out);

  folder.ExpectError("mtrun tiny.plan --data corpus --generate a", 2, HasSubstr("--generate needs a model"));
  folder.ExpectError(generate + "--generate a --top-p 0", 2, HasSubstr("--top-p 0 leaves no token"));
  folder.ExpectError(generate + "--generate " + std::string(65, 'a'), 2, HasSubstr("the prompt has 65 tokens"));
}

}  // namespace
}  // namespace mt
