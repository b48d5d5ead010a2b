"""What is asked of a vLLM server, and what becomes of a server that dies, hangs, lies or refuses: with a fake one."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import ServerSearch
from pipeline.run_secret import atom_secret
from stages.generation import server_jobs, vllm_server, weights
from stages.generation.protocols import Completion, Prompt, SamplerContext
from stages.generation.samplers import make_sampler
from stages.generation.server_jobs import Announced
from stages.generation.vllm_sampler import VllmServer
from stages.generation.vllm_server import ServerLost
from stages.generation.vllm_worker import atom_index
from stages.rl.config import Sampling
from stages.train.checkpoint.release_checkpoint import save_tensors
from tests.fixtures import rl_fixtures, vllm_fixtures, weights_fixtures
from tests.fixtures.vllm_fixtures import CHANGED, PROMPT, TENSORS, Fake, answer, fakes, sampler, secret  # noqa: F401 - fixtures


def test_requests_are_dealt_and_say_all_that_the_contract_needs(fakes: Any, sampler: VllmServer) -> None:
    prompts = [Prompt((4, n), n) for n in range(10)]
    assert sampler.weights is not None
    versions = ((sampler.weights.digest, 3),)
    expected = [Completion((4, n, 1), (-0.5,) * 3, True, versions=versions) for n in range(10)]
    assert sampler.generate(prompts) == expected
    assert [len(kind.requests) for kind in fakes[0]] == [5, 5]
    fakes[0][0].requests.clear()
    sampler.generate([PROMPT])
    sampler.generate([PROMPT], greedy=True)
    (path, body), (_, greedy) = fakes[0][0].requests
    assert path == "/inference/v1/generate" and body["token_ids"] == [4, 5]
    expected = {
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": 7,
        "stop_token_ids": [1, 3],
        "logprobs": 0,
        "detokenize": False,
    }
    assert body["sampling_params"] == expected
    assert greedy["sampling_params"] == {**expected, "temperature": 0.0}
    assert sampler.generate([]) == []


def test_each_server_takes_the_weights(fakes: Any, sampler: VllmServer) -> None:
    sampler.load(weights_fixtures.written(sampler.folder, TENSORS))
    assert not fakes[0][0].requests, "the same weights were loaded again"
    changed = weights_fixtures.written(sampler.folder, CHANGED)
    sampler.load(changed)
    assert changed.folder is not None and len([p for p in sampler.folder.iterdir() if p.is_dir()]) == 2
    weights.remove_earlier(changed.folder)
    assert [p for p in sampler.folder.iterdir() if p.is_dir()] == [changed.folder]
    for kind in fakes[0]:
        assert kind.version == changed.digest
        assert [path for path, _ in kind.requests] == [
            "/start_weight_update", "/pause?mode=keep", "/update_weights", "/finish_weight_update", "/resume",
        ]  # fmt: skip


def test_a_new_server_is_asked_for_its_sizes(fakes: Any, sampler: VllmServer) -> None:
    sampler.serving.clear()
    sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
    assert ("/init_weight_transfer_engine", {"init_info": {"sizes": {"hidden_size": 2}}}) in fakes[0][1].requests


def cut(folder: Path) -> None:
    (folder / "rank-00001.safetensors").unlink()


def flip(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def exchange(folder: Path) -> None:
    save_tensors(folder / "rank-00001.safetensors", {"model.other.weight": torch.ones(2)})


def restate(folder: Path) -> None:
    index = json.loads((folder / atom_index.INDEX).read_text())
    index["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    (folder / atom_index.INDEX).write_text(json.dumps(index))


def drop(folder: Path) -> None:
    index = json.loads((folder / atom_index.INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / atom_index.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (shutil.rmtree, r"it does not see .*model\.safetensors\.index\.json; mount the run's work folder there$"),
        (cut, r"it cannot read .*rank-00001\.safetensors \(.*No such file"),
        (flip, r"model\.embed_tokens\.weight in .*rank-00000\.safetensors is not the tensor of the index$"),
        (exchange, r"it cannot read .*rank-00001\.safetensors \(.*model\.norm\.weight"),
        (restate, r"holds the policy tensors-sha256:\w+, not tensors-sha256:\w+$"),
        (drop, r"the index of .* names other tensors than it describes$"),
    ],
)
def test_weights_that_do_not_add_up_are_refused(
    fakes: Any, sampler: VllmServer, fault: Callable[[Path], None], sentence: str
) -> None:
    before, good = fakes[0][0].version, weights_fixtures.written(sampler.folder, CHANGED)
    assert good.folder is not None
    fault(good.folder)
    with pytest.raises(AtomError, match=r"^the vLLM server at http://\S+ refuses the weights: .*" + sentence):
        sampler.load(good)
    for kind in fakes[0]:
        paths = [path for path, _ in kind.requests]
        assert paths[-1] == "/update_weights" and kind.version == before, "it stays paused"
    assert sampler.weights is None, "the run goes on with weights that it does not have"


def test_a_server_that_fails_while_it_loads_stays_paused(fakes: Any, sampler: VllmServer) -> None:
    refused = {"error": {"message": "failed: '[[no tensor of <path> is a.weight of its model]]'"}}
    fakes[0][1].trouble["/update_weights"] = [(500, refused)]
    with pytest.raises(AtomError, match=r"refuses the weights: no tensor of /.*weights-\w+ is a\.weight of its model$"):
        sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
    assert fakes[0][1].requests[-1][0] == "/update_weights" and sampler.weights is None


def test_a_server_that_started_anew_gets_the_weights_again(fakes: Any, sampler: VllmServer) -> None:
    """With the next weights, or at once if no other server is left."""
    for kind in fakes[0]:
        kind.version = "default"
    assert sampler.generate([PROMPT])[0].ids == (4, 5, 1)
    (first, _), (second, _) = (next(iter(kind.requests)) for kind in fakes[0])
    assert first == "/inference/v1/generate" and second == "/inference/v1/generate"
    assert len(sampler.serving) == 2 and not sampler.lost


def test_shares_that_are_missing_or_come_twice_are_refused() -> None:
    row = atom_index.row_of(torch.ones(2))
    with pytest.raises(AtomError, match="shards do not add up: no rank hands over b$"):
        weights.merge(["a", "b"], [{"a": row}, {}])
    with pytest.raises(AtomError, match="shards do not add up: rank 1 hands over a a second time$"):
        weights.merge(["a"], [{"a": row}, {"a": row}])


def test_lost_connections_are_tried_again(fakes: Any, sampler: VllmServer) -> None:  # fmt: skip
    fakes[0][0].trouble["/inference/v1/generate"] = ["drop", 500, "drop"]
    assert sampler.generate([PROMPT])[0].ids == (4, 5, 1)
    fakes[0][0].trouble["/inference/v1/generate"] = [400]
    with pytest.raises(AtomError, match="refuses /inference/v1/generate: 400 no such thing"):
        sampler.generate([PROMPT])


@pytest.mark.parametrize("fault", [500, "drop", 1.0])
def test_a_lost_server_is_left_out_until_it_is_back(
    fakes: Any, sampler: VllmServer, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(sampler, "note", notes.append)
    monkeypatch.setattr(vllm_server, "REQUEST_SECONDS", 0.3)
    fakes[0][0].trouble["/inference/v1/generate"] = [fault] * 40
    prompts = [Prompt((4, n), n) for n in range(10)]
    assert [c.ids for c in sampler.generate(prompts)] == [(4, n, 1) for n in range(10)]
    (note,) = notes
    assert note.startswith(
        f"left out until it is back: the vLLM server at {sampler.servers[0].url} is gone (/inference"
    )
    assert sampler.serving == [sampler.servers[1]]
    fakes[0][0].trouble.clear()
    sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
    assert sampler.serving == sampler.servers and fakes[0][0].version == fakes[0][1].version


def test_servers_that_are_all_lost_as_they_load_are_waited_for(fakes: Any, sampler: VllmServer) -> None:
    for kind in fakes[0]:
        kind.trouble["/start_weight_update"] = ["drop"]
    sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
    assert set(sampler.serving) == set(sampler.servers)
    for kind in fakes[0]:
        kind.trouble["/start_weight_update"] = ["drop"] * 2
    with pytest.raises(ServerLost, match="is gone"):
        sampler.load(weights_fixtures.written(sampler.folder, TENSORS))


def test_servers_that_are_all_lost_again_and_again_end_the_stage(fakes: Any, sampler: VllmServer) -> None:
    for kind in fakes[0]:
        kind.trouble["/inference/v1/generate"] = [500] * 100
    with pytest.raises(ServerLost, match=r"is gone \(/inference/v1/generate: 500 no such thing\); see to it and run"):
        sampler.generate([PROMPT])


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"choices": []},
        answer([], "V"),
        answer([4, 1], "V", finish_reason="abort"),
        answer([4, 1], "V", logprobs=None),
        answer([4, 1], "V", logprobs={"content": [{"token_id": 4, "logprob": -0.5}]}),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(fakes: Any, sampler: VllmServer, wrong: Any) -> None:
    reply = json.loads(json.dumps(wrong).replace('"V"', json.dumps(sampler.weights.digest if sampler.weights else "")))
    fakes[0][0].trouble["/inference/v1/generate"] = [reply or {"nothing": 1}]
    with pytest.raises(AtomError, match="gave no whole answer"):
        sampler.generate([PROMPT])


def test_without_vllm_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stages.rl.rlvr import STAGE

    monkeypatch.delenv("ATOM_VLLM_PYTHON", raising=False)

    def why(python: str = "", **options: Any) -> str | None:
        if python:
            monkeypatch.setenv("ATOM_VLLM_PYTHON", python)
        sampling = {"kind": "vllm", "max_new_tokens": 4, **options}
        return STAGE.lack(STAGE.config.model_validate(rl_fixtures.config(sampling=sampling)))

    assert "needs the interpreter of an environment with vLLM; make one by `make .venv-vllm/.ready`" in (why() or "")
    assert f"{tmp_path}/python is no interpreter that runs" in (why(python=f"{tmp_path}/python") or "")
    assert f"{sys.executable} has no vLLM" in (why(python=sys.executable) or "")
    assert why(url=("http://node1:8000",), secret="secret") is None
    with pytest.raises(AtomError, match="has no vLLM"):
        vllm_fixtures.make_sampler({"dtype": "float32"}, (1,), 7, 1.0, tmp_path / "served")


def test_the_registry_makes_a_sampler_of_the_settings(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    urls = ("http://node1:8000", "http://node2:8000")
    settings = Sampling(kind="vllm", max_new_tokens=7, url=urls, secret=str(secret))
    with pytest.raises(AtomError, match=r"the secret .*secret cannot be read \(No such file.*see sampling.secret$"):
        make_sampler("vllm", SamplerContext({"dtype": "bfloat16"}, (1, 3), tmp_path / "served", settings))
    atom_secret.make(secret)
    sampler = make_sampler("vllm", SamplerContext({"dtype": "bfloat16"}, (1, 3), tmp_path / "served", settings))
    assert isinstance(sampler, VllmServer)
    assert [server.url for server in sampler.servers] == list(settings.url)
    assert (sampler.stops, sampler.max_new_tokens, sampler.temperature) == ({1, 3}, 7, 1.0)
    assert json.loads((tmp_path / "served" / "config.json").read_text()) == {"dtype": "bfloat16"}
    sampler.close()


def test_servers_in_jobs_of_their_own_come_and_go(
    fakes: Any, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by their files: one is enough, a dead one is left out, and one that was started again is a new one."""
    monkeypatch.setattr(server_jobs, "POLL_SECONDS", 0.01)
    notes: list[str] = []
    (one, two), urls = fakes
    place, config = tmp_path / "announced", {"dtype": "float32", "hidden_size": 2}
    place.mkdir()
    shutil.copy2(secret, place / "secret")  # of an earlier start of the stage
    search = ServerSearch(str(place), "run-1", 0.1)
    sampler = vllm_fixtures.make_sampler(config, (1, 3), 7, 0.5, tmp_path / "served", note=notes.append, search=search)
    assert json.loads((place / "config.json").read_text()) == config, "which the servers wait for"
    first = weights_fixtures.written(sampler.folder, TENSORS)
    with pytest.raises(
        MachineError, match=r"answers after 0 min \(slurm.servers.wait_minutes\); 0 have announced them"
    ):
        sampler.load(first)
    assert notes == ["waits for a vLLM server, at most 0 min"]

    def announced(number: int, url: str, start: int = 0) -> Any:
        return server_jobs.announced(place, number, Announced("run-1", url, "n1", "7", start))

    with contextlib.ExitStack() as stack:
        stack.enter_context(announced(0, "http://127.0.0.1:9"))  # nobody answers there
        stack.enter_context(announced(1, urls[0]))
        sampler.load(first)
        assert [server.url for server in sampler.serving] == [urls[0]]
        with announced(2, urls[1]):
            sampler.load(weights_fixtures.written(sampler.folder, CHANGED))
            assert {server.url for server in sampler.serving} == set(urls)
        with announced(2, urls[1], start=1):  # it started again, at the same address
            two.requests.clear()
            sampler.load(weights_fixtures.written(sampler.folder, TENSORS))
            assert "/init_weight_transfer_engine" in [path for path, _ in two.requests]
            assert {server.url for server in sampler.serving} == set(urls)
        one.trouble["/inference/v1/generate"] = [500] * 100
        assert len(sampler.generate([Prompt((4, n), n) for n in range(4)])) == 4
        assert [server.url for server in sampler.serving] == [urls[1]]
        one.trouble.clear()
        sampler.load(weights_fixtures.written(sampler.folder, CHANGED))  # it ended, and serves while it answers
        assert {server.url for server in sampler.serving} == set(urls)
    with pytest.raises(MachineError, match="cannot be used"):
        shutil.rmtree(place)
        sampler.load(weights_fixtures.written(sampler.folder, TENSORS))
