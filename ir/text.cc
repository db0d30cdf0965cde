#include "ir/text.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "ir/base/flags.h"
#include "ir/base/status_macros.h"
#include "ir/verifier.h"

namespace mt {
namespace {

std::string Quote(absl::string_view text) { return absl::StrCat("\"", absl::CEscape(text), "\""); }

bool IsNameChar(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-' || c == '/';
}

// "%0", "%x": the spelling of every value of one graph.
class ValueNames {
 public:
  explicit ValueNames(absl::Span<Node* const> order) {
    int64_t next = 0;
    for (const Node* node : order) {
      first_[node] = next;
      if (!node->is_input()) next += node->num_results();
    }
  }

  std::string operator()(const Value& value) const {
    const auto at = first_.find(value.node);
    if (at == first_.end()) return "%?";
    if (value.node->is_input()) return absl::StrCat("%", value.node->name());
    return absl::StrCat("%", at->second + value.index);
  }

 private:
  absl::flat_hash_map<const Node*, int64_t> first_;  // Number of result 0.
};

void AppendNode(const Node& node, const ValueNames& names, std::string& out) {
  absl::StrAppend(&out, "  ");
  for (int i = 0; i < node.num_results(); ++i) {
    absl::StrAppend(&out, i > 0 ? ", " : "", names(node.result(i)), ": ", node.result(i).type().ToString());
  }
  absl::StrAppend(&out, " = ", node.op().name, "(");
  for (size_t i = 0; i < node.operands().size(); ++i) {
    absl::StrAppend(&out, i > 0 ? ", " : "", names(node.operands()[i]));
  }
  absl::StrAppend(&out, ")");
  const std::string attrs = AttrsToString(node.op().attrs, node.attrs());
  if (!attrs.empty()) absl::StrAppend(&out, " ", attrs);
  if (!node.name().empty()) absl::StrAppend(&out, " ", Quote(node.name()));
  if (node.phase() != Phase::kForward) absl::StrAppend(&out, " ", PhaseName(node.phase()));
  if (node.recompute_of() != nullptr) absl::StrAppend(&out, " recompute_of=", names(node.recompute_of()->result()));
  absl::StrAppend(&out, "\n");
}

void AppendGraph(const Graph& graph, std::string& out) {
  const std::vector<Node*> order = graph.TopologicalOrder();
  const ValueNames names(order);
  absl::StrAppend(&out, "graph @", graph.name(), " stage=", StageName(graph.stage()), " {\n");
  for (const Node* node : order) {
    if (node->is_input()) {
      absl::StrAppend(&out, "  input %", node->name(), ": ", node->result().type().ToString(), " ",
                      RoleName(node->role()), "\n");
    } else {
      AppendNode(*node, names, out);
    }
  }
  for (const Output& output : graph.outputs()) {
    absl::StrAppend(&out, "  output ", Quote(output.name), " ", names(output.value));
    if (output.donates != nullptr) absl::StrAppend(&out, " donates ", names(output.donates->result()));
    absl::StrAppend(&out, "\n");
  }
  absl::StrAppend(&out, "}\n");
}

// One line of text, read from the left. Spaces between tokens are skipped.
class Cursor {
 public:
  explicit Cursor(absl::string_view line) : rest_(line) {}

