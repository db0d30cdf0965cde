#!/usr/bin/env python3
"""What other people's readers say of the folder of a run (mtrun --out RUN --tensorboard): TensorBoard's own reader against
metrics.jsonl, and the Python safetensors library, which must write the weights again byte for byte.

  run.py RUN

Needs tensorboard, safetensors and numpy (no torch). Exit code 1 where something differs.
"""
import json
import math
import os
import struct
import sys

import safetensors
import safetensors.numpy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def check_events(run):
    """(values compared, those that differ) of the scalars that metrics.jsonl has under the same step."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    with open(os.path.join(run, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    compared, bad = 0, []
    for tag in events.Tags()["scalars"]:
        expected = losses if tag in ("train/loss", "loss") else rates if tag in ("train/lr", "lr") else {}
        for event in events.Scalars(tag):
            if not math.isfinite(event.value):
                bad.append((tag, event.step, event.value))
            if event.step in expected:
                compared += 1
                if event.value != f32(expected[event.step]):
                    bad.append((tag, event.step, event.value, expected[event.step]))
    return {"tags": events.Tags()["scalars"], "steps": len(losses), "compared": compared, "different": bad}


def check_weights(path):
    with safetensors.safe_open(path, "np") as f:
        metadata = f.metadata()
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    with open(path, "rb") as f:
        before = f.read()
    # The library writes metadata in another order each time.
    same = any(safetensors.numpy.save(tensors, metadata) == before for _ in range(200))
    return {"tensors": len(tensors), "same_bytes": same}


def main():
    run = sys.argv[1]
    events = check_events(run)
    weights = check_weights(os.path.join(run, "model.safetensors"))
    print(json.dumps({"events": events, "weights": weights, "safetensors": safetensors.__version__}))
    sys.exit(0 if events["compared"] > 0 and not events["different"] and weights["same_bytes"] else 1)


if __name__ == "__main__":
    main()
