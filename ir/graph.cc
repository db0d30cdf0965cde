#include "ir/graph.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <queue>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "ir/base/check.h"
#include "ir/base/hash.h"
#include "ir/base/status_macros.h"

namespace mt {
namespace {

// The row of graph inputs. It is in no family: nobody can write it as a node.
const OpDef kInputOp = {.name = "input", .summary = "A graph input.", .operands = {}, .results = {}};

template <typename Enum, size_t kCount>
std::optional<Enum> ParseEnum(absl::string_view name, const absl::string_view (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name) return static_cast<Enum>(i);
  }
  return std::nullopt;
}

// Hashes everything that the text form says, without writing it; the same on every run and machine.
class Fingerprinter {
 public:
  void Word(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x9e3779b97f4a7c15u;
    hash_ ^= hash_ >> 29;
  }
  void Bytes(absl::string_view bytes) {
    Word(bytes.size());
    hash_ = Fnv1a(bytes, hash_);
  }
  void Type(const TensorType& type) {
    Word(static_cast<uint64_t>(type.dtype));
    Word(type.dims.size());
    for (const int64_t dim : type.dims) Word(static_cast<uint64_t>(dim));
  }
  void Attr(const AttrValue& value) {
    Word(value.index());
    switch (KindOf(value)) {
      case AttrKind::kBool:
        return Word(std::get<bool>(value) ? 1 : 0);
      case AttrKind::kInt:
        return Word(static_cast<uint64_t>(std::get<int64_t>(value)));
      case AttrKind::kDouble:
        return Word(std::bit_cast<uint64_t>(std::get<double>(value)));
      case AttrKind::kString:
        return Bytes(std::get<std::string>(value));
      case AttrKind::kDType:
        return Word(static_cast<uint64_t>(std::get<DType>(value)));
      case AttrKind::kIntList:
        Word(std::get<IntList>(value).size());
        for (const int64_t item : std::get<IntList>(value)) Word(static_cast<uint64_t>(item));
    }
  }
  uint64_t hash() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

constexpr absl::string_view kRoleNames[] = {"data", "step", "cache", "parameter", "optimizer_state", "gradient"};
constexpr absl::string_view kPhaseNames[] = {"forward", "backward", "optimizer"};
constexpr absl::string_view kStageNames[] = {"forward", "training", "optimized"};

}  // namespace

absl::string_view RoleName(Role role) { return kRoleNames[static_cast<size_t>(role)]; }
std::optional<Role> ParseRole(absl::string_view name) { return ParseEnum<Role>(name, kRoleNames); }
absl::string_view PhaseName(Phase phase) { return kPhaseNames[static_cast<size_t>(phase)]; }
std::optional<Phase> ParsePhase(absl::string_view name) { return ParseEnum<Phase>(name, kPhaseNames); }
absl::string_view StageName(Stage stage) { return kStageNames[static_cast<size_t>(stage)]; }
std::optional<Stage> ParseStage(absl::string_view name) { return ParseEnum<Stage>(name, kStageNames); }

std::vector<TensorType> Node::operand_types() const {
  std::vector<TensorType> types;
  types.reserve(operands_.size());
  for (const Value& operand : operands_) types.push_back(operand.type());
  return types;
}

std::unique_ptr<Graph> Graph::Clone() const {
  auto clone = std::make_unique<Graph>(name_);
  clone->stage_ = stage_;
  clone->phase_ = phase_;
  clone->made_by_ = made_by_;
  clone->next_id_ = next_id_;
  absl::flat_hash_map<const Node*, Node*> copies;
  for (const auto& [id, node] : nodes_) {
    auto copy = std::make_unique<Node>(*node);
    copies[node.get()] = copy.get();
    clone->nodes_.emplace(id, std::move(copy));
  }
  for (const auto& [id, node] : clone->nodes_) {
    for (Value& operand : node->operands_) operand.node = copies.at(operand.node);
    for (Use& use : node->uses_) use.node = copies.at(use.node);
    if (node->recompute_of_ != nullptr) {
      const auto original = copies.find(node->recompute_of_);
      node->recompute_of_ = original == copies.end() ? nullptr : original->second;
    }
  }
  for (Node* input : inputs_) clone->inputs_.push_back(copies.at(input));
  for (const auto& [name, input] : input_of_) clone->input_of_[name] = copies.at(input);
  for (const Output& output : outputs_) {
    clone->outputs_.push_back({Value{copies.at(output.value.node), output.value.index}, output.name,
                               output.donates == nullptr ? nullptr : copies.at(output.donates)});
  }
  return clone;
}

absl::StatusOr<Value> Graph::AddInput(absl::string_view name, const TensorType& type, Role role) {
  RETURN_IF_ERROR(Annotate(CheckTensorType(type), absl::StrCat("input ", name)));
  if (name.empty() || FindInput(name) != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("graph @", name_, ": input \"", name, "\" ",
                                                   name.empty() ? "has no name" : "exists already; names are unique"));
  }
  auto node = std::make_unique<Node>();
  node->id_ = next_id_++;
  node->op_ = &kInputOp;
  node->is_input_ = true;
  node->role_ = role;
  node->name_ = std::string(name);
  node->result_types_ = {type};
  Node* raw = node.get();
  inputs_.push_back(raw);
  input_of_[raw->name_] = raw;
  nodes_.emplace(raw->id_, std::move(node));
  return raw->result();
}

