#!/usr/bin/env python3
"""Trains the zoo's small cuts in PyTorch from the same weights, tokens and dropout masks, and writes what came out.

  make.py                          writes tests/parity/CASE.json for every case, seed 1
  make.py --case lab4 --seed S --out F

Weights, tokens and masks come from the project's Philox, written here again in numpy. parity_test trains the same plan
and compares: every loss, every gradient norm, and the first step's gradient of every parameter, through its norm and
projections on random signs (the mean square of the projections' differences estimates the squared L2 distance).
"""
import argparse
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

STEPS, PEAK_LR, WARMUP, BATCHES, PROJECTIONS = 50, 1e-3, 10, 50, 32
BETA1, BETA2, EPS, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0
TOKEN_TAG, SIGN_TAG = 0x746F6B65, 0x7369676E

# spec of the zoo, what --set changes, batch, sequence
CASES = {
    "tiny_char": dict(spec="tiny_char", sets=[], batch=4, sequence=64),
    "lab4": dict(spec="lab4", sets=["layers=2"], batch=2, sequence=64),
    "so_small": dict(spec="so_small", sets=["layers=2"], batch=2, sequence=48),
    "llama_160m": dict(spec="llama_160m", sets=["layers=2", "vocab_size=4000"], batch=1, sequence=64),
}


