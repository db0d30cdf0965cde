#!/usr/bin/env python3
"""Training steps beside PyTorch: same model, batch and technique; ours and the peer alternate in one run.

  python3 bench/steps.py [--target cpu|cuda] [--bin build/bin] [--models lab4:64,gpt2_wide32k:125] [--rounds 3]
                         [--techniques flash,fast] [--passes "flash;flash,fuse" --modes f32_flash,f32_flash_compile]

Needs a Python with a current torch (pip install torch). A JSON line for each measurement, then one table: the speed ratio
(torch's step time over ours) and the ratio of memory, each from the median of the rounds. Memory is the peak resident set on
the CPU; on a GPU our arena, which the plan states and `mtrun --measure` finds, beside torch's max_memory_allocated. Random
tokens. Parameter counts must be equal before a ratio is printed; where torch pads its vocabulary for speed, the padding is not counted.

Without --passes the pairs of TECHNIQUES are measured. On a GPU all eager modes of a model and round share one process of
torch. A mode of torch is words joined by "_": f32, tf32 or bf16 (autocast); math (written-out attention), flash
(scaled_dot_product_attention) or window (the same with a mask of T/4 keys); ckpt (checkpoint of each block); compile (torch.compile);
unpadded (a vocabulary as the model has it, on a GPU, too).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

# layers, width, heads, ffn, vocabulary, sequence, dropout, tied head, biases in attention: the zoo's specs
MODELS = {
    "tiny_char": (4, 128, 4, 512, 256, 128, 0.0, False, True),
    "lab4": (6, 512, 8, 2048, 10000, 512, 0.0, False, True),
    "gpt2_wide32k": (12, 768, 12, 3072, 32000, 256, 0.0, False, False),
    "so_small": (4, 256, 8, 1024, 50257, 256, 0.1, False, True),
    "gpt2_124m": (12, 768, 12, 3072, 50257, 1024, 0.0, True, True),
}
# name: our passes, torch's mode
TECHNIQUES = {
    "cpu": {
        "written-out": ("default", "f32_math"),
        "flash": ("default", "f32_flash"),
        "compiled": ("default", "f32_flash_compile"),
    },
    "cuda": {
        "tf32": ("tf32,pad_vocab,fuse", "tf32_math"),
        "tf32_flash": ("tf32,flash,pad_vocab,fuse", "tf32_flash"),
        "tf32_window": ("tf32,flash:window=T/4,pad_vocab,fuse", "tf32_window"),
        "tf32_remat": ("tf32,pad_vocab,fuse,remat", "tf32_math_ckpt"),
        "tf32_flash_remat": ("tf32,flash,pad_vocab,fuse,remat", "tf32_flash_ckpt"),
        "bf16": ("bf16,pad_vocab,fuse", "bf16_math"),
        "bf16_remat": ("bf16,pad_vocab,fuse,remat", "bf16_math_ckpt"),
        "flash": ("bf16,flash,pad_vocab,fuse", "bf16_flash"),
        "window": ("bf16,flash:window=T/4,pad_vocab,fuse", "bf16_window"),
        "remat": ("bf16,flash,pad_vocab,fuse,remat", "bf16_flash_ckpt"),
        "window_remat": ("bf16,flash:window=T/4,pad_vocab,fuse,remat", "bf16_window_ckpt"),
        "unpadded": ("tf32,fuse", "tf32_math_unpadded"),
        "fast": ("default", "bf16_flash_compile"),
        "small": ("bf16,flash,chunked_loss,pad_vocab,fuse,remat", "bf16_flash_ckpt_compile"),
    },
}
HEAD = f"{'model':13} {'technique':34} {'torch ms':>9} {'our ms':>9} {'speed':>7} {'its MiB':>9} {'our MiB':>9} {'memory':>7}"
BATCHES = {"cpu": {"tiny_char": 4, "lab4": 4}, "cuda": {"lab4": 64, "gpt2_wide32k": 125, "so_small": 64, "gpt2_124m": 64}}


def torch_side(name, mode, batch, threads, steps, target):
    import gc
    import resource
    import time
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    words = mode.split("_")
    cuda = target == "cuda"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if "f32" not in words else "highest")
    L, C, H, Ff, V, T, p, tied, biases = MODELS[name]
    padded = -(-V // 64) * 64 if cuda and "unpadded" not in words else V

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.proj = nn.Linear(C, 3 * C, bias=biases), nn.Linear(C, C, bias=biases)
            self.fc1, self.fc2 = nn.Linear(C, Ff), nn.Linear(Ff, C)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, H, C // H).permute(2, 0, 3, 1, 4)
            drop = p if self.training else 0.0
            if "math" in words:
                a = (q @ k.transpose(-2, -1)) * (C // H) ** -0.5
                a = F.dropout(a.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1), float("-inf")).softmax(-1),
                              drop, self.training) @ v
            elif "window" in words:
                ones = torch.ones(t, t, dtype=torch.bool, device=x.device)
                a = F.scaled_dot_product_attention(q, k, v, attn_mask=ones.tril() & ones.triu(-(t // 4)), dropout_p=drop)
            else:
                a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
            x = x + F.dropout(self.proj(a.transpose(1, 2).reshape(b, t, C)), p, self.training)
            return x + F.dropout(self.fc2(F.gelu(self.fc1(self.ln2(x)), approximate="tanh")), p, self.training)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.pos = nn.Embedding(padded, C), nn.Embedding(T, C)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.ln, self.head = nn.LayerNorm(C), nn.Linear(C, padded, bias=False)
            if tied:
                self.head.weight = self.tok.weight

        def forward(self, x, y):
            h = F.dropout(self.tok(x) + self.pos.weight, p, self.training)
            for block in self.blocks:
                h = checkpoint(block, h, use_reentrant=False) if "ckpt" in words else block(h)
            return F.cross_entropy(self.head(self.ln(h)).view(-1, padded).float(), y.view(-1))

    model = Model().to(target)
    for q in model.parameters():
        if q.dim() > 1:
            nn.init.normal_(q, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    fn = torch.compile(model) if "compile" in words else model
    xs, ys = (torch.randint(0, V, (4, batch, T), device=target) for _ in range(2))
    times = []
    for i in range(steps + 3):
        if cuda and i == 3:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(target, dtype=torch.bfloat16, enabled="bf16" in words):
            loss = fn(xs[i % 4], ys[i % 4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.item()  # Waits for the forward pass alone.
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = sorted(times[3:])
    median = times[len(times) // 2]
    line = dict(peer="torch " + torch.__version__, model=name, mode=mode, batch=batch, seq=T,
                params=sum(q.numel() for q in model.parameters()) - (padded - V) * C * (1 if tied else 2),
                padded_vocab=padded, threads=threads, step_ms=median * 1e3, min_ms=times[0] * 1e3, tok_s=batch * T / median, loss=loss)
    if cuda:
        line.update(gpu=torch.cuda.get_device_name(), peak_mib=torch.cuda.max_memory_allocated() / 2**20,
                    reserved_mib=torch.cuda.max_memory_reserved() / 2**20)
    else:
        line.update(peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(line), flush=True)
    del model, optimizer, fn, xs, ys, loss
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def measure(command, threads):
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bin", default="build/bin", help="folder of step_bench")
    parser.add_argument("--models", help="NAME or NAME:BATCH, separated by commas")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--techniques", help="of the target's list; default: all")
    parser.add_argument("--passes", help="our pipelines, separated by semicolons, each beside each of --modes")
    parser.add_argument("--modes", help="of torch, separated by commas")
    parser.add_argument("--out", help="appends the JSON lines to this file")
    parser.add_argument("--torch-side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = dict((name.split(":") + [None])[:2] for name in (args.models or ",".join(BATCHES[args.target])).split(","))
    for name in models:
        models[name] = int(models[name] or BATCHES[args.target].get(name, 4))
    if args.torch_side:
        for name, batch in models.items():
            for mode in args.torch_side.split(","):
                torch_side(name, mode, batch, args.threads, args.steps, args.target)
        return
    if bool(args.passes) != bool(args.modes):
        sys.exit("error: --passes and --modes go together")
    known = TECHNIQUES[args.target]
    if args.passes:
        pairs = [(f"{passes} / {mode}", passes, mode) for passes in args.passes.split(";") for mode in args.modes.split(",")]
    else:
        chosen = (args.techniques or ",".join(known)).split(",")
        if not set(chosen) <= set(known):
            sys.exit(f"error: --techniques {args.techniques}; known for {args.target}: {', '.join(known)}")
        pairs = [(name, *known[name]) for name in chosen]

    def note(line):
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as f:
                f.write(json.dumps(line) + "\n")
        return line

    memory = {"cpu": ("peak_rss_mib", "peak_rss_mib"), "cuda": ("arena_mib", "peak_mib")}[args.target]
    rows = []
    for model, batch in models.items():
        ours, torch = {pair[1]: [] for pair in pairs}, {pair[2]: [] for pair in pairs}
        for _ in range(args.rounds):
            for passes in ours:
                ours[passes].append(note(measure(
                    [os.path.join(args.bin, "step_bench"), model, f"--batch={batch}", f"--target={args.target}",
                     f"--threads={args.threads}", f"--steps={args.steps}", f"--passes={passes}"], args.threads)[-1]))
            parameters = ours[passes][-1]["params"]
            # On the CPU the peak is of the process: a process for each mode, as for what torch.compile keeps.
            shared = [mode for mode in torch if args.target == "cuda" and "compile" not in mode.split("_")]
            groups = ([shared] if shared else []) + [[mode] for mode in torch if mode not in shared]
            for modes in groups:
                for line in measure([sys.executable, os.path.abspath(__file__), "--torch-side", ",".join(modes), "--models",
                                     f"{model}:{batch}", "--target", args.target, "--threads", str(args.threads), "--steps",
                                     str(args.steps)], args.threads):
                    torch[line["mode"]].append(note(line))
                    if line["params"] != parameters:
                        sys.exit(f"error: {model}: {line['params']} parameters in torch, {parameters} here")
        median = lambda runs, key: statistics.median(run[key] for run in runs)
        for name, passes, mode in pairs:
            ms, its_ms = median(ours[passes], "step_ms"), median(torch[mode], "step_ms")
            mib, its_mib = median(ours[passes], memory[0]), median(torch[mode], memory[1])
            rows.append(f"{model:13} {name:34} {its_ms:9.1f} {ms:9.1f} {its_ms / ms:7.2f} {its_mib:9.0f} {mib:9.0f} {mib / its_mib:7.2f}")
    print(HEAD)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
