// The command line of mtlab.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "run",
     .positionals = "SUITE",
     .summary =
         "Runs a suite: compiles and trains what is not finished yet, then compares. Flags of mtrun are passed on.",
     .forwards_to = &kMtrun},
    {.name = "compare", .positionals = "", .summary = "Compares finished runs: a table, and files beside them."},
    {.name = "suites", .positionals = "", .summary = "Lists the suites that come with mt."},
};

constexpr FlagDef kFlags[] = {
    {.name = "data", .metavar = "DIR", .help = "A corpus from mtcorpus prep", .commands = "run"},
    {.name = "dataset", .metavar = "NAME", .help = "Its name in files (default: the folder's)", .commands = "run"},
    {.name = "set",
     .kind = FlagKind::kList,
     .metavar = "KEY=VALUE,...",
     .help = "Changes fields of the model: layers=2",
     .commands = "run"},
    {.name = "batch",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Sequences in a step, of every run (default: the suite's)",
     .commands = "run",
     .min = 1},
    {.name = "seq",
     .kind = FlagKind::kInt,
     .metavar = "T",
     .help = "Tokens in a sequence (default: the suite's)",
     .commands = "run",
     .min = 1},
    {.name = "only", .kind = FlagKind::kList, .metavar = "RUN,...", .help = "Runs these alone", .commands = "run"},
    {.name = "skip", .kind = FlagKind::kList, .metavar = "RUN,...", .help = "Leaves these out", .commands = "run"},
    {.name = "out", .metavar = "DIR", .help = "Where results go", .default_text = "results", .commands = "run"},
    {.name = "fresh", .kind = FlagKind::kBool, .help = "Replaces finished runs", .commands = "run"},
    {.name = "results-dir",
     .metavar = "DIR",
     .help = "Where the results are",
     .default_text = "results",
     .commands = "compare"},
    {.name = "experiments",
     .kind = FlagKind::kList,
     .metavar = "RUN,...",
     .help = "Compares these alone",
     .commands = "compare"},
    {.name = "json", .kind = FlagKind::kBool, .help = "Prints experiment_summary.json", .commands = "compare"},
};

}  // namespace

constinit const ToolDef kMtlab = {
    .name = "mtlab",
    .summary = "runs suites of experiments and compares them",
    .commands = kCommands,
    .flags = kFlags,
    .examples =
        "mtlab run lab8 --data corpus --set layers=2 --batch 4 --steps 100\n"
        "mtlab run lab8 --data corpus --only baseline,bf16\n"
        "mtlab compare",
};

}  // namespace mt
