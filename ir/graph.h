// Graphs of ops over typed values, and the module of programs that read and write the same states.
//
// Purely functional: states come in as inputs and leave as outputs that donate their input's buffer. Edges change
// through Graph alone, so use lists are always right.
#ifndef MT_IR_GRAPH_H_
#define MT_IR_GRAPH_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "ir/attrs.h"
#include "ir/op.h"
#include "ir/tensor_type.h"

namespace mt {

class Graph;
class Node;

// One result of one node. Cheap, hashable, comparable by (node id, index) through ValueOrder.
struct Value {
  Node* node = nullptr;
  int index = 0;

  explicit operator bool() const { return node != nullptr; }
  const TensorType& type() const;
  friend bool operator==(const Value& a, const Value& b) { return a.node == b.node && a.index == b.index; }
  friend bool operator!=(const Value& a, const Value& b) { return !(a == b); }
  template <typename H>
  friend H AbslHashValue(H h, const Value& v) {
    return H::combine(std::move(h), v.node, v.index);
  }
};

// What an input is. Data: batches from the loader. Step: scalars that mtrun sets each step (StepInputs). Cache: what a
// program keeps from one of its runs to the next, as long as no other program runs; an output of its name takes it
// over. The others are states of the module; gradients: sums over the microbatches of a step.
enum class Role : uint8_t { kData, kStep, kCache, kParameter, kOptimizerState, kGradient };
absl::string_view RoleName(Role role);  // "data", "step", "cache", "parameter", "optimizer_state", "gradient"
std::optional<Role> ParseRole(absl::string_view name);
inline bool IsState(Role role) { return role >= Role::kParameter; }
// Whether an output may take over the input's buffer: states and caches.
inline bool IsDonated(Role role) { return role >= Role::kCache; }

enum class Phase : uint8_t { kForward, kBackward, kOptimizer };
absl::string_view PhaseName(Phase phase);  // "forward", "backward", "optimizer"
std::optional<Phase> ParsePhase(absl::string_view name);

// Where a graph stands in the pipeline: as built, with gradients, with updates.
enum class Stage : uint8_t { kForward, kTraining, kOptimized };
absl::string_view StageName(Stage stage);  // "forward", "training", "optimized"
std::optional<Stage> ParseStage(absl::string_view name);

// A read of a value: operand `operand` of `node`.
struct Use {
  Node* node;
  int operand;
};

class Node {
 public:
  int64_t id() const { return id_; }        // Creation order within the graph; never reused.
  const OpDef& op() const { return *op_; }  // Inputs have the op named "input".
  bool is_input() const { return is_input_; }
  Role role() const { return role_; }  // REQUIRES: is_input().
  const std::string& name() const {
    return name_;
  }  // Path in the model ("h0.attn.qkv"); inputs: unique, the state's name.
  Phase phase() const { return phase_; }
  const Node* recompute_of() const { return recompute_of_; }  // The node this one repeats, or null.
  // Name of the pass that made it, "" for the model's builder; for reports: no part of text, fingerprint or equality.
  const std::string& made_by() const { return made_by_; }
  const Attrs& attrs() const { return attrs_; }  // Complete: defaults filled in.
  absl::Span<const Value> operands() const { return operands_; }
  absl::Span<const TensorType> result_types() const { return result_types_; }
  std::vector<TensorType> operand_types() const;
  int num_results() const { return static_cast<int>(result_types_.size()); }
  Value result(int index = 0) { return Value{this, index}; }
  Value result(int index = 0) const { return Value{const_cast<Node*>(this), index}; }
  // Reads of any result of this node by other nodes; graph outputs are not among them.
  absl::Span<const Use> uses() const { return uses_; }

 private:
  friend class Graph;
  int64_t id_ = 0;
  const OpDef* op_ = nullptr;
  bool is_input_ = false;
  Role role_ = Role::kData;
  Phase phase_ = Phase::kForward;
  const Node* recompute_of_ = nullptr;
  int64_t num_repeats_ = 0;  // Nodes that are recompute_of this one.
  std::string name_;
  std::string made_by_;
  Attrs attrs_;
  std::vector<Value> operands_;
  std::vector<TensorType> result_types_;
  std::vector<Use> uses_;
};

inline const TensorType& Value::type() const { return node->result_types()[static_cast<size_t>(index)]; }

struct Output {
  Value value;
  std::string name;         // "loss", or the name of the state that is written.
  Node* donates = nullptr;  // The input, a state or cache, whose buffer this output takes over. Null: a metric.
};

class Graph {
 public:
  explicit Graph(std::string name) : name_(std::move(name)) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  std::unique_ptr<Graph> Clone() const;  // Same ids.

  const std::string& name() const { return name_; }
  Stage stage() const { return stage_; }
  void set_stage(Stage stage) { stage_ = stage; }
  // The phase that AddNode gives to new nodes.
  void set_phase(Phase phase) { phase_ = phase; }
  Phase phase() const { return phase_; }
  // The Node::made_by that AddNode gives to new nodes; the pass manager sets it.
  void set_made_by(absl::string_view pass) { made_by_ = std::string(pass); }

