"""What the tests of Slurm do to a run: submit it, ask how it stands, and disturb its jobs or the cluster under them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import slurm_world as world
from conftest import atom


def submit(home: Path, until: str = "pretrain", **settings) -> None:
    """Submits pre-training on two nodes."""
    folder = home.parent
    atom(
        home,
        "submit",
        world.write_recipe(folder),
        "--cluster",
        world.write_profile(folder, **settings),
        "--until",
        until,
    )


def finish(home: Path, stage: str = "pretrain") -> str:
    world.until(lambda: world.sealed(home, stage), f"{stage} sealed")
    return world.digest(home, stage)


def status(home: Path) -> dict:
    return json.loads(atom(home, "status", "--json").stdout)


def finished_stages(home: Path) -> dict | None:
    stages = {s["name"]: s for s in status(home)["stages"]}
    return stages if all(s["state"] in ("sealed", "failed", "cancelled", "lost") for s in stages.values()) else None


# --- what happens to the job of a stage, or to the cluster under it -----------------------------------------------------


def requeue(home: Path, stage: str = "pretrain") -> None:
    world.slurm("scontrol", "requeue", world.job_of(home, stage))


def told_to_save(home: Path, stage: str = "pretrain") -> None:
    """The signal that comes before a time limit."""
    world.slurm("scancel", "--signal=USR2", world.job_of(home, stage))


def preempt(home: Path, stage: str = "pretrain") -> None:
    command = ["--partition=test", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    world.slurm("sbatch", *command)


def node_down(home: Path, stage: str = "pretrain") -> None:
    node = world.nodes_of(home, stage)[-1]
    world.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def node_crash(home: Path, stage: str = "pretrain") -> None:
    """Every process of a node, its daemon and Slurm's supervisors among them."""
    node = world.nodes_of(home, stage)[-1]
    world.kill([world.daemon(f"slurmd.{node}"), *world.processes(node)])
    time.sleep(12)  # until the controller has noticed
    world.cluster("up")


def rank_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[-1], b"submitit"))


def first_rank_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[0], b"submitit"))


def rank_hangs(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[-1], b"submitit"), signal.SIGSTOP)


def daemons_killed(home: Path, stage: str = "pretrain") -> None:
    """Node daemon and supervisors, while the stage's own processes live on."""
    daemons = [world.daemon(f"slurmd.{node}") for node in world.nodes_of(home, stage)]
    world.kill([*daemons, *world.stepds(world.job_of(home, stage))])
    time.sleep(12)
    world.cluster("up")


def controller_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill([world.daemon("slurmctld")])
    world.cluster("up")


def controller_away_as_a_rank_dies(home: Path, stage: str = "pretrain") -> None:
    """The job's script then asks for a new start of a controller that does not answer."""
    rank = world.processes(world.nodes_of(home, stage)[-1], b"submitit")
    world.kill([world.daemon("slurmctld"), *rank])
    time.sleep(12)
    world.cluster("up")


def accounting_away(home: Path, stage: str = "pretrain") -> None:
    world.kill([world.daemon("slurmdbd")], signal.SIGTERM)
    output = atom(home, "status").stdout
    assert stage in output
    time.sleep(2)
    world.cluster("up")


RESTARTED = {requeue: True, told_to_save: True, preempt: True, daemons_killed: None}
RESTARTED |= {controller_killed: None, accounting_away: False}
"""Whether the stage's job must have been started again; None: as it comes."""
AT_LENGTH = {node_down: True, node_crash: True, rank_killed: True, first_rank_killed: True, rank_hangs: True}
AT_LENGTH |= {controller_away_as_a_rank_dies: True}
"""As well by `make soak`."""
SOAK = bool(os.environ.get("ATOM_SOAK"))
