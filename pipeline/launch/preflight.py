"""Checks each node before a stage starts, so that a broken node is reported by name within seconds.

Each rank checks its node (space, clock, GPU, versions) and writes the result, `checked-<rank>.json`, to the folder of
the launch. Rank 0 gathers the results and reports for all.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
import uuid
from pathlib import Path

from pipeline.core import environment
from pipeline.core.environment import node_name
from pipeline.core.errors import Failure
from pipeline.launch.rendezvous import Ranks, polls, read, write

# The maximum difference between the starts of the ranks of a launch.
SECONDS = 120.0
# Seconds by which a node's clock may differ from that of the file system.
SKEW_SECONDS = 30.0
RESULT = re.compile(r"checked-([0-9]+)\.json")
# The files and sockets that each process may have open, where the node's hard limit allows so many; the job's script
# asks for as many.
OPEN_FILES = 65536


def least_open_files(ranks: int) -> int:
    """Returns the fewest open files that a rank of so many needs.

    gloo connects it with each other rank, and with rank 0 once more, where the ranks meet. The rest is for NCCL and
    data.
    """
    return 512 + 4 * ranks


def allow_open_files() -> int:
    """Raises the limit of open files of this process and of its later children to OPEN_FILES.

    The limit does not rise above the hard limit, and a higher one stays as it is.

    Returns:
        The limit of this process after the call.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= possible:
        return OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    return possible


def check(home: Path, ranks: Ranks, free_gb: float, scratch: str | None) -> Failure | None:
    """Returns the problem of a node of this launch, in one sentence with its name; None without one.

    On a rank other than 0, it is the reason why the rank could not write its result.
    """
    problem = check_node(home, free_gb, scratch, ranks.size)
    # Also without a problem, since rank 0 waits for a result of each rank.
    if ranks.rank:
        text = None if problem is None else problem.text
        result = {"node": node_name(), "wrong": text, "lock": environment.fingerprint()}
        try:
            write(ranks.folder / f"checked-{ranks.rank}.json", result)
        except OSError as error:
            return Failure(f"node {node_name()} cannot write to {ranks.folder} ({error.strerror}); fix its mounts")
        return None
    # A problem of rank 0's own node counts without the reports of the others.
    return problem if problem is not None or ranks.size == 1 else _gather_results(ranks)


def check_node(home: Path, free_gb: float, scratch: str | None, ranks: int = 1) -> Failure | None:
    """Returns the problem of this node; None without one.

    The node is named as bad, except for a problem of $ATOM_HOME: all share it.

    Args:
        home: $ATOM_HOME.
        free_gb: GB that must be free in each folder.
        scratch: The folder of the node for temporary files; None without one.
        ranks: Processes of the job.
    """
    name = node_name()
    if (limit := allow_open_files()) < (least := least_open_files(ranks)):
        text = (
            f"node {name} lets a process have {limit} files open, and one of {ranks} ranks needs {least}; have its "
            "hard limit raised (ulimit -Hn, LimitNOFILE of slurmd)"
        )
        return Failure(text, bad_node=name)
    for folder in [home, *([Path(scratch)] if scratch else [])]:
        bad_node = "" if folder == home else name  # all nodes share the home
        try:
            free = shutil.disk_usage(folder).free / 1e9
            probe = folder / f".probe-{uuid.uuid4().hex}"
            local_time = time.time()
            probe.touch()
            written = probe.stat().st_mtime
            probe.unlink()
        except OSError as error:
            text = f"node {name} cannot write to {folder} ({error.strerror}); fix its mounts, or exclude it"
            return Failure(text, bad_node=bad_node)
        if free < free_gb:
            text = f"node {name} has {free:.1f} GB free in {folder}, less than free_gb = {free_gb:g}; free some"
            return Failure(text, bad_node=bad_node)
        skew = abs(written - local_time)
        if folder == home and skew > SKEW_SECONDS:
            relation = "ahead of" if local_time > written else "behind"
            text = f"the clock of node {name} is {skew:.0f} s {relation} the file system's; set it by NTP"
            return Failure(text, bad_node=name)
    return _gpus(name)


def _gpus(name: str) -> Failure | None:
    """Returns the problem of the GPUs that Slurm allocated here; None without one.

    They must exist, by their device files and without torch. Before training, the device test tries them.
    """
    assigned = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip().isdigit()]
    device_files = list(Path("/dev").glob("nvidia[0-9]*"))
    if os.environ.get("SLURM_GPUS_ON_NODE") and len(device_files) < len(assigned):
        gave = f"and Slurm gave {len(assigned)}; check the NVIDIA driver"
        return Failure(f"node {name} has {len(device_files)} GPUs under /dev, {gave}", bad_node=name)
    return None


def _gather_results(ranks: Ranks) -> Failure | None:
    """Reads the results of all other ranks, on rank 0, and returns the problem, if any.

    Rank 0's own node is sound: a problem of another node is that node's, also one with $ATOM_HOME.
    """
    silent = set(range(1, ranks.size))
    for _ in polls(time.monotonic() + SECONDS):
        if (failure := ranks.failure()) is not None:
            return failure
        silent -= {int(match[1]) for name in os.listdir(ranks.folder) if (match := RESULT.fullmatch(name))}
        if not silent:
            break
    if silent:
        first = min(silent)
        silent_ranks = f"rank {first}" + (f" and {len(silent) - 1} more" if len(silent) > 1 else "")
        any_started = any((ranks.folder / f"started-{rank}").exists() for rank in silent)
        state = "started and then stopped answering" if any_started else "did not start"
        return Failure(f"{silent_ranks} of {ranks.size} {state} within {SECONDS:.0f} s; see its log")
    results = [read(ranks.folder / f"checked-{rank}.json") or {} for rank in range(1, ranks.size)]
    if problems := [result for result in results if result["wrong"]]:
        return Failure(str(problems[0]["wrong"]), bad_node=str(problems[0]["node"]))
    for result in results:
        if result["lock"] != environment.fingerprint():
            nodes = f"nodes {result['node']} and {node_name()}"
            return Failure(f"{nodes} differ in Python, packages or processor; ask for nodes that are alike")
    return None