  bool at_end() {
    Skip();
    return rest_.empty();
  }
  absl::string_view rest() {
    Skip();
    return rest_;
  }
  bool Consume(absl::string_view token) {
    Skip();
    return absl::ConsumePrefix(&rest_, token);
  }
  // Like Consume, but the token is a whole word.
  bool ConsumeWord(absl::string_view word) {
    Skip();
    if (!absl::StartsWith(rest_, word) || (rest_.size() > word.size() && IsNameChar(rest_[word.size()]))) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  // Letters, digits and the other characters of names; may be empty.
  absl::string_view Word() {
    Skip();
    size_t n = 0;
    while (n < rest_.size() && IsNameChar(rest_[n])) ++n;
    return Take(n);
  }
  // Up to and without the first of `stops`, or the end of the line.
  absl::string_view Until(absl::string_view stops) {
    Skip();
    return Take(std::min(rest_.find_first_of(stops), rest_.size()));
  }
  // "word[...]" with its bracket.
  absl::string_view Bracketed() {
    Skip();
    const size_t end = rest_.find(']');
    return end == absl::string_view::npos ? absl::string_view() : Take(end + 1);
  }
  // A quoted string with its quotes; empty where there is none.
  absl::string_view QuotedRaw() {
    Skip();
    if (rest_.empty() || rest_[0] != '"') return {};
    for (size_t i = 1; i < rest_.size(); ++i) {
      if (rest_[i] == '\\') {
        ++i;
      } else if (rest_[i] == '"') {
        return Take(i + 1);
      }
    }
    return {};
  }

 private:
  void Skip() { rest_ = absl::StripLeadingAsciiWhitespace(rest_); }
  absl::string_view Take(size_t n) {
    const absl::string_view taken = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return taken;
  }

  absl::string_view rest_;
};

class Parser {
 public:
  explicit Parser(absl::string_view text) : text_(text) {}

  absl::StatusOr<std::unique_ptr<Graph>> WholeGraph() {
    RETURN_IF_ERROR(CheckSize());
    RETURN_IF_ERROR(NextLine("graph @NAME stage=STAGE {"));
    ASSIGN_OR_RETURN(std::unique_ptr<Graph> graph, OneGraph());
    if (SkipToLine()) return Error("\"", Shown(line_), "\" follows the graph; expected the end of the text");
    RETURN_IF_ERROR(Untrusted(VerifyGraph(*graph)));
    return graph;
  }

  absl::StatusOr<std::unique_ptr<Module>> WholeModule() {
    RETURN_IF_ERROR(CheckSize());
    RETURN_IF_ERROR(NextLine("module @NAME {"));
    Cursor cursor(line_);
    if (!cursor.ConsumeWord("module")) return Expected(cursor, "module @NAME {");
    ASSIGN_OR_RETURN(std::string name, AtName(cursor));
    if (!cursor.Consume("{") || !cursor.at_end()) return Expected(cursor, "{ and the end of the line");
    auto module = std::make_unique<Module>(name);
    while (true) {
      RETURN_IF_ERROR(NextLine("fact, state or }"));
      Cursor entry(line_);
      if (entry.Consume("}") && entry.at_end()) break;
      if (entry.ConsumeWord("fact")) {
        RETURN_IF_ERROR(Fact(entry, *module));
      } else if (entry.ConsumeWord("state")) {
        RETURN_IF_ERROR(OneState(entry, *module));
      } else {
        return Expected(entry, "fact NAME = NUMBER, state \"NAME\": TYPE ROLE, or }");
      }
    }
    while (SkipToLine()) {
      if (static_cast<int64_t>(module->graphs().size()) >= kMaxInputs)
        return Error("more than ", kMaxInputs, " graphs");
      const int64_t first_line = line_number_;
      ASSIGN_OR_RETURN(std::unique_ptr<Graph> graph, OneGraph());
      if (module->FindGraph(graph->name()) != nullptr) {
        line_number_ = first_line;
        return Error("graph @", graph->name(), " exists already; names are unique");
      }
      module->AddGraph(std::move(graph));
    }
    RETURN_IF_ERROR(Untrusted(VerifyModule(*module)));
    return module;
  }

 private:
  using NumberedValues = absl::flat_hash_map<int64_t, Value>;

  template <typename... Args>
  absl::Status Error(const Args&... args) const {
    return absl::InvalidArgumentError(absl::StrCat("line ", line_number_, ": ", args...));
  }
  absl::Status Expected(Cursor& cursor, absl::string_view what) const {
    return Error("expected ", what, " at \"", Shown(cursor.rest()), "\"");
  }
  absl::Status AtLine(const absl::Status& status) const {
    return status.ok() ? status : Error(absl::StripSuffix(status.message(), "\n"));
  }
  // What a verifier finds in a file is the file's fault.
  static absl::Status Untrusted(const absl::Status& status) {
    return status.ok() ? status : absl::InvalidArgumentError(status.message());
  }
  // At most 60 characters of a piece of the input, fit for a message.
  static std::string Shown(absl::string_view text) {
    return absl::StrCat(absl::CEscape(text.substr(0, 60)), text.size() > 60 ? "..." : "");
  }

