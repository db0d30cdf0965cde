// Generated text, small compiled models and loaded plans: what the runtime is tested on.
#ifndef MT_TESTS_SMALL_RUNS_H_
#define MT_TESTS_SMALL_RUNS_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "codegen/compile.h"
#include "ir/base/check.h"
#include "ir/base/file.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"
#include "models/model.h"
#include "runtime/data/prep.h"
#include "runtime/executor.h"
#include "runtime/measure.h"
#include "runtime/train/trainer.h"

namespace mt {

// Documents with blank lines between, of sentences from a few words: far from random, so that a model learns quickly.
inline std::string GeneratedText(int documents) {
  static constexpr const char* kWords[] = {"river", "stone", "light", "winter", "garden", "letter", "window", "silent"};
  std::string text;
  uint64_t state = 12345;
  for (int d = 0; d < documents; ++d) {
    for (int sentence = 0; sentence < 4; ++sentence) {
      for (int word = 0; word < 8; ++word) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        text += kWords[(state >> 60) & 7];
        text += word == 7 ? ".\n" : " ";
      }
    }
    text += "\n";
  }
  return text;
}

// A corpus of characters in `folder`/corpus, of `text`. Gives the size of its vocabulary.
inline absl::StatusOr<int64_t> PrepareCharacters(const std::string& folder, const std::string& text,
                                                 const std::vector<double>& split = {}) {
  RETURN_IF_ERROR(WriteFile(absl::StrCat(folder, "/text"), text));
  PrepOptions options;
  options.input = absl::StrCat(folder, "/text");
  options.output = absl::StrCat(folder, "/corpus");
  options.tokenizer = "char";
  if (!split.empty()) options.split = split;
  ASSIGN_OR_RETURN(const Manifest manifest, PrepareCorpus(options));
  return manifest.vocab_size;
}

// A compiled model of the zoo or file. The test's own arguments: it must compile.
inline proto::PlanProto MustCompile(const std::string& spec, const ModelOptions& options) {
  absl::StatusOr<std::unique_ptr<Module>> module = LoadModel(spec, options);
  CHECK(module.ok()) << module.status();
  absl::StatusOr<proto::PlanProto> plan = Compile(*std::move(module), {});
  CHECK(plan.ok()) << plan.status();
  return *std::move(plan);
}

inline proto::PlanProto TinyPlan(std::vector<std::string> more = {}, int64_t batch = 2, int64_t sequence = 16,
                                 int64_t vocab = 40) {
  std::vector<std::string> sets = {"layers=1", "width=32", "heads=2"};
  sets.insert(sets.end(), more.begin(), more.end());
  return MustCompile("tiny_char", {.batch = batch, .sequence = sequence, .vocab_size = vocab, .sets = sets});
}

// So many steps of a small model, with a learning rate that it bears.
inline TrainOptions Steps(int64_t steps) {
  TrainOptions options;
  options.steps = steps;
  options.scalars.lr = 3e-3;
  return options;
}

// A loaded plan and its inputs, fed without a corpus.
struct LoadedPlan {
  std::unique_ptr<Executor> executor;
  const Program* train = nullptr;
  std::optional<StepInputs> inputs;
  StepScalars scalars = {.seed = 7, .lr = 1e-2};
  int64_t tokens = 0, vocab = 0;

  // Tokens and labels that depend on the step alone; every 11th label is ignored.
  absl::Status Prepare(int64_t step = 0) {
    std::vector<int32_t> ids(static_cast<size_t>(tokens)), labels(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      const uint64_t bits = Fnv1a("token", static_cast<uint64_t>(step) * 100003 + i);
      ids[i] = static_cast<int32_t>(bits % static_cast<uint64_t>(vocab));
      labels[i] = i % 11 == 3 ? -1 : static_cast<int32_t>((bits >> 20) % static_cast<uint64_t>(vocab));
    }
    inputs->SetBatch(ids, labels);
    scalars.step = step;
    scalars.first_sample = step * 8;
    inputs->SetScalars(scalars);
    return absl::OkStatus();
  }
  absl::StatusOr<Measurement> Measure() {
    return MeasureProgram(
        *executor, *train, [this] { return Prepare(); },
        [this] {
          executor->InitializeStates(scalars.seed);
          return absl::OkStatus();
        });
  }
};

// `backend` null: the cpu's, with `threads`.
inline absl::StatusOr<std::unique_ptr<LoadedPlan>> LoadForTest(proto::PlanProto plan, int threads = 2,
                                                               std::unique_ptr<Backend> backend = nullptr) {
  auto loaded = std::make_unique<LoadedPlan>();
  if (backend == nullptr) {
    ASSIGN_OR_RETURN(backend, MakeCpuBackend(threads));
  }
  loaded->vocab = plan.facts().at("vocab_size");
  loaded->tokens = plan.facts().at("batch") * plan.facts().at("sequence");
  ASSIGN_OR_RETURN(loaded->executor, Executor::Load(std::move(plan), std::move(backend)));
  loaded->train = loaded->executor->FindProgram("train");
  ASSIGN_OR_RETURN(StepInputs inputs, StepInputs::Bind(*loaded->executor, *loaded->train, loaded->vocab));
  loaded->inputs = std::move(inputs);
  loaded->executor->InitializeStates(loaded->scalars.seed);
  return loaded;
}

}  // namespace mt

#endif  // MT_TESTS_SMALL_RUNS_H_
