"""The reward model in a server of its own: real processes on cores, with the scores of the one in the phase's process."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.stage import ServerPlace, ServerSearch
from pipeline.core.store import Artifact, Store, write_manifest
from stages.generation import server_jobs
from stages.generation.vllm_server import Server
from stages.rl import rlvr
from stages.rl.protocols import Response, VerifierContext, VerifierFailed
from stages.rl.rewards.reward_model import RewardModel, RewardModelSettings
from stages.rl.rewards.reward_server import ServedScorer
from stages.rl.rollout.generation import Chat, Verifiers
from tests.fixtures import rl_fixtures, train_fixtures
from tests.fixtures.run_fixtures import at_length

RUN = "run-1"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """An exported model of random weights, as a reward model."""
    from stages.export import hf

    folder = tmp_path_factory.mktemp("served")
    made = rl_fixtures.make(folder)
    for name in ("work", "export", "reward"):
        (folder / name).mkdir()
    config = {"model": rl_fixtures.MODEL, "padded_vocab_size": rl_fixtures.PADDED}
    artifacts = {"checkpoint": made["init"], "tokenizer": made["tokenizer"]}
    hf.run(
        hf.STAGE.config.model_validate(config), artifacts, folder / "work", folder / "export", train_fixtures.Reporter()
    )
    (folder / "reward" / "summary.json").write_text(json.dumps({"centre": -3.5}))
    return {
        **made, "reward": write_manifest(folder / "reward", "reward-test"),
        "reward_model": write_manifest(folder / "export", "export-test"),
    }  # fmt: skip


ANSWERS = [
    (rl_fixtures.row(f"r{n}", "k", 0, f"say {n}"), Response.parse("e" * (n % 17) + "xo"[n % 2], n % 5 != 4))
    for n in range(150)
]


def verifier(inputs: dict[str, Artifact], servers: int) -> RewardModel:
    return RewardModel(VerifierContext(RewardModelSettings(servers=servers), inputs, Chat(inputs["tokenizer"])))


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Artifact]) -> list[dict[str, float]]:
    """The rewards by the model in this process."""
    model = verifier(inputs, 0)
    rewards = model.score(ANSWERS)
    model.close()
    assert len({parts["reward"] for parts in rewards}) > 40 and min(parts["reward"] for parts in rewards) == 0
    return rewards


def test_a_server_gives_the_rewards_of_the_process_and_a_killed_one_is_asked_again(
    inputs: dict[str, Artifact], expected: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One local process. It dies under a request: the call fails and is repeated, and no answer has a reward of it."""
    monkeypatch.setattr("stages.rl.rollout.generation.RETRY_SECONDS", 0.0)
    model, notes = verifier(inputs, 1), list[str]()
    assert isinstance(model.scorer, ServedScorer) and model.version == "export-test"
    try:
        assert model.score(ANSWERS) == expected
        server, post, kills = model.scorer.local, Server.post, list[int]()
        assert server is not None

        def dying(self: Server, path: str, *arguments: Any, **options: Any) -> Any:
            if path == "/atom/score" and not kills and self.process:
                kills.append(self.process.pid)
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            return post(self, path, *arguments, **options)

        monkeypatch.setattr(Server, "post", dying)
        assert Verifiers({"reward-model": model}, notes.append).score(for_reward_model(ANSWERS)) == expected
        (note,) = notes
        assert note.startswith("verifier reward-model: the server of the reward model at http://127.0.0.1:")
        assert "is gone (exit code -9)" in note and note.endswith("retrying")
        assert server.process is not None and server.process.pid != kills[0]
        # It never comes back: the step stops, in one sentence, without a reward.
        monkeypatch.setattr(Server, "launch", lambda self: None)
        kills.clear()
        with pytest.raises(
            VerifierFailed, match=r"^verifier reward-model: the server of the reward model at .* is gone"
        ):
            Verifiers({"reward-model": model}, notes.append).score(for_reward_model(ANSWERS))
    finally:
        work = model.scorer.work
        model.close()
    assert work is not None and not work.exists() and model.scorer.local is not None
    assert model.scorer.local.process is None


def for_reward_model(answers: Any) -> list[Any]:
    return [({**row, "verifier": "reward-model"}, response) for row, response in answers]


