"""Trains small tokenizers with other people's libraries and writes them with the ids that those give: golden data.

    python make.py OUT            needs tokenizers, tiktoken and sentencepiece; tests/tokenizer_test.cc reads the result
    python make.py OUT --check TEXTS BENCH [VOCAB]
                                  larger vocabularies, and TEXTS (UTF-8, separated by NUL) through each library and
                                  through BENCH (build/bin/tokenizer_bench); prints mismatches and speeds

GPT-2's own files are not needed: what is compared is the reading of each format and the algorithm.
"""

import array
import base64
import json
import os
import subprocess
import sys
import time

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLES = [
    "Litwo! Ojczyzno moja! ty jesteś jak zdrowie;\nIle cię trzeba cenić, ten tylko się dowie,\nKto cię stracił.",
    "It's the year 1834, isn't it? WE'LL see... \t\tdon't   you're 12345678 \r\n\r\n  x_y = f(a[0]) + 3.14;\n",
    "zażółć gęślą jaźń 😀😀 👩‍👩‍👧‍👦 e\u0301o\u0308 \u1e9b\u0323 한국어 日本語 हिन्दी\u00a0\u3000\u2028",
    "int main() {\n    for (int i = 0; i < 10; ++i) {\n\t\tprintf(\"%d\\n\", i);\n    }\n    return 0;\n}\n",
    "  leading, trailing and    runs  of spaces  ",
    "▁ already ▁▁here <0x41> </s> <tool>call</tool> <|endoftext|>",
    "a",
    " ",
    "\n",
    "\u017f's 'S 'LL ³²¹ ½ Ⅷ ١٢٣ ǅ ª º _ __ ‿",
]


def train_byte_level(texts, vocab, pre_tokenizer, normalizer=None, added=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if added:
        tokenizer.add_tokens([AddedToken(a, normalized=n) for a, n in added])
    tokenizer.encode_special_tokens = True  # A document that spells out a special token is a text, too.
    return tokenizer


def train_sentencepiece(texts, vocab, path, **options):
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=path,
        vocab_size=vocab,
        max_sentence_length=65536,
        minloglevel=2,
        num_threads=2,
        **options,
    )
    os.remove(path + ".vocab")
    return sentencepiece.SentencePieceProcessor(model_file=path + ".model")


