"""Runs a model in vLLM.

    python -P vllm_run.py FOLDER DTYPE < REQUEST

Request and answer are those of transformers_run.py. This file imports no module of this project, on purpose.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import packages_distributions, version

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    folder, dtype, request = sys.argv[1], sys.argv[2], json.load(sys.stdin)
    rows = request["rows"]
    longest = max(len(row["ids"]) + len(row["greedy"]) for row in rows)
    llm = LLM(model=folder, dtype=dtype, max_model_len=longest + 1, enforce_eager=True, seed=0)
    tokenizer, answers = llm.get_tokenizer(), []
    for row in rows:
        ids = row["ids"] + row["greedy"]
        read = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (scored,) = llm.generate([{"prompt_token_ids": ids}], read, use_tqdm=False)
        draw = SamplingParams(temperature=0, max_tokens=len(row["greedy"]), ignore_eos=True, detokenize=False)
        (drawn,) = llm.generate([{"prompt_token_ids": row["ids"]}], draw, use_tqdm=False)
        text, places = tokenizer(row["text"], add_special_tokens=False)["input_ids"], scored.prompt_logprobs[1:]
        logprobs = [place[token].logprob for place, token in zip(places, ids[1:], strict=True)]
        answers.append({"ids": text, "greedy": list(drawn.outputs[0].token_ids), "logprobs": logprobs})
    # Builds for other devices have the same module in a package of another name.
    name = min(packages_distributions()["vllm"])
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request.get("texts", [])]
    stated = {"program": name, "version": version(name)}
    # The libraries print lines of their own, so the result has a mark.
    print("RUN " + json.dumps({**stated, "rows": answers, "texts": texts}), flush=True)


if __name__ == "__main__":
    main()
