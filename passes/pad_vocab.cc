// The rows of the vocabulary to a multiple that matmuls like.
#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "ir/base/status_macros.h"
#include "ir/tensor_type.h"
#include "passes/head.h"
#include "passes/registry.h"

namespace mt {
namespace {

constexpr absl::string_view kName = "pad_vocab";
constexpr int64_t kDefaultMultiple = 64, kMaxMultiple = 1 << 20;

int64_t RoundUp(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }
bool IsOp(const Node& node, absl::string_view op) { return !node.is_input() && node.op().name == op; }
// x w^T without a cross entropy behind it: a program that returns logits.
bool IsProjection(const Node& node, int operand) {
  return IsOp(node, "matmul") && operand == 1 && !node.attrs().Bool("transpose_a") &&
         node.attrs().Bool("transpose_b") && node.operands().size() == 2;
}
bool IsTable(const Node& node, int operand) { return IsOp(node, "embedding") && operand == 0; }
// Whether nothing but embeddings reads the parameter.
bool IsTableAlone(const Module& module, absl::string_view parameter) {
  for (const auto& graph : module.graphs()) {
    const Node* input = graph->FindInput(parameter);
    if (input == nullptr) continue;
    if (graph->IsOutput(input)) return false;
    for (const Use& use : input->uses()) {
      if (!IsTable(*use.node, use.operand)) return false;
    }
  }
  return true;
}

// The vocabularies of the heads, and the parameters that get more rows: name -> rows as they are.
struct Vocabulary {
  std::vector<int64_t> sizes;  // Of each head.
  std::map<std::string, int64_t> padded;
};

absl::Status AddParameter(const Graph& graph, Value value, int64_t vocab, int64_t multiple, Vocabulary& vocabulary) {
  if (!value.node->is_input() || value.node->role() != Role::kParameter) {
    return HeadStopped(graph, *value.node, kName, "stands where the head's parameters are", "a parameter there");
  }
  if (vocab % multiple != 0) vocabulary.padded[value.node->name()] = vocab;
  return absl::OkStatus();
}

// Everything that reads a padded parameter must know that its last rows are padding.
absl::Status CheckReaders(const Graph& graph, const Vocabulary& vocabulary, const std::vector<Head>& heads) {
  for (const Node* input : graph.inputs()) {
    if (vocabulary.padded.find(input->name()) == vocabulary.padded.end()) continue;
    if (graph.IsOutput(input)) {
      return HeadStopped(graph, *input, kName, "is an output of the graph", "it to stay inside");
    }
    for (const Use& use : input->uses()) {
      const bool is_head = std::any_of(heads.begin(), heads.end(), [&](const Head& head) {
        return use.node == head.add || use.node == (head.matmul == nullptr ? head.loss : head.matmul);
      });
      if (is_head || IsTable(*use.node, use.operand) || IsProjection(*use.node, use.operand)) continue;
      return HeadStopped(graph, *use.node, kName, absl::StrCat("reads ", input->name()),
                         "only embeddings and heads to read a vocabulary");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Vocabulary> FindVocabulary(const Module& module, int64_t multiple) {
  Vocabulary vocabulary;
  std::vector<std::vector<Head>> heads;
  for (const auto& graph : module.graphs()) {
    ASSIGN_OR_RETURN(std::vector<Head> found, FindHeads(*graph, kName));
    for (const Head& head : found) {
      const int64_t vocab = head.w.type().dim(0);
      if (head.loss->attrs().Int("classes") != 0) {
        return HeadStopped(*graph, *head.loss, kName, "has padding already", "a head as a model has it");
      }
      vocabulary.sizes.push_back(vocab);
      RETURN_IF_ERROR(AddParameter(*graph, head.w, vocab, multiple, vocabulary));
      if (head.bias) RETURN_IF_ERROR(AddParameter(*graph, head.bias, vocab, multiple, vocabulary));
    }
    heads.push_back(std::move(found));
  }
  for (const auto& graph : module.graphs()) {
    for (const Node* node : graph->Nodes()) {
      if (!IsOp(*node, "embedding")) continue;
      const Value table = node->operands()[0];
      const int64_t rows = table.type().dim(0);
      const bool is_vocabulary =
          std::find(vocabulary.sizes.begin(), vocabulary.sizes.end(), rows) != vocabulary.sizes.end();
      // Positions may be as many as classes.
      if (is_vocabulary && IsTableAlone(module, table.node->name()))
        RETURN_IF_ERROR(AddParameter(*graph, table, rows, multiple, vocabulary));
    }
  }
  for (size_t i = 0; i < heads.size(); ++i) {
    RETURN_IF_ERROR(CheckReaders(*module.graphs()[i], vocabulary, heads[i]));
  }
  return vocabulary;
}

// New inputs in the place of all, in their order, the padded ones longer. Returns those: old -> new.
absl::StatusOr<absl::flat_hash_map<const Node*, Value>> PadInputs(Graph& graph, const Vocabulary& vocabulary,
                                                                  int64_t multiple) {
  absl::flat_hash_map<const Node*, Value> longer;
  absl::flat_hash_map<const Node*, Node*> replaced;
  const std::vector<Node*> inputs(graph.inputs().begin(), graph.inputs().end());
  for (Node* old : inputs) {
    TensorType type = old->result().type();
    const bool is_padded = vocabulary.padded.find(old->name()) != vocabulary.padded.end();
    if (is_padded) type.dims[0] = RoundUp(type.dims[0], multiple);
    ASSIGN_OR_RETURN(const Value made, graph.AddInput(absl::StrCat(kName, ":", old->name()), type, old->role()));
    replaced[old] = made.node;
    if (is_padded) {
      longer[old] = made;
    } else {
      graph.ReplaceAllUses(old->result(), made);
    }
  }
  std::vector<Output> outputs = graph.outputs();
  for (Output& output : outputs) {
    if (output.donates != nullptr) output.donates = replaced.at(output.donates);
  }
  graph.SetOutputs(std::move(outputs));
  for (Node* old : inputs) {
    const std::string name = old->name();
    Node* made = replaced.at(old);
    if (longer.find(old) == longer.end()) graph.RemoveInput(old);
    graph.SetNodeName(made, name);
  }
  return longer;
}

// A node like `old` with other operands and attributes; results of the type that they had are read from it.
absl::StatusOr<Node*> Remake(Graph& graph, Node* old, const std::vector<Value>& operands, Attrs attrs) {
  ASSIGN_OR_RETURN(Node * made, graph.AddNode(old->op(), operands, std::move(attrs), old->name()));
  graph.SetNodePhase(made, old->phase());
  for (int i = 0; i < old->num_results(); ++i) {
    if (made->result(i).type() == old->result(i).type()) graph.ReplaceAllUses(old->result(i), made->result(i));
  }
  return made;
}

absl::Status Pad(Graph& graph, const Vocabulary& vocabulary, int64_t multiple) {
  ASSIGN_OR_RETURN(const std::vector<Head> heads, FindHeads(graph, kName));
  std::vector<Node*> tables, projections;
  for (Node* node : graph.Nodes()) {
    if (IsOp(*node, "embedding")) tables.push_back(node);
    const bool is_head = std::any_of(heads.begin(), heads.end(), [&](const Head& head) { return head.matmul == node; });
    if (IsProjection(*node, 1) && !is_head) projections.push_back(node);
  }
  using Longer = absl::flat_hash_map<const Node*, Value>;
  ASSIGN_OR_RETURN(const Longer longer, PadInputs(graph, vocabulary, multiple));
  const auto operands_of = [&](const Node* node) {
    std::vector<Value> operands(node->operands().begin(), node->operands().end());
    for (Value& operand : operands) {
      if (const auto at = longer.find(operand.node); at != longer.end()) operand = at->second;
    }
    return operands;
  };
  for (Node* table : tables) {
    if (longer.find(table->operands()[0].node) == longer.end()) continue;
    RETURN_IF_ERROR(Remake(graph, table, operands_of(table), table->attrs()).status());
    graph.RemoveNode(table);
  }
  for (Node* old : projections) {
    if (longer.find(old->operands()[1].node) == longer.end()) continue;
    ASSIGN_OR_RETURN(Node * logits, Remake(graph, old, operands_of(old), old->attrs()));
    const TensorType& type = old->result_types()[0];
    ASSIGN_OR_RETURN(
        Node * classes,
        graph.AddNode(*FindOp("slice"), {logits->result()},
                      {{"dim", type.rank() - 1}, {"start", int64_t{0}}, {"limit", type.dim(-1)}}, old->name()));
    graph.SetNodePhase(classes, old->phase());
    graph.ReplaceAllUses(old->result(), classes->result());
    graph.RemoveNode(old);
  }
  for (const Head& head : heads) {
    if (longer.find(head.w.node) == longer.end()) continue;
    std::vector<Value> operands = operands_of(head.loss);
    if (head.matmul != nullptr) {
      ASSIGN_OR_RETURN(Node * logits, Remake(graph, head.matmul, operands_of(head.matmul), head.matmul->attrs()));
      if (head.add != nullptr) {
        std::vector<Value> terms = operands_of(head.add);
        std::replace(terms.begin(), terms.end(), head.matmul->result(), logits->result());
        ASSIGN_OR_RETURN(logits, Remake(graph, head.add, terms, head.add->attrs()));
      }
      operands[0] = logits->result();
    }
    Attrs attrs = head.loss->attrs();
    attrs.Set("classes", head.w.type().dim(0));
    RETURN_IF_ERROR(Remake(graph, head.loss, operands, std::move(attrs)).status());
    for (Node* old : {head.loss, head.add, head.matmul}) {
      if (old != nullptr) graph.RemoveNode(old);
    }
  }
  for (const auto& [old, made] : longer) graph.RemoveInput(const_cast<Node*>(old));
  return absl::OkStatus();
}

absl::StatusOr<bool> PadVocab(Module& module, const Attrs& options, PassContext& context) {
  const int64_t multiple = options.Int("multiple");
  if (multiple > kMaxMultiple) {
    return absl::InvalidArgumentError(
        absl::StrCat("multiple=", multiple, " is too large; expected 1 to ", kMaxMultiple));
  }
  ASSIGN_OR_RETURN(const Vocabulary vocabulary, FindVocabulary(module, multiple));
  if (vocabulary.sizes.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "module @", module.name(), " has no cross entropy of logits; pad_vocab has nothing to do: leave it out"));
  }
  if (vocabulary.padded.empty()) {
    context.warnings.push_back(absl::StrCat("pad_vocab: the vocabulary, ", vocabulary.sizes[0],
                                            " rows, is a multiple of ", multiple, " as it is: nothing is padded"));
    return false;
  }
  for (const auto& graph : module.graphs()) RETURN_IF_ERROR(Pad(*graph, vocabulary, multiple));
  for (const auto& [name, rows] : vocabulary.padded) {
    TensorType& type = module.MutableState(name)->type;
    type.dims[0] = RoundUp(rows, multiple);
    RETURN_IF_ERROR(Annotate(CheckTensorType(type), absl::StrCat("state ", name)));
  }
  return true;
}

bool HasOddVocabulary(const Module& module) {
  const absl::StatusOr<Vocabulary> vocabulary = FindVocabulary(module, kDefaultMultiple);
  return vocabulary.ok() && !vocabulary->padded.empty();
}

constexpr PassOption kOptions[] = {
    {.name = "multiple",
     .kind = AttrKind::kInt,
     .doc = "rows of the embedding and of the head are padded to a multiple of this many",
     .default_text = "64",
     .min = 1},
};
constexpr absl::string_view kAlsoKnownAs[] = {"pad_vocabulary", "pad_vocab_size_multiple", "pad_to_multiple_of"};

}  // namespace

const PassDef kPadVocabPass = {
    .name = kName,
    .summary =
        "Rows of the embedding and the head to a multiple of 64; the padding is zero, stays zero and is no class.",
    .options = kOptions,
    .source = "Shoeybi et al., \"Megatron-LM\" (2019), section 5.1: a vocabulary padded for efficient matmuls",
    .tolerance = 1e-6,
    .also_known_as = kAlsoKnownAs,
    .applies = HasOddVocabulary,
    .run = PadVocab,
};

}  // namespace mt