  absl::Status CheckSize() const {
    if (static_cast<int64_t>(text_.size()) <= kMaxTextBytes) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", text_.size(), " bytes; at most ", kMaxTextBytes, " are allowed"));
  }

  // Moves to the next line that is neither blank nor a comment; false at the end of the text.
  bool SkipToLine() {
    while (!text_.empty()) {
      const size_t end = std::min(text_.find('\n'), text_.size());
      line_ = absl::StripAsciiWhitespace(text_.substr(0, end));
      text_.remove_prefix(std::min(end + 1, text_.size()));
      ++line_number_;
      if (!line_.empty() && !absl::StartsWith(line_, "//")) return true;
    }
    return false;
  }
  absl::Status NextLine(absl::string_view expected) {
    if (SkipToLine()) return absl::OkStatus();
    return Error("the text ends here; expected ", expected);
  }

  absl::StatusOr<std::string> AtName(Cursor& cursor) const {
    if (!cursor.Consume("@")) return Expected(cursor, "@NAME");
    const absl::string_view name = cursor.Word();
    if (!IsTextName(name)) {
      return Error("\"", Shown(name),
                   "\" is no name; expected letters, digits, '.', '_', '-' or '/', not digits alone");
    }
    return std::string(name);
  }
  absl::StatusOr<std::string> Quoted(Cursor& cursor, absl::string_view what) const {
    const absl::string_view raw = cursor.QuotedRaw();
    std::string text;
    if (raw.empty() || !absl::CUnescape(raw.substr(1, raw.size() - 2), &text)) return Expected(cursor, what);
    return text;
  }
  absl::StatusOr<TensorType> Type(Cursor& cursor) const {
    const absl::string_view text = cursor.Bracketed();
    if (text.empty()) return Expected(cursor, "a type such as f32[32,128]");
    absl::StatusOr<TensorType> type = ParseTensorType(text);
    if (!type.ok()) return AtLine(type.status());
    return type;
  }
  absl::StatusOr<Role> ParsedRole(Cursor& cursor) const {
    const absl::string_view word = cursor.Word();
    const std::optional<Role> role = ParseRole(word);
    if (!role) return Error("\"", Shown(word), "\" is no role; known: data step parameter optimizer_state gradient");
    return *role;
  }

  absl::Status Fact(Cursor& cursor, Module& module) const {
    const absl::string_view name = cursor.Word();
    int64_t value = 0;
    if (!IsTextName(name) || !cursor.Consume("=") || !absl::SimpleAtoi(cursor.Until(" \t"), &value) ||
        !cursor.at_end()) {
      return Error("expected fact NAME = NUMBER at \"", Shown(line_), "\"");
    }
    if (static_cast<int64_t>(module.facts().size()) >= kMaxInputs) return Error("more than ", kMaxInputs, " facts");
    if (!module.facts().emplace(std::string(name), value).second) return Error("fact ", name, " is given twice");
    return absl::OkStatus();
  }

  absl::Status OneState(Cursor& cursor, Module& module) const {
    State state;
    ASSIGN_OR_RETURN(state.name, Quoted(cursor, "the state's name in quotes"));
    if (!cursor.Consume(":")) return Expected(cursor, "a colon and the state's type");
    ASSIGN_OR_RETURN(state.type, Type(cursor));
    ASSIGN_OR_RETURN(state.role, ParsedRole(cursor));
    if (cursor.Consume("init=")) {
      absl::StatusOr<Init> init = ParseInit(cursor.Until(" \t"));
      if (!init.ok()) return AtLine(init.status());
      state.init = *init;
    }
    if (cursor.Consume("logical=")) {
      absl::StatusOr<AttrValue> dims = ParseAttrValue(AttrKind::kIntList, cursor.Bracketed());
      if (!dims.ok()) return AtLine(dims.status());
      const IntList& list = std::get<IntList>(*dims);
      state.logical_dims.assign(list.begin(), list.end());
    }
    if (!cursor.at_end()) return Expected(cursor, "init=INIT, logical=[DIMS] or the end of the line");
    if (static_cast<int64_t>(module.states().size()) >= kMaxInputs) return Error("more than ", kMaxInputs, " states");
    return AtLine(module.AddState(std::move(state)));
  }

