"""What is asked of a vLLM server, and what becomes of a server that dies, hangs, lies or refuses: with a fake one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import ServerSearch
from stages.mcore.parallel_layout import Layout
from stages.rl import broadcast, weights
from stages.rl.broadcast import Broadcast
from stages.rl.config import Sampling
from stages.rl.protocols import Completion, Prompt, SamplerContext
from stages.rl.samplers import server_files, vllm_server
from stages.rl.samplers.registry import make_sampler
from stages.rl.samplers.server_files import Announced
from stages.rl.samplers.vllm_sampler import VllmServer
from stages.rl.samplers.vllm_server import ServerLost
from stages.rl.samplers.vllm_worker import atom_group, atom_index
from stages.rl.samplers.vllm_worker.atom_group import PATIENCE, Group, connect, packets, view
from stages.train.checkpoint.release_checkpoint import save_tensors
from stages.train.parallel import Ranks
from tests.fixtures import ROOT, rl_fixtures, weights_fixtures

TENSORS = {"model.embed_tokens.weight": torch.arange(6.0).view(3, 2), "model.norm.weight": torch.ones(2)}
CHANGED = {**TENSORS, "model.norm.weight": torch.full((2,), 2.0)}
PROMPT = Prompt((4, 5), 2**63 + 7)


class Fake(BaseHTTPRequestHandler):
    """Answers with the prompt's ids and the stop token. `trouble` has the path fail that often, and how. It joins the
    trainer's group as a server of one worker, and has what was broadcast in `received`."""

    requests: list[tuple[str, Any]]
    trouble: dict[str, list[Any]]
    version = "default"
    group: Group | None = None
    received: dict[str, torch.Tensor]

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, body))
        trouble = self.trouble.get(self.path)
        if trouble:
            fault = trouble.pop(0)
            if fault is None:
                pass
            elif isinstance(fault, tuple):
                return self.reply(fault[1], fault[0])
            elif fault == "drop":
                self.close_connection = True
                if self.group is not None:
                    self.group.close()
                return self.connection.close()
            elif isinstance(fault, float):
                time.sleep(fault)
            elif isinstance(fault, int):
                return self.reply({"error": {"message": "no such\nthing"}}, fault)
            else:
                return self.reply(fault)
        if self.path == "/update_weights" and not body["update_info"].get("load", True):
            try:
                atom_index.check(Path(body["update_info"]["folder"]), body["update_info"]["digest"], 0, 1)
            except atom_index.Refused as error:
                message = f"Call to collective_rpc method failed: Worker failed with error '{error}', please check"
                return self.reply({"error": {"message": message}}, 500)
        try:
            self.take_part(body)
        except RuntimeError as error:
            return self.reply({"error": {"message": str(error)}}, 500)
        if self.path == "/finish_weight_update" and "weight_version" in body:
            type(self).version = body["weight_version"]
        if self.path == "/inference/v1/generate":
            ids = [*body["token_ids"], 1]
            return self.reply(answer(ids, self.version))
        self.reply({"message": "done"})

    def take_part(self, body: dict[str, Any]) -> None:
        """What the workers of a server do, by the functions that they use."""
        if self.path == "/init_weight_transfer_engine" and "store" in (info := body["init_info"]):
            store = connect(info["store"], info["seconds"])
            store.set("workers", "1")
            type(self).group = Group(
                store, info["ranks"], info["ranks"] + 1, info["seconds"], torch.device("cpu"), PATIENCE
            )
        elif self.path == "/update_weights" and "rows" in (info := body["update_info"]):
            type(self).received = {}
            assert self.group is not None
            for packet in itertools.chain.from_iterable(packets(info["rows"], info["roots"])):
                buffer = torch.empty(packet.size, dtype=torch.uint8)
                self.group.end(self.group.start(buffer, packet.root))
                for number, offset in zip(packet.numbers, packet.offsets, strict=True):
                    tensor = view(buffer, offset, info["rows"][number])
                    assert atom_index.row_of(tensor) == info["rows"][number]
                    self.received[info["names"][number]] = tensor

    def reply(self, body: Any, code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked has given up
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


def answer(ids: list[int], version: str, **fields: Any) -> dict[str, Any]:
    body = {"content": [{"token_id": i, "logprob": -0.5} for i in ids]}
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    return {
        "choices": [{"token_ids": ids, "logprobs": body, "weight_versions": spans, "finish_reason": "stop", **fields}]
    }


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two fake servers: (their classes, their urls)."""
    monkeypatch.setattr(vllm_server, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(vllm_server, "START_SECONDS", 5.0)
    kinds = [type("One", (Fake,), {"requests": [], "trouble": {}}) for _ in range(2)]
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield kinds, [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sampler(fakes: Any, tmp_path: Path) -> VllmServer:
    config = {"dtype": "float32", "hidden_size": 2, "use_cache": True}
    server = VllmServer(config, (1, 3), 7, 0.5, tmp_path / "served", urls=fakes[1])
    server.load(weights_fixtures.written(server.folder, TENSORS))
    for kind in fakes[0]:
        kind.requests.clear()
    return server


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


def test_a_server_takes_the_weights_once_all_servers_have_checked_them(fakes: Any, sampler: VllmServer) -> None:
    sampler.load(weights_fixtures.written(sampler.folder, TENSORS))
    assert not fakes[0][0].requests, "the same weights were loaded again"
    changed = weights_fixtures.written(sampler.folder, CHANGED)
    sampler.load(changed)
    assert changed.folder is not None and len([p for p in sampler.folder.iterdir() if p.is_dir()]) == 2
    weights.remove_earlier(changed.folder)
    assert [p for p in sampler.folder.iterdir() if p.is_dir()] == [changed.folder]
    for kind in fakes[0]:
        loads = [body["update_info"]["load"] for path, body in kind.requests if path == "/update_weights"]
        assert kind.version == changed.digest and loads == [False, True]
        assert [path for path, _ in kind.requests] == [
            "/start_weight_update", "/update_weights",
            "/pause?mode=keep", "/update_weights", "/finish_weight_update", "/resume",
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
        (exchange, r"rank-00001\.safetensors and the index do not have the same tensors: model\.norm\.weight$"),
        (restate, r"holds the policy tensors-sha256:\w+, not tensors-sha256:\w+$"),
        (drop, r"the index of .* names other tensors than it describes$"),
    ],
)
def test_weights_that_do_not_add_up_are_refused_and_the_old_ones_stay(
    fakes: Any, sampler: VllmServer, fault: Callable[[Path], None], sentence: str
) -> None:
    before, good = fakes[0][0].version, weights_fixtures.written(sampler.folder, CHANGED)
    assert good.folder is not None
    fault(good.folder)
    with pytest.raises(AtomError, match=r"^the vLLM server at http://\S+ refuses the weights: .*" + sentence):
        sampler.load(good)
    for kind in fakes[0]:
        paths = [path for path, _ in kind.requests]
        assert "/pause?mode=keep" not in paths and paths[-1] == "/finish_weight_update"
        assert kind.version == before
    assert sampler.weights is None, "the run goes on with weights that it does not have"


def test_a_server_that_fails_while_it_loads_stays_paused(fakes: Any, sampler: VllmServer) -> None:
    refused = {"error": {"message": "failed: '[[no tensor of <path> is a.weight of its model]]'"}}
    fakes[0][1].trouble["/update_weights"] = [None, (500, refused)]
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

    def why(**options: Any) -> str | None:
        sampling = {"kind": "vllm", "max_new_tokens": 4, **options}
        return STAGE.lack(STAGE.config.model_validate(rl_fixtures.config(sampling=sampling)))

    assert "needs the interpreter of an environment with vLLM; make one by `make .venv-vllm/.ready`" in (why() or "")
    assert f"{tmp_path}/python is no interpreter that runs" in (why(python=f"{tmp_path}/python") or "")
    assert f"{sys.executable} has no vLLM" in (why(python=sys.executable) or "")
    assert why(url=("http://node1:8000",)) is None
    with pytest.raises(AtomError, match="has no vLLM"):
        VllmServer({"dtype": "float32"}, (1,), 7, 1.0, tmp_path / "served", sys.executable)


def test_the_registry_makes_a_sampler_of_the_settings(tmp_path: Path) -> None:
    settings = Sampling(kind="vllm", max_new_tokens=7, url=("http://node1:8000", "http://node2:8000"))
    sampler = make_sampler("vllm", SamplerContext({"dtype": "bfloat16"}, (1, 3), tmp_path / "served", settings))
    assert isinstance(sampler, VllmServer)
    assert [server.url for server in sampler.servers] == list(settings.url)
    assert (sampler.stops, sampler.max_new_tokens, sampler.temperature) == ({1, 3}, 7, 1.0)
    assert json.loads((tmp_path / "served" / "config.json").read_text()) == {"dtype": "bfloat16"}
    sampler.close()


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> vllm_server.Server:
    (folder / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setattr(vllm_server, "command", lambda *args: [sys.executable, "-c", code])
    return vllm_server.Server.start("python", folder, folder / "server.log")


def test_a_server_that_dies_at_its_start_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, monkeypatch, "print('one', flush=True); raise SystemExit('no such device')")
    with pytest.raises(
        AtomError, match=r"is gone \(exit code 1\); its log .*server.log ends: .*no such device; see to it"
    ):
        server.wait(30)
    server.close()
    server = start(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(AtomError, match="no answer within 0 s"):
        server.wait(0.3)
    server.close()
    server.close()


CHILD = "import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); print(os.getpid(), p.pid, flush=True); time.sleep(60)"


def pids(log: Path) -> list[int]:
    for _ in range(200):
        if log.exists() and (text := log.read_text()).endswith("\n"):
            return [int(x) for x in text.split()]
        time.sleep(0.05)
    raise AssertionError("the server wrote nothing")


def have_ended(process_ids: list[int]) -> bool:
    def runs(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False

    for _ in range(200):
        if not any(runs(pid) for pid in process_ids):
            return True
        time.sleep(0.05)
    return False


def test_a_server_ends_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, monkeypatch, CHILD)
    process_ids = pids(tmp_path / "server.log")
    server.close()
    assert have_ended(process_ids)


def test_a_server_ends_when_the_stage_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from stages.rl.samplers import vllm_server as v\n"
        f"v.command = lambda *given: [sys.executable, '-c', {CHILD!r}]\n"
        "folder = Path(sys.argv[1]); s = v.Server.start('python', folder, folder / 'server.log')\n"
        "while not (folder / 'server.log').read_text().endswith('\\n'): time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT)], check=False)
    assert have_ended(pids(tmp_path / "server.log"))


def test_a_server_beside_training_leaves_it_its_gpu_or_its_memory() -> None:
    assert vllm_server.place({}, 2, 0.9) == ({"CUDA_VISIBLE_DEVICES": "1"}, [])
    assert vllm_server.place({"CUDA_VISIBLE_DEVICES": "4,6,7", "WORLD_SIZE": "2"}, 3, 0.9)[0] == {
        "CUDA_VISIBLE_DEVICES": "7"
    }
    assert vllm_server.place({"WORLD_SIZE": "16"}, 8, 0.6) == ({}, ["--gpu-memory-utilization=0.30"])


def test_workarounds_for_the_cpu_are_only_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert not set(vllm_server.CPU_OPTIONS) & set(vllm_server.command("python", tmp_path, "127.0.0.1", 1))


@pytest.fixture
def sending(sampler: VllmServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """send(tensors): hands them over by broadcast; returns their digest. Both servers have received the first ones."""
    monkeypatch.setattr(broadcast, "SECONDS", 60.0)
    monkeypatch.setattr(atom_group, "PACKET_BYTES", 20)  # of the two tensors, one is a packet
    held: dict[str, torch.Tensor] = {}
    sender = Broadcast(lambda by_turns: iter(held.items()), Ranks(0, 1, Layout(), 0, 1, True))

    def send(tensors: dict[str, torch.Tensor]) -> str:
        held.update(tensors)
        return sender.load(sampler)

    send(TENSORS | {"model.norm.weight": torch.zeros(2)})
    yield send
    sender.close()


def assert_received(kind: Any, tensors: dict[str, torch.Tensor], digest: str) -> None:
    assert kind.version == digest and kind.received.keys() == tensors.keys()
    assert all(torch.equal(kind.received[name], tensor) for name, tensor in tensors.items())


def test_a_broadcast_reaches_all_servers_in_groups_that_last(fakes: Any, sampler: VllmServer, sending: Any) -> None:
    tensors = {
        **CHANGED,
        "model.layers.0.weight": torch.arange(7, dtype=torch.bfloat16),
        "model.scalar": torch.tensor(3),
    }
    for kind in fakes[0]:
        kind.requests.clear()
    digest = sending(tensors)
    assert digest == weights_fixtures.written(sampler.folder, tensors).digest
    for kind in fakes[0]:
        assert_received(kind, tensors, digest)
        paths = [path for path, _ in kind.requests]
        assert paths == [
            "/start_weight_update", "/pause?mode=keep", "/update_weights", "/finish_weight_update", "/resume"
        ]  # fmt: skip
    assert sampler.generate([PROMPT])[0].ids == (4, 5, 1)
    sending(tensors)
    assert len(fakes[0][0].requests) == 6, "the same weights were sent again"


@pytest.mark.parametrize("way", ["it dies", "it receives nothing"])
def test_a_server_that_is_lost_while_it_receives_breaks_nothing_else(
    fakes: Any, sampler: VllmServer, sending: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(sampler, "note", notes.append)
    one, two = fakes[0]
    if way == "it receives nothing":  # in a group of more haste than that of the other server
        sampler.serving.remove(sampler.servers[0])
        with monkeypatch.context() as patched:
            patched.setattr(broadcast, "SECONDS", 2.0)
            sending({"model.norm.weight": torch.full((2,), 5.0)})
    one.trouble["/update_weights"] = ["drop"] if way == "it dies" else [{"message": "done"}]
    lost = {**TENSORS, "model.norm.weight": torch.full((2,), 7.0)}
    digest = sending(lost)
    assert sampler.serving == [sampler.servers[1]]
    assert_received(two, lost, digest)
    digest = sending(CHANGED)  # it is back, in a new group
    assert set(sampler.serving) == set(sampler.servers)
    assert_received(one, CHANGED, digest)
    (note,) = notes
    assert note.startswith("left out until it is back: the vLLM server at")
    assert way == "it dies" or "did not come through in time; see whether it and the ranks reach each other" in note


def test_a_server_that_does_not_join_is_left_out(
    fakes: Any, sampler: VllmServer, sending: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sampler.servers
    sampler.serving.remove(one)
    for reply in ({"message": "done"}, "drop"):
        fakes[0][0].trouble["/init_weight_transfer_engine"] = [reply]
        with monkeypatch.context() as patched:
            patched.setattr(broadcast, "SECONDS", 1.0 if reply != "drop" else 60.0)
            digest = sending({"model.norm.weight": torch.full((2,), float(len(reply)))})
        assert sampler.serving == [two] and fakes[0][1].version == digest
        assert ("did not come through in time" in str(sampler.lost[one])) == (reply != "drop")
        del sampler.lost[one]
    sampler.serving.clear()
    fakes[0][1].trouble["/init_weight_transfer_engine"] = [(500, {"error": {"message": "'[[its model has 3]]'"}})]
    with pytest.raises(AtomError, match="refuses the weights: its model has 3$"):
        sending(TENSORS)


def test_without_a_server_that_has_the_weights_a_broadcast_is_not_made_up(
    fakes: Any, sampler: VllmServer, sending: Any
) -> None:
    for kind in fakes[0]:
        kind.trouble["/inference/v1/generate"] = [500] * 8
    with pytest.raises(ServerLost, match="is gone"):
        sampler.generate([PROMPT])


def test_packets_are_the_same_on_every_side_and_hold_each_tensor_once() -> None:
    rows = [{"dtype": "bfloat16", "shape": [n, 3], "sha256": ""} for n in (1, 5, 0, 9, 2, 2, 10_000)]
    roots = [0, 1, 1, 0, 2, 0, 1]
    together = list(packets(rows, roots))
    assert [[packet.root for packet in group] for group in together] == [[0, 1, 2]]
    numbers = [number for group in together for packet in group for number in packet.numbers]
    assert sorted(numbers) == list(range(7)) and all(roots[n] == p.root for g in together for p in g for n in p.numbers)
    for packet in itertools.chain.from_iterable(together):
        ends = [o + atom_group.bytes_of(rows[n]) for n, o in zip(packet.numbers, packet.offsets, strict=True)]
        assert all(offset % 16 == 0 for offset in packet.offsets) and max(ends) <= packet.size
        assert all(end <= offset for end, offset in zip(ends, packet.offsets[1:], strict=False))


def test_servers_in_jobs_of_their_own_come_and_go(fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by their files: one is enough, a dead one is left out, and one that was started again is a new one."""
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.01)
    notes: list[str] = []
    (one, two), urls = fakes
    place, config = tmp_path / "announced", {"dtype": "float32", "hidden_size": 2}
    search = ServerSearch(str(place), "run-1", 0.1)
    sampler = VllmServer(config, (1, 3), 7, 0.5, tmp_path / "served", note=notes.append, search=search)
    assert json.loads((place / "config.json").read_text()) == config, "which the servers wait for"
    first = weights_fixtures.written(sampler.folder, TENSORS)
    with pytest.raises(
        MachineError, match=r"answers after 0 min \(slurm.servers.wait_minutes\); 0 have announced them"
    ):
        sampler.load(first)
    assert notes == ["waits for a vLLM server, at most 0 min"]

    def announced(number: int, url: str, start: int = 0) -> Any:
        return server_files.announced(place, number, Announced("run-1", url, "n1", "7", start))

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