absl::StatusOr<Node*> Graph::AddNode(const OpDef& op, absl::Span<const Value> operands, Attrs attrs,
                                     absl::string_view name) {
  std::vector<TensorType> types;
  types.reserve(operands.size());
  for (const Value& operand : operands) {
    CHECK(operand.node != nullptr) << op.name;
    types.push_back(operand.type());
  }
  absl::StatusOr<std::vector<TensorType>> results = InferTypes(op, types, attrs);
  if (!results.ok()) {
    return Annotate(results.status(), name.empty() ? std::string(op.name) : absl::StrCat(op.name, " \"", name, "\""));
  }
  auto node = std::make_unique<Node>();
  node->id_ = next_id_++;
  node->op_ = &op;
  node->phase_ = phase_;
  node->name_ = std::string(name);
  node->made_by_ = made_by_;
  node->attrs_ = std::move(attrs);
  node->operands_.assign(operands.begin(), operands.end());
  node->result_types_ = *std::move(results);
  Node* raw = node.get();
  AddUses(raw);
  nodes_.emplace(raw->id_, std::move(node));
  return raw;
}

absl::StatusOr<Node*> Graph::CloneNode(const Node& node, absl::Span<const Value> operands, bool recompute) {
  ASSIGN_OR_RETURN(Node * copy, AddNode(node.op(), operands, node.attrs(), node.name()));
  copy->phase_ = node.phase();
  copy->made_by_ = node.made_by();
  if (recompute) SetNodeRecomputeOf(copy, node.recompute_of() != nullptr ? node.recompute_of() : &node);
  return copy;
}

void Graph::AddUses(Node* node) {
  for (size_t i = 0; i < node->operands_.size(); ++i) {
    node->operands_[i].node->uses_.push_back({node, static_cast<int>(i)});
  }
}

void Graph::DropUse(Value value, Node* user, int operand) {
  std::vector<Use>& uses = value.node->uses_;
  const auto at = std::find_if(uses.begin(), uses.end(),
                               [&](const Use& use) { return use.node == user && use.operand == operand; });
  CHECK(at != uses.end());
  uses.erase(at);
}

Node* Graph::FindInput(absl::string_view name) const {
  const auto at = input_of_.find(name);
  return at == input_of_.end() ? nullptr : at->second;
}

void Graph::SetNodeName(Node* node, absl::string_view name) {
  if (node->is_input()) {
    const auto at = input_of_.find(node->name_);
    if (at != input_of_.end() && at->second == node) input_of_.erase(at);
    input_of_[std::string(name)] = node;
  }
  node->name_ = std::string(name);
}

void Graph::SetNodeRecomputeOf(Node* node, const Node* original) {
  CountRepeat(node->recompute_of_, -1);
  node->recompute_of_ = original;
  CountRepeat(original, +1);
}

void Graph::CountRepeat(const Node* original, int64_t change) {
  if (original == nullptr) return;
  const auto own = nodes_.find(original->id());
  if (own != nodes_.end() && own->second.get() == original) own->second->num_repeats_ += change;
}

const Output* Graph::FindOutput(absl::string_view name) const {
  for (const Output& output : outputs_) {
    if (output.name == name) return &output;
  }
  return nullptr;
}

void Graph::RemoveInput(Node* input) {
  CHECK(input->is_input() && input->uses().empty() && !IsOutput(input));
  inputs_.erase(std::find(inputs_.begin(), inputs_.end(), input));
  const auto at = input_of_.find(input->name());
  if (at != input_of_.end() && at->second == input) input_of_.erase(at);
  nodes_.erase(input->id());
}

void Graph::SetOperand(Node* node, int operand, Value value) {
  Value& slot = node->operands_[static_cast<size_t>(operand)];
  CHECK(slot.type() == value.type());
  DropUse(slot, node, operand);
  slot = value;
  value.node->uses_.push_back({node, operand});
}

