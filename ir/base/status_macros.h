// RETURN_IF_ERROR, ASSIGN_OR_RETURN and Annotate: absl::Status without noise.
#ifndef MT_IR_BASE_STATUS_MACROS_H_
#define MT_IR_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace mt {

// Prefixes the message of an error with `context` and ": "; OK stays OK.
inline absl::Status Annotate(absl::Status status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

namespace internal {
inline absl::Status ToStatus(absl::Status status) { return status; }
template <typename T>
absl::Status ToStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}
}  // namespace internal

}  // namespace mt

#define MT_CONCAT_INNER(a, b) a##b
#define MT_CONCAT(a, b) MT_CONCAT_INNER(a, b)

#ifndef RETURN_IF_ERROR
#define RETURN_IF_ERROR(expression)                                \
  do {                                                             \
    absl::Status mt_status = ::mt::internal::ToStatus(expression); \
    if (!mt_status.ok()) return mt_status;                         \
  } while (false)
#endif

#ifndef ASSIGN_OR_RETURN
#define ASSIGN_OR_RETURN(target, expression) \
  MT_ASSIGN_OR_RETURN_INNER(MT_CONCAT(mt_status_or_, __LINE__), target, expression)
#define MT_ASSIGN_OR_RETURN_INNER(status_or, target, expression) \
  auto status_or = (expression);                                 \
  if (!status_or.ok()) return std::move(status_or).status();     \
  target = *std::move(status_or)
#endif

#endif  // MT_IR_BASE_STATUS_MACROS_H_
