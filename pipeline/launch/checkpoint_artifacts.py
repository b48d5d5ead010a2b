"""Artifacts that a stage seals before it ends: the release checkpoints of a training phase.

The artifact of the phase has the same files (the same inodes, by hard links), but only after the end of the phase. A
checkpoint can be used while its phase is running, or if the phase never ends.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import MachineError
from pipeline.core.lease import Lease, draft_folder
from pipeline.core.store import Artifact, digest_of, rows_of
from pipeline.graph.checkpoints import Checkpoint

if TYPE_CHECKING:
    from pipeline.launch.attempt import Attempt


class CheckpointArtifacts:
    """Seals the checkpoints of one attempt, which holds the lease of its key. Any of its threads may seal one."""

    def __init__(self, attempt: Attempt, lease: Lease) -> None:
        self.attempt, self.lease, self.lock = attempt, lease, threading.Lock()

    def seal(self, step: int, folder: Path) -> None:
        """Seals `folder` as the checkpoint after `step`, unless that was done before.

        Raises AtomError if it was sealed with different bytes by the same code in the same environment, MachineError if
        another worker has taken over.
        """
        with self.lock:
            task, store = self.attempt.task, self.attempt.store
            checkpoint = Checkpoint(task.key, step)
            self._require_lease(checkpoint)
            if store.sealed(checkpoint.key):
                self._check_same_digest(store.open(checkpoint.key), folder)
                return
            draft = draft_folder(store.work(task.key), self.lease.number, step)
            try:
                shutil.copytree(folder, draft, copy_function=os.link)
                store.seal(draft, checkpoint.key, lambda artifact: self._record(artifact, checkpoint))
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def _record(self, artifact: Artifact, checkpoint: Checkpoint) -> None:
        self._require_lease(checkpoint)
        self.attempt.record(artifact, checkpoint)

    def _check_same_digest(self, sealed: Artifact, folder: Path) -> None:
        pairs = [(sealed / row.path, folder / row.path) for row in sealed.rows]
        if all(new.exists() and os.path.samefile(old, new) for old, new in pairs):
            return  # same files by hard links: nothing to compare
        rows = rows_of(folder, handed_over=True)
        artifact = Artifact(sealed.key, digest_of(rows), folder, tuple(rows))
        self.attempt.refuse_second_digest(artifact)
        if artifact.digest != sealed.digest:
            self.attempt.report.note(
                f"{artifact.key} came out as {artifact.digest[:12]}; {sealed.digest[:12]} stands, made by other code, "
                "in another environment or by other ranks"
            )

    def _require_lease(self, checkpoint: Checkpoint) -> None:
        if self.lease.lost:
            raise MachineError(f"another worker took over {checkpoint.phase} before {checkpoint.node} was sealed here")