void Graph::ReplaceAllUses(Value from, Value to, const Node* except) {
  CHECK(from.type() == to.type());
  const std::vector<Use> uses(from.node->uses_);
  for (const Use& use : uses) {
    if (use.node != except && use.node->operands()[static_cast<size_t>(use.operand)] == from) {
      SetOperand(use.node, use.operand, to);
    }
  }
  for (Output& output : outputs_) {
    if (output.value == from) output.value = to;
  }
}

bool Graph::IsOutput(const Node* node) const {
  return std::any_of(outputs_.begin(), outputs_.end(),
                     [&](const Output& output) { return output.value.node == node || output.donates == node; });
}

void Graph::RemoveNode(Node* node) {
  CHECK(!node->is_input() && node->uses().empty() && !IsOutput(node)) << node->name();
  for (size_t i = 0; i < node->operands_.size(); ++i) DropUse(node->operands_[i], node, static_cast<int>(i));
  if (node->num_repeats_ > 0) {
    for (const auto& [id, other] : nodes_) {
      if (other->recompute_of_ == node) other->recompute_of_ = nullptr;
    }
  }
  CountRepeat(node->recompute_of_, -1);
  nodes_.erase(node->id());
}

std::vector<Node*> Graph::Nodes() const {
  std::vector<Node*> all(inputs_);
  for (const auto& [id, node] : nodes_) {
    if (!node->is_input()) all.push_back(node.get());
  }
  return all;
}

std::vector<Node*> Graph::TopologicalOrder() const {
  std::vector<Node*> order(inputs_);
  absl::flat_hash_map<const Node*, int64_t> waiting;  // Operands not yet placed.
  const auto later = [](const Node* a, const Node* b) { return a->id() > b->id(); };
  std::priority_queue<Node*, std::vector<Node*>, decltype(later)> ready(later);
  for (const auto& [id, node] : nodes_) {
    if (node->is_input()) continue;
    waiting[node.get()] = static_cast<int64_t>(node->operands_.size());
    if (node->operands_.empty()) ready.push(node.get());
  }
  const auto release = [&](Node* placed) {
    for (const Use& use : placed->uses_) {
      if (--waiting.at(use.node) == 0) ready.push(use.node);
    }
  };
  for (Node* input : inputs_) release(input);
  while (!ready.empty()) {
    Node* next = ready.top();
    ready.pop();
    order.push_back(next);
    release(next);
  }
  return order;
}

uint64_t Graph::Fingerprint() const {
  Fingerprinter print;
  print.Bytes(name_);
  print.Word(static_cast<uint64_t>(stage_));
  const std::vector<Node*> order = TopologicalOrder();
  absl::flat_hash_map<const Node*, uint64_t> numbers;
  numbers.reserve(order.size());
  for (const Node* node : order) numbers.emplace(node, numbers.size());
  // Nodes on a cycle, which a verifier will find, have no number.
  const auto number = [&](const Node* node) {
    const auto at = numbers.find(node);
    return at == numbers.end() ? ~uint64_t{0} : at->second;
  };
  const auto add = [&](const Value& value) {
    print.Word(number(value.node));
    print.Word(static_cast<uint64_t>(value.index));
  };
  for (const Node* node : order) {
    print.Bytes(node->op().name);
    print.Bytes(node->name());
    print.Word(static_cast<uint64_t>(node->is_input() ? node->role() : Role::kData));
    print.Word(static_cast<uint64_t>(node->phase()));
    print.Word(number(node->recompute_of()));
    for (const auto& [name, value] : node->attrs().entries()) {
      print.Bytes(name);
      print.Attr(value);
    }
    print.Word(node->operands().size());
    for (const Value& operand : node->operands()) add(operand);
    for (const TensorType& type : node->result_types()) print.Type(type);
  }
  for (const Output& output : outputs_) {
    print.Bytes(output.name);
    add(output.value);
    print.Word(number(output.donates));
  }
  return print.hash();
}

std::string Init::ToString() const {
  switch (kind) {
    case Kind::kZeros:
      return "zeros";
    case Kind::kOnes:
      return "ones";
    case Kind::kNormal:
      return absl::StrCat("normal(", AttrValueToString(stddev), ")");
    case Kind::kConstant:
      return absl::StrCat("constant(", AttrValueToString(value), ")");
  }
  return "";
}

