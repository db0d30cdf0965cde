#!/usr/bin/env python3
"""Training steps on the CPU beside PyTorch: same model, batch, threads; ours and the peer alternate in one run.

  python3 bench/steps.py --bin build/bin [--models tiny_char,lab4] [--batch 4] [--threads N] [--rounds 3] [--out FILE]
                         [--passes "flash;flash,fuse"]

Needs a Python with a current torch (pip install torch). A JSON line for each measurement, then one table: the speed ratio
(torch's step time over ours) and the ratio of peak resident memory, each from the median of the rounds. Parameter counts
must be equal before a ratio is printed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

# layers, width, heads, ffn, vocabulary, sequence; attention and MLP with biases, untied head (the zoo's specs)
MODELS = {"tiny_char": (4, 128, 4, 512, 256, 128), "lab4": (6, 512, 8, 2048, 10000, 512)}


def torch_side(name, mode, batch, threads, steps):
    import resource
    import time
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    L, C, H, Ff, V, T = MODELS[name]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.fc1, self.fc2 = nn.Linear(C, Ff), nn.Linear(Ff, C)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, H, C // H).permute(2, 0, 3, 1, 4)
            if attention == "math":
                a = (q @ k.transpose(-2, -1)) * (C // H) ** -0.5
                a = a.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")).softmax(-1) @ v
            else:
                a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj(a.transpose(1, 2).reshape(b, t, C))
            return x + self.fc2(F.gelu(self.fc1(self.ln2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.pos = nn.Embedding(V, C), nn.Embedding(T, C)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.ln, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

        def forward(self, x, y):
            h = self.tok(x) + self.pos.weight
            for block in self.blocks:
                h = block(h)
            return F.cross_entropy(self.head(self.ln(h)).view(-1, V), y.view(-1))

    attention = "math" if mode.endswith("math") else "sdpa"
    model = Model()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    fn = torch.compile(model) if mode.startswith("compile") else model
    xs, ys = torch.randint(0, V, (4, batch, T)), torch.randint(0, V, (4, batch, T))
    times = []
    for i in range(steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = fn(xs[i % 4], ys[i % 4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.item()
        times.append(time.perf_counter() - start)
    times = sorted(times[3:])
    median = times[len(times) // 2]
    print(json.dumps(dict(peer="torch " + torch.__version__, model=name, mode=mode, batch=batch, seq=T,
                          params=sum(p.numel() for p in model.parameters()), threads=threads, step_ms=median * 1e3,
                          min_ms=times[0] * 1e3, tok_s=batch * T / median,
                          peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, loss=loss)))


def measure(command, threads):
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="build/bin", help="folder of step_bench")
    parser.add_argument("--models", default="tiny_char,lab4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--passes", default="default", help="our pipelines, separated by semicolons")
    parser.add_argument("--modes", default="eager_math,eager,compile", help="of torch")
    parser.add_argument("--out", help="appends the JSON lines to this file")
    parser.add_argument("--torch-side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_side:
        torch_side(args.models, args.torch_side, args.batch, args.threads, args.steps)
        return
    lines = []

    def note(line):
        lines.append(line)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as f:
                f.write(json.dumps(line) + "\n")

    rows = []
    for model in args.models.split(","):
        ours, peers = {passes: [] for passes in args.passes.split(";")}, {mode: [] for mode in args.modes.split(",")}
        for _ in range(args.rounds):
            for passes in ours:
                ours[passes].append(measure([os.path.join(args.bin, "step_bench"), model, f"--batch={args.batch}",
                                             f"--threads={args.threads}", f"--steps={args.steps}", f"--passes={passes}"],
                                            args.threads))
                note(ours[passes][-1])
            parameters = ours[passes][-1]["params"]
            for mode in peers:
                peers[mode].append(measure([sys.executable, os.path.abspath(__file__), "--torch-side", mode, "--models", model,
                                            "--batch", str(args.batch), "--threads", str(args.threads), "--steps",
                                            str(args.steps)], args.threads))
                note(peers[mode][-1])
                if peers[mode][-1]["params"] != parameters:
                    sys.exit(f"error: {model}: {peers[mode][-1]['params']} parameters in torch, {parameters} here")
        median = lambda runs, key: statistics.median(run[key] for run in runs)
        for passes, runs in ours.items():
            ms, mib = median(runs, "step_ms"), median(runs, "peak_rss_mib")
            for mode, its in peers.items():
                its_ms, its_mib = median(its, "step_ms"), median(its, "peak_rss_mib")
                rows.append(f"{model:10} {passes:26} {mode:11} {its_ms:9.1f} {ms:9.1f} {its_ms / ms:7.2f} {its_mib:9.0f} "
                            f"{mib:9.0f} {mib / its_mib:7.2f}")
    print(f"{'model':10} {'our passes':26} {'torch':11} {'its ms':>9} {'our ms':>9} {'speed':>7} {'its MiB':>9} "
          f"{'our MiB':>9} {'memory':>7}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
