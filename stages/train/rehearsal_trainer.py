"""The steps of a rehearsal on each rank, and the comparison of the step that is taken before and after the restart."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.core import atomic_files
from pipeline.core.environment import node_name
from pipeline.core.errors import CheckFailed, Interrupted, Restart
from pipeline.core.provenance import Rehearsed
from pipeline.core.store import canonical
from stages.formats.table import write_json
from stages.train import log
from stages.train.checkpoint.work_checkpoint import NoWholeCheckpoint
from stages.train.rehearsal import COMPARED, FILE, SAVED, STEPS, RehearsalConfig, difference, differing, within
from stages.train.text_trainer import SpikeDetector, TextTrainer

NODES = "nodes.json"
"""In the work folder: the node of each rank at the start that saved the checkpoint."""


class Rehearsal(TextTrainer):
    """The trainer of the phase for its first steps."""

    config: RehearsalConfig

    clock = staticmethod(time.monotonic)
    """Seconds; for the speed."""

    def is_release_step(self, step: int) -> bool:
        """Returns False: a rehearsal publishes no checkpoint."""
        return False

    def measure(self, step: int) -> dict[str, Any] | None:
        """Returns None: held-out loss is the phase's own matter."""
        return None

    def save_beginning(self, step: int) -> None:
        """Saves nothing: a rehearsal that is killed before its checkpoint begins anew."""

    def begin(self, step: int) -> None:
        """So few steps have no spikes; a loss that is no number stops the rehearsal."""
        self.spike_detector = SpikeDetector(None, ())

    def run(self, stop: list[int], out: Path) -> None:
        """Takes the steps of this start, and fills `out` if it was one after the restart."""
        ranks, first = self.engine.ranks, self.phase.first_step - 1
        try:
            step = self._start()
        except NoWholeCheckpoint as error:  # on all ranks
            raise self._failed(str(error)) from None
        self.begin(step)
        if step == first + SAVED:
            (saved,) = [line["digests"] for line in self.log_lines() if line["step"] == step and "digests" in line]
            if different := differing(saved, self._digests()):
                raise self._failed(f"after the restart, {different} not what was saved after step {step}")
        else:
            while step < first + SAVED:
                step = self._take(step, stop)
            # Before it is saved, so that the log of the checkpoint has them.
            self.log.write({"step": step, "digests": self._digests()})
            self._save(step)

        # Written last by the start before the restart: without it, this start takes that one's place.
        is_control = ranks.from_first(not (self.work / NODES).exists())
        earlier = _lines_of(first + COMPARED, self.log.replay.lines)
        if ranks.from_first(not is_control and not any("digests" in line for line in earlier)):
            raise self._failed("the start after the restart did not find what the one before had saved")
        step = self._take(step, stop)
        self.log.write({"step": step, "digests": self._digests()})
        nodes = ranks.gather(node_name())
        if is_control:
            self.checkpoints.wait()
            if self.first:
                atomic_files.write(self.work / NODES, json.dumps(nodes))
            ranks.barrier()
            raise Restart(f"step {step} is taken once, and taken again after a restart from step {step - 1}")
        lines = _lines_of(step, self.log_lines())
        if problem := ranks.from_first(difference(earlier, lines, self._is_exact) if self.first else None):
            raise self._failed(f"step {step} after the restart is not the one before it: {problem}")

        speeds = []
        while step < first + STEPS:
            began = self.clock()
            step = self._take(step, stop)
            # With padding, as the plan counts tokens.
            tokens = self.phase.rows_of(step) * self.phase.sequence_length
            speeds.append(tokens / (self.clock() - began))
        speed = statistics.median(speeds)
        slow = ranks.from_first(self._slowness(speed))
        if slow and self.config.slow == "stop":
            raise self._failed(slow)
        if self.first:
            body = {"phase": self.name, "ranks": ranks.world, "exact": self._is_exact}
            write_json(out / FILE, {**body, "restored_step": first + SAVED, "before": earlier, "after": lines})
            self._record(nodes, speed, slow)
        # No rank ends its groups before all are done.
        ranks.barrier()

    def _take(self, step: int, stop: list[int]) -> int:
        """Takes the next step. Raises Interrupted on all ranks if one of them was asked to stop."""
        step = self.step(step + 1)
        self.watchdog.alive()
        self.report.progress(step - self.phase.first_step + 1, STEPS, "steps", **self.progress_figures)
        if self.engine.ranks.max(int(bool(stop))):
            raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        return step

    def _digests(self) -> list[str]:
        """SHA-256 of the state of each rank: the weights that it computes with, and what its optimizer owns."""
        digest = hashlib.sha256(canonical([self.engine.step_done, self.engine.router_state()]))
        owned = [(f"{kind}.{piece.name}", x) for piece, tensors in self.engine.state() for kind, x in tensors.items()]
        for name, tensor in sorted([*owned, *(("", x) for x in self.engine.local_weights())], key=lambda pair: pair[0]):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return self.engine.ranks.gather(digest.hexdigest())

    @property
    def _is_exact(self) -> bool:
        """True if a repeated step has the same bits."""
        return self.engine.ranks.device.type == "cpu" or self.phase.parallelism.deterministic

    def _slowness(self, speed: float) -> str | None:
        """Returns why the phase is slow, in words; None if it is not, or if the plan does not know its speed."""
        planned, least = self.report.planned_tokens_per_s, self.config.least_of_plan
        if speed >= least * planned:
            return None
        return (
            f"{speed:,.0f} tokens a second are {speed / planned:.0%} of the planned {planned:,.0f}, less than "
            f"{least:.0%} (rehearsal.least_of_plan)"
        )

    def _failed(self, problem: str) -> CheckFailed:
        """Removes the work of all starts, so that the next one rehearses from the beginning. Returns the error."""
        if self.first:
            self.checkpoints.wait()
            for attempt in self.work.glob("attempt-*"):
                shutil.rmtree(attempt)
            (self.work / NODES).unlink(missing_ok=True)
        # A rank that fails first ends the others.
        self.engine.ranks.barrier()
        return CheckFailed(
            f"the rehearsal of {self.name} failed: {problem}; have the nodes and the file system of $ATOM_HOME "
            "checked, and run again to rehearse from the beginning"
        )

    def _record(self, nodes: list[str], speed: float, slow: str | None) -> None:
        """Adds what depends on clock and nodes to the record of this start. Rank 0 only."""
        planned, earlier = self.report.planned_tokens_per_s, json.loads((self.work / NODES).read_text())
        rehearsed: Rehearsed = {
            "tokens_per_s": round(speed, 1),
            "planned_tokens_per_s": round(planned, 1) if planned else None,
            "slow": slow is not None,
            "nodes": len({*nodes}),
            "moved_ranks": sum(node != before for node, before in zip(nodes, earlier, strict=True)),
        }
        path = log.start_path(self.work, self.report.lease)
        atomic_files.write(path, json.dumps({**json.loads(path.read_text()), "rehearsed": rehearsed}) + "\n")
        plan = f"{speed / planned:.0%} of the plan" if planned else "the plan does not state its speed"
        moved = f"{rehearsed['moved_ranks']} of {len(nodes)} ranks on another node"
        self.report.note(
            f"{self.name}: a step came out equal{within(self._is_exact)} after a restart, of {moved}; "
            f"{slow or f'{speed:,.0f} tokens a second ({plan})'}"
        )


def _lines_of(step: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["step"] == step]
