"""What nvidia-smi says of the GPUs of this node, before a stage begins: ECC errors, rows to be remapped, clocks that
the hardware has lowered, and a reset or reboot that the driver asks for after an Xid error.

It has run on no GPU yet: the tests have a program in the place of nvidia-smi.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from pipeline.core.errors import Failure

SECONDS = 60.0
SOUND = {
    "ecc.errors.uncorrected.volatile.total": ("0",),
    "remapped_rows.pending": ("no", "0"),
    "remapped_rows.failure": ("no", "0"),
    "clocks_throttle_reasons.hw_slowdown": ("not active",),
    "gpu_recovery_action": ("none",),
}
"""The fields of `nvidia-smi --query-gpu`, and the values of a sound GPU. The last one is that of newer drivers."""
UNKNOWN = ("n/a", "not supported", "unknown", "requested functionality has been deprecated", "")
"""What it answers, in brackets or not, where a GPU or a driver does not have a field."""


def check(node: str, gpus: Sequence[str]) -> Failure | None:
    """The problem of one of these GPUs of this node, in one sentence; None without one. Without nvidia-smi nothing is
    known, which a line of the log says. gpus: their numbers; the others may be another job's."""
    if shutil.which("nvidia-smi") is None:
        print(
            f"node {node} has no nvidia-smi here, so ECC errors and clocks of its GPUs are not checked", file=sys.stderr
        )
        return None
    fields = list(SOUND)
    while True:
        query = f"--query-gpu=index,{','.join(fields)}"
        command = ["nvidia-smi", f"--id={','.join(gpus)}", query, "--format=csv,noheader,nounits"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            stdout, stderr = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps a killed process
                process.communicate(timeout=1.0)
            why = f"nvidia-smi gave no answer within {SECONDS:.0f} s"
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
