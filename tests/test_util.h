// What every test needs: status matchers and the paths of the checkout.
#ifndef MT_TESTS_TEST_UTIL_H_
#define MT_TESTS_TEST_UTIL_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "ir/base/status_macros.h"

namespace mt {

// EXPECT_THAT(status, IsOk()); EXPECT_THAT(status, StatusIs(code, HasSubstr("..."))). Takes Status and StatusOr.
MATCHER(IsOk, "is OK") {
  const absl::Status status = internal::ToStatus(arg);
  *result_listener << status.ToString();
  return status.ok();
}

MATCHER_P2(StatusIs, code, message, "") {
  const absl::Status status = internal::ToStatus(arg);
  *result_listener << status.ToString();
  return status.code() == code &&
         ::testing::SafeMatcherCast<std::string>(message).Matches(std::string(status.message()));
}

}  // namespace mt

#define EXPECT_OK(expression) EXPECT_THAT(expression, ::mt::IsOk())
#define ASSERT_OK(expression) ASSERT_THAT(expression, ::mt::IsOk())
#define ASSERT_OK_AND_ASSIGN(target, expression) \
  MT_ASSERT_OK_AND_ASSIGN_INNER(MT_CONCAT(mt_status_or_, __LINE__), target, expression)
#define MT_ASSERT_OK_AND_ASSIGN_INNER(status_or, target, expression) \
  auto status_or = (expression);                                     \
  ASSERT_TRUE(status_or.ok()) << status_or.status();                 \
  target = *std::move(status_or)

#endif  // MT_TESTS_TEST_UTIL_H_