class Job:
    """A server's job of Slurm, in a thread: what `run_server` calls."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        launch = folder / "servers" / "launches" / str(number)
        launch.mkdir(parents=True)
        self.place = ServerPlace(Store(folder / "home"), "rlvr-key", RUN, launch, number)
        self.place.folder.mkdir(exist_ok=True)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        phase = rl_fixtures.config(
            tasks=[{**HUB_PROMPTS}], verifiers={"reward-model": {"servers": 1}}
        )  # fmt: skip
        try:
            rlvr.serve_phase(rlvr.STAGE.config.model_validate(phase), self.place)
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        (self.place.launch / "ended").touch()
        self.thread.join(60)


HUB_PROMPTS = dict(
    source="hub-prompts", repo="a/b", revision="0" * 40, pattern="x", format="jsonl", prompt_field="p", kind="chat",
    count=1, license="MIT", license_evidence="x",
)  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    made = Job(tmp_path)
    search = ServerSearch(str(made.place.folder), RUN, 60.0)
    for name, value in search.variable().items():
        monkeypatch.setenv(name, value)
    yield made
    made.end()


def test_a_server_in_a_job_is_found_by_files_and_ends_with_the_stage(
    job: Job, inputs: dict[str, Artifact], expected: list[dict[str, float]]
) -> None:
    job.thread.start()
    model = verifier(inputs, 1)
    assert model.score(ANSWERS) == expected
    (announced,) = server_jobs.read(job.place.folder / "reward", RUN)
    assert not server_jobs.read(job.place.folder, RUN), "the sampler does not take it for a server that draws"
    with pytest.raises(AtomError, match="^a server of the reward model has export-test, and the phase asks for other;"):
        ServedScorer(inputs["reward_model"] / "model", "other")
    job.end()
    assert job.error is None and not job.thread.is_alive()
    assert not server_jobs.read(job.place.folder / "reward", RUN)
    assert isinstance(model.scorer, ServedScorer) and model.scorer.search is not None
    model.scorer.search = ServerSearch(model.scorer.search.folder, RUN, 0.5)
    with pytest.raises(VerifierFailed) as failed:
        model.score(ANSWERS)
    assert str(failed.value) == (
        "verifier reward-model: no server of the reward model has answered for 0 s; see the logs of the jobs of "
        "slurm.servers, of which verifiers.reward-model.servers score, and run again to go on"
    )
    assert "refused" in str(model.scorer.announced[announced].problem()), "the process is gone, too"
    model.close()


@at_length("training", 10)
def test_a_server_that_dies_ends_its_job_which_is_started_again(job: Job, inputs: dict[str, Artifact]) -> None:
    """The job fails with the sentence of the server, so that Slurm's side puts it into the queue again."""
    job.thread.start()
    model = verifier(inputs, 1)
    assert isinstance(model.scorer, ServedScorer)
    children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_server(p)]
    assert children
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    job.thread.join(60)
    assert "the server of the reward model at" in str(job.error) and "is gone (exit code" in str(job.error)
    model.close()


def is_server(process: Path) -> bool:
    """Whether a process is a server of this test, by its parent and command."""
    try:
        command, stat = (process / "cmdline").read_bytes(), (process / "stat").read_text()
    except OSError:
        return False
    return (
        b"reward_server" in command
        and b"export-test" in command
        and int(stat.rsplit(")", 1)[1].split()[1]) == os.getpid()
    )


def test_some_servers_score_and_the_others_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[Any]()
    monkeypatch.setattr("stages.rl.rewards.reward_server.serve", lambda place: ran.append(("score", place.number)))
    monkeypatch.setattr("stages.rl.rlvr.serve", lambda sampling, place: ran.append(("draw", place.number)))
    phase = rl_fixtures.config(
        sampling={"kind": "vllm", "max_new_tokens": 12}, verifiers={"reward-model": {"servers": 2}}
    )
    config = rlvr.STAGE.config.model_validate(phase)
    for number in range(4):
        rlvr.serve_phase(config, ServerPlace(Store(tmp_path), "key", RUN, tmp_path, number))
    assert ran == [("score", 0), ("score", 1), ("draw", 2), ("draw", 3)]
    served = rlvr.STAGE.estimate(config).served
    assert served is not None and served.scorers == 2 and rlvr.STAGE.takes_servers(config)