def llama_tokenizer(model_file):
    """The tokenizer.json that Llama 2 has beside its tokenizer.model: merges by the scores of their results."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model_file)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, rank in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and not processor.is_byte(rank) and not processor.is_control(rank):
                merges.append((rank, vocab[left], vocab[right], left, right))
    merges = [(left, right) for _, _, _, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_of_name():
    kept = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in kept]
    table = {chr(b): b for b in kept}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def build(texts, folder, vocab):
    """Yields (name, spec, encode, text_of) of every tokenizer; files are in `folder`."""
    os.makedirs(folder, exist_ok=True)
    byte_level = pre_tokenizers.ByteLevel

    def hf(name, tokenizer):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
        tokenizer.save(f"{folder}/{name}/tokenizer.json", pretty=False)
        return name, f"hf:{folder}/{name}", lambda t: tokenizer.encode(t, add_special_tokens=False).ids

    gpt2 = train_byte_level(texts, vocab, byte_level(add_prefix_space=False))
    yield hf("gpt2", gpt2)
    prefixed = train_byte_level(texts, vocab, byte_level(add_prefix_space=True), normalizers.NFC())
    yield hf("nfc_prefix", prefixed)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    added = [("<tool>", False), ("</tool>", False), ("    ", False), ("  ", True)]
    yield hf("split_added", train_byte_level(texts, vocab, split, added=added))
    removed = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CL100K), "removed", invert=True),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    ignoring = train_byte_level(texts, vocab, removed)
    state = json.loads(ignoring.to_str())
    state["model"]["ignore_merges"] = True
    ignoring = Tokenizer.from_str(json.dumps(state))
    ignoring.encode_special_tokens = True
    yield hf("ignore_merges", ignoring)

    # The same vocabulary in GPT-2's two files, and as tiktoken has it.
    state = json.loads(gpt2.to_str())["model"]
    os.makedirs(f"{folder}/files", exist_ok=True)
    with open(f"{folder}/files/encoder.json", "w") as f:
        json.dump(state["vocab"], f)
    with open(f"{folder}/files/vocab.bpe", "w") as f:
        f.write("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in state["merges"]))
    yield "files", f"{folder}/files/encoder.json", lambda t: gpt2.encode(t, add_special_tokens=False).ids
    names = byte_of_name()
    by_id = sorted(state["vocab"].items(), key=lambda item: item[1])
    tokens = [bytes(names[c] for c in token) for token, _ in by_id if token != "<|endoftext|>"]
    for encoding, pattern in (("gpt2", GPT2), ("cl100k_base", CL100K)):
        path = f"{folder}/own.{encoding}.tiktoken"
        with open(path, "w") as f:
            f.writelines(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
        encoder = tiktoken.Encoding(
            "own", pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
            special_tokens={"<|endoftext|>": len(tokens)},
        )
        yield f"tiktoken_{encoding}", path, encoder.encode_ordinary

    common = dict(model_type="bpe", normalization_rule_name="identity")
    llama = dict(byte_fallback=True, remove_extra_whitespaces=False, split_digits=True)
    llama["allow_whitespace_only_pieces"] = True
    spm = train_sentencepiece(texts, vocab, f"{folder}/llama", **common, **llama)
    yield "spm_llama", f"spm:{folder}/llama.model", spm.encode
    defaults = train_sentencepiece(
        texts, vocab, f"{folder}/defaults", **common, user_defined_symbols=["<tool>", "</tool>"],
        character_coverage=0.99,
    )
    yield "spm_defaults", f"spm:{folder}/defaults.model", defaults.encode
    yield hf("llama", llama_tokenizer(f"{folder}/llama.model"))


def encode_ours(bench, spec, texts_path, out):
    line = subprocess.run([bench, spec, texts_path, f"--ids={out}"], check=True, capture_output=True, text=True).stdout
    ids = array.array("i")
    with open(out, "rb") as f:
        ids.frombytes(f.read())
    os.remove(out)
    rows, row = [], []
    for i in ids:
        if i < 0:
            rows.append(row)
            row = []
        else:
            row.append(i)
    return rows, json.loads(line)["megabytes_per_second"]


def check(folder, texts_path, bench, vocab):
    with open(texts_path, "rb") as f:
        texts = f.read().decode().split("\0")
    size = os.path.getsize(texts_path)
    print(f"{size:,} bytes in {len(texts):,} texts; tokenizers {tokenizers.__version__}, tiktoken "
          f"{tiktoken.__version__}, sentencepiece {sentencepiece.__version__}")
    training = texts[:: max(1, size // 4_000_000)]
    for name, spec, encode in build(training, folder, vocab):
        start = time.process_time()
        theirs = [encode(text) for text in texts]
        seconds = time.process_time() - start
        ours, speed = encode_ours(bench, spec, texts_path, f"{folder}/ids")
        bad = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
        print(f"{name:22} tokens {sum(map(len, theirs)):>11,}  texts that differ {len(bad):5}  ours {speed:6.1f} MB/s  "
              f"theirs {size / seconds / 1e6:6.1f} MB/s", flush=True)
        for i in bad[:3]:
            at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), 0)
            print(f"    text {i}, token {at}: ours {ours[i][at:at + 8]}, theirs {theirs[i][at:at + 8]}")


def main():
    folder = sys.argv[1]
    if "--check" in sys.argv:
        texts, bench, *vocab = sys.argv[sys.argv.index("--check") + 1 :]
        return check(folder, texts, bench, int(vocab[0]) if vocab else 16000)
    golden = [
        {"name": name, "spec": spec.replace(folder + "/", "@/"), "ids": [list(encode(text)) for text in SAMPLES]}
        for name, spec, encode in build(SAMPLES * 3, folder, 560)
    ]
    with open(f"{folder}/golden.json", "w") as f:
        json.dump({"texts": SAMPLES, "tokenizers": golden}, f, ensure_ascii=False)
        f.write("\n")


if __name__ == "__main__":
    main()
