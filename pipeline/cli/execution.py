"""Executes a graph for `run`, `submit` and `retry`, on this machine or by Slurm, and prints the result."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from pipeline.core.errors import AtomError
from pipeline.core.lease import Lease
from pipeline.core.process import Companion
from pipeline.core.progress import Display, stages
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.launch.cluster_profile import Profile
from pipeline.launch.local import LocalLauncher, prepare_environment, require_inputs
from pipeline.operations.command_options import console

if TYPE_CHECKING:
    from pipeline.launch.slurm import Submission


def run(composed: Graph, store: Store, selected: list[str], cluster: str, profile: Profile, reference: str) -> None:
    """Runs stages of a graph on this machine. A process beside it sends the run to MLflow.

    Args:
        composed: The graph.
        store: The home.
        selected: The names of the stages to run.
        cluster: The cluster profile as the user wrote it.
        profile: The profile of that name.
        reference: The recipe as the user wrote it.

    Raises:
        AtomError: A stage fails or cannot run, or the profile is for a Slurm cluster alone.
        Exit: The user pressed Ctrl-C. The exit code is 130.
    """
    if profile.slurm is not None and "local" not in profile.model_fields_set:
        raise AtomError(
            f"cluster profile {profile.name} is of a Slurm cluster, and `atom run` would run every stage on this host; "
            "use `atom submit`, or a profile with a section `local`"
        )
    require_inputs(composed, store, selected)
    if all(store.sealed(composed.nodes[name].key) for name in selected):
        print(f"{stages(len(selected))}, all sealed already: nothing to run. Results are under {store.artifacts}.")
        return
    prepare_environment()

    new_run = runs.start(composed, store, selected, cluster, {"launcher": "local", "prices": profile.costs()})
    # While this lease is held, the run is not over, even if no stage runs at the moment.
    driver = Lease.take(new_run.folder / "driver")
    assert driver is not None, "the run was begun just now"
    companion = Companion(store.home, new_run.id, whole=True)
    print(f"run {new_run.id}, logs in {new_run.folder}", flush=True)
    try:
        LocalLauncher(composed, store, new_run, selected, profile, Display(console())).go()
    except KeyboardInterrupt:
        print("atom: stopped; run the same command to go on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        driver.release()
        companion.close(over=True)

    next_command = "atom build" if len(selected) == len(composed.nodes) else "atom run"
    print(f"all of {stages(len(selected))} sealed under {store.artifacts}; next: {next_command} {reference}")


def print_submission(submission: Submission) -> None:
    """Prints the problems of a submission on standard error, and one line on what became of its stages."""
    for text in dict.fromkeys(submission.kept_nodes):
        print(f"atom: {text}", file=sys.stderr)
    if submission.run is None:
        print(f"{stages(len(submission.sealed))} sealed already: nothing to submit")
        return

    parts: list[str] = []
    if submission.submitted:
        parts.append(f"{stages(len(submission.submitted))} submitted")
    if submission.attached:
        parts.append(f"{len(submission.attached)} already queued in Slurm")
    if submission.sealed:
        parts.append(f"{len(submission.sealed)} sealed already")
    print(f"run {submission.run.id}: {', '.join(parts)}; watch it: atom status --watch")
