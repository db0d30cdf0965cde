// Straight-line graph construction with a sticky error: the first failure is reported at the end.
#ifndef MT_IR_BUILDER_H_
#define MT_IR_BUILDER_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/graph.h"

namespace mt {

class Builder {
 public:
  explicit Builder(Graph& graph) : graph_(graph) {}

  // First error of any call, OK if none. After an error every call returns an invalid Value and adds nothing.
  const absl::Status& status() const { return status_; }
  void Fail(absl::Status status);
  Graph& graph() { return graph_; }

  // Names of new nodes are prefixed: Scope scope(builder, "h0"); ... "h0.attn".
  class Scope {
   public:
    Scope(Builder& builder, absl::string_view name);
    ~Scope();

   private:
    Builder& builder_;
    std::string saved_;
  };
  // The current prefix joined with `name`; either may be empty.
  std::string Path(absl::string_view name) const;
  void set_path(absl::string_view path) { path_ = std::string(path); }

  Value Input(absl::string_view name, const TensorType& type, Role role);
  // One result, or all of them.
  Value Op(absl::string_view op, absl::Span<const Value> operands, Attrs attrs = {}, absl::string_view name = "");
  std::vector<Value> Ops(absl::string_view op, absl::Span<const Value> operands, Attrs attrs = {},
                         absl::string_view name = "");

  // Shorthands for what gradient rules and models write most.
  Value Add(Value a, Value b) { return Op("add", {a, b}); }
  Value Mul(Value a, Value b) { return Op("mul", {a, b}); }
  Value Scale(Value x, double factor) { return Op("scale", {x}, {{"factor", factor}}); }
  Value Reshape(Value x, absl::Span<const int64_t> dims);
  Value Cast(Value x, DType to);                         // x itself where it has that dtype.
  Value SumTo(Value x, absl::Span<const int64_t> dims);  // Reduces a broadcast's gradient to `dims`.

 private:
  Graph& graph_;
  std::string path_;
  absl::Status status_;
};

}  // namespace mt

#endif  // MT_IR_BUILDER_H_
