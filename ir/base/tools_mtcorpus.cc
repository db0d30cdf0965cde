// The command line of mtcorpus.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "prep",
     .positionals = "",
     .summary = "Turns UTF-8 text into token shards with a train, val and test split."},
    {.name = "stat", .positionals = "DIR", .summary = "Shows a corpus: sizes, vocabulary, unigram and bigram entropy."},
};

constexpr FlagDef kFlags[] = {
    {.name = "input",
     .metavar = "FILE|-",
     .help = "Text file, folder of them, or - for standard input",
     .commands = "prep"},
    {.name = "out", .metavar = "DIR", .help = "Where the corpus goes", .commands = "prep"},
    {.name = "tokenizer",
     .metavar = "char|bpe:N",
     .help = "Characters, or byte-level BPE of N tokens",
     .default_text = "bpe:10000",
     .commands = "prep"},
    {.name = "split",
     .metavar = "A,B,C",
     .help = "Per cent of documents in train, val and test",
     .default_text = "85,10,5",
     .commands = "prep"},
    {.name = "seed",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Seed of the documents' order",
     .default_text = "0",
     .commands = "prep",
     .min = 0},
    {.name = "invalid-utf8",
     .kind = FlagKind::kChoice,
     .help = "What to do with bytes that are not UTF-8",
     .default_text = "refuse",
     .commands = "prep",
     .choices = "refuse|replace|skip"},
    {.name = "json", .kind = FlagKind::kBool, .help = "Prints JSON", .commands = "stat"},
};

}  // namespace

constinit const ToolDef kMtcorpus = {
    .name = "mtcorpus",
    .summary = "turns text into token shards",
    .commands = kCommands,
    .flags = kFlags,
    .examples =
        "mtcorpus prep --input book.txt --out corpus --tokenizer char\n"
        "mtcorpus stat corpus",
};

}  // namespace mt
