#!/usr/bin/env python3
"""Makes mixed UTF-8 text of any size out of what a Debian machine has: prose and manuals in many languages, program
sources, emoji and code points of every script.

  mixed_text.py OUT --bytes N [--nul] [--seed S] [ROOT ...]

ROOTs are folders (default: documents, manuals, headers and Python sources; for Polish prose unpack fortunes-pl,
manpages-pl and libreoffice-help-pl and name the folder, too). Each gives as many bytes as the others, its documents in
random order; 2 % are random code points. Documents are separated by an empty line, or by NUL (--nul). When all of a
ROOT are used each comes again, cut into sentences and shuffled, so that nothing repeats as it stood. The same seed over
the same files gives the same text.
"""
import argparse
import gzip
import os
import random
import re

ROOTS = ["/usr/share/doc", "/usr/share/man", "/usr/include", "/usr/lib/python3", "/usr/share/perl"]
MOST = 2_000_000  # Bytes of one file.
RANDOM_SHARE = 0.02
WORDS = (
    "zażółć gęślą jaźń świetnie że się nie w na do 😀 👩‍👩‍👧‍👦 🇵🇱 👍🏽 ❤️ don't I'LL we've e\u0301 o\u0308 \u1e9b\u0323 한국어 각 日本語 हिन्दी "
    "עברית العربية ไทย 12345 3.14 x_y ... --- \t \n \r\n \u00a0 \u3000 \u2028 \u0085 \u2581 '' \" <0x41> </s> <|endoftext|>"
).split(" ")


def random_document(rng):
    parts = []
    for _ in range(rng.randrange(1, 300)):
        kind = rng.random()
        if kind < 0.5:
            parts.append(rng.choice(WORDS) + rng.choice(["", " ", " ", "  "]))
        elif kind < 0.7:
            parts.append(chr(rng.randrange(1, 0x3100)))
        elif kind < 0.8:
            spans = [(0x20, 0xD800), (0xE000, 0x110000), (0x1F300, 0x1FB00)]
            parts.append(chr(rng.randrange(*rng.choice(spans))))
        else:
            parts.append(rng.choice([" ", "  ", "\n", "\n\n", "\t", "a", "ż", "1", "?"]))
    return "".join(parts)


def read(path):
    """The text of a file; None where it is none."""
    try:
        if os.path.islink(path) or os.path.getsize(path) > MOST:
            return None
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            text = f.read(4 * MOST)
        if b"\0" in text:
            return None
        text = text.decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    if path.endswith((".html", ".xhp")):
        text = re.sub(r"<[^>]*>", " ", text)
    return text.strip() or None


def documents(root, rng):
    paths = sorted(os.path.join(d, f) for d, _, files in os.walk(root) for f in files)
    kept = []
    rng.shuffle(paths)
    for path in paths:
        if text := read(path):
            kept.append(path)
            yield text
    while kept:
        rng.shuffle(kept)
        for path in kept:
            sentences = re.split(r"(?<=[.!?;])\s+|\n", read(path) or "")
            rng.shuffle(sentences)
            yield rng.choice(["\n", " ", "\n    "]).join(sentences)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("roots", nargs="*", default=ROOTS)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--nul", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_intermixed_args()
    rng = random.Random(args.seed)
    sources = [documents(root, rng) for root in args.roots]
    shares = [0] * len(sources)  # Bytes of each.
    separator, size, of_random = (b"\0" if args.nul else b"\n\n"), 0, 0
    with open(args.out, "wb") as out:
        while size < args.bytes:
            if of_random < size * RANDOM_SHARE:
                text = random_document(rng)
                of_random += len(text.encode())
            else:
                least = shares.index(min(shares))
                if (text := next(sources[least], None)) is None:
                    parser.error(f"{args.roots[least]}: no text there")
                shares[least] += len(text.encode())
            size += out.write((separator if size else b"") + text.replace("\0", " ").encode())


if __name__ == "__main__":
    main()
