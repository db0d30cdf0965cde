// What holds for every module between passes.
#ifndef MT_IR_VERIFIER_H_
#define MT_IR_VERIFIER_H_

#include "absl/status/status.h"
#include "ir/graph.h"

namespace mt {

// Structure: use lists right, acyclic, attributes as specified, types as inferred, inputs and outputs named uniquely,
// recompute_of refers to an equal node that may be repeated.
// Donation: an output that donates takes over a state of its own name and type; one donor each. Whether it can be
// written in place, and after whom, is the scheduler's to decide; otherwise a copy is made.
// Stage: forward: no backward or optimizer nodes; training: an output "loss"; optimized: every parameter is donated,
// or its gradient is added to the state grad.NAME of role gradient.
// Errors: Internal, naming graph, node and both facts.
absl::Status VerifyGraph(const Graph& graph);
// All graphs; states are well-formed and uniquely named; every state input of a graph agrees with the module's table.
absl::Status VerifyModule(const Module& module);

}  // namespace mt

#endif  // MT_IR_VERIFIER_H_
