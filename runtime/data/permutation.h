// A seeded permutation of 0 ... n - 1 in O(1) memory: every epoch's order and the shuffle of documents.
#ifndef MT_RUNTIME_DATA_PERMUTATION_H_
#define MT_RUNTIME_DATA_PERMUTATION_H_

#include <cstdint>

namespace mt {

// An alternating Feistel network over the next power of two, walking the cycle until the value is below n (less than
// two rounds of it on average). Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), section 4
// and 5.
class Permutation {
 public:
  // REQUIRES: 1 <= n <= 2^62. Equal (n, seed, stream) give the same permutation on every machine.
  Permutation(int64_t n, uint64_t seed, uint64_t stream);

  int64_t size() const { return n_; }
  // REQUIRES: 0 <= index < size().
  int64_t operator()(int64_t index) const;

 private:
  uint64_t Round(uint64_t half, uint32_t round) const;

  int64_t n_;
  uint64_t seed_;
  uint64_t stream_;
  int low_bits_;  // Of the two halves; they differ by at most one bit.
  int high_bits_;
};

}  // namespace mt

#endif  // MT_RUNTIME_DATA_PERMUTATION_H_
