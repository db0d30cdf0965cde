// The initial value of a state, from (seed, state name, element) alone: the same whatever passes, target or rank.
#ifndef MT_IR_INITIAL_VALUE_H_
#define MT_IR_INITIAL_VALUE_H_

#include <cstdint>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/graph.h"

namespace mt {

// Fills `out` with elements first..first+out.size()-1 (row-major over the logical dims).
//   normal: Box-Muller in f64 from Philox words. With name hash h = Fnv1a(name): key = (seed low, seed high), counter =
//   (element / 2 low, element / 2 high, h low, h high); u1 = (w0 + 1) / 2^32, u2 = w1 / 2^32, r = sqrt(-2 ln u1);
//   even elements r cos(2 pi u2), odd elements r sin(2 pi u2); times stddev, rounded to f32 once.
void InitialValues(const Init& init, uint64_t seed, absl::string_view name, int64_t first, absl::Span<float> out);

}  // namespace mt

#endif  // MT_IR_INITIAL_VALUE_H_
