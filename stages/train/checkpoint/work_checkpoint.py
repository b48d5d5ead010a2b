"""Work checkpoints, from which a killed run resumes; they are written while training continues.

    state/attempt-0002/training.jsonl             the log of finished steps
    state/attempt-0002/sealed/step-000600/        release checkpoints so far
    state/attempt-0002/checkpoints/step-000000600/rank-00000.safetensors, rank-00000.json, …, complete.json
    state/attempt-0002/checkpoints/step-000000600/release-<digest>/model-00001-of-00009.safetensors, ….json, …

Saving copies the state in memory, and training waits only for that; a thread of each rank writes its copy, and rank 0's
adds `complete.json` when it sees all ranks' files. It contains the size and SHA-256 of every file, including those of
the phase's product so far. Before loading, the ranks hash the files of the checkpoint, and compare the size, time and
inode of the product's.

A release checkpoint is made from a complete work checkpoint. Its files follow from the model alone, and each rank
writes some of them into a folder named by the digest of `complete.json`, reading what it needs from the files of all
ranks. They stay as long as the work checkpoint, so a resumed attempt writes only those that are missing. Rank 0 links
them into `sealed`.

Each attempt writes to a folder of its own and reads those of earlier attempts, so a surviving process of an earlier
attempt can damage nothing; it stops when it sees its successor. The exception are the files of a release checkpoint
that an earlier attempt began, of which both would write the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.core import atomic_files, os_errors
from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import Report
from pipeline.core.store import FileRecord, Progress, canonical, hand_over_hash, no_progress, sha256_bytes, sha256_file
from stages.train.checkpoint import release_checkpoint, sharded_state
from stages.train.checkpoint.sharded_state import ShardReader
from stages.train.engine import Engine, Piece
from stages.train.parallel import Ranks

T = TypeVar("T")

MARKER, LOG, SEALED = "complete.json", "training.jsonl", "sealed"
POLL = 0.02
SLOWEST_POLL = 1.0
"""The longest pause of a thread that waits for files of other ranks."""


class NoWholeCheckpoint(AtomError):
    """Every work checkpoint is damaged. Raised on all ranks."""


class Checkpoints:
    """The work checkpoints of one attempt. Methods are collective but for `failed`."""

    def __init__(
        self,
        work: Path,
        keep: int,
        engine: Engine,
        report: Report,
        lease: int | None = None,
        rewind_steps: int = 0,
        progress: Progress = no_progress,
    ) -> None:
        """The checkpoints of an attempt, which gets a folder of its own.

        `lease` is the number of this attempt, if the caller counts them; None means the one after the latest.
        `rewind_steps` is the largest number of steps that `rewind` goes back from the next step. `progress` gets the
        bytes of files for which training waits.
        """
        self.rewind_steps, self.progress = rewind_steps, progress
        self.work, self.keep, self.engine, self.report = work, keep, engine, report
        self.ranks = ranks = engine.ranks
        latest = max((int(p.name[8:]) for p in _attempts(work)), default=0)
        # Rank 0 decides: on a shared file system, ranks may see different attempts.
        number = ranks.from_first(1 + latest if lease is None else lease)
        self.folder = work / f"attempt-{number:04d}"
        if ranks.first:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._require_present()
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.bytes_done = 0
        """Bytes that the thread has read, hashed and written."""
        self.release_records: dict[str, FileRecord] = {}
        """Records of the release checkpoints' files, which never change. Rank 0 only."""
        self.given_up = threading.Event()
        self.copies: dict[str, Tensor] = {}
        self.lost_lines: list[dict[str, Any]] = []
        """Lines of the log that earlier attempts wrote after the loaded checkpoint. Rank 0 only."""

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any], seal: bool) -> float:
        """Copies the state of a finished step and writes it in a thread. Returns the seconds that training waited.

        state: the content of state.json, with the state to resume from. seal: also writes a release checkpoint. Waits
        for the previous checkpoint if that is still being written. Raises AtomError if that write failed.
        """
        started = time.monotonic()
        self.wait()
        owned = list(self.engine.state())
        tensors_by_name = {f"{kind}.{piece.name}": t for piece, tensors in owned for kind, t in tensors.items()}
        with torch.no_grad():
            # Host memory is allocated once and used for all checkpoints, as page-locking it is slow.
            self.copies |= self._host_memory({n: t for n, t in tensors_by_name.items() if n not in self.copies})
            for name, tensor in tensors_by_name.items():
                self.copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            # The copies are asynchronous, and the next step overwrites the optimizer's state.
            torch.cuda.synchronize()
        copies = {name: self.copies[name] for name in tensors_by_name}
        # Now, as the log grows while the thread writes.
        log = (self.folder / LOG).stat().st_size if self.ranks.first else 0
        pieces, folder = [piece for piece, _ in owned], self.folder / "checkpoints" / f"step-{step:09d}"
        self._start(folder, partial(self._write, folder, step, pieces, copies, dict(state), seal, log))
        return time.monotonic() - started

    def _host_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for copies of the tensors: one piece for each type, page-locked if they are on a GPU.

        PyTorch's own page-locked memory comes in powers of two, up to twice of what is asked for.
        """
        copies: dict[str, Tensor] = {}
        for dtype in {t.dtype for t in tensors.values()}:
            group = {name: t for name, t in tensors.items() if t.dtype == dtype}
            flat = torch.empty(sum(t.numel() for t in group.values()), dtype=dtype)
            if flat.numel() and any(t.is_cuda for t in group.values()):
                cuda: Any = torch.cuda.cudart()
                torch.cuda.check_error(cuda.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
                weakref.finalize(self, _unlock, flat)  # which keeps the memory until then
            parts = flat.split([t.numel() for t in group.values()])
            copies |= {name: part.view_as(t) for (name, t), part in zip(group.items(), parts, strict=True)}
        return copies

    def wait(self) -> None:
        """Waits until all ranks have finished writing, and reports the progress of this rank's thread.

        Raises the error of any rank, on all of them.
        """
        reported = self.bytes_done
        # Polling by small collectives, as a single barrier would time out while a rank still writes.
        while status := self.ranks.max(2 if self.error else int(self.thread is not None and self.thread.is_alive())):
            if status == 2:
                # Every rank raises: one that went on would wait for the others in its next collective.
                own_error = self.error
                errors = self.ranks.gather(str(own_error) if own_error else None)
                self.given_up.set()  # rank 0 may be waiting for a file that will never come, which is no cause
                raise own_error or MachineError(next(filter(None, errors)))
            if (done := self.bytes_done) > reported:
                self.progress(done - reported)
                reported = done
            time.sleep(POLL)
        self.thread = None

    def failed(self) -> bool:
        """Returns True if a write failed on this rank; `wait` raises the error."""
        return self.error is not None

    def _start(self, folder: Path, write: Callable[[], None]) -> None:
        """Starts a thread that writes files of the work checkpoint in `folder`. `wait` raises its error."""

        def run() -> None:
            try:
                write()
            except OSError as error:
                # A full or broken disk gets a sentence of its own; a folder that is gone means a successor.
                fault = os_errors.device(error, folder)
                unwritten = f"work checkpoint {folder} cannot be written ({error}); make room and run again to go on"
                message = fault.text if fault else unwritten
                self.error = MachineError(message if self._is_current() else SUPERSEDED)
            except Exception as error:  # an AtomError or a bug
                self.error = error

        # A daemon, so that a process that fails does not wait for the write.
        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def _advance(self, size: int) -> None:
        self.bytes_done += size

    def _write(
        self,
        folder: Path,
        step: int,
        pieces: list[Piece],
        copies: dict[str, Tensor],
        state: dict[str, Any],
        seal: bool,
        log: int,
    ) -> None:
        started = time.monotonic()
        folder.mkdir(exist_ok=True)
        # Each rank writes what it owns; nothing is gathered.
        sharded_state.write(folder, self.ranks.rank, pieces, copies, self._advance)
        if self.ranks.first:
            self._complete(folder, step, state, log)
        if seal:
            self._seal(folder)
        if self.ranks.first:
            self._prune()
            self.report.metric(step, checkpoint_write_seconds=time.monotonic() - started)

    def _wait_for(self, read: Callable[[], T | None], lack: str) -> T:
        """Waits in the thread until `read` returns something.

        Raises MachineError with the sentence `lack` if another rank has failed meanwhile, or if a later attempt
        has begun.
        """
        pause = POLL
        while (value := read()) is None:
            self._require_present()
            if self.given_up.wait(pause):
                raise MachineError(lack)
            pause = min(SLOWEST_POLL, 1.3 * pause)  # hundreds of ranks may wait for one file
        self._require_present()
        return value

    def _complete(self, folder: Path, step: int, state: Mapping[str, Any], log: int) -> None:
        # Rank 0 waits for the files of all ranks, by the file system: a collective in this thread could meet one of
        # training.
        files = self._wait_for(
            lambda: sharded_state.receipts(folder, self.ranks.world),
            f"work checkpoint {folder} lacks the files of another rank",
        )
        # The log has grown since: only its size and digest at the step count.
        product: dict[str, Any] = dict(self.release_records)
        with open(self.folder / LOG, "rb") as file:
            product[LOG] = [log, sha256_bytes(file.read(log))]
        marker = with_digest({"step": step, "state": state, "files": files, "product": product})
        atomic_files.write(folder / MARKER, json.dumps(marker), durable=True)

    def _seal(self, folder: Path) -> None:
        """Writes this rank's share of the release checkpoint of a complete work checkpoint.

        Rank 0 then puts it together.
        """
        marker = self._wait_for(lambda: _marker_if_complete(folder), f"work checkpoint {folder} was never completed")
        # From the files and not from memory, which belongs to a later step by now.
        source = ShardReader(folder, marker["files"], self._advance)
        shapes = self.engine.shapes
        # Before the first step there are no states.
        states = self.engine.config.phase.optimizer.state_shapes(shapes) if marker["state"]["optimizer_step"] else {}
        files = release_checkpoint.plan(shapes, states)
        parts = folder / f"release-{_digest(marker)[:16]}"
        parts.mkdir(exist_ok=True)
        # Ranks take the files in turns, so that each writes about as much.
        for file in files[self.ranks.rank :: self.ranks.world]:
            self._require_present()
            release_checkpoint.write_part(parts, file, source.full, self._advance)
        if not self.ranks.first:
            return
        records = self._wait_for(
            lambda: release_checkpoint.read_records(parts, files),
            f"the release checkpoint in {parts} lacks the files of another rank",
        )
        target = self.folder / SEALED / release_checkpoint.name_of(marker["step"])
        # What only a resumed phase needs is not published.
        state = {name: value for name, value in marker["state"].items() if name != PENDING}
        for name, record in release_checkpoint.join(target, parts, files, records, state).items():
            self.release_records[f"{SEALED}/{target.name}/{name}"] = record
        self.report.seal_checkpoint(marker["step"], target)

    def _is_current(self) -> bool:
        return _attempts(self.work)[-1:] == [self.folder]

    def _require_present(self) -> None:
        """Raises AtomError if a later attempt has begun, because this one was presumed dead."""
        if not self._is_current():
            raise MachineError(SUPERSEDED)

    def _prune(self) -> None:
        """Removes all but the newest complete checkpoints, ordered by attempt and step.

        Keeps the files of later attempts: this one may be the orphan.
        """
        self._require_present()
        folders = [f for f in _checkpoints(self.work) if f.parent.parent <= self.folder]
        complete = [f for f in folders if (f / MARKER).exists()]
        # Only complete ones count: a newer one may still be in the hands of another rank.
        kept = complete[-self.keep :]
        if self.rewind_steps:  # and the one to which a spike at the next step would rewind, and the next one
            # A rewind goes this far back from the next step.
            bound = _step(complete[-1]) + 1 - self.rewind_steps
            kept += [f for f in complete if _step(f) <= bound][-1:] + [f for f in complete if _step(f) > bound][:1]
        for old in complete:
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
        # Nobody is left to complete those of earlier attempts. Those of this one may still be written.
        for folder in folders:
            if folder.parent.parent < self.folder and folder not in complete:
                shutil.rmtree(folder, ignore_errors=True)
        for attempt in _attempts(self.work):
            if attempt < self.folder and not any((attempt / "checkpoints").glob("step-*")):
                shutil.rmtree(attempt, ignore_errors=True)

    # -- resuming ---------------------------------------------------------------------------------------------------

    def load(self, is_release_step: Callable[[int], bool]) -> dict[str, Any] | None:
        """Loads the newest usable checkpoint into the engine and links the log and release checkpoints up to its step.

        is_release_step: whether a step has a release checkpoint. Returns the state that was saved with it; None if
        there never was a checkpoint. Truncated or damaged ones are skipped with a note. Raises AtomError if complete
        ones were written and none of them is intact.
        """
        problems: list[str] = []
        names = [f.relative_to(self.work).as_posix() for f in reversed(_checkpoints(self.work))]
        for name in self.ranks.from_first(names):
            folder = self.work / name
            damage = find_damage(self.ranks, folder, partial(self._find_damage, folder))
            if damage is None:
                marker = read_marker(folder)
                state: dict[str, Any] = marker["state"]
                read = ShardReader(folder, marker["files"], self.progress).read
                self.engine.load_state(read, int(state["optimizer_step"]), state=state)
                # A kill may have come between the work checkpoint and its release checkpoint.
                lacks_release = self.ranks.first and self._take_over(folder, marker, is_release_step)
                if self.ranks.from_first(lacks_release):
                    self._start(folder, partial(self._seal, folder))
                return state
            if damage != INCOMPLETE:
                # An incomplete one is what every kill leaves, and no damage.
                problems.append(damage)
                self.report.note(f"work checkpoint {name} is damaged ({damage}); going back to the one before it")
        if problems:
            raise NoWholeCheckpoint(
                f"every work checkpoint in {self.work} is damaged (newest: {problems[0]}); "
                f"remove {self.work} to start this stage anew"
            )
        return None

    def rewind(self, step: int) -> dict[str, Any]:
        """Loads the newest usable checkpoint of this step or an earlier one into the engine; returns its saved state.

        The log is taken back to there. Release checkpoints stay: they are made again with the same bytes.

        Raises AtomError if there is none.
        """
        self.wait()
        names = [f.relative_to(self.work).as_posix() for f in reversed(_checkpoints(self.work)) if _step(f) <= step]
        for name in self.ranks.from_first(names):
            folder = self.work / name
            if find_damage(self.ranks, folder, partial(self._find_damage, folder)):
                continue
            marker = read_marker(folder)
            state: dict[str, Any] = marker["state"]
            read = ShardReader(folder, marker["files"], self.progress).read
            self.engine.load_state(read, int(state["optimizer_step"]), state=state)
            if self.ranks.first:
                # A superseded attempt must not remove checkpoints that its successor may load.
                self._require_present()
                self.lost_lines = []
                # Lines after the step are written again, in the order of the repeated steps.
                os.truncate(self.folder / LOG, marker["product"][LOG][0])
                for newer in _checkpoints(self.work):
                    if newer.parent.parent <= self.folder and _step(newer) > state["step"]:
                        shutil.rmtree(newer, ignore_errors=True)
            # No rank may save before rank 0 has removed the newer checkpoints.
            self.ranks.barrier()
            return state
        raise AtomError(
            f"no work checkpoint of step {step} or before is left in {self.work} to go back to; set "
            "spikes.action to skip"
        )

    def _find_damage(self, folder: Path) -> str | None:
        """A description of damage to a checkpoint or its log and release checkpoints; each rank checks its share."""
        try:
            marker = read_marker(folder)
        except FileNotFoundError:
            return INCOMPLETE
        except ValueError as error:
            return f"{MARKER} cannot be read: {error}"
        attempt = folder.parent.parent
        files = [(folder / name, [receipt["size"], receipt["sha256"]]) for name, receipt in marker["files"].items()]
        product = [(attempt / name, mark) for name, mark in marker["product"].items()]
        # Each rank hashes its share: all of them together read the checkpoint once.
        for path, (size, digest, *time_and_inode) in [*files, *product][self.ranks.rank :: self.ranks.world]:
            if not path.is_file():
                return f"{path.name} is missing"
            if path.name == LOG:  # it has grown since
                intact = sha256_bytes(path.read_bytes()[:size]) == digest
            elif time_and_inode:  # of a release checkpoint
                intact = FileRecord(size, digest, *time_and_inode).describes(path, self.progress)
            else:
                intact = path.stat().st_size == size and sha256_file(path, self.progress) == digest
            if not intact:
                return f"{path.relative_to(attempt)} is not what was written"
        return None

    def _take_over(self, folder: Path, marker: dict[str, Any], is_release_step: Callable[[int], bool]) -> bool:
        """Links the log and release checkpoints up to a checkpoint's step into this attempt's folder.

        Removes the skipped checkpoints. Returns whether the release checkpoint of that step is still to be made.
        """
        previous, current = folder.parent.parent, self.folder
        try:
            for name, (_, sha256, *_) in marker["product"].items():
                if name != LOG:
                    path = current / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # Links, not copies: release checkpoints never change, and may have terabytes.
                    os.link(previous / name, path)
                    self.release_records[name] = FileRecord.of(path, sha256)
                    # The seal of the artifact then need not read the file again.
                    hand_over_hash(path, sha256)
            size = marker["product"][LOG][0]
            log = (previous / LOG).read_bytes()[:size]
            (current / LOG).write_bytes(log)
            self.lost_lines = _lines_after(log, [a for a in _attempts(self.work) if a < current])
        except FileNotFoundError:
            # A successor removes the folders of earlier attempts that it does not need.
            self._require_present()
            raise
        self._require_present()
        folders = [f for f in _checkpoints(self.work) if f.parent.parent < current]
        for newer in folders[folders.index(folder) + 1 :]:
            shutil.rmtree(newer, ignore_errors=True)
        for release in sorted((current / SEALED).glob("step-*")):  # a kill may have come before these were reported
            self.report.seal_checkpoint(int(release.name[5:]), release)
        target = current / SEALED / release_checkpoint.name_of(marker["step"])
        return is_release_step(marker["step"]) and not target.exists()


def find_damage(ranks: Ranks, folder: Path, find: Callable[[], str | None]) -> str | None:
    """Looks for damage to files on all ranks, in a thread of each, which may take longer on one than on another.

    Ranks that are done poll the others: in a single collective they would wait for longer than its timeout allows. An
    error of the file system counts as damage: if it was raised on one rank, the others would wait for that rank.

    Args:
        ranks: The ranks, each of which calls this.
        folder: The folder of the files, for the sentence about one that cannot be read.
        find: Describes damage to the files that this rank checks; None if they are intact.

    Returns:
        The damage that the first rank with any found, on all ranks; None if all files are intact.
    """

    def find_or_describe_error() -> str | None:
        try:
            return find()
        except OSError as error:
            return f"{folder} cannot be read: {error}"

    with ThreadPoolExecutor(1) as pool:
        # In a thread, as hashing holds up the polling.
        damage = pool.submit(find_or_describe_error)
        while ranks.max(int(not damage.done())):
            time.sleep(POLL)
    return next(filter(None, ranks.gather(damage.result())), None)


def _lines_after(log: bytes, attempts: list[Path]) -> list[dict[str, Any]]:
    """The lines after a log in the longest log of earlier attempts that continues it, up to a cut or damaged one."""
    longest = b""
    for path in (attempt / LOG for attempt in attempts):
        text = path.read_bytes() if path.is_file() else b""
        # A log that differs before the checkpoint is of another attempt's past.
        if text.startswith(log) and len(text) - len(log) > len(longest):
            longest = text[len(log) :]
    lines: list[dict[str, Any]] = []
    # After the last newline there is nothing, or a line that a kill cut off.
    for text in longest.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def _unlock(memory: Tensor) -> None:
    cuda: Any = torch.cuda.cudart()
    cuda.cudaHostUnregister(memory.data_ptr())


def with_digest(marker: dict[str, Any]) -> dict[str, Any]:
    """The marker with a digest of its content, which detects a flipped byte."""
    return {**marker, "sha256": _digest(marker)}


def _digest(marker: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical(marker))


def read_marker(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if the checkpoint was never completed, ValueError if the marker is damaged."""
    marker = json.loads((folder / MARKER).read_text())
    if not isinstance(marker, dict):
        raise ValueError("it is not what was written")
    body = {name: value for name, value in marker.items() if name != "sha256"}
    if with_digest(body) != marker:
        raise ValueError("it is not what was written")
    return body


def _marker_if_complete(folder: Path) -> dict[str, Any] | None:
    """The marker of a checkpoint; None until it is complete. Raises ValueError if it is damaged."""
    try:
        return read_marker(folder)
    except FileNotFoundError:
        return None


def _step(folder: Path) -> int:
    return int(folder.name[5:])


PENDING = "spikes_pending"
"""Only in the state of a work checkpoint: spikes whose steps are still to be repeated."""
INCOMPLETE = "never completed"
SUPERSEDED = "a later attempt has taken over from this one, which stops without harm to it"


def _attempts(work: Path) -> list[Path]:
    return sorted(p for p in work.glob("attempt-*") if p.name[8:].isdigit())


def _checkpoints(work: Path) -> list[Path]:
    """All work checkpoints, sorted by attempt and step; the last one is the newest."""
    return [f for attempt in _attempts(work) for f in sorted((attempt / "checkpoints").glob("step-*"))]
