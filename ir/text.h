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

std::string Print(const Graph& graph);
std::string Print(const Module& module);

// Errors: InvalidArgument with line number. The input is untrusted; the result passed VerifyGraph.
absl::StatusOr<std::unique_ptr<Graph>> ParseGraph(absl::string_view text);
absl::StatusOr<std::unique_ptr<Module>> ParseModule(absl::string_view text);

}  // namespace mt

#endif  // MT_IR_TEXT_H_
