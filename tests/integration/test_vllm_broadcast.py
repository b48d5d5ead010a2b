"""Weights that go to vLLM servers by broadcast, and servers that are lost while they receive: with fake ones."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError
from stages.mcore.parallel_layout import Layout
from stages.rl import broadcast
from stages.rl.broadcast import Broadcast
from stages.rl.samplers.vllm_sampler import VllmServer
from stages.rl.samplers.vllm_server import ServerLost
from stages.rl.samplers.vllm_worker import atom_group
from stages.rl.samplers.vllm_worker.atom_group import packets
from stages.train.parallel import Ranks
from tests.fixtures import weights_fixtures
from tests.fixtures.vllm_fixtures import CHANGED, PROMPT, TENSORS, Fake, answer, fakes, sampler, secret  # noqa: F401 - fixtures


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
