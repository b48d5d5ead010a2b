"""Work checkpoints: damaged ones are passed over, orphans do no harm, the newest are kept, a full disk is reported."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import AtomError, MachineError
from stages.train.checkpoint import sharded_state, work_checkpoint
from stages.train.checkpoint.work_checkpoint import Checkpoints
from tests.fixtures import train_fixtures
from tests.fixtures.run_fixtures import RecordingReport
from tests.fixtures.train_fixtures import checkpoints, damage, fresh


def test_damaged_work_checkpoints(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), train_fixtures.Reporter(9, signal.SIGTERM))
    before, newest = checkpoints(work)
    (newest.parent / "step-000000010").mkdir()  # one that a kill left incomplete
    damage(newest / "rank-00000.safetensors")
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), report)
    assert before.name == "step-000000008" and report.notes[1].endswith("going on after step 8")
    assert re.match(r"work checkpoint attempt-0001/\S+/step-000000009 is damaged \(.*rank-00000.safetensors is not what "
                    r"was written\); going back", report.notes[0])  # fmt: skip
    assert train_fixtures.digest(out) == train_fixtures.digest(undisturbed)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "marker", "log", "device", "marker's device"])
def test_every_kind_of_damage_is_seen(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), train_fixtures.Reporter(5, signal.SIGTERM))
    _, folder = checkpoints(work)
    data, marker, log = (
        folder / "rank-00000.safetensors",
        folder / "complete.json",
        folder.parent.parent / "training.jsonl",
    )

    def fail_to_read(module: ModuleType, name: str, unreadable: Path) -> None:
        """Lets a function raise what a failing disk or a lost server of files makes of a read."""
        function = getattr(module, name)

        def read(path: Path, *arguments: Any) -> Any:
            if path == unreadable:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(path, *arguments)

        monkeypatch.setattr(module, name, read)

    {
        "device": lambda: fail_to_read(work_checkpoint, "sha256_file", data),
        "marker's device": lambda: fail_to_read(work_checkpoint, "read_marker", folder),
        "flipped": lambda: damage(data),
        "truncated": lambda: data.write_bytes(data.read_bytes()[:-1]),
        "missing": data.unlink,
        "marker": lambda: marker.write_bytes(marker.read_bytes()[:-9]),
        "log": lambda: damage(log, at=len(log.read_bytes()) - 2),  # in the lines of step 5
    }[how]()
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), report)
    assert "step-000000005 is damaged" in report.notes[0] and report.notes[1].endswith("going on after step 4")
    assert train_fixtures.digest(out) == train_fixtures.digest(undisturbed)


def test_no_flipped_bit_of_a_marker_is_believed(corpus: Path, tmp_path: Path) -> None:
    from stages.train.checkpoint.work_checkpoint import read_marker

    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(
            corpus,
            tmp_path / "work",
            tmp_path / "out",
            train_fixtures.config(),
            train_fixtures.Reporter(5, signal.SIGTERM),
        )
    folder = checkpoints(tmp_path / "work")[-1]
    marker, marker_value = folder / "complete.json", read_marker(folder)
    content = marker.read_bytes()
    for at in range(0, len(content), 5):
        marker.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            assert read_marker(folder) == marker_value  # a blank between values
        except ValueError:
            continue


def test_nothing_is_trained_on_when_no_checkpoint_is_intact(corpus: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(
            corpus, work, tmp_path / "out", train_fixtures.config(), train_fixtures.Reporter(5, signal.SIGTERM)
        )
    for folder in checkpoints(work):
        damage(folder / "rank-00000.safetensors")
    with pytest.raises(AtomError, match=r"every work checkpoint .* is damaged .*; remove .* to start this stage anew"):
        train_fixtures.pretrain(corpus, work, tmp_path / "out", train_fixtures.config())


def test_a_damaged_product_in_the_work_folder_is_never_sealed(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), train_fixtures.Reporter(9, signal.SIGTERM))
    weights = work / "attempt-0001" / "sealed" / "step-000000" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AtomError, match=r"is damaged .*step-000000/model.safetensors is not what was written"):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config())
    content[-1] ^= 1
    weights.write_bytes(content)
    train_fixtures.pretrain(corpus, work, out, train_fixtures.config())
    assert train_fixtures.digest(out) == train_fixtures.digest(undisturbed)


def test_an_orphan_of_an_earlier_attempt_does_no_harm(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """An attempt is stopped by the system, thought dead and succeeded; then it wakes up and goes on writing."""
    orphan = fresh(corpus, tmp_path, env={"TEST_DISTURB": "0 8 SIGSTOP"})
    while orphan.poll() is None and stopped(orphan.pid) is False:
        time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt):  # the successor is itself stopped, after checkpoints of its own
        train_fixtures.pretrain(
            corpus,
            tmp_path / "work",
            tmp_path / "out2",
            train_fixtures.config(),
            train_fixtures.Reporter(11, signal.SIGTERM),
        )
    orphan.send_signal(signal.SIGCONT)
    _, stderr = orphan.communicate(timeout=180)
    assert orphan.returncode == 1 and "a later attempt has taken over from this one" in stderr
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out2", train_fixtures.config(), report)
    assert report.notes[0].endswith("going on after step 11")
    assert train_fixtures.digest(tmp_path / "out2") == train_fixtures.digest(undisturbed)


def test_an_orphan_that_wakes_while_it_loads_does_no_harm(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempt 2 sleeps between finding a checkpoint and going on from it; meanwhile attempt 3 writes later ones."""
    from stages.train.checkpoint.work_checkpoint import Checkpoints

    work, out, take_over = tmp_path / "work", tmp_path / "out", Checkpoints._take_over

    def slept(self: Checkpoints, *args: object) -> None:
        monkeypatch.undo()
        _, stderr = fresh(corpus, tmp_path, 11, signal.SIGTERM).communicate(timeout=180)
        assert "stopped after step 11" in stderr
        take_over(self, *args)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), train_fixtures.Reporter(5, signal.SIGTERM))
    monkeypatch.setattr(Checkpoints, "_take_over", slept)
    with pytest.raises(AtomError, match="a later attempt has taken over from this one"):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config())
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), report)
    assert report.notes[0].endswith("going on after step 11") and train_fixtures.digest(out) == train_fixtures.digest(
        undisturbed
    )


