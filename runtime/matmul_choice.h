// Which of a library's algorithms computes a matmul: the rule of the choice and what is remembered of it. Knows no
// device.
#ifndef MT_RUNTIME_MATMUL_CHOICE_H_
#define MT_RUNTIME_MATMUL_CHOICE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace mt {

// What the choice asks of the device. Errors mean that the candidate cannot be had, and leave it out.
class MatmulTrials {
 public:
  virtual ~MatmulTrials() = default;
  // A digest of all bits that candidate `i` computes from operands that are the same for each.
  virtual absl::StatusOr<uint64_t> Digest(size_t i) = 0;
  // The median of `runs` runs.
  virtual absl::StatusOr<double> Seconds(size_t i, int runs) = 0;
};

struct MatmulTrial {
  bool same_bits = false;  // As the first candidate.
  double seconds = 0;      // 0: not timed.
};

// The fastest of the `count` candidates among those that give the bits of the first, the library's own proposal: so a
// result depends neither on what was timed nor on whether it was. Another one than the first is chosen where it is
// faster by 1 % at least. One run each leaves out what takes 1.2 times the fastest; the rest, six at most, take turns.
// `trials`, if not null, gets what was seen, one a candidate; then those of other bits are timed as well. REQUIRES:
// count >= 1.
size_t ChooseMatmul(size_t count, MatmulTrials& device, std::vector<MatmulTrial>* trials = nullptr);

// The algorithms that were chosen, in one file of the user: JSON, {"format": 1, "algorithms": {PROBLEM: HEX}}, where
// PROBLEM names all that the choice depends on (see runtime/cuda/matmul_timer.h).
class MatmulCache {
 public:
  // `path` "": remembers nothing beyond this object. No file: empty. A file that is not such a cache counts as empty,
  // with a warning.
  explicit MatmulCache(std::string path);

  // The algorithm's bytes; null where the problem is new. Until the next Put.
  const std::string* Find(const std::string& problem) const;
  void Put(const std::string& problem, std::string algorithm);

  // Writes what is new into the file, beside what others put there meanwhile. A file that cannot be written is a
  // warning. Does nothing where nothing is new.
  void Save();

  // Of loading and saving: one line each, given out once.
  std::vector<std::string> TakeWarnings();

 private:
  using Entries = std::map<std::string, std::string>;
  static absl::StatusOr<Entries> Read(const std::string& path);

  const std::string path_;
  Entries entries_, added_;
  std::vector<std::string> warnings_;
  bool warned_ = false;  // That it cannot be read: then nothing more is said.
};

}  // namespace mt

#endif  // MT_RUNTIME_MATMUL_CHOICE_H_
