// The command line of mtrun.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "", .positionals = "PLAN", .summary = "runs a plan: trains, evaluates or counts"},
};

constexpr FlagDef kFlags[] = {
    {.name = "data", .metavar = "DIR", .help = "A corpus from mtcorpus prep"},
    {.name = "steps", .kind = FlagKind::kInt, .metavar = "N", .help = "Optimizer steps", .min = 0},
    {.name = "epochs",
     .kind = FlagKind::kDouble,
     .metavar = "E",
     .help = "Passes over the training split, instead of --steps",
     .min = 0},
    {.name = "max-minutes", .kind = FlagKind::kDouble, .metavar = "M", .help = "Stops after this time", .min = 0},
    {.name = "lr",
     .kind = FlagKind::kDouble,
     .metavar = "X",
     .help = "Peak learning rate",
     .default_text = "1e-3",
     .min = 0},
    {.name = "seed",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Seed of weights, dropout and order",
     .default_text = "0",
     .min = 0},
    {.name = "threads",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "CPU threads (default: what affinity and cgroup allow)",
     .min = 1},
    {.name = "out",
     .metavar = "DIR",
     .help = "Writes metrics.jsonl, memory.json, summary.json and the final weights there"},
    {.name = "init", .metavar = "DIR", .help = "Starts from the weights of an earlier --out"},
    {.name = "measure", .kind = FlagKind::kBool, .help = "Measures one step's memory and compares it with the plan"},
    {.name = "trace", .metavar = "FILE", .help = "Writes a timeline for Perfetto"},
    {.name = "eval",
     .kind = FlagKind::kChoice,
     .help = "Prints the loss of one split and trains nothing",
     .choices = "train|val|test"},
    {.name = "dry-run", .kind = FlagKind::kBool, .help = "Loads the plan and counts; computes nothing"},
};

}  // namespace

constinit const ToolDef kMtrun = {
    .name = "mtrun",
    .summary = "runs a plan: trains, evaluates or counts",
    .commands = kCommands,
    .flags = kFlags,
    .examples = "mtrun tiny.plan --data corpus --steps 200 --out run1",
};

}  // namespace mt
