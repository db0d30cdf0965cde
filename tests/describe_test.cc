// The documentation of ops that `mtc ops` prints.
#include "ir/describe.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(DescribeOpTest, WhatARowSays) {
  EXPECT_THAT(DescribeOp(*FindOp("matmul")),
              AllOf(HasSubstr("matmul(a, b, bias?, accumulator?) -> y"), HasSubstr("transpose_a=false"),
                    HasSubstr("for a, b, bias?"), HasSubstr("better saved"), HasSubstr("low precision")));
  EXPECT_THAT(DescribeOp(*FindOp("dropout")),
              AllOf(HasSubstr("rate (double)"), HasSubstr("gradient       for x\n"), HasSubstr("element-wise")));
  EXPECT_THAT(DescribeOp(*FindOp("global_norm")), HasSubstr("gradient       none\n"));
  EXPECT_THAT(DescribeOp(*FindOp("reshape")), HasSubstr("a view"));
  EXPECT_THAT(DescribeOp(*FindOp("all_reduce")), HasSubstr("collective"));
  EXPECT_THAT(DescribeOp(*FindOp("gelu.grad0")), HasSubstr("dy * d gelu / d x"));
}

TEST(DescribeOpTest, EveryRowIsDocumented) {
  for (const OpDef* op : AllOps()) {
    SCOPED_TRACE(op->name);
    EXPECT_FALSE(op->summary.empty());
    for (const AttrSpec& attr : op->attrs) EXPECT_FALSE(attr.doc.empty()) << attr.name;
    EXPECT_TRUE(absl::StartsWith(DescribeOp(*op), absl::StrCat(op->name, ": ")));
  }
}

TEST(DescribeOpTest, ListsOpsButNotTheirDerivatives) {
  const std::string text = DescribeOps();
  EXPECT_THAT(text, AllOf(HasSubstr("softmax_cross_entropy_backward  "), HasSubstr("gelu "), Not(HasSubstr(".grad"))));
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, absl::MaxSplits(' ', 1));
    EXPECT_NE(FindOp(words[0]), nullptr) << line;
  }
}

}  // namespace
}  // namespace mt
