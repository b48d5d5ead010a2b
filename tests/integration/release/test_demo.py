"""The demo on the smoke recipe: real build, real Hub client over HTTP, real pull, and a model that plain transformers loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.run_fixtures import at_length, atom

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from huggingface_hub import snapshot_download
for name in sys.argv[2:]:
    folder = snapshot_download(name, revision=sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("sort 52741:", return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.decode(tokenizer("naïve 👩 text").input_ids) == "naïve 👩 text"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    print("LOADED", type(model).__name__, "megatron" in sys.modules)
"""

BATCH = """
import json, sys
from transformers import pipeline
for folder in sys.argv[1:]:
    generate = pipeline("text-generation", folder, max_new_tokens=48, do_sample=False)
    chats = [[{"role": "user", "content": text}] for text in ("347+586", "sort 72954", "Thank the farmer for the bread.")]
    answers = [[row[0]["generated_text"][-1] for row in generate(chats, batch_size=size)] for size in (1, 3)]
    texts = [[row[0]["generated_text"] for row in generate(["347+586", "sort 7295:"], batch_size=size)] for size in (1, 2)]
    print(json.dumps({"answers": answers, "texts": texts}))
"""
"""Stock pipelines on models: each answer alone and in a batch, to chats and to plain texts."""


@pytest.fixture(scope="module")
def demo_home(smoke_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that the tests may change."""
    return Path(shutil.copytree(smoke_demo, tmp_path_factory.mktemp("demo") / "home"))


def test_the_demo_ends_with_its_table(smoke_demo: Path, demo_home: Path) -> None:
    stdout = (smoke_demo.parent / "demo.txt").read_text("utf-8")
    for words in ("$ atom run atom-smoke", "know before any figure", "trained on", "quality", "What to try next"):
        assert words in stdout
    assert "\x1b" not in stdout, "control codes where there is no terminal"
    assert (
        stdout.count(": verified; it is signed") + stdout.count(": verified, and signed") == 2
        and stdout.count("ok      signatures: ") == 2
    )
    release = demo_home / "releases" / "atom-smoke-0.1.0"
    page = atom(demo_home, "show", str(release)).stdout
    gates = json.loads((release / "evidence/gates.json").read_text())
    judged = [gate for gate in gates.values() if gate["ok"] is not None]
    others = len(gates) - len(judged)
    assert f"checks        {len(judged)} gates and {others} not judged, all passed" in page
    assert "\nsigned        with the key\n" in page
    assert max(map(len, page.splitlines())) <= 80
    second = subprocess.run([sys.executable, "-I", release / "evidence/independent_verifier.py", release])
    assert second.returncode == 0


def test_a_pulled_model_loads_in_a_fresh_interpreter(demo_home: Path, tmp_path: Path) -> None:
    from release.hub.local.server import running

    with running(demo_home / "hub") as endpoint:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_local", "HF_HUB_DISABLE_XET": "1"}
        process = subprocess.run(
            [sys.executable, "-c", LOAD, "v0.1.0", "local/atom-smoke", "local/atom-smoke-base"],
            env={**env, "HF_HOME": str(tmp_path / "stranger")},
            capture_output=True,
            text=True,
        )
        assert process.stdout.count("LOADED Qwen3MoeForCausalLM False") == 2, process.stdout + process.stderr
        refused = atom(
            demo_home, "publish", str(demo_home / "releases" / "atom-smoke-0.1.0"), "--to", "local", code=2,
            HF_ENDPOINT=endpoint, HF_TOKEN="hf_wrong",
        )  # fmt: skip
        assert refused.stderr.count("\n") == 1 and "token" in refused.stderr


def test_the_tool_is_installed_from_the_code_of_the_release(demo_home: Path, tmp_path: Path) -> None:
    """By the commands of the model card, in an empty folder; pip takes the packages that are here."""
    from release.hub.local.server import running

    card = (demo_home / "releases/atom-smoke-0.1.0/model/README.md").read_text()
    download, install, verify = re.findall(r"^(?:hf|pip|atom) .*$", card, re.MULTILINE)[-3:]
    offline = f"{sys.executable} -m pip install --quiet --no-deps --no-build-isolation --target here "
    with running(demo_home / "hub") as endpoint:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_local", "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HOME": str(tmp_path / "stranger"), "PYTHONPATH": str(tmp_path / "here")}
        commands = [
            f"{Path(sys.executable).parent}/{download}",
            install.replace("pip install ", offline),
            verify.replace("atom ", f"{sys.executable} -m pipeline.cli "),
            f"{sys.executable} -c 'import release; print(release.__file__)'",
        ]
        process = subprocess.run(
            ["bash", "-ec", "\n".join(commands)], env=env, cwd=tmp_path, capture_output=True, text=True
        )
    assert process.returncode == 0, process.stdout + process.stderr
    assert ": verified" in process.stdout and str(tmp_path / "here/release") in process.stdout
    readme = (tmp_path / "atom-smoke-evidence/code/README.md").read_text()
    assert re.findall(r"\]\((?!https:)", readme) == [], "links that lead nowhere"


def test_stock_pipelines_answer_in_batches_without_padding(demo_home: Path) -> None:
    release = demo_home / "releases" / "atom-smoke-0.1.0"
    models = sorted(release.glob("model*/"))
    process = subprocess.run([sys.executable, "-c", BATCH, *models], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for model, line in zip(models, process.stdout.splitlines(), strict=True):
        rows = json.loads(line)
        assert "<|" not in json.dumps(rows["answers"]), model.name
        assert rows["answers"][0] == rows["answers"][1], model.name
        converses = "response_template" in json.loads((model / "tokenizer_config.json").read_text())
        if not converses:  # with a response template, transformers keeps special tokens in plain text
            assert "<|" not in json.dumps(rows["texts"]), model.name
    assert len(models) > 2


@at_length("release", 30)
def test_the_harness_gives_the_answers_that_the_release_states(demo_home: Path) -> None:
    from release.audit import harness

    release = demo_home / "releases" / "atom-smoke-0.1.0"
    answers = harness.compare_answers(release, "model")
    assert answers["problems"] and not answers["other_answers"] and answers["exact_match"] == answers["stated"]
    shorter = harness.compare_answers(release, "model-base", limit=3)
    assert shorter["problems"] == 3 and not shorter["other_answers"]


def test_a_flipped_byte_is_named_and_exits_1(demo_home: Path) -> None:
    release = demo_home / "releases" / "atom-smoke-0.1.0"
    weights = release / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    stdout = atom(demo_home, "verify", str(release), code=1).stdout
    assert "model/model.safetensors" in stdout and "NOT what it claims to be" in stdout


@at_length("release", 20)
def test_building_again_in_a_terminal_without_utf_8_gives_the_same_bytes(demo_home: Path) -> None:
    old = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    sums = demo_home / "releases" / "atom-smoke-0.1.0" / "evidence" / "SHA256SUMS"
    before = sums.read_text()
    atom(demo_home, "build", "atom-smoke", **old)
    assert sums.read_text() == before
    assert "verified" in atom(demo_home, "verify", str(sums.parents[1]), **old).stdout
