"""Texts that a model behind a real vLLM server writes from the documents of another source: those of the stage's
process where nothing is drawn by chance, their records, and what follows when the server dies.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from stages.data.acquire import generate_stage
from stages.data.acquire.generate_stage import Generator
from stages.data.acquire.readers.generated import Generated
from stages.generation.vllm_model import Client
from stages.generation.vllm_server import ServerLost
from tests.fixtures import release_fixtures
from tests.fixtures.generated_source_fixtures import READER, acquire_notes, digest_of, rows, run, write_recipe

pytestmark = pytest.mark.skipif(
    "ATOM_VLLM_PYTHON" not in os.environ, reason="vLLM needs an environment of its own; see `make test-vllm`"
)
SIZES = {"hidden_size": 64, "head_dim": 32, "initializer_range": 0.3}
"""vLLM's kernels for the CPU know heads of 32 and more; the wide weights leave few near ties."""
VLLM = {"engine": {"kind": "vllm"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a generator, whose config.json names the data type of its weights as transformers 4 does."""
    folder = tmp_path_factory.mktemp("generated")
    release_fixtures.save_model(folder / "model", seed=3, context=128, **SIZES)
    config = json.loads((folder / "model/config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "model/config.json").write_text(json.dumps(config))
    acquire_notes(folder)
    return folder


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Client]]:
    """The servers that are started, in their order."""
    started, start = [], Client.start

    def record(*arguments: Any, **settings: Any) -> Client:
        started.append(start(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(Client, "start", record)
    yield started
    assert all(client.server.process is None for client in started), "every server has ended"


def write(place: Path, folder: Path, **reader: Any) -> Artifact:
    write_recipe(place, digest_of(place), **reader)
    run("generate", place, "rewritten", folder / "work", folder / "out")
    return write_manifest(folder / "out", "acquire-rewritten")


def test_greedy_texts_are_those_of_the_process(place: Path, tmp_path: Path, clients: list[Client]) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "own").mkdir()
    served = write(place, tmp_path / "served", greedy=True, **VLLM)
    oracle = write(place, tmp_path / "own", greedy=True)
    assert len(clients) == 1, "one server for all parts"
    for table in ("documents", "generated", "failed"):
        assert rows(served, table) == rows(oracle, table) != []
    declared = [json.loads((artifact / "source.json").read_text())["generated"] for artifact in (served, oracle)]
    assert [one.pop("engine") for one in declared] == ["vllm", "in-process"] and declared[0] == declared[1]


def test_a_server_that_dies_loses_the_batch_in_work(
    place: Path, tmp_path: Path, clients: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and sealed batches stay; the run that goes on draws the others with a new server."""
    draw, work = Generator.draw, tmp_path / "work"
    drawn: list[int] = []

    def kill_before_third(generator: Generator, requests: Any) -> Any:
        drawn.append(len(requests))
        if len(drawn) == 3:
            process = clients[0].server.process
            assert process is not None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return draw(generator, requests)

    monkeypatch.setattr(Generator, "draw", kill_before_third)
    with pytest.raises(ServerLost, match=r"the vLLM server at http://127.* is gone .*; see to it and run again to go"):
        write(place, tmp_path, **VLLM)
    batches = {path.parent.name for path in work.glob("*/texts.parquet")}
    assert batches == {"rewritten-00000-000000", "rewritten-00000-000001"}
    times = {name: (work / name / "texts.parquet").stat().st_mtime_ns for name in batches}
    artifact = write(place, tmp_path, **VLLM)
    assert {name: (work / name / "texts.parquet").stat().st_mtime_ns for name in batches} == times
    assert len(clients) == 2 and not list(work.glob("vllm-*.log")), "the second server left no log"
    records, documents = rows(artifact, "generated"), rows(artifact, "documents")
    assert len(records) == 11 and len(documents) > 5
    digest = digest_of(place)
    assert {(row["generator"], row["generator_digest"], row["temperature"]) for row in records} == {
        ("tiny", digest, 1.0)
    }
    requests = [row for row in records if row["tokens"]]
    assert len(requests) >= len(documents) and all(0 < row["tokens"] <= 16 for row in requests)
    assert len({row["text"] for row in documents}) == len(documents), "each text has its own seed"


def test_a_missing_environment_names_the_setting_of_the_source(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOM_VLLM_PYTHON", "/no/python")
    settings = {**READER, "path": str(place / "model"), "engine": {"kind": "vllm"}}
    reader = Generated.model_validate(settings)
    words = r"reader\.engine\.kind = vllm: /no/python is no interpreter that runs .* name it in ATOM_VLLM_PYTHON"
    with pytest.raises(AtomError, match=words):
        Generator(reader, tmp_path)
    recipe = write_recipe(place, digest_of(place), engine=settings["engine"])
    config = generate_stage.STAGE.config.model_validate(recipe.resolved().acquire_config("rewritten", 0))
    lack = generate_stage.STAGE.lack(config)
    assert lack is not None and "reader.engine.kind = vllm: /no/python" in lack
    assert generate_stage.STAGE.promise(config) == "numeric"
