// The command line of mtc.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "compile", .positionals = "SPEC", .summary = "Compiles a model spec or a raw graph into a plan."},
    {.name = "inspect",
     .positionals = "SPEC|PLAN",
     .summary = "Shows what a plan costs: parameters, memory, FLOPs. Nothing is run."},
    {.name = "train",
     .positionals = "SPEC",
     .summary = "Compiles, then becomes mtrun: one command from a spec to a trained model.",
     .forwards_to = &kMtrun},
    {.name = "models", .positionals = "", .summary = "Lists the zoo."},
    {.name = "passes", .positionals = "[NAME]", .summary = "Lists the passes, or documents one."},
    {.name = "ops", .positionals = "[NAME]", .summary = "Lists the ops, or documents one."},
    {.name = "doctor", .positionals = "", .summary = "Says what this machine and this build can do."},
};

constexpr FlagDef kFlags[] = {
    {.name = "data",
     .metavar = "DIR",
     .help = "A corpus from mtcorpus prep: gives the vocabulary",
     .commands = "compile inspect train"},
    {.name = "set",
     .kind = FlagKind::kList,
     .metavar = "KEY=VALUE,...",
     .help = "Changes fields of the spec: layers=4,width=256",
     .commands = "compile inspect train"},
    {.name = "batch",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Sequences that one optimizer step sees (default: the spec's)",
     .commands = "compile inspect train",
     .min = 1},
    {.name = "seq",
     .kind = FlagKind::kInt,
     .metavar = "T",
     .help = "Tokens in a sequence (default: the spec's maximum)",
     .commands = "compile inspect train",
     .min = 1},
    {.name = "passes",
     .metavar = "LIST",
     .help = "Pipeline: none, a list such as remat,fuse, or changes to default such as +x,-y",
     .default_text = "default",
     .commands = "compile inspect train"},
    {.name = "optimizer",
     .kind = FlagKind::kChoice,
     .help = "adamw: decoupled weight decay; adam: decay added to the gradient",
     .default_text = "adamw",
     .commands = "compile inspect train",
     .choices = "adamw|adam"},
    {.name = "target",
     .metavar = "TARGET",
     .help = "What the plan runs on; in this version cpu alone",
     .default_text = "cpu",
     .commands = "compile inspect train"},
    {.name = "memory",
     .kind = FlagKind::kBytes,
     .metavar = "BYTES",
     .help = "Refuses a plan whose arena is larger: 24GiB",
     .commands = "compile inspect train",
     .min = 1},
    {.name = "print-pipeline",
     .kind = FlagKind::kBool,
     .help = "Prints the pipeline with every option spelled out",
     .commands = "compile inspect train"},
    {.name = "dump-dir",
     .metavar = "DIR",
     .help = "Writes the module after each pass: 03.remat.changed.mtir",
     .commands = "compile inspect train"},
    {.name = "output",
     .metavar = "PLAN",
     .help = "Where the plan goes (default: NAME.plan; train: in --out, or a temporary place)",
     .commands = "compile train",
     .letter = 'o'},
    {.name = "json", .kind = FlagKind::kBool, .help = "Prints JSON", .commands = "inspect"},
    {.name = "text", .kind = FlagKind::kBool, .help = "Prints the plan's text form", .commands = "inspect"},
};

}  // namespace

constinit const ToolDef kMtc = {
    .name = "mtc",
    .summary = "compiles a decoder-only transformer into one static plan",
    .commands = kCommands,
    .flags = kFlags,
    .examples =
        "mtc models\n"
        "mtc inspect gpt2_124m --batch 8 --seq 1024\n"
        "mtc compile tiny_char --data corpus -o tiny.plan",
};

}  // namespace mt
