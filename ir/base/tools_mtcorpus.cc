// The command line of mtcorpus.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "prep",
     .positionals = "",
     .summary = "Turns UTF-8 text into token shards with a train, val and test split."},
    {.name = "stat",
     .positionals = "[DIR]",
     .summary = "Checks and shows a corpus, or a text: sizes, words, unigram and bigram entropy."},
};

constexpr FlagDef kFlags[] = {
    {.name = "input",
     .metavar = "FILE",
     .help = "Text file, folder of them, or - for standard input",
     .commands = "prep stat"},
    {.name = "out", .metavar = "DIR", .help = "Where the corpus goes", .commands = "prep"},
    {.name = "tokenizer",
     .metavar = "FILE",
     .help = "bpe:N (byte-level, N tokens) or char, learned from the train split; or a tokenizer file",
     .default_text = "bpe:10000",
     .commands = "prep stat"},
    {.name = "split",
     .kind = FlagKind::kList,
     .metavar = "A,B,C",
     .help = "Shares of the documents in train, val and test",
     .default_text = "85,10,5",
     .commands = "prep"},
    {.name = "seed",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Seed of the split and of the documents' order",
     .default_text = "0",
     .commands = "prep",
     .min = 0},
    {.name = "documents",
     .kind = FlagKind::kChoice,
     .help = "What a document is; auto: each file of a folder, else what blank lines separate",
     .default_text = "auto",
     .commands = "prep stat",
     .choices = "auto|file|blank-line|line"},
    {.name = "invalid-utf8",
     .kind = FlagKind::kChoice,
     .help = "What to do with bytes that are not UTF-8",
     .default_text = "error",
     .commands = "prep stat",
     .choices = "error|replace|skip"},
    {.name = "tokenizer-bytes",
     .kind = FlagKind::kBytes,
     .metavar = "N",
     .help = "BPE is learned from at most this much of the train split",
     .default_text = "256MiB",
     .commands = "prep stat",
     .min = 1},
    {.name = "shard-tokens",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Tokens in one shard",
     .default_text = "67108864",
     .commands = "prep",
     .min = 1},
    {.name = "overwrite", .kind = FlagKind::kBool, .help = "Replaces the corpus that DIR holds", .commands = "prep"},
    {.name = "top",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "How many of the most common tokens to list",
     .default_text = "10",
     .commands = "stat",
     .min = 0},
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
        "mtcorpus stat corpus\n"
        "mtcorpus stat --input book.txt",
};

}  // namespace mt
