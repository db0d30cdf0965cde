// Fused regions: a register program over the elements, rows and columns of one matrix, what a node of op `fused` does.
//
// The region works on `rows` x `width` elements in row-major order. Each step makes one value: a number for each
// element, for each row, or one number in all. Arithmetic is in f32 (in f64 for the f64 reference), every primitive
// rounds once, and `round` steps are where the fused nodes rounded to their dtype. Sums over a row and over the rows
// are the same trees as those of the rows that are not fused, so a region gives the bits of the nodes it stands for.
#ifndef MT_IR_REGION_H_
#define MT_IR_REGION_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/scalar.h"
#include "ir/tensor_type.h"

namespace mt {

struct RegionStep {
  enum class Kind : uint8_t {
    kLoad,      // load(i): operand i of k * width elements; row r reads row r modulo k of it
    kRow,       // row(i): operand i of one element a row, or of one element for all
    kConstant,  // const(x)
    kUniform,   // uniform(i,key,n): uniform in [0,1) as UniformAt, i32[4] state in operand i, n elements in a sample
    kPrim,      // a primitive of ir/scalar.h; round(dtype,v)
    kRowSum,    // rowsum(v): sum over the row
  };
  Kind kind = Kind::kConstant;
  Prim prim = Prim::kConstant;  // kPrim
  int a = -1, b = -1, c = -1;   // Values: numbers of earlier steps.
  int64_t index = 0;            // kLoad, kRow, kUniform: operand
  double constant = 0;
  uint32_t key = 0;
  int64_t sample_elements = 1;
  DType dtype = DType::kF32;  // kRound

  int num_args() const;
  friend bool operator==(const RegionStep& a, const RegionStep& b);
  template <typename H>
  friend H AbslHashValue(H h, const RegionStep& s) {
    return H::combine(std::move(h), s.kind, s.prim, s.a, s.b, s.c, s.index, s.constant, s.key, s.sample_elements,
                      s.dtype);
  }
};

struct RegionResult {
  enum class Kind : uint8_t {
    kFull,     // full(v,type): every element; rows * width in any dimensions
    kRow,      // row(v,type): the number of each row
    kColumns,  // columns(v,type): sum over the rows, one number a column
  };
  Kind kind = Kind::kFull;
  int value = 0;
  TensorType type;  // The result is rounded to its dtype.
};

// How many numbers a value is.
enum class Extent : uint8_t { kOne, kRow, kElement };

struct Region {
  int64_t rows = 1, width = 1;
  std::vector<RegionStep> steps;
  std::vector<RegionResult> results;

  // "v0=load(0) v1=const(0.5) v2=mul(v0,v1) -> full(v2,f32[4,8])": exact; ParseRegion reads it back.
  std::string ToString() const;
  // One a step. `operands` decide whether a row(i) is one number.
  std::vector<Extent> Extents(absl::Span<const TensorType> operands) const;
  // Whether the stored `result`, one of this region, is the number that other steps read.
  bool StoresExactly(const RegionResult& result) const;
  // Whether a pass should make it: a larger one is not worth its registers and pointers.
  bool IsWorthOneKernel(size_t operands) const;
};

inline constexpr int64_t kMaxRegionOperands = 64, kMaxRegionSteps = 1024, kMaxRegionResults = 64;

// Untrusted: checks syntax, limits, that values are numbered in order and exist before they are read, extents and the
// sizes of results. Regions are kept: reading the same text again is cheap. Errors: InvalidArgument.
absl::StatusOr<std::shared_ptr<const Region>> ParseRegion(int64_t rows, int64_t width, absl::string_view text);

// Whether the operands are what the region reads, in number, dtype and size. Errors: InvalidArgument naming the step.
absl::Status CheckRegionOperands(const Region& region, absl::Span<const TensorType> operands);

// Builds a region; equal steps are one value.
class RegionBuilder {
 public:
  RegionBuilder(int64_t rows, int64_t width) { region_ = {.rows = rows, .width = width, .steps = {}, .results = {}}; }

  int Load(int64_t operand);
  int Row(int64_t operand);
  int Constant(double value);
  int RowSum(int value);
  int Round(DType dtype, int value);  // `value` itself for f32.
  int Make(Prim prim, int a, int b = -1, int c = -1);
  // The expression with operand(i) = values[i]; `operand_of[i]` is the region's operand that a random state is.
  int Compute(const Expr& expression, absl::Span<const int> values, absl::Span<const int64_t> operand_of,
              int64_t sample_elements);
  void AddResult(RegionResult::Kind kind, int value, TensorType type) {
    region_.results.push_back({kind, value, std::move(type)});
  }
  // Leaves out steps that no result needs.
  Region Build() const;

 private:
  int Add(RegionStep step);

  Region region_;
  absl::flat_hash_map<RegionStep, int> numbers_;
};

}  // namespace mt

#endif  // MT_IR_REGION_H_
