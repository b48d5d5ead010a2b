"""Runs a model in vLLM.

    python -P vllm_run.py FOLDER DTYPE < REQUEST

Request and answer are those of transformers_run.py, but a row without `greedy` is not supported. DTYPE is the data
type of the computation. This file imports no module of this project, on purpose.
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
        # vLLM always draws a token; only the log-probabilities of the prompt are read.
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (scored,) = llm.generate([{"prompt_token_ids": ids}], scoring, use_tqdm=False)
        drawing = SamplingParams(temperature=0, max_tokens=len(row["greedy"]), ignore_eos=True, detokenize=False)
        (drawn,) = llm.generate([{"prompt_token_ids": row["ids"]}], drawing, use_tqdm=False)

        # The first token has no log-probability.
        entries_of_tokens = scored.prompt_logprobs[1:]
        logprobs = [entries[token].logprob for entries, token in zip(entries_of_tokens, ids[1:], strict=True)]
        text_ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        answers.append({"ids": text_ids, "greedy": list(drawn.outputs[0].token_ids), "logprobs": logprobs})
    # Builds for other devices have the same module in a package of another name.
    name = min(packages_distributions()["vllm"])
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request.get("texts", [])]
    stated = {"program": name, "version": version(name)}
    # The libraries print lines of their own, so the result has a mark.
    print("RUN " + json.dumps({**stated, "rows": answers, "texts": texts}), flush=True)


if __name__ == "__main__":
    main()
