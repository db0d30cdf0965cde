#!/usr/bin/env python3
"""Causal attention on a GPU beside PyTorch's, same shapes: in bf16 flash (also in its deterministic form) and cuDNN, in TF32
the memory-efficient kernel and the written-out one.

  python3 bench/attention_peer.py [--bin build/bin/attention_bench] [--dtype bf16|tf32] [--rounds 3] [--out FILE] [B,H,G,T,D ...]

Needs a Python with a current torch. With --bin, ours and the peers alternate, shape by shape, in one run. A JSON line for
each measurement (medians of runs that each follow a fill of 256 MB), then one table: times of the medians of the rounds
and our speed against each peer's.
"""
import argparse
import json
import statistics
import subprocess

SHAPES = ["125,12,12,256,64", "64,8,8,512,64", "32,12,12,1024,64", "8,12,12,4096,64", "2,12,12,16384,64",
          "32,8,8,512,128", "8,16,16,4096,128", "2,16,16,16384,128"]


def peers(shape, dtype):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    torch.utils.deterministic.fill_uninitialized_memory = False
    b, h, g, t, d = map(int, shape.split(","))
    tf32 = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    number = torch.float32 if tf32 else torch.bfloat16
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def median(run):
        for _ in range(3):
            run()
        times = []
        for _ in range(21):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    q = torch.randn(b, h, t, d, device="cuda", dtype=number, requires_grad=True)
    k, v = (torch.randn(b, g, t, d, device="cuda", dtype=number, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    product = 2 * b * h * d * t * t / 2
    of_bf16 = (("torch flash", SDPBackend.FLASH_ATTENTION, False),
               ("torch flash deterministic", SDPBackend.FLASH_ATTENTION, True),
               ("torch cudnn", SDPBackend.CUDNN_ATTENTION, False))
    of_tf32 = (("torch efficient", SDPBackend.EFFICIENT_ATTENTION, False), ("torch math", SDPBackend.MATH, False))
    for name, backend, deterministic in of_tf32 if tf32 else of_bf16:
        row = dict(who=name, B=b, H=h, G=g, T=t, D=d, dtype=dtype, deterministic=deterministic)
        torch.use_deterministic_algorithms(deterministic)
        try:
            with sdpa_kernel(backend):
                def forward():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=g != h)

                with torch.no_grad():
                    row["forward_ms"] = median(forward)
                out = forward()

                def backward():
                    q.grad = k.grad = v.grad = None
                    out.backward(grad, retain_graph=True)

                row["backward_ms"] = median(backward)
            row["forward_tflop_s"] = 2 * product / row["forward_ms"] / 1e9
            row["backward_tflop_s"] = 5 * product / row["backward_ms"] / 1e9
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:200]
        finally:
            torch.use_deterministic_algorithms(False)
        yield row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin")
    parser.add_argument("--dtype", choices=["bf16", "tf32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    args = parser.parse_args()
    out = open(args.out, "a", encoding="utf-8") if args.out else None
    table = {}
    for shape in args.shapes:
        for _ in range(args.rounds):
            rows = []
            if args.bin:
                text = subprocess.run([args.bin, f"--dtype={args.dtype}", shape], check=True, capture_output=True, text=True).stdout
                rows = [json.loads(line) for line in text.splitlines()]
            for row in rows + list(peers(shape, args.dtype)):
                line = json.dumps(row)
                print(line, flush=True)
                if out:
                    out.write(line + "\n")
                if "error" not in row:
                    table.setdefault(shape, {}).setdefault(row["who"], []).append((row["forward_ms"], row["backward_ms"]))
    print(f"\n{'B,H,G,T,D':>20}  {'who':28} {'forward ms':>10} {'backward ms':>11}  ours against it")
    for shape, all_of in table.items():
        medians = {who: [statistics.median(column) for column in zip(*times)] for who, times in all_of.items()}
        for who, (forward, backward) in medians.items():
            ours = medians.get("mt")
            ratios = f"{forward / ours[0]:.2f} {backward / ours[1]:.2f}" if ours and who != "mt" else ""
            print(f"{shape:>20}  {who:28} {forward:10.4f} {backward:11.4f}  {ratios}")


if __name__ == "__main__":
    main()
