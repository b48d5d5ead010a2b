"""A real vLLM server as the sampler: its tokens and log-probabilities are those of the in-process sampler, before and
after weights are reloaded, and in a whole step of reinforcement learning.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from pipeline.core.errors import AtomError
from stages.generation.in_process import InProcess
from stages.generation.protocols import Completion, Prompt
from stages.generation.vllm_sampler import VllmServer
from stages.generation.weights import Broadcast, Weights
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import full_tensor
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.rl.rollout import rollouts
from stages.train.parallel import Ranks
from tests.fixtures import rl_fixtures, vllm_fixtures, weights_fixtures

pytestmark = pytest.mark.skipif(
    "ATOM_VLLM_PYTHON" not in os.environ, reason="vLLM needs an environment of its own; see `make test-vllm`"
)
# vLLM's kernels for the CPU know heads of 32 and more
MODEL: dict[str, Any] = {
    **rl_fixtures.MODEL,
    "hidden_size": 64,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "init_std": 0.3,
}
STOPS, TOKENS, TEMPERATURE = (1, 3), 24, 0.7
ARGUMENTS = (STOPS, TOKENS, TEMPERATURE)


def weights(seed: int) -> dict[str, torch.Tensor]:
    model = Qwen3MoeConfig(**MODEL)
    shapes = model.shapes(rl_fixtures.PADDED)
    tensors = {name: full_tensor(name, shape, model, seed) for name, shape in shapes.items()}
    # no norm of a trained model is all ones
    noise = torch.Generator().manual_seed(seed)
    tensors |= {n: t * (1 + 0.2 * torch.randn(t.shape, generator=noise)) for n, t in tensors.items() if "norm" in n}
    return dict(to_hf(tensors, model, rl_fixtures.PADDED))


CONFIG = hf_config(Qwen3MoeConfig(**MODEL), rl_fixtures.PADDED, 1, 0, "float32")
FIRST, SECOND = weights(0), weights(1)


def prompts(count: int) -> list[Prompt]:
    """128 of them are more tokens than vLLM reads at once."""
    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 41, (count,), generator=make).tolist()
    return [
        Prompt(tuple(torch.randint(4, 48, (n,), generator=make).tolist()), 2**62 + i) for i, n in enumerate(lengths)
    ]


def gap(
    completions: list[Completion], requests: list[Prompt], model: InProcess, temperature: float = TEMPERATURE
) -> float:
    """The largest difference from the log-probabilities of a transformers model."""
    gaps = [
        (logprobs(model.model, p, c, temperature) - torch.tensor(c.logprobs)).abs().max()
        for p, c in zip(requests, completions, strict=True)
    ]
    return float(torch.stack(gaps).max())


def logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    """A transformers model's log-probabilities, [tokens], of an answer's tokens at a temperature."""
    ids = torch.tensor([[*prompt.ids, *completion.ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt.ids) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def load(sampler: VllmServer, tensors: dict[str, torch.Tensor]) -> None:
    sampler.load(weights_fixtures.written(sampler.folder, tensors))


def of_others(sampler: VllmServer) -> dict[str, Any]:
    """The arguments of another sampler that uses the server of this one."""
    (server,) = sampler.servers
    return {"url": [server.url], "secret": str(server.secret)}


def get(sampler: VllmServer, path: str) -> Any:
    (server,) = sampler.servers
    return json.loads(server._exchange(path, None, server.instance, 10)[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    sampler = vllm_fixtures.make_sampler(CONFIG, *ARGUMENTS, tmp_path_factory.mktemp("vllm") / "served")
    began = time.monotonic()
    load(sampler, FIRST)
    print(f"\nserver started and weights loaded in {time.monotonic() - began:.1f} s")
    yield sampler
    sampler.close()


@pytest.fixture
def ours() -> InProcess:
    engine = InProcess(CONFIG, *ARGUMENTS)
    engine.load(FIRST)
    return engine


def test_tokens_and_log_probabilities_are_those_of_the_in_process_sampler(served: VllmServer, ours: InProcess) -> None:
    requests = prompts(128)
    for tensors in (FIRST, SECOND, FIRST):  # and after reloads, of weights that were served before too
        began = time.monotonic()
        load(served, tensors)
        reload = time.monotonic() - began
        ours.load(tensors)
        theirs, mine = served.generate(requests, greedy=True), ours.generate(requests, greedy=True)
        assert [c.ids for c in theirs] == [c.ids for c in mine] and [c.finished for c in theirs] == [
            c.finished for c in mine
        ]
        greedy = gap(theirs, requests, ours, 1.0)
        assert greedy < 1e-4
        began = time.monotonic()
        drawn = served.generate(requests)
        seconds = time.monotonic() - began
        sampled = gap(drawn, requests, ours)
        assert sampled < 1e-4
        assert [c.ids for c in served.generate(requests)] == [c.ids for c in drawn], "equal seeds drew other tokens"
        redrawn = served.generate([Prompt(p.ids, p.seed + 1) for p in requests])
        assert sum(a.ids != b.ids for a, b in zip(redrawn, drawn, strict=True)) > 100
        for c in drawn + theirs:
            assert c.finished == (c.ids[-1] in STOPS) and not set(c.ids[:-1]) & set(STOPS)
            assert c.finished or len(c.ids) == TOKENS
        assert {c.finished for c in drawn} == {True, False}
        rate = sum(len(c.ids) for c in drawn) / seconds
        print(f"128 of 128 greedy answers equal; largest gap {greedy:.2g} greedy, {sampled:.2g} sampled; "
              f"reload {reload:.3f} s; {rate:.0f} tokens/s")  # fmt: skip


ROUTES = """
import argparse, json, os
os.environ["VLLM_SERVER_DEV_MODE"] = "1"
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-offline-docs"])
app = build_app(args, ("generate",))
print(json.dumps(sorted({route.path for route in app.routes})))
"""


def test_no_route_takes_an_unsigned_request(served: VllmServer) -> None:
    """Every path that vLLM knows in its development mode, and a path that is none."""
    (server,) = served.servers
    run = [os.environ["ATOM_VLLM_PYTHON"], "-P", "-c", ROUTES]
    listed = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert {"/health", "/collective_rpc", "/update_weights", "/inference/v1/generate", "/metrics"} <= set(listed)
    secret = server.secret.read_text()
    before = server.log.read_text() if server.log else ""
    for path in [*listed, "/none"]:
        for method in ("GET", "POST", "OPTIONS"):
            for headers in ({}, {"Authorization": f"Bearer {secret}"}):
                connection = http.client.HTTPConnection(*urlsplit(server.url).netloc.split(":"), timeout=30)
                connection.request(method, path.replace("{", "").replace("}", ""), b"{}", headers)
                assert connection.getresponse().status == 401, (method, path)
                connection.close()
    print(f"\n{len(listed)} paths refuse unsigned requests")
    for path in ("/collective_rpc", "/server_info", "/sleep", "/v1/models"):
        assert server._exchange(path, b"{}", server.instance, 30)[0] == 404
    assert get(served, "/weight_info") and server.secret.stat().st_mode & 0o777 == 0o600
    assert server.process is not None and server.log is not None
    assert secret not in server.log.read_text() and before
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for name in ("cmdline", "environ"):
                assert secret.encode() not in (process / name).read_bytes()


def test_frequencies_are_those_of_the_distribution(served: VllmServer, ours: InProcess) -> None:
    load(served, FIRST)
    prompt = prompts(1)[0].ids
    drawn = served.generate([Prompt(prompt, seed) for seed in range(2000)])
    counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=48) / 2000
    with torch.inference_mode():
        probabilities = torch.softmax(ours.model(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE, -1)
    assert 0.5 * (counts - probabilities).abs().sum() < 0.08


def test_a_server_that_others_started_may_be_used(served: VllmServer, ours: InProcess, tmp_path: Path) -> None:
    """As one on a node of its own. Who used it before notices the other weights, and gives it its own again."""
    load(served, FIRST)
    sampler = vllm_fixtures.make_sampler(CONFIG, *ARGUMENTS, tmp_path / "served", **of_others(served))
    requests = prompts(20)
    for user, tensors in ((sampler, SECOND), (served, FIRST)):
        ours.load(tensors)
        if user is sampler:
            load(sampler, tensors)
        assert gap(user.generate(requests), requests, ours) < 1e-4
        sampler.close()  # ends no server that is not its own


def test_weights_that_do_not_add_up_are_refused(served: VllmServer, tmp_path: Path) -> None:
    load(served, FIRST)
    first, requests = served.weights, prompts(8)
    assert first is not None
    before = served.generate(requests, greedy=True)
    second = weights_fixtures.written(served.folder, SECOND)
    assert second.folder is not None
    path = second.folder / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    hidden = Weights(second.digest, second.tensors, tmp_path / "elsewhere")
    for given, sentence in ((second, "is not the tensor of the index"), (hidden, "it does not see .*elsewhere")):
        with pytest.raises(AtomError, match=f"refuses the weights: .*{sentence}") as raised:
            served.load(given)
        print(f"\n{raised.value}")
        assert get(served, "/weight_info") == {"weight_version": first.digest}
        assert get(served, "/is_paused") == {"is_paused": True}
    load(served, SECOND)
    assert served.generate(requests, greedy=True) != before


def broadcast(
    sampler: VllmServer, tensors: dict[str, torch.Tensor], sent: dict[str, torch.Tensor] | None = None
) -> Any:
    """The trainer's end, which has handed over the tensors. sent: what it sends in their place."""
    passes = iter([tensors, tensors, sent or tensors])
    sender = Broadcast(lambda by_turns: iter(next(passes).items()), Ranks(0, 1, Layout(), 0, 1, True))
    try:
        return sender.load(sampler)
    finally:
        sender.close()


