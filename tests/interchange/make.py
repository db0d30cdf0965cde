#!/usr/bin/env python3
"""Small models saved by transformers, and what transformers says of the folders that we write.

  make.py OUT                 writes OUT/{gpt2,llama,llama_sharded,mistral}: what transformers saves, and logits.json
  make.py --logits FOLDER     loads a folder that mtrun --export-hf wrote, and prints the mean loss over its
                              tokens.json, a list of lists of ids
  make.py --safetensors FILE  reads a safetensors file and writes it again with the Python library: the same bytes?

Needs torch and transformers. hugging_face_test reads what the first form writes.
"""
import json
import os
import sys

import torch
import transformers

GPT2 = dict(n_layer=2, n_head=2, n_embd=16, n_positions=24, n_inner=40, vocab_size=53, initializer_range=0.3,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
LLAMA = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=24,
             max_position_embeddings=32, vocab_size=53, initializer_range=0.3, rms_norm_eps=1e-5, bos_token_id=0,
             eos_token_id=0, tie_word_embeddings=False)


def perturb(model):
    """Biases and norms that are not their defaults, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def make(out):
    torch.manual_seed(1)
    models = {
        "gpt2": (transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), {}),
        "llama": (transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_bias=True)), {}),
        "llama_sharded": (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": True})),
            {"max_shard_size": "6KB"},
        ),
        "mistral": (transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5)), {}),
    }
    tokens = torch.randint(0, 53, (2, 20), generator=torch.Generator().manual_seed(3))
    for name, (model, options) in models.items():
        model.eval()
        perturb(model)
        model.set_attn_implementation("eager")
        folder = os.path.join(out, name)
        model.save_pretrained(folder, safe_serialization=True, **options)
        for extra in ("generation_config.json",):
            if os.path.exists(os.path.join(folder, extra)):
                os.remove(os.path.join(folder, extra))
        with torch.no_grad():
            logits = model(tokens).logits
        with open(os.path.join(folder, "logits.json"), "w") as f:
            rounded = [[[round(x, 6) for x in row] for row in sample] for sample in logits.tolist()]
            json.dump({"tokens": tokens.tolist(), "logits": rounded}, f)
            f.write("\n")


def logits(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    problems = repr({k: v for k, v in info.items() if v})
    with open(os.path.join(folder, "tokens.json")) as f:
        rows = json.load(f)
    model.eval()
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            out = torch.log_softmax(model(ids[:, :-1]).logits.double(), -1)
            total += -out.gather(-1, ids[:, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    print(json.dumps({"model": type(model).__name__, "loss": total / count, "tokens": count, "problems": problems}))


def round_trip(path):
    import safetensors
    import safetensors.torch

    tensors, metadata = {}, None
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
        for key in f.keys():
            tensors[key] = f.get_tensor(key)
    with open(path, "rb") as f:
        before = f.read()
    same = safetensors.torch.save(tensors, metadata) == before
    print("same bytes" if same else "DIFFERENT bytes")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    if sys.argv[1] == "--logits":
        logits(sys.argv[2])
    elif sys.argv[1] == "--safetensors":
        round_trip(sys.argv[2])
    else:
        make(sys.argv[1])
