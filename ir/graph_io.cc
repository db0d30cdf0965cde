#include "ir/graph_io.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/text.h"
#include "ir/verifier.h"

namespace mt {
namespace {

template <typename... Args>
absl::Status Bad(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

// At most 60 characters of a piece of the input, fit for a message.
std::string Shown(absl::string_view text) {
  return absl::StrCat("\"", absl::CEscape(text.substr(0, 60)), text.size() > 60 ? "..." : "", "\"");
}

absl::Status CheckCount(int64_t count, absl::string_view what, int64_t limit = kMaxInputs) {
  return count <= limit ? absl::OkStatus() : Bad(count, " ", what, "; at most ", limit, " are allowed");
}

proto::GraphProto GraphToProto(const Graph& graph) {
  proto::GraphProto out;
  out.set_name(graph.name());
  if (graph.stage() != Stage::kForward) out.set_stage(std::string(StageName(graph.stage())));
  const std::vector<Node*> order = graph.TopologicalOrder();
  // Nodes are named by their place among the nodes; no input is named so.
  absl::flat_hash_map<const Node*, std::string> ids;
  int64_t next = 0;
  for (const Node* node : order) ids[node] = node->is_input() ? node->name() : absl::StrCat(next++);
  const auto reference = [&](const Value& value) {
    const std::string& id = ids.at(value.node);
    return value.node->num_results() == 1 ? id : absl::StrCat(id, ":", value.index);
  };
  for (const Node* node : order) {
    if (node->is_input()) {
      proto::InputProto& input = *out.add_inputs();
      input.set_name(node->name());
      *input.mutable_type() = ToProto(node->result().type());
      input.set_role(std::string(RoleName(node->role())));
      continue;
    }
    proto::NodeProto& to = *out.add_nodes();
    to.set_id(ids.at(node));
    to.set_op(std::string(node->op().name));
    for (const Value& operand : node->operands()) to.add_operands(reference(operand));
    for (const auto& [name, value] : node->attrs().entries()) *to.add_attrs() = ToProto(name, value);
    to.set_name(node->name());
    for (const TensorType& type : node->result_types()) *to.add_types() = ToProto(type);
    if (node->phase() != Phase::kForward) to.set_phase(std::string(PhaseName(node->phase())));
    if (node->recompute_of() != nullptr) to.set_recompute_of(ids.at(node->recompute_of()));
  }
  for (const Output& output : graph.outputs()) {
    proto::OutputProto& to = *out.add_outputs();
    to.set_name(output.name);
    to.set_value(reference(output.value));
    if (output.donates != nullptr) to.set_donates(output.donates->name());
  }
  return out;
}

// Builds one graph; what it says about the file comes from here, the rest from the graph itself and the verifier.
class GraphReader {
 public:
  GraphReader(const proto::GraphProto& proto, Graph& graph) : proto_(proto), graph_(graph) {}

  absl::Status Run() {
    if (!proto_.stage().empty()) {
      const std::optional<Stage> stage = ParseStage(proto_.stage());
      if (!stage) return Bad(Shown(proto_.stage()), " is no stage; known: forward training optimized");
      graph_.set_stage(*stage);
    }
    RETURN_IF_ERROR(Inputs());
    ASSIGN_OR_RETURN(const std::vector<int> order, Order());
    for (const int i : order) {
      RETURN_IF_ERROR(Annotate(AddNode(proto_.nodes(i)), absl::StrCat("node ", Shown(proto_.nodes(i).id()))));
    }
    for (const proto::NodeProto& node : proto_.nodes()) {
      if (node.recompute_of().empty()) continue;
      const auto original = nodes_.find(node.recompute_of());
      if (original == nodes_.end()) {
        return Bad("node ", Shown(node.id()), ": recompute_of ", Shown(node.recompute_of()), " is no node");
      }
      graph_.SetNodeRecomputeOf(nodes_.at(node.id()), original->second);
    }
    return Outputs();
  }

 private:
  // What "ID" or "ID:INDEX" names: an input or node by its id, and which result.
  struct Reference {
    absl::string_view id;
    int index = -1;  // -1: not written.
  };

  static absl::StatusOr<Reference> ParseReference(absl::string_view text) {
    const size_t colon = text.rfind(':');
    if (colon == absl::string_view::npos) return Reference{text, -1};
    Reference reference{text.substr(0, colon), -1};
    if (!absl::SimpleAtoi(text.substr(colon + 1), &reference.index) || reference.index < 0) {
      return Bad(Shown(text), " is no value; expected ID or ID:INDEX");
    }
    return reference;
  }

  absl::Status Inputs() {
    RETURN_IF_ERROR(CheckCount(proto_.inputs_size(), "inputs"));
    RETURN_IF_ERROR(CheckCount(proto_.outputs_size(), "outputs"));
    for (const proto::InputProto& input : proto_.inputs()) {
      const std::string what = absl::StrCat("input ", Shown(input.name()));
      absl::StatusOr<TensorType> type = TypeFromProto(input.type());
      if (!type.ok()) return Annotate(type.status(), what);
      const std::optional<Role> role = ParseRole(input.role());
      if (!role)
        return Bad(what, ": ", Shown(input.role()), " is no role; known: data step parameter optimizer_state gradient");
      ASSIGN_OR_RETURN(const Value value, graph_.AddInput(input.name(), *type, *role));
      nodes_[input.name()] = value.node;
    }
    return absl::OkStatus();
  }

  // Kahn's order of the nodes, the first written first among the ready ones.
  absl::StatusOr<std::vector<int>> Order() const {
    absl::flat_hash_map<absl::string_view, int> position;
    for (int i = 0; i < proto_.nodes_size(); ++i) {
      const std::string& id = proto_.nodes(i).id();
      if (id.empty()) return Bad("node ", i, " has no id");
      if (id.find(':') != std::string::npos) return Bad("node ", Shown(id), ": an id holds no colon");
      if (nodes_.contains(id) || !position.emplace(id, i).second) {
        return Bad("two nodes or inputs have the id ", Shown(id), "; ids are unique");
      }
    }
    const size_t n = static_cast<size_t>(proto_.nodes_size());
    std::vector<std::vector<int>> readers(n);
    std::vector<int64_t> waiting(n, 0);
    for (int i = 0; i < proto_.nodes_size(); ++i) {
      for (const std::string& operand : proto_.nodes(i).operands()) {
        ASSIGN_OR_RETURN(const Reference reference, ParseReference(operand));
        const auto at = position.find(reference.id);
        if (at != position.end()) {
          readers[static_cast<size_t>(at->second)].push_back(i);
          ++waiting[static_cast<size_t>(i)];
        } else if (!nodes_.contains(reference.id)) {
          return Bad("node ", Shown(proto_.nodes(i).id()), ": operand ", Shown(operand), " is no input or node");
        }
      }
    }
    std::priority_queue<int, std::vector<int>, std::greater<int>> ready;
    for (int i = 0; i < proto_.nodes_size(); ++i) {
      if (waiting[static_cast<size_t>(i)] == 0) ready.push(i);
    }
    std::vector<int> order;
    while (!ready.empty()) {
      const int next = ready.top();
      ready.pop();
      order.push_back(next);
      for (const int reader : readers[static_cast<size_t>(next)]) {
        if (--waiting[static_cast<size_t>(reader)] == 0) ready.push(reader);
      }
    }
    if (order.size() == n) return order;
    const auto left = std::find_if(waiting.begin(), waiting.end(), [](int64_t count) { return count > 0; });
    return Bad("node ", Shown(proto_.nodes(static_cast<int>(left - waiting.begin())).id()), " is on or after a cycle");
  }

  absl::StatusOr<Value> Resolve(absl::string_view text) const {
    ASSIGN_OR_RETURN(const Reference reference, ParseReference(text));
    const auto at = nodes_.find(reference.id);
    if (at == nodes_.end()) return Bad(Shown(text), " is no input or node");
    const int count = at->second->num_results();
    if (reference.index < 0 && count != 1) {
      return Bad(Shown(text), " has ", count, " results; say which one, as in ", Shown(absl::StrCat(text, ":0")));
    }
    if (reference.index >= count) return Bad(Shown(text), " is result ", reference.index, " of ", count);
    return at->second->result(std::max(reference.index, 0));
  }

  absl::Status AddNode(const proto::NodeProto& from) {
    const OpDef* op = FindOp(from.op());
    if (op == nullptr) {
      std::vector<std::string> candidates;
      for (const OpDef* candidate : AllOps()) candidates.emplace_back(candidate->name);
      const std::string guess = from.op().size() <= 64 ? DidYouMean(from.op(), candidates) : "";
      return Bad("unknown op ", Shown(from.op()), guess.empty() ? "" : absl::StrCat("; did you mean ", guess, "?"));
    }
    std::vector<Value> operands;
    for (const std::string& operand : from.operands()) {
      ASSIGN_OR_RETURN(operands.emplace_back(), Resolve(operand));
    }
    ASSIGN_OR_RETURN(Attrs attrs, AttrsFromProto(from.attrs()));
    Phase phase = Phase::kForward;
    if (!from.phase().empty()) {
      const std::optional<Phase> parsed = ParsePhase(from.phase());
      if (!parsed) return Bad(Shown(from.phase()), " is no phase; known: forward backward optimizer");
      phase = *parsed;
    }
    // Digits alone are a number that ToProto gave to a node without a name.
    const bool numbered = from.id().find_first_not_of("0123456789") == std::string::npos;
    const std::string& name = from.name().empty() && !numbered ? from.id() : from.name();
    ASSIGN_OR_RETURN(Node * node, graph_.AddNode(*op, operands, std::move(attrs), name));
    graph_.SetNodePhase(node, phase);
    if (from.types_size() != 0 && from.types_size() != node->num_results()) {
      return Bad(from.types_size(), " types are given; ", op->name, " has ", node->num_results(), " results");
    }
    for (int i = 0; i < from.types_size(); ++i) {
      ASSIGN_OR_RETURN(const TensorType type, TypeFromProto(from.types(i)));
      if (type != node->result(i).type()) {
        return Bad("result ", i, " is written as ", type.ToString(), ", but ", op->name, " gives ",
                   node->result(i).type().ToString());
      }
    }
    nodes_[from.id()] = node;
    return absl::OkStatus();
  }

  absl::Status Outputs() {
    for (const proto::OutputProto& output : proto_.outputs()) {
      const std::string what = absl::StrCat("output ", Shown(output.name()));
      const absl::StatusOr<Value> value = Resolve(output.value());
      if (!value.ok()) return Annotate(value.status(), what);
      Node* donates = nullptr;
      if (!output.donates().empty()) {
        donates = graph_.FindInput(output.donates());
        if (donates == nullptr) return Bad(what, " donates ", Shown(output.donates()), ", which is no input");
      }
      graph_.AddOutput(*value, output.name(), donates);
    }
    return absl::OkStatus();
  }

  const proto::GraphProto& proto_;
  Graph& graph_;
  absl::flat_hash_map<std::string, Node*> nodes_;  // By id, inputs included.
};

absl::StatusOr<State> StateFromProto(const proto::StateProto& from) {
  State state;
  state.name = from.name();
  ASSIGN_OR_RETURN(state.type, TypeFromProto(from.type()));
  state.logical_dims.assign(from.logical_dims().begin(), from.logical_dims().end());
  if (!from.role().empty()) {
    const std::optional<Role> role = ParseRole(from.role());
    if (!role) return Bad(Shown(from.role()), " is no role; known: parameter optimizer_state gradient");
    state.role = *role;
  }
  if (!from.init().empty()) {
    ASSIGN_OR_RETURN(state.init, ParseInit(from.init()));
  }
  return state;
}

}  // namespace

proto::TensorTypeProto ToProto(const TensorType& type) {
  proto::TensorTypeProto out;
  out.set_dtype(std::string(DTypeName(type.dtype)));
  for (const int64_t d : type.dims) out.add_dims(d);
  return out;
}

proto::AttrProto ToProto(absl::string_view name, const AttrValue& value) {
  proto::AttrProto out;
  out.set_name(std::string(name));
  switch (KindOf(value)) {
    case AttrKind::kBool:
      out.set_bool_value(std::get<bool>(value));
      break;
    case AttrKind::kInt:
      out.set_int_value(std::get<int64_t>(value));
      break;
    case AttrKind::kDouble:
      out.set_double_value(std::get<double>(value));
      break;
    case AttrKind::kString:
      out.set_string_value(std::get<std::string>(value));
      break;
    case AttrKind::kDType:
      out.set_dtype_value(std::string(DTypeName(std::get<DType>(value))));
      break;
    case AttrKind::kIntList:
      out.mutable_ints_value();  // Present where the list is empty, too.
      for (const int64_t item : std::get<IntList>(value)) out.mutable_ints_value()->add_values(item);
      break;
  }
  return out;
}

proto::ModuleProto ToProto(const Module& module) {
  proto::ModuleProto out;
  out.set_name(module.name());
  for (const auto& [name, value] : module.facts()) (*out.mutable_facts())[name] = value;
  for (const State& state : module.states()) {
    proto::StateProto& to = *out.add_states();
    to.set_name(state.name);
    *to.mutable_type() = ToProto(state.type);
    if (state.logical_dims != state.type.dims) {
      for (const int64_t d : state.logical_dims) to.add_logical_dims(d);
    }
    to.set_role(std::string(RoleName(state.role)));
    to.set_init(state.init.ToString());
  }
  for (const auto& graph : module.graphs()) *out.add_graphs() = GraphToProto(*graph);
  return out;
}

absl::StatusOr<TensorType> TypeFromProto(const proto::TensorTypeProto& proto) {
  TensorType type;
  const std::optional<DType> dtype = ParseDType(proto.dtype());
  if (!dtype) return Bad(Shown(proto.dtype()), " is no dtype; known: f32 bf16 f16 f64 i32 u8");
  type.dtype = *dtype;
  if (proto.dims_size() > kMaxRank) {
    return Bad("a type has ", proto.dims_size(), " dimensions; at most ", kMaxRank, " are allowed");
  }
  type.dims.assign(proto.dims().begin(), proto.dims().end());
  RETURN_IF_ERROR(CheckTensorType(type));
  return type;
}

absl::StatusOr<Attrs> AttrsFromProto(const google::protobuf::RepeatedPtrField<proto::AttrProto>& attrs) {
  using proto::AttrProto;
  Attrs out;
  RETURN_IF_ERROR(CheckCount(attrs.size(), "attributes", 256));
  for (const AttrProto& attr : attrs) {
    if (attr.name().empty()) return Bad("an attribute has no name");
    if (out.Find(attr.name()) != nullptr) return Bad("attribute ", Shown(attr.name()), " is given twice");
    switch (attr.value_case()) {
      case AttrProto::kBoolValue:
        out.Set(attr.name(), attr.bool_value());
        break;
      case AttrProto::kIntValue:
        out.Set(attr.name(), int64_t{attr.int_value()});
        break;
      case AttrProto::kDoubleValue:
        if (std::isnan(attr.double_value())) return Bad("attribute ", Shown(attr.name()), " is not a number");
        out.Set(attr.name(), attr.double_value());
        break;
      case AttrProto::kStringValue:
        out.Set(attr.name(), attr.string_value());
        break;
      case AttrProto::kDtypeValue: {
        const std::optional<DType> dtype = ParseDType(attr.dtype_value());
        if (!dtype) return Bad("attribute ", Shown(attr.name()), ": ", Shown(attr.dtype_value()), " is no dtype");
        out.Set(attr.name(), *dtype);
        break;
      }
      case AttrProto::kIntsValue:
        out.Set(attr.name(), IntList(attr.ints_value().values().begin(), attr.ints_value().values().end()));
        break;
      case AttrProto::VALUE_NOT_SET:
        return Bad("attribute ", Shown(attr.name()), " has no value");
    }
  }
  return out;
}

absl::StatusOr<std::unique_ptr<Module>> ModuleFromProto(const proto::ModuleProto& proto) {
  const auto limit = [&]() -> absl::Status {
    RETURN_IF_ERROR(CheckCount(static_cast<int64_t>(proto.facts().size()), "facts"));
    RETURN_IF_ERROR(CheckCount(proto.states_size(), "states"));
    RETURN_IF_ERROR(CheckCount(proto.graphs_size(), "graphs"));
    int64_t nodes = 0;
    for (const proto::GraphProto& graph : proto.graphs()) nodes += graph.nodes_size();
    return CheckCount(nodes, "nodes", kMaxNodes);
  };
  auto module = std::make_unique<Module>(proto.name());
  RETURN_IF_ERROR(Annotate(limit(), "module"));
  for (const auto& [name, value] : proto.facts()) module->facts()[name] = value;
  for (const proto::StateProto& from : proto.states()) {
    absl::StatusOr<State> state = StateFromProto(from);
    if (!state.ok()) return Annotate(state.status(), absl::StrCat("state ", Shown(from.name())));
    RETURN_IF_ERROR(module->AddState(*std::move(state)));
  }
  for (const proto::GraphProto& from : proto.graphs()) {
    if (module->FindGraph(from.name()) != nullptr) return Bad("two graphs are named ", Shown(from.name()));
    auto graph = std::make_unique<Graph>(from.name());
    RETURN_IF_ERROR(Annotate(GraphReader(from, *graph).Run(), absl::StrCat("graph ", Shown(from.name()))));
    module->AddGraph(std::move(graph));
  }
  const absl::Status verified = VerifyModule(*module);
  if (!verified.ok()) return absl::InvalidArgumentError(verified.message());
  return module;
}

}  // namespace mt
