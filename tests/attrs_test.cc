#include "ir/attrs.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr AttrSpec kSpecs[] = {
    {"dims", AttrKind::kIntList, "which dimensions"},      {"eps", AttrKind::kDouble, "added to the variance", "1e-05"},
    {"keep_dims", AttrKind::kBool, "keeps them", "false"}, {"label", AttrKind::kString, "a text", "\"\""},
    {"to", AttrKind::kDType, "the dtype", "f32"},          {"window", AttrKind::kInt, "a width", "-1"}};

std::string RoundTrip(const AttrValue& value) {
  const std::string text = AttrValueToString(value);
  const absl::StatusOr<AttrValue> back = ParseAttrValue(KindOf(value), text);
  EXPECT_TRUE(back.ok() && *back == value) << text;
  return text;
}

TEST(AttrsTest, TextOfEveryKind) {
  EXPECT_EQ(RoundTrip(true), "true");
  EXPECT_EQ(RoundTrip(int64_t{-3}), "-3");
  EXPECT_EQ(RoundTrip(0.5), "0.5");
  EXPECT_EQ(RoundTrip(1.0), "1.0");
  EXPECT_EQ(RoundTrip(1e30), "1e+30");
  EXPECT_EQ(RoundTrip(std::string("a \"b\"\n, }")), "\"a \\\"b\\\"\\n, }\"");
  EXPECT_EQ(RoundTrip(DType::kBF16), "bf16");
  EXPECT_EQ(RoundTrip(IntList{}), "[]");
  EXPECT_EQ(RoundTrip(IntList{1, -2}), "[1,-2]");
}

TEST(AttrsTest, DoublesReadBackExactly) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t bits = random();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isnan(value)) RoundTrip(value);
  }
  RoundTrip(std::numeric_limits<double>::denorm_min());
  RoundTrip(std::numeric_limits<double>::max());
  RoundTrip(std::numeric_limits<double>::infinity());
  RoundTrip(0.1);
  RoundTrip(static_cast<double>(0.1f));
}

TEST(AttrsTest, EveryByteOfAStringReadsBack) {
  std::string all;
  for (int c = 0; c < 256; ++c) all.push_back(static_cast<char>(c));
  RoundTrip(all);
}

TEST(AttrsTest, TextThatIsNoValueOfItsKind) {
  for (const auto& [kind, text] : std::vector<std::pair<AttrKind, std::string>>{{AttrKind::kBool, "1"},
                                                                                {AttrKind::kInt, "0.5"},
                                                                                {AttrKind::kInt, "9223372036854775808"},
                                                                                {AttrKind::kDouble, "nan"},
                                                                                {AttrKind::kDouble, ""},
                                                                                {AttrKind::kString, "plain"},
                                                                                {AttrKind::kString, "\"\\q\""},
                                                                                {AttrKind::kDType, "f31"},
                                                                                {AttrKind::kIntList, "1,2"},
                                                                                {AttrKind::kIntList, "[1,,2]"}}) {
    EXPECT_THAT(ParseAttrValue(kind, text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text))) << text;
  }
}

TEST(AttrsTest, EntriesAreSortedAndSetOverwrites) {
  Attrs attrs{{"b", int64_t{1}}, {"a", true}};
  attrs.Set("b", int64_t{2});
  EXPECT_EQ(attrs.entries().size(), 2u);
  EXPECT_EQ(attrs.entries()[0].first, "a");
  EXPECT_EQ(attrs.Int("b"), 2);
  EXPECT_EQ(attrs, (Attrs{{"a", true}, {"b", int64_t{2}}}));
  attrs.Erase("a");
  EXPECT_EQ(attrs.Find("a"), nullptr);
  EXPECT_NE(attrs, (Attrs{{"b", int64_t{3}}}));
}

TEST(AttrsTest, CompleteFillsDefaultsAndWidensInts) {
  ASSERT_OK_AND_ASSIGN(const Attrs attrs, CompleteAttrs(kSpecs, {{"dims", IntList{0}}, {"eps", int64_t{1}}}));
  EXPECT_EQ(attrs.Double("eps"), 1.0);
  EXPECT_FALSE(attrs.Bool("keep_dims"));
  EXPECT_EQ(attrs.Get<std::string>("label"), "");
  EXPECT_EQ(attrs.Get<DType>("to"), DType::kF32);
  EXPECT_EQ(attrs.Int("window"), -1);
  ASSERT_OK_AND_ASSIGN(const Attrs again, CompleteAttrs(kSpecs, attrs));
  EXPECT_EQ(again, attrs);
}

TEST(AttrsTest, CompleteNamesWhatIsWrong) {
  EXPECT_THAT(CompleteAttrs(kSpecs, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("dims"), HasSubstr("missing"))));
  EXPECT_THAT(CompleteAttrs(kSpecs, {{"dims", IntList{}}, {"eps", true}}),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("eps=true"), HasSubstr("double"))));
  EXPECT_THAT(
      CompleteAttrs(kSpecs, {{"dims", IntList{}}, {"esp", 0.5}}),
      StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("unknown attribute esp"), HasSubstr("eps"))));
  EXPECT_THAT(CompleteAttrs({}, {{"a", true}}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("known: none")));
}

TEST(AttrsTest, PrintsOnlyWhatDiffersFromTheDefaults) {
  ASSERT_OK_AND_ASSIGN(const Attrs plain, CompleteAttrs(kSpecs, {{"dims", IntList{0, 2}}}));
  EXPECT_EQ(AttrsToString(kSpecs, plain), "{dims=[0,2]}");
  ASSERT_OK_AND_ASSIGN(const Attrs more,
                       CompleteAttrs(kSpecs, {{"dims", IntList{}}, {"window", int64_t{3}}, {"to", DType::kBF16}}));
  EXPECT_EQ(AttrsToString(kSpecs, more), "{dims=[], to=bf16, window=3}");
  EXPECT_EQ(AttrsToString({}, Attrs()), "");
}

}  // namespace
}  // namespace mt
