"""Evaluation by a real vLLM server: the log-probabilities and greedy answers of the stage's process, up to rounding.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from stages.evaluation import harness, model_evaluation, pass_at_k, win_rate
from stages.evaluation.harness_vllm import Served
from stages.formats.table import read_table
from stages.generation.engine import Engine
from stages.generation.transformers_model import TransformersModel
from stages.generation.vllm_model import Client, ServedModel
from stages.tasks import benchmarks
from tests.fixtures import chat_fixtures, harness_fixtures, release_fixtures

pytestmark = pytest.mark.skipif(
    "ATOM_VLLM_PYTHON" not in os.environ, reason="vLLM needs an environment of its own; see `make test-vllm`"
)
SIZES = {"hidden_size": 64, "head_dim": 32, "initializer_range": 0.3}
"""vLLM's kernels for the CPU know heads of 32 and more; the wide weights leave few near ties."""
BEYOND = 3 * release_fixtures.CONTEXT
GAP = 1e-4
"""Largest difference of a log-probability in bits, and of bits per byte."""
VLLM = {"engine": {"kind": "vllm"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    release_fixtures.save_model(folder / "model", 1, **SIZES)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    began = time.monotonic()
    client = Client.start(Engine(kind="vllm"), folder / "model", tmp_path_factory.mktemp("work"), BEYOND)
    print(f"\nserver started in {time.monotonic() - began:.1f} s")
    yield client
    client.close()
    assert client.server.log is not None and not client.server.log.exists() and client.server.process is None


@pytest.fixture
def shared(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of a test asks the one server, which none of them ends."""
    monkeypatch.setattr(client, "close", lambda: None)
    monkeypatch.setattr(Client, "start", lambda *_, **__: client)


def rows_of(count: int, length: int, seed: int = 0) -> list[list[int]]:
    ids = torch.randint(4, release_fixtures.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    rows: list[list[int]] = ids.tolist()
    return rows


def test_log_probabilities_and_greedy_answers_are_those_of_transformers(client: Client, folder: Path) -> None:
    """At the full context, beyond it, after a question, and of a first token alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    served, oracle = ServedModel(client, tokenizer), TransformersModel.load(folder / "model", tokenizer)
    assert served.context == oracle.context == release_fixtures.CONTEXT
    full, short = rows_of(6, oracle.context), rows_of(40, 9, seed=1)
    rows = [(full[0], 0), (full[1], 30), (full[2], oracle.context), ([7], 0), ([], 0)] + [(row, 0) for row in short]
    bits = list(zip(served.bits(rows), oracle.bits(rows), strict=True))
    print(f"largest difference of {len(bits)} texts: {max(abs(a - b) for a, b in bits):.2g} bits")
    assert all(abs(a - b) < GAP * max(1.0, b) for a, b in bits) and bits[2] == bits[4] == (0.0, 0.0)
    (long,) = rows_of(1, BEYOND, seed=2)
    gap = (served.token_bits(long) - oracle.token_bits(long)).abs().max()
    print(f"largest difference of a token in {BEYOND} tokens: {gap:.2g} bits")
    assert gap < GAP and served.likeliest(long, 50) == oracle.likeliest(long, 50)
    prompts = [row[: 3 + n] for n, row in enumerate(rows_of(32, 40, seed=3))]
    assert served.continue_greedily(prompts, 16) == oracle.continue_greedily(prompts, 16)
    with pytest.raises(AtomError, match=f"a row has {BEYOND + 1} tokens, and the vLLM server reads at most {BEYOND}"):
        served.token_bits([*long, 5])


def test_a_scaled_embedding_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    release_fixtures.save_model(tmp_path / "model", 1, context=4 * release_fixtures.CONTEXT, **SIZES)
    with pytest.raises(AtomError, match="cannot read 9999 tokens with the scaled rotary embedding of"):
        Client.start(Engine(kind="vllm"), tmp_path / "model", tmp_path, 9999)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(AtomError, match=r"is gone \(exit code .*unrecognized arguments: --no-such-option"):
        Client.start(Engine(kind="vllm", options=("--no-such-option",)), folder / "model", tmp_path)


@pytest.mark.usefixtures("shared")
def test_stages_give_the_scores_of_the_process(
    folder: Path, tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = chat_fixtures.make(tmp_path / "chat")
    inputs |= {"model": write_manifest(folder, "export-1"), "before": inputs["model"]}
    for role in ("dedup", "items"):
        release_fixtures.make_node(role, tmp_path / role)
    of_documents = {"model": inputs["model"]} | {r: write_manifest(tmp_path / r, r) for r in ("dedup", "items")}

    def both(stage: Any, config: dict[str, Any], of: dict[str, Artifact]) -> tuple[Artifact, Artifact]:
        return run_stage(stage, {**config, **VLLM}, of), run_stage(stage, config, of)

    served, oracle = both(model_evaluation.STAGE, {"heldout_documents": 2, "max_new_tokens": 8}, of_documents)
    assert (served / "items.parquet").read_bytes() == (oracle / "items.parquet").read_bytes()
    scores = [artifact.json("scores.json") for artifact in (served, oracle)]
    bits = [scores[n]["bits_per_byte_all"]["value"] for n in range(2)]
    print(f"bits per byte {bits[0]:.6f}, in the process {bits[1]:.6f}, difference {abs(bits[0] - bits[1]):.2g}")
    assert abs(bits[0] - bits[1]) < GAP and scores[0]["accuracy"] == scores[1]["accuracy"]

    config = {"num_samples": 2, "max_new_tokens": 6, "seed": 0}
    answers = [read_table(a / "answers.parquet").to_pylist() for a in both(pass_at_k.STAGE, config, inputs)]
    greedy = [[row for row in rows if row["sample"] == pass_at_k.GREEDY] for rows in answers]
    assert greedy[0] == greedy[1] and len(greedy[0]) == 10
    assert [row["seed"] for row in answers[0]] == [row["seed"] for row in answers[1]]

    config = {"model": "dpo", "before": "rlvr", "max_new_tokens": 6, "seed": 0}
    pairs = run_stage(win_rate.STAGE, {**config, **VLLM}, {**inputs, "before": inputs["model"]})
    assert len(read_table(pairs / "pairs.parquet")) == 12


@pytest.mark.usefixtures("shared")
def test_the_harness_gives_the_results_of_the_process(
    client: Client, folder: Path, tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    section = harness_fixtures.section_of(harness_fixtures.write_tasks(tmp_path / "own"))
    sets = section.task_sets(tmp_path, "recipe")
    config: dict[str, Any] = {"sets": sets, "forms": {"own": ["raw", "chat"]}, "max_new_tokens": 9}
    inputs = {"model": write_manifest(folder, "export-1"), "benchmarks": run_stage(benchmarks.STAGE, config, {})}
    served, oracle = (run_stage(harness.STAGE, {**config, **kind}, inputs) for kind in (VLLM, {}))
    assert served.json("scores.json") == oracle.json("scores.json")
    results = [read_table(artifact / "items.parquet").to_pylist() for artifact in (served, oracle)]
    for ours, theirs in zip(*results, strict=True):
        if ours["metric"] == "acc":
            pairs = [json.loads(row["response"]) for row in (ours, theirs)]
            assert [pair[0] for pair in pairs[0]] == pytest.approx([pair[0] for pair in pairs[1]], abs=GAP)
        else:
            assert ours["response"] == theirs["response"]
    rolling = Served(client, AutoTokenizer.from_pretrained(folder / "model"))
    text = "one two three " * 40
    (ours,) = rolling.loglikelihood_rolling([type("Request", (), {"args": (text,)})])
    alone = harness.language_model(folder / "model")
    windows = get_rolling_token_windows(alone.tok_encode(text), alone.prefix_token_id, release_fixtures.CONTEXT, 1)
    # one by one: together, the harness gives the last one, which shares tokens with that before it, another value
    values = [alone._loglikelihood_tokens([(None, *make_disjoint_window(window))])[0][0] for window in windows]
    assert ours == pytest.approx(sum(values), rel=GAP)
