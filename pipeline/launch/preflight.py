"""Checks each node before a stage starts, so that a broken node is reported by name within seconds.

Each rank checks its node (space, clock, GPU, versions) and sends the result to rank 0 over the network that training
will use, signed with the secret of the launch. Rank 0 gathers the results and reports for all. The shared file system
holds only the address of rank 0 and the secret. A rank opens three files there, and one more for each second in which
it waits for rank 0.

`nvidia-smi` tells the state of the GPUs. It has run on no GPU yet: the tests have a program in its place.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core import environment
from pipeline.core.environment import node_name, own_address
from pipeline.core.errors import Failure
from pipeline.launch.rendezvous import Ranks, polls, read, write
from pipeline.run_secret import atom_secret
from pipeline.run_secret.atom_secret import UnusableSecret, is_signed, sign

# The maximum difference between the starts of the ranks of a launch, and the maximum duration of a call.
SECONDS = 120.0
# The maximum time for the line of one caller, so that a foreign connection causes no long delay.
CALLER_SECONDS = 5.0
# Seconds by which a node's clock may differ from that of the file system.
SKEW_SECONDS = 30.0
POLL = 0.1
# How often a waiting rank looks whether another one has failed.
LOOK_SECONDS = 1.0
# Bytes of a message that are read: anyone in the network may send any number.
LONGEST_LINE = 65536
# The files and sockets that each process may have open, where the node's hard limit allows so many; the job's script
# asks for as many.
OPEN_FILES = 65536
# Seconds for a call of nvidia-smi, which hangs with its driver.
SMI_SECONDS = 60.0
# The fields of `nvidia-smi --query-gpu`, and the values of a sound GPU. The last one is that of newer drivers.
SOUND = {
    "ecc.errors.uncorrected.volatile.total": ("0",),
    "remapped_rows.pending": ("no", "0"),
    "remapped_rows.failure": ("no", "0"),
    "clocks_throttle_reasons.hw_slowdown": ("not active",),
    "gpu_recovery_action": ("none",),
}
# What it answers, in brackets or not, where a GPU or a driver does not have a field.
UNKNOWN = ("n/a", "not supported", "unknown", "requested functionality has been deprecated", "")


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

    On a rank other than 0, it is the reason why the rank could not report to rank 0.
    """
    problem = check_node(home, free_gb, scratch, ranks.size)
    # Also without a problem, since rank 0 waits for a report of each rank.
    if ranks.rank:
        text = _send_report(ranks, problem)
        return None if text is None else Failure(text)
    # A problem of rank 0's own node counts without the reports of the others.
    return problem if problem is not None or ranks.size == 1 else _gather_reports(ranks)


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

    They must exist, by their device files and without torch, and be sound.
    """
    assigned = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip().isdigit()]
    device_files = list(Path("/dev").glob("nvidia[0-9]*"))
    if os.environ.get("SLURM_GPUS_ON_NODE") and len(device_files) < len(assigned):
        gave = f"and Slurm gave {len(assigned)}; check the NVIDIA driver"
        return Failure(f"node {name} has {len(device_files)} GPUs under /dev, {gave}", bad_node=name)
    # One rank of a node checks for all of them, unless each rank sees its own GPUs only.
    is_first = os.environ.get("SLURM_LOCALID", "0") == "0"  # of the ranks of this node, if all have the same GPUs
    has_part = len(assigned) < int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    return gpu_problem(name, assigned) if assigned and (is_first or has_part) else None


def gpu_problem(node: str, gpus: Sequence[str]) -> Failure | None:
    """Returns the problem of one of these GPUs of this node, in one sentence; None without one.

    Without nvidia-smi nothing is known, which a line of the log says.

    Args:
        node: The name of this node.
        gpus: The numbers of the GPUs; the others may be another job's.
    """
    if shutil.which("nvidia-smi") is None:
        text = f"node {node} has no nvidia-smi here, so ECC errors and clocks of its GPUs are not checked"
        print(text, file=sys.stderr)
        return None
    fields = list(SOUND)
    while True:
        query = f"--query-gpu=index,{','.join(fields)}"
        command = ["nvidia-smi", f"--id={','.join(gpus)}", query, "--format=csv,noheader,nounits"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            stdout, stderr = process.communicate(timeout=SMI_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps a killed process
                process.communicate(timeout=1.0)
            why = f"nvidia-smi gave no answer within {SMI_SECONDS:.0f} s"
            return Failure(f"{why} on node {node}; have its GPUs and their driver checked", bad_node=node)
        output = " ".join((stdout + stderr).split())
        if unknown := [field for field in fields if f'"{field}" is not a valid field' in output]:
            fields = [field for field in fields if field not in unknown]  # an older driver
            continue
        if process.returncode:
            text = f"nvidia-smi failed on node {node} ({output[:200]}); have its GPUs and their driver checked"
            return Failure(text, bad_node=node)
        return _first_problem(node, fields, stdout)


def _first_problem(node: str, fields: list[str], output: str) -> Failure | None:
    for line in output.splitlines():
        index, *values = (value.strip() for value in line.split(","))
        for field, value in zip(fields, values, strict=False):
            if value.strip("[]").lower() not in (*SOUND[field], *UNKNOWN):
                text = f"GPU {index} of node {node} is not sound ({field}: {value}); have it reset or repaired"
                return Failure(text, bad_node=node)
    return None


def _send_report(ranks: Ranks, problem: Failure | None) -> str | None:
    """Sends the state of this node to rank 0, on another rank.

    Returns the reason if that fails; None if it does not.
    """
    path, listener, next_look = ranks.folder / "listener.json", None, time.monotonic() + LOOK_SECONDS
    for _ in polls(time.monotonic() + SECONDS):
        if path.exists() and (listener := read(path)) is not None:
            break
        if time.monotonic() > next_look:
            if ranks.failure() is not None:
                break
            next_look = time.monotonic() + LOOK_SECONDS
    if listener is None:
        if (failure := ranks.failure()) is not None:
            return failure.text
        silence = f"node {node_name()} got no answer from rank 0 for {SECONDS:.0f} s"
        return f"{silence}; check that it has the same $ATOM_HOME"
    wrong = None if problem is None else problem.text
    report = {"rank": ranks.rank, "node": node_name(), "wrong": wrong, "lock": environment.fingerprint()}
    text = json.dumps(report)
    try:
        key = atom_secret.read(ranks.secret)
        message = {"report": text, "signature": sign(key, "report", text)}
        with socket.create_connection((listener["host"], listener["port"]), timeout=SECONDS) as line:
            line.sendall(json.dumps(message).encode() + b"\n")
            line.settimeout(SECONDS)
            with line.makefile("rb") as file:
                answer = file.readline(LONGEST_LINE).decode(errors="replace").strip()
        # The answer is signed as well, so that no other listener is taken for rank 0.
        if is_signed(answer, key, "received", text):
            return None
        return f"node {node_name()}: rank 0 at {listener['host']} hung up"
    except UnusableSecret as error:
        return f"node {node_name()}: {error}; check that all nodes have the same user and the same $ATOM_HOME"
    except OSError as error:
        address = f"{listener['host']}:{listener['port']}"
        return f"node {node_name()} cannot reach rank 0 at {address} ({error}); look at names, routes and firewall"


def _gather_reports(ranks: Ranks) -> Failure | None:
    """Receives the reports of all other ranks, on rank 0, and returns the problem, if any.

    Rank 0's own node is sound: a problem of another node is that node's, also one with $ATOM_HOME.
    """
    deadline, next_look = time.monotonic() + SECONDS, 0.0
    reports: dict[int, dict[str, Any]] = {}
    atom_secret.make(ranks.secret)
    key, (own_host, host) = atom_secret.read(ranks.secret), address()
    family = socket.AF_INET6 if ":" in own_host else socket.AF_INET
    with socket.create_server((own_host, 0), family=family, backlog=ranks.size) as server:
        server.settimeout(POLL)
        write(ranks.folder / "listener.json", {"host": host.strip("[]"), "port": server.getsockname()[1]})
        while len(reports) < ranks.size - 1 and time.monotonic() < deadline:
            with suppress(OSError):  # including TimeoutError: no connection is waiting
                line, _ = server.accept()
                with line:
                    report = _receive_report(line, key)
                    if report is not None:
                        reports[report["rank"]] = report
            if time.monotonic() > next_look:
                if (failure := ranks.failure()) is not None:
                    return failure
                next_look = time.monotonic() + LOOK_SECONDS
    silent = sorted(set(range(1, ranks.size)) - set(reports))
    if silent:
        started = set(os.listdir(ranks.folder))
        silent_ranks = f"rank {silent[0]}" + (f" and {len(silent) - 1} more" if silent[1:] else "")
        any_started = any(f"started-{rank}" in started for rank in silent)
        state = "started and then stopped answering" if any_started else "did not start"
        return Failure(f"{silent_ranks} of {ranks.size} {state} within {SECONDS:.0f} s; see its log")
    ordered = [reports[rank] for rank in sorted(reports)]
    if problems := [report for report in ordered if report["wrong"]]:
        return Failure(str(problems[0]["wrong"]), bad_node=str(problems[0]["node"]))
    fingerprint = environment.fingerprint()
    for report in ordered:
        if report["lock"] != fingerprint:
            nodes = f"nodes {report['node']} and {node_name()}"
            return Failure(f"{nodes} differ in Python, packages or processor; ask for nodes that are alike")
    return None


def _receive_report(line: socket.socket, key: bytes) -> dict[str, Any] | None:
    """Returns the report of one rank; None if the connection is not from a rank of this launch."""
    line.settimeout(CALLER_SECONDS)
    try:
        with line.makefile("rb") as file:
            message = dict(json.loads(file.readline(LONGEST_LINE)))
        text = str(message["report"])
        if not is_signed(str(message["signature"]), key, "report", text):
            return None
    except (ValueError, TypeError, KeyError):
        return None
    line.sendall(sign(key, "received", text).encode() + b"\n")
    return dict(json.loads(text))


def address() -> tuple[str, str]:
    """Returns the address on which this node listens, and the host under which other nodes of the job reach it.

    A job on one node uses the loopback.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return own_address() if nodes > 1 else ("127.0.0.1", "127.0.0.1")
