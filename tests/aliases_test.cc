// Flags of other trainers: the whole table, what it becomes, and what is refused.
#include "ir/base/aliases.h"

#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "ir/base/flags.h"
#include "ir/base/tools.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::vector<std::string>> Expand(const std::string& line) {
  const std::vector<std::string> words = absl::StrSplit(line, ' ');
  return ExpandAliases(words);
}

TEST(AliasesTest, OfTheDocuments) {
  EXPECT_THAT(
      *Expand("train lab4 --dataset corpus --technique bf16_gradcp --bf16 --gradient-checkpointing --batch-size 64"),
      ElementsAre("train", "lab4", "--data=corpus", "--out=bf16_gradcp", "--batch=64", "--passes=bf16,remat"));
  EXPECT_THAT(*Expand("train lab4 --bf16 --flash-attn --window-size 256"),
              ElementsAre("train", "lab4", "--passes=bf16,flash:window=256"));
  EXPECT_THAT(
      *Expand("train gpt2_wide32k --use_fp16 true --use_flash_attention False --use_gradient_checkpointing=true "
              "--adjust_batch_size true --max_training_minutes 120"),
      ElementsAre("train", "gpt2_wide32k", "--batch=max", "--max-minutes=120", "--passes=fp16,remat"));
  EXPECT_THAT(*Expand("train lab4 --use_fp16 false"), ElementsAre("train", "lab4", "--passes=none"));
  EXPECT_THAT(*Expand("train lab4 --adjust-batch-size false --lr 1e-3"), ElementsAre("train", "lab4", "--lr", "1e-3"));
  EXPECT_THAT(*Expand("train --use_8bit lab4 --num-layers 6 --embedding_dim=512 --gradient-accumulation-steps 4"),
              ElementsAre("train", "lab4", "--set=layers=6", "--set=width=512", "--passes=adamw8bit,accumulate:4"));
  // Other commands, and what follows "--", are left alone.
  EXPECT_THAT(*Expand("compile lab4 --bf16"), ElementsAre("compile", "lab4", "--bf16"));
  EXPECT_THAT(*Expand("train lab4 -- --bf16"), ElementsAre("train", "lab4", "--", "--bf16"));
}

TEST(AliasesTest, Refused) {
  EXPECT_THAT(Expand("train lab4 --bf16 --passes flash"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("--bf16"), HasSubstr("--passes"))));
  EXPECT_THAT(Expand("train lab4 --use_fp16=maybe"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("--use-fp16"), HasSubstr("maybe"))));
  EXPECT_THAT(Expand("train lab4 --batch-size"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--batch-size")));
  EXPECT_THAT(Expand("train lab4 --batch-size --bf16"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("needs a value")));
}

// Each alias becomes something that the tools take, and hides no flag of theirs.
TEST(AliasesTest, EveryRow) {
  std::set<std::string> names;
  for (const FlagAlias& alias : TrainAliases()) {
    SCOPED_TRACE(alias.name);
    EXPECT_TRUE(names.insert(std::string(alias.name)).second);
    const bool truth = alias.kind == FlagAlias::kPass || alias.kind == FlagAlias::kSwitch;
    std::string value = truth ? "true" : "4";
    for (const ToolDef* tool : {&kMtc, &kMtrun}) {
      for (const FlagDef& flag : tool->flags) {
        EXPECT_NE(flag.name, alias.name);
        const bool choice = alias.kind == FlagAlias::kRename && flag.name == alias.to && flag.kind == FlagKind::kChoice;
        if (choice) value = std::string(flag.choices.substr(0, flag.choices.find('|')));
      }
    }
    ASSERT_OK_AND_ASSIGN(const std::vector<std::string> expanded,
                         ExpandAliases({"train", "lab4", absl::StrCat("--", alias.name), value}));
    EXPECT_OK(ParseArgs(kMtc, AllTools(), expanded));
  }
}

}  // namespace
}  // namespace mt
