"""Loads an exported model without this project's code: plain transformers in an interpreter of its own.

    python -P load_check.py [--memory=BYTES --seconds=N] MODEL_FOLDER...

Prints, for each folder, one line `RELOAD` with JSON: `problems`, a list of [part, sentence] (empty without problems)
whose part is `model` or `chat_template`, the number of `parameters`, and `goldens`, the outputs of tokenizer, template
and model for fixed inputs: token ids, text, last row of logits in fp32, a greedy continuation. Any runtime can be
compared with these. The limits apply to the use beyond the libraries themselves. This file imports no module of this
project, on purpose.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4, «vier»\n"}]

TEXTS = ["def main(): 2+2", "Ünïcode, «quotes»\n\n\tand 3 lines.", "347+586="]
NEW_TOKENS = 8
MOST_BYTES, MOST_TEXTS, MOST_CHARACTERS = 100_000_000, 16, 2_000
"""Limits for the goldens.json of an untrusted folder."""
LOADING = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
"""Options that run or unpickle nothing of an untrusted folder, without a prompt."""


def check_model(folder: str) -> dict[str, object]:
    loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **LOADING)
    model, loading = loaded[0], loaded[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    problems = [
        ("model", f"{kind}: {name}")
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(loading[kind])
    ]
    problems += [("chat_template", text) for text in check_tokenizer(tokenizer, model)]
    problems += [("model", text) for text in check_generation(tokenizer, model)]
    outputs = {} if problems else goldens(tokenizer, model.float(), *recorded_inputs(folder))
    return {"problems": problems, "parameters": sum(p.numel() for p in model.parameters()), "goldens": outputs}


def recorded_inputs(folder: str) -> tuple[list[str], list[dict[str, str]]]:
    """The inputs of the goldens.json in a folder, which an older version may have chosen differently; else the present
    ones."""
    path = Path(folder, "goldens.json")
    if not path.is_file():
        return TEXTS, MESSAGES[:1]
    with open(path, "rb") as file:
        content = json.loads(file.read(MOST_BYTES))
    texts = [str(row["text"]) for row in content["rows"][:-1]]
    if len(texts) > MOST_TEXTS or sum(map(len, texts)) > MOST_CHARACTERS:
        raise ValueError("goldens.json has more inputs than a release states")
    return texts, content["messages"]


def goldens(tokenizer, model, texts, messages) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """For each text, {text, ids, logits, greedy}; the last text is a conversation rendered with the template."""
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rows = []
    for text in [*texts, chat]:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1].float()
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[
            0, inputs["input_ids"].shape[1] :
        ]
        ids, greedy = inputs["input_ids"][0].tolist(), generated.tolist()
        rows.append({"text": text, "ids": ids, "logits": [round(x, 6) for x in logits.tolist()], "greedy": greedy})
    return {"messages": messages, "rows": rows}


def check_tokenizer(tokenizer, model) -> list[str]:  # type: ignore[no-untyped-def]
    """Checks that the text of the chat template survives the tokenizer, with every marker as one token."""
    if not tokenizer.chat_template:
        return ["the tokenizer has no chat template"]
    problems = []
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    direct = tokenizer.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    if ids != direct:
        problems.append("the chat template gives other tokens than its own text")
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        problems.append("the chat template's text does not survive the tokenizer")
    for message in MESSAGES:
        if message["content"].strip() not in text:
            problems.append(f"the chat template drops the {message['role']}'s words")
    for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        if len(tokenizer(marker, add_special_tokens=False)["input_ids"]) != 1:
            problems.append(f"{marker} is not one token")
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    if not prompt.startswith(tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False)):
        problems.append("the generation prompt rewrites what came before it")
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:
        problems.append("the tokenizer knows tokens that the model does not")
    return problems


def check_generation(tokenizer, model) -> list[str]:  # type: ignore[no-untyped-def]
    """Checks that logits are finite, and that the generation config names the stop tokens."""
    inputs = tokenizer("def main(): 2+2", return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        logits = model(**inputs).logits
    if not torch.isfinite(logits).all():
        return ["the model's logits are not finite"]
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if tokenizer.convert_tokens_to_ids("<|endoftext|>") not in stops:
        return ["the generation config does not stop at <|endoftext|>"]
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    return [] if generated.shape[1] > inputs["input_ids"].shape[1] else ["the model generates nothing"]


def limit(memory: int, seconds: int) -> None:
    """Limits the further use of private memory in bytes, and of processor time, by this process."""
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
    spent = round(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = [name for name in sys.argv[1:] if not name.startswith("--")]
    options = dict(name[2:].split("=") for name in sys.argv[1:] if name.startswith("--"))
    if options:
        limit(int(options["memory"]), int(options["seconds"]))
    for name in folders:
        try:
            result = check_model(name)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError) as error:
            message = f"transformers cannot load it: {type(error).__name__}: {error}"
            result = {"problems": [("model", message)], "parameters": None, "goldens": {}}
        print("RELOAD " + json.dumps(result))