  // REQUIRES: on the line of the header. Leaves off on the line of the closing brace.
  absl::StatusOr<std::unique_ptr<Graph>> OneGraph() {
    Cursor cursor(line_);
    if (!cursor.ConsumeWord("graph")) return Expected(cursor, "graph @NAME stage=STAGE {");
    ASSIGN_OR_RETURN(std::string name, AtName(cursor));
    auto graph = std::make_unique<Graph>(name);
    if (cursor.Consume("stage=")) {
      const absl::string_view word = cursor.Word();
      const std::optional<Stage> stage = ParseStage(word);
      if (!stage) return Error("\"", Shown(word), "\" is no stage; known: forward training optimized");
      graph->set_stage(*stage);
    }
    if (!cursor.Consume("{") || !cursor.at_end()) return Expected(cursor, "{ and the end of the line");
    NumberedValues values;
    inputs_.clear();
    recomputes_.clear();
    while (true) {
      RETURN_IF_ERROR(NextLine(absl::StrCat("} at the end of graph @", name)));
      Cursor entry(line_);
      if (entry.Consume("}") && entry.at_end()) break;
      if (entry.ConsumeWord("input")) {
        RETURN_IF_ERROR(Input(entry, *graph));
      } else if (entry.ConsumeWord("output")) {
        RETURN_IF_ERROR(OneOutput(entry, values, *graph));
      } else {
        RETURN_IF_ERROR(OneNode(entry, values, *graph));
      }
    }
    // A repeat may be printed before what it repeats.
    for (const Recompute& recompute : recomputes_) {
      const auto at = values.find(recompute.original);
      if (at == values.end()) {
        return absl::InvalidArgumentError(absl::StrCat("line ", recompute.line, ": recompute_of=%", recompute.original,
                                                       " is not a node of graph @", name));
      }
      graph->SetNodeRecomputeOf(recompute.node, at->second.node);
    }
    return graph;
  }

  absl::Status Input(Cursor& cursor, Graph& graph) {
    if (!cursor.Consume("%")) return Expected(cursor, "%NAME");
    const absl::string_view name = cursor.Word();
    if (!IsTextName(name)) {
      return Error("\"", Shown(name),
                   "\" cannot name an input; expected letters, digits, '.', '_', '-' or '/', not "
                   "digits alone");
    }
    if (!cursor.Consume(":")) return Expected(cursor, "a colon and the input's type");
    ASSIGN_OR_RETURN(const TensorType type, Type(cursor));
    ASSIGN_OR_RETURN(const Role role, ParsedRole(cursor));
    if (!cursor.at_end()) return Expected(cursor, "the end of the line");
    if (static_cast<int64_t>(graph.inputs().size()) >= kMaxInputs) return Error("more than ", kMaxInputs, " inputs");
    const absl::StatusOr<Value> value = graph.AddInput(name, type, role);
    if (value.ok()) inputs_[value->node->name()] = *value;
    return AtLine(value.status());
  }

  absl::StatusOr<Value> ParsedValue(Cursor& cursor, const NumberedValues& values, const Graph& graph) const {
    if (!cursor.Consume("%")) return Expected(cursor, "a value such as %3 or %x");
    const absl::string_view word = cursor.Word();
    if (IsTextName(word)) {
      if (const auto at = inputs_.find(word); at != inputs_.end()) return at->second;
      return Error("%", word, " is no input of graph @", graph.name(), "; inputs are declared before their uses");
    }
    int64_t number = 0;
    if (absl::SimpleAtoi(word, &number)) {
      const auto at = values.find(number);
      if (at != values.end()) return at->second;
    }
    return Error("%", Shown(word), " is not defined above; values are defined before their uses");
  }

