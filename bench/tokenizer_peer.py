#!/usr/bin/env python3
"""Ids and encoding speed of tokenizer_bench beside tokenizers, tiktoken and sentencepiece: one thread, one text after
the other, taking turns in one run. Prints a JSON line for each tokenizer: megabytes a second of processor time, the
best of the rounds, and how many texts have other ids.

  tokenizer_peer.py BENCH TEXTS TOKENIZER ... [--rounds N]

BENCH is build/bin/tokenizer_bench; TEXTS are UTF-8 separated by NUL (mixed_text.py makes them); a TOKENIZER is
  FOLDER           of a byte-level tokenizer.json (a corpus of mtcorpus prep --tokenizer bpe:N has one), or of GPT-2's
                   published encoder.json and vocab.bpe
  STEM.tiktoken    cl100k_base, ...: ranks that OpenAI published; tiktoken checks their hash
  FILE.model       SentencePiece BPE
Exits with 1 where an id differs; the first ones go to stderr.
"""
import argparse
import array
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
import sentencepiece  # noqa: E402
import tiktoken  # noqa: E402
import tiktoken.load  # noqa: E402
import tiktoken_ext.openai_public  # noqa: E402
import tokenizers  # noqa: E402

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_names():
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {chr(b): b for b in kept}
    names.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in kept)})
    return names


def of_tiktoken(path):
    """Of a tokenizer.json. None where tiktoken has no such thing: a normalizer, more than one split."""
    with open(path) as f:
        file = json.load(f)
    steps = file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
    patterns += [GPT2 for step in steps if step["type"] == "ByteLevel" and step.get("use_regex", True)]
    normalizer = file.get("normalizer") or {"normalizers": []}
    if len(patterns) != 1 or normalizer.get("normalizers") != []:
        return None
    names = byte_names()
    special = {t["content"]: t["id"] for t in file["added_tokens"]}
    ranks = {bytes(names[c] for c in t): i for t, i in file["model"]["vocab"].items() if t not in special}
    encoding = tiktoken.Encoding("own", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens=special)
    return encoding.encode_ordinary


def of_published(name, files):
    """tiktoken's own definition of an encoding; what it would fetch is in `files`, by the ends of the addresses."""
    def read(url, expected_hash=None):
        path = next(path for end, path in files.items() if url.endswith(end))
        with open(path, "rb") as f:
            contents = f.read()
        if not tiktoken.load.check_hash(contents, expected_hash):
            sys.exit(f"{path}: is not the file that was published as {url}")
        return contents

    tiktoken.load.read_file_cached = read
    return tiktoken.Encoding(**tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()).encode_ordinary


def of_gpt2_files(folder):
    bpe = tokenizers.models.BPE.from_file(f"{folder}/encoder.json", f"{folder}/vocab.bpe")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def of_tokenizers(path):
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def of_sentencepiece(path):
    return sentencepiece.SentencePieceProcessor(model_file=path).encode


def peers_of(path):
    """The name, how tokenizer_bench calls it, its files, and the peers by their names."""
    name = os.path.basename(os.path.normpath(path))
    if path.endswith(".model"):
        return name, "spm:" + path, [path], {"sentencepiece": of_sentencepiece(path)}
    if path.endswith(".tiktoken"):
        stem = name.split(".")[-2]
        return name, path, [path], {"tiktoken": of_published(stem, {f"/{stem}.tiktoken": path})}
    file = os.path.join(path, "tokenizer.json")
    if os.path.exists(file):
        peers = {"tokenizers": of_tokenizers(file), "tiktoken": of_tiktoken(file)}
        return name, "hf:" + path, [file], {k: v for k, v in peers.items() if v}
    files = {f: os.path.join(path, f) for f in ("encoder.json", "vocab.bpe")}
    peers = {"tokenizers": of_gpt2_files(path), "tiktoken": of_published("gpt2", files)}
    return name, "hf:" + path, [*files.values()], peers


def ours_of(bench, spec, texts):
    """The JSON line, and the ids, each text's followed by -1."""
    ids = array.array("i")
    with tempfile.TemporaryDirectory() as folder:
        line = subprocess.run([bench, spec, texts, f"--ids={folder}/ids"], check=True, capture_output=True).stdout
        with open(f"{folder}/ids", "rb") as f:
            ids.frombytes(f.read())
    return json.loads(line), ids


def differing(texts, ids, rows, peer):
    """How many texts have other ids. Says where in the first ones."""
    count, at = 0, 0
    for number, row in enumerate(rows):
        end = ids.index(-1, at)
        ours, at = ids[at:end], end + 1
        if ours == row:
            continue
        count += 1
        if count <= 5:
            k = next((k for k, (a, b) in enumerate(zip(ours, row)) if a != b), min(len(ours), len(row)))
            print(f"{peer}: text {number} of {len(texts)}, token {k}: ours {ours[k:k + 8].tolist()}, "
                  f"theirs {row[k:k + 8].tolist()}", file=sys.stderr)
    return count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bench")
    parser.add_argument("texts")
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_intermixed_args()
    with open(args.texts, "rb") as f:
        texts = f.read().decode().split("\0")
    size = os.path.getsize(args.texts)
    versions = {m.__name__: m.__version__ for m in (tokenizers, tiktoken, sentencepiece)}
    bad = 0
    for path in args.tokenizers:
        name, spec, files, peers = peers_of(path)
        best, differ = {}, {}
        for round_ in range(args.rounds):
            ours, ids = ours_of(args.bench, spec, args.texts)
            best["mt"] = max(best.get("mt", 0), ours["megabytes_per_second"])
            for peer, encode in peers.items():
                seconds, rows = 0, []
                for text in texts:
                    start = time.process_time()
                    row = encode(text)
                    seconds += time.process_time() - start
                    rows.append(array.array("i", row))
                best[peer] = max(best.get(peer, 0), size / seconds / 1e6)
                if round_ == 0:
                    differ[peer] = differing(texts, ids, rows, peer)
        bad += sum(differ.values())
        hashes = {os.path.basename(f): hashlib.sha256(open(f, "rb").read()).hexdigest() for f in files}
        print(json.dumps({"case": name, "tokenizer": ours["tokenizer"], "sha256": hashes, "bytes": size,
                          "texts": len(texts), "tokens": ours["tokens"], "rounds": args.rounds,
                          "megabytes_per_second": {k: round(v, 2) for k, v in best.items()},
                          "texts_that_differ": differ, "versions": versions, "load": round(os.getloadavg()[0], 2),
                          "cpu": next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if "model name" in l), ""),
                          "python": platform.python_version()}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