def test_a_broadcast_gives_the_answers_of_the_folder(served: VllmServer, ours: InProcess) -> None:
    compare_transfers(served, ours)


def compare_transfers(sampler: VllmServer, ours: InProcess) -> None:
    requests = prompts(40)
    answers = []
    for tensors in (FIRST, SECOND):
        load(sampler, tensors)
        ours.load(tensors)
        answers.append(sampler.generate(requests, greedy=True))
        assert [c.ids for c in answers[-1]] == [c.ids for c in ours.generate(requests, greedy=True)]
    assert answers[0] != answers[1]
    for tensors, folders in zip((FIRST, SECOND), answers, strict=True):
        began = time.monotonic()
        assert broadcast(sampler, tensors) == weights_fixtures.written(sampler.folder, tensors).digest
        print(f"\nbroadcast and loaded in {time.monotonic() - began:.2f} s")
        assert [c.ids for c in sampler.generate(requests, greedy=True)] == [c.ids for c in folders]


def test_what_arrives_as_another_tensor_is_not_loaded_and_the_server_answers_nothing(served: VllmServer) -> None:
    load(served, FIRST)
    requests = prompts(8)
    before = served.generate(requests, greedy=True)
    name = "model.layers.1.mlp.gate.weight"
    with pytest.raises(AtomError, match=rf"refuses the weights: what arrived as {name} is not the trainer's tensor"):
        broadcast(served, SECOND, {**SECOND, name: SECOND[name] + 1})
    assert get(served, "/is_paused") == {"is_paused": True}
    broadcast(served, FIRST)
    assert [c.ids for c in served.generate(requests, greedy=True)] == [c.ids for c in before]


