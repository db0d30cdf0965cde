#!/usr/bin/env python3
"""Encoding speed of tokenizer_bench beside tokenizers, tiktoken and sentencepiece: one thread, one text after the other,
taking turns in one run. Prints JSON lines: megabytes a second of processor time, the best of the rounds.

  tokenizer_peer.py BENCH TEXTS TOKENIZER_JSON [--spm MODEL] [--rounds N]

BENCH is build/bin/tokenizer_bench, TEXTS are UTF-8 separated by NUL, TOKENIZER_JSON is a corpus's (mtcorpus prep
--tokenizer bpe:N), MODEL a SentencePiece BPE model. The ids of all must be the same, or it says so.
"""
import argparse
import array
import json
import os
import platform
import subprocess
import time

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
import sentencepiece  # noqa: E402
import tiktoken  # noqa: E402
import tokenizers  # noqa: E402

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_names():
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {chr(b): b for b in kept}
    names.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in kept)})
    return names


def of_tiktoken(path):
    with open(path) as f:
        file = json.load(f)
    names = byte_names()
    special = {t["content"]: t["id"] for t in file["added_tokens"]}
    ranks = {bytes(names[c] for c in t): i for t, i in file["model"]["vocab"].items() if t not in special}
    encoding = tiktoken.Encoding("own", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=special)
    return encoding.encode_ordinary


def of_tokenizers(path):
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def of_sentencepiece(path):
    return sentencepiece.SentencePieceProcessor(model_file=path).encode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bench")
    parser.add_argument("texts")
    parser.add_argument("tokenizer_json")
    parser.add_argument("--spm")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with open(args.texts, "rb") as f:
        texts = f.read().decode().split("\0")
    size = os.path.getsize(args.texts)
    cases = [("bpe", args.tokenizer_json, {"tokenizers": of_tokenizers, "tiktoken": of_tiktoken})]
    if args.spm:
        cases.append(("spm", "spm:" + args.spm, {"sentencepiece": of_sentencepiece}))
    versions = {m.__name__: m.__version__ for m in (tokenizers, tiktoken, sentencepiece)}
    for name, spec, makers in cases:
        peers = {peer: make(spec.split(":", 1)[-1]) for peer, make in makers.items()}
        best = {}
        rows = {}
        for _ in range(args.rounds):
            line = subprocess.run([args.bench, spec, args.texts, "--ids=ids.tmp"], check=True, capture_output=True)
            ours = json.loads(line.stdout)
            best["mt"] = max(best.get("mt", 0), ours["megabytes_per_second"])
            for peer, encode in peers.items():
                start = time.process_time()
                rows[peer] = [encode(text) for text in texts]
                best[peer] = max(best.get(peer, 0), size / (time.process_time() - start) / 1e6)
        ids = array.array("i")
        with open("ids.tmp", "rb") as f:
            ids.frombytes(f.read())
        os.remove("ids.tmp")
        same = {peer: array.array("i", [i for row in r for i in [*row, -1]]) == ids for peer, r in rows.items()}
        print(json.dumps({"case": name, "tokenizer": ours["tokenizer"], "bytes": size, "tokens": ours["tokens"],
                          "rounds": args.rounds, "megabytes_per_second": {k: round(v, 2) for k, v in best.items()},
                          "same_ids": same, "versions": versions, "load": os.getloadavg()[0],
                          "cpu": next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if "model name" in l), ""),
                          "python": platform.python_version()}), flush=True)


if __name__ == "__main__":
    main()