def test_an_attempt_that_was_succeeded_before_it_began_stops(corpus: Path, tmp_path: Path) -> None:
    """Attempts are counted by the lease, which the report gives, not by who comes first."""
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(
            corpus,
            tmp_path / "work",
            tmp_path / "out",
            train_fixtures.config(),
            train_fixtures.Reporter(5, signal.SIGTERM, lease=3),
        )
    folders = checkpoints(tmp_path / "work")
    assert {p.relative_to(tmp_path / "work").parts[0] for p in folders} == {"attempt-0003"}
    with pytest.raises(AtomError, match="a later attempt has taken over from this one"):
        train_fixtures.pretrain(
            corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config(), train_fixtures.Reporter(lease=2)
        )
    assert checkpoints(tmp_path / "work") == folders


def test_a_bug_while_writing_is_not_reported_as_a_full_disk(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.train.checkpoint import sharded_state

    def write(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(sharded_state, "write", write)
    with pytest.raises(KeyError, match="a bug"):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config())


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in ("T", "t")


def test_the_newest_checkpoints_are_kept(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    work, settings = tmp_path / "work", train_fixtures.config(checkpoint_interval=1)
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            train_fixtures.pretrain(
                corpus, work, tmp_path / "out", settings, train_fixtures.Reporter(step, signal.SIGTERM)
            )
        names = [p.relative_to(work).as_posix() for p in checkpoints(work)]
        number = 1 if step == 4 else 2
        assert names == [f"attempt-{number:04d}/checkpoints/step-{n:09d}" for n in range(step - 1, step + 1)]
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, work, tmp_path / "out", settings, report)
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)
    assert report.checkpoints == [0, 6, 12]


@pytest.mark.parametrize("limit", [60_000, 200_000])
def test_a_full_disk_is_one_sentence(corpus: Path, undisturbed: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses longer files, as a full disk does; with room again, the run goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(
            AtomError, match=r"rank-00000.safetensors cannot be written \(.*File too large.*\); make room and run again"
        ):
            train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)


class Rank:
    """One of two ranks that are threads. Its collectives are real ones."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: dict[int, Any]) -> None:
        self.rank, self.world, self.first, self.barrier, self.values = rank, 2, rank == 0, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(60)
        values = [self.values[rank] for rank in range(self.world)]
        self.barrier.wait(60)
        return values

    def max(self, value: int) -> int:
        return max(self.gather(value))

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]


def test_the_first_sentence_about_a_full_disk_is_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rank that could not write, and of rank 0, which waits for the files of that rank."""
    barrier, values, sentences = threading.Barrier(2), dict[int, Any](), dict[int, str]()

    def write(folder: Path, rank: int, pieces: Any, tensors: Any, progress: Any) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "rank-00001.safetensors"))

    monkeypatch.setattr(sharded_state, "write", write)

    def run(rank: int) -> None:
        engine = SimpleNamespace(ranks=Rank(rank, barrier, values), state=lambda: [])
        checkpoints = Checkpoints(tmp_path / "state", 2, engine, RecordingReport())  # type: ignore[arg-type]
        if rank == 0:
            (checkpoints.folder / "training.jsonl").touch()
        checkpoints.save(5, {}, seal=False)
        with pytest.raises(MachineError) as error:
            checkpoints.wait()
        sentences[rank] = str(error.value)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    full = (
        f"the disk that holds {tmp_path}/state/attempt-0001/checkpoints/step-000000005/rank-00001.safetensors is full; "
    )
    assert {rank: text.startswith(full) for rank, text in sentences.items()} == {0: True, 1: True}, sentences
