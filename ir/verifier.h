// What holds for every module between passes.
#ifndef MT_IR_VERIFIER_H_
#define MT_IR_VERIFIER_H_

#include "absl/status/status.h"
#include "ir/graph.h"

namespace mt {

// Structure (acyclic, use lists right, types as inferred, attributes as specified, unique names, recompute_of refers to an
// equal op) and stage (forward: no backward or optimizer nodes; training and optimized: what each promises; donation: the
// output has its input's type, one donor each, and every other reader of the input can run before the writer).
// Errors: Internal, naming graph, node and both facts.
absl::Status VerifyGraph(const Graph& graph);
// All graphs; and every state input of a graph agrees with the module's table.
absl::Status VerifyModule(const Module& module);

}  // namespace mt

#endif  // MT_IR_VERIFIER_H_
