// Module <-> graph.proto, one to one.
#ifndef MT_IR_GRAPH_IO_H_
#define MT_IR_GRAPH_IO_H_

#include <memory>

#include "absl/status/statusor.h"
#include "ir/graph.h"
#include "proto/graph.pb.h"

namespace mt {

proto::ModuleProto ToProto(const Module& module);
proto::TensorTypeProto ToProto(const TensorType& type);
proto::AttrProto ToProto(absl::string_view name, const AttrValue& value);

// Untrusted input: sizes, names, cycles and types are checked; the result passed VerifyModule. Errors: InvalidArgument.
absl::StatusOr<std::unique_ptr<Module>> ModuleFromProto(const proto::ModuleProto& proto);
absl::StatusOr<TensorType> TypeFromProto(const proto::TensorTypeProto& proto);
// Attributes as written (not completed). Errors: InvalidArgument for one without a value or twice the same name.
absl::StatusOr<Attrs> AttrsFromProto(const google::protobuf::RepeatedPtrField<proto::AttrProto>& attrs);

}  // namespace mt

#endif  // MT_IR_GRAPH_IO_H_
