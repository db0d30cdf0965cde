// The command line of mtcorpus.
#include "ir/base/tools.h"

namespace mt {
namespace {

constexpr CommandDef kCommands[] = {
    {.name = "prep",
     .positionals = "",
     .summary =
         "Turns UTF-8 text into token shards with a train, val and test split; goes on where it was interrupted."},
    {.name = "stat",
     .positionals = "[DIR|FILE]",
     .summary = "Checks and shows a corpus, or a text: sizes, words, unigram and bigram entropy; compares tokenizers."},
    {.name = "list", .positionals = "[NAME]", .summary = "Names Speakleash's corpora, or describes one."},
    {.name = "get",
     .positionals = "NAME",
     .summary = "Downloads a corpus of Speakleash, or hf:OWNER/NAME: tokenizer, config and safetensors."},
};

constexpr FlagDef kFlags[] = {
    {.name = "input",
     .metavar = "FILE",
     .help = "Text file, .jsonl, .jsonl.zst, folder of them, or - for standard input",
     .commands = "prep stat"},
    {.name = "out",
     .metavar = "DIR",
     .help = "Where the corpus goes; get: where the files go (data/raw, or the cache for hf:)",
     .commands = "prep get"},
    {.name = "base-url", .metavar = "URL", .help = "Another server with the same files", .commands = "list get"},
    {.name = "quality",
     .kind = FlagKind::kChoice,
     .help = "Keeps documents of this quality, by Speakleash's own judgement",
     .commands = "get",
     .choices = "HIGH|MEDIUM|LOW"},
    {.name = "limit",
     .kind = FlagKind::kInt,
     .metavar = "N",
     .help = "Keeps the first N documents (of that quality)",
     .commands = "get",
     .min = 1},
    {.name = "tokenizer",
     .metavar = "FILE",
     .help = "bpe:N or char, learned from the train split; gpt2, OWNER/NAME, hf:DIR, spm:FILE, or a tokenizer file; "
             "stat: several with commas are compared, and one with a corpus's own",
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
     .help = "What a document is; auto: a record of .jsonl, each file of a folder, else what blank lines separate",
     .default_text = "auto",
     .commands = "prep stat",
     .choices = "auto|file|blank-line|line|record"},
    {.name = "text-field",
     .metavar = "NAME",
     .help = "The string of a record (a line of .jsonl or .jsonl.zst) that is its text",
     .default_text = "text",
     .commands = "prep stat"},
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
     .default_text = "16777216",
     .commands = "prep",
     .min = 1},
    {.name = "overwrite",
     .kind = FlagKind::kBool,
     .help = "Replaces the corpus that DIR holds, or unfinished work of another command or input",
     .commands = "prep"},
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
    .summary = "fetches texts and turns them into token shards",
    .commands = kCommands,
    .flags = kFlags,
    .examples =
        "mtcorpus prep --input book.txt --out corpus --tokenizer char\n"
        "mtcorpus get wolne_lektury_corpus --quality HIGH --limit 100000\n"
        "mtcorpus stat corpus\n"
        "mtcorpus stat --input book.txt\n"
        "mtcorpus stat corpus --tokenizer gpt2,bpe:10000,spm:tokenizer.model",
};

}  // namespace mt
