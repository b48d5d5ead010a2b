"""`atom replay`: retrains published steps of a release from its published files alone, and compares every tensor.

    atom replay runs/releases/atom-smoke-0.1.0 pretrain --steps 30:60

`source` reads the files of a release, each only if it has the digest of `SHA256SUMS`. `plan` says what is replayed.
`retraining` tokenizes the kept documents, writes the checkpoint after step A as a work checkpoint beside the log up to
there, and lets the stage resume as after a kill, by the published order, until step B is sealed. Learning rate, spikes
and data are then those of the whole phase. `post_training` gives a phase that learns from answers the published ones.
`comparison` compares the sealed checkpoint with the published one, and `report` states the result.

No file of the release is unpickled: it is read as safetensors, JSON and Parquet. Its code is not executed, unless the
present code differs from the code that trained the phase: then `carried_code` runs the code in the release.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtomError, installing
from release import scratch
from release.audit.replay import carried_code
from release.audit.replay.comparison import compare_checkpoints
from release.audit.replay.plan import Plan, select_steps
from release.audit.replay.report import Replay, certificate, text
from release.audit.replay.retraining import retrain
from release.audit.replay.source import Source

__all__ = ["Replay", "certificate", "replay", "replay_into", "text"]

NEEDS = ("torch", "megatron", "tiktoken", "tokenizers")


def replay(
    release: Path,
    phase: str,
    first: int | None = None,
    last: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    unconfined: bool = False,
) -> Replay:
    """Retrains the steps after `first` up to `last`, both steps of published checkpoints; the last two if None.

    With `unconfined`, code of the release runs without bubblewrap, if it is needed.

    Raises AtomError for an unknown phase or step, CheckFailed if a file differs from SHA256SUMS, if the files do not
    state how the phase was trained, or if the kept documents do not give the token shards of the release.
    """
    if missing_module := next((name for name in NEEDS if importlib.util.find_spec(name) is None), None):
        raise AtomError(f"atom replay trains, which needs {missing_module}; {installing('train,data')}")
    source = Source(release)
    first, last = select_steps(source, phase, first, last)
    progress("hashing checkpoints and evidence")
    code = carried_code.find(source, phase, last)
    with scratch.folder() as temporary:
        folder = temporary.resolve()
        if code is None:
            retrained = retrain(source, phase, first, last, folder, progress)
        else:
            retrained = carried_code.run(code, phase, first, last, folder, unconfined, progress)
            # The carried code names these files, so they are compared with the checksums here.
            for path in retrained.subject:
                source.file(path)
        progress("comparing")
        comparison = compare_checkpoints(source.folder / Plan.checkpoint(phase, last), retrained.checkpoint)
    return Replay(
        phase=phase,
        first=first,
        last=last,
        verdict=comparison.verdict(retrained.state),
        tensors=comparison.tensors,
        different=comparison.different,
        state=retrained.state,
        diverges=retrained.diverges,
        ranks=retrained.ranks,
        environment=retrained.environment,
        fingerprint=retrained.fingerprint,
        materials=retrained.materials,
        subject=retrained.subject,
        code="here" if code is None else f"sha256:{code.digest}",
    )


def replay_into(release: Path, phase: str, first: int, last: int, folder: Path) -> None:
    """Replays steps in `folder` as the code that a release carries, and writes the result there as JSON.

    `carried_code.run` of a later version starts it in a process of its own. Each line of progress is printed after
    `ATOM`. Raises what `retrain` raises.
    """

    def print_progress(line: str) -> None:
        print("ATOM " + " ".join(line.split()), flush=True)

    retrained = retrain(Source(release), phase, first, last, folder, print_progress)
    carried_code.write_result(retrained, folder)