class Place:
    """Where a server runs: until `is_over`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.run, self.number = folder, folder / "server.log", "run-1", 3
        self.is_over = self.is_ready = False

    def ended(self) -> bool:
        return self.is_over

    def ready(self) -> None:
        self.is_ready = True


ANSWERING = (
    "import http.server as h, os, sys\n"
    "class Health(h.BaseHTTPRequestHandler):\n"
    "    def do_GET(self): self.send_response(200); self.send_header('Content-Length', '0'); self.end_headers()\n"
    "    def log_message(self, *arguments): pass\n"
    "print(os.getpid(), flush=True)\n"
    "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()\n"
)


def test_a_server_in_a_job_is_announced_while_it_answers_and_ends_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(vllm_server, "interpreter", lambda python: "python")
    monkeypatch.setattr(
        vllm_server, "command", lambda python, folder, host, port, options: [sys.executable, "-c", ANSWERING, str(port)]
    )
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    place, outcomes = Place(tmp_path), []
    settings = Sampling(kind="vllm", max_new_tokens=7)

    def run() -> None:
        try:
            outcomes.append(vllm_server.serve(settings, place))
        except ServerLost as error:
            outcomes.append(error)

    def announcements(count: int) -> list[Announced]:
        for _ in range(1000):
            if len(found := server_files.read(tmp_path, "run-1")) == count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{found} were announced, not {count}; {outcomes}")

    for is_killed in (True, False):
        thread = threading.Thread(target=run)
        thread.start()
        if is_killed:
            time.sleep(0.1)
            assert not place.log.exists(), "it started without a model"
            (tmp_path / "config.json").write_text('{"dtype": "float32"}')
        (announced,) = announcements(1)
        assert place.is_ready and (announced.run, announced.job, announced.host) == ("run-1", "7", "127.0.0.1")
        pid = pids(place.log)[-1]
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        else:
            place.is_over = True
        thread.join(60)
        assert not announcements(0) and have_ended([pid])
        assert ("is gone (exit code" in str(outcomes[-1])) == is_killed
    assert outcomes[-1] is None