def philox(key, counter):
    """Philox4x32-10 (Salmon et al., 2011). key: 2 words; counter: 4 arrays of uint32. Returns 4 arrays."""
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    c = [np.asarray(x, dtype=np.uint64) for x in np.broadcast_arrays(*counter)]
    mask, m0, m1 = np.uint64(0xFFFFFFFF), np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    shift = np.uint64(32)
    for _ in range(10):
        p0, p1 = m0 * c[0], m1 * c[2]
        c = [(p1 >> shift) ^ c[1] ^ k0, p1 & mask, (p0 >> shift) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return [x.astype(np.uint32) for x in c]


def fnv1a(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def seed_key(seed):
    return seed & 0xFFFFFFFF, seed >> 32


def normal(seed, name, shape, stddev):
    n = int(np.prod(shape))
    pair = np.arange((n + 1) // 2, dtype=np.uint64)
    h = fnv1a(name)
    w = philox(seed_key(seed), [pair & np.uint64(0xFFFFFFFF), pair >> np.uint64(32), h & 0xFFFFFFFF, h >> 32])
    u1 = (w[0].astype(np.float64) + 1) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(u1)) * stddev, 2 * np.pi * (w[1].astype(np.float64) * 2.0**-32)
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]
    return torch.from_numpy(both.astype(np.float32).reshape(shape))


def words(seed, n, c1, c2, c3):
    i = np.arange((n + 3) // 4, dtype=np.uint64)
    return np.stack(philox(seed_key(seed), [i, c1, c2, c3]), axis=1).reshape(-1)[:n]


def batch_of(seed, k, B, T, V):
    ids = (words(seed, B * (T + 1), k, TOKEN_TAG, 0) % np.uint32(V)).astype(np.int64).reshape(B, T + 1)
    labels = ids[:, 1:].copy()
    labels.reshape(-1)[6::13] = -1  # Ignored.
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels)


def signs(seed, name, n, projection):
    h = fnv1a(name)
    return torch.from_numpy(1.0 - 2.0 * (words(seed, n, h & 0xFFFFFFFF, SIGN_TAG, projection) & 1).astype(np.float64))


def read_spec(name, sets, folder):
    """The fields of a flat textproto."""
    spec = {}
    with open(os.path.join(folder, name + ".textproto")) as f:
        lines = [l.strip() for l in f if l.strip() and not l.strip().startswith("#")]
    for line in lines + [s.replace("=", ":", 1) for s in sets]:
        key, value = (x.strip() for x in line.split(":", 1))
        spec[key] = {"true": True, "false": False}.get(value, value.strip('"'))
        try:
            spec[key] = float(value) if "." in value else int(value)
        except ValueError:
            pass
    return spec


class Model:
    """The decoder of models/transformer.cc as PyTorch operations over a table of named parameters."""

    def __init__(self, spec, seed, B, T):
        self.s, self.seed, self.B, self.T, self.p = spec, seed, B, T, {}
        self.C, self.H = spec["width"], spec["heads"]
        self.G = spec.get("kv_heads", 0) or self.H
        self.D, self.Ff = self.C // self.H, spec.get("ffn_width", 0) or 4 * self.C
        self.rms, self.rope = spec.get("norm") == "RMS_NORM", spec.get("positions") == "ROTARY"
        self.rate = spec.get("dropout", 0.0)
        self.residual = 0.02 / math.sqrt(2 * spec["layers"])
        self.step = 0
        self.loss(*batch_of(seed, 0, B, T, spec["vocab_size"]))  # Creates the parameters.

    def param(self, name, shape, init):
        if name not in self.p:
            value = torch.ones(shape) if init == "ones" else torch.zeros(shape)
            if not isinstance(init, str):
                value = normal(self.seed, name, shape, init)
            self.p[name] = value.requires_grad_()
        return self.p[name]

    def linear(self, name, x, columns, bias, stddev=0.02):
        y = x @ self.param(name + ".weight", (x.shape[-1], columns), stddev)
        return y + self.param(name + ".bias", (columns,), "zeros") if bias else y

    def norm(self, name, x):
        w = self.param(name + ".weight", (self.C,), "ones")
        if self.rms:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w
        b = self.param(name + ".bias", (self.C,), "zeros") if self.s.get("norm_bias") else None
        return F.layer_norm(x, (self.C,), w, b, 1e-5)

    def dropout(self, path, x):
        if self.rate == 0:
            return x
        per_sample = x[0].numel()
        element = np.arange((per_sample + 3) // 4, dtype=np.uint64)[None, :]
        sample = np.arange(self.B, dtype=np.uint64)[:, None] + np.uint64(self.step * self.B)
        w = philox(seed_key(self.seed), [element, fnv1a(path) & 0xFFFFFFFF, self.step, sample])
        u = (np.stack(w, axis=2).reshape(self.B, -1)[:, :per_sample] >> np.uint32(8)).astype(np.float32) * 2.0**-24
        keep = torch.from_numpy((u >= np.float32(self.rate)).astype(np.float32)).reshape(x.shape)
        return x * keep / (1 - self.rate)

    def rotate(self, x):
        half = self.D // 2
        angle = torch.arange(self.T, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attention(self, path, x):
        B, T, H, G, D = self.B, self.T, self.H, self.G, self.D
        qkv = self.linear(path + ".qkv", x, (H + 2 * G) * D, self.s.get("attention_bias"))
        q, k, v = (y.transpose(1, 2) for y in qkv.view(B, T, H + 2 * G, D).split([H, G, G], dim=2))
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
        a = self.dropout(path + ".weights_dropout", scores.softmax(-1)) @ v
        y = self.linear(path + ".out", a.transpose(1, 2).reshape(B, T, H * D), self.C, self.s.get("attention_bias"), self.residual)
        return self.dropout(path + ".dropout", y)

    def mlp(self, path, x):
        bias = self.s.get("mlp_bias")
        if self.s.get("activation") == "SWIGLU":
            h = F.silu(self.linear(path + ".gate", x, self.Ff, bias)) * self.linear(path + ".up", x, self.Ff, bias)
        else:
            h = F.gelu(self.linear(path + ".up", x, self.Ff, bias), approximate="tanh")
        return self.dropout(path + ".dropout", self.linear(path + ".down", h, self.C, bias, self.residual))

    def loss(self, tokens, labels):
        x = self.param("embed.tokens.weight", (self.s["vocab_size"], self.C), 0.02)[tokens]
        if not self.rope:
            x = x + self.param("embed.positions.weight", (self.s["max_sequence"], self.C), 0.02)[: self.T]
        x = self.dropout("embed.dropout", x)
        for layer in range(self.s["layers"]):
            h = f"h{layer}"
            x = x + self.attention(h + ".attn", self.norm(h + ".norm1", x))
            x = x + self.mlp(h + ".mlp", self.norm(h + ".norm2", x))
        head = self.param("head.weight", (self.s["vocab_size"], self.C), 0.02)
        logits = self.norm("final_norm", x) @ head.t()
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-1)


def run(name, seed, models):
    case = CASES[name]
    B, T = case["batch"], case["sequence"]
    model = Model(read_spec(case["spec"], case["sets"], models), seed, B, T)
    decayed = [p for p in model.p.values() if p.dim() >= 2]
    others = [p for p in model.p.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=DECAY), dict(params=others, weight_decay=0.0)],
                                  lr=PEAK_LR, betas=(BETA1, BETA2), eps=EPS)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        model.step = step
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP)
        optimizer.zero_grad()
        loss = model.loss(*batch_of(seed, step % BATCHES, B, T, model.s["vocab_size"]))
        loss.backward()
        if step == 0:
            for key, p in model.p.items():
                g = p.grad.double().reshape(-1)
                gradients[key] = dict(norm=g.norm().item(),
                                      projections=[(g @ signs(seed, key, g.numel(), i)).item() for i in range(PROJECTIONS)])
        norms.append(torch.nn.utils.clip_grad_norm_(list(model.p.values()), CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    print(f"{name}: loss {losses[0]:.5f} -> {losses[-1]:.5f}")
    return dict(case=name, seed=seed, torch=torch.__version__, **case, steps=STEPS, peak_lr=PEAK_LR, warmup=WARMUP,
                batches=BATCHES, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, grad_clip=CLIP,
                parameters=sum(p.numel() for p in model.p.values()), losses=losses, grad_norms=norms, gradients=gradients)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="one case (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="file to write; needs --case (default: CASE.json beside this script)")
    parser.add_argument("--models", default=os.path.join(here, "..", "..", "models"), help="folder of the specs")
    args = parser.parse_args()
    if args.out and not args.case:
        parser.error("--out needs --case")
    for name in [args.case] if args.case else sorted(CASES):
        with open(args.out or os.path.join(here, name + ".json"), "w") as f:
            json.dump(run(name, args.seed, args.models), f, indent=1)
            f.write("\n")
