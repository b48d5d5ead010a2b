"""Loads an exported model without this project's code: plain transformers in an interpreter of its own.

    python -P load_check.py --whole=BYTES [--memory=BYTES --seconds=N] MODEL_FOLDER...

Prints, for each folder, one line `RELOAD` with JSON: `problems`, a list of [part, sentence] (empty without problems)
whose part is `model` or `chat_template`, the number of `parameters`, and `goldens`, the outputs of tokenizer, template
and model for fixed inputs: token ids, text, last row of logits in fp32, a greedy continuation, and conversations in the
chat template. Any runtime can be compared with these. A model above --whole, in bytes of fp32, is in memory a layer at
a time. --memory and --seconds limit the use beyond the libraries themselves. Neither this file nor the one beside it,
which it loads by its path, imports a module of this project, on purpose.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

# First, because it prepares the process for the imports below.
spec: Any = spec_from_file_location("streamed_model", Path(__file__).with_name("streamed_model.py"))
streamed_model: Any = module_from_spec(spec)
spec.loader.exec_module(streamed_model)

import torch  # noqa: E402
import yaml  # noqa: E402
from jinja2 import TemplateError  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

CONVERSATIONS = yaml.safe_load(Path(__file__).with_name("conversations.yaml").read_text("utf-8"))["conversations"]
MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4, «vier»\n"}]

TALK = ("messages", "tools", "add_generation_prompt", "enable_thinking")
TEXTS = ["def main(): 2+2", "Ünïcode, «quotes»\n\n\tand 3 lines.", "347+586="]
NEW_TOKENS = 8
MOST_BYTES, MOST_TEXTS, MOST_CHARACTERS = 100_000_000, 16, 2_000
MOST_CONVERSATIONS, MOST_CONVERSATION_CHARACTERS = 64, 100_000
"""Limits for the goldens.json of an untrusted folder."""


def check_model(folder: str, whole_bytes: int) -> dict[str, object]:
    source = open_model(folder, whole_bytes)
    model, tokenizer = source.model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    problems = [("chat_template", text) for text in check_tokenizer(tokenizer, model)]
    problems += [("model", text) for text in check_stops(tokenizer, model)]
    texts, messages, talks = recorded_inputs(folder)
    try:
        rendered = [rendered_row(tokenizer, row) for row in talks]
    except (TemplateError, ValueError, TypeError) as error:
        problems.append(("chat_template", f"the chat template cannot render a conversation: {error}"))
    outputs = {} if problems or source.keys else goldens(tokenizer, source, texts, messages)
    if outputs and talks:
        outputs["conversations"] = rendered
    rows: Any = outputs.get("rows", ())
    if rows and source.in_memory:  # of another one each token would read all files
        model.generate(torch.tensor([rows[0]["ids"]]), do_sample=False, max_new_tokens=1)
    if not all(math.isfinite(value) for row in rows for value in row["logits"]):
        problems.append(("model", "the model's logits are not finite"))
    problems += [("model", text) for text in source.keys]  # of layers, these are known after a pass
    saved = model.state_dict().keys()  # with buffers that are loaded: biases that choose experts
    loaded = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
    parameters = sum(tensor.numel() for tensor in loaded)
    return {"problems": problems, "parameters": parameters, "goldens": {} if problems else outputs}


def open_model(folder: str, whole_bytes: int):  # type: ignore[no-untyped-def]
    """The model in fp32.

    If it has more than `whole_bytes`, a layer is in memory at a time: the operations and their results are those of
    the whole model, and each of NEW_TOKENS passes reads all files.
    """
    kind = "Whole" if streamed_model.fp32_bytes(Path(folder)) <= whole_bytes else "ByLayer"
    return getattr(streamed_model, kind)(folder)


def recorded_inputs(folder: str) -> tuple[list[str], list[dict[str, str]], list[dict[str, Any]]]:
    """Returns texts, messages and conversations: the inputs of the goldens.json in a folder, else the present ones."""
    path = Path(folder, "goldens.json")
    if not path.is_file():
        return TEXTS, MESSAGES[:1], CONVERSATIONS
    with open(path, "rb") as file:
        # A longer file is cut off here, and is no JSON any more.
        content = json.loads(file.read(MOST_BYTES))
    # The last row is the conversation, which is rendered anew from the messages.
    texts = [str(row["text"]) for row in content["rows"][:-1]]
    talks = [{name: row[name] for name in TALK} for row in content.get("conversations", ())]
    if (
        len(texts) > MOST_TEXTS
        or sum(map(len, texts)) > MOST_CHARACTERS
        or len(talks) > MOST_CONVERSATIONS
        or len(json.dumps(talks)) > MOST_CONVERSATION_CHARACTERS
    ):
        raise ValueError("goldens.json has more inputs than a release states")
    return texts, content["messages"], talks


def rendered_row(tokenizer, row) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """A conversation with the text and token ids that transformers makes of it."""
    options = {name: row[name] for name in TALK[1:] if row[name] is not None}
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, **options)
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=True, **options)["input_ids"]
    return {**row, "text": text, "ids": ids}


@torch.no_grad()
def goldens(tokenizer, source, texts, messages) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """For each text, {text, ids, logits, greedy}; the last text is a conversation rendered with the template.

    Nothing if layers of the model lack tensors.
    """
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*texts, chat]]
    stops, head = stop_ids(source.model), source.model.get_output_embeddings()
    rows = [{"text": text, "ids": ids, "greedy": []} for text, ids in zip([*texts, chat], prompts, strict=True)]
    for _ in range(NEW_TOKENS):
        unfinished = [row for row in rows if not stops.intersection(row["greedy"])]
        states = streamed_model.hidden_states(source, [row["ids"] + row["greedy"] for row in unfinished])
        if source.keys:
            return {}
        for row, state in zip(unfinished, states, strict=True):
            logits = head(state)[0, -1].float()
            row.setdefault("logits", [round(x, 6) for x in logits.tolist()])
            row["greedy"].append(int(logits.argmax()))
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


def check_stops(tokenizer, model) -> list[str]:  # type: ignore[no-untyped-def]
    """Checks that the generation config names the stop token."""
    if tokenizer.convert_tokens_to_ids("<|endoftext|>") not in stop_ids(model):
        return ["the generation config does not stop at <|endoftext|>"]
    return []


def stop_ids(model) -> set[int]:  # type: ignore[no-untyped-def]
    stops = model.generation_config.eos_token_id
    return set(stops if isinstance(stops, list) else [stops])


def limit(memory: int, seconds: int) -> None:
    """Limits the further use of private memory in bytes, and of processor time, by this process."""
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
    spent = round(time.process_time())
    # The first limit sends SIGXCPU, and the second one, a second later, SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = [name for name in sys.argv[1:] if not name.startswith("--")]
    options = dict(name[2:].split("=") for name in sys.argv[1:] if name.startswith("--"))
    if "memory" in options:
        limit(int(options["memory"]), int(options["seconds"]))
    for name in folders:
        try:
            result = check_model(name, int(options["whole"]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a parser in Rust is no Exception
            message = f"transformers cannot load it: {type(error).__name__}: {error}"
            result = {"problems": [("model", message)], "parameters": None, "goldens": {}}
        print("RELOAD " + json.dumps(result))
