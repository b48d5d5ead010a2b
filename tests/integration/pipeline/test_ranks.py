"""A stage of several processes: sealed as by one, and however a rank ends, nothing hangs and nothing is half-written."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.core import input_integrity, provenance
from pipeline.core.errors import AtomError, Failure, PeerLost
from pipeline.core.lease import Lease, has_exited, holder, this_process
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from pipeline.core.store import Progress, Store, sha256_file, write_manifest
from pipeline.graph import registry
from pipeline.launch import rendezvous
from pipeline.launch.attempt import Task
from pipeline.launch.local import visible_gpus
from pipeline.launch.worker import _record_operation, attempt, work
from stages.models.parallel_layout import Layout
from tests.fixtures.recipe_fixtures import SMOKE
from tests.fixtures.run_fixtures import SOAK, at_length, atom, digests, start, wait_for

SLOW = 40  # steps: enough to be disturbed in


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The smoke recipe with a short pre-training on two data-parallel ranks."""
    body = yaml.safe_load(SMOKE.read_text())
    body["pretrain"] |= {
        "steps": SLOW,
        "batch": {"global_tokens": 1536, "micro_tokens": 768},
        "validation": {"every": 10, "rows": 24},
        "optimizer": {**body["pretrain"]["optimizer"], "warmup_steps": 5},
        "release_checkpoint_interval": 10,
        "checkpoint_interval": 5,
        "parallelism": {"ranks": 2},
    }
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(smoke_home: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of a run that nobody disturbed; what does not depend on the recipe is taken from the smoke run."""
    home = tmp_path_factory.mktemp("ranks") / "home"
    for name in ("artifacts", "ledger"):
        shutil.copytree(smoke_home / name, home / name)
    atom(home, "run", recipe, "--until", "order-pretrain")
    before = home.parent / "before"
    shutil.copytree(home, before)
    output = atom(home, "run", recipe, "--until", "pretrain").stdout
    assert "pretrain: started on 2 ranks" in output and "all of 15 stages sealed" in output
    return home


def test_two_ranks_seal_one_artifact_whose_statement_says_how(undisturbed: Path, recipe: str) -> None:
    status = json.loads(atom(undisturbed, "status", "--json").stdout)["stages"][-1]
    assert (status["name"], status["state"], status["ranks"]) == ("pretrain", "sealed", 2)
    store = Store(undisturbed)
    body = provenance.sealed(store.ledger, store.open(status["key"]))
    assert body
    operation, usage = provenance.operation_of(body[1]), provenance.usage(body[1])
    assert operation["phase"]["parallelism"]["ranks"] == 2 and operation["phase"]["checkpoint_interval"] == 5
    assert "cluster" not in body[1]["predicate"]["buildDefinition"]["externalParameters"]["config"]["phase"]
    assert usage["ranks"] == usage["ranks_counted"] == 2 and usage["cpu_seconds"] > 0
    assert not any((undisturbed / "work").iterdir()), "no work folder is left"

    first, second = (atom(undisturbed, "logs", "pretrain", "--rank", str(n)).stdout for n in range(2))
    assert f"{SLOW}/{SLOW} steps" in first and f"{SLOW}/{SLOW} steps" not in second and "global_rank=1" in second
    refused = atom(undisturbed, "logs", "pretrain", "--rank", "2", code=2).stderr
    assert refused.startswith("atom: stage pretrain has no rank 2 in run") and "ran as ranks 0 to 1" in refused
    assert "ran as one rank, 0" in atom(undisturbed, "logs", "order-pretrain", "--rank", "1", code=2).stderr


@at_length("training", 50)
def test_however_a_rank_ends_the_same_command_ends_in_the_same_bytes(
    undisturbed: Path, recipe: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(undisturbed.parent / "before", home)
    profile = tmp_path / "cluster.yaml"
    profile.write_text("name: here\nlocal: {jobs: 2, stop_grace_seconds: 5}\npower: {watts_per_core: 8}\n")

    def disturb(rank: int, number: int, step: int, interrupt: bool = False) -> tuple[int, str]:
        """Sends a signal to a rank after a step. Returns exit code and output of `atom run`."""
        before = set(home.glob("logs/*"))
        run = start(home, "run", recipe, "--until", "pretrain", "--cluster", str(profile))
        while not (new := set(home.glob("logs/*/pretrain/ranks/*")) - {p for b in before for p in b.rglob("*")}):
            time.sleep(0.1)
            assert run.poll() is None
        folder = new.pop()
        file, text = ("metrics.jsonl", f'"step": {step},') if step else ("events.jsonl", '"start"')
        wait_for(home, str((folder.parent.parent / file).relative_to(home)), text, seconds=60)
        if step > 5:  # the interval of checkpoints, which a thread writes
            wait_for(home, "work/pretrain-*/state/attempt-*/checkpoints/*/complete.json", '"', seconds=60)
        for n in range(2):
            wait_for(home, str((folder / f"rank-{n}.json").relative_to(home)), '"pid"', seconds=60)
        pids = rendezvous.living_ranks(int(folder.name.split(".")[0]))
        processes = [json.loads((folder / f"rank-{n}.json").read_text()) for n in sorted(pids)]
        assert sorted(pids) == [0, 1] and not any(map(has_exited, processes))
        os.kill(pids[rank], number)
        if interrupt:
            time.sleep(0.5)
            os.killpg(run.pid, signal.SIGINT)
        output = run.communicate(timeout=180)[0]
        deadline = time.monotonic() + 60
        while not all(map(has_exited, processes)):
            assert time.monotonic() < deadline, "no rank is left"
            time.sleep(0.1)
        (work_folder,) = (home / "work").glob("pretrain-*")
        present = holder(work_folder)
        assert present and not present.alive and not list((home / "artifacts").glob(work_folder.name))
        return run.returncode, output

    code, stdout = disturb(1, signal.SIGKILL, 0)
    assert code == 2 and "stage pretrain failed: rank 1: its process is gone" in stdout, stdout

    code, stdout = disturb(1, signal.SIGKILL, 2)
    assert code == 2 and "stage pretrain failed: " in stdout, stdout
    failed = [body for p in (home / "ledger").glob("pretrain-*") for _, body in provenance.read(p.parent, p.name)
              if provenance.outcome(body) != "sealed"]  # fmt: skip
    assert len(failed) == 2, "each attempt has its statement"
    for body in failed:
        usage = provenance.usage(body)
        assert (usage["ranks"], usage["ranks_counted"]) == (2, 1), "a rank that was killed cannot say what it used"
        assert provenance.kind(body) == "machine"

    if SOAK:
        code, stdout = disturb(1, signal.SIGSTOP, 5, interrupt=True)
        assert code == 130 and "stopped; run the same command to go on from here" in stdout

    code, stdout = disturb(0, signal.SIGKILL, 7)
    assert code == 2 and "its process was killed from outside (perhaps for memory)" in stdout, stdout

    assert "pretrain: going on after step" in atom(home, "run", recipe, "--until", "pretrain").stdout
    assert digests(home) == digests(undisturbed)


def test_ranks_believe_only_the_rank_0_of_their_own_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_JOB_NUM_NODES": "1"}
    for name, value in job.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)

    def rank(number: int, job: int = 7) -> rendezvous.Ranks:
        monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", str(number))
        monkeypatch.setenv("SUBMITIT_LOCAL_LOCALID", str(number))
        monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", str(job))
        return rendezvous.Ranks.from_environment(2, tmp_path)

    meeting = rank(0).open_rendezvous(3)
    assert meeting and rank(1).join_rendezvous() == meeting and meeting.lease == 3
    with rank(1).environment(meeting):
        assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "1" and os.environ["MASTER_ADDR"] == "127.0.0.1"
        assert os.environ["MASTER_PORT"] == str(meeting.port) and os.environ["WORLD_SIZE"] == "2"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 0.2)
    with pytest.raises(AtomError, match="rank 0 did not answer"):
        rank(1, job=8).join_rendezvous()
    rank(0, job=8).cancel_rendezvous("busy")
    assert rank(1, job=8).join_rendezvous() is None, "rank 0 needs no other ranks"
    rank(0, job=10).report_waiting(0)
    with pytest.raises(AtomError, match="rank 0 did not answer"):
        rank(1, job=10).join_rendezvous()
    rank(0, job=10).cancel_rendezvous("sealed")
    assert rank(1, job=10).join_rendezvous() is None, "rank 0 waited for its turn, and found the product"
    rank(1, job=11).announce(Failure("its GPU is gone"))
    with pytest.raises(PeerLost, match="rank 1: its GPU is gone"):
        rank(0, job=11).report_waiting(1)
    assert (
        rank(1, job=11).failure() is None
        and rank(0, job=11).find_cause(Failure("lost")).text == "rank 1: its GPU is gone"
    )
    rank(0, job=9)
    another = {**this_process(), "start": "1"}
    (tmp_path / "ranks" / "9.0" / "rank-0.json").write_text(json.dumps(another))
    with pytest.raises(AtomError, match="rank 0 has ended"):
        rank(1, job=9).join_rendezvous()


class Launch:
    """Two ranks of a stage with one large input, the second of which only meets the first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, hash_file: Callable[..., str]) -> None:
        monkeypatch.setattr(rendezvous, "RENDEZVOUS_SECONDS", 1.0)
        monkeypatch.setattr(input_integrity, "PROGRESS_SECONDS", 0.1)
        monkeypatch.setitem(registry.stages(), "hanging", __name__)
        monkeypatch.setattr(sys.modules[__name__], "STAGE", Stage("hanging", 1, Hanging, lambda *_: None))
        self.store, self.folder = Store(folder), folder / "launch"
        draft = self.store.work("large-0") / "out.1"
        for place in (self.folder, draft):
            place.mkdir(parents=True)
        (self.folder / rendezvous.FAILURES).touch()
        for name in ("one", "two"):
            (draft / name).write_text(f"large {name}")
        self.store.seal(draft, "large-0", lambda artifact: None)
        monkeypatch.setattr(input_integrity, "PART_BYTES", 1)  # a part for each file
        monkeypatch.setattr(input_integrity, "sha256_file", hash_file)
        self.met: list[Any] = []
        self.helped = threading.Event()
        self.follower = threading.Thread(target=self._follow, daemon=True)
        self.follower.start()

    def _follow(self) -> None:
        follower = rendezvous.Ranks(2, 1, 1, True, self.folder)
        try:
            self.met.append(follower.join_rendezvous(self.helped.set))
        except AtomError as error:
            self.met.append(error)
        follower.record_end(rendezvous.FOLLOWED, rendezvous.Usage(0.0, 0))

    def attempt(self) -> Any:
        home = str(self.store.home)
        task = Task(home, "run", "hanging", "hanging", {}, {"large": "large-0"}, "hanging-0", 8.0, 2)
        return attempt(task, self.store, rendezvous.Ranks(2, 0, 0, True, self.folder))


