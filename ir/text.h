// The text form of graphs and modules: for people, dumps and golden files.
//
//   module @mlp {
//     fact batch = 32
//     state "fc1.weight": f32[784,128] parameter init=normal(0.02)
//   }
//   graph @train stage=forward {
//     input %x: f32[32,784] data
//     input %fc1.weight: f32[784,128] parameter
//     %0: f32[32,128] = matmul(%x, %fc1.weight) "fc1"
//     %1: f32[32,128], %2: f32[32] = two_results(%0) {k=3} "path" backward recompute_of=%0
//     output "loss" %1
//     output "fc1.weight" %9 donates %fc1.weight
//   }
//
// One node a line, results numbered in topological order, types always printed, attributes only where they differ from
// the default, the phase only where it is not forward. Print(Parse(Print(x))) == Print(x).
#ifndef MT_IR_TEXT_H_
#define MT_IR_TEXT_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "ir/graph.h"

namespace mt {

// Values that are not reachable from the inputs and constants (a cycle, a corrupted graph) print as "%?".
std::string Print(const Graph& graph);
std::string Print(const Module& module);

// What "%NAME" and "@NAME" can hold: 1 to 512 letters, digits, '.', '_', '-', '/'; not digits alone. Graphs, modules,
// inputs, states and facts are named so.
bool IsTextName(absl::string_view name);

// Limits on what a file may hold.
inline constexpr int64_t kMaxTextBytes = int64_t{64} << 20;
inline constexpr int64_t kMaxNodes = 1'000'000;  // In all graphs together.
inline constexpr int64_t kMaxInputs = 1 << 14;   // Of one graph; also the states, facts and outputs, and the graphs.

// A line that starts with "//" is a comment. Errors: InvalidArgument with line number. The input is untrusted; the
// result passed VerifyGraph or VerifyModule.
absl::StatusOr<std::unique_ptr<Graph>> ParseGraph(absl::string_view text);
absl::StatusOr<std::unique_ptr<Module>> ParseModule(absl::string_view text);

}  // namespace mt

#endif  // MT_IR_TEXT_H_