def test_two_tensor_ranks_take_weights_by_folder_and_by_broadcast(
    ours: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # else each wants a NUMA node of its own
    elif torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    sampler = vllm_fixtures.make_sampler(CONFIG, *ARGUMENTS, tmp_path / "served", options=["--tensor-parallel-size=2"])
    try:
        compare_transfers(sampler, ours)
    finally:
        sampler.close()


def test_a_server_of_another_model_is_refused(served: VllmServer, tmp_path: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": CONFIG["num_hidden_layers"] + 1}
    sampler = vllm_fixtures.make_sampler(config, *ARGUMENTS, tmp_path / "served", **of_others(served))
    with pytest.raises(AtomError, match=r"its model has num_hidden_layers = 2, and the trainer's has 3"):
        load(sampler, FIRST)
    # a folder that is whole in itself, and lacks a tensor of the model: the server draws nothing from the mixture
    part = {name: t for name, t in SECOND.items() if name != "model.layers.1.mlp.gate.weight"}
    with pytest.raises(AtomError, match=r"no tensor of .* is model\.layers\.1\.mlp\.gate\.weight of its model"):
        load(served, part)
    assert get(served, "/is_paused") == {"is_paused": True}
    load(served, FIRST)


def test_a_step_of_reinforcement_learning(served: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself starts the server, and the trainer finds the log-probabilities that it returned."""
    monkeypatch.setattr(rl_fixtures, "MODEL", {**MODEL, "init_std": rl_fixtures.MODEL["init_std"]})
    rl_fixtures.make(tmp_path / "given")
    settings = rl_fixtures.config(
        steps=2, validate_every=2, release_checkpoint_interval=2, sampling={"kind": "vllm", "max_new_tokens": 12}
    )
    rl_fixtures.rlvr(tmp_path / "given", tmp_path / "work", tmp_path / "out", settings)
    lines = [x for x in rl_fixtures.lines(tmp_path / "out") if "sampler_gap" in x]
    assert len(lines) == 2 and lines[0]["policy"] != lines[1]["policy"]
    for x in lines:
        print(f"step {x['step']}: {x['answers']} answers, sampler_gap {x['sampler_gap']:.2g}, "
              f"largest {x['max_sampler_gap']:.2g}")  # fmt: skip
        assert x["sampler_gap"] < 1e-3 and x["max_sampler_gap"] < 1e-4
    # the same policies in the in-process sampler's hands: greedy answers to the validation items earn the same
    rl_fixtures.rlvr(
        tmp_path / "given", tmp_path / "work2", tmp_path / "out2",
        rl_fixtures.config(steps=2, validate_every=2, release_checkpoint_interval=2),
    )  # fmt: skip
    theirs, mine = (rl_fixtures.lines(tmp_path / out)[0]["validation"] for out in ("out", "out2"))
    assert theirs == mine


def test_an_asynchronous_phase(served: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change while the server draws, and training from the recorded answers moves the same weights."""
    monkeypatch.setattr(rl_fixtures, "MODEL", {**MODEL, "init_std": rl_fixtures.MODEL["init_std"]})
    rl_fixtures.make(tmp_path / "given")
    phase = {"steps": 6, "validate_every": 3, "release_checkpoint_interval": 3, "asynchronous": {"max_staleness": 2}}
    settings = rl_fixtures.config(sampling={"kind": "vllm", "max_new_tokens": 36}, **phase)
    rl_fixtures.rlvr(tmp_path / "given", tmp_path / "work", tmp_path / "out", settings)
    recorded = rl_fixtures.record(tmp_path / "out", tmp_path / "recorded")
    rl_fixtures.rlvr(tmp_path / "given", tmp_path / "work2", tmp_path / "out2", settings, rollouts=recorded)
    assert rl_fixtures.trained(tmp_path / "out2") == rl_fixtures.trained(tmp_path / "out")
    answers = rollouts.read(tmp_path / "out" / "rollouts.parquet")
    print(f"\n{sum(len(r.versions or ()) > 1 for r in answers)} of {len(answers)} answers are of several policies")
    assert {span["version"] for r in answers for span in r.versions or ()} >= {0, 1, 2}
    first_step = next(x for x in rl_fixtures.lines(tmp_path / "out") if "sampler_gap" in x)
    assert first_step["max_sampler_gap"] < 1e-4


def test_a_killed_server_is_started_anew_and_ends_with_its_children(served: VllmServer) -> None:
    """The last test: it ends the server."""
    load(served, FIRST)
    requests = prompts(200)
    before = served.generate(requests, greedy=True)
    killed = served.servers[0].process
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert served.generate(requests, greedy=True) == before
    present = served.servers[0].process
    assert present is not None and present.pid != killed.pid
    served.close()
    for _ in range(100):
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        groups = {str(killed.pid), str(present.pid)}
        remaining = [line for line in listed.splitlines() if line.split()[0] in groups and "Z" not in line]
        if not remaining:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of the server are left: {remaining}")