  absl::Status OneOutput(Cursor& cursor, const NumberedValues& values, Graph& graph) const {
    ASSIGN_OR_RETURN(const std::string name, Quoted(cursor, "the output's name in quotes"));
    ASSIGN_OR_RETURN(const Value value, ParsedValue(cursor, values, graph));
    Node* donates = nullptr;
    if (cursor.ConsumeWord("donates")) {
      ASSIGN_OR_RETURN(const Value donor, ParsedValue(cursor, values, graph));
      if (!donor.node->is_input()) return Error("output \"", name, "\" donates a value that is no input");
      donates = donor.node;
    }
    if (!cursor.at_end()) return Expected(cursor, "donates %INPUT or the end of the line");
    if (static_cast<int64_t>(graph.outputs().size()) >= kMaxInputs) return Error("more than ", kMaxInputs, " outputs");
    graph.AddOutput(value, name, donates);
    return absl::OkStatus();
  }

  absl::StatusOr<Attrs> ParsedAttrs(Cursor& cursor, const OpDef& op) const {
    Attrs attrs;
    if (!cursor.Consume("{")) return attrs;
    do {
      const absl::string_view name = cursor.Word();
      if (!cursor.Consume("=")) return Expected(cursor, "NAME=VALUE");
      const AttrSpec* spec = nullptr;
      std::vector<std::string> known;
      for (const AttrSpec& candidate : op.attrs) {
        if (candidate.name == name) spec = &candidate;
        known.emplace_back(candidate.name);
      }
      if (spec == nullptr) {
        return Error(op.name, " has no attribute \"", Shown(name),
                     "\"; known: ", known.empty() ? "none" : absl::StrJoin(known, ", "));
      }
      if (attrs.Find(name) != nullptr) return Error("attribute ", name, " is given twice");
      absl::string_view text = cursor.rest();
      if (absl::StartsWith(text, "\"")) {
        text = cursor.QuotedRaw();
      } else if (absl::StartsWith(text, "[")) {
        text = cursor.Bracketed();
      } else {
        text = absl::StripTrailingAsciiWhitespace(cursor.Until(",}"));
      }
      absl::StatusOr<AttrValue> value = ParseAttrValue(spec->kind, text);
      if (!value.ok()) return Error("attribute ", name, ": ", value.status().message());
      attrs.Set(name, *std::move(value));
    } while (cursor.Consume(","));
    if (!cursor.Consume("}")) return Expected(cursor, ", or }");
    return attrs;
  }

  absl::Status OneNode(Cursor& cursor, NumberedValues& values, Graph& graph) {
    std::vector<int64_t> numbers;
    std::vector<TensorType> types;
    do {
      int64_t number = 0;
      if (!cursor.Consume("%") || !absl::SimpleAtoi(cursor.Word(), &number)) {
        return Error("expected input, output, } or %NUMBER: TYPE = OP(OPERANDS) at \"", Shown(line_), "\"");
      }
      if (number < 0 || values.contains(number) || std::find(numbers.begin(), numbers.end(), number) != numbers.end()) {
        return Error("%", number, number < 0 ? " is negative" : " is defined already; every value is defined once");
      }
      if (!cursor.Consume(":")) return Expected(cursor, "a colon and the type of the result");
      ASSIGN_OR_RETURN(types.emplace_back(), Type(cursor));
      numbers.push_back(number);
      if (numbers.size() > kMaxResults) return Error("more than ", kMaxResults, " results");
    } while (cursor.Consume(","));
    if (!cursor.Consume("=")) return Expected(cursor, "= OP(OPERANDS)");
    const absl::string_view op_name = cursor.Word();
    const OpDef* op = FindOp(op_name);
    if (op == nullptr) return UnknownOp(op_name);
    if (!cursor.Consume("(")) return Expected(cursor, "( and the operands");
    std::vector<Value> operands;
    if (!cursor.Consume(")")) {
      do {
        ASSIGN_OR_RETURN(operands.emplace_back(), ParsedValue(cursor, values, graph));
      } while (cursor.Consume(","));
      if (!cursor.Consume(")")) return Expected(cursor, ", or )");
    }
    ASSIGN_OR_RETURN(Attrs attrs, ParsedAttrs(cursor, *op));
    std::string name;
    if (absl::StartsWith(cursor.rest(), "\"")) {
      ASSIGN_OR_RETURN(name, Quoted(cursor, "the node's name in quotes"));
    }
    Phase phase = Phase::kForward;
    for (const Phase candidate : {Phase::kForward, Phase::kBackward, Phase::kOptimizer}) {
      if (cursor.ConsumeWord(PhaseName(candidate))) {
        phase = candidate;
        break;
      }
    }
    int64_t original = -1;
    if (cursor.Consume("recompute_of=")) {
      if (!cursor.Consume("%") || !absl::SimpleAtoi(cursor.Word(), &original) || original < 0) {
        return Expected(cursor, "%NUMBER after recompute_of=");
      }
    }
    if (!cursor.at_end()) return Expected(cursor, "{ATTRIBUTES} \"NAME\" PHASE recompute_of=%NUMBER, in this order");
    if (++nodes_ > kMaxNodes) return Error("more than ", kMaxNodes, " nodes");
    absl::StatusOr<Node*> node = graph.AddNode(*op, operands, std::move(attrs), name);
    if (!node.ok()) return AtLine(node.status());
    if ((*node)->num_results() != static_cast<int>(types.size())) {
      return Error(op_name, " has ", (*node)->num_results(), " results; ", types.size(), " are named");
    }
    for (size_t i = 0; i < types.size(); ++i) {
      const Value result = (*node)->result(static_cast<int>(i));
      if (result.type() != types[i]) {
        return Error("%", numbers[i], " is written as ", types[i].ToString(), ", but ", op_name, " gives ",
                     result.type().ToString());
      }
      values[numbers[i]] = result;
    }
    graph.SetNodePhase(*node, phase);
    if (original >= 0) recomputes_.push_back({*node, original, line_number_});
    return absl::OkStatus();
  }