absl::StatusOr<Init> ParseInit(absl::string_view text) {
  if (text == "zeros") return Init{};
  if (text == "ones") return Init{.kind = Init::Kind::kOnes};
  absl::string_view inside = text;
  if (absl::ConsumePrefix(&inside, "normal(") && absl::ConsumeSuffix(&inside, ")")) {
    double stddev = 0;
    if (absl::SimpleAtod(inside, &stddev) && stddev >= 0 && stddev < 1e6) {
      return Init{.kind = Init::Kind::kNormal, .stddev = stddev};
    }
  }
  inside = text;
  if (absl::ConsumePrefix(&inside, "constant(") && absl::ConsumeSuffix(&inside, ")")) {
    double value = 0;
    if (absl::SimpleAtod(inside, &value) && std::abs(value) < 1e30) {
      return Init{.kind = Init::Kind::kConstant, .value = value};
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", text, "\" is not an initial value; expected zeros, ones, normal(STDDEV) or constant(VALUE)"));
}

std::unique_ptr<Module> Module::Clone() const {
  auto clone = std::make_unique<Module>(name_);
  clone->states_ = states_;
  clone->IndexStates();
  clone->facts_ = facts_;
  clone->made_by_ = made_by_;
  for (const auto& graph : graphs_) clone->graphs_.push_back(graph->Clone());
  return clone;
}

absl::Status Module::AddState(State state) {
  RETURN_IF_ERROR(Annotate(CheckTensorType(state.type), absl::StrCat("state ", state.name)));
  for (const size_t i : given_away_) state_of_[states_[i].name] = i;
  given_away_.clear();
  if (state.name.empty() || FindState(state.name) != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "state \"", state.name, "\" ", state.name.empty() ? "has no name" : "exists already; names are unique"));
  }
  if (!IsState(state.role)) {
    return absl::InvalidArgumentError(absl::StrCat("state ", state.name, " has role ", RoleName(state.role),
                                                   "; expected parameter, optimizer_state or gradient"));
  }
  if (state.logical_dims.empty()) state.logical_dims = state.type.dims;
  state_of_[state.name] = states_.size();
  states_.push_back(std::move(state));
  return absl::OkStatus();
}

void Module::IndexStates() {
  state_of_.clear();
  for (size_t i = 0; i < states_.size(); ++i) state_of_.emplace(states_[i].name, i);
  given_away_.clear();
}

const State* Module::FindState(absl::string_view name) const {
  const auto at = state_of_.find(name);
  if (at != state_of_.end() && states_[at->second].name == name) return &states_[at->second];
  for (const size_t i : given_away_) {
    if (states_[i].name == name) return &states_[i];
  }
  return nullptr;
}

State* Module::MutableState(absl::string_view name) {
  State* state = const_cast<State*>(FindState(name));
  if (state != nullptr) given_away_.push_back(static_cast<size_t>(state - states_.data()));
  return state;
}

Graph* Module::AddGraph(absl::string_view name) { return AddGraph(std::make_unique<Graph>(std::string(name))); }

Graph* Module::AddGraph(std::unique_ptr<Graph> graph) {
  CHECK(FindGraph(graph->name()) == nullptr) << graph->name();
  graph->set_made_by(made_by_);
  graphs_.push_back(std::move(graph));
  return graphs_.back().get();
}

void Module::set_made_by(absl::string_view pass) {
  made_by_ = std::string(pass);
  for (const auto& graph : graphs_) graph->set_made_by(pass);
}

Graph* Module::FindGraph(absl::string_view name) const {
  for (const auto& graph : graphs_) {
    if (graph->name() == name) return graph.get();
  }
  return nullptr;
}

int64_t Module::fact(absl::string_view name, int64_t otherwise) const {
  const auto at = facts_.find(std::string(name));
  return at == facts_.end() ? otherwise : at->second;
}

int64_t Module::num_parameters() const {
  int64_t total = 0;
  for (const State& state : states_) {
    if (state.role == Role::kParameter) total += TensorType{state.type.dtype, state.logical_dims}.num_elements();
  }
  return total;
}

uint64_t Module::Fingerprint() const {
  Fingerprinter print;
  print.Bytes(name_);
  for (const auto& [name, value] : facts_) {
    print.Bytes(name);
    print.Word(static_cast<uint64_t>(value));
  }
  for (const State& state : states_) {
    print.Bytes(state.name);
    print.Type(state.type);
    print.Type({state.type.dtype, state.logical_dims});
    print.Word(static_cast<uint64_t>(state.role));
    print.Word(static_cast<uint64_t>(state.init.kind));
    print.Attr(state.init.stddev);
  }
  for (const auto& graph : graphs_) print.Word(graph->Fingerprint());
  return print.hash();
}

}  // namespace mt