def test_the_others_wait_while_rank_0_hashes_a_large_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than they wait for a word of it; and they hear no more of its work once it has called them.

    The clock of the rendezvous stands still, and goes on by more than half of that time after each word that they read.
    """
    now, heard = [0.0], set()
    read = rendezvous.read

    def listen(path: Path) -> Any:
        message = read(path)
        if path.name == "meeting.json" and message is not None and "turns" in message:
            heard.add(message["turns"])
        return message

    def hash_slowly(path: Path, progress: Progress) -> str:
        for _ in range(5 if path.name == "one" else 0):
            before = len(heard)
            while len(heard) == before and launch.follower.is_alive():
                progress(1)
                time.sleep(0.01)
            now[0] += 0.6 * rendezvous.RENDEZVOUS_SECONDS
        return sha256_file(path)

    monkeypatch.setattr(rendezvous, "read", listen)
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    launch = Launch(tmp_path, monkeypatch, hash_slowly)
    assert launch.attempt() == "sealed"
    launch.follower.join(60)
    (meeting,) = launch.met
    assert isinstance(meeting, rendezvous.Rendezvous) and meeting.lease == 1, meeting
    assert launch.helped.is_set(), "it was asked to hash its share"
    assert rendezvous.read(launch.folder / "meeting.json") == meeting.__dict__


def test_the_others_do_not_wait_for_a_hash_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    def hang(path: Path, progress: Progress) -> str:
        given_up.wait(300)
        return sha256_file(path)

    launch = Launch(tmp_path, monkeypatch, hang)
    rank_0 = threading.Thread(target=launch.attempt)
    rank_0.start()
    launch.follower.join(60)
    given_up.set()
    rank_0.join()
    (error,) = launch.met
    assert isinstance(error, AtomError) and "rank 0 did not answer for 1 seconds" in str(error)


def test_ranks_share_the_files_of_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hashes its share, what another one hashes is left to it, and only rank 0 waits until all is hashed."""
    monkeypatch.setattr(input_integrity, "PART_BYTES", 1)
    hashed: list[str] = []
    monkeypatch.setattr(
        input_integrity, "sha256_file", lambda path, progress: hashed.append(path.name) or sha256_file(path)
    )
    (tmp_path / "input").mkdir()
    for number in range(7):
        (tmp_path / "input" / f"file-{number}").write_text(str(number))
    artifact, run = write_manifest(tmp_path / "input", "input-0"), tmp_path / "run"
    input_integrity.help_to_check(run, [artifact], 1, 3)
    assert sorted(hashed) == ["file-1", "file-4"]
    lease = Lease.take(run / "hashed" / "input-0.2.lease")
    assert lease is not None
    input_integrity.help_to_check(run, [artifact], 2, 3)
    assert sorted(hashed) == ["file-1", "file-4", "file-5"]
    threading.Timer(1.0, lease.release).start()
    input_integrity.check(run, [artifact])
    assert sorted(hashed) == [f"file-{number}" for number in range(7)]


