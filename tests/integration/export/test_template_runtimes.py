"""What transformers 4 and llama.cpp make of chat template and tokenizer, against transformers here.

Each wants an environment of its own: ATOM_TRANSFORMERS4_PYTHON and ATOM_LLAMA_CPP_PYTHON name their interpreters. The
second one has `xllamacpp`, which brings llama.cpp's server with its own Jinja.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.fixtures import taught_fixtures
from tests.fixtures.conversation_fixtures import CONVERSATIONS

TRANSFORMERS4 = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
folder, rows = Path(sys.argv[1]), json.load(sys.stdin)
t, out = AutoTokenizer.from_pretrained(folder), []
for row in rows:
    options = {name: value for name, value in row.items() if name != "messages" and value is not None}
    text = t.apply_chat_template(row["messages"], tokenize=False, **options)
    out.append([text, t.apply_chat_template(row["messages"], return_dict=True, **options)["input_ids"]])
marked = t.apply_chat_template(rows[3]["messages"], chat_template=(folder / "training_chat_template.jinja").read_text(),
                               return_dict=True, return_assistant_tokens_mask=True)
answers = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"]) if m]
kept = t.decode(t("<think>a</think>b<|im_end|>")["input_ids"], skip_special_tokens=True)
print(json.dumps({"rows": out, "length": t.model_max_length, "side": t.padding_side, "answers": t.decode(answers),
                  "kept": kept}))
"""
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = sys.argv[1], 2048, 1, 0
settings.cpuparams.n_threads, settings.use_jinja, settings.warmup = 1, True, False
server = xllamacpp.Server(settings)
def post(path, body):
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return json.load(urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, headers)))
out = []
for row in json.load(sys.stdin):
    body = {"messages": row["messages"], "add_generation_prompt": row["add_generation_prompt"]}
    body |= {"tools": row["tools"]} if row["tools"] else {}
    if row["enable_thinking"] is not None:
        body["chat_template_kwargs"] = {"enable_thinking": row["enable_thinking"]}
    text = post("/apply-template", body)["prompt"]
    out.append([text, post("/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]])
print("ROWS " + json.dumps(out))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "model"
    taught_fixtures.save(folder, steps=0)
    return folder


def rendered_here(folder: Path, rows: list[dict[str, Any]]) -> list[list[Any]]:
    loaded, out = AutoTokenizer.from_pretrained(folder), []
    for row in rows:
        options = {name: value for name, value in row.items() if name != "messages" and value is not None}
        text = loaded.apply_chat_template(row["messages"], tokenize=False, **options)
        out.append([text, loaded(text, add_special_tokens=False)["input_ids"]])
    return out


def run(python: str, code: str, argument: Path, rows: list[dict[str, Any]]) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    process = subprocess.run(
        [python, "-P", "-c", code, str(argument)], input=json.dumps(rows), capture_output=True, text=True, timeout=300,
        env=environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_transformers_4(folder: Path) -> None:
    python = os.environ.get("ATOM_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("ATOM_TRANSFORMERS4_PYTHON names no interpreter with transformers 4")
    report = json.loads(run(python, TRANSFORMERS4, folder, CONVERSATIONS))
    assert report["rows"] == rendered_here(folder, CONVERSATIONS)
    assert (report["length"], report["side"]) == (taught_fixtures.CONTEXT, "left")
    assert report["kept"] == "<think>a</think>b"
    assert report["answers"] == "b<|im_end|><think>\nsecond\n</think>\n\nd<|im_end|>"


def test_llama_cpp(folder: Path, tmp_path: Path) -> None:
    """But for conversations that end with an answer, which its server continues."""
    python = os.environ.get("ATOM_LLAMA_CPP_PYTHON")
    if not python or subprocess.run([python, "-c", "import xllamacpp"], capture_output=True, check=False).returncode:
        pytest.skip("ATOM_LLAMA_CPP_PYTHON names no interpreter with xllamacpp")
    gguf_file = pytest.importorskip("stages.export.variants.gguf_file")
    gguf_file.write(folder, tmp_path, "F32")
    rows = [row for row in CONVERSATIONS if row["messages"][-1]["role"] != "assistant"]
    assert len(rows) > 8
    (line,) = [line for line in run(python, LLAMA_CPP, tmp_path / gguf_file.file_name("F32"), rows).splitlines()
               if line.startswith("ROWS ")]  # fmt: skip
    assert json.loads(line.removeprefix("ROWS ")) == rendered_here(folder, rows)