  // Errors: InvalidArgument (duplicate name, bad type).
  absl::StatusOr<Value> AddInput(absl::string_view name, const TensorType& type, Role role);
  // Completes `attrs`, infers the result types. Errors: InvalidArgument, prefixed with op and name.
  absl::StatusOr<Node*> AddNode(const OpDef& op, absl::Span<const Value> operands, Attrs attrs,
                                absl::string_view name = "");
  // A copy of `node` with other operands, marked recompute_of `node` if `recompute`; phase, name, made_by and
  // attributes kept.
  absl::StatusOr<Node*> CloneNode(const Node& node, absl::Span<const Value> operands, bool recompute);

  Node* FindInput(absl::string_view name) const;  // Null where there is none.
  absl::Span<Node* const> inputs() const { return inputs_; }
  // REQUIRES: no uses, not an output.
  void RemoveInput(Node* input);

  const std::vector<Output>& outputs() const { return outputs_; }
  void AddOutput(Value value, absl::string_view name, Node* donates = nullptr) {
    outputs_.push_back({value, std::string(name), donates});
  }
  void SetOutputs(std::vector<Output> outputs) { outputs_ = std::move(outputs); }
  const Output* FindOutput(absl::string_view name) const;

  void SetOperand(Node* node, int operand, Value value);  // REQUIRES: same type.
  void SetNodeName(Node* node, absl::string_view name);
  void SetNodePhase(Node* node, Phase phase) { node->phase_ = phase; }
  void SetNodeRecomputeOf(Node* node, const Node* original);
  // Rewrites operands and outputs; `except` keeps its operands. REQUIRES: same type.
  void ReplaceAllUses(Value from, Value to, const Node* except = nullptr);
  // REQUIRES: no uses, not an output.
  void RemoveNode(Node* node);
  bool IsOutput(const Node* node) const;

  // All nodes, inputs first, by id.
  std::vector<Node*> Nodes() const;
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()); }
  // Inputs in their order, then the other nodes so that operands come first; among the ready ones the smallest id.
  // Nodes on a cycle (a corrupted graph) are left out: the verifier compares the count.
  std::vector<Node*> TopologicalOrder() const;
  // Hash of what the text form says: equal graphs, equal fingerprints, whatever the ids.
  uint64_t Fingerprint() const;

 private:
  void AddUses(Node* node);
  void DropUse(Value value, Node* user, int operand);
  void CountRepeat(const Node* original, int64_t change);

  std::string name_;
  Stage stage_ = Stage::kForward;
  Phase phase_ = Phase::kForward;
  std::string made_by_;
  int64_t next_id_ = 0;
  std::map<int64_t, std::unique_ptr<Node>> nodes_;  // By id.
  std::vector<Node*> inputs_;
  absl::flat_hash_map<std::string, Node*> input_of_;  // By name.
  std::vector<Output> outputs_;
};

// How a state starts. Weights come from (seed, name, element): see InitialValue in ir/initial_value.h.
struct Init {
  enum class Kind : uint8_t { kZeros, kOnes, kNormal, kConstant };
  Kind kind = Kind::kZeros;
  double stddev = 0;             // kNormal
  double value = 0;              // kConstant
  std::string ToString() const;  // "zeros", "ones", "normal(0.02)", "constant(65536.0)"
  friend bool operator==(const Init& a, const Init& b) {
    return a.kind == b.kind && a.stddev == b.stddev && a.value == b.value;
  }
};
absl::StatusOr<Init> ParseInit(absl::string_view text);

// A tensor that outlives a step.
struct State {
  std::string name;   // "h0.attn.qkv.weight"; optimizer states: "adamw.m.h0.attn.qkv.weight"
  TensorType type;    // Physical.
  Dims logical_dims;  // What a user sees; equal to type.dims unless padded.
  Role role = Role::kParameter;
  Init init;
};

// Programs over one table of states.
class Module {
 public:
  explicit Module(std::string name) : name_(std::move(name)) {}
  std::unique_ptr<Module> Clone() const;

  const std::string& name() const { return name_; }

  // Errors: InvalidArgument (duplicate name, bad type).
  absl::Status AddState(State state);
  const State* FindState(absl::string_view name) const;
  const std::vector<State>& states() const { return states_; }
  State* MutableState(absl::string_view name);

  // "train", "eval", "generate", ...; in this order in text.
  Graph* AddGraph(absl::string_view name);  // REQUIRES: no such graph yet.
  Graph* AddGraph(std::unique_ptr<Graph> graph);
  Graph* FindGraph(absl::string_view name) const;
  // Graph::set_made_by of all graphs, also of those that AddGraph will add.
  void set_made_by(absl::string_view pass);
  const std::vector<std::unique_ptr<Graph>>& graphs() const { return graphs_; }

  // Facts about the model that tools print and the runtime checks: "vocab_size", "sequence", "batch", "layers", ...
  std::map<std::string, int64_t>& facts() { return facts_; }
  const std::map<std::string, int64_t>& facts() const { return facts_; }
  int64_t fact(absl::string_view name, int64_t otherwise = 0) const;

  int64_t num_parameters() const;  // Logical elements of all states of role kParameter.
  uint64_t Fingerprint() const;    // Of states, facts and graphs.

 private:
  std::string name_;
  void IndexStates();

  std::vector<State> states_;
  absl::flat_hash_map<std::string, size_t> state_of_;  // By name.
  std::vector<size_t> given_away_;                     // By MutableState, since they were indexed: names may be others.
  std::vector<std::unique_ptr<Graph>> graphs_;
  std::string made_by_;
  std::map<std::string, int64_t> facts_;
};

}  // namespace mt

#endif  // MT_IR_GRAPH_H_
