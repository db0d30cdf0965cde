#include "ir/builder.h"

#include "absl/strings/str_cat.h"

namespace mt {

void Builder::Fail(absl::Status status) {
  if (status_.ok()) status_ = std::move(status);
}

Builder::Scope::Scope(Builder& builder, absl::string_view name) : builder_(builder), saved_(builder.path_) {
  builder.path_ = builder.Path(name);
}

Builder::Scope::~Scope() { builder_.path_ = saved_; }

std::string Builder::Path(absl::string_view name) const {
  if (path_.empty()) return std::string(name);
  if (name.empty()) return path_;
  return absl::StrCat(path_, ".", name);
}

Value Builder::Input(absl::string_view name, const TensorType& type, Role role) {
  if (!status_.ok()) return Value{};
  if (Node* input = graph_.FindInput(name); input != nullptr && input->role() == role) {
    if (input->result_types()[0] == type) return input->result();
    Fail(absl::InvalidArgumentError(absl::StrCat("input ", name, " is ", input->result_types()[0].ToString(),
                                                 "; asked for again as ", type.ToString())));
    return Value{};
  }
  absl::StatusOr<Value> value = graph_.AddInput(name, type, role);
  if (!value.ok()) {
    Fail(value.status());
    return Value{};
  }
  return *value;
}

std::vector<Value> Builder::Ops(absl::string_view op, absl::Span<const Value> operands, Attrs attrs,
                                absl::string_view name) {
  if (!status_.ok()) return {};
  const OpDef* row = FindOp(op);
  if (row == nullptr) {
    Fail(absl::InvalidArgumentError(absl::StrCat("unknown op \"", op, "\" at \"", Path(name), "\"")));
    return {};
  }
  for (const Value& operand : operands) {
    if (!operand) {
      Fail(absl::InternalError(absl::StrCat(op, " \"", Path(name), "\": an operand is absent")));
      return {};
    }
  }
  absl::StatusOr<Node*> node = graph_.AddNode(*row, operands, std::move(attrs), Path(name));
  if (!node.ok()) {
    Fail(node.status());
    return {};
  }
  std::vector<Value> results;
  for (int i = 0; i < (*node)->num_results(); ++i) results.push_back((*node)->result(i));
  return results;
}

Value Builder::Op(absl::string_view op, absl::Span<const Value> operands, Attrs attrs, absl::string_view name) {
  const std::vector<Value> results = Ops(op, operands, std::move(attrs), name);
  return results.empty() ? Value{} : results[0];
}

Value Builder::Reshape(Value x, absl::Span<const int64_t> dims) {
  if (x && Dims(dims.begin(), dims.end()) == x.type().dims) return x;
  return Op("reshape", {x}, {{"dims", IntList(dims.begin(), dims.end())}});
}

Value Builder::Cast(Value x, DType to) {
  if (x && x.type().dtype == to) return x;
  return Op("cast", {x}, {{"to", to}});
}

Value Builder::SumTo(Value x, absl::Span<const int64_t> dims) {
  if (!x || !status_.ok()) return Value{};
  const Dims target(dims.begin(), dims.end());
  if (x.type().dims == target) return x;
  const int64_t missing = x.type().rank() - static_cast<int64_t>(dims.size());
  if (missing < 0) {
    Fail(absl::InternalError(absl::StrCat("cannot sum ", x.type().ToString(), " to ", DimsToString(dims))));
    return Value{};
  }
  IntList summed;
  for (int64_t i = 0; i < x.type().rank(); ++i) {
    if (i < missing || (dims[static_cast<size_t>(i - missing)] == 1 && x.type().dim(i) != 1)) summed.push_back(i);
  }
  if (!summed.empty()) x = Op("reduce_sum", {x}, {{"dims", summed}});
  return Reshape(x, dims);
}

}  // namespace mt
