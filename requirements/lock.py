"""Write the lock files of this folder: exact versions and hashes, one file for each Python.

Command: `make lock`. It needs uv on the PATH and the Python package index.

`uv pip compile` resolves pyproject.toml's extra `test` for Linux within constraints.txt. The hashes are those that the
index states for every file of a version. Two things are added to what uv writes:

- The CUDA libraries, which torch from the index needs and a CPU build does not, go into cuda.lock.
- A CPU build of torch that pip finds in its own `find-links`, if any, gets an entry in torch-cpu.lock.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
CUDA = ("cuda-", "nvidia-", "triton")
HEAD = "# Written by `make lock`; docs/install.md explains it. Do not edit.\n"


def compile_lock(python: str) -> list[str]:
    """One entry a package, `name==version \\` with its hashes, in alphabetical order."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
    command += ["--extra", "test", "--constraint", "constraints.txt", "pyproject.toml"]
    command += ["--python-version", python, "--python-platform", PLATFORM]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return re.split(r"\n(?=\S)", text.rstrip("\n"))


def cpu_torch(torch: str, python: str) -> str:
    """The entry of the CPU build of this torch that pip finds without an index; empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-index"]
        command += ["--python-version", python, "--dest", folder, f"{torch}+cpu"]
        if subprocess.run(command, capture_output=True).returncode:
            return ""
        (wheel,) = Path(folder).glob("torch-*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = f'{torch}+cpu ; python_version == "{python}" --hash=sha256:{digest}'
    return f"# {wheel.name}, from the find-links of the machine that wrote this file\n{entry}\n"


def main() -> None:
    cuda: set[str] = set()
    cpu = ""
    for python in PYTHONS:
        entries = compile_lock(python)
        (torch,) = (entry.split(" ")[0] for entry in entries if entry.startswith("torch=="))
        cpu += cpu_torch(torch, python)
        libraries = {entry for entry in entries if entry.startswith(CUDA)}
        if cuda and libraries != cuda:
            sys.exit(f"Python {python} needs other CUDA libraries than Python {PYTHONS[0]}; write a cuda.lock for each")
        cuda = libraries
        lines = [entry for entry in entries if entry not in libraries]
        (HERE / f"py{python.replace('.', '')}.lock").write_text(HEAD + "\n".join(lines) + "\n")
    (HERE / "cuda.lock").write_text(HEAD + "\n".join(sorted(cuda)) + "\n")
    if cpu:
        (HERE / "torch-cpu.lock").write_text(HEAD + cpu)


if __name__ == "__main__":
    main()
