"""Calibrates 4-bit weights by llm-compressor, in an interpreter that has it.

    python -P calibrate.py MODEL FOLDER awq|gptq < TOKEN_IDS

TOKEN_IDS is a JSON list of lists. This file imports no module of this project, on purpose.
"""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.awq import AWQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import GPTQModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = ["lm_head", r"re:.*mlp\.gate$"]


def main() -> None:
    source, folder, method = sys.argv[1:]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(sys.stdin)]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    options = {"targets": ["Linear"], "ignore": IGNORED}
    recipe = AWQModifier(scheme="W4A16_ASYM", **options) if method == "awq" else GPTQModifier(scheme="W4A16", **options)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=max(len(row["input_ids"]) for row in rows),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(folder, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


if __name__ == "__main__":
    main()
