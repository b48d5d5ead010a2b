"""The environment of a stage: its machine, packages and code, which are recorded but in no key."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

import pipeline
from pipeline.core import json_files
from pipeline.core.store import canonical, sha256_bytes

# Environment variables that select the arithmetic of another processor, with other rounding.
ARITHMETIC = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
# Folders that every machine has: with a Python under /usr, `#!/usr/bin/env` is no secret.
COMMON_PATHS = frozenset({"/", "/usr", "/usr/local", "/opt", "/tmp", "/var", "/home", "/mnt", "/srv", "/data"})
# The file of a snapshot of the code with the checkout's commit; no part of the snapshot's digest.
COMMIT = "commit.json"


class _Commit(TypedDict):
    commit: str | None
    dirty: bool


_COMMIT: TypeAdapter[Any] = TypeAdapter(_Commit)


def node_name() -> str:
    """Returns the name of this node in Slurm, or in the system without Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address() -> tuple[str, str]:
    """Returns the address on which this node listens for other nodes, and the host for the URLs that they use.

    The host is the name of the node. If this node knows itself by a loopback address only, it is the address of the
    interface with the default route; without any route it is the loopback.
    """
    name = node_name()
    with suppress(OSError):
        for *_, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            number = ip_address(str(address[0]).partition("%")[0])
            if not number.is_loopback and not number.is_link_local:
                return str(number), name
    # Connecting a datagram socket sends nothing, and shows which address the route to another host begins at. These
    # two addresses are reserved for documentation.
    for family, distant in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect((distant, 9))
            local_address = str(route.getsockname()[0])
            return local_address, f"[{local_address}]" if ":" in local_address else local_address
    return "127.0.0.1", "127.0.0.1"


@cache
def packages() -> dict[str, str]:
    """Returns {distribution: version} of everything importable here, sorted by name: the environment lock."""
    # Vendored packages are importable only after the import of their parent.
    distributions = (d for d in metadata.distributions() if "_vendor" not in Path(str(d.locate_file(""))).parts)
    # Each look at `metadata` parses the file again.
    fields = (distribution.metadata for distribution in distributions)
    return dict(sorted((row["Name"].lower(), row["Version"]) for row in fields if row["Name"]))


@cache
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def arithmetic() -> dict[str, str]:
    """Returns the variables of ARITHMETIC that are set."""
    return {name: os.environ[name] for name in ARITHMETIC if name in os.environ}


def device() -> dict[str, Any]:
    """Returns the device to which bitwise promises are bound. That of rank 0 counts for all: a run is homogeneous."""
    # A stage that used a GPU has loaded torch before its statement is written; any other stage ran on the CPU.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"type": "cuda", "model": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    cpu = {"type": "cpu", "model": cpu_model(), "threads_per_rank": threads}
    return cpu | ({"variables": arithmetic()} if arithmetic() else {})


def fingerprint() -> str:
    """Returns a digest of the environment: runs with equal ones must give equal bytes for bitwise stages."""
    return sha256_bytes(canonical({"python": platform.python_version(), "packages": packages(), "device": device()}))


def describe() -> dict[str, Any]:
    """Returns the environment in the form of a statement."""
    python = platform.python_version()
    return {"fingerprint": fingerprint(), "python": python, "packages": packages(), "device": device()}


def git_commit(root: Path) -> tuple[str | None, bool]:
    """Returns (commit, dirty) of the checkout that contains `root`, or from which a snapshot of its code was made.

    Returns (None, False) without a checkout, for example in a wheel.
    """
    if not (root / ".git").exists():
        stated = json_files.read_optional(root / COMMIT, _COMMIT, "the commit of the code is not recorded")
        return (stated["commit"], stated["dirty"]) if stated else (None, False)

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        # Without the lock of the index, which a killed process would leave behind.
        command = ["git", "--no-optional-locks", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return None, False
    return (head.stdout.strip() or None) if head.returncode == 0 else None, bool(status.stdout.strip())


def code_root() -> Path:
    """Returns a checkout, or the site-packages folder of a wheel."""
    return Path(pipeline.__path__[0]).parent


def machine_paths(home: Path) -> list[Path]:
    """Returns $ATOM_HOME, the code, the user's home and Python, without those that every machine has."""
    return [path for path in (home, code_root(), Path.home(), Path(sys.prefix)) if str(path) not in COMMON_PATHS]
