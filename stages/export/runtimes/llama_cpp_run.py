"""Runs a GGUF file in llama.cpp, through llama-cpp-python.

    python -P llama_cpp_run.py FILE < REQUEST

Request and answer are those of transformers_run.py. Keys and values are cached in fp32 and attention is not fused, so
that a file of fp32 weights is computed in fp32. This file imports no module of this project, on purpose.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

F32 = 0
"""ggml's number of the type."""


def run_row(llama: Any, row: dict[str, Any]) -> dict[str, Any]:
    ids = row["ids"] + row["greedy"]
    llama.reset()
    llama.eval(ids)
    logits = np.asarray(llama.scores[: len(ids) - 1], dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(ids) - 1), ids[1:]].tolist()
    llama.reset()
    llama.eval(row["ids"])
    greedy: list[int] = []
    for _ in row["greedy"]:
        greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(greedy[-1:])
    return {"ids": encode(llama, row["text"]), "greedy": greedy, "logprobs": chosen}


def encode(llama: Any, text: str) -> list[int]:
    ids: list[int] = llama.tokenize(text.encode(), add_bos=False, special=True)
    return ids


def main() -> None:
    path, request = sys.argv[1], json.load(sys.stdin)
    longest = max(len(row["ids"]) + len(row["greedy"]) for row in request["rows"])
    llama = llama_cpp.Llama(
        model_path=path,
        n_ctx=longest + 1,
        n_batch=longest + 1,
        # Keys and values in fp32, plain attention and one thread: as near to the reference as the program can be.
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    rows = [run_row(llama, row) for row in request["rows"]]
    texts = [encode(llama, text) for text in request.get("texts", [])]
    stated = {"program": "llama-cpp-python", "version": llama_cpp.__version__}
    # The libraries print lines of their own, so the result has a mark.
    print("RUN " + json.dumps({**stated, "rows": rows, "texts": texts}))


if __name__ == "__main__":
    main()
