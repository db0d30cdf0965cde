// The texts that mtrun generates: --generate, and --sample-every while a run trains.
#ifndef MT_RUNTIME_TRAIN_SAMPLES_H_
#define MT_RUNTIME_TRAIN_SAMPLES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/base/flags.h"
#include "runtime/data/tokenizer.h"
#include "runtime/executor.h"
#include "runtime/train/generate.h"

namespace mt {

// --generate: its text, or each line of stdin for "-", goes on, on stdout as it is drawn; what there is to say of it on
// stderr. Errors: as Generator's; Cancelled where `interrupted`.
absl::Status GenerateTexts(Executor& executor, const Tokenizer& tokenizer, const ParsedArgs& args,
                           const std::function<bool()>& interrupted);

// --sample-every and --sample-prompt.
class Samples {
 public:
  // Null where none are asked for. `tokenizer` must outlive it. Errors: InvalidArgument (a flag's value).
  static absl::StatusOr<std::unique_ptr<Samples>> Create(const Tokenizer& tokenizer, const ParsedArgs& args);

  // The plan to generate with from here on.
  absl::Status Use(Executor& executor);
  bool DueAfter(int64_t step) const { return step % every_ == 0; }
  // The prompt and what goes on, valid UTF-8. REQUIRES: Use.
  absl::StatusOr<std::string> Take();

 private:
  explicit Samples(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  const Tokenizer& tokenizer_;
  int64_t every_ = 1;
  std::string prompt_;
  GenerateOptions options_;
  std::unique_ptr<Generator> generator_;
};

}  // namespace mt

#endif  // MT_RUNTIME_TRAIN_SAMPLES_H_