def test_every_way_in_which_a_phase_was_run_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "operations.json"
    one, two = {"ranks": 1}, {"ranks": 2}
    assert [_record_operation(path, operation) for operation in (one, one, two, one)] == [
        [one],
        [one],
        [one, two],
        [two, one],
    ]
    path.write_text("[{")
    assert _record_operation(path, two) == [two]
    common: dict[str, Any] = dict(subject={}, stage="s", version=1, node="n", key="k", config={}, materials={}, code={}, environment={},
                  invocation="r/n", started=0.0, finished=1.0, usage={}, outcome="sealed")  # fmt: skip
    for operations in ([one], [one, two]):
        body = provenance.statement(provenance.AttemptRecord(operations=operations, **common))
        assert provenance.operations_of(body) == operations and provenance.operation_of(body) == operations[-1]


@pytest.mark.parametrize(("devices", "expected"), [("2,3", [2, 3]), ("", []), (None, None)])
def test_the_local_launcher_hides_no_gpu(
    devices: str | None, expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    present = list(range(len(list(Path("/dev").glob("nvidia[0-9]*")))))
    assert visible_gpus() == (present if expected is None else expected)


class Hanging(Config):
    """Config of a stage that hangs."""

    path: str = operational("/somewhere/private/file")
    holding_the_lock: bool = False
    failing_rank: int | None = None


def hang(config: Hanging, inputs: Inputs, work: Path, out: Path, report: Any) -> None:
    """Sleeps in C; another thread gives up after a moment. Or, of two ranks, one fails."""
    if config.failing_rank is not None:
        fail(config.failing_rank)
    (out / "half").touch()

    def give_up(report: Report) -> None:
        time.sleep(0.5)
        report.abandon("rank 0 finished no step for 0.5 seconds; run again to go on")

    if config.holding_the_lock:
        report._lock.acquire()
    threading.Thread(target=give_up, args=(report,)).start()
    ctypes.CDLL(None).sleep(600)


def fail(rank: int) -> None:
    """One of two ranks raises; the other one waits for it in a collective, by gloo beside a default group of another
    backend, as with GPUs."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend `fake`

    from stages.train import parallel

    this_rank = int(os.environ["RANK"])
    # without a store, the backend `fake` takes one that gloo cannot use
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, this_rank == 0)
    dist.init_process_group("fake", rank=this_rank, world_size=2, store=store)
    objects = parallel.create_groups(Layout(ranks=2), 60.0, on_gpu=True)
    ranks = parallel.Ranks(this_rank, 2, Layout(ranks=2), this_rank, 2, True, objects)
    assert dist.get_backend() == "fake" and ranks.gather(this_rank) == [0, 1]
    assert ranks.max(this_rank) == 1 and ranks.from_first(this_rank) == 0
    if this_rank == rank:
        raise ValueError("a bug")
    ranks.barrier()


STAGE = Stage("hanging", 1, Hanging, hang)


@pytest.mark.parametrize("holding_the_lock", [False, True])
def test_a_stage_that_hangs_in_c_is_abandoned_by_another_thread(tmp_path: Path, holding_the_lock: bool) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.integration.pipeline.test_ranks",
        str(tmp_path),
        json.dumps({"holding_the_lock": holding_the_lock}),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert process.returncode == 1, process.stderr
    text = "rank 0 finished no step for 0.5 seconds; run again to go on"
    assert f"hanging: {text}" in process.stderr
    ((_, body),) = provenance.read(tmp_path / "ledger", "hanging-0")
    assert provenance.outcome(body) == text
    assert provenance.operation_of(body) == {"path": "…/file"}, "no folder of the machine is published"
    events = [json.loads(line) for line in (tmp_path / "logs" / "run" / "hanging" / "events.jsonl").open()]
    assert [e["event"] for e in events] == ["start", "usage", "end"] and events[-1]["outcome"] == text
    present = holder(tmp_path / "work" / "hanging-0")
    assert present and not present.alive and not list(tmp_path.glob("work/*/out.*"))


def test_no_rank_of_a_failed_stage_ends_well(tmp_path: Path) -> None:
    """Else srun would not end the others, which wait in a collective."""
    job = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_JOB_NUM_NODES": "1"}
    common = {**os.environ, **{f"SUBMITIT_{name}": value for name, value in job.items()}}
    command = [
        sys.executable,
        "-m",
        "tests.integration.pipeline.test_ranks",
        str(tmp_path),
        json.dumps({"failing_rank": 1}),
    ]
    processes = [
        subprocess.Popen(
            command, env={**common, "SUBMITIT_LOCAL_GLOBALID": str(n), "SUBMITIT_LOCAL_LOCALID": str(n)},
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "ValueError: a bug" in errors[1]
    ((_, body),) = provenance.read(tmp_path / "ledger", "hanging-0")
    assert "a bug" in provenance.outcome(body)


if __name__ == "__main__":  # python -m tests.integration.pipeline.test_ranks HOME CONFIG
    registry.stages()["hanging"] = "tests.integration.pipeline.test_ranks"
    config = json.loads(sys.argv[2])
    ranks = 2 if "failing_rank" in config else 1
    work(Task(sys.argv[1], "run", "hanging", "hanging", config, {}, "hanging-0", 8.0, ranks))
