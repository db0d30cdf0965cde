#include "ir/base/units.h"

#include "tests/test_util.h"

namespace mt {
namespace {

using ::testing::HasSubstr;

TEST(Units, ParsesBytes) {
  EXPECT_EQ(*ParseBytes("8GiB"), int64_t{8} << 30);
  EXPECT_EQ(*ParseBytes("512 MiB"), int64_t{512} << 20);
  EXPECT_EQ(*ParseBytes("1.5KiB"), 1536);
  EXPECT_EQ(*ParseBytes("100"), 100);
  EXPECT_EQ(*ParseBytes("7B"), 7);
}

TEST(Units, RefusesWhatIsNotBytesAndSuggests) {
  EXPECT_THAT(ParseBytes("8Gb"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("did you mean 8GiB?")));
  EXPECT_THAT(ParseBytes("24G"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("24GiB")));
  EXPECT_FALSE(ParseBytes("").ok());
  EXPECT_FALSE(ParseBytes("GiB").ok());
  EXPECT_FALSE(ParseBytes("-1GiB").ok());
  EXPECT_FALSE(ParseBytes("1.3B").ok());
  EXPECT_FALSE(ParseBytes("99999999999999TiB").ok());
  EXPECT_FALSE(ParseBytes("nan").ok());
}

TEST(Units, PrintsForPeopleAndExactly) {
  EXPECT_EQ(FormatBytes(int64_t{8} << 30), "8.0 GiB");
  EXPECT_EQ(FormatBytes(100), "100 B");
  for (const int64_t bytes : {int64_t{0}, int64_t{1000}, int64_t{1} << 20, (int64_t{3} << 30) + 1}) {
    EXPECT_EQ(*ParseBytes(CanonicalBytes(bytes)), bytes);
  }
  EXPECT_EQ(FormatCount(134367744), "134,367,744");
  EXPECT_EQ(FormatCount(-1000), "-1,000");
  EXPECT_EQ(FormatDuration(83.2), "0:01:23");
}

}  // namespace
}  // namespace mt
