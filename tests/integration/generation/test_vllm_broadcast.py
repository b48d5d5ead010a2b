"""Weights that go to vLLM servers by broadcast, and servers that are lost while they receive: with fake ones.

python -m tests.integration.generation.test_vllm_broadcast TASK.json [kill|stop]    # receives as a server's worker
"""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import AtomError
from stages.generation import weights
from stages.generation.vllm_sampler import VllmServer
from stages.generation.vllm_server import ServerLost
from stages.generation.vllm_worker import atom_group
from stages.generation.vllm_worker.atom_group import PATIENCE, WORKERS, Group, SignedStore, connect, packets, view
from stages.generation.vllm_worker.atom_index import row_of
from stages.generation.weights import Broadcast, Weights
from stages.models.parallel_layout import Layout
from stages.train.parallel import Ranks
from tests.fixtures import layout_fixtures, weights_fixtures
from tests.fixtures.vllm_fixtures import CHANGED, PROMPT, TENSORS, Fake, answer, fakes, sampler, secret  # noqa: F401 - fixtures


@pytest.fixture
def sending(sampler: VllmServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """send(tensors): hands them over by broadcast; returns their digest. Both servers have received the first ones."""
    monkeypatch.setattr(weights, "GROUP_SECONDS", 60.0)
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
            patched.setattr(weights, "GROUP_SECONDS", 2.0)
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
            patched.setattr(weights, "GROUP_SECONDS", 1.0 if reply != "drop" else 60.0)
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


KEY = "00" * 32
"""Of the entries of a group's store."""
LARGE = {f"model.layers.{n}.weight": torch.full((2_000_000,), float(n)) for n in range(3)}
"""Tensors of 8 MB, each of which is a packet here: more than a connection takes before it is read."""


def receive(task: dict[str, Any], way: str) -> None:
    """Receives as the only worker of a server, and has itself killed or stopped in the middle of the second packet."""
    atom_group.PACKET_BYTES = 8_000_000
    store = connect(task["store"], KEY, 60)
    store.set(WORKERS, "1")
    group = Group(store, 1, 2, 60, torch.device("cpu"), PATIENCE)
    for number, packet in enumerate(itertools.chain.from_iterable(packets(task["rows"], task["roots"]))):
        if number == 1 and way:
            os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGSTOP)
        buffer = torch.empty(packet.size, dtype=torch.uint8)
        group.end(group.start(buffer, packet.root))
        for n, offset in zip(packet.numbers, packet.offsets, strict=True):
            assert row_of(view(buffer, offset, task["rows"][n])) == task["rows"][n]


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_server_that_is_lost_in_the_middle_of_a_packet_does_not_hold_up_the_others(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers as processes of their own. The trainer gives the lost one up, at its deadline if it only stopped, and
    sends the other one the rest."""
    monkeypatch.setattr(atom_group, "PACKET_BYTES", 8_000_000)
    ways, processes, outcome = {"lost": way, "whole": ""}, {}, set()

    class Servers:
        def load(self, weights: Weights) -> None:
            sender = weights.sender
            assert isinstance(sender, Broadcast)
            addresses = {}
            for server, how in ways.items():
                store = dist.TCPStore(
                    "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
                )
                sender.stores[server], sender.keys[server] = store, KEY
                addresses[server] = f"127.0.0.1:{store.port}"
                task = tmp_path / f"{server}.json"
                task.write_text(json.dumps({**sender.content, "store": addresses[server]}))
                (processes[server],) = layout_fixtures.spawn(
                    "tests.integration.generation.test_vllm_broadcast", [str(task), how], 1
                )
            assert sender.join({server: {"store": address} for server, address in addresses.items()}) == set(ways)
            sender.groups["lost"].seconds, sender.groups["lost"].limit = 3.0, timedelta(seconds=3)
            outcome.update(sender.send(list(ways)))
            assert sender.has_group("whole") and not sender.has_group("lost")

    sender = Broadcast(lambda by_turns: iter(LARGE.items()), Ranks(0, 1, Layout(), 0, 1, True))
    try:
        sender.load(Servers())  # type: ignore[arg-type]
        assert outcome == {"whole"}
        codes, logs = layout_fixtures.end([processes["whole"]])
        assert codes == [0], logs
    finally:
        sender.close()
        for process in processes.values():
            process.kill()
            process.wait()


class Nccl:
    """Stands for a group of NCCL: whether it would have a watchdog, and whether it was aborted, by which thread."""

    made: list[Nccl]

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.has_watchdog = os.environ.get(atom_group.BLOCKING) != "1"
        self.options, self.aborted, self.never_ends = options, 0, False
        self.made.append(self)

    def broadcast(self, buffers: list[torch.Tensor], options: Any) -> Any:
        ends = not self.never_ends
        return SimpleNamespace(is_completed=lambda: ends, wait=lambda: None)

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Nccl]]:
    """`Nccl` in the place of PyTorch's class, which a build without CUDA lacks."""
    kind = type("Kind", (Nccl,), {"made": [], "Options": SimpleNamespace})
    monkeypatch.setattr(dist, "ProcessGroupNCCL", kind, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    yield kind


@pytest.mark.parametrize("before", [None, "0"])
def test_a_group_of_nccl_cannot_end_the_process(
    nccl: type[Nccl], monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """It has no watchdog and a limit far above its own deadline, after which this process leaves it. Groups that are made
    later have a watchdog again."""
    monkeypatch.delenv(atom_group.BLOCKING, raising=False)
    if before is not None:
        monkeypatch.setenv(atom_group.BLOCKING, before)
    group = Group(SignedStore(dist.HashStore(), KEY), 0, 2, 60.0, torch.device("cuda", 0))
    (made,) = nccl.made
    assert not made.has_watchdog and made.options._timeout > 100 * timedelta(seconds=group.seconds)
    assert os.environ.get(atom_group.BLOCKING) == before
    made.never_ends, group.seconds = True, 0.1
    with pytest.raises(RuntimeError, match="a broadcast did not end within 0.1 s"):
        group.end(group.start(torch.zeros(4, dtype=torch.uint8), 1))
    group.close()
    group.close()
    assert made.aborted == 1


@pytest.mark.parametrize("part", ["__init__", "broadcast", "abort"])
def test_nothing_of_nccl_is_waited_for_without_end(
    nccl: type[Nccl], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A process that is lost while a communicator is built leaves NCCL waiting in C, and so may an abort."""

    def hang(*arguments: Any) -> Any:
        time.sleep(600)

    monkeypatch.setattr(nccl, part, hang)
    monkeypatch.setattr(atom_group, "ABORT_SECONDS", 0.1)
    device, forms = torch.device("cuda", 0), part == "abort"
    make: Callable[[], Group] = lambda: Group(SignedStore(dist.HashStore(), KEY), 0, 2, 60.0 if forms else 0.5, device)  # noqa: E731
    if forms:
        make().close()
    else:
        with pytest.raises(RuntimeError, match="it did not end within 0.5 s"):
            make()
        assert [made.aborted for made in nccl.made] == ([1] if part == "broadcast" else [])


def test_another_release_of_nccl_is_refused_before_a_communicator_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atom_group, "nccl_version", lambda device: "2.29.7" if device.type == "cuda" else "")
    assert atom_group.other_nccl("2.29.7", torch.device("cuda")) is None
    assert atom_group.other_nccl("", torch.device("cpu")) is None
    assert atom_group.other_nccl("2.30.4", torch.device("cuda")) == (
        "it has NCCL 2.29.7, and the trainer has 2.30.4; NCCL connects equal releases only, so install one for both, or "
        "set sampling.transfer = folder"
    )


if __name__ == "__main__":
    receive(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