  absl::Status UnknownOp(absl::string_view name) const {
    std::vector<std::string> candidates;
    for (const OpDef* op : AllOps()) candidates.emplace_back(op->name);
    const std::string guess = name.size() <= 64 ? DidYouMean(name, candidates) : "";
    return Error("unknown op \"", Shown(name), "\"", guess.empty() ? "" : absl::StrCat("; did you mean ", guess, "?"));
  }

  static constexpr size_t kMaxResults = 64;
  struct Recompute {
    Node* node;
    int64_t original, line;
  };

  absl::string_view text_;  // What follows the current line.
  absl::string_view line_;
  int64_t line_number_ = 0;
  int64_t nodes_ = 0;
  absl::flat_hash_map<absl::string_view, Value> inputs_;  // Of the current graph, by name.
  std::vector<Recompute> recomputes_;                     // Of the current graph.
};

}  // namespace

bool IsTextName(absl::string_view name) {
  if (name.empty() || name.size() > 512) return false;
  bool digits_only = true;
  for (const char c : name) {
    if (!IsNameChar(c)) return false;
    digits_only = digits_only && absl::ascii_isdigit(static_cast<unsigned char>(c));
  }
  return !digits_only;
}

std::string Print(const Graph& graph) {
  std::string out;
  AppendGraph(graph, out);
  return out;
}

std::string Print(const Module& module) {
  std::string out = absl::StrCat("module @", module.name(), " {\n");
  for (const auto& [name, value] : module.facts()) absl::StrAppend(&out, "  fact ", name, " = ", value, "\n");
  for (const State& state : module.states()) {
    absl::StrAppend(&out, "  state ", Quote(state.name), ": ", state.type.ToString(), " ", RoleName(state.role),
                    " init=", state.init.ToString());
    if (state.logical_dims != state.type.dims) {
      absl::StrAppend(&out, " logical=", DimsToString(state.logical_dims));
    }
    absl::StrAppend(&out, "\n");
  }
  absl::StrAppend(&out, "}\n");
  for (const auto& graph : module.graphs()) AppendGraph(*graph, out);
  return out;
}

absl::StatusOr<std::unique_ptr<Graph>> ParseGraph(absl::string_view text) { return Parser(text).WholeGraph(); }

absl::StatusOr<std::unique_ptr<Module>> ParseModule(absl::string_view text) { return Parser(text).WholeModule(); }

}  // namespace mt
