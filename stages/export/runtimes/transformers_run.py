"""Runs a model in transformers, in an interpreter of any version of it.

    python -P transformers_run.py FOLDER [BASE] < REQUEST

With BASE, the folder of a model, FOLDER is an adapter that PEFT puts on it.

REQUEST is JSON: `rows`, each with `text`, its token `ids`, and the `greedy` continuation that is expected or the number
of tokens to `draw`; and further `texts`. The last line printed is `RUN` with JSON: `program`, `version`; for each row
the `ids` of the text by this program's tokenizer, as many `greedy` tokens, and `logprobs`, of each token but the first
of ids and continuation together; and `texts`, the token ids of the further ones. In fp32, on one thread. This file
imports no module of this project, on purpose.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers


@torch.no_grad()
def run_row(tokenizer: Any, model: Any, row: dict[str, Any]) -> dict[str, Any]:
    tokens, state = torch.tensor([row["ids"]]), None
    greedy: list[int] = []
    for _ in range(row.get("draw") or len(row["greedy"])):
        output = model(tokens, past_key_values=state, use_cache=True)
        state, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        greedy.append(int(tokens))
    ids = row["ids"] + (greedy if "draw" in row else row["greedy"])
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return {"ids": encode(tokenizer, row["text"]), "greedy": greedy, "logprobs": logprobs.tolist()}


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def main() -> None:
    torch.set_num_threads(1)
    folder, request = sys.argv[1], json.load(sys.stdin)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = sys.argv[2] if len(sys.argv) > 2 else folder
    model = transformers.AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()
    if base != folder:
        import peft

        model = peft.PeftModel.from_pretrained(model, folder).eval()
    rows = [run_row(tokenizer, model, row) for row in request["rows"]]
    texts = [encode(tokenizer, text) for text in request.get("texts", [])]
    stated = {"program": "transformers", "version": transformers.__version__}
    if base != folder:
        stated = {"program": "PEFT", "version": f"{peft.__version__} (transformers {transformers.__version__})"}
    # The libraries print lines of their own, so the result has a mark.
    print("RUN " + json.dumps({**stated, "rows": rows, "texts": texts}))


if __name__ == "__main__":
    main()
