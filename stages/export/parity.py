"""The parity check of an export: plain transformers in an interpreter of its own.

    python -P parity.py MODEL_FOLDER EXPECTED.safetensors

EXPECTED has `ids.<n>` ([length]) and Megatron's `logits.<n>` ([length, vocabulary]). The last printed line is one JSON
object: keys that were missing, left over or of another shape, the largest logit difference and its location. This file
imports no module of this project, on purpose: the CPU patches of Megatron must not affect the compared model.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(folder: str, expected: str) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    keys = [f"{kind.replace('_', ' ')} {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in sorted(map(str, loading[kind]))]  # fmt: skip
    pairs, worst = load_file(expected), {"delta": 0.0, "row": 0, "position": 0}
    for n in range(len(pairs) // 2):
        with torch.no_grad():
            logits = model(pairs[f"ids.{n}"].unsqueeze(0)).logits[0].float()
        deltas = (logits - pairs[f"logits.{n}"]).abs().amax(-1)
        deltas = torch.nan_to_num(deltas, nan=float("inf"))
        position = int(deltas.argmax())
        if float(deltas[position]) > worst["delta"]:
            worst = {"delta": float(deltas[position]), "row": n, "position": position}
    print(json.dumps({"keys": keys, **worst}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
