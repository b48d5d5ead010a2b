"""`atom replay`: retrains published steps of a release from its published files alone, and compares every tensor.

    atom replay runs/releases/atom-smoke-0.1.0 pretrain --steps 30:60

`source` reads the files of a release, each only if it has the digest of `SHA256SUMS`. `plan` says what is replayed, and
which answers a phase that learns from answers gets. `retraining` tokenizes the kept documents, writes the checkpoint
after step A as a work checkpoint beside the log up to there, and lets the stage resume as after a kill, by the
published order, until step B is sealed. Learning rate, spikes and data are then those of the whole phase. It compares
the sealed checkpoint with the published one, and `report` states the result.

No file of the release is unpickled: it is read as safetensors, JSON and Parquet. Its code is not executed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtomError, installing
from release import scratch
from release.audit.replay.plan import select_steps
from release.audit.replay.report import Replay, certificate, text
from release.audit.replay.retraining import retrain
from release.audit.replay.source import Source

__all__ = ["Replay", "certificate", "replay", "text"]

NEEDS = ("torch", "megatron", "tiktoken", "tokenizers")


def replay(
    release: Path,
    phase: str,
    first: int | None = None,
    last: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Replay:
    """Retrains the steps after `first` up to `last`, both steps of published checkpoints; the last two if None.

    Raises AtomError for an unknown phase or step, CheckFailed if a file differs from SHA256SUMS, if the files do not
    state how the phase was trained, or if the kept documents do not give the token shards of the release.
    """
    if missing_module := next((name for name in NEEDS if importlib.util.find_spec(name) is None), None):
        raise AtomError(f"atom replay trains, which needs {missing_module}; {installing('train,data')}")
    source = Source(release)
    first, last = select_steps(source, phase, first, last)
    progress("hashing checkpoints and evidence")
    with scratch.folder() as temporary:
        return retrain(source, phase, first, last, temporary.resolve(), progress)
