// CHECK and DCHECK: programmer errors only; what a user can cause is an absl::Status.
// Debian 12's Abseil has no absl/log; where a newer one defines CHECK, include that header instead of this one.
#ifndef MT_IR_BASE_CHECK_H_
#define MT_IR_BASE_CHECK_H_

#include <cstdlib>
#include <iostream>
#include <sstream>

namespace mt::internal {

// Collects the message of a failed check and aborts when destroyed.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) {
    stream_ << file << ":" << line << ": check failed: " << condition << " ";
  }
  [[noreturn]] ~CheckFailure() {
    std::cerr << stream_.str() << std::endl;
    std::abort();
  }
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

struct Voidify {
  void operator&(std::ostream&) {}
};

}  // namespace mt::internal

#ifndef CHECK
#define CHECK(condition) \
  (condition) ? (void)0  \
              : ::mt::internal::Voidify() & ::mt::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()
#define CHECK_EQ(a, b) CHECK((a) == (b))
#define CHECK_NE(a, b) CHECK((a) != (b))
#define CHECK_LT(a, b) CHECK((a) < (b))
#define CHECK_LE(a, b) CHECK((a) <= (b))
#define CHECK_GT(a, b) CHECK((a) > (b))
#define CHECK_GE(a, b) CHECK((a) >= (b))
#define CHECK_OK(expression) CHECK((expression).ok())
#endif

#endif  // MT_IR_BASE_CHECK_H_
